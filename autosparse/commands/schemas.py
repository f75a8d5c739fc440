"""YAML and pydantic: what the commands take. Everything under this file takes plain dataclasses."""

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

from autosparse.errors import AutoSparseError, require, settings, suggest
from autosparse.experiment.candidates import Candidate
from autosparse.experiment.checks import CHECKS, expand
from autosparse.experiment.structured import thinnings
from autosparse.files import check_file, replace_file
from autosparse.jobs.executor import ExecutorSettings
from autosparse.masks.schedule import check_sparsity
from autosparse.network.diagnostics import DiagnosticSettings
from autosparse.network.signals import SignalSettings
from autosparse.scorers.fitting import FitSettings
from autosparse.scorers.outcome import OutcomeSettings
from autosparse.search.irp import IRPSettings
from autosparse.trainability.export import ExportSettings
from autosparse.trainability.prepare import check_preparation
from autosparse.trainability.tpp import TPPSettings
from autosparse.training.data import DataSettings
from autosparse.training.loop import Recipe
from autosparse.training.models import ModelSettings
from autosparse.training.tasks import TaskSettings

T = TypeVar("T")

# Keys under which a bare string stands for a whole group of settings: `model: resnet20` is `model: {name: resnet20}`.
_SHORT = {
    **dict.fromkeys(("model", "models", "sources", "target", "data"), "name"),
    **dict.fromkeys(("criterion", "criteria"), "criterion"),
    "executor": "kind",
}


@settings
class GenerateConfig:
    """`autosparse generate`: IRP runs of every model with every seed, into `output/records`.

    With `tasks`, which draws the networks, the runs are those of the tasks, and there are no `models` and `seeds`. In a
    file, each of `tasks.data` takes from `data` what it does not say.
    """

    output: str = "runs/irp"
    models: tuple[ModelSettings, ...] = (ModelSettings("resnet20"),)
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    irp: IRPSettings = IRPSettings()
    signals: SignalSettings = SignalSettings()
    seeds: tuple[int, ...] = (0,)
    tasks: TaskSettings | None = None
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        default = {"models": (ModelSettings("resnet20"),), "seeds": (0,)}
        for key, value in default.items():
            given = getattr(self, key)
            require(self.tasks is None or given == value, key, given, f"tasks draws the {key}: leave it or tasks out")


@settings
class FitConfig:
    """`autosparse fit`: a scorer from records (files, or directories that are searched), into `output`.

    `alias` of the version in MLflow's registry, as in `models:/NAME@ALIAS`.
    """

    output: str = "runs/scorer"
    records: tuple[str, ...] = ("runs/irp",)
    name: str = "scorer"
    alias: str | None = None
    fit: FitSettings = FitSettings()
    device: str = "cpu"
    tracking: bool = True


@settings
class TuneConfig:
    """`autosparse tune`: a scorer whose layer densities are learned from the outcome of short trainings, into `output`.

    `scorer`: its file or name; `null` begins at ERK densities, without a network. `tasks` are drawn as for `generate`, by another seed than the scorer's corpus; their data
    need validation images.
    """

    output: str = "runs/tune"
    scorer: str | None = "runs/scorer/scorer.safetensors"
    name: str = "tuned"
    tasks: TaskSettings = TaskSettings(seed=1)
    data: DataSettings = DataSettings("cifar10", image_size=16, limit=5000, validation=0.4)
    recipe: Recipe = Recipe()
    tune: OutcomeSettings = OutcomeSettings()
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()


@settings
class PruneConfig:
    """`autosparse prune`: masks of one freshly initialized network, into `output/masks.safetensors`.

    `sparsity` is `null` with an N:M pattern, which sets it.
    """

    output: str = "runs/prune"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    criterion: Candidate = Candidate("snip")
    sparsity: float | None = 0.95
    recipe: Recipe = Recipe()
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        chosen = self.criterion
        for key, value in (("criterion", chosen.variant == "reinit" or chosen.continues), ("prepare", chosen.prepare)):
            given = getattr(chosen, key)
            require(not value, key, given, "prune writes masks, no weights: benchmark and check can")


@settings
class TrainConfig:
    """`autosparse train`: train one network, with masks or dense, into `output/model.safetensors`.

    `prepare`: what is done to the weights that stay before (`autosparse list preparations`); masks that it chose itself go
    into `output/masks.safetensors`.
    `device` of this and the other commands: `auto`, `cpu`, `cuda`, `cuda:1`, or several, `cuda:0,1` (`cpu:2`: two
    processes): every training runs on all of them, everything else on the first.
    """

    output: str = "runs/train"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    masks: str | None = None
    prepare: str | None = None
    seed: int = 0
    device: str = "auto"
    tracking: bool = True

    def __post_init__(self) -> None:
        check_preparation(self.prepare)


