"""What a person sees on the terminal: lines, tables, and bars that show how far many jobs are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from autosparse.commands.streams import readable

if TYPE_CHECKING:
    from autosparse.jobs.executor import Event
    from autosparse.training.data import ImageData
    from autosparse.training.recipe import Recipe


@contextmanager
def bars(first: str | None = None) -> Iterator[Any]:
    """Progress bars on a terminal; elsewhere the last state of those whose length is known, at the end.

    `first`: of a bar that moves until its length is known.
    """
    from rich import get_console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    ]
    moves = get_console().is_interactive and not _silent.get()
    with Progress(*columns, disable=not moves) as shown:
        if first is not None:
            shown.add_task(first, total=None)
        try:
            yield shown
        finally:
            known = [task for task in shown.tasks if task.total is not None]
            if known and not moves and not _silent.get():
                shown.console.print(shown.make_tasks_table(known))


@contextmanager
def busy(text: str) -> Iterator[None]:
    """A bar that moves while the block works, on a terminal, and leaves no line."""
    from rich import get_console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)]
    with Progress(*columns, transient=True, disable=_silent.get() or not get_console().is_interactive) as shown:
        shown.add_task(text, total=None)
        yield


class Live:
    """A bar for all jobs, which moves with each epoch of each, and under it a line for each worker.

    `epochs` of one training, where they are known. `counts`: jobs that end are counted here, not by `advance`.
    """

    def __init__(
        self, shown: Any, what: str, total: int, done: int = 0, counts: bool = True, epochs: float | None = None
    ) -> None:
        self._bars, self._counts, self._epochs = shown, counts, epochs
        self._all = shown.task_ids[0] if shown.task_ids else shown.add_task(what)
        self._what, self._total, self._done = what, total, done
        self._workers: dict[int, Any] = {}
        self._shares: dict[str, float] = {}
        self._searched: dict[str, float] = {}  # how much of a job was done when its search ended
        if done:
            self.advance(done, what)
        else:
            shown.update(self._all, description=f"{what}: starting, {total} to do")  # moves until the first has news

    def show(self, event: Event) -> None:
        from autosparse.jobs.status import doing

        if event.kind == "started":
            if event.worker in self._workers:
                self._bars.remove_task(self._workers[event.worker])
            text = f"worker {event.worker} {event.device}: {event.key}"
            self._workers[event.worker] = self._bars.add_task(text, total=None)
        elif event.kind == "progress":
            before, share = self._shares.get(event.key, 0.0), share_done(event.values, self._epochs)
            if event.values.get("stage") == "training":  # after a search
                searched = self._searched.setdefault(event.key, before)
                share = searched + (1 - searched) * share
            self._shares[event.key] = max(before, share)
            text = f"worker {event.worker} {event.device}: {event.key}: {doing(event.values)}"
            self._bars.update(self._workers[event.worker], description=text)
            self._update()
            if "note" in event.values:
                self._bars.console.print(f"note: {event.key}: {event.values['note']}", markup=False)
        else:
            if event.kind == "died":
                self._bars.console.print(f"{event.kind}: {event.key}: {event.values['error']}", markup=False)
                return  # tried again, from its last checkpoint
            self._shares.pop(event.key, None)
            self._searched.pop(event.key, None)
            if self._counts:
                self.advance(self._done + 1, f"{self._what}: {event.key} {event.kind}")

    def advance(self, done: int, text: str) -> None:
        """So many jobs are done."""
        self._done = done
        self._update(description=text)

    def _update(self, **more: Any) -> None:
        completed = self._done + sum(self._shares.values())
        self._bars.update(self._all, total=self._total, completed=completed, **more)

    def end(self, text: str) -> None:
        for line in self._workers.values():
            self._bars.remove_task(line)
        self._bars.update(self._all, description=text)


def share_done(values: Mapping[str, Any], epochs: float | None) -> float:
    """How much of a job its last progress says is done, in [0, 1]: of its rounds, and of the epochs of the round at work.

    A search is half of its job at most, because how many trainings it takes is not known here.
    """
    rounds = values.get("rounds", 0) + 1
    now = values["epoch"] / epochs if epochs and "epoch" in values else 0.0
    at = values.get("round", 0) + (1.0 if "density" in values else min(now, 1.0))
    return min(at / rounds, 1.0) / (2 if values.get("stage") == "search" else 1)


def words(seconds: float) -> str:
    """A time as people say it: `40 s`, `3 minutes`, `2 hours`; rounded up."""
    for unit, length, most in (("s", 10.0, 90.0), ("minutes", 60.0, 5400.0)):
        if seconds <= most:
            count = max(1, -int(-seconds // length)) * (10 if unit == "s" else 1)
            return f"{count} {unit}"
    return f"{-int(-seconds // 3600)} hours"


_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of a command is printed inside, for callers from Python."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def say(text: str) -> None:
    if not _silent.get():
        print(text, flush=True)


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(quiet=_silent.get())

    def cell(text: str) -> Text:  # brackets in a name are no markup
        return Text(readable(text, console.encoding))

    table = Table(title=cell(title), title_justify="left", title_style="bold")
    for index, header in enumerate(headers):
        table.add_column(cell(header), justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*map(cell, row))
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width to fit into
    console.print(table)


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """What the warnings of `prune` say is printed as notes."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def epochs_of(recipe: Recipe, data: ImageData | None = None) -> float | None:
    """The length of a training; `None` where only the data tell, and are not loaded."""
    if data is not None:
        from autosparse.training.recipe import steps_per_epoch

        return recipe.length(data) / steps_per_epoch(data, recipe.batch_size)
    return recipe.epochs if recipe.steps is None else None


def epoch_text(what: str, row: Mapping[str, float]) -> str:
    return f"{what}: loss {row['loss']:.3f}, validation accuracy {100 * row['accuracy']:.1f} %"


def say_failed(text: str) -> None:
    """A line on standard error about a job that failed."""
    if not _silent.get():
        print(f"failed: {text}", file=sys.stderr)
