"""Signals -> scores. Knows no thresholds, data sets or files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from autosparse.errors import AutoSparseError, require, suggest
from autosparse.masks.layers import Layer
from autosparse.masks.mask import masked
from autosparse.masks.random import make_generator
from autosparse.network.signals import FROM_BATCHES, Signals, parse_horizon
from autosparse.plugins import is_outside, load_outside

if TYPE_CHECKING:
    from autosparse.network.graph import Graph

Scores = dict[str, Tensor]  # parameter name -> one float per weight, higher = keep


@dataclass(frozen=True)
class Context:
    """What a criterion may ask for besides signals: the layers, the traced graph if there is one, the density that the
    mask will have after this step, the masks of the step before, a seed, and the layer densities at that density of the
    other criteria that its attribute `densities_of` names."""

    layers: Mapping[str, Layer]
    density: float
    graph: Graph | None = None
    masks: Mapping[str, Tensor] | None = None
    seed: int = 0
    densities: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Criterion(Protocol):
    """A pure function of signals. `signals`: names of those it needs. `n_batches`: batches for them, by default.

    The call returns one real tensor in its weight's shape for each name in `context.layers`; higher scores are kept.
    """

    @property
    def name(self) -> str: ...
    @property
    def signals(self) -> tuple[str, ...]: ...
    @property
    def n_batches(self) -> int: ...
    def __call__(self, signals: Signals, context: Context) -> Scores: ...


@dataclass(frozen=True)
class HandMade:
    """A criterion given by a formula."""

    name: str
    score: Callable[[Signals, Context], Scores]
    signals: tuple[str, ...] = ()
    n_batches: int = 0
    per_class: int | None = None  # samples of every class that its authors score on, where they draw a balanced sample

    def __call__(self, signals: Signals, context: Context) -> Scores:
        return self.score(signals, context)


@dataclass(frozen=True)
class Inverted:
    """A sanity check: the scores of `rule` with the opposite sign, so that the worst weights stay."""

    rule: Criterion

    @property
    def name(self) -> str:
        return f"inverted:{self.rule.name}"

    @property
    def signals(self) -> tuple[str, ...]:
        return self.rule.signals

    @property
    def n_batches(self) -> int:
        return self.rule.n_batches

    @property
    def densities_of(self) -> tuple[str, ...]:
        return getattr(self.rule, "densities_of", ())

    def __call__(self, signals: Signals, context: Context) -> Scores:
        return {name: -score for name, score in self.rule(signals, context).items()}


def random(signals: Signals, context: Context) -> Scores:
    """`s ~ U(0, 1)`, a function of the seed alone: the same on every device."""
    generator = make_generator(context.seed, "random scores")
    return {name: torch.rand(layer.shape, generator=generator) for name, layer in context.layers.items()}


def spread_order(
    layer: Layer, generator: torch.Generator, prefer: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """A random order of a layer's weights, int64 ranks in the layer's shape, of which any first k are spread evenly.

    Output channels differ by one weight at most, input channels nearly so, and no kernel gets a second weight before all
    have one. With random positions some channels of a sparse layer get no weight and others too many; here none starves.

    Args:
        prefer: within each kernel the highest come first; default: any.
        kept: a mask; channels in which it has no weight come last, all with the rank `N_l`. Default: all are in use.
    """
    if kept is not None:
        return _spread_among(layer, generator, prefer, kept)
    out, into = layer.shape[layer.out_dim], layer.shape[layer.in_dim]
    pairs, kernel = out * into, layer.numel // (out * into)
    at = torch.arange(pairs)
    # Steps along both channels at once; after `lcm` steps the walk would close, and goes on one input channel further.
    walk_out, walk_in = at % out, (at + at // math.lcm(out, into)) % into
    mixed_out, mixed_in = (torch.randperm(n, generator=generator) for n in (out, into))
    turn = torch.empty(out, into, dtype=torch.long)
    turn[mixed_out[walk_out], mixed_in[walk_in]] = at
    worth = torch.rand(out, into, kernel, generator=generator)
    if prefer is not None:
        worth = prefer.detach().cpu().movedim((layer.out_dim, layer.in_dim), (0, 1)).reshape(out, into, kernel)
    place = worth.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    ranks = (place * pairs + turn[:, :, None]).view(out, into, *layer.kernel)
    return ranks.movedim((0, 1), (layer.out_dim, layer.in_dim))


def _spread_among(layer: Layer, generator: torch.Generator, prefer: Tensor | None, kept: Tensor) -> Tensor:
    """`spread_order` of a layer without the channels that have no weight in `kept`, put where these weights are."""

    def first(t: Tensor) -> Tensor:  # dimensions: out, in, and those of the kernel
        return t.detach().cpu().movedim((layer.out_dim, layer.in_dim), (0, 1))

    used = first(kept).reshape(layer.shape[layer.out_dim], layer.shape[layer.in_dim], -1).any(2)
    rows, columns = used.any(1).nonzero().flatten(), used.any(0).nonzero().flatten()
    ranks = torch.full(layer.shape, layer.numel)
    if len(rows):
        inside = Layer(layer.name, layer.kind, (len(rows), len(columns), *layer.kernel))
        liked = None if prefer is None else first(prefer)[rows][:, columns]
        first(ranks)[rows[:, None], columns] = spread_order(inside, generator, liked)
    return ranks


def spread(signals: Signals, context: Context) -> Scores:
    """`s = 1 − rank / N_l` in an order that spreads what stays evenly over the channels, see `spread_order`.

    Uniform layer densities by itself; the preset of this name has ERK's. No signals.
    """
    generator = make_generator(context.seed, "spread")
    kept = context.masks or {}
    return {n: 1 - spread_order(l, generator, kept=kept.get(n)) / l.numel for n, l in context.layers.items()}


def spread_small(signals: Signals, context: Context) -> Scores:
    """As `spread`, and of each kernel the smallest `|θ|` first.

    Before a norm layer the scale of a filter does not change what the network computes, but the gradient grows as
    `1/‖θ‖`, and so the step relative to the weight as `1/‖θ‖²`: small weights learn sooner, which tells in short
    trainings. Scaling the weights that a random mask keeps does the same.
    """
    generator = make_generator(context.seed, "spread")
    weights, kept = signals["weight"], context.masks or {}
    return {
        name: 1 - spread_order(layer, generator, -weights[name].abs(), kept.get(name)) / layer.numel
        for name, layer in context.layers.items()
    }


POSITIONS = ("scores", "spread", "spread_scores", "spread_small")


def ranks_within(scores: Scores, positions: str, weights: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
    """The order in which the weights of each layer stay: int64 ranks from 0 in the layers' shapes, what is pruned last.

    `positions`: `"scores"`, the highest first; or spread evenly over the channels, see `spread_order`, with any
    (`"spread"`), the highest (`"spread_scores"`) or the smallest weights (`"spread_small"`) of each kernel first.
    """
    generator = make_generator(context.seed, "positions")
    found = {}
    for name, layer in context.layers.items():
        score = scores[name]
        if positions == "scores":
            order = score.flatten().argsort(descending=True, stable=True)
        else:
            prefer = {"spread": None, "spread_scores": score, "spread_small": -weights[name].abs()}[positions]
            kept = None if context.masks is None else context.masks[name]
            order = spread_order(layer, generator, prefer, kept).flatten().argsort(stable=True).to(score.device)
        if context.masks is not None:
            gone = ~context.masks[name].to(score.device).flatten()[order]
            order = order[gone.to(torch.uint8).argsort(stable=True)]
        ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        found[name] = ranks.view(layer.shape)
    return found


def rearranged(scores: Scores, positions: str, weights: Mapping[str, Tensor], context: Context) -> Scores:
    """The same scores in every layer, and so the same layer densities at any cut, in another order: see `ranks_within`."""
    if positions == "scores":
        return scores
    found = {}
    for name, ranks in ranks_within(scores, positions, weights, context).items():
        values = scores[name].flatten()
        if context.masks is not None:  # what is pruned has no say
            kept = context.masks[name].to(values.device).flatten()
            values = torch.where(kept, values, values[kept].min() if kept.any() else values)
        found[name] = values.sort(descending=True).values[ranks]
    return found


def _product(weight: Tensor, gradient: Tensor) -> Tensor:
    """`θ ⊙ g`; of complex numbers `Re(θ ⊙ ḡ)`, for torch's gradient is `∂L/∂Re θ + i·∂L/∂Im θ`."""
    return (weight * gradient.conj()).real


