"""How large a network is, and what one example costs in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from autosparse.masks.layers import prunable_layers, unwrap
from autosparse.network.graph import first_of_batch, trace


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

    `numel · positions`: output positions, of a transposed convolution input positions. Products of two activations, norms
    and activations are not counted. Arguments and errors as of `size`.
    """
    model = unwrap(model)
    batch = max(
        (t.shape[0] for t in tree_leaves(first_of_batch(example_input, 2)) if isinstance(t, torch.Tensor)), default=1
    )
    graph = trace(model, example_input)
    layers = prunable_layers(model, operands=graph.operands)
    macs = dict.fromkeys(layers, 0)
    for op in graph.operations:
        for name in op.weights:
            convolves = op.kind == "conv"
            positions = op.shape[2:] if convolves else op.shape[:-1]  # a product may fold the batch
            if op.kind == "conv_transpose":  # each input is multiplied with the whole kernel
                positions = graph.operations[op.inputs[0]].shape[2:]
            macs[name] += layers[name].numel * math.prod(positions) // (1 if op.kind.startswith("conv") else batch)
    return macs
