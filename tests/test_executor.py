"""Jobs by every executor: what dies is tried again, what fails is told, nothing is done twice, results are the same."""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
import multiprocessing
import os
import pickletools
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from jobs import work
from test_runs import same

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.experiment.benchmark import Cell, grid, run_grid
from autosparse.experiment.candidates import Candidate
from autosparse.jobs import status
from autosparse.jobs.encoding import decode_job, encode_job
from autosparse.jobs.executor import INLINE, Event, ExecutorSettings, Job, run_jobs
from autosparse.jobs.local import _devices
from autosparse.jobs.status import FOLDER, journal, kept_up, statuses
from autosparse.network.signals import SignalSettings
from autosparse.pruning.warmup import WarmupSettings
from autosparse.search.irp import IRPSettings
from autosparse.training.data import DataSettings, load_data
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe
from data_gen.campaign import generate, runs

torch.set_num_threads(1)

HERE = Path(__file__).parent
MODEL, DATA = ModelSettings("convnet", 4), DataSettings("digits", limit=300, limit_test=100)
RECIPE = Recipe(epochs=1, batch_size=50, lr=0.05, schedule="cosine")
LOCAL = ExecutorSettings("local", workers=2)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the package ray is not installed")
BOTH = [pytest.param(LOCAL, id="local"), pytest.param(ExecutorSettings("ray", workers=2), id="ray", marks=needs_ray)]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are not spawned by this one find this file too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]))


def jobs_of(place: Path, **how: str) -> list[Job]:
    return [Job(name, work, {"place": place, "name": name, "how": kind}) for name, kind in how.items()]


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"kind": "locl"}, "did you mean 'local'"),
        ({"kind": "inline", "workers": 2}, "executor.workers is 2: set executor.kind"),
        ({"kind": "local", "workers": 0}, "executor.workers is 0"),
        ({"kind": "local", "retries": -1}, "executor.retries is -1"),
        ({"kind": "local", "devices": ()}, "give at least one"),
        ({"kind": "inline", "timeout": 5.0}, "executor.timeout is 5.0: set executor.kind: local, ray or slurm"),
        ({"kind": "ray", "timeout": 0.0}, "executor.timeout is 0.0: give seconds"),
        ({"kind": "ray", "devices": ("cuda:0",)}, "only kind local takes devices"),
        ({"kind": "local", "address": "auto"}, "only kind ray takes an address"),
        ({"kind": "local", "slurm": {"mem_gb": 8}}, "executor.slurm is .*: only kind slurm takes"),
    ],
)
def test_wrong_settings_are_told(given: dict[str, Any], match: str) -> None:
    with pytest.raises(AutoSparseError, match=match):
        ExecutorSettings(**given)


