"""How many weights each layer keeps, whichever they are: rules for layer densities, and exact counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from autosparse.errors import AutoSparseError, require
from autosparse.masks.layers import Layer
from autosparse.masks.schedule import check_density
from autosparse.plugins import is_outside, load_outside

Densities = Callable[[Mapping[str, Layer], float], Mapping[str, float]]
Scope = str | Mapping[str, float]  # a name (see `SCOPES`), or the layer densities themselves


def uniform(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """The same density in every layer."""
    return dict.fromkeys(layers, density)


def erk(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """Erdős–Rényi-kernel densities `d_l = ε·(n_in + n_out + k_h + k_w)/(n_in·n_out·k_h·k_w)`.

    ε is solved so that `Σ d_l·N_l = density·Σ N_l`; layers with `d_l > 1` are dense and ε is solved again.
    Source: Evci et al. 2020 (RigL), after Mocanu et al. 2018.
    """
    return _scaled({name: sum(layer.shape) / layer.numel for name, layer in layers.items()}, layers, density)


def igq(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """Ideal gas quotas `d_l = 1/(1 + F·N_l)`, `F ≥ 0` solved so that `Σ d_l·N_l = density·Σ N_l`.

    A layer keeps at most `1/F` weights, however large it is. Source: Chen et al. 2021, arXiv 2107.02306.
    """
    check_density(density)
    sizes = [layer.numel for layer in layers.values()]
    target = density * sum(sizes)
    low, high = 0.0, len(sizes) / target  # at which each layer keeps under target/L
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(size / (1 + middle * size) for size in sizes)
        low, high = (middle, high) if kept > target else (low, middle)
    return {name: 1 / (1 + high * layer.numel) for name, layer in layers.items()}


def smart_ratio(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """Smart ratios `d_l ∝ (L−l+1)² + (L−l+1)` for layer l of L in the order of `layers`; a last linear layer has 0.3.

    The last layer gets at most half of all weights kept, so that something is left for the others. Layers with `d_l > 1`
    are dense. Source: Su et al. 2020, "Sanity-checking pruning methods", without the factor that they use on VGG alone.
    """
    check_density(density)
    names, number = list(layers), len(layers)
    raw = {name: float((number - i) ** 2 + number - i) for i, name in enumerate(names)}
    last = layers[names[-1]]
    if number == 1 or last.kind != "linear":
        return _scaled(raw, layers, density)
    total = density * sum(layer.numel for layer in layers.values())
    rest = {name: layers[name] for name in names[:-1]}
    others = sum(layer.numel for layer in rest.values())
    given = max(min(0.3, total / 2 / last.numel), (total - others) / last.numel)
    left = (total - given * last.numel) / others
    return {**_scaled({name: raw[name] for name in rest}, rest, min(left, 1.0)), names[-1]: given}


DENSITIES: dict[str, Densities] = {"uniform": uniform, "erk": erk, "igq": igq, "smart_ratio": smart_ratio}
SCOPES = ("global", *DENSITIES)


def check_scope(scope: Scope, layers: Mapping[str, Layer] | None = None, what: str = "scope") -> None:
    """Raise `AutoSparseError` unless `scope` is known: `"global"`, a name of `DENSITIES`, a function from outside as
    `package.module:name`, or, where `layers` are given, a density in [0, 1] for each."""
    if isinstance(scope, Mapping):
        for name in layers or {}:
            if name not in scope:
                raise AutoSparseError(f"{what} has no density of {name!r}: give each layer one in [0, 1]")
            given = scope[name]
            require(0 <= given <= 1, f"density of {name!r} in {what}", given, "give each layer one in [0, 1]")
    elif isinstance(scope, str) and is_outside(scope) and not scope.startswith("densities:"):
        require(callable(load_outside(scope, what)), what, scope, "it must be a function of layers and density")
    else:
        known = f"known: {', '.join(SCOPES)}, or package.module:name; or the density of each layer, as numbers"
        require(scope in SCOPES, what, scope, known)


def layer_densities(scope: Scope, layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """The density of each layer by a rule's name, or as given; `scope` is not `"global"`."""
    if isinstance(scope, Mapping):
        return dict(scope)
    rule = DENSITIES.get(scope)
    if rule is None:
        rule = load_outside(scope, "scope")
        values = dict(rule(layers, density))
        check_scope(values, layers, scope)
        return values
    return dict(rule(layers, density))


def _scaled(raw: Mapping[str, float], layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """`min(ε·raw, 1)` with ε solved so that `Σ d_l·N_l = density·Σ N_l`."""
    check_density(density)
    dense: set[str] = set()
    while True:
        free = [name for name in layers if name not in dense]
        budget = density * sum(layer.numel for layer in layers.values()) - sum(layers[n].numel for n in dense)
        if not free:
            return dict.fromkeys(layers, 1.0)
        epsilon = budget / sum(raw[n] * layers[n].numel for n in free)
        over = {n for n in free if epsilon * raw[n] > 1}
        if not over:
            return {n: 1.0 if n in dense else epsilon * raw[n] for n in layers}
        dense |= over


def apportion(
    shares: Mapping[str, float], total: int, least: Mapping[str, int], room: Mapping[str, int]
) -> dict[str, int]:
    """Whole counts in proportion to `shares`, each in `least … room`, that sum exactly to `total`.

    Largest remainders first. `Σ least ≤ total ≤ Σ room` must hold.
    """

    def scaled(factor: float) -> dict[str, float]:
        return {n: min(max(factor * share, least[n]), room[n]) for n, share in shares.items()}

    low, high = 0.0, max((room[n] / share for n, share in shares.items() if share > 0), default=0.0)
    ideal = scaled(1.0)
    if abs(sum(ideal.values()) - total) >= 1:  # bounds bite: the others take or give what these lack or have too much
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(scaled(middle).values()) < total else (low, middle)
        ideal = scaled(high)
    counts = {n: max(math.floor(value + 1e-9), least[n]) for n, value in ideal.items()}
    while (left := total - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        movable = [n for n in counts if (counts[n] < room[n] if step > 0 else counts[n] > least[n])]
        movable.sort(key=lambda n: -step * (ideal[n] - counts[n]))
        for name in movable[: abs(left)]:
            counts[name] += step
    return counts
