"""How large a network is, and what one example costs in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from autosparse.masks.layers import prunable_layers, unwrap
from autosparse.network.graph import trace
from autosparse.network.observe import EXAMPLES
from autosparse.network.used import fused


@dataclass(frozen=True)
class Size:
    """`parameters`, of which a shared one counts once; `macs`: multiply-accumulates of one example."""

    parameters: int
    macs: int


def size(model: nn.Module, example_input: Any) -> Size:
    """The size of `model`; its MACs are the sum of `layer_macs`. The model stays as it is.

    Args:
        example_input: as for `trace`.

    Raises:
        AutoSparseError: the model does not take this input, or has no weights.
    """
    macs = layer_macs(model, example_input)
    return Size(sum(p.numel() for p in unwrap(model).parameters()), sum(macs.values()))


def layer_macs(model: nn.Module, example_input: Any) -> dict[str, int]:
    """Multiply-accumulates of one example with each prunable weight, over all of its uses, from the traced graph.

    Of each use as many as it computes: with the rows of a stacked projection that it takes, at its positions. Products of
    two activations, norms and activations are not counted. Where dimension 0 of the example is no batch, the whole of it
    is one example. Arguments and errors as of `size`.
    """
    model = fused(unwrap(model))
    graph = trace(model, example_input)
    layers = prunable_layers(model, operands=graph.operands)
    macs = dict.fromkeys(layers, 0)
    first = {op.shape[:1] for op in graph.operations if op.kind == "input"}
    size = first.pop()[0] if len(first) == 1 and first != {()} else 1
    batch = size if size <= EXAMPLES else 1  # of more examples the trace takes the first, if they are a batch
    fed: list[bool] = []  # per operation: whether it runs for each example
    for op in graph.operations:
        fed.append(op.kind == "input" or any(fed[i] for i in op.inputs))
        count = math.prod(op.shape) * op.contracted
        if op.kind == "conv_transpose":  # each input is multiplied with the whole kernel
            count = math.prod(graph.operations[op.inputs[0]].shape) * op.contracted
        for name in op.weights:
            if name in macs:
                macs[name] += count // (batch if fed[-1] else 1)
    return macs