def test_without_ray_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AutoSparseError, match=r"package ray is not installed; pip install 'autosparse\[ray\]'"):
        run_jobs(jobs_of(tmp_path, a="good"), ExecutorSettings("ray"))


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({}, "^executor.kind is 'slurm': .*srun.*; start the command where Slurm's commands are"),
        ({"cluster": "locl"}, "^executor.slurm.cluster is 'locl': known: slurm, local$"),
        ({"cluster": "local", "memory": 3}, "^executor.slurm is {'memory': 3}: Parameter 'memory' need"),
        ({"cluster": "local", "mem_gb": "3"}, "^executor.slurm is {'mem_gb': '3'}: Parameter \"mem_gb\" expected"),
    ],
)
def test_slurm_that_cannot_start_is_one_line(
    asked: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(AutoSparseError, match=match):
        run_jobs(jobs_of(tmp_path, a="good"), ExecutorSettings("slurm", slurm=asked))
    assert not list(tmp_path.rglob("slurm/*")), "nothing stays"
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(AutoSparseError, match=r"package submitit is not installed; pip install 'autosparse\[slurm\]'"):
        run_jobs(jobs_of(tmp_path, a="good"), ExecutorSettings("slurm"))


def test_devices_that_are_not_there_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for executor in (replace(LOCAL, devices=("cuda:0", "cuda:1")), LOCAL):
        with pytest.raises(AutoSparseError, match="device is 'cuda:1': this machine has cuda:0"):
            run_jobs(jobs_of(tmp_path, a="good"), executor, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _devices(LOCAL, "auto") == _devices(LOCAL, "cuda") == ("cuda:0", "cuda:1")
    assert _devices(LOCAL, "cuda:1") == ("cuda:1",) and _devices(LOCAL, "cpu") == ("cpu",)
    assert _devices(replace(LOCAL, devices=("cuda:1", "cpu")), "auto") == ("cuda:1", "cpu")


# -- what dies and what fails ---------------------------------------------------------------------------------------------


def test_inline_lists_what_fails_and_goes_on(tmp_path: Path) -> None:
    events: list[Event] = []
    jobs = jobs_of(tmp_path, a="good", b="poisoned", c="wrong", d="full", e="good")
    outcomes = run_jobs(jobs, INLINE, events.append, device="cpu")
    assert [(k, o.error, o.mistake) for k, o in outcomes.items()] == [
        ("a", None, False),
        ("b", "ZeroDivisionError: as planned", False),
        ("c", "model is 'x': choose another", True),
        ("d", "cannot write: no space left on device", False),
        ("e", None, False),
    ]
    assert outcomes["e"].value == "e on cpu"
    assert [e.kind for e in events if e.key in "ab"] == ["started", "progress", "done", "started", "progress", "failed"]


@pytest.mark.parametrize("executor", BOTH)
def test_workers_that_die_and_jobs_that_fail(tmp_path: Path, executor: ExecutorSettings) -> None:
    events: list[Event] = []
    how = {"a": "good", "b": "poisoned", "c": "killed once", "d": "killed", "e": "wrong", "f": "exit", "g": "good"}
    if executor.kind == "local":
        how["h"] = "crashes"
    outcomes = run_jobs(jobs_of(tmp_path, **how), executor, events.append, device="cpu")
    assert {k: o.value for k, o in outcomes.items() if o.error is None} == {k: f"{k} on cpu" for k in "acg"}
    errors = {k: o.error for k, o in outcomes.items() if o.error is not None}
    crashed = errors.pop("h", None)
    assert errors.keys() == set("bdef") and all("\n" not in str(e) for e in errors.values())
    assert errors["b"] == "ZeroDivisionError: as planned" and errors["e"] == "model is 'x': choose another"
    assert str(errors["d"]).startswith("its worker died 2 times")
    assert [len((tmp_path / f"{k}.marks").read_text()) for k in "abcdeg"] == [1, 1, 2, 2, 1, 1]
    kinds = [e.kind for e in events if e.key == "c" and e.kind != "progress"]  # Ray loses what is said before a kill
    assert kinds == ["started", "died", "started", "done"]
    assert len({e.worker for e in events}) == 2 and {e.device for e in events} == {"cpu"}
    if executor.kind == "local":
        assert errors["d"] == "its worker died 2 times, at last killed by signal 9 (SIGKILL) (out of memory?)"
        assert str(crashed).startswith(
            "its worker died 2 times, at last killed by signal 11 (SIGSEGV) in string_at, called by"
        )
        assert errors["f"] == "its worker died 2 times, at last with exit code 3"


@pytest.mark.parametrize("executor", BOTH)
def test_a_job_that_hangs_has_its_worker_killed(tmp_path: Path, executor: ExecutorSettings) -> None:
    events: list[Event] = []
    jobs = jobs_of(tmp_path, a="hangs once", b="good", c="hangs")
    outcomes = run_jobs(jobs, replace(executor, timeout=0.5), events.append, device="cpu")
    assert outcomes["a"].value == "a on cpu" and outcomes["b"].value == "b on cpu"
    assert outcomes["c"].error == "its worker died 2 times, at last killed since it ran longer than 0.5 s"
    assert [len((tmp_path / f"{k}.marks").read_text()) for k in "abc"] == [2, 1, 2]
    kinds = [(e.kind, e.values.get("error")) for e in events if e.key == "a" and e.kind != "progress"]
    why = "its worker died, killed since it ran longer than 0.5 s; tried again"
    assert kinds == [("started", None), ("died", why), ("started", None), ("done", None)]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExecutorSettings:
    """By submitit's own stand-in on this machine; none of the files that it pickles may be read here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("submitit.core.utils.pickle_load", None)
    return ExecutorSettings("slurm", workers=4, slurm={"cluster": "local"})


def at_work_on(text: str) -> list[psutil.Process]:
    """Processes under this one with such a command."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [process] if text in " ".join(process.cmdline()) else []
    return found


def test_slurm_by_its_stand_in(tmp_path: Path, slurm: ExecutorSettings) -> None:
    """What dies is tried again, what hangs is killed, what is cancelled is submitted anew; no file and no process stays."""
    events: list[Event] = []
    modes: set[int] = set()

    def on_event(event: Event) -> None:
        events.append(event)
        for path in (tmp_path / "cache").rglob("*_submitted.pkl"):
            modes.update(folder.stat().st_mode & 0o777 for folder in (path.parent, *path.parents[1:4]))
            names = {str(name) for _, name, _ in pickletools.genops(path.read_bytes())}
            assert {n for n in names if "." in n and "/" not in n} <= {"submitit.core.utils", "autosparse.jobs.slurm"}
        if event.key == "d" and "rounds" in event.values and not any(e.key == "d" and e.kind == "died" for e in events):
            (command,) = at_work_on("/4.json")
            command.parents()[1].kill()  # what stands for Slurm

    how = {"a": "wrong", "b": "killed once", "c": "hangs once", "d": "hangs once"}
    outcomes = run_jobs(jobs_of(tmp_path, **how), replace(slurm, timeout=2.0), on_event, device="cpu", folder=tmp_path)
    assert {k: o.value for k, o in outcomes.items()} == {"a": None, **{k: f"{k} on cpu" for k in "bcd"}}
    assert outcomes["a"].error == "model is 'x': choose another" and outcomes["a"].mistake
    assert [len((tmp_path / f"{k}.marks").read_text()) for k in "abcd"] == [1, 2, 2, 2]
    died = {e.key: e.values["error"] for e in events if e.kind == "died"}
    assert died.keys() == set("bcd")
    assert died["b"] == "its worker died, killed by signal 9 (SIGKILL) (out of memory?); tried again"
    assert died["c"] == "its worker died, killed since it ran longer than 2 s; tried again"
    assert re.fullmatch(r"its worker died, Slurm job \d+ in state INTERRUPTED \(.+\); tried again", died["d"])
    assert modes == {0o700} and not list((tmp_path / "cache").rglob("slurm/*"))
    until(lambda: not at_work_on(str(tmp_path)))


def test_what_a_killed_driver_left_in_the_queue_ends(tmp_path: Path, slurm: ExecutorSettings) -> None:
    code = f"""
from pathlib import Path
from jobs import slow
from autosparse.jobs.executor import ExecutorSettings, Job, run_jobs
here = Path({str(tmp_path)!r})
jobs = [Job("a", slow, {{"place": here, "name": "a", "seconds": 600}})]
run_jobs(jobs, ExecutorSettings("slurm", slurm={{"cluster": "local"}}), device="cpu", folder=here)
"""
    driver = subprocess.Popen([sys.executable, "-c", code])
    file = tmp_path / "a.pid"
    until(lambda: driver.poll() is not None or (file.exists() and file.read_text() != ""))
    driver.kill()
    driver.wait()
    assert running(int(file.read_text()))
    run_jobs(jobs_of(tmp_path, b="good"), slurm, device="cpu", folder=tmp_path)
    until(lambda: not running(int(file.read_text())))
    assert not list((tmp_path / "cache").rglob("slurm/*"))


def test_jobs_as_json() -> None:
    """All that jobs of ours are given, read by a process that shares no memory."""
    warm = Candidate("movement@0.5", warmup=WarmupSettings(), scope="densities:erk")
    arguments = {
        "cell": replace(small_grid()[0], candidate=warm),
        "run": corpus(1)[0],
        "rule": (("x", 0.1), ("y", -1e-30)),
    }
    arguments |= {"path": Path("a/b").absolute(), "options": {"a": [1, None], 2: (True, "tuple")}, "none": None}
    job = Job("key", work, arguments)
    assert decode_job(json.loads(json.dumps(encode_job(job)))) == job
    with pytest.raises(AutoSparseError, match="a job is given Tensor, which cannot be sent"):
        encode_job(replace(job, arguments={"data": torch.zeros(1)}))
    with pytest.raises(AutoSparseError, match="is defined in a script: put it into a module"):
        encode_job(replace(job, function=lambda: None))


def test_a_job_waits_for_another(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, first="poisoned", a="order", b="order", c="good")
    jobs = [jobs[0], *(replace(job, after="first") for job in jobs[1:3]), replace(jobs[3], after="none of these")]
    events: list[Event] = []
    outcomes = run_jobs(jobs, LOCAL, events.append, device="cpu")
    assert [k for k, o in outcomes.items() if o.error] == ["first"]
    order = [(e.kind, e.key) for e in events]
    assert order.index(("failed", "first")) < order.index(("started", "a")) < order.index(("started", "b"))
    assert order.index(("started", "c")) == 1


def test_jobs_that_cannot_be_imported_fail(tmp_path: Path) -> None:
    def here(**_: Any) -> None: ...

    with pytest.raises(AttributeError):
        run_jobs([Job("a", here, {})], LOCAL, device="cpu")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_end_of_the_driver_ends_the_workers(tmp_path: Path, how: int) -> None:
    code = f"""
import signal, sys
from pathlib import Path
from jobs import slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
from autosparse.jobs.executor import ExecutorSettings, Job, run_jobs
jobs = [Job(n, slow, {{"place": Path({str(tmp_path)!r}), "name": n, "seconds": 600}}) for n in "abc"]
run_jobs(jobs, ExecutorSettings('local', workers=2), device="cpu")
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    files = [tmp_path / "a.pid", tmp_path / "b.pid"]
    until(lambda: driver.poll() is not None or all(f.exists() and f.read_text() for f in files))
    driver.send_signal(how)
    driver.wait()
    until(lambda: not any(running(int(f.read_text())) for f in files))
    assert not (tmp_path / "c.pid").exists()


def until(holds: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- campaigns and grids --------------------------------------------------------------------------------------------------


def corpus(seeds: int) -> list[Any]:
    settings = IRPSettings(rounds=2, density=0.2), SignalSettings(n_batches=1, batch_size=32)
    return runs([MODEL], DATA, RECIPE, *settings, list(range(seeds)))


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The records of `corpus(8)`, made one after another in this process."""
    return generate(corpus(8), tmp_path_factory.mktemp("serial"), device="cpu").records


def at_work() -> list[int]:
    """Processes under this one that do a job: those of Ray say so."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            names[int(folder.name)] = (folder / "cmdline").read_text()
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])

    def mine(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and mine(parents[pid]))

    own = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
    return own + [pid for pid, name in names.items() if "ray::_ray_job" in name and mine(pid)]


@pytest.mark.parametrize("executor", BOTH)
def test_a_worker_killed_in_a_corpus_changes_no_record(
    tmp_path: Path, executor: ExecutorSettings, serial: list[Path]
) -> None:
    """Eight runs and one that diverges on two workers, one of which is killed in the middle; and profiled."""
    todo = corpus(8)
    doomed = replace(todo[0], model=ModelSettings("mlp", 8), recipe=replace(RECIPE, lr=1e20))
    events: list[Event] = []

    def kill_one(event: Event) -> None:
        events.append(event)
        kinds = [e.kind for e in events]
        if event.kind == "progress" and kinds.count("done") >= 2 and "died" not in kinds and (workers := at_work()):
            os.kill(workers[0], signal.SIGKILL)

    out = tmp_path / "spread"
    executor = replace(executor, retries=3)
    spread = generate(
        [*todo, doomed], out, device="cpu", executor=executor, profile=tmp_path / "profile", on_event=kill_one
    )
    assert [p.name for p in spread.records] == [p.name for p in serial] and len(serial) == 8
    for a, b in zip(serial, spread.records, strict=True):
        same(a, b)
    assert list(spread.failures) == [doomed.label()] and "training diverged" in spread.failures[doomed.label()]
    dead = {e.key for e in events if e.kind == "died"}
    assert dead and all([e.kind for e in events if e.key == key][-1] == "done" for key in dead)
    assert {e.worker for e in events} == {0, 1}
    (found,) = statuses(out)
    assert not found.alive and [job.state for job in found.jobs] == ["done"] * 8 + ["failed"]
    assert list((tmp_path / "profile").glob("worker[01]/trace.json.gz"))


def test_a_full_disk_fails_runs_and_leaves_them_whole(tmp_path: Path, serial: list[Path]) -> None:
    """A limit on the size of files stands for it: HDF5 itself would crash."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        campaign = generate(corpus(2), tmp_path, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not campaign.records and len(campaign.failures) == 2
    assert all("File too large; free space" in reason for reason in campaign.failures.values())
    assert not list((tmp_path / "records").glob(".*.tmp"))
    for a, b in zip(generate(corpus(2), tmp_path, device="cpu").records, serial[:2], strict=True):
        same(a, b)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A result without how long it took."""
    return {k: v for k, v in json.loads(json.dumps(row)).items() if not k.endswith("_seconds")}


def test_grids_are_the_same_by_every_executor(tmp_path: Path) -> None:
    """With a method and two variants of it, which share one search; and a cell that fails."""
    irp = Candidate("irp", options={"rounds": 2})
    shared = [Candidate(f"{variant}:irp", options={"rounds": 2}) for variant in ("densities", "reinit")]
    greedy = Candidate("snip", label="greedy", floor=0.2)
    cells = grid([MODEL], DATA, RECIPE, [shared[0], irp, shared[1], Candidate("snip"), greedy], [0.8], [0, 1])
    data = load_data(DATA)
    inline = run_grid(cells, tmp_path / "inline", data, device="cpu")
    counts: list[int] = []
    local = run_grid(
        cells, tmp_path / "local", data, device="cpu", executor=LOCAL, on_cell=lambda n, *_: counts.append(n)
    )
    assert [plain_row(r) for r in inline] == [plain_row(r) for r in local]
    assert counts == list(range(1, 13)) and sum(bool(r["error"]) for r in local) == 2
    for seed in (0, 1):
        seconds = {r["mask_seconds"] for r in local if "irp" in r["criterion"] and r["seed"] == seed}
        assert len(seconds) == 1, "one search for the three"
    (found,) = statuses(tmp_path / "local")
    assert {s: found.count(s) for s in ("done", "failed", "running", "waiting")} == {
        "done": 10,
        "failed": 2,
        "running": 0,
        "waiting": 0,
    }
    assert all("floor 0.2 needs" in job.detail for job in found.jobs if job.state == "failed")


def test_a_grid_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is full nothing is written: no result, no table, no journal."""
    cells = grid([MODEL], DATA, RECIPE, [Candidate("random"), Candidate("snip")], [0.8], [0])
    data, real, full = load_data(DATA), os.replace, False

    def replaced(source: Path, target: Path) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    def fill(event: Event) -> None:
        nonlocal full
        if event.kind in ("started", "progress"):
            full = "_random_" in event.key

    monkeypatch.setattr(os, "replace", replaced)
    dense, random, snip = run_grid(cells, tmp_path / "full", data, device="cpu", on_event=fill)
    assert "No space left on device" in random["error"] and not dense["error"] and not snip["error"]
    with (tmp_path / "full" / "results.csv").open(newline="") as file:
        assert [bool(row["error"]) for row in csv.DictReader(file)] == [False, True, False]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "full" / "cells").iterdir()}
    again = run_grid(cells, tmp_path / "full", data, device="cpu")
    assert len(before) == 2 and all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [plain_row(r) for r in again] == [plain_row(r) for r in run_grid(cells, tmp_path / "b", data, device="cpu")]


