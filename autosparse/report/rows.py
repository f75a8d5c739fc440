"""Benchmark results as pandas tables: reading, seeds together, paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from pandas import DataFrame

from autosparse.errors import AutoSparseError
from autosparse.report.text import Stat, Table, in_percent, number_text, range_text, sparsity_text, stat, unique

REQUIRED = ("model", "data", "criterion", "sparsity", "seed", "accuracy")
TEXTS = ("model", "data", "criterion", "recipe", "floor", "continues", "error")
NUMBERS = (
    *("sparsity", "seed", "accuracy", "sparsity_got", "effective_sparsity", "dense_accuracy"),
    *("mask_epochs", "mask_cost", "train_epochs", "total_cost", "total_seconds", "total_images", "dead_layers", "ties"),
)
CELL = ["model", "criterion", "sparsity"]  # what its seeds have in common, within one data set and recipe
RUN = ["data", "recipe", *CELL, "floor", "seed"]
DENSE = "dense"


def read_results(path: Path) -> tuple[DataFrame, list[str]]:
    """The rows of one results.csv, and a line about each that makes no sense.

    Raises:
        AutoSparseError: a column is missing.
    """
    raw = pd.read_csv(path, dtype=str, keep_default_na=False)
    for name in REQUIRED:
        if name not in raw.columns:
            raise AutoSparseError(f"no benchmark table: column {name!r} is missing")
    return clean(raw)


def clean(raw: DataFrame) -> tuple[DataFrame, list[str]]:
    """Texts and numbers where they belong, a number that is missing as NaN; and a line about each row left out.

    A run failed if it has an error or no accuracy. Accuracies and sparsities lie in [0, 1]; costs are in trainings.
    """
    rows = DataFrame(
        {name: raw.get(name, pd.Series("", raw.index)).fillna("").astype(str).str.strip() for name in TEXTS}
    )
    for name in NUMBERS:
        rows[name] = pd.to_numeric(raw.get(name, pd.Series(math.nan, raw.index)), errors="coerce")
    valid = (
        rows.sparsity.between(0, 1, inclusive="left") & rows.seed.notna() & ~(rows.accuracy < 0) & ~(rows.accuracy > 1)
    )
    notes = [
        f"line {index + 2} ignored: sparsity, seed or accuracy is out of range or no number"
        for index in rows.index[~valid]
    ]
    rows = rows[valid].copy()
    rows["sparsity"], rows["seed"] = rows.sparsity.round(8), rows.seed.astype(int)
    rows["mask_cost"] = rows.mask_cost.fillna(rows.mask_epochs / rows.train_epochs.where(rows.train_epochs > 0))
    rows["total_cost"] = rows.total_cost.fillna(rows.mask_cost + 1)
    rows.loc[(rows.error == "") & rows.accuracy.isna(), "error"] = "no accuracy"
    return rows, notes


def without_repeats(rows: DataFrame) -> DataFrame:
    """Each cell and seed once: the last row that did not fail wins."""
    order = rows.assign(failed=rows.error != "").sort_values("failed", ascending=False, kind="stable")
    return order.drop_duplicates(RUN, keep="last").sort_index().drop(columns="failed")


def name_floors(rows: DataFrame) -> DataFrame:
    """A criterion run with several floors becomes several criteria, so that they are not averaged."""
    several = rows.groupby(["data", "recipe", "criterion"]).floor.transform("nunique") > 1
    named = rows.criterion + " (floor " + rows.floor.replace("", "none") + ")"
    return rows.assign(criterion=rows.criterion.where(~several, named))


def groups(rows: DataFrame) -> list[tuple[tuple[str, str], DataFrame]]:
    """The rows by (data, recipe): only within one of these may they be compared."""
    return list(rows.groupby(["data", "recipe"], sort=False))


def heading(key: tuple[str, str]) -> str:
    """What a (data, recipe) is called."""
    return f"{key[0]}, recipe {key[1]}" if key[1] else key[0]


def summarise(rows: DataFrame) -> DataFrame:
    """The seeds of each (model, criterion, sparsity) together, without failed runs and dense networks.

    Columns: `accuracy`, a `Stat`; `mean` and `std` of it; means of `effective_sparsity`, `dead_layers`, `mask_cost` and
    `total_cost`; `continues`; `best`, whether no mean accuracy of that model and sparsity is higher.

    Raises:
        AutoSparseError: rows of several recipes or data sets.
    """
    if len(groups(rows)) > 1:
        raise AutoSparseError(f"rows of {len(groups(rows))} (data, recipe) pairs: use groups() first")
    done = rows[(rows.error == "") & (rows.criterion != DENSE)]
    by_cell = done.groupby(CELL, sort=False)
    cells = by_cell[["effective_sparsity", "dead_layers", "mask_cost", "total_cost"]].mean()
    cells["accuracy"] = [stat(own.accuracy) for _, own in by_cell]
    cells["mean"] = [value.mean for value in cells.accuracy]
    cells["std"] = [value.std for value in cells.accuracy]
    cells["continues"] = by_cell.continues.first() != ""
    cells["best"] = cells["mean"] == cells.groupby(["model", "sparsity"])["mean"].transform("max")
    return cells


def dense_accuracy(rows: DataFrame, model: str) -> Stat:
    """Accuracy of the dense network over seeds: from its own rows, else from the column that the others carry."""
    own = rows[rows.model == model]
    dense = own[(own.criterion == DENSE) & (own.error == "")]
    if not dense.empty:
        return stat(dense.drop_duplicates("seed", keep="last").accuracy)
    return stat(own.dropna(subset="dense_accuracy").drop_duplicates("seed", keep="last").dense_accuracy)


def paired_differences(rows: DataFrame, model: str, sparsity: float, criterion: str, rival: str) -> list[float]:
    """Accuracy of `criterion` less that of `rival`, seed by seed, over the seeds that both have."""
    own = rows[(rows.error == "") & (rows.model == model) & (rows.sparsity == sparsity)]
    table = own[own.criterion.isin([criterion, rival])].pivot_table("accuracy", "seed", "criterion", "last")
    return [] if table.shape[1] < 2 else list((table[criterion] - table[rival]).dropna())


def paired_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test.

    `None` where there is no test: n < 2, or all differences equal (results.csv has six digits) and not zero, which
    leaves no spread to measure them by. 1 where all are zero.
    """
    mean, std, n = stat(differences)
    if n < 2:
        return None
    if std < 5e-6:
        return 1.0 if abs(mean) < 5e-6 else None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp([d for d in differences if math.isfinite(d)], 0).pvalue)