@settings
class ExportConfig:
    """`autosparse export`: a pruned network in the forms that others run, and their table, into `output`.

    `weights`: model.safetensors of `autosparse train`; `null` is the fresh initialization of `seed`. `masks`: those of
    `autosparse prune`. Instead of `data`, which gives the shape of the images and the classes, `input_size` (channels,
    height, width) and `classes` do, so that no data is needed. With `smaller` the weights are those of the physically smaller
    network that the masks leave, trained as such; without, the masks apply to them.
    """

    output: str = "runs/export"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    input_size: tuple[int, int, int] | None = None
    classes: int | None = None
    weights: str | None = None
    masks: str = "runs/prune/masks.safetensors"
    smaller: bool = False
    seed: int = 0
    export: ExportSettings = ExportSettings()
    device: str = "auto"

    def __post_init__(self) -> None:
        both = (self.input_size is None) == (self.classes is None)
        require(both, "input_size", self.input_size, "give input_size and classes together, or neither, and data")
        if self.input_size is not None and self.classes is not None:
            channels, height, width = self.input_size
            good = channels >= 1 and height == width >= 1
            require(good, "input_size", list(self.input_size), "give channels and the two equal sides: [3, 32, 32]")
            require(self.classes >= 1, "classes", self.classes, "give at least 1")


@settings
class BenchmarkConfig:
    """`autosparse benchmark`: the grid models × criteria × sparsities × seeds, into `output/results.csv`."""

    output: str = "runs/benchmark"
    models: tuple[ModelSettings, ...] = (ModelSettings("resnet20"),)
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    criteria: tuple[Candidate, ...] = (Candidate("erk"), Candidate("magnitude"), Candidate("snip"))
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            check_sparsity(sparsity)


@settings
class CheckConfig:
    """`autosparse check`: every criterion beside its variants, into `output/results.csv`.

    `criteria` without variants; `checks`: the variants of each, but for `inverted` of methods that search by training.
    """

    output: str = "runs/check"
    models: tuple[ModelSettings, ...] = (ModelSettings("resnet20"),)
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    criteria: tuple[Candidate, ...] = (Candidate("magnitude"), Candidate("snip"))
    sparsities: tuple[float, ...] = (0.95,)
    seeds: tuple[int, ...] = (0, 1, 2)
    checks: tuple[str, ...] = tuple(CHECKS)
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        require(len(self.checks) > 0, "checks", list(self.checks), f"give at least one of {', '.join(CHECKS)}")
        for check in self.checks:
            require(check in CHECKS, "checks", check, suggest(check, CHECKS))
        for criterion in self.criteria:
            require(
                criterion.variant is None,
                "criteria",
                criterion.criterion,
                f"give {criterion.base!r}: checks adds the variants",
            )
        expand(self.criteria, self.checks)  # raises where a criterion cannot have a variant


@settings
class DiagnoseConfig:
    """`autosparse diagnose`: one network dense, pruned by each of `criteria`, and then prepared in each way of `prepare`;
    figures of each layer into `output/diagnosis.csv`, of the network into `output/summary.csv`.

    The network is a new one, or has `weights`, a file that `autosparse train` wrote; `masks`, as `autosparse prune` writes
    them, are one more state. Criteria without variants that train or draw weights anew.
    """

    output: str = "runs/diagnose"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    weights: str | None = None
    masks: str | None = None
    criteria: tuple[Candidate, ...] = (Candidate("erk"), Candidate("snip"))
    sparsity: float | None = 0.95
    prepare: tuple[str, ...] = ("repair",)
    diagnostics: DiagnosticSettings = DiagnosticSettings()
    recipe: Recipe = Recipe()
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        for how in self.prepare:
            check_preparation(how)
        for one in self.criteria:
            require(one.prepare is None, f"prepare of {one.criterion}", one.prepare, "prepare of the config adds them")
            draws = one.variant == "reinit" or one.continues
            require(not draws, "criteria", one.criterion, "diagnose measures masks on the network's own weights")


@settings
class ShrinkConfig:
    """`autosparse shrink`: networks trained densely, thinned by each method at each ratio, and made smaller, into
    `output/results.csv` and `output/networks`.

    `recipe` of the dense training, which methods and ratios share; `tpp` of the steps after it, which every method takes,
    with or without the penalty, with the batches and optimizer of `finetune`; `finetune` of the smaller network. `methods`:
    `l1` removes the filters of the lowest mean |w|, `tpp` pushes them out first; another criterion or scorer (`snip`,
    `tpp:snip`) chooses others. `ratios` of filters that go: a share, of each convolution whose filters can go alone, or shares
    by patterns on weight names.
    """

    output: str = "runs/shrink"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    tpp: TPPSettings = TPPSettings()
    finetune: Recipe = Recipe(epochs=120, lr=0.01)
    methods: tuple[str, ...] = ("tpp", "l1")
    ratios: tuple[float | Mapping[str, float], ...] = (0.5,)
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        thinnings(self.model, self.data, self.recipe, self.tpp, self.finetune, self.methods, self.ratios, self.seeds)


