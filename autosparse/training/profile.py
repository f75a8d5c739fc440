"""Where the time of trainings goes: a trace of a few steps, then a table of parts that adds up to the wall time."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from autosparse.files import replace_file

PARTS = ("data", "bookkeeping", "forward", "backward", "optimizer", "mask", "evaluation", "other")
_ON: ContextVar[Profile | None] = ContextVar("profile", default=None)


class Profile:
    """The time of every training in a `with profiling(…)` block, by parts.

    The first `warmup` steps are left out; the next `traced` go into `trace` (Chrome's format, for Perfetto too) as they
    run; from then on a clock counts `seconds` by part, until the block ends. What no part claims is `"other"`, so the
    parts add up to `wall`. While the clock runs, each change of part waits for the GPU, so that a part holds its own
    work: a GPU that otherwise computes while the CPU prepares the next step is a little faster than the table says.
    """

    def __init__(self, directory: Path, warmup: int = 10, traced: int = 5) -> None:
        self.trace, self.table = directory / "trace.json.gz", directory / "parts.csv"
        self.warmup, self.traced = warmup, traced
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.wall = 0.0
        self.steps = 0
        self._part, self._device = "other", torch.device("cpu")
        self._tracer: Any = None
        self._range: Any = None
        self._since: float | None = None

    @property
    def clocked(self) -> int:
        """Steps in the table."""
        return max(0, self.steps - self.warmup - self.traced)

    def begin(self, part: str, device: torch.device | None = None) -> None:
        """From now on it is `part`; a step is counted where its forward pass begins."""
        self._device = device or self._device
        self._end()
        self._part = part
        if part == "forward":
            self.steps += 1
            if self.steps == self.warmup + 1:
                self._start_trace()
            elif self.steps == self.warmup + self.traced + 1:
                self._save_trace()
                self._since = self._now()
        if self._tracer is not None:
            self._range = torch.profiler.record_function(part)
            self._range.__enter__()

    def rows(self) -> list[tuple[str, float, float]]:
        """Part, seconds and percent of the wall time."""
        return [(part, s, 100 * s / max(self.wall, 1e-12)) for part, s in self.seconds.items()]

    def close(self) -> None:
        """Write what there is: the trace if a step of it ran, the table if a step was clocked."""
        self._end()
        if self._tracer is not None:
            self._save_trace()
        if self._since is not None:
            with replace_file(self.table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("part", "seconds", "percent"))
                writer.writerows((part, f"{s:.6f}", f"{p:.3f}") for part, s, p in self.rows())

    def _end(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if self._since is not None:
            now = self._now()
            self.seconds[self._part] += now - self._since
            self.wall += now - self._since
            self._since = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _start_trace(self) -> None:
        kinds = torch.profiler.ProfilerActivity
        on_gpu = self._device.type == "cuda"
        self._tracer = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])])
        self._tracer.start()

    def _save_trace(self) -> None:
        self._now()  # the traced steps end before the trace does
        self._tracer.stop()
        with replace_file(self.trace) as temporary:
            compressed = temporary.with_name(f"{temporary.name}.gz")  # the name tells torch to compress
            self._tracer.export_chrome_trace(str(compressed))
            compressed.replace(temporary)
        self._tracer = None


@contextmanager
def profiling(directory: Path, warmup: int = 10, traced: int = 5) -> Iterator[Profile]:
    """Profile the trainings of this process in the block; files go into `directory`."""
    profile = Profile(directory, warmup, traced)
    token = _ON.set(profile)
    try:
        yield profile
    finally:
        _ON.reset(token)
        profile.close()


def parts(device: torch.device) -> Callable[[str], None]:
    """What a training calls with the name of the part that begins; it does nothing unless a profile is on."""
    profile = _ON.get()
    return _nothing if profile is None else lambda part: profile.begin(part, device)


def _nothing(part: str) -> None:
    pass
