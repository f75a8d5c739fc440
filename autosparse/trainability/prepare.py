"""One door to everything that changes the weights that stay, before training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from autosparse.errors import AutoSparseError, require, suggest
from autosparse.masks.mask import Masks
from autosparse.trainability.orthogonal import eoi, isometry
from autosparse.trainability.preparation import Preparation
from autosparse.trainability.repair import rei, repair
from autosparse.trainability.signs import signs

# Each is called with keywords: model, masks, example_input, seed if it draws, and its own options.
PREPARATIONS: dict[str, Callable[..., Preparation]] = {
    "rei": rei,
    "repair": repair,
    "eoi": eoi,
    "isometry": isometry,
    "signs": signs,
}


def prepare(
    model: nn.Module, masks: Masks | None, how: str = "repair", *, example_input: Any, seed: int = 0, **options: Any
) -> Preparation:
    """Change the weights and norm layers of `model` in place, so that it trains well under `masks`.

    Args:
        model: the network before training.
        masks: as `prune` returns them, not yet applied. `None` for the dense network.
        how: `"rei"`, `"repair"`, `"eoi"`, `"isometry"` or `"signs"`.
        example_input: what the model takes, for the trace.
        seed: for preparations that draw random numbers.
        options: of the preparation: `mode` of ReI and RePaIR (`"weights"`, `"gamma"`, `"both"`); `gain` of EOI and
            isometry; `steps` of isometry.

    Returns:
        What was done to each layer, and the masks to train under.

    Raises:
        AutoSparseError: an unknown preparation or option, or an error of the preparation.

    Examples:
        >>> import torch, autosparse
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> images = torch.randn(2, 3, 8, 8)
        >>> masks = autosparse.prune(model, sparsity=0.5, criterion="magnitude", example_input=images)
        >>> autosparse.prepare(model, masks, "repair", example_input=images).layers[0].norm
        '1'
    """
    check_preparation(how)
    run = PREPARATIONS[how]
    known = inspect.signature(run).parameters.keys() - {"model", "masks", "example_input"}
    for option in options:
        if option not in known:
            raise AutoSparseError(f"option {option!r} of {how}: {suggest(option, known - {'seed'})}")
    drawn = {"seed": seed} if "seed" in known else {}
    return run(model=model, masks=masks, example_input=example_input, **drawn, **options)


def check_preparation(how: str | None) -> None:
    """Raise `AutoSparseError` unless `how` is a preparation, or none."""
    require(how is None or how in PREPARATIONS, "prepare", how, suggest(str(how), PREPARATIONS))
