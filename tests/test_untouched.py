"""Our calls leave no trace: a model that remembers runs, copies and computes the same afterwards, bit for bit."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autosparse
from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.network.diagnostics import diagnose
from autosparse.network.restore import reachable
from autosparse.trainability.export import export
from autosparse.trainability.forms import ExportSettings
from autosparse.trainability.prepare import prepare
from autosparse.trainability.shrink import shrink

GLOBAL: dict[Any, Tensor] = {}
COUNT = 0


class Base(nn.Module):
    """Two convolutions; a subclass remembers in `keep`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv1(x)))
        found: Tensor = self.conv2(self.keep(h)).mean((2, 3))
        return found

    def keep(self, h: Tensor) -> Tensor:
        return h


class DictCache(Base):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, Tensor] = {}

    def keep(self, h: Tensor) -> Tensor:
        key = tuple(h.shape[2:])
        if key not in self.cache:
            self.cache[key] = torch.linspace(0, 1, h[0, 0].numel(), device=h.device).view(key)
        return h * self.cache[key].to(h.dtype)


class Losses(Base):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.recent: deque[Tensor] = deque(maxlen=2)

    def keep(self, h: Tensor) -> Tensor:
        self.losses.append(h.square().mean())
        self.recent.append(h.mean())
        return h


class Store:
    __slots__ = ("count", "tensor")

    def __init__(self) -> None:
        self.count, self.tensor = 0, None


class PlainObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store()

    def keep(self, h: Tensor) -> Tensor:
        self.store.count += 1
        if self.store.tensor is None:
            self.store.tensor = torch.ones_like(h[0, :1]) / 3
        return h * self.store.tensor


class Activation(Base):
    last: Tensor | None = None

    def keep(self, h: Tensor) -> Tensor:
        self.last = h
        return h


class ClassCache(Base):
    cache: ClassVar[dict[Any, Tensor]] = {}
    calls = 0

    def keep(self, h: Tensor) -> Tensor:
        type(self).calls += 1
        return h * self.cache.setdefault("scale", torch.full_like(h[0, :1], 0.5))


