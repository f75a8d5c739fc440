"""What a network costs to run: parameters, FLOPs, and latency as measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autosparse.masks.layers import unwrap
from autosparse.network.observe import undisturbed
from autosparse.network.running import forward
from autosparse.network.size import layer_macs


@dataclass(frozen=True)
class Cost:
    """Parameters and FLOPs (two for each multiply and add) of one example.

    `stored` are all parameters (a shared one counts once), `nonzero` those that the masks keep; `flops` is what dense kernels
    compute, `effective_flops` the share of it that is with weights kept, which only special kernels could save.
    """

    stored: int
    nonzero: int
    flops: int
    effective_flops: int


def cost(model: nn.Module, masks: Mapping[str, Tensor] | None, example: Tensor) -> Cost:
    """The cost of `model` for the one image in `example`.

    FLOPs are those of `torch.utils.flop_counter` (products and convolutions; no norms, activations or biases), with attention
    as plain products. `effective = flops − 2·Σ_l (1 − d_l)·N_l·p_l`: `N_l` weights of density `d_l` at `p_l` output positions
    (input positions of a transposed convolution). The model stays as it is.

    Raises:
        AutoSparseError: the model does not take the example.
    """
    model, kept = unwrap(model), masks or {}
    macs = layer_macs(model, example)
    counter = FlopCounterMode(display=False)
    with undisturbed(model), torch.no_grad(), counter:
        forward(model, {}, example)
    flops = counter.get_total_flops()
    pruned = {name: mask.numel() - int(mask.sum()) for name, mask in kept.items()}
    saved = sum(2 * macs[name] * count / kept[name].numel() for name, count in pruned.items() if name in macs)
    stored = sum(p.numel() for p in model.parameters())
    return Cost(stored, stored - sum(pruned.values()), flops, round(flops - saved))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """`count` threads of torch on the CPU; afterwards as many as before."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, np.ndarray]:
    """Seconds of each side in each round; which goes first changes from round to round.

    Two rounds to warm up come before. No round begins after `seconds`, but for the first five.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for index in range(rounds + _WARM_UP):
        if index >= _WARM_UP + _FEWEST and time.perf_counter() - began > seconds:
            break
        names = list(sides)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values[_WARM_UP:]) for name, values in times.items()}


_WARM_UP, _FEWEST = 2, 5
