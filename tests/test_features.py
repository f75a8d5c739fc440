"""What a scorer sees of a weight, against direct definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer
from autosparse.network.graph import Graph, Operation
from autosparse.scorers import features as module
from autosparse.scorers.features import (
    DEFAULT,
    FEATURES,
    GROUPS,
    View,
    channel_index,
    channel_sums,
    channels,
    check_features,
    contexts,
    depths,
    of_layers,
    of_weights,
    signals_of,
)

torch.set_num_threads(1)

# One layer of every kind, and for every weight the channels that it joins, written out.
LAYERS = {
    "conv": Layer("conv", "conv", (3, 2, 2, 2)),
    "grouped": Layer("grouped", "conv", (4, 3, 2, 1), groups=2),
    "depthwise": Layer("depthwise", "conv", (3, 1, 3, 3), groups=3),
    "transposed": Layer("transposed", "conv_transpose", (4, 3, 2, 2), 1, 0, groups=2),
    "operand": Layer("operand", "matmul", (3, 4), 1, 0),
    "fc": Layer("fc", "linear", (4, 3)),
}
EXTRA = {
    "transposed operand": Layer("transposed operand", "matmul", (6, 2, 1), 1, 0, groups=3),
    "point": Layer("point", "conv", (1, 1, 1, 1)),
    "plain transposed": Layer("plain transposed", "conv_transpose", (2, 5, 3), 1, 0),
    "attention": Layer("attention", "attention", (9, 3)),
}
STRIDES = {"conv": 2.0, "grouped": 1.0, "depthwise": math.sqrt(2), "transposed": 2.0, "operand": 1.0, "fc": 1.0}
ALL = check_features([*(name for name in FEATURES if not name.endswith("@T")), "early@1"])
NETWORK_WIDE = {name for name in ALL if "network" in name or (name.startswith("layer_") and "scale" in name)} | {
    "raw_weight",
    "raw_gradient",
    "layer_relative_movement@1",
    "log_warm_weight@1",
    "log_warm_weight_network@1",
}


def graph() -> Graph:
    """conv → (grouped → depthwise) + skip → transposed → operand → fc"""
    operations = [
        Operation("input", "", (), (), (1, 2)),
        Operation("conv", "", (0,), ("conv",), (1,), (2, 2), 1, ("conv",)),
        Operation("conv", "", (1,), ("grouped",), (1,), (1, 1), 2, ("grouped",)),
        Operation("conv", "", (2,), ("depthwise",), (1,), (2, 1), 3, ("depthwise",)),
        Operation("add", "", (1, 3), (), (1,)),
        Operation("conv_transpose", "", (4,), ("transposed",), (1,), (2, 2), 2, ("transposed",)),
        Operation("linear", "", (5,), ("operand",), (1,), weights=("operand",)),
        Operation("linear", "", (6,), ("fc",), (1,), weights=("fc",)),
    ]
    return Graph(tuple(operations))


def ends(layer: Layer, index: tuple[int, ...]) -> dict[str, int]:
    """The output and the input channel that a weight joins, from what convolutions and products are defined to do."""
    if layer.kind == "conv":
        out, group = index[0], index[0] // (layer.shape[0] // layer.groups)
        return {"out": out, "in": group * layer.shape[1] + index[1]}
    if layer.kind == "conv_transpose" or layer.groups > 1:
        inner, group = index[0], index[0] // (layer.shape[0] // layer.groups)
        return {"out": group * layer.shape[1] + index[1], "in": inner}
    return {"out": index[layer.out_dim], "in": index[layer.in_dim]}


def indices(layer: Layer) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, layer.shape)))


def signals(seed: int = 0, scale: float = 1.0, names: tuple[str, ...] = ()) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(size: float) -> dict[str, Tensor]:
        return {n: size * torch.randn(layer.shape, generator=generator) for n, layer in LAYERS.items()}

    found = {"weight": draw(scale), "gradient": draw(1.0), "displacement@1": draw(0.1)}
    found["flow"] = {n: t.double().abs() for n, t in draw(1.0).items()}
    return found


def table(
    given: dict[str, dict[str, Tensor]],
    name: str,
    names: tuple[str, ...] = ALL,
    masks: dict[str, Tensor] | None = None,
    with_graph: bool = True,
) -> dict[str, Tensor]:
    view = View.of(names, LAYERS, given, graph() if with_graph else None, masks)
    found = view.rows(name, 0, LAYERS[name].shape[0])
    assert found.shape == (given["weight"][name].numel(), len(names)) and found.dtype == torch.float32
    return {feature: found[:, column] for column, feature in enumerate(names)}


def rms(*tensors: Tensor) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).double().square().mean().sqrt())


def channel_scale(values: Tensor, layer: Layer, side: str) -> Tensor:
    """log(rms_c / rms_l) by a loop over weights."""
    members: dict[int, list[float]] = {}
    for index in indices(layer):
        members.setdefault(ends(layer, index)[side], []).append(float(values[index]))
    scales = {c: rms(torch.tensor(v)) / rms(values) for c, v in members.items()}
    return torch.tensor([max(math.log(scales[ends(layer, index)[side]]), -10.0) for index in indices(layer)])


def direct(given: dict[str, dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """Every feature from its one-line definition in `FEATURES`."""
    layer = LAYERS[name]
    shaped = {s: by[name] for s, by in given.items()}
    w, g, d, f = (shaped[s].flatten().float() for s in ("weight", "gradient", "displacement@1", "flow"))
    all_w, all_g, all_d, all_f = (list(given[s].values()) for s in ("weight", "gradient", "displacement@1", "flow"))
    all_s = [a * b for a, b in zip(all_w, all_g, strict=True)]
    one = torch.ones(len(w))
    fan_in = {"conv": 8, "grouped": 6, "depthwise": 9, "transposed": 8, "operand": 3, "fc": 3}[name]
    fan_out = {"conv": 12, "grouped": 4, "depthwise": 9, "transposed": 12, "operand": 4, "fc": 4}[name]
    sides = {"conv": 9, "grouped": 10, "depthwise": 10, "transposed": 11, "operand": 7, "fc": 7}[name]
    kernel = {"conv": 4, "grouped": 2, "depthwise": 9, "transposed": 4}.get(name, 1)
    found = {
        "weight": w / rms(w),
        "log_abs_weight": torch.log(w.abs() / rms(w) + 1e-3),
        "weight_rank": torch.tensor([float((w.abs() < v).float().mean()) for v in w.abs()]),
        "gradient": g / rms(g),
        "log_abs_gradient": torch.log(g.abs() / rms(g) + 1e-3),
        "growth": -g * w.sign() / rms(g),
        "log_saliency": torch.log((w * g).abs() / rms(w * g) + 1e-3),
        "log_abs_weight_network": torch.log(w.abs() / rms(*all_w) + 1e-3),
        "log_saliency_network": torch.log((w * g).abs() / rms(*all_s) + 1e-3),
        "layer_weight_scale": one * math.log(rms(w) / rms(*all_w)),
        "layer_gradient_scale": one * math.log(rms(g) / rms(*all_g)),
        "layer_size": one * math.log(layer.numel / sum(item.numel for item in LAYERS.values())),
        "layer_fan_in": one * math.log(fan_in),
        "layer_fan_out": one * math.log(fan_out),
        "layer_erk": one * math.log(sides / layer.numel),
        "layer_kernel": one * math.log(kernel),
        "layer_stride": one * math.log(STRIDES[name]),
        "layer_groups": one * math.log({"grouped": 2, "depthwise": 3, "transposed": 2}.get(name, 1)),
        "layer_depth": one * list(LAYERS).index(name) / 5,
        "layer_first": one * (name == "conv"),
        "layer_last": one * (name == "fc"),
        "layer_adds": one * (name in ("conv", "depthwise")),
        "log_flow": torch.log(f / rms(f) + 1e-3),
        "log_flow_network": torch.log(f / rms(*all_f) + 1e-6),
        "layer_flow_scale": one * math.log(rms(f) / rms(*all_f)),
        "growth@1": w.sign() * d / rms(d),
        "log_movement@1": torch.log(d.abs() / rms(d) + 1e-3),
        "log_warm_weight@1": torch.log((w + d).abs() / rms(w) + 1e-3),
        "log_warm_weight_network@1": torch.log((w + d).abs() / rms(*all_w) + 1e-3),
        "layer_movement_scale@1": one * math.log(rms(d) / rms(*all_d)),
        "layer_relative_movement@1": one * math.log(rms(d) / rms(w)),
        "raw_weight": w,
        "raw_gradient": g,
    }
    products = {
        "weight_scale": shaped["weight"],
        "saliency_scale": shaped["weight"] * shaped["gradient"],
        "movement_scale@1": shaped["displacement@1"],
    }
    for side, (feature, values) in itertools.product(("out", "in"), products.items()):
        found[f"{side}_{feature}"] = channel_scale(values, layer, side)
    return found


@pytest.mark.parametrize("name", list(LAYERS))
def test_each_feature_is_what_its_definition_says(name: str) -> None:
    given = signals()
    found, wanted = table(given, name), direct(given, name)
    assert set(found) == set(wanted)
    for feature in ALL:
        # the rank is interpolated in a histogram: two weights may share a bin
        tolerance = 2 / LAYERS[name].numel + 1e-6 if feature == "weight_rank" else 1e-5
        torch.testing.assert_close(found[feature], wanted[feature], rtol=1e-5, atol=tolerance, msg=feature)


def test_literal_weights() -> None:
    layers = {"w": Layer("w", "linear", (1, 4))}
    given = {"weight": {"w": torch.tensor([[1.0, -1.0, 5.0, 3.0]])}, "gradient": {"w": torch.tensor([[2.0, 2, 0, 4]])}}
    view = View.of(("weight", "growth", "layer_fan_in"), layers, given)
    scales = view.contexts["w"].scales
    assert scales["weight"] == pytest.approx(3.0) and scales["gradient"] == pytest.approx(math.sqrt(6))
    s = 1 / math.sqrt(6)
    wanted = [[1 / 3, -2 * s], [-1 / 3, 2 * s], [5 / 3, 0.0], [1.0, -4 * s]]
    torch.testing.assert_close(view.rows("w", 0, 1), torch.tensor([[*row, math.log(4)] for row in wanted]))


def test_literal_channel_scales() -> None:
    """Rows (3, 4) and (0, 0): the first output channel has rms 5/√2 of the layer's 5/2, the second nothing."""
    layers = {"w": Layer("w", "linear", (2, 2))}
    given = {"weight": {"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}}
    found = View.of(("out_weight_scale", "in_weight_scale"), layers, given).rows("w", 0, 2)
    high, three, four = 0.5 * math.log(2), math.log(3 / math.sqrt(2) / 2.5), math.log(4 / math.sqrt(2) / 2.5)
    torch.testing.assert_close(found, torch.tensor([[high, three], [high, four], [-10.0, three], [-10.0, four]]))


def test_ranks_of_many_weights_are_exact_to_a_bin() -> None:
    weight = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    layers = {"w": Layer("w", "linear", (200, 50))}
    found = View.of(("weight_rank",), layers, {"weight": {"w": weight}}).rows("w", 0, 200)[:, 0]
    order = weight.flatten().abs().argsort().argsort() / weight.numel()
    assert (found - order).abs().max() < 2e-3
    assert float(found.max()) == 1.0 and float(found.min()) >= 0.0


# -- channels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("name", [*LAYERS, *EXTRA])
def test_channel_index_and_sums_against_a_loop(name: str, side: str) -> None:
    layer = {**LAYERS, **EXTRA}[name]
    values = torch.randn(*layer.shape, 2, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(channels(layer, side), 2)
    index = channel_index(layer, side).expand(layer.shape)
    for place in indices(layer):
        assert int(index[place]) == ends(layer, place)[side]
        wanted[ends(layer, place)[side]] += values[place]
    assert len({ends(layer, place)[side] for place in indices(layer)}) == channels(layer, side)
    for step in range(1, layer.shape[0] + 1):  # rows of the first dimension, so many at a time
        found = torch.zeros_like(wanted)
        for start in range(0, layer.shape[0], step):
            found.index_add_(0, *channel_sums(values[start : start + step], layer, side, start))
        torch.testing.assert_close(found, wanted)


def test_literal_channels_of_a_grouped_layer() -> None:
    """Four outputs in two groups, two inputs each: outputs 2 and 3 see inputs 2 and 3."""
    layer = Layer("w", "conv", (4, 2, 1), groups=2)
    assert channel_index(layer, "in").flatten().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert channel_index(layer, "out").flatten().tolist() == [0, 1, 2, 3]
    values = torch.arange(8.0).view(4, 2, 1, 1)
    index, sums = channel_sums(values, layer, "in")
    assert torch.zeros(4).index_add_(0, index, sums[:, 0]).tolist() == [0 + 2, 1 + 3, 4 + 6, 5 + 7]
    index, sums = channel_sums(values, layer, "out")
    assert index.tolist() == [0, 1, 2, 3] and sums[:, 0].tolist() == [1.0, 5.0, 9.0, 13.0]


# Channels of different groups cannot change places.
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.groups == 1])
def test_permuting_channels_permutes_features(name: str) -> None:
    layer = LAYERS[name]
    given = signals()
    before = View.of(ALL, LAYERS, given, graph()).rows(name, 0, layer.shape[0])
    for dim in range(2):
        order = torch.randperm(layer.shape[dim], generator=torch.Generator().manual_seed(1))
        moved = {s: {**by, name: by[name].index_select(dim, order)} for s, by in given.items()}
        after = View.of(ALL, LAYERS, moved, graph()).rows(name, 0, layer.shape[0])
        wanted = before.view(*layer.shape, -1).index_select(dim, order).flatten(0, -2)
        torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-5)


