"""The HDF5 record of one IRP run: schema, write, read, check. Knows no training."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from autosparse.errors import AutoSparseError
from autosparse.files import check_file, check_seal, files_under, is_sealed, read_sealed, sha256, write_sealed
from autosparse.masks.layers import Layer
from autosparse.network.graph import Graph

SCHEMA = "autosparse.record/1"


@dataclass(frozen=True)
class Record:
    """One IRP run.

    `signals[signal][layer]` are float32 arrays of the weight's shape, all of `θ₀`; `survival[layer]` uint8, the rounds
    that each weight survived; `density`, `accuracy`, `loss` have a row per training, r = 0 … R; `operations` are the
    traced operations as JSON texts, `edges` pairs of layers. `rounds_done` counts the removals written so far.
    """

    layers: dict[str, Layer]
    signals: Mapping[str, Mapping[str, np.ndarray]]
    survival: Mapping[str, np.ndarray]
    density: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    config: Mapping[str, Any]
    seed: int
    rounds_done: int = 0
    complete: bool = False
    operations: tuple[str, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """How the labels were made: `"irp"`, `"irp rewind end"`, `"irp rewind never"` or `"gradual"`."""
        if "gradual" in self.config:
            return "gradual"
        rewind = self.config.get("irp", {}).get("rewind", "round")
        return "irp" if rewind == "round" else f"irp rewind {rewind}"

    def graph(self) -> Graph:
        """The traced graph of the network."""
        return Graph.from_json(json.dumps({"operations": [json.loads(op) for op in self.operations], "operands": {}}))

    @property
    def removal_densities(self) -> np.ndarray:
        """`ρ_1 … ρ_r`, the exact densities after each removal that is in `survival`."""
        total = sum(s.size for s in self.survival.values())
        kept = survivors(self.survival, self.rounds_done)
        return kept[1:] / total


def survivors(survival: Mapping[str, np.ndarray], rounds: int) -> np.ndarray:
    """Weights left after 0, 1, …, `rounds` removals: `Σ [survival ≥ r]`."""
    counts = np.zeros(rounds + 1, dtype=np.int64)
    for array in survival.values():
        counts += np.bincount(array.ravel(), minlength=rounds + 1)[: rounds + 1]
    return counts[::-1].cumsum()[::-1]


class _Memory(io.RawIOBase):
    """A file in memory, which HDF5 reads without a copy of it."""

    def __init__(self, content: np.ndarray, size: int) -> None:
        self._content, self._size, self._at = content, size, 0

    @property
    def content(self) -> memoryview:
        return self._content.data[: self._size]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        part = self.content[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)

    def write(self, data: Any) -> int:
        end = self._at + len(data)
        if end > self._size:
            self.truncate(end)
        self._content.data[self._at : end] = data
        self._at = end
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        if size > len(self._content):
            larger = np.zeros(2 * size, np.uint8)  # memory that is not written to is not taken
            larger[: self._size] = self._content[: self._size]
            self._content = larger
        self._size = size
        return size


def write_record(path: Path, record: Record) -> None:
    """Write the record in one step: what was at `path` stays whole until the new file is whole on disk.

    Raises:
        AutoSparseFailure: the disk is full or the directory cannot be written.
    """
    memory = _Memory(np.zeros(2**20, np.uint8), 0)  # HDF5 crashes the process when a write to a disk fails
    with h5py.File(memory, "w") as file:
        placed = sorted(_fill(file, record), key=lambda item: item[0])
    pieces, at = [], 0
    for offset, array in placed:  # where HDF5 left room for them: they are written from where they are
        pieces += [memory.content[at:offset], array.reshape(-1).view(np.uint8).data]
        at = offset + array.nbytes
    write_sealed(path, [*pieces, memory.content[at:]])


def _fill(file: h5py.File, record: Record) -> list[tuple[int, np.ndarray]]:
    """Everything but the large arrays, and these with the places in the file that are theirs."""
    room = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    room.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    room.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    placed: list[tuple[int, np.ndarray]] = []

    def place(group: h5py.Group, key: str, array: np.ndarray) -> None:
        # Without compression: of random numbers it takes a tenth off, and ten times as long.
        dataset = group.create_dataset(key, array.shape, array.dtype, dcpl=room)
        if array.size:
            placed.append((dataset.id.get_offset(), np.ascontiguousarray(array)))

    file.attrs["schema"] = SCHEMA
    for key, version in record.versions.items():
        file.attrs[f"{key}_version"] = version
    file.attrs["config"] = json.dumps(record.config, sort_keys=True)
    file.attrs["seed"] = record.seed
    file.attrs["rounds_done"] = record.rounds_done
    file.attrs["complete"] = record.complete
    for position, (name, layer) in enumerate(record.layers.items()):
        group = file.create_group(f"layers/{name}")
        group.attrs["position"] = position
        group.attrs["layer"] = json.dumps(asdict(layer))
        for signal, arrays in record.signals.items():
            place(group, signal, np.asarray(arrays[name], dtype=np.float32))
        place(group, "survival", np.asarray(record.survival[name], dtype=np.uint8))
    for key in ("density", "accuracy", "loss"):
        file.create_dataset(f"rounds/{key}", data=np.asarray(getattr(record, key), dtype=np.float64))
    text = h5py.string_dtype()
    file.create_dataset("graph/operations", data=list(record.operations), dtype=text)
    file.create_dataset("graph/edges", data=np.array(record.edges, dtype=object).reshape(-1, 2), dtype=text)
    return placed


def read_record(path: Path, signals: Iterable[str] | None = None) -> Record:
    """Read and check a record; `signals` limits what is read (`None`: all).

    Raises:
        AutoSparseError: the file is missing, truncated, damaged, no record of AutoSparse, or lacks a signal.
    """
    wanted = None if signals is None else list(signals)
    _check_path(path)
    if not is_sealed(path):
        _opened(path, path).close()  # tells what a file is that is not ours
    content = read_sealed(path, "record")
    with _opened(path, _Memory(np.frombuffer(content, np.uint8), len(content))) as file:
        try:
            record = _read(file, content, path, wanted)
        except AutoSparseError:
            raise
        except Exception as error:  # what HDF5 raises on damaged bytes is anything
            raise AutoSparseError(
                f"record {path} is damaged: {type(error).__name__} {error}; generate it again"
            ) from error
    _check(record, path)
    return record


def _array(dataset: h5py.Dataset, content: memoryview) -> np.ndarray:
    """The values of a data set where they lie in the file's content, if they lie there as they are."""
    offset = dataset.id.get_offset()
    if offset is None or not dataset.size or not dataset.dtype.isnative:
        return np.asarray(dataset[()])
    array = np.frombuffer(content, dataset.dtype, dataset.size, offset).reshape(dataset.shape)
    return np.require(array, requirements="A")  # behind an odd number of bytes it is a copy


