"""How many jobs at once and how many CPU threads each: by hand, and without a trace in the results."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from autosparse import processes
from autosparse.experiment.benchmark import Cell, run_cell
from autosparse.experiment.candidates import Candidate
from autosparse.jobs import local
from autosparse.jobs.executor import ExecutorSettings
from autosparse.jobs.local import _shares
from autosparse.training.data import DataSettings, ImageData, load_data
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe
from autosparse.training.threads import threads_for


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (processes, local):
        monkeypatch.setattr(module, "cores", lambda: 4)
    monkeypatch.setattr(local, "memory_for", lambda processes: 100 // processes)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("workers", "devices", "jobs", "planned", "given", "expected"),
    [
        (None, ("cpu",), 75, 75, "", (4, 1)),
        (None, ("cpu",), 1, 1, "", (1, 4)),
        (None, ("cpu",), 2, 2, "", (2, 2)),
        (None, ("cpu",), 1, 75, "", (1, 1)),  # the last of 75, after a stop: on one thread as the others
        (None, ("cpu",), 75, 75, "2", (2, 2)),
        (None, ("cpu:2",), 75, 75, "", (2, 2)),
        (None, ("auto",), 75, 75, "", (4, 1)),
        (None, ("cuda:0", "cuda:1"), 75, 75, "", (1, 2)),
        (1, ("cpu",), 75, 75, "", (1, 4)),
        (3, ("cpu",), 75, 75, "", (3, 1)),
        (2, ("cpu",), 75, 75, "8", (2, 8)),
    ],
)
def test_cores_are_shared_out(
    four_cores: None,
    monkeypatch: pytest.MonkeyPatch,
    workers: int | None,
    devices: tuple[str, ...],
    jobs: int,
    planned: int,
    given: str,
    expected: tuple[int, int],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert _shares(ExecutorSettings(workers=workers), devices, jobs, planned) == expected


def test_no_more_jobs_than_memory(four_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for room, expected in ((3, 3), (0, 1)):
        monkeypatch.setattr(local, "memory_for", lambda processes, room=room: room)
        assert _shares(ExecutorSettings(), ("cpu",), 75, 75) == (expected, 1)


def test_a_network_gets_the_threads_that_its_steps_keep_busy(digits: ImageData, threads: None) -> None:
    """64·10 multiply-accumulates an image: 312,500 images are 2·10⁸."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.set_num_threads(3)
    for images, expected in ((128, 1), (312_499, 1), (312_500, 2), (10**6, 3)):
        with threads_for(model, digits, images) as count:
            assert count == expected == torch.get_num_threads()
        assert torch.get_num_threads() == 3


def test_a_small_network_gives_the_same_bits_whatever_its_share_of_the_cores(threads: None) -> None:
    data = DataSettings("digits", limit=150, limit_test=50)
    cell = Cell(ModelSettings("convnet", 4), data, Recipe(epochs=1, batch_size=50), Candidate("snip"), 0.8, 0)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        result = run_cell(cell, load_data(data), device="cpu")
        found.append((result["loss"], result["accuracy"], result["layers"], str(result["history"])))
    assert found[0] == found[1]


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    processes.let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setenv(name, value)
        processes.let_threads_sleep()
        assert os.environ.get("OMP_WAIT_POLICY") == ("ACTIVE" if name == "OMP_WAIT_POLICY" else None)
