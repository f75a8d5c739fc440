"""What AutoSparse costs beside the plain thing, measured side by side in one process.

    python benchmarks/run.py [step loop usual runs record scoring snip] [--threads N] [--csv benchmarks/results/NAME.csv]

Other work on the machine slows both sides of a comparison, so each round times them one right after the other, in turns
of order; a ratio is the median over rounds, beside its quartiles.
"""

from __future__ import annotations

import argparse
import copy
import csv
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosparse
from autosparse.masks.layers import prunable_layers
from autosparse.masks.selection import select
from autosparse.network.graph import trace
from autosparse.pruning.criteria import Context
from autosparse.scorers import heads
from autosparse.scorers.features import DEFAULT
from autosparse.scorers.scorer import Scorer
from autosparse.scorers.mlp import MLPScorer
from autosparse.scorers.records import Record, read_record, write_record
from autosparse.training.data import ImageData, Split
from autosparse.training.loop import Recipe, build_optimizer, train
from autosparse.training.models import create_model

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


def alternate(rounds: int, sides: Mapping[str, Callable[[], object]]) -> dict[str, np.ndarray]:
    """Seconds of each side in each round; which goes first changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        names = list(sides)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def row(
    benchmark: str, device: str, measure: str, values: np.ndarray | float, unit: str = "ratio", goal: str = ""
) -> Row:
    found = np.atleast_1d(np.asarray(values, dtype=float))
    low, mid, high = np.quantile(found, [0.25, 0.5, 0.75])
    return Row(benchmark, device, measure, float(mid), float(low), float(high), len(found), unit, goal)


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


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


def step() -> Iterator[Row]:
    recipe = Recipe(lr=0.01, batch_size=BATCH)
    for device in devices():
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


# -- loop: `train` against a bare loop on batches in place --------------------------------------------------------------


def random_data(train_images: int, validation_images: int, side: int = SIDE) -> ImageData:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(CLASSES, (count,), generator=generator))

    moments = torch.full((3,), 0.5), torch.full((3,), 0.29)
    return ImageData(split(train_images), split(validation_images), split(1), CLASSES, *moments, "crop+flip")


def loop() -> Iterator[Row]:
    """One `train` of several epochs; the bare loop takes as many steps after each of them, in `on_epoch`."""
    for device in devices():
        steps, epochs = (40, 9) if device == "cpu" else (400, 13)
        for share in (0.0, 0.1):
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
            what = "without validation" if share == 0 else "validating on a tenth"
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
        for images, labels in itertools.islice(batches, steps):
            logits = model(images.to(device, non_blocking=True))
            loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        wait(device)

    return run


def usual() -> Iterator[Row]:
    """As in `loop`: one `train` of several epochs; after each of them the other sides take as many steps."""
    for device, name in itertools.product(devices(), ("resnet20", "resnet18")):
        steps, epochs, batch = (
            (300, 9, BATCH) if device == "cuda" else (6, 5, BATCH) if name == "resnet20" else (2, 4, 16)
        )
        data = random_data(steps * batch, 0, 32)

        def make(name: str = name, device: str = device) -> nn.Module:
            return create_model(name, classes=CLASSES, image_size=32).to(device).train()

        fast = {"precision": "bf16", "channels_last": True}
        for precision, options in {"fp32": {}, **({"bf16": fast} if device == "cuda" else {})}.items():
            recipe = Recipe(epochs=epochs, lr=0.01, batch_size=batch, schedule="cosine", **options)
            form = torch.channels_last if options else torch.contiguous_format
            ready = [
                (x.contiguous(memory_format=form), y)
                for x, y in itertools.islice(data.to(device).epoch(batch, 0), min(steps, 8))
            ]
            model = make().to(memory_format=form)
            optimizer, batches = build_optimizer(model, recipe), itertools.cycle(ready)

            def bare(
                model: nn.Module = model,
                optimizer: torch.optim.Optimizer = optimizer,
                batches: Iterator[tuple[Tensor, Tensor]] = batches,
                steps: int = steps,
                device: str = device,
                bf16: bool = bool(options),
            ) -> None:
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    plain_step(model, optimizer, batches, steps)
                wait(device)

            sides = {"bare": bare}
            for workers in (0, 2):
                sides[f"usual, {workers} workers"] = usual_steps(
                    make(), usual_loader(data, workers, device, batch), device, steps
                )
            ours: list[float] = []
            others: dict[str, list[float]] = {side: [] for side in sides}
            clock = time.perf_counter()

            def on_epoch(
                _: dict[str, float],
                device: str = device,
                sides: dict[str, Callable[[], None]] = sides,
                ours: list[float] = ours,
                others: dict[str, list[float]] = others,
            ) -> None:
                nonlocal clock
                wait(device)
                ours.append(time.perf_counter() - clock)
                names = list(sides)
                first = len(ours) % len(names)
                for side in names[first:] + names[:first]:
                    others[side].extend(alternate(1, {side: sides[side]})[side])
                clock = time.perf_counter()

            train(make(), data, recipe, device=device, on_epoch=on_epoch)
            mine = np.array(ours[1:])
            what = f"{name}, {precision}"
            yield row("usual", device, f"train, {what}", steps * batch / mine, "images/s")
            for side, seconds in others.items():
                found = np.array(seconds)
                ratios = (found[1:] + found[:-1]) / 2 / mine
                goal = "" if device == "cpu" else ">= 0.9" if side == "bare" else ">= 5"
                yield row("usual", device, f"{side}, {what}", steps * batch / found, "images/s")
                yield row("usual", device, f"train / {side}, images per second, {what}", ratios, goal=goal)


# -- runs: IRP runs per hour, by processes that share the device --------------------------------------------------------


def one_run(device: str, folder: str, index: int, steps: int, batch: int, barrier: Barrier) -> None:
    """In a process of its own: a recorded IRP run of 12 rounds between two meetings with the others."""
    from autosparse.network.signals import SignalSettings
    from autosparse.pruning.irp import IRPSettings
    from autosparse.training.data import DataSettings
    from autosparse.training.models import ModelSettings
    from data_gen.runs import Run, generate_record

    torch.set_num_threads(1)
    data = DataSettings(f"hdf5:{folder}/data.h5")
    recipe = Recipe(steps=steps, batch_size=batch, lr=0.05, schedule="cosine")
    run = Run(ModelSettings("resnet20"), data, recipe, IRPSettings(rounds=12, density=0.05), SignalSettings(), index)
    train(
        create_model("resnet20", image_size=SIDE),
        random_data(batch, 0),
        Recipe(steps=1, batch_size=batch),
        device=device,
    )
    barrier.wait()
    generate_record(run, Path(folder) / f"{index}.h5", device=device)
    barrier.wait()


def runs() -> Iterator[Row]:
    """Starting the processes is left out: in a campaign they live on."""
    import h5py

    processes = multiprocessing.get_context("spawn")
    for device in devices():
        steps, batch, counts, rounds = (2, 32, (1, 2), 3) if device == "cpu" else (400, 128, (1, 2, 4, 8), 3)
        hours: dict[int, list[float]] = {count: [] for count in counts}
        for _, count in itertools.product(range(rounds), counts):
            with tempfile.TemporaryDirectory() as folder:
                with h5py.File(f"{folder}/data.h5", "w") as file:
                    for split, source in (("train", 1024 if device == "cpu" else 50_000), ("test", 256)):
                        part = random_data(source, 0).train
                        file[f"{split}/images"] = part.images.permute(0, 2, 3, 1).numpy()
                        file[f"{split}/labels"] = part.labels.numpy()
                barrier = processes.Barrier(count + 1)
                crew = [
                    processes.Process(target=one_run, args=(device, folder, i, steps, batch, barrier), daemon=True)
                    for i in range(count)
                ]
                for process in crew:
                    process.start()
                barrier.wait(300)
                start = time.perf_counter()
                barrier.wait(3600)
                hours[count].append((time.perf_counter() - start) / 3600)
                for process in crew:
                    process.join()
        single = np.array(hours[1])
        for count in counts:
            spent = np.array(hours[count])
            what = f"{count} process{'es' * (count > 1)}"
            yield row("runs", device, f"12-round IRP of ResNet-20, {13 * steps} steps, {what}", count / spent, "runs/h")
            if count > 1:
                yield row("runs", device, f"runs per hour, {what} / 1 process", count * single / spent)


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


def record() -> Iterator[Row]:
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
        yield row("record", "cpu", "write, plain file / record seconds", writes["plain"] / writes["ours"])
        yield row("record", "cpu", "write, record", size / MB / writes["ours"], "MB/s")
        yield row("record", "cpu", "write, plain file", size / MB / writes["plain"], "MB/s")
        yield row("record", "cpu", "read (cached), plain file / record seconds", reads["plain"] / reads["ours"])
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


def scoring() -> Iterator[Row]:
    """In a process of its own, so that the peak of memory is that of scoring."""
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
    scorer = Scorer(MLPScorer(len(DEFAULT), heads.outputs("hazard")).eval(), "hazard", DEFAULT, 1, 128)
    context = Context(layers, 0.05, graph)
    gc.collect()
    before, _ = memory(reset=True)
    scores = scorer(signals, context)
    _, peak_scoring = memory()
    select(scores, 0.05, layers=layers)
    _, peak = memory()
    bare = passes(model, images, labels)
    bare()
    times = alternate(
        3,
        {
            "score": lambda: scorer(signals, context),
            "select": lambda: select(scores, 0.05, layers=layers),
            "bare": bare,
        },
    )
    total = sum(layer.numel for layer in layers.values())
    yield row("scoring", "cpu", "weights", total / 1e6, "million")
    yield row("scoring", "cpu", "scorer", times["score"], "s", "< 10")
    yield row("scoring", "cpu", "scorer / ResNet-50 forward and backward", times["score"] / times["bare"])
    yield row("scoring", "cpu", "selection", times["select"], "s")
    yield row("scoring", "cpu", "selection / ResNet-50 forward and backward", times["select"] / times["bare"])
    yield row("scoring", "cpu", "ResNet-50 forward and backward, 32 images of 224", times["bare"], "s")
    yield row("scoring", "cpu", "peak memory of scoring", (peak_scoring - before) / 1e3, "GB", "< 2")
    yield row("scoring", "cpu", "peak memory of scoring and selection", (peak - before) / 1e3, "GB", "< 2")


# -- snip: masks of ResNet-50 against the bare passes ------------------------------------------------------------------


def snip() -> Iterator[Row]:
    for device in devices():
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


BENCHMARKS: dict[str, Callable[[], Iterator[Row]]] = {
    "step": step,
    "loop": loop,
    "usual": usual,
    "runs": runs,
    "record": record,
    "scoring": scoring,
    "snip": snip,
}


def machine() -> list[str]:
    lines = [
        f"torch {torch.__version__}, Python {sys.version.split()[0]}, autosparse {autosparse.__version__}",
        f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start",
    ]
    if torch.cuda.is_available():
        lines.append(f"CUDA: {torch.cuda.get_device_name()}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--csv", type=Path, help="file to write the figures to")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch on the CPU")
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
    rows = []
    for name in options.names or BENCHMARKS:
        for r in BENCHMARKS[name]():
            rows.append(r)
            spread = f"{r.lower_quartile:9.4g} {r.upper_quartile:9.4g}" if r.rounds > 1 else ""
            goal = f"  (goal {r.goal})" if r.goal else ""
            print(
                f"{r.benchmark:8} {r.device:6} {r.measure:62} {r.median:9.4g} {spread:>19} {r.rounds:6}  {r.unit}{goal}",
                flush=True,
            )
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(options.csv, "w", newline="") as file:
            file.writelines(f"# {line}\n" for line in header)
            writer = csv.DictWriter(file, fieldnames=list(Row.__dataclass_fields__), lineterminator="\n")
            writer.writeheader()
            for r in rows:
                writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(r).items()})


if __name__ == "__main__":
    main()
