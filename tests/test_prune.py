"""`prune`: criterion × schedule × scope × granularity on networks of all kinds."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data

import autosparse
from autosparse import NM, AutoSparseError, Channel, Masks, Preset, prune
from autosparse.errors import AutoSparseFailure
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.network import flow_rules, reachability
from autosparse.network.signals import measure
from autosparse.pruning.criteria import CRITERIA, PRESETS, Context, Scores

Guard = Callable[[nn.Module], AbstractContextManager[None]]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def pairs(*sizes: int, shape: tuple[int, ...] = (8,)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(n, *shape, generator=generator), torch.arange(n) % 4) for n in sizes]


@dataclass
class Recorder:
    """A criterion that notes what it is given."""

    name: str = "recorder"
    signals: tuple[str, ...] = ("weight", "gradient")
    n_batches: int = 2

    def __post_init__(self) -> None:
        self.calls: list[tuple[dict, Context]] = []

    def __call__(self, signals: dict, context: Context) -> Scores:
        self.calls.append((signals, context))
        return {n: (w * signals["gradient"][n]).abs() for n, w in signals["weight"].items()}


def test_snip_keeps_the_highest_products() -> None:
    model, batches = mlp(), pairs(12, 5)
    masks = prune(model, 0.75, "snip", batches=batches)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    flat = torch.cat([(model[i].weight * model[i].weight.grad).abs().flatten() for i in (0, 2)])
    cut = flat.sort(descending=True).values[round(0.25 * flat.numel()) - 1]
    assert torch.equal(torch.cat([masks["0.weight"].flatten(), masks["2.weight"].flatten()]), flat >= cut)


def test_n_batches_of_snip_are_the_mean_over_samples() -> None:
    model, batches = mlp(), pairs(6, 2, 4)
    whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    assert prune(model, 0.5, "snip", batches=batches, n_batches=3) == prune(model, 0.5, "snip", batches=whole)
    assert prune(model, 0.5, "snip", batches=batches) == prune(model, 0.5, "snip", batches=batches[:1])


def test_steps_measure_again_on_what_is_left() -> None:
    model, rule = mlp(), Recorder()
    masks = prune(model, 0.75, rule, batches=pairs(4, 4, 4), steps=3)
    assert masks.kept == 48
    assert [c.density for _, c in rule.calls] == pytest.approx([0.25 ** (1 / 3), 0.25 ** (2 / 3), 0.25])
    earlier = [c.masks for _, c in rule.calls]
    assert earlier[0] is None
    for (signals, _), before in zip(rule.calls[1:], earlier[1:], strict=True):
        for name, mask in before.items():
            assert (signals["weight"][name][~mask] == 0).all()
            assert (signals["weight"][name][mask] != 0).all()
    assert [sum(int(m.sum()) for m in e.values()) for e in earlier[1:]] == [
        round(192 * 0.25 ** (t / 3)) for t in (1, 2)
    ]
    assert all((masks[n] <= earlier[2][n]).all() and (earlier[2][n] <= earlier[1][n]).all() for n in masks)
    found = measure(model, prunable_layers(model), ("gradient",), batches=pairs(4, 4), masks=earlier[2])
    assert all(torch.equal(g, rule.calls[2][0]["gradient"][n]) for n, g in found["gradient"].items())
    assert masks.report.origin["images"] == 24 and masks.report.origin["n_batches"] == 2


def test_what_a_step_removed_stays_removed() -> None:
    """Even where a criterion would have it back: this one ranks anew in every step."""

    @dataclass
    class Fickle(Recorder):
        def __call__(self, signals: dict, context: Context) -> Scores:
            super().__call__(signals, context)
            generator = torch.Generator().manual_seed(len(self.calls))
            return {n: torch.rand(w.shape, generator=generator) for n, w in signals["weight"].items()}

    rule = Fickle()
    masks = prune(mlp(), 0.75, rule, batches=pairs(4), steps=4)
    before = [c.masks for _, c in rule.calls[1:]]
    for earlier, later in zip(before, [*before[1:], masks], strict=True):
        assert all((later[n] <= earlier[n]).all() for n in masks)
    assert masks.kept == 48


def test_batches_are_drawn_once_for_all_steps() -> None:
    masks = prune(mlp(), 0.5, "snip", batches=iter(pairs(4, 4)), steps=4)
    assert masks == prune(mlp(), 0.5, "snip", batches=pairs(4, 4), steps=4)


def test_a_criterion_sees_layers_graph_and_seed() -> None:
    rule = Recorder()
    prune(mlp(), 0.5, rule, batches=pairs(4), seed=5)
    context = rule.calls[0][1]
    assert list(context.layers) == ["0.weight", "2.weight"] and context.seed == 5
    assert context.graph is not None and context.graph.layers() == ("0.weight", "2.weight")


def test_presets_bring_their_scope_and_arguments_win() -> None:
    def counts(**options) -> list[int]:
        return [l.kept for l in prune(mlp(), 0.5, "random", seed=3, **options).layers()]

    assert counts() == [64, 32]
    assert counts(scope="erk") != [64, 32] and sum(counts(scope="erk")) == 96
    assert prune(mlp(), 0.5, "erk", seed=3) == prune(mlp(), 0.5, "random", scope="erk", seed=3)
    assert prune(mlp(), 0.5, "erk").report.origin["scope"] == "erk"


def test_what_is_no_model_or_criterion_is_told() -> None:
    model = nn.Linear(4, 4)
    wrong: list[Any] = [model.state_dict(), None, nn.Linear]
    for one in wrong:
        with pytest.raises(AutoSparseError, match=r"model is '.*': give a torch\.nn\.Module, not its class or state"):
            prune(one, 0.5)
    with pytest.raises(AutoSparseError, match="criterion is 'snip': a Preset holds a criterion with name"):
        prune(model, 0.5, Preset("snip", scope="erk"))  # type: ignore[arg-type]


def test_two_of_four() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    batches = pairs(4, shape=(3, 5, 5))
    for steps in (1, 3):
        masks = prune(model, None, "snip", granularity="2:4", batches=batches, steps=steps)
        assert masks.report.dense_layers == ("0.weight",)
        assert masks["0.weight"].all()
        assert (masks["2.weight"].movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
        assert (masks["4.weight"].view(-1, 4).sum(1) == 2).all()
    assert prune(model, 0.5, "magnitude", granularity=NM(2, 4)) == prune(model, None, "magnitude", granularity="2:4")
    with pytest.raises(AutoSparseError, match=r"sparsity is 0\.9, but 2:4 sets 0\.5: give that"):
        prune(model, 0.9, "magnitude", granularity="2:4")


def test_steps_towards_a_pattern_go_through_patterns() -> None:
    """Densities 0.71, 0.5, 0.35 and 0.25 of 4 are 3:4, 2:4, 2:4 and 1:4."""
    rule = Recorder()
    masks = prune(mlp(), None, rule, granularity="1:4", batches=pairs(16), steps=4)
    before = [c.masks for _, c in rule.calls[1:]]
    assert [sum(int(m.sum()) for m in earlier.values()) for earlier in before] == [144, 96, 96]
    assert masks.kept == 48
    for earlier, later in zip(before, [*before[1:], masks], strict=True):
        assert all((later[n] <= earlier[n]).all() for n in masks)


def test_channels_of_several_sizes_say_what_they_keep() -> None:
    masks = prune(mlp(), 0.5, "magnitude", granularity=Channel(), floor=0.05)
    for mask in masks.values():
        assert (mask.all(1) | ~mask.any(1)).all()
    assert abs(masks.kept - 96) <= 8
    assert masks.kept == 96 or f"whole channels keep {masks.kept} weights; 96 were asked for" in masks.report.notes


def test_include_exclude_and_floor() -> None:
    model = mlp()
    assert list(prune(model, 0.5, "magnitude", include=["2.*"])) == ["2.weight"]
    assert list(prune(model, 0.5, "magnitude", exclude="2.*")) == ["0.weight"]
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    masks = prune(model, 0.75, "magnitude", floor=0.1)
    assert [l.kept for l in masks.layers()] == [13, 35]


# -- all kinds of networks ---------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """An embedding, attention, a raw operand, positions, a tied weight and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.frozen = nn.Linear(8, 4)
        self.frozen.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.two(torch.relu(self.one(x))) @ self.mix
        return self.frozen(x.mean(1))


