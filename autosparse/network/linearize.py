"""One forward pass as a list of aten operators, to be replayed with other values in place of the tensors."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import unwrap
from autosparse.network.observe import Observer, observe
from autosparse.network.operators import base_name, named_arguments, written_arguments

# Operators, beside views and slices, that put elements elsewhere or add them up.
_MOVED = """slice_scatter select_scatter index_put index_copy index_add scatter scatter_add masked_scatter repeat
    repeat_interleave tril triu view_copy diagonal_copy unfold_copy reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d"""
MOVES = frozenset(_MOVED.split())


class Step(NamedTuple):
    """One operator call; `written` are the tensors that it changed in place.

    `shapes` are those of the results at that time: a later in-place transpose changes the tensor's own.
    """

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    written: list[Tensor]
    shapes: list[torch.Size]

    @property
    def arguments(self) -> dict[str, Any]:
        return named_arguments(self.func, self.args, self.kwargs)

    @property
    def operands(self) -> list[Tensor]:
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]


class Tape(Observer):
    """The operators of one forward pass, and which of its tensors are parameters or buffers, inputs and outputs.

    The tensors are placeholders (on the meta device, where the model allows) that live as long as the tape does, so
    that `id` tells them apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.state: dict[str, Tensor] = {}
        self.inputs: list[tuple[Tensor, Tensor]] = []  # each with the user's own
        self.outputs: list[Tensor] = []
        self.steps: list[Step] = []

    def parameter(self, name: str, tensor: Tensor) -> None:
        self.state[name] = tensor

    def input(self, tensor: Tensor, given: Tensor) -> None:
        self.inputs.append((tensor, given))

    def output(self, tensor: Tensor) -> None:
        self.outputs.append(tensor)

    def seen(self, func: Any, arguments: dict[str, Any], args: Any, kwargs: Any, results: list[Tensor]) -> None:
        written = written_arguments(func, arguments)
        results = results or written
        self.steps.append(Step(func, base_name(func), args, kwargs, results, written, [t.shape for t in results]))

    @cached_property
    def seen_elsewhere(self) -> dict[int, list[Tensor]]:
        """The steps that write into memory that is read later through other tensors, made before; and these tensors."""
        made: dict[int, int] = {}
        read: dict[int, int] = {id(t): len(self.steps) for t in self.outputs}
        sharing: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)
        for i, step in enumerate(self.steps):
            for t in (*step.operands, *step.results):
                made.setdefault(id(t), i)
                sharing[shared_storage(t)][id(t)] = t
            for t in step.operands:
                read[id(t)] = max(i, read.get(id(t), i))
        found: dict[int, list[Tensor]] = {}
        for i, step in enumerate(self.steps):
            for t in step.written:
                others = sharing[shared_storage(t)].values()
                seen = [o for o in others if o is not t and made[id(o)] < i < read.get(id(o), -1)]
                if seen:
                    found.setdefault(i, []).extend(seen)
        return found


