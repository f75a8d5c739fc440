"""The grid models × criteria × sparsities × seeds under one recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from autosparse.errors import AutoSparseError, require
from autosparse.experiment.candidates import Candidate, find_masks, identity, prepare_result
from autosparse.files import fingerprint
from autosparse.jobs.cells import Progress, Result, run_cells, unfinished, write_table
from autosparse.jobs.executor import INLINE, Event, ExecutorSettings
from autosparse.jobs.status import FOLDER
from autosparse.masks.layers import prunable_layers
from autosparse.masks.mask import Masks
from autosparse.masks.random import derive
from autosparse.masks.schedule import check_sparsity
from autosparse.network.graph import trace
from autosparse.scorers.loading import criterion_for
from autosparse.search.method import SearchResult, method_for
from autosparse.training.content import of_settings
from autosparse.training.data import DataSettings, ImageData
from autosparse.training.loop import Trained, check_fits, put_back
from autosparse.training.models import ModelSettings, build_model
from autosparse.training.recipe import Recipe, steps_per_epoch
from autosparse.training.threads import threads_for
from autosparse.training.train import train

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
    "continues",
    "total_cost",
    "total_seconds",
    "total_images",
    "dead_layers",
    "ties",
    "floor",
    "recipe",
    "error",
)


Work = TypeVar("Work", bound=Any)  # a cell, or another job that begins with the network of a model and a seed


# -- the grid -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One training: everything that its result depends on. `candidate` is `None` for the dense network.

    `inputs`: fingerprint of its images and initial network, see `with_inputs`.
    """

    model: ModelSettings
    data: DataSettings
    recipe: Recipe
    candidate: Candidate | None
    sparsity: float
    seed: int
    inputs: str = ""
    folder: ClassVar[str] = "cells"

    @property
    def criterion(self) -> str:
        return "dense" if self.candidate is None else self.candidate.name

    def config(self) -> dict[str, Any]:
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        values["data"].pop("root")
        return values | {"candidate": None if self.candidate is None else identity(self.candidate)}

    def key(self) -> str:
        """File name: readable, and unique through a hash of the settings and inputs."""
        digest = fingerprint(self.config())[:10]
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", self.criterion)
        return f"{self.model.label()}_{name}_{self.sparsity:g}_s{self.seed}_{digest}"

    def row(self) -> dict[str, Any]:
        """What names the cell in the table."""
        return {
            "model": self.model.label(),
            "data": self.data.label(),
            "criterion": self.criterion,
            "sparsity": self.sparsity,
            "seed": self.seed,
            "recipe": recipe_hash(self.recipe, self.data),
        }

    def shared(self, directory: Path) -> Path | None:
        """The masks of its search, which its variants and preparations take too."""
        return _stored(self, directory / "masks")

    def run(self, directory: Path, data: ImageData, *, device: str, state: Path, progress: Progress) -> dict[str, Any]:
        """See `run_cell`."""
        return run_cell(self, data, device=device, state=state, store=directory / "masks", on_epoch=progress)


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
        AutoSparseError: an empty axis, a sparsity out of range, two candidates of one name, a variant (`"densities:snip"`) of
            other settings than the candidate that it would be compared with, an unknown scorer file.
    """
    for what, axis in (("models", models), ("criteria", candidates), ("sparsities", sparsities), ("seeds", seeds)):
        require(len(axis) > 0, what, list(axis), "give at least one")
        twice = [item for i, item in enumerate(axis) if item in axis[:i]]
        require(not twice or axis is candidates, what, twice, "it is there twice; give each once")
    for sparsity in sparsities:
        check_sparsity(sparsity)
    names = [c.name for c in candidates]
    for name in names:
        require(names.count(name) == 1 and name != "dense", "criterion name", name, "give each its own label")
    for variant in candidates:
        for plain in candidates:
            if variant.variant is not None and variant.name == f"{variant.variant}:{plain.name}":
                one, two = (
                    dataclasses.replace(c, criterion=c.base, label=None, continues=False) for c in (variant, plain)
                )
                require(
                    one == two,
                    "criterion",
                    variant.name,
                    f"its settings are not those of {plain.name}: give it a label",
                )
    for candidate in candidates:
        for sparsity in sparsities:
            try:
                candidate.check(data.validation, sparsity)
            except AutoSparseError as error:
                raise AutoSparseError(f"{candidate.name} at sparsity {sparsity:g}: {error}") from None
    cells = []
    for seed in seeds:
        for model in models:
            cells.append(Cell(model, data, recipe, None, 0.0, seed))
            cells += [Cell(model, data, recipe, c, s, seed) for s in sparsities for c in candidates]
    return cells


def with_inputs(cells: Sequence[Work], data: ImageData) -> list[Work]:
    """The cells, known by the content of their images and initial networks as well as by their settings.

    Those that are known so already stay as they are.
    """
    if all(cell.inputs for cell in cells):
        return list(cells)
    known: dict[tuple[str, int], str] = {}
    for cell in cells:
        key = (cell.model.label(), cell.seed)
        if key not in known:
            known[key] = of_settings(cell.model, data, cell.seed)
    return [dataclasses.replace(cell, inputs=known[cell.model.label(), cell.seed]) for cell in cells]


def check_lengths(cells: Sequence[Cell], data: ImageData) -> None:
    """Raise `AutoSparseError` where a search does not fit into the trainings of its recipe."""
    seen: list[tuple[Candidate, Recipe]] = []
    for cell in cells:
        if cell.candidate is not None and (cell.candidate, cell.recipe) not in seen:
            seen.append((cell.candidate, cell.recipe))
            try:
                cell.candidate.check_length(data, cell.recipe)
            except AutoSparseError as error:
                raise AutoSparseError(f"{cell.candidate.name}: {error}") from None


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
    store: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Find the masks, train with them, and give the cell's result as plain values.

    Args:
        state: directory for what a stop in the middle would lose.
        store: directory in which masks that took many passes are kept; a method, its variants and its preparations share
            them.
    """
    model = build_model(cell.model, data, cell.seed).to(data.device)
    with threads_for(model, data, cell.recipe.batch_size):
        found = None
        if cell.candidate is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they say stands in the result: dead layers, ties
                found = _search(cell, model, data, device, state, store, _stage("search", on_epoch))
                if cell.candidate.variant == "reinit":
                    model = build_model(cell.model, data, derive(cell.seed, "redrawn weights")).to(data.device)
                if cell.candidate.prepare is not None:
                    found = prepare_result(model, data, cell.candidate.prepare, found, cell.seed)
            if found.weights is not None:
                put_back(model, found.weights)
        trained = train(
            model,
            data,
            cell.recipe,
            masks=None if found is None else found.masks,
            seed=cell.seed,
            device=device,
            start_step=0 if found is None else found.steps,
            checkpoint=None if state is None else state / "final.pt",
            on_epoch=on_epoch if found is None else _stage("training", on_epoch),
        )
        epochs = cell.recipe.length(data) / steps_per_epoch(data, cell.recipe.batch_size)
        return _result(cell, found, trained, epochs, len(data.train))


