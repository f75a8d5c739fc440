"""`prune(…, channels=…)`: masks between a share of the channels."""

from __future__ import annotations

import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.masks.random import make_generator
from autosparse.network.coupling import coupled_filters
from autosparse.pruning.criteria import PRESETS, narrow, spread_order
from autosparse.training.models import ModelSettings, create_model

X = torch.zeros(2, 3, 8, 8)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def resnet() -> nn.Module:
    return create_model(ModelSettings("resnet8", 4), image_size=8, seed=0)


def test_the_weights_between_half_of_the_channels() -> None:
    """Of 4-8-8-2: rows 4 of 8, 4 of 8 and all 2; columns all 4, the same 4 of 8, and the same 4 of 8: 16 + 16 + 8."""
    masks = autosparse.prune(mlp(), 1 - 40 / 112, "random", example_input=torch.zeros(1, 4), channels=0.5)
    first, second, last = masks.values()
    assert [int(m.sum()) for m in masks.values()] == [16, 16, 8]
    assert first.any(1).sum() == second.any(1).sum() == 4
    assert torch.equal(first, first.any(1, keepdim=True).expand(8, 4))
    assert torch.equal(second, second.any(1, keepdim=True) & first.any(1))
    assert torch.equal(last, second.any(1).expand(2, 8))
    assert masks.report.origin["channels"] == 0.5 and masks.report.effective_sparsity == masks.sparsity


def test_all_channels_are_in_use_by_default() -> None:
    example = torch.zeros(1, 4)
    default = autosparse.prune(mlp(), 0.5, "random", example_input=example)
    assert default == autosparse.prune(mlp(), 0.5, "random", example_input=example, channels=1)
    assert default.report.origin["channels"] == 1.0


@pytest.mark.parametrize("network", ["resnet8", "vgg11"])
@pytest.mark.parametrize("criterion", [n for n, p in PRESETS.items() if not any("@" in s for s in p.criterion.signals)])
def test_every_criterion_stays_between_them(network: str, criterion: str) -> None:
    """The exact count, in at most half of the channels of a layer, which are the same in all layers of a group."""
    model = create_model(ModelSettings(network, 4), image_size=8, seed=0)
    layers = prunable_layers(model)
    batches = [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4))] * 5
    how = {"batches": batches, "channels": 0.5, "steps": min(PRESETS[criterion].steps, 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        masks = autosparse.prune(model, 0.9, criterion, **how)
    assert masks.kept == round(0.1 * masks.total)
    groups = coupled_filters(model, layers, X)
    for names in (*groups, *[(n,) for n in [*layers][:-1] if not any(n in g for g in groups)]):
        used = torch.stack([masks[n].flatten(1).any(1) for n in names]).any(0)
        assert used.sum() <= len(used) / 2, names


@hypothesis.given(st.floats(0.3, 1), st.floats(0.93, 0.99), st.integers(0, 5))
@hypothesis.settings(max_examples=10)
def test_the_count_is_exact_for_any_share(share: float, sparsity: float, seed: int) -> None:
    model = mlp()
    model[2] = nn.Linear(8, 80)
    model[4] = nn.Linear(80, 2)
    example = torch.zeros(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        masks = autosparse.prune(model, sparsity, "spread_igq", example_input=example, channels=share, seed=seed)
    assert masks.kept == round((1 - sparsity) * masks.total)
    for name, channels in (("0.weight", 8), ("2.weight", 80)):
        assert int(masks[name].any(1).sum()) < share * channels + 1, name  # whole channels, rounded up or down


def test_narrow_igq_gives_up_channels_that_would_have_few_weights() -> None:
    """Of 300 inputs a channel has 6 weights at 2 %, 3 at 1 %; of 4-8-8-2, far less."""
    wide = prunable_layers(nn.Sequential(nn.Linear(300, 5)))
    assert [narrow(wide, d) for d in (0.02, 0.01)] == pytest.approx([6 / 8, 1 / 2])
    few = prunable_layers(mlp())
    assert [narrow(few, d) for d in (0.04, 0.03, 0.02, 0.01)] == pytest.approx([1, 3 / 4, 1 / 2, 1 / 2])
    masks = autosparse.prune(resnet(), 0.98, "narrow_igq", example_input=X)
    assert masks.report.origin["channels"] == pytest.approx(0.5)
    assert masks == autosparse.prune(resnet(), 0.98, "igq", example_input=X, channels=0.5)
    patterned = autosparse.prune(resnet(), 0.98, "narrow_igq", example_input=X, granularity="block2x2")
    assert patterned.report.origin["channels"] == 1  # a granularity takes the place of the preset's channels
    assert autosparse.prune(resnet(), 0.96, "narrow_igq", example_input=X) == autosparse.prune(resnet(), 0.96, "igq")


def test_positions_are_spread_over_the_channels_in_use() -> None:
    """Rows 1, 2 and columns 0, 3 of 3×4: the first two weights share neither; what lies outside comes last."""
    layer = Layer("a", "linear", (3, 4))
    kept = torch.zeros(3, 4, dtype=torch.bool)
    kept[1, 0] = kept[2, 3] = True
    ranks = spread_order(layer, make_generator(0, "x"), kept=kept)
    inside = ranks[1:][:, [0, 3]]
    assert sorted(inside.flatten().tolist()) == [0, 1, 2, 3] and (ranks == 12).sum() == 8
    first = inside < 2
    assert first.sum(0).tolist() == first.sum(1).tolist() == [1, 1]


def test_mistakes_are_told_in_one_line() -> None:
    example = torch.zeros(1, 4)
    for share in (0, 1.5, "half"):
        with pytest.raises(
            AutoSparseError, match=rf"^channels is '?{share}'?: give the share that stays in use, in \(0, 1\]"
        ):
            autosparse.prune(mlp(), 0.9, "random", example_input=example, channels=share)
    with pytest.raises(
        AutoSparseError, match=r"^channels is 0.5: between them are 40 weights, and the sparsity keeps 56;"
    ):
        autosparse.prune(mlp(), 0.5, "random", example_input=example, channels=0.5)
    with pytest.raises(AutoSparseError, match=r"^channels is 0.5: .* without example_input or batches; give one$"):
        autosparse.prune(mlp(), 0.9, "random", channels=0.5)
    with pytest.raises(AutoSparseError, match=r"^granularity is 'block4x4': channels is 0.5: .* leave it out$"):
        autosparse.prune(mlp(), 0.9, "random", example_input=example, channels=0.5, granularity="block4x4")
