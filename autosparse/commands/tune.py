"""Tune: layer densities from the outcome of trainings, by evolution or by a designed experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autosparse.commands.directory import claim_directory
from autosparse.commands.schemas import TuneConfig
from autosparse.commands.terminal import Live, bars, quiet_warnings, say, say_failed
from autosparse.errors import AutoSparseError, AutoSparseFailure, require
from autosparse.experiment.design import BATCH, DesignSettings, design, fit_rule, run_design
from autosparse.files import write_json
from autosparse.jobs.cells import unfinished
from autosparse.jobs.executor import Job, run_jobs
from autosparse.jobs.status import journal
from autosparse.network.signals import SignalSettings
from autosparse.report.text import plural
from autosparse.scorers.loading import load_scorer
from autosparse.scorers.outcome import Task, Trial, do_trial, no_scorer, sought, starting_point, tune
from autosparse.search.irp import IRPSettings
from data_gen.tasks import sample_tasks


def run(config: TuneConfig) -> Path:
    """Learn a rule of layer densities from outcomes as `config` says, and give the path of the scorer."""
    if config.design is not None:
        return run_designed(config, config.design)
    given = no_scorer(config.name) if config.scorer is None else load_scorer(config.scorer)
    scorer = starting_point(replace(given, name=config.name), config.tune)
    drawn = sample_tasks(config.tasks, config.recipe, IRPSettings(), SignalSettings())
    tasks = [Task(run.model, run.data, run.recipe, run.seed) for run in drawn]
    directory = claim_directory(config)
    path, base = directory / f"{config.name}.safetensors", directory / "base.safetensors"
    if path.exists() and load_scorer(path).card.outcome.get("inputs") == sought(scorer, tasks, config.tune):
        say(f"complete: {path} is there already")
        return path
    scorer.save(base)
    failed: dict[str, str] = {}

    def run_trials(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
        files = {trial.key: directory / "trials" / f"{trial.key}.json" for trial in trials}
        jobs = [Job(trial.key, do_trial, {"trial": trial, "path": files[trial.key]}) for trial in trials]
        live = Live(shown, "trials", len(jobs))
        with journal(directory, files, live.show) as notes:
            outcomes = run_jobs(jobs, config.executor, notes.note, device=config.device, folder=directory)
        live.end("trials")
        for trial in trials:
            if (reason := outcomes[trial.key].error) is not None and trial.key not in failed:
                failed[trial.key] = reason
                say_failed(f"{trial.task.model.label()} at {trial.sparsity:g}: {reason}")
        return {key: outcome.value for key, outcome in outcomes.items() if outcome.error is None}

    def on_generation(row: dict[str, Any]) -> None:
        say(f"generation {row['generation']} of {config.tune.generations}: validation loss {row['loss']:.4f}")

    with quiet_warnings(), bars() as shown:
        tuned = tune(scorer, base, tasks, config.tune, run_trials, on_generation)
    tuned.save(path)
    write_json(directory / "scorer.json", tuned.card.plain())
    for name, weight in tuned.rule.items():
        say(f"  {name}: {weight:+.3f}")
    held_out = tuned.card.outcome["held_out"]
    if held_out:
        gain = held_out["accuracy"]
        say(
            f"on {gain['n']} held-out trainings: {100 * gain['mean']:+.2f} ± {100 * gain['std']:.2f} points over the "
            f"scorer before tuning (p = {gain['p']:.2g})"
        )
    say(f"scorer: {path}")
    return path


def run_designed(config: TuneConfig, chosen: DesignSettings) -> Path:
    """Train what is designed, print what the outcomes say of layer densities, and give the path of the scorer."""
    drawn = sample_tasks(config.tasks, config.recipe, IRPSettings(), SignalSettings())
    cells = design([Task(run.model, run.data, run.recipe, run.seed) for run in drawn], chosen)
    networks = len({cell.model.label() for cell in cells})
    require(networks > 1, "tasks.count", config.tasks.count, "a rule is fitted to two networks or more")
    directory = claim_directory(config)
    with quiet_warnings(), bars() as shown:
        live = Live(shown, "design", len(cells), len(cells) - len(unfinished(cells, directory)), counts=True)
        results = run_design(cells, directory, device=config.device, executor=config.executor, on_event=live.show)
        live.end(f"design: {len(cells)} trainings")
    failed = [result for result in results if result.get("error")]
    for result in failed:
        say_failed(f"{result['model']} {result['source']}: {result['error']}")
    say(f"results: {directory / 'design.csv'}")
    try:
        rule = fit_rule(results, chosen.base, chosen.along)
    except AutoSparseError as error:
        raise AutoSparseFailure(f"{error}; no scorer is saved") from error
    write_json(directory / "rule.json", dataclasses.asdict(rule))
    outcome = {"design": dataclasses.asdict(chosen), "rule": dataclasses.asdict(rule)}
    path = directory / f"{config.name}.safetensors"
    scorer = replace(
        no_scorer(config.name),
        rule=rule.densities(chosen.sigma),
        positions=chosen.positions,
        n_batches=1,
        batch_size=BATCH,
    )
    replace(scorer, card=replace(scorer.card, outcome=outcome)).save(path)
    say(
        f"{rule.trainings} trainings of {rule.networks} networks; accuracy points per std of the feature × unit of log "
        "density:"
    )
    for name, value in sorted(rule.coefficients.items(), key=lambda item: -abs(item[1])):
        say(f"  {name:16} {value:+.2f} ± {rule.errors[name]:.2f}")
    say(
        f"  curvature        {rule.curvature:+.2f}; on networks left out: rank correlation {rule.correlation:.2f}, "
        f"slope {rule.slope:.2f}; predicted gain over the base: {rule.gain:.2f} points"
    )
    if not rule.correlation > 0:
        say("  this rule does not predict networks that were left out: do not expect it to be better than its base")
    if rule.networks < networks:
        say(
            f"  {plural(networks - rule.networks, 'network')} left out: trainings failed, or all reached the same accuracy"
        )
    if rule.networks <= len(rule.coefficients):
        say("  fewer networks than features: the standard errors mean little, give more tasks")
    if failed:
        raise AutoSparseFailure(f"{len(failed)} of {len(cells)} trainings failed; start again to try them again")
    say(f"scorer: {path}")
    return path
