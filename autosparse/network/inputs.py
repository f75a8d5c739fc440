"""What a model takes and gives: tensors in tuples, lists, dicts, dataclasses and other objects, to any depth."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from autosparse.errors import AutoSparseError, first_line


def as_call(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `model`: the one rule for example inputs and for the inputs of batches.

    A tuple is positional arguments and a dict keyword arguments. Everything else is the one argument: a tensor, an
    object, and a list or named tuple too, unless `forward` cannot be called with one argument alone. Then the list is
    positional, as a `DataLoader` makes a list of the tuple of inputs that a data set gives.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    several = type(inputs) is tuple or (isinstance(inputs, (list, tuple)) and not _takes_one(model))
    return (tuple(inputs) if several else (inputs,)), {}


def _takes_one(model: nn.Module) -> bool:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a compiled extension
        return True
    try:
        signature.bind(None)
    except TypeError:
        return False
    return True


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `change(t)` in place of each of its tensors; what holds them is copied and keeps its type.

    One tensor in several places is changed once, so that it stays one. What holds no tensors is not copied.
    """
    done: dict[int, tuple[Any, Any]] = {}  # by id, which the item itself keeps from being used again

    def again(item: Any) -> Any:
        if id(item) not in done:
            done[id(item)] = item, item  # where an object holds itself
            done[id(item)] = item, change(item) if isinstance(item, Tensor) else _rebuilt(again, item)
        return done[id(item)][1]

    return again(value)


_OPAQUE = (str, bytes, type, nn.Module, ModuleType, FunctionType, MethodType, BuiltinFunctionType, weakref.ref)


def _rebuilt(again: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, _OPAQUE):
        return value
    if isinstance(value, PackedSequence):  # its batch sizes stay where they are
        parts: list[Any] = [again(part) if i != 1 else part for i, part in enumerate(value)]
        return PackedSequence(*parts)
    if isinstance(value, (tuple, list, set, frozenset)):
        items = list(value)
        changed = [again(item) for item in items]
        if all(a is b for a, b in zip(items, changed, strict=True)):
            return value
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if isinstance(value, Mapping):
        entries = {key: again(value[key]) for key in list(value)}
        if all(entries[key] is value[key] for key in entries):
            return value
        new: Any = copy.copy(value)
        for key, item in entries.items():
            new[key] = item
        return new
    slots = {name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))}
    fields = {**{n: getattr(value, n) for n in slots if hasattr(value, n)}, **getattr(value, "__dict__", {})}
    fields = {name: (item, again(item)) for name, item in fields.items() if not name.startswith("__")}
    if all(a is b for a, b in fields.values()):
        return value
    new = copy.copy(value)
    for name, (before, after) in fields.items():
        if before is not after:
            object.__setattr__(new, name, after)  # of frozen dataclasses too
    return new


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in what a model takes or gives, each once."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(note, value)
    return found


def cast_like(model: nn.Module, example_input: Any) -> Any:
    """`example_input` with its floating tensors in the model's precision, if it has one for all of its parameters."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        return example_input
    dtype = dtypes.pop()
    return map_tensors(
        lambda t: t.detach().to(dtype) if t.is_floating_point() and t.dtype != dtype else t, example_input
    )


def first_of_batch(example: Any, count: int) -> Any:
    """The first `count` of the batch, where all tensors agree on a batch size; else the example itself."""
    tensors = tensors_in(example)
    sizes = {t.shape[0] if t.dim() else -1 for t in tensors}
    if len(sizes) != 1 or sizes.pop() <= count:
        return example
    return map_tensors(lambda t: t[:count], example)


def shapes_of(value: Any) -> str:
    """The shapes of its tensors, for a message."""
    shapes = [tuple(t.shape) for t in tensors_in(value)]
    return str(shapes[0] if len(shapes) == 1 else shapes)


def refusal(model: nn.Module, example_input: Any, error: BaseException) -> AutoSparseError:
    """The error for a model that does not run on `example_input`."""
    way_out = "give example_input of the shape the model takes"
    if type(example_input) is list:
        way_out += ", several arguments as a tuple"
    return AutoSparseError(
        f"{type(model).__name__} cannot run on example_input of shape {shapes_of(example_input)} "
        f"({type(error).__name__}: {first_line(error)}): {way_out}"
    )
