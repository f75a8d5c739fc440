"""Records of one gradual run: each weight is labelled by the density at which it fell, at the cost of two trainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autosparse.errors import require, settings
from autosparse.masks.layers import Layer
from autosparse.masks.schedule import check_density
from autosparse.search.gmp import GMPSettings
from autosparse.search.sparsify import MaskSchedule


@settings
class GradualSettings:
    """One run of gradual magnitude pruning (`search.gmp`), recorded in place of IRP.

    `density`: what is left at the end. `updates`: removals, from the share `begin` of the training to `end`; a training
    of few steps has fewer. Each is a round of the record, so a weight's survival counts the removals that it survived;
    the densities lie on the axis of IRP's records. The last row of the record is the ticket's training from `θ₀`, the
    others have no accuracy. The cost is two trainings, where IRP of R rounds takes R + 1.
    """

    density: float = 0.01
    updates: int = 100
    begin: float = 0.05
    end: float = 0.7

    def __post_init__(self) -> None:
        check_density(self.density, "gradual.density")
        require(1 <= self.updates <= 255, "gradual.updates", self.updates, "it must lie in 1 … 255")
        GMPSettings(begin=self.begin, end=self.end)  # checks them

    def schedule(self, layers: Mapping[str, Layer], steps: int) -> MaskSchedule:
        """The masks of a training of so many steps."""
        window = max(1, round((self.end - self.begin) * steps))
        every = max(1, -(-window // self.updates))
        return MaskSchedule(GMPSettings(every=every, begin=self.begin, end=self.end), dict(layers), self.density)


def survival_of(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """How many removals each weight survived, uint8, from the state of a `Sparsifier`, and the densities `1 = ρ_0 … ρ_{R−1}`
    before each of the R removals."""
    rounds = len(state["path"])
    survival = {}
    for name, removed in state["removed_in"].items():
        number = removed.numpy().astype(np.int64)
        survival[name] = np.where(number == 0, rounds, number - 1).astype(np.uint8)
    return survival, np.array([1.0, *state["path"][:-1]])
