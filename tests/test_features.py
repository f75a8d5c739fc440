"""What a scorer sees of a weight, against direct definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer
from autosparse.network.graph import Graph, Operation
from autosparse.scorers.features import DEFAULT, FEATURES, check_features, contexts, depths, rows, signals_of

torch.set_num_threads(1)

CONV = Layer("conv.weight", "conv", (3, 2, 2, 2))
FC = Layer("fc.weight", "linear", (4, 3))
LAYERS = {"conv.weight": CONV, "fc.weight": FC}
NETWORK_WIDE = {
    "log_abs_weight_network",
    "log_saliency_network",
    "layer_weight_scale",
    "layer_gradient_scale",
    "raw_weight",
    "raw_gradient",
}


def signals(seed: int = 0, scale: float = 1.0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": {n: scale * torch.randn(layer.shape, generator=generator) for n, layer in LAYERS.items()},
        "gradient": {n: torch.randn(layer.shape, generator=generator) for n, layer in LAYERS.items()},
    }


def table(
    given: dict[str, dict[str, Tensor]],
    name: str,
    names: tuple[str, ...] = tuple(FEATURES),
    masks: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    gradient = given["gradient"][name].flatten() if "gradient" in given else None
    found = rows(names, given["weight"][name].flatten(), gradient, contexts(LAYERS, given, None, masks)[name])
    assert found.shape == (given["weight"][name].numel(), len(names)) and found.dtype == torch.float32
    return {feature: found[:, column] for column, feature in enumerate(names)}


def rms(*tensors: Tensor) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).double().square().mean().sqrt())


def direct(given: dict[str, dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """Every feature from its one-line definition in `FEATURES`."""
    layer, w, g = LAYERS[name], given["weight"][name].flatten(), given["gradient"][name].flatten()
    all_w, all_g = list(given["weight"].values()), list(given["gradient"].values())
    all_s = [a * b for a, b in zip(all_w, all_g, strict=True)]
    total = sum(item.numel for item in LAYERS.values())
    first = name == "conv.weight"
    one = torch.ones(len(w))
    return {
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
        "layer_size": one * math.log(layer.numel / total),
        "layer_fan_in": one * math.log(8 if first else 3),
        "layer_fan_out": one * math.log(12 if first else 4),
        "layer_kernel": one * math.log(4 if first else 1),
        "layer_depth": one * (0.0 if first else 1.0),
        "layer_first": one * float(first),
        "layer_last": one * float(not first),
        "raw_weight": w,
        "raw_gradient": g,
    }


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("feature", list(FEATURES))
def test_each_feature_is_what_its_definition_says(feature: str, name: str) -> None:
    given = signals()
    found, wanted = table(given, name)[feature], direct(given, name)[feature]
    # the rank is interpolated in a histogram: within one weight's share of the layer
    tolerance = 1 / len(wanted) + 1e-6 if feature == "weight_rank" else 1e-5
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=tolerance)


def test_literal_weights() -> None:
    layers = {"w": Layer("w", "linear", (1, 4))}
    given = {"weight": {"w": torch.tensor([[1.0, -1.0, 5.0, 3.0]])}, "gradient": {"w": torch.tensor([[2.0, 2, 0, 4]])}}
    context = contexts(layers, given)["w"]
    assert context.weight_rms == pytest.approx(3.0) and context.gradient_rms == pytest.approx(math.sqrt(6))
    found = rows(("weight", "growth", "layer_fan_in"), given["weight"]["w"][0], given["gradient"]["w"][0], context)
    s = 1 / math.sqrt(6)
    wanted = [[1 / 3, -2 * s], [-1 / 3, 2 * s], [5 / 3, 0.0], [1.0, -4 * s]]
    torch.testing.assert_close(found, torch.tensor([[*row, math.log(4)] for row in wanted]))


def test_ranks_of_many_weights_are_exact_to_a_bin() -> None:
    weight = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    layers = {"w": Layer("w", "linear", (200, 50))}
    context = contexts(layers, {"weight": {"w": weight}})["w"]
    found = rows(("weight_rank",), weight.flatten(), None, context)[:, 0]
    order = weight.flatten().abs().argsort().argsort() / weight.numel()
    assert (found - order).abs().max() < 2e-3
    assert float(found.max()) == 1.0 and float(found.min()) >= 0.0


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([1e-6, 1e-3, 0.1, 3.0, 1e4]), st.integers(0, 100))
def test_scaling_a_layer_changes_nothing_within_it(scale: float, seed: int) -> None:
    given, scaled = signals(seed), signals(seed)
    scaled["weight"]["conv.weight"] = given["weight"]["conv.weight"] * scale
    before, after = table(given, "conv.weight"), table(scaled, "conv.weight")
    for feature in FEATURES.keys() - NETWORK_WIDE:
        torch.testing.assert_close(after[feature], before[feature], rtol=1e-3, atol=1e-3, msg=feature)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([1e-6, 0.1, 1e4]))
def test_scaling_the_whole_network_changes_only_raw_features(scale: float) -> None:
    before, after = table(signals(), "fc.weight"), table(signals(scale=scale), "fc.weight")
    for feature in DEFAULT:
        torch.testing.assert_close(after[feature], before[feature], rtol=1e-3, atol=1e-3, msg=feature)


@given(st.integers(1, 30))
def test_pieces_give_what_the_whole_gives(size: int) -> None:
    given = signals()
    weight, gradient = given["weight"]["conv.weight"].flatten(), given["gradient"]["conv.weight"].flatten()
    context = contexts(LAYERS, given)["conv.weight"]
    whole = rows(tuple(FEATURES), weight, gradient, context)
    parts = [
        rows(tuple(FEATURES), w, g, context) for w, g in zip(weight.split(size), gradient.split(size), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_columns_come_in_the_order_asked() -> None:
    a = table(signals(), "fc.weight", ("layer_size", "raw_weight"))
    b = table(signals(), "fc.weight", ("raw_weight", "layer_size"))
    assert torch.equal(a["raw_weight"], b["raw_weight"]) and torch.equal(a["layer_size"], b["layer_size"])


def test_with_masks_scales_and_ranks_are_of_the_weights_left() -> None:
    given = signals()
    masks = {
        n: torch.rand(layer.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for n, layer in LAYERS.items()
    }
    # what is pruned must not count, whatever it holds
    noisy = {s: {n: torch.where(masks[n], t, 1e3) for n, t in by.items()} for s, by in given.items()}
    for name in LAYERS:
        kept = masks[name].flatten()
        w, g = given["weight"][name].flatten()[kept], given["gradient"][name].flatten()[kept]
        every = torch.cat([given["weight"][n][masks[n]] for n in LAYERS])
        found = contexts(LAYERS, noisy, None, masks)[name]
        assert found.weight_rms == pytest.approx(rms(w), rel=1e-5)
        assert found.gradient_rms == pytest.approx(rms(g), rel=1e-5)
        assert found.saliency_rms == pytest.approx(rms(w * g), rel=1e-5)
        assert found.network_weight_rms == pytest.approx(rms(every), rel=1e-5)
        assert found.largest == pytest.approx(float(w.abs().max()))
        rank = table(noisy, name, ("weight_rank",), masks)["weight_rank"][kept]
        wanted = torch.tensor([float((w.abs() < v).float().mean()) for v in w.abs()])
        torch.testing.assert_close(rank, wanted, rtol=0, atol=1 / len(w) + 1e-6)


def test_no_masks_and_full_masks_agree() -> None:
    full = {n: torch.ones(layer.shape, dtype=torch.bool) for n, layer in LAYERS.items()}
    for feature, column in table(signals(), "fc.weight", masks=full).items():
        torch.testing.assert_close(column, table(signals(), "fc.weight")[feature], msg=feature)


@pytest.mark.parametrize("what", ["zero weights", "zero gradients", "empty mask"])
def test_degenerate_layers_give_finite_features(what: str) -> None:
    given = signals()
    masks = None
    if what == "empty mask":
        masks = {n: torch.full(layer.shape, n == "fc.weight") for n, layer in LAYERS.items()}
        given["weight"]["conv.weight"].zero_()
    else:
        given["weight" if what == "zero weights" else "gradient"]["conv.weight"].zero_()
    for name in LAYERS:
        for feature, column in table(given, name, masks=masks).items():
            assert torch.isfinite(column).all(), feature
            if feature.endswith("_scale"):
                assert float(column.min()) >= -10


@pytest.mark.parametrize("signal", ["weight", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_signals_that_are_not_finite_are_told(signal: str, value: float) -> None:
    given = signals()
    given[signal]["fc.weight"][0, 0] = value
    with pytest.raises(AutoSparseError, match=f"signal '{signal}' of 'fc.weight' is not finite"):
        contexts(LAYERS, given)


def test_depth_by_the_graph_or_by_order() -> None:
    three = {n: Layer(n, "linear", (2, 2)) for n in ("a", "b", "c")}
    chain = [Operation("input", "", (), (), (1, 2))]
    for index, name in enumerate(("c", "a", "b")):  # executed in another order than registered
        chain.append(Operation("linear", "", (index,), (name,), (1, 2), weights=(name,)))
    assert depths(three, Graph(tuple(chain))) == {"c": 0.0, "a": 0.5, "b": 1.0}
    assert depths(three, None) == {"a": 0.0, "b": 0.5, "c": 1.0}
    assert depths(three, Graph(tuple(chain[:2]))) == {"a": 0.0, "b": 0.5, "c": 1.0}, "a graph that lacks layers"
    assert depths({"a": three["a"]}, None) == {"a": 0.0}


def test_names_are_checked() -> None:
    assert check_features(["raw_weight"]) == ("raw_weight",)
    with pytest.raises(AutoSparseError, match="feature is 'wieght': did you mean 'weight'"):
        check_features(["weight", "wieght"])
    with pytest.raises(AutoSparseError, match="features are empty"):
        check_features([])


def test_gradients_are_asked_for_only_where_they_are_needed() -> None:
    assert signals_of(("weight", "weight_rank", "layer_depth")) == ("weight",)
    weights_only = {"weight": signals()["weight"]}
    for feature in FEATURES:
        needs = "gradient" in signals_of((feature,))
        a = table(signals(), "fc.weight", (feature,))[feature]
        b = table(weights_only, "fc.weight", (feature,))[feature]
        assert needs != torch.equal(a, b), feature


def test_defaults_are_all_but_raw() -> None:
    assert set(FEATURES) - set(DEFAULT) == {"raw_weight", "raw_gradient"}