def magnitude(signals: Signals, context: Context) -> Scores:
    """`s = |θ|` (Han et al. 2015; at initialization Frankle et al. 2021)."""
    return {name: weight.abs() for name, weight in signals["weight"].items()}


def snip(signals: Signals, context: Context) -> Scores:
    """`s = |θ ⊙ g|`, the first-order change of the loss when a weight goes (Lee et al. 2019). One batch by default."""
    gradient = signals["gradient"]
    return {name: _product(weight, gradient[name]).abs() for name, weight in signals["weight"].items()}


def force(signals: Signals, context: Context) -> Scores:
    """`s = |θ ⊙ g(θ ⊙ m)|` of all weights, pruned ones too, so that they may return (de Jorge et al. 2021)."""
    gradient = signals["gradient"]
    return {name: _product(weight, gradient[name]).abs() for name, weight in signals["dense_weight"].items()}


def grasp(signals: Signals, context: Context) -> Scores:
    """`s = θ ⊙ Hg`: keep the weights whose removal would cost the gradient most of its norm (Wang et al. 2020).

    To first order removing `θ_i` changes `½‖g‖²` by `−θ_i (Hg)_i`; the authors take 10 samples of each class.
    """
    product = signals["hessian_gradient"]
    return {name: _product(weight, product[name]) for name, weight in signals["weight"].items()}


