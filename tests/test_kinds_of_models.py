"""Models of unusual kinds: the masks of the plain model, or one line that names the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer, unwrap
from autosparse.network.diagnostics import diagnose
from autosparse.network.running import cross_entropy
from autosparse.pruning.criteria import CRITERIA, Context
from autosparse.trainability.prepare import prepare

X, Y = torch.linspace(-1, 1, 48).view(8, 6), torch.arange(8) % 3
BATCHES = [(X, Y)]


def mlp(outputs: int = 3, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, **options), nn.Tanh(), nn.Linear(8, outputs, **options))


# -- wrappers inside ----------------------------------------------------------------------------------------------------


class Outer(nn.Module):
    """A parameter beside modules that are wrapped, one of them used under two names."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(6))
        self.first = wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
        self.again = self.first
        self.last = wrap(nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.again(self.first(self.scale * x)))
        return found


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": lambda m: nn.DataParallel(m, device_ids=[]),
    "checkpoint": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_submodule_has_the_names_and_masks_of_the_plain_network(wrap: Callable[..., Any]) -> None:
    plain, wrapped = Outer(lambda m: m), Outer(wrap)
    expected, found = (autosparse.prune(m, 0.5, "iterative_snip", batches=BATCHES, steps=2) for m in (plain, wrapped))
    assert found == expected and list(found) == ["first.0.weight", "last.weight"]
    expected.check(wrapped)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    expected.enforce(wrapped, optimizer)
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in unwrap(wrapped).named_parameters():
        if name in expected:
            assert bool((parameter[~expected[name]] == 0).all()) and any(parameter is p for p in wrapped.parameters())


def test_nothing_is_unwrapped_where_nothing_is_wrapped() -> None:
    model = Outer(lambda m: m)
    assert unwrap(model) is model


def test_a_scripted_submodule_has_the_masks_of_the_plain_network() -> None:
    plain = mlp()
    found = copy.deepcopy(plain)
    found[0] = torch.jit.script(found[0])
    masks = [autosparse.prune(m, 0.5, "iterative_snip", batches=BATCHES, steps=2) for m in (plain, found)]
    assert masks[0] == masks[1]


# -- complex weights ----------------------------------------------------------------------------------------------------


def test_saliencies_of_complex_weights_are_those_of_their_two_real_parts() -> None:
    layers = {"w": Layer("w", "linear", (1, 2))}
    weight, gradient = torch.tensor([[1 + 2j, 3 - 1j]]), torch.tensor([[3 + 1j, 1 + 2j]])  # Re(θ ḡ): 5, 1
    signals = {"weight": {"w": weight}, "gradient": {"w": gradient}, "dense_weight": {"w": weight}}
    signals["hessian_gradient"] = {"w": gradient}
    for name, scores in {"snip": [5, 1], "force": [5, 1], "growth0": [-5, -1], "grasp": [5, 1]}.items():
        assert CRITERIA[name](signals, Context(layers, 0.5))["w"].tolist() == [scores]


@pytest.mark.parametrize("criterion", ["snip", "grasp", "prospr", "force"])
def test_masks_of_complex_weights_are_those_of_the_same_network_in_real_ones(criterion: str) -> None:
    """`x·Re w` and `x·w` with the real part taken score the same where imaginary parts are 0 and get no gradient."""

    class Real(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            torch.manual_seed(0)
            weights = [torch.randn(6, 8), torch.randn(8, 3)]
            self.one, self.two = (nn.Parameter(w.to(dtype)) for w in weights)

        def forward(self, x: Tensor) -> Tensor:
            h = (x.to(self.one.dtype) @ self.one).real.tanh()
            return (h.to(self.two.dtype) @ self.two).real

    a, b = (
        autosparse.prune(Real(dtype), 0.5, criterion, batches=BATCHES, steps=1)
        for dtype in (torch.float32, torch.complex64)
    )
    assert a == b


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.abs(), targets)


