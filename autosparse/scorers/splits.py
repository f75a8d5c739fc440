"""Which records a scorer learns from, which choose its epoch and which test it: by run, architecture or tag."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from autosparse.errors import AutoSparseError, require
from autosparse.masks.random import make_numpy_generator
from autosparse.scorers.rows import FitSettings, Source


@dataclass(frozen=True)
class Parts:
    """Indices of records: those to `fit`, those that choose the epoch (`validation`), those that test it (`test`).

    The parts are disjoint. `note` says why there is no validation part where one was asked for.
    """

    fit: tuple[int, ...]
    validation: tuple[int, ...] = ()
    test: tuple[int, ...] = ()
    note: str = ""

    def of(self, index: int) -> str:
        return "test" if index in self.test else "validation" if index in self.validation else "fit"


def split_records(sources: Sequence[Source], chosen: FitSettings) -> Parts:
    """The three parts that `split`, `test_share`, `validation` and `validation_share` ask for.

    Raises:
        AutoSparseError: there is only one run or architecture, so none is left to test on, or the tag is that of none or of all.
    """
    everything = range(len(sources))
    if chosen.split == "none":
        return with_validation(sources, (), chosen)
    if chosen.split.startswith("tag:"):
        test = [i for i in everything if chosen.split[4:] in sources[i].tags]
        if len(test) in (0, len(sources)):
            known = sorted({tag for s in sources for tag in s.tags})
            whose = "all" if test else "none"
            raise AutoSparseError(
                f"fit.split is {chosen.split!r}: {whose} of the records have this tag; there are {', '.join(known) or 'none'}"
            )
        return with_validation(sources, test, chosen)
    units = units_of(sources, everything, chosen.split, chosen.seed)
    if len(units) < 2:
        raise AutoSparseError(
            f"fit.split is {chosen.split!r} but the records hold only one {chosen.split}: generate more, or set fit.split=none"
        )
    return with_validation(sources, _first(units, chosen.test_share), chosen)


def folds(sources: Sequence[Source], chosen: FitSettings) -> list[Parts]:
    """The parts of `chosen.folds` fits: the architectures are dealt out, and each fit is tested on its share of them.

    Raises:
        AutoSparseError: there are fewer architectures than folds.
    """
    units = units_of(sources, range(len(sources)), "model", chosen.seed)
    require(len(units) >= chosen.folds, "fit.folds", chosen.folds, f"there are {len(units)} architectures")
    held_out = [[i for unit in units[fold :: chosen.folds] for i in unit] for fold in range(chosen.folds)]
    return [with_validation(sources, test, chosen) for test in held_out]


def with_validation(sources: Sequence[Source], test: Sequence[int], chosen: FitSettings) -> Parts:
    """What is left beside the test records, of which some choose the epoch unless there are too few."""
    rest = tuple(i for i in range(len(sources)) if i not in set(test))
    held_out = tuple(sorted(test))
    if chosen.validation == "none":
        return Parts(rest, (), held_out)
    units = units_of(sources, rest, chosen.validation, chosen.seed)
    if len(units) < 2:
        note = f"fit.validation is {chosen.validation!r}, but only one {chosen.validation} is left to learn from"
        return Parts(rest, (), held_out, f"{note}: none can choose the epoch, so the last is kept")
    validation = _first(units, chosen.validation_share)
    return Parts(tuple(i for i in rest if i not in set(validation)), tuple(sorted(validation)), held_out)


def units_of(sources: Sequence[Source], which: Sequence[int], unit: str, seed: int) -> list[list[int]]:
    """The records of each run or architecture among `which`, in random order. Records that begin with
    the same images and initial weights are one run, however they were searched."""
    members: dict[str, list[int]] = {}
    for i in which:
        config = sources[i].config
        start = config.get("inputs") or json.dumps(config, sort_keys=True)  # a hash of images and initial weights
        key = sources[i].model if unit == "model" else start
        members.setdefault(key, []).append(i)
    distinct = sorted(members)
    return [members[distinct[j]] for j in make_numpy_generator(seed, "folds").permutation(len(distinct))]


def _first(units: Sequence[Sequence[int]], share: float) -> list[int]:
    """The records of that share of the units: at least one, and never all."""
    count = min(max(1, round(share * len(units))), len(units) - 1)
    return [i for unit in units[:count] for i in unit]
