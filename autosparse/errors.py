"""What a user's mistake looks like, and how settings are declared."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


class AutoSparseError(ValueError):
    """A mistake of the user. The message is one line that names the thing, its value and what to do."""


class AutoSparseStateError(AutoSparseError):
    """A saved state cannot be resumed: it belongs to other settings, data or another version, or it is damaged."""


@contextmanager
def of_state() -> Iterator[None]:
    """Raise errors in the block as `AutoSparseStateError`: the saved state is at fault, and the caller may delete it."""
    try:
        yield
    except AutoSparseError as error:
        raise AutoSparseStateError(str(error)) from error


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass that a YAML file can fill too.

    Its `__post_init__` checks the values, so that library and config get the same messages; a config's types are read
    through pydantic, which `__pydantic_config__` tells to refuse unknown keys. No pydantic is needed to use the class.
    Before that, fields that are a number, a text or a flag are checked for their type; after it, that no number is infinite
    or NaN.
    """
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    check = getattr(cls, "__post_init__", None)

    def check_all(self: Any) -> None:
        _check_types(self)
        if check is not None:
            check(self)
        _check_finite(self)

    cls.__post_init__ = check_all  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


_KINDS: Mapping[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "a string"),
    "bool": (bool, "True or False"),
}


def _check_types(values: Any) -> None:
    """Of the fields that are a number, a text or a flag, or may be `None` too."""
    for field in dataclasses.fields(values):
        names = [name.strip() for name in str(field.type).split("|")]
        value = getattr(values, field.name)
        kinds = [_KINDS[name] for name in names if name in _KINDS]
        if len(kinds) + names.count("None") < len(names) or (value is None and "None" in names):
            continue
        fits = isinstance(value, tuple(kind for kind, _ in kinds)) and (not isinstance(value, bool) or "bool" in names)
        require(fits, field.name, value, "give " + " or ".join(text for _, text in kinds))


def _check_finite(values: Any) -> None:
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            require(finite, field.name, value, "give a finite number")


def require(condition: bool, what: str, value: Any, way_out: str) -> None:
    """Raise `AutoSparseError("what is value: way_out")` unless `condition` holds."""
    if not condition:
        raise AutoSparseError(f"{what} is {value!r}: {way_out}")


def require_unset(values: Any, names: Sequence[str], of: str, why: str) -> None:
    """Raise `AutoSparseError` where one of the fields `names`, which nothing uses, is not at its default.

    `of`: what stands before its name in the message, such as `"irp."`; `why`: the reason that it is not used.
    """
    usual = {field.name: field for field in dataclasses.fields(values)}
    for name in names:
        field, value = usual[name], getattr(values, name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        require(value == default, f"{of}{name}", value, f"{why}; leave it out")


def from_mapping(cls: type[T], given: Mapping[str, Any], of: str) -> T:
    """Settings from a mapping of their fields.

    Raises:
        AutoSparseError: an unknown field, or a value that the settings refuse.
    """
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in known:
            raise AutoSparseError(f"{key} of {of} is {value!r}: {suggest(key, known)}")
    return cls(**given)


def first_line(error: BaseException) -> str:
    """The first line of what another library raised, or its type where it says nothing: what fits into our one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def raise_out_of_memory(error: BaseException, doing: str) -> None:
    """Raise the one clear error if `error` says that memory ran out; every broad `except` around torch asks this first."""
    if isinstance(error, AutoSparseFailure):
        raise error
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch is not imported here
    text = str(error)
    allocator = isinstance(error, RuntimeError) and ("not enough memory" in text or "DefaultCPUAllocator" in text)
    if kinds & {"OutOfMemoryError", "MemoryError"} or allocator:
        raise AutoSparseFailure(
            f"out of memory while {doing} ({first_line(error)}): use smaller batches or a smaller example_input"
        ) from error


@contextmanager
def memory_watched(doing: str) -> Iterator[None]:
    """The one clear error where memory runs out inside."""
    try:
        yield
    except Exception as error:
        raise_out_of_memory(error, doing)
        raise


def suggest(name: str, known: Any) -> str:
    """The end of an error message about an unknown name: the nearest known one, if any, and all of them."""
    import difflib

    names = sorted(str(k) for k in known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"


class AutoSparseFailure(RuntimeError):
    """Work that failed without a mistake in the input, such as a training that diverged or a full disk. Exit code 1."""


def warn(message: str) -> None:
    """A warning that points to the first caller outside the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "autosparse",
        "data_gen",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
