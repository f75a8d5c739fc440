"""STAMP: which channels of a pretrained network a new task needs, told by a few of its images without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autosparse.errors import AutoSparseError, AutoSparseFailure, require, settings
from autosparse.masks.layers import prunable_layers
from autosparse.masks.random import forked, make_generator, seed_global
from autosparse.network.gating import SHUT, Places, channels_last, multiplied
from autosparse.network.running import eval_mode
from autosparse.training.data import ImageData

SCOPES = ("global", "uniform")


@settings
class StampSettings:
    """How a task encoder is learned.

    In each of `tasks` steps, a task of `classes` classes is drawn from the reference data; `images` of them, without labels,
    are what the encoder sees, and `batch_size` others with labels are what the masked network is tested on. `keep`: share of
    the channels that are to stay in the mean; `penalty` on what differs from it. `hidden`: width of the encoder. `scope`:
    `"uniform"` ranks the channels of each layer, which keeps as many as with the other methods; `"global"` those of all
    layers together, as many as their multiply-adds allow.
    """

    tasks: int = 300
    classes: int = 3
    images: int = 32
    batch_size: int = 64
    keep: float = 0.5
    penalty: float = 10.0
    lr: float = 3e-3
    hidden: int = 32
    scope: str = "uniform"

    def __post_init__(self) -> None:
        require(self.scope in SCOPES, "stamp.scope", self.scope, f"known: {', '.join(SCOPES)}")
        for key in ("tasks", "images", "batch_size", "hidden"):
            require(getattr(self, key) >= 1, f"stamp.{key}", getattr(self, key), "give at least 1")
        require(self.classes >= 2, "stamp.classes", self.classes, "give at least 2")
        require(0 < self.keep < 1, "stamp.keep", self.keep, "it is a share in (0, 1)")
        for key in ("penalty", "lr"):
            value = getattr(self, key)
            require(0 < value < math.inf, f"stamp.{key}", value, "give a positive number")


class TaskEncoder(nn.Module):
    """A set of images -> one logit of being kept for each channel of a network.

    With `a_ic` the mean of channel c over the positions of image i, in standard deviations of the reference data:

        e = mean_i φ(a_i),     logit_c = ψ(mean_i a_ic, std_i a_ic, log‖W_c‖, layer, e)

    φ and ψ are small MLPs, ψ shared by all channels, with a learned vector for each layer. The mean over images makes it
    invariant to their order.
    """

    mean: Tensor
    std: Tensor
    norms: Tensor
    of_layer: Tensor

    def __init__(self, channels: Mapping[str, int], hidden: int) -> None:
        super().__init__()
        self.names = list(channels)
        self.counts = list(channels.values())
        total = sum(self.counts)
        self.image = nn.Sequential(nn.Linear(total, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.layer = nn.Parameter(torch.zeros(len(channels), hidden))
        self.channel = nn.Sequential(nn.Linear(3 + 2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("std", torch.ones(total))
        self.register_buffer("norms", torch.zeros(total))
        index = torch.repeat_interleave(torch.arange(len(channels)), torch.tensor(self.counts))
        self.register_buffer("of_layer", index)

    def forward(self, activations: Tensor) -> Tensor:
        """Logits `(C,)` from `(images, C)`."""
        scaled = (activations - self.mean) / self.std
        embedding = self.image(scaled).mean(0)
        spread = scaled.std(0, correction=0)
        own = torch.stack([scaled.mean(0), spread, self.norms], dim=1)
        shared = embedding.expand(len(own), -1)
        return self.channel(torch.cat([own, self.layer[self.of_layer], shared], 1))[:, 0]

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values of all channels, by layer."""
        return dict(zip(self.names, values.split(self.counts), strict=True))


