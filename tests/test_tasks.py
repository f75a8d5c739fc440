"""A distribution of tasks, and a campaign of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from autosparse.commands.directory import claim_directory
from autosparse.commands.generate import run as generate
from autosparse.commands.loading import load_config
from autosparse.commands.schemas import GenerateConfig
from autosparse.errors import AutoSparseError
from autosparse.masks.layers import prunable_layers
from autosparse.network.signals import SignalSettings
from autosparse.scorers.records import read_record
from autosparse.search.irp import IRPSettings
from autosparse.training.cells import CELLS
from autosparse.training.data import DataSettings, shared_data
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe
from autosparse.training.tasks import TaskSettings
from data_gen.runs import Run
from data_gen.tasks import macs, sample_tasks

torch.set_num_threads(1)

SMALL = DataSettings("digits", limit=200, limit_test=50)
LARGE = DataSettings("digits", image_size=12, limit=200, limit_test=50)
RECIPE = Recipe(epochs=1, batch_size=50, schedule="onecycle")


def sample(tasks: TaskSettings, recipe: Recipe = RECIPE) -> list[Run]:
    return sample_tasks(tasks, recipe, IRPSettings(rounds=1, density=0.5), SignalSettings(n_batches=1, batch_size=16))


def weights(run: Run) -> int:
    data = shared_data(run.data, "cpu")
    model = create_model(
        run.model, in_channels=data.channels, classes=data.classes, image_size=data.image_size, seed=run.seed
    )
    return sum(layer.numel for layer in prunable_layers(model).values())


# -- what is drawn ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> list[Run]:
    return sample(TaskSettings(count=60, seeds=1, data=(SMALL, LARGE), min_weights=2_000, max_weights=50_000))


def test_all_kinds_are_drawn_by_their_shares(many: list[Run]) -> None:
    counts = Counter(run.model.options["cell"] for run in many)
    assert set(counts) == set(CELLS)
    for cell, share in TaskSettings().cells.items():
        assert abs(counts[cell] - 60 * share) <= 2, cell
    assert Counter(run.data for run in many) == {SMALL: 30, LARGE: 30}


def test_architectures_differ_and_keep_the_bounds(many: list[Run]) -> None:
    assert len({run.model.label() for run in many}) == 60
    sizes = [weights(run) for run in many]
    assert min(sizes) >= 2_000 and max(sizes) <= 50_000
    assert sum(size < 10_000 for size in sizes) > 15 and sum(size > 10_000 for size in sizes) > 15, "log-uniform"
    assert max(macs(run.model, shared_data(run.data, "cpu")) for run in many[:10]) <= TaskSettings().max_macs


def test_recipes_suit_the_networks(many: list[Run]) -> None:
    for run in many:
        options, recipe = run.model.options, run.recipe
        if options["cell"] in ("attention", "mlp", "resmlp"):
            assert recipe.optimizer == "adamw" and 0.001 <= recipe.lr <= 0.003
        elif options["norm"] == "none":
            assert recipe.optimizer == "sgd" and recipe.clip_norm == 1 and 0.01 <= recipe.lr <= 0.03
        else:
            assert replace(recipe, lr=0.1) == RECIPE and 0.05 <= recipe.lr <= 0.15
    for run in sample(TaskSettings(count=20, data=(SMALL,), lr=(1, 1)), replace(RECIPE, optimizer="adamw", lr=0.004)):
        assert run.recipe == replace(RECIPE, optimizer="adamw", lr=0.004)


@given(seed=st.integers(0, 99), count=st.integers(1, 4), more=st.integers(0, 2), seeds=st.integers(1, 3))
@hypothesis(max_examples=5, deadline=None)
def test_a_smaller_count_is_a_prefix(seed: int, count: int, more: int, seeds: int) -> None:
    tasks = TaskSettings(count=count, seeds=seeds, data=(LARGE, SMALL), min_weights=1_000, max_weights=9_000, seed=seed)
    runs = sample(tasks)
    assert len(runs) == count * seeds and [run.seed for run in runs] == list(range(seeds)) * count
    assert sample(tasks) == runs
    assert sample(replace(tasks, count=count + more))[: len(runs)] == runs


def test_another_seed_draws_other_networks() -> None:
    one, two = ({r.model.label() for r in sample(TaskSettings(count=5, data=(SMALL,), seed=s))} for s in (0, 1))
    assert not one & two


def test_macs_are_the_products_of_one_image() -> None:
    data = shared_data(SMALL, "cpu")  # 1×8×8, 10 classes
    plain = ModelSettings("cellnet", 4, {"cell": "plain", "blocks": (1, 1)})
    assert macs(plain, data) == 36 * 64 + 288 * 16 + 80
    tokens = ModelSettings("cellnet", 4, {"cell": "attention", "blocks": (1,), "norm": "layer", "stem_stride": 4})
    assert macs(tokens, data) == (64 + 48 + 16 + 32 + 32) * 4 + 40
    assert macs(ModelSettings("cellnet", 4, {"cell": "mlp", "blocks": (2,)}), data) == 256 + 16 + 40


def test_bounds_that_no_network_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_gen.tasks._ATTEMPTS", 5)
    tasks = TaskSettings(count=1, data=(SMALL,), cells={"attention": 1}, min_weights=10, max_weights=20)
    with pytest.raises(AutoSparseError, match=r"tasks.cells holds 'attention': none of 5 networks of 10 … 20 weights"):
        sample(tasks)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.count=0", "tasks.count is 0: give at least 1"),
        ("tasks.seeds=0", "tasks.seeds is 0: give at least 1"),
        ("tasks.data=[]", "tasks.data is []: give at least one data set"),
        ("tasks.cells={plane: 1}", "tasks.cells is 'plane': did you mean 'plain'?"),
        ("tasks.cells={plain: -1}", "tasks.cells.plain is -1.0: give a share"),
        ("tasks.cells={plain: 0}", "give a cell with a share above 0"),
        ("tasks.max_weights=6000", "tasks.max_weights is 6000: give at least twice tasks.min_weights"),
        ("tasks.lr=[2, 1]", "tasks.lr is [2.0, 1.0]: give two factors"),
        ("tasks.sedes=1", "unknown key 'tasks.sedes': did you mean 'seeds'?"),
        ("tasks.data=[{name: digits, limt: 3}]", "unknown key 'tasks.data.0.limt': did you mean 'limit'?"),
    ],
)
def test_wrong_settings(override: str, message: str) -> None:
    with pytest.raises(AutoSparseError) as caught:
        load_config(GenerateConfig, None, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


# -- campaigns ----------------------------------------------------------------------------------------------------------


def write(path: Path, **changes: object) -> Path:
    values = {
        "output": str(path.parent / "out"),
        "data": {"name": "digits", "limit": 200, "limit_test": 50},
        "tasks": {
            "count": 2,
            "seeds": 1,
            "data": [{"image_size": 12}, "digits"],
            "min_weights": 500,
            "max_weights": 2000,
            "cells": {"plain": 1, "mlp": 1},
        },
        "recipe": {"epochs": 1, "batch_size": 50, "schedule": "onecycle"},
        "irp": {"rounds": 1, "density": 0.5},
        "signals": {"names": ["weight"], "n_batches": 1, "batch_size": 16},
        "device": "cpu",
        "tracking": False,
    }
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def test_data_of_tasks_take_what_they_do_not_say(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml")
    config = load_config(GenerateConfig, path)
    assert config.tasks is not None and config.tasks.data == (LARGE, SMALL)
    other = load_config(GenerateConfig, path, ["data.name=hdf5:a.h5", "data.limit=100"]).tasks
    assert other is not None
    assert other.data == (replace(LARGE, name="hdf5:a.h5", limit=100), replace(SMALL, limit=100))
    resolved = claim_directory(config) / "config.yaml"
    assert load_config(GenerateConfig, resolved) == config


@pytest.mark.parametrize(("key", "value"), [("models", ["resnet8"]), ("seeds", [0, 1])])
def test_tasks_draw_models_and_seeds(tmp_path: Path, key: str, value: list[object]) -> None:
    with pytest.raises(AutoSparseError, match=rf"{key} is .*: tasks draws the networks; leave it out"):
        load_config(GenerateConfig, write(tmp_path / "c.yaml", **{key: value}))


def indexed(directory: Path) -> set[Path]:
    """The records that the index of a corpus lists."""
    return {directory / row["path"] for row in json.loads((directory / "corpus.json").read_text())["records"]}


@pytest.mark.parametrize("kind", ["inline", "local"])
def test_a_campaign_of_two_data_sets_goes_on_when_it_grows(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "c.yaml", executor={"kind": kind})
    generate(load_config(GenerateConfig, path))
    files = sorted((tmp_path / "out" / "records").glob("*.h5"))
    records = [read_record(file) for file in files]
    assert len(records) == 2 and all(record.complete for record in records)
    assert {record.config["data"]["image_size"] for record in records} == {12, None}
    assert indexed(tmp_path / "out") == set(files)
    times = {file: file.stat().st_mtime_ns for file in files}
    if kind == "local":
        return
    generate(load_config(GenerateConfig, path, ["tasks.count=3", "tasks.seeds=2"]))
    assert len(list((tmp_path / "out" / "records").glob("*.h5"))) == len(indexed(tmp_path / "out")) == 6
    assert all(file.stat().st_mtime_ns == time for file, time in times.items()), "what was done is not done again"
    with pytest.raises(AutoSparseError, match=r"there tasks.max_weights is 2000, here 3000"):
        generate(load_config(GenerateConfig, path, ["tasks.max_weights=3000"]))
    with pytest.raises(AutoSparseError, match=r"belongs to another config \(there tasks is \{.*here None"):
        generate(load_config(GenerateConfig, path, ["tasks=null", "models=[mlp]"]))
    capsys.readouterr()
