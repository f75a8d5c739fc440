"""One training on several devices: what one device gives, and what dies, fails or stops on the way."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked import Buggy, Doomed, net
from test_executor import running, until
from test_loop import Stop, stop_after
from torch import nn

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.jobs.executor import ExecutorSettings
from autosparse.masks.mask import Masks
from autosparse.network.signals import SignalSettings
from autosparse.pruning.prune import prune
from autosparse.search.irp import IRPSettings
from autosparse.training.data import DataSettings, ImageData
from autosparse.training.devices import device_names
from autosparse.training.loop import Trained, fabric_for, full_state
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe
from autosparse.training.train import train
from data_gen.campaign import generate, runs

HERE = Path(__file__).parent
SHORT = Recipe(epochs=3, batch_size=16, lr=0.05, schedule="cosine", label_smoothing=0.1, clip_norm=1.0)


def masks_of(model: nn.Module) -> Masks:
    return prune(model, 0.5, "random", seed=1)


def assert_same(one: nn.Module, its: Trained, other: nn.Module, others: Trained) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=1e-5, rtol=1e-4)
    assert len(its.history) == len(others.history)
    for a, b in zip(its.history, others.history, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert (its.steps, its.epochs, its.accuracy) == (others.steps, others.epochs, others.accuracy)
    assert its.loss == pytest.approx(others.loss, rel=1e-4)


# -- names --------------------------------------------------------------------------------------------------------------


def test_names_of_devices() -> None:
    assert device_names("cuda:0,1") == ("cuda:0", "cuda:1") and device_names("cuda:3,1")[0] == "cuda:3"
    assert device_names("cpu:2") == ("cpu", "cpu") and device_names("cpu:1") == ("cpu",)
    assert [device_names(n) for n in ("auto", "cuda:1", "cpu")] == [("auto",), ("cuda:1",), ("cpu",)]
    with pytest.raises(AutoSparseError, match="device is 'cuda:0,0': name different GPUs"):
        device_names("cuda:0,0")
    assert fabric_for("cpu:2").device == torch.device("cpu")


def test_shares_of_a_batch_are_the_batch(digits: ImageData) -> None:
    for augment in ("none", "crop+flip"):
        data = replace(digits, augment=augment)
        shares = [list(data.epoch(16, 5, rank, 4)) for rank in range(4)]
        for index, (images, labels) in enumerate(data.epoch(16, 5)):
            assert torch.equal(torch.cat([s[index][0] for s in shares]), images)
            assert torch.equal(torch.cat([s[index][1] for s in shares]), labels)


# -- what comes out -----------------------------------------------------------------------------------------------------


def test_two_ranks_give_what_one_device_gives(
    digits: ImageData, tmp_path: Path, unchanged: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    """From the checkpoint that one device left after its first epoch."""
    data = replace(digits, augment="crop+flip")
    one, two, rows = net(), net().eval(), []
    masks, own = masks_of(one), [id(p) for p in two.parameters()]
    options: dict[str, Any] = {
        "checkpoint": tmp_path / "training.pt",
        "checkpoint_every": 0.0,
        "seed": 3,
        "masks": masks,
    }
    with pytest.raises(Stop):
        train(net(), data, SHORT, device="cpu", on_epoch=stop_after(2), **options)
    with unchanged(nn.Linear(1, 1)):
        found = train(two, data, SHORT, device="cpu:2", on_epoch=rows.append, **options)
    assert_same(one, train(one, data, SHORT, masks=masks, seed=3, device="cpu"), two, found)
    assert rows == found.history[1:] and found.images_per_second > 0
    assert all((two.get_parameter(n)[~m] == 0).all() for n, m in masks.items())
    assert [id(p) for p in two.parameters()] == own and two.training and two.steps == 8
    assert not multiprocessing.active_children() and not list(tmp_path.iterdir())


def test_stopped_on_two_devices_and_resumed_on_one(digits: ImageData, tmp_path: Path) -> None:
    checkpoint = tmp_path / "training.pt"
    options: dict[str, Any] = {"checkpoint": checkpoint, "checkpoint_every": 0.0, "seed": 4}
    model, whole = net(), net()
    options["masks"] = masks_of(model)
    before = copy.deepcopy(full_state(model))
    with pytest.raises(Stop):
        train(model, digits, SHORT, device="cpu:2", on_epoch=stop_after(2), **options)
    assert all(torch.equal(v, before[n]) for n, v in full_state(model).items())
    assert list(tmp_path.iterdir()) == [checkpoint] and not multiprocessing.active_children()
    resumed = train(model, digits, SHORT, device="cpu", **options)
    assert_same(whole, train(whole, digits, SHORT, device="cpu", masks=options["masks"], seed=4), model, resumed)


def test_a_record_by_a_worker_with_two_ranks(tmp_path: Path) -> None:
    model = ModelSettings("convnet", 4, {"norm": False})
    data, recipe = DataSettings("digits", limit=96, limit_test=40), Recipe(epochs=1, batch_size=16, lr=0.05)
    signals = SignalSettings(("weight", "gradient"), n_batches=1, batch_size=16)
    todo = runs([model], data, recipe, IRPSettings(rounds=1, density=0.5), signals, [0])
    campaign = generate(todo, tmp_path, device="cpu:2", executor=ExecutorSettings("local"))
    assert not campaign.failures and len(campaign.records) == 1


# -- what does not come out -----------------------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_shared(digits: ImageData) -> None:
    with pytest.raises(AutoSparseError, match="batch size is 16: 3 devices need a multiple of 3"):
        train(net(), digits, SHORT, device="cpu:3")


def test_a_model_that_cannot_be_sent(digits: ImageData) -> None:
    model = net()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(AutoSparseError, match=r"^Net cannot be sent to the processes of several devices: .*lambda.*; "):
        train(model, digits, SHORT, device="cpu:2")


def test_only_the_first_device_shows_its_gradients(digits: ImageData) -> None:
    seen: list[int] = []
    train(net(), digits, Recipe(steps=3, batch_size=16), device="cpu:2", on_gradient=seen.append)
    assert seen == [0, 1, 2]


def test_divergence_is_told_by_the_ranks(digits: ImageData) -> None:
    model = net()
    before = copy.deepcopy(full_state(model))
    with pytest.raises(
        AutoSparseFailure, match=r"^training diverged: .* by step 4 \(lr 1e\+30, sgd\); lower recipe\.lr"
    ):
        train(model, digits, Recipe(epochs=5, batch_size=16, lr=1e30), device="cpu:2")
    assert all(torch.equal(v, before[n]) for n, v in full_state(model).items())
    assert not multiprocessing.active_children()


def test_a_rank_that_is_killed(digits: ImageData) -> None:
    with pytest.raises(
        AutoSparseFailure, match=r"2 devices ended: the process on cpu died, killed by signal 9 \(SIGKILL\) \(out of"
    ):
        train(net(Doomed), digits, SHORT, device="cpu:2")
    assert not multiprocessing.active_children()


def test_a_bug_in_a_rank_is_told_with_its_traceback(digits: ImageData) -> None:
    with pytest.raises(RuntimeError, match=r"^ZeroDivisionError: of rank 1\n") as caught:
        train(net(Buggy), digits, SHORT, device="cpu:2")
    assert "in forward" in caught.value.__notes__[0] and not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("how", "kind"), [(signal.SIGKILL, "local"), (signal.SIGTERM, "inline")], ids=["killed", "terminated"]
)
def test_the_end_of_the_driver_ends_the_ranks(how: int, kind: str, tmp_path: Path) -> None:
    code = f"""
from ranked import endless
from autosparse.jobs.executor import ExecutorSettings, Job, run_jobs
run_jobs([Job("a", endless, {{"place": {str(tmp_path)!r}}})], ExecutorSettings({kind!r}), device="cpu:2")
"""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path}
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment)
    until(lambda: driver.poll() is not None or len(list(tmp_path.iterdir())) == 2)
    driver.send_signal(how)
    driver.wait()
    pids = [int(p.name) for p in tmp_path.iterdir()]
    assert len(pids) == 2
    until(lambda: not any(map(running, pids)))