@settings
class QuickstartConfig:
    """`autosparse quickstart`: generate, fit and benchmark on the digits, into one directory."""

    output: str = "runs/quickstart"
    data: DataSettings = DataSettings("digits")
    recipe: Recipe = Recipe(epochs=15, schedule="cosine")
    sources: tuple[ModelSettings, ...] = (ModelSettings("convnet"), ModelSettings("resnet8", 8))
    source_seeds: tuple[int, ...] = (0, 1)
    irp: IRPSettings = IRPSettings(rounds=8, density=0.02)
    signals: SignalSettings = SignalSettings(n_batches=8)
    fit: FitSettings = FitSettings(validation="none")  # four runs: one judges, none is spared to choose the epoch
    target: ModelSettings = ModelSettings("vgg11", 8)
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    seeds: tuple[int, ...] = (0, 1, 2)
    floor: float = 0.005
    device: str = "cpu"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.floor < 1, "floor", self.floor, "it is the smallest density of a layer, in [0, 1)")
        for sparsity in self.sparsities:
            check_sparsity(sparsity)


# Keys that may differ between two runs in one directory: they change what more is done, not what has been done.
_FREE = {"output", "device", "executor", "tracking"}
_GRID = {"models", "criteria", "sparsities", "seeds"}
_AXES = {
    GenerateConfig: {"models", "seeds", "tasks.count", "tasks.seeds"},
    BenchmarkConfig: _GRID,
    CheckConfig: _GRID | {"checks"},
    DiagnoseConfig: {"criteria", "prepare"},
    ShrinkConfig: {"methods", "ratios", "seeds"},
}


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
    for name, _ in node.value:
        line, key = name.start_mark.line + 1, loader.construct_object(name, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, f"the key in line {line} is no text", None)
        if key in lines:
            where = f"in line {line}" if lines[key] == line else f"in lines {lines[key]} and {line}"
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice, {where}: keep one")
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
    values = {} if path is None else _read_file(path, _command(schema))
    for text in overrides:
        _override(values, text)
    values = _expanded(values)
    try:
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
        raise AutoSparseError(f"config {path} is one of autosparse {given}: run that, or give another config")
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
        raise AutoSparseError(f"{' and '.join(missing)} missing: give {'it' if len(missing) == 1 else 'them'}")


def _command(schema: type) -> str:
    return schema.__name__.removesuffix("Config").lower()


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
            raise AutoSparseError(f"override {text!r}: {part} is a {type(inner).__name__}, it has no keys")
        at = inner
    try:
        at[last] = _read(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AutoSparseError(f"override {text!r}: the value is not YAML") from error


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


def claim_directory(config: Any) -> Path:
    """The output directory, with the resolved config in it.

    Raises:
        AutoSparseError: it holds results of another config, or cannot be made.
    """
    directory = Path(config.output)
    path = directory / "config.yaml"
    free = _FREE | _AXES.get(type(config), set())
    mine = {"command": _command(type(config)), **plain(config)}
    if path.exists() and _has_results(directory):
        try:
            other = yaml.safe_load(path.read_text(encoding="utf-8"))
            other = other if isinstance(other, dict) else {}
        except yaml.YAMLError:
            other = {}
        before, now = _bound(other, free), _bound(mine, free)
        for key in sorted(now.keys() | before.keys(), key=lambda key: (key != "command", key)):
            if now.get(key) != before.get(key):
                raise AutoSparseError(
                    f"output {directory} belongs to another config ({_difference(key, before.get(key), now.get(key))}): "
                    "choose another output, or delete the directory"
                )
    elif directory.is_file():
        raise AutoSparseError(f"output {directory} is a file: choose a directory")
    with replace_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(mine, sort_keys=False), encoding="utf-8")
    return directory


def _bound(values: Mapping[str, Any], free: set[str]) -> dict[str, Any]:
    """The values of a config without the free keys, of which some lie in a group (`tasks.count`), and without what a group
    does not set: an older version may not have had it."""
    inner = {top: {key.partition(".")[2] for key in free if key.startswith(f"{top}.")} for top in values}
    return {
        key: {k: v for k, v in value.items() if k not in inner[key] and v is not None}
        if isinstance(value, dict)
        else value
        for key, value in values.items()
        if key not in free
    }


def _has_results(directory: Path) -> bool:
    """Whether there is more than the config, tracking, locks and unfinished state of a run that failed on its input."""
    for path in directory.rglob("*"):
        top, *_ = parts = path.relative_to(directory).parts
        ours = top == "config.yaml" or top.startswith("mlflow.db") or top == "mlartifacts"
        if path.is_file() and not ours and not any(p.startswith(".") or p.endswith(".state") for p in parts):
            return True
    return False


def _difference(key: str, other: Any, mine: Any) -> str:
    if isinstance(other, dict) and isinstance(mine, dict):
        for sub in sorted(other.keys() | mine.keys()):
            if other.get(sub) != mine.get(sub):
                return _difference(f"{key}.{sub}", other.get(sub), mine.get(sub))
    return f"there {key} is {other!r}, here {mine!r}"
