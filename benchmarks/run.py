"""What AutoSparse costs beside the plain thing, measured side by side in one process.

    python benchmarks/run.py [step sparsify loop usual runs stacked record scoring snip synflow scorer latency] [--threads N] [--csv benchmarks/results/NAME.csv]

Other work on the machine slows both sides of a comparison, so each round times them one right after the other, in turns
of order; a ratio is the median over rounds, beside its quartiles. The file is written as figures come, and what it holds is
not measured again: the same command goes on after a stop, and a file that is deleted starts over.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

import autosparse
from autosparse.masks.layers import prunable_layers
from autosparse.masks.selection import select
from autosparse.network.graph import trace
from autosparse.pruning.criteria import Context
from autosparse.scorers import heads
from autosparse.scorers.features import DEFAULT
from autosparse.scorers.image import FEATURES, ImageScorer
from autosparse.scorers.kinds import build_network
from autosparse.scorers.records import Record, read_record, write_record
from autosparse.scorers.scorer import Scorer
from autosparse.trainability.shrink import remove
from autosparse.training.data import ImageData, Split
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe, build_optimizer
from autosparse.training.train import train

BATCH, SIDE, CLASSES = 128, 16, 10  # of the training benchmarks
MB = 1e6


@dataclass(frozen=True)
class Row:
    """One figure: the median over rounds, with quartiles where there are several."""

    benchmark: str
    device: str
    measure: str
    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    unit: str = "ratio"
    goal: str = ""


@dataclass(frozen=True)
class Ask:
    """What to measure, and how long; `steps` and `rounds` are of `usual`, `runs`, `stacked` and `latency`, each has its own."""

    devices: tuple[str, ...]
    steps: int | None = None
    rounds: int | None = None
    only: str = ""
    until: float = math.inf
    there: frozenset[tuple[str, str, str]] = frozenset()  # benchmark, device, measure

    def wants(self, benchmark: str, device: str, case: str = "") -> bool:
        """Whether the figures whose measures end with `case` are asked for, not there yet, and there is time."""
        if device not in self.devices or self.only not in case:
            return False
        if any(b == benchmark and d == device and measure.endswith(case) for b, d, measure in self.there):
            return False
        if time.perf_counter() > self.until:
            print(f"# no time for {benchmark} {device} {case}: the same command goes on with it", flush=True)
            return False
        return True


def clock_of(device: str) -> Callable[[], float]:
    """Seconds of the wall; with one thread on a CPU those that this process computed, less moved by other work there."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def alternate(
    rounds: int, sides: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Seconds of each side in each round; which goes first changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        names = list(sides)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = clock()
            sides[name]()
            times[name].append(clock() - start)
    return {name: np.array(values) for name, values in times.items()}


