"""What a model holds, wherever Python can reach it: set back after a pass, or copied."""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

M = TypeVar("M", bound=nn.Module)

_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, WeakIdKeyDictionary, WeakTensorKeyDictionary)
_CODE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, property, classmethod, staticmethod)
_ATOMS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, types.BuiltinFunctionType)
_LRU = type(functools.lru_cache(lambda: None))
_ABSENT = object()


@contextmanager
def restored(model: nn.Module, but: Iterable[Tensor] = ()) -> Iterator[None]:
    """Whatever `model` holds is afterwards what it was: the same objects, with the same contents, bit for bit.

    That is all that Python reaches from it: attributes of modules and other objects, dicts, lists, sets, deques, arrays,
    tensors with their gradients, random generators; hooks and methods with their closures, defaults and the globals that
    they name; attributes of the model's classes. What functools remembers for a function is forgotten if it has changed.

    Not covered is what Python cannot look into or set back: files, connections, iterators, objects of extensions, the state
    of the standard library.

    Args:
        but: tensors whose values are not kept, because nothing writes them. Of all others a copy is held.
    """
    saved = {_storage(t) for t in but}
    undo = [back for thing in reachable(model) for back in _undo(thing, saved)]
    try:
        yield
    finally:
        for back in undo:
            back()


def private_copy(model: M) -> M:
    """A deep copy of `model`, which `copy.deepcopy` refuses for some.

    Tensors that a model remembers with their graph come without it; what cannot be copied (locks, files) is shared.
    """
    found = reachable(model)
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in found if isinstance(t, Tensor) and not t.is_leaf}
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:  # whatever somebody's object raises: then it is found and shared
        for thing in found:
            if not isinstance(thing, (Tensor, nn.Module, type)) and not _parts(thing):
                try:
                    copy.deepcopy(thing)
                except Exception:
                    memo[id(thing)] = thing
        return copy.deepcopy(model, memo)


def reachable(model: nn.Module) -> list[Any]:
    """All objects that Python reaches from `model`, each once; not through modules and classes of torch and Python."""
    found: dict[int, Any] = {}
    pending: list[Any] = [model]
    while pending:
        thing = pending.pop()
        if isinstance(thing, _ATOMS) or id(thing) in found:
            continue
        found[id(thing)] = thing
        pending.extend(_parts(thing))
    return list(found.values())


def _parts(thing: Any) -> list[Any]:
    """What an object holds directly."""
    kind: Any = type(thing)
    if isinstance(thing, types.ModuleType):
        return []
    if isinstance(thing, type):
        if _foreign(thing):
            return []
        named = [value for name, value in vars(thing).items() if name == "__call__" or not name.startswith("__")]
        return [*named, *thing.__bases__]
    if isinstance(thing, types.FunctionType):
        named = [v for v in _globals(thing).values() if v is not _ABSENT]
        return [*(thing.__closure__ or ()), thing.__defaults__, thing.__kwdefaults__, thing.__dict__, *named]
    if isinstance(thing, types.CellType):
        return [] if _content(thing) is _ABSENT else [thing.cell_contents]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, _LRU):
        return [thing.__wrapped__]
    if isinstance(thing, property):
        return [thing.fget, thing.fset]
    if isinstance(thing, (classmethod, staticmethod)):
        return [thing.__func__]
    if isinstance(thing, weakref.ReferenceType):
        return [thing()]
    held: list[Any] = []
    if isinstance(thing, (dict, types.MappingProxyType, *_WEAK)):
        held = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        held = list(thing)
    elif isinstance(thing, Tensor):
        held = [thing.grad] if thing.is_leaf and not isinstance(thing, nn.Parameter) else []
    if isinstance(thing, (nn.Module, Tensor)) or not _foreign(kind):
        held += [getattr(thing, "__dict__", None), kind, *_slots(thing).values()]
    return held


def _undo(thing: Any, saved: set[Any]) -> list[Callable[[], None]]:
    """How to set an object back to what it holds now; storages in `saved` are passed over."""
    kind: Any = type(thing)
    if isinstance(thing, types.ModuleType):
        return []
    if isinstance(thing, types.FunctionType):
        return [functools.partial(_put_names, thing.__globals__, thing.__globals__, _globals(thing))]
    if isinstance(thing, type):
        return [] if _foreign(thing) else [functools.partial(_put_attributes, thing, dict(vars(thing)))]
    if isinstance(thing, types.CellType):
        return [functools.partial(_put_content, thing, _content(thing))]
    if isinstance(thing, _LRU):
        return [functools.partial(_forget, thing, thing.cache_info())]
    if isinstance(thing, Tensor):
        return _undo_tensor(thing, saved)
    undo: list[Callable[[], None]] = []
    if isinstance(thing, _WEAK):
        undo.append(functools.partial(_put_weak, thing, list(thing.items())))
    elif isinstance(thing, dict):
        undo.append(functools.partial(_put_items, thing, list(thing.items())))
    elif isinstance(thing, (list, deque, bytearray)):
        undo.append(functools.partial(_put_list, thing, list(thing)))
    elif isinstance(thing, set):
        undo.append(functools.partial(_put_set, thing, set(thing)))
    elif isinstance(thing, np.ndarray):
        undo.append(functools.partial(_put_array, thing, thing.copy()))
    elif isinstance(thing, torch.Generator):
        undo.append(functools.partial(_put_state, thing, thing.get_state()))
    elif isinstance(thing, random.Random):
        undo.append(functools.partial(thing.setstate, thing.getstate()))
    elif isinstance(thing, np.random.RandomState):
        undo.append(functools.partial(thing.set_state, thing.get_state()))
    elif isinstance(thing, np.random.Generator):
        undo.append(functools.partial(setattr, thing.bit_generator, "state", thing.bit_generator.state))
    if not _foreign(kind) and (slots := _slots(thing)):
        undo.append(functools.partial(_put_slots, thing, slots))
    return undo


