"""Gradual magnitude pruning (GMP): from dense to sparse in one training; and AC/DC, dense and sparse by turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from autosparse.errors import require, require_unset, settings
from autosparse.masks.densities import Scope, layer_densities
from autosparse.masks.selection import select
from autosparse.masks.updates import gradual_density
from autosparse.search.method import Method
from autosparse.search.sparsify import SparseTraining, Update, at_share, check_length, check_task, search


@settings
class GMPSettings(SparseTraining):
    """Gradual magnitude pruning.

    From the share `begin` of the training to `end`, every `every` optimizer steps the weights of lowest `|θ|` are
    removed, to the density `ρ_t = ρ + (1 − ρ)(1 − r)³` with `r` from 0 to 1, and at `end` to exactly ρ. What is removed
    stays removed. With layer densities `d_l`, layer l goes to `d_l + (1 − d_l)(1 − r)³`; otherwise all weights are ranked
    together.

    Source: Zhu & Gupta 2017, "To prune, or not to prune".
    """

    every: int = 50
    begin: float = 0.05
    end: float = 0.7
    gradual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = f"begin and end are shares of the training, 0 <= begin < end <= 1; end is {self.end}"
        require(0 <= self.begin < self.end <= 1, "begin", self.begin, shares)

    def due(self, step: int, steps: int) -> bool:
        first, last = self._window(steps)
        return step == last or (first < step < last and (step - first) % self.every == 0)

    def update(self, now: Update) -> Mapping[str, Tensor]:
        first, last = self._window(now.steps)
        return prune_gradually(now, (now.step - first) / (last - first))

    def _window(self, steps: int) -> tuple[int, int]:
        first = at_share(self.begin, steps)
        return first, min(max(first + 1, at_share(self.end, steps)), steps)


def prune_gradually(now: Update, progress: float, start: float = 1.0) -> Mapping[str, Tensor]:
    """The kept weights of highest `|θ|`, at the density of `gradual_density`; see `GMPSettings`."""
    density = gradual_density(now.density, progress, start)
    rule: Scope = now.scope or "global"
    if rule != "global":
        wanted = layer_densities(rule, now.layers, now.density)
        rule = {n: gradual_density(d, progress, start) for n, d in wanted.items()}
    magnitudes = {n: w.abs() for n, w in now.weights.items()}
    return select(magnitudes, density, layers=now.layers, scope=rule, floor=now.floor, within=now.masks, seed=now.seed)


@settings
class ACDCSettings(SparseTraining):
    """AC/DC: dense and sparse phases by turns, sparse at the end.

    The first share `warmup` of the training is dense. Then phases of the share `phase` follow, a sparse one first: it keeps
    the weights whose `|θ|` was highest at its start. A dense phase gives all weights back, from zero. From the share
    `last` on the network stays sparse.

    Source: Peste et al. 2021, whose CIFAR schedule of 200 epochs the defaults are: sparse from 10, 50, …, 170, dense from
    30, 70, …, 150. It has no `every`.
    """

    warmup: float = 0.05
    phase: float = 0.1
    last: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = f"warmup and last are shares of the training, 0 <= warmup < last < 1; last is {self.last}"
        require(0 <= self.warmup < self.last < 1, "warmup", self.warmup, shares)
        require(0 < self.phase < 1, "phase", self.phase, "it is a share of the training, in (0, 1)")
        require_unset(self, ("every",), "", "AC/DC changes its masks when a phase begins")

    def due(self, step: int, steps: int) -> bool:
        return step in self._phases(steps)

    def update(self, now: Update) -> Mapping[str, Tensor]:
        if not self._phases(now.steps)[now.step]:
            return {n: m.new_ones(m.shape) for n, m in now.masks.items()}
        magnitudes = {n: w.abs() for n, w in now.weights.items()}
        scope = now.scope or "global"
        return select(magnitudes, now.density, layers=now.layers, scope=scope, floor=now.floor, seed=now.seed)

    def _phases(self, steps: int) -> dict[int, bool]:
        """The step at which each phase begins, and whether it is sparse."""
        phases, share, sparse = {}, self.warmup, True
        while share < self.last - 1e-9:
            phases[max(1, at_share(share, steps))] = sparse
            share, sparse = share + self.phase, not sparse
        return phases | {min(max(1, at_share(self.last, steps)), steps): True}


METHOD = Method(GMPSettings, search, continues=True, check=check_task, check_length=check_length)
ACDC = Method(ACDCSettings, search, continues=True, check=check_task, check_length=check_length)
