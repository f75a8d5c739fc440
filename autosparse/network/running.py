"""Run a network as it is given: with other weights, on batches, from a seed; and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autosparse.errors import AutoSparseError, first_line
from autosparse.masks.random import seeded

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
            taken.append((_move(item[0], device), _move(item[1], device)))
            if len(taken) == n_batches:
                break
    if not taken:
        raise AutoSparseError("batches are empty: give at least one pair (inputs, targets)")
    return taken


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