def _undo_tensor(tensor: Tensor, saved: set[Any]) -> list[Callable[[], None]]:
    undo: list[Callable[[], None]] = [functools.partial(_put_tensor, tensor, tensor.detach(), _gradient(tensor))]
    key = _storage(tensor)
    if key is not None and key not in saved:
        saved.add(key)
        storage = tensor.untyped_storage()
        undo.append(functools.partial(storage.copy_, storage.clone()))
    return undo


def _storage(tensor: Tensor) -> Any:
    """A key of the memory of a tensor; `None` where it has none that could be copied."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    with suppress(RuntimeError, NotImplementedError, ValueError):  # lazy parameters, tensors of other kinds
        return tensor.untyped_storage()._cdata
    return None


def _gradient(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


@functools.cache
def _foreign(kind: type) -> bool:
    """Whether a class is Python's, NumPy's or torch's own machinery, whose state is not the model's."""
    top, _, rest = kind.__module__.partition(".")
    if top == "torch":
        return issubclass(kind, (nn.Module, Tensor)) or rest.startswith(("_", "fx", "jit", "utils.hooks")) or not rest
    return top in ("builtins", "numpy", "logging") or top in sys.stdlib_module_names


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """The globals that the code of a function names, as far as they are data or the user's code."""
    top = str(function.__globals__.get("__name__", "")).partition(".")[0]
    if top in ("torch", "numpy") or top in sys.stdlib_module_names:
        return {}
    names: set[str] = set()
    pending = [function.__code__]
    while pending:
        code = pending.pop()
        names.update(code.co_names)
        pending.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return {name: function.__globals__.get(name, _ABSENT) for name in names}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


@functools.cache
def _slot_names(kind: type) -> tuple[Any, ...]:
    return tuple(d for k in kind.__mro__ for d in vars(k).values() if isinstance(d, types.MemberDescriptorType))


def _slots(thing: Any) -> dict[Any, Any]:
    kind: Any = type(thing)
    found = {}
    for descriptor in _slot_names(kind):
        with suppress(AttributeError):
            found[descriptor] = descriptor.__get__(thing)
    return found


# -- setting back -------------------------------------------------------------------------------------------------------


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _put_items(live: dict[Any, Any], before: list[tuple[Any, Any]]) -> None:
    if len(live) == len(before) and all(
        k is k0 and v is v0 for (k, v), (k0, v0) in zip(live.items(), before, strict=True)
    ):
        return
    kind = OrderedDict if isinstance(live, OrderedDict) else dict  # a subclass may do more than hold
    kind.clear(live)
    for key, value in before:
        kind.__setitem__(live, key, value)


def _put_weak(live: MutableMapping[Any, Any], before: list[tuple[Any, Any]]) -> None:
    live.clear()
    live.update(before)


def _put_list(live: Any, before: list[Any]) -> None:
    if not _same(list(live), before):
        live.clear()
        live.extend(before)


def _put_set(live: set[Any], before: set[Any]) -> None:
    live.clear()
    live.update(before)


def _put_array(live: np.ndarray, before: np.ndarray) -> None:
    if live.flags.writeable:
        live[...] = before


def _put_state(generator: torch.Generator, before: Tensor) -> None:
    generator.set_state(before)


def _put_content(cell: types.CellType, before: Any) -> None:
    if _content(cell) is not before:
        if before is _ABSENT:
            del cell.cell_contents
        else:
            cell.cell_contents = before


def _forget(function: Any, before: Any) -> None:
    if function.cache_info() != before:
        function.cache_clear()


def _put_tensor(tensor: Tensor, before: Tensor, gradient: Tensor | None) -> None:
    if _storage(tensor) != _storage(before) or tensor.shape != before.shape:
        tensor.data = before
    if _gradient(tensor) is not gradient:
        tensor.grad = gradient


def _put_slots(thing: Any, before: Mapping[Any, Any]) -> None:
    kind: Any = type(thing)
    now = _slots(thing)
    for descriptor in _slot_names(kind):
        if descriptor in before:
            if now.get(descriptor, _ABSENT) is not before[descriptor]:
                with suppress(AttributeError, TypeError):  # read-only members of C types: no Python code changes them
                    descriptor.__set__(thing, before[descriptor])
        else:
            with suppress(AttributeError):
                descriptor.__delete__(thing)


def _put_names(live: dict[str, Any], now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Set data back that code has bound anew; what it imported or defined stays."""
    for name, value in before.items():
        found = now.get(name, _ABSENT)
        if found is value or isinstance(found, _CODE):
            continue
        if value is _ABSENT:
            del live[name]
        else:
            live[name] = value


def _put_attributes(kind: type, before: Mapping[str, Any]) -> None:
    now = dict(vars(kind))
    for name in {*now, *before}:
        found, value = now.get(name, _ABSENT), before.get(name, _ABSENT)
        if found is value or isinstance(found, _CODE) or (name.startswith("__") and name.endswith("__")):
            continue
        if value is _ABSENT:
            delattr(kind, name)
        else:
            setattr(kind, name, value)