def _read(file: h5py.File, content: memoryview, path: Path, signals: list[str] | None) -> Record:
    groups = sorted(_leaves(file["layers"]), key=lambda item: int(item[1].attrs["position"]))
    layers: dict[str, Layer] = {}
    survival: dict[str, np.ndarray] = {}
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, group in groups:
        values = json.loads(group.attrs["layer"])
        layers[name] = Layer(**{**values, "shape": tuple(values["shape"])})
        wanted = [key for key in group if key != "survival"] if signals is None else signals
        for key in (*wanted, "survival"):
            if key not in group:
                stored = ", ".join(sorted(k for k in group if k != "survival"))
                raise AutoSparseError(f"record {path} has no signal {key!r} for {name!r}: it stores {stored}")
        for key in wanted:
            found.setdefault(key, {})[name] = _array(group[key], content)
        survival[name] = _array(group["survival"], content)
    return Record(
        layers=layers,
        signals=found,
        survival=survival,
        density=file["rounds/density"][()],
        accuracy=file["rounds/accuracy"][()],
        loss=file["rounds/loss"][()],
        config=json.loads(file.attrs["config"]),
        seed=int(file.attrs["seed"]),
        rounds_done=int(file.attrs["rounds_done"]),
        complete=bool(file.attrs["complete"]),
        operations=tuple(file["graph/operations"].asstr()[()]),
        edges=tuple((str(a), str(b)) for a, b in file["graph/edges"].asstr()[()]),
        versions={key.removesuffix("_version"): str(file.attrs[key]) for key in file.attrs if key.endswith("_version")},
    )


