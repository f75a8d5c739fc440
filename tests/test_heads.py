"""Hazards and their loss, against hand-computed tables and a brute-force likelihood."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from autosparse.errors import AutoSparseError
from autosparse.scorers import heads
from autosparse.scorers.heads import BINS, WIDTH, exposure, interval_tables, loss, outputs, score

torch.set_num_threads(1)

times = st.floats(0, 8, allow_nan=False)


def survival(rates: list[float], x: float) -> float:
    """`S(x) = exp(−∫₀ˣ λ)` by walking along the bins; the last one reaches to infinity."""
    integral = 0.0
    for b, rate in enumerate(rates):
        low, high = b * WIDTH, (b + 1) * WIDTH if b < BINS - 1 else math.inf
        integral += rate * max(0.0, min(x, high) - low) / WIDTH
    return math.exp(-integral)


def test_exposure_by_hand() -> None:
    assert exposure(0, 0) == [0.0] * BINS
    assert exposure(0, WIDTH) == [1.0] + [0.0] * (BINS - 1)
    assert exposure(0.5 * WIDTH, 2.25 * WIDTH) == pytest.approx([0.5, 1.0, 0.25] + [0.0] * (BINS - 3))
    assert exposure(0, (BINS + 3) * WIDTH) == pytest.approx([1.0] * (BINS - 1) + [4.0])


@given(times, times, times)
def test_exposures_add_up(a: float, b: float, c: float) -> None:
    a, b, c = sorted((a, b, c))
    assert sum(exposure(a, c)) == pytest.approx((c - a) / WIDTH, abs=1e-9)
    for left, right, whole in zip(exposure(a, b), exposure(b, c), exposure(a, c), strict=True):
        assert left + right == pytest.approx(whole, abs=1e-9)


def test_interval_tables_by_hand() -> None:
    """Removals at x = W/2 and 2W: three labels, filled up to five rows."""
    survived, fell = interval_tables([math.exp(-0.5 * WIDTH), math.exp(-2 * WIDTH)], rows=5)
    zero = [0.0] * BINS
    rest = [0.0] * (BINS - 2)
    torch.testing.assert_close(survived, torch.tensor([zero, [0.5, 0, *rest], [1.0, 1, *rest], zero, zero]))
    torch.testing.assert_close(fell, torch.tensor([[0.5, 0, *rest], [0.5, 1, *rest], zero, zero, zero]))


def brute_force(z: torch.Tensor, s: int, densities: list[float]) -> float:
    """−log P(fell between removals s and s + 1), or beyond the last."""
    rates = [math.log1p(math.exp(v)) for v in z.tolist()]
    x = [0.0, *(-math.log(d) for d in densities)]
    if s == len(densities):
        return -math.log(survival(rates, x[s]))
    return -math.log(survival(rates, x[s]) - survival(rates, x[s + 1]))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.lists(st.floats(0.005, 0.98), min_size=1, max_size=6, unique=True))
def test_the_hazard_loss_is_the_interval_censored_likelihood(seed: int, densities: list[float]) -> None:
    densities = sorted({round(d, 3) for d in densities}, reverse=True)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(densities) + 1)
    z = torch.randn(len(labels), BINS, generator=generator) - 1
    survived, fell = (t[labels] for t in interval_tables(densities, len(labels)))
    wanted = sum(brute_force(z[i], i, densities) for i in range(len(labels))) / len(labels)
    assert float(loss("hazard", z, survived, fell)) == pytest.approx(wanted, rel=2e-3, abs=2e-3)


def test_records_with_different_schedules_mix_in_one_batch() -> None:
    """Every label keeps its own record's times; the mean is over all."""
    schedules = [[0.5, 0.25, 0.1], [0.02]]
    tables = [interval_tables(d, rows=4) for d in schedules]
    owner, label = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([3, 0, 1, 1, 0])
    survived = torch.stack([t[0] for t in tables])[owner, label]
    fell = torch.stack([t[1] for t in tables])[owner, label]
    z = torch.randn(5, BINS, generator=torch.Generator().manual_seed(0))
    wanted = [brute_force(z[i], int(label[i]), schedules[int(owner[i])]) for i in range(5)]
    assert float(loss("hazard", z, survived, fell)) == pytest.approx(sum(wanted) / 5, rel=1e-4)


