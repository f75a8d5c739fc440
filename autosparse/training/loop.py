"""The one training loop, on one device; `training.train` is its front."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from autosparse.errors import (
    AutoSparseError,
    AutoSparseFailure,
    first_line,
    raise_out_of_memory,
)
from autosparse.files import fingerprint
from autosparse.masks.layers import unwrap
from autosparse.masks.mask import Masks, Zeroing
from autosparse.masks.random import derive, forked, seed_global
from autosparse.network.onednn import safe_convolutions
from autosparse.network.restore import restored
from autosparse.network.running import eval_mode
from autosparse.training.checkpoint import reading_state, write_state
from autosparse.training.content import of_network
from autosparse.training.data import ImageData
from autosparse.training.devices import SUPPORTED, device_names
from autosparse.training.profile import parts
from autosparse.training.recipe import PRECISIONS, Recipe, build_optimizer, learning_rate, steps_per_epoch

_CHECK_EVERY = 200  # steps between looks at the loss: a look waits for the device
_ARCHITECTURES = 256  # torch compiles a class for 8 networks and runs the others uncompiled, without a word
OptimizerState = Mapping[str, Mapping[str, Tensor]]  # by parameter name, as in `optimizer.state`


class MaskHandle(Protocol):
    """Masks that follow an optimizer."""

    @property
    def masks(self) -> Masks: ...
    def mask_gradients(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def remove(self) -> None: ...


class MaskSchedule(Protocol):
    """Masks that change while a network trains: a dataclass, whose fields are what the training depends on."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> MaskHandle: ...


@dataclass
class Trained:
    """What a training gave: `accuracy` and `loss` on the test images after the last step, never the best epoch's.

    `history` has one row per epoch: epoch, step, loss (training), accuracy and validation_loss (validation; NaN where it
    was not looked at), lr. `arithmetic`: TF32, and what else of torch's settings it depends on, as they were. `masks`: those
    at the end of a training whose masks changed; `mask_state`: what their handle knows then. `optimizer_state`: that of each
    parameter by name, of a training that was given one.
    """

    accuracy: float = math.nan
    loss: float = math.nan
    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    images_per_second: float = math.nan
    history: list[dict[str, float]] = field(default_factory=list)
    arithmetic: dict[str, Any] = field(default_factory=dict)
    masks: Masks | None = None
    mask_state: dict[str, Any] | None = None
    optimizer_state: OptimizerState | None = None


@dataclass(frozen=True)
class Plan:
    """What a training is to do, whatever the device; see `training.train.train`."""

    recipe: Recipe
    masks: Masks | None = None
    seed: int = 0
    start_step: int = 0
    stop_step: int | None = None
    checkpoint: Path | None = None
    checkpoint_every: float = 30.0
    validate: bool = True
    mask_schedule: MaskSchedule | None = None
    optimizer_state: OptimizerState | None = None


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer (those that are not in `state_dict` too): what a rewind puts back."""
    return {name: value.detach().clone() for name, value in _everything(model)}


def _everything(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


@torch.no_grad()
def put_back(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Rewind `model` to what `full_state` gave.

    Raises:
        AutoSparseError: the state is another model's.
    """
    for name, value in _everything(model):
        if name not in state or state[name].shape != value.shape:
            raise AutoSparseError(f"the state to rewind to does not fit {name!r}: it is another model's; start again")
        value.copy_(state[name])


