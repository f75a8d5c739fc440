"""One HTML page, with its figures, of what lies in a directory: benchmark tables, IRP records, scorer cards.

What is read is plain text, JSON and HDF5, so that a report needs neither torch nor the code that wrote the results.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autosparse.errors import AutoSparseError
from autosparse.files import replace_file

SCHEMA = "autosparse.record/1"
REQUIRED = ("model", "data", "criterion", "sparsity", "seed", "accuracy")
BINS = 20
DENSE = "dense"
SKIPPED_FOLDERS = {"mlartifacts", "figures"}  # copies of results that MLflow keeps would count twice

# Okabe and Ito's colours without the yellow, which is too light on white; the line style changes when they run out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4F9E", "#555555")
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
STYLE = {
    "svg.hashsalt": "autosparse",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a criterion called a$b is no formula
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}
WIDTH = 9.6  # inches: 920 CSS pixels, a page's width


# ---------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Result:
    """One cell of a benchmark with one seed; a number that is missing is NaN. Accuracies and sparsities in [0, 1]."""

    model: str
    data: str
    criterion: str
    sparsity: float
    seed: int
    accuracy: float
    recipe: str = ""
    floor: str = ""
    error: str = ""
    sparsity_got: float = math.nan
    effective_sparsity: float = math.nan
    dense_accuracy: float = math.nan
    mask_cost: float = math.nan
    dead_layers: float = math.nan
    ties: float = math.nan

    @property
    def ok(self) -> bool:
        return math.isfinite(self.accuracy) and not self.error


class Stat(NamedTuple):
    """Mean and sample standard deviation (ddof 1, NaN when n < 2) of n finite values."""

    mean: float
    std: float
    n: int


class Cell(NamedTuple):
    """The seeds of one (model, criterion, sparsity) together."""

    accuracy: Stat
    dead_layers: Stat
    effective_sparsity: Stat
    mask_cost: Stat


class Table(NamedTuple):
    """A table of strings for a terminal: one (data, recipe) each, since different recipes are not comparable."""

    title: str
    headers: list[str]
    rows: list[list[str]]


CellKey = tuple[str, str, float]


def number(value: Any) -> float:
    """`value` as a float; NaN for what is missing or no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def load_results(path: Path) -> tuple[list[Result], list[str]]:
    """The rows of one results.csv, and a line about each one that cannot be read; AutoSparseError: a missing column."""
    rows, notes = [], []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
        if missing:
            raise AutoSparseError(f"no benchmark table: column {missing[0]!r} is missing")
        for line in reader:
            row = parse_result(line)
            if row is None:
                notes.append(f"line {reader.line_num} ignored: sparsity, seed or accuracy is out of range or no number")
            else:
                rows.append(row)
    return rows, notes


def parse_result(line: Mapping[str, Any]) -> Result | None:
    """One line of results.csv, or None where its sparsity, seed or accuracy makes no sense."""
    accuracy, sparsity, seed = (number(line.get(key)) for key in ("accuracy", "sparsity", "seed"))
    if not (0 <= sparsity < 1) or not math.isfinite(seed) or accuracy < 0 or accuracy > 1:
        return None
    cost, epochs = number(line.get("mask_cost")), number(line.get("train_epochs"))
    if math.isnan(cost) and epochs > 0:
        cost = number(line.get("mask_epochs")) / epochs

    def text(key: str) -> str:
        return (line.get(key) or "").strip()

    return Result(
        model=text("model"),
        data=text("data"),
        criterion=text("criterion"),
        sparsity=round(sparsity, 8),
        seed=int(seed),
        accuracy=accuracy,
        recipe=text("recipe"),
        floor=text("floor"),
        error=text("error") or ("no accuracy" if math.isnan(accuracy) else ""),
        sparsity_got=number(line.get("sparsity_got")),
        effective_sparsity=number(line.get("effective_sparsity")),
        dense_accuracy=number(line.get("dense_accuracy")),
        mask_cost=cost,
        dead_layers=number(line.get("dead_layers")),
        ties=number(line.get("ties")),
    )


def without_repeats(rows: Iterable[Result]) -> list[Result]:
    """Each cell and seed once: the last row that did not fail wins."""
    kept: dict[tuple[Any, ...], Result] = {}
    for row in rows:
        key = (row.data, row.recipe, row.model, row.criterion, row.floor, row.sparsity, row.seed)
        if key not in kept or row.ok or not kept[key].ok:
            kept[key] = row
    return list(kept.values())


def floors_by_criterion(rows: Iterable[Result]) -> dict[tuple[str, str, str], set[str]]:
    """The floors that each (data, recipe, criterion) was run with."""
    floors: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in rows:
        floors[row.data, row.recipe, row.criterion].add(row.floor)
    return dict(floors)


def with_floor_named(row: Result, floors: Mapping[tuple[str, str, str], set[str]]) -> Result:
    """A criterion run with several floors becomes several criteria, so that they are not averaged."""
    if len(floors[row.data, row.recipe, row.criterion]) < 2:
        return row
    return replace(row, criterion=f"{row.criterion} (floor {row.floor or 'none'})")


def stat(values: Iterable[float]) -> Stat:
    """Mean, sample standard deviation and count of the finite values."""
    finite = [v for v in values if math.isfinite(v)]
    mean = sum(finite) / len(finite) if finite else math.nan
    std = math.sqrt(sum((v - mean) ** 2 for v in finite) / (len(finite) - 1)) if len(finite) > 1 else math.nan
    return Stat(mean, std, len(finite))


