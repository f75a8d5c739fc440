"""Structured, trainability-preserving pruning (TPP): filters are pushed out by a growing penalty before they are removed.

A filter that is removed at once takes with it what the others relied on. TPP trains on with a penalty that decorrelates
the filters P that will go from those that stay, and shrinks them, their biases and the γ and β of their channels, ever more
strongly; when they are removed, hardly anything changes, and what is left trains as well as before.

Source: Wang & Fu 2023, "Trainability Preserving Neural Pruning"; the growing penalty is that of Wang et al. 2021 (GReg).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, require, settings
from autosparse.masks.layers import Layer, prunable_layers, unwrap
from autosparse.network.coupling import coupled_filters
from autosparse.network.graph import trace
from autosparse.trainability.shrink import Removal
from autosparse.training.data import ImageData
from autosparse.training.loop import Trained
from autosparse.training.recipe import Recipe
from autosparse.training.train import train

Ratio = float | Mapping[str, float]


@settings
class TPPSettings:
    """How filters are pushed out; the defaults are the published ones for CIFAR (ImageNet: `tau` 5).

    The penalty's factor grows over `ramp` steps, `λ = min(ceiling, delta·step/tau)`, and stays as it is for `stabilise`
    more; all at the constant learning rate `lr`. `weight`: of the decorrelation beside λ. A shorter ramp needs a larger
    `delta` to end at the same λ: `delta·ramp/tau` is 1 with the defaults.
    """

    ramp: int = 100_000
    stabilise: int = 10_000
    lr: float = 1e-3
    delta: float = 1e-4
    tau: float = 10.0
    ceiling: float = 1.0
    weight: float = 1000.0

    def __post_init__(self) -> None:
        require(self.ramp >= 1, "tpp.ramp", self.ramp, "give at least 1 step")
        require(self.stabilise >= 0, "tpp.stabilise", self.stabilise, "it must not be negative")
        for key in ("lr", "delta", "tau", "ceiling"):
            value = getattr(self, key)
            require(value > 0 and math.isfinite(value), f"tpp.{key}", value, "give a positive number")
        require(self.weight >= 0, "tpp.weight", self.weight, "it must not be negative")

    def strength(self, step: int) -> float:
        """λ of a step in `0 … ramp + stabilise − 1`."""
        return min(self.ceiling, self.delta * min(step, self.ramp) / self.tau)

    def recipe(self, other: Recipe) -> Recipe:
        """The recipe of these steps: batches, optimizer and precision of another one."""
        return replace(
            other, steps=self.ramp + self.stabilise, lr=self.lr, schedule="constant", warmup=0.0, label_smoothing=0.0
        )


def gram_penalty(weight: Tensor, pruned: Tensor) -> Tensor:
    """How much the filters that will go correlate with one another and with those that stay.

    `R = (1/N²) Σ_{i∈P or j∈P} G_ij²` with `G = W Wᵀ`: pairs of filters that both stay do not count.

    Args:
        weight: `(N, …)`, one filter per row.
        pruned: `(N,)`, True for the filters P.
    """
    return (_counted(weight.flatten(1), pruned) ** 2).sum() / len(weight) ** 2


def gram_gradient(weight: Tensor, pruned: Tensor) -> Tensor:
    """`∂R/∂W = (4/N²) (G ⊙ C) W` of `gram_penalty`, where `C_ij` is 1 if i or j is in P: filters that stay are moved too."""
    rows = weight.flatten(1)
    return (_counted(rows, pruned) @ rows * (4 / len(rows) ** 2)).view(weight.shape)


def _counted(rows: Tensor, pruned: Tensor) -> Tensor:
    """`G ⊙ C`."""
    return (rows @ rows.T).masked_fill(~(pruned[:, None] | pruned[None, :]), 0)


def free_filters(model: nn.Module, example_input: Any) -> tuple[str, ...]:
    """The convolutions whose filters can be removed alone, but for those that see the input.

    Of a ResNet each block's convolutions but the last, of a VGG all but the first: what TPP prunes by default.
    """
    model = unwrap(model)
    layers, coupled, last, depth = _known(model, example_input)
    bound = {*last, *(name for group in coupled for name in group)}
    return tuple(
        name
        for name, layer in layers.items()
        if layer.kind == "conv"
        and layer.groups == 1
        and layer.shape[0] > 1
        and name not in bound
        and depth.get(name, 0) > 1
    )


def filter_densities(model: nn.Module, example_input: Any, ratio: Ratio) -> dict[str, float]:
    """The share of filters that each layer keeps when the `⌈ratio·N⌉` of N go: a scope for `prune(…, granularity="channel")`.

    Args:
        example_input: as for `trace`.
        ratio: in (0, 1), of the layers of `free_filters`; or shell patterns on weight names with the ratio of each, of which
            the last that fits counts. Filters that a residual sum couples can go only together: a ratio of one such layer is
            that of all.

    Raises:
        AutoSparseError: a ratio out of range, no layer to prune, a pattern that fits nothing or the model's outputs, layers
            that are coupled and have different ratios.
    """
    model = unwrap(model)
    layers, coupled, last, _ = _known(model, example_input)
    if isinstance(ratio, Mapping):
        ratios = _by_pattern(ratio, [name for name in layers if name not in last], coupled)
    else:
        ratios = dict.fromkeys(free_filters(model, example_input), ratio)
        if not ratios:
            raise AutoSparseError(
                f"{type(model).__name__} has no convolution whose filters can go alone: give ratios by name, "
                f"such as {{'{next(iter(layers))}': {ratio:g}}}"
            )
    for name, value in ratios.items():
        require(0 < value < 1, f"ratio of {name!r}", value, "it is the share of filters that go, in (0, 1)")
    found = dict.fromkeys(layers, 1.0)
    for name, value in ratios.items():
        filters = layers[name].shape[layers[name].out_dim]
        found[name] = 1 - min(math.ceil(value * filters - 1e-9), filters - 1) / filters
    return found


def _by_pattern(ratio: Mapping[str, float], names: list[str], coupled: tuple[tuple[str, ...], ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pattern, value in ratio.items():
        fitting = fnmatch.filter(names, pattern)
        require(bool(fitting), "ratio pattern", pattern, f"no layer but the last fits; the names are like {names[0]!r}")
        found |= dict.fromkeys(fitting, value)
    for group in coupled:
        given = {found[name]: name for name in group if name in found}
        if len(given) > 1:
            (a, first), (b, second) = list(given.items())[:2]
            raise AutoSparseError(
                f"ratio of {first!r} is {a:g} and of {second!r} {b:g}: their filters go only together, give them the same"
            )
        found |= dict.fromkeys(group if given else (), next(iter(given), 0.0))
    return found


def _known(
    model: nn.Module, example: Any
) -> tuple[dict[str, Layer], tuple[tuple[str, ...], ...], tuple[str, ...], dict[str, int]]:
    """Layers, coupled groups of them, those that give the outputs, and depths."""
    graph = trace(model, example)
    layers = prunable_layers(model, operands=graph.operands)
    return layers, coupled_filters(model, layers, example), graph.last_layers(), graph.depth()


def push_out(
    model: nn.Module,
    data: ImageData,
    removal: Removal,
    chosen: TPPSettings,
    recipe: Recipe,
    *,
    penalise: bool = True,
    seed: int = 0,
    device: str = "auto",
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Trained:
    """Train `model` in place while the filters of `removal` are pushed out; it has all of them still afterwards.

    The loss is `CE + weight·λ(t)·Σ R` over the layers that lose filters, see `gram_penalty`; after its gradient, `λ(t)·θ` is
    added to that of all that will be gone: pruned filters, their biases, γ and β.

    Args:
        removal: what `remove` gave for this model and its masks.
        recipe: see `TPPSettings.recipe`.
        penalise: `False` trains the same number of steps without the penalty: the baseline.
        seed, device, checkpoint, on_epoch: as for `train`, as is what is raised.

    Source: Wang & Fu 2023.
    """
    own = dict(unwrap(model).named_parameters())

    def add_gradients(step: int) -> None:
        strength = chosen.strength(step)
        if strength > 0:
            _penalise(own, removal, strength, chosen.weight)

    return train(
        model,
        data,
        chosen.recipe(recipe),
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
        on_gradient=add_gradients if penalise else None,
    )


@torch.no_grad()
def _penalise(parameters: Mapping[str, Tensor], removal: Removal, strength: float, weight: float) -> None:
    """Add the gradient of the penalty to the gradients that are there."""
    for name, (dim, indices) in removal.gone.items():
        parameter = parameters.get(name)  # of what is gone some are buffers
        if parameter is None or parameter.grad is None:
            continue
        gone = torch.tensor(indices, device=parameter.device)
        if name in removal.removed:
            filters = parameter.movedim(dim, 0)
            pruned = torch.zeros(len(filters), dtype=torch.bool, device=parameter.device)
            pruned[gone] = True
            gradient = gram_gradient(filters, pruned).movedim(0, dim)
            parameter.grad.add_(gradient, alpha=weight * strength)
        parameter.grad.index_add_(dim, gone, parameter.index_select(dim, gone), alpha=strength)
