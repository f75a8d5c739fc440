"""K-starts: train several random masks for a moment, keep the fittest."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseFailure, AutoSparseStateError, of_state, require, require_unset, settings
from autosparse.files import fingerprint as content
from autosparse.files import read_json, read_safetensors, write_json, write_safetensors
from autosparse.masks.densities import Scope, check_scope
from autosparse.masks.layers import Layer, unwrap
from autosparse.masks.mask import MaskReport, Masks
from autosparse.masks.random import derive, make_generator
from autosparse.masks.schedule import check_density
from autosparse.masks.selection import select
from autosparse.search.method import Method, SearchResult
from autosparse.training.content import of_network
from autosparse.training.data import ImageData
from autosparse.training.loop import full_state, put_back, rewound
from autosparse.training.recipe import Recipe, steps_per_epoch
from autosparse.training.train import train

FITNESS = ("weights", "gradients", "both", "validation", "random")
STATE = "autosparse.state/1"


@settings
class KStartsSettings:
    """How K-starts selects.

    `k` random masks are trained for `epochs` each. `fitness`: `"weights"`, `"gradients"` or `"both"`; as controls
    `"validation"` (lowest validation loss) and `"random"` (one of the k, no training). `generations` of evolution: in
    each, the better half stays and its children are trained in the other half's place; `mutation` is the share of a
    child's kept weights that change places with pruned ones. `scope`: the rule for the layers' densities, such as
    `"erk"`.
    """

    k: int = 5
    epochs: float = 1.0
    fitness: str = "weights"
    generations: int = 0
    mutation: float = 0.1
    scope: str = "erk"

    def __post_init__(self) -> None:
        require(self.k >= 1, "kstarts.k", self.k, "give at least 1")
        require(self.epochs > 0 and math.isfinite(self.epochs), "kstarts.epochs", self.epochs, "give a positive number")
        require(self.fitness in FITNESS, "kstarts.fitness", self.fitness, f"known: {', '.join(FITNESS)}")
        require(self.generations >= 0, "kstarts.generations", self.generations, "give 0 or more")
        require(
            self.generations == 0 or self.fitness != "random",
            "kstarts.generations",
            self.generations,
            "fitness: random measures nothing to select by; leave generations out",
        )
        require(
            self.generations == 0 or self.k >= 3,
            "kstarts.k",
            self.k,
            "generations need two parents and a child; give at least 3",
        )
        require(0 <= self.mutation <= 1, "kstarts.mutation", self.mutation, "it is a share, in [0, 1]")
        if self.generations == 0:
            require_unset(self, ("mutation",), "kstarts.", "only generations have children")
        require(self.scope != "global", "kstarts.scope", self.scope, "random masks need layer densities, such as erk")
        check_scope(self.scope, what="kstarts.scope")

    @property
    def parents(self) -> int:
        """How many stay from one generation to the next."""
        return max(2, (self.k + 1) // 2)


def kstarts(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    settings: KStartsSettings,
    density: float,
    *,
    seed: int = 0,
    device: str = "auto",
    scope: Scope | None = None,
    floor: float = 0.0,
    state: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> SearchResult:
    """The fittest of k random masks of equal layer densities, each trained from the state `θ₀` of `model` at the call.

    Every start trains the first `e₁` epochs of `recipe`, in the same order of data, so that only the masks differ. Its
    fitness is `F_w = Σ|θ⊙m|` after them, `F_g = Σ|Σ_t g_t ⊙ m|` over the gradients `g_t` of all their steps, or
    `z(F_w) + z(F_g)`, z over the present population. Evolution: see `child`; parents keep their fitness. The model is
    left as it was. Source: derived from the abstract of the published method; its full text was not available.

    Args:
        density: fraction of all prunable weights kept; `floor` the smallest of any layer.
        scope: in place of that of the settings, such as layer densities.
        state: directory for what is done, to continue after a stop; the caller deletes it.

    Raises:
        AutoSparseError: the starts are longer than a training, validation images are asked for and there are none, the
            floor asks for more than the density keeps, or the state is another search's.
        AutoSparseFailure: a training diverged.
    """
    clock = time.perf_counter()
    check_density(density)
    per_epoch, steps = steps_per_epoch(data, recipe.batch_size), check_start(settings, data, recipe)
    generator = make_generator(seed, "starts")
    noise = {n: torch.rand(layer.shape, generator=generator) for n, layer in layers.items()}
    seeds = [[derive(seed, "start", g, i) for i in range(settings.k)] for g in range(settings.generations + 1)]
    template = select(noise, density, layers=layers, scope=scope or settings.scope, floor=floor, seed=seed)
    origin = {"criterion": "kstarts", **asdict(settings), "density": density, "floor": floor, "seed": seed}
    if settings.fitness == "random":
        chosen = Masks(template.shuffle(seeds[0][0]), layers, MaskReport(origin=origin))
        return SearchResult(chosen, 0.0, time.perf_counter() - clock)
    of = fingerprint(model, data, "kstarts", settings, recipe, density, scope, floor, seed)
    progress = read_progress(state and state / "kstarts.json", of, {"values": [], "seconds": 0.0})
    values = [tuple(v) for v in progress["values"]]
    seconds = progress["seconds"]
    trained: list[Masks] = []
    present: list[int] = []  # the population, as places in `trained`
    held: dict[int, dict[str, Tensor]] = {}  # weights of those who can still win
    with rewound(model) as initial:
        for generation, draws in enumerate(seeds):
            if generation == 0:
                newcomers = [template.shuffle(draw) for draw in draws]
            else:
                present = [present[i] for i in ranking([values[i] for i in present])[: settings.parents]]
                parents = [trained[i] for i in present]
                newcomers = [child(parents, settings.mutation, draw) for draw in draws[settings.parents :]]
            for masks in newcomers:
                number = len(trained)
                trained.append(masks)
                present.append(number)
                if number < len(values):
                    continue
                clock = time.perf_counter()
                put_back(model, initial)
                how = settings.fitness, steps, seed, device, state, on_epoch
                values.append(_start(model, data, recipe, masks, *how))
                seconds += time.perf_counter() - clock
                front = {present[i] for i in unbeaten([values[i] for i in present])}
                held[number] = {n: t.cpu() for n, t in full_state(model).items()}
                held = {i: tensors for i, tensors in held.items() if i in front}
                if state is not None:
                    progress = {"of": of, "values": values, "seconds": seconds}
                    _keep(state, progress, number, held.get(number), front)
    winner = present[ranking([values[i] for i in present])[0]]
    weights = held.get(winner) or _weights_of(state, winner)
    masks = Masks(trained[winner], layers, MaskReport(origin={**origin, "start": winner, "fitness": values}))
    epochs = len(trained) * steps / per_epoch
    return SearchResult(masks, epochs, seconds, weights, steps, fitness=tuple(values))


def _weights_of(state: Path | None, number: int) -> Mapping[str, Tensor]:
    """The weights of a start of an earlier call."""
    assert state is not None
    with of_state():
        return read_safetensors(state / f"start{number}.safetensors", STATE, "state of a search")[0]


def _keep(
    state: Path, progress: dict[str, Any], number: int, weights: Mapping[str, Tensor] | None, front: set[int]
) -> None:
    """Write what is known after a start, with its weights if it can win; delete those of starts that no longer can."""
    if weights is not None:
        write_safetensors(state / f"start{number}.safetensors", weights, STATE)
    write_json(state / "kstarts.json", progress)
    for path in state.glob("start*.safetensors"):
        if int(path.stem.removeprefix("start")) not in front:
            path.unlink()


def check_start(settings: KStartsSettings, data: ImageData, recipe: Recipe) -> int:
    """How many steps each start has; the `Method.check_length` of K-starts."""
    per_epoch, length = steps_per_epoch(data, recipe.batch_size), recipe.length(data)
    steps = max(1, round(settings.epochs * per_epoch))
    require(
        steps <= length, "kstarts.epochs", settings.epochs, f"a training has {length / per_epoch:g} epochs; lower it"
    )
    require(
        settings.fitness != "validation" or len(data.validation) > 0,
        "kstarts.fitness",
        settings.fitness,
        "the data have no validation images; set data.validation to a share, such as 0.1",
    )
    return steps


def _start(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    masks: Masks,
    fitness: str,
    steps: int,
    seed: int,
    device: str,
    state: Path | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> tuple[float, ...]:
    """Train one start; what `fitness` measures of it, higher = fitter."""
    sums: dict[str, Tensor] = {}
    own = dict(unwrap(model).named_parameters())

    def add(_: int) -> None:
        for name in masks:
            gradient = own[name].grad
            if gradient is not None:
                sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()

    gradients = fitness in ("gradients", "both")
    result = train(
        model,
        data.without("test"),
        recipe,
        masks=masks,
        seed=seed,
        device=device,
        stop_step=steps,
        # a training that goes on from its checkpoint would have lost the gradients before it
        checkpoint=None if state is None or gradients else state / "training.pt",
        validate=fitness == "validation" or on_epoch is not None,
        on_epoch=on_epoch,
        on_gradient=add if gradients else None,
    )
    values = []
    if fitness in ("weights", "both"):
        values.append(kept_sum({n: own[n].detach() for n in masks}, masks))
    if gradients:
        values.append(kept_sum(sums, masks))
    if fitness == "validation":
        values.append(-result.history[-1]["validation_loss"])
    if not all(math.isfinite(v) for v in values):
        raise AutoSparseFailure(
            f"a start diverged: its fitness is not finite after {steps} steps (lr {recipe.lr}); lower recipe.lr, or set "
            "recipe.clip_norm or recipe.warmup; what was computed before is kept"
        )
    return tuple(values)


def kept_sum(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float:
    """`Σ|x ⊙ m|` over all tensors: `F_w` of the weights, `F_g` of the gradients summed over steps."""
    return float(sum(t[masks[n].to(t.device)].abs().sum(dtype=torch.float64) for n, t in tensors.items()))


def z_scores(values: Sequence[float]) -> list[float]:
    """`(x − mean)/std` over the population; zeros where all are equal."""
    mean, std = statistics.fmean(values), statistics.pstdev(values)
    return [(v - mean) / std if std > 0 else 0.0 for v in values]


def ranking(values: Sequence[tuple[float, ...]]) -> list[int]:
    """Places of a population, the fittest first: by the sum of the z-scores of what was measured; the earlier at ties."""
    fitness = [sum(row) for row in zip(*map(z_scores, zip(*values, strict=True)), strict=True)]
    return sorted(range(len(values)), key=lambda i: (fitness[i], values[i]), reverse=True)


def unbeaten(values: Sequence[tuple[float, ...]]) -> list[int]:
    """Places that no other one equals or passes in everything measured (of equals, the first).

    Only these can come first in a `ranking` of the same population with others added: z-scores move when others come,
    but never against the order in one measurement.
    """

    def beats(j: int, i: int) -> bool:
        return all(a >= b for a, b in zip(values[j], values[i], strict=True)) and (values[j] != values[i] or j < i)

    return [i for i in range(len(values)) if not any(beats(j, i) for j in range(len(values)))]


def crossover(one: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """What both boolean masks (of equal counts) keep, and a random part of what one of them keeps, to the same count."""
    kept = one & other
    differ = (one ^ other).flatten().nonzero().flatten()
    chosen = differ[torch.randperm(len(differ), generator=generator)[: int(one.sum() - kept.sum())]]
    kept.view(-1)[chosen] = True
    return kept


def mutate(mask: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the kept positions swapped with pruned ones, as far as there are any; the count stays."""
    flat = mask.flatten()
    kept, pruned = flat.nonzero().flatten(), (~flat).nonzero().flatten()
    number = min(round(share * len(kept)), len(pruned))
    swapped = flat.clone()
    swapped[kept[torch.randperm(len(kept), generator=generator)[:number]]] = False
    swapped[pruned[torch.randperm(len(pruned), generator=generator)[:number]]] = True
    return swapped.view_as(mask)


