"""Status: what of many runs is done."""

from __future__ import annotations

from pathlib import Path

from autosparse.commands.terminal import say
from autosparse.jobs.status import STATES, statuses


def run(directory: Path) -> None:
    """Say what of a campaign or grid is done, running, failed (and why) or waiting; while it runs and after."""
    for found in statuses(directory):
        counts = ", ".join(f"{found.count(state)} {state}" for state in STATES)
        say(
            f"{found.directory}: {len(found.jobs)} jobs: {counts}; {'running' if found.alive else 'no process is running'}"
        )
        for job in found.jobs:
            if job.detail:
                say(f"  {job.state}: {job.key}: {job.detail}")
