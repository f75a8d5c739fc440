"""The one maker of random numbers: every generator of the package comes from here."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from autosparse.errors import require


def derive(seed: int, *purpose: object) -> int:
    """A seed in [0, 2⁶³) for one purpose: the BLAKE2b hash of `seed` and what `purpose` names.

    Two purposes never share a stream of random numbers, however close their seeds are, and none shares the stream that
    `torch.manual_seed(seed)` gives the initialization of a network. Without this, a "random" mask of seed 0 on a
    network made after `torch.manual_seed(0)` would keep exactly the largest weights.

    Args:
        seed: any integer, of any size.
        purpose: a name, such as `"ties"`, and whatever tells two uses of it apart (a step, a rank, a layer's name).

    Raises:
        AutoSparseError: the seed is a float, a bool, or no number.
    """
    whole = hasattr(seed, "__index__") and not isinstance(seed, (bool, np.bool_))
    require(whole, "seed", seed, "give a whole number")
    text = repr((int(seed), *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"autosparse").digest(), "little") >> 1


def make_generator(seed: int, *purpose: object) -> torch.Generator:
    """A torch generator on the CPU for one purpose, see `derive`. The same numbers on every device."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def make_numpy_generator(seed: int, *purpose: object) -> np.random.Generator:
    """A NumPy generator for one purpose, see `derive`."""
    return np.random.default_rng(derive(seed, *purpose))


def make_python_generator(seed: int, *purpose: object) -> random.Random:
    """A generator of Python's `random` for one purpose, see `derive`."""
    return random.Random(derive(seed, *purpose))


@contextmanager
def forked(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Afterwards the global generators of torch (of the CPU and of `devices`), NumPy and Python are as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(sorted({d.index or 0 for d in devices if d.type == "cuda"})):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def seeded(seed: int, *purpose: object, device: torch.device | str = "cpu") -> Iterator[None]:
    """Code that draws from the global generators of `device` and the CPU, of NumPy and Python draws for one purpose;
    afterwards their states are as they were."""
    with forked([torch.device(device)]):
        seed_global(seed, *purpose, device=device)
        random.seed(derive(seed, *purpose))
        np.random.seed(derive(seed, *purpose) % 2**32)
        yield


def seed_global(seed: int, *purpose: object, device: torch.device | str = "cpu") -> None:
    """Seed the global generators of `device` and the CPU for one purpose, and those of no other device."""
    value, place = derive(seed, *purpose), torch.device(device)
    if place.type == "cuda":
        with torch.cuda.device(place):
            torch.cuda.manual_seed(value)
    elif place.type != "cpu":
        torch.manual_seed(value)
    torch.default_generator.manual_seed(value)
