"""Many IRP runs from one config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autosparse.errors import AutoSparseError, AutoSparseFailure, require
from autosparse.experiment.benchmark import check_prunable
from autosparse.network.signals import SignalSettings
from autosparse.pruning.irp import IRPSettings, Round
from autosparse.scorers.records import is_complete
from autosparse.training.data import DataSettings, load_data
from autosparse.training.loop import Recipe
from autosparse.training.models import ModelSettings, create_model
from data_gen.runs import Run, generate_record


@dataclass
class Campaign:
    """What came of it: the records that are complete, and the reason of each run that failed."""

    records: list[Path] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def runs(
    models: Sequence[ModelSettings],
    data: DataSettings,
    recipe: Recipe,
    irp: IRPSettings,
    signals: SignalSettings,
    seeds: Sequence[int],
) -> list[Run]:
    """One run for each seed and model.

    Raises:
        AutoSparseError: no model or seed, or two runs of one name.
    """
    require(len(models) > 0, "models", list(models), "give at least one")
    require(len(seeds) > 0, "seeds", list(seeds), "give at least one")
    found = [Run(model, data, recipe, irp, signals, seed) for seed in seeds for model in models]
    labels = [run.label() for run in found]
    for label in labels:
        require(labels.count(label) == 1, "run", label, "two runs have this name; drop the repeated model or seed")
    return found


def record_path(directory: Path, run: Run) -> Path:
    return directory / "records" / f"{run.label()}.h5"


def generate(
    todo: Sequence[Run],
    directory: Path,
    *,
    device: str = "auto",
    on_round: Callable[[Run, int, int, Round | None], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Campaign:
    """Do the runs one after another into `directory/records/NAME.h5`; one that fails does not stop the rest.

    Raises:
        AutoSparseError: an input is wrong in a way that concerns every run (the data cannot be read).
        AutoSparseFailure: every run failed for the same reason.
    """
    campaign = Campaign()
    failure: AutoSparseError | AutoSparseFailure | None = None
    paths = [record_path(directory, run) for run in todo]
    pending = [run for run, path in zip(todo, paths, strict=True) if not is_complete(path)]
    images = load_data(todo[0].data) if pending else None
    for model in {
        run.model.label(): run.model for run in pending
    }.values():  # wrong input is told before hours are spent
        assert images is not None
        check_prunable(
            create_model(model, in_channels=images.channels, classes=images.classes, image_size=images.image_size),
            images,
        )
    for run, path in zip(todo, paths, strict=True):

        def report(index: int, rounds: int, outcome: Round | None, run: Run = run) -> None:
            if on_round is not None:
                on_round(run, index, rounds, outcome)

        try:
            generate_record(run, path, device=device, data=images, on_round=report, on_epoch=on_epoch)
            campaign.records.append(path)
        except (AutoSparseError, AutoSparseFailure) as error:
            failure = error
            campaign.failures[run.label()] = str(error)
    if failure is not None and not campaign.records and len(set(campaign.failures.values())) == 1:
        raise failure
    return campaign
