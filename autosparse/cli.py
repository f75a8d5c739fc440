"""The command line: composes the rooms, and imports them only inside the commands."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autosparse.commands.streams import readable, streams
from autosparse.commands.terminal import Live, bars, busy, words
from autosparse.errors import AutoSparseError, AutoSparseFailure, memory_watched
from autosparse.jobs.processes import let_threads_sleep, start_server

if TYPE_CHECKING:
    from autosparse.commands.schemas import (
        BenchmarkConfig,
        CheckConfig,
        ExportConfig,
        FitConfig,
        GenerateConfig,
        QuickstartConfig,
        ShrinkConfig,
        TuneConfig,
    )
    from autosparse.jobs.executor import Event
    from autosparse.training.loop import Recipe

app = typer.Typer(
    name="autosparse",
    help="Learn which weights to keep before training: generate IRP records, fit a scorer, prune unseen networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(help="YAML file, such as those in configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that override the file's: recipe.epochs=10 device=cuda:0,1 (a training on two GPUs)",
    ),
]
Profile = Annotated[
    bool, typer.Option("--profile", help="Trace some steps and say where the time goes, in OUTPUT/profile/.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    let_threads_sleep()
    with suppress(Exception):  # standard error may be no file
        faulthandler.enable()  # a crash of a compiled library shows where it was
    with streams():
        try:
            with memory_watched("working"):
                app(args=arguments, standalone_mode=True)
        except AutoSparseError as error:
            _fail(str(error), 2)
        except AutoSparseFailure as error:
            _fail(str(error), 1)
        except OSError as error:  # a path too long, no permission, no space: nothing that a traceback would explain
            _fail(f"{error.strerror}{f': {error.filename}' if error.filename else ''}", 1)
        except SystemExit as end:
            if end.code == 130:  # what typer makes of Ctrl-C, without a word
                _fail("stopped: run the same command again to go on", 130)
            raise


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# -- commands -----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: autosparse generate configs/irp/digits.yaml seeds=[0,1] irp.rounds=8")
def generate(config: Config, overrides: Overrides = None, profile: Profile = False) -> None:
    """Run IRP on every model with every seed, or on networks drawn at random (configs/corpus), and record what each
    weight looked like and survived.

    A second start goes on after the last finished round; a finished run answers at once.
    """
    from autosparse.commands.schemas import GenerateConfig, load_config

    chosen = load_config(GenerateConfig, config, overrides or [])
    with _profiled(chosen.output, profile, chosen.executor.kind) as of_workers:
        _generate(chosen, profile=of_workers)


@app.command(epilog="Example: autosparse fit configs/scorer/digits.yaml fit.head=mse")
def fit(config: Config, overrides: Overrides = None) -> None:
    """Train a scorer on records: signals at initialization in, survival out."""
    from autosparse.commands.schemas import FitConfig, load_config

    _fit(load_config(FitConfig, config, overrides or []))


@app.command(epilog="Example: autosparse tune configs/tune.yaml scorer=runs/scorer/scorer.safetensors")
def tune(config: Config, overrides: Overrides = None) -> None:
    """Learn a scorer's layer densities from the outcome of short trainings, by evolution strategies.

    Stopped, it goes on where it was; ends with a paired comparison on tasks that it did not learn from.
    """
    from autosparse.commands.schemas import TuneConfig, load_config

    _tune(load_config(TuneConfig, config, overrides or []))


@app.command(epilog="Example: autosparse prune configs/prune.yaml criterion=snip sparsity=0.95")
def prune(config: Config, overrides: Overrides = None) -> None:
    """Write the masks of a freshly initialized network, by any criterion or scorer."""
    from autosparse.commands.schemas import PruneConfig, claim_directory, load_config
    from autosparse.experiment.benchmark import build_model
    from autosparse.experiment.candidates import find_masks, inputs
    from autosparse.masks.mask import Masks
    from autosparse.training.data import load_data
    from autosparse.training.loop import check_fits, fabric_for
    from autosparse.training.threads import threads_for

    chosen = load_config(PruneConfig, config, overrides or [])
    place = fabric_for(chosen.device).device
    data = load_data(chosen.data, place)
    model = build_model(chosen.model, data, chosen.seed).to(place)
    check_fits(model, data)
    directory = claim_directory(chosen)
    path = directory / "masks.safetensors"
    of = inputs(model, data, chosen.criterion)
    if path.exists() and Masks.load(path).report.origin.get("inputs") == of:
        _say(f"complete: {path} is there already")
        return
    with threads_for(model, data, chosen.recipe.batch_size), _quiet_warnings(), bars() as shown:
        task = shown.add_task(f"{chosen.criterion.name} on {chosen.model.label()}", total=None)
        found = find_masks(
            model,
            data,
            chosen.criterion,
            chosen.sparsity,
            recipe=chosen.recipe,
            seed=chosen.seed,
            device=chosen.device,
            state=directory / "state",
            on_epoch=lambda row: shown.update(task, description=f"training, epoch {row['epoch']:.0f}"),
        )
    found.masks.save(path)
    report = found.masks.report
    rows = [
        [r.name, "×".join(map(str, r.shape)), f"{r.kept:,}", f"{r.total:,}", f"{100 * r.density:.2f} %"]
        for r in found.masks.layers()
    ]
    _table(f"{chosen.model.label()} by {chosen.criterion.name}", ["weight", "shape", "kept", "of", "density"], rows)
    effective = "unknown" if report.effective_sparsity is None else f"{report.effective_sparsity:.4f}"
    _say(
        f"sparsity {found.masks.sparsity:.4f} ({found.masks.kept:,} of {found.masks.total:,} kept), effective {effective}, "
        f"dead layers {len(report.dead_layers)}, ties {report.ties:.2%}, "
        f"cost {found.seconds:.1f} s = {found.epochs:.3g} epochs"
    )
    for note in report.notes:
        _say(f"note: {note}")
    _say(f"masks: {path}")


@app.command(epilog="Example: autosparse train configs/train.yaml masks=runs/prune/masks.safetensors")
def train(config: Config, overrides: Overrides = None, profile: Profile = False) -> None:
    """Train a network, with masks or dense. Stopped, it goes on from its last checkpoint."""
    from autosparse.commands.schemas import TrainConfig, claim_directory, load_config, plain
    from autosparse.experiment.benchmark import build_model
    from autosparse.experiment.tracking import track
    from autosparse.files import fingerprint, read_json, write_json
    from autosparse.masks.mask import Masks
    from autosparse.trainability.prepare import prepare
    from autosparse.trainability.stored import save_weights
    from autosparse.training.content import of_network
    from autosparse.training.data import load_data
    from autosparse.training.loop import fabric_for
    from autosparse.training.loop import train as run
    from autosparse.training.threads import threads_for

    chosen = load_config(TrainConfig, config, overrides or [])
    masks = None if chosen.masks is None else Masks.load(chosen.masks)
    place = fabric_for(chosen.device, chosen.recipe.precision).device
    data = load_data(chosen.data, place)
    model = build_model(chosen.model, data, chosen.seed)
    if masks is not None:
        masks.check(model)
    directory = claim_directory(chosen)
    done = directory / "result.json"
    result = read_json(done, "result") if done.exists() else {}
    inputs = {
        "images": data.content,
        "initial network": of_network(model),
        "masks": fingerprint(masks and dict(masks)),
    }
    changed = [name for name, content in inputs.items() if result and result.get("inputs", {}).get(name) != content]
    if changed:
        _say(f"trained anew: the {' and the '.join(changed)} are not those of the result in {directory}")
    elif result:
        _say(f"complete: accuracy {100 * result['accuracy']:.2f} %, {directory / 'model.safetensors'}")
        if profile:
            _say("profile: nothing was trained; give another output")
        return
    if chosen.prepare is not None:
        example = data.normalise(data.train.images[:2]).cpu()
        prepared = prepare(model, masks, chosen.prepare, example_input=example, seed=chosen.seed)
        before, after = ([getattr(p, f"lipschitz_{when}") for p in prepared.layers] for when in ("before", "after"))
        _say(
            f"{chosen.prepare}: Lipschitz constants of {len(before)} layers {min(before):.2f} … {max(before):.2f}, "
            f"now {min(after):.2f} … {max(after):.2f}"
        )
        if masks is not None and prepared.masks != masks:
            prepared.masks.save(directory / "masks.safetensors")
            _say(f"masks: {directory / 'masks.safetensors'}, chosen by {chosen.prepare}")
        masks = prepared.masks if masks is not None else None
    history: list[dict[str, float]] = []
    total = max(1, round(chosen.recipe.length(data) / max(1, len(data.train) // chosen.recipe.batch_size)))
    tracked = track(directory, "train", plain(chosen), enabled=chosen.tracking)
    threads = threads_for(model, data, chosen.recipe.batch_size)
    with threads, _profiled(directory, profile), tracked as tracker, bars() as shown:
        task = shown.add_task(f"train {chosen.model.label()}", total=total)

        def on_epoch(row: dict[str, float]) -> None:
            history.append(row)
            shown.update(task, completed=int(row["epoch"]), description=_epoch_text("train", row))
            tracker.log({k: v for k, v in row.items() if k != "epoch"}, int(row["epoch"]))
            tracker.flush()
            write_json(directory / "history.json", {"epochs": history})

        trained = run(
            model,
            data,
            chosen.recipe,
            masks=masks,
            seed=chosen.seed,
            device=chosen.device,
            checkpoint=directory / "checkpoint.pt",
            on_epoch=on_epoch,
        )
        save_weights(directory / "model.safetensors", model)
        write_json(directory / "history.json", {"epochs": trained.history})
        figures = {
            k: getattr(trained, k)
            for k in ("accuracy", "loss", "steps", "epochs", "seconds", "images_per_second", "arithmetic")
        }
        tracker.log({"test_accuracy": trained.accuracy, "test_loss": trained.loss}, int(trained.epochs))
        tracker.artifact(directory / "model.safetensors")
        write_json(done, {**figures, "inputs": inputs})
    _say(
        f"accuracy {100 * trained.accuracy:.2f} % after the last epoch, {trained.seconds:.1f} s, "
        f"{trained.images_per_second:,.0f} images/s; {directory / 'model.safetensors'}"
    )


@app.command(epilog="Example: autosparse export configs/export.yaml export.forms=[safetensors,onnx,channels]")
def export(config: Config, overrides: Overrides = None) -> None:
    """Write a pruned network as safetensors, ONNX, torch.export, 2:4 or physically smaller, and measure each.

    Every file is checked against the masked network. The table tells parameters, FLOPs, bytes and latency beside the dense
    network's, and plainly where a form is not faster.
    """
    from autosparse.commands.schemas import ExportConfig, load_config

    _export(load_config(ExportConfig, config, overrides or []))


@app.command(epilog="Example: autosparse benchmark configs/benchmark/digits.yaml seeds=[0,1,2]")
def benchmark(config: Config, overrides: Overrides = None, profile: Profile = False) -> None:
    """Prune and train every model × criterion × sparsity × seed under one recipe; results.csv and report.html."""
    from autosparse.commands.schemas import BenchmarkConfig, load_config

    chosen = load_config(BenchmarkConfig, config, overrides or [])
    with _profiled(chosen.output, profile, chosen.executor.kind) as of_workers:
        _benchmark(chosen, profile=of_workers)


@app.command(epilog="Example: autosparse check configs/check.yaml sparsities=[0.9,0.98] seeds=[0,1,2,3,4]")
def check(config: Config, overrides: Overrides = None) -> None:
    """Sanity checks: does a criterion choose positions, or only layer densities?

    Trains every criterion beside its own shuffle (the same layer densities, positions at random), its mask on newly
    drawn weights, and its lowest scores, on the same seeds; ends with a paired t-test of each difference.
    """
    from autosparse.commands.schemas import CheckConfig, load_config

    _benchmark(load_config(CheckConfig, config, overrides or []))


@app.command(epilog="Example: autosparse diagnose configs/diagnose.yaml sparsity=0.98 criteria=[erk,snip]")
def diagnose(config: Config, overrides: Overrides = None) -> None:
    """How well a network can train, dense, pruned and prepared: Lipschitz constants, Jacobian, Hessians, gradient flow.

    Measures without training; states that are done are not measured again.
    """
    from autosparse.commands.schemas import DiagnoseConfig, claim_directory, load_config
    from autosparse.experiment.benchmark import build_model
    from autosparse.experiment.states import run_states, states
    from autosparse.report.rows import diagnosis_table
    from autosparse.trainability.stored import load_weights
    from autosparse.training.data import load_data
    from autosparse.training.loop import check_fits, fabric_for
    from autosparse.training.threads import threads_for

    chosen = load_config(DiagnoseConfig, config, overrides or [])
    masks, weights = (None if path is None else Path(path) for path in (chosen.masks, chosen.weights))
    todo = states(chosen.criteria, masks, chosen.prepare)
    place = fabric_for(chosen.device).device
    data = load_data(chosen.data, place)
    model = build_model(chosen.model, data, chosen.seed)
    if weights is not None:
        load_weights(weights, model)
    model = model.to(place)
    check_fits(model, data)
    directory = claim_directory(chosen)
    with threads_for(model, data, chosen.recipe.batch_size), _quiet_warnings(), bars() as shown:
        task = shown.add_task(f"diagnose: {todo[0].name}", total=len(todo))

        def on_state(number: int, result: Mapping[str, Any]) -> None:
            following = todo[number + 1].name if number + 1 < len(todo) else "done"
            shown.update(task, completed=number + 1, description=f"diagnose: {following}")

        results = run_states(
            todo,
            directory,
            model,
            data,
            chosen.diagnostics,
            sparsity=chosen.sparsity,
            recipe=chosen.recipe,
            seed=chosen.seed,
            device=chosen.device,
            on_state=on_state,
        )
    headers, lines = diagnosis_table(results)
    _table(f"{chosen.model.label()} on {chosen.data.name}", headers, lines)
    _say(f"results: {directory / 'diagnosis.csv'}, {directory / 'summary.csv'}")
    _report(directory)


@app.command(epilog="Example: autosparse shrink configs/shrink/resnet20-cpu.yaml methods=[tpp,l1,snip] ratios=[0.7]")
def shrink(config: Config, overrides: Overrides = None) -> None:
    """Make trained networks physically smaller: TPP (filters are pushed out before they go) beside removal at once.

    Trains densely, chooses filters, trains on with or without the penalty, removes the filters, fine-tunes what is left.
    Stopped, it goes on from its last checkpoint.
    """
    from autosparse.commands.schemas import ShrinkConfig, load_config

    _shrink(load_config(ShrinkConfig, config, overrides or []))


@app.command(epilog="Example: autosparse status runs/irp")
def status(directory: Annotated[Path, typer.Argument(help="The output of generate, benchmark or check.")]) -> None:
    """What of a campaign or grid is done, running, failed (and why) or waiting; while it runs and after."""
    from autosparse.jobs.status import STATES, statuses

    for found in statuses(directory):
        counts = ", ".join(f"{found.count(state)} {state}" for state in STATES)
        _say(
            f"{found.directory}: {len(found.jobs)} jobs: {counts}; {'at work' if found.alive else 'nobody works on it'}"
        )
        for job in found.jobs:
            if job.detail:
                _say(f"  {job.state}: {job.key}: {job.detail}")


@app.command(epilog="Example: autosparse report runs/quickstart")
def report(directory: Annotated[Path, typer.Argument(help="A directory with results, records or scorers.")]) -> None:
    """Write report.html, one file, and its figures as SVG."""
    _report(directory)


@app.command(name="list", epilog="Example: autosparse list models")
def list_(
    what: Annotated[
        str, typer.Argument(help="models, data, criteria, preparations, scorers, signals or features; default: all.")
    ] = "all",
) -> None:
    """Names that configs and `prune` understand."""
    from autosparse.errors import suggest
    from autosparse.experiment.candidates import METHODS
    from autosparse.experiment.checks import CHECKS
    from autosparse.network.signals import SIGNALS, WARMUP_SIGNALS
    from autosparse.pruning.criteria import EARLY, PRESETS
    from autosparse.scorers.bundled import bundled
    from autosparse.scorers.features import FEATURES, GROUPS
    from autosparse.scorers.scorer import read_scorer
    from autosparse.trainability.prepare import PREPARATIONS
    from autosparse.training.models import MODELS
    from autosparse.training.readers import DATA

    names: dict[str, list[str]] = {
        "models": [*MODELS, "torchvision:NAME", "timm:NAME", "package.module:factory"],
        "data": [*DATA, "imagefolder:PATH", "hdf5:PATH"],
        "criteria": [
            *(f"{name}[@EPOCHS]" if name in EARLY else name for name in PRESETS),
            *METHODS,
            *bundled(),
            "SCORER.safetensors",
            "models:/NAME@ALIAS",
            *(f"{v}:ANY_OF_THESE" for v in CHECKS),
        ],
        "preparations": [*PREPARATIONS],
        "scorers": [f"{name}: {read_scorer(path).card.summary}" for name, path in bundled().items()],
        "signals": [*SIGNALS, *(f"{name}@EPOCHS" for name in WARMUP_SIGNALS)],
        "features": [
            *(f"{name}: {feature.meaning}" for name, feature in FEATURES.items()),
            *(f"{name}: all of {', '.join(members)}" for name, members in GROUPS.items()),
        ],
    }
    if what != "all" and what not in names:
        raise AutoSparseError(f"list {what!r}: {suggest(what, names)}")
    for key, values in names.items():
        if what in ("all", key):
            lines = key in ("features", "scorers")
            print(f"{key}:" + ("\n  " if lines else " ") + ("\n  " if lines else ", ").join(values))


@app.command(epilog="Example: autosparse quickstart")
def quickstart(
    config: Annotated[Path | None, typer.Argument(help="YAML file; default: as in configs/quickstart.yaml.")] = None,
    overrides: Overrides = None,
) -> None:
    """See the whole idea on small digits in under 3 minutes on 2 CPU cores.

    IRP on two small networks and two seeds, a scorer fitted on their records, and a third network pruned by it at
    initialization and trained, beside random, ERK, magnitude and SNIP.
    """
    begun = time.monotonic()
    if config is not None and "=" in str(config):  # `quickstart key=value`: no file was given
        overrides, config = [str(config), *(overrides or [])], None
    with busy("loading PyTorch, timing a few steps of each network"):
        from autosparse.commands.schemas import (
            BenchmarkConfig,
            FitConfig,
            GenerateConfig,
            QuickstartConfig,
            claim_directory,
            load_config,
        )
        from autosparse.experiment.candidates import Candidate

        chosen = load_config(QuickstartConfig, config, overrides or [])
        directory = claim_directory(chosen)
        if chosen.executor.kind == "local":
            start_server()
        plan = _quickstart_plan(chosen, directory, begun)
    _say(plan)
    common: dict[str, Any] = {"device": chosen.device, "tracking": chosen.tracking}
    _say("1/3 generate: IRP on small networks")
    _generate(
        GenerateConfig(
            output=str(directory / "irp"),
            models=chosen.sources,
            data=chosen.data,
            recipe=chosen.recipe,
            irp=chosen.irp,
            signals=chosen.signals,
            seeds=chosen.source_seeds,
            executor=chosen.executor,
            **common,
        ),
        directory,
    )
    _say("2/3 fit: a scorer from their records")
    scorer = _fit(
        FitConfig(
            output=str(directory / "scorer"),
            records=(str(directory / "irp" / "records"),),
            fit=chosen.fit,
            **common,
        ),
        directory,
    )
    _say(f"3/3 benchmark: {chosen.target.label()}, which the scorer never saw, pruned at initialization and trained")
    criteria = [Candidate(name, floor=chosen.floor) for name in ("random", "erk", "magnitude", "snip")]
    _benchmark(
        BenchmarkConfig(
            output=str(directory / "benchmark"),
            models=(chosen.target,),
            data=chosen.data,
            recipe=chosen.recipe,
            criteria=(
                *criteria,
                Candidate(str(scorer), label="scorer", floor=chosen.floor),
                Candidate(f"densities:{scorer}", label="densities:scorer", floor=chosen.floor),
            ),
            sparsities=chosen.sparsities,
            seeds=chosen.seeds,
            executor=chosen.executor,
            **common,
        ),
        directory,
        write_report=False,
    )
    _report(directory)
    minutes, seconds = divmod(round(time.monotonic() - begun), 60)
    _say(f"took {minutes} min {seconds} s")


def _quickstart_plan(chosen: QuickstartConfig, directory: Path, begun: float) -> str:
    """What is left to do and how long it will take: trainings by the timing, the rest by what the start took."""
    from autosparse.experiment.estimate import seconds_of_trainings
    from autosparse.jobs.executor import jobs_at_once
    from autosparse.scorers.records import is_complete
    from autosparse.training.data import load_data

    loading = time.monotonic() - begun
    data = load_data(chosen.data)
    records = sum(is_complete(path) for path in (directory / "irp" / "records").glob("*.h5"))
    cells = len(list((directory / "benchmark" / "cells").glob("*.json")))
    left = max(0, len(chosen.sources) * len(chosen.source_seeds) - records)
    counts = [(m, -(-left * (chosen.irp.rounds + 1) // len(chosen.sources))) for m in chosen.sources]
    masked = 6 * len(chosen.sparsities)
    counts.append((chosen.target, max(0, len(chosen.seeds) * (1 + masked) - cells)))
    trainings = sum(count for _, count in counts)
    if not trainings:
        return "everything is trained already"
    seconds = seconds_of_trainings(counts, data, chosen.recipe, chosen.executor, chosen.device)
    workers = jobs_at_once(chosen.executor, chosen.device, trainings)
    return f"{trainings} trainings, {workers} at a time: about {words(seconds + 7 * loading)}, as fast as this machine is now"


# -- the three jobs, from checked configs -------------------------------------------------------------------------------


def _generate(config: GenerateConfig, tracking: Path | None = None, profile: Path | None = None) -> None:
    from autosparse.commands.schemas import claim_directory, plain
    from autosparse.experiment.tracking import track
    from autosparse.scorers.corpus import write_index
    from autosparse.scorers.records import is_complete
    from data_gen.campaign import generate as run_all
    from data_gen.campaign import record_path, runs
    from data_gen.tasks import sample_tasks

    if config.tasks is None:
        todo = runs(config.models, config.data, config.recipe, config.irp, config.signals, config.seeds)
    else:
        todo = sample_tasks(config.tasks, config.recipe, config.irp, config.signals)
    directory = claim_directory(config)
    news = [run.label() for run in todo if not is_complete(record_path(directory, run))]
    enabled = config.tracking and bool(news)  # a finished run answers at once
    first = bars("IRP: getting ready")
    with first as shown, track(tracking or directory, "generate", plain(config), enabled=enabled) as tracker:
        live = Live(shown, "IRP", len(todo), len(todo) - len(news), epochs=_epochs(config.recipe))

        def on_event(event: Event) -> None:
            live.show(event)
            values = event.values
            if event.kind == "progress" and "density" in values:
                metrics = {f"{event.key}/{k}": values[k] for k in ("accuracy", "loss", "density")}
                tracker.log(metrics, values["round"])
                tracker.flush()

        campaign = run_all(
            todo, directory, device=config.device, executor=config.executor, profile=profile, on_event=on_event
        )
        live.end(f"IRP: {len(campaign.records)} of {len(todo)} records complete")
        for path in campaign.records:
            tracker.artifact(path)
    if config.tasks is not None and campaign.records:
        corpus = write_index(directory)
        _say(f"corpus: {len(corpus.entries)} records, {corpus.sha256[:16]}, in {directory / 'corpus.json'}")
    for label, reason in campaign.failures.items():
        print(f"failed: {label}: {reason}", file=sys.stderr)
    if campaign.failures:
        raise AutoSparseFailure(f"{len(campaign.failures)} of {len(todo)} runs failed; start again to try them again")
    _say(f"records: {len(campaign.records)} complete in {directory / 'records'}")


def _fit(config: FitConfig, tracking: Path | None = None) -> Path:
    from autosparse.commands.schemas import claim_directory, plain
    from autosparse.experiment.tracking import track
    from autosparse.files import read_json, sha256, write_json
    from autosparse.scorers.card import OWN, PARTS, read_card
    from autosparse.scorers.fitting import fit as run
    from autosparse.scorers.records import distinct, find_records
    from autosparse.training.loop import fabric_for

    records, copies = distinct(find_records(config.records))
    for note in copies:
        _say(f"note: {note}")
    device = str(fabric_for(config.device).device)
    directory = claim_directory(config)
    path, card = directory / f"{config.name}.safetensors", directory / "scorer.json"
    hashes = sorted(sha256(record) for record in records)
    if path.exists() and card.exists():
        known = read_card(read_json(card, "scorer card"))
        if sorted(r["sha256"] for r in known.records) == hashes:
            _say(f"complete: {path} is there already")
            return path
    first = bars(f"fit: reading {len(records)} records")
    with first as shown, track(tracking or directory, "fit", plain(config), enabled=config.tracking) as tracker:
        task = shown.task_ids[0]

        def on_epoch(row: dict[str, float]) -> None:
            text = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items() if k != "epoch")
            shown.update(task, total=config.fit.epochs, completed=int(row["epoch"]), description=f"fit: {text}")
            tracker.log({k: v for k, v in row.items() if k != "epoch"}, int(row["epoch"]))
            tracker.flush()

        def on_test(rows: list[dict[str, Any]]) -> None:
            _write_ranks(directory / "test", config.fit.split, rows)

        if config.fit.folds:
            _cross_validate(config, records, hashes, directory, device)
        scorer = run(records, config.fit, name=config.name, device=device, on_epoch=on_epoch, on_test=on_test)
        scorer.save(path)
        write_json(card, scorer.card.plain())
        own = scorer.card.test.get(OWN, {})
        tracker.log({f"test/{key}": value for key, value in own.items()}, config.fit.epochs)
        tracker.artifact(card)
        tracker.register_scorer(path, config.name, config.alias)
    parts = [
        f"{len(scorer.card.part(part))} {what}"
        for part, what in zip(PARTS, ("learned from", "chose the epoch", "judge"), strict=True)
    ]
    _say(f"records: {', '.join(parts)}; epoch {scorer.card.epoch} of {config.fit.epochs} is kept")
    for note in scorer.card.notes:
        _say(f"note: {note}")
    if own:
        magnitude = scorer.card.test["magnitude"]
        _say(
            f"records that judge: AUC {own['auc']:.3f} (|θ₀| alone {magnitude['auc']:.3f}), within layers "
            f"{own['auc_within_layers']:.3f} ({magnitude['auc_within_layers']:.3f}), "
            f"within bins of |θ₀| {own['auc_within_magnitude_bins']:.3f} (0.5), overlap "
            f"{own['overlap']:.3f} ({magnitude['overlap']:.3f}); {directory / 'test.csv'}"
        )
    _say(f"scorer: {path}")
    return path


def _export(config: ExportConfig) -> None:
    from autosparse.commands.schemas import claim_directory
    from autosparse.files import fingerprint, read_json, write_json
    from autosparse.masks.mask import Masks
    from autosparse.trainability.export import export, write_table
    from autosparse.trainability.shrink import shrink
    from autosparse.trainability.stored import NetworkSettings, load_weights
    from autosparse.training.content import of_network
    from autosparse.training.data import load_data
    from autosparse.training.loop import fabric_for

    masks = Masks.load(config.masks)
    device = fabric_for(config.device).device
    if config.input_size is not None and config.classes is not None:
        network = NetworkSettings(config.model, config.input_size[0], config.classes, config.input_size[1])
    else:
        data = load_data(config.data)
        network = NetworkSettings(config.model, data.channels, data.classes, data.image_size)
    model = network.build(config.seed)
    masks.check(model)
    smaller = shrink(model, masks, network.example()) if config.smaller else None
    if config.weights is not None:
        load_weights(config.weights, model if smaller is None else smaller)
    directory = claim_directory(config)
    sources = {"network": of_network(model if smaller is None else smaller), "masks": fingerprint(dict(masks))}
    done = directory / "export.json"
    if done.exists() and read_json(done, "export")["sources"] == sources:
        _say(f"complete: {directory / 'table.csv'} is there already")
        return
    with _quiet_warnings(), bars() as shown:
        task = shown.add_task(f"export {config.model.label()}", total=None)
        made = export(
            model,
            masks,
            directory,
            config.export,
            example_input=network.example(),
            network=network,
            smaller=smaller,
            device=device,
            on_form=lambda text: shown.update(task, description=f"export {config.model.label()}: {text}"),
        )
    write_table(directory / "table.csv", made.rows)
    sizes = config.export.batch_sizes
    headers = ["network", "runs in", "parameters", "stored", "MFLOPs", "effective", "MB"]
    headers += [text for n in sizes for text in (f"ms, batch {n}", "dense / this (quartiles)")]
    rows = []
    for row in made.rows:
        line = [row.network, row.runtime, f"{row.cost.nonzero:,}", f"{row.stored:,}", f"{row.cost.flops / 1e6:,.2f}"]
        line += [f"{row.cost.effective_flops / 1e6:,.2f}", f"{row.size / 1e6:,.3f}"]
        for n in sizes:
            found = row.latency.get(n)
            line += ["", ""] if found is None else [f"{found.milliseconds:.3g}", ""]
            if found is not None and row.network != "dense":
                line[-1] = f"{found.speedup:.2f} ({found.lower:.2f} – {found.upper:.2f})"
        rows.append(line)
    _table(f"{config.model.label()} under {config.masks}", headers, rows)
    for row in made.rows:
        if row.verdict:
            _say(f"{row.network}, {row.runtime}: {row.verdict}{f'; {directory / row.file}' if row.file else ''}")
    for note in made.notes:
        _say(f"note: {note}")
    for form, reason in made.failures.items():
        print(f"failed: {form}: {reason}", file=sys.stderr)
    if made.failures:
        count = "1 form" if len(made.failures) == 1 else f"{len(made.failures)} forms"
        raise AutoSparseFailure(f"{count} could not be made; the others are in {directory}")
    write_json(done, {"sources": sources})
    _say(f"table: {directory / 'table.csv'}")


def _tune(config: TuneConfig) -> None:
    from autosparse.commands.schemas import claim_directory
    from autosparse.experiment.tracking import load_scorer
    from autosparse.files import write_json
    from autosparse.jobs.executor import Job, run_jobs
    from autosparse.jobs.status import journal
    from autosparse.network.signals import SignalSettings
    from autosparse.scorers.outcome import Task, Trial, do_trial, no_scorer, sought, starting_point
    from autosparse.scorers.outcome import tune as search
    from autosparse.search.irp import IRPSettings
    from data_gen.tasks import sample_tasks

    given = no_scorer(config.name) if config.scorer is None else load_scorer(config.scorer)
    scorer = starting_point(replace(given, name=config.name), config.tune)
    drawn = sample_tasks(config.tasks, config.recipe, IRPSettings(), SignalSettings())
    tasks = [Task(run.model, run.data, run.recipe, run.seed) for run in drawn]
    directory = claim_directory(config)
    path, base = directory / f"{config.name}.safetensors", directory / "base.safetensors"
    if path.exists() and load_scorer(path).card.outcome.get("inputs") == sought(scorer, tasks, config.tune):
        _say(f"complete: {path} is there already")
        return
    scorer.save(base)
    failed: dict[str, str] = {}

    def run(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
        files = {trial.key: directory / "trials" / f"{trial.key}.json" for trial in trials}
        jobs = [Job(trial.key, do_trial, {"trial": trial, "path": files[trial.key]}) for trial in trials]
        live = Live(shown, "trials", len(jobs))
        with journal(directory, files) as book:

            def on_event(event: Event) -> None:
                book.note(event)
                live.show(event)

            outcomes = run_jobs(jobs, config.executor, on_event, device=config.device)
        live.end("trials")
        for trial in trials:
            if (reason := outcomes[trial.key].error) is not None and trial.key not in failed:
                failed[trial.key] = reason
                print(f"failed: {trial.task.model.label()} at {trial.sparsity:g}: {reason}", file=sys.stderr)
        return {key: outcome.value for key, outcome in outcomes.items() if outcome.error is None}

    def on_generation(row: dict[str, Any]) -> None:
        _say(f"generation {row['generation']} of {config.tune.generations}: validation loss {row['loss']:.4f}")

    with _quiet_warnings(), bars() as shown:
        tuned = search(scorer, base, tasks, config.tune, run, on_generation)
    tuned.save(path)
    write_json(directory / "scorer.json", tuned.card.plain())
    for name, weight in tuned.rule.items():
        _say(f"  {name}: {weight:+.3f}")
    held_out = tuned.card.outcome["held_out"]
    if held_out:
        gain = held_out["accuracy"]
        _say(
            f"on {gain['n']} held-out trainings: {100 * gain['mean']:+.2f} ± {100 * gain['std']:.2f} points over the "
            f"scorer as it was (p = {gain['p']:.2g})"
        )
    _say(f"scorer: {path}")


def _cross_validate(
    config: FitConfig, records: Sequence[Path], hashes: Sequence[str], directory: Path, device: str
) -> None:
    """Leave-architecture-out, fold by fold, into folds.csv; folds that are done are not done again."""
    from autosparse.files import read_json, write_json
    from autosparse.scorers.fitting import cross_validate

    path = directory / "folds.json"
    state = read_json(path, "folds") if path.exists() else {}
    known = {int(k): rows for k, rows in state.get("folds", {}).items()} if state.get("records") == hashes else {}

    def on_fold(fold: int, rows: list[dict[str, Any]]) -> None:
        known[fold] = rows
        write_json(path, {"records": list(hashes), "folds": known})
        _say(f"fold {fold + 1} of {config.fit.folds}: {len({r['record'] for r in rows})} records left out")

    rows = cross_validate(records, config.fit, device=device, known=known, on_fold=on_fold)
    _write_ranks(directory / "folds", f"{config.fit.folds} folds", rows)


def _write_ranks(stem: Path, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """STEM.csv: how each criterion ranks each record that judged; STEM-mean.csv and the terminal: mean and std over them."""
    from autosparse.files import write_csv
    from autosparse.report.rows import stat
    from autosparse.scorers.card import FIGURES

    write_csv(stem.with_suffix(".csv"), rows)
    lines, table = [], []
    for name in dict.fromkeys(row["criterion"] for row in rows):
        own = [row for row in rows if row["criterion"] == name]
        found = {key: stat(row[key] for row in own) for key in FIGURES}
        figures = {k: round(v, 4) for key, s in found.items() for k, v in ((key, s.mean), (f"{key}_std", s.std))}
        lines.append({"split": split, "criterion": name, "records": len(own), **figures})
        table.append([name, *(f"{s.mean:.3f} ± {s.std:.3f}" if s.n > 1 else f"{s.mean:.3f}" for s in found.values())])
    write_csv(stem.with_name(f"{stem.name}-mean.csv"), lines)
    headers = ["criterion", *(key.replace("_", " ") for key in FIGURES)]
    _table(f"ranks of records left out ({split}), mean ± std over records", headers, table)


def _benchmark(
    config: BenchmarkConfig | CheckConfig,
    tracking: Path | None = None,
    write_report: bool = True,
    profile: Path | None = None,
) -> None:
    from autosparse.commands.schemas import CheckConfig, claim_directory, plain
    from autosparse.experiment.benchmark import failures, grid, result_path, run_grid, with_inputs
    from autosparse.experiment.checks import expand, tables
    from autosparse.experiment.tracking import track
    from autosparse.report.rows import collect, summary
    from autosparse.training.data import load_data
    from autosparse.training.loop import fabric_for

    what, criteria = "benchmark", config.criteria
    if isinstance(config, CheckConfig):
        what, criteria = "check", tuple(expand(criteria, config.checks))
    cells = grid(config.models, config.data, config.recipe, criteria, config.sparsities, config.seeds)
    place = fabric_for(config.device).device if config.executor.kind == "inline" else "cpu"
    data = load_data(config.data, place)
    cells = with_inputs(cells, data)
    directory = claim_directory(config)
    enabled = config.tracking and not all(result_path(directory, cell).exists() for cell in cells)
    first = bars(f"{what}: getting ready")
    with first as shown, track(tracking or directory, what, plain(config), enabled=enabled) as tracker:
        live = Live(shown, what, len(cells), counts=False, epochs=_epochs(config.recipe))

        def on_cell(number: int, cell: Any, result: Mapping[str, Any], known: bool) -> None:
            accuracy = result.get("accuracy")
            text = f"{cell.model.label()} {cell.criterion} {cell.sparsity:g} seed {cell.seed}"
            text += f": {100 * accuracy:.1f} %" if accuracy is not None else ": failed"
            live.advance(number, f"{what}: {text}")
            if not known and accuracy is not None:
                tracker.log({f"{cell.criterion}/{cell.sparsity:g}/accuracy": accuracy}, cell.seed)
                tracker.flush()

        results = run_grid(
            cells,
            directory,
            data,
            device=config.device,
            executor=config.executor,
            profile=profile,
            on_cell=on_cell,
            on_event=live.show,
        )
        live.end(f"{what}: {len(cells)} cells")
        tracker.artifact(directory / "results.csv")
    rows = collect(directory).results
    for title, headers, lines in summary(rows):
        _table(f"accuracy after the last epoch, % ({title})", headers, lines)
    for (title, headers, lines), verdicts in tables(rows):
        _table(f"sanity checks: accuracy, and its difference in points, paired by seed ({title})", headers, lines)
        _say("\n".join(verdicts))
    _say(f"results: {directory / 'results.csv'}")
    if write_report:
        _report(directory)
    failed = list(failures(results))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if failed:
        raise AutoSparseFailure(f"{len(failed)} of {len(cells)} cells failed; start again to try them again")


def _shrink(config: ShrinkConfig) -> None:
    from autosparse.commands.schemas import claim_directory, plain
    from autosparse.experiment.benchmark import with_inputs
    from autosparse.experiment.structured import result_path, run_thinnings, summary, thinnings
    from autosparse.experiment.tracking import track
    from autosparse.training.data import load_data
    from autosparse.training.loop import fabric_for

    todo = thinnings(
        config.model,
        config.data,
        config.recipe,
        config.tpp,
        config.finetune,
        config.methods,
        config.ratios,
        config.seeds,
    )
    place = fabric_for(config.device).device if config.executor.kind == "inline" else "cpu"
    data = load_data(config.data, place)
    todo = with_inputs(todo, data)
    directory = claim_directory(config)
    done = sum(result_path(directory, thinning).exists() for thinning in todo)
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
    _table(title, headers, rows)
    _say(f"results: {directory / 'results.csv'}, networks: {directory / 'networks'}")
    failed = [result for result in results if result.get("error")]
    for result in failed:
        print(f"failed: {result['method']} {result['ratio']} seed {result['seed']}: {result['error']}", file=sys.stderr)
    if failed:
        raise AutoSparseFailure(f"{len(failed)} of {len(todo)} networks failed; start again to try them again")


# -- what a person sees -------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, flush=True)


def _report(directory: Path) -> None:
    with busy("report"):
        from autosparse.report.page import build

        path = build(directory)
    _say(f"report: {path}")


def _epochs(recipe: Recipe) -> int | None:
    return recipe.epochs if recipe.steps is None else None


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

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
def _profiled(output: str | Path, wanted: bool, executor: str = "inline") -> Iterator[Path | None]:
    """The block, and after it where its time went; yields where its workers have to profile themselves, if it has any."""
    directory = Path(output) / "profile"
    if not wanted:
        yield None
        return
    if executor != "inline":
        before = _times(directory)
        yield directory
        _say_profiles([path for path, time in _times(directory).items() if time != before.get(path)])
        return
    from autosparse.training.profile import profiling

    with profiling(directory) as profile:
        yield None
    if not profile.clocked:
        _say(
            f"profile: {profile.steps} training steps ran in this process, and the clock starts after "
            f"{profile.warmup + profile.traced}: profile a longer training, into another output"
        )
        return
    _parts(f"{profile.clocked:,} steps by part", profile.seconds)
    _say(f"profile: {profile.table}, {profile.trace}")


def _parts(title: str, seconds: Mapping[str, float]) -> None:
    whole = sum(seconds.values())
    rows = [[part, f"{s:.3f}", f"{100 * s / whole:.1f} %"] for part, s in seconds.items()]
    _table(title, ["part", "seconds", "share"], [*rows, ["sum", f"{whole:.3f}", "100.0 %"]])


def _times(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(directory.glob("worker*/parts.csv"))}


def _say_profiles(tables: Sequence[Path]) -> None:
    """The parts of the first job of each worker, summed, and where each worker's own lie."""
    import csv
    from collections import Counter

    if not tables:
        _say("profile: the first job of no worker was long enough; profile a longer training, into another output")
        return
    seconds: Counter[str] = Counter()
    for path in tables:
        with open(path, newline="", encoding="utf-8") as file:
            seconds.update({row["part"]: float(row["seconds"]) for row in csv.DictReader(file)})
    _parts("first job of each worker", seconds)
    for path in tables:
        _say(f"profile: {path}, {path.with_name('trace.json.gz')}")


@contextmanager
def _quiet_warnings() -> Iterator[None]:
    """What the warnings of `prune` say is printed as notes."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _epoch_text(what: str, row: Mapping[str, float]) -> str:
    return f"{what}: loss {row['loss']:.3f}, validation accuracy {100 * row['accuracy']:.1f} %"
