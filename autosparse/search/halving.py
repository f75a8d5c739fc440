"""Successive halving: train under the masks of several criteria for a moment, drop the worse half, and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor, nn

from autosparse.errors import of_state, require, settings
from autosparse.files import read_safetensors, write_json, write_safetensors
from autosparse.masks.densities import Scope
from autosparse.masks.layers import Layer
from autosparse.masks.mask import MaskReport, Masks
from autosparse.search.kstarts import STATE, fingerprint, read_progress
from autosparse.search.method import Method, SearchResult
from autosparse.training.data import ImageData
from autosparse.training.loop import full_state, put_back, rewound
from autosparse.training.recipe import Recipe, steps_per_epoch
from autosparse.training.train import train


@settings
class HalvingSettings:
    """Which masks are compared, and how long.

    `starts`: criteria, scorers or variants, such as `("erk", "igq", "densities:synflow")`. Each trains for `epochs`, with
    the whole learning-rate schedule; the better half, by validation loss, trains for `epochs` more, and so on until one is
    left. Data need validation images.
    """

    starts: tuple[str, ...] = ("erk", "igq", "snip", "densities:synflow")
    epochs: float = 0.5

    def __post_init__(self) -> None:
        require(len(self.starts) >= 2, "starts", self.starts, "give at least two criteria to choose from")
        require(len(set(self.starts)) == len(self.starts), "starts", self.starts, "give each criterion once")
        new = [name for name in self.starts if name.startswith("reinit:")]
        require(not new, "starts", self.starts, "only masks are compared, all from the same weights; leave reinit: out")
        require(self.epochs > 0, "epochs", self.epochs, "give a positive number")

    @property
    def label(self) -> str:
        """What follows the method's name in tables."""
        return f"-{len(self.starts)}x{self.epochs:g}"


def halving(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    settings: HalvingSettings,
    density: float,
    *,
    starts: Mapping[str, Masks],
    seed: int = 0,
    device: str = "auto",
    scope: Scope | None = None,
    floor: float = 0.0,
    state: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> SearchResult:
    """The masks of `starts` under which the network trains best in short trainings from `θ₀`; the model is left as it was.

    In every round each mask that is left trains for `settings.epochs` with the same data order, from the weights that its
    last round ended with; the learning-rate schedule starts anew. Half of them, rounded up, stay. Source: successive
    halving, Jamieson & Talwalkar 2016.

    Args:
        starts: the masks to choose from, in order; an earlier one wins ties.
        scope, floor: unused here; the masks of `starts` were found with them.
        state: directory for what is done, to continue after a stop; the caller deletes it.

    Raises:
        AutoSparseError: the data have no validation images, or the state is another search's.
        AutoSparseFailure: a training diverged.
    """
    _check(settings, len(data.validation), density, scope)
    per_epoch = steps_per_epoch(data, recipe.batch_size)
    recipe = replace(recipe, steps=max(1, round(settings.epochs * per_epoch)))
    names = list(starts)
    facts = {name: dict(masks) for name, masks in starts.items()}
    of = fingerprint(model, data, "halving", settings, recipe, density, seed, facts)
    progress = read_progress(state and state / "halving.json", of, {"losses": [], "seconds": 0.0})
    losses: list[dict[str, float]] = progress["losses"]  # one dictionary a round
    seconds, trainings = progress["seconds"], 0
    weights: dict[str, Mapping[str, Tensor]] = {}
    with rewound(model) as initial:
        left, number = names, 0
        while len(left) > 1:
            if number == len(losses):
                losses.append({})
            for name in left:
                trainings += 1
                file = None if state is None else state / f"start{names.index(name)}.safetensors"
                if name in losses[number]:
                    continue
                clock = time.perf_counter()
                put_back(model, initial if number == 0 else weights.get(name) or _read(file))
                trained = train(
                    model,
                    data.without("test"),
                    recipe,
                    masks=starts[name],
                    seed=seed,
                    device=device,
                    checkpoint=None if state is None else state / "training.pt",
                    on_epoch=on_epoch,
                )
                weights[name] = {n: t.cpu() for n, t in full_state(model).items()}
                losses[number][name] = trained.history[-1]["validation_loss"]
                seconds += time.perf_counter() - clock
                if state is not None and file is not None:
                    write_safetensors(file, weights[name], STATE)
                    write_json(state / "halving.json", {"of": of, "losses": losses, "seconds": seconds})
            left = sorted(left, key=lambda name: losses[number][name])[: (len(left) + 1) // 2]
            weights = {name: weights[name] for name in left if name in weights}
            number += 1
    winner = starts[left[0]]
    origin = {"criterion": "halving", **asdict(settings), "chosen": left[0], "losses": losses, "seed": seed}
    masks = Masks(winner, winner.layer_info or None, MaskReport(origin=origin))
    return SearchResult(masks, trainings * recipe.length(data) / per_epoch, seconds)


def _read(file: Path | None) -> Mapping[str, Tensor]:
    """The weights that a mask's last round ended with."""
    assert file is not None
    with of_state():
        return read_safetensors(file, STATE, "state of a search")[0]


def _check(settings: HalvingSettings, validation: float, density: float, scope: Scope | None) -> None:
    require(validation > 0, "starts", settings.starts, "no validation images; set data.validation, such as 0.1")


METHOD = Method(HalvingSettings, halving, starts=lambda chosen: chosen.starts, hands_on=True, check=_check)
