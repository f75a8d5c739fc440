"""Figures of a criterion on a record, against a ticket that is known weight by weight."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import plant, write
from torch import Tensor

from autosparse.masks.layers import Layer
from autosparse.network.signals import Signals
from autosparse.pruning.criteria import CRITERIA, Context, Criterion, HandMade
from autosparse.scorers import evaluation
from autosparse.scorers.card import FIGURES, OWN
from autosparse.scorers.evaluation import RIVALS, compare, evaluate, figures, means
from autosparse.scorers.records import read_record

LAYERS = {"a": Layer("a", "linear", (1, 4)), "b": Layer("b", "linear", (1, 4))}
# The ticket: the first two of `a`, the first of `b`, and nothing else.
TICKET = {"a": np.array([[9.0, 8, 1, 0]]), "b": np.array([[7.0, 2, 3, 4]])}


def judge(criterion: Criterion, path: Path) -> dict[str, float]:
    return figures(criterion, read_record(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    signals = {
        "weight": {"a": np.array([[4.0, -3, 2, 1]]), "b": np.array([[1.0, 2, -3, 4]])},
        "gradient": {"a": np.ones((1, 4)), "b": np.ones((1, 4))},
    }
    return write(tmp_path / "r.h5", LAYERS, signals, TICKET, densities=(3 / 8,))


def scores(a: list[float], b: list[float]) -> HandMade:
    found = {"a": torch.tensor([a]), "b": torch.tensor([b])}
    return HandMade("known", lambda signals, context: found, ("weight",))


def test_the_ticket_itself_is_perfect(path: Path) -> None:
    record = read_record(path)
    assert [int((s == 1).sum()) for s in record.survival.values()] == [2, 1]
    found = judge(scores(TICKET["a"][0].tolist(), TICKET["b"][0].tolist()), path)
    assert set(found) == set(FIGURES)
    assert found["auc"] == found["auc_within_layers"] == found["auc_within_magnitude_bins"] == 1.0
    assert found["overlap"] == found["overlap_within_layers"] == 1.0 and found["density_error"] == 0.0


def test_figures_by_hand(path: Path) -> None:
    """Kept are the best three: both of `a`'s ticket but the last of `b`.

    Of 3 × 5 pairs 13 are in order: `b`'s first is below 0.8 and 0.7. Within layers 4 of `a`'s 4 and 1 of `b`'s 3.
    """
    found = judge(scores([1.0, 0.9, 0.1, 0.2], [0.6, 0.5, 0.7, 0.8]), path)
    assert found["auc"] == pytest.approx(13 / 15)
    assert found["auc_within_layers"] == pytest.approx((4 + 1) / (4 + 3))
    assert found["overlap"] == pytest.approx(2 / 3) and found["density_error"] == 0.0
    assert found["overlap_within_layers"] == pytest.approx(2 / 3)


def test_the_wrong_layer_is_told_apart_from_the_wrong_weight(path: Path) -> None:
    """All three from `b`, whose own first is the best: two weights of the wrong layer, none wrong within."""
    found = judge(scores([0.4, 0.3, 0.1, 0.2], [0.9, 0.7, 0.6, 0.8]), path)
    assert found["overlap"] == pytest.approx(1 / 3) and found["density_error"] == pytest.approx(2 / 3)
    assert found["overlap_within_layers"] == 1.0 and found["auc_within_layers"] == 1.0


def test_ties_are_worth_half(path: Path) -> None:
    found = judge(scores([1.0] * 4, [1.0] * 4), path)
    assert found["auc"] == found["auc_within_layers"] == found["auc_within_magnitude_bins"] == 0.5


def test_within_magnitude_bins_magnitude_is_worth_nothing(tmp_path: Path) -> None:
    """Where survival is by |g|, and where it is by |θ|: neighbours in |θ| are no longer told apart by it."""
    by_gradient = plant(tmp_path / "g.h5", rule="gradient", sizes=((60, 60),))
    assert judge(CRITERIA["magnitude"], by_gradient)["auc_within_magnitude_bins"] == pytest.approx(0.5, abs=0.06)
    gradient = HandMade("gradient", lambda s, context: {n: g.abs() for n, g in s["gradient"].items()}, ("gradient",))
    only = HandMade("both", gradient.score, ("weight", "gradient"))
    assert judge(only, by_gradient)["auc_within_magnitude_bins"] == 1.0
    found = judge(gradient, by_gradient)
    assert found["auc"] == found["overlap"] == found["auc_within_magnitude_bins"] == 1.0


def test_the_criterion_is_asked_at_the_lowest_density_with_the_graph(tmp_path: Path) -> None:
    seen: list[Context] = []

    def score(signals: Signals, context: Context) -> dict[str, Tensor]:
        seen.append(context)
        return {n: w.abs() for n, w in signals["weight"].items()}

    path = plant(tmp_path / "r.h5", densities=(0.5, 0.2))
    figures(HandMade("spy", score, ("weight",)), read_record(path))
    (context,) = seen
    assert context.density == pytest.approx(0.2, abs=1e-3) and context.masks is None
    assert context.graph is not None and context.graph.layers() == ("l0.weight", "l1.weight")


def test_the_mean_over_records_and_the_rivals_that_can_be_asked(tmp_path: Path) -> None:
    plain = plant(tmp_path / "a.h5", 0)
    more = plant(tmp_path / "b.h5", 1, rule="flow", extra=("flow",))
    rows = evaluate(CRITERIA["magnitude"], [plain, more])
    found = means(rows)
    one, two = (judge(CRITERIA["magnitude"], p) for p in (plain, more))
    for key in FIGURES:
        for name in (OWN, "magnitude"):
            if not math.isnan(one[key] + two[key]):
                assert found[name][key] == pytest.approx((one[key] + two[key]) / 2), key
    assert one["auc"] == 1.0 and found[OWN]["auc"] < 0.9
    assert found["snip"]["auc"] == pytest.approx(sum(judge(CRITERIA["snip"], p)["auc"] for p in (plain, more)) / 2)
    flow = next(rival for rival in RIVALS if rival.name == "flow")
    assert found["flow"]["auc"] == judge(flow, more)["auc"], "the mean is over the records that store it"
    assert set(found) == {OWN, *(r.name for r in RIVALS)} and all(set(of) == set(FIGURES) for of in found.values())
    assert [row["record"] for row in rows if row["criterion"] == OWN] == ["a", "b"]
    assert evaluate(CRITERIA["magnitude"], []) == [] and means([]) == {}


def test_rivals_stand_beside_where_their_signals_are_stored(path: Path) -> None:
    found = compare([scores(TICKET["a"][0].tolist(), TICKET["b"][0].tolist())], read_record(path))
    assert list(found) == ["known", "magnitude", "snip", "growth0"], "no flow in this record"
    assert found["known"]["overlap"] == 1 and found["magnitude"] == judge(CRITERIA["magnitude"], path)


@pytest.mark.parametrize("values", [2, 5, 1000])
@pytest.mark.parametrize("size", [1, 2, 19, 20, 21, 137])
def test_the_auc_within_bins_is_the_mean_of_scikit_learns(size: int, values: int) -> None:
    """Weighted by pairs; with few values there are many ties, within bins and over their edges."""
    from sklearn.metrics import roc_auc_score

    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores, labels = rng.integers(0, values, size).astype(np.float32), rng.random(size) < 0.3
        weight = rng.integers(0, 4, size)
        parts = np.array_split(np.argsort(weight, kind="stable"), max(1, size // 20))
        bins = evaluation._bins(weight)
        assert all(set(bins[part]) == {number} for number, part in enumerate(parts))
        both = [part for part in parts if 0 < labels[part].sum() < len(part)]
        pairs = [labels[part].sum() * (~labels[part]).sum() for part in both]
        wanted = np.average([roc_auc_score(labels[p], scores[p]) for p in both], weights=pairs) if both else math.nan
        found = evaluation._mean_auc([(labels, scores, bins)])
        assert found == pytest.approx(wanted, abs=1e-12, nan_ok=True)
