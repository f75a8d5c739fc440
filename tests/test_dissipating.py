"""Dissipating gradients: removal by hand, exact densities, thresholds, stops; and on the winner of K-starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.masks.mask import Masks
from autosparse.search.dissipating import (
    CombinedSettings,
    DissipatingSettings,
    combined,
    displacement,
    dissipating,
    remove,
)
from autosparse.search.kstarts import KStartsSettings
from autosparse.search.method import SearchResult
from autosparse.training.data import ImageData
from autosparse.training.loop import full_state
from autosparse.training.recipe import Recipe
from autosparse.training.train import train

Make = Callable[..., nn.Module]
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05)  # 4 steps an epoch


def run(
    model: nn.Module, data: ImageData, settings: DissipatingSettings, density: float = 0.2, **options: Any
) -> SearchResult:
    recipe = options.pop("recipe", RECIPE)
    options = {"scope": "global", **options}
    return dissipating(model, prunable_layers(model), data, recipe, settings, density, device="cpu", **options)


def same(one: SearchResult, other: SearchResult) -> bool:
    assert one.weights is not None and other.weights is not None
    return (
        one.masks == other.masks
        and one.masks.report == other.masks.report
        and (one.fitness, one.epochs, one.steps) == (other.fitness, other.epochs, other.steps)
        and all(torch.equal(t, other.weights[n]) for n, t in one.weights.items())
    )


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each training, with the whole state that it started from and ended in."""
    seen: list[dict[str, Any]] = []

    def spy(model: nn.Module, data: ImageData, recipe: Recipe, **options: Any) -> Any:
        before = full_state(model)
        result = train(model, data, recipe, **options)
        seen.append({**options, "recipe": recipe, "before": before, "after": full_state(model)})
        return result

    monkeypatch.setattr("autosparse.search.dissipating.train", spy)
    return seen


def test_displacement_by_hand() -> None:
    weight, initial = torch.tensor([1.5, -3.0, 0.0, 0.5]), torch.tensor([1.0, -2.0, 0.25, 0.0])
    assert displacement(weight, initial, "absolute").tolist() == [0.5, 1.0, 0.25, 0.5]
    relative = displacement(weight, initial, "relative")
    assert relative[:3].tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert relative[3] > 1e6 and relative.isfinite().all(), "an exact zero that moves moved most"


def layered(**shapes: int) -> dict[str, Layer]:
    return {name: Layer(name, "linear", (1, size)) for name, size in shapes.items()}


def kept(masks: Masks) -> dict[str, list[int]]:
    return {n: m.flatten().int().tolist() for n, m in masks.items()}


CHANGES = {"a": torch.tensor([[0.9, 0.1, 0.5, 0.2]]), "b": torch.tensor([[0.05, 0.3, 0.15, 0.8]])}


def within(a: str = "1111", b: str = "1111") -> Masks:
    tensors: dict[str, Tensor] = {n: torch.tensor([[c == "1" for c in t]]) for n, t in {"a": a, "b": b}.items()}
    return Masks(tensors, layered(a=4, b=4))


def test_removal_by_hand() -> None:
    layers = layered(a=4, b=4)
    assert kept(remove(CHANGES, within(), 0.5, layers)) == {"a": [1, 0, 1, 0], "b": [0, 1, 0, 1]}
    assert kept(remove(CHANGES, within("0111"), 0.375, layers)) == {"a": [0, 0, 1, 0], "b": [0, 1, 0, 1]}
    assert kept(remove(CHANGES, within(b="1100"), 0.5, layers, scope="uniform")) == {
        "a": [1, 0, 1, 0],
        "b": [1, 1, 0, 0],
    }


