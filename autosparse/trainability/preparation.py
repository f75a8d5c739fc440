"""What changing the weights that stay gives back."""

from __future__ import annotations

from dataclasses import dataclass

from autosparse.masks.mask import Masks


@dataclass(frozen=True)
class PreparedLayer:
    """One prunable weight before and after: `norm` is the name of the norm layer that takes its output, if one does;
    `lipschitz_*` estimate the Lipschitz constant of the layer and its norm; `note` says what was left alone, and why."""

    name: str
    norm: str | None
    lipschitz_before: float
    lipschitz_after: float
    note: str = ""


@dataclass(frozen=True)
class Preparation:
    """The network was changed in place; `masks` are those to train it under: the ones given, or, for an initialization that
    chooses its own positions at their layer densities (`"eoi"`), others."""

    how: str
    masks: Masks
    layers: tuple[PreparedLayer, ...]
