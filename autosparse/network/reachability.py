"""Which of the kept weights lie on a path from the input to the output, and which layers are dead.

The network runs once forward and once backward on its *dependence*: every activation is 1 where it can depend on an
input element and 0 elsewhere, every weight is its mask. Products and sums of these say where a path exists; a weight is
effective if it is kept, can be reached from the input (forward) and reaches the output (its gradient is positive).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from autosparse.errors import raise_out_of_memory
from autosparse.masks.layers import unwrap
from autosparse.network.linearize import (
    MOVES,
    Replay,
    Step,
    Tape,
    Value,
    either_factor,
    first_names,
    is_pointwise,
    multiply,
    record,
)
from autosparse.network.observe import owned
from autosparse.network.operators import FACTORS, KIND, ON_VECTORS, VIEWS, takes_no_values


@dataclass(frozen=True)
class Reachability:
    """How much of a mask is of use.

    `effective_sparsity` is one minus the share of masked layers' weights that are effective; `dead_layers` have no
    effective weight; `effective` counts the effective weights of each layer. `exact` is False if the network's paths
    could not be followed: then the effective sparsity is `None`, only layers without any kept weight are known to be
    dead, and every kept weight counts as effective. Layers that eval mode does not run (auxiliary classifiers) or that
    see nothing but a learned token (queries of class attention) have no path and are dead.
    """

    effective_sparsity: float | None
    dead_layers: tuple[str, ...]
    effective: dict[str, int]
    exact: bool = True


def reachability(model: nn.Module, masks: Mapping[str, Tensor], example_input: Any) -> Reachability:
    """Effective sparsity and dead layers of `masks` (Vysogorets & Kempe 2021, "Connectivity Matters").

    Takes and raises what `effective_masks` does.
    """
    found, exact = _effective(model, masks, example_input)
    effective = {name: int(mask.sum()) for name, mask in found.items()}
    total = sum(mask.numel() for mask in masks.values())
    return Reachability(
        effective_sparsity=1 - sum(effective.values()) / max(total, 1) if exact else None,
        dead_layers=tuple(name for name, count in effective.items() if count == 0),
        effective=effective,
        exact=exact,
    )


def effective_masks(model: nn.Module, masks: Mapping[str, Tensor], example_input: Any) -> dict[str, Tensor]:
    """The weights of `masks` that are kept and on a path from some input element to some output element.

    Exact by position: the outer taps of a 3×3 kernel on a 1×1 map see only padding and are not effective. Biases and
    shifts are no path; gates, attention and other products of activations pass a path from either factor; an operator
    that is not known passes paths from all of its inputs to all of its outputs.

    Args:
        masks: bool tensors by parameter name, in the parameter's shape; parameters without a mask count as present.
        example_input: as for `trace`; the first example of the batch is used, and only its shape matters.

    Raises:
        AutoSparseError: a mask fits no parameter, or the model does not take this input.
    """
    return _effective(model, masks, example_input)[0]


def _effective(model: nn.Module, masks: Mapping[str, Tensor], example_input: Any) -> tuple[dict[str, Tensor], bool]:
    """The effective weights, and whether the paths could be followed: a network in which even dense layers have none, as
    where objects hide its tensors, could not."""
    model = unwrap(model)
    names = first_names(model, masks)
    tape = record(model, example_input)
    try:
        found = _on_paths(model, {names[n]: mask != 0 for n, mask in masks.items()}, tape)
        if not any(bool(mask.any()) for mask in found.values()):
            dense = _on_paths(
                model, {names[n]: torch.ones_like(mask, dtype=torch.bool) for n, mask in masks.items()}, tape
            )
            if not any(bool(mask.any()) for mask in dense.values()):
                raise NotImplementedError("no path is seen")
    except (RuntimeError, MemoryError, TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise_out_of_memory(error, f"finding the paths through {type(model).__name__}")
        return {name: mask.bool().clone() for name, mask in masks.items()}, False
    return {name: mask.bool() & found[names[name]].to(mask.device) for name, mask in masks.items()}, True


def _on_paths(model: nn.Module, masks: Mapping[str, Tensor], tape: Tape) -> dict[str, Tensor]:
    """The positions whose paths reach an output."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda):
        leaves = {name: mask.to(device).float().requires_grad_() for name, mask in masks.items()}
        reached = [v.dependence.sum() for v in _Replay(tape, model, leaves, device).run() if v.dependence.requires_grad]
        gradients: Any = [None] * len(leaves)
        if reached:
            total = torch.stack(reached).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=False)
    return {
        name: torch.zeros_like(leaf, dtype=torch.bool) if g is None else (leaf > 0) & (g > 0.5)
        for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
    }