def test_embeddings_attention_operands_ties_and_frozen_weights(unchanged: Guard) -> None:
    torch.manual_seed(0)
    model = Everything()
    batches = [(torch.randint(11, (6, 5)), torch.arange(6) % 4)]
    with unchanged(model):
        masks = prune(model, 0.5, "snip", batches=batches)
    names = ["mix", "attention.in_proj_weight", "attention.out_proj.weight", "one.weight", "frozen.weight"]
    assert sorted(masks) == sorted(names)
    assert masks.total == 64 + 192 + 64 + 64 + 32 and masks.kept == masks.total / 2
    masks.apply_(model)
    assert torch.equal(model.two.weight != 0, masks["one.weight"])


CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(4, 8, 3), (4, 6)),
    "conv3d": (nn.Conv3d(4, 8, 2), (4, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 8, 3), (4, 3, 3)),
    "grouped transposed": (nn.ConvTranspose2d(4, 8, 3, groups=2), (4, 3, 3)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
}


@pytest.mark.parametrize("granularity", [None, "channel", "block2x2"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind: str, granularity: str | None, unchanged: Guard) -> None:
    conv, shape = CONVOLUTIONS[kind]
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))
    with unchanged(model):
        masks = prune(model, 0.5, "snip", batches=pairs(8, shape=shape), granularity=granularity, floor=0.05)
    assert masks["0.weight"].shape == conv.weight.shape
    assert granularity is not None or masks.kept == round(0.5 * masks.total)