def test_the_loss_is_least_at_the_true_rates() -> None:
    """Labels drawn from known hazards: the gradient there is (nearly) zero."""
    densities = [math.exp(-WIDTH * k) for k in range(1, 5)]
    rates = torch.tensor([0.3, 0.7, 0.2, 1.0])
    alive = torch.cat([torch.zeros(1), rates.cumsum(0)]).neg().exp()  # S at the five times
    chance = torch.cat([alive[:-1] - alive[1:], alive[-1:]])
    survived, fell = interval_tables(densities, rows=5)
    z = torch.full((BINS,), 0.0)
    z[:4] = torch.log(torch.expm1(rates))
    z = z.requires_grad_()
    value = sum(chance[s] * loss("hazard", z[None], survived[s : s + 1], fell[s : s + 1]) for s in range(5))
    assert isinstance(value, torch.Tensor)
    value.backward()
    assert z.grad is not None and z.grad.abs().max() < 1e-6


def test_the_loss_stays_finite_at_extreme_outputs() -> None:
    survived, fell = interval_tables([0.5, 0.1], rows=3)
    for head, balance in itertools.product(("hazard", "cumulative"), (0.0, 1.0)):
        for value in (-1e4, -50.0, 50.0, 1e4):
            z = torch.full((3, BINS), value, requires_grad=True)
            found = loss(head, z, survived, fell, balance)
            found.backward()
            assert torch.isfinite(found) and z.grad is not None and torch.isfinite(z.grad).all()


def test_the_squared_error_is_of_the_log_density_survived() -> None:
    survived, fell = interval_tables([0.5, 0.25, 0.125], rows=4)
    target = torch.tensor([0, 1, 2, 3]) * math.log(2) / (BINS * WIDTH)
    assert float(loss("mse", target[:, None], survived, fell)) == pytest.approx(0, abs=1e-12)
    assert float(loss("mse", target[:, None] + 0.5, survived, fell)) == pytest.approx(0.25)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_survival_falls_with_the_density(seed: int, a: float, b: float) -> None:
    z = torch.randn(20, BINS, generator=torch.Generator().manual_seed(seed))
    low, high = sorted((a, b))
    assert (score("hazard", z, low) <= score("hazard", z, high) + 1e-6).all()
    assert (score("hazard", z, high) <= 0).all()