def _stage(name: str, on_epoch: Callable[[dict[str, Any]], None] | None) -> Callable[[dict[str, Any]], None] | None:
    """`on_epoch` with the stage of the cell in every row."""
    return None if on_epoch is None else lambda row: on_epoch({"stage": name, **row})


def _search(
    cell: Cell,
    model: nn.Module,
    data: ImageData,
    device: str,
    state: Path | None,
    store: Path | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> SearchResult:
    """The masks of a cell; those that took many passes come from `store` if they are there, and go there."""
    assert cell.candidate is not None

    def find(candidate: Candidate, found: SearchResult | None = None) -> SearchResult:
        return find_masks(
            model,
            data,
            candidate,
            cell.sparsity,
            recipe=cell.recipe,
            seed=cell.seed,
            device=device,
            state=state,
            result=found,
            on_epoch=on_epoch,
        )

    path = None if store is None else _stored(cell, store)
    if path is None:
        return find(cell.candidate)
    with _one_search(path):
        if path.exists():
            masks = Masks.load(path).to(data.device)
            found = SearchResult(masks, masks.report.origin["epochs"], masks.report.origin["seconds"])
        else:
            found = find(cell.candidate.plain())
            origin = {**found.masks.report.origin, "seconds": found.seconds, "epochs": found.epochs}
            found.masks.report = dataclasses.replace(found.masks.report, origin=origin)
            found.masks.save(path)
    return find(cell.candidate, found)


def _stored(cell: Cell, store: Path) -> Path | None:
    """Where the masks of the cell's search are kept, if finding them takes many passes."""
    chosen = cell.candidate
    if chosen is None or not chosen.repeats or chosen.continues:
        return None
    return store / f"{dataclasses.replace(cell, candidate=chosen.plain()).key()}.safetensors"


@contextmanager
def _one_search(path: Path) -> Iterator[None]:
    """Wait until no other process searches for these masks; a kill frees the lock."""
    import filelock

    lock = path.parent.parent / FOLDER / f"{path.stem}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(lock):
        yield


def _result(cell: Cell, found: SearchResult | None, trained: Trained, epochs: float, images: int) -> dict[str, Any]:
    """The row of a cell, and what its table does not show; `epochs` of one training over `images` images."""
    masks = None if found is None else found.masks
    went_on = epochs - trained.epochs  # what the search trained already is no cost of its own
    mask_epochs = 0.0 if found is None else found.epochs - went_on
    mask_seconds = 0.0 if found is None else found.seconds
    return {
        **cell.row(),
        "sparsity_got": 0.0 if masks is None else masks.sparsity,
        "effective_sparsity": 0.0 if masks is None else masks.report.effective_sparsity,
        "accuracy": trained.accuracy,
        "loss": trained.loss,
        "mask_seconds": mask_seconds,
        "mask_epochs": mask_epochs,
        "mask_cost": mask_epochs / epochs,
        "train_seconds": trained.seconds,
        "train_epochs": epochs,
        "continues": "yes" if cell.candidate is not None and cell.candidate.continues else "",
        "total_cost": mask_epochs / epochs + 1,
        "total_seconds": mask_seconds + trained.seconds,
        "total_images": round((mask_epochs + epochs) * images),
        "dead_layers": 0 if masks is None else len(masks.report.dead_layers),
        "ties": 0.0 if masks is None else masks.report.ties,
        "floor": "" if cell.candidate is None or cell.candidate.floor == 0 else cell.candidate.floor,
        "error": "",
        "notes": [] if masks is None else list(masks.report.notes),
        "remarks": [] if found is None else list(found.notes),
        "layers": [] if masks is None else [{"name": r.name, "kept": r.kept, "total": r.total} for r in masks.layers()],
        "history": trained.history,
        "arithmetic": trained.arithmetic,
    }


def recipe_hash(recipe: Recipe, data: DataSettings) -> str:
    """Short name of everything that must be equal before two accuracies may be compared."""
    values = [dataclasses.asdict(recipe), {k: v for k, v in dataclasses.asdict(data).items() if k != "root"}]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def run_grid(
    cells: Sequence[Cell],
    directory: Path,
    data: ImageData,
    *,
    device: str = "auto",
    executor: ExecutorSettings = INLINE,
    profile: Path | None = None,
    on_cell: Callable[[int, Cell, Mapping[str, Any], bool], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> list[Result]:
    """Run every cell that has no result in `directory/cells` yet, and keep `directory/results.csv` up to date.

    Masks that took many passes to find are kept in `directory/masks`. For cells that fail (a training that diverges, a
    criterion that cannot score the model) and the arguments, see `run_cells`.

    Raises:
        AutoSparseError: a model or a scorer cannot work, or another process works on the directory.
    """
    cells = with_inputs(cells, data)
    fresh = unfinished(cells, directory)
    check_lengths(fresh, data)
    for model in {cell.model.label(): cell.model for cell in fresh}.values():
        check_prunable(build_model(model, data), data.to("cpu"))  # wrong input ends here, before hours are spent
    candidates = [c.candidate for c in fresh if c.candidate is not None]
    for criterion in {
        c.base
        for candidate in candidates
        for c in (candidate, candidate.layer_densities, *candidate.starts)
        if c is not None
    }:
        if method_for(criterion) is None:
            criterion_for(criterion)
    how: dict[str, Any] = {"device": device, "executor": executor, "profile": profile}
    write = partial(write_results, directory / "results.csv")
    return run_cells(cells, directory, data, write, on_cell=on_cell, on_event=on_event, **how)


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """`results.csv`: one row a cell, with the accuracy of the dense network of the same model and seed beside."""
    dense = {(r["model"], r["seed"]): r.get("accuracy") for r in results if r["criterion"] == "dense"}
    rows = [{**r, "dense_accuracy": dense.get((r["model"], r["seed"]), "")} for r in results]
    write_table(path, COLUMNS, rows)


def failures(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line for each cell that failed."""
    for result in results:
        if result.get("error"):
            yield f"{result['model']} {result['criterion']} {result['sparsity']} seed {result['seed']}: {result['error']}"
