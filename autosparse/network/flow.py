"""Synaptic flow of any network: the gradient of its recorded tape, replayed on a linear and non-negative version of it.

What an operator becomes there (`|θ|` stands for `|θ ⊙ m|`, x for a non-negative activation):

- products and convolutions with a weight: `|θ|` in its place; biases, shifts and positions: 0;
- norm layers: `x·|γ|`, without statistics; activations, dropout: x; max-pooling, averages, sums, moves: as they are;
- `x·θ`, `x·c` of a parameter or constant: `x·|θ|`, `x·|c|`; `x − s` with a statistic s (of fewer elements): x;
- weights and scales that are zero throughout, as classifiers and the last norms of residual branches often begin: 1
  everywhere, or there would be no flow to compare;
- gates are 1. Of two activations multiplied elementwise the gate is the one of fewer elements; else the output of the
  more bounded operator (sigmoid, softmax, clamp before tanh, GELU, ReLU before everything else); else each is the
  gate of the other, and the result is their mean;
- matrix products of two activations: the same choice, but by the operator alone; the gate averages uniformly. So
  attention is the mean of V over the keys, and nothing flows through queries and keys.

All of this is linear in the activations, so each is held as `x·2^k` with its own whole number k: products rescale their
result, operands of a sum are brought to the same k. This changes neither a bit of the mantissa nor the weighting of
branches, and keeps networks of any depth finite; gradients are then those of `R·2^(−k)`, one factor for all layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, first_line, raise_out_of_memory
from autosparse.masks.layers import Layer, unwrap
from autosparse.masks.mask import all_finite, masked
from autosparse.network.flow_rules import LOOKUPS, FlowValue, aligned, rule
from autosparse.network.linearize import (
    Replay,
    Step,
    Tape,
    Traced,
    first_names,
    record,
    shared_storage,
)
from autosparse.network.operators import FACTORS, takes_no_values


def synaptic_flow(
    model: nn.Module,
    layers: Mapping[str, Layer],
    example_input: Any,
    masks: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Synaptic flow through each weight: the sum over all paths through it of the product of their `|θ ⊙ m|`.

    `s = |θ⊙m| ⊙ ∂R/∂|θ⊙m| ≥ 0`, where `R` is the sum of the outputs of the linearised network (see this module) on an
    input of ones; 0 where the mask is 0. In a chain of layers each layer's flow sums to `R`. Exact up to one power of
    two, common to all layers, which is 1 as long as `R` lies within the square root of what `dtype` can hold (2^±512).
    The model stays as it is.

    Args:
        layers: the weights whose flow is wanted.
        example_input: as for `trace`; only its shape matters, and the first example of the batch is used.
        masks: by parameter name, in the parameter's shape; parameters without one are dense.
        dtype: of computation and result.
        weights: in place of the model's parameters of these names.

    Returns:
        Per layer a tensor of the weight's shape, on the model's device.

    Raises:
        AutoSparseError: masks or weights fit no parameter, the model does not take this input, an operator has no rule,
            or the weights are not finite.

    Source: Tanaka, Kunin, Yamins & Ganguli 2020, "Pruning neural networks without any data by iteratively conserving
    synaptic flow"; the rules for gates, attention and statistics are ours, and on plain ReLU/BatchNorm networks they
    change nothing.
    """
    model = unwrap(model)
    tape = record(model, example_input)
    memory = example_input.memory if isinstance(example_input, Traced) else {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda):
        absolute = _absolute(model, layers, masks or {}, weights or {}, dtype, memory)
        leaves = {name: absolute[name].detach().requires_grad_() for name in layers}
        total, exponent = _Flow(tape, model, absolute | leaves, device, dtype).total()
        gradients: Any = [None] * len(leaves)
        if total.requires_grad:
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    limit = int(math.log2(torch.finfo(dtype).max)) // 2
    scale = 2.0 ** max(-limit, min(limit, exponent))
    with torch.no_grad():
        flow = {
            name: torch.zeros_like(leaf) if g is None else _times(leaf, g, scale, owned)
            for (name, leaf), g, owned in zip(leaves.items(), gradients, _own_memory(gradients), strict=True)
        }
    for name, score in flow.items():
        if not all_finite(score):
            raise AutoSparseError(
                f"synaptic flow of {name!r} is not finite in {dtype}: check that the weights are finite"
            )
    return {name: score.detach() for name, score in flow.items()}


def _times(leaf: Tensor, gradient: Tensor, scale: float, owned: bool) -> Tensor:
    """`leaf·gradient·scale`, in the gradient's memory if it is its own: new memory costs more than the product."""
    product = gradient.mul_(leaf) if owned else leaf * gradient
    return product if scale == 1 else product.mul_(scale)


