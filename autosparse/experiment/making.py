"""How a network becomes smaller, by each method of `autosparse shrink`: from the dense network to the row of results."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure, of_state
from autosparse.experiment.candidates import find_masks
from autosparse.files import read_json, read_safetensors, write_safetensors
from autosparse.jobs.cells import Progress, result_path
from autosparse.masks.layers import prunable_layers
from autosparse.masks.mask import Masks
from autosparse.masks.random import make_generator
from autosparse.network.graph import trace
from autosparse.network.size import Size, size
from autosparse.scorers.task import keep_highest, learn_encoder
from autosparse.trainability.fuse import Fused, FuseSettings, fresh, fuse
from autosparse.trainability.gated import train_gated, whole_filters
from autosparse.trainability.gates import unit_layers
from autosparse.trainability.shrink import remove
from autosparse.trainability.stored import save_weights
from autosparse.trainability.tpp import filter_densities, push_out
from autosparse.training.data import ImageData, shared_data
from autosparse.training.loop import Trained, evaluate, full_state, put_back
from autosparse.training.models import build_model
from autosparse.training.train import train

if TYPE_CHECKING:
    from autosparse.experiment.structured import Thinning

_SCHEMA = "autosparse.state/1"  # all parameters and buffers of a network


def train_dense(
    thinning: Thinning, model: nn.Module, directory: Path, data: ImageData, device: str, state: Path, progress: Progress
) -> dict[str, Any]:
    """Train the network that the others begin with, on the reference data where there are any."""
    if thinning.reference is not None:
        data = shared_data(thinning.reference, str(data.device))
        model = build_model(thinning.model, data, thinning.seed).to(data.device)
    trained = train(
        model,
        data,
        thinning.recipe,
        seed=thinning.seed,
        device=device,
        checkpoint=state / "dense.pt",
        on_epoch=_staged("dense", progress),
    )
    write_safetensors(result_path(directory, thinning).with_suffix(".safetensors"), full_state(model), _SCHEMA)
    before = size(model, data.normalise(data.train.images[:2]))
    return {
        **thinning.row(),
        "dense_accuracy": trained.accuracy,
        "accuracy": trained.accuracy,
        "parameters_before": before.parameters,
        "parameters": before.parameters,
        "macs_before": before.macs,
        "macs": before.macs,
        "seconds": trained.seconds,
        "total_seconds": trained.seconds,
        "history": trained.history,
        "arithmetic": trained.arithmetic,
    }


def make_smaller(
    thinning: Thinning, model: nn.Module, directory: Path, data: ImageData, device: str, state: Path, progress: Progress
) -> dict[str, Any]:
    """Choose filters, push them out, remove them, fine-tune; each stage asks first for what an earlier try left."""
    assert thinning.method is not None and thinning.tpp is not None and thinning.finetune is not None
    path, example = result_path(directory, thinning), data.normalise(data.train.images[:2])
    dense = _trained_dense(thinning, model, directory, example)
    chosen = state / "masks.safetensors"
    clock = time.perf_counter()
    if not chosen.exists():
        progress({"stage": "choosing filters"})
        _choose(thinning, model, directory, data, example, device, progress).save(chosen)
    choosing = time.perf_counter() - clock
    with of_state():
        masks = Masks.load(chosen).to(data.device)
    removal = remove(model, masks, example)
    if not removal.removed:
        reasons = "; ".join(f"{name}: {why}" for name, why in removal.stays.items()) or "the ratios empty none"
        raise AutoSparseError(f"ratio {thinning.ratio_label} removes no filter of {thinning.model.label()} ({reasons})")
    ramped = state / "ramp.safetensors"
    if ramped.exists():
        with of_state():
            weights, figures = read_safetensors(ramped, _SCHEMA, "state of a cell")
        put_back(model, weights)
    else:
        trained = push_out(
            model,
            data,
            removal,
            thinning.tpp,
            thinning.finetune,
            penalise=thinning.method.split(":")[0] == "tpp",
            seed=thinning.seed,
            device=device,
            checkpoint=state / "ramp.pt",
            on_epoch=_staged("ramp", progress),
        )
        figures = {"accuracy": repr(trained.accuracy), "seconds": repr(trained.seconds)}
        write_safetensors(ramped, full_state(model), _SCHEMA, **figures)
    before = size(model, example)
    removal = remove(model, masks, example)
    smaller = removal.smaller
    removed_accuracy, _ = evaluate(smaller, data, channels_last=thinning.finetune.channels_last)
    trained = _finetune(thinning, smaller, data, device, state, progress)
    after = size(smaller, example)
    masks.save(path.with_suffix(".masks.safetensors"))
    save_weights(path.with_suffix(".safetensors"), smaller)
    seconds = choosing + float(figures["seconds"]) + trained.seconds
    return {
        **_row(thinning, dense, before, after, removed_accuracy, trained, seconds),
        "ramp_accuracy": float(figures["accuracy"]),
        "filters": {name: len(filters) for name, filters in removal.removed.items()},
        "stays": dict(removal.stays),
    }


def make_shallower(
    thinning: Thinning, model: nn.Module, directory: Path, data: ImageData, device: str, state: Path, progress: Progress
) -> dict[str, Any]:
    """Fuse layers of the trained network, and train what comes of it."""
    assert thinning.fuse is not None and thinning.finetune is not None
    path, example = result_path(directory, thinning), data.normalise(data.train.images[:2])
    dense = _trained_dense(thinning, model, directory, example)
    progress({"stage": "fusing"})
    clock = time.perf_counter()
    fused = fused_network(thinning.fuse, model, data, thinning.seed)
    seconds = time.perf_counter() - clock
    smaller = fused.model
    if thinning.method != "fuse":
        how = {"equal_norms": thinning.method == "fuse:random", "whole": thinning.method == "fuse:scratch"}
        smaller = fresh(fused, thinning.seed, **how)
    before, after = size(model, example), size(smaller, example)
    fused_accuracy, _ = evaluate(smaller, data, channels_last=thinning.finetune.channels_last)
    trained = _finetune(thinning, smaller, data, device, state, progress)
    save_weights(path.with_suffix(".safetensors"), smaller)
    row = _row(thinning, dense, before, after, fused_accuracy, trained, seconds + trained.seconds)
    return {**row, "errors": dict(fused.errors)}


def close_gates(
    thinning: Thinning, model: nn.Module, directory: Path, data: ImageData, device: str, state: Path, progress: Progress
) -> dict[str, Any]:
    """Train from the initialization with gates, and fine-tune what is left, as the other methods do."""
    assert thinning.gates is not None and thinning.finetune is not None
    path, example = result_path(directory, thinning), data.normalise(data.train.images[:2])
    dense, _ = _dense_result(thinning, directory)
    before = size(model, example)
    gated = train_gated(
        model,
        data,
        thinning.recipe,
        thinning.gates,
        checkpoint=state / "gated.pt",
        seed=thinning.seed,
        device=device,
        on_epoch=_staged("closing gates", progress),
    )
    smaller, after = gated.model, size(gated.model, example)
    trained = _finetune(thinning, smaller, data, device, state, progress)
    save_weights(path.with_suffix(".safetensors"), smaller)
    seconds = gated.seconds + trained.seconds
    return {
        **_row(thinning, dense, before, after, gated.accuracy, trained, seconds),
        "total_seconds": seconds,
        "removed": gated.removed,
        "history": [*gated.history, *trained.history],
    }


def _finetune(
    thinning: Thinning, smaller: nn.Module, data: ImageData, device: str, state: Path, progress: Progress
) -> Trained:
    """Train the smaller network, as all methods do in the end."""
    assert thinning.finetune is not None
    return train(
        smaller,
        data,
        thinning.finetune,
        seed=thinning.seed,
        device=device,
        checkpoint=state / "finetune.pt",
        on_epoch=_staged("fine-tuning", progress),
    )


def _row(
    thinning: Thinning,
    dense: Mapping[str, Any],
    before: Size,
    after: Size,
    removed_accuracy: float,
    trained: Trained,
    seconds: float,
) -> dict[str, Any]:
    """What every method tells; `seconds` are those after the dense training."""
    return {
        **thinning.row(),
        "dense_accuracy": dense["accuracy"],
        "ramp_accuracy": None,
        "removed_accuracy": removed_accuracy,
        "accuracy": trained.accuracy,
        "parameters_before": before.parameters,
        "parameters": after.parameters,
        "macs_before": before.macs,
        "macs": after.macs,
        "seconds": seconds,
        "total_seconds": dense["seconds"] + seconds,
        "history": trained.history,
        "arithmetic": trained.arithmetic,
    }


def fused_network(chosen: FuseSettings, model: nn.Module, data: ImageData, seed: int, few: bool = False) -> Fused:
    """The fused network; `few`: from hardly any data, to see whether it can be made."""
    batches = data.sample(8 if few else chosen.batch_size, 1 if few else chosen.n_batches, seed)
    return fuse(model, chosen.runs, batches, how=chosen.how, n_batches=len(batches), kernel=chosen.kernel)


def _dense_result(thinning: Thinning, directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The result of the dense training that a method begins with or stands beside, and the weights after it."""
    origin = result_path(directory, thinning.dense())
    if not origin.exists():
        raise AutoSparseFailure(f"the dense network of seed {thinning.seed} is missing: see why its training failed")
    weights = read_safetensors(origin.with_suffix(".safetensors"), _SCHEMA, "weights")[0]
    return read_json(origin, "result"), weights


