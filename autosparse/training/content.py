"""What went into a result, known by its content: images and networks, not the names under which they lie."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from torch import nn

from autosparse.files import fingerprint, sha256
from autosparse.masks.layers import unwrap
from autosparse.training.data import ImageData
from autosparse.training.models import ModelSettings, build_model

_OURS = ("torch", "autosparse")  # whose modules are told apart by their settings


def of_network(model: nn.Module, source: bool = True) -> str:
    """Fingerprint of all parameters and buffers, of the modules and of their settings, as `print(model)` shows them.

    With `source` also of the files that define its own modules, those that are not of torch or AutoSparse: the weights and
    names of a network may stay while what it computes changes.
    """
    inner = unwrap(model)
    structure = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(inner))
    foreign = {type(m) for m in inner.modules() if type(m).__module__.partition(".")[0] not in _OURS}
    sources = sorted({found for c in foreign if (found := _source(c))}) if source else []
    return fingerprint(structure, {**dict(inner.named_parameters()), **dict(inner.named_buffers())}, sources)


def of_start(model: nn.Module, data: ImageData) -> str:
    """Fingerprint of what a training begins with: the images and the initial network."""
    return fingerprint(data.content, of_network(model))


def of_settings(model: ModelSettings, data: ImageData, seed: int) -> str:
    """`of_start` of the network that `build_model` makes."""
    return of_start(build_model(model, data, seed), data)


def _source(of: type) -> str | None:
    try:
        path = inspect.getsourcefile(of)
    except (OSError, TypeError):  # typed in at a prompt
        return None
    return sha256(Path(path)) if path is not None and Path(path).is_file() else None
