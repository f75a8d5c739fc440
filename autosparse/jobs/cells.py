"""The cells of a grid: each has one result file, those that are there already are not done again, a table sums them up."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from autosparse.errors import AutoSparseStateError
from autosparse.files import read_json, write_csv, write_json
from autosparse.jobs.executor import INLINE, Event, ExecutorSettings, Job, run_jobs
from autosparse.jobs.status import journal, kept_up
from autosparse.training.data import DataSettings, ImageData, shared_data
from autosparse.training.loop import fabric_for

Result = dict[str, Any]
Progress = Callable[[Mapping[str, Any]], None]


class AnyCell(Protocol):
    """One piece of work of a grid, which holds everything that its result depends on.

    `folder`: name of the directory of the results. `data`: what a worker loads; `None` where cells only run inline.
    """

    folder: ClassVar[str]

    @property
    def data(self) -> DataSettings | None: ...

    def key(self) -> str:
        """File name: readable, and unique through a hash of all that the result depends on."""

    def row(self) -> dict[str, Any]:
        """What names the cell in the table, whatever comes of it."""

    def shared(self, directory: Path) -> Path | None:
        """A file that cells have in common: the first of them makes it, the others wait for that."""

    def run(self, directory: Path, data: ImageData, *, device: str, state: Path, progress: Progress) -> dict[str, Any]:
        """The result. `state`: directory for what a stop would lose, which goes when the result is there."""


C = TypeVar("C", bound=AnyCell)


def result_path(directory: Path, cell: AnyCell) -> Path:
    """Where the result of the cell is kept."""
    return directory / cell.folder / f"{cell.key()}.json"


def unfinished(cells: Sequence[C], directory: Path) -> list[C]:
    """The cells that have no result yet."""
    return [cell for cell in cells if not result_path(directory, cell).exists()]


def run_cells(
    cells: Sequence[C],
    directory: Path,
    data: ImageData | None,
    write: Callable[[list[Result]], None],
    *,
    device: str = "auto",
    executor: ExecutorSettings = INLINE,
    profile: Path | None = None,
    on_cell: Callable[[int, C, Result, bool], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> list[Result]:
    """Run every cell that has no result in `directory` yet, and give the results of all.

    A cell that fails has its `row` and the `error` as its result, which is kept in no file, and the others go on; the next
    start tries it again.

    Args:
        data: loaded data for cells that run inline; `None`: each loads its own.
        write: writes the table of the results that are there; called when they change, and at the end.
        executor: where cells run, and how many at once; the results are the same but for seconds.
        profile: see `run_jobs`.
        on_cell: called with the number of cells done, the cell, its result, and whether that was there already.
        on_event: called with what happens to each cell, under its key.

    Raises:
        AutoSparseError: another process works on the directory.
    """
    paths = [result_path(directory, cell) for cell in cells]
    results: dict[Path, Result] = {path: read_json(path, "result") for path in paths if path.exists()}
    fresh = {path: cell for path, cell in zip(paths, cells, strict=True) if path not in results}
    files = {path.stem: path for path in paths}
    count = 0

    def report(path: Path, cell: C, known: bool) -> None:
        nonlocal count
        count += 1
        if on_cell is not None:
            on_cell(count, cell, results[path], known)

    def receive(event: Event) -> None:
        if on_event is not None:
            on_event(event)
        path = files[event.key]
        if event.kind == "done":
            results[path] = event.values["value"]
        elif event.kind == "failed":
            results[path] = {**fresh[path].row(), "error": event.values["error"]}
        else:
            return
        changed()
        report(path, fresh[path], False)

    def write_table() -> None:
        write([results[path] for path in paths if path in results])

    jobs = _jobs(fresh, directory, data if executor.kind == "inline" else None)
    with journal(directory, files, receive) as notes, kept_up(write_table) as changed:
        for path, cell in zip(paths, cells, strict=True):
            if path not in fresh:
                report(path, cell, True)
        run_jobs(jobs, executor, notes.note, device=device, planned=len(cells), profile=profile, folder=directory)
    return [results[path] for path in paths]


def _jobs(cells: Mapping[Path, AnyCell], directory: Path, data: ImageData | None) -> list[Job]:
    first: dict[Path, str] = {}
    jobs = []
    for path, cell in cells.items():
        file = cell.shared(directory)
        maker = path.stem if file is None or file.exists() else first.setdefault(file, path.stem)
        arguments = {"cell": cell, "directory": directory, "data": data}
        jobs.append(Job(path.stem, do_cell, arguments, after=None if maker == path.stem else maker))
    return jobs


def do_cell(cell: AnyCell, directory: Path, data: ImageData | None, *, device: str, progress: Progress) -> Result:
    """One cell as a job: its result, which is in its file then; `data` where the caller has loaded it."""
    path = result_path(directory, cell)
    if path.exists():  # an earlier try was killed after its last line
        return read_json(path, "result")
    if data is None:
        assert cell.data is not None
        data = shared_data(cell.data, str(fabric_for(device).device))
    state = path.with_suffix(".state")
    run = partial(cell.run, directory, data, device=device, state=state, progress=progress)
    try:
        result = run()
    except AutoSparseStateError as error:  # the cell's settings are in its name: another version or other data wrote it
        progress({"note": f"the saved state {state} does not fit and is deleted; this job starts again ({error})"})
        shutil.rmtree(state)
        result = run()
    write_json(path, result)
    shutil.rmtree(state, ignore_errors=True)
    return result


def write_table(path: Path, columns: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    """One row a result as CSV: floats with six digits, empty where there is no value or NaN."""
    write_csv(path, [{column: _rounded(result.get(column)) for column in columns} for result in results], columns)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else float(f"{value:.6g}")
    return "" if value is None else value
