"""How many CPU threads a network is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autosparse.training.data import ImageData
from autosparse.training.loop import check_fits

# Multiply-accumulates of a forward pass of one batch that keep a thread busy, some 25 ms of a step: with fewer, two threads
# wait for each other longer than they work.
_MACS = 100_000_000


@contextmanager
def threads_of_step(macs: int) -> Iterator[int]:
    """As many threads of torch as a step with so many multiply-accumulates forward keeps busy; afterwards as many as before.

    `max(1, min(threads before, macs // 10⁸))`. Yields the number.
    """
    before = torch.get_num_threads()
    count = max(1, min(before, macs // _MACS))
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


@contextmanager
def threads_for(model: nn.Module, data: ImageData, batch_size: int) -> Iterator[int]:
    """`threads_of_step` of a batch of `data`: so a small network takes one thread, and trains to the same bits wherever it does.

    On a GPU nothing changes. Yields the number.

    Raises:
        AutoSparseError: the model does not take the images.
    """
    before = torch.get_num_threads()
    if data.device.type != "cpu" or before == 1:
        yield before
        return
    with FlopCounterMode(display=False) as counter:
        check_fits(model, data)  # two images forward in either mode; two FLOPs are one multiply-accumulate
    with threads_of_step(counter.get_total_flops() // 8 * batch_size) as count:
        yield count
