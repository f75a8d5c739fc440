"""Many independent jobs: one after another here, in processes of their own, or on a Ray cluster."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError, AutoSparseFailure, first_line, require, settings, suggest
from autosparse.processes import (
    cores,
    heed_the_end,
    how_it_ended,
    memory_for,
    set_threads,
    start_context,
    thread_limit,
    uninterrupted,
)
from autosparse.training.devices import device_names

KINDS = ("inline", "local", "ray")


@settings
class ExecutorSettings:
    """Where jobs run, and how many at once; what comes out is the same, bit for bit on the same device and CPU threads.

    `kind`: `"inline"` (one after another in this process, for debugging: a crash of a compiled library ends the command,
    with the Python stack on standard error), `"local"` (processes on this machine) or `"ray"` (package
    `ray`). `workers` jobs at once for each device; on a Ray cluster without GPUs, in the whole cluster. `None`: one for
    each GPU, or as many as there are CPU cores, jobs and memory for. `devices` of `"local"`, such as
    `["cuda:0", "cuda:1"]`, or `["cuda:0,1", "cuda:2,3"]` for trainings on two GPUs each: `None` takes all GPUs
    where the command's device is `auto` or `cuda` and there are some, else that device. The CPU cores are shared out
    evenly among the workers, or each takes `OMP_NUM_THREADS`; small networks take one thread whatever their share, and so
    give the same bits by any number of workers (sums of floats by another number of threads differ in the last bits). `retries`: how many times a job is tried again after its worker died. `timeout`: after how many
    seconds at one job its worker is killed, a death too. `address` of an existing Ray cluster; `None` starts a local one.
    """

    kind: str = "local"
    workers: int | None = None
    devices: tuple[str, ...] | None = None
    retries: int = 1
    timeout: float | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "executor.kind", self.kind, suggest(self.kind, KINDS))
        require(
            self.workers is None or self.workers >= 1,
            "executor.workers",
            self.workers,
            "give at least 1, or leave it out",
        )
        require(self.retries >= 0, "executor.retries", self.retries, "it must not be negative")
        inline = self.kind == "inline"
        require(
            not inline or self.workers in (None, 1), "executor.workers", self.workers, "set executor.kind: local or ray"
        )
        given = self.timeout is not None
        require(not given or not inline, "executor.timeout", self.timeout, "set executor.kind: local or ray")
        require(
            self.timeout is None or self.timeout > 0, "executor.timeout", self.timeout, "give seconds, or leave it out"
        )
        given = self.devices is not None
        require(not given or self.kind == "local", "executor.devices", self.devices, "only kind local takes devices")
        require(self.devices != (), "executor.devices", self.devices, "give at least one, or leave it out")
        given = self.address is not None
        require(not given or self.kind == "ray", "executor.address", self.address, "only kind ray takes an address")


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
) -> dict[str, Outcome]:
    """Run the jobs and give what came of each, by key; one that fails does not stop the rest.

    A job whose worker died (killed, out of memory, longer than `executor.timeout`) is tried again up to
    `executor.retries` times; one that raised is not. An interrupt or SIGTERM ends all workers at once, as does the end
    of this process by whatever means.

    Args:
        profile: directory into which worker N profiles its first job, as `workerN`; see `training.profile`.
        planned: how many jobs there are with those that are done already.

    Raises:
        AutoSparseError: the executor cannot start: a device that is not there, no `ray`, no cluster at the address.
        KeyboardInterrupt: stopped.
    """
    book = _Book(jobs, executor, on_event or (lambda event: None), profile)
    if jobs:
        with _terminable():
            {"inline": _inline, "local": _local, "ray": _ray}[executor.kind](
                book, executor, device, planned or len(jobs)
            )
    return book.outcomes


class _Book:
    """Which jobs wait and what came of the others; every entry is an event."""

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
        self._tell = on_event
        self._profile = profile
        self._profiled: set[int] = set()

    def take(self, worker: int, device: str) -> Job | None:
        """The next job that may start, if any."""
        for index, job in enumerate(self.waiting):
            if job.after is None or job.after not in self._keys or job.after in self.outcomes:
                self._tell(Event("started", job.key, worker, device))
                return self.waiting.pop(index)
        return None

    def profile(self, worker: int) -> Path | None:
        """Where the worker profiles the job that it is given now, if it is its first."""
        if self._profile is None or worker in self._profiled:
            return None
        self._profiled.add(worker)
        return self._profile / f"worker{worker}"

    def late(self, since: float) -> str | None:
        """Why a job that began then (by the monotonic clock) must die now, if so."""
        limit = self._executor.timeout
        over = limit is not None and time.monotonic() - since > limit
        return f"killed since it ran longer than {limit:g} s" if over else None

    def heard(self, job: Job, worker: int, device: str, kind: str, values: Mapping[str, Any]) -> None:
        if kind == "done":
            self.outcomes[job.key] = Outcome(values["value"])
        elif kind == "failed":
            self.outcomes[job.key] = Outcome(error=values["error"], mistake=values.get("mistake", False))
        self._tell(Event(kind, job.key, worker, device, values))

    def died(self, job: Job, worker: int, device: str, why: str) -> None:
        deaths = self._deaths[job.key] = self._deaths.get(job.key, 0) + 1
        if deaths > self._executor.retries:
            times = "once" if deaths == 1 else f"{deaths} times"
            self.heard(job, worker, device, "failed", {"error": f"its worker died {times}, at last {why}"})
        else:
            self.waiting.insert(0, job)
            self._tell(Event("died", job.key, worker, device, {"error": f"its worker died, {why}; tried again"}))


def _perform(
    job: Job, device: str, progress: Callable[[Mapping[str, Any]], None], profile: Path | None = None
) -> tuple[str, dict[str, Any]]:
    try:
        with nullcontext() if profile is None else _profiling(profile):
            return "done", {"value": job.function(**job.arguments, device=device, progress=progress)}
    except (AutoSparseError, AutoSparseFailure) as error:
        return "failed", {"error": str(error), "mistake": isinstance(error, AutoSparseError)}
    except Exception as error:
        return "failed", _bug(error)


def _profiling(directory: Path) -> AbstractContextManager[Any]:
    from autosparse.training.profile import profiling

    return profiling(directory)


def _bug(error: BaseException) -> dict[str, Any]:
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


# -- inline -------------------------------------------------------------------------------------------------------------


def _inline(book: _Book, executor: ExecutorSettings, device: str, planned: int) -> None:
    while (job := book.take(0, device)) is not None:

        def progress(values: Mapping[str, Any], job: Job = job) -> None:
            book.heard(job, 0, device, "progress", values)

        book.heard(job, 0, device, *_perform(job, device, progress))


# -- processes --------------------------------------------------------------------------------------------------------


def _local(book: _Book, executor: ExecutorSettings, device: str, planned: int) -> None:
    from multiprocessing.connection import wait

    devices = _devices(executor, device)
    workers, threads = _shares(executor, devices, len(book.waiting), planned)
    places = [place for _ in range(workers) for place in devices]
    team: dict[int, _Worker] = {}
    busy: dict[int, Job] = {}
    begun: dict[int, float] = {}
    pause = None if executor.timeout is None else 1.0
    try:
        while book.waiting or busy:
            for number, place in enumerate(places):
                if number in busy or (job := book.take(number, place)) is None:
                    continue
                if number in team and not team[number].process.is_alive():  # killed while it had nothing to do
                    team.pop(number).end()
                if number not in team:
                    team[number] = _Worker(place, threads)
                busy[number] = job
                team[number].give(job, book.profile(number))
            wait([waitable for number in busy for waitable in team[number].waitables()], pause)
            for number, job in list(busy.items()):
                place = places[number]
                for kind, values in team[number].messages():
                    if kind == "began":
                        begun[number] = time.monotonic()
                        continue
                    if kind == "died":
                        book.died(job, number, place, values["error"])
                    else:
                        book.heard(job, number, place, kind, values)
                    if kind != "progress":
                        del busy[number]
                        begun.pop(number, None)
                    if kind == "died" or "traceback" in values:  # a bug may leave its process (CUDA) in any state
                        team.pop(number).end()
                if number in begun and (why := book.late(begun[number])) is not None:
                    team.pop(number).end()
                    del busy[number], begun[number]
                    book.died(job, number, place, why)
    finally:
        for worker in team.values():
            worker.process.terminate()
        for worker in team.values():
            worker.end()


def _devices(executor: ExecutorSettings, device: str) -> tuple[str, ...]:
    """Those given, or all GPUs, or `device`; one that is not there would fail all jobs of the others."""
    chosen = executor.devices or (device,)
    if not any(name.startswith(("auto", "cuda")) for name in chosen):
        return chosen
    import torch

    gpus = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    if executor.devices is None and device in ("auto", "cuda") and gpus:
        return gpus
    for name in itertools.chain.from_iterable(map(device_names, chosen)):
        there = not name.startswith("cuda") or name in gpus or (name == "cuda" and bool(gpus))
        require(there, "device", name, f"this machine has {', '.join(gpus) or 'no GPU; use cpu'}")
    return chosen


def jobs_at_once(executor: ExecutorSettings, device: str, jobs: int) -> int:
    """How many of `jobs` are done at the same time; on Ray, if the cluster is this machine."""
    if executor.kind == "inline":
        return 1
    devices = _devices(executor, device)
    return _shares(executor, devices, jobs, jobs)[0] * len(devices)


def _shares(executor: ExecutorSettings, devices: Sequence[str], jobs: int, planned: int) -> tuple[int, int]:
    """How many of `jobs` each device does at once, and the most CPU threads of each.

    The threads follow from all `planned` jobs: those that a second start finds left have the threads they would have had.
    """
    if executor.workers is not None:
        return executor.workers, thread_limit(executor.workers * len(devices))
    if not all(name.startswith(("auto", "cpu")) for name in devices):  # `auto` stands here where there is no GPU
        return 1, thread_limit(len(devices))
    processes = sum(len(device_names(name)) for name in devices)
    threads = thread_limit(len(devices) * max(1, min(planned, cores() // processes)))
    return max(1, min(jobs, cores() // max(threads, processes), memory_for(processes))), threads


class _Worker:
    """A process that does one job at a time."""

    def __init__(self, device: str, threads: int) -> None:
        context = start_context()
        self.connection, theirs = context.Pipe()
        self._stack = tempfile.NamedTemporaryFile(prefix="autosparse-", suffix=".stack")  # noqa: SIM115
        arguments = (theirs, device, threads, self._stack.name)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with uninterrupted():
            self.process.start()
        theirs.close()

    def waitables(self) -> list[Any]:
        return [self.connection, self.process.sentinel]

    def give(self, job: Job, profile: Path | None) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # that it died is told by `messages`
            self.connection.send((job, profile))

    def messages(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What it has said; lastly that it died, if it did before the end of its job."""
        kind = ""
        alive = self.process.is_alive()  # asked before: what it said is in the pipe
        try:
            while kind not in ("done", "failed") and self.connection.poll():
                kind, values = self.connection.recv()
                yield kind, values
        except (EOFError, OSError):
            alive = False
        if not alive and kind not in ("done", "failed"):
            self.process.join()
            stack = Path(self._stack.name).read_text(encoding="utf-8", errors="replace")
            yield "died", {"error": how_it_ended(self.process.exitcode, stack)}

    def end(self) -> None:
        self.process.terminate()
        self.process.join(3)
        self.process.kill()
        self.process.join()
        self.connection.close()
        self._stack.close()


