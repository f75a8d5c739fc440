"""The graph scorer: symmetries, how far messages reach, and what it learns that one weight alone cannot tell."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import chain, plant, write
from torch import Tensor, nn

from autosparse.masks.layers import Layer, prunable_layers
from autosparse.network.graph import Graph, Operation, trace
from autosparse.pruning.criteria import Context
from autosparse.scorers import features as features_module
from autosparse.scorers.card import OWN
from autosparse.scorers.features import DEFAULT, View, channel_index, of_weights
from autosparse.scorers.fitting import fit
from autosparse.scorers.gnn import BETWEEN, EDGE_INPUTS, KINDS, GNNScorer, batch, network_data, node_inputs
from autosparse.scorers.kinds import kind_for
from autosparse.scorers.records import read_record
from autosparse.scorers.rows import FitSettings, Rows, as_signals, open_source
from autosparse.scorers.scorer import Scorer

torch.set_num_threads(1)

Given = dict[str, dict[str, Tensor]]
# Layer and channels of all kinds, none with scales over the network.
LOCAL = ("weight", "log_abs_weight", "gradient", "log_abs_gradient", "growth", "out_weight_scale", "in_saliency_scale")


class Net(nn.Module):
    """Plain, grouped, depthwise, transposed and linear layers; a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.back = nn.Conv2d(6, 4, 1)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.back(torch.relu(self.depthwise(self.grouped(x))))
        return self.out(self.up(x).mean((2, 3)))


torch.manual_seed(0)
_NET = Net()
LAYERS = prunable_layers(_NET)
GRAPH = trace(_NET, torch.randn(1, 2, 8, 8))


def draw(seed: int = 0, layers: dict[str, Layer] | None = None) -> Given:
    generator = torch.Generator().manual_seed(seed)
    return {
        s: {n: torch.randn(layer.shape, generator=generator) for n, layer in (layers or LAYERS).items()}
        for s in ("weight", "gradient")
    }


def network(features: tuple[str, ...] = DEFAULT, rounds: int = 3, outputs: int = 2, seed: int = 0) -> GNNScorer:
    torch.manual_seed(seed)
    return GNNScorer(len(of_weights(features)), node_inputs(features), outputs, width=16, rounds=rounds).eval()


