"""Sanity checks: each criterion beside its own shuffle, its mask under new weights, and its scores upside down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from autosparse.report.text import Stat, Table, in_percent, number_text, p_text, plural, sparsity_text, stat, unique

if TYPE_CHECKING:
    from pandas import DataFrame

LEVEL = 0.05  # of the tests


class Check(NamedTuple):
    """What a criterion is set against, and what to say when it is better, not told apart, or worse."""

    rival: str
    better: str
    unclear: str
    worse: str


CHECKS = {
    "densities": Check("its shuffle", "positions matter", "no sign that positions matter", "worse than its shuffle"),
    "reinit": Check(
        "new weights",
        "the mask needs its own weights",
        "no sign that the mask needs its own weights",
        "worse than with new weights",
    ),
    "inverted": Check(
        "its lowest scores",
        "the order of scores matters",
        "no sign that the order of scores matters",
        "worse than its lowest scores",
    ),
}


class Comparison(NamedTuple):
    """Accuracy of a criterion less that of its check over the seeds that both have, and p of the paired t-test."""

    difference: Stat
    p: float | None
    cell: Any  # of the check, a row of `rows.summarise`


@dataclass(frozen=True)
class Checked:
    """One criterion of one model at one sparsity, with the tests of the checks that have results."""

    model: str
    criterion: str
    sparsity: float
    cell: Any
    tests: Mapping[str, Comparison]


def split(name: str) -> tuple[str | None, str]:
    """The variant and the criterion in a name: `("densities", "snip")` of `"densities:snip"`."""
    first, sign, rest = name.partition(":")
    return (first, rest) if sign and first in CHECKS else (None, name)


def checked(rows: DataFrame) -> list[Checked]:
    """Every criterion with at least one of its variants beside it; rows of one (data, recipe).

    Without those that continue with trained weights: their variants, trained from the initialization, are no fair rivals.
    """
    from autosparse.report.rows import paired_differences, paired_test, summarise

    cells = {cell.Index: cell for cell in summarise(rows).itertuples()}
    result = []
    for (model, criterion, sparsity), cell in cells.items():
        tests = {}
        for check in CHECKS:
            rival = f"{check}:{criterion}"
            if (model, rival, sparsity) in cells and not cell.continues:
                differences = paired_differences(rows, model, sparsity, criterion, rival)
                tests[check] = Comparison(stat(differences), paired_test(differences), cells[model, rival, sparsity])
        if tests:
            result.append(Checked(model, criterion, sparsity, cell, tests))
    models = unique(key[0] for key in cells)
    return sorted(result, key=lambda c: (models.index(c.model), c.sparsity))


def conclusion(check: str, test: Comparison) -> str:
    """What a test says, in few words."""
    n, p = test.difference.n, test.p
    if n < 2:
        return "one seed: cannot tell" if n else "no shared seed: cannot tell"
    if p is None:
        return f"all {n} differences equal: cannot tell"
    if p >= LEVEL:
        return CHECKS[check].unclear
    return CHECKS[check].better if test.difference.mean > 0 else CHECKS[check].worse


def verdict(check: str, test: Comparison) -> str:
    """The conclusion with its figures: "positions matter (+3.1 ± 0.4 over its shuffle, p = 0.010, n = 3)"."""
    text, n = conclusion(check, test), test.difference.n
    difference, p = in_percent(test.difference, signed=True), p_text(test.p)
    if n < 2:
        return text
    if text == CHECKS[check].unclear:
        return f"{text}: {n} seeds do not separate it from {CHECKS[check].rival} ({difference}, {p})"
    over = f" over {CHECKS[check].rival}" if text == CHECKS[check].better else ""
    return f"{text} ({difference}{over}, {p}, n = {n})"


def verdicts(rows: Iterable[Checked]) -> list[str]:
    """One line for each criterion: over models and sparsities, how often each conclusion came out."""
    by_criterion: dict[str, list[Checked]] = {}
    for row in rows:
        by_criterion.setdefault(row.criterion, []).append(row)
    lines = []
    for criterion, own in by_criterion.items():
        parts: list[str] = []
        for check in CHECKS:
            tests = [row.tests[check] for row in own if check in row.tests]
            texts = [conclusion(check, test) for test in tests]
            if len(tests) == 1:
                parts.append(verdict(check, tests[0]) if not parts else texts[0])
            elif tests:
                counts = Counter(texts).most_common()
                parts.append(", ".join(f"{text} in {count} of {len(tests)}" for text, count in counts))
        lines.append(f"{criterion}: {'; '.join(unique(parts))}")
    return lines


def caution(rows: Iterable[Checked]) -> str:
    """What the number of tests does to their worth."""
    count = sum(test.p is not None for row in rows for test in row.tests.values())
    if not count:
        return "No test was possible: run at least two seeds."
    return f"{plural(count, 'test')}: even with no real difference, about {LEVEL * count:.1f} would have p < {LEVEL:g}."


def tables(results: DataFrame) -> list[tuple[Table, list[str]]]:
    """For a terminal: the table of each (data, recipe) with checks in it, and the verdicts."""
    from autosparse.report.rows import groups, heading

    result = []
    for key, group in groups(results):
        rows = checked(group)
        if not rows:
            continue
        checks = [check for check in CHECKS if any(check in row.tests for row in rows)]
        headers = ["model", "criterion", "sparsity", "accuracy", "effective %", "dead", "seeds"]
        lines = [
            [
                row.model,
                row.criterion,
                f"{100 * row.sparsity:.6g} %",
                in_percent(row.cell.accuracy),
                sparsity_text(row.cell.effective_sparsity),
                number_text(row.cell.dead_layers),
                "–".join(str(n) for n in sorted({test.difference.n for test in row.tests.values()})),
                *(_figures(row.tests.get(check)) for check in checks),
            ]
            for row in rows
        ]
        table = Table(heading(key), [*headers, *(f"over {CHECKS[check].rival}" for check in checks)], lines)
        result.append((table, [*verdicts(rows), caution(rows)]))
    return result


def _figures(test: Comparison | None) -> str:
    return "" if test is None else f"{in_percent(test.difference, signed=True)}, {p_text(test.p)}"
