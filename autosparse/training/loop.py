"""The one training loop."""

from __future__ import annotations

import io
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from autosparse.errors import (
    AutoSparseError,
    AutoSparseFailure,
    AutoSparseStateError,
    first_line,
    raise_out_of_memory,
    require,
    settings,
)
from autosparse.files import check_seal, fingerprint, replace_file, seal
from autosparse.masks.layers import unwrap
from autosparse.masks.mask import Masks, Zeroing
from autosparse.masks.random import derive, forked, seed_global
from autosparse.network.onednn import safe_convolutions
from autosparse.network.restore import restored
from autosparse.network.running import eval_mode
from autosparse.training.content import of_network
from autosparse.training.data import ImageData
from autosparse.training.devices import SUPPORTED, device_names
from autosparse.training.profile import parts

OPTIMIZERS = ("sgd", "adamw")
LR_SCHEDULES = ("multistep", "cosine", "onecycle", "constant")
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
_CHECK_EVERY = 200  # steps between looks at the loss: a look waits for the device
_ARCHITECTURES = 256  # torch compiles a class for 8 networks and runs the others uncompiled, without a word


@settings
class Recipe:
    """How a network is trained.

    `optimizer`: `"sgd"` (Nesterov) or `"adamw"`. `schedule` of the learning rate over the whole length: `"multistep"`
    (× `gamma` at each of `milestones`, shares of the length), `"cosine"` (to 0), `"onecycle"` (linear up to `lr`, then
    linear to 0), `"constant"`; `warmup` is the share of the length with a linear rise (`"onecycle"`: 0.3 if 0). Length:
    `epochs`, or `steps` when that is given. `clip_norm`: largest gradient norm, over the kept weights. `precision`:
    `"fp32"` or `"bf16"` (autocast). `compile`: the training steps go through `torch.compile`, once per architecture in a
    process, whatever the seed, masks or round; `"graphs"`: as CUDA graphs too, for networks so small that the GPU waits
    for Python (on a CPU the same as `true`; not yet run on a GPU). Weight decay is on all parameters.
    """

    epochs: int = 160
    steps: int | None = None
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "multistep"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool | str = False

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "recipe.epochs", self.epochs, "give at least 1")
        require(self.steps is None or self.steps >= 1, "recipe.steps", self.steps, "give at least 1")
        require(self.batch_size >= 1, "recipe.batch_size", self.batch_size, "give at least 1")
        require(self.optimizer in OPTIMIZERS, "recipe.optimizer", self.optimizer, f"known: {', '.join(OPTIMIZERS)}")
        require(self.lr > 0 and math.isfinite(self.lr), "recipe.lr", self.lr, "give a positive number")
        require(0 <= self.momentum < 1, "recipe.momentum", self.momentum, "it must lie in [0, 1)")
        require(self.weight_decay >= 0, "recipe.weight_decay", self.weight_decay, "it must not be negative")
        require(self.schedule in LR_SCHEDULES, "recipe.schedule", self.schedule, f"known: {', '.join(LR_SCHEDULES)}")
        require(
            all(0 < m < 1 for m in self.milestones),
            "recipe.milestones",
            self.milestones,
            "they are shares of the training's length, such as 0.5 and 0.75",
        )
        require(0 <= self.warmup < 1, "recipe.warmup", self.warmup, "it is a share of the length, in [0, 1)")
        require(0 <= self.label_smoothing < 1, "recipe.label_smoothing", self.label_smoothing, "it must be in [0, 1)")
        require(self.clip_norm is None or self.clip_norm > 0, "recipe.clip_norm", self.clip_norm, "it must be positive")
        require(self.precision in PRECISIONS, "recipe.precision", self.precision, f"known: {', '.join(PRECISIONS)}")
        require(self.compile in (False, True, "graphs"), "recipe.compile", self.compile, "give true, false or graphs")

    def length(self, data: ImageData) -> int:
        """Optimizer steps of one training."""
        return self.steps if self.steps is not None else self.epochs * steps_per_epoch(data, self.batch_size)


@dataclass
class Trained:
    """What a training gave: `accuracy` and `loss` on the test images after the last step, never the best epoch's.

    `history` has one row per epoch: epoch, step, loss (training), accuracy and validation_loss (validation; NaN where it
    was not looked at), lr. `arithmetic`: TF32, and what else of torch's settings it depends on, as they were.
    """

    accuracy: float = math.nan
    loss: float = math.nan
    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    images_per_second: float = math.nan
    history: list[dict[str, float]] = field(default_factory=list)
    arithmetic: dict[str, Any] = field(default_factory=dict)


