"""Recorded IRP runs: killed at any moment and started again they give the record of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.masks.layers import prunable_layers
from autosparse.network.signals import SignalSettings, measure
from autosparse.pruning.warmup import WarmupSettings, warmup
from autosparse.scorers.corpus import write_index
from autosparse.scorers.fitting import fit
from autosparse.scorers.records import Record, find_records, is_complete, read_record
from autosparse.scorers.rows import FitSettings, open_source
from autosparse.scorers.splits import split_records
from autosparse.search.irp import IRPSettings
from autosparse.training.data import DataSettings, ImageData, load_data
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe
from autosparse.training.train import train
from data_gen import runs as runs_module
from data_gen.campaign import generate, runs
from data_gen.gradual import GradualSettings
from data_gen.runs import Run, generate_record, masks_of_round, sole_writer

torch.set_num_threads(1)

RUN = Run(
    ModelSettings("convnet", 4),
    DataSettings("digits", limit=300, limit_test=100),
    Recipe(epochs=2, batch_size=50, lr=0.05, schedule="cosine"),
    IRPSettings(rounds=3, density=0.2),
    SignalSettings(n_batches=2, batch_size=32),
    seed=3,
)
LATE = replace(RUN, irp=replace(RUN.irp, rewind_step=3))
CRITERIA = {
    "magnitude": RUN,
    "late rewinding": LATE,
    "snip": replace(RUN, irp=replace(RUN.irp, criterion="snip")),
    "rewound at the end": replace(LATE, irp=replace(LATE.irp, rewind="end")),
    "never rewound": replace(RUN, irp=replace(RUN.irp, rewind="never")),
}
GRADUAL = replace(RUN, gradual=GradualSettings(density=0.2, updates=4, begin=0.1, end=0.9))


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(RUN.data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: ImageData) -> dict[str, Path]:
    """The records of uninterrupted runs."""
    folder = tmp_path_factory.mktemp("whole")
    for name, run in CRITERIA.items():
        generate_record(run, folder / f"{name}.h5", device="cpu", data=data)
    return {name: folder / f"{name}.h5" for name in CRITERIA}


def content(path: Path) -> dict[str, Any]:
    """Every dataset and attribute of an HDF5 file."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        found.update({f"{name}@{key}": value for key, value in item.attrs.items()})
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(path, "r") as file:
        visit("/", file)
        file.visititems(visit)
    return found


def same(a: Path, b: Path) -> None:
    """Two records hold the same bits in every dataset and attribute."""
    left, right = content(a), content(b)
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


class Stop(BaseException):
    """A stop that no handler of the code under test knows."""


# -- what a run records -------------------------------------------------------------------------------------------------


def test_what_a_record_says(whole: dict[str, Path], data: ImageData) -> None:
    record = read_record(whole["magnitude"])
    assert record.complete and record.rounds_done == 3 and record.seed == 3
    total = sum(layer.numel for layer in record.layers.values())
    assert total == 4 * 9 + 8 * 36 + 8 * 72 + 80
    wanted = [round(0.2 ** (r / 3) * total) / total for r in range(4)]
    assert record.density.tolist() == pytest.approx(wanted, abs=1e-12)
    assert record.removal_densities.tolist() == pytest.approx(wanted[1:], abs=1e-12)
    assert len(record.accuracy) == len(record.loss) == 4 and (record.accuracy > 0.1).all()
    own = {key: value for key, value in record.config.items() if key != "inputs"}
    assert (
        own == json.loads(json.dumps(RUN.config()))
        and len(record.config["inputs"]) == 64
        and "root" not in record.config["data"]
    )
    assert record.graph().layers() == tuple(record.layers)
    for r in range(4):
        assert masks_of_round(record.survival, record.layers, r).density == pytest.approx(record.density[r])


@pytest.mark.parametrize("name", list(CRITERIA))
def test_signals_are_those_of_the_initialization(whole: dict[str, Path], data: ImageData, name: str) -> None:
    record = read_record(whole[name])
    model = create_model(RUN.model, in_channels=1, classes=10, image_size=8, seed=RUN.seed)
    layers = prunable_layers(model)
    assert list(record.layers.items()) == list(layers.items())
    wanted = measure(model, layers, ("weight", "gradient"), batches=data.sample(32, 2, RUN.seed), seed=RUN.seed)
    for key in ("weight", "gradient"):
        for layer in layers:
            np.testing.assert_array_equal(record.signals[key][layer], wanted[key][layer].numpy())


