"""Factors on the channels of a network while it runs: gates that learn, and masks that are sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

SHUT = 1e-3  # what a closed gate lets through while it learns: at 0 a ReLU behind it would hide its gradient
Places = Mapping[str, str]  # layer or branch -> the module at whose output its gates stand


def channels_last(module: nn.Module) -> bool:
    """Whether the channels of a module's output are its last dimension, as those of a Linear, and not dimension 1."""
    return isinstance(module, nn.Linear)


def first_of(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a module gave, changed: the tensor, or the first of a tuple, as of attention."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


@contextmanager
def multiplied(model: nn.Module, places: Places, factor: Callable[[str], Tensor]) -> Iterator[None]:
    """Within the block, the output at each of `places` is multiplied by `factor(name)`: `(channels,)`, or `()` for all."""

    def hook(name: str) -> Callable[..., Tensor]:
        def multiply(module: nn.Module, args: Any, out: Any) -> Any:
            def scaled(tensor: Tensor) -> Tensor:
                value = factor(name).to(tensor)
                if value.dim() and not channels_last(module):
                    value = value.view(-1, *[1] * (tensor.dim() - 2))
                return tensor * value

            return first_of(out, scaled)

        return multiply

    hooks = [model.get_submodule(place).register_forward_hook(hook(name)) for name, place in places.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