@pytest.mark.parametrize("criterion", ["snip", "magnitude", "random"])
def test_bfloat16(criterion: str, unchanged: Guard) -> None:
    model = mlp().bfloat16()
    batches = [(x.bfloat16(), y) for x, y in pairs(8)]
    with unchanged(model):
        masks = prune(model, 0.5, criterion, batches=batches)
    assert masks.kept == 96


def test_wrapped_models_have_the_names_of_the_inner_one() -> None:
    model = mlp()
    assert prune(torch.compile(model), 0.5, "snip", batches=pairs(4)) == prune(model, 0.5, "snip", batches=pairs(4))


# -- the report ------------------------------------------------------------------------------------------------------


def test_the_report_tells_where_the_mask_comes_from(tmp_path: Path) -> None:
    masks = prune(mlp(), np.float32(0.5), "snip", batches=pairs(6, 4), n_batches=2, steps=np.int64(2), seed=np.int64(3))
    assert masks.report.origin == {
        "criterion": "snip",
        "sparsity": 0.5,
        "scope": "global",
        "granularity": "unstructured",
        "channels": 1.0,
        "steps": 2,
        "n_batches": 2,
        "images": 20,
        "floor": 0.0,
        "seed": 3,
    }
    masks.save(tmp_path / "m.safetensors")
    assert Masks.load(tmp_path / "m.safetensors").report == masks.report


