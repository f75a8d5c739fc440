"""Everything that a directory of results holds, as the report needs it."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from autosparse.errors import AutoSparseError, first_line
from autosparse.files import files_under, read_json
from autosparse.report.rows import clean, name_floors, read_results, without_repeats
from autosparse.report.text import plural
from autosparse.scorers.card import Card, read_card

BINS = 20
COPIES = {"mlartifacts", "figures"}  # folders of copies that MLflow keeps, which would count twice
LAYERS = ["data", "recipe", "model", "criterion", "sparsity", "seed", "layer", "density"]


@dataclass(frozen=True)
class Survival:
    """What a report needs of one IRP record: its course, and survival by initial magnitude.

    `within`, `overall`: mean fraction of rounds survived in each magnitude bin, with bins within each layer or over all
    layers together; `ticket_within`, `ticket_overall`: the share of the bin in the last ticket.
    """

    name: str
    model: str
    complete: bool
    density: np.ndarray
    accuracy: np.ndarray
    within: np.ndarray
    overall: np.ndarray
    ticket_within: np.ndarray
    ticket_overall: np.ndarray
    torch: str


@dataclass
class Results:
    """All that a directory holds: benchmark `rows`, densities of `layers`, `smaller` networks of `autosparse shrink`."""

    rows: DataFrame = field(default_factory=lambda: clean(DataFrame())[0])
    layers: DataFrame = field(default_factory=lambda: DataFrame(columns=LAYERS))
    smaller: DataFrame = field(default_factory=DataFrame)
    records: list[Survival] = field(default_factory=list)
    scorers: list[tuple[str, Card]] = field(default_factory=list)
    diagnoses: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    newest: float = 0.0


def collect(directory: Path) -> Results:
    """Read everything under `directory`; what cannot be read becomes a note.

    Raises:
        AutoSparseError: no such directory, or nothing to report in it.
    """
    if not directory.is_dir():
        raise AutoSparseError(f"{str(directory)!r} is not a directory: give one with results in it")
    results = Results()
    rows: list[DataFrame] = []
    cells: list[dict[str, Any]] = []
    smaller: list[DataFrame] = []
    for path in sorted(p for p in files_under(directory) if p.suffix in {".csv", ".json", ".h5"}):
        parts = path.relative_to(directory).parts
        name = "/".join(parts)
        if any(part in COPIES or part.startswith(".") for part in parts):
            continue
        try:
            if path.name == "results.csv" and "ratio" in _columns(path):
                smaller.append(
                    pd.read_csv(path, dtype={"ratio": str, "error": str}).assign(folder="/".join(parts[:-1]))
                )
            elif path.name == "results.csv":
                own, notes = read_results(path)
                rows.append(own.assign(folder=str(path.parent)))
                results.notes += [f"{name}: {note}" for note in notes]
            elif path.name == "scorer.json":
                results.scorers.append((name, read_card(read_json(path, "scorer card"))))
            elif path.name == "diagnosis.json":
                results.diagnoses.append((name, read_diagnosis(path)))
            elif path.suffix == ".json" and path.parent.name == "cells":
                cells.append(_read_cell(path, name))
            elif path.suffix == ".h5":
                results.records.append(read_survival(path, name))
            else:
                continue
            results.newest = max(results.newest, path.stat().st_mtime)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, ArithmeticError, csv.Error) as error:
            results.notes.append(f"{name} ignored: {first_line(error)}")
    if not (rows or smaller or results.records or results.scorers or results.diagnoses):
        unreadable = f" ({len(results.notes)} files could not be read: {results.notes[0]})" if results.notes else ""
        raise AutoSparseError(
            f"nothing to report in {str(directory)!r}: looked for results.csv, IRP records (*.h5), scorer.json and "
            "diagnosis.json" + unreadable
        )
    if smaller:
        results.smaller = pd.concat(smaller, ignore_index=True)
    if rows:
        everything = pd.concat(rows, ignore_index=True)
        results.rows = name_floors(without_repeats(everything))
        if repeated := len(everything) - len(results.rows):
            results.notes.append(f"{repeated} repeated rows: the last one that did not fail counts.")
    _add_layers(results, cells)
    return results


def _columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return file.readline().strip().split(",")


def _read_cell(path: Path, name: str) -> dict[str, Any]:
    cell = read_json(path, "result")
    layers = {str(layer["name"]): int(layer["kept"]) / int(layer["total"]) for layer in cell.get("layers", [])}
    known = {key: cell[key] for key in ("data", "recipe", "model", "criterion")}
    accuracy = cell.get("accuracy")
    known |= {"seed": int(cell["seed"]), "sparsity": round(float(cell["sparsity"]), 6)}
    accuracy = math.nan if accuracy is None else float(accuracy)
    return known | {"folder": str(path.parent.parent), "accuracy_of_cell": accuracy, "layers": layers}


def _add_layers(results: Results, cells: Sequence[Mapping[str, Any]]) -> None:
    """The layer densities of cells that have their row in results.csv; the accuracy tells cells of other settings apart."""
    if not cells:
        return
    rows, known = results.rows, DataFrame(cells)
    rows = rows.assign(
        sparsity_wanted=rows.sparsity, sparsity=rows.sparsity.round(6), named=rows.criterion,
        criterion=rows.criterion.str.replace(r" \(floor [^)]*\)$", "", regex=True),
    ) if len(rows) else rows.assign(folder="", sparsity_wanted=0.0, named="")  # fmt: skip
    keys = ["folder", "data", "recipe", "model", "criterion", "seed", "sparsity"]
    both = known.reset_index().merge(rows, on=keys)
    difference = (both.accuracy - both.accuracy_of_cell).abs()
    both = both[(difference < 1e-5) | (both.accuracy.isna() & both.accuracy_of_cell.isna())].drop_duplicates("index")
    if stale := len(known) - len(both):
        results.notes.append(f"{plural(stale, 'cell file')} without a row in results.csv ignored: of other settings.")
    lines = [
        (row.data, row.recipe, row.model, row.named, row.sparsity_wanted, row.seed, layer, density)
        for row in both.itertuples()
        for layer, density in row.layers.items()
    ]
    results.layers = DataFrame(lines, columns=LAYERS)


def magnitude_bins(weight: np.ndarray, value: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Sum of `value` and number of weights in each of `bins` equally full bins of |weight|."""
    order = np.argsort(np.abs(weight).ravel(), kind="stable")
    place = np.arange(order.size) * bins // max(order.size, 1)
    return np.bincount(place, value.ravel()[order], bins), np.bincount(place, minlength=bins)


