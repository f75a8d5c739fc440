"""Every criterion on architectures of all kinds: what its mask keeps alive, and what it takes to find it.

    python benchmarks/architectures.py zoo  [--models NAME …] [--criteria NAME …] [--csv benchmarks/results/zoo.csv]
    python benchmarks/architectures.py deep [--csv benchmarks/results/deep.csv]

`zoo`: torchvision and timm networks at 95 %. Each mask is found in a process of its own, so that the peak of its memory is
its own. `deep`: SynFlow and ReSynFlow on a plain network of 100 convolutions and on ResNet-110 at 99.5 %. Rows are written
as they come, and those that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.pruning.criteria import PRESETS
from autosparse.training.models import ModelSettings, create_model

SIDE, BATCH = 64, 8  # of the zoo
ZOO = (
    "torchvision:resnet50",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "torchvision:vit_b_16",
    "torchvision:convnext_tiny",
    "torchvision:swin_t",
    "timm:regnety_008",
)
DEEP = (ModelSettings("convnet", 8, {"depth": 100, "norm": False}), ModelSettings("resnet110"))
AT_ONCE = [name for name, preset in PRESETS.items() if not any("@" in s for s in preset.criterion.signals)]


@dataclasses.dataclass(frozen=True)
class Task:
    """One mask to find."""

    model: str
    criterion: str
    sparsity: float
    side: int
    steps: int
    schedule: str
    classes: int = 1000
    width: int | None = None
    options: str = "{}"


def measured(task: Task) -> dict[str, object]:
    """The mask, its figures, and seconds and peak memory (GB, of the whole process, and before pruning began)."""
    settings = ModelSettings(task.model, task.width, json.loads(task.options))
    model = create_model(settings, classes=task.classes, image_size=task.side)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.trunc_normal_(module.weight, std=0.02)  # a head of zeros, as ViT has, passes no gradient
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, task.side, task.side, generator=generator)
    labels = torch.randint(task.classes, (BATCH,), generator=generator)
    found: dict[str, object] = {"weights": "", "error": ""}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    clock = time.perf_counter()
    try:
        masks = autosparse.prune(
            model,
            task.sparsity,
            task.criterion,
            batches=[(images, labels)],
            steps=task.steps,
            schedule=task.schedule,
        )
    except AutoSparseError as error:
        return {**found, "error": str(error)}
    report = masks.report
    return {
        **found,
        "weights": masks.total,
        "kept": masks.kept,
        "layers": len(masks),
        "dead_layers": len(report.dead_layers),
        "effective_sparsity": "" if report.effective_sparsity is None else round(report.effective_sparsity, 5),
        "ties": round(report.ties, 5),
        "seconds": round(time.perf_counter() - clock, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "before_gb": round(before, 2),
    }


COLUMNS = [f.name for f in dataclasses.fields(Task)] + [
    "weights",
    "kept",
    "layers",
    "dead_layers",
    "effective_sparsity",
    "ties",
    "seconds",
    "peak_gb",
    "before_gb",
    "error",
]


def zoo(models: list[str], criteria: list[str], most: int) -> list[Task]:
    tasks = []
    for model in models:
        for name in criteria:
            preset = PRESETS[name]
            tasks.append(Task(model, name, 0.95, SIDE, min(preset.steps, most), preset.schedule))
    return tasks


def deep() -> list[Task]:
    tasks = []
    for model in DEEP:
        for criterion in ("synflow", "resynflow"):
            for steps, schedule in ((100, "exponential"), (10, "exponential"), (10, "linear"), (1, "exponential")):
                options = json.dumps(dict(model.options))
                tasks.append(Task(model.name, criterion, 0.995, 32, steps, schedule, 10, model.width, options))
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["zoo", "deep"])
    parser.add_argument("--models", nargs="+", default=list(ZOO))
    parser.add_argument("--criteria", nargs="+", default=AT_ONCE, choices=AT_ONCE)
    parser.add_argument("--most-steps", type=int, default=100, help="no more steps than these; the row says how many")
    parser.add_argument("--csv", type=Path, help="file to write to and to go on with")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        warnings.simplefilter("ignore")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        print(json.dumps(measured(Task(**json.loads(chosen.child)))))
        return
    tasks = deep() if chosen.what == "deep" else zoo(chosen.models, chosen.criteria, chosen.most_steps)
    path = chosen.csv or Path(__file__).parent / "results" / f"{chosen.what}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = []
    if path.exists():
        known = list(csv.DictReader(line for line in path.open(newline="") if not line.startswith("#")))
    else:
        threads = os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())
        command = f"python benchmarks/architectures.py {chosen.what}"
        about = f"# {command}; torch {torch.__version__}, CPU, {threads} threads, batch of {BATCH} random images\n"
        path.write_text(about + ",".join(COLUMNS) + "\n")
    done = {tuple(row[f.name] for f in dataclasses.fields(Task)) for row in known}
    for number, task in enumerate(tasks, 1):
        plain = dataclasses.asdict(task)
        if tuple("" if v is None else str(v) for v in plain.values()) in done:
            continue
        command = [sys.executable, __file__, chosen.what, "--child", json.dumps(plain)]
        child = subprocess.run(command, capture_output=True, text=True)
        lines = child.stdout.strip().splitlines()
        result = json.loads(lines[-1]) if child.returncode == 0 else {"error": child.stderr.strip().splitlines()[-1]}
        with path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n").writerow({**plain, **result})
        print(f"{number}/{len(tasks)} {task.model} {task.criterion} {task.schedule} {task.steps}: {result}", flush=True)


if __name__ == "__main__":
    main()