def steps_per_epoch(data: ImageData, batch_size: int) -> int:
    return max(1, len(data.train) // batch_size)


def learning_rate(recipe: Recipe, step: int, length: int) -> float:
    """Learning rate of `step` in `0 … length − 1`."""
    at = step / length
    rise = recipe.warmup or (0.3 if recipe.schedule == "onecycle" else 0.0)
    if at < rise:
        return recipe.lr * (step + 1) / (rise * length + 1)
    if recipe.schedule == "multistep":
        return recipe.lr * recipe.gamma ** sum(at >= m for m in recipe.milestones)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (at - rise) / (1 - rise)))
    if recipe.schedule == "onecycle":
        return recipe.lr * (1 - at) / (1 - rise)
    return recipe.lr


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


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise AutoSparseError(f"{type(model).__name__} has nothing to train: let some parameters require gradients")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


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
    recipe: Recipe,
    *,
    masks: Masks | None = None,
    seed: int = 0,
    device: str = "auto",
    start_step: int = 0,
    stop_step: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 30.0,
    validate: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_gradient: Callable[[int], None] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Trained:
    """Train `model` in place, its pruned weights held at zero after every step; test it after the last.

    Data order, augmentation and dropout are functions of `seed` and the step, so that a training that starts again from
    `checkpoint` gives what it would have given without the stop; the global RNG stays as it was.

    On several devices (`device="cuda:0,1"`; `"cpu:2"`: two processes on the CPU) it is one training all the same, with a
    process for each device (a rank): each takes its share of the same batches, and gradients are means over all shares, so
    that what comes out is that of one device up to rounding. But dropout draws other numbers on each; on CPUs, batch norms
    take the statistics of a rank's share, and the buffers of the first are kept (on GPUs those of `torch.nn` take all
    ranks'). Each call starts its processes anew, so a script needs its `if __name__ == "__main__":`, and a very short
    training gains nothing.

    Args:
        masks: weights outside stay zero.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, or several, `"cuda:0,1"`; the model ends up on it, or the first.
        start_step, stop_step: train this part of the recipe's steps only (late rewinding).
        checkpoint: file to write at epoch ends, `checkpoint_every` seconds apart or more, and to resume from; it is
            removed at the end. It must be of this very training: recipe, seed, masks, steps, initial weights and data.
        validate: measure accuracy and loss on the validation images after each epoch; nothing else depends on it.
        on_epoch: called with each new row of the history.
        on_gradient: called before each step of the optimizer with the number of steps done, when the gradients of the
            parameters are there (before clipping). Of several devices only the first is used then.
        rank, world: of this process, in a process group: for the processes of a training on several devices.

    Raises:
        AutoSparseError: the model cannot take the images, or the masks are another model's, or the checkpoint another
            training's; several devices cannot share the batch evenly.
        AutoSparseFailure: the loss is no longer finite; the message says at which step and what to try. The process of
            one of several devices died.
    """
    devices = device_names(device)
    if len(devices) > 1 and on_gradient is None:
        from autosparse.training.ranks import train_on

        return train_on(
            devices,
            model,
            data,
            recipe,
            masks=masks,
            seed=seed,
            start_step=start_step,
            stop_step=stop_step,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            validate=validate,
            on_epoch=on_epoch,
        )
    fabric = fabric_for(device, recipe.precision)
    data = data.to(fabric.device)
    model.to(fabric.device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    check_fits(model, data)
    built = build_optimizer(model, recipe)
    parallel: nn.Module = model
    if world > 1:
        from autosparse.training.ranks import distribute

        parallel = distribute(model, data)
    # Static shapes: else the second architecture of a class would be compiled for any number of channels.
    graphs = recipe.compile == "graphs"
    mode = "reduce-overhead" if graphs else None
    compiled = torch.compile(parallel, dynamic=False, mode=mode) if recipe.compile else parallel
    network, optimizer = fabric.setup(compiled, built, move_to_device=False)
    begin = parts(fabric.device)
    per_epoch, length = steps_per_epoch(data, recipe.batch_size), recipe.length(data)
    stop = length if stop_step is None else min(stop_step, length)
    result = Trained(steps=start_step)
    of = ""
    if checkpoint is not None:  # with anything else it would go on silently wrong
        network_now = of_network(model, source=False)  # a script that was edited may go on
        of = fingerprint(data.content, network_now, recipe, masks and dict(masks), seed, start_step, stop)
    if checkpoint is not None and checkpoint.exists():
        _restore(checkpoint, of, model, optimizer.optimizer, result)
    handles = []
    if masks is not None:
        handles.append(optimizer.optimizer.register_step_post_hook(lambda *_: begin("mask")))
        handles.append(masks.enforce(model, optimizer.optimizer))
    # Weights that are not there must not take part in the gradient's norm.
    own = dict(unwrap(model).named_parameters())
    pruned = [own.get(n) for n in masks or {}]  # of a parametrized weight the gradient has the mask already
    zero = Zeroing((masks or {}).values())
    gpus = [fabric.device.index or 0] if fabric.device.type == "cuda" else []

    def look(split: str) -> tuple[float, float]:
        if world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)
        with fabric.autocast():  # never the compiled network: to compile it again for this costs more than it wins
            return evaluate(model, data, split, recipe.channels_last, rank, world)

    clock, saved, seen = time.perf_counter(), time.perf_counter(), 0
    before = result.seconds
    with ExitStack() as stack:
        stack.enter_context(safe_convolutions(model))
        stack.enter_context(torch.random.fork_rng(devices=gpus))
        stack.enter_context(_same_sums())
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=_ARCHITECTURES))
        stack.callback(begin, "other")
        result.arithmetic = arithmetic()
        while result.steps < stop:
            epoch = result.steps // per_epoch
            first = result.steps % per_epoch
            last = min(per_epoch, first + stop - result.steps)
            network.train()
            total = torch.zeros((), device=fabric.device)
            batches = data.epoch(recipe.batch_size, derive(seed, "epoch", epoch), rank, world)
            begin("data")
            for images, labels in itertools.islice(batches, first, last):
                begin("bookkeeping")
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, result.steps, length)
                optimizer.zero_grad(set_to_none=True)
                if graphs:  # the memory of the last step's logits and gradients is free for this one's
                    torch.compiler.cudagraph_mark_step_begin()
                seed_global(seed, "training step", result.steps, rank, device=fabric.device)
                begin("forward")
                outputs = network(_layout(images, recipe.channels_last))
                loss = training_loss(outputs, labels, recipe.label_smoothing)
                begin("backward")
                fabric.backward(loss)
                begin("optimizer")
                if on_gradient is not None:
                    on_gradient(result.steps)
                if recipe.clip_norm is not None:
                    zero(None if parameter is None else parameter.grad for parameter in pruned)
                    # To raise on a norm that is not finite would wait for the device at every step.
                    fabric.clip_gradients(network, optimizer, max_norm=recipe.clip_norm, error_if_nonfinite=False)
                optimizer.step()
                begin("bookkeeping")
                total += loss.detach()
                result.steps += 1
                seen += len(labels) * world
                if result.steps % _CHECK_EVERY == 0:
                    _check_finite(total, result, recipe)
                begin("data")
            begin("bookkeeping")
            if world > 1:
                distributed.all_reduce(total)
                total /= world
            _check_finite(total, result, recipe)
            begin("evaluation")
            accuracy, validation_loss = look("validation") if validate else (math.nan, math.nan)
            begin("other")
            row = {
                "epoch": epoch + 1,
                "step": result.steps,
                "loss": float(total) / max(last - first, 1),
                "accuracy": accuracy,
                "validation_loss": validation_loss,
                "lr": optimizer.param_groups[0]["lr"],
            }
            result.history.append(row)
            result.seconds = before + time.perf_counter() - clock
            if rank > 0:
                continue
            if on_epoch is not None:
                on_epoch(row)
            if checkpoint is not None and result.steps < stop and time.perf_counter() - saved >= checkpoint_every:
                _save(checkpoint, of, model, optimizer.optimizer, result)
                saved = time.perf_counter()
        for handle in handles:
            handle.remove()
        result.images_per_second = seen / max(time.perf_counter() - clock, 1e-9)
        begin("evaluation")
        result.accuracy, result.loss = look("test")
        if len(data.test) > 0:
            _check_finite(result.loss, result, recipe)
    result.epochs = (result.steps - start_step) / per_epoch
    result.seconds = before + time.perf_counter() - clock
    if checkpoint is not None and rank == 0:
        checkpoint.unlink(missing_ok=True)
    return result


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


def _save(path: Path, of: str, model: nn.Module, optimizer: torch.optim.Optimizer, result: Trained) -> None:
    state = {
        "of": of,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "steps": result.steps,
        "seconds": result.seconds,
        "history": result.history,
    }
    buffer = io.BytesIO()  # torch's own writer does not say so when the disk is full
    torch.save(state, buffer)
    with replace_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        seal(temporary)


def _restore(path: Path, of: str, model: nn.Module, optimizer: torch.optim.Optimizer, result: Trained) -> None:
    try:
        content = path.read_bytes()[: check_seal(path, "checkpoint")]
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state.get("of") != of:
            raise ValueError("it is of another training (recipe, seed, masks, steps, initial weights or data differ)")
        result.steps, result.seconds, result.history = state["steps"], state["seconds"], state["history"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise AutoSparseStateError(
            f"checkpoint {path} cannot be resumed: {first_line(error)}; delete it to train from the start"
        ) from error
