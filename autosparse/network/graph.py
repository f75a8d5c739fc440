"""The graph of any network: which operations one forward pass runs, on which weights, in which order."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from autosparse.masks.layers import Layer
from autosparse.network.observe import EXAMPLES, Observer, observe, owned
from autosparse.network.operators import (
    FACTORS,
    KIND,
    ON_VECTORS,
    SAME,
    VIEWS,
    base_name,
    only_moves,
    takes_no_values,
    written_arguments,
)


@dataclass(frozen=True)
class Operation:
    """One operation of the forward pass.

    `kind` is the coarse class: `"input"`, `"conv"`, `"conv_transpose"`, `"linear"` (a product with a weight),
    `"matmul"` (a product of two activations), `"norm"`, `"activation"`, `"add"`, `"mul"`, `"concat"`, `"pool"`,
    `"reshape"`, `"slice"`, `"resize"`, `"reduce"`, `"softmax"`, `"attention"`, `"embedding"`, `"output"` or `"other"`;
    `target` is the aten operator (`"aten.convolution.default"`, empty for inputs and outputs); `inputs` are the
    (earlier) operations whose results it consumes; `parameters` are the names of all parameters and buffers that it
    consumes, itself or as views, casts or maps of them, and `weights` those among them that are a factor of a product
    or convolution; `shape` is the shape of its first result; `stride` that of a convolution or pool; `contracted` how
    many products each element of a product's or convolution's result sums (of a transposed one: each input goes into).
    """

    kind: str
    target: str
    inputs: tuple[int, ...]
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    groups: int = 1
    weights: tuple[str, ...] = ()
    contracted: int = 0


@dataclass(frozen=True)
class Graph:
    """The operations of one forward pass in execution order, and the raw parameters that act as weights in it.

    `operands` holds those parameters that belong to no Conv, Linear or attention module but were a factor of a matrix
    product or convolution: what `prunable_layers` takes to make them prunable. `recomputed` names the weights that are not
    such a factor themselves, moved or cast, but computed into one: by weight standardization, weight norm, a scale.
    """

    operations: tuple[Operation, ...]
    operands: dict[str, Layer] = field(default_factory=dict)
    recomputed: tuple[str, ...] = ()

    def layers(self) -> tuple[str, ...]:
        """Names of the weights that are a factor of a product or convolution, in execution order, once each."""
        return tuple(dict.fromkeys(name for op in self.operations for name in op.weights))

    def edges(self) -> tuple[tuple[str, str], ...]:
        """Pairs of layers `(from, to)` where the output of one reaches the other with no other layer between.

        A weight that is used again on its own output has an edge to itself.
        """
        return tuple(self.links())

    def links(self) -> dict[tuple[str, str], frozenset[str]]:
        """The edges, each with the kinds of all operations on the ways from one layer to the next: `"add"` where a residual
        sum lies between, `"concat"`, `"matmul"`, `"pool"`, … A bias or constant that is added is no sum, and not named."""
        found: dict[tuple[str, str], frozenset[str]] = {}
        for op, before in self._preceded():
            for b in op.weights:
                for a, kinds in before.items():
                    found[a, b] = found.get((a, b), frozenset()) | kinds
        return found

    def stride(self) -> dict[str, float]:
        """Stride of each layer's convolution at its first use, the geometric mean over dimensions; 1 for products."""
        found: dict[str, float] = {}
        for op in self.operations:
            for name in op.weights:
                found.setdefault(name, math.prod(op.stride) ** (1 / max(len(op.stride), 1)))
        return found

    def areas(self) -> dict[str, int]:
        """How many positions each layer's weights serve: the product of the spatial sizes of its output, the tokens of a
        product; at its first use."""
        found: dict[str, int] = {}
        for op in self.operations:
            spatial = op.shape[2:] if op.kind.startswith("conv") else op.shape[1:-1]
            for name in op.weights:
                found.setdefault(name, max(1, math.prod(spatial)))
        return found

    def projections(self, layers: Mapping[str, Layer]) -> set[str]:
        """Projection shortcuts: 1×1 convolutions whose output goes into a sum, and whose input goes into other layers too."""
        links = self.links()
        adding = {a for (a, _), kinds in links.items() if "add" in kinds}
        follow: dict[str, set[str]] = {}  # by layer: those that take its output
        for a, b in links:
            follow.setdefault(a, set()).add(b)
        branching = {b for after in follow.values() if len(after) > 1 for b in after}
        pointwise = {n for n, layer in layers.items() if layer.kind == "conv" and math.prod(layer.kernel) == 1}
        return adding & branching & pointwise

    def last_layers(self) -> tuple[str, ...]:
        """Layers whose output reaches an output of the model with no other layer between: classifiers, as a rule."""
        return tuple({name: None for op, before in self._preceded() if op.kind == "output" for name in before})

    def _preceded(self) -> Iterator[tuple[Operation, dict[str, frozenset[str]]]]:
        """Each operation with the last layers before it, and the kinds of the operations between."""
        nearest: list[dict[str, frozenset[str]]] = []  # per operation: the last layers before its result
        for op in self.operations:
            before: dict[str, frozenset[str]] = {}
            for i in op.inputs:
                for name, kinds in nearest[i].items():
                    before[name] = before.get(name, frozenset()) | kinds
            yield op, before
            if op.weights:
                nearest.append(dict.fromkeys(op.weights, frozenset()))
            else:
                own = set() if op.kind == "add" and len(op.inputs) < 2 else {op.kind}
                nearest.append({name: kinds | own for name, kinds in before.items()})

    def depth(self) -> dict[str, int]:
        """Layers on the longest path from the input to each layer, itself included (so 1 for the first layer).

        A weight that is used several times has the depth of its first use.
        """
        depths: list[int] = []
        found: dict[str, int] = {}
        for op in self.operations:
            depths.append(max((depths[i] for i in op.inputs), default=0) + bool(op.weights))
            for name in op.weights:
                found.setdefault(name, depths[-1])
        return found

    def to_json(self) -> str:
        """The graph as a JSON text, which `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Graph:
        """The graph that `to_json` wrote."""
        data = json.loads(text)
        return cls(
            operations=tuple(Operation(**_tuples(op)) for op in data["operations"]),
            operands={name: Layer(**_tuples(layer)) for name, layer in data["operands"].items()},
            recomputed=tuple(data.get("recomputed", ())),
        )


def trace(model: nn.Module, example_input: Any) -> Graph:
    """The graph of `model`, from one forward pass in eval mode that carries the provenance of every tensor.

    The pass runs on the meta device and so computes nothing; a model that cannot (control flow that depends on values,
    tensors that are neither parameters nor buffers) runs on its own device. The model is left as it was.

    Args:
        example_input: what the model takes: a tensor; a tuple of positional or a dict of keyword arguments; a list or an
            object as one argument (see `as_call`). Where dimension 0 is a batch, its size does not matter.

    Raises:
        AutoSparseError: the model does not take this input, or returns no tensor.
    """
    provenance = observe(model, example_input, _Provenance, EXAMPLES)
    return Graph(tuple(provenance.operations), provenance.operands, tuple(provenance.recomputed))


# ---------------------------------------------------------------------------------------------------------------------
# Running a user's model without a trace of it left


# ---------------------------------------------------------------------------------------------------------------------
# Provenance


class _Origin(NamedTuple):
    """Where a tensor comes from.

    `operations` whose results, and parameters that it holds. `fixed`: it is made of parameters and buffers alone (a
    weight, as far as products are concerned), not of data. `recomputed`: by more than moves and casts. `bits` is set while the tensor is a rearrangement of one raw
    parameter: per element, bit d tells whether its index in dimension d of that parameter is above 0.
    """

    operations: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    fixed: bool = True
    bits: Tensor | None = None
    recomputed: bool = False


class _Provenance(Observer):
    """Records every operator that data passes through, with the provenance of its operands.

    Operators on parameters alone are not recorded: their results stand for the parameters (weight standardisation,
    weight norm, casts, chunks of a stacked projection). Products are recorded always, except matrix times vector of
    parameters alone, which is how spectral norm is measured.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.operations: list[Operation] = []
        self.operands: dict[str, Layer] = {}
        self.recomputed: dict[str, None] = {}  # in order
        self._parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._owned = owned(model)
        self._origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # The last write into a storage; the weak reference keeps the storage's address from being used again.
        self._written: dict[int, tuple[StorageWeakRef, _Origin]] = {}

    def parameter(self, name: str, tensor: Tensor) -> None:
        bits = None
        if name in self._parameters and name not in self._owned and 2 <= tensor.dim() <= 8:
            bits = _index_bits(tensor.shape)
        self._origins[tensor] = _Origin(parameters=(name,), bits=bits)

    def input(self, tensor: Tensor, given: Tensor) -> None:
        self._origins[tensor] = self._record(Operation("input", "", (), (), tuple(tensor.shape)))

    def output(self, tensor: Tensor) -> None:
        origin = self._origin(tensor) or _Origin()
        self._record(Operation("output", "", origin.operations, origin.parameters, tuple(tensor.shape)))

    def seen(self, func: Any, arguments: dict[str, Any], args: Any, kwargs: Any, results: list[Tensor]) -> None:
        operands = [t for t in tree_leaves(list(arguments.values())) if isinstance(t, Tensor)]
        known = [(t, origin) for t in operands if (origin := self._origin(t)) is not None]
        name = base_name(func)
        if not known or not results or takes_no_values(name):
            return
        written = written_arguments(func, arguments)
        joined = _join(origin for _, origin in known)
        is_product = name in FACTORS and not (joined.fixed and name in ON_VECTORS)
        if name in SAME and len(known) == 1:
            new = known[0][1]
        elif joined.fixed and not is_product:
            new = joined if only_moves(func, name) else joined._replace(recomputed=True)
        elif is_product:
            new = self._product(name, func, arguments, joined, results[0])
        else:
            stride = _pair(arguments.get("stride") or arguments.get("kernel_size")) if KIND.get(name) == "pool" else ()
            kind = KIND.get(name, "attention" if "scaled_dot_product" in name else "other")
            new = self._record(
                Operation(kind, str(func), joined.operations, joined.parameters, tuple(results[0].shape), tuple(stride))
            )
        rearranged = _bits_after(func, name, args, kwargs, known, results) if new.fixed else [None] * len(results)
        for t, bits in zip(results, rearranged, strict=True):
            self._origins[t] = new._replace(bits=bits)
        for t in written:
            self._origins[t] = new._replace(bits=None)
            reference = StorageWeakRef(t.untyped_storage())
            self._written[reference.cdata] = (reference, new._replace(bits=None))

    def _product(self, name: str, func: Any, arguments: dict[str, Any], joined: _Origin, result: Tensor) -> _Origin:
        """Record a product or convolution; what it returns is a weight again only if both factors are raw weights."""
        transposed = bool(arguments.get("transposed"))
        groups = int(arguments.get("groups", 1))
        factors = [(arguments[key], dim, self._origin(arguments[key])) for key, dim in FACTORS[name]]
        weights = {
            weight: (tensor, dim, origin)
            for tensor, dim, origin in factors
            if origin is not None and origin.fixed
            for weight in self._weights(origin)
        }
        if any(weight in self._owned for weight in weights):
            # Then a raw parameter beside it is its input (learned queries), not a weight.
            weights = {weight: use for weight, use in weights.items() if weight in self._owned}
        self.recomputed |= dict.fromkeys(weight for weight, (_, _, origin) in weights.items() if origin.recomputed)
        for weight, (tensor, dim, origin) in weights.items():
            if weight not in self._owned and weight not in self.operands:
                if name == "convolution":
                    out_dim, in_dim = (1, 0) if transposed else (0, 1)
                else:
                    out_dim, in_dim = _dims(self._parameters[weight], origin.bits, dim % max(tensor.dim(), 1))
                self.operands[weight] = Layer(weight, "matmul", self._parameters[weight], out_dim, in_dim, groups)
        if name == "convolution":
            kind = "conv_transpose" if transposed else "conv"
        else:
            kind = "linear" if weights else "matmul"
        stride = tuple(arguments["stride"]) if name == "convolution" else ()
        parameters = (*weights, *(p for p in joined.parameters if p not in weights))
        first, dim, _ = factors[0]
        contracted = math.prod(arguments["weight"].shape[1:]) if name == "convolution" else first.shape[dim]
        if name == "addbmm":
            contracted *= first.shape[0]
        shape = tuple(result.shape)
        new = self._record(
            Operation(kind, str(func), joined.operations, parameters, shape, stride, groups, tuple(weights), contracted)
        )
        return new._replace(fixed=joined.fixed and not any(weight in self._owned for weight in weights))

    def _weights(self, origin: _Origin) -> list[str]:
        """Of the parameters that a factor is made of, the largest: weight norm's directions, not its magnitudes."""
        sizes = {n: math.prod(self._parameters[n]) for n in origin.parameters if len(self._parameters.get(n, ())) > 1}
        return [name for name, size in sizes.items() if size == max(sizes.values())]

    def _origin(self, tensor: Any) -> _Origin | None:
        if not isinstance(tensor, Tensor):
            return None
        origin = self._origins.get(tensor)
        if self._written and (write := self._written.get(tensor.untyped_storage()._cdata)) is not None:
            # Written through another view after this tensor was made: it holds what was written too.
            newest = max(write[1].operations, default=-1)
            if origin is None:
                return write[1]
            if newest > max(origin.operations, default=-1):
                return _join((origin, write[1]))
        return origin

    def _record(self, operation: Operation) -> _Origin:
        self.operations.append(operation)
        return _Origin(operations=(len(self.operations) - 1,), fixed=False)