# -- scales -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.sampled_from([1e-6, 1e-3, 0.1, 3.0, 1e4]), st.integers(0, 100), st.sampled_from(["conv", "grouped", "fc"]))
def test_scaling_a_layer_changes_nothing_within_it(scale: float, seed: int, name: str) -> None:
    given, scaled = signals(seed), signals(seed)
    scaled["weight"][name] = given["weight"][name] * scale
    before, after = table(given, name), table(scaled, name)
    for feature in set(ALL) - NETWORK_WIDE:
        torch.testing.assert_close(after[feature], before[feature], rtol=1e-3, atol=1e-3, msg=feature)


@settings(max_examples=15)
@given(st.sampled_from([1e-6, 0.1, 1e4]), st.sampled_from(["weight", "gradient"]))
def test_scaling_the_whole_network_changes_only_raw_features(scale: float, signal: str) -> None:
    scaled = signals()
    scaled[signal] = {n: t * scale for n, t in scaled[signal].items()}
    before, after = table(signals(), "fc"), table(scaled, "fc")
    for feature in DEFAULT:
        torch.testing.assert_close(after[feature], before[feature], rtol=1e-3, atol=1e-3, msg=feature)


def test_tiny_gradients_and_huge_flows_keep_their_features() -> None:
    """Squares of 1e-25 are nothing in single precision, and flow may be beyond its range."""
    scaled = signals()
    scaled["gradient"] = {n: t * 1e-25 for n, t in scaled["gradient"].items()}
    scaled["flow"] = {n: t * 1e60 for n, t in scaled["flow"].items()}
    before, after = table(signals(), "conv"), table(scaled, "conv")
    for feature in set(ALL) - {"raw_gradient"}:
        torch.testing.assert_close(after[feature], before[feature], rtol=1e-3, atol=1e-3, msg=feature)


