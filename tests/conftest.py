"""Fixtures for all tests: one thread, small data, and a guard that nothing of a model changes."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch
from torch import nn

from autosparse.training.data import DataSettings, ImageData, load_data
from autosparse.training.models import ModelSettings, create_model

torch.set_num_threads(1)
hypothesis.settings.register_profile("autosparse", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("autosparse")


@pytest.fixture(autouse=True)
def imports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test's own modules, and folders that it adds to `sys.path`, are gone for the next test."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if isinstance(file, str) and Path(file).is_relative_to(tmp_path_factory.getbasetemp()):
            del sys.modules[name]


@pytest.fixture(scope="session")
def digits() -> ImageData:
    """64 training, 32 validation and 40 test images of 8×8 pixels."""
    return load_data(DataSettings("digits", limit=96, limit_test=40, validation=1 / 3))


@pytest.fixture
def convnet() -> Callable[..., nn.Module]:
    """A factory of convolutional networks of width 4 for `digits`."""

    def make(seed: int = 0, **options: Any) -> nn.Module:
        return create_model(ModelSettings("convnet", 4, options), in_channels=1, image_size=8, seed=seed)

    return make


def _state(model: nn.Module) -> dict[str, Any]:
    """All that must not change, as bytes and identities."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    modules = dict(model.named_modules())
    return {
        "identity": {n: id(t) for n, t in tensors.items()},
        "bits": {n: t.detach().cpu().contiguous().flatten().view(torch.uint8).tolist() for n, t in tensors.items()},
        "grads": {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {
            n: [len(h) for key, h in sorted(vars(m).items()) if key.endswith("_hooks") and isinstance(h, dict)]
            for n, m in modules.items()
        },
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
    }


@pytest.fixture
def unchanged() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """`with unchanged(model): …` fails if the block changes the model or a global random state."""

    @contextmanager
    def guard(model: nn.Module) -> Iterator[None]:
        before, drawn = _state(model), (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
        yield
        after = _state(model)
        for key in before:
            assert after[key] == before[key], key
        assert torch.equal(drawn[0], torch.get_rng_state())
        assert (drawn[1] == np.random.get_state()[1]).all()
        assert drawn[2] == random.getstate()

    return guard