def _join(origins: Any) -> _Origin:
    listed = list(origins)
    return _Origin(
        tuple(sorted({i for o in listed for i in o.operations})),
        tuple(dict.fromkeys(p for o in listed for p in o.parameters)),
        all(o.fixed for o in listed),
        recomputed=any(o.recomputed for o in listed),
    )


def _index_bits(shape: torch.Size) -> Tensor:
    bits = torch.zeros(shape, dtype=torch.uint8, device="cpu")
    for d, size in enumerate(shape):
        bits.narrow(d, min(1, size), max(size - 1, 0)).bitwise_or_(1 << d)
    return bits


def _bits_after(
    func: Callable[..., Any], name: str, args: Any, kwargs: Any, known: Any, results: list[Tensor]
) -> list[Tensor | None]:
    """Index bits of the results of an operator on one raw parameter: rearranged by views, kept by elementwise maps."""
    tracked = [(t, origin.bits) for t, origin in known if origin.bits is not None]
    nothing: list[Tensor | None] = [None] * len(results)
    if len(tracked) != 1:
        return nothing
    tensor, bits = tracked[0]
    if name in VIEWS:
        return [bits.reshape(results[0].shape)]
    if getattr(func, "is_view", False):
        moved = func(*tree_map(lambda a: bits if a is tensor else a, args), **(kwargs or {}))
        return [t for t in tree_leaves(moved) if isinstance(t, Tensor)]
    return [bits if t.shape == bits.shape else None for t in results]


def _dims(shape: tuple[int, ...], bits: Tensor | None, contracted: int) -> tuple[int, int]:
    """Out and in dimension of a raw parameter, from its rearrangement as a factor contracted along `contracted`."""
    if bits is None:
        return 0, 1
    out = next((d for d in range(bits.dim() - 1, -1, -1) if d != contracted and bits.dim() - d <= 2), None)
    inner = _largest(shape, _varying(bits, contracted), but=None)
    outer = _largest(shape, _varying(bits, out) if out is not None else [], but=inner)
    return outer, inner


def _varying(bits: Tensor, dim: int) -> list[int]:
    """Dimensions of the parameter whose index changes along `dim` of its rearrangement."""
    if bits.numel() == 0:
        return []
    change = bits ^ bits.narrow(dim, 0, 1)
    return [d for d in range(8) if bool((change & (1 << d)).any())]


def _largest(shape: tuple[int, ...], candidates: list[int], but: int | None) -> int:
    allowed = [d for d in candidates if d != but] or [d for d in range(len(shape)) if d != but]
    return max(allowed, key=lambda d: shape[d])


def _pair(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
