"""Signs of trained weights beside a mask: given, kept in files, and put on the initial weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from autosparse import AutoSparseError, Masks, prepare
from autosparse.experiment.candidates import Candidate, find_masks
from autosparse.training.data import ImageData
from autosparse.training.recipe import Recipe

X = torch.zeros(1, 3)


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 2))
    net[0].weight.data = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 0.0]])
    return net


def test_signs_by_hand(tmp_path: Path) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    positive = torch.tensor([[False, False, False], [True, True, False]])
    masks = Masks({"0.weight": mask}, signs={"0.weight": positive})
    masks.save(tmp_path / "m.safetensors")
    loaded = Masks.load(tmp_path / "m.safetensors")
    assert loaded == masks and torch.equal(loaded.signs["0.weight"], positive) and list(loaded) == ["0.weight"]
    net = model()
    result = prepare(net, loaded, "signs", example_input=X)
    assert net[0].weight.tolist() == [[-1.0, -2.0, 0.0], [4.0, 5.0, 0.0]]
    assert result.masks is loaded and result.layers[0].note == "2 of 5 signs changed"
    again = prepare(net, loaded, "signs", example_input=X)
    assert again.layers[0].note == "0 of 5 signs changed", "twice is once"


def test_masks_without_signs_are_refused() -> None:
    masks = Masks({"0.weight": torch.ones(2, 3).bool()}, signs={"0.weight": torch.ones(2, 3).bool()})
    for bare in (masks.shuffle(0), None):
        with pytest.raises(AutoSparseError, match="these masks have no signs; take those of a method that trains"):
            prepare(model(), bare, "signs", example_input=X)


@pytest.mark.parametrize(("name", "options"), [("gmp", {"every": 1}), ("irp", {"rounds": 2, "epochs": 4})])
def test_methods_that_train_give_signs(
    name: str, options: dict[str, object], digits: ImageData, convnet: Callable[..., nn.Module]
) -> None:
    recipe = Recipe(epochs=4, batch_size=16, lr=0.3)
    net = convnet()
    masks = find_masks(net, digits, Candidate(name, options=options), 0.5, recipe=recipe, device="cpu").masks
    assert masks.signs.keys() == masks.keys()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    prepare(net, masks, "signs", example_input=digits.normalise(digits.train.images[:2]))
    changed = 0
    for n, p in net.named_parameters():
        kept = masks[n] if n in masks else torch.ones_like(p).bool()
        assert torch.equal(p[kept].abs(), before[n][kept].abs()) and not bool(p[~kept].any())
        if n in masks:
            changed += int((p != before[n])[kept].sum())
            assert bool(((p >= 0) == masks.signs[n])[masks[n] & (p != 0)].all())
    assert changed > 0, "training changes some signs"