def _trained_dense(thinning: Thinning, model: nn.Module, directory: Path, example: Tensor) -> dict[str, Any]:
    """Put the weights of the dense training into `model`; the last layer stays fresh after other data. Its result."""
    dense, weights = _dense_result(thinning, directory)
    if thinning.reference is not None:
        last = {name.rpartition(".")[0] for name in trace(model, example).last_layers()}
        weights |= {n: t for n, t in full_state(model).items() if n.rpartition(".")[0] in last}
    put_back(model, weights)
    return dense


def _choose(
    thinning: Thinning,
    model: nn.Module,
    directory: Path,
    data: ImageData,
    example: Tensor,
    device: str,
    progress: Progress,
) -> Masks:
    """The masks of the filters that will go, chosen on the trained dense network."""
    densities = filter_densities(model, example, thinning.ratio)
    if thinning.stamp is not None:
        return _of_task(thinning, model, directory, data, example, densities, progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_masks(
            model,
            data,
            thinning.candidate(),
            None,
            recipe=thinning.recipe,
            seed=thinning.seed,
            device=device,
            scope=densities,
        ).masks


def _of_task(
    thinning: Thinning,
    model: nn.Module,
    directory: Path,
    data: ImageData,
    example: Tensor,
    densities: Mapping[str, float],
    progress: Progress,
) -> Masks:
    """The masks that a task encoder gives for the images of `data`, at these densities or no more multiply-adds than theirs.

    With the method `stamp:other` it sees images of the reference data in their place.
    """
    assert thinning.stamp is not None and thinning.reference is not None
    reference = shared_data(thinning.reference, str(data.device))
    pretrained = build_model(thinning.model, reference, thinning.seed).to(data.device)
    put_back(pretrained, _dense_result(thinning, directory)[1])
    learned = learn_encoder(
        pretrained,
        reference,
        unit_layers(pretrained, example),
        thinning.stamp,
        seed=thinning.seed,
        on_task=lambda task, loss: progress({"stage": "learning what tasks need", "task": task, "loss": loss}),
    )
    source = reference if thinning.method == "stamp:other" else data
    order = torch.randperm(len(source.train), generator=make_generator(thinning.seed, "images of the task"))
    images = source.normalise(source.train.images[order[: thinning.stamp.images].to(source.device)])
    logits = {name: z.cpu() for name, z in learned.logits(pretrained, images).items()}
    layers = prunable_layers(model)
    own = {name: max(1, round(densities.get(name, 1.0) * len(z))) for name, z in logits.items()}
    if thinning.stamp.scope == "uniform":
        return whole_filters({n: keep_highest({n: z}, own[n])[n] for n, z in logits.items()}, layers)
    first = {name: torch.arange(len(z)) < own[name] for name, z in logits.items()}
    most = size(remove(model, whole_filters(first, layers), example).smaller, example).macs
    low, high = len(logits), sum(map(len, logits.values()))  # the largest count that is no more expensive
    while low < high:
        middle = (low + high + 1) // 2
        masks = whole_filters(keep_highest(logits, middle), layers)
        cheap = size(remove(model, masks, example).smaller, example).macs <= most
        low, high = (middle, high) if cheap else (low, middle - 1)
    return whole_filters(keep_highest(logits, low), layers)


def _staged(stage: str, progress: Progress) -> Callable[[dict[str, float]], None]:
    return lambda row: progress({"stage": stage, **row})
