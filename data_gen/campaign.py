"""Many IRP runs from one config."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autosparse.errors import AutoSparseError, AutoSparseFailure, require
from autosparse.experiment.benchmark import check_prunable
from autosparse.jobs.executor import INLINE, Event, ExecutorSettings, Job, run_jobs
from autosparse.jobs.status import journal
from autosparse.network.signals import SignalSettings
from autosparse.scorers.records import is_complete
from autosparse.search.irp import IRPSettings, Round
from autosparse.training.data import DataSettings, ImageData, shared_data
from autosparse.training.loop import fabric_for
from autosparse.training.models import ModelSettings, build_model
from autosparse.training.recipe import Recipe
from data_gen.gradual import GradualSettings
from data_gen.runs import Run, generate_record


@dataclass
class Campaign:
    """The result of many runs: the records that are complete, and the reason of each run that failed."""

    records: list[Path] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def runs(
    models: Sequence[ModelSettings],
    data: DataSettings,
    recipe: Recipe,
    irp: IRPSettings,
    signals: SignalSettings,
    seeds: Sequence[int],
    gradual: GradualSettings | None = None,
) -> list[Run]:
    """One run for each seed and model; with `gradual` a gradual one in place of IRP.

    Raises:
        AutoSparseError: no model or seed, or two runs of one name.
    """
    require(len(models) > 0, "models", list(models), "give at least one")
    require(len(seeds) > 0, "seeds", list(seeds), "give at least one")
    todo = [Run(model, data, recipe, irp, signals, seed, gradual) for seed in seeds for model in models]
    labels = [run.label() for run in todo]
    for label, count in Counter(labels).items():
        require(count == 1, "run", label, "two runs have this name; drop the repeated model or seed")
    return todo


def record_path(directory: Path, run: Run) -> Path:
    return directory / "records" / f"{run.label()}.h5"


def generate(
    todo: Sequence[Run],
    directory: Path,
    *,
    device: str = "auto",
    executor: ExecutorSettings = INLINE,
    profile: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Campaign:
    """Do the runs into `directory/records/NAME.h5`; one that fails does not stop the rest.

    Args:
        executor: where they run, and how many at once; the records are the same.
        profile: see `run_jobs`.
        on_event: called with what happens to each run that is not complete yet, under the run's label; progress has
            `round` and `rounds`, and `density`, `accuracy` and `loss` at the end of a round, or the row of an epoch.

    Raises:
        AutoSparseError: data cannot be read or a model does not take its images, before any run starts;
            every run has the same wrong input; or another process works on the directory.
        AutoSparseFailure: every run failed for the same reason.
    """
    campaign = Campaign()
    paths = {run.label(): record_path(directory, run) for run in todo}
    pending = [run for run in todo if not is_complete(paths[run.label()])]
    images = {data: shared_data(data, "cpu") for data in {run.data: None for run in todo}}
    for model, data in {(run.model.label(), run.data): (run.model, images[run.data]) for run in pending}.values():
        check_prunable(build_model(model, data), data)  # wrong input ends here, before hours are spent
    open_labels = {run.label() for run in pending}
    jobs = {}
    for run in todo:  # what is complete is looked at here: whether its images and initial weights are still the same
        here = executor.kind == "inline" or run.label() not in open_labels
        arguments = {"run": run, "path": paths[run.label()], "data": images[run.data] if here else None}
        jobs[run.label()] = Job(run.label(), do_run, arguments)

    def receive(event: Event) -> None:
        if on_event is not None and event.key in open_labels:
            on_event(event)

    with journal(directory, paths, receive) as notes:
        complete = [job for label, job in jobs.items() if label not in open_labels]
        outcomes = run_jobs(complete, INLINE, notes.note, device=device)
        left = [jobs[run.label()] for run in pending]
        how: dict[str, Any] = {"device": device, "planned": len(todo), "profile": profile, "folder": directory}
        outcomes |= run_jobs(left, executor, notes.note, **how)
    failed = {label: outcomes[label] for label in paths if outcomes[label].error is not None}
    campaign.records += [path for label, path in paths.items() if label not in failed]
    campaign.failures |= {label: str(outcome.error) for label, outcome in failed.items()}
    if failed and not campaign.records and len(set(campaign.failures.values())) == 1:
        first = next(iter(failed.values()))
        raise (AutoSparseError if first.mistake else AutoSparseFailure)(str(first.error))
    return campaign


def do_run(
    run: Run,
    path: Path,
    data: ImageData | None,
    *,
    device: str,
    progress: Callable[[Mapping[str, Any]], None],
) -> None:
    """One run as a job; `data` when the caller has it at hand."""

    at = {"round": 0, "rounds": run.rounds}

    def on_round(index: int, rounds: int, outcome: Round | None) -> None:
        values: dict[str, Any] = {"round": index, "rounds": rounds}
        at["round"] = index + 1
        if outcome is not None:
            trained = outcome.trained
            values |= {"density": outcome.density}
            if math.isfinite(trained.accuracy):
                values |= {"accuracy": trained.accuracy, "loss": trained.loss}
        progress(values)

    if data is None:
        data = shared_data(run.data, str(fabric_for(device).device))
    generate_record(
        run, path, device=device, data=data, on_round=on_round, on_epoch=lambda row: progress({**at, **row})
    )