def ntk_sap(signals: Signals, context: Context) -> Scores:
    """`s = |∂/∂m ‖f(x; θ⊙m) − f(x; (θ+εz)⊙m)‖²|`, whose mean is the trace of the neural tangent kernel (Wang et al.
    2023); no data."""
    return {name: value.abs() for name, value in signals["ntk_sensitivity"].items()}


def prospr(signals: Signals, context: Context) -> Scores:
    """`s = |∂L(θ_M)/∂c|`, the loss after M = 3 steps of SGD from `c ⊙ θ` (Alizadeh et al. 2022). Four batches by default:
    one for each step, one for the loss."""
    return {name: value.abs() for name, value in signals["meta_gradient"].items()}


def synflow(signals: Signals, context: Context) -> Scores:
    """`s = |θ| ⊙ ∂R/∂|θ|`, synaptic flow of the linearised network (Tanaka et al. 2020); no data.

    Weights that no flow can reach by construction (queries, keys, gates) would all score 0 and die whatever they are
    worth: of these every layer keeps the target density by magnitude.
    """
    return _flow_and_dry(signals["flow"], signals, context)


def resynflow(signals: Signals, context: Context) -> Scores:
    """`s = |θ̃| ⊙ ∂R/∂|θ̃|`, θ̃ every layer's weights divided by their spectral norm; no data. Else as `synflow`.

    The authors' linear schedule kills layers of deep networks at high sparsity; `schedule="exponential"` does not.
    """
    return _flow_and_dry(signals["rescaled_flow"], signals, context)


def _flow_and_dry(flow: Mapping[str, Tensor], signals: Signals, context: Context) -> Scores:
    unreached = signals["no_flow"]
    above = 2 * max(float(f.max()) for f in flow.values())
    scores: Scores = {}
    for name, value in flow.items():
        apart = unreached[name]
        count = round(context.density * int(apart.count_nonzero()))
        if count:
            weight = signals["dense_weight"][name]
            weight = weight if context.masks is None else masked(weight, context.masks[name])
            magnitude = torch.where(apart, weight.abs().to(value.dtype), -1.0).flatten()
            value = value.clone()
            value.view(-1)[magnitude.topk(count).indices] = above
        scores[name] = value
    return scores


