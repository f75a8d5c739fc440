"""Watching one forward pass, operation by operation, without changing the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autosparse.errors import AutoSparseError, raise_out_of_memory
from autosparse.masks.layers import check_model, unwrap
from autosparse.masks.random import forked
from autosparse.network.inputs import as_call, cast_like, first_of_batch, map_tensors, refusal, shapes_of, tensors_in
from autosparse.network.operators import (
    FACTORS,
    KIND,
    base_name,
    may_be_left_out,
    named_arguments,
    takes_no_values,
)
from autosparse.network.running import untouched

EXAMPLES = 2  # that a trace runs on: of one the batch is hidden in every view


class Observer(TorchDispatchMode):
    """Sees every operator of one forward pass, and learns which tensors are parameters, inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def parameter(self, name: str, tensor: Tensor) -> None:
        """`tensor` stands for the parameter or buffer `name`."""

    def input(self, tensor: Tensor, given: Tensor) -> None:
        """`tensor` stands for `given`, an input of the model."""

    def output(self, tensor: Tensor) -> None:
        """`tensor` is an output of the model."""

    def seen(self, func: Any, arguments: dict[str, Any], args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """The operator was called, and gave `results`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        arguments = named_arguments(func, args, kwargs)
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        operands = {key: a.shape for key, a in arguments.items() if isinstance(a, Tensor)}
        self.calls.append(Call(func, operands, [t.shape for t in results]))
        self.seen(func, arguments, tuple(args), dict(kwargs or {}), results)
        return result


class Call(NamedTuple):
    """One call of an operator: the shapes of its operands, by their names in the schema, and of its results."""

    func: Any
    operands: dict[str, torch.Size]
    results: list[torch.Size]


O = TypeVar("O", bound=Observer)


def observe(model: nn.Module, example_input: Any, observer: Callable[[nn.Module], O], batch: int) -> O:
    """An observer that has seen one forward pass of `model` on the example, see `trace`.

    The first `batch` examples do instead of all of them where dimension 0 is a batch, see `_independent`.
    """
    model = unwrap(model)
    check_model(model)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    example = cast_like(model, example_input)
    few = first_of_batch(example, batch)
    for place in (torch.device("meta"), device):
        part = None
        try:
            if few is not example:
                with suppress(Exception):
                    part = _observed(model, few, place, observer(model))
            whole = _observed(model, example, place, observer(model) if part is None else Observer(model))
            if part is None:
                return whole  # type: ignore[return-value]
            if _independent(part.calls, whole.calls):
                return part
            return _observed(model, example, place, observer(model))
        except Exception as e:  # whatever it is, the model's own device is closer to how the user runs it
            raise_out_of_memory(e, f"running {type(model).__name__} on an example of shape {shapes_of(example_input)}")
            error = e
    raise error if isinstance(error, AutoSparseError) else refusal(model, example_input, error) from error


def _independent(part: Sequence[Call], whole: Sequence[Call]) -> bool:
    """Whether the first examples run as all of them do, each for itself: then dimension 0 is a batch.

    The same operators run. What comes from tensors with fewer elements has fewer elements too, so none is combined over
    the batch; products contract dimensions of the same size, and convolutions and pools slide over such.
    """
    part, whole = ([c for c in calls if not may_be_left_out(base_name(c.func))] for calls in (part, whole))
    if [c.func for c in part] != [c.func for c in whole]:
        return False
    for few, all_of_them in zip(part, whole, strict=True):
        smaller = {key for key, shape in few.operands.items() if shape != all_of_them.operands.get(key)}
        name = base_name(few.func)
        for key, dim in FACTORS.get(name, ()):
            if key in smaller and few.operands[key][dim] != all_of_them.operands[key][dim]:
                return False
        slides = name == "convolution" or KIND.get(name) in ("pool", "resize")
        if slides and any(few.operands[key][1:] != all_of_them.operands[key][1:] for key in smaller):
            return False
        if smaller and not takes_no_values(name):
            for a, b in zip(few.results[:1], all_of_them.results, strict=False):  # the others are statistics or alike
                if b and math.prod(a) >= math.prod(b) > 0:
                    return False
    return True


def _observed(model: nn.Module, example: Any, device: torch.device, seen: O) -> O:
    def copy(t: Tensor) -> Tensor:
        return torch.empty_like(t, device="meta") if device.type == "meta" else t.detach().to(device, copy=True)

    # In inference mode operators arrive in another form.
    with undisturbed(model), torch.inference_mode(False), torch.no_grad():
        stands_for: list[tuple[Tensor, Tensor]] = []

        def input_copy(t: Tensor) -> Tensor:
            stands_for.append((copy(t), t))
            return stands_for[-1][0]

        inputs = map_tensors(input_copy, example)
        args, kwargs = as_call(model, inputs)
        state = {name: copy(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        for name, t in state.items():
            seen.parameter(name, t)
        for t, given in stands_for:
            seen.input(t, given)
        with seen:
            found = tensors_in(torch.func.functional_call(model, state, args, kwargs))
        if not found:
            raise AutoSparseError(f"{type(model).__name__} returned no tensor: its forward must return at least one")
        for t in found:
            seen.output(t)
    return seen


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """`untouched`, with plain (not fused) attention; the global RNG states come back too."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = [t.device for t in (*model.parameters(), *model.buffers())]
    with untouched(model), forked(devices), sdpa_kernel(SDPBackend.MATH):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


def owned(model: nn.Module) -> set[str]:
    """Names of the weights of Conv, Linear and attention modules, whose layout is known without a trace."""
    weights = {
        id(p)
        for m in model.modules()
        if isinstance(m, (_ConvNd, nn.Linear, nn.MultiheadAttention))
        for key, p in m.named_parameters(recurse=False)
        if key.endswith("weight")
    }
    return {name for name, p in model.named_parameters() if id(p) in weights}
