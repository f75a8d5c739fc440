"""Whether one update of our gradual and dynamic methods chooses the weights that public implementations choose.

    python benchmarks/updates.py --public FOLDER [--out benchmarks/results/updates.csv]

FOLDER holds clones named OWNER+NAME: `VITA-Group+GraNet` and `nollied+rigl-torch`; one that is not there is skipped. Their code
runs as it is, on our weights, gradients and masks: first with its own choices, then with one after another set as ours.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from parity import import_from
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse.masks.layers import prunable_layers
from autosparse.masks.updates import exchange_fraction, gradual_density
from autosparse.search.dynamic import GraNetSettings, RigLSettings, SETSettings
from autosparse.search.gmp import GMPSettings
from autosparse.search.sparsify import SparseTraining, Update, at_share
from autosparse.training.models import ModelSettings, create_model

STEP, STEPS, DENSITY = 300, 1000, 0.05
NETWORKS = {"resnet20": ModelSettings("resnet20"), "vgg11-w16": ModelSettings("vgg11", 16)}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Weights (zero where pruned), gradients of all weights, and masks, by name in the order of the modules."""

    model: nn.Module
    weights: Tensors
    gradients: Tensors
    masks: dict[str, Tensor]

    def updated(self, method: SparseTraining) -> dict[str, Tensor]:
        """The masks after our update."""
        layers = prunable_layers(self.model)
        now = Update(self.weights, self.gradients, self.masks, layers, DENSITY, None, 0.0, STEP, STEPS, 0)
        return {n: m.bool() for n, m in method.update(now).items()}

    def without_return(self, after: Mapping[str, Tensor]) -> Case:
        """The same with no gradient where our update drops a weight, so that it does not come back elsewhere either."""
        gradients = {n: g * ~(self.masks[n] & ~after[n]) for n, g in self.gradients.items()}
        return Case(self.model, self.weights, gradients, self.masks)


def make_case(network: str, method: SparseTraining) -> Case:
    torch.manual_seed(0)
    model = create_model(NETWORKS[network], image_size=16)
    layers = prunable_layers(model)
    own = {n: p for n, p in model.named_parameters() if n in layers}
    masks = {n: m.bool() for n, m in method.start(layers, DENSITY, None, 0.0, 0).items()}
    with torch.no_grad():
        for name, weight in own.items():
            weight.mul_(masks[name])
    F.cross_entropy(model(torch.randn(64, 3, 16, 16)), torch.randint(10, (64,))).backward()
    gradients = {n: w.grad.clone() for n, w in own.items() if w.grad is not None}
    return Case(model, {n: w.detach().clone() for n, w in own.items()}, gradients, masks)


# ---------------------------------------------------------------------------------------------- theirs


def rigl_torch(folder: Path, case: Case, method: RigLSettings) -> dict[str, Tensor]:
    """`RigLScheduler._rigl_step` of nollied/rigl-torch."""
    (module,) = import_from(folder, "rigl_torch.RigL")
    model = copy.deepcopy(case.model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    last = at_share(method.end, STEPS)
    scheduler = module.RigLScheduler(model, optimizer, dense_allocation=0.5, T_end=last, alpha=method.fraction)
    names = {id(p): n for n, p in model.named_parameters()}
    order = [names[id(w)] for w in scheduler.W]
    with torch.no_grad():
        for name, weight in zip(order, scheduler.W, strict=True):
            weight.copy_(case.weights[name])
            weight.grad = case.gradients[name].clone()
    scheduler.S, scheduler.step = [0.5] * len(order), STEP
    scheduler.backward_masks = [case.masks[n].clone() for n in order]
    scheduler.backward_hook_objects = [SimpleNamespace(dense_grad=case.gradients[n].clone()) for n in order]
    scheduler._rigl_step()
    return {n: m.bool() for n, m in zip(order, scheduler.backward_masks, strict=True)}


def granet(
    folder: Path, case: Case, method: Any, *, prunes: bool, exchanges: bool, floor: bool = False, count: bool = False
) -> dict[str, Tensor]:
    """`Masking.pruning` and `Masking.truncate_weights` of VITA-Group/GraNet, which has RigL and GMP too.

    `floor`: `⌊α·kept⌋` weights are dropped, not `⌈α·kept⌉`. `count`: as many weights stay as with us.
    """
    (core,) = import_from(folder / "CIFAR", "sparselearning.core")
    model = copy.deepcopy(case.model)
    first, last = (at_share(getattr(method, key, 0.0), STEPS) for key in ("begin", "end"))
    args = SimpleNamespace(
        fix=True, method="GMP", sparse_init="", rm_first=False, multiplier=1, init_density=1.0,
        final_density=DENSITY, init_prune_epoch=first, final_prune_epoch=last,
    )  # fmt: skip
    masking = core.Masking(
        torch.optim.SGD(model.parameters(), 0.1), growth_mode="gradient", args=args, train_loader=[0]
    )
    masking.modules, masking.prune_every_k_steps = [model], 1
    masking.masks = {n: m.float() for n, m in case.masks.items()}
    masking.prune_rate = fraction_of(method) if exchanges else 0.0
    for name, weight in model.named_parameters():
        if name in case.weights:
            weight.data = case.weights[name].clone()
            weight.grad = case.gradients[name].clone()
    wanted = round(
        gradual_density(DENSITY, (STEP - first) / (last - first)) * sum(w.numel() for w in case.weights.values())
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "cuda", lambda self: self))
        if floor:
            stack.enter_context(mock.patch.object(core, "math", SimpleNamespace(ceil=lambda x: int(x + 1e-9))))
        if count:
            topk = torch.topk
            kept = mock.patch.object(torch, "topk", lambda scores, k, **how: topk(scores, wanted + 1, **how))
            stack.enter_context(kept)  # what is above the next one
        if prunes:
            masking.pruning(STEP)
        if exchanges:
            masking.truncate_weights(STEP)
    return {n: m.bool() for n, m in masking.masks.items()}


