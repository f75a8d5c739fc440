"""How a network is trained: optimizer, learning rate, length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from autosparse.errors import AutoSparseError, require, settings

if TYPE_CHECKING:
    from autosparse.training.data import ImageData

OPTIMIZERS = ("sgd", "adamw")
LR_SCHEDULES = ("multistep", "cosine", "onecycle", "constant")
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


@settings
class Recipe:
    """How a network is trained.

    Length: `epochs`, or `steps` optimizer steps if given, of `batch_size` images; an incomplete last batch is dropped.
    `optimizer`: `"sgd"` with `momentum` (Nesterov's if `nesterov`) or `"adamw"`; `weight_decay` is on all parameters.
    `lr`: the highest learning rate. `label_smoothing`: of the cross-entropy, in [0, 1). `channels_last`: memory format.
    `schedule` of the learning rate over the whole length: `"multistep"` (× `gamma` at each of `milestones`, shares of the
    length), `"cosine"` (to 0), `"onecycle"` (linear up to `lr`, then linear to 0), `"constant"`; `warmup` is the share of
    the length with a linear rise (`"onecycle"`: 0.3 if 0). `clip_norm`: largest gradient norm, over the kept weights.
    `precision`: `"fp32"` or `"bf16"` (autocast). `compile`: the training steps go through `torch.compile`, once per architecture in a
    process, whatever the seed, masks or round; `"graphs"`: as CUDA graphs too, for networks so small that the GPU waits
    for Python (on a CPU the same as `true`; not yet run on a GPU).
    """

    epochs: int = 160
    steps: int | None = None
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "multistep"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool | str = False

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "recipe.epochs", self.epochs, "give at least 1")
        require(self.steps is None or self.steps >= 1, "recipe.steps", self.steps, "give at least 1")
        require(self.batch_size >= 1, "recipe.batch_size", self.batch_size, "give at least 1")
        require(self.optimizer in OPTIMIZERS, "recipe.optimizer", self.optimizer, f"known: {', '.join(OPTIMIZERS)}")
        require(self.lr > 0 and math.isfinite(self.lr), "recipe.lr", self.lr, "give a positive number")
        require(0 <= self.momentum < 1, "recipe.momentum", self.momentum, "it must lie in [0, 1)")
        require(self.weight_decay >= 0, "recipe.weight_decay", self.weight_decay, "it must not be negative")
        require(self.schedule in LR_SCHEDULES, "recipe.schedule", self.schedule, f"known: {', '.join(LR_SCHEDULES)}")
        require(
            all(0 < m < 1 for m in self.milestones),
            "recipe.milestones",
            self.milestones,
            "they are shares of the training's length, such as 0.5 and 0.75",
        )
        require(0 <= self.warmup < 1, "recipe.warmup", self.warmup, "it is a share of the length, in [0, 1)")
        require(0 <= self.label_smoothing < 1, "recipe.label_smoothing", self.label_smoothing, "it must be in [0, 1)")
        require(self.clip_norm is None or self.clip_norm > 0, "recipe.clip_norm", self.clip_norm, "it must be positive")
        require(self.precision in PRECISIONS, "recipe.precision", self.precision, f"known: {', '.join(PRECISIONS)}")
        require(self.compile in (False, True, "graphs"), "recipe.compile", self.compile, "give true, false or graphs")

    def length(self, data: ImageData) -> int:
        """Optimizer steps of one training."""
        return self.steps if self.steps is not None else self.epochs * steps_per_epoch(data, self.batch_size)


def steps_per_epoch(data: ImageData, batch_size: int) -> int:
    return max(1, len(data.train) // batch_size)


def learning_rate(recipe: Recipe, step: int, length: int) -> float:
    """Learning rate of `step` in `0 … length − 1`."""
    at = step / length
    rise = recipe.warmup or (0.3 if recipe.schedule == "onecycle" else 0.0)
    if at < rise:
        return recipe.lr * (step + 1) / (rise * length + 1)
    if recipe.schedule == "multistep":
        return recipe.lr * recipe.gamma ** sum(at >= m for m in recipe.milestones)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (at - rise) / (1 - rise)))
    if recipe.schedule == "onecycle":
        return recipe.lr * (1 - at) / (1 - rise)
    return recipe.lr


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise AutoSparseError(f"{type(model).__name__} has nothing to train: let some parameters require gradients")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
