"""A known fault of PyTorch's CPU convolutions, and how the package stays clear of it; see docs/known-faults.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_SAFE_FROM = 8  # input channels: the floats in a register of AVX2


def faulty_convolution(model: nn.Module) -> str | None:
    """The name of the first convolution of `model` whose backward pass can crash the process on this CPU, if any.

    With AVX2 and without AVX-512, oneDNN's gradient of the weights of a 1×1 convolution with a stride and fewer than eight
    input channels writes outside its memory, if the input is in channels-last layout. Seen with PyTorch 2.14 and 2.15.
    """
    limited = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    if not torch.backends.mkldnn.is_available() or (torch.backends.cpu.get_cpu_capability() != "AVX2" and not limited):
        return None
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.weight.device.type == "cpu"
            and module.groups == 1
            and set(module.kernel_size) == {1}
            and max(module.stride) > 1
            and module.in_channels < _SAFE_FROM
        ):
            return name or type(module).__name__
    return None


@contextmanager
def safe_convolutions(model: nn.Module) -> Iterator[None]:
    """Convolutions of `model` run without oneDNN inside, if one of them can crash; the setting comes back afterwards."""
    before = torch.backends.mkldnn.enabled
    if not before or faulty_convolution(model) is None:
        yield
        return
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before)