class Traced:
    """An example input with the tapes of one model on it, each recorded once, when it is first asked for.

    What takes an example input and runs on its tape (flow, reachability, coupling) takes this in its place.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = unwrap(model)
        self.example = example
        self.memory: dict[str, Tensor] = {}  # what synaptic flow writes the weights into, in one step after the other
        self._tapes: dict[int, Tape] = {}

    def tape(self, examples: int) -> Tape:
        if examples not in self._tapes:
            self._tapes[examples] = observe(self.model, self.example, Tape, examples)
        return self._tapes[examples]


def record(model: nn.Module, example_input: Any, examples: int = 1) -> Tape:
    """The tape of one forward pass of `model` in eval mode on the first of the examples of `example_input`.

    Raises:
        AutoSparseError: the model does not take this input, or returns no tensor.
    """
    traced = example_input if isinstance(example_input, Traced) else Traced(model, example_input)
    return traced.tape(examples)


def shared_storage(tensor: Tensor) -> int:
    """A key that tensors have in common if and only if they share memory."""
    return tensor.untyped_storage()._cdata


def is_pointwise(func: Any) -> bool:
    """Whether every element of the result depends only on the elements at its place in the (broadcast) operands."""
    return torch.Tag.pointwise in func.tags


# ---------------------------------------------------------------------------------------------------------------------
# Replaying


@dataclasses.dataclass(frozen=True)
class Value:
    """What stands for a tensor of the tape; a tensor of role `"constant"` is the real thing.

    `known` is the real thing too where it is of whole numbers that the user gave (tokens, the edges of a graph), or that
    follow from them alone.
    """

    tensor: Tensor
    role: str
    known: Tensor | None = field(default=None, kw_only=True)

    @property
    def index(self) -> Tensor | None:
        """The real thing, if it is known and of whole numbers: then it may select elements."""
        real = self.tensor if self.role == "constant" else self.known
        return None if real is None or real.is_floating_point() else real


V = TypeVar("V", bound=Value)


class Replay(Generic[V]):
    """Runs a tape with other values in place of its tensors; a subclass says what becomes of them in each operator."""

    def __init__(self, tape: Tape, device: torch.device) -> None:
        self.tape = tape
        self.device = device
        self.values: dict[int, V] = {}

    def step(self, step: Step) -> list[V]:
        """The values of the operator's results."""
        raise NotImplementedError

    def constant(self, tensor: Tensor) -> V:
        """The value of a tensor that depends on neither parameters nor inputs."""
        raise NotImplementedError

    def run(self) -> list[V]:
        """The values of the outputs."""
        for i, step in enumerate(self.tape.steps):
            values = self.step(step)
            for t, value in zip(step.results, values, strict=True):
                before = self.values.get(id(t))
                self.values[id(t)] = value
                constant = before is not None and before.tensor is value.tensor  # the operator itself wrote into it
                if i in self.tape.seen_elsewhere and not constant and any(t is w for w in step.written):
                    for other in self.tape.seen_elsewhere[i]:
                        if shared_storage(other) == shared_storage(t):
                            self.values[id(other)] = self._overwritten(other, t)
        return [self.value(t) for t in self.tape.outputs]

    def value(self, t: Tensor) -> V:
        if id(t) not in self.values:
            if t.is_meta:
                raise NotImplementedError("a tensor of unknown origin")
            self.values[id(t)] = self.constant(t.detach().to(self.device, copy=True))
        return self.values[id(t)]

    def call(self, step: Step) -> list[Tensor]:
        """The results of the operator itself on what stands for its tensors."""

        def stand_in(a: Any) -> Any:
            if isinstance(a, Tensor):
                value = self.value(a)
                return value.tensor if value.known is None else value.known
            if isinstance(a, torch.Generator):  # the model's own stays as it is
                return a.clone_state()
            return self.device if isinstance(a, torch.device) else a

        args, kwargs = tree_map(stand_in, (step.args, step.kwargs))
        return [t for t in tree_leaves(step.func(*args, **kwargs)) if isinstance(t, Tensor)]

    def known(self, step: Step) -> list[Tensor]:
        """The real results of an operator on constants and known whole numbers; none of any other."""
        if any(t.is_floating_point() or t.is_complex() for t in step.results):
            return []
        values = [self.value(t) for t in step.operands]
        return self.call(step) if all(v.role == "constant" or v.known is not None for v in values) else []

    def aligned(self, values: list[V]) -> list[V]:
        """The same values in one unit, so that their elements can be mixed."""
        return values

    def _overwritten(self, other: Tensor, t: Tensor) -> V:
        """The value of `other` after a write into `t`, where they share memory; nothing is written in place, for autograd."""
        old, new = self.aligned([self.value(other), self.value(t)])
        if (other.dtype, other.shape, t.shape) != (t.dtype, old.tensor.shape, new.tensor.shape):
            raise NotImplementedError("a write into a tensor that is read as one of another form")
        size = t.untyped_storage().nbytes() // t.element_size()
        place = torch.full((size,), -1, device=self.device)
        place.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(
            torch.arange(t.numel(), device=self.device).view(t.shape)
        )
        source = place.as_strided(other.shape, other.stride(), other.storage_offset())
        if not bool((source >= 0).any()):
            return old
        role = max(old.role, new.role, key=_ROLES.index)
        dtype = next(v.tensor.dtype for v in (new, old) if v.role == role)
        written, stays = (v.tensor if v.role == role else torch.zeros_like(v.tensor, dtype=dtype) for v in (new, old))
        mixed = torch.where(source >= 0, written.flatten()[source.clamp(min=0)], stays)
        return dataclasses.replace(old if old.role == role else new, tensor=mixed, known=None)


_ROLES = ("constant", "gate", "weight", "data")  # of values that are mixed the later one counts


def first_names(model: nn.Module, tensors: Mapping[str, Tensor], what: str = "mask") -> dict[str, str]:
    """The first name of the parameter of each of `tensors`, which differs from its name there if it is tied.

    Raises:
        AutoSparseError: one fits no parameter.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in parameters:
            raise AutoSparseError(
                f"{what} {name!r} fits no parameter of {type(model).__name__}: its parameters are like "
                f"{next(iter(parameters), 'none')!r}"
            )
        if tensor.shape != parameters[name].shape:
            raise AutoSparseError(
                f"{what} {name!r} has shape {tuple(tensor.shape)}: give one of shape {tuple(parameters[name].shape)}"
            )
    return {name: first[id(parameters[name])] for name in tensors}


def multiply(name: str, arguments: Mapping[str, Any], a: Tensor, b: Tensor) -> Tensor:
    """The product or convolution `name` of two other factors, without what it adds."""
    if name == "convolution":
        geometry = [arguments[k] for k in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
        result: Tensor = torch.ops.aten.convolution.default(a, b, None, *geometry)
        return result
    if name == "linear":
        return F.linear(a, b)
    product = torch.matmul(a, b)
    return product.sum(0) if name == "addbmm" else product


def either_factor(name: str, a: Tensor, b: Tensor) -> Tensor:
    """The matrix product `name` linearised at ones: row i of the first plus column j of the second factor, summed up."""
    if b.dim() == 1:
        return a.sum(-1) + b.sum()
    columns = b.sum(-1).unsqueeze(-2) if name == "linear" else b.sum(-2, keepdim=True)
    result = a.sum(-1, keepdim=True) + columns
    return result.sum(0) if name == "addbmm" else result