def test_scores_are_log_survival() -> None:
    z = torch.randn(5, BINS, generator=torch.Generator().manual_seed(1))
    for density in (0.9, 0.3, 0.01, 0.0001):
        wanted = [math.log(survival(F.softplus(row).tolist(), -math.log(density))) for row in z]
        torch.testing.assert_close(score("hazard", z, density), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_the_order_may_depend_on_the_density() -> None:
    z = torch.full((2, BINS), -10.0)
    z[0, 0] = 2.0  # falls early if at all
    z[1, 3:] = 2.0  # safe at first, doomed later
    early, late = score("hazard", z, math.exp(-WIDTH)), score("hazard", z, math.exp(-8 * WIDTH))
    assert early[0] < early[1] and late[0] > late[1]


def test_the_cumulative_loss_by_hand() -> None:
    """Removals at x = 1.5 W and 3 W. A weight that fell between is known to be alive at end 1 and gone from end 3 on; of
    end 2 nothing is known. One that did not fall is known to be alive at ends 1 to 3, and nothing more."""
    survived, fell = (t[1:] for t in interval_tables([math.exp(-1.5 * WIDTH), math.exp(-3 * WIDTH)], rows=3))
    z = torch.randn(2, BINS, generator=torch.Generator().manual_seed(0))
    alive, gone = (lambda v: math.log(1 + math.exp(-v))), (lambda v: math.log(1 + math.exp(v)))
    first = alive(z[0, 0]) + sum(gone(v) for v in z[0, 2:].tolist())
    second = sum(alive(v) for v in z[1, :3].tolist())
    assert float(loss("cumulative", z, survived, fell)) == pytest.approx((first + second) / 2, rel=1e-5)

    def worth(b: int) -> float:  # ρ^−½ at the middle of the bin
        return math.exp(0.5 * WIDTH * (b + 0.5))

    first = worth(0) * alive(z[0, 0]) + sum(worth(b) * gone(float(z[0, b])) for b in range(2, BINS))
    second = sum(worth(b) * alive(float(z[1, b])) for b in range(3))
    assert float(loss("cumulative", z, survived, fell, 0.5)) == pytest.approx((first + second) / 2, rel=1e-5)


def test_the_cumulative_loss_of_what_fell_at_once_and_of_what_never_fell() -> None:
    """Fallen within the first bin: gone at all ends. Records that reach beyond the grid: alive at all."""
    survived, fell = interval_tables([math.exp(-0.5 * WIDTH), math.exp(-(BINS + 2) * WIDTH)], rows=3)
    z = torch.randn(1, BINS, generator=torch.Generator().manual_seed(0))
    gone, alive = F.softplus(z).sum(), F.softplus(-z).sum()
    torch.testing.assert_close(loss("cumulative", z, survived[:1], fell[:1]), gone)
    torch.testing.assert_close(loss("cumulative", z, survived[2:], fell[2:]), alive)
    assert float(loss("cumulative", z, survived[1:2], fell[1:2])) == 0, "fallen somewhere: of no end anything is known"


def test_the_cumulative_score_interpolates_between_the_ends_of_bins() -> None:
    z = torch.arange(2.0 * BINS).view(2, BINS).square()
    for b in range(BINS):
        torch.testing.assert_close(score("cumulative", z, math.exp(-(b + 1) * WIDTH)), z[:, b], rtol=1e-4, atol=1e-3)
    for b, share in ((0, 0.25), (4, 0.5), (BINS - 2, 0.75)):
        wanted = (1 - share) * z[:, b] + share * z[:, b + 1]
        found = score("cumulative", z, math.exp(-(b + 1 + share) * WIDTH))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(score("cumulative", z, 1.0), z[:, 0]) and torch.equal(score("cumulative", z, 0.9), z[:, 0])
    assert torch.equal(score("cumulative", z, 1e-9), z[:, -1])


@given(st.integers(0, 1000), st.sampled_from(["hazard", "cumulative"]), st.sampled_from([0.3, 1.0]))
def test_balance_weighs_what_happens_in_a_bin(seed: int, head: str, balance: float) -> None:
    """Labels that each tell of one bin alone: the loss is that without balance, times ρ^−b of the bin's middle."""
    z = torch.randn(1, BINS, generator=torch.Generator().manual_seed(seed))
    survived, fell = torch.zeros(1, BINS), torch.zeros(1, BINS)
    fell[0, 0] = 1
    if head == "hazard":  # exposure inside of bin 3 only: a made-up label, but one term of every real one
        fell[0, 0], survived[0, 3] = 0, 1
    worth = math.exp(balance * WIDTH * (3.5 if head == "hazard" else 0.5))
    if head == "cumulative":  # gone at all ends: each end has the worth of its bin
        each = F.softplus(z[0]) * torch.tensor([math.exp(balance * WIDTH * (b + 0.5)) for b in range(BINS)])
        torch.testing.assert_close(loss(head, z, survived, fell, balance), each.sum())
    else:
        plain = loss(head, z, survived, fell, 0.0)
        torch.testing.assert_close(loss(head, z, survived, fell, balance), worth * plain)
        assert float(plain) == pytest.approx(float(F.softplus(z[0, 3])), rel=1e-5)


def test_balanced_hazards_by_hand() -> None:
    """Removals at W and 3 W; the weight that fell between: exposure to bin 0, then −log(1 − exp(−λ₁ − λ₂)), whose worth is
    the mean of those of bins 1 and 2."""
    survived, fell = (t[1:2] for t in interval_tables([math.exp(-WIDTH), math.exp(-3 * WIDTH)], rows=3))
    z = torch.randn(1, BINS, generator=torch.Generator().manual_seed(3))
    rate = F.softplus(z[0]).tolist()
    worth = [math.exp(0.7 * WIDTH * (b + 0.5)) for b in range(3)]
    wanted = worth[0] * rate[0] - (worth[1] + worth[2]) / 2 * math.log(1 - math.exp(-rate[1] - rate[2]))
    assert float(loss("hazard", z, survived, fell, 0.7)) == pytest.approx(wanted, rel=1e-5)
    plain = rate[0] - math.log(1 - math.exp(-rate[1] - rate[2]))
    assert float(loss("hazard", z, survived, fell, 0.0)) == pytest.approx(plain, rel=1e-5)


def test_balance_means_nothing_to_the_squared_error() -> None:
    survived, fell = interval_tables([0.5, 0.1], rows=3)
    z = torch.randn(3, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss("mse", z, survived, fell, 1.0), loss("mse", z, survived, fell))


def test_at_density_one_the_order_is_that_of_the_first_bin() -> None:
    z = torch.randn(50, BINS, generator=torch.Generator().manual_seed(2))
    assert torch.equal(score("hazard", z, 1.0).argsort(), (-z[:, 0]).argsort())


def test_the_mse_score_does_not_ask_for_the_density() -> None:
    predicted = torch.tensor([[0.2], [0.7]])
    assert torch.equal(score("mse", predicted, 0.5), score("mse", predicted, 0.01))


def test_heads_are_checked() -> None:
    assert {h: outputs(h) for h in heads.HEADS} == {"hazard": BINS, "cumulative": BINS, "mse": 1}
    with pytest.raises(AutoSparseError, match="head is 'cox': known: hazard, cumulative, mse"):
        outputs("cox")