@contextmanager
def rewound(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Whatever is trained in the block, afterwards the model is what it was: weights, and all that `restored` tells."""
    origin = full_state(model)
    with restored(model, but=model.parameters()):
        try:
            yield origin
        finally:
            put_back(model, origin)


def fabric_for(device: str = "auto", precision: str = "fp32") -> Any:
    """A Lightning Fabric on one device: `"cpu"`, `"cuda"`, `"cuda:1"`; of several, such as `"cuda:0,1"`, the first.

    `"auto"` is `"cuda"` where there is a GPU, else `"cpu"`.

    Raises:
        AutoSparseError: no name of a device that is supported, or the machine has no such device.
    """
    try:
        from lightning_fabric import Fabric
    except ImportError:
        from lightning.fabric import Fabric  # the large package holds the same

    for name in ("lightning_fabric", "lightning.fabric"):  # says at each call which precision was asked for
        logging.getLogger(name).setLevel(logging.WARNING)
    kind, _, index = device_names(device)[0].partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return Fabric(accelerator=kind, devices=[int(index)] if index else 1, precision=PRECISIONS[precision])
    except Exception as error:
        raise AutoSparseError(f"device is {device!r}: {first_line(error)}; {SUPPORTED}") from error


AUXILIARY = 0.3  # weight of each auxiliary classifier in the loss


@torch.no_grad()
def check_fits(model: nn.Module, data: ImageData) -> None:
    """Raise `AutoSparseError` unless the model takes the images and has an output for every class, in both modes."""
    device = next(model.parameters()).device
    images = data.normalise(data.train.images[:2].to(data.device)).to(device)
    try:
        with restored(model), forked([device]):
            model.eval()
            outputs = model(images)
            model.train()
            trained = model(images)
    except (RuntimeError, MemoryError, ValueError, AssertionError, IndexError, TypeError) as error:
        raise_out_of_memory(error, f"running {type(model).__name__} on two images")
        raise AutoSparseError(
            f"{type(model).__name__} cannot take batches of shape {tuple(images.shape)}: {first_line(error)}; "
            "change data.image_size, or give a model for these images"
        ) from error
    for mode, found in (("eval", [outputs]), ("train", logits_of(trained))):
        for logits in found:
            if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < data.classes:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise AutoSparseError(
                    f"{type(model).__name__} gives outputs {got} for {len(images)} images of {data.classes} classes in {mode} "
                    f"mode: it must give logits of shape ({len(images)}, {data.classes}), and beside them auxiliary logits at most"
                )


def logits_of(outputs: Any) -> list[Any]:
    """The logits that a model gives in train mode, and after them those of its auxiliary classifiers, if it has any."""
    return [found for found in outputs if found is not None] if isinstance(outputs, tuple) else [outputs]


def training_loss(outputs: Any, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the logits, and 0.3 times that of each auxiliary classifier.

    Source: Szegedy et al. 2015, "Going deeper with convolutions" (GoogLeNet), where the weight is 0.3.
    """
    loss, *auxiliary = (F.cross_entropy(logits, labels, label_smoothing=smoothing) for logits in logits_of(outputs))
    return loss + AUXILIARY * torch.stack(auxiliary).sum() if auxiliary else loss


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageData, split: str = "test", channels_last: bool = False, rank: int = 0, world: int = 1
) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy over a split, in eval mode; NaN for an empty split.

    In a training on several devices each of the `world` ranks looks at a part and gets the figures of the whole.
    """
    total = len(getattr(data, split))
    if total == 0:
        return math.nan, math.nan
    correct = torch.zeros((), device=data.device)
    loss = torch.zeros((), device=data.device)
    with eval_mode(model):
        for images, labels in itertools.islice(data.batches(split), rank, None, world):
            logits = model(_layout(images, channels_last)).float()
            correct += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum")
    if world > 1:
        distributed.all_reduce(correct)
        distributed.all_reduce(loss)
    return float(correct) / total, float(loss) / total


def _layout(images: Tensor, channels_last: bool) -> Tensor:
    # Not `contiguous(…)`, which leaves images of one channel in the strides of NCHW.
    return images.clone(memory_format=torch.channels_last) if channels_last else images


def train(
    model: nn.Module,
    data: ImageData,
    plan: Plan,
    *,
    device: str = "auto",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_gradient: Callable[[int], None] | None = None,
    on_batch: Callable[[int, Tensor, Tensor], None] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Trained:
    """`training.train.train` on one device, which is that of `rank` among `world` in a process group."""
    return _Loop(model, data, plan, device, on_epoch, on_gradient, on_batch, rank, world).run()


class _Loop:
    """One training: the network made ready, and its epochs and steps."""

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        plan: Plan,
        device: str,
        on_epoch: Callable[[dict[str, float]], None] | None,
        on_gradient: Callable[[int], None] | None,
        on_batch: Callable[[int, Tensor, Tensor], None] | None,
        rank: int,
        world: int,
    ) -> None:
        recipe, masks = plan.recipe, plan.masks
        self.model, self.plan, self.recipe = model, plan, recipe
        self.on_epoch, self.on_gradient, self.on_batch = on_epoch, on_gradient, on_batch
        self.rank, self.world = rank, world
        self.fabric = fabric_for(device, recipe.precision)
        self.data = data.to(self.fabric.device)
        model.to(self.fabric.device)
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        check_fits(model, self.data)
        built = build_optimizer(model, recipe)
        parallel = model if world == 1 else distribute(model, self.data)
        # Static shapes: else the second architecture of a class would be compiled for any number of channels.
        mode = "reduce-overhead" if recipe.compile == "graphs" else None
        compiled = torch.compile(parallel, dynamic=False, mode=mode) if recipe.compile else parallel
        self.network, self.optimizer = self.fabric.setup(compiled, built, move_to_device=False)
        self.begin = parts(self.fabric.device)
        self.per_epoch, self.length = steps_per_epoch(self.data, recipe.batch_size), recipe.length(self.data)
        self.stop = self.length if plan.stop_step is None else min(plan.stop_step, self.length)
        self.result = Trained(steps=plan.start_step)
        self.of = self._fingerprint() if plan.checkpoint is not None else ""
        stepped = self.optimizer.optimizer
        self.handle: MaskHandle | None = None
        if plan.mask_schedule is not None:
            self.handle = plan.mask_schedule.attach(model, stepped, self.stop - plan.start_step, plan.seed)
        for name, state in (plan.optimizer_state or {}).items():
            stepped.state[model.get_parameter(name)] = {k: t.clone() for k, t in state.items()}
        if plan.checkpoint is not None and plan.checkpoint.exists():
            self._restore(plan.checkpoint)
        # Weights that are not there must not take part in the gradient's norm.
        own = dict(unwrap(model).named_parameters())
        self.pruned = [own.get(n) for n in masks or {}]  # of a parametrized weight the gradient has the mask already
        self.zero = Zeroing((masks or {}).values())

    def _save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.optimizer.state_dict(),
            "masks": None if self.handle is None else self.handle.state_dict(),
            "steps": self.result.steps,
            "seconds": self.result.seconds,
            "history": self.result.history,
        }
        write_state(path, self.of, state)

    def _restore(self, path: Path) -> None:
        result = self.result
        with reading_state(path, self.of) as state:
            result.steps, result.seconds, result.history = state["steps"], state["seconds"], state["history"]
            self.model.load_state_dict(state["model"])
            self.optimizer.optimizer.load_state_dict(state["optimizer"])
            if self.handle is not None:
                self.handle.load_state_dict(state["masks"])

    def _fingerprint(self) -> str:
        """What a checkpoint belongs to: with anything else it would go on silently wrong."""
        plan = self.plan
        network = of_network(self.model, source=False)  # a script that was edited may go on
        masks = plan.masks and dict(plan.masks)
        how = plan.seed, plan.start_step, self.stop
        return fingerprint(self.data.content, network, plan.recipe, masks, plan.mask_schedule, *how)

    def run(self) -> Trained:
        plan, result = self.plan, self.result
        handles: list[Any] = [] if self.handle is None else [self.handle]
        if plan.masks is not None:
            handles.append(self.optimizer.optimizer.register_step_post_hook(lambda *_: self.begin("mask")))
            handles.append(plan.masks.enforce(self.model, self.optimizer.optimizer))
        gpus = [self.fabric.device.index or 0] if self.fabric.device.type == "cuda" else []
        clock, saved, seen, before = time.perf_counter(), time.perf_counter(), 0, result.seconds
        with ExitStack() as stack:
            stack.enter_context(safe_convolutions(self.model))
            stack.enter_context(torch.random.fork_rng(devices=gpus))
            stack.enter_context(_same_sums())
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=_ARCHITECTURES))
            stack.callback(self.begin, "other")
            result.arithmetic = arithmetic()
            while result.steps < self.stop:
                row, images = self._epoch()
                seen += images
                result.history.append(row)
                result.seconds = before + time.perf_counter() - clock
                if self.rank > 0:
                    continue
                if self.on_epoch is not None:
                    self.on_epoch(row)
                due = time.perf_counter() - saved >= plan.checkpoint_every
                if plan.checkpoint is not None and result.steps < self.stop and due:
                    self._save(plan.checkpoint)
                    saved = time.perf_counter()
            if self.handle is not None:
                result.masks, result.mask_state = self.handle.masks, self.handle.state_dict()
            for handle in handles:
                handle.remove()
            if plan.optimizer_state is not None:
                known = self.optimizer.optimizer.state
                result.optimizer_state = {n: dict(known[p]) for n, p in self.model.named_parameters() if p in known}
            result.images_per_second = seen / max(time.perf_counter() - clock, 1e-9)
            self.begin("evaluation")
            result.accuracy, result.loss = self._evaluate("test")
            if len(self.data.test) > 0:
                _check_finite(result.loss, result, self.recipe)
        result.epochs = (result.steps - plan.start_step) / self.per_epoch
        result.seconds = before + time.perf_counter() - clock
        if plan.checkpoint is not None and self.rank == 0:
            plan.checkpoint.unlink(missing_ok=True)
        return result

    def _epoch(self) -> tuple[dict[str, float], int]:
        """The steps that are left of an epoch: their row of the history, and how many images they saw."""
        result, recipe, begin = self.result, self.recipe, self.begin
        epoch, first = divmod(result.steps, self.per_epoch)
        last = min(self.per_epoch, first + self.stop - result.steps)
        self.network.train()
        total, seen = torch.zeros((), device=self.fabric.device), 0
        order = derive(self.plan.seed, "epoch", epoch)
        batches = self.data.epoch(recipe.batch_size, order, self.rank, self.world)
        begin("data")
        for images, labels in itertools.islice(batches, first, last):
            total += self._step(images, labels)
            result.steps += 1
            seen += len(labels) * self.world
            if result.steps % _CHECK_EVERY == 0:
                _check_finite(total, result, recipe)
            begin("data")
        begin("bookkeeping")
        if self.world > 1:
            distributed.all_reduce(total)
            total /= self.world
        _check_finite(total, result, recipe)
        begin("evaluation")
        accuracy, validation_loss = self._evaluate("validation") if self.plan.validate else (math.nan, math.nan)
        begin("other")
        row = {
            "epoch": epoch + 1,
            "step": result.steps,
            "loss": float(total) / max(last - first, 1),
            "accuracy": accuracy,
            "validation_loss": validation_loss,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        return row, seen

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of the optimizer; the loss before it."""
        recipe, begin, steps = self.recipe, self.begin, self.result.steps
        begin("bookkeeping")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, steps, self.length)
        self.optimizer.zero_grad(set_to_none=True)
        if recipe.compile == "graphs":  # the memory of the last step's logits and gradients is free for this one's
            torch.compiler.cudagraph_mark_step_begin()
        seed_global(self.plan.seed, "training step", steps, self.rank, device=self.fabric.device)
        begin("forward")
        images = _layout(images, recipe.channels_last)
        if self.on_batch is not None:
            self.on_batch(steps, images, labels)
        outputs = self.network(images)
        loss = training_loss(outputs, labels, recipe.label_smoothing)
        begin("backward")
        self.fabric.backward(loss)
        begin("optimizer")
        if self.on_gradient is not None:
            self.on_gradient(steps)
        if recipe.clip_norm is not None:
            if self.handle is not None:
                self.handle.mask_gradients()
            self.zero(None if parameter is None else parameter.grad for parameter in self.pruned)
            # To raise on a norm that is not finite would wait for the device at every step.
            self.fabric.clip_gradients(
                self.network, self.optimizer, max_norm=recipe.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        begin("bookkeeping")
        return loss.detach()

    def _evaluate(self, split: str) -> tuple[float, float]:
        if self.world > 1:
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, 0)
        with self.fabric.autocast():  # never the compiled network: to compile it again costs more than it wins
            return evaluate(self.model, self.data, split, self.recipe.channels_last, self.rank, self.world)


