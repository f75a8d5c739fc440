"""What lies in a directory of results: benchmark rows and their statistics, IRP records, scorer cards."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autosparse.errors import AutoSparseError, first_line
from autosparse.files import files_under, read_json
from autosparse.scorers.card import Card, read_card

REQUIRED = ("model", "data", "criterion", "sparsity", "seed", "accuracy")
BINS = 20
DENSE = "dense"
SKIPPED_FOLDERS = {"mlartifacts", "figures"}  # copies of results that MLflow keeps would count twice


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


def paired_differences(rows: Iterable[Result], model: str, sparsity: float, criterion: str, rival: str) -> list[float]:
    """Accuracy of `criterion` less that of `rival`, seed by seed, over the seeds that both have."""
    accuracy: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.ok and (row.model, row.sparsity) == (model, sparsity):
            accuracy[row.criterion][row.seed] = row.accuracy
    shared = sorted(accuracy[criterion].keys() & accuracy[rival].keys())
    return [accuracy[criterion][seed] - accuracy[rival][seed] for seed in shared]


def paired_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test, `t = mean / (std / √n)` with n − 1 degrees of freedom.

    `None` where there is no test: n < 2, or all differences equal (results.csv has six digits) and not zero, which
    leaves no spread to measure them by. 1 where all are zero.
    """
    mean, std, n = stat(differences)
    if n < 2:
        return None
    if std < 5e-6:
        return 1.0 if abs(mean) < 5e-6 else None
    from scipy.special import stdtr

    return float(2 * stdtr(n - 1, -abs(mean) * math.sqrt(n) / std))


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
    headers = ["model", "criterion", *(f"{100 * s:.6g} %" for s in sparsities)]
    headers += ["effective %", "mask cost", "seeds", "dead layers"]
    lines = []
    for model in unique(r.model for r in rows):
        dense = dense_accuracy(rows, model)
        if dense.n:
            lines.append([model, DENSE, *[in_percent(dense)] * len(sparsities), "0", "0", str(dense.n), "0"])
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
                    " / ".join(
                        sparsity_text(c.effective_sparsity.mean) if c and c.effective_sparsity.n else "–" for c in row
                    ),
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
    """One IRP record; AutoSparseError: it is missing, damaged or something else."""
    from autosparse.scorers.records import read_record

    record = read_record(path, ["weight"])
    known = np.isfinite(record.density) & np.isfinite(record.accuracy) & (record.density > 0)
    weight = record.signals["weight"]
    curves = survival_curves([(weight[name], survival) for name, survival in record.survival.items()])
    within, overall, ticket_within, ticket_overall = curves
    return Record(
        name=name,
        model=model_name(record.config) or Path(name).stem,
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


# ------------------------------------------------------------------------------------------------- collecting


@dataclass
class Found:
    """All that a directory holds."""

    results: list[Result] = field(default_factory=list)
    densities: dict[tuple[str, str], dict[CellKey, list[dict[str, float]]]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    scorers: list[tuple[str, Card]] = field(default_factory=list)
    diagnoses: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
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
    rows_at: dict[tuple[Path, tuple[str, str, int]], list[Result]] = defaultdict(list)

    def read_results(path: Path, name: str) -> None:
        loaded, notes = load_results(path)
        rows.extend(loaded)
        for row in loaded:
            rows_at[path.parent, (row.model, row.criterion, row.seed)].append(row)
        found.notes += [f"{name}: {note}" for note in notes]

    def read_cell(path: Path, name: str) -> None:
        cells.append((path, read_json(path, "result")))

    def read_record(path: Path, name: str) -> None:
        found.records.append(load_record(path, name))

    def read_scorer(path: Path, name: str) -> None:
        found.scorers.append((name, read_card(read_json(path, "scorer card"))))

    def read_diagnosis(path: Path, name: str) -> None:
        found.diagnoses.append((name, load_diagnosis(path)))

    for path in sorted(p for p in files_under(directory) if p.suffix in {".csv", ".json", ".h5"}):
        parts = path.relative_to(directory).parts
        reader = reader_of(path, read_results, read_cell, read_record, read_scorer, read_diagnosis)
        if reader is None or any(part in SKIPPED_FOLDERS or part.startswith(".") for part in parts):
            continue
        name = "/".join(parts)
        try:
            reader(path, name)
            found.newest = max(found.newest, path.stat().st_mtime)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, csv.Error) as error:
            found.notes.append(f"{name} ignored: {first_line(error)}")
    if not (rows or found.records or found.scorers or found.diagnoses):
        unreadable = f" ({len(found.notes)} files could not be read: {found.notes[0]})" if found.notes else ""
        raise AutoSparseError(
            f"nothing to report in {str(directory)!r}: looked for results.csv, IRP records (*.h5), scorer.json and "
            "diagnosis.json" + unreadable
        )
    floors = floors_by_criterion(rows)
    found.results = [with_floor_named(row, floors) for row in without_repeats(rows)]
    if len(found.results) < len(rows):
        found.notes.append(f"{len(rows) - len(found.results)} repeated rows: the last one that did not fail counts.")
    stale = 0
    for path, cell in cells:
        try:
            start = (cell["model"], cell["criterion"], int(cell["seed"]))
            match = row_of_cell(rows_at.get((path.parent.parent, start), ()), cell)
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


def reader_of(
    path: Path, results: Any, cell: Any, record: Any, scorer: Any, diagnosis: Any
) -> Callable[[Path, str], None] | None:
    """Which of the readers a file needs, by its name."""
    if path.name == "diagnosis.json":
        return diagnosis
    if path.name == "results.csv":
        return results
    if path.name == "scorer.json":
        return scorer
    if path.suffix == ".json" and path.parent.name == "cells":
        return cell
    return record if path.suffix == ".h5" else None


def load_diagnosis(path: Path) -> list[dict[str, Any]]:
    """The states of one diagnosis.json; KeyError or AutoSparseError: it lacks something."""
    states = read_json(path, "diagnosis")["states"]
    for state in states:
        _ = [state[key] for key in ("state", "criterion", "prepare", "network", "singular_values")]
        _ = [layer[key] for layer in state["layers"] for key in ("name", "kept", "lipschitz", "hessian_norm")]
    if not states:
        raise AutoSparseError("no states")
    return list(states)


def diagnosis_table(states: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of the network figures of a diagnosis, a line for each state."""
    columns = {
        "sparsity": lambda n: f"{100 * n['sparsity']:.2f} %",
        "dead layers": lambda n: f"{n['dead_layers']:.0f}",
        "loss": lambda n: f"{n['loss']:.3g}",
        "‖∇L‖": lambda n: f"{n['gradient_norm']:.3g}",
        "‖∇L‖/‖θ‖": lambda n: f"{n['relative_gradient']:.3g}",
        "Jacobian σ": lambda n: f"{n['jacobian_mean']:.3g} ± {n['jacobian_std']:.2g}",
        "min … max": lambda n: f"{n['jacobian_min']:.2g} … {n['jacobian_max']:.2g}",
        "largest Lipschitz": lambda n: f"{n['lipschitz_max']:.3g}",
        "largest Hessian": lambda n: f"{n['hessian_max']:.3g}",
        "Hessian spread": lambda n: f"{n['hessian_spread']:.3g}",
    }
    lines = [[str(s["state"]), *(text(s["network"]) for text in columns.values())] for s in states]
    return ["state", *columns], lines


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


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def scorer_name(path: str, card: Card) -> str:
    """The name on a scorer's card, else the folder it lies in."""
    return card.name or path.rpartition("/")[0] or path
