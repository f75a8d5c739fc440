"""Signals + graph -> what a scorer sees of each weight, channel and layer, normalised so that it transfers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autosparse.errors import AutoSparseError, suggest
from autosparse.masks.layers import Layer
from autosparse.network.graph import Graph
from autosparse.network.signals import Signals, parse_horizon

VERSION = 2
CHUNK = 1 << 14  # weights whose features are made at a time: what is made of them stays in the cache
_BINS = 2048  # of the histogram behind weight_rank
_EPS = 1e-3  # under this many rms a magnitude counts as nothing
_FLOW_EPS = 1e-6  # flows of one network differ by orders of magnitude
_LEAST = -10.0  # of log scales
_NOTHING = 1e-30  # scales are at least this: those of layers of zeros too


@dataclass(frozen=True)
class Feature:
    """One number per weight: what it is, and the signals that it is made of."""

    meaning: str
    signals: tuple[str, ...]


# `l` is the weight's layer; `rms_l` is over that layer's weights, `rms_c` over those of its channel, `rms` over all.
# `d` is the displacement after T epochs of warm-up, `f` the synaptic flow.
_W, _G, _F, _D = ("weight",), ("weight", "gradient"), ("weight", "flow"), ("weight", "displacement@T")
FEATURES: dict[str, Feature] = {
    "weight": Feature("θ / rms_l(θ)", _W),
    "log_abs_weight": Feature("log(|θ| / rms_l(θ) + 1e-3)", _W),
    "weight_rank": Feature("share of the layer's weights with a smaller |θ|", _W),
    "gradient": Feature("g / rms_l(g)", _G),
    "log_abs_gradient": Feature("log(|g| / rms_l(g) + 1e-3)", _G),
    "growth": Feature("−g·sign(θ) / rms_l(g): the signed change of |θ| in a small step", _G),
    "log_saliency": Feature("log(|θ·g| / rms_l(θ·g) + 1e-3)", _G),
    "log_abs_weight_network": Feature("log(|θ| / rms(θ) + 1e-3)", _W),
    "log_saliency_network": Feature("log(|θ·g| / rms(θ·g) + 1e-3)", _G),
    "out_weight_scale": Feature("log(rms_c(θ) / rms_l(θ)) over the weight's output channel, at least −10", _W),
    "in_weight_scale": Feature("log(rms_c(θ) / rms_l(θ)) over the weight's input channel, at least −10", _W),
    "out_saliency_scale": Feature("log(rms_c(θ·g) / rms_l(θ·g)) over the output channel, at least −10", _G),
    "in_saliency_scale": Feature("log(rms_c(θ·g) / rms_l(θ·g)) over the input channel, at least −10", _G),
    "layer_weight_scale": Feature("log(rms_l(θ) / rms(θ)), at least −10", _W),
    "layer_gradient_scale": Feature("log(rms_l(g) / rms(g)), at least −10", _G),
    "layer_size": Feature("log(N_l / N)", _W),
    "layer_fan_in": Feature("log fan-in", _W),
    "layer_fan_out": Feature("log fan-out", _W),
    "layer_erk": Feature("log((c_in + c_out + Σ k) / N_l), k the kernel's sides: the logarithm of ERK densities", _W),
    "layer_kernel": Feature("log of the kernel's area, 0 for matrices", _W),
    "layer_stride": Feature("log of the stride", _W),
    "layer_groups": Feature("log of the number of groups", _W),
    "layer_depth": Feature("depth in the graph, 0 for the first layer, 1 for the last", _W),
    "layer_first": Feature("1 for a layer that sees the input", _W),
    "layer_last": Feature("1 for the deepest layers", _W),
    "layer_adds": Feature("1 for a layer whose output goes into a sum, as in residual blocks", _W),
    "log_flow": Feature("log(f / rms_l(f) + 1e-3)", _F),
    "log_flow_network": Feature("log(f / rms(f) + 1e-6)", _F),
    "layer_flow_scale": Feature("log(rms_l(f) / rms(f)), at least −10", _F),
    "growth@T": Feature("sign(θ)·d / rms_l(d): the signed growth of |θ| in the warm-up", _D),
    "log_movement@T": Feature("log(|d| / rms_l(d) + 1e-3)", _D),
    "log_warm_weight@T": Feature("log(|θ + d| / rms_l(θ) + 1e-3)", _D),
    "log_warm_weight_network@T": Feature("log(|θ + d| / rms(θ) + 1e-3)", _D),
    "out_movement_scale@T": Feature("log(rms_c(d) / rms_l(d)) over the output channel, at least −10", _D),
    "in_movement_scale@T": Feature("log(rms_c(d) / rms_l(d)) over the input channel, at least −10", _D),
    "layer_movement_scale@T": Feature("log(rms_l(d) / rms(d)), at least −10", _D),
    "layer_relative_movement@T": Feature("log(rms_l(d) / rms_l(θ)), at least −10", _D),
    "raw_weight": Feature("θ", _W),
    "raw_gradient": Feature("g", _G),
}
_EARLY = tuple(name for name in FEATURES if name.endswith("@T"))
_FLOW = ("log_flow", "log_flow_network", "layer_flow_scale")
DEFAULT = tuple(n for n in FEATURES if not n.startswith("raw_") and n not in (*_EARLY, *_FLOW))
# Names that stand for several features; `early@1` is those of a warm-up of one epoch.
GROUPS: dict[str, tuple[str, ...]] = {
    "default": DEFAULT,
    "flow": _FLOW,
    "early@T": _EARLY,
    "raw": ("raw_weight", "raw_gradient"),
}


def check_features(names: Sequence[str]) -> tuple[str, ...]:
    """The features that the names of features and groups stand for, once each.

    Raises:
        AutoSparseError: an unknown name, a horizon that is missing, or no name.
    """
    if not names:
        raise AutoSparseError("features are empty: leave them out for the default ones")
    found: dict[str, None] = {}
    for name in names:
        stem, sign, horizon = name.partition("@")
        general = f"{stem}@T" if sign else stem
        if general not in FEATURES and general not in GROUPS:
            early = f"{stem}@T" in FEATURES or f"{stem}@T" in GROUPS
            hint = f"give its horizon in epochs, as in '{stem}@1'" if early else suggest(name, [*FEATURES, *GROUPS])
            raise AutoSparseError(f"feature is {name!r}: {hint}")
        if sign:
            parse_horizon(name, "feature")
        for feature in GROUPS.get(general, (general,)):
            found[feature.replace("@T", f"@{horizon}")] = None
    return tuple(found)


def signals_of(names: Sequence[str]) -> tuple[str, ...]:
    """The signals that these features are made of, the weights first."""
    found = {"weight": None}
    for name in names:
        stem, sign, horizon = name.partition("@")
        for signal in FEATURES[f"{stem}@T" if sign else stem].signals:
            found[signal.replace("@T", f"@{horizon}")] = None
    return tuple(found)


def of_layers(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the features that all weights of a layer share."""
    return tuple(name for name in names if name.startswith("layer_"))


