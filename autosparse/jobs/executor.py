"""Many independent jobs: one after another here, in processes of their own, on a Ray or on a Slurm cluster."""

from __future__ import annotations

import importlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError, AutoSparseFailure, first_line, require, settings, suggest

# The module of each kind, whose `run(queue, executor, device, planned, folder)` does the jobs of the queue.
EXECUTORS = {
    "inline": "autosparse.jobs.inline",
    "local": "autosparse.jobs.local",
    "ray": "autosparse.jobs.ray",
    "slurm": "autosparse.jobs.slurm",
}


@settings
class ExecutorSettings:
    """Where jobs run, and how many at once. Results are the same, bit for bit on the same device and CPU threads.

    `kind`: `"inline"` (one after another in this process, for debugging: a crash of a compiled library ends the command,
    with the Python stack on standard error), `"local"` (processes on this machine), `"ray"` (package `ray`) or `"slurm"`
    (package `submitit`). `workers`: jobs at once on each device; on a Ray cluster without GPUs, in the whole cluster; on
    Slurm, jobs in its queue. `None`: one for each GPU, or as many as there are CPU cores, jobs and memory for; 100 on
    Slurm. `devices` of `"local"`, such as `["cuda:0", "cuda:1"]`, or `["cuda:0,1", "cuda:2,3"]` for trainings on two GPUs
    each: `None` takes all GPUs where the command's device is `auto` or `cuda` and there are some, else that device. The CPU
    cores are shared out evenly among the workers, or each takes `OMP_NUM_THREADS`; small networks take one thread whatever
    their share, and so give the same bits with any number of workers (sums of floats by another number of threads differ in
    the last bits). `retries`: how many times a job is tried again after its worker died. `timeout`: after how many seconds
    at one job its worker is killed, which counts as a death. `address` of an existing Ray cluster; `None` starts a local
    one. `slurm`: what each Slurm job asks for, in submitit's words (`timeout_min`, `mem_gb`, `cpus_per_task`,
    `gpus_per_node`, `slurm_partition`, …); its key `cluster` may be `local`, which tries the settings out on this machine.
    """

    kind: str = "local"
    workers: int | None = None
    devices: tuple[str, ...] | None = None
    retries: int = 1
    timeout: float | None = None
    address: str | None = None
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inline = self.kind == "inline"
        several = "set executor.kind: local, ray or slurm"
        for name, good, way_out in (
            ("kind", self.kind in EXECUTORS, suggest(self.kind, EXECUTORS)),
            ("workers", self.workers is None or self.workers >= 1, "give at least 1, or leave it out"),
            ("retries", self.retries >= 0, "it must not be negative"),
            ("workers", not inline or self.workers in (None, 1), several),
            ("timeout", not inline or self.timeout is None, several),
            ("timeout", self.timeout is None or self.timeout > 0, "give seconds, or leave it out"),
            ("devices", self.devices is None or self.kind == "local", "only kind local takes devices"),
            ("devices", self.devices != (), "give at least one, or leave it out"),
            ("address", self.address is None or self.kind == "ray", "only kind ray takes an address"),
            ("slurm", not self.slurm or self.kind == "slurm", "only kind slurm takes what a Slurm job asks for"),
        ):
            require(good, f"executor.{name}", getattr(self, name), way_out)


INLINE = ExecutorSettings("inline")


@dataclass(frozen=True)
class Job:
    """`function(**arguments, device=…, progress=…)`, which writes one result file in one step and returns plain values.

    `function` is importable by its name and finds by itself what an earlier try left; `progress` takes plain values.
    `after`: the key of a job to wait for, whatever comes of it.
    """

    key: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    after: str | None = None


