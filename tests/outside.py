"""What users add from outside of the package: `outside:NAME` in the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from autosparse import Context, Preset
from autosparse.pruning.criteria import HandMade


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