def fraction_of(method: Any) -> float:
    """The share of weights that our method exchanges at this step."""
    length = STEPS if isinstance(method, GraNetSettings) else at_share(method.end, STEPS)
    return exchange_fraction(method.fraction, STEP / length)


def dropped(folder: Path, case: Case, method: Any, *, floor: bool = False, room: bool = False) -> dict[str, Tensor]:
    """What `Masking.magnitude_death` keeps: SET's choice, as what grows is drawn at random.

    `room`: a layer drops no more than it has places to grow.
    """
    (core,) = import_from(folder / "CIFAR", "sparselearning.core")
    kept = {n: int(m.sum()) for n, m in case.masks.items()}
    free = {n: int((~m).sum()) for n, m in case.masks.items()}
    found = {}
    for name, weight in case.weights.items():
        rate = min(fraction_of(method), free[name] / kept[name]) if room else fraction_of(method)
        masking = SimpleNamespace(prune_rate=rate, name2nonzeros=kept, name2zeros=free)
        with mock.patch.object(core, "math", SimpleNamespace(ceil=lambda x: int(x + 1e-9)) if floor else math):
            found[name] = core.Masking.magnitude_death(masking, case.masks[name], weight, name)
    return found


# ---------------------------------------------------------------------------------------------- comparison

Run = Callable[..., dict[str, Tensor]]
FLOOR = ("⌊α·kept⌋ weights are dropped", {"floor": True})
COUNT = ("as many weights stay", {"count": True})
ROOM = ("a layer drops no more than it has places to grow", {"room": True})
NO_RETURN = ("what is dropped does not come back at once", {"no_return": True})


@dataclass(frozen=True)
class Comparison:
    """`stages`: options that make a choice of the public code ours, one after another."""

    method: str
    public: str
    ours: SparseTraining
    run: Run
    options: Mapping[str, bool]
    stages: Sequence[tuple[str, Mapping[str, bool]]]


COMPARISONS = (
    Comparison("rigl", "nollied/rigl-torch", RigLSettings(), rigl_torch, {}, (NO_RETURN,)),
    Comparison("rigl", "VITA-Group/GraNet", RigLSettings(), granet, {"prunes": False, "exchanges": True}, (FLOOR, NO_RETURN)),
    Comparison("granet", "VITA-Group/GraNet", GraNetSettings(), granet, {"prunes": True, "exchanges": True}, (COUNT, FLOOR, NO_RETURN)),
    Comparison("gmp", "VITA-Group/GraNet", GMPSettings(), granet, {"prunes": True, "exchanges": False}, (COUNT,)),
    Comparison("set", "VITA-Group/GraNet", SETSettings(), dropped, {}, (FLOOR, ROOM)),
)  # fmt: skip


def overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Intersection over union."""
    both = sum(int((a[n] & b[n]).sum()) for n in a)
    return both / max(1, sum(int((a[n] | b[n]).sum()) for n in a))


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {n: m & ~after[n] for n, m in before.items()}, {n: after[n] & ~m for n, m in before.items()}


def compare(folder: Path, one: Comparison, network: str) -> Iterator[dict[str, Any]]:
    case = make_case(network, one.ours)
    ours = case.updated(one.ours)
    if one.method == "set":
        ours = {n: m & case.masks[n] for n, m in ours.items()}
    options: dict[str, Any] = dict(one.options)
    for stage, change in (("as it is", {}), *one.stages):
        options |= change
        given = case.without_return(ours) if options.pop("no_return", False) else case
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = one.run(folder, given, one.ours, **options)
        (gone, come), (gone_there, come_there) = changes(case.masks, ours), changes(case.masks, theirs)
        yield {
            "method": one.method,
            "public": one.public,
            "network": network,
            "stage": stage,
            "kept": sum(int(m.sum()) for m in ours.values()),
            "kept_there": sum(int(m.sum()) for m in theirs.values()),
            "overlap": f"{overlap(ours, theirs):.6g}",
            "overlap_of_dropped": f"{overlap(gone, gone_there):.6g}",
            "overlap_of_grown": f"{overlap(come, come_there):.6g}" if any(m.any() for m in come.values()) else "",
            "equal": all(torch.equal(ours[n], theirs[n]) for n in ours),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, required=True, help="folder of clones named OWNER+NAME")
    parser.add_argument("--out", type=Path, help="CSV to write")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for one in COMPARISONS:
        folder = (chosen.public / one.public.replace("/", "+")).resolve()
        if not folder.is_dir():
            print(f"{one.public} is not in {chosen.public}: left out")
            continue
        for network in NETWORKS:
            for row in compare(folder, one, network):
                rows.append(row)
                print(*row.values(), sep="  ")
    if chosen.out is not None and rows:
        with chosen.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
