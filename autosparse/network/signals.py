"""Measure signals on a network, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from autosparse.errors import AutoSparseError, first_line, require, settings, suggest
from autosparse.masks.layers import Layer, unwrap
from autosparse.network.flow import synaptic_flow, without_flow

Signals = dict[str, dict[str, Tensor]]  # signal -> parameter name -> tensor of the parameter's shape
Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]

SIGNALS = ("weight", "gradient", "flow", "no_flow")
FIXED = ("no_flow",)  # these do not depend on the mask: measured once, whatever the steps
DATA_FREE = ("flow", "no_flow")  # these take an example input instead of batches


@settings
class SignalSettings:
    """Which signals of `θ₀` are recorded, and how many training batches their gradients take."""

    names: tuple[str, ...] = ("weight", "gradient")
    n_batches: int = 8
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in SIGNALS:
                raise AutoSparseError(f"signal is {name!r}: {suggest(name, SIGNALS)}")
        require(self.n_batches >= 1, "signals.n_batches", self.n_batches, "give at least 1")
        require(self.batch_size >= 1, "signals.batch_size", self.batch_size, "give at least 1")


def take_batches(batches: Iterable[Batch], n_batches: int, device: torch.device, seed: int = 0) -> list[Batch]:
    """The first `n_batches` of `(inputs, targets)`, on `device`; what the loader draws comes from `seed`.

    Raises:
        AutoSparseError: there are none, or an item is not a pair.
    """
    taken: list[Batch] = []
    with seeded(seed, device):
        for item in batches:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise AutoSparseError(
                    f"batches give {type(item).__name__} items: each must be a pair (inputs, targets); "
                    "to give an input alone use example_input"
                )
            taken.append((_move(item[0], device), _move(item[1], device)))
            if len(taken) == n_batches:
                break
    if not taken:
        raise AutoSparseError("batches are empty: give at least one pair (inputs, targets)")
    return taken


def measure(
    model: nn.Module,
    layers: Mapping[str, Layer],
    names: Sequence[str],
    *,
    batches: Sequence[Batch] = (),
    example_input: Any = None,
    masks: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Signals:
    """Measure the named signals of `model` on `θ ⊙ m`; every tensor has its weight's shape, on the model's device.

    `"weight"`: `θ ⊙ m`. `"gradient"`: `g = ∂L/∂(θ ⊙ m)`, the mean over all samples of `batches`, pruned positions too,
    with norm layers (only these) in train mode. `"flow"`: synaptic flow (see `flow.py`), float64. `"no_flow"`: boolean,
    the weights that synaptic flow cannot reach whatever their values. Parameters, buffers, gradients, modes, hooks and RNG stay as they were.

    Args:
        example_input: what data-free signals take; default the first batch's inputs.
        loss: `loss(outputs, targets)`, a mean over the batch; cross-entropy by default.
        seed: what dropout-like layers of a model draw from.

    Raises:
        AutoSparseError: an unknown signal, a gradient without batches, flow without an input, or batches that the model cannot take.
    """
    for name in names:
        if name not in SIGNALS:
            raise AutoSparseError(f"signal is {name!r}: known are {', '.join(SIGNALS)}")
    model = unwrap(model)
    own = dict(model.named_parameters())
    with torch.no_grad():
        weights = {
            n: own[n].detach() if masks is None else own[n].detach() * masks[n].to(own[n].device) for n in layers
        }
    signals: Signals = {}
    if "weight" in names:
        signals["weight"] = {n: w.clone() if masks is None else w for n, w in weights.items()}
    if "gradient" in names:
        if not batches:
            raise AutoSparseError("this criterion needs gradients: give batches, pairs of (inputs, targets)")
        signals["gradient"] = _gradient(model, weights, batches, loss or F.cross_entropy, seed)
    if set(DATA_FREE) & set(names):
        example = batches[0][0] if example_input is None and batches else example_input
        if example is None:
            raise AutoSparseError("this criterion runs the network: give example_input, or batches")
        if "flow" in names:
            signals["flow"] = synaptic_flow(model, layers, example, masks)
        if "no_flow" in names:
            found = without_flow(model, layers, example)
            signals["no_flow"] = {
                n: found[n] if n in found else torch.zeros_like(w, dtype=torch.bool) for n, w in weights.items()
            }
    return signals


def _gradient(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Sequence[Batch], loss: Loss, seed: int
) -> dict[str, Tensor]:
    leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    sizes = [batch_size(batch) for batch in batches]
    total: list[Tensor] | None = None
    device = next(iter(weights.values())).device
    with eval_mode(model, but=NORMS), seeded(seed, device), torch.enable_grad():
        for (inputs, targets), size in zip(batches, sizes, strict=True):
            outputs = forward(model, {**leaves, **buffers}, inputs)
            try:
                value = loss(outputs, targets)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise AutoSparseError(
                    f"the loss cannot take outputs {_describe(outputs)} and targets {_describe(targets)}: "
                    f"{first_line(error)}; give loss=, or targets that fit the model"
                ) from error
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise AutoSparseError(
                    f"the loss is {_describe(value)} without a gradient or not a single number: "
                    "it must be the batch's mean as a tensor that depends on the weights (not under inference_mode)"
                )
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            share = size / sum(sizes)
            found = [
                torch.zeros_like(w) if g is None else g * share for g, w in zip(grads, leaves.values(), strict=True)
            ]
            if total is None:
                total = found
            else:
                torch._foreach_add_(total, found)
    assert total is not None
    return dict(zip(leaves, total, strict=True))


def forward(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Any:
    """`model(inputs)` with `state` in place of its parameters and buffers; tuples are positional, dicts keywords.

    Raises:
        AutoSparseError: the model cannot take the inputs.
    """
    args, kwargs = (
        ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    try:
        return torch.func.functional_call(model, dict(state), args, kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        raise AutoSparseError(
            f"{type(model).__name__} cannot take batches {_describe(inputs)}: {first_line(error)}; "
            "give inputs of the shape that the model takes"
        ) from error


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@contextmanager
def eval_mode(model: nn.Module, but: tuple[type[nn.Module], ...] = ()) -> Iterator[None]:
    """Every module in eval mode, those of the types `but` in train mode; afterwards each as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = isinstance(module, but)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` on `device` and on the CPU; the global RNG states come back."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        seed_device(seed, device)
        yield


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the global RNG of `device` and of the CPU, and no other's, as `torch.manual_seed` would."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)
    torch.default_generator.manual_seed(seed)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_move(item, device) for item in value)
    return value


def batch_size(batch: Batch) -> int:
    """Samples in a batch: the length of the first target that has one, or else of the first input."""
    inputs, targets = batch
    return next((len(t) for t in tree_leaves((targets, inputs)) if isinstance(t, Tensor) and t.dim()), 1)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__name__}"