def child(parents: Sequence[Masks], mutation: float, seed: int) -> Masks:
    """A child of two random parents, by crossover then mutation of every layer; each layer keeps its count."""
    generator = make_generator(seed, "child")
    one, other = (parents[int(i)] for i in torch.randperm(len(parents), generator=generator)[:2])
    crossed = {n: crossover(m, other[n], generator) for n, m in one.items()}
    return Masks({n: mutate(m, mutation, generator) for n, m in crossed.items()}, one.layer_info or None)


def fingerprint(model: nn.Module, data: ImageData, *facts: Any, masks: Mapping[str, Tensor] | None = None) -> str:
    """What the state of a search belongs to: its settings, the weights and masks it starts from, the data."""
    return content(facts, data.content, of_network(model, source=False), masks and dict(masks))


def read_progress(path: Path | None, of: str, nothing: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call with the fingerprint `of` wrote at `path`; `nothing` if there was none.

    Raises:
        AutoSparseStateError: it is another search's, or damaged.
    """
    if path is None or not path.exists():
        return nothing
    with of_state():
        progress = read_json(path, "state of a search")
    if progress.get("of") != of:
        raise AutoSparseStateError(
            f"{path} is of another search (settings, recipe, density, seed, weights or data differ): "
            "delete its directory or give another one"
        )
    return progress


METHOD = Method(KStartsSettings, kstarts, continues=True, check_length=check_start)