def test_dead_layers_are_named() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    with pytest.warns(UserWarning) as seen:
        masks = prune(model, 0.5, "magnitude", example_input=torch.ones(1, 8))
    assert [str(w.message).split(": ", 1)[1] for w in seen] == [
        "2 of 2 layers are dead (0.weight, 2.weight); set floor, or take another scope",
        "no path from input to output is left; lower the sparsity, set floor, or take another scope",
    ]
    assert seen[0].filename == __file__
    assert masks.report.dead_layers == ("0.weight", "2.weight")
    assert masks.report.effective_sparsity == 1
    with pytest.warns(UserWarning, match=r"1 of 2 layers are dead \(2\.weight\)"):
        masks = prune(model, 0.5, "magnitude")
    assert masks.report.dead_layers == ("2.weight",) and masks.report.effective_sparsity is None
    assert any("no example_input" in note for note in masks.report.notes)


def test_ties_are_warned_of() -> None:
    model = mlp()
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight.fill_(0.5)
    with pytest.warns(UserWarning, match=r"100\.0% of the weights tie at the cut"):
        masks = prune(model, 0.5, "magnitude", example_input=torch.ones(1, 8))
    assert masks.kept == 96 and masks.report.ties == 1


def test_nothing_is_warned_of_without_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prune(mlp(), 0.0, "snip", batches=pairs(4)).sparsity == 0
        assert prune(mlp(), 0.5, "snip", batches=pairs(4)).report.notes == ()


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "snap"}, "criterion is 'snap': did you mean 'snip'"),
        ({"sparsity": 1.0}, r"sparsity is 1\.0"),
        ({"sparsity": 95}, r"sparsity is 95: .*0\.95 keeps 5 %"),
        ({"sparsity": None}, "sparsity is None: give the share"),
        ({"steps": 0}, "steps is 0"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        ({"scope": "layer"}, "scope is 'layer'"),
        ({"granularity": "2x4"}, "granularity is '2x4'"),
        ({"floor": 0.9}, r"floor 0\.9 needs"),
        ({"n_batches": 0}, "n_batches is 0: give a whole number of at least 1"),
        ({"n_batches": 1.5}, r"n_batches is 1\.5"),
        ({"batches": None}, "criterion 'snip' needs gradients: give batches"),
        ({"batches": []}, "batches are empty"),
        ({"batches": [(torch.ones(2, 9), torch.tensor([0, 1]))]}, r"Sequential cannot .*\(2, 9\)"),
        ({"include": ["conv*"]}, r"include pattern 'conv\*' matches no"),
        ({"model": nn.ReLU()}, "ReLU has no prunable weights"),
        ({"model": nn.Sequential(nn.LazyLinear(4))}, "is uninitialized: run the lazy model once"),
    ],
    ids=str,
)
def test_mistakes_are_named(options: dict, message: str) -> None:
    arguments = {"model": mlp(), "sparsity": 0.5, "criterion": "snip", "batches": pairs(4), **options}
    with pytest.raises(AutoSparseError, match=message):
        prune(**arguments)


def test_a_classifier_of_zeros() -> None:
    model = mlp()
    nn.init.zeros_(model[2].weight)
    with pytest.raises(AutoSparseError, match=r"all scores are zero: .*classifier initialized to zeros"):
        prune(model, 0.5, "snip", batches=pairs(4))


def test_weights_and_batches_that_are_not_finite(unchanged: Guard) -> None:
    model = mlp()
    model[0].weight.data[1, 2] = torch.nan
    for criterion in ("magnitude", "snip"):
        with pytest.raises(AutoSparseError, match=r"scores of '.*' are not finite: the weights or batches hold NaN"):
            prune(model, 0.5, criterion, batches=pairs(4))
    good = mlp()
    x, y = pairs(4)[0]
    with unchanged(good), pytest.raises(AutoSparseError, match="not finite"):
        prune(good, 0.5, "snip", batches=[(x * torch.inf, y)])


def test_a_criterion_that_scores_other_layers() -> None:
    @dataclass
    class Partial(Recorder):
        def __call__(self, signals: dict, context: Context) -> Scores:
            return {"0.weight": signals["weight"]["0.weight"].abs()}

    with pytest.raises(AutoSparseError, match=r"scores lack '2\.weight'"):
        prune(mlp(), 0.5, Partial(), batches=pairs(4))