def test_signals_of_a_warmup(whole: dict[str, Path], data: ImageData, tmp_path: Path) -> None:
    names = ("weight", "displacement@0.5", "accumulated_gradient@1")
    run = replace(RUN, signals=replace(RUN.signals, names=names, warmup_orders=2, warmup_lr=0.02))
    path = tmp_path / "r.h5"
    with pytest.raises(Stop):
        generate_record(run, path, device="cpu", data=data, on_round=stop_after_the_first)
    record = generate_record(run, path, device="cpu", data=data)
    assert record.signals.keys() == set(names) and record.config["signals"]["warmup_orders"] == 2
    model = create_model(RUN.model, in_channels=1, classes=10, image_size=8, seed=RUN.seed)
    wanted = warmup(
        model, record.layers, data, RUN.recipe, names[1:], WarmupSettings(2, 0.02), seed=RUN.seed, device="cpu"
    ).signals
    plain = read_record(whole["magnitude"])
    found = read_record(path)
    for layer in plain.layers:
        for name in names[1:]:
            np.testing.assert_array_equal(found.signals[name][layer], wanted[name][layer].numpy())
        np.testing.assert_array_equal(found.signals["weight"][layer], plain.signals["weight"][layer])
        np.testing.assert_array_equal(found.survival[layer], plain.survival[layer])
    np.testing.assert_array_equal(found.accuracy, plain.accuracy)


