"""A distribution of tasks: networks, data sets, seeds and recipes, drawn for a corpus of records."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import torch

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import prunable_layers
from autosparse.masks.random import make_python_generator
from autosparse.network.signals import SignalSettings
from autosparse.network.size import size
from autosparse.search.irp import IRPSettings
from autosparse.training.cells import CellNet
from autosparse.training.data import ImageData, shared_data
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe
from autosparse.training.tasks import TaskSettings
from data_gen.gradual import GradualSettings
from data_gen.runs import Run

_WIDTHS = (4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
_ATTEMPTS = 200
_GOLDEN = (math.sqrt(5) - 1) / 2


def sample_tasks(
    settings: TaskSettings,
    recipe: Recipe,
    irp: IRPSettings,
    signals: SignalSettings,
    gradual: GradualSettings | None = None,
) -> list[Run]:
    """`count` different architectures, drawn one after another, each with all of its seeds.

    A pure function of its arguments, whose first runs are those of a smaller `count`. An architecture is drawn without
    its width, which then brings it as near as can be to a log-uniform number of prunable weights; one out of bounds is
    drawn again. Cells take turns by their shares, so that a small corpus has all that are not rare. Networks without
    norm train with a fifth of the learning rate and gradients clipped at norm 1, attention and MLPs with AdamW.

    Raises:
        AutoSparseError: a data set cannot be read, or no network keeps the bounds.
    """
    start = make_python_generator(settings.seed, "tasks").random()
    found: list[Run] = []
    known: set[str] = set()
    for index in range(settings.count):
        rng = make_python_generator(settings.seed, "task", index)
        data = settings.data[index % len(settings.data)]
        cell = _at_share(settings.cells, (start + index * _GOLDEN) % 1)
        model = _model(rng, cell, settings, shared_data(data, "cpu"), known)
        known.add(_key(model))
        factor = math.exp(rng.uniform(*map(math.log, settings.lr)))
        own = _recipe(recipe, model, factor)
        found += [Run(model, data, own, irp, signals, seed, gradual) for seed in range(settings.seeds)]
    return found


def _at_share(shares: Mapping[str, float], at: float) -> str:
    """The name whose stretch of the summed shares holds `at` in [0, 1)."""
    names = [name for name, share in shares.items() if share > 0]
    ends = list(itertools.accumulate(shares[name] for name in names))
    return names[min(bisect.bisect_right(ends, at * ends[-1]), len(names) - 1)]


def _key(model: ModelSettings) -> str:
    return json.dumps([model.name, model.width, dict(model.options)], sort_keys=True)


def _model(rng: Random, cell: str, settings: TaskSettings, images: ImageData, known: set[str]) -> ModelSettings:
    """A network of this cell that is new and keeps the bounds."""
    for _ in range(_ATTEMPTS):
        target = math.exp(rng.uniform(math.log(settings.min_weights), math.log(settings.max_weights)))
        options = _options(rng, cell, images.image_size)
        width, weights = _nearest(options, target, images)
        model = ModelSettings("cellnet", width, options)
        in_bounds = settings.min_weights <= weights <= settings.max_weights
        if in_bounds and _key(model) not in known and macs(model, images) <= settings.max_macs:
            return model
    raise AutoSparseError(
        f"tasks.cells holds {cell!r}: none of {_ATTEMPTS} networks of {settings.min_weights} … {settings.max_weights} "
        f"weights and at most {settings.max_macs} MACs on images of {images.image_size} pixels was a new one; "
        "widen the bounds, or give this cell the share 0"
    )


def _nearest(options: dict[str, Any], target: float, images: ImageData) -> tuple[int, int]:
    """The width that brings the network nearest to `target` prunable weights, and their number."""

    @functools.cache
    def weights(width: int) -> int:
        network = _empty(ModelSettings("cellnet", width, options), images)
        return sum(layer.numel for layer in prunable_layers(network).values())

    widths = [width for width in _WIDTHS if width % options.get("heads", 1) == 0]
    place = bisect.bisect_left(widths, target, key=weights)
    near = widths[max(0, place - 1) : place + 1]
    width = min(near, key=lambda w: abs(math.log(weights(w) / target)))
    return width, weights(width)


def _empty(model: ModelSettings, images: ImageData) -> torch.nn.Module:
    """The network without storage."""
    with torch.device("meta"):
        return CellNet(images.channels, images.classes, images.image_size, model.width or 16, **model.options)


def macs(model: ModelSettings, images: ImageData) -> int:
    """Multiply-accumulates of one image in the layers with weights."""
    side = images.image_size
    return size(_empty(model, images), torch.zeros(2, images.channels, side, side)).macs


def _options(rng: Random, cell: str, image_size: int) -> dict[str, Any]:
    """Options of `CellNet` but for the width: 2 to about 25 layers with weights."""
    pick = rng.choice
    chosen: dict[str, Any] = {"cell": cell}
    if cell == "attention":
        side = pick([s for s in (2, 4) if image_size // s >= 3])
        chosen |= {"blocks": (pick((1, 1, 2, 2, 3, 4)),), "norm": "layer", "stem_stride": side, "heads": pick((2, 4))}
        return chosen | {"activation": pick(("gelu", "relu"))}
    if cell in ("mlp", "resmlp"):
        norm = pick(("batch", "none", "layer") if cell == "mlp" else ("batch", "layer", "none"))
        depth = pick((1, 2, 3, 4)) if cell == "mlp" else pick((2, 3, 4, 6, 8))
        return chosen | {"blocks": (depth,), "norm": norm, "activation": pick(("relu", "relu", "gelu", "silu"))}
    stages = pick((1, 2, 3, 3, 4) if cell == "plain" else (1, 2, 3, 3))
    per_stage = {"plain": (1, 1, 2, 2, 3, 4, 6), "dense": (1, 2, 3, 4, 6), "preact": (1, 1, 2, 3, 4)}
    repeats = per_stage.get(cell, (1, 1, 2, 2, 3, 4))
    even = rng.random() < 0.5
    count = pick(repeats)
    chosen["blocks"] = tuple(count if even else pick(repeats) for _ in range(stages))
    chosen["growth"] = pick((1.0, 1.5, 2.0, 2.0))
    chosen["kernel"] = pick((3, 3, 3, 5))
    chosen["pool"] = rng.choices(("stride", "max", "avg"), (25, 60, 15) if cell == "plain" else (70, 15, 15))[0]
    chosen["norm"] = rng.choices(("batch", "group", "layer", "none"), (65, 10, 10, 15))[0]
    chosen["activation"] = pick(("relu", "relu", "relu", "gelu", "silu"))
    chosen["stem_stride"] = pick((1, 1, 1, 2)) if image_size >= 12 else 1
    if chosen["norm"] == "none" and cell in ("plain", "inverted"):  # deep chains would fade out, or not start to train
        chosen["blocks"] = tuple(min(count, 3 if cell == "plain" else 2) for count in chosen["blocks"])
        chosen["activation"] = "relu"
    return chosen


def _recipe(recipe: Recipe, model: ModelSettings, factor: float) -> Recipe:
    """What this network trains with, given a recipe for convolutional networks with norm."""
    own = replace(recipe, lr=recipe.lr * factor)
    if recipe.optimizer == "adamw":
        return own
    if model.options["cell"] in ("attention", "mlp", "resmlp"):
        return replace(own, optimizer="adamw", lr=0.02 * own.lr, weight_decay=0.01)
    if model.options["norm"] == "none":
        return replace(own, lr=0.2 * own.lr, clip_norm=1.0)
    return own