def row(
    benchmark: str, device: str, measure: str, values: np.ndarray | float, unit: str = "ratio", goal: str = ""
) -> Row:
    found = np.atleast_1d(np.asarray(values, dtype=float))
    low, mid, high = np.quantile(found, [0.25, 0.5, 0.75])
    return Row(benchmark, device, measure, float(mid), float(low), float(high), len(found), unit, goal)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]], steps: int
) -> None:
    """What a training step cannot do without."""
    for images, labels in itertools.islice(batches, steps):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def ready_batches(device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Eight batches that are in place, again and again."""
    generator = torch.Generator().manual_seed(0)
    found = [
        (
            torch.randn(BATCH, 3, SIDE, SIDE, generator=generator).to(device),
            torch.randint(CLASSES, (BATCH,), generator=generator).to(device),
        )
        for _ in range(8)
    ]
    return itertools.cycle(found)


def resnet20(device: str) -> nn.Module:
    return create_model("resnet20", classes=CLASSES, image_size=SIDE).to(device).train()


# -- step: masked against dense training step --------------------------------------------------------------------------


def step(ask: Ask) -> Iterator[Row]:
    recipe = Recipe(lr=0.01, batch_size=BATCH)
    for device in ask.devices:
        if not ask.wants("step", device):
            continue
        dense = resnet20(device)
        masks = autosparse.prune(dense, 0.9, "magnitude", example_input=torch.zeros(1, 3, SIDE, SIDE, device=device))
        again, masked = copy.deepcopy(dense), copy.deepcopy(dense)
        steps, rounds = (1, 200) if device == "cpu" else (50, 60)
        batches = ready_batches(device)

        def side(
            model: nn.Module,
            enforce: bool = False,
            device: str = device,
            steps: int = steps,
            batches: Iterator[tuple[Tensor, Tensor]] = batches,
            masks: autosparse.Masks = masks,
        ) -> Callable[[], None]:
            optimizer = build_optimizer(model, recipe)
            if enforce:
                masks.enforce(model, optimizer)

            def run() -> None:
                plain_step(model, optimizer, batches, steps)
                wait(device)

            return run

        sides = {"dense": side(dense), "masked": side(masked, enforce=True), "dense again": side(again)}
        alternate(10, sides)
        times = alternate(rounds, sides)
        yield row("step", device, "masked / dense step", times["masked"] / times["dense"], goal="<= 1.03")
        yield row("step", device, "dense / dense step (noise)", times["dense again"] / times["dense"])
        yield row("step", device, "dense step", 1e3 * times["dense"] / steps, "ms")


# -- sparsify: a step while masks change, and what an update costs ---------------------------------------------------


def changing(ask: Ask) -> Iterator[Row]:
    """`autosparse.sparsify` beside a dense step: between updates, and one update, in steps. With an update every 100
    steps the overhead is the first less 1, and a hundredth of the second."""
    recipe = Recipe(lr=0.01, batch_size=BATCH)
    for device, method in itertools.product(ask.devices, ("gmp", "set", "rigl", "granet")):
        if not ask.wants("sparsify", device, method):
            continue
        dense, model = resnet20(device), resnet20(device)
        optimizers = [build_optimizer(m, recipe) for m in (dense, model)]
        handle = autosparse.sparsify(model, optimizers[1], method, sparsity=0.9, steps=10**6, every=1000)
        batches = ready_batches(device)

        def run(
            model: nn.Module,
            optimizer: torch.optim.Optimizer,
            at: int | None = None,
            device: str = device,
            batches: Iterator[tuple[Tensor, Tensor]] = batches,
            handle: autosparse.Sparsifier = handle,
        ) -> None:
            if at is not None:
                handle.step = at
            plain_step(model, optimizer, batches, 1)
            wait(device)

        # RigL's update takes the place of an optimizer step, so it is compared with all that a step costs
        due = next(s for s in range(200_000, 300_000) if handle.method.due(s, handle.steps))
        sides = {
            "dense": functools.partial(run, dense, optimizers[0]),
            "between": functools.partial(run, model, optimizers[1], due + 1),
            "update": functools.partial(run, model, optimizers[1], due - 1),
        }
        alternate(5, sides)
        times = alternate(ask.rounds or 60, sides, clock_of(device))
        between, update = times["between"] / times["dense"], (times["update"] - times["between"]) / times["dense"]
        yield row("sparsify", device, f"between updates / dense step, {method}", between, goal="<= 1.03")
        yield row("sparsify", device, f"one update, in dense steps, {method}", update)
        yield row("sparsify", device, f"every 100 steps / dense step, {method}", between + update / 100, goal="<= 1.03")


# -- loop: `train` against a bare loop on batches in place --------------------------------------------------------------


def random_data(train_images: int, validation_images: int, side: int = SIDE) -> ImageData:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(CLASSES, (count,), generator=generator))

    moments = torch.full((3,), 0.5), torch.full((3,), 0.29)
    return ImageData(split(train_images), split(validation_images), split(1), CLASSES, *moments, "crop+flip")


def loop(ask: Ask) -> Iterator[Row]:
    """One `train` of several epochs; the bare loop takes as many steps after each of them, in `on_epoch`."""
    for device in ask.devices:
        steps, epochs = (40, 9) if device == "cpu" else (400, 13)
        for share, what in ((0.0, "without validation"), (0.1, "validating on a tenth")):
            if not ask.wants("loop", device, what):
                continue
            data = random_data(steps * BATCH, round(share / (1 - share) * steps * BATCH))
            recipe = Recipe(epochs=epochs, lr=0.01, batch_size=BATCH, schedule="cosine")
            model, batches = resnet20(device), ready_batches(device)
            optimizer = build_optimizer(model, recipe)
            ours: list[float] = []
            bare: list[float] = []
            clock = time.perf_counter()

            def on_epoch(
                _: dict[str, float],
                device: str = device,
                steps: int = steps,
                model: nn.Module = model,
                optimizer: torch.optim.Optimizer = optimizer,
                batches: Iterator[tuple[Tensor, Tensor]] = batches,
                ours: list[float] = ours,
                bare: list[float] = bare,
            ) -> None:
                nonlocal clock
                wait(device)
                ours.append(time.perf_counter() - clock)
                start = time.perf_counter()
                plain_step(model, optimizer, batches, steps)
                wait(device)
                bare.append(time.perf_counter() - start)
                clock = time.perf_counter()

            train(resnet20(device), data, recipe, device=device, on_epoch=on_epoch)
            # Each epoch of ours lies between two bare ones; the first, which holds the set-up, is left out.
            mine, plain = np.array(ours[1:]), np.array(bare)
            ratios = (plain[1:] + plain[:-1]) / 2 / mine
            goal = ">= 0.95" if share == 0 else ""
            yield row("loop", device, f"train / bare images per second, {what}", ratios, goal=goal)
            yield row("loop", device, f"train, {what}", steps * BATCH / mine, "images/s")


# -- usual: `train` against a bare loop and against the loop of most repositories ---------------------------------------


class PerImage(torch.utils.data.Dataset):
    """Image by image through Pillow and transforms, as torchvision's CIFAR-10 does."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        from torchvision import transforms

        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.29,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def usual_loader(data: ImageData, workers: int, device: str, batch: int) -> torch.utils.data.DataLoader:
    arrays = data.train.images.permute(0, 2, 3, 1).contiguous().numpy(), data.train.labels.numpy()
    return torch.utils.data.DataLoader(
        PerImage(*arrays),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=1 if workers else None,  # little is made ready while the other sides run
        pin_memory=device == "cuda",
    )


def usual_steps(model: nn.Module, loader: torch.utils.data.DataLoader, device: str, steps: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    next(batches)  # its workers start before the clock does

    def run() -> None:
        total = 0.0
        with torch.backends.cudnn.flags(enabled=True):  # torch's own choice, where `train` asks for determinism
            for images, labels in itertools.islice(batches, steps):
                logits = model(images.to(device, non_blocking=True))
                loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
        wait(device)

    return run


FAST = {"precision": "bf16", "channels_last": True}
SETTINGS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": FAST, "bf16 as CUDA graphs": {**FAST, "compile": "graphs"}}


def usual(ask: Ask) -> Iterator[Row]:
    networks = {("resnet20", 32): 4, ("resnet20", 16): 8, ("resnet18", 32): 1}  # steps on a CPU
    for device, ((name, side), few) in itertools.product(ask.devices, networks.items()):
        for setting, options in SETTINGS.items():
            case = f"{name} at {side}x{side}, {setting}"
            if (device == "cuda" or not options) and ask.wants("usual", device, case):
                steps = ask.steps or (150 if device == "cuda" else few)
                yield from usual_case(device, name, side, options, case, steps, ask.rounds or 6)


def usual_case(
    device: str, name: str, side: int, options: dict[str, Any], case: str, steps: int, rounds: int
) -> Iterator[Row]:
    """As in `loop`: one `train` of several epochs; after each of them the other sides take as many steps.

    With one thread on a CPU the time of the usual loop's workers does not count: as if they had cores of their own.
    """
    data = random_data(steps * BATCH, 0, side)

    def make() -> nn.Module:
        return create_model(name, classes=CLASSES, image_size=side).to(device).train()

    form = torch.channels_last if options else torch.contiguous_format
    ready = [
        (x.contiguous(memory_format=form), y)
        for x, y in itertools.islice(data.to(device).epoch(BATCH, 0), min(steps, 8))
    ]
    recipe = Recipe(epochs=rounds + 1, lr=0.01, batch_size=BATCH, schedule="cosine", **options)
    model = make().to(memory_format=form)
    optimizer, batches = build_optimizer(model, recipe), itertools.cycle(ready)

    def bare() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bool(options)):
            plain_step(model, optimizer, batches, steps)
        wait(device)

    sides = {"bare": bare}
    if recipe.compile is False:
        for workers in (0, 2) if device == "cpu" else (2, 8):
            loader = usual_loader(data, workers, device, BATCH)
            sides[f"usual, {workers} workers"] = usual_steps(make(), loader, device, steps)
    for run in sides.values():  # not measured: the first time loads kernels and allocates
        run()
    ours: list[float] = []
    others: dict[str, list[float]] = {other: [] for other in sides}
    now = clock_of(device)
    began = now()

    def on_epoch(_: dict[str, float]) -> None:
        nonlocal began
        wait(device)
        ours.append(now() - began)
        names = list(sides)
        first = len(ours) % len(names)
        for other in names[first:] + names[:first]:
            start = now()
            sides[other]()
            others[other].append(now() - start)
        began = now()

    train(make(), data, recipe, device=device, on_epoch=on_epoch)
    mine = np.array(ours[1:])  # the first epoch holds the set-up
    yield row("usual", device, f"train, {case}", steps * BATCH / mine, "images/s")
    for other, seconds in others.items():
        found = np.array(seconds)
        ratios = (found[1:] + found[:-1]) / 2 / mine
        goal = "" if device == "cpu" else ">= 0.9" if other == "bare" else ">= 5"
        yield row("usual", device, f"{other}, {case}", steps * BATCH / found, "images/s")
        yield row("usual", device, f"images per second, train / {other}, {case}", ratios, goal=goal)


# -- runs: IRP runs per hour, by processes that share the device --------------------------------------------------------


def ready_worker(device: str, recipe: Recipe, barrier: Barrier) -> None:
    """Import, start the device and train a step, then wait for the others: in a campaign workers live on."""
    torch.set_num_threads(1)
    model, data = create_model("resnet20", image_size=SIDE), random_data(recipe.batch_size, 0)
    train(model, data, replace(recipe, steps=1), device=device)
    barrier.wait(200)


def one_run(device: str, folder: str, name: str, seed: int, recipe: Recipe) -> None:
    """A recorded IRP run of 12 rounds."""
    from autosparse.network.signals import SignalSettings
    from autosparse.search.irp import IRPSettings
    from autosparse.training.data import DataSettings
    from data_gen.runs import Run, generate_record

    data = DataSettings(f"hdf5:{folder}/data.h5")
    run = Run(ModelSettings("resnet20"), data, recipe, IRPSettings(rounds=12, density=0.05), SignalSettings(), seed)
    generate_record(run, Path(folder) / name, device=device)


def runs(ask: Ask) -> Iterator[Row]:
    for device in ask.devices:
        recipe, images = Recipe(batch_size=64, lr=0.05, schedule="cosine", steps=ask.steps or 10), 1024
        if device == "cuda":
            recipe, images = replace(recipe, batch_size=128, steps=ask.steps or 100, **FAST), 50_000
        for count in (2,) if device == "cpu" else (2, 4, 8):
            size = f"12-round IRP of ResNet-20, 13 x {recipe.steps} steps of {recipe.batch_size}, {recipe.precision}"
            case = f"{size}, {count} at once"
            if ask.wants("runs", device, case):
                yield from runs_case(device, count, recipe, images, case, ask.rounds or 3)


def runs_case(device: str, count: int, recipe: Recipe, images: int, case: str, rounds: int) -> Iterator[Row]:
    """`count` runs at once against one alone, a thread each; the workers are there before the clock starts."""
    import h5py

    processes = multiprocessing.get_context("spawn")
    barrier = processes.Barrier(count + 1)
    with (
        tempfile.TemporaryDirectory() as folder,
        processes.Pool(count, initializer=ready_worker, initargs=(device, recipe, barrier)) as pool,
    ):
        with h5py.File(f"{folder}/data.h5", "w") as file:
            for split, total in (("train", images), ("test", 256)):
                part = random_data(total, 0).train
                file[f"{split}/images"] = part.images.permute(0, 2, 3, 1).numpy()
                file[f"{split}/labels"] = part.labels.numpy()
        barrier.wait(200)
        names = (f"{i}.h5" for i in itertools.count())

        def at_once(number: int) -> None:
            work = [(device, folder, next(names), seed, recipe) for seed in range(number)]
            pool.starmap(one_run, work, chunksize=1)

        times = alternate(rounds, {"alone": lambda: at_once(1), "all": lambda: at_once(count)})
    yield row("runs", device, f"1 alone beside {case}", 3600 / times["alone"], "runs/h")
    yield row("runs", device, case, 3600 * count / times["all"], "runs/h")
    yield row("runs", device, f"runs per hour against 1 alone, {case}", count * times["alone"] / times["all"])


# -- stacked: several networks at once by torch.func, against one after another -----------------------------------------


class Stack:
    """Networks of one architecture that take their steps together: `vmap` over stacked parameters and buffers.

    All the rest is as in `train`: the same fused optimizer (it works weight by weight), and pruned weights that are
    held at zero.
    """

    def __init__(self, models: Sequence[nn.Module], masks: Sequence[autosparse.Masks], recipe: Recipe) -> None:
        self.skeleton = copy.deepcopy(models[0]).to("meta")
        parameters, self.buffers = stack_module_state(list(models))
        leaves = nn.ParameterList(p.detach() for p in parameters.values())
        self.parameters = dict(zip(parameters, leaves, strict=True))
        self.optimizer = build_optimizer(leaves, recipe)
        self.weights = [self.parameters[n] for n in masks[0]]
        self.factors = [torch.stack([m[n] for m in masks]).to(w) for n, w in zip(masks[0], self.weights, strict=True)]
        self._mask()

    @torch.no_grad()
    def _mask(self) -> None:
        torch._foreach_mul_(self.weights, self.factors)

    def _loss(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.skeleton, (parameters, buffers), (x,)), y)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Images `(networks, batch, C, H, W)`: a batch of each network's own."""
        self.optimizer.zero_grad(set_to_none=True)
        vmap(self._loss)(self.parameters, self.buffers, images, labels).sum().backward()
        self.optimizer.step()
        self._mask()


