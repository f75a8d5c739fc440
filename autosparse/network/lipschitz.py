"""Which norm takes which layer's output, and what both together make of a difference of inputs."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from autosparse.masks.layers import Layer
from autosparse.network.graph import Graph, Operation


@dataclass(frozen=True)
class Pair:
    """The norm that takes a layer's output: its module's name (its operator's where it has no parameters), `None` where
    no norm does; `gamma` is the name of its γ, where it has one of this layer's own; `note` says what stands against."""

    norm: str | None
    gamma: str | None
    note: str = ""


def pairs(graph: Graph, layers: Collection[str], parameters: Collection[str]) -> dict[str, Pair]:
    """Each layer with the norm that takes its output in the graph, for `parameters` that can be set.

    Between the two may lie the addition of a bias, and what only rearranges; nothing else (activation, pooling, sum of two
    branches, concatenation), and no other consumer. A layer whose output goes to two norms has none. A γ that several
    layers share belongs to none of them: it could suit one only. A layer that is used more than once has a norm if it is
    the same each time.
    """
    users: dict[int, list[int]] = {}
    for index, operation in enumerate(graph.operations):
        for before in operation.inputs:
            users.setdefault(before, []).append(index)
    uses: dict[str, set[Pair]] = {name: set() for name in layers}
    for index, operation in enumerate(graph.operations):
        for name in operation.weights:
            if name in uses:
                uses[name].add(_pair(graph.operations, users, index, parameters))
    sharing: dict[str, set[str]] = {}
    for name, found in uses.items():
        for pair in found:
            if pair.gamma is not None:
                sharing.setdefault(pair.gamma, set()).add(name)
    result = {}
    for name, found in uses.items():
        pair = Pair(None, None, "it is not used in eval mode") if not found else next(iter(found))
        if len(found) > 1:
            pair = Pair(None, None, "its output goes to different places")
        elif pair.gamma is not None and len(sharing[pair.gamma]) > 1:
            others = ", ".join(sorted(sharing[pair.gamma] - {name}))
            pair = Pair(pair.norm, None, f"γ left as it is: {others} shares it")
        result[name] = pair
    return result


def _pair(
    operations: tuple[Operation, ...], users: dict[int, list[int]], index: int, parameters: Collection[str]
) -> Pair:
    while True:
        following = users.get(index, [])
        if len(following) > 1:
            return Pair(None, None, "no norm: its output goes to several operations")
        index = following[0] if following else -1
        operation = operations[index] if following else None
        if operation is not None and operation.kind == "norm" and "vector_norm" not in operation.target:
            break
        bias_or_view = operation is not None and operation.kind in ("add", "reshape") and len(operation.inputs) == 1
        if not bias_or_view:
            return Pair(None, None, "no norm takes its output")
    # Operands come in the order of the operators' schemas: weight, bias, running statistics.
    held = operation.parameters
    norm = held[0].rpartition(".")[0] if held else operation.target.split(".")[1]
    gamma = next((name for name in held if name in parameters and not name.endswith("bias")), None)
    return Pair(norm, gamma, "" if gamma else "its norm has no γ that can be set")


def spectral_norm(weight: Tensor, layer: Layer) -> float:
    """`‖W‖₂` of `W` as a matrix of outputs × fan-in; of the blocks of a grouped convolution the largest."""
    blocks = weight.unflatten(0, (layer.groups, -1)).movedim(layer.out_dim + 1, 1).flatten(2)
    gram = blocks @ blocks.mT if blocks.shape[1] <= blocks.shape[2] else blocks.mT @ blocks
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram).max())))


def constant(weight: Tensor, sigma: float, layer: Layer) -> float:
    """`L = σ/√(0.5·n·v)`, fan-in n and `v = Var(W)`: the Lipschitz constant of a layer and its norm at γ = 1, for inputs
    that are rectified standard Gaussians. Infinite for equal weights."""
    deviation = math.sqrt(0.5 * layer.fan_in * float(weight.var(correction=0)))
    return sigma / deviation if deviation > 0 else math.inf


def estimate(weight: Tensor, sigma: float, layer: Layer, pair: Pair, gamma: Tensor | None) -> float:
    """`L·max|γ|` (γ = 1 for a norm without), and σ for a layer without norm; 0 for a layer without a weight left.

    `sigma`: `spectral_norm(weight, layer)`."""
    if pair.norm is None or sigma == 0:
        return sigma
    return constant(weight, sigma, layer) * (1.0 if gamma is None else float(gamma.abs().max()))