@dataclass(frozen=True)
class Event:
    """Something that happened to a job: `kind` is started, progress, died (and tried again), done or failed.

    `values`: of progress, what the job gave; of done, its `value`; of died and failed, the `error` in one line.
    """

    kind: str
    key: str
    worker: int
    device: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a job returned, or why it failed; `mistake`: through wrong input."""

    value: Any = None
    error: str | None = None
    mistake: bool = False


def run_jobs(
    jobs: Sequence[Job],
    executor: ExecutorSettings,
    on_event: Callable[[Event], None] | None = None,
    *,
    device: str = "auto",
    profile: Path | None = None,
    planned: int | None = None,
    folder: Path | None = None,
) -> dict[str, Outcome]:
    """Run the jobs and give what came of each, by key; one that fails does not stop the rest.

    A job whose worker died (killed, out of memory, longer than `executor.timeout`) is tried again up to
    `executor.retries` times; one that raised is not. An interrupt or SIGTERM ends all workers at once, as does the end
    of this process by whatever means (jobs on Slurm outlive a kill; see `folder`).

    Args:
        profile: directory into which worker N profiles its first job, as `workerN`; see `training.profile`.
        planned: how many jobs there are with those that are done already.
        folder: directory that this process works on alone; jobs that a killed process left on Slurm for it are cancelled.

    Raises:
        AutoSparseError: the executor cannot start: a device that is not there, a package that is missing, no cluster.
        KeyboardInterrupt: stopped.
    """
    queue = JobQueue(jobs, executor, on_event or (lambda event: None), profile)
    if jobs:
        with _terminable():
            module = importlib.import_module(EXECUTORS[executor.kind])
            module.run(queue, executor, device, planned or len(jobs), folder)
    return queue.outcomes


class JobQueue:
    """The jobs that wait, and the outcomes of the others. Whatever is recorded is reported as an event."""

    def __init__(
        self,
        jobs: Sequence[Job],
        executor: ExecutorSettings,
        on_event: Callable[[Event], None],
        profile: Path | None,
    ) -> None:
        self.waiting = list(jobs)
        self.outcomes: dict[str, Outcome] = {}
        self._keys = {job.key for job in jobs}
        self._executor = executor
        self._deaths: dict[str, int] = {}
        self._on_event = on_event
        self._profile = profile
        self._profiled: set[int] = set()

    def take(self, worker: int, device: str) -> Job | None:
        """The next job that may start, if any."""
        for index, job in enumerate(self.waiting):
            if job.after is None or job.after not in self._keys or job.after in self.outcomes:
                self._on_event(Event("started", job.key, worker, device))
                return self.waiting.pop(index)
        return None

    def profile(self, worker: int) -> Path | None:
        """Where the worker profiles the job that it is given now, if it is its first."""
        if self._profile is None or worker in self._profiled:
            return None
        self._profiled.add(worker)
        return self._profile / f"worker{worker}"

    def overdue(self, since: float) -> str | None:
        """Why a job that began then (by the monotonic clock) must die now, if so."""
        limit = self._executor.timeout
        over = limit is not None and time.monotonic() - since > limit
        return f"killed since it ran longer than {limit:g} s" if over else None

    def record(self, job: Job, worker: int, device: str, kind: str, values: Mapping[str, Any]) -> None:
        if kind == "done":
            self.outcomes[job.key] = Outcome(values["value"])
        elif kind == "failed":
            self.outcomes[job.key] = Outcome(error=values["error"], mistake=values.get("mistake", False))
        self._on_event(Event(kind, job.key, worker, device, values))

    def record_death(self, job: Job, worker: int, device: str, why: str) -> None:
        deaths = self._deaths[job.key] = self._deaths.get(job.key, 0) + 1
        if deaths > self._executor.retries:
            times = "once" if deaths == 1 else f"{deaths} times"
            self.record(job, worker, device, "failed", {"error": f"its worker died {times}, at last {why}"})
        else:
            self.waiting.insert(0, job)
            self._on_event(Event("died", job.key, worker, device, {"error": f"its worker died, {why}; tried again"}))


def perform(
    job: Job, device: str, progress: Callable[[Mapping[str, Any]], None], profile: Path | None = None
) -> tuple[str, dict[str, Any]]:
    """Do the job here: `"done"` with its `value`, or `"failed"` with the `error` in one line."""
    try:
        with nullcontext() if profile is None else _profiling(profile):
            return "done", {"value": job.function(**job.arguments, device=device, progress=progress)}
    except (AutoSparseError, AutoSparseFailure) as error:
        return "failed", {"error": str(error), "mistake": isinstance(error, AutoSparseError)}
    except Exception as error:
        return "failed", bug(error)


def _profiling(directory: Path) -> AbstractContextManager[Any]:
    from autosparse.training.profile import profiling

    return profiling(directory)


def bug(error: BaseException) -> dict[str, Any]:
    """What a failed job says of an exception that nobody expected."""
    text = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {first_line(error)}", "traceback": text}


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