def distribute(model: nn.Module, data: ImageData) -> nn.Module:
    """`model` with gradients that are means over the ranks; parameters without a gradient are left out."""
    weights = [p for p in model.parameters() if p.requires_grad]
    images = data.normalise(data.train.images[:2])
    with eval_mode(model), torch.random.fork_rng(devices=[]):
        gradients = torch.autograd.grad(model(images).sum(), weights, allow_unused=True)
    return DistributedDataParallel(model, find_unused_parameters=any(g is None for g in gradients))


@contextmanager
def _same_sums() -> Iterator[None]:
    """cuDNN takes the same algorithm at every start; all else of `torch.backends` stays as the user has set it.

    `torch.backends.cudnn.flags` would not leave it: what it is not given it sets, TF32 to on.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def arithmetic() -> dict[str, Any]:
    """The settings of torch on which the last bits of a training depend, as they are now."""
    return {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
    }


def _check_finite(total: Tensor | float, result: Trained, recipe: Recipe) -> None:
    if not math.isfinite(float(total)):
        raise AutoSparseFailure(
            f"training diverged: the loss is not finite by step {result.steps} (lr {recipe.lr}, {recipe.optimizer}); "
            "lower recipe.lr, set recipe.clip_norm or recipe.warmup; what was computed before is kept"
        )