@pytest.mark.parametrize("name", list(LAYERS))
def test_pieces_give_what_the_whole_gives(name: str) -> None:
    view, lead = View.of(ALL, LAYERS, signals(), graph()), LAYERS[name].shape[0]
    whole = view.rows(name, 0, lead)
    for step in range(1, lead + 1):
        parts = [view.rows(name, start, min(start + step, lead)) for start in range(0, lead, step)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_chunks_cover_a_layer_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    view = View.of(("weight",), LAYERS, signals())
    for name, layer in LAYERS.items():
        ranges = list(view.chunks(name))
        assert [i for a, b in ranges for i in range(a, b)] == list(range(layer.shape[0]))
        row = layer.numel // layer.shape[0]
        assert all((b - a) * row <= max(chunk, row) for a, b in ranges)


def test_columns_come_in_the_order_asked() -> None:
    a = table(signals(), "fc", ("layer_size", "raw_weight"))
    b = table(signals(), "fc", ("raw_weight", "layer_size"))
    assert torch.equal(a["raw_weight"], b["raw_weight"]) and torch.equal(a["layer_size"], b["layer_size"])
    view = View.of(("layer_size", "raw_weight", "gradient"), LAYERS, signals())
    assert torch.equal(view.rows("fc", 1, 3, ("gradient",)), view.rows("fc", 1, 3)[:, 2:])


def test_the_layers_own_features() -> None:
    assert of_layers(ALL) + of_weights(ALL) != ALL and set(of_layers(ALL)) | set(of_weights(ALL)) == set(ALL)
    view = View.of(ALL, LAYERS, signals(), graph())
    nodes = view.nodes()
    for i, name in enumerate(LAYERS):
        columns = table(signals(), name)
        torch.testing.assert_close(nodes[i], torch.stack([columns[f][0] for f in of_layers(ALL)]))
    assert View.of(("weight",), LAYERS, signals()).nodes().shape == (6, 0)


# -- masks --------------------------------------------------------------------------------------------------------------


def random_masks(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(layer.shape, generator=generator) < 0.6 for n, layer in LAYERS.items()}


def test_what_is_pruned_counts_in_no_feature() -> None:
    """Whatever it holds, in any scale, rank or channel."""
    given, masks = signals(), random_masks()
    noisy = {s: {n: torch.where(masks[n], t, 1e3) for n, t in by.items()} for s, by in given.items()}
    for name in LAYERS:
        kept = masks[name].flatten()
        a, b = table(given, name, masks=masks), table(noisy, name, masks=masks)
        for feature in ALL:
            torch.testing.assert_close(a[feature][kept], b[feature][kept], rtol=1e-5, atol=1e-5, msg=feature)


def test_with_masks_scales_and_ranks_are_of_the_weights_left() -> None:
    given, masks = signals(), random_masks()
    for name, layer in LAYERS.items():
        kept = masks[name]
        w, g = given["weight"][name][kept], given["gradient"][name][kept]
        every = torch.cat([given["weight"][n][masks[n]] for n in LAYERS])
        context = contexts(LAYERS, given, ALL, None, masks)[name]
        assert context.scales["weight"] == pytest.approx(rms(w), rel=1e-5)
        assert context.scales["gradient"] == pytest.approx(rms(g), rel=1e-5)
        assert context.scales["saliency"] == pytest.approx(rms(w * g), rel=1e-5)
        assert context.network["weight"] == pytest.approx(rms(every), rel=1e-5)
        assert context.largest == pytest.approx(float(w.abs().max()))
        found = table(given, name, masks=masks)
        wanted = torch.tensor([float((w.abs() < v).float().mean()) for v in w.abs()])
        torch.testing.assert_close(found["weight_rank"][kept.flatten()], wanted, rtol=0, atol=2 / len(w) + 1e-6)
        for side in ("out", "in"):
            members: dict[int, list[float]] = {}
            for index in indices(layer):
                if masks[name][index]:
                    members.setdefault(ends(layer, index)[side], []).append(float(given["weight"][name][index]))
            for i, index in enumerate(indices(layer)):
                if masks[name][index]:
                    scale = rms(torch.tensor(members[ends(layer, index)[side]])) / rms(w)
                    assert float(found[f"{side}_weight_scale"][i]) == pytest.approx(math.log(scale), abs=1e-5)


def test_no_masks_and_full_masks_agree() -> None:
    full = {n: torch.ones(layer.shape, dtype=torch.bool) for n, layer in LAYERS.items()}
    for feature, column in table(signals(), "fc", masks=full).items():
        torch.testing.assert_close(column, table(signals(), "fc")[feature], msg=feature)


# -- degenerate networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("what", ["weight", "gradient", "displacement@1", "flow", "mask", "everything"])
def test_degenerate_layers_give_finite_features(what: str, name: str) -> None:
    given = signals()
    masks = None
    if what == "mask":
        masks = {n: torch.full(layer.shape, n != name) for n, layer in LAYERS.items()}
        given["weight"][name].zero_()
    elif what == "everything":
        for by in given.values():
            for values in by.values():
                values.zero_()
    else:
        given[what][name].zero_()
    for other in LAYERS:
        for feature, column in table(given, other, masks=masks).items():
            assert torch.isfinite(column).all(), feature
            if "scale" in feature:
                assert float(column.min()) >= -10


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1, 1), (1, 7), (7, 1)])
def test_a_network_of_one_small_layer(shape: tuple[int, ...]) -> None:
    layers = {"w": Layer("w", "linear" if len(shape) == 2 else "conv", shape)}
    given = {s: {"w": torch.ones(shape)} for s in signals_of(ALL)}
    found = View.of(ALL, layers, given).rows("w", 0, shape[0])
    assert torch.isfinite(found).all()
    columns = dict(zip(ALL, found.T, strict=True))
    for feature in ("layer_weight_scale", "out_weight_scale", "in_weight_scale", "layer_size", "layer_depth"):
        assert columns[feature].abs().max() < 1e-6
    assert (columns["layer_first"] == 1).all() and (columns["weight_rank"] <= 1).all()


