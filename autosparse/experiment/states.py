"""Diagnoses of one network in several states: dense, pruned, and prepared after pruning."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from autosparse.errors import AutoSparseError, AutoSparseFailure, require
from autosparse.experiment.candidates import Candidate, find_masks, identity, prepare_result
from autosparse.files import fingerprint, sha256, write_csv, write_json
from autosparse.jobs.cells import Progress, Result, run_cells
from autosparse.jobs.executor import Event
from autosparse.masks.mask import Masks
from autosparse.network.diagnostics import Diagnosis, DiagnosticSettings, diagnose
from autosparse.network.restore import private_copy
from autosparse.search.method import SearchResult
from autosparse.training.content import of_start
from autosparse.training.data import ImageData
from autosparse.training.recipe import Recipe

DENSE = "dense"


@dataclass(frozen=True)
class State:
    """A network as it is (`pruned` is `None`), under the masks of a candidate or of a file; then prepared, or not."""

    pruned: Candidate | Path | None = None
    prepare: str | None = None

    @property
    def criterion(self) -> str:
        if self.pruned is None:
            return DENSE
        return self.pruned.stem if isinstance(self.pruned, Path) else self.pruned.name

    @property
    def name(self) -> str:
        return self.criterion if self.prepare is None else f"{self.criterion}+{self.prepare}"

    def key(self, of: str) -> str:
        """File name: readable, and unique through a hash of the state and of what it depends on beside, `of`."""
        pruned: Any = sha256(self.pruned) if isinstance(self.pruned, Path) else self.pruned and identity(self.pruned)
        return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', self.name)}_{fingerprint(pruned, self.prepare, of)[:10]}"


def states(criteria: Sequence[Candidate], masks: Path | None, prepare: Sequence[str]) -> list[State]:
    """The dense network, then for the masks given and those of each candidate: pruned, and after each preparation.

    Raises:
        AutoSparseError: two states of one name, or a file of masks that does not exist.
    """
    if masks is not None and not masks.is_file():
        raise AutoSparseError(f"masks file {masks} does not exist: check the path")
    pruned: list[Candidate | Path] = [*([] if masks is None else [masks]), *criteria]
    found = [State(), *(State(one, how) for one in pruned for how in (None, *prepare))]
    names = [state.name for state in found]
    for name in names:
        require(
            names.count(name) == 1, "state", name, "it is there twice: give criteria a label, and preparations once"
        )
    return found


@dataclass(frozen=True)
class Measurement:
    """One state of a network as a cell of a grid; `of`: fingerprint of the network and its images."""

    state: State
    of: str
    model: nn.Module
    settings: DiagnosticSettings
    sparsity: float | None
    recipe: Recipe
    seed: int
    data: None = None
    folder: ClassVar[str] = "states"

    def key(self) -> str:
        return self.state.key(self.of)

    def row(self) -> dict[str, Any]:
        return {"state": self.state.name, "criterion": self.state.criterion, "prepare": self.state.prepare}

    def shared(self, directory: Path) -> Path | None:
        """The masks before their preparation, found once for all preparations."""
        pruned = self.state.pruned
        return (
            directory / "masks" / f"{State(pruned).key(self.of)}.safetensors" if isinstance(pruned, Candidate) else None
        )

    def run(self, directory: Path, data: ImageData, *, device: str, state: Path, progress: Progress) -> dict[str, Any]:
        """Find the masks and diagnose; the model is left as it is."""
        found, network = None, self.model
        if self.state.pruned is not None:
            found = self._find(directory, data, device)
        if self.state.prepare is not None:
            assert found is not None
            network = private_copy(self.model)
            found = prepare_result(network, data, self.state.prepare, found, self.seed)
        diagnosis = diagnose(
            network,
            data.sample(self.settings.batch_size, self.settings.n_batches, self.seed),
            None if found is None else found.masks,
            samples=self.settings.samples,
            iterations=self.settings.iterations,
            tolerance=self.settings.tolerance,
            seed=self.seed,
        )
        return {
            **self.row(),
            "network": figures(diagnosis),
            "layers": [dataclasses.asdict(layer) for layer in diagnosis.layers],
            "singular_values": diagnosis.singular_values.tolist(),
        }

    def _find(self, directory: Path, data: ImageData, device: str) -> SearchResult:
        pruned = self.state.pruned
        path = pruned if isinstance(pruned, Path) else self.shared(directory)
        assert path is not None
        if path.exists() or not isinstance(pruned, Candidate):
            masks = Masks.load(path).to(data.device)
            masks.check(self.model)
            return SearchResult(masks, 0.0, 0.0)
        how: dict[str, Any] = {"recipe": self.recipe, "seed": self.seed, "device": device}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dead layers are in the result
            found = find_masks(self.model, data, pruned, self.sparsity, state=path.with_suffix(".state"), **how)
        found.masks.save(path)
        return found


def run_states(
    todo: Sequence[State],
    directory: Path,
    model: nn.Module,
    data: ImageData,
    settings: DiagnosticSettings,
    *,
    sparsity: float | None,
    recipe: Recipe,
    seed: int = 0,
    device: str = "auto",
    on_cell: Callable[[int, Measurement, Result, bool], None] | None = None,
) -> list[Result]:
    """Diagnose `model` in each state; those that are done, and masks that are found, are read from `directory`.

    Writes `states/*.json`, `masks/*.safetensors`, and of all states `diagnosis.json`, `diagnosis.csv` (a row for each layer
    of each state) and `summary.csv` (a row for each state). The model is left as it is.

    Args:
        data: on the device of `model`.
        on_cell: see `run_cells`.

    Raises:
        AutoSparseError, AutoSparseFailure: why a state cannot be diagnosed, after the others.
    """
    of = of_start(model, data)
    cells = [Measurement(state, of, model, settings, sparsity, recipe, seed) for state in todo]
    failed: dict[str, Event] = {}

    def on_event(event: Event) -> None:
        if event.kind == "failed":
            failed.setdefault(event.values["error"], event)

    how: dict[str, Any] = {"device": device, "on_cell": on_cell, "on_event": on_event}
    results = run_cells(cells, directory, data, partial(_write_all, directory), **how)
    for reason, event in failed.items():
        raise (AutoSparseError if event.values.get("mistake") else AutoSparseFailure)(reason)
    return results


def _write_all(directory: Path, results: Sequence[Result]) -> None:
    done = [result for result in results if "network" in result]
    if done:
        write_json(directory / "diagnosis.json", {"states": done})
        layers = [{"state": result["state"], **layer} for result in done for layer in result["layers"]]
        write_csv(directory / "diagnosis.csv", layers)
        write_csv(directory / "summary.csv", [{"state": result["state"], **result["network"]} for result in done])


def figures(diagnosis: Diagnosis) -> dict[str, float]:
    """The figures of a whole network.

    `dead_layers` get no gradient at all; `hessian_spread`: the largest Hessian norm of a layer by the smallest that is not
    zero; `hessians_converged`: the share of layers whose iteration has converged.
    """
    layers = diagnosis.layers
    kept, total = sum(layer.kept for layer in layers), sum(layer.total for layer in layers)
    hessians = [layer.hessian_norm for layer in layers if layer.hessian_norm > 0]
    measured = [layer.hessian_converged for layer in layers if not math.isnan(layer.hessian_norm)]
    return {
        "sparsity": 1 - kept / total,
        "dead_layers": sum(layer.gradient_norm == 0 for layer in layers),
        "loss": diagnosis.loss,
        "gradient_norm": diagnosis.gradient_norm,
        "relative_gradient": diagnosis.relative_gradient,
        **{f"jacobian_{key}": value for key, value in diagnosis.jacobian.items()},
        "lipschitz_max": max(layer.lipschitz for layer in layers),
        "hessian_max": max(hessians, default=math.nan),
        "hessian_spread": max(hessians) / min(hessians) if hessians else math.nan,
        "hessians_converged": sum(measured) / len(measured) if measured else math.nan,
    }