def crew(settings: ModelSettings, side: int, count: int, device: str) -> tuple[list[nn.Module], list[autosparse.Masks]]:
    """Networks of different seeds, each with its own magnitude masks."""
    models = [create_model(settings, classes=CLASSES, image_size=side, seed=seed).train() for seed in range(count)]
    example = torch.zeros(1, 3, side, side)
    masks = [autosparse.prune(m, 0.9, "magnitude", example_input=example) for m in models]
    return [m.to(device) for m in models], masks


def check_stack(device: str) -> None:
    """A step of the stack is a step of each network, to rounding (in float64, without norms)."""
    models, masks = crew(ModelSettings("convnet", options={"norm": False}), 8, 3, device)
    recipe = Recipe(lr=0.1)
    for model in models:
        model.double()
    together = Stack(models, masks, recipe)
    images = torch.randn(3, 16, 3, 8, 8, dtype=torch.float64, device=device)
    labels = torch.randint(CLASSES, (3, 16), device=device)
    together.step(images, labels)
    for index, (model, mask) in enumerate(zip(models, masks, strict=True)):
        optimizer = build_optimizer(model, recipe)
        mask.enforce(model, optimizer)
        plain_step(model, optimizer, iter([(images[index], labels[index])]), 1)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together.parameters[name][index], parameter)


