"""Diagnose: how well a network can train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autosparse.commands.directory import claim_directory
from autosparse.commands.report import write_report
from autosparse.commands.schemas import DiagnoseConfig
from autosparse.commands.terminal import bars, print_table, quiet_warnings, say
from autosparse.experiment.states import Measurement, run_states, states
from autosparse.report.page import diagnosis_table
from autosparse.trainability.stored import load_weights
from autosparse.training.data import load_data
from autosparse.training.loop import check_fits, fabric_for
from autosparse.training.models import build_model
from autosparse.training.threads import threads_for


def run(config: DiagnoseConfig) -> Path:
    """Measure how well a network can train, as `config` says, and give the path of the report."""
    masks, weights = (None if path is None else Path(path) for path in (config.masks, config.weights))
    todo = states(config.criteria, masks, config.prepare)
    place = fabric_for(config.device).device
    data = load_data(config.data, place)
    model = build_model(config.model, data, config.seed)
    if weights is not None:
        load_weights(weights, model)
    model = model.to(place)
    check_fits(model, data)
    directory = claim_directory(config)
    with threads_for(model, data, config.recipe.batch_size), quiet_warnings(), bars() as shown:
        task = shown.add_task("diagnose", total=len(todo))

        def on_cell(done: int, cell: Measurement, result: Any, known: bool) -> None:
            shown.update(task, completed=done, description=f"diagnose: {cell.state.name}")

        results = run_states(
            todo,
            directory,
            model,
            data,
            config.diagnostics,
            sparsity=config.sparsity,
            recipe=config.recipe,
            seed=config.seed,
            device=config.device,
            on_cell=on_cell,
        )
    headers, lines = diagnosis_table(results)
    print_table(f"{config.model.label()} on {config.data.name}", headers, lines)
    say(f"results: {directory / 'diagnosis.csv'}, {directory / 'summary.csv'}")
    return write_report(directory)
