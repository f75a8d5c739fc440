"""Signals -> scores. Knows no thresholds, data sets or files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from autosparse.masks.layers import Layer
from autosparse.network.signals import Signals

if TYPE_CHECKING:
    from autosparse.network.graph import Graph

Scores = dict[str, Tensor]  # parameter name -> one float per weight, higher = keep


@dataclass(frozen=True)
class Context:
    """What a criterion may ask for besides signals: the layers, the traced graph if there is one, the density that the
    mask will have after this step, the masks of the step before, and a seed."""

    layers: Mapping[str, Layer]
    density: float
    graph: Graph | None = None
    masks: Mapping[str, Tensor] | None = None
    seed: int = 0


class Criterion(Protocol):
    """A pure function of signals that names those it needs and how many batches they take by default."""

    @property
    def name(self) -> str: ...
    @property
    def signals(self) -> tuple[str, ...]: ...
    @property
    def n_batches(self) -> int: ...
    def __call__(self, signals: Signals, context: Context) -> Scores: ...


@dataclass(frozen=True)
class HandMade:
    """A criterion given by a formula."""

    name: str
    score: Callable[[Signals, Context], Scores]
    signals: tuple[str, ...] = ()
    n_batches: int = 0

    def __call__(self, signals: Signals, context: Context) -> Scores:
        return self.score(signals, context)


@dataclass(frozen=True)
class Inverted:
    """A sanity check: the scores of `rule` with the opposite sign, so that the worst weights stay."""

    rule: Criterion

    @property
    def name(self) -> str:
        return f"inverted:{self.rule.name}"

    @property
    def signals(self) -> tuple[str, ...]:
        return self.rule.signals

    @property
    def n_batches(self) -> int:
        return self.rule.n_batches

    def __call__(self, signals: Signals, context: Context) -> Scores:
        return {name: -score for name, score in self.rule(signals, context).items()}


def random(signals: Signals, context: Context) -> Scores:
    """`s ~ U(0, 1)`, a function of the seed alone: the same on every device."""
    generator = torch.Generator().manual_seed(context.seed)
    return {name: torch.rand(layer.shape, generator=generator) for name, layer in context.layers.items()}


def magnitude(signals: Signals, context: Context) -> Scores:
    """`s = |θ|` (Han et al. 2015; at initialization Frankle et al. 2021)."""
    return {name: weight.abs() for name, weight in signals["weight"].items()}


def snip(signals: Signals, context: Context) -> Scores:
    """`s = |θ ⊙ g|`, the first-order change of the loss when a weight goes (Lee et al. 2019). One batch by default."""
    gradient = signals["gradient"]
    return {name: (weight * gradient[name]).abs() for name, weight in signals["weight"].items()}


def synflow(signals: Signals, context: Context) -> Scores:
    """`s = |θ| ⊙ ∂R/∂|θ|`, synaptic flow of the linearised network (Tanaka et al. 2020); no data.

    Weights that no flow can reach by construction (queries, keys, gates) would all score 0 and die whatever they are
    worth: of these every layer keeps the target density by magnitude.
    """
    flow, unreached = signals["flow"], signals["no_flow"]
    above = 2 * max(float(f.max()) for f in flow.values())
    scores: Scores = {}
    for name, value in flow.items():
        apart = unreached[name]
        count = round(context.density * int(apart.sum()))
        if count:
            magnitude = torch.where(apart, signals["weight"][name].abs().to(value.dtype), -1.0).flatten()
            value = value.clone()
            value.view(-1)[magnitude.topk(count).indices] = above
        scores[name] = value
    return scores


CRITERIA: dict[str, Criterion] = {
    "random": HandMade("random", random),
    "magnitude": HandMade("magnitude", magnitude, ("weight",)),
    "snip": HandMade("snip", snip, ("weight", "gradient"), n_batches=1),
    "synflow": HandMade("synflow", synflow, ("weight", "flow", "no_flow")),
}


@dataclass(frozen=True)
class Preset:
    """A criterion with the settings that its authors published; each can be overridden in `prune`.

    `revive`: weights that a step pruned may come back in the next (FORCE); else what is pruned stays pruned.
    """

    criterion: Criterion
    scope: str = "global"
    steps: int = 1
    schedule: str = "exponential"
    n_batches: int | None = None
    revive: bool = False


PRESETS: dict[str, Preset] = {
    "random": Preset(CRITERIA["random"], scope="uniform"),
    "erk": Preset(CRITERIA["random"], scope="erk"),
    "magnitude": Preset(CRITERIA["magnitude"]),
    "snip": Preset(CRITERIA["snip"]),
    "iterative_snip": Preset(CRITERIA["snip"], steps=60),  # Verdenius et al. 2020, de Jorge et al. 2021
    "synflow": Preset(CRITERIA["synflow"], steps=100),
}
