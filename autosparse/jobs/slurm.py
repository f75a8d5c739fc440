"""The executor `slurm`: one Slurm job for each job, submitted by submitit.

submitit writes a pickle of what a Slurm job shall do into a folder, and the job reads it and writes one of its result. So
that nobody else can write these files, the folder is in the user's own cache directory, which both the submitting machine
and the nodes must see, and has mode 700. The pickle holds no more than a command, `python -m autosparse.jobs.slurm FILE`,
where FILE is JSON. Events come back as lines of JSON in another file there. The pickle of the result is never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError, AutoSparseFailure, first_line
from autosparse.files import read_json, write_json
from autosparse.jobs.encoding import decode_job, encode_job
from autosparse.jobs.executor import Event, ExecutorSettings, Job, JobQueue, bug, run_jobs
from autosparse.processes import set_threads

_AT_ONCE = 100
_DAY = 24 * 60  # minutes; submitit's own default is 5
_PAUSE = {"slurm": 2.0, "local": 0.2}  # seconds between two looks at the files
_LAG = {"slurm": 15.0, "local": 0.0}  # seconds until the last lines of a job that has ended are seen on a shared disk


def run(queue: JobQueue, executor: ExecutorSettings, device: str, planned: int, folder: Path | None) -> None:
    """Submit jobs and follow what they write; each runs its job as the executor `local` does."""
    asked = dict(executor.slurm)
    kind = asked.pop("cluster", "slurm")
    gpus = asked.get("gpus_per_node", 0)
    place = f"cuda:{','.join(map(str, range(gpus)))}" if gpus > 1 and device in ("auto", "cuda") else device
    settings = {"retries": executor.retries, "timeout": executor.timeout, "threads": asked.get("cpus_per_task", 1)}
    free = list(range(executor.workers or _AT_ONCE))[::-1]
    running: dict[int, _Submitted] = {}
    count = 0
    with _folder_of_jobs(folder) as mine:
        cluster = _cluster(kind, asked, executor, mine)
        _cancel_left_over(mine, kind)
        try:
            while queue.waiting or running:
                while free and (job := queue.take(free[-1], place)) is not None:
                    number, count = free.pop(), count + 1
                    profile = queue.profile(number)
                    given = {
                        **settings,
                        "device": place,
                        "profile": None if profile is None else str(profile.resolve()),
                    }
                    running[number] = _submit(cluster, mine / f"{count}.json", job, given)
                    queue.record(job, number, place, "progress", {"stage": f"in the queue of {kind}"})
                time.sleep(_PAUSE[kind])
                for number, submitted in list(running.items()):
                    if _follow(submitted, queue, number, place, _LAG[kind]):
                        running.pop(number).events.unlink()
                        free.append(number)
        finally:
            for submitted in running.values():
                with suppress(Exception):
                    submitted.task.cancel(check=False)


@contextmanager
def _folder_of_jobs(folder: Path | None) -> Iterator[Path]:
    """A directory for submitit, beside those of earlier processes that worked on `folder`; it is removed at the end."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"process-{os.getpid()}" if folder is None else hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    home = cache.resolve() / "autosparse" / "slurm" / name[:16]
    for directory in (home.parent.parent, home.parent, home):  # whoever may write one of them could replace all below
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
    mine = Path(tempfile.mkdtemp(dir=home))  # of mode 700
    try:
        yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)
        with suppress(OSError):  # there may be others in it
            home.rmdir()


def _cluster(kind: str, asked: Mapping[str, Any], executor: ExecutorSettings, folder: Path) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise AutoSparseError(
            "executor.kind is 'slurm': the package submitit is not installed; pip install 'autosparse[slurm]', or use local"
        ) from error
    if kind not in _PAUSE:
        raise AutoSparseError(f"executor.slurm.cluster is {kind!r}: known: {', '.join(_PAUSE)}")
    try:
        cluster = submitit.AutoExecutor(folder, cluster=kind)
    except Exception as error:  # whatever it raises where there is no srun
        raise AutoSparseError(
            f"executor.kind is 'slurm': {first_line(error)}; start the command where Slurm's commands are, or use local"
        ) from error
    minutes = _DAY if executor.timeout is None else math.ceil((executor.retries + 1) * executor.timeout / 60) + 5
    try:
        cluster.update_parameters(**{"name": "autosparse", "timeout_min": minutes, **asked})
    except Exception as error:  # its own exceptions are of many types
        raise AutoSparseError(f"executor.slurm is {dict(asked)}: {first_line(error)}") from error
    return cluster


