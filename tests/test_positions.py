"""Positions that spread what stays over the channels."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.pruning.criteria import POSITIONS, Context, rearranged, spread, spread_order, spread_small
from autosparse.training.models import create_model

CONV = Layer("conv.weight", "conv", (6, 4, 3, 3))
TRANSPOSED = Layer("up.weight", "conv_transpose", (4, 6, 3, 3), out_dim=1, in_dim=0)
LINEAR = Layer("fc.weight", "linear", (5, 12))


def order(layer: Layer, seed: int = 0, prefer: torch.Tensor | None = None) -> torch.Tensor:
    return spread_order(layer, torch.Generator().manual_seed(seed), prefer)


@given(
    st.integers(1, 12), st.integers(1, 12), st.sampled_from([(), (1, 1), (3, 3), (2,)]), st.integers(0, 9), st.data()
)
def test_any_first_k_are_spread_evenly(
    out: int, into: int, kernel: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    layer = Layer("w", "conv", (out, into, *kernel))
    ranks = order(layer, seed)
    assert sorted(ranks.flatten().tolist()) == list(range(layer.numel)), "an order of all weights"
    k = data.draw(st.integers(0, layer.numel))
    kept = (ranks < k).reshape(out, into, -1).sum(2)
    per_out, per_in = kept.sum(1), kept.sum(0)
    assert per_out.max() - per_out.min() <= 1
    assert per_in.max() - per_in.min() <= 2
    assert kept.max() - kept.min() <= 1, "no kernel has a second weight before all have one"


@pytest.mark.parametrize("layer", [CONV, TRANSPOSED, LINEAR], ids=lambda layer: layer.kind)
def test_channels_are_those_of_the_layer(layer: Layer) -> None:
    kept = order(layer) < 2 * layer.shape[layer.out_dim]
    rest = [d for d in range(len(layer.shape)) if d != layer.out_dim]
    assert kept.sum(rest).tolist() == [2] * layer.shape[layer.out_dim]


def test_within_a_kernel_the_preferred_come_first() -> None:
    layer = Layer("w", "conv", (2, 2, 1, 3))
    prefer = torch.tensor([[[[1.0, 3, 2]], [[9.0, 8, 7]]], [[[0.0, 1, 2]], [[-1.0, -3, -2]]]])
    ranks = order(layer, 3, prefer)
    passes = ranks // 4
    assert passes.view(4, 3).tolist() == [[2, 0, 1], [0, 1, 2], [2, 1, 0], [0, 2, 1]]
    first = (ranks % 4).view(4, 3)
    assert (first == first[:, :1]).all(), "each kernel has its turn in every pass"


def test_an_order_is_a_function_of_its_seed() -> None:
    assert torch.equal(order(CONV, 1), order(CONV, 1)) and not torch.equal(order(CONV, 1), order(CONV, 2))


def test_the_small_stay_one_in_each_kernel() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    layers = {CONV.name: CONV}
    scores = spread_small({"weight": {CONV.name: weight}}, Context(layers, 1 / 9))[CONV.name]
    kept = scores.flatten().topk(24).indices
    smallest = weight.abs().view(24, 9).argmin(1) + 9 * torch.arange(24)
    assert sorted(kept.tolist()) == sorted(smallest.tolist())
    free = spread({}, Context(layers, 1 / 9))[CONV.name]
    assert sorted((free.flatten().topk(24).indices // 9).tolist()) == list(range(24))


@pytest.mark.parametrize("positions", POSITIONS)
def test_rearranged_scores_cut_every_layer_alike(positions: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {layer.name: layer for layer in (CONV, LINEAR)}
    scores = {n: torch.randn(layer.shape, generator=generator) for n, layer in layers.items()}
    weights = {n: torch.randn(layer.shape, generator=generator) for n, layer in layers.items()}
    context = Context(layers, 0.2, seed=4)
    found = rearranged(scores, positions, weights, context)
    for name in layers:
        assert torch.equal(found[name].flatten().sort().values, scores[name].flatten().sort().values)
        assert torch.equal(found[name], scores[name]) == (positions == "scores")
    if positions != "scores":
        kept = found[CONV.name].flatten().topk(12).indices
        assert torch.bincount(kept // 36, minlength=6).tolist() == [2] * 6
    if positions == "spread_scores":
        best = scores[CONV.name].view(24, 9).argmax(1) + 9 * torch.arange(24)
        assert set(found[CONV.name].flatten().topk(12).indices.tolist()) <= set(best.tolist())


def test_what_was_pruned_has_no_say_in_a_later_step() -> None:
    """Of four weights two are left; the highest score is of one that is gone."""
    layer = Layer("w", "linear", (1, 4))
    masks = {"w": torch.tensor([[True, False, True, False]])}
    scores = {"w": torch.tensor([[1.0, 9.0, 2.0, 8.0]])}
    found = rearranged(scores, "spread", scores, Context({"w": layer}, 0.25, masks=masks))["w"]
    assert sorted(found.flatten().tolist()) == [1.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("name", ["spread", "spread_small"])
def test_as_presets_they_have_the_densities_of_erk(name: str) -> None:
    model = create_model("resnet8", image_size=16)
    example = torch.zeros(1, 3, 16, 16)
    mine = autosparse.prune(model, 0.9, name, example_input=example)
    erk = autosparse.prune(model, 0.9, "erk", example_input=example)
    assert [a.kept for a in mine.layers()] == [b.kept for b in erk.layers()]
    for layer in prunable_layers(model).values():
        rest = [d for d in range(len(layer.shape)) if d != 0]
        counts = mine[layer.name].sum(rest)
        assert counts.max() - counts.min() <= 1, layer.name
    assert not mine.report.dead_layers


def test_unknown_names_are_told() -> None:
    with pytest.raises(AutoSparseError, match="criterion is 'spred'"):
        autosparse.prune(create_model("resnet8"), 0.9, "spred", example_input=torch.zeros(1, 3, 8, 8))


def test_walks_of_all_sizes_meet_every_kernel_once() -> None:
    for out, into in itertools.product(range(1, 9), range(1, 9)):
        assert order(Layer("w", "linear", (out, into))).flatten().unique().numel() == out * into