def test_the_front_door() -> None:
    assert set(autosparse.__all__) <= set(dir(autosparse))
    assert all(getattr(autosparse, name) is not None for name in autosparse.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'prun'"):
        autosparse.prun  # noqa: B018
    assert isinstance(Layer("a", "linear", (2, 2)).fan_in, int) and CRITERIA["snip"].n_batches == 1


# ---------------------------------------------------------------------------------------------------------------------
# Whatever the model takes


@dataclasses.dataclass(frozen=True)
class Given:
    x: Tensor
    more: dict[str, list[Tensor]]


@dataclasses.dataclass
class Made:
    logits: Tensor


class Takes(nn.Module):
    """Two or three layers in a forward pass of any signature."""

    def __init__(self, run: Callable[..., Any], a: nn.Module, b: nn.Module, table: nn.Module | None = None) -> None:
        super().__init__()
        self.run, self.a, self.b, self.table = run, a, b, table

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.run(self, *inputs, **named)


def graph_net(m: Takes, x: Tensor, edges: Tensor) -> Tensor:
    source, target = edges
    h = m.a(x).relu()
    return m.b(torch.zeros_like(h).index_add(0, target, h[source]))


def images(m: Takes, listed: list[Tensor]) -> Tensor:
    assert type(listed) is list
    return m.b(torch.stack([m.a(image[None]).relu().mean((0, 2, 3)) for image in listed]))


EDGES = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
FORMS: dict[str, tuple[Callable[[], Takes], Any]] = {
    "recurrent states": (
        lambda: Takes(
            lambda m, x, state: m.b(m.a(m.table(x), state)[0][:, -1]),
            nn.LSTM(4, 4, batch_first=True),
            nn.Linear(4, 3),
            nn.Embedding(9, 4),
        ),
        (torch.arange(35).view(5, 7) % 9, (torch.zeros(1, 5, 4), torch.zeros(1, 5, 4))),
    ),
    "attention mask": (
        lambda: Takes(
            lambda m, x, mask: m.b(m.a(x, mask).mean(1)),
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            nn.Linear(4, 3),
        ),
        (torch.linspace(-1, 1, 120).view(5, 6, 4), torch.zeros(6, 6)),
    ),
    "positions without batch": (
        lambda: Takes(
            lambda m, x, at: m.b((m.a(x) + m.table(at)).relu().mean(1)), *map(nn.Linear, (4, 4, 2), (4, 3, 4))
        ),
        (torch.linspace(-1, 1, 120).view(5, 6, 4), torch.linspace(0, 1, 12).view(6, 2)),
    ),
    "graph": (
        lambda: Takes(graph_net, nn.Linear(4, 4), nn.Linear(4, 3)),
        (torch.linspace(-1, 1, 20).view(5, 4), EDGES),
    ),
    "Data": (
        lambda: Takes(lambda m, d: graph_net(m, d.x, d.edge_index), nn.Linear(4, 4), nn.Linear(4, 3)),
        Data(x=torch.linspace(-1, 1, 20).view(5, 4), edge_index=EDGES),
    ),
    "list of images": (
        lambda: Takes(images, nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)),
        [torch.linspace(-1, 1, 3 * 6 * n).view(3, 6, n) for n in (5, 6, 7, 6, 6)],
    ),
    "dataclass": (
        lambda: Takes(lambda m, g: Made(m.b(m.a(g.x).relu() + g.more["y"][0])), nn.Linear(4, 4), nn.Linear(4, 3)),
        Given(torch.linspace(-1, 1, 20).view(5, 4), {"y": [torch.zeros(5, 4)]}),
    ),
    "keywords": (
        lambda: Takes(lambda m, x, y: m.b(m.a(x["x"]).relu() + y), nn.Linear(4, 4), nn.Linear(4, 3)),
        {"x": {"x": torch.linspace(-1, 1, 20).view(5, 4)}, "y": torch.zeros(5, 4)},
    ),
}
SCORED = [n for n, p in PRESETS.items() if not any("@" in signal for signal in p.criterion.signals)] + ["autosparse"]


