"""Rows of features in batches, and the moments of what was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowBatch(NamedTuple):
    """Rows of several records: features `(n, F)`, survival `(n,)`, which record `(n,)`, and where in it the weight is
    `(n, 3)`: its layer, its output channel and its input channel, counted over all layers."""

    x: Tensor
    y: Tensor
    owner: Tensor
    place: Tensor

    def pick(self, index: Tensor) -> RowBatch:
        return RowBatch(*(column[index] for column in self))

    @staticmethod
    def join(parts: Sequence[RowBatch]) -> RowBatch:
        return RowBatch(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class Moments:
    """Mean, standard deviation and range of rows that are seen part by part."""

    def __init__(self, inputs: int) -> None:
        self.count = 0
        self.total = torch.zeros(inputs, dtype=torch.float64)
        self.squares = torch.zeros(inputs, dtype=torch.float64)
        self.low = torch.full((inputs,), math.inf)
        self.high = torch.full((inputs,), -math.inf)

    def see(self, rows: Tensor) -> None:
        if len(rows):
            self.count += len(rows)
            self.total += rows.double().sum(0)
            self.squares += rows.double().square().sum(0)
            self.low = torch.minimum(self.low, rows.amin(0))
            self.high = torch.maximum(self.high, rows.amax(0))

    def figures(self) -> dict[str, Tensor]:
        mean = self.total / max(self.count, 1)
        std = (self.squares / max(self.count, 1) - mean.square()).clamp(min=1e-6).sqrt()
        return {"mean": mean, "std": std, "low": self.low, "high": self.high}
