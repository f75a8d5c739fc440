"""Training with gates: what closes is removed at once, and makes the rest of the training cheaper."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError
from autosparse.files import fingerprint
from autosparse.masks.layers import Layer, prunable_layers, unwrap
from autosparse.masks.mask import Masks
from autosparse.masks.random import make_generator
from autosparse.network.restore import private_copy
from autosparse.network.size import size
from autosparse.trainability.gates import Gates, GateSettings, take_out
from autosparse.trainability.shrink import remove, survivors
from autosparse.training.checkpoint import reading_state, write_state
from autosparse.training.content import of_network
from autosparse.training.data import ImageData
from autosparse.training.loop import OptimizerState, Trained, evaluate, fabric_for
from autosparse.training.recipe import Recipe, steps_per_epoch
from autosparse.training.train import train


@dataclass
class Gated:
    """What a training with gates gave.

    `model` is the smaller network; `history` that of `Trained`, with `macs` (one image), `seconds` (of that epoch) and `open`
    (gates that are left, for units as a share) in each row; `removed`: branches by name, or how many units of each layer.
    """

    model: nn.Module
    accuracy: float = math.nan
    loss: float = math.nan
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    arithmetic: dict[str, Any] = field(default_factory=dict)


def train_gated(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    chosen: GateSettings,
    *,
    seed: int = 0,
    device: str = "auto",
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Gated:
    """Train a copy of `model` with gates, and give the network that is left; `model` stays as it is.

    After each epoch what has reached `π = 0` is removed physically: a branch with all its modules, units by
    `trainability.shrink`. The weights that stay keep their optimizer's state, so the training goes on as it was, and is
    faster from then on.

    Args:
        checkpoint: file to write after each epoch and to go on from, of which structure left too; the caller deletes it.
        on_epoch: called with each new row of the history.

    Raises:
        AutoSparseError: as `train`; no gate can stand in this network; a compiled recipe. AutoSparseStateError: the
            checkpoint is another training's.
        AutoSparseFailure: the training diverged.

    Source: layers: concurrent training and layer pruning (2406.04549); units: parsimonious networks (2205.04650), whose
    flattening hyper-prior leaves a cost linear in π. The schedule, the removal after an epoch, and the first-order
    gradient of units are derived here.
    """
    if recipe.compile:
        raise AutoSparseError(
            f"recipe.compile is {recipe.compile}: a network that changes is not compiled; leave it out"
        )
    return _Training(unwrap(model), data, recipe, chosen, seed, device, checkpoint, on_epoch).run()


class _Training:
    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        recipe: Recipe,
        chosen: GateSettings,
        seed: int,
        device: str,
        checkpoint: Path | None,
        on_epoch: Callable[[dict[str, float]], None] | None,
    ) -> None:
        self.fabric = fabric_for(device, recipe.precision)
        self.model = private_copy(model).to(self.fabric.device)
        self.data, self.recipe, self.chosen, self.seed, self.device = data, recipe, chosen, seed, device
        self.checkpoint, self.on_epoch = checkpoint, on_epoch
        self.example = data.normalise(data.train.images[:2]).to(self.fabric.device)
        self.per_epoch, self.length = steps_per_epoch(data, recipe.batch_size), recipe.length(data)
        self.gates, self.known = Gates.of(self.model, self.example, chosen, seed)
        self.whole = {n: len(pi) for n, pi in self.gates.pi.items() if pi.dim()}
        self.left = {n: torch.arange(c) for n, c in self.whole.items()}  # of units: which of the first network's
        self.out: list[str] = []  # branches that are gone
        self.optimizer: OptimizerState = {}
        self.step, self.result = 0, Gated(self.model)
        self.of = fingerprint(data.content, of_network(model, source=False), recipe, chosen, seed)
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)

    def run(self) -> Gated:
        result, trained = self.result, Trained()
        first, last = (round(share * self.length) for share in (self.chosen.begin, self.chosen.end))
        while self.step < self.length:
            clock = time.perf_counter()
            stop = min(self.step - self.step % self.per_epoch + self.per_epoch, self.length)
            macs, learning = size(self.model, self.example).macs, self.step < last
            how: dict[str, Any] = {"start_step": self.step, "stop_step": stop, "optimizer_state": self.optimizer}
            if learning:
                how |= {"on_batch": self.gates.draw, "on_gradient": lambda step: self._on_gradient(step, first, last)}
            seen = self.data if stop == self.length else self.data.without("test")
            rows: list[dict[str, float]] = []
            with self.gates.attached(self.model) if learning else nullcontext():
                trained = train(
                    self.model, seen, self.recipe, seed=self.seed, device=self.device, on_epoch=rows.append, **how
                )
            self.step, self.optimizer = stop, trained.optimizer_state or {}
            if learning:
                self._remove(final=stop >= last)
            row = {**rows[-1], "macs": float(macs), "seconds": time.perf_counter() - clock, "open": self._open()}
            result.history.append(row)
            result.seconds += row["seconds"]
            result.arithmetic = trained.arithmetic
            if self.checkpoint is not None and self.step < self.length:
                self._save(self.checkpoint)
            if self.on_epoch is not None:
                self.on_epoch(row)
        result.model, result.accuracy, result.loss = self.model, trained.accuracy, trained.loss
        if last > self.length - self.per_epoch:  # gates were still learning in the last epoch
            with self.fabric.autocast():
                result.accuracy, result.loss = evaluate(self.model, self.data, "test", self.recipe.channels_last)
        result.removed = dict.fromkeys(self.out, 1)
        result.removed |= {n: c - len(self.left[n]) for n, c in self.whole.items() if len(self.left[n]) < c}
        return result

    def _on_gradient(self, step: int, first: int, last: int) -> None:
        if first <= step < last:
            self.gates.learn(self.model, step, self.fabric.autocast)

    def _open(self) -> float:
        if self.chosen.of == "layers":
            return float(len(self.known) - len(self.out))
        return sum(map(len, self.left.values())) / sum(self.whole.values())

    def _remove(self, final: bool) -> None:
        """Take out what has closed; `final`: what is more closed than open too."""
        limit = 0.5 if final else 0.0
        if self.chosen.shuffled and any((pi <= limit).any() for pi in self.gates.pi.values()):
            self._shuffle()
        if self.chosen.of == "layers":
            for name in [n for n, pi in self.gates.pi.items() if pi <= limit]:
                take_out(self.model, self.known[name])
                self.out.append(name)
                del self.gates.pi[name], self.gates.places[name]
            own = dict(self.model.named_parameters())
            self.optimizer = {n: state for n, state in self.optimizer.items() if n in own}
        else:
            self._remove_units(limit)

    def _shuffle(self) -> None:
        """Exchange π among the branches, or among the units of each layer."""
        generator = make_generator(self.seed, "shuffled gates", self.step)
        names = list(self.gates.pi)
        if self.chosen.of == "layers":
            order = torch.randperm(len(names), generator=generator).tolist()
            self.gates.pi = {name: self.gates.pi[names[i]] for name, i in zip(names, order, strict=True)}
        else:
            for name, pi in self.gates.pi.items():
                self.gates.pi[name] = pi[torch.randperm(len(pi), generator=generator)]

    def _remove_units(self, limit: float) -> None:
        closed = {n: pi <= limit for n, pi in self.gates.pi.items()}
        for name, shut in closed.items():
            if shut.all():
                shut[self.gates.pi[name].argmax()] = False  # a layer keeps at least one
        if not any(shut.any() for shut in closed.values()):
            return
        layers = prunable_layers(self.model)
        masks = whole_filters({n: ~shut for n, shut in closed.items()}, layers)
        before = {n: p.shape for n, p in self.model.named_parameters()}
        places, removal = survivors(self.model, masks, self.example), remove(self.model, masks, self.example)
        self.model = removal.smaller.to(self.fabric.device)
        moved = {}
        for name, state in self.optimizer.items():
            index = places[name].to(self.fabric.device)
            moved[name] = {k: t.flatten()[index] if t.shape == before[name] else t for k, t in state.items()}
        self.optimizer = moved
        for name, shut in closed.items():
            keep = torch.ones(len(shut), dtype=torch.bool)
            keep[list(removal.removed.get(name, ()))] = False
            self.left[name], self.gates.pi[name] = self.left[name][keep], self.gates.pi[name][keep]
            if bool((shut & keep).any()):  # what cannot go stays, and is open from now on
                del self.gates.pi[name], self.gates.places[name]

    def _save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "out": self.out,
            "left": self.left,
            "pi": self.gates.pi,
            "model": self.model.state_dict(),
            "optimizer": {n: dict(values) for n, values in self.optimizer.items()},
            "history": self.result.history,
            "seconds": self.result.seconds,
        }
        write_state(path, self.of, state)

    def _restore(self, path: Path) -> None:
        """Make the network as small as it was, then put its weights in."""
        with reading_state(path, self.of) as state:
            for name in state["out"]:
                take_out(self.model, self.known[name])
            self.out, self.left = list(state["out"]), dict(state["left"])
            kept = {n: torch.isin(torch.arange(c), self.left[n]) for n, c in self.whole.items()}
            if any(not k.all() for k in kept.values()):
                masks = whole_filters(kept, prunable_layers(self.model))
                self.model = remove(self.model, masks, self.example).smaller.to(self.fabric.device)
            self.model.load_state_dict(state["model"])
            self.gates.pi = dict(state["pi"])
            self.gates.places = {n: place for n, place in self.gates.places.items() if n in self.gates.pi}
            device = self.fabric.device
            self.optimizer = {n: {k: t.to(device) for k, t in v.items()} for n, v in state["optimizer"].items()}
            self.step, self.result.history, self.result.seconds = state["step"], state["history"], state["seconds"]


def whole_filters(kept: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> Masks:
    """Masks that keep whole filters."""
    tensors = {}
    for name, keep in kept.items():
        shape = [1] * len(layers[name].shape)
        shape[layers[name].out_dim] = -1
        tensors[name] = keep.cpu().view(shape).expand(layers[name].shape).clone()
    return Masks(tensors, {n: layers[n] for n in tensors})