@pytest.mark.parametrize("form", FORMS)
def test_every_criterion_takes_what_the_model_takes(form: str, unchanged: Guard) -> None:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(getattr(outputs, "logits", outputs), targets)

    make, inputs = FORMS[form]
    torch.manual_seed(1)
    model = make()
    for name in SCORED:
        with warnings.catch_warnings(), unchanged(model):
            warnings.simplefilter("ignore")
            masks = prune(model, 0.25, name, batches=[(inputs, torch.arange(5) % 3)], loss=loss, steps=2, n_batches=1)
        assert masks.kept == round(0.75 * masks.total), name
        assert masks.report.effective_sparsity is not None, name
        assert not masks.report.dead_layers, name
    from_one, from_all = (
        prune(model, 0.25, "synflow", steps=2, **given)
        for given in ({"example_input": inputs}, {"batches": [(inputs, torch.arange(5) % 3)]})
    )
    assert all(torch.equal(from_one[name], from_all[name]) for name in from_one)


def test_a_refusal_shows_the_shapes_that_were_given() -> None:
    with pytest.raises(AutoSparseError, match=r"example_input of shape \(7, 9\)"):
        prune(mlp(), 0.5, "magnitude", example_input=torch.zeros(7, 9))
    with pytest.raises(AutoSparseError, match=r"of shape \[\(7, 8\), \(3, 8\)\].*several arguments as a tuple"):
        prune(mlp(), 0.5, "magnitude", example_input=[torch.zeros(7, 8), torch.zeros(3, 8)])
    with pytest.raises(AutoSparseError, match=r"cannot take batches of type list with shapes \[\(7, 8\), \(3, 8\)\]"):
        prune(
            mlp(),
            0.5,
            "snip",
            batches=[([torch.zeros(7, 8), torch.zeros(3, 8)], torch.zeros(7).long())],
            example_input=torch.zeros(1, 8),
        )


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
    ),
]


def test_densities_of_one_criterion_and_positions_of_another() -> None:

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [(torch.randn(16, 8), torch.arange(16) % 4)]
    synflow = autosparse.prune(model, 0.7, "synflow", batches=batches)
    for given in (batches, iter(batches), itertools.cycle(batches)):
        masks = autosparse.prune(model, 0.7, "snip", batches=given, scope="densities:synflow")
        assert [layer.kept for layer in masks.layers()] == [layer.kept for layer in synflow.layers()] != [128, 64]
        assert masks != synflow
    for preset in ("random_synflow", "spread_synflow"):
        masks = autosparse.prune(model, 0.7, preset, batches=batches)
        assert [layer.kept for layer in masks.layers()] == [layer.kept for layer in synflow.layers()]
    snip = autosparse.prune(model, 0.7, "random_snip", batches=batches)
    assert snip.report.origin["images"] == 16, "the images that SNIP saw count"
    with pytest.raises(AutoSparseError, match="criterion 'snip' needs gradients: give batches"):
        autosparse.prune(model, 0.7, "random_snip", example_input=batches[0][0])
    with pytest.raises(AutoSparseError, match="did you mean 'synflow'"):
        autosparse.prune(model, 0.7, "snip", batches=batches, scope="densities:synflw")


