"""Dissipating gradients: remove early in training what does not move; alone, or on the winner of K-starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autosparse.errors import AutoSparseError, of_state, require, require_unset, settings
from autosparse.files import read_safetensors, write_json, write_safetensors
from autosparse.masks.densities import Scope, check_scope
from autosparse.masks.layers import Layer, unwrap
from autosparse.masks.mask import Masks, dense_masks
from autosparse.masks.schedule import check_density, densities
from autosparse.masks.selection import select
from autosparse.search.kstarts import (
    STATE,
    KStartsSettings,
    check_start,
    fingerprint,
    kstarts,
    read_progress,
)
from autosparse.search.method import Method, SearchResult
from autosparse.training.data import ImageData
from autosparse.training.loop import full_state, put_back, rewound
from autosparse.training.recipe import Recipe, steps_per_epoch
from autosparse.training.train import train

EPSILON = 1e-8  # far under any initial weight but an exact zero, whose relative change it keeps finite


@settings
class DissipatingSettings:
    """Settings of dissipating gradients: weights that move little in early training are removed.

    A removal follows each of the first `epochs` epochs. `by`: `"rank"` keeps the same fraction of what is left each
    time, down to the density asked for; `"threshold"` removes all whose change is at most `threshold`, but not below
    that density. `change`: `"relative"`, `|θ−θ₀|/(|θ₀|+ε)`, or `"absolute"`, `|θ−θ₀|`.
    """

    epochs: int = 3
    by: str = "rank"
    change: str = "relative"
    threshold: float = 0.1

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "dissipating.epochs", self.epochs, "give at least 1")
        require(self.by in ("rank", "threshold"), "dissipating.by", self.by, "known: rank, threshold")
        require(self.change in ("relative", "absolute"), "dissipating.change", self.change, "known: relative, absolute")
        require(
            self.threshold >= 0 and math.isfinite(self.threshold),
            "dissipating.threshold",
            self.threshold,
            "give 0 or more",
        )
        if self.by == "rank":
            require_unset(self, ("threshold",), "dissipating.", "only by: threshold uses it")


def dissipating(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    settings: DissipatingSettings,
    density: float,
    *,
    seed: int = 0,
    device: str = "auto",
    masks: Masks | None = None,
    scope: Scope | None = None,
    floor: float = 0.0,
    state: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> SearchResult:
    """Masks of the weights that move most in early training.

    The training starts from the weights `θ₀` of `model` at the call, and continues through all removals.

    After each of the first E epochs of `recipe` the survivors that moved least since `θ₀` are removed: by rank to the
    density `ρ_e = ρ^{e/E}`, or within start masks of density `ρ_0` to `ρ_0·(ρ/ρ_0)^{e/E}`; by threshold τ all with
    `|θ−θ₀| ≤ τ·(|θ₀|+ε)`, or absolutely `|θ−θ₀| ≤ τ`, until ρ is reached (ε = 1e-8). What is over ρ after E epochs
    stays, and the report says so. These epochs have no weight decay, which would move all weights alike; each has a fresh
    optimizer. The model is left as it was. Source: derived from the abstract of the published method; its full text was
    not available.

    Args:
        density: fraction of all prunable weights kept at the end; `floor` the smallest of any layer.
        masks: start within these; all weights if `None`.
        scope: where weights are ranked, as in `select`; by threshold only once the density binds. `None`: `"erk"` for
            relative changes, which are much alike in all layers, and `"global"` for absolute ones.
        state: directory for what is done, to continue after a stop; the caller deletes it.

    Raises:
        AutoSparseError: the epochs are more than a training has, the start masks are another model's or keep less than
            the density, the floor asks for more than the density keeps, or the state is another search's.
        AutoSparseFailure: the training diverged.
    """
    per_epoch = check_length(settings, data, recipe)
    scope = scope or ("erk" if settings.change == "relative" else "global")
    masks, target, path = _plan(layers, settings.epochs, density, masks, scope, floor)
    threshold = settings.threshold if settings.by == "threshold" else None
    path = path if threshold is None else [density] * settings.epochs
    recipe = replace(recipe, weight_decay=0.0)
    of = fingerprint(model, data, "dissipating", settings, recipe, density, scope, floor, seed, masks=masks)
    progress = read_progress(state and state / "dissipating.json", of, {"densities": [], "seconds": 0.0})
    reached, seconds = list(progress["densities"]), progress["seconds"]
    with rewound(model) as initial:
        if reached:
            assert state is not None
            masks = _resume(model, state, len(reached))
        while len(reached) < settings.epochs and masks.kept > target:
            clock, epoch = time.perf_counter(), len(reached)
            train(
                model,
                data.without("test"),
                recipe,
                masks=masks,
                seed=seed,
                device=device,
                start_step=epoch * per_epoch,
                stop_step=(epoch + 1) * per_epoch,
                validate=on_epoch is not None,
                on_epoch=on_epoch,
            )
            own = dict(unwrap(model).named_parameters())
            changes = {n: displacement(own[n].detach().cpu(), initial[n].cpu(), settings.change) for n in layers}
            how: dict[str, Any] = {"threshold": threshold, "scope": scope, "floor": floor, "seed": seed}
            masks = remove(changes, masks, path[epoch], layers, **how)
            reached.append(masks.density)
            seconds += time.perf_counter() - clock
            if state is not None:
                _save(model, state, masks, {"of": of, "densities": reached, "seconds": seconds})
        masks.apply_(model)
        final = {n: t.cpu() for n, t in full_state(model).items()}
    origin = {"criterion": "dissipating", **asdict(settings), "scope": scope, "density": density, "floor": floor}
    notes = masks.report.notes
    if masks.kept > target:
        notes = (*notes, f"threshold {threshold:g} left density {masks.density:.4g}, asked {density:g}")
    masks.report = replace(masks.report, notes=notes, origin={**origin, "seed": seed, "densities": reached})
    return SearchResult(masks, float(len(reached)), seconds, weights=final, steps=len(reached) * per_epoch)


def check_length(settings: DissipatingSettings, data: ImageData, recipe: Recipe) -> int:
    """Optimizer steps of an epoch.

    Raises:
        AutoSparseError: the epochs are more than a training has.
    """
    per_epoch = steps_per_epoch(data, recipe.batch_size)
    most = recipe.length(data) / per_epoch
    require(settings.epochs <= most, "dissipating.epochs", settings.epochs, f"a training has {most:g} epochs; lower it")
    return per_epoch


def check_both_lengths(settings: CombinedSettings, data: ImageData, recipe: Recipe) -> None:
    """The `Method.check_length` of both methods, one after the other."""
    check_start(settings.kstarts, data, recipe)
    check_length(settings.dissipating, data, recipe)


def _save(model: nn.Module, state: Path, masks: Masks, progress: dict[str, Any]) -> None:
    """Write what is known after an epoch, and delete what was known before."""
    done = len(progress["densities"])
    masks.save(state / f"masks{done}.safetensors")
    write_safetensors(state / f"weights{done}.safetensors", full_state(model), STATE)
    write_json(state / "dissipating.json", progress)
    for name in ("masks", "weights"):
        (state / f"{name}{done - 1}.safetensors").unlink(missing_ok=True)


def _resume(model: nn.Module, state: Path, done: int) -> Masks:
    """The masks after so many epochs, and their weights in `model`."""
    with of_state():
        put_back(model, read_safetensors(state / f"weights{done}.safetensors", STATE, "state of a search")[0])
        return Masks.load(state / f"masks{done}.safetensors")


def _plan(
    layers: Mapping[str, Layer],
    epochs: int,
    density: float,
    masks: Masks | None,
    scope: Scope,
    floor: float,
) -> tuple[Masks, int, list[float]]:
    """The masks to start within, how many weights stay at the end, and the density after each epoch."""
    check_density(density)
    check_scope(scope, layers)
    require(0 <= floor < 1, "floor", floor, "it is the smallest density of a layer, in [0, 1)")
    if masks is None:
        masks = dense_masks(layers)
    elif set(masks) != set(layers):
        raise AutoSparseError("the masks to start within are another model's: give masks of its prunable weights")
    masks = masks.to("cpu")
    target = round(density * masks.total)
    require(target <= masks.kept, "density", density, f"the masks to start within keep {masks.density:.4g}; lower it")
    fewest = sum(math.ceil(floor * layer.numel) for layer in layers.values())
    require(fewest <= target, "floor", floor, f"it asks for {fewest} weights, the density keeps {target}; lower it")
    path = [masks.density * d for d in densities(min(1.0, density / masks.density), epochs)]
    return masks, target, [*path[:-1], density]


def displacement(weight: Tensor, initial: Tensor, change: str) -> Tensor:
    """`|θ−θ₀|`, or `"relative"`: `|θ−θ₀|/(|θ₀|+ε)`."""
    moved = (weight - initial).abs()
    return moved / (initial.abs() + EPSILON) if change == "relative" else moved


def remove(
    changes: Mapping[str, Tensor],
    masks: Masks,
    density: float,
    layers: Mapping[str, Layer],
    *,
    threshold: float | None = None,
    scope: Scope = "global",
    floor: float = 0.0,
    seed: int = 0,
) -> Masks:
    """The survivors that moved most: at `density`, or all over `threshold` where those are more.

    `floor` of each layer stays in any case.
    """
    if threshold is not None:
        over = sum(
            max(int((changes[n][m] > threshold).sum()), min(math.ceil(floor * m.numel()), int(m.sum())))
            for n, m in masks.items()
        )
        if over > round(density * masks.total):
            density, scope = over / masks.total, "global"
    return select(changes, density, layers=layers, scope=scope, floor=floor, within=masks, seed=seed)


@settings
class CombinedSettings:
    """`kstarts` to the density `between` (`None`: `√ρ`), then `dissipating` within the winner's mask."""

    kstarts: KStartsSettings = KStartsSettings()
    dissipating: DissipatingSettings = DissipatingSettings()
    between: float | None = None

    def __post_init__(self) -> None:
        require(self.between is None or 0 < self.between <= 1, "between", self.between, "it is a density, in (0, 1]")


