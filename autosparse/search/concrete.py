"""Concrete ticket search (CTS): a mask learned by gradient descent while the weights stay as they are."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autosparse.errors import AutoSparseFailure, AutoSparseStateError, first_line, require, settings
from autosparse.files import check_seal, replace_file, seal
from autosparse.masks.densities import Scope
from autosparse.masks.layers import Layer
from autosparse.masks.mask import MaskReport, Masks
from autosparse.masks.random import derive, seed_global
from autosparse.masks.selection import select
from autosparse.search.kstarts import fingerprint
from autosparse.search.method import Method, SearchResult
from autosparse.training.data import ImageData
from autosparse.training.loop import fabric_for, rewound, training_loss
from autosparse.training.recipe import Recipe, steps_per_epoch

DROPS_AT = 0.88  # share of the steps after which the learning rate is a tenth
MARGIN = 1.1  # how far over the wanted count the expected one may be


@settings
class ConcreteSettings:
    """How the logits of a mask are learned.

    `epochs` of training images, in batches of `batch_size` (`None`: the recipe's); Adam with learning rate `lr`;
    `temperature` τ of the relaxed mask. `prior`: a criterion, scorer or variant whose layer densities the logits start
    from; `None`: the same density in all layers. `strength` s is added to the logits of the weights that the prior keeps
    and subtracted from the others.
    """

    epochs: float = 20.0
    batch_size: int | None = None
    lr: float = 0.1
    temperature: float = 2 / 3
    prior: str | None = None
    strength: float = 0.0

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "give a positive number")
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "give at least 1")
        require(self.lr > 0 and math.isfinite(self.lr), "lr", self.lr, "give a positive number")
        require(self.temperature > 0, "temperature", self.temperature, "give a positive number")
        require(
            self.strength == 0 or self.prior is not None,
            "strength",
            self.strength,
            "it needs a prior; set prior, or leave strength out",
        )

    @property
    def label(self) -> str:
        """What follows the method's name in tables."""
        return f"-{self.epochs:g}" + (f"-{self.prior}" if self.prior is not None else "")


def concrete(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    settings: ConcreteSettings,
    density: float,
    *,
    starts: Mapping[str, Masks] | None = None,
    seed: int = 0,
    device: str = "auto",
    scope: Scope | None = None,
    floor: float = 0.0,
    state: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> SearchResult:
    """The mask of highest logits after a search on frozen weights; the model is left as it was.

    With logits α, noise `U ~ Uniform(0, 1)` and the relaxed mask `m = σ((log(U/(1 − U)) + α)/τ)` the loss is
    `L(θ₀ ⊙ m) + λ·(Σσ(α)/(1.1·ρN) − 1)`. λ is the running mean (0.01) of `‖∇_α L‖/‖∇_α Σσ(α)/(1.1·ρN)‖` while the expected
    count is over budget, else 0. Adam on α, its learning rate a tenth after 88 % of the steps. Batch norms use the
    statistics of the batch. All other parameters stay as they are too. Source: Concrete Ticket Search, arXiv 2512.07142.

    Args:
        starts: the masks of the prior, by its name.
        scope: where logits are ranked at the end; `None`: `"global"`.
        state: directory for what is done, to continue after a stop; the caller deletes it.

    Raises:
        AutoSparseError: the state is another search's.
        AutoSparseFailure: the loss is no longer finite.
    """
    per_epoch, size = steps_per_epoch(data, recipe.batch_size), settings.batch_size or recipe.batch_size
    own_epoch = steps_per_epoch(data, size)
    steps = max(1, round(settings.epochs * own_epoch))
    prior = next(iter((starts or {}).values()), None)
    place = fabric_for(device, recipe.precision)
    data, parameters = data.to(place.device), dict(model.to(place.device).named_parameters())
    logits = first_logits(layers, density, prior, settings.strength)
    logits = {n: t.to(place.device).requires_grad_() for n, t in logits.items()}
    search = _Search(settings, {n: parameters[n].detach() for n in layers}, logits, density, steps, seed)
    path = None if state is None else state / "concrete.pt"
    facts = dict(prior) if prior is not None else None
    of = fingerprint(model, data, "concrete", settings, recipe, density, seed, masks=facts)
    if path is not None and path.exists():
        _restore(path, of, search)
    clock, before = time.perf_counter(), search.seconds
    trains = [p for p in model.parameters() if p.requires_grad]
    with (
        rewound(model),
        torch.random.fork_rng(devices=[place.device.index or 0] if place.device.type == "cuda" else []),
    ):
        model.train()
        for parameter in trains:
            parameter.requires_grad_(False)
        try:
            while search.step < steps:
                epoch = search.step // own_epoch
                batches = data.epoch(size, derive(seed, "concrete epoch", epoch))
                loss = search.epoch(model, batches, own_epoch, place)
                search.seconds = before + time.perf_counter() - clock
                if on_epoch is not None:
                    on_epoch(
                        {
                            "epoch": epoch + 1,
                            "step": search.step,
                            "loss": loss,
                            "lr": search.optimizer.param_groups[0]["lr"],
                        }
                    )
                if path is not None and search.step < steps:
                    _save(path, of, search)
        finally:
            for parameter in trains:
                parameter.requires_grad_(True)
    scores = {n: t.detach().cpu() for n, t in logits.items()}
    masks = select(scores, density, layers=layers, scope=scope or "global", floor=floor, seed=seed)
    origin = {"criterion": "concrete", **asdict(settings), "density": density, "seed": seed, "steps": steps}
    masks.report = MaskReport(ties=masks.report.ties, notes=masks.report.notes, origin=origin)
    return SearchResult(masks, steps * size / (per_epoch * recipe.batch_size), search.seconds)


def first_logits(
    layers: Mapping[str, Layer], density: float, prior: Masks | None, strength: float = 0.0
) -> dict[str, Tensor]:
    """`log(d_l/(1 − d_l))` of the prior's layer densities, clipped to [0.001, 0.999], `± strength` by its positions."""

    def logit(value: float) -> float:
        value = min(max(value, 1e-3), 1 - 1e-3)
        return math.log(value / (1 - value))

    if prior is None:
        return {n: torch.full(layer.shape, logit(density)) for n, layer in layers.items()}
    known = {row.name: row.density for row in prior.layers()}
    return {n: logit(known[n]) + strength * (2 * prior[n].cpu().float() - 1) for n in layers}


class _Search:
    """The logits, their optimizer and λ."""

    def __init__(
        self,
        settings: ConcreteSettings,
        weights: Mapping[str, Tensor],
        logits: Mapping[str, Tensor],
        density: float,
        steps: int,
        seed: int,
    ) -> None:
        self.settings, self.weights, self.logits, self.steps, self.seed = settings, weights, logits, steps, seed
        self.budget = MARGIN * density * sum(w.numel() for w in weights.values())
        self.optimizer = torch.optim.Adam(list(logits.values()), lr=settings.lr)
        self.step, self.ratio, self.seconds = 0, math.nan, 0.0

    def epoch(self, model: nn.Module, batches: Any, length: int, fabric: Any) -> float:
        """The rest of an epoch; its mean loss."""
        first, total = self.step % length, torch.zeros((), device=fabric.device)
        taken = 0
        for index, (images, labels) in enumerate(batches):
            if index < first or index >= length or self.step == self.steps:
                continue
            total += self._step(model, images, labels, fabric)
            taken += 1
        if not math.isfinite(float(total)):
            raise AutoSparseFailure(
                f"concrete ticket search diverged by step {self.step} (lr {self.settings.lr}); lower lr"
            )
        return float(total) / max(taken, 1)

    def _step(self, model: nn.Module, images: Tensor, labels: Tensor, fabric: Any) -> Tensor:
        chosen, values = self.settings, list(self.logits.values())
        for group in self.optimizer.param_groups:
            group["lr"] = chosen.lr * (0.1 if self.step >= DROPS_AT * self.steps else 1)
        seed_global(self.seed, "concrete step", self.step, device=fabric.device)
        masked = {}
        for name, weight in self.weights.items():
            noise = torch.rand_like(weight).clamp(1e-6, 1 - 1e-6)
            mask = torch.sigmoid(((noise / (1 - noise)).log() + self.logits[name]) / chosen.temperature)
            masked[name] = weight * mask
        with fabric.autocast():
            loss = training_loss(functional_call(model, masked, (images,)), labels)
        task = torch.autograd.grad(loss, values)
        expected = torch.stack([v.sigmoid().sum() for v in values]).sum() / self.budget
        sparse = torch.autograd.grad(expected, values)
        ratio = float(_norm(task) / _norm(sparse).clamp(min=1e-12))
        self.ratio = ratio if math.isnan(self.ratio) else 0.99 * self.ratio + 0.01 * ratio
        factor = self.ratio if float(expected.detach()) > 1 else 0.0
        for value, one, other in zip(values, task, sparse, strict=True):
            value.grad = one + factor * other
        self.optimizer.step()
        self.step += 1
        return loss.detach()


def _norm(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


def _save(path: Path, of: str, search: _Search) -> None:
    logits = {n: t.detach() for n, t in search.logits.items()}
    state = {
        "of": of,
        "logits": logits,
        "optimizer": search.optimizer.state_dict(),
        "step": search.step,
        "ratio": search.ratio,
        "seconds": search.seconds,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replace_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        seal(temporary)


@torch.no_grad()
def _restore(path: Path, of: str, search: _Search) -> None:
    try:
        content = path.read_bytes()[: check_seal(path, "state of a search")]
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state["of"] != of:
            raise ValueError("it is of another search (settings, density, seed, weights or data differ)")
        for name, value in search.logits.items():
            value.copy_(state["logits"][name])
        search.optimizer.load_state_dict(state["optimizer"])
        search.step, search.ratio, search.seconds = state["step"], state["ratio"], state["seconds"]
    except Exception as error:
        raise AutoSparseStateError(
            f"{path} cannot be resumed: {first_line(error)}; delete it to start again"
        ) from error


METHOD = Method(ConcreteSettings, concrete, starts=lambda chosen: () if chosen.prior is None else (chosen.prior,))
