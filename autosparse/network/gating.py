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


@contextmanager
def multiplied(model: nn.Module, places: Places, factor: Callable[[str], Tensor]) -> Iterator[None]:
    """Within the block, the output at each of `places` is multiplied by `factor(name)`: `(channels,)`, or `()` for all."""

    def hook(name: str) -> Callable[..., Tensor]:
        def multiply(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            value = factor(name).to(out)
            if value.dim() and not channels_last(module):
                value = value.view(-1, *[1] * (out.dim() - 2))
            return out * value

        return multiply

    hooks = [model.get_submodule(place).register_forward_hook(hook(name)) for name, place in places.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
