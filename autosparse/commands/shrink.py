"""Shrink: trained networks made physically smaller."""

from __future__ import annotations

from typing import Any

from autosparse.commands.directory import claim_directory
from autosparse.commands.loading import plain
from autosparse.commands.report import write_report
from autosparse.commands.schemas import ShrinkConfig
from autosparse.commands.terminal import Live, bars, print_table, say, say_failed
from autosparse.errors import AutoSparseFailure
from autosparse.experiment.benchmark import with_inputs
from autosparse.experiment.structured import GATED, run_thinnings, summary
from autosparse.jobs.cells import unfinished
from autosparse.jobs.executor import Event
from autosparse.tracking import track
from autosparse.training.data import load_data
from autosparse.training.loop import fabric_for


def run(config: ShrinkConfig) -> list[dict[str, Any]]:
    """Make networks physically smaller as `config` says, and give the rows of results."""
    todo = config.networks()
    place = fabric_for(config.device).device if config.executor.kind == "inline" else "cpu"
    data = load_data(config.data, place)
    todo = with_inputs(todo, data)
    directory = claim_directory(config)
    done = len(todo) - len(unfinished(todo, directory))
    enabled = config.tracking and done < len(todo)
    first = bars("shrink: getting ready")
    with first as shown, track(directory, "shrink", plain(config), enabled=enabled) as tracker:
        live = Live(shown, "shrink", len(todo), done)

        def on_event(event: Event) -> None:
            live.show(event)
            value = event.values.get("value") if event.kind == "done" else None
            if value is not None:
                name = "/".join(str(value[key]) for key in ("method", "ratio") if value[key])
                tracker.log({f"{name}/accuracy": value["accuracy"]}, value["seed"])
                tracker.flush()

        results = run_thinnings(
            todo, directory, data, device=config.device, executor=config.executor, on_event=on_event
        )
        live.end(f"shrink: {len(todo)} networks")
        tracker.artifact(directory / "results.csv")
    title, headers, rows = summary(results)
    print_table(title, headers, rows)
    say(f"results: {directory / 'results.csv'}, networks: {directory / 'networks'}")
    for result in results:
        if result["method"] in GATED and not result.get("error") and not result["removed"]:
            say(f"{result['method']} seed {result['seed']}: no gate closed; raise gates.cost, or train longer")
    write_report(directory)
    failed = [result for result in results if result.get("error")]
    for result in failed:
        say_failed(f"{result['method']} {result['ratio']} seed {result['seed']}: {result['error']}")
    if failed:
        raise AutoSparseFailure(f"{len(failed)} of {len(todo)} networks failed; start again to try them again")
    return results