def test_removal_by_threshold_by_hand() -> None:
    layers = layered(a=4, b=4)
    over = remove(CHANGES, within(), 0.25, layers, threshold=0.15, scope="uniform")
    assert kept(over) == {"a": [1, 0, 1, 1], "b": [0, 1, 0, 1]}, "0.15 itself goes; no scope evens it out"
    assert kept(remove(CHANGES, within("0111"), 0.25, layers, threshold=0.15)) == {"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]}
    assert kept(remove(CHANGES, within(), 0.25, layers, threshold=0.0)) == {"a": [1] * 4, "b": [1] * 4}
    bound = remove(CHANGES, within(), 0.5, layers, threshold=0.6)
    assert kept(bound) == {"a": [1, 0, 1, 0], "b": [0, 1, 0, 1]}, "not below the density"
    changes = {"a": CHANGES["a"], "b": CHANGES["b"] / 100}
    floored = remove(changes, within(), 0.25, layers, threshold=0.15, floor=0.25)
    assert kept(floored) == {"a": [1, 0, 1, 1], "b": [0, 0, 0, 1]}, "a floor adds, and takes nothing from who is over"


@pytest.mark.parametrize("change", ["relative", "absolute"])
def test_what_moved_least_goes(change: str, digits: ImageData, convnet: Make, trainings: list, unchanged: Any) -> None:
    """Densities, order and continuity, from what each epoch started from and ended in."""
    model = convnet()
    origin = full_state(model)
    with unchanged(model):
        found = run(model, digits, DissipatingSettings(epochs=3, change=change), 0.1)
    total = found.masks.total
    path = [1, 0.1 ** (1 / 3), 0.1 ** (2 / 3), 0.1]
    each_masks = [*(each["masks"] for each in trainings), found.masks]
    assert [m.kept for m in each_masks] == [round(d * total) for d in path]
    assert found.masks.report.origin["densities"] == [m.density for m in each_masks[1:]]
    assert (found.epochs, found.steps, found.masks.report.notes) == (3.0, 12, ())
    for index, each in enumerate(trainings):
        assert (each["start_step"], each["stop_step"]) == (4 * index, 4 * index + 4)
        assert each["recipe"] == dataclasses.replace(RECIPE, weight_decay=0.0)
        before = origin if index == 0 else trainings[index - 1]["after"]
        assert all(torch.equal(v, before[n]) for n, v in each["before"].items()), "not rewound in between"
        ours, following = each["masks"], each_masks[index + 1]
        moved = {n: (each["after"][n] - origin[n]).abs() for n in ours}
        if change == "relative":
            moved = {n: v / (origin[n].abs() + 1e-8) for n, v in moved.items()}
        stay = torch.cat([moved[n][following[n]] for n in ours])
        gone = torch.cat([moved[n][ours[n] & ~following[n]] for n in ours])
        assert all((following[n] <= ours[n]).all() for n in ours) and stay.min() >= gone.max()
    assert found.weights is not None
    for name, value in trainings[-1]["after"].items():
        mask = found.masks[name] if name in found.masks else torch.ones_like(value)
        assert torch.equal(found.weights[name], value * mask)


def test_a_threshold_that_leaves_too_much_says_so(digits: ImageData, convnet: Make) -> None:
    settings = DissipatingSettings(epochs=2, by="threshold", threshold=1e-6)
    found = run(convnet(), digits, settings, 0.2)
    assert found.masks.density > 0.9 and found.epochs == 2
    assert found.masks.report.notes == (f"threshold 1e-06 left density {found.masks.density:.4g}, asked 0.2",)


def test_a_threshold_that_takes_all_stops_at_the_density(digits: ImageData, convnet: Make, trainings: list) -> None:
    found = run(convnet(), digits, DissipatingSettings(by="threshold", threshold=1e6), 0.2)
    assert found.masks.kept == round(0.2 * found.masks.total) and found.masks.report.notes == ()
    assert (found.epochs, found.steps, len(trainings)) == (1.0, 4, 1), "nothing left to remove, nothing to train for"


def test_a_threshold_between(digits: ImageData, convnet: Make, trainings: list) -> None:
    found = run(convnet(), digits, DissipatingSettings(epochs=1, by="threshold", threshold=0.1), 0.05)
    origin = full_state(convnet())
    for name, mask in found.masks.items():
        moved = (trainings[0]["after"][name] - origin[name]).abs()
        assert torch.equal(mask, moved / (origin[name].abs() + 1e-8) > 0.1)


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
def test_within_start_masks(scope: str, digits: ImageData, convnet: Make) -> None:
    model = convnet()
    layers = prunable_layers(model)
    generator = torch.Generator().manual_seed(0)
    start = Masks({n: torch.rand(layer.shape, generator=generator) < 0.5 for n, layer in layers.items()}, layers)
    found = run(model, digits, DissipatingSettings(epochs=2), 0.1, masks=start, scope=scope, floor=0.02)
    assert all((m <= start[n]).all() for n, m in found.masks.items())
    assert found.masks.kept == round(0.1 * found.masks.total)
    assert found.masks.report.origin["densities"][0] == pytest.approx(math.sqrt(start.density * 0.1), abs=1e-3)
    assert all(layer.density >= 0.02 for layer in found.masks.layers())
    assert start.report.origin == {}, "the caller's masks stay as they were"


def test_masks_at_the_density_already(digits: ImageData, convnet: Make) -> None:
    first = run(convnet(), digits, DissipatingSettings(epochs=1), 0.2)
    found = run(convnet(), digits, DissipatingSettings(), 0.2, masks=first.masks)
    assert found.masks == first.masks and (found.epochs, found.steps) == (0.0, 0)


def test_same_seed_same_masks(digits: ImageData, convnet: Make) -> None:
    one, two, other = (run(convnet(), digits, DissipatingSettings(epochs=2), seed=s) for s in (0, 0, 1))
    assert same(one, two) and one.masks != other.masks


class Stop(Exception):
    pass


def stopping(after: int, rows: list) -> Callable[[dict[str, float]], None]:
    def on_epoch(row: dict[str, float]) -> None:
        rows.append(row["epoch"])
        if len(rows) == after:
            raise Stop

    return on_epoch


@pytest.mark.parametrize("by", ["rank", "threshold"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_stop_loses_only_the_epoch_in_flight(
    after: int, by: str, digits: ImageData, convnet: Make, tmp_path: Path
) -> None:
    settings = DissipatingSettings(3, by, **({"threshold": 0.01} if by == "threshold" else {}))  # type: ignore[arg-type]
    whole = run(convnet(), digits, settings)
    model = convnet()
    before = full_state(model)
    with pytest.raises(Stop):
        run(model, digits, settings, state=tmp_path, on_epoch=stopping(after, []))
    assert all(torch.equal(v, before[n]) for n, v in full_state(model).items())
    rest: list[float] = []
    found = run(convnet(), digits, settings, state=tmp_path, on_epoch=stopping(9, rest))
    assert same(found, whole) and rest == list(range(after, 4))
    again = run(convnet(), digits, settings, state=tmp_path, on_epoch=stopping(1, []))
    assert same(again, whole) and again.seconds == found.seconds
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("dissipating.json", "masks3.safetensors", "weights3.safetensors")
    ]


def test_the_state_of_another_search_is_refused(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    settings = DissipatingSettings(epochs=1)
    found = run(convnet(), digits, settings, 0.5, state=tmp_path)
    for other in ({"seed": 1}, {"density": 0.2}, {"masks": found.masks, "density": 0.5}, {"scope": "erk"}):
        with pytest.raises(AutoSparseError, match=r"dissipating\.json is of another search"):
            run(convnet(), digits, settings, **{"density": 0.5, "state": tmp_path, **other})


def both(model: nn.Module, data: ImageData, density: float = 0.09, **options: Any) -> SearchResult:
    starts, dissipation = KStartsSettings(k=2, epochs=0.5), DissipatingSettings(epochs=2)
    settings = CombinedSettings(starts, dissipation, options.pop("between", None))
    options = {"scope": "global", **options}
    return combined(model, prunable_layers(model), data, RECIPE, settings, density, device="cpu", **options)


def test_the_combination(digits: ImageData, convnet: Make, trainings: list, unchanged: Any) -> None:
    """Within the winner, from `θ₀` again; both costs."""
    model = convnet()
    origin = full_state(model)
    with unchanged(model):
        found = both(model, digits)
    winner = trainings[0]["masks"]
    assert winner.kept == round(0.3 * winner.total), "√0.09"
    assert all(torch.equal(v, origin[n]) for n, v in trainings[0]["before"].items())
    assert all((m <= winner[n]).all() for n, m in found.masks.items())
    assert found.masks.kept == round(0.09 * winner.total)
    assert (found.epochs, found.steps, len(found.fitness)) == (2 * 0.5 + 2, 8, 2)
    assert found.masks.report.origin["criterion"] == "kstarts+dissipating"
    both(model, digits, between=0.5)
    assert trainings[2]["masks"].kept == round(0.5 * winner.total)
    with pytest.raises(AutoSparseError, match=r"between is 0\.05: it must be at least the density 0\.09"):
        both(model, digits, between=0.05)


@pytest.mark.parametrize("after", [2, 4])
def test_a_stop_in_the_combination(after: int, digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    whole = both(convnet(), digits)
    with pytest.raises(Stop):
        both(convnet(), digits, state=tmp_path, on_epoch=stopping(after, []))
    rest: list[float] = []
    found = both(convnet(), digits, state=tmp_path, on_epoch=stopping(9, rest))
    assert same(found, whole) and len(rest) == 4 - (after - 1)
    found.masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert loaded == found.masks and loaded.report.origin["kstarts"]["k"] == 2


def test_mistakes_are_named(digits: ImageData, convnet: Make) -> None:
    with pytest.raises(AutoSparseError, match=r"dissipating\.epochs is 4: a training has 3 epochs; lower it"):
        run(convnet(), digits, DissipatingSettings(epochs=4))
    with pytest.raises(AutoSparseError, match=r"scope is 'layer': known: global, uniform, erk"):
        run(convnet(), digits, DissipatingSettings(), scope="layer")
    with pytest.raises(AutoSparseError, match=r"floor is 0\.5: it asks for .* the density keeps"):
        run(convnet(), digits, DissipatingSettings(), floor=0.5)
    with pytest.raises(AutoSparseError, match="masks to start within are another model's"):
        run(convnet(), digits, DissipatingSettings(), masks=Masks({"a": torch.ones(1, dtype=torch.bool)}))
    model = convnet()
    layers = prunable_layers(model)
    few = Masks({n: torch.zeros(layer.shape, dtype=torch.bool) for n, layer in layers.items()}, layers)
    with pytest.raises(AutoSparseError, match=r"density is 0\.2: the masks to start within keep 0; lower it"):
        run(model, digits, DissipatingSettings(), masks=few)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"by": "magnitude"},
        {"change": "signed"},
        {"threshold": -1.0},
        {"threshold": math.inf},
        {"threshold": 0.2},
    ],
    ids=str,
)
def test_bad_settings(wrong: dict) -> None:
    key, value = next(iter(wrong.items()))
    with pytest.raises(AutoSparseError, match=rf"dissipating\.{key} is {value!r}"):
        DissipatingSettings(**wrong)
