"""Benchmark and check: criteria and methods side by side under one recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosparse.commands.directory import claim_directory
from autosparse.commands.loading import plain
from autosparse.commands.profiles import profiled
from autosparse.commands.report import write_report
from autosparse.commands.schemas import BenchmarkConfig, CheckConfig
from autosparse.commands.terminal import Live, bars, epochs_of, print_table, say, say_failed
from autosparse.errors import AutoSparseFailure
from autosparse.experiment.benchmark import failures, grid, run_grid, with_inputs
from autosparse.experiment.candidates import expand
from autosparse.jobs.cells import unfinished
from autosparse.report.checks import tables
from autosparse.report.collect import collect
from autosparse.report.rows import summary
from autosparse.report.text import unique
from autosparse.tracking import track
from autosparse.training.data import load_data
from autosparse.training.loop import fabric_for

if TYPE_CHECKING:
    from pandas import DataFrame


def run(
    config: BenchmarkConfig | CheckConfig,
    *,
    tracking: Path | None = None,
    report: bool = True,
    profile: bool = False,
) -> DataFrame:
    """Prune and train every cell of the grid that `config` names, and give its results, a row each.

    Args:
        tracking: directory of the MLflow store; default the output.
        report: write report.html too.
        profile: say where the time of the first job of each worker goes.

    Raises:
        AutoSparseFailure: cells failed; the others are complete.
    """
    what, criteria = "benchmark", config.criteria
    if isinstance(config, CheckConfig):
        what, criteria = "check", tuple(expand(criteria, config.checks))
    cells = grid(config.models, config.data, config.recipe, criteria, config.sparsities, config.seeds)
    place = fabric_for(config.device).device if config.executor.kind == "inline" else "cpu"
    data = load_data(config.data, place)
    cells = with_inputs(cells, data)
    directory = claim_directory(config)
    enabled = config.tracking and bool(unfinished(cells, directory))
    first = bars(f"{what}: getting ready")
    with first as shown, track(tracking or directory, what, plain(config), enabled=enabled) as tracker:
        live = Live(shown, what, len(cells), counts=False, epochs=epochs_of(config.recipe, data))

        def on_cell(number: int, cell: Any, result: Mapping[str, Any], known: bool) -> None:
            accuracy = result.get("accuracy")
            text = f"{cell.model.label()} {cell.criterion} {cell.sparsity:g} seed {cell.seed}"
            text += f": {100 * accuracy:.1f} %" if accuracy is not None else ": failed"
            live.advance(number, f"{what}: {text}")
            if not known and accuracy is not None:
                tracker.log({f"{cell.criterion}/{cell.sparsity:g}/accuracy": accuracy}, cell.seed)
                tracker.flush()

        with profiled(directory, profile, config.executor.kind) as of_workers:
            results = run_grid(
                cells,
                directory,
                data,
                device=config.device,
                executor=config.executor,
                profile=of_workers,
                on_cell=on_cell,
                on_event=live.show,
            )
        live.end(f"{what}: {len(cells)} cells")
        tracker.artifact(directory / "results.csv")
    for line in unique(f"{r['criterion']}: {note}" for r in results for note in r.get("remarks", [])):
        say(f"note: {line}")
    rows = collect(directory).rows
    for title, headers, lines in summary(rows):
        print_table(f"accuracy after the last epoch, % ({title})", headers, lines)
    for (title, headers, lines), verdicts in tables(rows):
        print_table(f"sanity checks: accuracy, and its difference in points, paired by seed ({title})", headers, lines)
        say("\n".join(verdicts))
    say(f"results: {directory / 'results.csv'}")
    if report:
        write_report(directory)
    failed = list(failures(results))
    for line in failed:
        say_failed(line)
    if failed:
        raise AutoSparseFailure(f"{len(failed)} of {len(cells)} cells failed; start again to try them again")
    return rows