def _serve(connection: Any, device: str, threads: int, stack: str) -> None:
    import faulthandler
    import multiprocessing

    crashes = open(stack, "w", encoding="utf-8")  # noqa: SIM115 as long as the process lives, for what it was doing when it crashed
    faulthandler.enable(crashes)
    heed_the_end()
    multiprocessing.current_process().daemon = False  # to the driver it is one; but a daemon may not start ranks
    set_threads(threads)
    while True:
        try:
            job, profile = connection.recv()
        except EOFError:
            return
        except Exception as error:  # the function cannot be imported here
            connection.send(("failed", _bug(error)))
            continue
        connection.send(("began", {}))
        kind, values = _perform(job, device, lambda values: connection.send(("progress", values)), profile)
        connection.send((kind, values))


# -- Ray ----------------------------------------------------------------------------------------------------------------


def _ray(book: _Book, executor: ExecutorSettings, device: str, planned: int) -> None:
    require(
        len(device_names(device)) == 1, "device", device, "a job on Ray has one device; use cuda, or executor local"
    )
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        try:
            dashboard = False if executor.address is None else None
            ray.init(
                address=executor.address or "local",
                log_to_driver=False,
                logging_level="WARNING",
                include_dashboard=dashboard,
            )
        except Exception as error:  # whatever it raises when nobody answers
            raise AutoSparseError(
                f"executor.address is {executor.address!r}: {first_line(error)}; start a cluster there, or leave it out"
            ) from error
    running: dict[Any, tuple[Job, int]] = {}
    begun: dict[Any, float] = {}  # not those that Ray lets wait
    killed: dict[Any, str] = {}
    try:
        place, slots, options, threads = _ray_shares(ray, executor, device, planned)
        task = ray.remote(_ray_job).options(num_returns="streaming", max_retries=0, **options)
        free = list(range(slots))[::-1]
        while book.waiting or running:
            while free and (job := book.take(free[-1], place)) is not None:
                number = free.pop()
                running[task.remote(job, place, threads, os.getcwd(), book.profile(number))] = job, number
            ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            for stream in ready:
                job, number = running[stream]
                try:
                    kind, values = ray.get(next(stream))
                except (ray.exceptions.RayError, StopIteration) as error:
                    why = killed.pop(stream, f"{type(error).__name__}: {first_line(error)}")
                    kind, values = "died", {"error": why}
                if kind == "began":
                    begun[stream] = time.monotonic()
                    continue
                if kind != "progress":
                    del running[stream]
                    begun.pop(stream, None)
                    free.append(number)
                if kind == "died":
                    book.died(job, number, place, values["error"])
                else:
                    book.heard(job, number, place, kind, values)
            for stream, since in begun.items():
                if stream not in killed and (late := book.late(since)) is not None:
                    killed[stream] = late
                    ray.cancel(stream, force=True)  # that it died is told when it did: two tries must not overlap
    finally:
        for stream in running:
            with suppress(Exception):
                ray.cancel(stream, force=True)
        if started:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise AutoSparseError(
            "executor.kind is 'ray': the package ray is not installed; pip install 'autosparse[ray]', or use local"
        ) from error
    return ray