def stacked(ask: Ask) -> Iterator[Row]:
    networks = [  # side, batch, steps of a stack in a round on a CPU
        (ModelSettings("convnet", 4), 8, 16, 64),
        (ModelSettings("convnet", 16), 8, 128, 8),
        (ModelSettings("resnet20", 4), 16, 128, 6),
        (ModelSettings("resnet20", 8), 16, 128, 3),
        (ModelSettings("resnet20", 16), 16, 128, 1),
    ]
    for device in ask.devices:
        check_stack(device)
        for settings, side, batch, few in networks:
            case = f"{settings.label()} at {side}x{side}, batches of {batch}"
            if ask.wants("stacked", device, case):
                steps = ask.steps or (50 if device == "cuda" else few)
                yield from stacked_case(device, settings, side, batch, case, steps, ask.rounds or 5)


def stacked_case(
    device: str, settings: ModelSettings, side: int, batch: int, case: str, steps: int, rounds: int
) -> Iterator[Row]:
    """Images per second in all, of K networks at once and of `train`, one network after another.

    Neither set-up nor the first step counts: a step's clock is read where its gradients are there.
    """
    now = clock_of(device)
    counts = (1, 2, 4, 8) if device == "cpu" else (1, 2, 4, 8, 32)
    recipe = Recipe(steps=4 * steps + 1, batch_size=batch, lr=0.01, schedule="constant")
    data = random_data((4 * steps + 1) * batch, 0, side).to(device)
    models, masks = crew(settings, side, max(counts), device)
    stacks = {k: Stack(models[:k], masks[:k], recipe) for k in counts}  # copies: `train` goes on with the models

    def together(k: int) -> float:
        start = now()
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # as in `train`
            orders = [data.epoch(batch, seed) for seed in range(k)]
            for batches in itertools.islice(zip(*orders, strict=True), steps):
                images, labels = (torch.stack(parts) for parts in zip(*batches, strict=True))
                stacks[k].step(images, labels)
        wait(device)
        return k * steps * batch / (now() - start)

    def in_turn() -> float:
        times: list[float] = []

        def on_gradient(step: int) -> None:
            if step in (0, 4 * steps):
                wait(device)
                times.append(now())

        train(models[0], data, recipe, masks=masks[0], device=device, validate=False, on_gradient=on_gradient)
        return 4 * steps * batch / (times[1] - times[0])

    sides: dict[str, Callable[[], float]] = {"train, one after another": in_turn}
    sides |= {f"{k} stacked": functools.partial(together, k) for k in counts}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        names = list(sides)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            found[name].append(sides[name]())
    rates = {name: np.array(values[1:]) for name, values in found.items()}  # the first round warms up
    weights = sum(layer.numel for layer in prunable_layers(models[0]).values())
    yield row("stacked", device, f"weights, {case}", weights, "weights")
    alone = rates.pop("train, one after another")
    yield row("stacked", device, f"train, one after another, {case}", alone, "images/s")
    for name, rate in rates.items():
        yield row("stacked", device, f"images per second, {name} / one after another, {case}", rate / alone)


