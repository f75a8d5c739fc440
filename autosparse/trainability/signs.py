"""The signs that a search ended with, given to the initial weights: magnitudes of `θ₀`, signs of `θ_T`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import unwrap
from autosparse.masks.mask import Masks
from autosparse.trainability.preparation import Preparation, PreparedLayer


@torch.no_grad()
def signs(model: nn.Module, masks: Masks | None, example_input: Any) -> Preparation:
    """`θ ← |θ₀|·sign(θ_T)` for the weights that `masks` keep, in place; θ_T are the weights that the search ended with.

    `θ_T = 0` counts as positive. Pruned weights are zero
    afterwards; biases and norms stay.

    Raises:
        AutoSparseError: masks without signs: only methods that search by training give them, and a shuffle loses them.

    Source: the signs of a ticket carry part of its worth (Zhou et al. 2019; "Find a winning sign", ICLR 2025).
    """
    if masks is None or set(masks.signs) != set(masks):
        raise AutoSparseError(
            "prepare is 'signs': these masks have no signs; take those of a method that trains, such as gmp"
        )
    masks.check(model)
    own = dict(unwrap(model).named_parameters())
    rows = []
    for name, mask in masks.items():
        weight = own[name]
        positive, kept = masks.signs[name].to(weight.device), mask.to(weight.device)
        flipped = kept & (weight != 0) & ((weight < 0) == positive)
        weight.copy_(torch.where(flipped, -weight, weight).masked_fill(~kept, 0))
        note = f"{int(flipped.sum())} of {int(kept.sum())} signs changed"
        rows.append(PreparedLayer(name, None, math.nan, math.nan, note))
    return Preparation("signs", masks, tuple(rows))
