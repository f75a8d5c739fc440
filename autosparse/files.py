"""Files that a kill at any instant cannot damage, that tell damage of any other kind, and that are read without pickle.

Every file of ours holds a hash of its content, and a file whose content has another one, or that has none, is not read:
JSON and safetensors under the key `content_sha256`, other files in their last line (`seal`).
"""

from __future__ import annotations

import bisect
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from autosparse.errors import AutoSparseError, AutoSparseFailure, first_line

if TYPE_CHECKING:
    from torch import Tensor


class Unfailing(io.FileIO):
    """A file that takes every write, whatever becomes of it, and keeps the first error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while rest and self.error is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return len(data)


HASH = "content_sha256"


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it replaces `path` in one step, on disk for good.

    Raises:
        AutoSparseFailure: the disk is full or the directory cannot be written; what was at `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")  # one for each thread
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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The values as a JSON object, with their hash, in one step."""
    value = json.loads(json.dumps(value))  # as it will be read: tuples are lists, keys are texts
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps({**value, HASH: _hash_of(value)}, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Raises:
        AutoSparseError: it is missing, not a JSON object, or its content is not what was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AutoSparseError(f"{what} {path} does not exist: check the path") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(what, path, first_line(error)) from error
    if not isinstance(value, dict):
        raise _damaged(what, path, "it holds no JSON object")
    _check_hash(what, path, value.pop(HASH, None), _hash_of(value))
    return value


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], schema: str, **metadata: str) -> None:
    """A safetensors file of the tensors, whose metadata name `schema` and the content's hash, in one step."""
    from safetensors.torch import save_file

    stored = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    metadata = {"schema": schema, **metadata}
    with replace_file(path) as temporary:
        save_file(stored, temporary, {**metadata, HASH: _hash_of(metadata, stored)})
        _order_metadata(temporary)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """A table in one step; `columns` are the keys of all rows, by default those of the first."""
    with replace_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _order_metadata(path: Path) -> None:
    """The same content makes the same file: safetensors writes its metadata in random order."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


def read_safetensors(
    path: Path, schema: str, what: str, foreign: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that `write_safetensors` wrote with this schema.

    With `foreign` also those of a file that names no schema, as others write it.

    Raises:
        AutoSparseError: the file is missing, truncated, of another kind, or its content is not what was written.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path, f"{what} file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("schema", "no schema")
            ours = "schema" in metadata or HASH in metadata or not foreign
            if ours and found != schema:
                raise AutoSparseError(f"{path} holds {found}, not {schema}: give a file with {what} of AutoSparse")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AutoSparseError):
            raise
        raise AutoSparseError(
            f"{path} cannot be read as {what}: {first_line(error)}; it is truncated or not safetensors"
        ) from error
    if ours:
        _check_hash(what, path, metadata.pop(HASH, None), _hash_of(metadata, tensors))
    return tensors, metadata


def files_under(directory: Path) -> Iterator[Path]:
    """All files in a directory and those below; directories that another process removes meanwhile are left out."""
    for folder, _, names in os.walk(directory):  # `Path.rglob` would raise
        yield from (Path(folder) / name for name in names)


def check_file(path: Path, what: str, way_out: str = "check the path") -> None:
    """Nothing, where there is a file (or a pipe) at `path`.

    Raises:
        AutoSparseError: there is nothing, or a directory, or one cannot get there.
    """
    try:
        if path.stat() and path.is_dir():
            raise AutoSparseError(f"{what} {str(path)!r} is a directory: give a file")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AutoSparseError(f"{what} {path} does not exist: {way_out}") from error
    except OSError as error:
        raise AutoSparseError(f"{what} {path} cannot be read: {error.strerror}; {way_out}") from error


def _hash_of(values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of what a file holds: the values, and names, types, shapes and bytes of the tensors."""
    import torch

    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted((tensors or {}).items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_hash(what: str, path: Path, stored: str | None, found: str) -> None:
    if stored is None:
        raise _damaged(what, path, f"it holds no hash of its content ({HASH})")
    if stored != found:
        raise _damaged(what, path, "its content is not what was written")


def _damaged(what: str, path: Path, how: str) -> AutoSparseError:
    return AutoSparseError(f"{what} {path} is damaged: {how}; delete it and make it again")


# -- files that name no hash themselves -------------------------------------------------------------------------------

_BLOCK = 2**22  # bytes
_SEAL = b"\nautosparse checksum "
_SEAL_LENGTH = len(_SEAL) + 64 + 1


def seal(path: Path) -> None:
    """Add a last line with the checksum of all before it. HDF5 reads no further than its own end, and does not mind."""
    with open(path, "rb+") as file:
        line = _SEAL + _checksum(file, file.seek(0, os.SEEK_END)) + b"\n"
        file.write(line)


def write_sealed(path: Path, pieces: Sequence[memoryview]) -> None:
    """The pieces one after another and the line of `seal`, in one step.

    Raises:
        AutoSparseFailure: the disk is full or the directory cannot be written; what was at `path` stays as it was.
    """
    starts = [*itertools.accumulate((len(p) for p in pieces), initial=0)]

    def parts(start: int, stop: int) -> Iterator[memoryview]:
        index = bisect.bisect_right(starts, start) - 1
        while index < len(pieces) and starts[index] < stop:
            yield pieces[index][max(start - starts[index], 0) : stop - starts[index]]
            index += 1

    line = _SEAL + _in_blocks(starts[-1], parts) + b"\n"
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.write(line)


def read_sealed(path: Path, what: str) -> memoryview:
    """The content of a file without the line of `seal`, read and checked in one pass.

    Raises:
        AutoSparseError: the line is missing, or the content is not what was sealed.
    """
    import numpy as np

    with open(path, "rb") as file:  # once: by the next time another file may have taken the place of this one
        size, line = _last_line(file)
        _check_line(path, what, line)
        content = np.empty(size, np.uint8).data

        def block(start: int, stop: int) -> tuple[memoryview]:
            part = content[start:stop]
            os.preadv(file.fileno(), [part], start)
            return (part,)

        if line != _SEAL + _in_blocks(size, block) + b"\n":
            raise _damaged(what, path, "its content is not what was written")
    return content


def _last_line(file: BinaryIO) -> tuple[int, bytes]:
    """Where the line of `seal` begins, and what is there."""
    size = max(0, os.fstat(file.fileno()).st_size - _SEAL_LENGTH)
    return size, os.pread(file.fileno(), _SEAL_LENGTH, size)


def is_sealed(path: Path) -> bool:
    """Whether `seal` wrote the last line."""
    with open(path, "rb") as file:
        return _last_line(file)[1].startswith(_SEAL)


def check_seal(path: Path, what: str) -> int:
    """The length of the file without the line that `seal` added.

    Raises:
        AutoSparseError: the line is missing, or the content is not what was sealed.
    """
    with open(path, "rb") as file:
        size, line = _last_line(file)
        _check_line(path, what, line)
        if line != _SEAL + _checksum(file, size) + b"\n":
            raise _damaged(what, path, "its content is not what was written")
    return size


def _check_line(path: Path, what: str, line: bytes) -> None:
    if not line.startswith(_SEAL):
        raise _damaged(what, path, "its last line, the checksum, is missing: it is truncated, or was changed")


def _checksum(file: BinaryIO, size: int) -> bytes:
    return _in_blocks(size, lambda start, stop: (os.pread(file.fileno(), stop - start, start),))


def _in_blocks(size: int, parts: Callable[[int, int], Iterable[bytes | memoryview]]) -> bytes:
    """SHA-256 of the CRC-32 of every 4 MiB: as sure to tell damage as CRC-32, which is as fast as reading."""
    with ThreadPoolExecutor(2) as pool:

        def check(start: int) -> bytes:
            found = 0
            for part in parts(start, min(start + _BLOCK, size)):
                found = zlib.crc32(part, found)
            return b"%d %d," % (start, found)

        return hashlib.sha256(b"".join(pool.map(check, range(0, size, _BLOCK)))).hexdigest().encode()


# -- what a result is known by ------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Of a file's bytes, read once in a process as long as its size and time of change stay."""
    found = path.stat()
    return _sha256(str(path.resolve()), found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*facts: Any) -> str:
    """SHA-256 of everything that a result comes from: plain values, dataclasses, tensors, and lists and mappings of these.

    Equal contents have equal fingerprints on every device and in every process; the order of a mapping does not count.

    Raises:
        TypeError: a fact of another kind, of which the text may tell nothing.
    """
    digest = hashlib.sha256()
    _feed(digest, facts)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        digest.update(f"{type(value).__name__} {value!r}\n".encode())
    elif dataclasses.is_dataclass(value):
        digest.update(f"{type(value).__name__}\n".encode())
        _feed(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        digest.update(f"mapping of {len(value)}\n".encode())
        for key in sorted(value, key=repr):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"sequence of {len(value)}\n".encode())
        for item in value:
            _feed(digest, item)
    elif type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "untyped_storage"):
        import torch

        digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():  # an empty tensor's strides allow no view as bytes
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    else:
        raise TypeError(f"{type(value).__name__} has no fingerprint")
