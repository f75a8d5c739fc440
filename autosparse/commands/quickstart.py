"""Quickstart: the whole idea on small digits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from autosparse.commands import benchmark, fit, generate
from autosparse.commands.directory import claim_directory
from autosparse.commands.report import write_report
from autosparse.commands.schemas import BenchmarkConfig, FitConfig, GenerateConfig, QuickstartConfig
from autosparse.commands.terminal import busy, say, words
from autosparse.experiment.candidates import Candidate
from autosparse.experiment.estimate import seconds_of_trainings
from autosparse.jobs.local import jobs_at_once
from autosparse.processes import start_server
from autosparse.scorers.records import is_complete
from autosparse.training.data import load_data
from autosparse.training.recipe import steps_per_epoch

FREE = ("random", "erk", "snip", "densities:snip", "densities:synflow")
SHORT = 0.25  # of a training: the length of the short search


def run(config: QuickstartConfig) -> Path:
    """Generate, fit and benchmark on small digits as `config` says, and give the path of the report."""
    begun = time.monotonic()
    with busy("timing a few steps of each network"):
        directory = claim_directory(config)
        if config.executor.kind == "local":
            start_server()
        plan = _plan(config, directory, begun)
    say(plan)
    common: dict[str, Any] = {"device": config.device, "tracking": config.tracking}
    say("1/3 generate: IRP on small networks")
    generate.run(
        GenerateConfig(
            output=str(directory / "irp"),
            models=config.sources,
            data=config.data,
            recipe=config.recipe,
            irp=config.irp,
            signals=config.signals,
            seeds=config.source_seeds,
            executor=config.executor,
            **common,
        ),
        tracking=directory,
    )
    say("2/3 fit: a scorer from their records")
    scorer = fit.run(
        FitConfig(
            output=str(directory / "scorer"),
            records=(str(directory / "irp" / "records"),),
            fit=config.fit,
            **common,
        ),
        tracking=directory,
    )
    say(f"3/3 benchmark: {config.target.label()}, which the scorer never saw, pruned at initialization and trained")
    benchmark.run(
        BenchmarkConfig(
            output=str(directory / "benchmark"),
            models=(config.target,),
            data=config.data,
            recipe=config.recipe,
            criteria=_candidates(config, str(scorer)),
            sparsities=config.sparsities,
            seeds=config.seeds,
            executor=config.executor,
            **common,
        ),
        tracking=directory,
        report=False,
    )
    path = write_report(directory)
    minutes, seconds = divmod(round(time.monotonic() - begun), 60)
    say(f"took {minutes} min {seconds} s")
    return path


def _candidates(config: QuickstartConfig, scorer: str) -> tuple[Candidate, ...]:
    """From what is free to what costs many trainings: criteria and a shuffle, our scorer and its shuffle, a short search,
    the ticket of full rounds."""
    data = load_data(config.data)
    epochs = config.recipe.length(data) / steps_per_epoch(data, config.recipe.batch_size)
    chosen: list[dict[str, Any]] = [{"criterion": name} for name in FREE]
    chosen += [
        {"criterion": scorer, "label": "scorer"},
        {"criterion": f"densities:{scorer}", "label": "densities:scorer"},
        {"criterion": "gmp", "options": {"epochs": SHORT * epochs, "every": 5}, "label": "short search"},
        {"criterion": "irp", "options": {"rounds": config.rounds}, "label": "ticket"},
    ]
    return tuple(Candidate(**one, floor=config.floor) for one in chosen)


def _plan(config: QuickstartConfig, directory: Path, begun: float) -> str:
    """What is left to do and how long it will take: trainings by the timing, the rest by what the start took."""
    loading = time.monotonic() - begun
    data = load_data(config.data)
    records = sum(is_complete(path) for path in (directory / "irp" / "records").glob("*.h5"))
    cells = len(list((directory / "benchmark" / "cells").glob("*.json")))
    left = max(0, len(config.sources) * len(config.source_seeds) - records)
    counts = [(m, -(-left * (config.irp.rounds + 1) // len(config.sources))) for m in config.sources]
    per_sparsity = len(FREE) + 2 + (1 + SHORT) + (1 + config.rounds)  # with the searches
    whole = len(config.seeds) * (1 + per_sparsity * len(config.sparsities))
    share = 1 - cells / (len(config.seeds) * (1 + (len(FREE) + 4) * len(config.sparsities)))
    counts.append((config.target, max(0, round(whole * share))))
    trainings = sum(count for _, count in counts)
    if not trainings:
        return "everything is trained already"
    seconds = seconds_of_trainings(counts, data, config.recipe, config.executor, config.device)
    workers = jobs_at_once(config.executor, config.device, trainings)
    return f"{trainings} trainings, {workers} at a time: about {words(seconds + 7 * loading)}, as fast as this machine is now"
