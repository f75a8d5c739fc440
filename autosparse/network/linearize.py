"""One forward pass as a list of aten operators, to be replayed with other values in place of the tensors."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autosparse.network.graph import Observer, base_name, named_arguments, observe, written_arguments


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
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.steps: list[Step] = []

    def parameter(self, name: str, tensor: Tensor) -> None:
        self.state[name] = tensor

    def input(self, tensor: Tensor) -> None:
        self.inputs.append(tensor)

    def output(self, tensor: Tensor) -> None:
        self.outputs.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        written = written_arguments(func, named_arguments(func, args, kwargs))
        results = results or written
        shapes = [t.shape for t in results]
        self.steps.append(Step(func, base_name(func), tuple(args), dict(kwargs or {}), results, written, shapes))
        return result

    def writes_seen_through_views(self) -> set[int]:
        """The steps that write into a tensor whose memory is read later through another tensor made before."""
        made: dict[int, int] = {}
        read: dict[int, int] = {id(t): len(self.steps) for t in self.outputs}
        sharing: defaultdict[int, set[int]] = defaultdict(set)
        for i, step in enumerate(self.steps):
            for t in (*step.operands, *step.results):
                made.setdefault(id(t), i)
                sharing[t.untyped_storage()._cdata].add(id(t))
            for t in step.operands:
                read[id(t)] = max(i, read.get(id(t), i))
        return {
            i
            for i, step in enumerate(self.steps)
            for t in step.written
            for other in sharing[t.untyped_storage()._cdata]
            if other != id(t) and made[other] < i < read.get(other, -1)
        }


def record(model: nn.Module, example_input: Any) -> Tape:
    """The tape of one forward pass of `model` in eval mode on the first example of `example_input`.

    Raises:
        AutoSparseError: the model does not take this input, or returns no tensor.
    """
    return observe(model, example_input, Tape, batch=1)


def shared_storage(tensor: Tensor) -> int:
    """A key that tensors have in common if and only if they share memory."""
    return tensor.untyped_storage()._cdata


def is_pointwise(func: Any) -> bool:
    """Whether every element of the result depends only on the elements at its place in the (broadcast) operands."""
    return torch.Tag.pointwise in func.tags
