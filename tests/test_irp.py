"""Iterative rewind pruning: exact densities, monotone masks, whole rewinds, resumed rounds."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.masks.layers import prunable_layers
from autosparse.masks.mask import Masks
from autosparse.pruning.criteria import CRITERIA, HandMade
from autosparse.search.irp import IRPSettings, Round, full_state, irp
from autosparse.training.data import ImageData
from autosparse.training.recipe import Recipe
from autosparse.training.train import train

Make = Callable[..., nn.Module]
RECIPE = Recipe(epochs=2, batch_size=16, lr=0.05)


def run(model: nn.Module, data: ImageData, settings: IRPSettings, **options: Any) -> list[Round]:
    recipe = options.pop("recipe", RECIPE)
    return list(irp(model, prunable_layers(model), data, recipe, settings, device="cpu", **options))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The whole state of the network at the start of each training of IRP."""
    seen: list[dict[str, Tensor]] = []

    def spy(model: nn.Module, *args: Any, **options: Any) -> Any:
        seen.append(full_state(model))
        return train(model, *args, **options)

    monkeypatch.setattr("autosparse.search.irp.train", spy)
    return seen


@pytest.mark.parametrize("criterion", ["magnitude", "snip"])
@pytest.mark.parametrize("schedule", ["geometric", "linear"])
@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
def test_densities_are_exact_and_masks_monotone(
    criterion: str, schedule: str, scope: str, digits: ImageData, convnet: Make
) -> None:
    settings = IRPSettings(rounds=3, density=0.1, schedule=schedule, criterion=criterion, scope=scope)
    path = [1, 0.1 ** (1 / 3), 0.1 ** (2 / 3), 0.1] if schedule == "geometric" else [1, 0.7, 0.4, 0.1]
    assert settings.densities() == pytest.approx(path)
    rounds = run(convnet(), digits, settings, recipe=Recipe(steps=2, batch_size=16, lr=0.05))
    total = rounds[0].masks.total
    assert [r.index for r in rounds] == [0, 1, 2, 3]
    assert [r.masks.kept for r in rounds] == [round(d * total) for d in settings.densities()]
    assert [r.density for r in rounds] == [r.masks.density for r in rounds]
    for one, following in itertools.pairwise(rounds):
        assert one.next_masks == following.masks
        assert all((following.masks[n] <= one.masks[n]).all() for n in one.masks)
    assert rounds[-1].next_masks is None


