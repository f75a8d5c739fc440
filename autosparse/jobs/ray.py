"""The executor `ray`: tasks on a Ray cluster."""

from __future__ import annotations

import os
import queue as queues
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError, first_line, require
from autosparse.jobs.executor import ExecutorSettings, Job, JobQueue, bug, perform
from autosparse.processes import set_threads
from autosparse.training.devices import device_names


def run(queue: JobQueue, executor: ExecutorSettings, device: str, planned: int, folder: Path | None) -> None:
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
        while queue.waiting or running:
            while free and (job := queue.take(free[-1], place)) is not None:
                number = free.pop()
                running[task.remote(job, place, threads, os.getcwd(), queue.profile(number))] = job, number
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
                    queue.record_death(job, number, place, values["error"])
                else:
                    queue.record(job, number, place, kind, values)
            for stream, since in begun.items():
                if stream not in killed and (late := queue.overdue(since)) is not None:
                    killed[stream] = late
                    ray.cancel(stream, force=True)  # its death is recorded once it is dead: two tries must not overlap
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
    """The messages of a job as they come; paths are those of the driver, on a file system that both see."""
    messages: queues.SimpleQueue[tuple[str, Any]] = queues.SimpleQueue()

    def work() -> None:
        try:
            os.chdir(folder)
        except OSError as error:
            messages.put(("failed", {"error": f"folder {folder} is not on this node ({error}): use a shared one"}))
            return
        set_threads(threads)
        try:
            messages.put(perform(job, device, lambda values: messages.put(("progress", values)), profile))
        except BaseException as error:  # a SystemExit would end this thread without a message
            messages.put(("failed", bug(error)))

    yield "began", {}
    threading.Thread(target=work, daemon=True).start()
    kind = ""
    while kind not in ("done", "failed"):
        kind, values = messages.get()
        yield kind, values
