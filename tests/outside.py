"""What users add from outside of the package: `outside:NAME` in the tests."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from autosparse import Context, Method, Preset, ScorerKind, SearchResult, prune, train
from autosparse.pruning.criteria import HandMade
from autosparse.scorers.mlp import Standard, by_rows


def largest(signals: dict[str, dict[str, Tensor]], context: Context) -> dict[str, Tensor]:
    return {name: signals["weight"][name].abs() for name in context.layers}


largest.signals = ("weight",)  # type: ignore[attr-defined]


def saliency(signals: dict[str, dict[str, Tensor]], context: Context) -> dict[str, Tensor]:
    return {name: (signals["weight"][name] * signals["gradient"][name]).abs() for name in context.layers}


saliency.signals = ("weight", "gradient")  # type: ignore[attr-defined]

preset = Preset(HandMade("mine", saliency, ("weight", "gradient"), 1), scope="erk", steps=2)


def unnamed(signals: object, context: object) -> None:
    """No `signals`: it cannot be a criterion."""


def stripes(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images of two classes: horizontal and vertical stripes."""
    labels = np.arange(40) % 2
    images = np.zeros((40, 8, 8, 1), np.uint8)
    images[labels == 0, ::2] = 255
    images[labels == 1, :, ::2] = 255
    return images[:30], labels[:30], images[30:], labels[30:]


def no_images(root: Path) -> list[int]:
    return [1, 2]


@dataclass(frozen=True)
class ShortSettings:
    epochs: int = 1


def short(
    model: Any, layers: Any, data: Any, recipe: Any, settings: ShortSettings, density: float, **common: Any
) -> SearchResult:
    """The largest weights after a short training."""
    trained = deepcopy(model)
    steps = settings.epochs * -(-len(data.train) // recipe.batch_size)
    result = train(trained, data, recipe, seed=common["seed"], device=common["device"], stop_step=steps)
    example = data.normalise(data.train.images[:2])
    return SearchResult(prune(trained, 1 - density, "magnitude", example_input=example), result.epochs, result.seconds)


method = Method(ShortSettings, short)


class Straight(nn.Module):
    """One Linear layer on the features, times a constant."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.inputs, self.linear, self.scale = Standard(inputs), nn.Linear(inputs, outputs), scale

    def forward(self, rows: Tensor) -> Tensor:
        return self.scale * self.linear(self.inputs(rows))

    def outputs(self, view: Any) -> Any:
        return by_rows(self, view)


class StraightKind(ScorerKind):
    def build(self, features: Any, outputs: int, options: Any) -> nn.Module:
        return Straight(len(features), outputs, **options)


kind = StraightKind()