def table(rows: DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of strings: models × criteria down, sparsities across; rows of one (data, recipe)."""
    cells = summarise(rows)
    sparsities = sorted(unique(cells.index.get_level_values("sparsity")))
    headers = ["model", "criterion", *(f"{100 * s:.6g} %" for s in sparsities)]
    headers += ["effective %", "mask cost", "total", "seeds", "dead layers"]
    lines = []
    for model in unique(rows.model):
        dense = dense_accuracy(rows, model)
        if dense.n:
            lines.append([model, DENSE, *[in_percent(dense)] * len(sparsities), "0", "0", "1", str(dense.n), "0"])
        for criterion in unique(c for m, c, _ in cells.index if m == model):
            own = of_criterion(cells, model, criterion)
            seeds = [value.n for value in own.accuracy]
            lines.append(
                [
                    model,
                    criterion,
                    *(in_percent(own.accuracy[s]) if s in own.index else "" for s in sparsities),
                    " / ".join(sparsity_text(own.effective_sparsity.get(s, math.nan)) for s in sparsities),
                    cost_text(own),
                    range_text(list(own.total_cost)),
                    range_text(seeds),
                    number_text(own.dead_layers.max()),
                ]
            )
    return headers, lines


def of_criterion(cells: DataFrame, model: str, criterion: str) -> DataFrame:
    """The rows of `summarise` of one criterion, by sparsity."""
    own = cells.reset_index()
    return own[(own.model == model) & (own.criterion == criterion)].set_index("sparsity")


def cost_text(cells: DataFrame) -> str:
    """The mask cost of a criterion over its sparsities, in trainings; none of its own where it is part of the training."""
    return "–" if cells.continues.all() and not cells.mask_cost.any() else range_text(list(cells.mask_cost))


def summary(results: DataFrame) -> list[Table]:
    """The final tables for a terminal, one per (data, recipe)."""
    return [Table(heading(key), *table(rows)) for key, rows in groups(results)]


def best_rival(cells: DataFrame, model: str, sparsity: float) -> Iterable[str]:
    """The criteria of highest mean accuracy; several when they tie."""
    best = cells[cells.best]
    return [c for m, c, s in best.index if (m, s) == (model, sparsity)]
