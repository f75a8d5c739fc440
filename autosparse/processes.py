"""Processes of our own that end with the one that started them, and how many CPU threads each may take."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_limit(workers: int) -> int:
    """The most CPU threads of each of `workers` processes: `OMP_NUM_THREADS` if it is set, else an even share of the cores."""
    return _given_threads() or max(1, cores() // workers)


def memory_for(processes: int) -> int:
    """For how many jobs of so many processes each there is memory now."""
    import psutil

    return int(psutil.virtual_memory().available // (_MEMORY * processes))


_MEMORY = 1.5 * 2**30  # torch, data and network of a process


def _given_threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(given) if given.isdigit() else 0


def set_threads(count: int) -> None:
    """Threads of torch and of the libraries under it, most of them not loaded yet."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    let_threads_sleep()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def let_threads_sleep() -> None:
    """Before torch is imported: OpenMP threads that wait sleep, unless the user's environment says otherwise.

    By default they spin, which on a machine that does other work too costs ten times the time of the training.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def start_context() -> Any:
    """How processes of our own start: forked from a fresh process that has imported torch once, where that is safe (Linux)."""
    import multiprocessing

    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning_fabric"])  # ignored when the server runs already
    return context


def start_server() -> None:
    """Let the process that the others are forked from import torch already, while this one does something else."""
    from multiprocessing import forkserver

    if start_context().get_start_method() == "forkserver":
        with uninterrupted():
            forkserver.ensure_running()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes started inside leave Ctrl-C to this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def exit_with_parent() -> None:
    """For a spawned process: SIGTERM is an exit, and the end of the parent, by whatever means, is the end of this one."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _leave)


def describe_exit(code: int | None, stack: str = "") -> str:
    """How a process ended, in words; `stack` is what `faulthandler` wrote when it crashed."""
    if code is None or code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name
    text = f"killed by signal {-code} ({name})"
    if name == "SIGKILL":
        return f"{text} (out of memory?)"
    frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', stack.partition("Current thread")[2].partition("\n\n")[0])
    if not frames:
        return text
    _, _, function = frames[0]
    own = (f for f in frames if {"autosparse", "data_gen"} & {*Path(f[0]).parts[-3:-1]})
    path, line, caller = next(own, frames[0])
    return f"{text} in {function}, called by {caller} in {Path(path).name}, line {line}: a crash of a compiled library"


def _leave(*_: Any) -> None:
    """Unlike a kill, an exit clears temporary files away; a second SIGTERM must not break into that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _end_with_parent() -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
