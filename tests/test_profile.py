"""Where the time goes: hand-counted parts, honest sums, and nothing when off."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from autosparse.pruning.prune import prune
from autosparse.training import profile as module
from autosparse.training.data import ImageData
from autosparse.training.profile import PARTS, Profile, parts, profiling
from autosparse.training.recipe import Recipe
from autosparse.training.train import train

Make = Callable[..., nn.Module]
CPU = torch.device("cpu")


def table(profile: Profile) -> dict[str, float]:
    with open(profile.table, newline="") as file:
        return {row["part"]: float(row["seconds"]) for row in csv.DictReader(file)}


def ranges(profile: Profile) -> Counter[str]:
    """How often each part stands in the trace."""
    events = json.loads(gzip.decompress(profile.trace.read_bytes()))["traceEvents"]
    return Counter(e["name"] for e in events if e.get("cat") == "user_annotation" and e["name"] in PARTS)


def test_parts_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    with profiling(tmp_path, warmup=1, traced=1) as profile:
        begin = parts(CPU)
        for _ in range(4):  # the first is left out, the second traced
            begin("forward")
            now += 1
            begin("backward")
            now += 2
            begin("data")
            now += 0.5
        begin("evaluation")
        now += 3
        begin("other")
        now += 4
    assert (profile.steps, profile.clocked, profile.wall) == (4, 2, 14.0)
    expected = {"data": 1.0, "forward": 2.0, "backward": 4.0, "evaluation": 3.0, "other": 4.0}
    assert table(profile) == {**dict.fromkeys(PARTS, 0.0), **expected}
    assert dict(ranges(profile)) == {"forward": 1, "backward": 1, "data": 1}
    assert ("backward", 4.0, pytest.approx(100 * 4 / 14)) in profile.rows()


def test_a_training_in_parts(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    recipe = Recipe(epochs=4, batch_size=16, lr=0.05, clip_norm=1.0)
    models = [convnet(), convnet()]
    masks = prune(models[0], 0.5, "random", seed=1)
    plain = train(models[0], digits, recipe, masks=masks, device="cpu")
    with profiling(tmp_path / "profile", warmup=3, traced=2) as profile:
        profiled = train(models[1], digits, recipe, masks=masks, device="cpu")
    assert profiled.history == plain.history
    assert all(torch.equal(v, models[0].state_dict()[n]) for n, v in models[1].state_dict().items())
    assert (profile.steps, profile.clocked) == (16, 11)
    seconds = table(profile)
    assert list(seconds) == list(PARTS) and all(s > 0 for s in seconds.values())
    assert sum(profile.seconds.values()) == pytest.approx(profile.wall)
    assert {n: c for n, c in ranges(profile).items() if n in ("forward", "backward", "optimizer", "mask")} == {
        "forward": 2, "backward": 2, "optimizer": 2, "mask": 2
    }  # fmt: skip
    assert sorted(p.name for p in profile.table.parent.iterdir()) == ["parts.csv", "trace.json.gz"]


def test_several_trainings_and_what_lies_between(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=16, lr=0.05)
    with profiling(tmp_path, warmup=3, traced=2) as profile:
        for _ in range(3):
            train(convnet(), digits, recipe, device="cpu")
    assert (profile.steps, profile.clocked) == (12, 7)


@pytest.mark.parametrize(("warmup", "files"), [(4, []), (3, ["trace.json.gz"])])
def test_too_short_a_training(warmup: int, files: list[str], digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    with profiling(tmp_path, warmup=warmup, traced=2) as profile:
        train(convnet(), digits, Recipe(epochs=1, batch_size=16, lr=0.05), device="cpu")
    assert profile.clocked == 0 and sorted(p.name for p in tmp_path.iterdir()) == files


def test_what_a_training_that_stops_leaves(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    def stop(_: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), profiling(tmp_path, warmup=1, traced=1) as profile:
        train(convnet(), digits, Recipe(epochs=2, batch_size=16), device="cpu", on_epoch=stop)
    assert profile.clocked == 2 and sum(table(profile).values()) == pytest.approx(profile.wall, abs=1e-5)
    assert parts(CPU) is module._nothing


def test_nothing_when_off(tmp_path: Path) -> None:
    assert parts(CPU) is module._nothing
    with profiling(tmp_path):
        assert parts(CPU) is not module._nothing
    assert parts(CPU) is module._nothing and not list(tmp_path.iterdir())
