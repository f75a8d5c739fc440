"""Iterative rewind pruning (IRP): lottery tickets by training, removing, rewinding."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from autosparse.errors import AutoSparseError, of_state, require, require_unset, settings
from autosparse.files import read_safetensors, write_json, write_safetensors
from autosparse.masks.densities import Scope, check_scope
from autosparse.masks.layers import Layer, unwrap
from autosparse.masks.mask import Masks, dense_masks
from autosparse.masks.schedule import check_density, densities
from autosparse.masks.selection import select
from autosparse.network.signals import measure
from autosparse.pruning.criteria import CRITERIA, Context
from autosparse.search.kstarts import STATE, fingerprint, read_progress
from autosparse.search.method import Method, SearchResult
from autosparse.training.data import ImageData
from autosparse.training.loop import Trained, full_state, put_back, rewound
from autosparse.training.recipe import Recipe, steps_per_epoch
from autosparse.training.train import train

REWIND = ("round", "end", "never")


@settings
class IRPSettings:
    """How IRP removes.

    `rounds`: removals R, so R + 1 trainings, the last to know the ticket's worth. `density`: what is left after the last
    round. `schedule`: `"geometric"` (each round keeps the same fraction, `ρ_r = ρ^{r/R}`) or `"linear"` (each removes the
    same number). `criterion` of the trained weights: `"magnitude"` or `"snip"`. `rewind_step`: 0 rewinds to the
    initialization, k to the weights after k steps (late rewinding). `n_batches` are for SNIP. `rewind`: `"round"` rewinds
    before each training (as published); `"end"` carries weights, norms and statistics on from round to round, with the
    learning-rate schedule from its start, and rewinds once, before the last training; `"never"` carries them on to the
    end (learning-rate rewinding, Renda et al. 2020).
    """

    rounds: int = 20
    density: float = 0.01
    schedule: str = "geometric"
    criterion: str = "magnitude"
    scope: str = "global"
    rewind_step: int = 0
    floor: float = 0.0
    n_batches: int = 1
    rewind: str = "round"

    def __post_init__(self) -> None:
        require(1 <= self.rounds <= 255, "irp.rounds", self.rounds, "it must lie in 1 … 255")
        check_density(self.density, "irp.density")
        require(self.density < 1, "irp.density", self.density, "it must be under 1")
        require(self.schedule in ("geometric", "linear"), "irp.schedule", self.schedule, "known: geometric, linear")
        require(self.criterion in ("magnitude", "snip"), "irp.criterion", self.criterion, "known: magnitude, snip")
        check_scope(self.scope, what="irp.scope")
        require(self.rewind_step >= 0, "irp.rewind_step", self.rewind_step, "give a step, 0 or more")
        require(0 <= self.floor < 1, "irp.floor", self.floor, "it is the smallest density of a layer, in [0, 1)")
        require(
            self.floor <= self.density + 1e-9,
            "irp.floor",
            self.floor,
            "it is above the final density irp.density; lower irp.floor",
        )
        require(self.n_batches >= 1, "irp.n_batches", self.n_batches, "give at least 1")
        if self.criterion != "snip":
            require_unset(self, ("n_batches",), "irp.", "only snip takes batches")
        require(self.rewind in REWIND, "irp.rewind", self.rewind, f"known: {', '.join(REWIND)}")

    def densities(self) -> list[float]:
        """`ρ_0 = 1, ρ_1, …, ρ_R`: the density of each training."""
        return [1.0, *densities(self.density, self.rounds, self.schedule)]


@dataclass(frozen=True)
class Round:
    """One training and the removal after it: `masks` held in it, `next_masks` what stays for the next (`None` after the
    last round). `weights`: what the next training begins with, where it does not rewind."""

    index: int
    density: float
    trained: Trained
    masks: Masks
    next_masks: Masks | None
    seconds: float
    weights: Mapping[str, Tensor] | None = None


def irp(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    settings: IRPSettings,
    *,
    seed: int = 0,
    device: str = "auto",
    start: int = 0,
    masks: Masks | None = None,
    rewind: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    scope: Scope | None = None,
    checkpoint: Path | None = None,
    on_rewind_state: Callable[[dict[str, Tensor]], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Iterator[Round]:
    """Rounds `start … R` of IRP on `model`, whose state at the call is the initialization `θ₀`.

    Round r: rewind every parameter and buffer to `θ₀` (or to step k; or not, see `IRPSettings.rewind`); train `θ ⊙ m_r` at
    density `ρ_r` with a fresh optimizer; score the trained weights; keep the highest, within `m_r`, for `m_{r+1}`. Source:
    Frankle & Carbin 2019; late rewinding Frankle et al. 2020.

    Args:
        layers: prunable weights by name, from `autosparse.masks.layers.prunable_layers(model)`.
        data: images and labels, from `autosparse.training.data.load_data("cifar10")`.
        recipe: optimizer, learning rate and length.
        start, masks, rewind, weights: continue at round `start` with the masks of that round; for late rewinding, the
            state of step k that `on_rewind_state` was given; and the `weights` of the round before, if it has any.
        scope: in place of that of the settings, such as layer densities, which each round scales to its own density.
        checkpoint: file for the round in flight.
        on_epoch: called with each new row of a training's history; without it nothing is validated.

    Yields:
        A `Round` for each training, `start` to `settings.rounds`.

    Raises:
        AutoSparseError: the rewind step lies beyond the training, the floor asks for more weights than the last density
            keeps, or masks or state to continue from are another model's.
        AutoSparseFailure: a training diverged; the rounds before it were given already.
    """
    masks, path = _start(layers, settings, masks, recipe.length(data)), settings.densities()
    origin = rewind
    if origin is None:
        if settings.rewind_step:
            train(
                model,
                data,
                recipe,
                seed=seed,
                device=device,
                stop_step=settings.rewind_step,
                validate=on_epoch is not None,
            )
        origin = full_state(model)
        if settings.rewind_step and on_rewind_state is not None:
            on_rewind_state(dict(origin))
    for index in range(start, settings.rounds + 1):
        clock = time.perf_counter()
        rewinds = index == 0 or settings.rewind == "round" or (settings.rewind == "end" and index == settings.rounds)
        if not rewinds and weights is None:
            raise AutoSparseError(f"round {index} needs the weights of the round before: start again")
        begins = origin if rewinds or weights is None else weights
        put_back(model, begins)
        trained = train(
            model,
            data,
            recipe,
            masks=masks,
            seed=seed,
            device=device,
            start_step=settings.rewind_step if rewinds else 0,
            checkpoint=checkpoint,
            validate=on_epoch is not None,
            on_epoch=on_epoch,
        )
        following, weights = None, None
        if index < settings.rounds:
            following = _remove(model, layers, data, recipe, settings, scope, masks, path[index + 1], seed)
            carries = settings.rewind == "never" or (settings.rewind == "end" and index + 1 < settings.rounds)
            weights = {n: t.cpu() for n, t in full_state(model).items()} if carries else None
        yield Round(index, masks.density, trained, masks, following, time.perf_counter() - clock, weights)
        if following is not None:
            masks = following


def _start(layers: Mapping[str, Layer], settings: IRPSettings, masks: Masks | None, length: int) -> Masks:
    """The masks to start with, once the settings fit the layers and the length of a training."""
    require(settings.rewind_step < length, "irp.rewind_step", settings.rewind_step, f"a training has {length} steps")
    total = sum(layer.numel for layer in layers.values())
    fewest = sum(math.ceil(settings.floor * layer.numel) for layer in layers.values())
    require(
        fewest <= round(settings.density * total),
        "irp.floor",
        settings.floor,
        "it needs more weights than irp.density keeps; lower irp.floor",
    )
    if masks is None:
        return dense_masks(layers)
    if set(masks) != set(layers):
        raise AutoSparseError("the masks to continue from are another model's: delete the record and start again")
    return masks


def _remove(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    settings: IRPSettings,
    scope: Scope | None,
    masks: Masks,
    density: float,
    seed: int,
) -> Masks:
    """Score the trained weights and keep the highest of those that are left."""
    criterion = CRITERIA[settings.criterion]
    device = next(model.parameters()).device
    batches = []
    if "gradient" in criterion.signals:
        batches = data.to(device).sample(recipe.batch_size, settings.n_batches, seed)
    signals = measure(model, layers, criterion.signals, batches=batches, seed=seed)
    scores = {n: s.cpu() for n, s in criterion(signals, Context(layers, density, masks=masks, seed=seed)).items()}
    scope = scope or settings.scope
    chosen = select(scores, density, layers=layers, scope=scope, floor=settings.floor, within=masks, seed=seed)
    own = dict(unwrap(model).named_parameters())
    chosen.signs = {n: own[n].detach().cpu() >= 0 for n in chosen}
    return chosen


@settings
class TicketSettings:
    """How a ticket is searched for: `rounds` of training, removing, rewinding, each of `epochs` (`None`: those of the
    recipe). A short round has the whole learning-rate schedule. `schedule`, `rewind`: see `IRPSettings`. With
    `rewind="never"` the final training goes on with the weights of the last round, at the start of its schedule.
    """

    rounds: int = 5
    epochs: float | None = None
    schedule: str = "geometric"
    rewind: str = "round"

    def __post_init__(self) -> None:
        require(self.rewind in REWIND, "rewind", self.rewind, f"known: {', '.join(REWIND)}")
        require(1 <= self.rounds <= 255, "rounds", self.rounds, "it must lie in 1 … 255")
        require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "give a positive number")
        require(self.schedule in ("geometric", "linear"), "schedule", self.schedule, "known: geometric, linear")

    @property
    def label(self) -> str:
        """What follows the method's name in tables."""
        length = f"x{self.epochs:g}" if self.epochs is not None else ""
        return f"-{self.rounds}{length}" + ("" if self.rewind == "round" else f"-rewind-{self.rewind}")

    @property
    def continues(self) -> bool:
        """Whether the final training goes on with the trained weights."""
        return self.rewind == "never"


