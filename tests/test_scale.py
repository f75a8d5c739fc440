"""Smaller initial weights: by hand, without a change of what a network with norms computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autosparse
from autosparse import AutoSparseError, Masks
from autosparse.training.models import create_model

INPUT = torch.tensor([[1.0, 2.0, 3.0, 4.0]])


def network() -> nn.Sequential:
    """Root mean squares of 2 and 0.1, with fan-ins of 4 and 2: gains of 4 and 0.14."""
    first, last = nn.Linear(4, 2), nn.Linear(2, 3)
    first.weight.data = torch.tensor([[2.0, -2, 2, 2], [-2, 2, 2, -2]])
    last.weight.data = torch.full((3, 2), 0.1)
    return nn.Sequential(first, last)


def test_by_hand() -> None:
    model = network()
    bias = model[0].bias.detach().clone()
    masks = Masks({"0.weight": torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool(), "1.weight": torch.ones(3, 2).bool()})
    done = autosparse.prepare(model, masks, "scale_down", example_input=INPUT, gain=0.5)
    # 0.5 / 4 = 0.125 of the weights, whatever is pruned
    torch.testing.assert_close(model[0].weight.data, torch.tensor([[0.25, -0.25, 0, 0], [0, 0, 0.25, -0.25]]))
    assert torch.equal(model[0].bias, bias) and bool((model[1].weight == 0.1).all())
    assert [layer.note for layer in done.layers] == ["its output is 0.125 times what it was", ""]
    first = done.layers[0]
    assert first.lipschitz_after == pytest.approx(0.125 * first.lipschitz_before) and done.masks == masks
    before = [p.detach().clone() for p in model.parameters()]
    autosparse.prepare(model, masks, "scale_down", example_input=INPUT, gain=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), (
        "a second call changes nothing"
    )


def test_norms_undo_it() -> None:
    """All but the classifier's: no norm follows it."""
    model, images = create_model("convnet", image_size=16), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        before = model(images)
        he = float([p for p in model.parameters() if p.dim() == 2][-1].square().mean().sqrt())
        done = autosparse.prepare(model, None, "scale_down", example_input=images)
        after = model(images)
        classifier = model.get_parameter(done.layers[-1].name)
        factor = 0.58 / (he * classifier.shape[1] ** 0.5)
    torch.testing.assert_close(after, factor * before, rtol=1e-2, atol=1e-3)
    assert done.layers[-1].note == f"its output is {factor:.3g} times what it was"
    scaled = [layer for layer in done.layers if layer.norm is not None]
    assert scaled and not any(layer.note for layer in scaled)
    for layer in scaled:
        weight = model.get_parameter(layer.name)
        assert float(weight.square().mean().sqrt()) * weight[0].numel() ** 0.5 == pytest.approx(0.58, rel=1e-4)


@pytest.mark.parametrize("gain", [0.0, -1.0, float("nan"), float("inf")])
def test_a_gain_that_cannot_be_is_told(gain: float) -> None:
    with pytest.raises(AutoSparseError, match=r"gain is .*: give a positive number"):
        autosparse.prepare(network(), None, "scale_down", example_input=INPUT, gain=gain)
