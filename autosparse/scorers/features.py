"""Signals + graph -> what a scorer sees of each weight, normalised so that it transfers between networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autosparse.errors import AutoSparseError, suggest
from autosparse.masks.layers import Layer
from autosparse.network.graph import Graph
from autosparse.network.signals import Signals

VERSION = 1
_BINS = 2048  # of the histogram behind weight_rank
_EPS = 1e-3  # under this many rms a magnitude counts as nothing

# What each feature is; `l` is the weight's layer, `rms_l` over that layer's weights, `rms` over all of them.
FEATURES: dict[str, str] = {
    "weight": "θ / rms_l(θ)",
    "log_abs_weight": "log(|θ| / rms_l(θ) + 1e-3)",
    "weight_rank": "share of the layer's weights with a smaller |θ|",
    "gradient": "g / rms_l(g)",
    "log_abs_gradient": "log(|g| / rms_l(g) + 1e-3)",
    "growth": "−g·sign(θ) / rms_l(g): the signed change of |θ| in a small step",
    "log_saliency": "log(|θ·g| / rms_l(θ·g) + 1e-3)",
    "log_abs_weight_network": "log(|θ| / rms(θ) + 1e-3)",
    "log_saliency_network": "log(|θ·g| / rms(θ·g) + 1e-3)",
    "layer_weight_scale": "log(rms_l(θ) / rms(θ)), at least −10",
    "layer_gradient_scale": "log(rms_l(g) / rms(g)), at least −10",
    "layer_size": "log(N_l / N)",
    "layer_fan_in": "log fan-in",
    "layer_fan_out": "log fan-out",
    "layer_kernel": "log of the kernel's area, 0 for matrices",
    "layer_depth": "depth in the graph, 0 for the first layer, 1 for the last",
    "layer_first": "1 for a layer that sees the input",
    "layer_last": "1 for the deepest layers",
    "raw_weight": "θ",
    "raw_gradient": "g",
}
DEFAULT = tuple(name for name in FEATURES if not name.startswith("raw_"))
_OF_GRADIENT = {
    "gradient",
    "log_abs_gradient",
    "growth",
    "log_saliency",
    "log_saliency_network",
    "layer_gradient_scale",
    "raw_gradient",
}


@dataclass(frozen=True)
class LayerContext:
    """What all weights of one layer share: scales, the distribution of `|θ|`, and the layer's place in the network."""

    weight_rms: float
    gradient_rms: float
    saliency_rms: float
    cdf: Tensor  # share of the layer's weights under each of the _BINS edges of |θ|
    largest: float
    constants: Mapping[str, float]
    network_weight_rms: float
    network_saliency_rms: float


def check_features(names: Sequence[str]) -> tuple[str, ...]:
    """The names, once they are known to be features.

    Raises:
        AutoSparseError: an unknown feature, or none.
    """
    if not names:
        raise AutoSparseError("features are empty: leave them out for the default ones")
    for name in names:
        if name not in FEATURES:
            raise AutoSparseError(f"feature is {name!r}: {suggest(name, FEATURES)}")
    return tuple(names)


def signals_of(names: Sequence[str]) -> tuple[str, ...]:
    """The signals that these features are made of."""
    return ("weight", "gradient") if _OF_GRADIENT & set(names) else ("weight",)


def depths(layers: Mapping[str, Layer], graph: Graph | None) -> dict[str, float]:
    """Each layer's depth from 0 (first) to 1 (deepest): by the graph, or by order where there is none."""
    found = {} if graph is None else graph.depth()
    if not all(name in found for name in layers):
        found = {name: index + 1 for index, name in enumerate(layers)}
    low, high = min(found[n] for n in layers), max(found[n] for n in layers)
    return {name: (found[name] - low) / max(high - low, 1) for name in layers}