def _own_memory(tensors: Sequence[Tensor | None]) -> list[bool]:
    """Which of the tensors share no memory with another, and lie in it as a weight does."""
    stored = Counter(shared_storage(t) for t in tensors if t is not None)
    return [t is not None and stored[shared_storage(t)] == 1 and t.is_contiguous() for t in tensors]


def rescaled_flow(
    model: nn.Module, layers: Mapping[str, Layer], example_input: Any, masks: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Synaptic flow after the `|θ ⊙ m|` of every layer is divided by its spectral norm.

    `|θ⊙m| / σ(|θ⊙m|)` in place of `θ`, σ the largest singular value of the matrix `(out, in·k_h·k_w)`; a layer of norm 0
    stays as it is. In a chain of layers this multiplies all scores by one constant; where branches meet it weighs them
    anew. Takes, returns and raises what `synaptic_flow` does, in float64.

    Source: ReSynFlow; the model itself keeps its weights.
    """
    parameters = dict(unwrap(model).named_parameters())
    scaled = {}
    for name, layer in layers.items():
        weight = parameters[name].detach().double().abs()
        if masks is not None and name in masks:
            weight = masked(weight, masks[name])
        matrix = weight.movedim(layer.out_dim, 0).flatten(1)
        small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        norm = torch.linalg.eigvalsh(small)[-1].clamp(min=0).sqrt()  # far cheaper than the singular values
        scaled[name] = weight / norm if norm > 0 else weight
    return synaptic_flow(model, layers, example_input, masks, weights=scaled)


def without_flow(model: nn.Module, layers: Mapping[str, Layer], example_input: Any) -> dict[str, Tensor]:
    """The weights of output units that synaptic flow cannot reach, whatever `layers` weigh: their score is always 0.

    Queries and keys (of a stacked projection only these rows), gates, squeeze-and-excitation, what position biases are
    computed with, layers that eval mode does not run. Takes and raises what `synaptic_flow` does.

    Returns:
        Bool tensors of the weights' shapes, True where no flow comes; only of layers that have such weights.
    """
    parameters = dict(unwrap(model).named_parameters())
    flow = synaptic_flow(model, layers, example_input, weights={n: torch.ones_like(parameters[n]) for n in layers})
    found = {}
    for name, score in flow.items():
        others = [d for d in range(score.dim()) if d != layers[name].out_dim]
        dry = score.amax(others, keepdim=True) == 0 if others else score == 0
        if dry.any():
            found[name] = dry.expand(score.shape).clone()
    return found


def _absolute(
    model: nn.Module,
    layers: Mapping[str, Layer],
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    memory: dict[str, Tensor],
) -> dict[str, Tensor]:
    """`|θ ⊙ m|` of every parameter, by first names; in `memory`, which the next call with the same writes over."""
    chosen = {first: weights[name] for name, first in first_names(model, weights, "weight").items()}
    kept = {first: masks[name] for name, first in first_names(model, masks).items()}
    found = {}
    for name, parameter in model.named_parameters():
        value = memory.setdefault(name, torch.empty_like(parameter, dtype=dtype, requires_grad=False))
        value.copy_(chosen.get(name, parameter).detach()).abs_()
        if name in layers and not (value.flatten()[:1].any() or value.any()):  # as a rule the first tells
            value.fill_(1)
        if name in kept and all_finite(value):  # a product is far faster than a choice, but would keep NaN
            value.mul_(kept[name].to(parameter.device, torch.bool))
        elif name in kept:
            value.copy_(masked(value, kept[name]))
        found[name] = value
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The replay

_STATISTICS = frozenset({"var", "std", "norm", "linalg_vector_norm"})
# Products rescale results that leave 2^±32.
_ROOM = 32


class _Flow(Replay[FlowValue]):
    """Runs a tape on the linearised network.

    In each operator one role carries the flow: data, or weights where there are no data.
    """

    def __init__(
        self, tape: Tape, model: nn.Module, absolute: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(tape, device)
        self.dtype = dtype
        self.name = type(model).__name__
        for name, _ in model.named_parameters():
            self.values[id(tape.state[name])] = FlowValue(absolute[name], "weight")
        for name, b in model.named_buffers():
            self.values[id(tape.state[name])] = self.constant(b.detach().clone())
        for t, given in tape.inputs:
            if t.is_floating_point():
                self.values[id(t)] = self._ones(t.shape, "data")
            else:
                real = given.detach().to(device, copy=True)
                self.values[id(t)] = dataclasses.replace(self._ones(t.shape, "gate"), known=real)

    def total(self) -> tuple[Tensor, int]:
        """`R` as a number and the power of two that it is to be multiplied by."""
        try:
            outputs = [v for v in self.run() if v.role == "data"]
        except NotImplementedError as error:
            raise AutoSparseError(
                f"synaptic flow cannot follow {self.name} ({first_line(error)}): use another criterion"
            ) from error
        if not outputs:
            return torch.zeros((), dtype=self.dtype, device=self.device), 0
        values = aligned(outputs)
        return torch.stack([v.tensor.sum() for v in values]).sum(), values[0].exponent

    def aligned(self, values: list[FlowValue]) -> list[FlowValue]:
        return aligned(values)

    def constant(self, tensor: Tensor) -> FlowValue:
        return FlowValue(tensor.to(self.dtype) if tensor.is_floating_point() else tensor, "constant")

    def _ones(self, shape: torch.Size, role: str) -> FlowValue:
        return FlowValue(torch.ones(shape, dtype=self.dtype, device=self.device), role)

    def step(self, step: Step) -> list[FlowValue]:
        try:
            values = self._step(step)
            for value, shape in zip(values, step.shapes, strict=True):
                if value.tensor.shape != shape:
                    raise ValueError(f"the rule gives shape {tuple(value.tensor.shape)} and not {tuple(shape)}")
        except (RuntimeError, MemoryError, TypeError, ValueError, IndexError, KeyError) as error:
            raise_out_of_memory(error, f"computing the synaptic flow of {self.name}")
            operands = [self.values[id(t)] for t in step.operands if id(t) in self.values]
            weights = [v for v in operands if v.role == "weight"]
            if weights and all(v.role in ("weight", "constant") for v in operands):
                return [self._like(weights, shape) for shape in step.shapes]
            reason = first_line(error)
            raise AutoSparseError(
                f"synaptic flow cannot follow {step.func} in {self.name} ({reason}): use another criterion"
            ) from error
        return values

    def _gates(self, step: Step) -> list[FlowValue]:
        return [self._ones(shape, "gate") for shape in step.shapes]

    def _like(self, weights: list[FlowValue], shape: torch.Size) -> FlowValue:
        """What becomes of weights in an unknown map of parameters alone: the one of the same shape, or else ones."""
        return next((v for v in weights if v.tensor.shape == shape), self._ones(shape, "constant"))

    def _step(self, step: Step) -> list[FlowValue]:
        operands = [self.value(t) for t in step.operands]
        roles = {v.role for v in operands}
        if step.name == "bernoulli":  # a dropout of the model's own
            return [self._ones(shape, "constant") for shape in step.shapes]
        if roles <= {"constant"} or takes_no_values(step.name):
            return [self.constant(t) for t in self.call(step)]
        if known := self.known(step):
            return [dataclasses.replace(self._ones(t.shape, "gate"), known=t) for t in known]
        if roles <= {"constant", "gate"} or step.name in _STATISTICS or step.name == "view_as_complex":
            return self._gates(step)
        if not any(t.is_floating_point() or t.is_complex() for t in step.results):  # comparisons, indices, tokens
            return self._gates(step)
        if "data" not in roles and "gate" in roles:
            if step.name in LOOKUPS:  # of tokens: this is where their flow starts
                return [self._ones(shape, "data") for shape in step.shapes]
            if step.name in FACTORS:  # tokens as one-hot vectors
                operands = [dataclasses.replace(v, role="data") if v.role == "gate" else v for v in operands]
        role = "data" if any(v.role == "data" for v in operands) else "weight"
        carriers = iter(aligned([v for v in operands if v.role == role]))
        operands = [next(carriers) if v.role == role else v for v in operands]
        read = {id(t): v for t, v in zip(step.operands, operands, strict=True)}
        found = rule(step, read, [v for v in operands if v.role == role], role)
        values = [
            found[i] if i < len(found) and t.is_floating_point() else self._ones(shape, "gate")
            for i, (t, shape) in enumerate(zip(step.results, step.shapes, strict=True))
        ]
        return [_rescaled(v) if step.name in FACTORS and role == "data" else v for v in values]


def _rescaled(value: FlowValue) -> FlowValue:
    """The same value as a tensor near 1 and a power of two."""
    if value.tensor.numel() == 0:
        return value
    peak = float(value.tensor.detach().amax())
    shift = max(-512, math.frexp(peak)[1]) if math.isfinite(peak) else 0
    if abs(shift) <= _ROOM:
        return value
    return dataclasses.replace(value, tensor=value.tensor * 2.0**-shift, exponent=value.exponent + shift)