def _check(record: Record, path: Path) -> None:
    """Raise `AutoSparseError` where a record contradicts itself."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise AutoSparseError(f"record {path} is damaged: {what}; generate it again")

    require(len(record.layers) > 0, "it holds no layer")
    rounds = record.rounds_done
    for name, layer in record.layers.items():
        for key, arrays in {**record.signals, "survival": record.survival}.items():
            require(
                arrays[name].shape == layer.shape, f"{name}/{key} has shape {arrays[name].shape}, not {layer.shape}"
            )
        require(int(record.survival[name].max()) <= rounds, f"{name} survived more than its {rounds} rounds")
    trainings = len(record.density)
    require(trainings in (rounds, rounds + 1), f"{trainings} densities of {rounds} rounds")
    for key in ("accuracy", "loss"):
        require(len(getattr(record, key)) == trainings, f"{key} has {len(getattr(record, key))} of {trainings} rows")


def open_record(path: Path, check: bool = False) -> h5py.File:
    """The file, open for reading, once it is known to be a record; with `check`, and its content what was written.

    Raises:
        AutoSparseError: missing, truncated, foreign, or damaged.
    """
    _check_path(path)
    if check:  # before HDF5 reads what is damaged: it can crash
        check_seal(path, "record")
    return _opened(path, path)


def _check_path(path: Path) -> None:
    check_file(path, "record", "check the path, or make it with autosparse generate")


def _opened(path: Path, source: Path | _Memory) -> h5py.File:
    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise AutoSparseError(f"record {path} is truncated or not HDF5: {error}; generate it again") from error
    schema = str(file.attrs.get("schema", "no schema"))
    parts = ("layers", "rounds/density", "rounds/accuracy", "rounds/loss", "graph/operations", "graph/edges")
    if schema != SCHEMA or any(part not in file for part in parts):
        file.close()
        raise AutoSparseError(f"{path} holds {schema}, not a whole {SCHEMA}: give a record of autosparse generate")
    return file


def is_complete(path: Path) -> bool:
    """Whether a complete record lies at `path`, by its attributes alone."""
    try:
        with open_record(path) as file:
            return bool(file.attrs["complete"])
    except (AutoSparseError, OSError, KeyError):
        return False


def distinct(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The records once each by their content, and a line for each that is a copy of another."""
    first: dict[str, Path] = {}
    notes = []
    for path in paths:
        known = first.setdefault(sha256(path), path)
        if known is not path:
            notes.append(f"record {path} is the same as {known}: it counts once")
    return list(first.values()), notes


def _leaves(group: h5py.Group, prefix: str = "") -> list[tuple[str, h5py.Group]]:
    """Layer groups with their names, which may hold slashes no HDF5 path can tell from groups."""
    if "layer" in group.attrs:
        return [(prefix, group)]
    return [leaf for key, item in group.items() for leaf in _leaves(item, f"{prefix}/{key}".lstrip("/"))]


def find_records(paths: Iterable[str | Path]) -> list[Path]:
    """Record files named by files and directories (searched for `*.h5`), sorted, once each; MLflow's copies are left out.

    Raises:
        AutoSparseError: a path does not exist, or there is no record at all.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = (p for p in files_under(path) if p.suffix == ".h5")
            found.update({p.resolve(): p for p in files if "mlartifacts" not in p.relative_to(path).parts})
        elif path.is_file():
            found[path.resolve()] = path
        else:
            raise AutoSparseError(f"records path {path} does not exist: generate records first, or check the path")
    if not found:
        raise AutoSparseError(
            f"no records (*.h5) under {', '.join(map(str, paths))}: make some with autosparse generate"
        )
    return sorted(found.values())
