"""Measure signals on a network, and leave it as it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, memory_watched, require, settings, suggest
from autosparse.masks.layers import Layer, unwrap
from autosparse.masks.mask import masked
from autosparse.network import saliency
from autosparse.network.flow import rescaled_flow, synaptic_flow, without_flow
from autosparse.network.linearize import Traced
from autosparse.network.onednn import safe_convolutions
from autosparse.network.running import Batch, Loss, batch_size, cross_entropy

Signals = dict[str, dict[str, Tensor]]  # signal -> parameter name -> tensor of the parameter's shape

FROM_BATCHES = ("gradient", "hessian_gradient", "meta_gradient")  # these need inputs with their targets
DATA_FREE = ("flow", "no_flow", "rescaled_flow", "ntk_sensitivity")  # these take an example input instead
SIGNALS = ("weight", "dense_weight", *FROM_BATCHES, *DATA_FREE)
WARMUP_SIGNALS = ("warm_weight", "displacement", "accumulated_gradient")  # of a short training: pruning/warmup.py
FIXED = ("dense_weight", "no_flow")  # these do not depend on the mask: measured once, whatever the steps


@settings
class SignalSettings:
    """Which signals of `θ₀` are recorded, and how many training batches their gradients take.

    The names may be those of a warm-up, with its horizon in epochs (`"displacement@0.5"`); `warmup_orders` and
    `warmup_lr` are its `orders` and `lr` (see `pruning/warmup.py`).
    """

    names: tuple[str, ...] = ("weight", "gradient")
    n_batches: int = 8
    batch_size: int = 128
    warmup_orders: int = 1
    warmup_lr: float | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            if parse_warmup(name) is None and name not in SIGNALS:
                known = (*SIGNALS, *(f"{s}@1" for s in WARMUP_SIGNALS))
                raise AutoSparseError(f"signal is {name!r}: {suggest(name, known)}")
        require(self.n_batches >= 1, "signals.n_batches", self.n_batches, "give at least 1")
        require(self.batch_size >= 1, "signals.batch_size", self.batch_size, "give at least 1")
        require(self.warmup_orders >= 1, "signals.warmup_orders", self.warmup_orders, "give at least 1")
        rate = self.warmup_lr
        require(rate is None or 0 < rate < math.inf, "signals.warmup_lr", rate, "give a positive number")

    def warmup_names(self) -> list[str]:
        return [name for name in self.names if parse_warmup(name) is not None]


def parse_warmup(name: str) -> tuple[str, float] | None:
    """`"displacement@0.5"` -> `("displacement", 0.5)`: signal and horizon in epochs; `None` for any other signal.

    Raises:
        AutoSparseError: the signal is one of a warm-up, but its horizon is missing or no positive number.
    """
    signal = name.partition("@")[0]
    return (signal, parse_horizon(name, "signal")) if signal in WARMUP_SIGNALS else None


def parse_horizon(name: str, what: str) -> float:
    """The epochs after the `@` of a signal's or criterion's name.

    Raises:
        AutoSparseError: there is no positive number.
    """
    stem, _, text = name.partition("@")
    try:
        epochs = float(text)
    except ValueError:
        epochs = math.nan
    require(0 < epochs < math.inf, what, name, f"give its horizon, a positive number of epochs, as in '{stem}@0.5'")
    return epochs


def measure(
    model: nn.Module,
    layers: Mapping[str, Layer],
    names: Sequence[str],
    *,
    batches: Sequence[Batch] = (),
    example_input: Any = None,
    masks: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Signals:
    """Measure the named signals of `model` on `θ ⊙ m`; every tensor has its weight's shape, on the model's device.

    `"weight"`: `θ ⊙ m`. `"dense_weight"`: `θ`, whatever the mask. `"gradient"`: `g = ∂L/∂(θ ⊙ m)`, the mean over all
    samples of `batches`, pruned positions too, with norm layers (only these) in train mode. `"hessian_gradient"`,
    `"meta_gradient"`, `"ntk_sensitivity"`: see `saliency.py`. `"flow"`, `"rescaled_flow"`: synaptic flow (see
    `flow.py`), float64. `"no_flow"`: boolean, the weights that synaptic flow cannot reach whatever their values.
    Parameters, buffers, gradients, modes, hooks and RNG stay as they were.

    Args:
        example_input: what data-free signals take (only its shape counts), or a `Traced` of it; default the first batch's
            inputs.
        loss: `loss(outputs, targets)`, a mean over the batch; cross-entropy by default.
        seed: what dropout-like layers of a model, and signals that redraw inputs and weights, draw from.

    Raises:
        AutoSparseError: an unknown signal, a gradient without batches, flow without an input, or batches that the model
            cannot take.
    """
    for name in names:
        if parse_warmup(name) is not None:
            raise AutoSparseError(
                f"this criterion needs {name!r}, a signal of a warm-up: give signals=warmup(…).signals, "
                "or use `autosparse prune` or the benchmark, which run it"
            )
        if name not in SIGNALS:
            raise AutoSparseError(f"signal is {name!r}: known are {', '.join(SIGNALS)}")
    model = unwrap(model)
    with safe_convolutions(model), memory_watched(f"measuring {', '.join(names)} of {type(model).__name__}"):
        return _measured(model, layers, names, batches, example_input, masks, loss, seed)


def _measured(
    model: nn.Module,
    layers: Mapping[str, Layer],
    names: Sequence[str],
    batches: Sequence[Batch],
    example_input: Any,
    masks: Mapping[str, Tensor] | None,
    loss: Loss | None,
    seed: int,
) -> Signals:
    own = dict(model.named_parameters())
    weights = {}
    if {"weight", *FROM_BATCHES} & set(names):
        weights = {n: own[n].detach() if masks is None else masked(own[n].detach(), masks[n]) for n in layers}
    signals: Signals = {}
    if "weight" in names:
        signals["weight"] = {n: w.clone() if masks is None else w for n, w in weights.items()}
    if "dense_weight" in names:
        signals["dense_weight"] = {n: own[n].detach().clone() for n in layers}
    if set(FROM_BATCHES) & set(names):
        if not batches:
            raise AutoSparseError("this criterion needs gradients: give batches, pairs of (inputs, targets)")
        chosen = loss or cross_entropy
        if "gradient" in names:
            signals["gradient"] = saliency.gradient(model, weights, batches, chosen, seed)
        if "hessian_gradient" in names:
            signals["hessian_gradient"] = saliency.hessian_gradient(model, weights, batches, chosen, seed, masks)
        if "meta_gradient" in names:
            signals["meta_gradient"] = saliency.meta_gradient(model, weights, batches, chosen, seed, masks)
    if set(DATA_FREE) & set(names):
        example = batches[0][0] if example_input is None and batches else example_input
        given = example.example if isinstance(example, Traced) else example
        if example is None:
            raise AutoSparseError("this criterion runs the network: give example_input, or batches")
        if "flow" in names:
            signals["flow"] = synaptic_flow(model, layers, example, masks)
        if "rescaled_flow" in names:
            signals["rescaled_flow"] = rescaled_flow(model, layers, example, masks)
        if "ntk_sensitivity" in names:
            dense = {n: own[n].detach() for n in layers}
            signals["ntk_sensitivity"] = saliency.ntk_sensitivity(model, dense, given, seed, masks)
        if "no_flow" in names:
            found = without_flow(model, layers, example)
            signals["no_flow"] = {
                n: found[n] if n in found else torch.zeros_like(own[n], dtype=torch.bool) for n in layers
            }
    return signals


def images_seen(names: Iterable[str], batches: Sequence[Batch], example_input: Any = None) -> int:
    """What measuring the signals once costs, in images that pass forward and backward (a forward is a third of it).

    A gradient passes each image once; a Hessian–gradient product three times, as does a step that is differentiated
    through: its gradient, and a second backward, twice as long as the first; for NTK-SAP each random input goes through
    two networks, and once forward before. Synaptic flow sees no images.
    """
    sizes = [batch_size(batch) for batch in batches] or [0]
    inner = [sizes[step % len(sizes)] for step in range(saliency.INNER_STEPS + 1)]
    seen = {
        "gradient": sum(sizes),
        "hessian_gradient": 3 * sum(sizes),
        "meta_gradient": 3 * sum(inner[:-1]) + inner[-1],
        "ntk_sensitivity": round(saliency.NTK_DRAWS * batch_size((example_input, None)) * 7 / 3),
    }
    return sum(seen.get(name, 0) for name in names)
