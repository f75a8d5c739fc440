"""A job as JSON, for processes that share no more than files with the one that gives it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError
from autosparse.jobs.executor import Job


def encode(value: Any) -> Any:
    """The value in types that JSON has; dataclasses and functions by the names under which they can be imported.

    Raises:
        AutoSparseError: a value of another type, or defined where no other process can import it.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": encode(list(value))}
    if isinstance(value, Path):
        return {"path": str(value.absolute())}
    if isinstance(value, Mapping):
        return {"mapping": [[encode(key), encode(item)] for key, item in value.items()]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"dataclass": _name(type(value)), "fields": {name: encode(item) for name, item in given.items()}}
    if callable(value):
        return {"function": _name(value)}
    raise AutoSparseError(f"a job is given {type(value).__name__}, which cannot be sent: use executor local or inline")


def decode(value: Any) -> Any:
    """What `encode` was given. Only modules that the value names are imported."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "dataclass" in value:
        kind = _named(value["dataclass"])
        assert dataclasses.is_dataclass(kind) and isinstance(kind, type)
        return kind(**{name: decode(item) for name, item in value["fields"].items()})
    ((kind, content),) = value.items()
    if kind == "function":
        return _named(content)
    content = decode(content) if kind != "path" else content
    return {"tuple": tuple, "path": Path, "mapping": dict}[kind](content)


def encode_job(job: Job) -> dict[str, Any]:
    return {"key": job.key, "function": encode(job.function), "arguments": encode(dict(job.arguments))}


def decode_job(value: Mapping[str, Any]) -> Job:
    return Job(value["key"], decode(value["function"]), decode(value["arguments"]))


def _name(value: Any) -> str:
    module, name = value.__module__, value.__qualname__
    if module == "__main__" or "<" in name:
        raise AutoSparseError(f"{name} is defined in a script: put it into a module that can be imported")
    return f"{module}:{name}"


def _named(name: str) -> Any:
    module, _, path = name.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value