def survival_curves(layers: Sequence[tuple[np.ndarray, np.ndarray]], bins: int = BINS) -> tuple[np.ndarray, ...]:
    """From (weight, survival) of each layer: fraction of rounds survived and of ticket members, within and over layers.

    The rounds are the highest survival that occurs, since the ticket's weights have survived all of them.
    """
    rounds = max((int(s.max()) for _, s in layers if s.size), default=0)
    curves = []
    for value in (lambda s: s / max(rounds, 1), lambda s: (s == rounds).astype(float)):
        parts = [magnitude_bins(w, value(s), bins) for w, s in layers]
        weights, values = (np.concatenate([a.ravel() for a in both]) for both in zip(*((w, value(s)) for w, s in layers), strict=True))  # fmt: skip
        for sums, counts in (map(sum, zip(*parts, strict=True)), magnitude_bins(weights, values, bins)):
            curves.append(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))
    return tuple(curves)


def read_survival(path: Path, name: str) -> Survival:
    """One IRP record.

    Raises:
        AutoSparseError: it is missing, damaged or something else.
    """
    from autosparse.scorers.records import read_record

    record = read_record(path, ["weight"])
    known = np.isfinite(record.density) & np.isfinite(record.accuracy) & (record.density > 0)
    weight = record.signals["weight"]
    layers = [(weight[layer], survival) for layer, survival in record.survival.items()]
    model = model_name(record.config) or Path(name).stem
    within, overall, ticket_within, ticket_overall = survival_curves(layers)
    return Survival(
        name=name,
        model=model,
        complete=record.complete,
        density=record.density[known],
        accuracy=record.accuracy[known],
        within=within,
        overall=overall,
        ticket_within=ticket_within,
        ticket_overall=ticket_overall,
        torch=record.versions.get("torch", ""),
    )


def model_name(config: Any) -> str:
    """The model of a record's config with its width and options, "convnet-w16-depth4"; "" if it names none."""
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping):
        return str(model or "")
    options = model.get("options")
    extra = [f"{key}{value}" for key, value in options.items()] if isinstance(options, Mapping) else []
    width = [f"w{model['width']}"] if model.get("width") is not None else []
    return "-".join([str(model.get("name") or ""), *width, *extra])


def read_diagnosis(path: Path) -> list[dict[str, Any]]:
    """The states of one diagnosis.json.

    Raises:
        KeyError, AutoSparseError: it lacks something.
    """
    states = read_json(path, "diagnosis")["states"]
    for state in states:
        _ = [state[key] for key in ("state", "criterion", "prepare", "network", "singular_values")]
        _ = [layer[key] for layer in state["layers"] for key in ("name", "kept", "lipschitz", "hessian_norm")]
    if not states:
        raise AutoSparseError("no states")
    return list(states)


def scorer_name(path: str, card: Card) -> str:
    """The name on a scorer's card, else the folder it lies in."""
    return card.name or path.rpartition("/")[0] or path
