"""A corpus: a directory of records with an index that says what each is, and what sets it apart from most."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError
from autosparse.files import sha256, write_json
from autosparse.network.graph import Graph
from autosparse.scorers.records import Record, distinct, find_records, read_record
from autosparse.training.data import DataSettings

SCHEMA = "autosparse.corpus/1"
INDEX = "corpus.json"
DEEP = 14  # layers on the longest path; a sixth of the networks that data_gen draws for configs/corpus have more
WIDE = 60  # output units of the largest layer; a quarter of them have more
TAGS = {
    "deeper": f"more than {DEEP} layers with weights on the longest path",
    "wider": f"a layer of more than {WIDE} output units",
    "no_skips": "no sum or concatenation joins two branches",
    "no_norm": "no normalisation",
    "attention": "a product of two activations",
    "mlp": "no convolution",
    "other_data": "data whose label does not start with cifar",
}


@dataclass(frozen=True)
class Entry:
    """What the index says of one record.

    `path` is relative to the corpus; `architecture` a hash of the model's settings, the same for all of its seeds;
    `weights` the number of prunable ones; `accuracy` that of the first and of the last training (`None` without any);
    `method` how the labels were made, see `Record.method`.
    """

    path: str
    sha256: str
    architecture: str
    model: Mapping[str, Any]
    data: str
    seed: int
    weights: int
    rounds: int
    complete: bool
    accuracy: tuple[float, float] | None
    method: str
    tags: frozenset[str]


@dataclass(frozen=True)
class Corpus:
    """The records under `directory`, and one hash of them all, see `hash_of`."""

    directory: Path
    entries: tuple[Entry, ...]

    @property
    def sha256(self) -> str:
        return hash_of(entry.sha256 for entry in self.entries)


def hash_of(records: Iterable[str]) -> str:
    """One hash of many records: `sha256` over their sorted hashes, a line each."""
    return hashlib.sha256("\n".join(sorted(records)).encode()).hexdigest()


def tags_of(record: Record) -> frozenset[str]:
    """Which of `TAGS` hold for a record, from its layers, graph and config alone: the named out-of-distribution splits.

    The stacked projections of attention count as three layers' output units. Data are those of the config's label, for
    `hdf5:` and `imagefolder:` the name of the file.
    """
    graph = record.graph()
    kinds = {op.kind for op in graph.operations}
    widest = max(layer.out_features // (3 if layer.kind == "attention" else 1) for layer in record.layers.values())
    holds = {
        "deeper": max(graph.depth().values(), default=0) > DEEP,
        "wider": widest > WIDE,
        "no_skips": not _joins(graph),
        "no_norm": "norm" not in kinds,
        "attention": bool(kinds & {"matmul", "attention"}),
        "mlp": not kinds & {"conv", "conv_transpose"},
        "other_data": not _data_label(record).startswith("cifar"),
    }
    return frozenset(tag for tag, held in holds.items() if held)


def _joins(graph: Graph) -> bool:
    return any(op.kind in ("add", "concat") and len(set(op.inputs)) > 1 for op in graph.operations)


def _data_label(record: Record) -> str:
    data = record.config["data"]
    return DataSettings(data["name"], image_size=data.get("image_size")).label()


def _entry(directory: Path, path: Path) -> Entry:
    record = read_record(path, [])
    try:
        model, data = record.config["model"], _data_label(record)
    except KeyError as error:
        raise AutoSparseError(
            f"record {path} has no {error} in its config: make it with autosparse generate"
        ) from error
    architecture = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:16]
    accuracy = record.accuracy.tolist()
    return Entry(
        path=path.relative_to(directory).as_posix(),
        sha256=sha256(path),
        architecture=architecture,
        model=model,
        data=data,
        seed=record.seed,
        weights=sum(layer.numel for layer in record.layers.values()),
        rounds=record.rounds_done,
        complete=record.complete,
        accuracy=(accuracy[0], accuracy[-1]) if accuracy and math.isfinite(accuracy[0]) else None,
        method=record.method,
        tags=tags_of(record),
    )


def write_index(directory: Path) -> Corpus:
    """Read every record under `directory`, complete or not, and write `corpus.json` there.

    Raises:
        AutoSparseError: there is no record, or one is damaged.
    """
    once, notes = distinct(find_records([directory]))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    corpus = Corpus(directory, tuple(_entry(directory, path) for path in once))
    rows = [{**asdict(entry), "tags": sorted(entry.tags)} for entry in corpus.entries]
    write_json(directory / INDEX, {"schema": SCHEMA, "sha256": corpus.sha256, "records": rows})
    return corpus
