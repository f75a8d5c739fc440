"""AutoSparse learns which weights to keep before training.

>>> import torch, autosparse
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
>>> masks = autosparse.prune(model, sparsity=0.5, criterion="magnitude", example_input=torch.ones(1, 8))
>>> masks.kept
80
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autosparse.errors import AutoSparseError, AutoSparseFailure
    from autosparse.experiment.tracking import load_scorer
    from autosparse.front import prune
    from autosparse.masks.mask import Masks
    from autosparse.masks.selection import NM, Block, Channel
    from autosparse.trainability.prepare import prepare

__version__ = "0.1.0"

_WHERE = {
    "AutoSparseError": "autosparse.errors",
    "AutoSparseFailure": "autosparse.errors",
    "Block": "autosparse.masks.selection",
    "Channel": "autosparse.masks.selection",
    "Masks": "autosparse.masks.mask",
    "NM": "autosparse.masks.selection",
    "load_scorer": "autosparse.experiment.tracking",
    "prepare": "autosparse.trainability.prepare",
    "prune": "autosparse.front",
}

__all__ = ["NM", "AutoSparseError", "AutoSparseFailure", "Block", "Channel", "Masks", "load_scorer", "prepare", "prune"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `autosparse --help` must not wait for torch."""
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'autosparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
