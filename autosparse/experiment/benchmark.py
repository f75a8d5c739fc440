"""The grid models × criteria × sparsities × seeds under one recipe."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from autosparse.errors import AutoSparseError, AutoSparseFailure, require, settings, suggest
from autosparse.experiment.tracking import load_scorer
from autosparse.files import read_json, replace_file, sha256, write_json
from autosparse.masks.layers import prunable_layers
from autosparse.masks.mask import Masks
from autosparse.masks.schedule import SCHEDULES, check_sparsity
from autosparse.masks.selection import SCOPES, parse_granularity
from autosparse.network.graph import trace
from autosparse.pruning.criteria import PRESETS, Criterion
from autosparse.pruning.irp import IRPSettings, irp
from autosparse.pruning.prune import describe, prune
from autosparse.training.data import DataSettings, ImageData
from autosparse.training.loop import Recipe, Trained, check_fits, steps_per_epoch, train
from autosparse.training.models import ModelSettings, create_model

METHODS = ("irp",)
_DENSITIES = "densities:"
COLUMNS = (
    "model",
    "data",
    "criterion",
    "sparsity",
    "sparsity_got",
    "effective_sparsity",
    "seed",
    "accuracy",
    "loss",
    "dense_accuracy",
    "mask_seconds",
    "mask_epochs",
    "mask_cost",
    "train_seconds",
    "train_epochs",
    "dead_layers",
    "ties",
    "floor",
    "recipe",
    "error",
)


@settings
class Candidate:
    """A criterion or method in the grid.

    `criterion`: a preset (`autosparse list criteria`), `"irp"`, or a scorer: its file, or an MLflow `models:/` URI;
    `"densities:"` before any of them keeps its layer densities and puts the positions within each layer at random, the
    rival that every criterion must beat: one that does not has found layer densities only.
    `label`: its name in tables. `scope`, `granularity`, `steps`, `schedule`, `n_batches`, `floor` as in `prune`;
    `batch_size` of the batches it scores on (`None`: a scorer's own, else 128). `rounds` of `"irp"`: trainings spent.
    """

    criterion: str
    label: str | None = None
    scope: str | None = None
    granularity: str | None = None
    steps: int | None = None
    schedule: str | None = None
    n_batches: int | None = None
    batch_size: int | None = None
    floor: float = 0.0
    rounds: int = 5

    def __post_init__(self) -> None:
        if not is_scorer(self.base) and self.base not in (*PRESETS, *METHODS):
            raise AutoSparseError(
                f"criterion is {self.criterion!r}: {suggest(self.base, [*PRESETS, *METHODS])}; "
                "or a scorer's file, NAME.safetensors; or densities: before one of them"
            )
        if self.scope is not None:
            require(self.scope in SCOPES, "scope", self.scope, f"known: {', '.join(SCOPES)}")
        if self.schedule is not None:
            require(self.schedule in SCHEDULES, "schedule", self.schedule, f"known: {', '.join(SCHEDULES)}")
        if self.granularity is not None:
            parse_granularity(self.granularity)
        for key in ("steps", "n_batches", "batch_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "give at least 1")
            require(value is None or self.base != "irp", f"{key} of irp", value, "it has none; leave it out")
        require(
            self.granularity in (None, "unstructured") or self.base != "irp",
            "granularity of irp",
            self.granularity,
            "it removes single weights; leave it out",
        )
        require(0 <= self.floor < 1, "floor", self.floor, "it is the smallest density of a layer, in [0, 1)")
        require(1 <= self.rounds <= 255, "rounds", self.rounds, "it must lie in 1 … 255")

        require(
            not self.only_densities or self.granularity in (None, "unstructured"),
            "granularity of densities:",
            self.granularity,
            "random positions have no pattern; leave it out",
        )

    @property
    def only_densities(self) -> bool:
        return self.criterion.startswith(_DENSITIES)

    @property
    def base(self) -> str:
        """The criterion whose scores or layer densities these are."""
        return self.criterion.removeprefix(_DENSITIES)

    @property
    def name(self) -> str:
        if self.label is not None:
            return self.label
        base = f"irp-{self.rounds}" if self.base == "irp" else self.base
        base = Path(base).stem if base.endswith(".safetensors") else base
        return _DENSITIES * self.only_densities + base


@dataclass(frozen=True)
class Found:
    """Masks and what it cost to find them: seconds, and epochs' worth of forward and backward passes."""

    masks: Masks
    seconds: float
    epochs: float


def resolve(text: str) -> str | Criterion:
    """A preset's name as it is, a scorer's file or `models:/` URI as the scorer."""
    return load_scorer(text) if is_scorer(text) else text


def is_scorer(text: str) -> bool:
    return text.endswith(".safetensors") or text.startswith("models:/")


def identity(criterion: str) -> str:
    """What a criterion is, for telling whether a result is still its own: a scorer is what its file holds, not its path.

    Raises:
        AutoSparseError: the scorer's file does not exist.
    """
    if not criterion.endswith(".safetensors"):
        return criterion
    path = Path(criterion.removeprefix(_DENSITIES))
    if not path.is_file():
        raise AutoSparseError(f"scorer file {path} does not exist: fit it first, or check the path")
    return _DENSITIES * criterion.startswith(_DENSITIES) + sha256(path)


def find_masks(
    model: nn.Module,
    data: ImageData,
    candidate: Candidate,
    sparsity: float | None,
    *,
    recipe: Recipe,
    seed: int = 0,
    device: str = "auto",
    state: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Found:
    """Masks of `model` (at its initialization, left as it is) by a preset, a scorer or a method that trains.

    Args:
        data: on the device of `model`.
        recipe: of the trainings of a method.
        state: directory in which a method keeps its rounds until it is done.
    """
    clock = time.perf_counter()
    if candidate.only_densities:
        inner = dataclasses.replace(candidate, criterion=candidate.base)
        found = find_masks(
            model, data, inner, sparsity, recipe=recipe, seed=seed, device=device, state=state, on_epoch=on_epoch
        )
        masks = describe(model, found.masks.shuffle(seed), data.normalise(data.train.images[:2]))
        return Found(_with_identity(masks, candidate), time.perf_counter() - clock, found.epochs)
    if candidate.criterion == "irp":
        if sparsity is None:
            raise AutoSparseError("sparsity is None: give the share of weights to remove, such as 0.95")
        return _irp_masks(model, data, candidate, sparsity, recipe, seed, device, state, on_epoch)
    criterion = resolve(candidate.criterion)
    rule = PRESETS[criterion].criterion if isinstance(criterion, str) else criterion
    size = candidate.batch_size or int(getattr(rule, "batch_size", 128))
    wanted = candidate.n_batches or rule.n_batches
    masks = prune(
        model,
        sparsity,
        criterion,
        batches=data.sample(size, max(wanted, 1), seed),
        n_batches=candidate.n_batches,
        scope=candidate.scope,
        granularity=candidate.granularity,
        steps=candidate.steps,
        schedule=candidate.schedule,
        floor=candidate.floor,
        seed=seed,
    )
    return Found(
        _with_identity(masks, candidate), time.perf_counter() - clock, masks.report.origin["images"] / len(data.train)
    )


def _with_identity(masks: Masks, candidate: Candidate) -> Masks:
    origin = {**masks.report.origin, "identity": identity(candidate.criterion)}
    masks.report = dataclasses.replace(masks.report, origin=origin)
    return masks


def _irp_masks(
    model: nn.Module,
    data: ImageData,
    candidate: Candidate,
    sparsity: float,
    recipe: Recipe,
    seed: int,
    device: str,
    state: Path | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> Found:
    """The ticket of `rounds` removals; its trainings, but for the ticket's own, are the cost."""
    example = data.normalise(data.train.images[:2])
    graph = trace(model, example)
    layers = prunable_layers(model, operands=graph.operands)
    chosen = IRPSettings(
        rounds=candidate.rounds,
        density=1 - check_sparsity(sparsity),
        schedule="linear" if candidate.schedule == "linear" else "geometric",
        scope=candidate.scope or "global",
        floor=candidate.floor,
    )
    start, masks, seconds = 0, None, 0.0
    if state is not None and (state / "irp.json").exists():
        progress = read_json(state / "irp.json", "state of a cell")
        start, seconds = progress["rounds"], progress["seconds"]
        masks = Masks.load(state / f"round{start}.safetensors")
    original = {n: t.detach().clone() for n, t in model.state_dict().items()}
    checkpoint = None if state is None else state / "training.pt"
    rounds = irp(
        model,
        layers,
        data,
        recipe,
        chosen,
        seed=seed,
        device=device,
        start=start,
        masks=masks,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )
    try:
        while start < candidate.rounds:
            outcome = next(rounds)
            masks, start = outcome.next_masks, start + 1
            seconds += outcome.seconds
            assert masks is not None
            if state is not None:
                masks.save(state / f"round{start}.safetensors")
                write_json(state / "irp.json", {"rounds": start, "seconds": seconds})
    finally:
        model.load_state_dict(original)
    assert masks is not None
    origin = {"criterion": "irp", "rounds": candidate.rounds, "sparsity": sparsity, "seed": seed}
    masks.report = dataclasses.replace(masks.report, origin=origin)
    epochs = candidate.rounds * recipe.length(data) / steps_per_epoch(data, recipe.batch_size)
    return Found(_with_identity(describe(model, masks, example), candidate), seconds, epochs)


# -- the grid -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One training: everything that its result depends on. `candidate` is `None` for the dense network."""

    model: ModelSettings
    data: DataSettings
    recipe: Recipe
    candidate: Candidate | None
    sparsity: float
    seed: int

    @property
    def criterion(self) -> str:
        return "dense" if self.candidate is None else self.candidate.name

    def config(self) -> dict[str, Any]:
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        values["data"].pop("root")
        if self.candidate is not None:
            values["candidate"]["criterion"] = identity(self.candidate.criterion)
        return values

    def key(self) -> str:
        """File name: readable, and unique through a hash of the settings."""
        digest = hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode()).hexdigest()[:10]
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", self.criterion)
        return f"{self.model.label()}_{name}_{self.sparsity:g}_s{self.seed}_{digest}"


def grid(
    models: Sequence[ModelSettings],
    data: DataSettings,
    recipe: Recipe,
    candidates: Sequence[Candidate],
    sparsities: Sequence[float],
    seeds: Sequence[int],
) -> list[Cell]:
    """All cells, seed by seed, so that a stop leaves whole comparisons; the dense network first.

    Raises:
        AutoSparseError: an empty axis, a sparsity out of range, two candidates of one name, an unknown scorer file.
    """
    for what, axis in (("models", models), ("criteria", candidates), ("sparsities", sparsities), ("seeds", seeds)):
        require(len(axis) > 0, what, list(axis), "give at least one")
    for sparsity in sparsities:
        check_sparsity(sparsity)
    names = [c.name for c in candidates]
    for name in names:
        require(names.count(name) == 1 and name != "dense", "criterion name", name, "give each its own label")
    cells = []
    for seed in seeds:
        for model in models:
            cells.append(Cell(model, data, recipe, None, 0.0, seed))
            cells += [Cell(model, data, recipe, c, s, seed) for s in sparsities for c in candidates]
    return cells


def build_model(model: ModelSettings, data: ImageData, seed: int = 0) -> nn.Module:
    """A freshly initialized network that fits the data."""
    return create_model(model, in_channels=data.channels, classes=data.classes, image_size=data.image_size, seed=seed)


def check_prunable(model: nn.Module, data: ImageData) -> None:
    """Raise `AutoSparseError` unless the model takes the images, has an output for every class, and prunable weights."""
    check_fits(model, data)
    prunable_layers(model, operands=trace(model, data.normalise(data.train.images[:2])).operands)


def run_cell(
    cell: Cell,
    data: ImageData,
    *,
    device: str = "auto",
    state: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Find the masks, train with them, and give the cell's result as plain values."""
    model = build_model(cell.model, data, cell.seed).to(data.device)
    found = None
    if cell.candidate is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say stands in the result: dead layers, ties
            found = find_masks(
                model,
                data,
                cell.candidate,
                cell.sparsity,
                recipe=cell.recipe,
                seed=cell.seed,
                device=device,
                state=state,
                on_epoch=on_epoch,
            )
    trained = train(
        model,
        data,
        cell.recipe,
        masks=None if found is None else found.masks,
        seed=cell.seed,
        device=device,
        checkpoint=None if state is None else state / "final.pt",
        on_epoch=on_epoch,
    )
    return _result(cell, found, trained)


def _result(cell: Cell, found: Found | None, trained: Trained) -> dict[str, Any]:
    masks = None if found is None else found.masks
    return {
        "model": cell.model.label(),
        "data": cell.data.label(),
        "criterion": cell.criterion,
        "sparsity": cell.sparsity,
        "sparsity_got": 0.0 if masks is None else masks.sparsity,
        "effective_sparsity": 0.0 if masks is None else masks.report.effective_sparsity,
        "seed": cell.seed,
        "accuracy": trained.accuracy,
        "loss": trained.loss,
        "mask_seconds": 0.0 if found is None else found.seconds,
        "mask_epochs": 0.0 if found is None else found.epochs,
        "mask_cost": 0.0 if found is None else found.epochs / trained.epochs,
        "train_seconds": trained.seconds,
        "train_epochs": trained.epochs,
        "dead_layers": 0 if masks is None else len(masks.report.dead_layers),
        "ties": 0.0 if masks is None else masks.report.ties,
        "floor": "" if cell.candidate is None or cell.candidate.floor == 0 else cell.candidate.floor,
        "recipe": recipe_hash(cell.recipe, cell.data),
        "error": "",
        "notes": [] if masks is None else list(masks.report.notes),
        "layers": [] if masks is None else [{"name": r.name, "kept": r.kept, "total": r.total} for r in masks.layers()],
        "history": trained.history,
    }


def recipe_hash(recipe: Recipe, data: DataSettings) -> str:
    """Short name of everything that must be equal before two accuracies may be compared."""
    values = [dataclasses.asdict(recipe), {k: v for k, v in dataclasses.asdict(data).items() if k != "root"}]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def result_path(directory: Path, cell: Cell) -> Path:
    """Where the cell's result lies once it is done."""
    return directory / "cells" / f"{cell.key()}.json"


def run_grid(
    cells: Sequence[Cell],
    directory: Path,
    data: ImageData,
    *,
    device: str = "auto",
    on_cell: Callable[[int, Cell, Mapping[str, Any], bool], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run every cell that has no result in `directory/cells` yet, and write `directory/results.csv` after each.

    A cell that fails (its training diverges, its criterion cannot score the model) is recorded with its reason, and the
    others go on; the next start tries it again.

    Args:
        on_cell: called with the number of cells done, the cell, its result, and whether it was found done.
    """
    paths = [result_path(directory, cell) for cell in cells]
    results = {path: read_json(path, "result") for path in paths if path.exists()}
    fresh = {path: cell for path, cell in zip(paths, cells, strict=True) if path not in results}
    for model in {cell.model.label(): cell.model for cell in fresh.values()}.values():
        check_prunable(build_model(model, data), data.to("cpu"))  # wrong input is told before hours are spent
    for criterion in {c.candidate.base for c in fresh.values() if c.candidate is not None}:
        resolve(criterion)
    for number, (path, cell) in enumerate(zip(paths, cells, strict=True), 1):
        if path in fresh:
            state = path.with_suffix(".state")
            try:
                results[path] = run_cell(cell, data, device=device, state=state, on_epoch=on_epoch)
                write_json(path, results[path])
                shutil.rmtree(state, ignore_errors=True)
            except (AutoSparseError, AutoSparseFailure) as error:
                results[path] = _failed(cell, error)
            write_results(directory / "results.csv", [results[p] for p in paths if p in results])
        if on_cell is not None:
            on_cell(number, cell, results[path], path not in fresh)
    if not fresh:
        write_results(directory / "results.csv", [results[path] for path in paths])
    return [results[path] for path in paths]


def _failed(cell: Cell, error: Exception) -> dict[str, Any]:
    return {
        "model": cell.model.label(),
        "data": cell.data.label(),
        "criterion": cell.criterion,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "recipe": recipe_hash(cell.recipe, cell.data),
        "error": str(error),
    }


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """`results.csv`: one row a cell, with the accuracy of the dense network of the same model and seed beside."""
    dense = {(r["model"], r["seed"]): r.get("accuracy") for r in results if r["criterion"] == "dense"}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    for result in results:
        row = {**result, "dense_accuracy": dense.get((result["model"], result["seed"]), "")}
        writer.writerow({k: _rounded(v) for k, v in row.items()})
    with replace_file(path) as temporary:
        temporary.write_text(text.getvalue())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else float(f"{value:.6g}")
    return "" if value is None else value


def failures(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line for each cell that failed."""
    for result in results:
        if result.get("error"):
            yield f"{result['model']} {result['criterion']} {result['sparsity']} seed {result['seed']}: {result['error']}"
