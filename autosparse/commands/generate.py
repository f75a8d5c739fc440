"""Generate: IRP on networks, one record a run."""

from __future__ import annotations

from pathlib import Path

from autosparse.commands.directory import claim_directory
from autosparse.commands.loading import plain
from autosparse.commands.profiles import profiled
from autosparse.commands.schemas import GenerateConfig
from autosparse.commands.terminal import Live, bars, epochs_of, say, say_failed
from autosparse.errors import AutoSparseFailure
from autosparse.jobs.executor import Event
from autosparse.scorers.corpus import write_index
from autosparse.scorers.records import is_complete
from autosparse.tracking import track
from data_gen.campaign import generate as run_all
from data_gen.campaign import record_path, runs
from data_gen.tasks import sample_tasks


def run(config: GenerateConfig, *, tracking: Path | None = None, profile: bool = False) -> list[Path]:
    """Run IRP as `config` says, and give the paths of the records; what is done already is not done again.

    Args:
        tracking: directory of the MLflow store; default the output.
        profile: say where the time of the first job of each worker goes.

    Raises:
        AutoSparseFailure: runs failed; the others are complete.
    """
    if config.tasks is None:
        todo = runs(config.models, config.data, config.recipe, config.irp, config.signals, config.seeds, config.gradual)
    else:
        todo = sample_tasks(config.tasks, config.recipe, config.irp, config.signals, config.gradual)
    directory = claim_directory(config)
    news = [run.label() for run in todo if not is_complete(record_path(directory, run))]
    enabled = config.tracking and bool(news)  # a finished run answers at once
    first = bars("IRP: getting ready")
    with first as shown, track(tracking or directory, "generate", plain(config), enabled=enabled) as tracker:
        live = Live(shown, "IRP", len(todo), len(todo) - len(news), epochs=epochs_of(config.recipe))

        def on_event(event: Event) -> None:
            live.show(event)
            values = event.values
            if event.kind == "progress" and "density" in values:
                metrics = {f"{event.key}/{k}": values[k] for k in ("accuracy", "loss", "density") if k in values}
                tracker.log(metrics, values["round"])
                tracker.flush()

        with profiled(directory, profile, config.executor.kind) as of_workers:
            campaign = run_all(
                todo,
                directory,
                device=config.device,
                executor=config.executor,
                profile=of_workers,
                on_event=on_event,
            )
        live.end(f"IRP: {len(campaign.records)} of {len(todo)} records complete")
        for path in campaign.records:
            tracker.artifact(path)
    if config.tasks is not None and campaign.records:
        corpus = write_index(directory)
        say(f"corpus: {len(corpus.entries)} records, {corpus.sha256[:16]}, in {directory / 'corpus.json'}")
    for label, reason in campaign.failures.items():
        say_failed(f"{label}: {reason}")
    if campaign.failures:
        raise AutoSparseFailure(f"{len(campaign.failures)} of {len(todo)} runs failed; start again to try them again")
    say(f"records: {len(campaign.records)} complete in {directory / 'records'}")
    return list(campaign.records)