# -- record: HDF5 record against a plain binary file -------------------------------------------------------------------


def resnet50() -> nn.Module:
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.resnet50()


def example_record(rounds: int = 20) -> Record:
    """A record of ResNet-50: its initial weights, random gradients, survival of IRP that keeps 80 % a round."""
    model = resnet50()
    layers = prunable_layers(model)
    own = dict(model.named_parameters())
    rng = np.random.default_rng(0)
    survival = {}
    for name, layer in layers.items():
        left = np.log(rng.random(layer.shape, dtype=np.float32).clip(1e-9)) / math.log(0.8)
        survival[name] = left.clip(0, rounds).astype(np.uint8)
    trainings = np.linspace(0, 1, rounds + 1)
    return Record(
        layers=layers,
        signals={
            "weight": {n: own[n].detach().numpy() for n in layers},
            "gradient": {
                n: rng.standard_normal(layer.shape, dtype=np.float32) * np.float32(1e-3) for n, layer in layers.items()
            },
        },
        survival=survival,
        density=0.8 ** np.arange(rounds + 1),
        accuracy=trainings,
        loss=trainings,
        config={},
        seed=0,
        rounds_done=rounds,
    )


def record(ask: Ask) -> Iterator[Row]:
    if not ask.wants("record", "cpu"):
        return
    example = example_record()
    arrays = [a for by_layer in (*example.signals.values(), example.survival) for a in by_layer.values()]
    size = sum(a.nbytes for a in arrays)
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = Path(folder) / "record.h5", Path(folder) / "plain.bin"

        def write_plain() -> None:
            with open(plain, "wb") as file:
                for array in arrays:
                    array.tofile(file)
                file.flush()
                os.fsync(file.fileno())

        def read_plain() -> list[np.ndarray]:
            with open(plain, "rb") as file:
                return [np.fromfile(file, a.dtype, a.size).reshape(a.shape) for a in arrays]

        def write_ours() -> None:
            write_record(ours, example)

        def read_ours() -> Record:
            return read_record(ours)

        writes = alternate(7, {"ours": write_ours, "plain": write_plain})
        reads = alternate(7, {"ours": read_ours, "plain": read_plain})
        again = read_record(ours)
        assert all((again.survival[n] == s).all() for n, s in example.survival.items())
        yield row(
            "record", "cpu", "write, plain file / record seconds", writes["plain"] / writes["ours"], goal=">= 0.5"
        )
        yield row("record", "cpu", "write, record", size / MB / writes["ours"], "MB/s")
        yield row("record", "cpu", "write, plain file", size / MB / writes["plain"], "MB/s")
        yield row(
            "record", "cpu", "read (cached), plain file / record seconds", reads["plain"] / reads["ours"], goal=">= 0.5"
        )
        yield row("record", "cpu", "read (cached), record", size / MB / reads["ours"], "MB/s")
        yield row("record", "cpu", "read (cached), plain file", size / MB / reads["plain"], "MB/s")
        yield row("record", "cpu", "raw bytes", size / MB, "MB")
        yield row("record", "cpu", "file size, record / plain file", ours.stat().st_size / size)


