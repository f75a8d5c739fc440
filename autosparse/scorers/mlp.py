"""A scorer network that sees one weight at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLPScorer(nn.Module):
    """`outputs` numbers per row of features: standardised inputs, hidden Linear layers with ReLU, one Linear.

    `mean` and `std` of the training rows are buffers, so that they travel with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        sizes = [inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.out = nn.Linear(sizes[-1], outputs)

    def forward(self, rows: Tensor) -> Tensor:
        x = (rows - self.mean) / self.std
        for layer in self.hidden:
            x = torch.relu_(layer(x))
        return self.out(x)