@dataclass(frozen=True)
class Learned:
    """A task encoder for one pretrained network, and the loss of each of its tasks (cross-entropy of the masked network)."""

    encoder: TaskEncoder
    places: Places
    losses: list[float]

    @torch.no_grad()
    def logits(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """The logits of every layer's channels for a task, from its images; `model` is the pretrained network."""
        return self.encoder.split(self.encoder(activations(model, self.places, images)))


@torch.no_grad()
def activations(model: nn.Module, places: Places, images: Tensor) -> Tensor:
    """`(images, C)`: the mean over positions of each channel that can go, in eval mode."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: Tensor) -> None:
            inner = range(1, out.dim() - 1) if channels_last(module) else range(2, out.dim())
            found[name] = out.mean([*inner]) if len(inner) else out

        return keep

    hooks = [model.get_submodule(place).register_forward_hook(hook(name)) for name, place in places.items()]
    try:
        with eval_mode(model), forked():
            model(images)
    finally:
        for one in hooks:
            one.remove()
    return torch.cat([found[name].float() for name in places], 1)


def learn_encoder(
    model: nn.Module,
    data: ImageData,
    places: Places,
    chosen: StampSettings,
    *,
    seed: int = 0,
    on_task: Callable[[int, float], None] | None = None,
) -> Learned:
    """Learn which channels tasks need, over tasks drawn from the classes of the reference data.

    For a task: logits z from its unlabelled images; `m = 1[σ((z + logit u)/τ) > ½]`, u uniform, τ = 2/3, with the gradient of
    the sigmoid (straight through); the loss is the cross-entropy of the masked network over the task's classes, plus
    `penalty·(mean σ(z) − keep)²`. The network's weights do not change.

    Args:
        model: trained on `data`.
        places: the layers whose channels can go, see `trainability.gates.unit_layers`.
        on_task: called with the number of tasks done and the loss.

    Raises:
        AutoSparseError: the data have fewer classes than a task. AutoSparseFailure: the loss is not finite.

    Source: STAMP (2006.12139), there with a set encoder of its own on the images; the features of the pretrained network as
    its input, the shared ψ and the penalty are derived here.
    """
    if data.classes < chosen.classes:
        raise AutoSparseError(f"stamp.classes is {chosen.classes}: the reference data have {data.classes} classes")
    if not places:
        raise AutoSparseError(
            f"{type(model).__name__} has no layer whose channels can be removed alone: use another method than stamp"
        )
    device = next(model.parameters()).device
    layers = prunable_layers(model)
    own = {n: model.get_parameter(n).detach().movedim(layers[n].out_dim, 0).flatten(1) for n in places}
    generator = make_generator(seed, "tasks")
    with forked([device]):
        seed_global(seed, "task encoder", device=device)
        encoder = TaskEncoder({name: len(filters) for name, filters in own.items()}, chosen.hidden).to(device)
    order = torch.randperm(len(data.train), generator=generator)[:512].to(data.device)
    reference = activations(model, places, data.normalise(data.train.images[order]))
    encoder.mean.copy_(reference.mean(0))
    encoder.std.copy_(reference.std(0).clamp(min=1e-6))
    norms = torch.cat([filters.norm(dim=1).clamp(min=1e-12).log() for filters in own.values()])
    encoder.norms.copy_(norms - norms.mean())
    optimizer = torch.optim.Adam(encoder.parameters(), lr=chosen.lr)
    labels = data.train.labels.cpu()
    members = [(labels == c).nonzero()[:, 0] for c in range(data.classes)]
    losses = []
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for task in range(chosen.tasks):
            classes = torch.randperm(data.classes, generator=generator)[: chosen.classes]
            pool = torch.cat([members[c] for c in classes.tolist()])
            pool = pool[torch.randperm(len(pool), generator=generator)]
            seen, tested = pool[: chosen.images], pool[chosen.images :][: chosen.batch_size]
            logits = encoder(activations(model, places, data.normalise(data.train.images[seen.to(data.device)])))
            noise = torch.rand(len(logits), generator=generator).clamp(1e-6, 1 - 1e-6).to(device)
            soft = torch.sigmoid((logits + torch.logit(noise)) * 1.5)
            hard = (soft > 0.5).float().clamp(min=SHUT) + soft - soft.detach()
            index = tested.to(data.device)
            wanted = (data.train.labels[index][:, None] == classes.to(data.device)).float().argmax(1)
            with eval_mode(model), multiplied(model, places, encoder.split(hard).__getitem__), torch.enable_grad():
                outputs = model(data.normalise(data.train.images[index]))[:, classes.to(device)]
            loss = functional.cross_entropy(outputs, wanted)
            over = torch.sigmoid(logits).mean() - chosen.keep
            optimizer.zero_grad()
            (loss + chosen.penalty * over.square()).backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise AutoSparseFailure(f"the task encoder diverged at task {task + 1}: lower stamp.lr ({chosen.lr:g})")
            if on_task is not None:
                on_task(task + 1, losses[-1])
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return Learned(encoder.eval(), dict(places), losses)


def keep_highest(logits: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Boolean choice of exactly `count` channels over all layers, those of the highest logits; at least one in each layer.

    Raises:
        AutoSparseError: fewer channels than layers, or more than there are.
    """
    total = sum(len(z) for z in logits.values())
    least, most = len(logits), total
    require(least <= count <= most, "channels to keep", count, f"give {least} (one a layer) to {most}")
    keep = {name: torch.zeros(len(z), dtype=torch.bool) for name, z in logits.items()}
    for name, z in logits.items():
        keep[name][int(z.argmax())] = True
    rest = [(float(z[i]), name, i) for name, z in logits.items() for i in range(len(z)) if not keep[name][i]]
    rest.sort(key=lambda one: -one[0])
    for _, name, index in rest[: count - least]:
        keep[name][index] = True
    return keep