# -- scoring: a scorer on the weights of ResNet-50 ---------------------------------------------------------------------


def memory(reset: bool = False) -> tuple[float, float]:
    """Resident memory and its peak, in MB (Linux); `reset` starts the peak anew."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    now, peak = (int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) for key in ("VmRSS", "VmHWM"))  # type: ignore[index]
    return now * 1024 / MB, peak * 1024 / MB


def passes(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One forward and one backward pass."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        wait(images.device.type)

    return run


def imagenet_batch(device: str, count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 224, 224, generator=generator)
    return images.to(device), torch.randint(1000, (count,), generator=generator).to(device)


def scoring(ask: Ask) -> Iterator[Row]:
    """In a process of its own, so that the peak of memory is that of scoring."""
    if not ask.wants("scoring", "cpu"):
        return
    command = [sys.executable, __file__, "--child", "scoring", "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    for line in done.stdout.splitlines():
        yield Row(**json.loads(line))


def scoring_child() -> Iterator[Row]:
    model = resnet50()
    images, labels = imagenet_batch("cpu")
    graph = trace(model, images)
    layers = prunable_layers(model)
    own = dict(model.named_parameters())
    torch.manual_seed(0)
    signals = {
        "weight": {n: own[n].detach().clone() for n in layers},
        "gradient": {n: torch.randn(layer.shape) * 1e-3 for n, layer in layers.items()},
    }
    context = Context(layers, 0.05, graph)
    total = sum(layer.numel for layer in layers.values())
    scorers = {kind: _untrained(kind) for kind in ("mlp", "gnn", "image")}
    published = ImageScorer(1).eval()
    few = torch.randn(256, 2)
    gc.collect()
    peaks = {}
    for kind, scorer in scorers.items():
        before, _ = memory(reset=True)
        scores = scorer(signals, context)
        peaks[kind] = memory()[1] - before
    bare = passes(model, images, labels)
    bare()
    sides = {kind: functools.partial(scorer, signals, context) for kind, scorer in scorers.items()}
    sides |= {"select": functools.partial(select, scores, 0.05, layers=layers), "bare": bare}
    times = alternate(3, {**sides, "published": lambda: torch.no_grad()(published)(few)})
    yield row("scoring", "cpu", "weights", total / 1e6, "million")
    for kind, name in (("mlp", "mlp"), ("gnn", "gnn"), ("image", "image, by its table")):
        yield row("scoring", "cpu", name, times[kind], "s", "< 15" if kind == "gnn" else "< 10")
        yield row("scoring", "cpu", f"{name}: weights/s", total / times[kind], "1/s")
        yield row("scoring", "cpu", f"{name} / ResNet-50 forward and backward", times[kind] / times["bare"])
        yield row("scoring", "cpu", f"peak memory of {name}", peaks[kind] / 1e3, "GB", "< 2")

    yield row("scoring", "cpu", "image, its ResNet-18: weights/s", len(few) / times["published"], "1/s")
    yield row("scoring", "cpu", "selection", times["select"], "s")
    yield row("scoring", "cpu", "ResNet-50 forward and backward, 32 images of 224", times["bare"], "s")


def _untrained(kind: str) -> Scorer:
    features = FEATURES if kind == "image" else DEFAULT
    options = {"size": 64} if kind == "image" else {}
    network = build_network(kind, features, heads.outputs("hazard"), options).eval()
    return Scorer(kind, network, "hazard", features, 1, 128, options)


# -- snip: masks of ResNet-50 against the bare passes ------------------------------------------------------------------


def snip(ask: Ask) -> Iterator[Row]:
    for device in ask.devices:
        if not ask.wants("snip", device):
            continue
        model = resnet50().to(device)
        batch = imagenet_batch(device)

        def prune(model: nn.Module = model, batch: tuple[Tensor, Tensor] = batch, device: str = device) -> None:
            autosparse.prune(model, 0.9, "snip", batches=[batch])
            wait(device)

        sides = {"snip": prune, "bare": passes(model, *batch)}
        alternate(1, sides)
        times = alternate(5, sides)
        yield row("snip", device, "prune(snip) / forward and backward", times["snip"] / times["bare"], goal="<= 1.3")
        yield row("snip", device, "prune(snip)", times["snip"], "s")
        yield row("snip", device, "forward and backward, 32 images of 224", times["bare"], "s")


# -- synflow and scorer: masks of ResNet-50 against what they cannot do without -------------------------------------------


def synflow(ask: Ask) -> Iterator[Row]:
    """100 steps on one example against as many forward and backward passes in float64; needs no more than one thread."""
    for device in ask.devices:
        if not ask.wants("synflow", device):
            continue
        model = resnet50().to(device)
        image = imagenet_batch(device, 1)[0]
        double, wide = copy.deepcopy(model).double().eval(), image.double()
        steps = ask.steps or 100

        def bare(double: nn.Module = double, wide: Tensor = wide, device: str = device, steps: int = steps) -> None:
            for _ in range(steps):
                double.zero_grad(set_to_none=True)
                double(wide).sum().backward()
            wait(device)

        def prune(model: nn.Module = model, image: Tensor = image, device: str = device, steps: int = steps) -> None:
            autosparse.prune(model, 0.9, "synflow", example_input=image, steps=steps)
            wait(device)

        times = alternate(ask.rounds or 1, {"synflow": prune, "bare": bare}, clock_of(device))
        measure = f"prune(synflow, {steps} steps) / as many passes in float64"
        yield row("synflow", device, measure, times["synflow"] / times["bare"], goal="<= 1.2")


def scorer(ask: Ask) -> Iterator[Row]:
    """The bundled scorer against SNIP, both on one batch of 32 images of 224."""
    for device in ask.devices:
        if not ask.wants("scorer", device):
            continue
        model, batch = resnet50().to(device), imagenet_batch(device)

        def prune(name: str, model: nn.Module = model, batch: Any = batch, device: str = device) -> None:
            autosparse.prune(model, 0.9, name, batches=[batch], n_batches=1)
            wait(device)

        sides = {name: functools.partial(prune, name) for name in ("autosparse", "snip")}
        times = alternate(ask.rounds or 3, sides, clock_of(device))
        yield row(
            "scorer", device, "prune(autosparse) / prune(snip)", times["autosparse"] / times["snip"], goal="<= 1.5"
        )


# -- latency: half of the channels removed, against dense ---------------------------------------------------------------


def halved(model: nn.Module, images: Tensor) -> autosparse.Masks:
    """Half of the filters of every layer but the classifier, which stays whole."""
    layers = prunable_layers(model)
    whole = sum(layers[name].numel for name in trace(model, images).last_layers())
    sparsity = 0.5 * (1 - whole / sum(layer.numel for layer in layers.values()))
    return autosparse.prune(model, sparsity, "magnitude", example_input=images, granularity="channel", scope="uniform")


def latency(ask: Ask) -> Iterator[Row]:
    """A forward pass of the dense, the masked and the physically smaller network, on the same images."""
    networks = {("torchvision:resnet18", 224): 1000, ("resnet18", 32): CLASSES}
    for device, ((name, side), classes), batch in itertools.product(ask.devices, networks.items(), (1, 32)):
        case = f"{name} at {side}x{side}, batch {batch}"
        if not ask.wants("latency", device, case):
            continue
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, side, side, generator=generator)
        model = create_model(name, classes=classes, image_size=side)
        with torch.no_grad():
            for _ in range(3):  # statistics of the norms that are not those of the initialization
                model.train()(torch.randn(8, 3, side, side, generator=generator))
        model.eval()
        found = remove(model, halved(model, images[:1]), images[:1])
        networks_here = {"dense": model, "masked": found.zeroed, "channels": found.smaller}
        with torch.inference_mode():
            expected, smaller = found.zeroed(images), found.smaller(images)
            worst = float((smaller - expected).abs().max() / expected.abs().max())
            batches = images.to(device)

            def run(network: nn.Module, batches: Tensor = batches, device: str = device) -> None:
                network(batches)
                wait(device)

            sides = {key: functools.partial(run, net.to(device)) for key, net in networks_here.items()}
            alternate(3, sides)
            times = alternate(ask.rounds or (60 if batch == 1 else 12), sides, clock_of(device))
        goal = ">= 2"
        yield row("latency", device, f"channels, difference of outputs, {case}", worst, "of the largest", "<= 1e-5")
        yield row("latency", device, f"dense / channels, {case}", times["dense"] / times["channels"], goal=goal)
        yield row("latency", device, f"dense / masked, {case}", times["dense"] / times["masked"])
        yield row("latency", device, f"dense, {case}", 1e3 * times["dense"], "ms")


BENCHMARKS: dict[str, Callable[[Ask], Iterator[Row]]] = {
    "step": step,
    "sparsify": changing,
    "loop": loop,
    "usual": usual,
    "runs": runs,
    "stacked": stacked,
    "record": record,
    "scoring": scoring,
    "snip": snip,
    "synflow": synflow,
    "scorer": scorer,
    "latency": latency,
}


def machine() -> list[str]:
    lines = [
        f"torch {torch.__version__}, Python {sys.version.split()[0]}, autosparse {autosparse.__version__}",
        f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start",
    ]
    if torch.cuda.is_available():
        lines.append(f"CUDA: {torch.cuda.get_device_name()}")
    return lines


def rows_there(path: Path | None) -> frozenset[tuple[str, str, str]]:
    if path is None or not path.exists():
        return frozenset()
    with open(path, newline="") as file:
        lines = csv.DictReader(line for line in file if not line.startswith("#"))
        return frozenset((r["benchmark"], r["device"], r["measure"]) for r in lines)


def append(path: Path, header: Sequence[str], rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, each in the file before it is passed on; the header comes before the first of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Row.__dataclass_fields__), lineterminator="\n")
        for index, found in enumerate(rows):
            if index == 0:
                file.writelines(f"# {line}\n" for line in header)
                if empty:
                    writer.writeheader()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(found).items()})
            file.flush()
            yield found


def main() -> None:
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--csv", type=Path, help="file for the figures; those that it holds are not measured again")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch on the CPU")
    parser.add_argument("--device", choices=there, help="this one only, instead of all there are")
    parser.add_argument(
        "--steps", type=int, help="of usual, runs, stacked: training steps a round (of a training in runs)"
    )
    parser.add_argument(
        "--rounds", type=int, help="of usual, runs, stacked, latency: rounds in which the sides take turns"
    )
    parser.add_argument(
        "--only", default="", help="of usual, runs, stacked, latency: cases with this text, such as resnet20"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so many")
    parser.add_argument("--note", help="a line for the head of the file, such as what else ran")
    parser.add_argument("--child", choices=["scoring"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    if options.child:
        for found in scoring_child():
            print(json.dumps(asdict(found)))
        return
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"benchmark is {name!r}: known are {', '.join(BENCHMARKS)}")
    header = ["python benchmarks/run.py " + shlex.join(sys.argv[1:]), *machine()]
    header += [options.note] if options.note else []
    print(*(f"# {line}" for line in header), sep="\n")
    print(f"{'':8} {'device':6} {'measure':62} {'median':>9} {'quartiles':>19} {'rounds':>6}  unit")
    ask = Ask(
        devices=(options.device,) if options.device else tuple(there),
        steps=options.steps,
        rounds=options.rounds,
        only=options.only,
        until=time.perf_counter() + 60 * options.minutes,
        there=rows_there(options.csv),
    )
    rows: Iterator[Row] = itertools.chain.from_iterable(BENCHMARKS[name](ask) for name in options.names or BENCHMARKS)
    for r in rows if options.csv is None else append(options.csv, header, rows):
        spread = f"{r.lower_quartile:9.4g} {r.upper_quartile:9.4g}" if r.rounds > 1 else ""
        goal = f"  (goal {r.goal})" if r.goal else ""
        print(
            f"{r.benchmark:8} {r.device:6} {r.measure:62} {r.median:9.4g} {spread:>19} {r.rounds:6}  {r.unit}{goal}",
            flush=True,
        )


if __name__ == "__main__":
    main()
