"""Dynamic sparse training: SET and RigL, sparse from the start, and GraNet, which prunes gradually and regrows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from autosparse.errors import require, settings
from autosparse.masks.densities import Scope
from autosparse.masks.layers import Layer
from autosparse.masks.mask import Masks
from autosparse.masks.random import make_generator
from autosparse.masks.updates import exchange, exchange_fraction
from autosparse.search.gmp import prune_gradually
from autosparse.search.method import Method
from autosparse.search.sparsify import SparseTraining, Update, at_share, check_length, check_task, random_masks, search


@settings
class SETSettings(SparseTraining):
    """Sparse evolutionary training.

    Starts with random masks of ERK's layer densities, or those that are given. Every `every` optimizer steps, up to the share `end` of the training, each layer drops the
    fraction `α_t = α/2·(1 + cos(πt/t_end))` of its weights, those of lowest `|θ|`, and grows as many at random, which
    begin at 0. `fraction` is α.

    Source: Mocanu et al. 2018; the decay of the fraction is RigL's.
    """

    fraction: float = 0.3
    end: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.fraction <= 1, "fraction", self.fraction, "it is the share of weights to drop, in (0, 1]")
        require(0 < self.end <= 1, "end", self.end, "it is a share of the training, in (0, 1]")

    def check(self, density: float, scope: Scope | None) -> None:
        way_out = "random masks cannot be ranked globally; give a rule such as erk"
        require(scope != "global", "rule of layer densities", scope, way_out)

    def start(self, layers: Mapping[str, Layer], density: float, scope: Scope | None, floor: float, seed: int) -> Masks:
        return random_masks(layers, density, scope, floor, seed)

    def due(self, step: int, steps: int) -> bool:
        return step % self.every == 0 and 0 < step < at_share(self.end, steps)

    def update(self, now: Update) -> Mapping[str, Tensor]:
        fraction = exchange_fraction(self.fraction, now.step / at_share(self.end, now.steps))
        return exchange_all(now, fraction, now.masks, by_gradient=self.grows_by_gradient)


@settings
class RigLSettings(SETSettings):
    """RigL: as SET, but each layer grows the pruned weights whose gradient `|g|` is highest.

    An update takes the place of an optimizer step. The gradient is that of all weights of the batch, which a training
    under masks computes anyway; on hardware that skips pruned weights it would cost a dense backward pass per update.

    Source: Evci et al. 2020, "Rigging the lottery".
    """

    grows_by_gradient: ClassVar[bool] = True
    skips_step: ClassVar[bool] = True


@settings
class GraNetSettings(SparseTraining):
    """GraNet: gradual pruning with regrowth.

    Every `every` steps the weights of lowest `|θ|` are removed as in GMP, from `start_density` at the share `begin` of the
    training to ρ at `end`; then each layer drops the fraction `α_t = α/2·(1 + cos(πt/T))` of what is left and grows as
    many by `|g|`. From `end` on the count stays and the exchange goes on to the end of the training.

    Source: Liu et al. 2021, "Sparse training via boosting pruning plasticity", and the authors' code.
    """

    fraction: float = 0.5
    start_density: float = 1.0
    begin: float = 0.0
    end: float = 0.5
    grows_by_gradient: ClassVar[bool] = True
    gradual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.fraction <= 1, "fraction", self.fraction, "it is the share of weights to drop, in (0, 1]")
        require(0 < self.start_density <= 1, "start_density", self.start_density, "it must lie in (0, 1]")
        shares = f"begin and end are shares of the training, 0 <= begin < end <= 1; end is {self.end}"
        require(0 <= self.begin < self.end <= 1, "begin", self.begin, shares)

    def check(self, density: float, scope: Scope | None) -> None:
        least = f"it is less than the density at the end, {density:g}; give more"
        require(self.start_density > density - 1e-9, "start_density", self.start_density, least)

    def start(self, layers: Mapping[str, Layer], density: float, scope: Scope | None, floor: float, seed: int) -> Masks:
        if self.start_density == 1:
            return super().start(layers, density, scope, floor, seed)
        return random_masks(layers, self.start_density, None, floor, seed)

    def due(self, step: int, steps: int) -> bool:
        first, last = at_share(self.begin, steps), at_share(self.end, steps)
        return step == last or (step > first and (step - first) % self.every == 0 and step < steps)

    def update(self, now: Update) -> Mapping[str, Tensor]:
        first, last = at_share(self.begin, now.steps), at_share(self.end, now.steps)
        masks = now.masks
        if now.step <= last:
            progress = (now.step - first) / max(last - first, 1)
            masks = prune_gradually(now, progress, self.start_density)
        return exchange_all(now, exchange_fraction(self.fraction, now.step / now.steps), masks, by_gradient=True)


def exchange_all(now: Update, fraction: float, masks: Mapping[str, Tensor], *, by_gradient: bool) -> dict[str, Tensor]:
    """`exchange` in each layer, growing by `|g|` or at random; a weight without a gradient counts as 0."""
    generator = make_generator(now.seed, "growth", now.step)
    changed = {}
    for name, mask in masks.items():
        weight, gradient = now.weights[name], now.gradients[name]
        if not by_gradient:
            growth = torch.rand(mask.shape, generator=generator).to(weight.device)
        else:
            growth = torch.zeros_like(weight) if gradient is None else gradient.abs()
        changed[name] = exchange(weight, mask.to(weight.device), growth, fraction)
    return changed


SET = Method(SETSettings, search, continues=True, check=check_task, check_length=check_length)
RIGL = Method(RigLSettings, search, continues=True, check=check_task, check_length=check_length)
GRANET = Method(GraNetSettings, search, continues=True, check=check_task, check_length=check_length)
