"""Rules by which a mask changes while the network trains."""

from __future__ import annotations

import math

from torch import Tensor

from autosparse.errors import AutoSparseError, require


def gradual_density(density: float, progress: float, start: float = 1.0) -> float:
    """`ρ_t = ρ + (ρ_0 − ρ)·(1 − r)³`: from `ρ_0 = start` at progress `r = 0` to `ρ` at `r = 1`, fast at first.

    Source: Zhu & Gupta 2017, "To prune, or not to prune".

    >>> round(gradual_density(0.1, 0.5), 2)
    0.21
    """
    return density + (start - density) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def exchange_fraction(fraction: float, progress: float) -> float:
    """`α_t = α/2·(1 + cos(π·r))` at progress r; 0 from `r = 1` on. Source: Evci et al. 2020 (RigL).

    >>> round(exchange_fraction(0.3, 0.5), 6)
    0.15
    """
    return 0.0 if progress >= 1 else fraction / 2 * (1 + math.cos(math.pi * max(progress, 0.0)))


def exchange(weight: Tensor, mask: Tensor, growth: Tensor, fraction: float) -> Tensor:
    """The mask after one exchange: `⌊α·kept⌋` kept weights of lowest `|θ|` go, as many pruned ones of highest `growth` come.

    The count stays. Nothing that goes comes back in the same exchange, so that at most as many are exchanged as were
    pruned before. Ties go to the earlier position. A growth score that is NaN counts as the lowest.

    Args:
        weight, growth: tensors of the mask's shape.
        fraction: α, in [0, 1].

    Raises:
        AutoSparseError: the fraction is out of range, or a kept weight is NaN.
    """
    require(0 <= fraction <= 1, "fraction", fraction, "it is the share of kept weights to exchange, in [0, 1]")
    kept = mask.flatten()
    if bool(weight.detach().flatten()[kept].isnan().any()):
        raise AutoSparseError("a kept weight is NaN: the training diverged; a lower learning rate may help")
    count = min(int(fraction * int(kept.sum()) + 1e-9), int((~kept).sum()))
    if count == 0:
        return mask.clone()
    magnitude = weight.detach().abs().float().flatten().masked_fill(~kept, math.inf)
    scores = growth.detach().float().flatten().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    scores = scores.masked_fill(kept, -math.inf)
    if not bool((scores > -math.inf).sum() >= count):  # NaN or −∞ where weights were pruned: any of these may come
        scores = scores.clamp(min=-3e38).masked_fill(kept, -math.inf)
    changed = kept.clone()
    changed[magnitude.argsort(stable=True)[:count]] = False
    changed[scores.argsort(stable=True, descending=True)[:count]] = True
    return changed.view_as(mask)
