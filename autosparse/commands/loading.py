"""YAML and pydantic: settings from a file and overrides, checked."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from autosparse.commands.schemas import QuickstartConfig
from autosparse.errors import AutoSparseError, require, suggest
from autosparse.experiment.candidates import Candidate
from autosparse.files import check_file
from autosparse.report.checks import split
from autosparse.scorers.loading import is_scorer
from autosparse.search.method import method_for

T = TypeVar("T")

# Keys under which a bare string stands for a whole group of settings: `model: resnet20` is `model: {name: resnet20}`.
_SHORT = {
    **dict.fromkeys(("model", "models", "sources", "target", "data"), "name"),
    **dict.fromkeys(("criterion", "criteria"), "criterion"),
    "executor": "kind",
}


_CANDIDATE = {field.name for field in dataclasses.fields(Candidate)}


class _Loader(yaml.SafeLoader):
    """YAML with the numbers that people write: `1e-3` is one, and `2:4` is a pattern, not 124 (base 60)."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping, none of whose keys is there twice: the last one would win silently."""
    lines: dict[Any, int] = {}
    for name, value in node.value:
        line, key = name.start_mark.line + 1, loader.construct_object(name, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key in line {line} is not text: quote it or remove it", None
            )
        if key in lines:
            where = f"in line {line}" if lines[key] == line else f"in lines {lines[key]} and {line}"
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice, {where}: keep one")
        if node.flow_style and ":" in str(key) and value.value == "":
            raise yaml.constructor.ConstructorError(
                None, None, f"{key!r} has no value: put a space after the colon", None
            )
        lines[key] = line
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _read(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader


def load_config(schema: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Settings from a YAML file and `key.sub=value` overrides, checked.

    Raises:
        AutoSparseError: no such file, not YAML, a misspelt key, or a value of the wrong type or out of range.
    """
    values = {} if path is None else _read_file(path, command_of(schema))
    for text in overrides:
        _override(values, text)
    values = _expanded(values)
    try:
        for key in ("criterion", "criteria"):
            given = values.get(key)
            for item in given if isinstance(given, list) else [given]:
                _collect_options(item)
        _check_numbers(schema, values, "")
        config = TypeAdapter(schema).validate_python(values)
        if path is not None:
            _check_given(schema, values)
        return config
    except (ValidationError, AutoSparseError) as error:
        where = f"config {path}" if path is not None else "config"
        reason = _explain(schema, error) if isinstance(error, ValidationError) else error
        raise AutoSparseError(f"{where}: {reason}") from None


def _read_file(path: Path, command: str) -> dict[str, Any]:
    """The values of a config file of a command."""
    check_file(path, "config", "give a YAML file such as those in configs/")
    try:
        values = _read(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AutoSparseError(f"config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AutoSparseError(f"config {path} is not YAML: it is not encoded in UTF-8 ({error.reason})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = "it nests too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise AutoSparseError(f"config {path} is not YAML: {text}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise AutoSparseError(f"config {path} holds a {type(values).__name__}: it must hold keys with values")
    given = values.pop("command", command)  # a resolved config.yaml is a config too
    if given != command:
        raise AutoSparseError(f"config {path} is for autosparse {given}: run that command, or give another config")
    return values


def _check_numbers(hint: Any, value: Any, where: str) -> None:
    """Raise `AutoSparseError` where a value would be made a number or a bool without being one, or a seed fits no file."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for option in options:
            fields: Mapping[Any, Any] = typing.get_type_hints(option) if dataclasses.is_dataclass(option) else {}
            args = [arg for arg in typing.get_args(option) if arg is not ...]
            for key, item in items if isinstance(value, Mapping) == (typing.get_origin(option) is not tuple) else ():
                _check_numbers(fields.get(key, args[-1] if args else Any), item, f"{where}.{key}".lstrip("."))
        return
    kinds = set(options) & {int, float, bool, str, Any}
    numbers = "integer" if kinds & {int, float} == {int} else "number"
    if kinds <= {int, float} and isinstance(value, (bool, str)):
        require(not kinds, where, value, f"input should be a valid {numbers}")
    if kinds == {bool}:
        require(isinstance(value, bool), where, value, "input should be a valid boolean: true or false")
    if int in kinds and "seed" in where and isinstance(value, int):
        require(0 <= value < 2**63, where, value, "a seed is a whole number from 0 to 2^63 - 1")


def _check_given(schema: type, values: Mapping[str, Any]) -> None:
    """Raise `AutoSparseError` where a file leaves out what the work is about: a default would begin to download data."""
    needed = {f.name for f in dataclasses.fields(schema)} & {"model", "models", "data", "records"}
    if schema is QuickstartConfig:
        needed = set()
    if isinstance(values.get("tasks"), Mapping):
        needed -= {"models"} | ({"data"} if "data" in values["tasks"] else set())
    if values.get("input_size") is not None:
        needed.discard("data")
    missing = sorted(needed - values.keys())
    if missing:
        raise AutoSparseError(f"{' and '.join(missing)} must be given")


def _override(values: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise AutoSparseError(f"override {text!r}: write key=value or key.sub=value, such as recipe.epochs=10")
    *parents, last = key.split(".")
    at = values
    for part in parents:
        inner = at.get(part)
        if isinstance(inner, str) and part in _SHORT:
            inner = {_SHORT[part]: inner}
        at[part] = inner = dict(inner or {}) if isinstance(inner, (dict, type(None))) else inner
        if not isinstance(inner, dict):
            raise AutoSparseError(f"override {text!r}: {part} holds {inner!r}, which has no keys; write {part}=VALUE")
        at = inner
    try:
        at[last] = _read(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "; where it has spaces, quote the override in the shell" if set("{[") & set(value) else ""
        if isinstance(error, yaml.constructor.ConstructorError):
            reason = f": {error.problem}"
        raise AutoSparseError(f"override {text!r}: the value is not YAML{reason}") from error


def _expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bare names as the settings that they stand for; also inside lists. `tasks.data` with what it takes from `data`."""

    def expand(key: str, value: Any) -> Any:
        short = _SHORT.get(key)
        if isinstance(value, str) and short:
            return {short: value}
        if isinstance(value, list) and short:
            return [expand(key, item) for item in value]
        return value

    expanded = {key: expand(key, value) for key, value in values.items()}
    tasks, data = expanded.get("tasks"), expanded.get("data", {})
    if isinstance(tasks, dict) and isinstance(tasks.get("data"), list) and isinstance(data, dict):
        entries = [expand("data", entry) for entry in tasks["data"]]
        entries = [{**data, **entry} if isinstance(entry, dict) else entry for entry in entries]
        expanded["tasks"] = {**tasks, "data": entries}
    return expanded


def _collect_options(candidate: Any) -> None:
    """The settings of a method, which stand beside `criterion` in a config, as its `options`."""
    if not isinstance(candidate, dict) or not isinstance(name := candidate.get("criterion"), str):
        return
    base = split(name)[1]
    if split(base)[0] is not None or is_scorer(base) or (method := method_for(base)) is None:
        return
    own = {field.name for field in dataclasses.fields(method.settings)}
    beside = {key for key in candidate if key in own or key not in _CANDIDATE}
    options = candidate.get("options")
    options = {**(options if isinstance(options, dict) else {}), **{key: candidate.pop(key) for key in beside}}
    for key in options.keys() - own:
        raise AutoSparseError(f"{key} of {base} is {options[key]!r}: {suggest(str(key), own | _CANDIDATE)}")
    _check_numbers(method.settings, options, base)
    try:
        candidate["options"] = TypeAdapter(method.settings).validate_python(options)
    except ValidationError as error:
        raise AutoSparseError(f"{base}: {_explain(method.settings, error)}") from None


def _explain(schema: type, error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = _at(schema, first["loc"][:-1])
        known = [f.name for f in dataclasses.fields(owner)] if owner is not None else []
        return f"unknown key {where!r}: {suggest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{where} is missing: give it"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where and not message.startswith(where) else message
    message = message.replace("valid tuple", "valid list")  # as YAML calls it
    return f"{where} is {first.get('input')!r}: {message[0].lower()}{message[1:]}"


def _at(schema: Any, location: Sequence[int | str]) -> Any:
    """The settings class at a place of the config."""
    for part in location:
        if isinstance(part, int):
            continue
        schema = typing.get_type_hints(schema).get(str(part))
        for inner in typing.get_args(schema):
            if dataclasses.is_dataclass(inner):
                schema = inner
        if schema is None:
            return None
    return schema if dataclasses.is_dataclass(schema) else None


def plain(config: Any) -> dict[str, Any]:
    """A config as YAML sees it."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def command_of(schema: type) -> str:
    return schema.__name__.removesuffix("Config").lower()