@pytest.mark.parametrize("criterion", ["synflow", "resynflow", "autosparse"])
def test_criteria_of_real_weights_say_so(criterion: str) -> None:
    batches = [(X.to(torch.complex64), Y)]
    with pytest.raises(
        AutoSparseError, match=r"weight '0.weight' is complex, and criterion .* is for real weights only"
    ):
        autosparse.prune(mlp(dtype=torch.complex64), 0.5, criterion, batches=batches, loss=absolute, steps=1)


def test_a_diagnosis_and_a_preparation_are_for_real_weights() -> None:
    model, x = mlp(dtype=torch.complex64), X.to(torch.complex64)
    with pytest.raises(AutoSparseError, match=r"'0.weight' is complex, and a diagnosis is for real weights only"):
        diagnose(model, [(x, Y)], loss=absolute)
    for how in ("repair", "isometry"):
        with pytest.raises(AutoSparseError, match=r"'0.weight' is complex, and a preparation is for real weights only"):
            prepare(model, None, how, example_input=x)


# -- models without values, or in programs ------------------------------------------------------------------------------


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return mlp()


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))


def scripted() -> nn.Module:
    return torch.jit.script(mlp())


def traced() -> nn.Module:
    return torch.jit.trace(mlp(), X)


def one_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = nn.Parameter(model[0].weight.data.t())
    return model


REASONS = {
    on_meta: "parameter '0.weight' is on the meta device and has no values",
    lazy: "parameter '0.weight' is uninitialized: run the lazy model once",
    scripted: "is a TorchScript program, .*: give the nn.Module it was made of",
    traced: "is a TorchScript program, .*: give the nn.Module it was made of",
    one_memory: "'0.weight' and '2.weight' are two Parameters in the same memory",
}


@pytest.mark.parametrize("build", REASONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("criterion", ["magnitude", "snip", "synflow", "random", "autosparse"])
def test_one_line_names_the_real_reason(build: Callable[[], nn.Module], criterion: str) -> None:
    with pytest.raises(AutoSparseError, match=REASONS[build]) as error:
        autosparse.prune(build(), 0.5, criterion, batches=BATCHES, steps=1)
    assert "\n" not in str(error.value)


def test_views_of_one_buffer_that_do_not_overlap_are_weights_of_their_own() -> None:
    model, flat = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)), torch.randn(36)
    model[0].weight, model[1].weight = nn.Parameter(flat[:24].view(4, 6)), nn.Parameter(flat[24:].view(3, 4))
    assert autosparse.prune(model, 0.5, "magnitude", example_input=X).kept == 18


# -- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [torch.zeros(8, dtype=torch.long), torch.rand(8, 1), torch.rand(8)])
def test_one_output_needs_a_loss(targets: Tensor) -> None:
    model = mlp(1) if targets.dim() != 1 or not targets.is_floating_point() else nn.Sequential(mlp(1), nn.Flatten(0))
    for run in (
        lambda: autosparse.prune(model, 0.5, "snip", batches=[(X, targets)]),
        lambda: diagnose(model, [(X, targets)]),
    ):
        with pytest.raises(AutoSparseError, match=r"one number for each example.*give loss="):
            run()


def test_one_example_without_a_batch_has_a_cross_entropy() -> None:
    outputs = torch.tensor([1.0, 2.0, 3.0])
    assert cross_entropy(outputs, torch.tensor(2)) == F.cross_entropy(outputs, torch.tensor(2))


def test_a_path_is_a_scorers_file(tmp_path: Path) -> None:
    with pytest.raises(AutoSparseError, match=r"scorer file .*missing.safetensors does not exist"):
        autosparse.prune(mlp(), 0.5, tmp_path / "missing.safetensors", batches=BATCHES)


@pytest.mark.parametrize("criterion", [3, lambda signals, context: signals])
def test_what_is_no_criterion_is_named(criterion: Any) -> None:
    with pytest.raises(AutoSparseError, match=r"criterion is .*: give a preset's name"):
        autosparse.prune(mlp(), 0.5, criterion, batches=BATCHES)
