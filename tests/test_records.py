"""The HDF5 record: what is written is what is read, and nothing else is taken for a record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosparse import files
from autosparse.errors import AutoSparseError
from autosparse.files import check_seal, read_sealed, seal, write_sealed
from autosparse.masks.layers import Layer
from autosparse.scorers.records import Record, find_records, read_record, survivors, write_record

CONV = Layer("features.0.weight", "conv", (2, 1, 1, 2))
LINEAR = Layer("a/b.head weight", "linear", (2, 3))
OPERATIONS = tuple(
    json.dumps({"kind": kind, "target": "", "inputs": inputs, "parameters": weights, "shape": [1], "weights": weights})
    for kind, inputs, weights in (("input", [], []), ("conv", [0], [CONV.name]), ("linear", [1], [LINEAR.name]))
)


def example() -> Record:
    """Ten weights in two layers, two removals of three done: 10, 6, 3 weights are left."""
    return Record(
        layers={CONV.name: CONV, LINEAR.name: LINEAR},
        signals={
            "weight": {
                CONV.name: np.array([1.5, -2, 0, 4], dtype=np.float32).reshape(2, 1, 1, 2),
                LINEAR.name: np.arange(6, dtype=np.float32).reshape(2, 3),
            },
            "gradient": {
                CONV.name: np.array([np.pi, 1e-30, -1e30, 0], dtype=np.float32).reshape(2, 1, 1, 2),
                LINEAR.name: -np.arange(6, dtype=np.float32).reshape(2, 3),
            },
        },
        survival={
            CONV.name: np.array([2, 1, 0, 2], dtype=np.uint8).reshape(2, 1, 1, 2),
            LINEAR.name: np.array([[0, 0, 1], [1, 2, 0]], dtype=np.uint8),
        },
        density=np.array([1.0, 0.6]),
        accuracy=np.array([0.9, 0.85]),
        loss=np.array([0.3, np.nan]),
        config={"model": {"name": "größe", "width": None}, "recipe": {"lr": 0.1, "milestones": [0.5]}},
        seed=7,
        rounds_done=2,
        complete=False,
        operations=OPERATIONS,
        edges=((CONV.name, LINEAR.name),),
        versions={"autosparse": "0.1.0", "torch": "2.0"},
    )


def equal(a: Record, b: Record) -> None:
    """Every field, arrays with dtype and bits."""
    assert list(a.layers.items()) == list(b.layers.items())
    assert a.signals.keys() == b.signals.keys()
    for signal in a.signals:
        for name in a.layers:
            assert a.signals[signal][name].dtype == b.signals[signal][name].dtype == np.float32
            np.testing.assert_array_equal(a.signals[signal][name], b.signals[signal][name])
    for name in a.layers:
        assert a.survival[name].dtype == b.survival[name].dtype == np.uint8
        np.testing.assert_array_equal(a.survival[name], b.survival[name])
    for key in ("density", "accuracy", "loss"):
        np.testing.assert_array_equal(getattr(a, key), getattr(b, key))
    for key in ("config", "seed", "rounds_done", "complete", "operations", "edges", "versions"):
        assert getattr(a, key) == getattr(b, key), key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_record(tmp_path / "r.h5", example())
    return tmp_path / "r.h5"


def test_every_field_comes_back(path: Path) -> None:
    equal(read_record(path), example())


def test_a_record_without_rounds_or_graph_comes_back(tmp_path: Path) -> None:
    empty = replace(
        example(),
        survival={n: np.zeros(layer.shape, dtype=np.uint8) for n, layer in example().layers.items()},
        density=np.empty(0),
        accuracy=np.empty(0),
        loss=np.empty(0),
        rounds_done=0,
        operations=(),
        edges=(),
        complete=True,
    )
    write_record(tmp_path / "r.h5", empty)
    equal(read_record(tmp_path / "r.h5"), empty)


def test_arrays_are_used_where_they_lie_in_the_file(tmp_path: Path) -> None:
    """What a reader writes to them is its own, and they stay when the file is replaced; behind 15 bytes they are aligned."""
    layer = Layer("w", "linear", (40, 41))
    weight = np.arange(layer.numel, dtype=np.float32).reshape(layer.shape)
    large = replace(
        example(),
        layers={"w": layer},
        signals={"weight": {"w": weight}, "gradient": {"w": -weight}},
        survival={"w": (weight % 3).astype(np.uint8)},
    )
    path = tmp_path / "r.h5"
    write_record(path, large)
    found = read_record(path)
    assert not any(found.signals[signal]["w"].flags.owndata for signal in ("weight", "gradient"))
    for arrays in (*found.signals.values(), found.survival):
        assert arrays["w"].flags.aligned and arrays["w"].flags.writeable
    found.signals["weight"]["w"][:] = 5
    equal(read_record(path), large)
    odd = {n: Layer(n, "linear", (5, 3)) for n in ("a", "b")}
    values = {n: np.full((5, 3), 2, dtype=np.float32) for n in odd}
    survival = {n: np.ones((5, 3), dtype=np.uint8) for n in odd}
    write_record(path, replace(large, layers=odd, signals={"weight": values}, survival=survival))
    assert all(array.flags.aligned for array in read_record(path).signals["weight"].values())
    write_record(path, replace(large, signals={"weight": {"w": weight + 1}, "gradient": {"w": weight}}))
    np.testing.assert_array_equal(found.signals["gradient"]["w"], -weight)


def test_signals_are_read_as_asked(path: Path) -> None:
    assert read_record(path, ["weight"]).signals.keys() == {"weight"}
    assert read_record(path, []).signals == {}
    assert read_record(path, (s for s in ("gradient", "weight"))).signals.keys() == {"gradient", "weight"}


def test_the_graph_comes_back(path: Path) -> None:
    graph = read_record(path).graph()
    assert graph.layers() == (CONV.name, LINEAR.name)
    assert graph.edges() == example().edges
    assert graph.depth() == {CONV.name: 1, LINEAR.name: 2}


def test_survivors_by_hand() -> None:
    assert survivors(example().survival, 2).tolist() == [10, 6, 3]
    assert survivors(example().survival, 4).tolist() == [10, 6, 3, 0, 0]
    assert example().removal_densities.tolist() == [0.6, 0.3]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=3))
def test_survivors_count_what_is_at_least_r(layers: list[list[int]]) -> None:
    survival = {str(i): np.array(values, dtype=np.uint8) for i, values in enumerate(layers)}
    flat = [v for values in layers for v in values]
    assert survivors(survival, 9).tolist() == [sum(v >= r for v in flat) for r in range(10)]


def test_arrays_are_stored_as_they_are(path: Path) -> None:
    """Signals do not compress; a reader of some rows of a layer reads no others."""
    with h5py.File(path) as file:  # as others read it, whatever its last line
        weight = file[f"layers/{LINEAR.name}/weight"]
        assert weight.chunks is None and weight.compression is None
        np.testing.assert_array_equal(weight[1:], [[3, 4, 5]])


def test_writing_replaces_the_whole_file_and_leaves_nothing_beside_it(path: Path) -> None:
    other = replace(example(), seed=8)
    write_record(path, other)
    equal(read_record(path), other)
    assert [p.name for p in path.parent.iterdir()] == ["r.h5"]


def test_a_failed_write_leaves_the_old_record(path: Path) -> None:
    broken = replace(example(), survival={CONV.name: example().survival[CONV.name]})
    with pytest.raises(KeyError):
        write_record(path, broken)
    equal(read_record(path), example())
    assert [p.name for p in path.parent.iterdir()] == ["r.h5"]


# -- what is no record --------------------------------------------------------------------------------------------------


def refuse(path: Path, match: str) -> None:
    with pytest.raises(AutoSparseError, match=match) as caught:
        read_record(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "no.h5", "does not exist: check the path")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refuse(path, "truncated")


def test_a_foreign_hdf5_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["train/images"] = np.zeros((3, 2))
    refuse(tmp_path / "f.h5", "holds no schema, not a whole autosparse.record/1")
    with h5py.File(tmp_path / "f.h5", "a") as file:
        file.attrs["schema"] = "autosparse.record/99"
    refuse(tmp_path / "f.h5", "holds autosparse.record/99")
    with h5py.File(tmp_path / "f.h5", "a") as file:
        file.attrs["schema"] = [1, 2]
    refuse(tmp_path / "f.h5", "not a whole")


@pytest.mark.parametrize(
    "part", ["layers", "rounds/density", "rounds/accuracy", "rounds/loss", "graph/operations", "graph/edges"]
)
def test_a_record_without_one_of_its_parts(path: Path, part: str) -> None:
    with h5py.File(path, "a") as file:
        del file[part]
    refuse(path, "not a whole autosparse.record/1")


@contextmanager
def edited(path: Path) -> Iterator[h5py.File]:
    """The record, to be changed, with the checksum of what it then holds."""
    with h5py.File(path, "a") as file:  # cuts the last line off
        yield file
    seal(path)


@pytest.mark.parametrize("key", ["config", "seed", "rounds_done", "complete"])
def test_a_record_without_one_of_its_attributes(path: Path, key: str) -> None:
    with edited(path) as file:
        del file.attrs[key]
    refuse(path, f"damaged: KeyError.*{key}")


def test_a_record_without_a_signal_or_survival(path: Path) -> None:
    with pytest.raises(AutoSparseError, match=r"no signal 'flow' for 'features.0.weight': it stores gradient, weight"):
        read_record(path, ["weight", "flow"])
    with edited(path) as file:
        del file[f"layers/{LINEAR.name}/survival"]
    refuse(path, "no signal 'survival'")


def test_a_changed_record_without_its_checksum(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file.attrs["seed"] = 8
    refuse(path, "damaged: its last line, the checksum, is missing")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            f"layers/{CONV.name}/gradient",
            np.zeros(4, dtype=np.float32),
            r"features.0.weight/gradient has shape \(4,\), not \(2, 1, 1, 2\)",
        ),
        (f"layers/{CONV.name}/survival", np.full(CONV.shape, 3, dtype=np.uint8), "survived more than its 2 rounds"),
        ("rounds/density", np.ones(5), "5 densities of 2 rounds"),
        ("rounds/loss", np.ones(1), "loss has 1 of 2 rows"),
        ("layers", None, "it holds no layer"),
    ],
)
def test_contradictions_are_told(path: Path, name: str, value: np.ndarray | None, message: str) -> None:
    with edited(path) as file:
        del file[name]
        if value is None:
            file.create_group(name)
        else:
            file[name] = value
    refuse(path, message)


def test_refused_files_are_closed(path: Path) -> None:
    with edited(path) as file:
        del file["rounds/loss"]
    refuse(path, "not a whole")
    with edited(path) as file:  # would fail were it still open for reading
        file["rounds/loss"] = np.zeros(2)
    read_record(path)


# -- finding them -------------------------------------------------------------------------------------------------------


def test_find_records_searches_directories_and_names_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.h5", "a.h5", "b/notes.txt", "mlartifacts/1/x/artifacts/a.h5", "b/.2.h5.77.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    wanted = [tmp_path / "a.h5", tmp_path / "b" / "2.h5"]
    assert find_records([tmp_path]) == wanted, "MLflow's copies would put a run into training and validation"
    monkeypatch.chdir(tmp_path)
    assert [p.resolve() for p in find_records([tmp_path, "b", tmp_path / "a.h5", "./b/2.h5"])] == wanted


def test_find_records_tells_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AutoSparseError, match=r"records path .*nowhere does not exist"):
        find_records([tmp_path / "nowhere"])
    with pytest.raises(AutoSparseError, match=r"no records \(\*.h5\) under"):
        find_records([tmp_path])


@pytest.mark.parametrize("read", [read_sealed, check_seal])
def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    """The reader sees the file that it opened, whole, and calls nothing damaged."""
    path = tmp_path / "record.h5"
    write_sealed(path, [memoryview(b"first")])
    last_line = files._last_line

    def then_replaced(file: Any) -> tuple[int, bytes]:
        line = last_line(file)
        write_sealed(path, [memoryview(b"the second one")])
        return line

    monkeypatch.setattr(files, "_last_line", then_replaced)
    got = read(path, "record")
    assert (got if isinstance(got, int) else bytes(got)) in (5, b"first")
    monkeypatch.undo()
    assert bytes(read_sealed(path, "record")) == b"the second one"
