"""Whatever happens to a file of ours: it is refused in one line that names it, or its content is what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autosparse.errors import AutoSparseError
from autosparse.files import HASH, files_under, read_json, read_safetensors, write_json, write_safetensors
from autosparse.masks.layers import Layer
from autosparse.masks.mask import MaskReport, Masks
from autosparse.scorers.card import Card
from autosparse.scorers.kinds import build_network
from autosparse.scorers.loading import bundled
from autosparse.scorers.records import Record, read_record, write_record
from autosparse.scorers.scorer import Scorer, read_scorer
from autosparse.trainability.stored import load_network, load_weights, save_network, save_weights
from autosparse.training.checkpoint import reading_state, write_state


def linear(seed: int = 0) -> nn.Linear:
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(20.0).view(4, 5) + seed)
        layer.bias.fill_(seed)
    return layer


def masks() -> Masks:
    kept = torch.arange(20).view(4, 5) % 3 == 0
    return Masks({"weight": kept}, {"weight": Layer("weight", "linear", (4, 5))}, MaskReport(notes=("a note",)))


def record() -> Record:
    weight = np.arange(20, dtype=np.float32).reshape(4, 5)
    return Record(
        {"weight": Layer("weight", "linear", (4, 5))},
        {"weight": {"weight": weight}},
        {"weight": (weight % 3).astype(np.uint8)},
        density=np.array([1.0, 0.6, 0.3]),
        accuracy=np.array([0.9, 0.8, 0.7]),
        loss=np.array([0.1, 0.2, 0.3]),
        config={"model": {"name": "net"}},
        seed=3,
        rounds_done=2,
        complete=True,
        operations=('{"kind": "input"}',),
        edges=(("weight", "weight"),),
        versions={"torch": "2"},
    )


def scorer() -> Scorer:
    features = ("weight", "layer_depth")
    with torch.random.fork_rng():
        network = build_network("mlp", features, 1, {"hidden": [3]})
    return Scorer("mlp", network, "mse", features, 1, 2, options={"hidden": [3]}, card=Card(summary="of a test"))


def checkpoint(path: Path) -> None:
    write_state(path, "me", {"model": linear(1).state_dict(), "steps": 7})


def resumed(path: Path) -> Any:
    model = linear()
    with reading_state(path, "me") as state:
        model.load_state_dict(state["model"])
        return state["steps"], plain(model.state_dict())


def plain(value: Any) -> Any:
    """Anything that a reader gives, as values that `==` compares."""
    if isinstance(value, (Tensor, np.ndarray)):
        return (str(value.dtype), value.tolist())
    if isinstance(value, nn.Module):
        return plain(value.state_dict())
    if isinstance(value, (Masks, dict)) or hasattr(value, "items"):
        extra = plain(value.report) if isinstance(value, Masks) else None
        return {name: plain(item) for name, item in value.items()}, extra
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def weights(path: Path) -> nn.Module:
    load_weights(path, model := linear())
    return model


KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "masks": (lambda p: masks().save(p), Masks.load),
    "scorer": (lambda p: scorer().save(p), read_scorer),
    "bundled": (lambda p: p.write_bytes(bundled()["autosparse"].read_bytes()), read_scorer),
    "record": (lambda p: write_record(p, record()), read_record),
    "network": (lambda p: save_network(p, linear(1), masks()), lambda p: load_network(p, linear())),
    "weights": (lambda p: save_weights(p, linear(1)), weights),
    "state": (
        lambda p: write_safetensors(p, linear(1).state_dict(), "s/1"),
        lambda p: read_safetensors(p, "s/1", "state"),
    ),
    "checkpoint": (checkpoint, resumed),
    "json": (
        lambda p: write_json(p, {"a": [1, 0.1, float("inf")], "b": {"c": "θ", "d": None}}),
        lambda p: read_json(p, "result"),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    for kind, (write, _) in KINDS.items():
        write(folder / kind)
    return folder


def read_or_refused(kind: str, path: Path) -> Any:
    """What is read, or `None` where it is refused in one line."""
    try:
        return plain(KINDS[kind][1](path))
    except AutoSparseError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_changes_nothing_unseen(kind: str, folder: Path, data: st.DataObject) -> None:
    content = bytearray((folder / kind).read_bytes())
    whole = read_or_refused(kind, folder / kind)
    assert whole is not None
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "damaged").write_bytes(content)
    assert read_or_refused(kind, folder / "damaged") in (None, whole)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_lost_and_zeroed_bytes_change_nothing_unseen(kind: str, folder: Path, data: st.DataObject) -> None:
    content = (folder / kind).read_bytes()
    whole = read_or_refused(kind, folder / kind)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    (folder / "damaged").write_bytes(content[:start] + bytes(end - start) + content[end:])
    assert read_or_refused(kind, folder / "damaged") in (None, whole)
    (folder / "damaged").write_bytes(content[:start] + content[end:])
    assert read_or_refused(kind, folder / "damaged") in (None, whole)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("record", "checkpoint", "json")])
def test_a_safetensors_file_without_its_hash_is_refused(kind: str, folder: Path) -> None:
    with safe_open(folder / kind, framework="pt") as file:
        metadata = file.metadata()
    assert len(metadata.pop(HASH)) == 64
    save_file(load_file(folder / kind), folder / "bare", metadata)
    with pytest.raises(AutoSparseError, match=r"bare is damaged: it holds no hash of its content"):
        KINDS[kind][1](folder / "bare")


def test_masks_whose_texts_are_not_whole_are_told(folder: Path) -> None:
    """As another program may write them: with the hash of what they hold."""
    tensors, texts = read_safetensors(folder / "masks", "autosparse.masks/1", "masks")
    two = {**tensors, "other": tensors["weight"].clone()}
    for content, changed in (
        (tensors, {k: v for k, v in texts.items() if k != "report"}),
        (tensors, {**texts, "report": "{"}),
        (tensors, {**texts, "report": json.dumps({"dead_layers": 3})}),
        (two, texts),
        (tensors, {**texts, "layers": json.dumps({"other": {"name": "other", "kind": "linear", "shape": [4, 5]}})}),
    ):
        changed = {k: v for k, v in changed.items() if k != "schema"}
        write_safetensors(folder / "told", content, "autosparse.masks/1", **changed)
        with pytest.raises(AutoSparseError, match=r"masks .*told are damaged: .*; make them again"):
            Masks.load(folder / "told")


def test_the_hash_is_of_the_content_alone(folder: Path) -> None:
    """The order of keys and of tensors is no content; types, shapes, names and values are."""
    first = {"a": torch.zeros(2, 3), "b": torch.ones(1)}

    def hash_of(tensors: dict[str, Tensor], **texts: str) -> str:
        write_safetensors(folder / "one", tensors, "s/1", **texts)
        with safe_open(folder / "one", framework="pt") as file:
            return str(file.metadata()[HASH])

    same = hash_of(first, x="1", y="2")
    assert hash_of(dict(reversed(first.items())), y="2", x="1") == same
    others = [
        {**first, "a": torch.zeros(3, 2)},
        {**first, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": first["a"], "c": first["b"]},
        {**first, "b": torch.zeros(1)},
    ]
    hashes = {hash_of(other, x="1", y="2") for other in others} | {hash_of(first, x="1", y="3"), same}
    assert len(hashes) == 6


def test_the_same_content_makes_the_same_bytes(folder: Path) -> None:
    for name in ("first", "second", "third"):
        masks().save(folder / name)
    assert (folder / "first").read_bytes() == (folder / "second").read_bytes() == (folder / "third").read_bytes()


def test_threads_that_write_the_same_file_leave_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    values = [{"text": letter * 100_000} for letter in "ab"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: write_json(path, values[i % 2]), range(40)))
    assert read_json(path, "test") in values
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_folders_that_vanish_while_files_are_looked_for_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.h5", "b/2.h5", "c/3.h5"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    scan = os.scandir

    def removed_meanwhile(path: Any) -> Any:
        if Path(path).name == "b":
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", removed_meanwhile)
    assert sorted(p.name for p in files_under(tmp_path)) == ["1.h5", "3.h5"]
