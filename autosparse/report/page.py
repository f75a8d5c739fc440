"""One HTML page, with its figures, of what lies in a directory: benchmark tables, IRP records, scorer cards.

What is read is plain text, JSON and HDF5, so that a report needs neither torch nor the code that wrote the results.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pandas import DataFrame

from autosparse.files import replace_file
from autosparse.report import figures
from autosparse.report.checks import CHECKS, LEVEL, Checked, caution, checked, conclusion, split, verdicts
from autosparse.report.collect import BINS, Results, collect, scorer_name
from autosparse.report.notes import notes
from autosparse.report.rows import (
    DENSE,
    best_rival,
    cost_text,
    dense_accuracy,
    groups,
    heading,
    of_criterion,
    paired_differences,
    summarise,
)
from autosparse.report.text import (
    Stat,
    Table,
    in_percent,
    number_text,
    p_text,
    plural,
    range_text,
    sparsity_text,
    stat,
    unique,
)
from autosparse.scorers.card import OWN, PARTS


class Cell(NamedTuple):
    """A field of a table: its text, small print under it, and a warning under that."""

    text: str
    bold: bool = False
    small: str = ""
    warning: str = ""


class Figure(NamedTuple):
    """A figure, its guide, and the criteria that it had no room for."""

    svg: str
    guide: str
    left_out: Sequence[str] = ()


class Group(NamedTuple):
    """Rows of a table under a title of their own; each row is a name, its fields, and a remark."""

    title: str
    note: str
    rows: list[tuple[str, list[Cell], str]]


def build(directory: Path) -> Path:
    """Write DIRECTORY/report.html and DIRECTORY/figures/*.svg from what lies under `directory`.

    Raises:
        AutoSparseError: there is nothing to report.
        AutoSparseFailure: the files cannot be written.
    """
    import jinja2

    directory = Path(directory)
    results = collect(directory)
    drawn: dict[str, str] = {}

    def figure(name: str, draw: Callable[[], Any], guide: str, left_out: Sequence[str] = ()) -> Figure:
        drawn[name] = figures.svg(draw, name)
        return Figure(drawn[name], guide, left_out)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autosparse.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        name=directory.resolve().name,
        about=about(results),
        benchmarks=benchmarks(results, figure),
        diagnoses=diagnoses(results, figure),
        smaller=smaller(results, figure),
        records=records(results, figure),
        scorers=scorers(results, figure),
        notes=notes(results),
        free=figures.FREE,
        bins=BINS,
        level=LEVEL,
    )
    target = directory / "report.html"
    files = {directory / "figures" / f"{name}.svg": text for name, text in drawn.items()}
    for path, text in {**files, target: page}.items():
        with replace_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return target


def about(results: Results) -> str:
    """What was read, from when it is, and with which versions."""
    counts = {
        "benchmark run": len(results.rows),
        "IRP record": len(results.records),
        "fitted scorer": len(results.scorers),
        "diagnosed network": sum(len(states) for _, states in results.diagnoses),
        "smaller network": int((results.smaller.method != DENSE).sum()) if len(results.smaller) else 0,
    }
    when = datetime.fromtimestamp(results.newest, UTC).strftime("newest of %Y-%m-%d %H:%M UTC")
    torch = ", ".join(sorted({r.torch for r in results.records if r.torch})) or version("torch")
    what = ", ".join(plural(n, noun) for noun, n in counts.items() if n)
    return f"{what}; {when}. autosparse {version('autosparse')}, torch {torch}."


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def benchmarks(results: Results, figure: Callable[..., Figure]) -> list[dict[str, Any]]:
    """The tables and figures of each (data, recipe)."""
    look = figures.looks(c for c in results.rows.criterion if c != DENSE)
    by_group = groups(results.rows)
    sections = []
    for number, (key, rows) in enumerate(by_group, 1):
        suffix = f"-{number}" if len(by_group) > 1 else ""
        section: dict[str, Any] = {"heading": heading(key), "figures": []}
        sections.append(section)
        cells = summarise(rows)
        if cells.empty:
            continue
        tests = checked(rows)
        section["sparsities"] = [f"{100 * s:.6g} %" for s in sorted(unique(cells.index.get_level_values("sparsity")))]
        section["table"], section["differences"] = accuracy_table(rows, cells), difference_table(rows, cells)
        section["checks"] = check_table(tests)
        section["rivals"] = [CHECKS[check].rival for check in checks_in(tests)]
        section["verdicts"], section["caution"] = verdicts(tests), caution(tests)
        names = unique(cells.index.get_level_values("criterion"))
        add, shown = section["figures"].append, figures.selected(cells, figures.MOST)
        add(
            figure(
                f"accuracy-sparsity{suffix}",
                lambda rows=rows: figures.plot_accuracy(rows, look),
                "accuracy",
                [name for name in names if name not in shown],
            )
        )
        for cost in ("mask_cost", "total_cost"):
            usable = cells[~cells.continues] if cost == "mask_cost" else cells
            if usable[cost].notna().any():
                draw = lambda rows=rows, cost=cost: figures.plot_cost(rows, look, cost)  # noqa: E731
                add(figure(f"accuracy-{cost.replace('_', '-')}{suffix}", draw, cost))
        layers = results.layers[(results.layers.data == key[0]) & (results.layers.recipe == key[1])]
        if len(layers):
            own = cells[[c in set(layers.criterion) for c in cells.index.get_level_values("criterion")]]
            plain = own[[split(c)[0] is None for c in own.index.get_level_values("criterion")]]
            own = plain if len(plain) else own
            shown = figures.selected(own, len(figures.COLOURS))
            part = layers[layers.criterion.isin(shown)]
            add(
                figure(
                    f"layer-density{suffix}",
                    lambda part=part: figures.plot_layers(part, look),
                    "layers",
                    [name for name in unique(own.index.get_level_values("criterion")) if name not in shown],
                )
            )
    return sections


def accuracy_table(rows: DataFrame, cells: DataFrame) -> list[Group]:
    """Models × criteria down, sparsities across: accuracy, and under it seeds, effective sparsity and dead layers."""

    def field(cell: Any) -> Cell:
        return small_print(cell, in_percent(cell.accuracy), f"n = {cell.accuracy.n}", bold=bool(cell.best))

    result = by_model(cells, field)
    for group in result:
        for name, fields, _ in group.rows:
            own = of_criterion(cells, group.title, name)
            fields += [Cell(cost_text(own)), Cell(range_text(list(own.total_cost)))]
    return [group._replace(note=dense_note(dense_accuracy(rows, group.title))) for group in result]


def dense_note(dense: Stat) -> str:
    return f"dense {in_percent(dense)} % (n = {dense.n})" if dense.n else ""


def difference_table(rows: DataFrame, cells: DataFrame) -> list[Group]:
    """Each criterion less the best of its column, seed by seed: what the bold type of the table is worth."""

    def field(cell: Any) -> Cell:
        model, criterion, sparsity = cell.Index
        if cell.best:
            return Cell("best", bold=True)
        difference = stat(paired_differences(rows, model, sparsity, criterion, min(best_rival(cells, model, sparsity))))
        return small_print(cell, in_percent(difference, signed=True), f"n = {difference.n}")

    return by_model(cells, field)


def by_model(cells: DataFrame, field: Callable[[Any], Cell]) -> list[Group]:
    """A group for each model, in it a row for each criterion with a field for each sparsity."""
    sparsities = sorted(unique(cells.index.get_level_values("sparsity")))
    fields = {cell.Index: field(cell) for cell in cells.itertuples()}
    result = []
    for model in unique(cells.index.get_level_values("model")):
        names = unique(c for m, c, _ in cells.index if m == model)
        lines = [(name, [fields.get((model, name, s), Cell("")) for s in sparsities], "") for name in names]
        result.append(Group(model, "", lines))
    return result


def small_print(cell: Any, text: str, *small: str, bold: bool = False) -> Cell:
    """A field with the effective sparsity of the masks under it, and their dead layers."""
    if math.isfinite(cell.effective_sparsity):
        small = (*small, f"eff. {sparsity_text(cell.effective_sparsity)}")
    dead = f"{cell.dead_layers:.2g} dead" if cell.dead_layers > 0 else ""
    return Cell(text, bold, " · ".join(small), dead)


def checks_in(tests: Sequence[Checked]) -> list[str]:
    return [check for check in CHECKS if any(check in row.tests for row in tests)]


def check_table(tests: Sequence[Checked]) -> list[Group]:
    """Every criterion with variants beside it, less each of them, with the paired tests and what they say."""
    checks, result = checks_in(tests), []
    for model, sparsity in unique((row.model, row.sparsity) for row in tests):
        lines = []
        for row in (row for row in tests if (row.model, row.sparsity) == (model, sparsity)):
            fields = [small_print(row.cell, in_percent(row.cell.accuracy))]
            for check in checks:
                test = row.tests.get(check)
                if test is None:
                    fields.append(Cell(""))
                    continue
                small, clear = f"{p_text(test.p)} · n = {test.difference.n}", test.p is not None and test.p < LEVEL
                fields.append(small_print(test.cell, in_percent(test.difference, signed=True), small, bold=clear))
            said = "; ".join(unique(conclusion(check, test) for check, test in row.tests.items()))
            lines.append((row.criterion, fields, said))
        result.append(Group(f"{model}, {100 * sparsity:.6g} % sparse", "", lines))
    return result


def diagnosis_table(states: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
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


def diagnoses(results: Results, figure: Callable[..., Figure]) -> list[dict[str, Any]]:
    """A table and a figure for each directory of `autosparse diagnose`."""
    sections = []
    for number, (name, states) in enumerate(results.diagnoses, 1):
        suffix = f"-{number}" if len(results.diagnoses) > 1 else ""
        headers, lines = diagnosis_table(states)
        drawn = figure(f"diagnosis{suffix}", lambda states=states: figures.plot_diagnosis(states), "diagnosis")
        folder = name.rpartition("/")[0]
        sections.append({"folder": folder, "table": Table("", headers, lines), "figure": drawn})
    return sections


def smaller(results: Results, figure: Callable[..., Figure]) -> dict[str, Any]:
    """What `autosparse shrink` measured: accuracy at each stage, and what is left of the network."""
    if results.smaller.empty or not (results.smaller.method != DENSE).any():
        return {}
    done = results.smaller[results.smaller.error.isna() & (results.smaller.method != DENSE)]
    stages = {
        "dense": "dense_accuracy",
        "after the ramp": "ramp_accuracy",
        "after removal": "removed_accuracy",
        "fine-tuned": "accuracy",
    }
    lines = []
    for (model, data, ratio, method), own in done.groupby(["model", "data", "ratio", "method"], sort=False):
        accuracies = [in_percent(stat(own[column])) for column in stages.values()]
        left = [f"{100 * (own[k] / own[f'{k}_before']).mean():.1f} %" for k in ("parameters", "macs")]
        seconds = f"{own.total_seconds.mean():.0f}"
        lines.append([f"{model}, {data}", ratio, method, *accuracies, *left, seconds, str(len(own))])
    headers = [
        "network",
        "ratio",
        "method",
        *stages,
        "parameters left",
        "multiply-adds left",
        "seconds in all",
        "seeds",
    ]
    look = figures.looks(done.method)
    drawn = figure("accuracy-size", lambda: figures.plot_smaller(done, look), "size") if lines else None
    return {"table": Table("", headers, lines), "figure": drawn}


def records(results: Results, figure: Callable[..., Figure]) -> list[Figure]:
    """Survival against magnitude, and the rounds' accuracy."""
    if not results.records:
        return []
    drawn = [figure("survival-magnitude", lambda: figures.plot_survival(results.records), "survival")]
    if any(len(r.density) for r in results.records):
        drawn.append(figure("irp-rounds", lambda: figures.plot_rounds(results.records), "rounds"))
    return drawn


def scorers(results: Results, figure: Callable[..., Figure]) -> dict[str, Any]:
    """The cards of fitted scorers."""
    if not results.scorers:
        return {}
    columns = {
        "AUC": (OWN, "auc"),
        "AUC of |θ₀|": ("magnitude", "auc"),
        "within layers": (OWN, "auc_within_layers"),
        "|θ₀| within layers": ("magnitude", "auc_within_layers"),
        "within |θ₀| bins": (OWN, "auc_within_magnitude_bins"),
        "overlap": (OWN, "overlap"),
        "overlap of |θ₀|": ("magnitude", "overlap"),
    }
    headers = ["scorer", "head", "features", "records to fit, validate, test", "weights", *columns]
    lines, features = [], []
    for path, card in results.scorers:
        values = [card.test.get(whose, {}).get(key, math.nan) for whose, key in columns.values()]
        parts = " + ".join(str(len(card.part(name))) for name in PARTS) if card.records else "–"
        known = [card.head or "–", str(len(card.features) or "–"), parts, f"{card.weights:,}" if card.weights else "–"]
        lines.append([scorer_name(path, card), *known, *(number_text(v, ".3f") for v in values)])
        if card.features:
            features.append(f"{scorer_name(path, card)}: {', '.join(card.features)}")
    fitted = any(card.history for _, card in results.scorers)
    drawn = figure("scorer-loss", lambda: figures.plot_fitting(results.scorers), "fitting") if fitted else None
    return {"table": Table("", headers, lines), "features": features, "figure": drawn}
