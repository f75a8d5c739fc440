"""Initial weights scaled down to the size of PyTorch's own initialization."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from autosparse.errors import require
from autosparse.masks.layers import check_real, check_values, prunable_layers, unwrap
from autosparse.masks.mask import Masks, dense_masks
from autosparse.network.graph import trace
from autosparse.network.lipschitz import pairs
from autosparse.network.used import refuse_recomputed
from autosparse.search.sparsify import scale_weights
from autosparse.trainability.preparation import Preparation, PreparedLayer
from autosparse.trainability.repair import lipschitz


def scale_down(model: nn.Module, masks: Masks | None, example_input: Any, gain: float = 0.58) -> Preparation:
    """Scale the weights of each layer down to a root mean square of `gain/√fan_in`, in place, where it is larger.

    He initialization has a gain of 1.41, PyTorch's own 0.58. The root mean square is that of all weights, pruned ones
    included. A norm layer behind a layer undoes the scale, so the outputs stay, but each step then turns the weights
    further. Where no norm layer takes the output, it becomes smaller, and the note says so. Biases and norms stay, pruned
    weights are zero afterwards. A second call changes nothing.

    Raises:
        AutoSparseError: `gain` is not positive, or the masks are another model's.

    Source: ours.
    """
    require(0 < gain < math.inf, "gain", gain, "give a positive number, such as 0.58")
    model = unwrap(model)
    graph = trace(model, example_input)
    layers = prunable_layers(model, operands=graph.operands)
    check_values(model)
    check_real(model, layers, "a preparation")
    refuse_recomputed(model, graph, layers)
    if masks is None:
        masks = dense_masks(layers)
    masks.check(model)
    before = lipschitz(model, example_input, masks)
    factors = scale_weights(model, layers, gain)
    after, norms = lipschitz(model, example_input, masks), pairs(graph, layers, dict(model.named_parameters()))
    masks.apply_(model)
    rows = []
    for name, factor in factors.items():
        note = "" if factor == 1 or norms[name].norm is not None else f"its output is {factor:.3g} times what it was"
        rows.append(PreparedLayer(name, norms[name].norm, before[name], after[name], note))
    return Preparation("scale_down", masks, tuple(rows))