class GlobalCache(Base):
    def keep(self, h: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return h * _scale(h)


def _scale(h: Tensor) -> Tensor:
    return GLOBAL.setdefault("scale", torch.full_like(h[0, :1], 0.5))


class Noise(Base):
    """Outputs that depend on generators of its own, and so on how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.numbers = torch.Generator().manual_seed(5), np.random.default_rng(5)

    def keep(self, h: Tensor) -> Tensor:
        noise = torch.rand(len(h), 1, 1, 1, generator=self.generator) + self.numbers.random()
        return h * noise.to(h)


class LateBuffer(Base):
    def keep(self, h: Tensor) -> Tensor:
        if not hasattr(self, "position"):
            self.register_buffer("position", torch.ones_like(h[0, :1]) / 3, persistent=False)
        return h * self.position


class Memory(Base):
    """A tensor, an array and its own bias that are written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.histogram = torch.zeros(3), np.zeros(3)
        self.shift = nn.Parameter(torch.full((1,), 0.9))

    def keep(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.memory.add_(1)
            self.shift.mul_(0.5)
        self.histogram += 1
        return h * float(self.memory[0]) * self.shift


class Weak(Base):
    def __init__(self) -> None:
        super().__init__()
        self.cache: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()

    def keep(self, h: Tensor) -> Tensor:
        if self.conv1 not in self.cache:
            self.cache[self.conv1] = torch.ones_like(h[0, :1]) / 3
        return h * self.cache[self.conv1]


class Memoized(Base):
    @functools.lru_cache  # noqa: B019
    def table(self, size: int) -> Tensor:
        return torch.ones_like(self.conv1.weight[0, 0, 0, 0]).expand(size) / 3

    def keep(self, h: Tensor) -> Tensor:
        return h * self.table(h.shape[-1])


class Hidden(Base):
    """A module out of torch's sight, whose statistics move."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = [nn.BatchNorm2d(1)]

    def keep(self, h: Tensor) -> Tensor:
        return h * self.teacher[0](h.float().sum(1, keepdim=True)).to(h)


class _Lazy(ModuleType):
    """As in transformers: a module of a class of its own, whose `__dict__` is a read-only member."""

    scale = 0.5


LIBRARY = _Lazy("library")


class Scaled(functools.partial[Tensor]):
    pass


class LazyModule(Base):
    def keep(self, h: Tensor) -> Tensor:
        return h * LIBRARY.scale


class ReadOnlyMembers(Base):
    """An object in its forward pass whose members no Python code can set."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled(torch.mul, other=0.5)

    def keep(self, h: Tensor) -> Tensor:
        return self.scaled(h)


class Average(Base):
    """A moving average of its own weights, kept out of torch's sight, and an observer of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.average = [nn.Conv2d(2, 4, 3)]
        self.observer = torch.ao.quantization.MinMaxObserver()

    def keep(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            if not self.conv1.weight.is_meta:
                self.average[0].weight.lerp_(self.conv1.weight.float(), 0.1)
        self.observer(h.detach().float())
        return h * 0.5


class Recurrent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.state = nn.LSTM(4, 4, batch_first=True), None
        self.lstm.flatten_parameters()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv1(x))).flatten(2).mT
        h, self.state = self.lstm(h)
        found: Tensor = self.conv2(h.mT.unflatten(2, (4, 4))).mean((2, 3))
        return found


class Locked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lock, self.lines = threading.Lock(), iter(x for x in "abc")


def hooked() -> nn.Module:
    model, seen, count = Base(), [], 0

    def look(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal count
        count += 1
        seen.append(output)

    model.conv1.register_forward_hook(look)
    model.seen = seen  # type: ignore[assignment]
    return model


class Watcher:
    def __init__(self) -> None:
        self.inputs: list[Any] = []

    def __call__(self, _: nn.Module, inputs: Any) -> None:
        self.inputs.append(inputs)

    def after(self, *_: Any) -> None:
        self.inputs.append("after")


def watched() -> nn.Module:
    model, watcher = Base(), Watcher()
    model.conv2.register_forward_pre_hook(watcher)
    model.conv2.register_forward_hook(watcher.after)
    return model


ZOO: list[Callable[[], nn.Module]] = [
    DictCache,
    Losses,
    PlainObject,
    Activation,
    ClassCache,
    GlobalCache,
    Noise,
    LateBuffer,
    Memory,
    Weak,
    Memoized,
    Hidden,
    LazyModule,
    ReadOnlyMembers,
    Average,
    Recurrent,
    Locked,
    hooked,
    watched,
]

X = torch.linspace(-1, 1, 4 * 2 * 6 * 6).view(4, 2, 6, 6)
BATCHES = [(X, torch.tensor([0, 1, 2, 0]))]


def channel_masks() -> autosparse.Masks:
    keep = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    keep[1] = False
    return autosparse.Masks({"conv1.weight": keep})


def call_prune(model: nn.Module, path: Path) -> None:
    autosparse.prune(model, 0.5, "magnitude", example_input=X)
    for criterion, steps in (("snip", 2), ("grasp", 1), ("prospr", 1)):
        autosparse.prune(model, 0.5, criterion, batches=BATCHES, steps=steps)
    autosparse.prune(model, 0.5, "ntk_sap", example_input=X, steps=1)
    autosparse.prune(model, 0.5, "synflow", example_input=X, steps=2, granularity="channel", exclude="conv2*")


def call_prepare(model: nn.Module, path: Path) -> None:
    state = copy.deepcopy(model.state_dict())
    prepare(model, channel_masks(), "repair", example_input=X)
    model.load_state_dict(state)


def call_shrink(model: nn.Module, path: Path) -> None:
    smaller = shrink(model, channel_masks(), X)
    assert smaller.conv1.weight.shape[0] == (4 if isinstance(model, Recurrent) else 3)
    if not isinstance(model, Locked):
        copy.deepcopy(smaller)


def call_diagnose(model: nn.Module, path: Path) -> None:
    diagnose(model, BATCHES, samples=1, iterations=1)


def call_export(model: nn.Module, path: Path) -> None:
    options = ExportSettings(forms=("safetensors", "torch_export", "channels"), batch_sizes=())
    export(model, channel_masks(), path, options, example_input=X)


CALLS = [call_prune, call_prepare, call_shrink, call_diagnose, call_export]


def contents(model: nn.Module) -> list[Any]:
    """All that is reachable, in order: identities, and the bytes of tensors and arrays."""
    found: list[Any] = []
    for thing in reachable(model):
        if isinstance(thing, Tensor):
            found.append(
                (id(thing), thing.detach().double().numpy().tobytes(), None if not thing.is_leaf else thing.grad)
            )
        elif isinstance(thing, np.ndarray):
            found.append((id(thing), thing.tobytes()))
        elif isinstance(thing, (list, dict, deque)):
            found.append((id(thing), repr(list(map(id, thing))), len(thing)))
    return found


def run(model: nn.Module) -> list[Tensor]:
    """What the model gives in train mode and in eval mode, from one state of the global RNG."""
    torch.manual_seed(0)
    return [model.train(mode)(X).detach() for mode in (True, False, True)]


def made(build: Callable[[], nn.Module], used: bool) -> nn.Module:
    torch.manual_seed(1)
    GLOBAL.clear()
    ClassCache.cache.clear()
    model = build()
    if used:
        model(X)
    return model


REFUSED = (Average, Recurrent)  # by some calls, in one line
CASES = [
    pytest.param(
        call, build, used, id=f"{call.__name__.removeprefix('call_')}-{build.__name__}-{'used' if used else 'new'}"
    )
    for call in CALLS
    for build in ZOO
    for used in ([False] if call is call_export or build in REFUSED else [False, True])
]


@pytest.mark.parametrize(("call", "build", "used"), CASES)
def test_a_model_that_remembers_is_left_as_it_was(
    call: Callable[..., None], build: Callable[[], nn.Module], used: bool, tmp_path: Path
) -> None:
    expected = run(made(build, used))
    model = made(build, used)
    before = contents(model)
    try:
        call(model, tmp_path)
    except (AutoSparseError, AutoSparseFailure):
        assert build in REFUSED
    if call is not call_prepare:  # which remembers what it has changed
        assert contents(model) == before
    if build is not Locked and not used:
        copy.deepcopy(model)
    for a, b in zip(run(model), expected, strict=True):
        assert torch.equal(a, b)


# -- gradient checkpoints -----------------------------------------------------------------------------------------------


class Checkpointed(Base):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        def first(x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv1(x)))

        h = first(x) if self.reentrant is None else checkpoint(first, x, use_reentrant=self.reentrant)
        found: Tensor = self.conv2(h).mean((2, 3))
        return found


CRITERIA = [("iterative_snip", 3), ("force", 3), ("grasp", 1), ("ntk_sap", 2), ("prospr", 1)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("criterion", "steps"), CRITERIA, ids=lambda v: str(v))
def test_gradient_checkpoints_change_no_mask(criterion: str, steps: int, reentrant: bool) -> None:
    found = []
    for kind in (None, reentrant):
        torch.manual_seed(3)
        model = Checkpointed(kind)
        state = copy.deepcopy(model.state_dict())
        found.append(autosparse.prune(model, 0.5, criterion, batches=BATCHES, steps=steps))
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert found[0] == found[1]
    assert "CheckpointFunction" in repr(torch.utils.checkpoint.CheckpointFunction)


def test_gradient_checkpoints_of_timm_change_no_mask() -> None:
    import timm

    found = []
    for on in (False, True):
        torch.manual_seed(3)
        sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
        model = timm.models.vision_transformer.VisionTransformer(in_chans=2, **sizes)
        model.set_grad_checkpointing(on)
        batches = [(torch.linspace(-1, 1, 256).view(2, 2, 8, 8), torch.tensor([0, 2]))]
        found.append(autosparse.prune(model, 0.5, "iterative_snip", batches=batches, steps=2))
    assert found[0] == found[1]