def groups(rows: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """The rows by (data, recipe): only within one of these may they be compared."""
    result: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for row in rows:
        result[row.data, row.recipe].append(row)
    return dict(result)


def aggregate(rows: Sequence[Result]) -> dict[CellKey, Cell]:
    """Mean, std and n over seeds by (model, criterion, sparsity), without failed rows and dense ones.

    AutoSparseError: rows of several recipes or data sets.
    """
    if len(groups(rows)) > 1:
        raise AutoSparseError(f"rows of {len(groups(rows))} (data, recipe) pairs: use groups() first")
    by_cell: dict[CellKey, list[Result]] = defaultdict(list)
    for row in rows:
        if row.ok and row.criterion != DENSE:
            by_cell[row.model, row.criterion, row.sparsity].append(row)
    return {
        key: Cell(
            stat(r.accuracy for r in cell),
            stat(r.dead_layers for r in cell),
            stat(r.effective_sparsity for r in cell),
            stat(r.mask_cost for r in cell),
        )
        for key, cell in by_cell.items()
    }


def dense_accuracy(rows: Iterable[Result], model: str) -> Stat:
    """Accuracy of the dense network over seeds: from its own rows, else from the column that the others carry."""
    of_model = [r for r in rows if r.model == model]
    own = {r.seed: r.accuracy for r in of_model if r.criterion == DENSE and r.ok}
    carried = {r.seed: r.dense_accuracy for r in of_model if math.isfinite(r.dense_accuracy)}
    return stat((own or carried).values())


def paired_difference(rows: Iterable[Result], model: str, sparsity: float, criterion: str, rival: str) -> Stat:
    """Accuracy of `criterion` less that of `rival`, over the seeds that both have."""
    accuracy: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.ok and (row.model, row.sparsity) == (model, sparsity):
            accuracy[row.criterion][row.seed] = row.accuracy
    shared = sorted(accuracy[criterion].keys() & accuracy[rival].keys())
    return stat(accuracy[criterion][seed] - accuracy[rival][seed] for seed in shared)


def best_of_column(cells: Mapping[CellKey, Cell]) -> dict[tuple[str, float], set[str]]:
    """The criteria of highest mean accuracy by (model, sparsity); several when they tie."""
    best: dict[tuple[str, float], float] = {}
    for (model, _, sparsity), cell in cells.items():
        best[model, sparsity] = max(cell.accuracy.mean, best.get((model, sparsity), -1.0))
    result: dict[tuple[str, float], set[str]] = defaultdict(set)
    for (model, criterion, sparsity), cell in cells.items():
        if cell.accuracy.mean == best[model, sparsity]:
            result[model, sparsity].add(criterion)
    return dict(result)


def unique(values: Iterable[Any]) -> list[Any]:
    """The values in order of first appearance."""
    return list(dict.fromkeys(values))


def in_percent(value: Stat, signed: bool = False) -> str:
    """ "61.7 ± 0.8" from fractions; "–" for what one seed cannot say."""
    if value.n == 0:
        return "–"
    std = f"{100 * value.std:.1f}" if value.n > 1 else "–"
    return f"{100 * value.mean:{'+' if signed else ''}.1f} ± {std}".replace("-", "−")


def sparsity_text(sparsity: float) -> str:
    """A sparsity in percent, to as many digits as its density has meaning."""
    if sparsity >= 1:
        return "100"
    digits = max(1, 1 - math.floor(math.log10(100 * (1 - sparsity)) + 1e-9))
    return f"{100 * sparsity:.{digits}f}"


def cost_text(costs: Sequence[float]) -> str:
    """A mask cost, or the range of it over sparsities, in units of one training."""
    finite = [c for c in costs if math.isfinite(c)]
    if not finite:
        return "–"
    low, high = f"{min(finite):.2g}", f"{max(finite):.2g}"
    return low if low == high else f"{low}–{high}"


def table(rows: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of strings: models × criteria down, sparsities across; rows of one (data, recipe)."""
    cells = aggregate(rows)
    sparsities = sorted({key[2] for key in cells})
    headers = ["model", "criterion", *(f"{100 * s:.6g} %" for s in sparsities), "mask cost", "seeds", "dead layers"]
    lines = []
    for model in unique(r.model for r in rows):
        dense = dense_accuracy(rows, model)
        if dense.n:
            lines.append([model, DENSE, *[in_percent(dense)] * len(sparsities), "0", str(dense.n), "0"])
        for criterion in unique(key[1] for key in cells if key[0] == model):
            row = [cells.get((model, criterion, s)) for s in sparsities]
            present = [cell for cell in row if cell]
            seeds = [cell.accuracy.n for cell in present]
            dead = [cell.dead_layers.mean for cell in present if cell.dead_layers.n]
            lines.append(
                [
                    model,
                    criterion,
                    *(in_percent(cell.accuracy) if cell else "" for cell in row),
                    cost_text([cell.mask_cost.mean for cell in present]),
                    str(seeds[0]) if min(seeds) == max(seeds) else f"{min(seeds)}–{max(seeds)}",
                    f"{max(dead):.2g}" if dead else "–",
                ]
            )
    return headers, lines


def summary(source: Path | Sequence[Result]) -> list[Table]:
    """The final tables for a terminal, one per (data, recipe), from a directory or from rows."""
    if isinstance(source, Path):
        source = collect(source).results
    return [
        Table(f"{data}, recipe {recipe}" if recipe else data, *table(rows))
        for (data, recipe), rows in groups(source).items()
    ]


# ---------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Record:
    """What a report needs of one IRP record: its course, and survival by initial magnitude."""

    name: str
    model: str
    complete: bool
    density: np.ndarray
    accuracy: np.ndarray
    within: np.ndarray  # mean fraction of rounds survived per magnitude bin, bins within each layer
    overall: np.ndarray  # the same with bins over all layers together
    ticket_within: np.ndarray  # fraction of the bin in the last ticket
    ticket_overall: np.ndarray
    torch: str


def magnitude_bins(weight: np.ndarray, value: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Sum of `value` and number of weights in each of `bins` equally full bins of |weight|."""
    order = np.argsort(np.abs(weight).ravel(), kind="stable")
    place = np.arange(order.size) * bins // max(order.size, 1)
    return np.bincount(place, value.ravel()[order], bins), np.bincount(place, minlength=bins)


def survival_curves(layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """From (weight, survival) of each layer: fraction of rounds survived and of ticket members, within and over layers.

    The rounds are the highest survival found, since the ticket's weights have survived all of them.
    """
    rounds = max((int(s.max()) for _, s in layers if s.size), default=0)
    curves = []
    for value in (lambda s: s / max(rounds, 1), lambda s: (s == rounds).astype(float)):
        parts = [magnitude_bins(w, value(s)) for w, s in layers]
        joint = magnitude_bins(
            np.concatenate([w.ravel() for w, _ in layers]), np.concatenate([value(s).ravel() for _, s in layers])
        )
        for sums, counts in ((sum(p[0] for p in parts), sum(p[1] for p in parts)), joint):
            curves.append(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))
    return tuple(curves)


def load_record(path: Path, name: str) -> Record:
    """One IRP record; AutoSparseError: another schema, or no layers."""
    import h5py

    with h5py.File(path, "r") as file:
        schema = file.attrs.get("schema", "")
        schema = schema.decode() if isinstance(schema, bytes) else str(schema)
        if schema != SCHEMA:
            raise AutoSparseError(f"no record: its schema is {schema!r}, not {SCHEMA!r}")
        found: list[Any] = []
        file["layers"].visititems(lambda _, item: found.append(item))  # names with slashes are nested
        groups_of_layers = [item for item in found if isinstance(item, h5py.Group) and "survival" in item]
        layers = [(layer["weight"][()], layer["survival"][()]) for layer in groups_of_layers]
        if not layers:
            raise AutoSparseError("a record without layers")
        density, accuracy = (np.asarray(file[f"rounds/{key}"][()], float).ravel() for key in ("density", "accuracy"))
        config = json.loads(file.attrs.get("config", "{}"))
        torch = next((str(v) for k, v in file.attrs.items() if "torch" in k), "")
        complete = bool(file.attrs.get("complete", False))
    length = min(len(density), len(accuracy))
    density, accuracy = density[:length], accuracy[:length]
    known = np.isfinite(density) & np.isfinite(accuracy) & (density > 0)
    within, overall, ticket_within, ticket_overall = survival_curves(layers)
    return Record(
        name=name,
        model=model_name(config) or Path(name).stem,
        complete=complete,
        density=density[known],
        accuracy=accuracy[known],
        within=within,
        overall=overall,
        ticket_within=ticket_within,
        ticket_overall=ticket_overall,
        torch=torch,
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


# ------------------------------------------------------------------------------------------------- collecting


@dataclass
class Found:
    """All that a directory holds."""

    results: list[Result] = field(default_factory=list)
    densities: dict[tuple[str, str], dict[CellKey, list[dict[str, float]]]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    scorers: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    newest: float = 0.0


def collect(directory: Path) -> Found:
    """Read everything under `directory`; what cannot be read becomes a note.

    AutoSparseError: no such directory, or nothing to report in it.
    """
    if not directory.is_dir():
        raise AutoSparseError(f"{str(directory)!r} is not a directory: give one with results in it")
    found = Found()
    cells: list[tuple[Path, dict[str, Any]]] = []
    rows: list[Result] = []
    rows_at: dict[Path, list[Result]] = defaultdict(list)

    def read_results(path: Path, name: str) -> None:
        loaded, notes = load_results(path)
        rows.extend(loaded)
        rows_at[path.parent].extend(loaded)
        found.notes += [f"{name}: {note}" for note in notes]

    def read_cell(path: Path, name: str) -> None:
        cells.append((path, read_json(path)))

    def read_record(path: Path, name: str) -> None:
        found.records.append(load_record(path, name))

    def read_scorer(path: Path, name: str) -> None:
        found.scorers.append((name, read_json(path)))

    for path in sorted(p for p in directory.rglob("*") if p.suffix in {".csv", ".json", ".h5"}):
        parts = path.relative_to(directory).parts
        reader = reader_of(path, read_results, read_cell, read_record, read_scorer)
        if reader is None or any(part in SKIPPED_FOLDERS or part.startswith(".") for part in parts):
            continue
        name = "/".join(parts)
        try:
            reader(path, name)
            found.newest = max(found.newest, path.stat().st_mtime)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, csv.Error) as error:
            found.notes.append(f"{name} ignored: {first_line(error)}")
    if not (rows or found.records or found.scorers):
        unreadable = f" ({len(found.notes)} files could not be read: {found.notes[0]})" if found.notes else ""
        raise AutoSparseError(
            f"nothing to report in {str(directory)!r}: looked for results.csv, IRP records (*.h5) and scorer.json"
            + unreadable
        )
    floors = floors_by_criterion(rows)
    found.results = [with_floor_named(row, floors) for row in without_repeats(rows)]
    if len(found.results) < len(rows):
        found.notes.append(f"{len(rows) - len(found.results)} repeated rows: the last one that did not fail counts.")
    stale = 0
    for path, cell in cells:
        try:
            match = row_of_cell(rows_at[path.parent.parent], cell)
            layers = {str(layer["name"]): int(layer["kept"]) / int(layer["total"]) for layer in cell["layers"]}
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            found.notes.append(f"{'/'.join(path.relative_to(directory).parts)} ignored: {first_line(error)}")
            continue
        stale += match is None
        if match is not None and layers:
            row = with_floor_named(match, floors)
            by_cell = found.densities.setdefault((row.data, row.recipe), {})
            by_cell.setdefault((row.model, row.criterion, row.sparsity), []).append(layers)
    if stale:
        found.notes.append(f"{plural(stale, 'cell file')} without a row in results.csv ignored: of other settings.")
    return found


def reader_of(path: Path, results: Any, cell: Any, record: Any, scorer: Any) -> Callable[[Path, str], None] | None:
    """Which of the readers a file needs, by its name."""
    if path.name == "results.csv":
        return results
    if path.name == "scorer.json":
        return scorer
    if path.suffix == ".json" and path.parent.name == "cells":
        return cell
    return record if path.suffix == ".h5" else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise AutoSparseError("no JSON object")
    return content


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def row_of_cell(rows: Sequence[Result], cell: Mapping[str, Any]) -> Result | None:
    """The row of results.csv that a cell's JSON belongs to, if there is just one; the accuracy tells old cells apart."""
    wanted = {key: cell[key] for key in ("data", "recipe", "floor") if cell.get(key) is not None}
    name, sparsity = (cell["model"], cell["criterion"], int(cell["seed"])), float(cell["sparsity"])
    accuracy = number(cell.get("accuracy"))
    matches = [
        row
        for row in rows
        if (row.model, row.criterion, row.seed) == name
        and math.isclose(row.sparsity, sparsity, abs_tol=1e-6)
        and (math.isnan(accuracy) or math.isclose(row.accuracy, accuracy, abs_tol=1e-5))
        and all(same_text(getattr(row, key), value) for key, value in wanted.items())
    ]
    return matches[0] if len({(r.data, r.recipe, r.floor) for r in matches}) == 1 else None


def same_text(text: str, value: Any) -> bool:
    """Whether a CSV field and a JSON value are the same, as numbers if both are."""
    return text == str(value) or number(text) == number(value)


# ---------------------------------------------------------------------------------------------------- figures


class Look(NamedTuple):
    """How a criterion looks, the same in every figure."""

    color: str
    linestyle: str
    marker: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, in order of first appearance."""
    return {
        name: Look(COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % len(LINES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(unique(names))
    }


def panels(count: int, columns: int = 3, height: float = 2.7) -> tuple[Any, list[Any]]:
    """A figure of page width with `count` axes; no pyplot, hence no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure: Any = Figure(figsize=(WIDTH if columns > 1 else 0.8 * WIDTH, rows * height + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend for all panels, under them, in as many columns as fit."""
    inches = max(len(label) for label in labels) * 0.075 + 0.6
    columns = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.4, columnspacing=1.4)


def legend_of(figure: Any, criteria: Iterable[str], look: Mapping[str, Look], *more: tuple[Any, str]) -> None:
    from matplotlib.lines import Line2D

    entries = [(Line2D([], [], **look[c]._asdict()), c) for c in criteria] + list(more)
    legend_below(figure, [handle for handle, _ in entries], [label for _, label in entries])


def dodge(count: int, width: float) -> list[float]:
    """`count` offsets across `width` about zero, by which equal values stay apart."""
    return [width * (i / (count - 1) - 0.5) if count > 1 else 0.0 for i in range(count)]


def density_axis(ax: Any, sparsities: Iterable[float]) -> float:
    """A logarithmic axis of density, sparser to the right, with the sparsities themselves as ticks where they fit.

    Returns its length in decades.
    """
    shown = sorted(set(sparsities))
    low, high = math.log10(1 / (1 - shown[0])), math.log10(1 / (1 - shown[-1]))
    span = max(high - low, 0.3)
    ticks: list[float] = []
    for s in reversed(shown):  # from the sparsest, whose label matters most
        if not ticks or math.log10((1 - s) / (1 - ticks[-1])) > 0.075 * span:
            ticks.append(s)
    ax.set_xscale("log")
    ax.set_xlim(10 ** (-low + 0.08 * span), 10 ** (-high - 0.08 * span))
    ax.set_xticks([1 - s for s in ticks], [f"{100 * s:.6g}" for s in ticks])
    ax.set_xticks([], minor=True)
    return span


def plot_accuracy(rows: Sequence[Result], look: Mapping[str, Look]) -> Any:
    """Accuracy against sparsity: a panel for each model, a line for each criterion, bars of one std over seeds."""
    from matplotlib.lines import Line2D

    cells = aggregate(rows)
    models, criteria = unique(k[0] for k in cells), unique(k[1] for k in cells)
    figure, axes = panels(len(models), height=3.1)
    for ax, model in zip(axes, models, strict=True):
        own = unique(k[1] for k in cells if k[0] == model)
        span = density_axis(ax, (k[2] for k in cells if k[0] == model))
        for criterion, shift in zip(own, dodge(len(own), 0.05 * span), strict=True):
            points = sorted((s, cell.accuracy) for (m, c, s), cell in cells.items() if (m, c) == (model, criterion))
            ax.errorbar(
                [(1 - s) * 10**-shift for s, _ in points],
                [100 * a.mean for _, a in points],
                [0 if math.isnan(a.std) else 100 * a.std for _, a in points],
                **look[criterion]._asdict(),
                capsize=2,
                elinewidth=0.8,
            )
        dense = dense_accuracy(rows, model)
        if dense.n:
            ax.axhline(100 * dense.mean, color="#333333", linestyle=(0, (6, 3)), linewidth=1, zorder=1)
        ax.set_title(f"{model} (dense {100 * dense.mean:.1f} %)" if dense.n else model)
        ax.set_xlabel("sparsity (%)")
    for ax in axes[:: min(3, len(axes))]:
        ax.set_ylabel("test accuracy (%)")
    legend_of(figure, criteria, look, (Line2D([], [], color="#333333", linestyle=(0, (6, 3)), linewidth=1), DENSE))
    return figure


def plot_cost(rows: Sequence[Result], look: Mapping[str, Look]) -> Any:
    """Accuracy against mask cost: a row of panels for each model, of its three highest sparsities."""
    cells = {k: c for k, c in aggregate(rows).items() if c.mask_cost.n and c.accuracy.n}
    places = [
        (model, sparsity)
        for model in unique(k[0] for k in cells)
        for sparsity in sorted({k[2] for k in cells if k[0] == model})[-3:]
    ]
    columns = max(sum(m == model for m, _ in places) for model, _ in places)
    figure, axes = panels(len(places), columns=columns if len({m for m, _ in places}) > 1 else 3, height=3.3)
    dearest = max(c.mask_cost.mean for c in cells.values())
    labels = []
    for ax, (model, sparsity) in zip(axes, places, strict=True):
        points = [(c, cell) for (m, c, s), cell in cells.items() if (m, s) == (model, sparsity)]
        steps = frontier([(cell.mask_cost.mean, cell.accuracy.mean) for _, cell in points])
        ax.plot(
            [x for x, _ in steps] + [1.5 * dearest + 0.1],
            [100 * y for _, y in steps] + [100 * steps[-1][1]],
            color="#d8d8d8",
            linewidth=2.5,
            drawstyle="steps-post",
            zorder=1,
            solid_capstyle="butt",
        )
        for criterion, cell in points:
            a = cell.accuracy
            color, _, marker = look[criterion]
            bar = 0 if math.isnan(a.std) else 100 * a.std
            ax.errorbar(cell.mask_cost.mean, 100 * a.mean, bar, color=color, marker=marker, capsize=2, elinewidth=0.8)
        ax.set_xscale("symlog", linthresh=0.1, linscale=1.2)
        ticks = [
            t
            for t in (0, *([] if dearest > 0.5 else [0.03]), 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
            if t <= max(1.3 * dearest, 0.1)
        ]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_xticks([], minor=True)
        ax.set_xlim(-0.02, 4 * dearest + 0.1)  # room for labels at the right
        ax.margins(y=0.12)
        ax.set_title(f"{model}, {100 * sparsity:.6g} % sparse")
        ax.set_xlabel("mask cost (trainings)")
        labels.append([(cell.mask_cost.mean, 100 * cell.accuracy.mean, criterion) for criterion, cell in points])
    for ax in axes[:: columns if columns > 1 else 1]:
        ax.set_ylabel("test accuracy (%)")
    figure.draw_without_rendering()  # places the axes, which the labels' places depend on
    for ax, points_of_ax in zip(axes, labels, strict=True):
        label_points(ax, points_of_ax)
    return figure


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, accuracy) that no cheaper or equally cheap point reaches, by cost."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


def label_points(ax: Any, points: Sequence[tuple[float, float, str]], size: float = 7.5) -> None:
    """Write each (x, y, text) beside its point, at the nearest place free of points and of other labels."""
    renderer = ax.figure.canvas.get_renderer()
    to_points = 72 / ax.figure.dpi
    spots = ax.transData.transform([(x, y) for x, y, _ in points]) * to_points
    frame = ax.get_window_extent().get_points() * to_points
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    for i in sorted(range(len(points)), key=lambda i: -points[i][1]):
        (px, py), text = spots[i], shortened(points[i][2], 26)
        note = ax.annotate(text, points[i][:2], xytext=(0, 0), textcoords="offset points", fontsize=size, va="center")
        note.set_in_layout(False)
        width = note.get_window_extent(renderer).width * to_points
        height = 1.15 * size
        sides = [(dx, dy * height) for dy in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7) for dx in (7, 14)]
        sides = [side for dx, dy in sides for side in ((dx, dy), (-dx - width, dy))]
        boxes = [(px + dx - 2, py + dy - height / 2, px + dx + width + 2, py + dy + height / 2) for dx, dy in sides]
        inside = [
            k
            for k, (x0, y0, x1, y1) in enumerate(boxes)
            if x0 >= frame[0, 0] and x1 <= frame[1, 0] and y0 >= frame[0, 1] and y1 <= frame[1, 1]
        ]
        free = [k for k in inside if not any(overlap(boxes[k], other) for other in taken)]
        k = (free or inside or [0])[0]
        taken.append(boxes[k])
        dx, dy = sides[k]
        note.set_position((dx, dy))
        if dy or abs(dx) == 14:
            end = (dx if dx > 0 else dx + width, dy)
            ax.annotate(
                "",
                points[i][:2],
                xytext=end,
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
            ).set_in_layout(False)


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) share a point."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def plot_layers(densities: Mapping[CellKey, Sequence[Mapping[str, float]]], look: Mapping[str, Look]) -> Any:
    """Density of each layer, in the network's order, at the highest sparsity but one; a cross: no weight left."""
    chosen = []
    for model in unique(k[0] for k in densities):
        sparsities = sorted({k[2] for k in densities if k[0] == model})
        chosen.append((model, sparsities[-2] if len(sparsities) > 1 else sparsities[0]))
    depth = max(len(cells[0]) for cells in densities.values())
    figure, axes = panels(len(chosen), columns=1 if depth > 12 else 2, height=3.4)
    figure.set_figwidth(WIDTH)
    criteria = []
    for ax, (model, sparsity) in zip(axes, chosen, strict=True):
        own = {c: densities[model, c, sparsity] for c in look if (model, c, sparsity) in densities}
        criteria += list(own)
        names = unique(name for cells in own.values() for cell in cells for name in cell)
        means = {
            c: [stat(cell.get(name, math.nan) for cell in cells).mean for name in names] for c, cells in own.items()
        }
        lowest = min((v for values in means.values() for v in values if v > 0), default=1e-3)
        grave = lowest / 4
        for (criterion, cells), shift in zip(own.items(), dodge(len(own), 0.3), strict=True):
            x = np.arange(len(names)) + shift
            y = np.array([v if v > 0 else math.nan for v in means[criterion]])
            ax.plot(x, y, **{**look[criterion]._asdict(), "markersize": 3.5})
            dead = [k for k, name in enumerate(names) if any(cell.get(name) == 0 for cell in cells)]
            ax.plot(x[dead], [grave] * len(dead), "x", color=look[criterion].color, markersize=7, markeredgewidth=1.8)
        ax.set_yscale("log")
        bottom = grave / 2
        ax.set_ylim(bottom, 1.5)
        ax.axhspan(bottom, grave * 2, color="#f3f3f3", zorder=0)
        ticks = [10.0**k for k in range(-8, 1) if 10.0**k > grave * 2]
        ax.set_yticks([grave, *ticks], ["dead", *(f"{100 * t:g} %" for t in ticks)])
        ax.set_yticks([], minor=True)
        ax.set_xlim(-0.6, len(names) - 0.4)
        if len(names) <= 60:
            ax.set_xticks(
                range(len(names)),
                [short_layer(name) for name in names],
                rotation=60,
                ha="right",
                fontsize=7,
                rotation_mode="anchor",
            )
        else:
            ax.set_xlabel("layer, from the input")
        ax.set_title(f"{model}, {100 * sparsity:.6g} % sparse")
        ax.set_ylabel("density of the layer")
    legend_of(figure, [c for c in look if c in criteria], look)
    return figure


def short_layer(name: str) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= 28 else "…" + name[-27:]  # the end tells layers apart


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    models: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        models[record.model].append(record)
    return dict(models)


def mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of curves over records, bin by bin, without the bins that a record does not fill."""
    stacked = np.array(curves)
    known = np.isfinite(stacked)
    return np.where(known, stacked, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def plot_survival(records: Sequence[Record]) -> Any:
    """Rounds survived, and share in the ticket, against the quantile of the initial magnitude."""
    from matplotlib.lines import Line2D

    models = by_model(records)
    many = len(models) > len(COLOURS)  # then each model is a thin grey line, and their mean a thick one
    look = looks(models)
    figure, axes = panels(2, height=3.3)
    quantile = 100 * (np.arange(BINS) + 0.5) / BINS
    curves = (("within", "overall"), ("ticket_within", "ticket_overall"))
    titles = ("fraction of rounds survived", "fraction in the last ticket")
    for ax, (within, overall), title in zip(axes, curves, titles, strict=True):
        for model, own in models.items():
            color = "#bbbbbb" if many else look[model].color
            ax.plot(
                quantile, mean_curve([getattr(r, within) for r in own]), color=color, linewidth=0.8 if many else 1.6
            )
            if not many:
                ax.plot(
                    quantile, mean_curve([getattr(r, overall) for r in own]), color=color, linestyle="--", linewidth=1
                )
        if many:
            ax.plot(quantile, mean_curve([getattr(r, within) for r in records]), color=COLOURS[0], linewidth=2)
            ax.plot(quantile, mean_curve([getattr(r, overall) for r in records]), color=COLOURS[0], linestyle="--")
        ax.set_title(title)
        ax.set_xlabel("quantile of initial magnitude |θ₀| (%)")
        ax.set_ylim(bottom=0)
    entries: list[tuple[Any, str]] = []
    if many:
        entries = [(Line2D([], [], color="#bbbbbb", linewidth=0.8), f"each of {len(models)} models, within layers")]
        entries.append((Line2D([], [], color=COLOURS[0], linewidth=2), "mean, bins within layers"))
        entries.append((Line2D([], [], color=COLOURS[0], linestyle="--"), "mean, bins over all layers"))
    else:
        entries = [
            (Line2D([], [], color=look[m].color), f"{m} ({plural(len(own), 'run')})") for m, own in models.items()
        ]
        entries.append((Line2D([], [], color="#333333"), "bins within layers"))
        entries.append((Line2D([], [], color="#333333", linestyle="--", linewidth=1), "bins over all layers"))
    legend_below(figure, [handle for handle, _ in entries], [label for _, label in entries])
    return figure


def plot_rounds(records: Sequence[Record]) -> Any:
    """Accuracy of each IRP round against its density."""
    from matplotlib.lines import Line2D

    models = by_model([r for r in records if len(r.density)])
    many = len(models) > len(COLOURS)
    look = looks(models)
    figure, (ax,) = panels(1, height=3.2)
    for model, own in models.items():
        color = "#999999" if many else look[model].color
        for record in own:
            style = "-" if record.complete else ":"
            ax.plot(
                record.density, 100 * record.accuracy, linestyle=style, marker="o", markersize=3, color=color, alpha=0.8
            )
    densities = [d for own in models.values() for r in own for d in r.density]
    low, high = min(densities), max(densities)
    ticks = [
        t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 1e-4, 1e-5) if low / 1.3 <= t <= high * 1.3
    ]
    ax.set_xscale("log")
    ax.set_xlim(high * 1.15, low / 1.15)
    ax.set_xticks(ticks, [f"{100 * t:g}" for t in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("density (% of weights left)")
    ax.set_ylabel("accuracy (%)")
    entries = [(Line2D([], [], color="#999999"), f"{len(models)} models")]
    if not many:
        entries = [
            (Line2D([], [], color=look[m].color), f"{m} ({plural(len(own), 'run')})") for m, own in models.items()
        ]
    if any(not r.complete for own in models.values() for r in own):
        entries.append((Line2D([], [], color="#333333", linestyle=":"), "unfinished"))
    legend_below(figure, [handle for handle, _ in entries], [label for _, label in entries])
    return figure


def loss_history(card: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """(epoch, training loss, validation loss) of a scorer's card."""
    history = card.get("history")
    entries = [entry for entry in history if isinstance(entry, Mapping)] if isinstance(history, list) else []
    return [tuple(number(e.get(k)) for k in ("epoch", "train_loss", "validation_loss")) for e in entries]  # type: ignore[misc]


def plot_fitting(scorers: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    """Loss against epoch of each scorer, on the records it learns from and on those held out."""
    shown = [(scorer_name(path, card), loss_history(card)) for path, card in scorers if loss_history(card)][:12]
    from matplotlib.lines import Line2D

    figure, axes = panels(len(shown), height=2.4)
    for ax, (name, history) in zip(axes, shown, strict=True):
        epochs, train, validation = zip(*history, strict=True)
        ax.plot(epochs, train, color=COLOURS[0], marker=".")
        ax.plot(epochs, validation, color=COLOURS[1], linestyle="--", marker=".")
        ax.set_title(name)
        ax.set_xlabel("epoch")
    axes[0].set_ylabel("loss")
    handles = [Line2D([], [], color=COLOURS[0]), Line2D([], [], color=COLOURS[1], linestyle="--")]
    legend_below(figure, handles, ["training records", "validation records"])
    return figure


def svg(draw: Callable[[], Any], name: str) -> str:
    """The SVG text of a figure: the same bytes for the same input, ids made unique by the figure's name."""
    import io

    import matplotlib.style

    with matplotlib.style.context(STYLE, after_reset=True):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r'<!--.*?-->\n?|(?<=<g) id="[^"]*"', "", buffer.getvalue())  # a third of the bytes, used by nothing
    text = re.sub(r"\n\s+", "\n", text)
    text = re.sub(r'\b(id="|xlink:href="#)|(url\(#)', rf"\g<0>{name}-", text)
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)


# ------------------------------------------------------------------------------------------------------- page

CSS = """
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 980px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin: 0 0 .1em; }
h2 { font-size: 1.25em; margin: 2.2em 0 .4em; border-bottom: 1px solid #ccc; }
h3 { font-size: 1.02em; margin: 1.6em 0 .3em; }
.about, figcaption, caption, .small { color: #555; font-size: .88em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6em 0; font-size: .9em; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .5em; }
th, td { padding: .3em .55em; text-align: right; vertical-align: top; white-space: nowrap; }
td { border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; border-bottom: 1px solid #999; }
th:first-child, td:first-child { text-align: left; white-space: normal; max-width: 17em; }
.cards th { white-space: normal; }
tr.model td { background: #f5f5f5; font-weight: 600; }
tr.model td .small { font-weight: normal; }
td .small { display: block; line-height: 1.25; font-size: .8em; }
td .dead { color: #a33c00; }
figure { margin: 1em 0 1.8em; } figure svg { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 46em; } summary { cursor: pointer; color: #333; }
ul { padding-left: 1.2em; } li { margin: .15em 0; overflow-wrap: anywhere; }
"""


def build(directory: Path) -> Path:
    """Write DIRECTORY/report.html and DIRECTORY/figures/*.svg from what lies under `directory`.

    AutoSparseError: there is nothing to report. AutoSparseFailure: the files cannot be written.
    """
    directory = Path(directory)
    found = collect(directory)
    figures: dict[str, str] = {}

    def figure(name: str, draw: Callable[[], Any], guide: str) -> str:
        figures[name] = svg(draw, name)
        return f"<figure>{figures[name]}<figcaption>{guide}</figcaption></figure>"

    body = [*benchmark_sections(found, figure), *record_sections(found, figure), *scorer_sections(found, figure)]
    body.append(notes_section(found))
    title = f"AutoSparse report: {escape(directory.resolve().name)}"
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head>\n'
        f'<body><h1>{title}</h1><p class="about">{escape(about(found))}</p>\n' + "\n".join(body) + "\n</body></html>\n"
    )
    target = directory / "report.html"
    files = {directory / "figures" / f"{name}.svg": text for name, text in figures.items()}
    for path, text in {**files, target: page}.items():
        with replace_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return target


Figure = Callable[[str, Callable[[], Any], str], str]


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def about(found: Found) -> str:
    """What was read, from when it is, and with which versions."""
    parts = []
    if found.results:
        parts.append(f"{plural(len(found.results), 'benchmark run')}")
    if found.records:
        parts.append(plural(len(found.records), "IRP record"))
    if found.scorers:
        parts.append(plural(len(found.scorers), "fitted scorer"))
    when = datetime.fromtimestamp(found.newest, UTC).strftime("newest of %Y-%m-%d %H:%M UTC")
    torch = ", ".join(sorted({r.torch for r in found.records if r.torch})) or version("torch")
    return f"{', '.join(parts)}; {when}. autosparse {version('autosparse')}, torch {torch}."


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def benchmark_sections(found: Found, figure: Figure) -> list[str]:
    """A table and the figures for each (data, recipe)."""
    look = looks(r.criterion for r in found.results if r.criterion != DENSE)
    by_group = groups(found.results)
    parts = []
    if len(by_group) > 1:
        parts.append(
            '<p class="small">Runs of different data sets or training recipes stand apart below: '
            "they must not be compared with each other.</p>"
        )
    for i, ((data, recipe), rows) in enumerate(by_group.items(), 1):
        suffix = f"-{i}" if len(by_group) > 1 else ""
        heading = f"{data}, recipe {recipe}" if recipe else data
        parts.append(f"<h2>Accuracy after training: {escape(heading)}</h2>")
        cells = aggregate(rows)
        if not cells:
            parts.append("<p>No pruned network has a result yet.</p>")
            continue
        parts += [html_table(rows, cells), html_differences(rows, cells)]
        parts.append(
            figure(
                f"accuracy-sparsity{suffix}",
                lambda rows=rows: plot_accuracy(rows, look),  # type: ignore[misc]
                "Mean over seeds, bars of one sample standard deviation; the axis is logarithmic in the weights left. "
                "Lines whose bars overlap are not told apart by these seeds.",
            )
        )
        if any(cell.mask_cost.n for cell in cells.values()):
            parts.append(
                figure(
                    f"accuracy-cost{suffix}",
                    lambda rows=rows: plot_cost(rows, look),  # type: ignore[misc]
                    "Work spent on finding the mask, in units of one training, at up to the three highest sparsities. "
                    "The grey line is the best accuracy at that cost or less: a method earns its cost only by "
                    "raising this line by more than its bar.",
                )
            )
        densities = found.densities.get((data, recipe))
        if densities:
            parts.append(
                figure(
                    f"layer-density{suffix}",
                    lambda densities=densities: plot_layers(densities, look),  # type: ignore[misc]
                    "Share of each layer's weights kept, mean over seeds, from input to output. A cross in the grey "
                    "band is a layer with no weight left for at least one seed: nothing passes through it.",
                )
            )
    return parts


def html_table(rows: Sequence[Result], cells: Mapping[CellKey, Cell]) -> str:
    """Models × criteria down, sparsities across: accuracy, and under it seeds, effective sparsity and dead layers."""
    sparsities = sorted({key[2] for key in cells})
    best = best_of_column(cells)
    head = "".join(f"<th>{100 * s:.6g} %</th>" for s in sparsities)
    lines = [f"<tr><th>criterion</th>{head}<th>mask cost</th></tr>"]
    for model in unique(key[0] for key in cells):
        dense = dense_accuracy(rows, model)
        note = f'<span class="small">dense {in_percent(dense)} % (n = {dense.n})</span>' if dense.n else ""
        lines.append(f'<tr class="model"><td colspan="{len(sparsities) + 2}">{escape(model)} {note}</td></tr>')
        for criterion in unique(key[1] for key in cells if key[0] == model):
            tds = [
                html_cell(cells.get((model, criterion, s)), criterion in best.get((model, s), ())) for s in sparsities
            ]
            cost = cost_text([c.mask_cost.mean for k, c in cells.items() if k[:2] == (model, criterion)])
            lines.append(f"<tr><td>{escape(criterion)}</td>{''.join(tds)}<td>{cost}</td></tr>")
    caption = (
        "Test accuracy (%) of the last epoch, mean ± sample standard deviation over n seeds. Bold: highest mean of its "
        "column, whether or not the difference is more than noise. “eff.”: effective sparsity (%), which counts "
        "weights that no path reaches as pruned. “dead”: layers that pass nothing on, mean over seeds. Mask cost: "
        "work to find the mask, in trainings."
    )
    return f'<div class="wide"><table><caption>{caption}</caption>{"".join(lines)}</table></div>'


def html_cell(cell: Cell | None, best: bool) -> str:
    if cell is None:
        return "<td></td>"
    value = in_percent(cell.accuracy)
    notes = [f"n = {cell.accuracy.n}"]
    if cell.effective_sparsity.n:
        notes.append(f"eff. {sparsity_text(cell.effective_sparsity.mean)}")
    small = f'<span class="small">{" · ".join(notes)}</span>'
    if cell.dead_layers.n and cell.dead_layers.mean > 0:
        small += f'<span class="small dead">{cell.dead_layers.mean:.2g} dead</span>'
    return f"<td>{f'<b>{value}</b>' if best else value}{small}</td>"


def html_differences(rows: Sequence[Result], cells: Mapping[CellKey, Cell]) -> str:
    """Each criterion less the best of its column, seed by seed: what the bold type of the table is worth."""
    sparsities = sorted({key[2] for key in cells})
    best = best_of_column(cells)
    lines = ["<tr><th>criterion</th>" + "".join(f"<th>{100 * s:.6g} %</th>" for s in sparsities) + "</tr>"]
    for model in unique(key[0] for key in cells):
        lines.append(f'<tr class="model"><td colspan="{len(sparsities) + 1}">{escape(model)}</td></tr>')
        for criterion in unique(key[1] for key in cells if key[0] == model):
            tds = []
            for s in sparsities:
                rivals = best.get((model, s), set())
                text = ""
                if criterion in rivals:
                    text = "<b>best</b>"
                elif (model, criterion, s) in cells:
                    difference = paired_difference(rows, model, s, criterion, min(rivals))
                    text = f'{in_percent(difference, signed=True)}<span class="small">n = {difference.n}</span>'
                tds.append(f"<td>{text}</td>")
            lines.append(f"<tr><td>{escape(criterion)}</td>{''.join(tds)}</tr>")
    caption = (
        "Accuracy less that of the best of the column, in points: mean ± standard deviation over the n seeds shared."
    )
    return (
        f"<details><summary>Differences from the best, paired by seed</summary>"
        f'<div class="wide"><table><caption>{caption}</caption>{"".join(lines)}</table></div></details>'
    )


def record_sections(found: Found, figure: Figure) -> list[str]:
    """Survival against magnitude, and the rounds' accuracy."""
    if not found.records:
        return []
    parts = ["<h2>Iterative pruning: what survives</h2>"]
    parts.append(
        figure(
            "survival-magnitude",
            lambda: plot_survival(found.records),
            f"Weights in {BINS} equally full bins by initial magnitude, mean over runs. The steeper the line, the "
            "more of survival is plain magnitude, which a scorer must go beyond; a flat line: magnitude says nothing.",
        )
    )
    if any(len(r.density) for r in found.records):
        parts.append(
            figure(
                "irp-rounds",
                lambda: plot_rounds(found.records),
                "One line per run, one point per training. Where a line falls below its left end, the ticket is "
                "worth less than the dense network, and so is its lesson for a scorer.",
            )
        )
    return parts


def scorer_name(path: str, card: Mapping[str, Any]) -> str:
    """The name on a scorer's card, else the folder it lies in."""
    return str(card.get("name") or path.rpartition("/")[0] or path)


def scorer_sections(found: Found, figure: Figure) -> list[str]:
    """The cards of fitted scorers."""
    if not found.scorers:
        return []
    columns = {
        "loss": "loss",
        "AUC": "auc",
        "AUC of |θ₀|": "auc_magnitude",
        "within layers": "auc_within_layers",
        "|θ₀| within layers": "auc_magnitude_within_layers",
        "within |θ₀| bins": "auc_within_magnitude_bins",
    }
    head = "".join(f"<th>{name}</th>" for name in ("scorer", "head", "features", "records", "weights", *columns))
    lines, features = [f"<tr>{head}</tr>"], []
    for path, card in found.scorers:
        measured = card.get("validation")
        measured = measured if isinstance(measured, Mapping) else {}
        values = [number(measured.get(key)) for key in columns.values()]
        known = listed(card.get("features"))
        cells = [
            escape(str(card.get("head", "–"))),
            str(len(known)) if known else "–",
            str(len(listed(card.get("records"))) or "–"),
            f"{number(card.get('weights')):,.0f}" if math.isfinite(number(card.get("weights"))) else "–",
            *(f"{v:.3f}" if math.isfinite(v) else "–" for v in values),
        ]
        name = escape(scorer_name(path, card))
        lines.append(f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        if known:
            features.append(f"<li>{name}: {escape(', '.join(map(str, known)))}</li>")
    parts = [
        "<h2>Fitted scorers</h2>",
        "<p>AUC is not worth: it says how well a scorer foretells survival on the validation records, most of which is "
        "initial magnitude; the accuracy after training decides.</p>",
        f'<div class="wide"><table class="cards">{"".join(lines)}</table></div>',
    ]
    if features:
        parts.append(f"<details><summary>Features</summary><ul>{''.join(features)}</ul></details>")
    if any(loss_history(card) for _, card in found.scorers):
        guide = "A validation loss that rises while the training loss falls is overfitting to the networks recorded."
        parts.append(figure("scorer-loss", lambda: plot_fitting(found.scorers), guide))
    return parts


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def notes_section(found: Found) -> str:
    """Everything that a reader must know to trust the rest."""
    notes = [*floor_notes(found.results), *failure_notes(found.results), *mask_notes(found.results)]
    notes += dead_notes(found) + [
        f"Unfinished record: {r.name}, {plural(len(r.density), 'training')} done; its survival is of these rounds only."
        for r in found.records
        if not r.complete
    ]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes + found.notes) or "<li>Nothing unusual.</li>"
    return f"<h2>Notes</h2><ul>{items}</ul>"


def floor_notes(rows: Sequence[Result]) -> list[str]:
    floors: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.floor and row.criterion not in floors[row.floor]:
            floors[row.floor].append(row.criterion)
    return [f"Floor per layer {floor}: {', '.join(criteria)}." for floor, criteria in floors.items()]


def failure_notes(rows: Sequence[Result]) -> list[str]:
    """The failed cells, those of one criterion and error in one line."""
    failed: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for r in rows:
        if not r.ok:
            failed[r.data, r.model, r.criterion, r.error].append(f"{100 * r.sparsity:.6g} % seed {r.seed}")
    return [
        f"Failed: {model}, {criterion}, on {data} ({', '.join(cells)}): {error}"
        for (data, model, criterion, error), cells in failed.items()
    ]


def mask_notes(rows: Sequence[Result]) -> list[str]:
    """Criteria whose masks missed the sparsity asked for, or were cut among ties."""
    notes = []
    for model, criterion in unique((r.model, r.criterion) for r in rows if r.ok):
        own = [r for r in rows if r.ok and (r.model, r.criterion) == (model, criterion) and criterion != DENSE]
        off = [r for r in own if abs(r.sparsity_got - r.sparsity) > max(0.001, 0.02 * (1 - r.sparsity))]
        if off:
            r = max(off, key=lambda r: abs(r.sparsity_got - r.sparsity))
            notes.append(
                f"Sparsity missed: {model}, {criterion} reached {sparsity_text(r.sparsity_got)} % where "
                f"{100 * r.sparsity:.6g} % was asked for ({plural(len(off), 'run')})."
            )
        ties = max((r.ties for r in own if math.isfinite(r.ties)), default=0.0)
        if ties > 0.01:
            notes.append(
                f"Ties at the cut: {model}, {criterion}, up to {ties:.3g}; the order among equals is arbitrary."
            )
    return notes


def dead_notes(found: Found) -> list[str]:
    """Layers without a weight, by name where the cells tell it, else by number."""
    notes, named = [], set()
    for (data, recipe), cells in found.densities.items():
        for (model, criterion, sparsity), seeds in cells.items():
            dead = unique(name for layers in seeds for name, density in layers.items() if density == 0)
            if dead:
                named.add((data, recipe, model, criterion, sparsity))
                hit = sum(0 in layers.values() for layers in seeds)
                names = ", ".join(dead[:6]) + (f" and {len(dead) - 6} more" if len(dead) > 6 else "")
                share = f"{hit} of {plural(len(seeds), 'seed')}"
                notes.append(f"Dead layers: {model}, {criterion}, {100 * sparsity:.6g} % ({share}): {names}.")
    counts = defaultdict(list)
    for row in found.results:
        key = (row.data, row.recipe, row.model, row.criterion, row.sparsity)
        if row.dead_layers > 0 and key not in named:
            counts[key].append(row.dead_layers)
    return notes + [
        f"Dead layers: {model}, {criterion}, {100 * sparsity:.6g} % ({plural(len(dead), 'seed')}): up to {max(dead):g}."
        for (_, _, model, criterion, sparsity), dead in counts.items()
    ]
