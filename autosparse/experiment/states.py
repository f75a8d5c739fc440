"""Diagnoses of one network in several states: dense, pruned, and prepared after pruning."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from autosparse.errors import AutoSparseError, require
from autosparse.experiment.candidates import Candidate, find_masks, identity, prepare_result
from autosparse.files import fingerprint, read_json, replace_file, sha256, write_json
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
    on_state: Callable[[int, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Diagnose `model` in each state; those that are done, and masks that are found, are read from `directory`.

    Writes `states/*.json`, `masks/*.safetensors`, and of all states `diagnosis.json`, `diagnosis.csv` (a row for each layer
    of each state) and `summary.csv` (a row for each state). The model is left as it is.

    Args:
        data: on the device of `model`.
        on_state: is told the place of each state in `todo`, and its result.
    """
    results = []
    of = of_start(model, data)
    for number, state in enumerate(todo):
        path = directory / "states" / f"{state.key(of)}.json"
        if path.exists():
            result = read_json(path, "state")
        else:
            found, network = None, model
            if state.pruned is not None:
                found = _masks(state, directory, of, model, data, sparsity, recipe, seed, device)
            if state.prepare is not None:
                assert found is not None
                network = private_copy(model)
                found = prepare_result(network, data, state.prepare, found, seed)
            masks = None if found is None else found.masks
            batches = data.sample(settings.batch_size, settings.n_batches, seed)
            diagnosis = diagnose(
                network,
                batches,
                masks,
                samples=settings.samples,
                iterations=settings.iterations,
                tolerance=settings.tolerance,
                seed=seed,
            )
            result = _plain(state, diagnosis)
            write_json(path, result)
        results.append(result)
        if on_state is not None:
            on_state(number, result)
    write_json(directory / "diagnosis.json", {"states": results})
    layers = [{"state": result["state"], **layer} for result in results for layer in result["layers"]]
    _write_csv(directory / "diagnosis.csv", layers)
    _write_csv(directory / "summary.csv", [{"state": result["state"], **result["network"]} for result in results])
    return results


def _masks(
    state: State,
    directory: Path,
    of: str,
    model: nn.Module,
    data: ImageData,
    sparsity: float | None,
    recipe: Recipe,
    seed: int,
    device: str,
) -> SearchResult:
    """The masks of a state before its preparation; found once for all preparations."""
    if isinstance(state.pruned, Path):
        masks = Masks.load(state.pruned).to(data.device)
        masks.check(model)
        return SearchResult(masks, 0.0, 0.0)
    assert state.pruned is not None
    key = State(state.pruned).key(of)
    path = directory / "masks" / f"{key}.safetensors"
    if path.exists():
        return SearchResult(Masks.load(path).to(data.device), 0.0, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dead layers stand in the result
        found = find_masks(
            model,
            data,
            state.pruned,
            sparsity,
            recipe=recipe,
            seed=seed,
            device=device,
            state=directory / "masks" / f"{key}.state",
        )
    found.masks.save(path)
    return found


def _plain(state: State, diagnosis: Diagnosis) -> dict[str, Any]:
    """A state's result as JSON holds it."""
    return {
        "state": state.name,
        "criterion": state.criterion,
        "prepare": state.prepare,
        "network": figures(diagnosis),
        "layers": [dataclasses.asdict(layer) for layer in diagnosis.layers],
        "singular_values": diagnosis.singular_values.tolist(),
    }


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


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replace_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
