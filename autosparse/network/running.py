"""Run a network as it is given: with other weights, on batches, from a seed; and leave it as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

from autosparse.errors import AutoSparseError, first_line, raise_out_of_memory
from autosparse.masks.random import seeded
from autosparse.network.inputs import as_call, map_tensors, shapes_of, tensors_in
from autosparse.network.restore import restored

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]


def take_batches(batches: Iterable[Batch], n_batches: int, device: torch.device, seed: int = 0) -> list[Batch]:
    """The first `n_batches` of `(inputs, targets)`, on `device`; what the loader draws comes from `seed`.

    Raises:
        AutoSparseError: there are none, or an item is not a pair.
    """
    taken: list[Batch] = []
    with seeded(seed, "batches", device=device):
        for item in batches:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise AutoSparseError(
                    f"batches give {type(item).__name__} items: each must be a pair (inputs, targets); "
                    "to give an input alone use example_input"
                )
            taken.append(map_tensors(lambda t: t.to(device), (item[0], item[1])))
            if len(taken) == n_batches:
                break
    if not taken:
        raise AutoSparseError("batches are empty: give at least one pair (inputs, targets)")
    return taken


def forward(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Any:
    """`model(inputs)` with `state` in place of its parameters and buffers; see `as_call`.

    Copies stand for those that `state` does not name, so nothing that the model writes reaches its own.

    Raises:
        AutoSparseError: the model cannot take the inputs.
    """
    own = (*model.named_parameters(), *model.named_buffers())
    copies = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in own if n not in state}
    args, kwargs = as_call(model, inputs)
    try:
        return torch.func.functional_call(model, {**copies, **state}, args, kwargs)
    except (RuntimeError, MemoryError, ValueError, AssertionError, IndexError, TypeError) as error:
        raise_out_of_memory(error, f"running {type(model).__name__} on a batch {_describe(inputs)}")
        raise AutoSparseError(
            f"{type(model).__name__} cannot take batches {_describe(inputs)}: {first_line(error)}; "
            "give inputs of the shape that the model takes"
        ) from error


def cross_entropy(outputs: Any, targets: Any) -> Tensor:
    """The default loss.

    Raises:
        AutoSparseError: there is one output for each example, whose cross-entropy is 0 whatever the weights are.
    """
    single = isinstance(outputs, Tensor) and outputs.dim() > 1 and outputs.shape[1] == 1
    flat = isinstance(outputs, Tensor) and outputs.dim() == 1 and isinstance(targets, Tensor) and targets.dim() == 1
    if single or flat:
        raise AutoSparseError(
            f"outputs {_describe(outputs)} are one number for each example, and the default loss is the cross-entropy of several "
            "classes: give loss=, such as torch.nn.functional.binary_cross_entropy_with_logits or mse_loss"
        )
    return F.cross_entropy(outputs, targets)


def batch_loss(model: nn.Module, state: Mapping[str, Tensor], batch: Batch, loss: Loss) -> Tensor:
    """`loss(model(inputs), targets)` with `state` in place of the model's parameters and buffers.

    Raises:
        AutoSparseError: the model cannot take the inputs, or the loss cannot take these outputs and targets or is no
            differentiable number.
    """
    inputs, targets = batch
    outputs = forward(model, state, inputs)
    try:
        value = loss(outputs, targets)
    except AutoSparseError:
        raise
    except (RuntimeError, MemoryError, ValueError, IndexError, TypeError) as error:
        raise_out_of_memory(error, f"computing the loss of outputs {_describe(outputs)}")
        raise AutoSparseError(
            f"the loss cannot take outputs {_describe(outputs)} and targets {_describe(targets)}: "
            f"{first_line(error)}; give loss=, or targets that fit the model"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise AutoSparseError(
            f"the loss is {_describe(value)} without a gradient or not a single number: "
            "it must be the batch's mean as a tensor that depends on the weights (not under inference_mode)"
        )
    return value


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
def untouched(model: nn.Module, but: tuple[type[nn.Module], ...] = ()) -> Iterator[None]:
    """`eval_mode` for passes by `forward`, after which the model holds what it held before, see `restored`.

    Gradient checkpoints run as plain calls: what they compute again in the backward pass would have the model's own weights
    and buffers instead of those that `forward` puts in their place. Compiled code runs uncompiled, as it was written.
    """
    with restored(model, but=model.parameters()), eval_mode(model, but), _plain_checkpoints(), _uncompiled():
        yield


@contextmanager
def _plain_checkpoints() -> Iterator[None]:
    """`torch.utils.checkpoint.checkpoint(f, *args)`, by whatever name it was imported, is `f(*args)`."""

    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        yield

    plain = {
        "CheckpointFunction": SimpleNamespace(apply=lambda function, _, *args: function(*args)),
        "_checkpoint_without_reentrant_generator": nothing,
        "_checkpoint_without_reentrant_generator_impl": nothing,  # its name since torch 2.14
    }
    before = {name: value for name, value in vars(checkpoint).items() if name in plain}
    try:
        vars(checkpoint).update({name: plain[name] for name in before})
        yield
    finally:
        vars(checkpoint).update(before)


@contextmanager
def _uncompiled() -> Iterator[None]:
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


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
    return next((len(t) for t in tensors_in((targets, inputs)) if t.dim()), 1)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    shapes = shapes_of(value)
    return f"of type {type(value).__name__}" + ("" if shapes == "[]" else f" with shapes {shapes}")
