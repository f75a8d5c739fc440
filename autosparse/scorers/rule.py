"""A rule of layer densities: the logarithm of a layer's density as a linear function of what is known before training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from autosparse.errors import AutoSparseError, suggest
from autosparse.masks.layers import Layer
from autosparse.network.graph import Graph

LEAST = 1e-4  # density of a layer that another criterion empties
OF_CRITERION = "densities:"  # before the name of the criterion whose layer densities are a feature
# Those of a layer's features that its network's structure and initial weights give.
STRUCTURE = (
    "layer_erk",
    "layer_size",
    "layer_fan_in",
    "layer_fan_out",
    "layer_kernel",
    "layer_stride",
    "layer_depth",
    "layer_first",
    "layer_last",
    "layer_adds",
)
FROM_GRAPH = {
    "layer_area": "log of the number of positions that each weight serves: of the layer's output, 0 for one vector",
    "layer_shortcut": "1 for a 1×1 convolution beside other layers, whose output goes into a sum",
}


def criteria_of(rule: Iterable[str]) -> tuple[str, ...]:
    """The criteria whose layer densities are features of a rule, as in `"densities:snip"`."""
    return tuple(name.removeprefix(OF_CRITERION) for name in rule if name.startswith(OF_CRITERION))


def log_densities(
    rule: Mapping[str, float],
    constants: Mapping[str, Mapping[str, float]],
    layers: Mapping[str, Layer],
    graph: Graph | None,
    given: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """`Σ_f rule_f·x_lf` of each layer.

    Args:
        constants: the layers' own features, of `scorers.features.contexts`.
        given: layer densities by criterion, for features such as `"densities:snip"`.

    Raises:
        AutoSparseError: a feature that is not known of these layers.
    """
    more = structure(layers, graph) if set(rule) & set(FROM_GRAPH) else {name: {} for name in constants}
    features = {name: {**own, **more[name]} for name, own in constants.items()}
    for criterion, by_layer in given.items():
        for name in features:
            features[name][OF_CRITERION + criterion] = math.log(max(by_layer[name], LEAST))
    known = features[next(iter(features))]
    for name in rule:
        if name not in known:
            why = "give prune an example input, or batches" if name in FROM_GRAPH else suggest(name, list(known))
            raise AutoSparseError(f"the rule of layer densities has the feature {name!r}: {why}")
    return {name: sum(value * of[key] for key, value in rule.items()) for name, of in features.items()}


def structure(layers: Mapping[str, Layer], graph: Graph | None) -> dict[str, dict[str, float]]:
    """The features `FROM_GRAPH` of each layer; none without a graph."""
    if graph is None:
        return {name: {} for name in layers}
    areas, shortcuts = graph.areas(), graph.projections(layers)
    return {
        name: {"layer_area": math.log(areas.get(name, 1)), "layer_shortcut": float(name in shortcuts)}
        for name in layers
    }
