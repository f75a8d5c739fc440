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
    from autosparse.api import prune
    from autosparse.errors import AutoSparseError, AutoSparseFailure
    from autosparse.masks.granularity import NM, Block, Channel
    from autosparse.masks.layers import Layer
    from autosparse.masks.mask import Masks
    from autosparse.network.diagnostics import diagnose
    from autosparse.pruning.criteria import Context, Criterion, Preset
    from autosparse.pruning.warmup import warmup
    from autosparse.scorers.kinds import ScorerKind
    from autosparse.scorers.loading import load_scorer
    from autosparse.search.irp import IRPSettings, irp
    from autosparse.search.method import Method, SearchResult
    from autosparse.search.sparsify import SparseTraining, Sparsifier, sparsify
    from autosparse.trainability.export import export
    from autosparse.trainability.prepare import prepare
    from autosparse.trainability.shrink import shrink
    from autosparse.training.recipe import Recipe
    from autosparse.training.train import train

__version__ = "0.1.0"

_WHERE = {
    "AutoSparseError": "autosparse.errors",
    "AutoSparseFailure": "autosparse.errors",
    "Block": "autosparse.masks.granularity",
    "Channel": "autosparse.masks.granularity",
    "Context": "autosparse.pruning.criteria",
    "Criterion": "autosparse.pruning.criteria",
    "IRPSettings": "autosparse.search.irp",
    "Layer": "autosparse.masks.layers",
    "Masks": "autosparse.masks.mask",
    "Method": "autosparse.search.method",
    "NM": "autosparse.masks.granularity",
    "Preset": "autosparse.pruning.criteria",
    "Recipe": "autosparse.training.recipe",
    "ScorerKind": "autosparse.scorers.kinds",
    "SearchResult": "autosparse.search.method",
    "SparseTraining": "autosparse.search.sparsify",
    "Sparsifier": "autosparse.search.sparsify",
    "diagnose": "autosparse.network.diagnostics",
    "export": "autosparse.trainability.export",
    "irp": "autosparse.search.irp",
    "load_scorer": "autosparse.scorers.loading",
    "prepare": "autosparse.trainability.prepare",
    "prune": "autosparse.api",
    "shrink": "autosparse.trainability.shrink",
    "sparsify": "autosparse.search.sparsify",
    "train": "autosparse.training.train",
    "warmup": "autosparse.pruning.warmup",
}

__all__ = [
    "NM",
    "AutoSparseError",
    "AutoSparseFailure",
    "Block",
    "Channel",
    "Context",
    "Criterion",
    "IRPSettings",
    "Layer",
    "Masks",
    "Method",
    "Preset",
    "Recipe",
    "ScorerKind",
    "SearchResult",
    "SparseTraining",
    "Sparsifier",
    "diagnose",
    "export",
    "irp",
    "load_scorer",
    "prepare",
    "prune",
    "shrink",
    "sparsify",
    "train",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `autosparse --help` must not wait for torch."""
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'autosparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
