"""The output directory of a command: whose it is, and what may differ when the command runs again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from autosparse.commands.loading import command_of, plain
from autosparse.commands.schemas import (
    BenchmarkConfig,
    CheckConfig,
    DiagnoseConfig,
    GenerateConfig,
    ShrinkConfig,
    TuneConfig,
)
from autosparse.errors import AutoSparseError
from autosparse.files import files_under, replace_file

# Keys that may differ between two runs in one directory: they change what more is done, not what has been done.
_FREE = {"output", "device", "executor", "tracking"}
_GRID = {"models", "criteria", "sparsities", "seeds"}
_AXES = {
    TuneConfig: {"design.draws", "design.rivals"},
    GenerateConfig: {"models", "seeds", "tasks.count", "tasks.seeds"},
    BenchmarkConfig: _GRID,
    CheckConfig: _GRID | {"checks"},
    DiagnoseConfig: {"criteria", "prepare"},
    ShrinkConfig: {"methods", "ratios", "seeds"},
}


def claim_directory(config: Any) -> Path:
    """The output directory, with the resolved config in it.

    Raises:
        AutoSparseError: it holds results of another config, or cannot be made.
    """
    directory = Path(config.output)
    path = directory / "config.yaml"
    free = _FREE | _AXES.get(type(config), set())
    mine = {"command": command_of(type(config)), **plain(config)}
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
    for path in files_under(directory):
        top, *_ = parts = path.relative_to(directory).parts
        ours = top == "config.yaml" or top.startswith("mlflow.db") or top == "mlartifacts"
        if not ours and not any(p.startswith(".") or p.endswith(".state") for p in parts):
            return True
    return False


def _difference(key: str, other: Any, mine: Any) -> str:
    if isinstance(other, dict) and isinstance(mine, dict):
        for sub in sorted(other.keys() | mine.keys()):
            if other.get(sub) != mine.get(sub):
                return _difference(f"{key}.{sub}", other.get(sub), mine.get(sub))
    return f"there {key} is {other!r}, here {mine!r}"
