"""Files that a kill at any instant cannot damage, and that are read without pickle."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosparse.errors import AutoSparseError, AutoSparseFailure

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it replaces `path` in one step, on disk for good.

    Raises:
        AutoSparseFailure: the disk is full or the directory cannot be written; what was at `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or error
        raise AutoSparseFailure(
            f"cannot write {path}: {reason}; free space or choose another output directory, "
            "then run the same command again: what was computed before is kept"
        ) from error
    finally:
        with suppress(OSError):  # it may never have come about
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=True) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file of ours.

    Raises:
        AutoSparseError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise AutoSparseError(f"{what} {path} does not exist: check the path") from error
    except (OSError, ValueError) as error:
        raise AutoSparseError(f"{what} {path} is damaged: {error}; delete it and run again") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], schema: str, **metadata: str) -> None:
    """A safetensors file of the tensors, whose metadata name `schema`, in one step."""
    from safetensors.torch import save_file

    with replace_file(path) as temporary:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, {"schema": schema, **metadata})


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table whose columns are the keys of the first row, in one step."""
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_safetensors(path: Path, schema: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata names `schema`.

    Raises:
        AutoSparseError: the file is missing, truncated, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise AutoSparseError(f"{what} file {path} does not exist: check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("schema", "no schema")
            if found != schema:
                raise AutoSparseError(f"{path} holds {found}, not {schema}: give a file with {what} of AutoSparse")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AutoSparseError(
            f"{path} cannot be read as {what}: {error}; it is truncated or not safetensors"
        ) from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
