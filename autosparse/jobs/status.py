"""Which jobs of a campaign or grid are done, running, failed or waiting, kept in small files beside the results."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.files import files_under, read_json, write_json
from autosparse.jobs.executor import Event

FOLDER = ".jobs"
STATES = ("done", "running", "failed", "waiting")


@contextmanager
def kept_up(write: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """A file that sums up many jobs, kept up to date at a cost that does not grow with how often they change.

    Yields what to call after each change; a thread then calls `write`, soon, but at most once a second and for at most
    a twentieth of the time. A disk that is full must not stop the work, so only the last `write`, when the block ends by
    itself, raises what it raises.
    """
    changed, over = threading.Event(), threading.Event()

    def follow() -> None:
        while changed.wait() and not over.is_set():
            changed.clear()
            begun = time.monotonic()
            with suppress(AutoSparseFailure):
                write()
            over.wait(max(1.0, 20 * (time.monotonic() - begun)))

    def end() -> None:
        over.set()
        changed.set()
        thread.join()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield changed.set
    except BaseException:
        end()
        with suppress(AutoSparseFailure):
            write()
        raise
    end()
    write()


class Journal:
    """Writes down which jobs run and which failed; those that are done are known by their results."""

    def __init__(self, folder: Path, on_event: Callable[[Event], None] | None = None) -> None:
        self._path = folder / "live.json"
        self._on_event = on_event
        self._running: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, dict[str, Any]] = {}
        self._writing = threading.Lock()  # else an older state could be written after a newer one
        self.write()
        self.changed: Callable[[], None] = self.write

    def note(self, event: Event) -> None:
        if event.kind == "started":
            row = {"worker": event.worker, "device": event.device, "since": time.time(), "doing": ""}
            self._running[event.key] = row
            self._failed.pop(event.key, None)
        elif event.kind == "progress":
            self._running[event.key]["doing"] = doing(event.values)
        else:
            self._running.pop(event.key, None)
        if event.kind == "failed":
            self._failed[event.key] = {k: v for k, v in event.values.items() if k in ("error", "traceback")}
        self.changed()
        if self._on_event is not None:
            self._on_event(event)

    def write(self) -> None:
        """A disk that is full must not stop the work."""
        with self._writing, suppress(AutoSparseFailure):
            rows = {"running": dict(self._running), "failed": dict(self._failed)}  # they change meanwhile
            write_json(self._path, {"host": socket.gethostname(), "pid": os.getpid(), **rows})


@contextmanager
def journal(
    directory: Path, jobs: Mapping[str, Path], on_event: Callable[[Event], None] | None = None
) -> Iterator[Journal]:
    """Be the one process that works on `directory`: `jobs` are the keys of all its jobs and the result file of each.

    `on_event` is called with each event after it is noted.

    Raises:
        AutoSparseError: another process works on it.
    """
    import filelock

    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "driver.lock", timeout=2)  # `status` holds it for an instant
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise AutoSparseError(
            f"{directory} is being written by another process: wait for it, or choose another output directory"
        ) from error
    try:
        _clear(directory, {path.parent for path in jobs.values()})
        write_json(folder / "plan.json", {key: os.path.relpath(path, directory) for key, path in jobs.items()})
        notes = Journal(folder, on_event)
        with kept_up(notes.write) as notes.changed:
            yield notes
    finally:
        lock.release()


def _clear(directory: Path, folders: set[Path]) -> None:
    """Remove what killed writers left half written."""
    for folder in {directory / FOLDER, *folders}:
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def doing(values: Mapping[str, Any]) -> str:
    """Progress in words: the latest round and epoch, with the accuracy."""
    words = [values["stage"]] if "stage" in values else []
    if "round" in values:
        words.append(f"round {values['round']}/{values['rounds']}")
    if "epoch" in values:
        words.append(f"epoch {values['epoch']:.0f}")
    if "density" in values:
        words.append(f"density {values['density']:.3f}")
    if "accuracy" in values:
        words.append(f"accuracy {100 * values['accuracy']:.1f} %")
    return ", ".join(words)


@dataclass(frozen=True)
class JobStatus:
    """`state` is one of `STATES`; `detail`: what it is doing, or why it failed."""

    key: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class Status:
    """The jobs of one directory, and whether a process works on them now."""

    directory: Path
    alive: bool
    jobs: Sequence[JobStatus]

    def count(self, state: str) -> int:
        return sum(job.state == state for job in self.jobs)


def statuses(directory: Path) -> list[Status]:
    """The status of every campaign and grid under `directory`, from its files alone.

    Raises:
        AutoSparseError: there is none.
    """
    plans = sorted(p for p in files_under(directory) if p.parts[-2:] == (FOLDER, "plan.json"))
    if not plans:
        raise AutoSparseError(
            f"no campaign or grid under {str(directory)!r}: give the output of autosparse generate, benchmark, check, diagnose, shrink or tune"
        )
    return [_status(plan.parent.parent) for plan in plans]


def _status(directory: Path) -> Status:
    folder = directory / FOLDER
    alive = _is_held(folder / "driver.lock")
    plan = read_json(folder / "plan.json", "plan")
    live = read_json(folder / "live.json", "journal") if (folder / "live.json").exists() else {}
    running, failed = live.get("running", {}), live.get("failed", {})
    jobs = []
    for key, place in plan.items():
        path = directory / place
        if alive and key in running:
            row = running[key]
            where = f"worker {row['worker']} ({row['device']}), {_duration(time.time() - row['since'])}"
            jobs.append(JobStatus(key, "running", f"{where}: {row['doing']}" if row["doing"] else where))
        elif _is_done(path):
            jobs.append(JobStatus(key, "done"))
        elif key in failed:
            jobs.append(JobStatus(key, "failed", failed[key]["error"]))
        else:
            begun = path.exists() or path.with_suffix(".state").exists()
            jobs.append(
                JobStatus(key, "waiting", "started before, will resume from its last checkpoint" if begun else "")
            )
    return Status(directory, alive, jobs)


def _is_done(path: Path) -> bool:
    if path.suffix == ".h5":
        from autosparse.scorers.records import is_complete

        return is_complete(path)
    return path.exists()


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock; a kill frees it."""
    import filelock

    lock = filelock.FileLock(path, timeout=0)
    try:
        with lock:
            return False
    except filelock.Timeout:
        return True


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
