"""Masks that change while a network trains: each update by hand, the handle in a user's own loop, stops."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer
from autosparse.masks.updates import exchange, exchange_fraction, gradual_density
from autosparse.search.dynamic import GraNetSettings, RigLSettings, SETSettings
from autosparse.search.gmp import ACDCSettings, GMPSettings
from autosparse.search.sparsify import SparseTraining, Update

METHODS: dict[str, dict[str, Any]] = {
    "gmp": {"every": 2},
    "set": {"every": 2},
    "rigl": {"every": 2},
    "granet": {"every": 2},
    "acdc": {},
}


def grid(*values: float) -> Tensor:
    return torch.tensor(values).view(2, -1)


def bits(*values: int) -> Tensor:
    return grid(*values).bool()


# -- each rule, by hand -------------------------------------------------------------------------------------------------


def test_the_gradual_density_by_hand() -> None:
    # ρ = 0.2: 0.2 + 0.8 · (1 − r)³
    assert [gradual_density(0.2, r) for r in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 0.3, 0.2, 0.2])
    assert gradual_density(0.2, 0.5, start=0.6) == pytest.approx(0.25)


def test_the_exchanged_fraction_by_hand() -> None:
    values = [exchange_fraction(0.4, r) for r in (0, 1 / 3, 0.5, 1, 3)]
    assert values == pytest.approx([0.4, 0.3, 0.2, 0, 0])


def test_an_exchange_by_hand() -> None:
    """Half of four go, those of lowest |θ|; of what was pruned the highest growth comes, never what has just gone."""
    weight, mask = grid(3, -1, 2, 0, 0, -4), bits(1, 1, 1, 0, 0, 1)
    growth = grid(9, 9, 9, 1, 2, 9)
    assert exchange(weight, mask, growth, 0.5).tolist() == bits(1, 0, 0, 1, 1, 1).tolist()
    assert exchange(weight, mask, growth, 0.25).tolist() == bits(1, 0, 1, 0, 1, 1).tolist()
    assert exchange(weight, mask, growth, 0.24).tolist() == mask.tolist(), "less than one weight"
    assert exchange(weight, mask, growth, 1.0).tolist() == exchange(weight, mask, growth, 0.5).tolist(), "two may come"
    dead = grid(1, 1, 1, math.nan, 0, 1)
    assert exchange(weight, mask, dead, 0.25).tolist() == bits(1, 0, 1, 0, 1, 1).tolist(), "NaN is the lowest"
    assert int(exchange(weight, mask, grid(*[math.nan] * 6), 0.5).sum()) == 4


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_an_exchange_keeps_the_count_and_takes_nothing_back(seed: int, share: float, fraction: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, growth, noise = torch.rand(3, 5, 7, generator=generator)
    mask = noise < share
    after = exchange(weight, mask, growth, fraction)
    gone, come = mask & ~after, after & ~mask
    assert int(after.sum()) == int(mask.sum()) and not bool((gone & come).any())
    assert int(gone.sum()) == min(int(fraction * int(mask.sum()) + 1e-9), int((~mask).sum()))
    if bool(gone.any()):
        assert weight[gone].max() <= weight[mask & after].min() if bool((mask & after).any()) else True
        assert growth[come].min() >= growth[~mask & ~after].max() if bool((~mask & ~after).any()) else True


def update(method: SparseTraining, weight: Tensor, mask: Tensor, step: int, steps: int = 100, **more: Any) -> Tensor:
    layers = {"w": Layer("w", "linear", tuple(weight.shape))}
    values = {"density": 1 / 6, "scope": None, "floor": 0.0, **more}
    gradients = {"w": values.pop("gradient", None)}
    now = Update({"w": weight}, gradients, {"w": mask}, layers, step=step, steps=steps, seed=0, **values)
    return method.update(now)["w"]


def test_gmp_by_hand() -> None:
    """From step 5 to 70: at 37.5 of them r = ½, ρ = 1/6 + 5/6 · 1/8 = 13/48, of six weights 2."""
    method = GMPSettings(every=5)
    assert [s for s in range(101) if method.due(s, 100)] == [*range(10, 70, 5), 70]
    weight = grid(3, -1, 2, 5, 0, -4)
    assert update(method, weight, bits(1, 1, 1, 1, 1, 1), 37).tolist() == bits(0, 0, 0, 1, 0, 1).tolist()
    assert update(method, weight, bits(1, 1, 1, 1, 1, 0), 70).tolist() == bits(0, 0, 0, 1, 0, 0).tolist()
    assert update(method, weight, bits(1, 0, 1, 0, 0, 0), 70).tolist() == bits(1, 0, 0, 0, 0, 0).tolist(), (
        "what is gone stays gone"
    )


def test_gmp_takes_each_layer_to_its_own_density() -> None:
    layers = {n: Layer(n, "linear", (2, 4)) for n in "ab"}
    weights = {"a": torch.arange(1.0, 9).view(2, 4), "b": 100 * torch.arange(1.0, 9).view(2, 4)}
    ones = {n: torch.ones(2, 4, dtype=torch.bool) for n in "ab"}
    # at r = 1/2: a: 1/2 + 1/2 · 1/8 = 9/16 of eight, 4.5; b: 1/8 + 7/8 · 1/8 = 15/64, 1.875: 6 in all
    now = Update(weights, {}, ones, layers, 5 / 16, {"a": 0.5, "b": 0.125}, 0.0, 50, 100, 0)
    masks = GMPSettings(begin=0, end=1).update(now)
    assert [int(masks[n].sum()) for n in "ab"] == [4, 2]


def test_set_grows_at_random_and_rigl_by_gradient() -> None:
    weight, mask = grid(3, -1, 2, 0, 0, -4), bits(1, 1, 1, 0, 0, 1)
    gradient = grid(9, 9, 9, 1, -2, 9)
    for method in (SETSettings(fraction=0.5), RigLSettings(fraction=0.5)):
        # step 25 of 75: α = 0.5/2 · (1 + cos(π/3)) = 0.375, of four weights 1
        after = update(method, weight, mask, 25, gradient=gradient)
        assert after.sum() == 4 and not after[0, 1], "the smallest went"
        if method.grows_by_gradient:
            assert after.tolist() == bits(1, 0, 1, 0, 1, 1).tolist()
        assert [s for s in range(301) if method.due(s, 300)] == [100, 200]
    drawn = {
        tuple(update(SETSettings(fraction=0.5), weight, mask, s, gradient=gradient).flatten().tolist())
        for s in range(1, 20)
    }
    assert len(drawn) == 2, "either of the two"


def test_granet_prunes_then_exchanges() -> None:
    """Step 25 of 100, r = ½: ρ = 1/6 + 5/6 · 1/8, 2 of 6 stay; then α = 0.5/2 · (1 + cos(π/4)) = 0.43 of 2: none."""
    weight, gradient = grid(3, -1, 2, 5, 0, -4), grid(1, 7, 1, 1, 1, 1)
    method = GraNetSettings(every=25)
    assert [s for s in range(101) if method.due(s, 100)] == [25, 50, 75]
    full = bits(1, 1, 1, 1, 1, 1)
    assert update(method, weight, full, 25, gradient=gradient).tolist() == bits(0, 0, 0, 1, 0, 1).tolist()
    bold = GraNetSettings(every=25, fraction=0.6)  # α = 0.512: one
    assert update(bold, weight, full, 25, gradient=gradient).tolist() == bits(0, 1, 0, 1, 0, 0).tolist()


def test_acdc_by_hand() -> None:
    method = ACDCSettings()
    # sparse from 10, 50, … of 200 steps, dense from 30, 70, …
    assert [s for s in range(201) if method.due(s, 200)] == [*range(10, 171, 20)]
    weight, mask = grid(3, -1, 2, 5, 0, -4), bits(1, 0, 0, 0, 0, 0)
    assert update(method, weight, mask, 30, 200).all(), "dense again"
    assert update(method, weight, mask, 50, 200).tolist() == bits(0, 0, 0, 1, 0, 0).tolist(), "all may come back"
    assert update(method, weight, mask, 170, 200).sum() == 1


# -- in a loop of one's own ---------------------------------------------------------------------------------------------


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)


def optimizer_of(model: nn.Module, kind: str = "sgd") -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)


def step_of(model: nn.Module, optimizer: Any, step: int, parts: int = 1) -> None:
    images, labels = batch(step)
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        (nn.functional.cross_entropy(model(x), y) / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def handle_of(model: nn.Module, optimizer: Any, method: str, steps: int = 30, **more: Any) -> autosparse.Sparsifier:
    return autosparse.sparsify(model, optimizer, method, **{"sparsity": 0.9, "steps": steps, **METHODS[method], **more})


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_its_density(method: str, kind: str) -> None:
    model = network()
    optimizer = optimizer_of(model, kind)
    handle = handle_of(model, optimizer, method)
    first = handle.masks
    counts, before = [], first
    weights = {n: dict(model.named_parameters())[n] for n in before}
    for step in range(30):
        step_of(model, optimizer, step)
        masks = handle.masks
        assert all(not bool(weights[n][~m].any()) for n, m in masks.items()), "pruned weights are zero after every step"
        for name, mask in masks.items():
            gone = before[name] & ~mask
            for value in optimizer.state[weights[name]].values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    assert not bool(value[gone].any()), "their momentum is gone too"
        counts.append(masks.kept)
        before = masks
    assert handle.masks.kept == round(0.1 * handle.masks.total)
    if method == "gmp":
        assert all(b <= a for a, b in itertools.pairwise(counts)), "the density never rises"
    if method in ("set", "rigl"):
        assert len(set(counts)) == 1 and handle.masks != first, "the count stays, the positions change"
    handle.remove()
    step_of(model, optimizer, 99)
    assert any(bool(weights[n][~m].any()) for n, m in handle.masks.items()), "it holds no longer"


@pytest.mark.parametrize("method", METHODS)
def test_a_stop_and_a_resume_change_nothing(method: str) -> None:
    def train(stop: int | None) -> dict[str, Tensor]:
        model = network()
        optimizer = optimizer_of(model)
        handle = handle_of(model, optimizer, method)
        for step in range(30):
            if step == stop:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
                model = network(1)
                optimizer = optimizer_of(model)
                handle = handle_of(model, optimizer, method)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                handle.load_state_dict(saved[2])
            step_of(model, optimizer, step)
        return {**model.state_dict(), **handle.masks, **{f"{n} removed": t for n, t in handle.removed_in.items()}}

    whole = train(None)
    for stop in (1, 13, 20):
        resumed = train(stop)
        assert all(torch.equal(t, resumed[n]) for n, t in whole.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["model, handle, state", "handle, state, model", "handle, model, state"])
def test_a_resume_in_any_order(method: str, order: str) -> None:
    model = network()
    optimizer = optimizer_of(model)
    handle = handle_of(model, optimizer, method)
    for step in range(13):
        step_of(model, optimizer, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    again = network(1)
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(saved[1])
    other = None
    for what in order.split(", "):
        if what == "model":
            again.load_state_dict(saved[0])
        elif what == "handle":
            other = handle_of(again, optimizer, method)
        else:
            assert other is not None
            other.load_state_dict(saved[2])
    assert other is not None and other.masks == handle.masks
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in saved[0].items())


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_changes_nothing(method: str) -> None:
    """As PyTorch Lightning steps: gradients are set to None, computed and cleared of pruned weights within the closure."""

    def train(closure: bool) -> dict[str, Tensor]:
        model = network()
        optimizer = optimizer_of(model)
        handle = handle_of(model, optimizer, method)
        for step in range(30):
            images, labels = batch(step)

            def gradients(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                handle.mask_gradients()
                return loss

            if closure:
                assert optimizer.step(gradients) > 0
            else:
                gradients()
                optimizer.step()
        return {**model.state_dict(), **handle.masks}

    plain, closed = train(False), train(True)
    assert all(torch.equal(t, closed[n]) for n, t in plain.items())


def test_more_updates_than_16_bits_count() -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = autosparse.sparsify(model, optimizer, "gmp", sparsity=0.75, steps=33000, every=1, begin=0.999, end=1.0)
    handle.path = [1.0] * 40000
    model.weight.grad = torch.ones(4, 4)
    for _ in range(33000):
        optimizer.step()
    assert handle.masks.kept == 4 and max(int(t.max()) for t in handle.removed_in.values()) > 40000


def test_masks_handles_and_states_that_do_not_fit() -> None:
    model = network()
    optimizer = optimizer_of(model)
    example = batch(0)[0]
    half = autosparse.prune(model, 0.5, "random", example_input=example)
    with pytest.raises(AutoSparseError, match=r"keep \d+ weights, and \w+ starts with \d+"):
        autosparse.sparsify(model, optimizer, "set", sparsity=0.9, steps=40, every=3, masks=half)
    floats = {n: m.float() for n, m in half.items()}
    with pytest.raises(AutoSparseError, match="give boolean tensors"):
        autosparse.sparsify(model, optimizer, "set", sparsity=0.5, steps=40, every=3, masks=floats)
    handle = autosparse.sparsify(model, optimizer, "set", sparsity=0.5, steps=40, every=3, masks=half)
    assert handle.masks == half
    with pytest.raises(AutoSparseError, match="sparsify already holds"):
        autosparse.sparsify(model, optimizer, "set", sparsity=0.9, steps=40, every=3)
    state = handle.state_dict()
    handle.remove()
    other = autosparse.sparsify(model, optimizer, "set", sparsity=0.9, steps=40, every=3)
    with pytest.raises(AutoSparseError, match=r"saved state is for 0\.5;"):
        other.load_state_dict(state)
    with pytest.raises(AutoSparseError, match="has no step"):
        other.load_state_dict({k: v for k, v in state.items() if k != "step"})


def test_weights_that_are_nan_are_named() -> None:
    weight = torch.tensor([math.nan, math.nan, 1.0, 0.0, 0.0, 0.0])
    with pytest.raises(AutoSparseError, match="a kept weight is NaN"):
        exchange(weight, torch.tensor([1, 1, 1, 0, 0, 0]).bool(), torch.ones(6), 0.7)


def test_rigl_takes_no_step_in_an_update() -> None:
    model = network()
    optimizer = optimizer_of(model)
    handle = handle_of(model, optimizer, "rigl", every=4)
    for step in range(12):
        before = copy.deepcopy(model.state_dict())
        step_of(model, optimizer, step)
        after, masks = model.state_dict(), handle.masks
        moved = [n for n in after if not torch.equal(after[n], before[n])]
        if step + 1 in (4, 8, 12):
            assert moved and set(moved) <= set(masks), "only weights that were dropped change"
            assert all(torch.equal(after[n], before[n] * m) for n, m in masks.items())
        else:
            assert len(moved) == len(after)


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_gradients_are_one_step(method: str) -> None:
    results = []
    for parts in (1, 2):
        model = network().double()
        optimizer = optimizer_of(model)
        handle = handle_of(model, optimizer, method)
        for step in range(30):
            images, labels = batch(step)
            for x, y in zip(images.double().chunk(parts), labels.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(handle.masks)
    assert results[0] == results[1]


@pytest.mark.parametrize("method", ["gmp", "rigl"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_does_not_count(fused: bool, method: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    handle = handle_of(model, optimizer, method, every=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        images, labels = batch(step)
        scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
        if step == 2:
            model[0].weight.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert handle.step == 3 and len(handle.path) == (method == "rigl"), "RigL grew once"
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_clipping_counts_only_what_is_there() -> None:
    model = network()
    optimizer = optimizer_of(model)
    handle = handle_of(model, optimizer, "rigl", every=2)
    for step in range(4):
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        handle.mask_gradients()
        gradient, mask = model[3].weight.grad, handle.masks["3.weight"]
        assert bool(gradient[~mask].any()) == (step % 2 == 1), "an update needs them all"
        optimizer.step()
        optimizer.zero_grad()


def test_a_compiled_model_and_a_user_s_densities() -> None:
    model = network()
    optimizer = optimizer_of(model)
    compiled = torch.compile(model, backend="eager")
    handle = handle_of(compiled, optimizer, "gmp", densities={"0.weight": 1.0, "3.weight": 0.05}, sparsity=0.9025)
    for step in range(30):
        step_of(compiled, optimizer, step)
    masks = handle.masks
    assert list(masks) == ["0.weight", "3.weight"] and masks.kept == round(0.0975 * masks.total)
    assert int(masks["0.weight"].sum()) == 54


def test_what_left_when() -> None:
    model = network()
    optimizer = optimizer_of(model)
    handle = handle_of(model, optimizer, "gmp", every=5)
    for step in range(30):
        step_of(model, optimizer, step)
    total = handle.masks.total
    for number, density in enumerate(handle.path, 1):
        gone = sum(int(((t > 0) & (t <= number)).sum()) for t in handle.removed_in.values())
        assert gone == total - round(density * total)
    assert handle.path == sorted(handle.path, reverse=True)


def test_two_handles_of_one_optimizer() -> None:
    """RigL clears all gradients in its updates, so that another method that grows by them would see none."""
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    optimizer = optimizer_of(model)
    how: dict[str, Any] = {"sparsity": 0.8, "steps": 20, "every": 2}
    autosparse.sparsify(model, optimizer, "rigl", include="0.weight", **how)
    for method in ("rigl", "granet"):
        with pytest.raises(
            AutoSparseError, match=r"two handles, \w+ and RigLSettings, .* give each model an optimizer"
        ):
            autosparse.sparsify(model, optimizer, method, include="1.weight", **how)
    other = autosparse.sparsify(model, optimizer, "gmp", include="1.weight", **how)
    for _ in range(20):
        sum(layer(torch.ones(3, 6)).square().mean() for layer in model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert other.masks.kept == 6


def test_granet_may_begin_at_its_last_density() -> None:
    for density in (0.05, 0.3, 0.02):
        model = network()
        autosparse.sparsify(
            model, optimizer_of(model), "granet", sparsity=1 - density, start_density=density, steps=20, every=2
        )


def test_a_training_that_is_too_short_to_be_gradual_is_named() -> None:
    for method in ("gmp", "granet"):
        model = network()
        with pytest.warns(UserWarning, match="every is 50: one update fits into a training of 30 steps"):
            autosparse.sparsify(model, optimizer_of(model), method, sparsity=0.9, steps=30, every=50)


def test_an_end_before_the_last_update_is_named() -> None:
    model = network()
    optimizer = optimizer_of(model)
    handle = handle_of(model, optimizer, "gmp", every=5)
    for step in range(10):
        step_of(model, optimizer, step)
    with pytest.warns(UserWarning, match=r"after 10 of 30 steps, and 3 updates .* is 0\.\d+, 0.9 was asked for"):
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.remove()


def test_masks_that_change_and_masks_that_do_not() -> None:
    model = network()
    optimizer = optimizer_of(model)
    masks = autosparse.prune(model, 0.5, "random", example_input=batch(0)[0])
    fixed = masks.enforce(model, optimizer)
    masks.enforce(model, optimizer)  # the same again, or fewer: what is pruned stays so
    with pytest.raises(
        AutoSparseError, match=r"Masks\.enforce already holds weights of this optimizer at zero: call remove"
    ):
        autosparse.sparsify(model, optimizer, "set", sparsity=0.5, steps=40, every=3)
    fixed.remove()
    optimizer = optimizer_of(model)
    handle = autosparse.sparsify(model, optimizer, "gmp", sparsity=0.5, steps=40, every=3)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    with pytest.raises(AutoSparseError, match="sparsify already holds weights of this optimizer at zero: call remove"):
        masks.enforce(model, optimizer)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    handle.remove()
    masks.enforce(model, optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gnp"}, "method is 'gnp': known are gmp, acdc, set, rigl, granet, or package.module:name"),
        ({"method": "irp"}, "method is 'irp': known are"),
        ({"epochs": 3}, "epochs is 3: steps is the length here"),
        ({"init_gain": 0.58}, "init_gain is 0.58: it is for a search that rewinds"),
        ({"every": 0}, "every is 0: give at least 1"),
        ({"every": 1000, "method": "set"}, "every is 1000: no update fits into a training of 30 steps"),
        ({"beginn": 0.1}, "beginn of gmp is 0.1: did you mean 'begin'?"),
        ({"sparsity": 1.2}, "sparsity is 1.2"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": "40"}, "steps is '40': give the number of optimizer steps .* a whole number"),
        ({"steps": 10.5}, "steps is 10.5"),
        ({"every": "2"}, "every is '2': give a whole number"),
        ({"every": 2.5}, "every is 2.5: give a whole number"),
        ({"every": None}, "every is None: give a whole number"),
        ({"end": "x"}, "end is 'x': give a number"),
        ({"every": 2, "masks": 3}, "masks to start with are another model's"),
        ({"method": None}, "method is None: known are gmp"),
        ({"method": "mine:nope"}, "method is 'mine:nope': No module"),
        (
            {"every": 2, "floor": 0.5},
            r"floor is 0\.5: it needs \d+ weights in all, the sparsity keeps \d+; lower floor",
        ),
        ({"every": 2, "floor": -1}, "floor is -1: it is the smallest"),
        ({"every": 2, "seed": "x"}, "seed is 'x': give a whole number"),
        ({"every": 2, "densities": "densities:snip"}, "densities is 'densities:snip': known: .* as numbers"),
        ({"densities": "erg"}, "densities is 'erg'"),
        (
            {"method": "set", "every": 2, "densities": "global"},
            "rule of layer densities is 'global': random masks cannot be ranked",
        ),
        ({"masks": {"a": torch.ones(2, 2).bool()}}, "masks to start with are another model's"),
        (
            {"method": "granet", "every": 2, "start_density": 0.01},
            "start_density is 0.01: it is less than the density at the end, 0.1",
        ),
        ({"begin": 0.8}, "begin is 0.8"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    model = network()
    given_options = {"method": "gmp", "sparsity": 0.9, "steps": 30, **options}
    with pytest.raises(AutoSparseError, match=message) as caught:
        autosparse.sparsify(model, optimizer_of(model), **given_options)
    assert "\n" not in str(caught.value)


def test_a_weight_that_nothing_trains_is_named() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(AutoSparseError, match=r"weight is '3.weight': the optimizer lacks it"):
        autosparse.sparsify(model, optimizer, "gmp", sparsity=0.5, steps=100)
    autosparse.sparsify(model, optimizer, "gmp", sparsity=0.5, steps=100, exclude="3.*")


def test_the_state_of_another_model_is_refused() -> None:
    model, other = network(), nn.Sequential(nn.Linear(3, 3))
    handle = handle_of(model, optimizer_of(model), "gmp")
    with pytest.raises(AutoSparseError, match="steps is 30: the saved state is of a training of 40; give the same"):
        handle.load_state_dict(handle_of(model, optimizer_of(model), "gmp", steps=40).state_dict())
    with pytest.raises(AutoSparseError, match="its masks are those of another model"):
        handle.load_state_dict(handle_of(other, optimizer_of(other), "gmp").state_dict())
    with pytest.raises(AutoSparseError, match=r"method is 'GMPSettings.*: the saved state is of RigLSettings\(.*every"):
        handle.load_state_dict(handle_of(model, optimizer_of(model), "rigl").state_dict())
    for key, value in (("densities", "uniform"), ("floor", 0.01)):
        message = f"{key} is .*: the saved state is for {value!r}; give the same"
        with pytest.raises(AutoSparseError, match=message):
            handle_of(model, optimizer_of(model), "gmp").load_state_dict(
                handle_of(model, optimizer_of(model), "gmp", **{key: value}).state_dict()
            )
    with pytest.raises(AutoSparseError, match="the state of sparsify is None: give what"):
        handle.load_state_dict(None)  # type: ignore[arg-type]
