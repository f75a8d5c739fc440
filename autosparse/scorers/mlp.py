"""A scorer network that sees one weight at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLPScorer(nn.Module):
    """`outputs` numbers per row of features: clipped and standardised inputs, hidden Linear layers with ReLU, one Linear.

    `mean`, `std` and the range `low … high` of the training rows are buffers, so that they travel with the weights.
    Features outside the range are clipped to it: what a layer larger than any in the records would get is otherwise the
    network's extrapolation, which can empty whole layers.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.register_buffer("low", torch.full((inputs,), -math.inf))
        self.register_buffer("high", torch.full((inputs,), math.inf))
        sizes = [inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.out = nn.Linear(sizes[-1], outputs)

    def forward(self, rows: Tensor) -> Tensor:
        x = (rows.clamp(self.low, self.high) - self.mean) / self.std
        for layer in self.hidden:
            x = torch.relu_(layer(x))
        return self.out(x)
