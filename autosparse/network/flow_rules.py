"""The rules of the linearized network: what each operator does to the flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from autosparse.network.linearize import (
    MOVES,
    Step,
    Value,
    either_factor,
    is_pointwise,
    multiply,
)
from autosparse.network.operators import FACTORS, KIND, VIEWS

_CONTENT, _ACTIVATION, _BOUNDED = 0, 1, 2
_BOUNDED_NAMES = frozenset({"sigmoid", "hardsigmoid", "log_sigmoid_forward", "clamp", "clamp_max", "hardtanh", "relu6"})


# Functions of one number that are no gates by themselves.
_PLAIN = frozenset({"neg", "abs", "pow", "square", "sqrt", "nan_to_num", "round", "floor", "ceil"})


_SAME = frozenset(
    {"alias", "detach", "lift_fresh", "lift", "clone", "contiguous", "_to_copy", "native_dropout", "dropout"}
)


_LINEAR = frozenset({"sum", "mean", "max", "min", "amax", "amin", "cumsum"}) | MOVES


LOOKUPS = frozenset({"embedding", "embedding_bag", "_embedding_bag", "index", "index_select", "gather"})


@dataclass(frozen=True)
class FlowValue(Value):
    """What stands for a tensor of the tape.

    `role` is `"data"` (linear in the input: `tensor·2^exponent`), `"weight"` (made of parameters, non-negative),
    `"constant"` (the real thing) or `"gate"` (depends on data, but not linearly: no flow; ones). `rank` tells how much
    like a gate it is when multiplied with other data.
    """

    rank: int = _CONTENT
    exponent: int = 0


Read = dict[int, FlowValue]  # by id of the operand


def aligned(values: list[FlowValue]) -> list[FlowValue]:
    """The same values with one exponent: the largest."""
    top = max((v.exponent for v in values), default=0)
    return [
        v if v.exponent == top else dataclasses.replace(v, tensor=v.tensor * 2.0 ** (v.exponent - top), exponent=top)
        for v in values
    ]


def rule(step: Step, read: Read, carriers: list[FlowValue], role: str) -> list[FlowValue]:
    """What the results of an operator are; the first is enough where the others are indices or statistics."""
    name, arguments, shape = step.name, step.arguments, step.shapes[0]
    kind = KIND.get(name)
    first = carriers[0]

    def as_value(a: Any) -> FlowValue:
        return read[id(a)] if isinstance(a, Tensor) else FlowValue(first.tensor.new_tensor(a), "constant")

    def become(tensor: Tensor, rank: int = first.rank) -> list[FlowValue]:
        return [dataclasses.replace(first, tensor=tensor.expand(shape), rank=rank)]

    if name in FACTORS:
        return [_product(name, arguments, read, role)]
    if kind == "norm":
        return become(_normalized(name, first, read.get(id(arguments.get("weight")))), _CONTENT)
    if kind == "softmax":
        return become(first.tensor, _BOUNDED)
    if name == "glu":
        return become(first.tensor.chunk(2, dim=arguments.get("dim", -1))[0], _CONTENT)
    if kind == "activation":
        return become(first.tensor, _BOUNDED if name in _BOUNDED_NAMES else _ACTIVATION)
    if kind == "add":
        a, b = as_value(arguments["self"]), as_value(arguments["other"])
        return become(*_sum(name, a, b, abs(arguments.get("alpha", 1)), role))
    if name == "mul":
        return become(*_gated(as_value(arguments["self"]), as_value(arguments["other"])))
    if name == "div":
        return become(*_divided(as_value(arguments["self"]), as_value(arguments["other"]), role))
    if name == "addcmul":
        product, rank = _gated(as_value(arguments["tensor1"]), as_value(arguments["tensor2"]))
        factor = dataclasses.replace(first, tensor=product, rank=rank)
        if role not in (read[id(arguments[k])].role for k in ("tensor1", "tensor2")):
            return become(as_value(arguments["self"]).tensor)
        return become(*_sum("add", as_value(arguments["self"]), factor, abs(arguments.get("value", 1)), role))
    if name == "where" and read[id(arguments["condition"])].role == "constant":
        condition = read[id(arguments["condition"])].tensor
        one, other = (_carried(as_value(arguments[k]), role) for k in ("self", "other"))
        return become(torch.where(condition, one, other))
    if name in ("where", "lerp"):  # a choice between activations, made by activations
        return become(torch.stack([v.tensor.expand(shape) for v in carriers]).mean(0), _CONTENT)
    if name == "masked_fill":
        hidden = read[id(arguments["mask"])]
        return become(first.tensor.masked_fill(hidden.tensor, 0.0) if hidden.role == "constant" else first.tensor)
    if name == "copy":
        return become(_carried(as_value(arguments["src"]), role))
    if name in ("fill", "zero"):
        return become(torch.zeros_like(first.tensor))
    if name in _SAME:
        return become(first.tensor)
    if name == "as_strided" and first.tensor.shape != shape:
        raise ValueError("no rule")
    if name in VIEWS or name == "as_strided":  # strides may differ from the recorded ones
        return become(first.tensor.reshape(shape))
    if name == "constant_pad_nd":
        return become(F.pad(first.tensor, arguments["pad"]))
    if name == "var_mean":
        mean = first.tensor.mean(arguments.get("dim"), keepdim=True).reshape(step.shapes[1])
        return [dataclasses.replace(first, tensor=torch.ones_like(mean), role="gate"), *become(mean)]
    if name in ("maximum", "minimum") and len(carriers) > 1:
        return become(step.func(*(v.tensor for v in carriers)))
    if is_pointwise(step.func) and len(carriers) == 1:
        return become(first.tensor, first.rank if name in _PLAIN else _BOUNDED)
    follows = getattr(step.func, "is_view", False) or kind in ("reshape", "slice", "concat", "pool", "resize")
    if (follows or name in _LINEAR or name in LOOKUPS) and not ("bicubic" in name or "grid" in name):
        return [dataclasses.replace(first, tensor=t) for t in _itself(step, read, role)]
    raise ValueError("no rule")


def _product(name: str, arguments: Mapping[str, Any], read: Read, role: str) -> FlowValue:
    """A product or convolution with what it adds."""
    (first, dim), (second, _) = FACTORS[name]
    a, b = read[id(arguments[first])], read[id(arguments[second])]
    rank, exponent = _CONTENT, max(a.exponent, b.exponent)
    if any(v.role not in ("data", "gate") for v in (a, b)):
        tensor = multiply(name, arguments, _factor(a), _factor(b))
    elif name == "convolution":
        raise ValueError("its kernel is computed from activations")
    else:
        share, other = _shares(a, b)
        tensor = either_factor(name, a.tensor * share, b.tensor * other) / a.tensor.shape[dim]
        rank = _BOUNDED if share == other else _CONTENT
    tensor = tensor * abs(arguments["alpha"]) if "alpha" in arguments else tensor
    for key in {"bias", "self", "input"} - {first, second}:
        added = arguments.get(key)
        if isinstance(added, Tensor) and read[id(added)].role == role:
            tensor = tensor + read[id(added)].tensor * abs(arguments.get("beta", 1))
    return FlowValue(tensor, role, rank, exponent)


def _shares(a: FlowValue, b: FlowValue) -> tuple[float, float]:
    """How much of either of two activations passes where they are multiplied: the rest is the gate, which is 1."""
    if "gate" in (a.role, b.role):
        return float(a.role != "gate"), float(b.role != "gate")
    if a.rank != b.rank:
        return float(a.rank < b.rank), float(b.rank < a.rank)
    return 0.5, 0.5


def _gated(a: FlowValue, b: FlowValue) -> tuple[Tensor, int]:
    """`a·b` and its rank."""
    sizes = a.tensor.numel(), b.tensor.numel()
    if "gate" not in (a.role, b.role):
        if not a.role == b.role == "data":
            return _factor(a) * _factor(b), max(a.rank, b.rank)
        if sizes[0] != sizes[1]:
            content = a if sizes[0] > sizes[1] else b
            return content.tensor, content.rank
    share, other = _shares(a, b)
    if share == other:
        return (a.tensor + b.tensor) * share, _CONTENT
    content = a if share > other else b
    return content.tensor, max(content.rank, _ACTIVATION) if sizes[0] == sizes[1] else content.rank


def _divided(a: FlowValue, b: FlowValue, role: str) -> tuple[Tensor, int]:
    """`a/b` and its rank: what activations, or statistics of a weight, divide is as it was."""
    if b.role in ("data", "gate"):
        return (a.tensor, a.rank) if a.role == role else (b.tensor, _BOUNDED)
    if a.role == b.role and b.tensor.numel() < a.tensor.numel():
        return a.tensor, a.rank
    return _factor(a) / _factor(b), a.rank


def _sum(name: str, a: FlowValue, b: FlowValue, alpha: float, role: str) -> tuple[Tensor, int]:
    """`a ± alpha·b` and its rank; beside data only data count, beside weights constants too (`1 + γ`)."""
    if name == "sub" and a.role == b.role == role and b.tensor.numel() < a.tensor.numel():
        return a.tensor, _CONTENT
    counted = (role,) if role == "data" else ("weight", "constant")
    terms = [
        v.tensor.abs() * factor if v.role == "constant" else v.tensor if factor == 1 else v.tensor * factor
        for v, factor in ((a, 1), (b, alpha))
        if v.role in counted
    ]
    if len(terms) == 1:
        return terms[0], max(v.rank for v in (a, b) if v.role in counted)
    return terms[0] + terms[1], _CONTENT


def _normalized(name: str, x: FlowValue, gamma: FlowValue | None) -> Tensor:
    """`x·|γ|`, per channel (dimension 1) or over the last dimensions, as the norm layer has it."""
    if gamma is None or gamma.role in ("data", "gate"):
        return x.tensor
    per_channel = "layer_norm" not in name and "rms_norm" not in name
    factor = _factor(gamma)
    return x.tensor * (factor.reshape(-1, *[1] * (x.tensor.dim() - 2)) if per_channel else factor)


def _factor(v: FlowValue) -> Tensor:
    """Non-negative; and 1 for a scale or weight outside of `layers` that is zero throughout."""
    if v.role == "constant":
        return v.tensor.abs()
    zero = v.role == "weight" and not v.tensor.requires_grad and not v.tensor.any()
    return torch.ones_like(v.tensor) if zero else v.tensor


def _carried(v: FlowValue, role: str) -> Tensor:
    return v.tensor if v.role == role else torch.zeros_like(v.tensor)


def _itself(step: Step, read: Read, role: str) -> list[Tensor]:
    """The operator on what carries the flow, with 0 in place of everything else but indices."""

    def stand_in(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        v = read[id(a)]
        if v.index is not None:
            return v.index
        if not a.is_floating_point() and v.role == "gate":
            raise ValueError("activations choose the elements")
        return _carried(v, role)

    kwargs = {key: value for key, value in step.kwargs.items() if key != "dtype"}
    args, kwargs = tree_map(stand_in, (step.args, kwargs))
    if step.written:  # the operands may stand for other tensors too
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    return [t for t in tree_leaves(step.func(*args, **kwargs)) if isinstance(t, Tensor)]
