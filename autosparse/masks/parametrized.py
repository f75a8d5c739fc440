"""Weights that `torch.nn.utils.parametrize` computes from others whenever they are used: masked after the computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Place(NamedTuple):
    """The tensor `key` of `module`, which is computed by `module.parametrizations[key]`."""

    module: nn.Module
    key: str

    @property
    def chain(self) -> parametrize.ParametrizationList:
        return self.module.parametrizations[self.key]  # type: ignore[index, return-value]

    def originals(self) -> list[Tensor]:
        """What it is computed from."""
        chain = self.chain
        names = ["original"] if chain.is_tensor else [f"original{i}" for i in range(chain.ntensors)]
        return [getattr(chain, name) for name in names]

    @torch.no_grad()
    def value(self) -> Tensor:
        """The tensor as the network uses it in eval mode: so the power iteration of spectral norm takes no step."""
        modes = [(module, module.training) for module in self.chain.modules()]
        try:
            for module, _ in modes:
                module.training = False
            found: Tensor = self.chain().detach().clone()
            return found
        finally:
            for module, mode in modes:
                module.training = mode

    def mask(self, mask: Tensor) -> None:
        """Fill the tensor with 0 outside of the mask whenever it is computed, as the last step; in place of a mask before.

        What it is computed from stays as it is, so that nothing is 0/0 where a whole filter is pruned.
        """
        chain = self.chain
        last = list(chain.children())[-1]
        if not isinstance(last, Masking):
            last = Masking()
            chain.append(last)
        last.kept = mask.to(self.originals()[0].device)


class Masking(nn.Module):
    """The parametrization `w ⊙ m`. Its mask moves and is copied with the model, but is no buffer: the model's state stays."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.ones((), dtype=torch.bool)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Masking:
        self.kept = fn(self.kept)
        return super()._apply(fn, recurse)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.kept.to(weight.device), weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def parametrized(model: nn.Module) -> dict[str, Place]:
    """The parametrized tensors of `model`, by the names that they would have as plain parameters."""
    return {
        f"{prefix}.{key}" if prefix else key: Place(module, key)
        for prefix, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for key in module.parametrizations
    }
