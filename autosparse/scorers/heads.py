"""What a scorer predicts, and its loss against survival labels.

Time is `x = −log ρ`: IRP removes from x = 0 on, so records with any density schedule are read on one axis, and a weight
that survived s removals is known to have fallen between `x_s` and `x_{s+1}` (or, after the last, beyond `x_R`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from autosparse.errors import require

HEADS = ("hazard", "cumulative", "mse")
BINS = 12
WIDTH = 0.45  # of a bin, in −log ρ: the grid ends at ρ = e^−5.4 = 0.0045, and its last bin reaches beyond


def outputs(head: str) -> int:
    """Numbers that the network gives per weight."""
    require(head in HEADS, "head", head, f"known: {', '.join(HEADS)}")
    return 1 if head == "mse" else BINS


def exposure(start: float, stop: float) -> list[float]:
    """How much of `[start, stop]` lies in each bin of the grid, in bin widths."""
    edges = [i * WIDTH for i in range(BINS)] + [math.inf]
    return [max(0.0, min(stop, edges[b + 1]) - max(start, edges[b])) / WIDTH for b in range(BINS)]


def interval_tables(removal_densities: Sequence[float], rows: int) -> tuple[Tensor, Tensor]:
    """For a label s = 0 … R: exposure up to `x_s` (survived for sure) and in `(x_s, x_{s+1}]` (fell; zeros for s = R).

    Both `(rows, BINS)`, filled up with zeros over R + 1 rows.
    """
    times = [0.0, *(-math.log(d) for d in removal_densities)]
    survived, fell = torch.zeros(rows, BINS), torch.zeros(rows, BINS)
    for s in range(len(times)):
        survived[s] = torch.tensor(exposure(0.0, times[s]))
        if s + 1 < len(times):
            fell[s] = torch.tensor(exposure(times[s], times[s + 1]))
    return survived, fell


def loss(head: str, predicted: Tensor, survived: Tensor, fell: Tensor, balance: float = 0.0) -> Tensor:
    """Mean loss of a batch, given the exposures of its labels (see `interval_tables`).

    `"hazard"`: the network gives a rate `λ_b = softplus(z_b) ≥ 0` per bin, the chance of surviving to x is
    `S(x) = exp(−Σ_b λ_b·exposure_b(0, x))`, and the loss is the negative log-likelihood of what is known,
    `−log(S(x_s) − S(x_{s+1}))` for a weight that fell and `−log S(x_R)` for one that did not: the discrete-time hazard
    model with complementary log-log link (Prentice & Gloeckler 1978).
    `"cumulative"`: `z_b` is the logit of surviving beyond the end of bin b; binary cross-entropy over the ends of which the
    label tells.
    `"mse"`: squared error of `x_s` over the length of the grid, which for a geometric schedule is proportional to the
    survival count.

    `balance` b weighs what happens in a bin by `ρ^−b` of its middle: with 1 every density counts alike, though few weights
    are left at the lowest; `"mse"` has no bins.
    """
    if head == "mse":
        return F.mse_loss(predicted[:, 0], survived.sum(1) / BINS)
    worth = torch.exp(balance * WIDTH * (torch.arange(BINS, device=predicted.device) + 0.5))
    has_fallen = fell.sum(1) > 0
    if head == "cumulative":
        ends = torch.arange(1, BINS + 1, device=predicted.device)
        reached = survived.sum(1, keepdim=True)
        alive = ends <= reached + 1e-4
        dead = has_fallen[:, None] & (ends >= reached + fell.sum(1, keepdim=True) - 1e-4)
        each = F.binary_cross_entropy_with_logits(predicted, alive.float(), reduction="none")
        return (each * worth * (alive | dead)).sum(1).mean()
    rates = F.softplus(predicted)
    until = (rates * survived * worth).sum(1)
    inside = (rates * fell).sum(1)
    log_fell = torch.log(-torch.expm1(-inside.clamp(min=1e-6)))
    weight = (fell * worth).sum(1) / fell.sum(1).clamp(min=1e-6)
    return (until - torch.where(has_fallen, weight * log_fell, torch.zeros_like(log_fell))).mean()


def score(head: str, predicted: Tensor, density: float) -> Tensor:
    """One score per weight, higher = keep: `log S(−log ρ)` at the target density ρ, its logit between the ends of two bins,
    or the predicted survival.

    At ρ = 1 everything survives for sure, so that the order is that of the limit ρ → 1.
    """
    if head == "mse":
        return predicted[:, 0]
    if head == "cumulative":
        at = min(max(-math.log(density) / WIDTH - 1, 0.0), BINS - 1.0)
        low = min(int(at), BINS - 2)
        return torch.lerp(predicted[:, low], predicted[:, low + 1], at - low)
    until = max(-math.log(density), 1e-6)
    return -(F.softplus(predicted) @ torch.tensor(exposure(0.0, until), device=predicted.device))
