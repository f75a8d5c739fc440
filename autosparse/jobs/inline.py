"""The executor `inline`: one job after another in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autosparse.jobs.executor import ExecutorSettings, Job, JobQueue, perform


def run(queue: JobQueue, executor: ExecutorSettings, device: str, planned: int, folder: Path | None) -> None:
    while (job := queue.take(0, device)) is not None:

        def progress(values: Mapping[str, Any], job: Job = job) -> None:
            queue.record(job, 0, device, "progress", values)

        queue.record(job, 0, device, *perform(job, device, progress))
