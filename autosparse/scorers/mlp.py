"""A scorer network that sees one weight at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import require, settings
from autosparse.scorers.batches import Moments
from autosparse.scorers.features import View
from autosparse.scorers.kinds import ScorerKind

Outputs = Iterator[tuple[str, int, int, Tensor]]  # layer, range of its first dimension, (n, K) for the weights there


class Standard(nn.Module):
    """Inputs clipped to the range that they had in the records, and standardised; all of it buffers.

    Features outside the range are clipped to it: what a layer larger than any in the records would get is otherwise the
    network's extrapolation, which can empty whole layers.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.register_buffer("low", torch.full((inputs,), -math.inf))
        self.register_buffer("high", torch.full((inputs,), math.inf))

    def set(self, moments: Moments) -> None:
        """Take mean, standard deviation and range of what `moments` saw."""
        for name, value in moments.figures().items():
            getattr(self, name).copy_(value)

    def forward(self, rows: Tensor) -> Tensor:
        return (rows.clamp(self.low, self.high) - self.mean) / self.std


class MLPScorer(nn.Module):
    """`outputs` numbers per row of features: standardised inputs, hidden Linear layers with ReLU, one Linear."""

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.inputs = Standard(inputs)
        sizes = [inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.out = nn.Linear(sizes[-1], outputs)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.inputs(rows)
        for layer in self.hidden:
            x = torch.relu_(layer(x))
        return self.out(x)

    def outputs(self, view: View) -> Outputs:
        """The outputs for every weight of a network, chunk by chunk."""
        return by_rows(self, view)


def by_rows(network: Callable[[Tensor], Tensor], view: View) -> Outputs:
    """The outputs of a function of single rows of features."""
    for name in view.layers:
        for start, stop in view.chunks(name):
            yield name, start, stop, network(view.rows(name, start, stop))


class NoNetwork(nn.Module):
    """Scores nothing: for a scorer that is its rule of layer densities and its positions alone."""

    def outputs(self, view: View) -> Outputs:
        return by_rows(lambda rows: rows.new_zeros(len(rows), 1), view)


@settings
class MLPSettings:
    """`hidden`: widths of the hidden layers."""

    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        require(len(self.hidden) >= 1 and min(self.hidden) >= 1, "hidden", self.hidden, "give widths of at least 1")


class _MLP(ScorerKind):
    settings = MLPSettings

    def build(self, features: Sequence[str], outputs: int, options: Mapping[str, Any]) -> nn.Module:
        return MLPScorer(len(features), outputs, **options)


class _Rule(ScorerKind):
    def build(self, features: Sequence[str], outputs: int, options: Mapping[str, Any]) -> nn.Module:
        return NoNetwork()


KIND, RULE = _MLP(), _Rule()
