"""Signals against hand computation and finite differences, and a model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from queue import SimpleQueue

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import prunable_layers
from autosparse.masks.random import derive, seed_global
from autosparse.network.graph import trace
from autosparse.network.running import NORMS, batch_size, eval_mode, take_batches
from autosparse.network.signals import SignalSettings, measure

Guard = Callable[[nn.Module], AbstractContextManager[None]]
CPU = torch.device("cpu")


def two_layers(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def some_batches(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float64, inputs: int = 3
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, inputs, generator=generator, dtype=dtype), torch.randint(2, (n,), generator=generator))
        for n in sizes
    ]


def gradient(model: nn.Module, batches: list, **options) -> dict[str, Tensor]:
    layers = prunable_layers(model)
    found = measure(model, layers, ("gradient",), batches=batches, **options)["gradient"]
    assert all(found[n].shape == layers[n].shape for n in layers)
    return found


def test_gradient_by_hand() -> None:
    """One weight each: L = (2·(3·x) − y)², x = 1, y = 4: dL/dw₁ = 2·2·2·1 = 8, dL/dw₂ = 2·2·3 = 12."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(3)
        model[1].weight.fill_(2)
    found = gradient(model, [(torch.ones(1, 1), torch.full((1, 1), 4.0))], loss=F.mse_loss)
    assert {n: g.item() for n, g in found.items()} == {"0.weight": 8.0, "1.weight": 12.0}


def test_gradient_against_finite_differences() -> None:
    model, batches = two_layers(), some_batches((3, 2))
    found = gradient(model, batches)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for name, parameter in model.named_parameters():
        if name not in found:
            continue
        for index in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                other = copy.deepcopy(model)
                with torch.no_grad():
                    dict(other.named_parameters())[name].view(-1)[index] += sign * 1e-6
                    values.append(F.cross_entropy(other(inputs), targets).item())
            assert found[name].flatten()[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1, 4, 1)])
def test_gradient_is_the_mean_over_samples(sizes: tuple[int, ...]) -> None:
    model, (whole,) = two_layers(), some_batches((6,))
    parts = list(zip(whole[0].split(sizes), whole[1].split(sizes), strict=True))
    expected = gradient(model, [whole])
    for name, value in gradient(model, parts).items():
        torch.testing.assert_close(value, expected[name])


