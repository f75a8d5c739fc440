"""How a criterion ranks the weights of records that it was not fitted on, in figures that magnitude alone cannot earn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autosparse.masks.selection import select
from autosparse.network.signals import Signals
from autosparse.pruning.criteria import CRITERIA, Context, Criterion, HandMade
from autosparse.scorers.card import FIGURES, OWN
from autosparse.scorers.records import Record, read_record

# Hand-made criteria beside a scorer, where the record stores their signals; the last is SynFlow's score in one step.
RIVALS: tuple[Criterion, ...] = (
    *(CRITERIA[name] for name in ("magnitude", "snip", "growth0")),
    HandMade("flow", lambda signals, context: signals["flow"], ("flow",)),
)


def evaluate(criterion: Criterion, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The `FIGURES` at the lowest density of each record; none of them is accuracy after training.

    A row for each record and criterion: `criterion`, under the name `card.OWN`, and the rivals whose signals the record
    stores.
    """
    rows = []
    for path in paths:
        record = read_record(path)
        found = {OWN: figures(criterion, record), **compare([], record)}
        rows += [{"record": path.stem, "criterion": name, **values} for name, values in found.items()]
    return rows


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean of each of the `FIGURES` over the records of the rows of `evaluate`, for each criterion."""
    names = dict.fromkeys(row["criterion"] for row in rows)
    return {n: {key: _mean([row[key] for row in rows if row["criterion"] == n]) for key in FIGURES} for n in names}


def compare(criteria: Sequence[Criterion], record: Record) -> dict[str, dict[str, float]]:
    """The `FIGURES` on one record, of these criteria and of the rivals whose signals the record stores."""
    rivals = [rival for rival in RIVALS if set(rival.signals) <= set(record.signals)]
    return {criterion.name: figures(criterion, record) for criterion in (*criteria, *rivals)}


def figures(criterion: Criterion, record: Record) -> dict[str, float]:
    """The `FIGURES` of a criterion on a record that is in memory."""
    signals: Signals = {
        s: {n: torch.from_numpy(record.signals[s][n]) for n in record.layers} for s in criterion.signals
    }
    density = float(record.removal_densities[-1])
    graph = record.graph() if record.operations else None
    scores = criterion(signals, Context(record.layers, density, graph, seed=record.seed))
    ticket = {n: (s == record.rounds_done).ravel() for n, s in record.survival.items()}
    own = {n: s.numpy().ravel() for n, s in scores.items()}
    weight = {n: np.abs(record.signals["weight"][n]).ravel() for n in own} if "weight" in record.signals else {}
    kept = {n: int(t.sum()) for n, t in ticket.items()}
    size = sum(kept.values())
    shares = {n: k / record.layers[n].numel for n, k in kept.items()}
    masks = select(scores, density, layers=record.layers)
    inside = select(scores, density, layers=record.layers, scope=shares)
    return {
        "auc": _mean_auc([(np.concatenate([*ticket.values()]), np.concatenate([*own.values()]), None)]),
        "auc_within_layers": _mean_auc([(ticket[n], own[n], None) for n in own]),
        "auc_within_magnitude_bins": _mean_auc([(ticket[n], own[n], _bins(weight[n])) for n in weight]),
        "overlap": _overlap(ticket, masks, size),
        "overlap_within_layers": _overlap(ticket, inside, size),
        "density_error": sum(abs(int(masks[n].sum()) - kept[n]) for n in kept) / (2 * size),
    }


def _overlap(ticket: Mapping[str, np.ndarray], masks: Mapping[str, torch.Tensor], size: int) -> float:
    return sum(int((ticket[n] & masks[n].numpy().ravel()).sum()) for n in ticket) / size


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that exist; NaN where none does."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _bins(values: np.ndarray) -> np.ndarray:
    """The bin of each value: some 20 neighbours in rank each, since in wider ones magnitude would tell much of a ticket."""
    count, size = max(1, len(values) // 20), len(values)
    bins = np.empty(size, np.int64)
    # As np.array_split: the first bins have one more.
    bins[np.argsort(values, kind="stable")] = np.repeat(
        np.arange(count), [size // count + (i < size % count) for i in range(count)]
    )
    return bins


def _mean_auc(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> float:
    """The share of pairs (in the ticket, not in it) that the scores order, ties worth half, over all bins of all parts.

    So it is the mean of the AUC of bins that hold both, weighted by the pairs of each; NaN where there are no pairs. A part
    has labels, scores, and bins (`None`: one). With r the mean rank within its bin, `Σ_b Σ_{labels} r − n₁(n₁ + 1)/2` are
    the pairs in order (Mann and Whitney 1947): one sort for all bins.
    """
    ordered = pairs = 0.0
    for labels, scores, bins in parts:
        bins = np.zeros(len(scores), np.int64) if bins is None else bins
        order = np.lexsort((scores, bins))
        label, score, place = labels[order], scores[order], bins[order]
        new = np.r_[True, (score[1:] != score[:-1]) | (place[1:] != place[:-1])]
        start = np.flatnonzero(new)  # of runs of equal scores in a bin
        length = np.diff(np.r_[start, len(score)])
        first = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])  # of bins
        size = np.diff(np.r_[first, len(score)])
        rank = np.repeat(start + (length + 1) / 2, length) - np.repeat(first, size)
        ones = np.add.reduceat(label.astype(np.float64), first)
        ordered += float((rank * label).sum() - (ones * (ones + 1) / 2).sum())
        pairs += float((ones * (size - ones)).sum())
    return ordered / pairs if pairs else math.nan