def growth0(signals: Signals, context: Context) -> Scores:
    """`s = −θ ⊙ g`: how a weight would grow in one small step, `d|θ|/dt = −g · sign θ`, times `|θ|`; SNIP with its sign.

    In our own measurements `−g · sign θ` predicted survival beyond `|θ|`, `|g|` nothing. Eight batches by default.
    """
    gradient = signals["gradient"]
    return {name: -_product(weight, gradient[name]) for name, weight in signals["weight"].items()}


def early_magnitude(signals: Signals, context: Context, *, warm: str) -> Scores:
    """`s = |θ_t|` after a warm-up of t epochs: one-shot magnitude of a ticket that was hardly trained (our own)."""
    return {name: weight.abs() for name, weight in signals[warm].items()}


def movement(signals: Signals, context: Context, *, warm: str) -> Scores:
    """`s = |θ_t − θ₀|`: what moved most in a warm-up of t epochs (dissipating gradients' rule, in one shot)."""
    return {name: moved.abs() for name, moved in signals[warm].items()}


def growth(signals: Signals, context: Context, *, warm: str) -> Scores:
    """`s = |θ_t| − |θ₀|`, signed: what grew most in a warm-up of t epochs comes first, what shrank most goes first.

    Unlike `movement` it tells of survival beyond `|θ₀|` (our own measurements; Zhou et al. 2019 score trained weights
    so, as "magnitude increase").
    """
    moved = signals[warm]
    return {name: (weight + moved[name]).abs() - weight.abs() for name, weight in signals["weight"].items()}


EARLY: dict[str, tuple[Callable[..., Scores], tuple[str, ...], str]] = {  # formula, signals of θ₀, signal of a warm-up
    "early_magnitude": (early_magnitude, (), "warm_weight"),
    "movement": (movement, (), "displacement"),
    "growth": (growth, ("weight",), "displacement"),
}


def early(name: str, epochs: float = 1) -> HandMade:
    """The criterion of that name in `EARLY` on the signals of a warm-up of `epochs`."""
    score, initial, signal = EARLY[name]
    warm = f"{signal}@{epochs:g}"
    return HandMade(name if epochs == 1 else f"{name}@{epochs:g}", partial(score, warm=warm), (*initial, warm))


CRITERIA: dict[str, Criterion] = {
    "spread": HandMade("spread", spread),
    "spread_small": HandMade("spread_small", spread_small, ("weight",)),
    "random": HandMade("random", random),
    "magnitude": HandMade("magnitude", magnitude, ("weight",)),
    "snip": HandMade("snip", snip, ("weight", "gradient"), n_batches=1),
    "force": HandMade("force", force, ("dense_weight", "gradient"), n_batches=1),
    "grasp": HandMade("grasp", grasp, ("weight", "hessian_gradient"), n_batches=1, per_class=10),
    "ntk_sap": HandMade("ntk_sap", ntk_sap, ("ntk_sensitivity",)),
    "prospr": HandMade("prospr", prospr, ("meta_gradient",), n_batches=4),
    "synflow": HandMade("synflow", synflow, ("dense_weight", "flow", "no_flow")),
    "resynflow": HandMade("resynflow", resynflow, ("dense_weight", "rescaled_flow", "no_flow")),
    "growth0": HandMade("growth0", growth0, ("weight", "gradient"), n_batches=8),
    **{name: early(name) for name in EARLY},
}


@dataclass(frozen=True)
class Preset:
    """A criterion with the settings that its authors published; each can be overridden in `prune`.

    `scope`, `steps`, `schedule`: as in `prune`. `channels`: the share that stays in use, a function of the layers and the
    density; `None`: all. `n_batches`: `None`: the criterion's. `revive`: weights that a step pruned may come back in the
    next (FORCE); otherwise they stay pruned.
    """

    criterion: Criterion
    scope: str = "global"
    steps: int = 1
    schedule: str = "exponential"
    n_batches: int | None = None
    revive: bool = False
    channels: Callable[[Mapping[str, Layer], float], float] | None = None


