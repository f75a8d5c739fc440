"""The front of training: one device or several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autosparse.errors import require
from autosparse.masks.mask import Masks
from autosparse.training import loop
from autosparse.training.data import ImageData
from autosparse.training.devices import device_names
from autosparse.training.loop import MaskSchedule, OptimizerState, Trained
from autosparse.training.recipe import Recipe


def train(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    *,
    masks: Masks | None = None,
    mask_schedule: MaskSchedule | None = None,
    seed: int = 0,
    device: str = "auto",
    start_step: int = 0,
    stop_step: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 30.0,
    validate: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_gradient: Callable[[int], None] | None = None,
    on_batch: Callable[[int, Tensor, Tensor], None] | None = None,
    optimizer_state: OptimizerState | None = None,
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
        data: images and labels, from `autosparse.training.data.load_data("cifar10")`.
        recipe: optimizer, learning rate and length.
        masks: weights outside stay zero.
        mask_schedule: masks that change while the network trains, see `search.sparsify`; in place of `masks`. The result
            has those of the end.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, or several, `"cuda:0,1"`; the model ends up on it, or the first.
        start_step, stop_step: train this part of the recipe's steps only (late rewinding).
        checkpoint: file to write at epoch ends, `checkpoint_every` seconds apart or more, and to resume from; it is
            removed at the end. It must be of this very training: recipe, seed, masks, steps, initial weights and data.
        validate: measure accuracy and loss on the validation images after each epoch; nothing else depends on it.
        on_epoch: called with each new row of the history.
        on_gradient: called with the number of steps done, before each optimizer step and before clipping.
        on_batch: called with the number of steps done, the images and the labels, before each forward pass.
        optimizer_state: what the optimizer begins with, by parameter name (empty for nothing); the result then has its
            final state, so that a training in parts equals one in one go. With any of these three arguments, only the
            first of several devices is used.

    Returns:
        A `Trained`: test `accuracy` in [0, 1], test `loss` (mean cross-entropy) and `history`, one row per epoch.

    Raises:
        AutoSparseError: the model cannot take the images, or the masks are another model's, or the checkpoint another
            training's; several devices cannot share the batch evenly.
        AutoSparseFailure: the loss is no longer finite; the message says at which step and what to try. The process of
            one of several devices died.
    """
    require(
        masks is None or mask_schedule is None, "masks", "given", "mask_schedule has its own; leave one of them out"
    )
    plan = loop.Plan(
        recipe,
        masks,
        seed,
        start_step,
        stop_step,
        checkpoint,
        checkpoint_every,
        validate,
        mask_schedule,
        optimizer_state,
    )
    devices = device_names(device)
    if len(devices) > 1 and on_gradient is None and on_batch is None and optimizer_state is None:
        from autosparse.training.ranks import train_on

        return train_on(devices, model, data, plan, on_epoch=on_epoch)
    how: dict[str, Any] = {"on_epoch": on_epoch, "on_gradient": on_gradient, "on_batch": on_batch}
    return loop.train(model, data, plan, device=device, **how)
