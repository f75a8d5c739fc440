"""The index of a corpus: what each record is, by which tags, and that it is still the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autosparse.errors import AutoSparseError
from autosparse.files import read_json, sha256
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.network.graph import trace
from autosparse.scorers.corpus import DEEP, TAGS, WIDE, tags_of, write_index
from autosparse.scorers.records import Record, write_record
from autosparse.training.models import ModelSettings, create_model

CONFIG: dict[str, Any] = {
    "model": {"name": "convnet", "width": 2, "options": {"depth": 2}},
    "data": {"name": "hdf5:some/where/cifar10.h5", "image_size": 16},
}


def operation(kind: str, *inputs: int, weight: str | None = None) -> str:
    weights = [] if weight is None else [weight]
    values = {"kind": kind, "target": "", "inputs": inputs, "parameters": weights, "shape": [1], "weights": weights}
    return json.dumps(values)


def make(operations: list[tuple[Any, ...]], width: int = 2, kind: str = "conv", **config: Any) -> Record:
    """A record whose operations with weights have layers `0`, `1`, … of `width` output units."""
    names = [str(index) for index, (op, *_) in enumerate(operations) if op in ("conv", "linear")]
    layers = {name: Layer(name, kind, (width, 1)) for name in names}
    return Record(
        layers=layers,
        signals={},
        survival={name: np.ones((width, 1), dtype=np.uint8) for name in names},
        density=np.array([1.0, 0.5]),
        accuracy=np.array([0.5, 0.25]),
        loss=np.array([1.0, 2.0]),
        config={**CONFIG, **config},
        seed=3,
        rounds_done=1,
        complete=True,
        operations=tuple(
            operation(op, *inputs, weight=str(index) if op in ("conv", "linear") else None)
            for index, (op, *inputs) in enumerate(operations)
        ),
    )


SKIP = [("input",), ("conv", 0), ("norm", 1), ("conv", 2), ("add", 3, 2), ("linear", 4), ("output", 5)]


def chain(length: int, kind: str = "conv") -> list[tuple[Any, ...]]:
    return [("input",), *((kind, index) for index in range(length))]


# -- tags ---------------------------------------------------------------------------------------------------------------


def test_an_ordinary_network_has_no_tag() -> None:
    assert tags_of(make(SKIP)) == frozenset()


@pytest.mark.parametrize(
    ("record", "tags"),
    [
        (make(chain(DEEP)), {"no_skips", "no_norm"}),
        (make(chain(DEEP + 1)), {"no_skips", "no_norm", "deeper"}),
        (make(SKIP, width=WIDE), set()),
        (make(SKIP, width=WIDE + 1), {"wider"}),
        (make(SKIP, width=3 * WIDE, kind="attention"), set()),  # query, key and value stacked
        (make([*SKIP, ("matmul", 4, 5)]), {"attention"}),
        (make([("input",), ("conv", 0), ("norm", 1), ("add", 2)]), {"no_skips"}),  # a position or a bias is no branch
        (make([("input",), ("conv", 0), ("norm", 1), ("add", 2, 2)]), {"no_skips"}),  # nor is a doubled one
        (make([("input",), ("conv", 0), ("norm", 1), ("concat", 2, 0)]), set()),
        (make(chain(2, "linear")), {"mlp", "no_skips", "no_norm"}),
        (make(SKIP, data={"name": "digits"}), {"other_data"}),
        (make(SKIP, data={"name": "cifar100", "image_size": None}), set()),
        (make(SKIP, data={"name": "hdf5:cifar10/mnist.h5"}), {"other_data"}),
    ],
)
def test_tags(record: Record, tags: set[str]) -> None:
    assert tags_of(record) == tags and tags <= TAGS.keys()


@pytest.mark.parametrize(
    ("cell", "options", "tags"),
    [
        ("plain", {}, {"no_skips"}),
        ("plain", {"norm": "none", "blocks": (5, 5, 5)}, {"no_skips", "no_norm", "deeper"}),
        ("basic", {}, set()),
        ("preact", {"norm": "none"}, {"no_norm"}),
        ("dense", {"norm": "group"}, set()),
        ("inverted", {"growth": 4.0}, {"wider"}),
        ("inverted", {"blocks": (2,)}, set()),
        ("attention", {"norm": "layer", "stem_stride": 2}, {"attention"}),
        ("mlp", {}, {"mlp", "no_skips"}),
        ("resmlp", {"norm": "none"}, {"mlp", "no_norm"}),
    ],
)
def test_tags_of_traced_networks(cell: str, options: dict[str, Any], tags: set[str]) -> None:
    model = create_model(ModelSettings("cellnet", 8, {"cell": cell, **options}), image_size=8)
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    layers = prunable_layers(model, operands=graph.operands)
    lines = tuple(json.dumps(op) for op in json.loads(graph.to_json())["operations"])
    assert tags_of(replace(make(SKIP), layers=layers, operations=lines)) == tags


# -- the index ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_record(tmp_path / "records" / "a.h5", make(SKIP))
    write_record(tmp_path / "records" / "b.h5", replace(make(SKIP), seed=4))
    write_record(tmp_path / "c.h5", make(chain(2, "linear"), model={"name": "mlp"}, data={"name": "digits"}))
    write_index(tmp_path)
    return tmp_path


def test_what_an_index_says(corpus: Path) -> None:
    index = read_json(corpus / "corpus.json", "corpus index")
    result = write_index(corpus)
    assert index["schema"] == "autosparse.corpus/1" and index["sha256"] == result.sha256
    assert [row["tags"] for row in index["records"]] == [sorted(e.tags) for e in result.entries]
    assert [row["sha256"] for row in index["records"]] == [e.sha256 for e in result.entries]
    assert read_json(corpus / "corpus.json", "corpus index") == index
    c, a, b = result.entries
    assert [e.path for e in result.entries] == ["c.h5", "records/a.h5", "records/b.h5"]
    assert a.sha256 == sha256(corpus / "records" / "a.h5") != b.sha256
    assert a.architecture == b.architecture != c.architecture and a.model == CONFIG["model"]
    assert (a.data, b.data, c.data) == ("cifar10-16px", "cifar10-16px", "digits")
    assert (a.seed, b.seed, a.weights, a.rounds, a.complete, a.accuracy) == (3, 4, 6, 1, True, (0.5, 0.25))
    assert a.tags == frozenset() and c.tags == {"mlp", "no_skips", "no_norm", "other_data"}


def test_the_hash_is_that_of_the_records_wherever_they_lie(corpus: Path) -> None:
    before = read_json(corpus / "corpus.json", "corpus index")["sha256"]
    (corpus / "records" / "a.h5").rename(corpus / "z.h5")
    assert write_index(corpus).sha256 == before
    (corpus / "z.h5").unlink()
    assert write_index(corpus).sha256 != before


def test_a_record_without_a_training_has_no_accuracy(tmp_path: Path) -> None:
    none = np.empty(0)
    write_record(tmp_path / "r.h5", replace(make(SKIP), density=none, accuracy=none, loss=none, rounds_done=0,
                                            survival={n: np.zeros((2, 1), np.uint8) for n in "135"}))  # fmt: skip
    assert write_index(tmp_path).entries[0].accuracy is None
    assert read_json(tmp_path / "corpus.json", "corpus index")["records"][0]["accuracy"] is None


def test_records_that_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(AutoSparseError, match="no records"):
        write_index(tmp_path)
    write_record(tmp_path / "r.h5", replace(make(SKIP), config={"model": {}}))
    with pytest.raises(AutoSparseError, match=r"record .*r.h5 has no 'data' in its config"):
        write_index(tmp_path)
