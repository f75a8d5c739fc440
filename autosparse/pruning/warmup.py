"""Signals of a short training, after which the network is what it was before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure, require, settings, suggest
from autosparse.masks.layers import Layer, unwrap
from autosparse.masks.mask import Masks, masked
from autosparse.masks.random import derive
from autosparse.network.signals import WARMUP_SIGNALS, Signals, parse_warmup
from autosparse.training.data import ImageData
from autosparse.training.loop import fabric_for, put_back, rewound
from autosparse.training.recipe import Recipe, steps_per_epoch
from autosparse.training.train import train


@settings
class WarmupSettings:
    """How the network is trained for its warm-up signals.

    `orders`: data orders that the signals are averaged over; each is a warm-up of its own. `lr`: the constant learning
    rate; `None` is a fifth of the recipe's, since large steps blur what the signed growth of weights tells.
    """

    orders: int = 1
    lr: float | None = None

    def __post_init__(self) -> None:
        require(self.orders >= 1, "warmup.orders", self.orders, "give at least 1")
        require(self.lr is None or 0 < self.lr < math.inf, "warmup.lr", self.lr, "give a positive number")


@dataclass(frozen=True)
class Warm:
    """What a warm-up gave: its signals, and its cost in epochs (of all orders together) and in seconds."""

    signals: Signals
    epochs: float
    seconds: float


def order_seeds(seed: int, orders: int) -> list[int]:
    """The seeds of a warm-up's trainings.

    None is `seed` itself: the training that the mask is for draws from that, and signals are to hold for any data order.
    """
    return [derive(seed, "warm-up order", i) for i in range(orders)]


def warmup(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    names: Iterable[str],
    settings: WarmupSettings | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    masks: Masks | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Warm:
    """Measure the named signals of a short training of `model` from `θ₀ ⊙ m`, and rewind it to what it was.

    A name carries its horizon in epochs, as in `"displacement@0.5"`: t steps, at least one. `"warm_weight"`: `θ_t`.
    `"displacement"`: `θ_t − θ₀ ⊙ m`. `"accumulated_gradient"`: `Σ_{s<t} g_s`, of pruned positions too. Each is the mean
    over the data orders, in its weight's shape, on the device that `model` was on. One training per order serves all
    horizons; it has the recipe's optimizer, momentum, batch size and precision, but a constant learning rate and no
    weight decay, which would count as displacement. Test and validation images are not looked at.

    Args:
        layers: prunable weights by name, from `autosparse.masks.layers.prunable_layers(model)`.
        data: images and labels, from `autosparse.training.data.load_data("cifar10")`.
        recipe: optimizer, learning rate and length.
        names: `"warm_weight@T"`, `"displacement@T"`, `"accumulated_gradient@T"`, any number of each.
        masks: weights outside stay zero.
        on_epoch: called with each new row of the trainings' histories.

    Raises:
        AutoSparseError: no name or an unknown one, a horizon that is not positive, or data that do not fit the model.
        AutoSparseFailure: the warm-up diverged.

    Source: our own, after K-starts and dissipating gradients (`search.kstarts`, `search.dissipating`).
    """
    clock = time.perf_counter()
    settings = settings or WarmupSettings()
    per_epoch = steps_per_epoch(data, recipe.batch_size)
    wanted = _horizons(names, per_epoch)
    last = max(steps for _, steps in wanted.values())
    rate = recipe.lr / 5 if settings.lr is None else settings.lr
    short = replace(recipe, steps=last, lr=rate, schedule="constant", warmup=0.0, weight_decay=0.0)
    model = unwrap(model)
    home = next(model.parameters()).device
    place = fabric_for(device).device
    data = data.to(place).without("validation", "test")
    with rewound(model) as origin:
        try:
            model.zero_grad(set_to_none=True)  # else those to be given back would move to the device too
            model.to(place)
            own = {n: p for n, p in model.named_parameters() if n in layers}
            start = {n: origin[n].to(place) for n in own}
            if masks is not None:
                start = {n: masked(w, masks[n]) for n, w in start.items()}
            sums = {name: {n: torch.zeros_like(w) for n, w in start.items()} for name in wanted}
            for order in order_seeds(seed, settings.orders):
                put_back(model, origin)
                sums_of_order = _Accumulator(own, start, wanted, sums)
                train(
                    model,
                    data,
                    short,
                    masks=masks,
                    seed=order,
                    device=device,
                    validate=on_epoch is not None,
                    on_epoch=on_epoch,
                    on_gradient=sums_of_order,
                )
                sums_of_order.take(last)
        finally:
            model.to(home)
    for tensors in sums.values():
        for n in tensors:
            tensors[n] = tensors[n].div_(settings.orders).to(home)
            if not torch.isfinite(tensors[n]).all():
                raise AutoSparseFailure(
                    f"the warm-up diverged: the weights of {n!r} are not finite after {last} steps (lr {rate:g}); "
                    "set a lower warmup.lr (for generate: signals.warmup_lr)"
                )
    return Warm(sums, last * settings.orders / per_epoch, time.perf_counter() - clock)


def _horizons(names: Iterable[str], per_epoch: int) -> dict[str, tuple[str, int]]:
    """What each name measures, and after how many steps."""
    wanted = {}
    for name in names:
        parsed = parse_warmup(name)
        if parsed is None:
            known = [f"{signal}@1" for signal in WARMUP_SIGNALS]
            raise AutoSparseError(f"signal of a warm-up is {name!r}: {suggest(name, known)}")
        wanted[name] = (parsed[0], max(1, round(parsed[1] * per_epoch)))
    if not wanted:
        raise AutoSparseError("names of the warm-up's signals are empty: give at least one, such as 'displacement@1'")
    return wanted


class _Accumulator:
    """What one warm-up adds to the sums of the signals; called before each optimizer step with the steps done."""

    def __init__(
        self,
        own: Mapping[str, nn.Parameter],
        start: Mapping[str, Tensor],
        wanted: Mapping[str, tuple[str, int]],
        sums: Signals,
    ) -> None:
        self.own, self.start, self.wanted, self.sums = own, start, wanted, sums
        self.until = max((steps for signal, steps in wanted.values() if signal == "accumulated_gradient"), default=0)
        self.gradients = {n: torch.zeros_like(w) for n, w in start.items()} if self.until else {}

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        self.take(step)
        if step < self.until:
            for n, total in self.gradients.items():
                gradient = self.own[n].grad
                if gradient is not None:
                    total += gradient

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Add the signals whose horizon is `step`."""
        for name, (signal, steps) in self.wanted.items():
            if steps != step:
                continue
            for n, total in self.sums[name].items():
                if signal == "accumulated_gradient":
                    total += self.gradients[n]
                elif signal == "displacement":
                    total += self.own[n] - self.start[n]
                else:
                    total += self.own[n]
