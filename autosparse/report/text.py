"""Numbers in words: what tables of a terminal and of the report show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Stat(NamedTuple):
    """Mean and sample standard deviation (ddof 1, NaN when n < 2) of n finite values."""

    mean: float
    std: float
    n: int


class Table(NamedTuple):
    """A table of strings for a terminal."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def stat(values: Iterable[float]) -> Stat:
    """Mean, sample standard deviation and count of the finite values."""
    finite = [float(v) for v in values if math.isfinite(v)]
    mean = statistics.fmean(finite) if finite else math.nan
    return Stat(mean, statistics.stdev(finite) if len(finite) > 1 else math.nan, len(finite))


def unique(values: Iterable[Any]) -> list[Any]:
    """The values in order of first appearance."""
    return list(dict.fromkeys(values))


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def in_percent(value: Stat, signed: bool = False) -> str:
    """ "61.7 ± 0.8" from fractions; "–" for what one seed cannot say."""
    if value.n == 0:
        return "–"
    std = f"{100 * value.std:.1f}" if value.n > 1 else "–"
    return f"{100 * value.mean:{'+' if signed else ''}.1f} ± {std}".replace("-", "−")


def sparsity_text(sparsity: float) -> str:
    """A sparsity in percent, to as many digits as its density has meaning; "–" if it is not known."""
    if math.isnan(sparsity):
        return "–"
    if sparsity >= 1:
        return "100"
    digits = max(1, 1 - math.floor(math.log10(100 * (1 - sparsity)) + 1e-9))
    return f"{100 * sparsity:.{digits}f}"


def range_text(values: Sequence[float]) -> str:
    """A number to two digits, or the range of several; "–" if none is known."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "–"
    low, high = f"{min(finite):.2g}", f"{max(finite):.2g}"
    return low if low == high else f"{low}–{high}"


def number_text(value: float, form: str = ".2g") -> str:
    """A number, or "–" if it is not known."""
    return format(value, form) if math.isfinite(value) else "–"


def p_text(p: float | None) -> str:
    """ "p = 0.012", or "p –" where there is none."""
    if p is None:
        return "p –"
    return "p < 0.001" if p < 0.001 else f"p = {p:.{3 if p < 0.1 else 2}f}"