def contexts(
    layers: Mapping[str, Layer],
    signals: Signals,
    graph: Graph | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, LayerContext]:
    """The context of every layer; with `masks` over the weights that are left.

    Raises:
        AutoSparseError: a signal is not finite.
    """
    sums: dict[str, tuple[int, float, float, float]] = {}
    for name in layers:
        weight = signals["weight"][name]
        gradient = signals["gradient"][name] if "gradient" in signals else None
        kept = None if masks is None else masks[name].to(weight.device)
        sums[name] = (
            weight.numel() if kept is None else int(kept.sum()),
            _square_sum(weight, None, kept),
            _square_sum(gradient, None, kept),
            _square_sum(weight, gradient, kept) if gradient is not None else 0.0,
        )
        for signal, square_sum in zip(("weight", "gradient"), sums[name][1:3], strict=True):
            if not math.isfinite(square_sum):
                raise AutoSparseError(
                    f"signal {signal!r} of {name!r} is not finite: the weights or batches hold NaN or inf"
                )
    network = [_rms(sum(s[k] for s in sums.values()), sum(s[0] for s in sums.values())) for k in (1, 2, 3)]
    total = sum(layer.numel for layer in layers.values())
    place = depths(layers, graph)
    found = {}
    for name, layer in layers.items():
        weight_rms, gradient_rms, saliency_rms = (_rms(sums[name][k], sums[name][0]) for k in (1, 2, 3))
        weight = signals["weight"][name]
        cdf, largest = _distribution(weight, None if masks is None else masks[name].to(weight.device))
        found[name] = LayerContext(
            weight_rms=weight_rms,
            gradient_rms=gradient_rms,
            saliency_rms=saliency_rms,
            cdf=cdf,
            largest=largest,
            network_weight_rms=network[0],
            network_saliency_rms=network[2],
            constants={
                "layer_weight_scale": max(math.log(weight_rms / network[0]), -10.0),
                "layer_gradient_scale": max(math.log(gradient_rms / network[1]), -10.0),
                "layer_size": math.log(layer.numel / total),
                "layer_fan_in": math.log(layer.fan_in),
                "layer_fan_out": math.log(max(layer.fan_out, 1)),
                "layer_kernel": math.log(max(math.prod(layer.kernel), 1)),
                "layer_depth": place[name],
                "layer_first": float(place[name] == 0),
                "layer_last": float(place[name] == 1),
            },
        )
    return found


def _square_sum(a: Tensor | None, b: Tensor | None, kept: Tensor | None) -> float:
    if a is None:
        return 0.0
    product = a if b is None else a * b
    if kept is not None:
        product = product * kept
    return float(torch.linalg.vector_norm(product, dtype=torch.float64)) ** 2


def _rms(square_sum: float, count: int) -> float:
    return max(math.sqrt(square_sum / max(count, 1)), 1e-30)


def _distribution(weight: Tensor, kept: Tensor | None) -> tuple[Tensor, float]:
    """Cumulative share of `|θ|` over equal bins up to the largest: a rank without a sort, linear in weights."""
    magnitude = (weight if kept is None else weight[kept]).detach().float().abs().flatten()
    largest = float(magnitude.max()) if magnitude.numel() else 0.0
    if largest == 0:
        return torch.zeros(_BINS + 1, device=weight.device), 1.0
    counts = torch.zeros(_BINS, device=weight.device)
    for part in magnitude.split(1 << 20):
        counts += torch.histc(part, bins=_BINS, min=0.0, max=largest)
    cdf = torch.cat([counts.new_zeros(1), counts.cumsum(0) / counts.sum()])
    return cdf, largest


def rows(names: Sequence[str], weight: Tensor, gradient: Tensor | None, context: LayerContext) -> Tensor:
    """Features `(n, len(names))` float32 of n weights of one layer, given flat."""
    n = weight.numel()
    weight = weight.float()
    out = torch.empty(n, len(names), dtype=torch.float32, device=weight.device)
    magnitude = weight.abs()
    slope = torch.zeros_like(weight) if gradient is None else gradient.float()
    saliency = magnitude * slope.abs()
    for column, name in enumerate(names):
        if name in context.constants:
            out[:, column] = context.constants[name]
        elif name == "weight":
            torch.mul(weight, 1 / context.weight_rms, out=out[:, column])
        elif name == "log_abs_weight":
            out[:, column] = (magnitude / context.weight_rms + _EPS).log_()
        elif name == "weight_rank":
            out[:, column] = _rank(magnitude, context)
        elif name == "gradient":
            torch.mul(slope, 1 / context.gradient_rms, out=out[:, column])
        elif name == "log_abs_gradient":
            out[:, column] = (slope.abs() / context.gradient_rms + _EPS).log_()
        elif name == "growth":
            out[:, column] = slope * weight.sign() * (-1 / context.gradient_rms)
        elif name == "log_saliency":
            out[:, column] = (saliency / context.saliency_rms + _EPS).log_()
        elif name == "log_abs_weight_network":
            out[:, column] = (magnitude / context.network_weight_rms + _EPS).log_()
        elif name == "log_saliency_network":
            out[:, column] = (saliency / context.network_saliency_rms + _EPS).log_()
        elif name == "raw_weight":
            out[:, column] = weight
        else:
            out[:, column] = slope
    return out


def _rank(magnitude: Tensor, context: LayerContext) -> Tensor:
    """Linear interpolation in the layer's cumulative distribution."""
    at = (magnitude * (_BINS / context.largest)).clamp_(max=_BINS)
    low = at.floor().clamp_(max=_BINS - 1)
    index = low.long()
    return torch.lerp(context.cdf[index], context.cdf[index + 1], at - low)
