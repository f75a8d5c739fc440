"""How long trainings will take, from a short timing on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autosparse.jobs.executor import INLINE, ExecutorSettings
from autosparse.jobs.local import jobs_at_once
from autosparse.training.data import ImageData
from autosparse.training.models import ModelSettings, build_model
from autosparse.training.recipe import Recipe, steps_per_epoch
from autosparse.training.threads import threads_for
from autosparse.training.train import train


def seconds_of_training(model: ModelSettings, data: ImageData, recipe: Recipe, device: str = "cpu") -> float:
    """Seconds that one training takes alone: two of one epoch are timed, and the second, which has nothing to set up, counts."""
    network = build_model(model, data).to(data.device)
    epoch = steps_per_epoch(data, recipe.batch_size)
    with threads_for(network, data, recipe.batch_size):
        for _ in range(2):
            seconds = train(network, data, replace(recipe, steps=epoch), device=device).seconds
    return seconds * recipe.length(data) / epoch


def seconds_of_trainings(
    counts: Sequence[tuple[ModelSettings, int]],
    data: ImageData,
    recipe: Recipe,
    executor: ExecutorSettings = INLINE,
    device: str = "cpu",
) -> float:
    """Seconds for so many trainings of each network, as many at once as the executor does."""
    total = sum(count * seconds_of_training(model, data, recipe, device) for model, count in counts if count)
    return total / jobs_at_once(executor, device, sum(count for _, count in counts))
