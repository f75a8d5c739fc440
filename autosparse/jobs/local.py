"""The executor `local`: processes on this machine, each with a device, which do one job after another."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from autosparse.errors import require
from autosparse.jobs.executor import ExecutorSettings, Job, JobQueue, bug, perform
from autosparse.processes import (
    cores,
    describe_exit,
    exit_with_parent,
    memory_for,
    set_threads,
    start_context,
    thread_limit,
    uninterrupted,
)
from autosparse.training.devices import device_names


def run(queue: JobQueue, executor: ExecutorSettings, device: str, planned: int, folder: Path | None) -> None:
    from multiprocessing.connection import wait

    devices = _devices(executor, device)
    workers, threads = _shares(executor, devices, len(queue.waiting), planned)
    places = [place for _ in range(workers) for place in devices]
    team: dict[int, _Worker] = {}
    busy: dict[int, Job] = {}
    begun: dict[int, float] = {}
    pause = None if executor.timeout is None else 1.0
    try:
        while queue.waiting or busy:
            for number, place in enumerate(places):
                if number in busy or (job := queue.take(number, place)) is None:
                    continue
                if number in team and not team[number].process.is_alive():  # killed while it had nothing to do
                    team.pop(number).end()
                if number not in team:
                    team[number] = _Worker(place, threads)
                busy[number] = job
                team[number].give(job, queue.profile(number))
            wait([waitable for number in busy for waitable in team[number].waitables()], pause)
            for number, job in list(busy.items()):
                place = places[number]
                for kind, values in team[number].messages():
                    if kind == "began":
                        begun[number] = time.monotonic()
                        continue
                    if kind == "died":
                        queue.record_death(job, number, place, values["error"])
                    else:
                        queue.record(job, number, place, kind, values)
                    if kind != "progress":
                        del busy[number]
                        begun.pop(number, None)
                    if kind == "died" or "traceback" in values:  # a bug may leave its process (CUDA) in any state
                        team.pop(number).end()
                if number in begun and (why := queue.overdue(begun[number])) is not None:
                    team.pop(number).end()
                    del busy[number], begun[number]
                    queue.record_death(job, number, place, why)
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
    """How many of `jobs` run at the same time; on a cluster, if it were this machine."""
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
        with suppress(BrokenPipeError, ConnectionResetError):  # `messages` reports that it died
            self.connection.send((job, profile))

    def messages(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What it has sent; last that it died, if it did so before the end of its job."""
        kind = ""
        alive = self.process.is_alive()  # asked before reading: what it sent until then is in the pipe
        try:
            while kind not in ("done", "failed") and self.connection.poll():
                kind, values = self.connection.recv()
                yield kind, values
        except (EOFError, OSError):
            alive = False
        if not alive and kind not in ("done", "failed"):
            self.process.join()
            stack = Path(self._stack.name).read_text(encoding="utf-8", errors="replace")
            yield "died", {"error": describe_exit(self.process.exitcode, stack)}

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
    exit_with_parent()
    multiprocessing.current_process().daemon = False  # to the driver it is one; but a daemon may not start ranks
    set_threads(threads)
    while True:
        try:
            job, profile = connection.recv()
        except EOFError:
            return
        except Exception as error:  # the function cannot be imported here
            connection.send(("failed", bug(error)))
            continue
        connection.send(("began", {}))
        kind, values = perform(job, device, lambda values: connection.send(("progress", values)), profile)
        connection.send((kind, values))