@pytest.mark.parametrize("signal", ["weight", "gradient", "displacement@1", "flow"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_signals_that_are_not_finite_are_told(signal: str, value: float) -> None:
    given = signals()
    given[signal]["fc"][0, 0] = value
    with pytest.raises(AutoSparseError, match=f"signal '{signal}' of 'fc' is not finite"):
        contexts(LAYERS, given, ALL)


def test_depth_by_the_graph_or_by_order() -> None:
    three = {n: Layer(n, "linear", (2, 2)) for n in ("a", "b", "c")}
    chain = [Operation("input", "", (), (), (1, 2))]
    for index, name in enumerate(("c", "a", "b")):  # executed in another order than registered
        chain.append(Operation("linear", "", (index,), (name,), (1, 2), weights=(name,)))
    assert depths(three, Graph(tuple(chain))) == {"c": 0.0, "a": 0.5, "b": 1.0}
    assert depths(three, None) == {"a": 0.0, "b": 0.5, "c": 1.0}
    assert depths(three, Graph(tuple(chain[:2]))) == {"a": 0.0, "b": 0.5, "c": 1.0}, "a graph that lacks layers"
    assert depths({"a": three["a"]}, None) == {"a": 0.0}


def test_without_a_graph_stride_and_sums_are_not_known() -> None:
    found = table(signals(), "conv", with_graph=False)
    assert float(found["layer_stride"].abs().max()) == 0 and float(found["layer_adds"].max()) == 0


# -- names --------------------------------------------------------------------------------------------------------------


def test_names_are_checked() -> None:
    assert check_features(["raw_weight"]) == ("raw_weight",)
    for names, match in (
        (["weight", "wieght"], "feature is 'wieght': did you mean 'weight'"),
        ([], "features are empty"),
        (["log_movement"], "feature is 'log_movement': give its horizon in epochs, as in 'log_movement@1'"),
        (["early"], "feature is 'early': give its horizon in epochs, as in 'early@1'"),
        (["weight@1"], "feature is 'weight@1': "),
        (["growth@soon"], "feature is 'growth@soon': give its horizon, a positive number"),
        (["growth@0"], "feature is 'growth@0': give its horizon"),
        (["growth@T"], "feature is 'growth@T': give its horizon"),
    ):
        with pytest.raises(AutoSparseError, match=match) as caught:
            check_features(names)
        assert "\n" not in str(caught.value)


def test_groups_stand_for_their_features() -> None:
    assert check_features(["default"]) == DEFAULT
    assert check_features(["raw", "weight", "raw_weight"]) == ("raw_weight", "raw_gradient", "weight")
    early = check_features(["early@0.5"])
    assert "growth@0.5" in early and all(name.endswith("@0.5") for name in early)
    assert len(early) == len(GROUPS["early@T"]) == sum(name.endswith("@T") for name in FEATURES)
    assert check_features(["growth", "growth@1", "growth@2"]) == ("growth", "growth@1", "growth@2")


def test_signals_are_asked_for_only_where_they_are_needed() -> None:
    assert signals_of(("weight", "weight_rank", "layer_depth")) == ("weight",)
    assert signals_of(("growth@0.5", "growth")) == ("weight", "displacement@0.5", "gradient")
    assert signals_of(GROUPS["flow"]) == ("weight", "flow")
    for feature in ALL:
        needed = signals_of((feature,))
        given = {s: by for s, by in signals().items() if s in needed}
        assert torch.equal(table(given, "fc", (feature,))[feature], table(signals(), "fc", (feature,))[feature])


def test_two_horizons_side_by_side() -> None:
    given = signals()
    given["displacement@2"] = {n: -2 * t for n, t in given["displacement@1"].items()}
    names = ("growth@1", "growth@2", "layer_relative_movement@1", "layer_relative_movement@2", "out_movement_scale@2")
    found = table(given, "conv", names)
    torch.testing.assert_close(found["growth@2"], -found["growth@1"])
    more = found["layer_relative_movement@2"] - found["layer_relative_movement@1"]
    torch.testing.assert_close(more, torch.full_like(more, math.log(2)))
    torch.testing.assert_close(found["out_movement_scale@2"], table(given, "conv")["out_movement_scale@1"])


def test_defaults_are_all_but_raw_flow_and_early() -> None:
    assert set(FEATURES) - set(DEFAULT) == {*GROUPS["raw"], *GROUPS["flow"], *GROUPS["early@T"]}
