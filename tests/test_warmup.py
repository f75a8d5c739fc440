"""Signals of a warm-up: by hand, over horizons and data orders, and nothing of the network changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.masks.layers import prunable_layers
from autosparse.network.signals import SignalSettings, parse_warmup
from autosparse.pruning.prune import prune
from autosparse.pruning.warmup import Warm, WarmupSettings, order_seeds
from autosparse.pruning.warmup import warmup as warmup_anywhere
from autosparse.training.data import ImageData, Split
from autosparse.training.recipe import Recipe
from autosparse.training.train import train

Make = Callable[..., nn.Module]
Guard = Callable[[nn.Module], AbstractContextManager[None]]
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.1, schedule="cosine")  # four steps an epoch of `digits`
ALL = ("warm_weight@1", "displacement@1", "accumulated_gradient@1")


def warmup(model: nn.Module, data: ImageData, names: Any, recipe: Recipe = RECIPE, **options: Any) -> Warm:
    return warmup_anywhere(model, prunable_layers(model), data, recipe, names, device="cpu", **options)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, other[name]) for name, value in one.items())


# -- what the signals are ----------------------------------------------------------------------------------------------

# Two equal images x = (2, 0) of class 0 through `softmax(θx)`; batches of one, so that an epoch has two steps.
IMAGES = Split(torch.tensor([2, 0], dtype=torch.uint8).view(1, 1, 1, 2).repeat(2, 1, 1, 1), torch.zeros(2).long())
LITERAL = ImageData(IMAGES, IMAGES, IMAGES, 2, torch.zeros(1), torch.full((1,), 1 / 255), "none")
PLAIN = Recipe(epochs=1, batch_size=1, lr=2.5, momentum=0.0, nesterov=False, weight_decay=0.3)


def linear() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.25, 1.0], [0.25, -1.0]]))
    return model


def test_two_steps_by_hand() -> None:
    """First p₀ = ½, so g = (p − y)xᵀ has ∓1 in its first column; at learning rate 2.5/5 then the logits are (1.5, −0.5)
    and p₀ = σ(2), so that the second gradient has ∓2(1 − σ(2))."""
    names = (*ALL, "warm_weight@0.5", "displacement@0.5", "accumulated_gradient@0.5")
    found = warmup(linear(), LITERAL, names, PLAIN)
    second = 2 * (1 - 1 / (1 + math.exp(-2)))
    start = torch.tensor([[0.25, 1.0], [0.25, -1.0]])
    for horizon, total in (("0.5", 1.0), ("1", 1 + second)):
        gradient = torch.tensor([[-total, 0.0], [total, 0.0]])
        for signal, value in (
            ("accumulated_gradient", gradient),
            ("displacement", -0.5 * gradient),
            ("warm_weight", start - 0.5 * gradient),
        ):
            torch.testing.assert_close(found.signals[f"{signal}@{horizon}"]["1.weight"], value, rtol=1e-6, atol=1e-7)
    assert found.epochs == 1.0 and list(found.signals) == list(names)


def test_the_learning_rate_is_the_settings_or_a_fifth_of_the_recipes() -> None:
    a = warmup(linear(), LITERAL, ["displacement@0.5"], PLAIN, settings=WarmupSettings(lr=0.125))
    assert a.signals["displacement@0.5"]["1.weight"].tolist() == [[0.125, 0.0], [-0.125, 0.0]]
    b, c = (warmup(linear(), LITERAL, ["displacement@1"], PLAIN, settings=WarmupSettings(lr=r)) for r in (None, 0.5))
    assert_equal(b.signals["displacement@1"], c.signals["displacement@1"])


def test_the_learning_rate_is_constant_and_nothing_decays() -> None:
    plain = warmup(linear(), LITERAL, ["displacement@1"], PLAIN).signals["displacement@1"]
    for other in (
        replace(PLAIN, schedule="onecycle", warmup=0.4),
        replace(PLAIN, weight_decay=0.0),
        replace(PLAIN, epochs=9, steps=7),
    ):
        assert_equal(warmup(linear(), LITERAL, ["displacement@1"], other).signals["displacement@1"], plain)


def test_a_horizon_is_at_least_one_step() -> None:
    short = warmup(linear(), LITERAL, ["displacement@0.001"], PLAIN)
    assert short.epochs == 0.5
    half = warmup(linear(), LITERAL, ["displacement@0.5"], PLAIN)
    assert_equal(short.signals["displacement@0.001"], half.signals["displacement@0.5"])


def test_horizons_of_one_warmup_are_those_of_separate_ones(digits: ImageData, convnet: Make) -> None:
    names = [f"{signal}@{t}" for signal in ("accumulated_gradient", "displacement", "warm_weight") for t in (2, 0.5)]
    together = warmup(convnet(), digits, names)
    assert together.epochs == 2
    for name in names:
        alone = warmup(convnet(), digits, [name])
        assert alone.epochs == float(name.partition("@")[2])
        assert_equal(alone.signals[name], together.signals[name])


def test_data_orders_are_averaged(digits: ImageData, convnet: Make) -> None:
    """Against trainings of our own with the seeds of the orders."""
    found = warmup(convnet(), digits, ALL, settings=WarmupSettings(orders=2), seed=5)
    assert found.epochs == 2
    seeds = order_seeds(5, 2)
    assert len({5, *seeds}) == 3 and order_seeds(5, 1) == seeds[:1]
    wanted: dict[str, list[Tensor]] = {name: [] for name in ALL}
    for seed in seeds:
        model = convnet()
        weight = dict(model.named_parameters())["features.0.weight"]
        start, gradients = weight.detach().clone(), []
        recipe = Recipe(epochs=1, batch_size=16, lr=0.02, schedule="constant", weight_decay=0.0)

        def note(_: int, weight: nn.Parameter = weight, gradients: list[Tensor] = gradients) -> None:
            assert weight.grad is not None
            gradients.append(weight.grad.clone())

        train(model, digits, recipe, seed=seed, device="cpu", on_gradient=note)
        assert len(gradients) == 4
        for name, value in zip(ALL, (weight, weight - start, sum(gradients)), strict=True):
            wanted[name].append(torch.as_tensor(value).detach())
    for name, (one, two) in wanted.items():
        torch.testing.assert_close(found.signals[name]["features.0.weight"], (one + two) / 2, rtol=1e-6, atol=1e-8)


def test_signals_are_a_function_of_the_seed(digits: ImageData, convnet: Make) -> None:
    one, two, other = (warmup(convnet(), digits, ["displacement@1"], seed=s).signals for s in (0, 0, 1))
    assert_equal(one["displacement@1"], two["displacement@1"])
    assert differ(one["displacement@1"], other["displacement@1"])


def test_signals_have_the_shapes_of_the_weights(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    layers = prunable_layers(model)
    for tensors in warmup(model, digits, ALL).signals.values():
        assert {n: t.shape for n, t in tensors.items()} == {n: torch.Size(l.shape) for n, l in layers.items()}
        assert not any(t.requires_grad for t in tensors.values())


def test_masks_hold(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    masks = prune(model, 0.5, "random", seed=1)
    found = warmup(model, digits, ALL, masks=masks).signals
    for name, mask in masks.items():
        warm, moved, gradient = (found[signal][name] for signal in ALL)
        assert not warm[~mask].any() and not moved[~mask].any()
        torch.testing.assert_close(warm - moved, dict(model.named_parameters())[name].detach() * mask)
        assert gradient[~mask].any(), "pruned weights have gradients too"


# -- what it does not do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(digits: ImageData, convnet: Make, unchanged: Guard, training: bool) -> None:
    model = convnet().train(training)
    model(torch.ones(3, 1, 8, 8)).sum().backward()
    masks = prune(model, 0.5, "random", seed=1)
    with unchanged(model):
        warmup(model, digits, ALL, settings=WarmupSettings(orders=2), masks=masks)


def test_a_frozen_layer_does_not_move(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    first = next(model.parameters()).requires_grad_(False)
    found = warmup(model, digits, ALL).signals
    name = next(iter(prunable_layers(model)))
    assert torch.equal(found["warm_weight@1"][name], first)
    assert not found["displacement@1"][name].any() and not found["accumulated_gradient@1"][name].any()


def test_a_wrapped_model_is_the_model(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    wanted = warmup(model, digits, ["displacement@1"]).signals["displacement@1"]
    assert_equal(warmup(nn.DataParallel(model), digits, ["displacement@1"]).signals["displacement@1"], wanted)


def test_only_training_images_are_looked_at(digits: ImageData, convnet: Make) -> None:
    rows: list[dict[str, float]] = []
    blank = Split(digits.test.images * 0, digits.test.labels * 0)
    other = replace(digits, test=blank, validation=blank)
    one, two = (warmup(convnet(), data, ALL, on_epoch=rows.append).signals for data in (digits, other))
    for name in ALL:
        assert_equal(one[name], two[name])
    assert [row["step"] for row in rows] == [4, 4]
    assert all(math.isnan(row["accuracy"]) and math.isfinite(row["loss"]) for row in rows)


def test_a_divergence_is_told_and_leaves_the_model(digits: ImageData, convnet: Make, unchanged: Guard) -> None:
    model = convnet()
    with unchanged(model), pytest.raises(AutoSparseFailure, match="training diverged: the loss is not finite"):
        warmup(model, digits, ALL, settings=WarmupSettings(lr=1e30))
    bright = replace(LITERAL, std=torch.full((1,), 1e-9))  # no loss follows the last step, but its weights overflow
    model = linear()
    with unchanged(model), pytest.raises(AutoSparseFailure, match=r"warm-up diverged: .* after 1 steps \(lr 1e\+38\)"):
        warmup(model, bright, ["warm_weight@0.5"], PLAIN, settings=WarmupSettings(lr=1e38))


# -- names and settings ------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert parse_warmup("displacement@0.5") == ("displacement", 0.5)
    assert parse_warmup("warm_weight@2") == ("warm_weight", 2.0)
    assert parse_warmup("gradient") is None and parse_warmup("gradient@1") is None
    for name in (
        "displacement",
        "displacement@",
        "displacement@0",
        "displacement@-1",
        "displacement@nan",
        "warm_weight@x",
    ):
        with pytest.raises(AutoSparseError, match=f"signal is '{name}': give its horizon, .* as in '.*@0.5'"):
            parse_warmup(name)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["gradient"], "signal of a warm-up is 'gradient': .*displacement@1"),
        (["displacment@1"], "signal of a warm-up is 'displacment@1': did you mean 'displacement@1'"),
        (["displacement@0"], "signal is 'displacement@0'"),
        ([], "names of the warm-up's signals are empty"),
    ],
)
def test_mistakes_in_names(digits: ImageData, convnet: Make, names: list[str], match: str) -> None:
    with pytest.raises(AutoSparseError, match=match):
        warmup(convnet(), digits, names)


def test_settings_check_themselves() -> None:
    for options, match in (({"orders": 0}, "warmup.orders is 0"), ({"lr": 0.0}, "warmup.lr is 0.0")):
        with pytest.raises(AutoSparseError, match=match):
            WarmupSettings(**options)  # type: ignore[arg-type]
    for recorded, match in (
        ({"names": ("displacement@0",)}, "signal is 'displacement@0'"),
        ({"names": ("displacment@1",)}, "signal is 'displacment@1': did you mean 'displacement@1'"),
        ({"warmup_orders": 0}, "signals.warmup_orders is 0"),
        ({"warmup_lr": math.inf}, "signals.warmup_lr is inf"),
    ):
        with pytest.raises(AutoSparseError, match=match):
            SignalSettings(**recorded)  # type: ignore[arg-type]
    assert SignalSettings(("weight", "displacement@0.1")).warmup_names() == ["displacement@0.1"]


# -- pruning by them ---------------------------------------------------------------------------------------------------


def test_prune_by_what_moved(digits: ImageData, convnet: Make) -> None:
    model = convnet()
    signals = warmup(model, digits, ["displacement@0.5", "displacement@2"]).signals
    layers = prunable_layers(model)
    for horizon in ("0.5", "2"):
        masks = prune(model, 0.7, f"movement@{horizon}", signals=signals)
        moved = {n: t.abs() for n, t in signals[f"displacement@{horizon}"].items()}
        kept = torch.cat([moved[n][masks[n]] for n in layers])
        gone = torch.cat([moved[n][~masks[n]] for n in layers])
        assert len(kept) == round(0.3 * (len(kept) + len(gone))) and kept.min() >= gone.max()


def test_prune_without_a_warmup_says_what_is_missing(convnet: Make) -> None:
    for criterion, signal in (("movement", "displacement@1"), ("early_magnitude@3", "warm_weight@3")):
        with pytest.raises(AutoSparseError, match=f"needs '{signal}', a signal of a warm-up: give signals=warmup") as e:
            prune(copy.deepcopy(convnet()), 0.5, criterion)
        assert "\n" not in str(e.value)