def test_a_kill_in_the_warmup_repeats_it(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(RUN, signals=replace(RUN.signals, names=("weight", "displacement@0.5")))
    generate_record(run, tmp_path / "whole.h5", device="cpu", data=data)

    def killed(*_: Any, **__: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("autosparse.pruning.warmup.put_back", killed)
        generate_record(run, tmp_path / "r.h5", device="cpu", data=data)
    generate_record(run, tmp_path / "r.h5", device="cpu", data=data)
    same(tmp_path / "r.h5", tmp_path / "whole.h5")


def stop_after_the_first(*_: Any) -> None:
    raise Stop


def test_settings_of_a_warmup_that_is_not_done_are_no_other_run(whole: dict[str, Path], data: ImageData) -> None:
    other = replace(RUN, signals=replace(RUN.signals, warmup_orders=3))
    assert generate_record(other, whole["magnitude"], device="cpu", data=data).complete
    done = replace(other, signals=replace(other.signals, names=("weight", "displacement@1")))
    with pytest.raises(AutoSparseError, match=r"signals.names = \['weight', 'gradient'\], now it is"):
        generate_record(done, whole["magnitude"], device="cpu", data=data)


def test_late_rewinding_and_snip_give_other_tickets(whole: dict[str, Path]) -> None:
    survival = {
        name: np.concatenate([s.ravel() for s in read_record(path).survival.values()]) for name, path in whole.items()
    }
    assert not np.array_equal(survival["magnitude"], survival["late rewinding"])
    assert not np.array_equal(survival["magnitude"], survival["snip"])


def test_a_run_is_a_function_of_its_settings(whole: dict[str, Path], data: ImageData, tmp_path: Path) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    generate_record(RUN, tmp_path / "again.h5", device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    same(tmp_path / "again.h5", whole["magnitude"])


def test_a_finished_run_leaves_only_its_record(data: ImageData, tmp_path: Path) -> None:
    generate_record(LATE, tmp_path / "r.h5", device="cpu", data=data)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["r.h5"]
    (tmp_path / "r.state").mkdir()  # as if a kill had come between the last record and the end
    generate_record(LATE, tmp_path / "r.h5", device="cpu", data=data)
    assert not (tmp_path / "r.state").exists()


# -- stopped and started again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CRITERIA))
def test_stopped_after_every_round(whole: dict[str, Path], data: ImageData, tmp_path: Path, name: str) -> None:
    path, seen = tmp_path / "r.h5", []

    def stop(index: int, rounds: int, outcome: Any) -> None:
        if outcome is not None:
            seen.append(index)
            raise Stop

    for _ in range(4):
        with pytest.raises(Stop):
            generate_record(CRITERIA[name], path, device="cpu", data=data, on_round=stop)
    assert seen == [0, 1, 2, 3], "each start does the next round and no other"
    assert generate_record(CRITERIA[name], path, device="cpu", data=data, on_round=stop).complete
    same(path, whole[name])


@pytest.mark.parametrize("name", list(CRITERIA))
def test_stopped_in_every_epoch(
    whole: dict[str, Path], data: ImageData, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint at every epoch's end, a stop in any epoch loses at most that one."""
    assert train.__kwdefaults__ is not None
    monkeypatch.setitem(train.__kwdefaults__, "checkpoint_every", 0.0)
    path, epochs = tmp_path / "r.h5", []

    def stop(row: dict[str, float]) -> None:
        epochs.append(row["epoch"])
        if len(epochs) % 2 == 0:
            raise Stop

    for _ in range(20):
        try:
            generate_record(CRITERIA[name], path, device="cpu", data=data, on_epoch=stop)
            break
        except Stop:
            pass
    same(path, whole[name])
    assert len(epochs) == 15, "four trainings of two epochs, and one epoch lost at each of seven stops"
    assert not (tmp_path / "r.state").exists()


def test_a_lost_state_of_carried_weights_is_told(data: ImageData, tmp_path: Path) -> None:
    def stop(index: int, rounds: int, outcome: Any) -> None:
        raise Stop

    run = CRITERIA["never rewound"]
    with pytest.raises(Stop):
        generate_record(run, tmp_path / "r.h5", device="cpu", data=data, on_round=stop)
    (tmp_path / "r.state" / "weights1.safetensors").unlink()
    with pytest.raises(AutoSparseError, match=r"cannot be resumed: .*delete the record to start it again"):
        generate_record(run, tmp_path / "r.h5", device="cpu", data=data)


# -- one gradual run ----------------------------------------------------------------------------------------------------


def test_what_a_gradual_record_says(data: ImageData, tmp_path: Path) -> None:
    """10 steps, updates after 3, 5, 7 and 9: each weight has the number of removals that it survived."""
    record = generate_record(GRADUAL, tmp_path / "r.h5", device="cpu", data=data)
    assert read_record(tmp_path / "r.h5").method == record.method == "gradual" and record.complete
    model = create_model(RUN.model, in_channels=1, classes=10, image_size=8, seed=RUN.seed)
    schedule = GRADUAL.gradual.schedule(record.layers, 10)
    assert schedule.method.every == 2
    trained = train(model, data, RUN.recipe, mask_schedule=schedule, seed=RUN.seed, device="cpu")
    assert masks_of_round(record.survival, record.layers, record.rounds_done) == trained.masks
    assert record.rounds_done == 4 and len(record.density) == 5 and record.density[0] == 1
    r = np.array([1, 2, 3, 4]) / 4
    assert record.removal_densities == pytest.approx(0.2 + 0.8 * (1 - r) ** 3, abs=1e-3)
    assert record.density[1:] == pytest.approx(record.removal_densities)
    assert np.isnan(record.accuracy[:-1]).all() and 0.1 < record.accuracy[-1] <= 1
    ticket = create_model(RUN.model, in_channels=1, classes=10, image_size=8, seed=RUN.seed)
    assert (
        train(ticket, data, RUN.recipe, masks=trained.masks, seed=RUN.seed, device="cpu").accuracy
        == record.accuracy[-1]
    )


def test_a_gradual_run_stopped_in_every_epoch(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train.__kwdefaults__ is not None
    whole = generate_record(GRADUAL, tmp_path / "whole.h5", device="cpu", data=data)
    monkeypatch.setitem(train.__kwdefaults__, "checkpoint_every", 0.0)
    path, epochs = tmp_path / "r.h5", []

    def stop(row: dict[str, float]) -> None:
        epochs.append(row["epoch"])
        if len(epochs) % 2 == 0:
            raise Stop

    for _ in range(20):
        try:
            generate_record(GRADUAL, path, device="cpu", data=data, on_epoch=stop)
            break
        except Stop:
            pass
    same(path, tmp_path / "whole.h5")
    assert whole.complete and len(epochs) == 7, "two trainings of two epochs, and one epoch lost at each of three stops"
    calls: list[Any] = []
    generate_record(GRADUAL, path, device="cpu", data=data, on_round=lambda *a: calls.append(a))
    assert calls == [(1, 1, None)] and not (tmp_path / "r.state").exists()


def test_records_of_all_kinds_are_one_corpus(data: ImageData, tmp_path: Path) -> None:
    """They lie on one axis of density: one scorer is fitted on all, and the index says which is which."""
    for seed in range(2):
        for name, run in {"irp": RUN, "end": CRITERIA["rewound at the end"], "gradual": GRADUAL}.items():
            generate_record(replace(run, seed=seed), tmp_path / f"{name}{seed}.h5", device="cpu", data=data)
    corpus = write_index(tmp_path)
    assert [entry.method for entry in corpus.entries] == [*["irp rewind end"] * 2, *["gradual"] * 2, *["irp"] * 2]
    assert [entry.accuracy is None for entry in corpus.entries] == [False, False, True, True, False, False]
    quick = FitSettings(epochs=1, options={"hidden": (8,)}, split="none", validation="none")
    scorer = fit(find_records([tmp_path]), quick)
    assert len(scorer.card.records) == 6 and np.isfinite(scorer.card.history[-1]["train_loss"])


def test_a_campaign_of_gradual_runs(data: ImageData, tmp_path: Path) -> None:
    events: list[Any] = []
    campaign = generate([GRADUAL], tmp_path, device="cpu", on_event=events.append)
    assert len(campaign.records) == 1 and not campaign.failures
    seen = [e.values for e in events if e.kind == "progress" and "density" in e.values]
    assert [v["round"] for v in seen] == [0, 1] and "accuracy" not in seen[0] and 0 < seen[1]["accuracy"] <= 1


def test_found_rounds_are_reported_as_found(data: ImageData, tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def note(index: int, rounds: int, outcome: Any) -> None:
        seen.append((index, outcome is None))
        if index == 1 and outcome is not None:
            raise Stop

    with pytest.raises(Stop):
        generate_record(RUN, tmp_path / "r.h5", device="cpu", data=data, on_round=note)
    generate_record(RUN, tmp_path / "r.h5", device="cpu", data=data, on_round=note)
    assert seen == [(0, False), (1, False), (0, True), (1, True), (2, False), (3, False)]


def test_a_finished_run_answers_without_training(
    whole: dict[str, Path], data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs_module, "irp", never)
    monkeypatch.setattr("autosparse.search.irp.train", never)
    before = whole["magnitude"].read_bytes()
    calls: list[Any] = []
    record = generate_record(RUN, whole["magnitude"], data=data, on_round=lambda *a: calls.append(a))
    assert record.complete and calls == [(3, 3, None)]
    assert whole["magnitude"].read_bytes() == before


def test_a_lost_rewind_state_is_told(data: ImageData, tmp_path: Path) -> None:
    def stop(index: int, rounds: int, outcome: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        generate_record(LATE, tmp_path / "r.h5", device="cpu", data=data, on_round=stop)
    (tmp_path / "r.state" / "rewind.safetensors").unlink()
    with pytest.raises(AutoSparseError, match=r"cannot be resumed: .*delete the record to start it again"):
        generate_record(LATE, tmp_path / "r.h5", device="cpu", data=data)


SLOW = {
    "recipe": {"epochs": 2, "batch_size": 20, "lr": 0.05, "schedule": "cosine"},
    "irp": {"rounds": 6, "density": 0.1},
}


def test_killed_at_three_random_moments(tmp_path: Path) -> None:
    """`kill -9` on `python -m data_gen`, whenever it strikes, changes nothing in the end."""
    rewind_step = 5
    values = {
        "output": str(tmp_path / "out"),
        "models": [{"name": "convnet", "width": 4}],
        "data": {"name": "digits", "limit": 300, "limit_test": 100},
        **SLOW,
        "irp": {**SLOW["irp"], "rewind_step": rewind_step},
        "signals": {"n_batches": 1},
        "executor": "inline",
        "device": "cpu",
        "tracking": False,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    record = tmp_path / "out" / "records" / "convnet-w4_digits_s0.h5"
    chance = random.Random(rewind_step)
    moments = sorted(chance.sample(range(5), 3))  # rounds in the record when the kill strikes
    killed = []
    for moment in moments:
        process = start(config)
        while process.poll() is None and rounds_in(record) < moment:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        killed.append(process.wait() == -signal.SIGKILL)
    before = rounds_in(record)
    assert any(killed) and before >= 1
    process = start(config)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    run = Run(
        ModelSettings("convnet", 4),
        DataSettings("digits", limit=300, limit_test=100),
        Recipe(**SLOW["recipe"]),  # type: ignore[arg-type]
        IRPSettings(**SLOW["irp"], rewind_step=rewind_step),  # type: ignore[arg-type]
        SignalSettings(n_batches=1),
        0,
    )
    generate_record(run, tmp_path / "whole.h5", device="cpu")
    same(record, tmp_path / "whole.h5")
    assert not record.with_name("convnet-w4_digits_s0.state").exists()


def start(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "data_gen", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rounds_in(path: Path) -> int:
    """Trainings in the record; every file that is ever at its place is whole."""
    return len(read_record(path, []).density) if path.exists() else 0


# -- two at once, and other settings ------------------------------------------------------------------------------------


def test_a_second_process_on_the_same_run_is_told_so(data: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    with sole_writer(path), pytest.raises(AutoSparseError, match=r"r.h5 is being written by another process: wait"):
        generate_record(RUN, path, device="cpu", data=data)
    assert generate_record(RUN, path, device="cpu", data=data).complete, "the lock is free again"


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (replace(RUN, seed=4), "seed = 3, now it is 4"),
        (replace(RUN, recipe=replace(RUN.recipe, lr=0.06)), "recipe.lr = 0.05, now it is 0.06"),
        (replace(RUN, irp=replace(RUN.irp, rounds=4)), "irp.rounds = 3, now it is 4"),
        (replace(RUN, model=ModelSettings("convnet", 4, {"depth": 3})), "model.options"),
        (replace(RUN, signals=SignalSettings(n_batches=3, batch_size=32)), "signals.n_batches = 2"),
    ],
)
def test_another_run_at_the_same_path_is_refused(whole: dict[str, Path], data: ImageData, other: Run, key: str) -> None:
    before = whole["magnitude"].read_bytes()
    with pytest.raises(AutoSparseError, match=key):
        generate_record(other, whole["magnitude"], device="cpu", data=data)
    assert whole["magnitude"].read_bytes() == before


def test_other_images_under_the_same_name_are_another_run(whole: dict[str, Path], data: ImageData) -> None:
    images = data.train.images.clone()
    images[0, 0, 0, 0] ^= 1
    other = replace(data, train=replace(data.train, images=images))
    with pytest.raises(AutoSparseError, match=r"was made from other images or initial weights: choose another output"):
        generate_record(RUN, whole["magnitude"], device="cpu", data=other)
    assert generate_record(RUN, whole["magnitude"], device="cpu", data=data).complete


def test_where_the_data_lie_is_no_other_run(whole: dict[str, Path], data: ImageData) -> None:
    moved = replace(RUN, data=replace(RUN.data, root="elsewhere"))
    assert generate_record(moved, whole["magnitude"], device="cpu", data=data).complete


def test_a_truncated_record_is_told(whole: dict[str, Path], data: ImageData, tmp_path: Path) -> None:
    (tmp_path / "r.h5").write_bytes(whole["magnitude"].read_bytes()[:5000])
    with pytest.raises(AutoSparseError, match="truncated or not HDF5"):
        generate_record(RUN, tmp_path / "r.h5", device="cpu", data=data)


# -- many runs ----------------------------------------------------------------------------------------------------------


def test_one_run_for_each_seed_and_model() -> None:
    models = [ModelSettings("convnet", 4), ModelSettings("mlp", 8)]
    todo = runs(models, RUN.data, RUN.recipe, RUN.irp, RUN.signals, [0, 1])
    assert [r.label() for r in todo] == [f"{m}_digits_s{s}" for s in (0, 1) for m in ("convnet-w4", "mlp-w8")]
    for arguments, match in (
        (([], [0]), r"models is \[\]"),
        ((models, []), r"seeds is \[\]"),
        ((models, [1, 1]), "two runs have this name"),
    ):
        with pytest.raises(AutoSparseError, match=match):
            runs(arguments[0], RUN.data, RUN.recipe, RUN.irp, RUN.signals, arguments[1])


def test_a_diverging_run_fails_and_the_rest_goes_on(whole: dict[str, Path], tmp_path: Path) -> None:
    doomed = replace(RUN, model=ModelSettings("mlp", 8), recipe=replace(RUN.recipe, lr=1e20))
    campaign = generate([doomed, RUN], tmp_path, device="cpu")
    assert campaign.records == [tmp_path / "records" / "convnet-w4_digits_s3.h5"]
    assert list(campaign.failures) == ["mlp-w8_digits_s3"]
    assert "training diverged: the loss is not finite by step" in campaign.failures["mlp-w8_digits_s3"]
    same(campaign.records[0], whole["magnitude"])
    with pytest.raises(AutoSparseFailure, match="training diverged"):
        generate([doomed], tmp_path, device="cpu")


def test_what_is_wrong_with_every_run_is_one_error(tmp_path: Path) -> None:
    late = replace(RUN, irp=replace(RUN.irp, rewind_step=10))
    with pytest.raises(AutoSparseError, match=r"irp.rewind_step is 10: a training has 10 steps"):
        generate([late, replace(late, seed=4)], tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (ModelSettings("test_runs:Nothing"), "Nothing has no prunable weights"),
        (ModelSettings("test_runs:Eleven"), r"gives outputs \(2, 3\) for 2 images of 10 classes"),
        (ModelSettings("test_runs:Large"), r"Sequential cannot take batches of shape \(2, 1, 8, 8\)"),
    ],
)
def test_a_model_that_cannot_work_is_told_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: ModelSettings, match: str
) -> None:
    monkeypatch.setattr(runs_module, "irp", None)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(AutoSparseError, match=match):
        generate([RUN, replace(RUN, model=model)], tmp_path, device="cpu")


class Nothing(torch.nn.Module):
    """Bias and norm only."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3))[:, None] + self.bias


def Eleven() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))


def Large() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32 * 32, 10))


def test_survival_of_a_record_is_nested(whole: dict[str, Path]) -> None:
    for path in whole.values():
        record: Record = read_record(path)
        for r in range(record.rounds_done):
            now, later = (masks_of_round(record.survival, record.layers, i) for i in (r, r + 1))
            assert all(bool((now[n] | ~later[n]).all()) for n in now)


def test_a_finished_campaign_is_still_that_of_its_images(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records" / f"{RUN.label()}.h5"
    record = generate_record(RUN, path, device="cpu", data=data)
    assert record.complete and is_complete(path) and not is_complete(tmp_path / "none.h5")
    monkeypatch.setattr("data_gen.campaign.shared_data", lambda *_: data)
    assert generate([RUN], tmp_path, device="cpu").records == [path]
    monkeypatch.setattr("data_gen.campaign.shared_data", lambda *_: replace(data, augment="crop"))
    with pytest.raises(AutoSparseError, match="was made from other images or initial weights"):
        generate([RUN], tmp_path, device="cpu")


def test_searches_from_the_same_start_are_one_run_for_fit(tmp_path: Path) -> None:
    searches = [
        RUN,
        replace(RUN, irp=replace(RUN.irp, rewind="end")),
        replace(RUN, gradual=GradualSettings(density=0.2)),
    ]
    paths = []
    for seed in (0, 1):
        for i, run in enumerate(searches):
            paths.append(tmp_path / f"{seed}-{i}.h5")
            generate_record(replace(run, seed=seed), paths[-1])
    sources = [open_source(path, ("weight",)) for path in paths]
    for seed in range(4):
        parts = split_records(sources, FitSettings(split="run", validation="none", seed=seed))
        assert {parts.fit, parts.test} == {(0, 1, 2), (3, 4, 5)}