def test_gradient_is_taken_at_the_masked_weights_and_for_all_of_them() -> None:
    model, batches = two_layers(), some_batches((5,))
    masks = {
        n: torch.rand(l.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        for n, l in prunable_layers(model).items()
    }
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            dict(other.named_parameters())[name].mul_(mask)
    found = measure(model, prunable_layers(model), ("weight", "gradient"), batches=batches, masks=masks)
    for name, value in gradient(other, batches).items():
        torch.testing.assert_close(found["gradient"][name], value)
        assert torch.equal(found["weight"][name], dict(other.named_parameters())[name])
        assert (value[~masks[name]] != 0).any()


def test_dense_weight_knows_no_mask() -> None:
    model = two_layers()
    layers = prunable_layers(model)
    masks = {n: torch.zeros(l.shape, dtype=torch.bool) for n, l in layers.items()}
    found = measure(model, layers, ("weight", "dense_weight"), masks=masks)
    for name in layers:
        assert torch.equal(found["dense_weight"][name], model.get_parameter(name)) and not found["weight"][name].any()
    found["dense_weight"]["0.weight"].zero_()
    assert (model[0].weight != 0).all()


def test_weight_is_a_copy() -> None:
    model = two_layers()
    weight = measure(model, prunable_layers(model), ("weight",))["weight"]["0.weight"]
    assert torch.equal(weight, model[0].weight)
    weight.zero_()
    assert (model[0].weight != 0).all()


class Stochastic(nn.Module):
    """Dropout that is always on, as in some published models."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), training=True)


def test_dropout_draws_from_the_seed(unchanged: Guard) -> None:
    model, batches = Stochastic(), some_batches((8,), torch.float32)
    with unchanged(model):
        one, two, other = (gradient(model, batches, seed=s)["layer.weight"] for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_only_norm_layers_are_in_train_mode(unchanged: Guard) -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Linear(4, 2)
    )
    seen: SimpleQueue[tuple[int, bool]] = SimpleQueue()  # a list would be set back
    for index, module in enumerate(model):
        module.register_forward_pre_hook(lambda m, _, i=index: seen.put((i, m.training)))
    model.eval()
    model[2].train()  # modes of one's own come back too
    with unchanged(model):
        gradient(model, some_batches((8,), torch.float32))
    modes = dict(seen.get() for _ in range(6))
    assert seen.empty() and modes == {0: False, 1: True, 2: False, 3: True, 4: True, 5: False}
    with pytest.raises(KeyError), eval_mode(model, but=NORMS):
        raise KeyError
    assert [m.training for m in model] == [False, False, True, False, False, False]


def test_batch_norm_uses_the_batch_and_keeps_its_buffers(unchanged: Guard) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    batches = some_batches((8, 4), torch.float32)
    expected = copy.deepcopy(model)
    with unchanged(model):
        before = gradient(model, batches)
    model[1].running_mean.fill_(100)
    model[1].running_var.fill_(1e-3)
    after = gradient(model, batches)
    assert all(torch.equal(before[n], after[n]) for n in before)
    loss = sum(F.cross_entropy(expected(x), y) * len(x) / 12 for x, y in batches)
    loss.backward()
    for name, value in before.items():
        torch.testing.assert_close(value, dict(expected.named_parameters())[name].grad)


def test_existing_gradients_frozen_weights_and_hooks_stay(unchanged: Guard) -> None:
    model = two_layers()
    model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    frozen = model[0].weight.requires_grad_(False)
    calls, passes = [], SimpleQueue()
    model.register_forward_hook(lambda *_: calls.append(passes.put(1)))
    with unchanged(model), torch.no_grad():
        found = gradient(model, some_batches((4,)))
    assert frozen.requires_grad is False and (found["0.weight"] != 0).any() and calls == [] and passes.qsize() == 1


def test_a_tied_weight_gathers_the_gradients_of_all_its_uses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    batches = some_batches((4,), torch.float32)
    found = gradient(model, batches)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    assert set(found) == {"0.weight", "3.weight"}
    torch.testing.assert_close(found["0.weight"], model[0].weight.grad)


def test_a_weight_that_is_not_used_has_gradient_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    found = gradient(model, some_batches((4,), torch.float32))
    assert (found["idle.weight"] == 0).all() and (found["used.weight"] != 0).any()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def pooled(conv: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, 2))


KINDS = {
    "conv1d": (lambda: pooled(nn.Conv1d(2, 4, 3), 4), (2, 8)),
    "conv3d": (lambda: pooled(nn.Conv3d(2, 4, 3), 4), (2, 4, 4, 4)),
    "transposed": (lambda: pooled(nn.ConvTranspose2d(2, 4, 3), 4), (2, 4, 4)),
    "grouped": (lambda: pooled(nn.Conv2d(4, 4, 3, groups=2), 4), (4, 5, 5)),
    "depthwise": (lambda: pooled(nn.Conv2d(4, 4, 3, groups=4), 4), (4, 5, 5)),
    "attention": (Attention, (5, 4)),
    "operand": (Product, (4,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers_and_precisions(kind: str, dtype: torch.dtype, unchanged: Guard) -> None:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = make().to(dtype)
    x, y = torch.randn(6, *shape, dtype=dtype), torch.tensor([0, 1, 0, 1, 0, 1])
    layers = prunable_layers(model, operands=trace(model, x).operands) if kind == "operand" else prunable_layers(model)
    with unchanged(model):
        found = measure(model, layers, ("weight", "gradient"), batches=[(x, y)])
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        if name in layers:
            assert found["gradient"][name].dtype == dtype
            torch.testing.assert_close(found["gradient"][name], parameter.grad)
            assert torch.equal(found["weight"][name], parameter)


def test_measure_inside_wrappers() -> None:
    model, batches = two_layers(), some_batches((4,))
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert torch.equal(gradient(wrapped, batches)["0.weight"], gradient(model, batches)["0.weight"])


def test_inputs_as_tuples_and_keywords() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    model = Two()
    taken = [take_batches([(inputs, y)], 1, CPU) for inputs in ((x, x), [x, x], {"a": x, "b": x})]
    one, two, three = (gradient(model, batches)["layer.weight"] for batches in taken)
    assert torch.equal(one, two) and torch.equal(one, three)


def test_samples_in_a_batch() -> None:
    x, y = torch.zeros(5, 2), torch.zeros(5)
    assert batch_size((x, y)) == 5
    assert batch_size((x, {"labels": y, "weight": torch.tensor(1.0)})) == 5
    assert batch_size(({"ids": x}, None)) == 5
    assert batch_size((None, torch.tensor(1.0))) == 1


# -- batches -------------------------------------------------------------------------------------------------------------


def test_only_as_many_batches_as_asked_are_drawn() -> None:
    drawn = []

    def batches():
        for i in range(10):
            drawn.append(i)
            yield torch.full((2, 3), float(i)), torch.zeros(2)

    assert [x[0, 0].item() for x, _ in take_batches(batches(), 3, CPU)] == [0, 1, 2]
    assert drawn == [0, 1, 2]
    assert len(take_batches(some_batches((2, 2)), 5, CPU)) == 2


def test_a_shuffling_loader_draws_from_the_seed() -> None:
    loader = DataLoader(TensorDataset(torch.arange(20.0), torch.arange(20)), batch_size=5, shuffle=True)
    state = torch.get_rng_state()
    one, two, other = (take_batches(loader, 2, CPU, seed)[0][0] for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches are empty"),
        (torch.zeros(4, 3), "batches give Tensor items: each must be a pair"),
        ((torch.zeros(4, 3), torch.zeros(4)), "batches give Tensor items"),
        ([(torch.zeros(4), torch.zeros(4), torch.zeros(4))], "batches give tuple items: each must be a pair"),
        ([{"x": torch.zeros(4)}], "batches give dict items"),
    ],
)
def test_bad_batches(batches: object, message: str) -> None:
    with pytest.raises(AutoSparseError, match=message):
        take_batches(batches, 1, CPU)  # type: ignore[arg-type]


def test_what_measure_refuses(unchanged: Guard) -> None:
    model, layers = two_layers(), prunable_layers(two_layers())
    (good,) = some_batches((4,))

    def fails(message: str, **options) -> None:
        with unchanged(model), pytest.raises(AutoSparseError, match=message):
            measure(model, layers, ("gradient",), **options)

    fails("needs gradients: give batches")
    fails(
        r"Sequential cannot take batches of shape \(4, 5\) float64: .*give inputs of the shape",
        batches=[(torch.zeros(4, 5).double(), good[1])],
    )
    fails(
        r"loss cannot take outputs of shape \(4, 2\) float64 and targets of shape \(4,\) float64",
        batches=[(good[0], good[1].double())],
    )
    fails("loss cannot take outputs", batches=[(good[0], good[1] + 7)])
    for loss in (
        lambda o, t: F.cross_entropy(o, t, reduction="none"),
        lambda o, t: F.cross_entropy(o, t).detach(),
        lambda o, t: F.cross_entropy(o, t).item(),
    ):
        fails("the loss is of .* without a gradient or not a single number", batches=[good], loss=loss)
    with pytest.raises(AutoSparseError, match="signal is 'curvature'"):
        measure(model, layers, ("curvature",))


def test_signal_settings() -> None:
    with pytest.raises(AutoSparseError, match="signal is 'gradeint': did you mean 'gradient'"):
        SignalSettings(names=("gradeint",))
    with pytest.raises(AutoSparseError, match=r"signals\.n_batches is 0"):
        SignalSettings(n_batches=0)
    with pytest.raises(AutoSparseError, match=r"signals\.batch_size is 0"):
        SignalSettings(batch_size=0)


def test_seeding_the_cpu_leaves_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a device was seeded"))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: pytest.fail("a device was seeded"))
    with torch.random.fork_rng(devices=[]):
        seed_global(5, "a test", device=CPU)
        drawn = torch.rand(3)
        torch.default_generator.manual_seed(derive(5, "a test"))
        assert torch.equal(drawn, torch.rand(3))