def of_weights(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the features that differ within a layer."""
    return tuple(name for name in names if not name.startswith("layer_"))


def depths(layers: Mapping[str, Layer], graph: Graph | None) -> dict[str, float]:
    """Each layer's depth from 0 (first) to 1 (deepest): by the graph, or by order where there is none."""
    found = {} if graph is None else graph.depth()
    if not all(name in found for name in layers):
        found = {name: index + 1 for index, name in enumerate(layers)}
    low, high = min(found[n] for n in layers), max(found[n] for n in layers)
    return {name: (found[name] - low) / max(high - low, 1) for name in layers}


# -- channels -----------------------------------------------------------------------------------------------------------


def channels(layer: Layer, side: str) -> int:
    """Channels on the `"out"` or `"in"` side of a layer, over all groups."""
    return layer.out_features if side == "out" else layer.in_features


def channel_index(layer: Layer, side: str) -> Tensor:
    """The channel of every weight, int64, in a shape that broadcasts to the layer's."""
    dim = layer.out_dim if side == "out" else layer.in_dim
    ones = [1] * len(layer.shape)
    own = torch.arange(layer.shape[dim]).view([*ones[:dim], -1, *ones[dim + 1 :]])
    if layer.groups == 1 or dim == 0:
        return own
    per_group = layer.shape[0] // layer.groups  # with groups, dimension 0 holds the channels of all of them
    group = torch.arange(layer.shape[0]).div(per_group, rounding_mode="floor").view([-1, *ones[1:]])
    return group * layer.shape[dim] + own


def channel_sums(values: Tensor, layer: Layer, side: str, start: int = 0) -> tuple[Tensor, Tensor]:
    """Sums per channel of `values`, which belong to rows `start …` of the layer's first dimension.

    Args:
        values: `(rows, *layer.shape[1:], F)`.

    Returns:
        Channels `(C',)` and sums `(C', F)` to be added to them; with groups a channel may come several times.
    """
    dim = layer.out_dim if side == "out" else layer.in_dim
    rest = [d for d in range(len(layer.shape)) if d != dim]
    rows = len(values)
    if dim == 0:
        return torch.arange(start, start + rows, device=values.device), values.sum(rest)
    if layer.groups == 1:
        return torch.arange(layer.shape[dim], device=values.device), values.sum(rest)
    index = channel_index(layer, side)[start : start + rows].flatten().to(values.device)
    inner = [d for d in rest if d != 0]
    return index, (values.sum(inner) if inner else values).flatten(0, 1)


def _mean_square(values: Tensor, layer: Layer, side: str, kept: Tensor | None) -> Tensor:
    """Mean square per channel, in a shape that broadcasts to the layer's."""
    if kept is not None:
        values = values * kept
    both = torch.stack([values.square(), torch.ones_like(values) if kept is None else kept.to(values)], dim=-1)
    index, sums = channel_sums(both, layer, side)
    total = sums.new_zeros(channels(layer, side), 2).index_add_(0, index, sums)
    return (total[:, 0] / total[:, 1].clamp(min=1))[channel_index(layer, side).to(values.device)]


# -- scales -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerContext:
    """What the weights of one layer share.

    `scales` and `network`: rms of each signal, and of `"saliency"` (θ·g), over the layer and over the network.
    `channels`: log rms of a channel over that of the layer, for `"out_weight"`, `"in_saliency"`, …, in shapes that
    broadcast to the layer's. `constants`: the layer's own features. `cdf`: the share of weights under each of the
    edges of `|θ|` up to `largest`.
    """

    scales: Mapping[str, float]
    network: Mapping[str, float]
    channels: Mapping[str, Tensor]
    constants: Mapping[str, float]
    cdf: Tensor
    largest: float


def contexts(
    layers: Mapping[str, Layer],
    signals: Signals,
    names: Sequence[str],
    graph: Graph | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, LayerContext]:
    """The context of every layer that these features take; with `masks` over the weights that are left.

    Raises:
        AutoSparseError: a signal is not finite.
    """
    wanted = signals_of(names)
    squares: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for name, layer in layers.items():
        kept = None if masks is None else masks[name].to(signals["weight"][name].device)
        counts[name] = layer.numel if kept is None else int(kept.sum())
        squares[name] = {signal: _square_sum(signals[signal][name], kept) for signal in wanted}
        for signal, square in squares[name].items():
            if not math.isfinite(square):
                raise AutoSparseError(
                    f"signal {signal!r} of {name!r} is not finite: the weights or batches hold NaN or inf"
                )
        if "gradient" in wanted:
            squares[name]["saliency"] = _square_sum(signals["weight"][name] * signals["gradient"][name], kept)
    total = sum(counts.values())
    network = {key: _rms(sum(s[key] for s in squares.values()), total) for key in next(iter(squares.values()))}
    place = depths(layers, graph)
    strides = {} if graph is None else graph.stride()
    adding = set() if graph is None else {a for (a, _), kinds in graph.links().items() if "add" in kinds}
    weights = sum(layer.numel for layer in layers.values())
    found = {}
    for name, layer in layers.items():
        kept = None if masks is None else masks[name].to(signals["weight"][name].device)
        scales = {key: _rms(square, counts[name]) for key, square in squares[name].items()}
        cdf, largest = (torch.zeros(1), 1.0)
        if "weight_rank" in names:
            cdf, largest = _distribution(signals["weight"][name], kept)
        constants = {
            "layer_size": math.log(layer.numel / weights),
            "layer_fan_in": math.log(layer.fan_in),
            "layer_fan_out": math.log(max(layer.fan_out, 1)),
            "layer_erk": math.log(sum(layer.shape) / layer.numel),
            "layer_kernel": math.log(max(math.prod(layer.kernel), 1)),
            "layer_stride": math.log(strides.get(name, 1.0)),
            "layer_groups": math.log(layer.groups),
            "layer_depth": place[name],
            "layer_first": float(place[name] == 0),
            "layer_last": float(place[name] == 1),
            "layer_adds": float(name in adding),
        }
        for signal in wanted:
            stem, sign, horizon = signal.partition("@")
            against = _log_ratio(scales[signal], network[signal])
            if stem == "displacement":
                constants[f"layer_movement_scale@{horizon}"] = against
                constants[f"layer_relative_movement@{horizon}"] = _log_ratio(scales[signal], scales["weight"])
            elif not sign:
                constants[f"layer_{signal}_scale"] = against
        found[name] = LayerContext(
            scales, network, _channel_scales(layer, signals, name, names, scales, kept), constants, cdf, largest
        )
    return found


def _channel_scales(
    layer: Layer,
    signals: Signals,
    name: str,
    names: Sequence[str],
    scales: Mapping[str, float],
    kept: Tensor | None,
) -> dict[str, Tensor]:
    found = {}
    for feature in names:
        side, _, rest = feature.partition("_")
        if side not in ("out", "in"):
            continue
        stem, sign, horizon = rest.partition("@")
        key = stem.removesuffix("_scale")
        if key == "saliency":
            values = signals["weight"][name] * signals["gradient"][name]
        else:
            key = f"displacement@{horizon}" if sign else key
            values = signals[key][name]
        # Divided first: the squares of a small gradient would be nothing in single precision.
        mean_square = _mean_square((values / scales[key]).float(), layer, side, kept)
        found[feature] = mean_square.sqrt().log().clamp_(min=_LEAST)
    return found


def _log_ratio(a: float, b: float) -> float:
    return max(math.log(a / b), _LEAST)


def _square_sum(values: Tensor, kept: Tensor | None) -> float:
    if kept is not None:
        values = values * kept
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _rms(square_sum: float, count: int) -> float:
    return max(math.sqrt(square_sum / max(count, 1)), _NOTHING)


def _distribution(weight: Tensor, kept: Tensor | None) -> tuple[Tensor, float]:
    """Cumulative share of `|θ|` over equal bins up to the largest: a rank without a sort, linear in weights."""
    magnitude = (weight if kept is None else weight[kept]).detach().float().abs().flatten()
    largest = float(magnitude.max()) if magnitude.numel() else 0.0
    if largest < _NOTHING:
        return torch.zeros(_BINS + 1, device=weight.device), 1.0
    counts = torch.zeros(_BINS, device=weight.device)
    for part in magnitude.split(1 << 20):
        counts += torch.histc(part, bins=_BINS, min=0.0, max=largest)
    cdf = torch.cat([counts.new_zeros(1), counts.cumsum(0) / counts.sum()])
    return cdf, largest


# -- rows ---------------------------------------------------------------------------------------------------------------


def rows(names: Sequence[str], part: Mapping[str, Tensor], context: LayerContext, start: int = 0) -> Tensor:
    """Features `(n, len(names))` float32 of the n weights in rows `start …` of a layer's first dimension.

    Args:
        part: each signal's values there, `(rows, *layer.shape[1:])`.
    """
    shape = part["weight"].shape
    # Flow is in double precision, whose range it takes.
    values = {signal: (t if signal == "flow" else t.float()).flatten() for signal, t in part.items()}
    weight = values["weight"]
    if "gradient" in values:
        values["saliency"] = weight * values["gradient"]
    out = torch.empty(weight.numel(), len(names), dtype=torch.float32, device=weight.device)
    for column, name in enumerate(names):
        stem, sign, horizon = name.partition("@")
        if name in context.constants:
            out[:, column] = context.constants[name]
        elif name in context.channels:
            along = context.channels[name]
            own = along[start : start + shape[0]] if along.shape[0] > 1 else along
            out.view(*shape, len(names))[..., column] = own
        else:
            moved = values.get(f"displacement@{horizon}") if sign else None
            _COLUMNS[stem](out[:, column], values, moved, context, f"displacement@{horizon}")
    return out


def _scaled(key: str) -> Callable[..., object]:
    return lambda out, values, moved, context, _: torch.mul(values[key], 1 / context.scales[key], out=out)


def _log_scaled(key: str, network: bool = False, least: float = _EPS) -> Callable[..., object]:
    def column(out: Tensor, values: dict[str, Tensor], moved: Tensor | None, context: LayerContext, _: str) -> None:
        scale = (context.network if network else context.scales)[key]
        out.copy_(_log(values[key], scale, least))

    return column


def _log(values: Tensor, scale: float, least: float = _EPS) -> Tensor:
    return values.abs().div_(scale).add_(least).log_()


def _growth(out: Tensor, values: dict[str, Tensor], moved: Tensor | None, context: LayerContext, key: str) -> None:
    """Signed change of |θ|: along the displacement, or against the gradient where there is none."""
    if moved is None:
        torch.mul(values["gradient"] * values["weight"].sign(), -1 / context.scales["gradient"], out=out)
    else:
        torch.mul(moved * values["weight"].sign(), 1 / context.scales[key], out=out)


def _rank(out: Tensor, values: dict[str, Tensor], moved: Tensor | None, context: LayerContext, _: str) -> None:
    """Linear interpolation in the layer's cumulative distribution."""
    at = (values["weight"].abs() * (_BINS / context.largest)).clamp_(max=_BINS)
    low = at.floor().clamp_(max=_BINS - 1)
    index = low.long()
    out.copy_(torch.lerp(context.cdf[index], context.cdf[index + 1], at - low))


_COLUMNS: dict[str, Callable[..., object]] = {
    "weight": _scaled("weight"),
    "gradient": _scaled("gradient"),
    "log_abs_weight": _log_scaled("weight"),
    "log_abs_gradient": _log_scaled("gradient"),
    "log_saliency": _log_scaled("saliency"),
    "log_flow": _log_scaled("flow"),
    "log_abs_weight_network": _log_scaled("weight", network=True),
    "log_saliency_network": _log_scaled("saliency", network=True),
    "log_flow_network": _log_scaled("flow", network=True, least=_FLOW_EPS),
    "weight_rank": _rank,
    "growth": _growth,
    "log_movement": lambda out, values, moved, context, key: out.copy_(_log(moved, context.scales[key])),
    "log_warm_weight": lambda out, values, moved, context, key: out.copy_(
        _log(values["weight"] + moved, context.scales["weight"])
    ),
    "log_warm_weight_network": lambda out, values, moved, context, key: out.copy_(
        _log(values["weight"] + moved, context.network["weight"])
    ),
    "raw_weight": lambda out, values, *_: out.copy_(values["weight"]),
    "raw_gradient": lambda out, values, *_: out.copy_(values["gradient"]),
}


@dataclass(frozen=True)
class View:
    """What a scorer sees of one network: features of any of its weights, made when they are asked for."""

    features: tuple[str, ...]
    layers: Mapping[str, Layer]
    signals: Signals
    contexts: Mapping[str, LayerContext]
    graph: Graph | None = None
    masks: Mapping[str, Tensor] | None = None

    @staticmethod
    def of(
        features: Sequence[str],
        layers: Mapping[str, Layer],
        signals: Signals,
        graph: Graph | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> View:
        used = {name: signals[name] for name in signals_of(features)}
        return View(tuple(features), layers, used, contexts(layers, used, features, graph, masks), graph, masks)

    def rows(self, name: str, start: int, stop: int, names: Sequence[str] | None = None) -> Tensor:
        """Features `(n, F)` of rows `start … stop` of a layer's first dimension; `names`: of all that it has."""
        part = {signal: by_name[name][start:stop] for signal, by_name in self.signals.items()}
        return rows(self.features if names is None else names, part, self.contexts[name], start)

    def chunks(self, name: str) -> Iterator[tuple[int, int]]:
        """Ranges of a layer's first dimension, about `CHUNK` weights each."""
        lead = self.layers[name].shape[0]
        step = max(1, CHUNK * lead // max(self.layers[name].numel, 1))
        for start in range(0, lead, step):
            yield start, min(start + step, lead)

    def nodes(self) -> Tensor:
        """The layers' own features `(L, N)`."""
        own = of_layers(self.features)
        return torch.tensor([[self.contexts[n].constants[f] for f in own] for n in self.layers]).view(
            len(self.layers), len(own)
        )