@torch.no_grad()
def outputs(model: GNNScorer, view: View) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    at: dict[str, int] = {}
    for name, start, stop, values in model.outputs(view):
        assert start == at.get(name, 0)
        at[name] = stop
        found.setdefault(name, []).append(values)
    assert at == {n: layer.shape[0] for n, layer in view.layers.items()}
    return {n: torch.cat(parts).view(*view.layers[n].shape, -1) for n, parts in found.items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


# -- what it sees -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [7, 1 << 14])
def test_statistics_are_means_and_deviations_of_features(
    masked: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weights that are left: over channels and layers, whatever the kind, in any number of chunks."""
    monkeypatch.setattr(features_module, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(5)
    masks = {n: torch.rand(layer.shape, generator=generator) < 0.6 for n, layer in LAYERS.items()}
    view = View.of(DEFAULT, LAYERS, draw(), GRAPH, masks if masked else None)
    data, names = network_data(view), of_weights(DEFAULT)
    for side, stats, owner in (("out", data.out_stats, data.out_layer), ("in", data.in_stats, data.in_layer)):
        wanted, owners = [], []
        for i, (name, layer) in enumerate(LAYERS.items()):
            rows = view.rows(name, 0, layer.shape[0], names)
            along = channel_index(layer, side).expand(layer.shape).flatten()
            kept = masks[name].flatten() if masked else torch.ones(layer.numel, dtype=torch.bool)
            for channel in range(int(along.max()) + 1):
                own = rows[kept & (along == channel)]
                mean = own.mean(0) if len(own) else torch.zeros(len(names))
                std = own.std(0, correction=0) if len(own) else torch.zeros(len(names))
                wanted.append(torch.cat([mean, std]))
                owners.append(i)
            if side == "out":
                own = rows[kept]
                torch.testing.assert_close(
                    data.x[i, -2 * len(names) :],
                    torch.cat([own.mean(0), own.std(0, correction=0)]),
                    rtol=1e-4,
                    atol=1e-5,
                )
        torch.testing.assert_close(stats, torch.stack(wanted), rtol=1e-4, atol=1e-5)
        assert owner.tolist() == owners
    torch.testing.assert_close(data.x[:, len(KINDS) : len(KINDS) + view.nodes().shape[1]], view.nodes())
    assert data.x[:, : len(KINDS)].argmax(1).tolist() == [0, 0, 0, 0, 1, 2] and data.x.shape[1] == node_inputs(DEFAULT)


def test_what_is_pruned_does_not_count() -> None:
    given = draw()
    masks = {n: torch.rand(layer.shape) < 0.6 for n, layer in LAYERS.items()}
    noisy = {s: {n: torch.where(masks[n], t, 1e3) for n, t in by.items()} for s, by in given.items()}
    a, b = (network_data(View.of(DEFAULT, LAYERS, g, GRAPH, masks)) for g in (given, noisy))
    for key in ("x", "out_stats", "in_stats"):
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4)


def test_edges_go_both_ways_and_say_what_lies_between() -> None:
    data = network_data(View.of(DEFAULT, LAYERS, draw(), GRAPH))
    names = [n.removesuffix(".weight") for n in LAYERS]
    kinds = [*BETWEEN, "back"]
    found = {
        (names[a], names[b]): {kind for kind, value in zip(kinds, row, strict=True) if value}
        for (a, b), row in zip(data.edge_index.T.tolist(), data.edge_attr.tolist(), strict=True)
    }
    forth = {
        ("stem", "grouped"): {"activation"},
        ("grouped", "depthwise"): set(),
        ("depthwise", "back"): {"activation"},
        ("stem", "up"): {"activation", "add"},
        ("back", "up"): {"add"},
        ("up", "out"): {"pool"},
    }
    assert found == {**forth, **{(b, a): {*kinds, "back"} for (a, b), kinds in forth.items()}}


def test_operations_that_have_no_name_of_their_own_are_other() -> None:
    operations = [
        Operation("input", "", (), (), (1,)),
        Operation("linear", "", (0,), ("a",), (1,), weights=("a",)),
        Operation("conv", "", (0, 1), (), (1,)),  # a convolution with an activation as its kernel
        Operation("softmax", "", (2,), (), (1,)),
        Operation("linear", "", (3,), ("b",), (1,), weights=("b",)),
        Operation("linear", "", (4,), ("b",), (1,), weights=("b",)),  # an edge to itself tells nothing
    ]
    layers = {n: Layer(n, "linear", (2, 2)) for n in ("a", "b")}
    data = network_data(View.of(LOCAL, layers, draw(0, layers), Graph(tuple(operations))))
    assert data.edge_index.tolist() == [[0, 1], [1, 0]]
    assert {BETWEEN[i] for i in data.edge_attr[0].nonzero().flatten().tolist()} == {"other", "attention"}


# -- symmetries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["stem.weight", "back.weight", "out.weight"])
def test_permuting_channels_permutes_scores(name: str, dim: int) -> None:
    model, given = network(), draw()
    order = torch.arange(LAYERS[name].shape[dim]).roll(1)
    moved = {s: {**by, name: by[name].index_select(dim, order)} for s, by in given.items()}
    before, after = (outputs(model, View.of(DEFAULT, LAYERS, g, GRAPH)) for g in (given, moved))
    close(after, {**before, name: before[name].index_select(dim, order)})
    assert not torch.allclose(before[name], before[name].index_select(dim, order), atol=1e-3)


def test_permuting_groups_permutes_scores() -> None:
    """Within a group outputs are exchangeable, and whole groups are."""
    model, given = network(), draw()
    for order in ([2, 0, 1, 3, 4, 5], [3, 4, 5, 0, 1, 2]):
        moved = {s: {**by, "grouped.weight": by["grouped.weight"][order]} for s, by in given.items()}
        before, after = (outputs(model, View.of(DEFAULT, LAYERS, g, GRAPH)) for g in (given, moved))
        close(after, {**before, "grouped.weight": before["grouped.weight"][order]})


def test_the_order_of_layers_plays_no_part() -> None:
    model, given = network(), draw()
    before = outputs(model, View.of(DEFAULT, LAYERS, given, GRAPH))
    other = {n: LAYERS[n] for n in sorted(LAYERS, reverse=True)}
    after = outputs(model, View.of(DEFAULT, other, given, GRAPH))
    close({n: after[n] for n in before}, before)
    assert list(after) == list(other)


@pytest.mark.parametrize("chunk", [1, 11, 100])
def test_chunks_give_what_the_whole_gives(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, view = network(), View.of(DEFAULT, LAYERS, draw(), GRAPH)
    whole = outputs(model, view)
    monkeypatch.setattr(features_module, "CHUNK", chunk)
    assert sum(1 for _ in model.outputs(view)) > len(LAYERS)
    close(outputs(model, view), whole)


# -- messages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_messages_reach_as_many_layers_as_there_are_rounds(rounds: int) -> None:
    layers = {n: Layer(n, "linear", (5, 5)) for n in "abcde"}
    model, given = network(LOCAL, rounds), draw(0, layers)
    other = {s: dict(by) for s, by in given.items()}
    other["weight"]["c"] = given["weight"]["c"] ** 3  # of another distribution, whatever the scale
    before, after = (outputs(model, View.of(LOCAL, layers, g, chain("abcde"))) for g in (given, other))
    for name in layers:
        change = float((after[name] - before[name]).abs().max())
        distance = abs("abcde".index(name) - 2)
        assert change > 1e-5 if distance <= rounds else change == 0, (name, change)


def test_a_message_tells_its_direction_and_what_it_passed() -> None:
    layers = {n: Layer(n, "linear", (5, 5)) for n in "ab"}
    model, given = network(LOCAL, 1), draw(0, layers)
    names = ("a", "b")
    forth, back = (outputs(model, View.of(LOCAL, layers, given, chain(order))) for order in (names, names[::-1]))
    assert (forth["a"] - back["a"]).abs().max() > 1e-5
    plain = Graph(
        (
            Operation("input", "", (), (), (1,)),
            Operation("linear", "", (0,), ("a",), (1,), weights=("a",)),
            Operation("linear", "", (1,), ("b",), (1,), weights=("b",)),
        )
    )
    without = outputs(model, View.of(LOCAL, layers, given, plain))
    assert (forth["b"] - without["b"]).abs().max() > 1e-5


def test_networks_without_edges() -> None:
    layers = {"w": Layer("w", "linear", (3, 4))}
    for graph in (chain("w"), Graph(chain("w").operations[:2])):
        view = View.of(DEFAULT, layers, draw(0, layers), graph)
        assert network_data(view).edge_attr.shape == (0, EDGE_INPUTS)
        assert torch.isfinite(outputs(network(), view)["w"]).all()


@pytest.mark.parametrize("graph", [None, Graph(chain("a").operations)])
def test_an_unknown_graph_is_taken_as_a_chain(graph: Graph | None) -> None:
    layers = {n: Layer(n, "linear", (2, 2)) for n in "abc"}
    view = View.of(LOCAL, layers, draw(0, layers), graph)
    with pytest.warns(UserWarning, match="graph is not known: its layers are taken as a chain"):
        data = network_data(view)
    assert data.edge_index.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert data.edge_attr[:, :-1].sum() == 0 and data.edge_attr[:, -1].tolist() == [0, 1, 0, 1]


def test_a_known_graph_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network_data(View.of(LOCAL, LAYERS, draw(), GRAPH))


@pytest.mark.parametrize("what", ["weight", "gradient", "mask"])
def test_degenerate_layers_give_finite_outputs(what: str) -> None:
    given, masks = draw(), None
    if what == "mask":
        masks = {n: torch.full(layer.shape, n != "back.weight") for n, layer in LAYERS.items()}
        given["weight"]["back.weight"].zero_()
    else:
        given[what]["back.weight"].zero_()
    found = outputs(network(), View.of(DEFAULT, LAYERS, given, GRAPH, masks))
    assert all(torch.isfinite(values).all() for values in found.values())


# -- training -----------------------------------------------------------------------------------------------------------


def test_training_sees_what_scoring_sees(tmp_path: Path) -> None:
    """Two networks in one batch, rows in any order: the outputs of each weight are those of its own network alone."""
    paths = [
        write(tmp_path / "a.h5", LAYERS, numpy(draw(1)), numpy(draw(1))["weight"], graph=GRAPH),
        plant(tmp_path / "b.h5", 2, sizes=((6, 5), (4, 6, 3, 3))),
    ]
    settings = FitSettings(scorer="gnn", batch_size=10**6, records_per_step=2)
    part = Rows([open_source(p, DEFAULT, kind=kind_for("gnn")) for p in paths], of_weights(DEFAULT), settings, 2)
    model = network()
    (table,) = part.epoch(part.load(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = [source.data for source in part.sources]
        found = kind_for("gnn").predict(model, table, data, torch.device("cpu"))
    for owner, path in enumerate(paths):
        record = read_record(path)
        view = View.of(DEFAULT, record.layers, as_signals(record), record.graph())
        scores = outputs(model, view)
        rows = {n: view.rows(n, 0, layer.shape[0], of_weights(DEFAULT)) for n, layer in record.layers.items()}
        for i, name in enumerate(record.layers):
            mine = (table.owner == owner) & (table.place[:, 0] == i)
            x, order = rows[name], table.x[mine]
            where = torch.cdist(order.double(), x.double()).argmin(1)
            assert len(where.unique()) == len(x)
            torch.testing.assert_close(order, x[where])
            torch.testing.assert_close(found[mine], scores[name].flatten(0, -2)[where], rtol=1e-4, atol=1e-5)


def numpy(given: Given) -> dict[str, dict[str, np.ndarray]]:
    return {s: {n: t.numpy() for n, t in by.items()} for s, by in given.items()}


def test_batches_keep_networks_apart() -> None:
    small = {n: Layer(n, "linear", (3, 4)) for n in "ab"}
    datas = [
        network_data(View.of(DEFAULT, LAYERS, draw(), GRAPH)),
        network_data(View.of(DEFAULT, small, draw(0, small), chain("ab"))),
    ]
    model = network()
    with torch.no_grad():
        together = model.encode(batch(datas))
        alone = [model.encode(data) for data in datas]
    for value, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(value, torch.cat(parts), rtol=1e-4, atol=1e-5)


WEIGHTS = ("weight", "gradient")
QUICK = FitSettings(epochs=20, batch_size=1024, lr=1e-2, features=WEIGHTS, validation="none")


def auc(scorer: str, paths: list[Path], rounds: int = 1, **values: object) -> float:
    options = {"mlp": {"hidden": (32, 32)}, "gnn": {"width": 16, "rounds": rounds}}[scorer]
    return fit(paths, replace(QUICK, scorer=scorer, options=options, **values)).card.test[OWN]["auc"]


def test_the_mean_of_a_channel_is_learned_by_the_graph_network_alone(tmp_path: Path) -> None:
    """A weight survives by the mean gradient of its output channel, which each gradient tells little of."""
    paths = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        layers = {n: Layer(n, "linear", (24, 24)) for n in ("a", "b")}
        mean = {n: rng.normal(size=(24, 1)) for n in layers}
        gradient = {n: 0.5 * mean[n] + rng.normal(size=(24, 24)) for n in layers}
        weight = {n: rng.normal(size=(24, 24)) for n in layers}
        worth = {n: gradient[n].mean(1, keepdims=True) + 1e-6 * rng.normal(size=(24, 24)) for n in layers}
        signals = {"weight": weight, "gradient": gradient}
        paths.append(write(tmp_path / f"{seed}.h5", layers, signals, worth, seed=seed, graph=chain("ab")))
    assert auc("gnn", paths, epochs=10) > 0.97
    assert auc("mlp", paths, epochs=10) < 0.8


def test_what_the_neighbour_is_like_is_learned_by_the_graph_network_alone(tmp_path: Path) -> None:
    """A layer survives where the layer before it has weights of two values only; nothing of its own tells."""
    paths = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        names = "abcdef"
        layers = {n: Layer(n, "linear", (8, 8)) for n in names}
        flat = rng.random(len(names)) < 0.5
        flat[0], flat[3] = True, False
        weight = {
            n: np.sign(rng.normal(size=(8, 8))) * (1 if flat[i] else np.abs(rng.normal(size=(8, 8))))
            for i, n in enumerate(names)
        }
        worth = {n: (flat[i - 1] if i else False) + 0.01 * rng.random((8, 8)) for i, n in enumerate(names)}
        signals = {"weight": weight, "gradient": {n: rng.normal(size=(8, 8)) for n in names}}
        density = sum(flat[:-1]) / len(names)
        paths.append(
            write(tmp_path / f"{seed}.h5", layers, signals, worth, densities=(density,), seed=seed, graph=chain(names))
        )
    features = ("weight", "log_abs_weight")
    assert auc("gnn", paths, features=features) > 0.9
    assert auc("mlp", paths, features=features) < 0.75
    assert auc("gnn", paths, features=features, rounds=0) < 0.75, "without messages it cannot know either"


def test_scores_go_with_masks(tmp_path: Path) -> None:
    """In a second step what is pruned already says nothing, whatever its gradient."""
    model = network(DEFAULT, outputs=1)
    scorer = Scorer("gnn", model, "mse", DEFAULT, 1, 8, {"width": 16, "rounds": 3})
    given = draw()
    masks = {n: torch.rand(layer.shape) < 0.5 for n, layer in LAYERS.items()}
    noisy = {s: {n: torch.where(masks[n], t, 100.0) for n, t in by.items()} for s, by in given.items()}
    a, b = (scorer(g, Context(LAYERS, 0.1, GRAPH, masks)) for g in (given, noisy))
    for name in LAYERS:
        torch.testing.assert_close(a[name][masks[name]], b[name][masks[name]], rtol=1e-3, atol=1e-4)