def ticket(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    settings: TicketSettings,
    density: float,
    *,
    seed: int = 0,
    device: str = "auto",
    scope: Scope | None = None,
    floor: float = 0.0,
    state: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> SearchResult:
    """The masks after the last removal of `irp`; its trainings, but for the ticket's own, are the cost.

    The model is left as it was.

    Args:
        state: directory for what is done, to continue after a stop; the caller deletes it.

    Raises:
        AutoSparseError: as `irp`, or the state is another search's.
        AutoSparseFailure: a training diverged.
    """
    rounds, per_epoch = settings.rounds, steps_per_epoch(data, recipe.batch_size)
    if settings.epochs is not None:
        recipe = replace(recipe, steps=max(1, round(settings.epochs * per_epoch)))
    chosen = IRPSettings(
        rounds=rounds, density=density, schedule=settings.schedule, floor=floor, rewind=settings.rewind
    )
    start, masks, seconds = 0, None, 0.0
    weights: Mapping[str, Tensor] | None = None
    of = fingerprint(model, data, "irp", chosen, recipe, scope, seed)
    with of_state():
        progress = read_progress(state and state / "irp.json", of, {"rounds": 0, "seconds": 0.0})
        if progress["rounds"]:
            assert state is not None
            start, seconds = progress["rounds"], progress["seconds"]
            masks = Masks.load(state / f"round{start}.safetensors")
            if (path := state / f"weights{start}.safetensors").exists():
                weights = dict(read_safetensors(path, STATE, "state of a search")[0])
    with rewound(model):
        trainings = irp(
            model,
            layers,
            data,
            recipe,
            chosen,
            seed=seed,
            device=device,
            scope=scope,
            start=start,
            masks=masks,
            weights=weights,
            checkpoint=None if state is None else state / "training.pt",
            on_epoch=on_epoch,
        )
        while start < rounds:
            outcome = next(trainings)
            masks, weights, start = outcome.next_masks, outcome.weights, start + 1
            seconds += outcome.seconds
            assert masks is not None
            if state is not None:
                masks.save(state / f"round{start}.safetensors")
                if weights is not None:
                    write_safetensors(state / f"weights{start}.safetensors", weights, STATE)
                write_json(state / "irp.json", {"of": of, "rounds": start, "seconds": seconds})
                (state / f"weights{start - 1}.safetensors").unlink(missing_ok=True)
    assert masks is not None
    masks.report = replace(masks.report, origin={"rounds": rounds, "rewind": settings.rewind})
    return SearchResult(masks, rounds * recipe.length(data) / per_epoch, seconds, weights)


METHOD = Method(TicketSettings, ticket)