def test_a_killed_grid_goes_on_and_does_nothing_twice(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from test_executor import DATA, LOCAL, load_data, run_grid, small_grid
run_grid(small_grid(), Path({str(tmp_path / "killed")!r}), load_data(DATA), device="cpu", executor=LOCAL)
"""
    driver = subprocess.Popen([sys.executable, "-c", code])
    cells = tmp_path / "killed" / "cells"
    until(lambda: driver.poll() is not None or len(list(cells.glob("*.json"))) >= 2)
    driver.kill()
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    (found,) = statuses(tmp_path / "killed")
    assert not found.alive and found.count("running") == found.count("failed") == 0
    assert 2 <= len(before) <= found.count("done") < len(small_grid())
    data = load_data(DATA)
    again = run_grid(small_grid(), tmp_path / "killed", data, device="cpu")
    whole = run_grid(small_grid(), tmp_path / "whole", data, device="cpu")
    assert [plain_row(r) for r in again] == [plain_row(r) for r in whole]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "nothing was done twice"
    assert len((tmp_path / "killed" / "results.csv").read_text().splitlines()) == 1 + len(small_grid())


def small_grid() -> list[Cell]:
    return grid([MODEL], DATA, RECIPE, [Candidate("random"), Candidate("snip")], [0.5, 0.8], [0, 1, 2])


def test_a_killed_campaign_goes_on_and_does_nothing_twice(tmp_path: Path, serial: list[Path]) -> None:
    values = {
        "output": str(tmp_path / "out"),
        "models": [{"name": "convnet", "width": 4}],
        "data": {"name": "digits", "limit": 300, "limit_test": 100},
        "recipe": {"epochs": 1, "batch_size": 50, "lr": 0.05, "schedule": "cosine"},
        "irp": {"rounds": 2, "density": 0.2},
        "signals": {"n_batches": 1, "batch_size": 32},
        "seeds": [0, 1, 2],
        "executor": "local",
        "device": "cpu",
        "tracking": False,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "data_gen", str(tmp_path / "c.yaml")]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def some_done() -> bool:
        if not (tmp_path / "out" / FOLDER / "plan.json").exists():
            return False
        (found,) = statuses(tmp_path / "out")
        return found.count("done") >= 1

    until(some_done)
    driver.kill()
    driver.wait()
    (found,) = statuses(tmp_path / "out")
    done = {tmp_path / "out" / "records" / f"{j.key}.h5" for j in found.jobs if j.state == "done"}
    before = {path: path.stat().st_mtime_ns for path in done}
    assert not found.alive and found.count("running") == 0 and found.count("done") + found.count("waiting") == 3
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and "records: 3 complete" in answer.stdout, answer.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == before, "nothing was done twice"
    for path in serial[:3]:
        same(path, tmp_path / "out" / "records" / path.name)
    assert not [p for p in (tmp_path / "out" / "records").iterdir() if p.name.endswith((".tmp", ".state"))]


# -- status -------------------------------------------------------------------------------------------------------------


def test_status_while_it_runs_and_after(tmp_path: Path) -> None:
    places = {name: tmp_path / "cells" / f"{name}.json" for name in "abcd"}
    (tmp_path / "cells" / "d.state").mkdir(parents=True)
    with journal(tmp_path, places) as book:
        for name in "abc":
            book.note(Event("started", name, 1, "cuda:1"))
        places["a"].write_text("{}")
        book.note(Event("done", "a", 1, "cuda:1", {"value": {}}))
        book.note(Event("failed", "b", 1, "cuda:1", {"error": "ZeroDivisionError: x", "traceback": "…"}))
        book.note(Event("progress", "c", 1, "cuda:1", {"round": 2, "rounds": 5, "density": 0.25, "accuracy": 0.5}))
        book.write()
        (found,) = statuses(tmp_path)
        assert found.alive and [(j.key, j.state) for j in found.jobs] == [
            ("a", "done"),
            ("b", "failed"),
            ("c", "running"),
            ("d", "waiting"),
        ]
        assert found.jobs[1].detail == "ZeroDivisionError: x" and "will resume from its last" in found.jobs[3].detail
        assert found.jobs[2].detail.startswith("worker 1 (cuda:1), 0:00:0")
        assert found.jobs[2].detail.endswith(": round 2/5, density 0.250, accuracy 50.0 %")
        with pytest.raises(AutoSparseError, match="is being written by another process"), journal(tmp_path, places):
            pass
    (found,) = statuses(tmp_path.parent / tmp_path.name)
    assert not found.alive and [j.state for j in found.jobs] == ["done", "failed", "waiting", "waiting"]


def test_many_events_cost_few_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = status.write_json

    def counted(path: Path, value: Any) -> None:
        written.append(len(value.get("failed", ())))
        real(path, value)

    monkeypatch.setattr(status, "write_json", counted)
    names = [f"j{index}" for index in range(5_000)]
    with pytest.raises(KeyboardInterrupt), journal(tmp_path, {n: tmp_path / f"{n}.json" for n in names}) as book:
        for name in names:
            book.note(Event("started", name, 0, "cpu"))
            book.note(Event("failed", name, 0, "cpu", {"error": "as planned"}))
        raise KeyboardInterrupt
    assert len(written) < 100 and written[-1] == 5_000, "the last is told, whatever ended the work"
    (found,) = statuses(tmp_path)
    assert found.count("failed") == 5_000


def test_what_changed_is_written_while_nothing_happens(tmp_path: Path) -> None:
    """A job that starts right after another's and runs for hours is not waiting."""
    with journal(tmp_path, {n: tmp_path / f"{n}.json" for n in "ab"}) as book:
        for name in "ab":
            book.note(Event("started", name, 0, "cpu"))
        until(lambda: statuses(tmp_path)[0].count("running") == 2)


def test_the_last_write_tells_of_a_full_disk() -> None:
    def full() -> None:
        raise AutoSparseFailure("cannot write: no space left on device")

    with pytest.raises(AutoSparseFailure, match="no space"), kept_up(full) as changed:
        changed()
    with pytest.raises(KeyboardInterrupt), kept_up(full):
        raise KeyboardInterrupt


def test_a_full_disk_does_not_stop_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise AutoSparseFailure("cannot write: no space left on device")

    with journal(tmp_path, {"a": tmp_path / "a.json"}) as book:
        monkeypatch.setattr("autosparse.jobs.status.write_json", full)
        book.note(Event("started", "a", 0, "cpu"))


def test_a_directory_without_jobs_is_told(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(AutoSparseError, match="no campaign or grid under"):
            statuses(place)