def combined(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    settings: CombinedSettings,
    density: float,
    *,
    scope: Scope | None = None,
    state: Path | None = None,
    **common: Any,
) -> SearchResult:
    """K-starts to an intermediate density, then dissipating gradients within the winner's mask, from `θ₀` again.

    The costs of both add up. The rest as in `kstarts` and `dissipating`, of which it raises the errors; K-starts takes no
    named scope but its own.
    """
    check_density(density)
    check_both_lengths(settings, data, recipe)
    between = math.sqrt(density) if settings.between is None else settings.between
    require(between >= density, "between", between, f"it must be at least the density {density:g}")
    given = None if isinstance(scope, str) else scope
    folder = state and state / "kstarts"
    first = kstarts(model, layers, data, recipe, settings.kstarts, between, scope=given, state=folder, **common)
    common |= {"masks": first.masks, "scope": scope, "state": state and state / "dissipating"}
    then = dissipating(model, layers, data, recipe, settings.dissipating, density, **common)
    masks = then.masks
    origin = {"criterion": "kstarts+dissipating", "kstarts": first.masks.report.origin}
    masks.report = replace(masks.report, origin={**masks.report.origin, **origin})
    return replace(then, epochs=first.epochs + then.epochs, seconds=first.seconds + then.seconds, fitness=first.fitness)


METHOD = Method(DissipatingSettings, dissipating, continues=True, check_length=check_length)
COMBINED = Method(CombinedSettings, combined, continues=True, check_length=check_both_lengths)