def _ray_shares(
    ray: Any, executor: ExecutorSettings, device: str, planned: int
) -> tuple[str, int, dict[str, float], int]:
    """Device, jobs at once, resources and threads of each job."""
    total = ray.cluster_resources()
    nodes = [int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]]
    kind = device.partition(":")[0]
    if kind == "cuda" or (kind == "auto" and total.get("GPU", 0) >= 1):
        require(total.get("GPU", 0) >= 1, "device", device, "the Ray cluster has no GPU; use cpu")
        workers = executor.workers or 1
        slots = int(total["GPU"]) * workers
        threads = max(1, min(int(total.get("CPU", 1)) // slots, *nodes))
        return "cuda", slots, {"num_gpus": 1 / workers, "num_cpus": threads}, threads
    cpus = int(total.get("CPU", 1))
    workers = min(executor.workers or min(cpus, planned), cpus)
    threads = max(1, min(cpus // workers, *nodes))
    return device, workers, {"num_cpus": threads}, threads


def _ray_job(
    job: Job, device: str, threads: int, folder: str, profile: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a job says, as it says it; paths mean what they mean to the driver, on a file system that both see."""
    said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            os.chdir(folder)
        except OSError as error:
            said.put(("failed", {"error": f"folder {folder} is not on this node ({error}): use a shared one"}))
            return
        set_threads(threads)
        try:
            said.put(_perform(job, device, lambda values: said.put(("progress", values)), profile))
        except BaseException as error:  # a SystemExit would end this thread without a word
            said.put(("failed", _bug(error)))

    yield "began", {}
    threading.Thread(target=work, daemon=True).start()
    kind = ""
    while kind not in ("done", "failed"):
        kind, values = said.get()
        yield kind, values
