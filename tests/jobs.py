"""Jobs that `test_executor` runs; a module of its own, quick to import in many processes."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError, AutoSparseFailure


def work(place: Path, name: str, how: str, *, device: str, progress: Callable[[Mapping[str, Any]], None]) -> str:
    """Append to a file how often it was started, and do what `how` says."""
    marks = place / f"{name}.marks"
    with marks.open("a") as file:
        file.write("x")
    tries = len(marks.read_text())
    progress({"round": 0, "rounds": 1})
    if how == "poisoned":
        raise ZeroDivisionError("as planned\nand more")
    if how == "wrong":
        raise AutoSparseError("model is 'x': choose another")
    if how == "full":
        raise AutoSparseFailure("cannot write: no space left on device")
    if how == "exit":
        raise SystemExit(3)
    if how == "killed" or (how == "killed once" and tries == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crashes":
        ctypes.string_at(0)
    if how == "hangs" or (how == "hangs once" and tries == 1):
        time.sleep(600)
    if how == "order":
        assert (place / "first.marks").exists()
        time.sleep(0.05)
    (place / f"{name}.done").write_text("done")
    return f"{name} on {device}"


def slow(place: Path, name: str, seconds: float, *, device: str, progress: Callable[..., None]) -> None:
    (place / f"{name}.pid").write_text(str(os.getpid()))
    time.sleep(seconds)
    (place / f"{name}.done").write_text("done")