def test_the_highest_trained_weights_of_a_round_stay(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    layers = prunable_layers(model)
    rounds = irp(model, layers, digits, RECIPE, IRPSettings(rounds=2, density=0.25), device="cpu")
    for outcome in (next(rounds), next(rounds)):
        flat = torch.cat([(model.get_parameter(n).abs() * outcome.masks[n]).flatten() for n in layers])
        kept = torch.cat([outcome.next_masks[n].flatten() for n in layers])
        assert flat[kept].min() >= flat[~kept].max()
        assert all((model.get_parameter(n)[~outcome.masks[n]] == 0).all() for n in layers)


def test_what_a_round_removed_stays_removed(digits: ImageData, convnet: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the criterion would have it back."""
    turned = HandMade("magnitude", lambda s, _: {n: -w.abs() for n, w in s["weight"].items()}, ("weight",))
    monkeypatch.setitem(CRITERIA, "magnitude", turned)
    rounds = run(convnet(), digits, IRPSettings(rounds=2, density=0.4), recipe=Recipe(steps=1, batch_size=16))
    for one, following in itertools.pairwise(rounds):
        assert all((following.masks[n] <= one.masks[n]).all() for n in one.masks)


class Counting(nn.Module):
    """A network with a buffer outside of `state_dict` that training changes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return self.inner(x)


def test_everything_is_rewound(digits: ImageData, convnet: Make, starts: list) -> None:
    model = Counting(convnet())
    original = full_state(model)
    assert {"seen", "inner.features.1.running_mean", "inner.features.1.num_batches_tracked"} <= set(original)
    run(model, digits, IRPSettings(rounds=2, density=0.5))
    assert len(starts) == 3
    assert all(same(state, original) for state in starts)
    assert not same(full_state(model), original)


def test_late_rewinding(digits: ImageData, convnet: Make, starts: list) -> None:
    """Rounds start at the weights of step 3 and train the steps from there on."""
    model, states = convnet(), []
    rounds = run(
        model, digits, IRPSettings(rounds=1, density=0.5, rewind_step=3), seed=5, on_rewind_state=states.append
    )
    expected = convnet()
    train(expected, digits, RECIPE, seed=5, device="cpu", stop_step=3)
    assert same(states[0], full_state(expected))
    assert same(starts[0], full_state(convnet()))
    assert len(starts) == 3 and all(same(s, states[0]) for s in starts[1:])
    assert [(r.trained.steps, r.trained.epochs) for r in rounds] == [(8, 5 / 4)] * 2
    train(expected, digits, RECIPE, masks=rounds[1].masks, seed=5, device="cpu", start_step=3)
    assert same(full_state(expected), full_state(model))


def figures(rounds: list[Round]) -> list[tuple]:
    return [(r.index, r.density, r.trained.accuracy, r.trained.loss, r.trained.history) for r in rounds]


@pytest.mark.parametrize("rewind_step", [0, 2])
@pytest.mark.parametrize("start", [1, 2])
def test_resumed_rounds_equal_the_uninterrupted(
    start: int, rewind_step: int, digits: ImageData, convnet: Make, tmp_path: Path
) -> None:
    settings = IRPSettings(rounds=2, density=0.2, rewind_step=rewind_step, criterion="snip")
    whole, states = convnet(), []
    rounds = run(whole, digits, settings, seed=1, on_rewind_state=states.append)
    parts = convnet()
    rest = run(
        parts,
        digits,
        settings,
        seed=1,
        start=start,
        masks=rounds[start - 1].next_masks,
        rewind=states[0] if rewind_step else None,
    )
    assert figures(rest) == figures(rounds[start:])
    assert [r.next_masks for r in rest] == [r.next_masks for r in rounds[start:]]
    assert same(full_state(whole), full_state(parts))


def test_a_stop_inside_a_round(
    digits: ImageData, convnet: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 1 is stopped after its second epoch; it goes on from its checkpoint, not from its start."""
    recipe = Recipe(epochs=3, batch_size=16, lr=0.05)
    settings = IRPSettings(rounds=1, density=0.5)
    rounds = run(convnet(), digits, settings, recipe=recipe, on_epoch=lambda row: None)

    class Stop(Exception):
        pass

    epochs: list[int] = []

    def on_epoch(row: dict[str, float]) -> None:
        epochs.append(int(row["epoch"]))
        if len(epochs) == 6:
            raise Stop

    plain = train
    monkeypatch.setattr("autosparse.search.irp.train", lambda *a, **o: plain(*a, **o, checkpoint_every=0.0))
    checkpoint = tmp_path / "training.pt"
    done: list[Round] = []
    model = convnet()
    with pytest.raises(Stop):
        for outcome in irp(
            model,
            prunable_layers(model),
            digits,
            recipe,
            settings,
            device="cpu",
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        ):
            done.append(outcome)
    assert len(done) == 1 and checkpoint.exists() and epochs == [1, 2, 3, 1, 2, 3]
    epochs.clear()
    options = {"recipe": recipe, "checkpoint": checkpoint, "on_epoch": on_epoch}
    rest = run(convnet(), digits, settings, start=1, masks=done[0].next_masks, **options)
    assert epochs == [3]
    assert figures([*done, *rest]) == figures(rounds)
    assert not checkpoint.exists()


def test_the_checkpoint_of_another_round_is_refused(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    checkpoint = tmp_path / "training.pt"
    masks = run(convnet(), digits, IRPSettings(rounds=1, density=0.5))[0].next_masks

    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            convnet(),
            digits,
            RECIPE,
            masks=masks,
            device="cpu",
            checkpoint=checkpoint,
            checkpoint_every=0,
            on_epoch=stop,
        )
    assert checkpoint.exists()
    with pytest.raises(AutoSparseError, match="cannot be resumed: it is of another training"):
        run(convnet(), digits, IRPSettings(rounds=1, density=0.5), checkpoint=checkpoint)


def test_same_seed_same_rounds(digits: ImageData, convnet: Make) -> None:
    settings = IRPSettings(rounds=1, density=0.3, criterion="snip")
    state = torch.get_rng_state()
    one, two, other = (run(convnet(), digits, settings, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert figures(one) == figures(two) and one[0].next_masks == two[0].next_masks
    assert one[0].next_masks != other[0].next_masks


def test_a_floor_in_every_round(digits: ImageData, convnet: Make) -> None:
    rounds = run(convnet(), digits, IRPSettings(rounds=2, density=0.06, floor=0.05))
    for outcome in rounds:
        assert all(layer.density >= 0.05 for layer in outcome.masks.layers())
    assert rounds[-1].masks.kept == round(0.06 * rounds[-1].masks.total)


def test_a_training_that_diverges_keeps_the_rounds_before(digits: ImageData, convnet: Make) -> None:
    model, done = convnet(), []
    rounds = irp(model, prunable_layers(model), digits, RECIPE, IRPSettings(rounds=2, density=0.2), device="cpu")
    done.append(next(rounds))
    masks = done[0].next_masks
    broken = copy.deepcopy(convnet())
    broken.classifier.bias.data.fill_(torch.nan)
    with pytest.raises(AutoSparseFailure, match="training diverged"):
        run(broken, digits, IRPSettings(rounds=2, density=0.2), start=1, masks=masks)


def test_mistakes_are_named(digits: ImageData, convnet: Make) -> None:
    settings = IRPSettings(rounds=1, density=0.2)
    with pytest.raises(AutoSparseError, match=r"irp\.rewind_step is 8: a training has 8 steps"):
        run(convnet(), digits, IRPSettings(rounds=1, density=0.2, rewind_step=8))
    with pytest.raises(AutoSparseError, match=r"irp\.floor is 0\.5: it is above the final density irp\.density"):
        run(convnet(), digits, IRPSettings(rounds=1, density=0.2, floor=0.5))
    with pytest.raises(AutoSparseError, match="masks to continue from are another model's"):
        run(convnet(), digits, settings, start=1, masks=Masks({"a": torch.ones(1, dtype=torch.bool)}))
    with pytest.raises(AutoSparseError, match=r"state to rewind to does not fit .* another model's"):
        run(convnet(), digits, settings, rewind=full_state(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rounds": 0}, {"rounds": 256}, {"density": 0.0}, {"density": 1.0}, {"schedule": "cubic"}),
        *({"criterion": "random"}, {"scope": "layer"}, {"rewind_step": -1}, {"floor": 1.0}, {"n_batches": 0}),
    ],
    ids=str,
)
def test_bad_settings(wrong: dict) -> None:
    key, value = next(iter(wrong.items()))
    with pytest.raises(AutoSparseError, match=rf"irp\.{key} is {value!r}"):
        IRPSettings(**wrong)
