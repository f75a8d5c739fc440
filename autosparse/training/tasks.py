"""Which distribution of tasks a corpus is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field

from autosparse.errors import require, settings, suggest
from autosparse.training.cells import CELLS
from autosparse.training.data import DataSettings

_CELLS = {
    "plain": 0.30,
    "basic": 0.25,
    "preact": 0.08,
    "bottleneck": 0.06,
    "inverted": 0.07,
    "dense": 0.08,
    "attention": 0.08,
    "mlp": 0.05,
    "resmlp": 0.03,
}


@settings
class TaskSettings:
    """Architectures × data sets × seeds × recipes.

    `count` architectures, each with `seeds` seeds (0, 1, …) on one of the `data` sets, which take turns: one that is
    listed twice gets twice as many. `cells`: the share of each cell of `CellNet`. `min_weights` … `max_weights` prunable
    weights, log-uniform; at most `max_macs` multiply-accumulates per image. `lr`: bounds of a log-uniform factor on the
    recipe's learning rate. `seed` draws all of it; a larger `count` draws the same tasks and more.
    """

    count: int = 50
    seeds: int = 2
    data: tuple[DataSettings, ...] = (DataSettings("cifar10", image_size=16),)
    cells: Mapping[str, float] = field(default_factory=lambda: dict(_CELLS))
    min_weights: int = 5_000
    max_weights: int = 100_000
    max_macs: int = 4_000_000
    lr: tuple[float, float] = (0.5, 1.5)
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("count", "seeds", "min_weights", "max_macs"):
            require(getattr(self, key) >= 1, f"tasks.{key}", getattr(self, key), "give at least 1")
        require(len(self.data) > 0, "tasks.data", list(self.data), "give at least one data set")
        for cell, share in self.cells.items():
            require(cell in CELLS, "tasks.cells", cell, suggest(cell, CELLS))
            require(0 <= share < math.inf, f"tasks.cells.{cell}", share, "give a share, 0 or more")
        require(sum(self.cells.values()) > 0, "tasks.cells", dict(self.cells), "give a cell with a share above 0")
        bounds = self.min_weights, self.max_weights
        require(2 * bounds[0] <= bounds[1], "tasks.max_weights", bounds[1], "give at least twice tasks.min_weights")
        low, high = self.lr
        require(0 < low <= high < math.inf, "tasks.lr", list(self.lr), "give two factors, the lower one first")