# ---------------------------------------------------------------------------------------------------------------------
# The replay


@dataclass(frozen=True)
class _Value(Value):
    """What stands for a tensor of the tape.

    `role` is `"data"` (the tensor is its dependence on the input, float32, 0 or 1), `"weight"` (made of parameters; the
    tensor is its mask) or `"constant"` (the tensor is the real thing). `owned`: of a Conv, Linear or attention module.
    """

    owned: bool = False

    @property
    def dependence(self) -> Tensor:
        """0 for everything that does not come from the input: biases, positions and tables are no path."""
        return self.tensor if self.role == "data" else torch.zeros_like(self.tensor, dtype=torch.float32)

    @property
    def pattern(self) -> Tensor:
        """Where the tensor can be non-zero, as a factor of a product."""
        return (self.tensor != 0).float() if self.role == "constant" else self.tensor


class _Clamp(torch.autograd.Function):
    """Forward `x > forward`, backward `g > backward`, as 0 and 1; `None` passes the values through.

    Without it counts of paths would overflow (or, averaged, vanish) in deep networks. Counts are whole numbers except
    for rounding (Winograd convolutions give 1e-7 where 0 is meant), averages are fractions: hence two thresholds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float | None, backward: float | None) -> Tensor:
        ctx.threshold = backward
        return x.view_as(x) if forward is None else (x > forward).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] if ctx.threshold is None else (grads[0] > ctx.threshold).float(), None, None


def _some(x: Tensor, threshold: float = 0.0) -> Tensor:
    """1 where `x` is positive: the result of a sum of dependences."""
    clamped: Tensor = _Clamp.apply(x, threshold, 0.0)
    return clamped


def _entering(x: Tensor, threshold: float = 0.0) -> Tensor:
    """`x`, whose gradient is 1 where that of the operator that it enters is positive."""
    passed: Tensor = _Clamp.apply(x, None, threshold)
    return passed


# Statistics that only scale what they are divided into: a norm layer is the identity of each channel.
_SCALES = ("rsqrt", "var", "std", "linalg_vector_norm", "norm")
_REDUCTIONS = ("mean", "sum", "amax", "amin", "max", "min", "prod", "logsumexp", "any", "all")
_POINTWISE = {"add", "mul", "activation"}


class _Replay(Replay[_Value]):
    """Runs a tape on dependences."""

    def __init__(self, tape: Tape, model: nn.Module, masks: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__(tape, device)
        modules = owned(model)
        for name, p in model.named_parameters():
            present = torch.ones((), dtype=torch.float32, device=device).expand(p.shape)
            self.values[id(tape.state[name])] = _Value(masks.get(name, present), "weight", name in modules)
        for name, b in model.named_buffers():
            self.values[id(tape.state[name])] = _Value(b.detach().clone(), "constant")
        for t, given in tape.inputs:
            known = None if t.is_floating_point() else given.detach().to(device, copy=True)
            self.values[id(t)] = _Value(torch.ones(t.shape, dtype=torch.float32, device=device), "data", known=known)

    def constant(self, tensor: Tensor) -> _Value:
        return _Value(tensor, "constant")

    def step(self, step: Step) -> list[_Value]:
        operands = [self.value(t) for t in step.operands]
        roles = {v.role for v in operands}
        if roles <= {"constant"} or takes_no_values(step.name):
            return [_Value(t, "constant") for t in self.call(step)]
        if step.name in FACTORS and not ("data" not in roles and step.name in ON_VECTORS):
            return [self._product(step)]
        if "data" not in roles:
            tensors = _on_weights(step, operands, self.call)
            return [_Value(t, "weight", any(v.owned for v in operands)) for t in tensors]
        chosen = [t for t, v in zip(step.operands, operands, strict=True) if v.role == "data" and v.index is None]
        if torch.Tag.dynamic_output_shape in step.func.tags and (
            step.name != "index" or any(t.dtype in (torch.bool, torch.uint8) for t in chosen)
        ):
            raise NotImplementedError("activations choose how many elements there are")
        sources = [v.tensor for v in operands if v.role == "data"]
        try:
            tensors = self._on_data(step, [(t, self.value(t)) for t in step.operands])
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # a form that the rules do not know
            raise_out_of_memory(error, "finding the paths through the network")
            tensors = []
        if [t.shape for t in tensors] != step.shapes:
            tensors = [_any_to_any(sources, shape) for shape in step.shapes]
        known: list[Any] = self.known(step) or [None] * len(tensors)
        return [_Value(t, "data", known=k) for t, k in zip(tensors, known, strict=True)]

    def _product(self, step: Step) -> _Value:
        """A product or convolution: of data with weights, of two activations (either is a path), or of two weights."""
        arguments = step.arguments
        a, b = (self.value(arguments[key]) for key, _ in FACTORS[step.name])
        if "data" not in (a.role, b.role):
            if a.owned == b.owned:
                both = multiply(step.name, arguments, a.pattern, b.pattern)
                return _Value(_some(both, 0.5), "data" if a.owned else "weight")
            # What a layer's weight multiplies is data, here an input of its own: a table of coordinates, learned queries.
            source = torch.ones((), dtype=torch.float32, device=self.device)
            a, b = (v if v.owned else _Value(source.expand(v.tensor.shape), "data") for v in (a, b))
        if a.role == b.role == "data":
            if step.name == "convolution":
                ones = [torch.ones_like(v.tensor) for v in (a, b)]
                result = multiply(step.name, arguments, _entering(a.tensor, 0.5), ones[1])
                result = result + multiply(step.name, arguments, ones[0], _entering(b.tensor, 0.5))
            else:
                result = either_factor(step.name, _entering(a.tensor, 0.5), _entering(b.tensor, 0.5))
        else:
            x, y = (_entering(v.tensor, 0.5) if v.role == "data" else v.pattern for v in (a, b))
            result = multiply(step.name, arguments, x, y)
        addend = next(
            (
                arguments[k]
                for k in ("bias", "self", "input")
                if k not in dict(FACTORS[step.name]) and isinstance(arguments.get(k), Tensor)
            ),
            None,
        )
        if addend is not None and (added := self.value(addend)).role == "data":
            result = result + added.tensor
        return _Value(_some(result, 0.5), "data")

    def _on_data(self, step: Step, operands: list[tuple[Tensor, _Value]]) -> list[Tensor]:
        """The dependences of the results; none if the operator is not known."""
        name, arguments = step.name, step.arguments
        first = operands[0][1].dependence
        kind = KIND.get(name)
        shapes = step.shapes
        if name in _SCALES:
            return [torch.zeros(shape, dtype=torch.float32, device=self.device) for shape in shapes]
        if name == "var_mean":
            return [
                torch.zeros(shapes[0], dtype=torch.float32, device=self.device),
                _over(first, arguments).reshape(shapes[1]),
            ]
        if kind == "norm" and all(v.role != "data" for _, v in operands[1:]):
            return [first, *(torch.zeros(shape, dtype=torch.float32, device=self.device) for shape in shapes[1:])]
        if kind == "softmax":
            return [_over(first, {"dim": arguments["dim"], "keepdim": True}).expand(shapes[0])]
        if name in _REDUCTIONS:
            return [_over(first, arguments).reshape(shape) for shape in shapes]
        if kind == "pool":
            pooled = _pool(name, arguments, _entering(first))
            return [pooled] * len(shapes)  # the second result of a max-pool are indices
        if kind == "resize":
            blends = "bicubic" in name or "grid" in name  # bicubic has negative coefficients
            return [] if blends else [_some(self._run(step, enter=True)[0])]
        if name == "glu":
            return [_either_of(list(first.chunk(2, dim=arguments.get("dim", -1))))]
        if name == "embedding" and operands[0][1].role != "data":
            return [operands[1][1].dependence.unsqueeze(-1).expand(shapes[0])]
        if name == "constant_pad_nd":
            return [F.pad(first, arguments["pad"])]
        if name == "copy":
            return [self.value(arguments["src"]).dependence.expand(step.shapes[0])]
        if name in ("fill", "zero"):
            return [torch.zeros_like(first)]
        if name == "where" and operands[0][1].role == "constant":
            a, b = (self.value(arguments[key]).dependence for key in ("self", "other"))
            return [torch.where(operands[0][1].tensor, a, b)]
        if name == "masked_fill" and operands[1][1].role == "constant":
            return [first.masked_fill(operands[1][1].tensor, 0.0)]
        if is_pointwise(step.func) or kind in _POINTWISE or name in ("masked_fill", "_to_copy"):
            result = _either_of([v.tensor for _, v in operands if v.role == "data"])
            if name == "mul":
                for _, v in operands:
                    result = result * v.pattern if v.role == "constant" else result
            return [result.expand(shapes[0])]
        # Where data selects (an index computed from activations), every path is possible.
        selected = len(operands) > 1 and any(v.index is None and not t.is_floating_point() for t, v in operands)
        if selected and kind != "concat":
            return []
        if getattr(step.func, "is_view", False) or kind in ("reshape", "slice", "concat"):
            return self._run(step)
        return [_some(t) for t in self._run(step)] if name in MOVES else []

    def _run(self, step: Step, enter: bool = False) -> list[Tensor]:
        """The operator itself on dependences: for operators that move or sum elements."""

        def stand_in(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return self.device if isinstance(a, torch.device) else a
            value = self.value(a)
            if value.index is not None and KIND.get(step.name) != "concat":
                return value.index
            return _entering(value.dependence) if enter else value.dependence

        args, kwargs = tree_map(stand_in, (step.args, step.kwargs))
        if step.name in VIEWS:
            return [args[0].reshape(step.shapes[0])]  # strides may differ from the recorded ones
        if step.name == "as_strided":
            return [args[0]] if args[0].shape == step.shapes[0] else []
        if step.written:  # leave the operands, which may stand for other tensors too, as they are
            args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        return [t for t in tree_leaves(step.func(*args, **kwargs)) if isinstance(t, Tensor)]


def _on_weights(step: Step, operands: list[_Value], call: Any) -> list[Tensor]:
    """The masks of a map of parameters: moved by views and slices, otherwise those of the operands in its shape."""
    shapes = step.shapes
    kind = KIND.get(step.name)
    if step.name in VIEWS:
        return [operands[0].tensor.reshape(shapes[0])]
    if getattr(step.func, "is_view", False) or (kind in ("reshape", "slice", "concat") and not step.written):
        moved = call(step)
        if [t.shape for t in moved] == shapes:
            return [t.float() for t in moved]
    weights = [v.tensor for v in operands if v.role == "weight"]
    found = []
    for shape in shapes:
        alike = [w for w in weights if w.shape == shape]
        if step.name == "mul":
            found.append(math.prod((v.pattern for v in operands), start=torch.ones_like(weights[0])).expand(shape))
        elif alike:
            found.append(alike[0] if len(alike) == 1 or kind != "add" else _either_of(alike))
        else:
            found.append(torch.ones_like(weights[0].flatten()[0]).expand(shape))
    return found


def _either_of(tensors: Any) -> Tensor:
    """1 where some of the (broadcast) tensors are."""
    listed = list(tensors)
    if len(listed) == 1:
        only: Tensor = listed[0]
        return only
    total: Tensor = sum(_entering(t) for t in listed)  # type: ignore[assignment]
    return _some(total)


def _over(x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """1 where some element along the reduced dimensions is."""
    dim = arguments.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.dim()))
    return _some(_entering(x).sum(dims, keepdim=bool(arguments.get("keepdim", False))))


def _pool(name: str, arguments: Mapping[str, Any], x: Tensor) -> Tensor:
    """1 where some element under the window is: an average in place of whatever the pool takes."""
    spatial = int(name[name.index("pool") + 4])
    if "adaptive" in name:
        size = arguments["output_size"]
        average = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[spatial - 1](x, size)
        return _some(average)
    if any(d != 1 for d in tree_leaves(arguments.get("dilation", 1))):
        raise ValueError("a dilated pool")
    pools: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    kernel, stride = arguments["kernel_size"], arguments.get("stride") or None
    return _some(pools[spatial - 1](x, kernel, stride, arguments.get("padding", 0), arguments.get("ceil_mode", False)))


def _any_to_any(sources: list[Tensor], shape: torch.Size) -> Tensor:
    """Every element of the result depends on every element of the operands."""
    total = torch.stack([_entering(t).sum() for t in sources]).sum()
    return _some(total).expand(shape)
