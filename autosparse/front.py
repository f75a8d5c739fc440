"""The front door's `prune`, which knows the scorers of the package by their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from autosparse.experiment.tracking import load_scorer
from autosparse.pruning.prune import prune as by_criterion
from autosparse.scorers.bundled import is_scorer

P = ParamSpec("P")
T = TypeVar("T")


def _with_scorers(prune: Callable[P, T]) -> Callable[P, T]:
    """`prune` that takes the name, file or URI of a scorer as `criterion` too."""

    @functools.wraps(prune)
    def named(*args: P.args, **kwargs: P.kwargs) -> T:
        place = [*args[:3]]
        chosen = place[2] if len(place) == 3 else kwargs.get("criterion")
        if isinstance(chosen, Path) or (isinstance(chosen, str) and is_scorer(chosen)):
            if len(place) == 3:
                return prune(*place[:2], load_scorer(str(chosen)), *args[3:], **kwargs)  # type: ignore[arg-type]
            kwargs["criterion"] = load_scorer(str(chosen))
        return prune(*args, **kwargs)

    return named


prune = _with_scorers(by_criterion)