def test_the_shuffle_of_a_criterion() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [(torch.randn(16, 8), torch.arange(16) % 4)]
    snip = autosparse.prune(model, 0.7, "snip", batches=batches, seed=3)
    for given in (batches, iter(batches), itertools.cycle(batches)):
        masks = autosparse.prune(model, 0.7, "densities:snip", batches=given, seed=3)
        assert masks == snip.shuffle(3) != snip
        assert masks.report.effective_sparsity is not None and masks.report.origin["criterion"] == "snip"
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches[0]), batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    autosparse.prune(model, 0.7, "densities:snip", batches=loader)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.warns(UserWarning) as warned:
        autosparse.prune(model, 0.995, "densities:snip", batches=batches)
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == len(set(messages)), "of the shuffle alone"
    assert autosparse.prune(model, 0.7, "densities:erk").sparsity == pytest.approx(0.7, abs=0.01)
    for criterion, more, message in (
        ("reinit:snip", {}, "criterion is 'reinit:snip': give 'snip', or use autosparse benchmark"),
        ("densities:snp", {}, "did you mean 'snip'"),
        ("densities:snip", {"granularity": "2:4"}, "granularity is '2:4': densities:snip chooses single weights"),
        ("densities:snip", {"granularity": "x"}, "granularity is 'x'"),
        ("densities:gmp", {}, "criterion is 'gmp': this method trains the network"),
        ("gmp", {}, "criterion is 'gmp': this method trains the network"),
    ):
        with pytest.raises(AutoSparseError, match=message):
            autosparse.prune(model, 0.7, criterion, batches=batches, **more)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_clear_error_everywhere(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.is_meta else fail()

    (x, y), *_ = pairs(3)
    failing = pytest.raises(
        AutoSparseFailure, match=r"^out of memory while .*: use smaller batches or a smaller example"
    )
    with failing:  # in the trace
        prune(Takes(lambda m, x: fail(), nn.Linear(8, 4), nn.Linear(4, 4)), 0.5, "magnitude", example_input=x)
    with failing:  # in a batch
        prune(Failing(8, 4), 0.5, "snip", batches=[(x, y)])
    with failing:  # in the loss
        prune(mlp(), 0.5, "snip", batches=[(x, y)], loss=fail)
    with monkeypatch.context() as patched, failing:  # in synaptic flow
        patched.setattr(flow_rules, "multiply", fail)
        prune(mlp(), 0.5, "synflow", example_input=x)
    with monkeypatch.context() as patched, failing:  # in reachability
        patched.setattr(reachability, "multiply", fail)
        prune(mlp(), 0.5, "magnitude", example_input=x)
    with monkeypatch.context() as patched, failing:  # in a rule of reachability
        patched.setattr(reachability, "_either_of", fail)
        prune(mlp(), 0.5, "magnitude", example_input=x)
    with monkeypatch.context() as patched, failing:  # in a backward pass
        patched.setattr(torch.autograd, "grad", fail)
        prune(mlp(), 0.5, "snip", batches=[(x, y)])


@pytest.mark.parametrize("criterion", ["synflow", "resynflow"])
def test_a_network_runs_as_often_whatever_the_steps(criterion: str) -> None:
    runs = 0

    class Counting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            return super().forward(x)

    model = Counting(*mlp())
    prune(model, 0.5, criterion, example_input=torch.zeros(1, 8), steps=1)
    once, runs = runs, 0
    prune(model, 0.5, criterion, example_input=torch.zeros(1, 8), steps=20)
    assert runs == once <= 3


def test_without_a_criterion_it_takes_narrow_igq_or_igq_and_magnitude_for_patterns() -> None:
    import autosparse
    from autosparse.training.models import create_model

    model = create_model("resnet8", image_size=16)
    assert autosparse.prune(model, 0.9) == autosparse.prune(model, 0.9, "igq")
    example = torch.zeros(1, 3, 16, 16)
    for pattern, sparsity in (("2:4", None), ("channel", 0.5), ("block2x2", 0.5)):
        how = {"granularity": pattern, "example_input": example}
        assert autosparse.prune(model, sparsity, **how) == autosparse.prune(model, sparsity, "magnitude", **how)
    assert autosparse.prune(model, 0.99, granularity="unstructured") == autosparse.prune(model, 0.99, "igq")
    narrow = autosparse.prune(model, 0.99, example_input=example)
    assert narrow == autosparse.prune(model, 0.99, "narrow_igq", example_input=example)
    assert narrow.report.origin["channels"] == 0.5