def _cancel_left_over(mine: Path, kind: str) -> None:
    """End what a process that was killed left in the queue; a job ends too when its files are gone."""
    for old in mine.parent.iterdir():
        if old != mine:
            ids = [path.name.partition("_")[0] for path in old.glob("*_submitted.pkl")]
            if ids and kind == "slurm":
                subprocess.run(["scancel", *ids], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(old, ignore_errors=True)


@dataclass
class _Submitted:
    """A job that was submitted; `events` is the file that it appends to, without which it ends itself."""

    job: Job
    task: Any
    events: Path
    read: int = 0
    ended: float | None = None

    def new_events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with self.events.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]  # the last line may not be there in full yet
        self.read += len(text)
        for line in text.splitlines():
            kind, values = json.loads(line)
            yield kind, values


def _submit(cluster: Any, path: Path, job: Job, given: Mapping[str, Any]) -> _Submitted:
    from submitit.helpers import CommandFunction

    events = path.with_suffix(".events")
    write_json(path, {**given, "job": encode_job(job), "path": sys.path, "events": str(events)})
    events.touch()
    command = [sys.executable, "-m", "autosparse.jobs.slurm", str(path)]
    try:
        return _Submitted(job, cluster.submit(CommandFunction(command, verbose=False, cwd=os.getcwd())), events)
    except Exception as error:  # what sbatch says
        raise AutoSparseFailure(
            f"Slurm does not take job {job.key}: {first_line(error)}; change executor.slurm, then run the same command "
            "again: what was computed before is kept"
        ) from error


def _follow(submitted: _Submitted, queue: JobQueue, worker: int, device: str, lag: float) -> bool:
    """Record what the job has written since the last look; whether it has ended."""
    job, over = submitted.job, submitted.task.done()  # asked before: what it wrote until then is in the file
    for kind, values in submitted.new_events():
        queue.record(job, worker, device, kind, values)
        if kind in ("done", "failed"):
            return True
    if over and submitted.ended is None:
        submitted.ended = time.monotonic()
    if submitted.ended is None or time.monotonic() - submitted.ended < lag:
        return False
    task = submitted.task
    lines = (task.stderr() or "").strip().splitlines() or ["no message"]
    queue.record_death(job, worker, device, f"Slurm job {task.job_id} in state {task.state} ({lines[-1].strip()})")
    return True


# -- on the node --------------------------------------------------------------------------------------------------------


def main(path: Path) -> None:
    """What a Slurm job runs: the job of a file, by the executor `local`, whose events are appended to another file."""
    given = read_json(path, "job")
    events, ended = Path(given["events"]), threading.Event()
    threading.Thread(target=_end_without, args=(events, ended, os.getppid()), daemon=True).start()

    def write(event: Event) -> None:
        with events.open("a", encoding="utf-8") as file:
            file.write(json.dumps([event.kind, dict(event.values)]) + "\n")
        if event.kind in ("done", "failed"):
            ended.set()

    sys.path[:] = given["path"]
    set_threads(given["threads"])
    device = given["device"]
    local = ExecutorSettings("local", 1, (device,), given["retries"], given["timeout"])
    profile = None if given["profile"] is None else Path(given["profile"])
    try:
        job = decode_job(given["job"])
        run_jobs([job], local, write, device=device, profile=profile)
    except AutoSparseError as error:
        write(Event("failed", "", 0, device, {"error": str(error), "mistake": True}))
    except Exception as error:
        write(Event("failed", "", 0, device, bug(error)))


def _end_without(events: Path, ended: threading.Event, parent: int) -> None:
    """End this process and its worker once its events are wanted no more, or submitit's process has died."""
    while events.exists() and os.getppid() == parent:
        time.sleep(1)
    os._exit(0 if ended.is_set() else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