def narrow(layers: Mapping[str, Layer], density: float) -> float:
    """The share of channels `c = min(1, max(1/2, k/8, ρ/0.04))`, where `k = ρ·Σ N_l / Σ O_l` is how many weights an output
    channel keeps on average.

    So half of the channels leave at 98 %, fewer where the others would have more than eight weights each, and none at 96 %
    and below. Chosen on small networks of CIFAR-10, see `docs/results.md` (our own; compare the balance of nodes and paths
    in Pham et al. 2023).
    """
    weights = density * sum(layer.numel for layer in layers.values())
    a_channel = weights / sum(layer.out_features for layer in layers.values())
    return min(1.0, max(0.5, a_channel / 8, density / 0.04))


PRESETS: dict[str, Preset] = {
    "random": Preset(CRITERIA["random"], scope="uniform"),
    "erk": Preset(CRITERIA["random"], scope="erk"),
    "igq": Preset(CRITERIA["random"], scope="igq"),
    "smart_ratio": Preset(CRITERIA["random"], scope="smart_ratio"),
    "random_snip": Preset(CRITERIA["random"], scope="densities:snip"),
    "random_synflow": Preset(CRITERIA["random"], scope="densities:synflow"),
    "spread": Preset(CRITERIA["spread"], scope="erk"),
    "spread_igq": Preset(CRITERIA["spread"], scope="igq"),
    "narrow_igq": Preset(CRITERIA["random"], scope="igq", channels=narrow),
    "spread_synflow": Preset(CRITERIA["spread"], scope="densities:synflow"),
    "spread_small": Preset(CRITERIA["spread_small"], scope="erk"),
    "magnitude": Preset(CRITERIA["magnitude"]),
    "snip": Preset(CRITERIA["snip"]),
    "iterative_snip": Preset(CRITERIA["snip"], steps=60),  # Verdenius et al. 2020, de Jorge et al. 2021
    "force": Preset(CRITERIA["force"], steps=60, revive=True),
    "grasp": Preset(CRITERIA["grasp"]),
    "ntk_sap": Preset(CRITERIA["ntk_sap"], steps=20),
    "prospr": Preset(CRITERIA["prospr"]),
    "synflow": Preset(CRITERIA["synflow"], steps=100),
    "resynflow": Preset(CRITERIA["resynflow"], steps=10, schedule="linear"),
    "growth0": Preset(CRITERIA["growth0"]),
    **{name: Preset(CRITERIA[name]) for name in EARLY},
}


def _outside(text: str) -> Preset:
    found = load_outside(text, "criterion")
    if isinstance(found, Preset):
        return found
    if callable(found) and all(hasattr(found, part) for part in ("name", "signals", "n_batches")):
        return Preset(found)
    require(
        callable(found) and isinstance(getattr(found, "signals", None), (tuple, list)),
        "criterion",
        text,
        "it must be a Preset, a Criterion, or a function (signals, context) with an attribute `signals`, a tuple of names",
    )
    names = tuple(found.signals)
    return Preset(HandMade(text, found, names, getattr(found, "n_batches", int(bool(set(FROM_BATCHES) & set(names))))))


def preset_for(text: str) -> Preset:
    """The preset of that name; `"movement@0.5"` is `"movement"` with a warm-up of half an epoch instead of one.

    `"package.module:name"` is a criterion or preset of your own, or a function `(signals, context) -> scores` whose attribute
    `signals` names the signals that it needs (`n_batches`: batches for these, 1 by default).

    Raises:
        AutoSparseError: the name is unknown, or the horizon no positive number, or the preset takes none.
    """
    if text in PRESETS:
        return PRESETS[text]
    if is_outside(text):
        return _outside(text)
    name = text.partition("@")[0]
    if name not in PRESETS:
        raise AutoSparseError(f"criterion is {text!r}: {suggest(name, PRESETS)}")
    if name not in EARLY:
        raise AutoSparseError(
            f"criterion is {text!r}: {name!r} takes no horizon, only {', '.join(EARLY)} do; leave out what follows the @"
        )
    return replace(PRESETS[name], criterion=early(name, parse_horizon(text, "criterion")))
