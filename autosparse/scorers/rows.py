"""What a scorer is fitted on: the settings, and the weights of records as rows."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from autosparse.errors import AutoSparseError, require, settings, suggest
from autosparse.masks.layers import Layer
from autosparse.plugins import is_outside
from autosparse.pruning.criteria import POSITIONS
from autosparse.scorers import heads
from autosparse.scorers.batches import RowBatch
from autosparse.scorers.corpus import tags_of
from autosparse.scorers.features import (
    DEFAULT,
    LayerContext,
    View,
    channel_index,
    channels,
    check_features,
    rows,
    signals_of,
)
from autosparse.scorers.kinds import FITTED, ScorerKind, kind_for
from autosparse.scorers.records import Record, distinct, open_record, read_record

UNITS = ("run", "model")  # what is kept whole: never is one in two parts
_BLOCK = 1 << 16  # rows that are read at a time


@settings
class FitSettings:
    """How a scorer is fitted.

    `scorer`: `"mlp"` (one weight at a time), `"gnn"` (the whole network), `"image"` (the published form, for comparison:
    its features are the raw weight and gradient, and it sees 20,000 weights in all), or a `ScorerKind` from outside as
    `"package.module:name"`. `head`: `"hazard"`,
    `"cumulative"` or `"mse"`. `features`: names of features or groups (`autosparse list features`), `None` for the default
    ones. `split`: the test records, which do nothing else: `"run"`, whole IRP
    runs; `"model"`, whole architectures (what tells whether it transfers); `"tag:NAME"`, every record with that tag
    (`deeper`, `no_norm`, …: see `corpus.py`); `"none"`. `test_share`: of the runs or architectures, at least one.
    `validation`: of the others, those that choose the epoch: `"run"`, `"model"`, or `"none"` (the last epoch is kept, as
    where only one is left). `validation_share`: of the runs or architectures left, at least one; never single weights.
    `rows_per_record`: at most so many weights of each record in an epoch, so that large networks do not drown small ones.
    `records_per_step`: networks that one step of the graph network sees. `balance`: exponent b of the weight `ρ^−b` that
    what happens at density ρ has in the loss; 0 counts every weight alike, 1 every density.
    `memory_gib`: above this the rows are streamed from the files instead of held. `positions` that the scorer chooses
    within layers: `"scores"`, or `"spread"`, `"spread_scores"`, `"spread_small"`, which leave its scores the layer
    densities and spread the weights over the channels (see `criteria.rearranged`). `folds`: fit so many more scorers
    first, each without another part of the architectures, and test them there. `options`: those of the kind, such as
    `{"hidden": [64, 64]}` of the MLP, `{"width": 32, "rounds": 3}` of the graph network.
    """

    scorer: str = "mlp"
    head: str = "hazard"
    features: tuple[str, ...] | None = None
    epochs: int = 20
    batch_size: int = 4096
    records_per_step: int = 8
    lr: float = 2e-3
    weight_decay: float = 1e-4
    balance: float = 0.0
    split: str = "run"
    test_share: float = 0.25
    validation: str = "run"
    validation_share: float = 0.25
    rows_per_record: int | None = 200_000
    memory_gib: float = 4.0
    positions: str = "scores"
    folds: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scorer not in FITTED and not is_outside(self.scorer):
            raise AutoSparseError(
                f"fit.scorer is {self.scorer!r}: {suggest(self.scorer, FITTED)}, or package.module:name"
            )
        kind = kind_for(self.scorer)
        heads.outputs(self.head)
        if self.features is not None:
            own = kind.features in (None, check_features(self.features))
            require(
                own, "fit.features", self.features, f"a scorer of kind {self.scorer} takes its own only; leave it out"
            )
        kind.options(self.options, f"fit.scorer {self.scorer}")
        require(self.epochs >= 1, "fit.epochs", self.epochs, "give at least 1")
        require(self.batch_size >= 1, "fit.batch_size", self.batch_size, "give at least 1")
        require(self.records_per_step >= 1, "fit.records_per_step", self.records_per_step, "give at least 1")
        require(self.lr > 0, "fit.lr", self.lr, "give a positive number")
        require(0 <= self.balance <= 1, "fit.balance", self.balance, "it must be in [0, 1]")
        units = (*UNITS, "none")
        tagged = self.split.startswith("tag:") and len(self.split) > 4
        require(self.split in units or tagged, "fit.split", self.split, f"known: {', '.join(units)}, tag:NAME")
        require(self.validation in units, "fit.validation", self.validation, f"known: {', '.join(units)}")
        for key in ("test_share", "validation_share"):
            require(0 < getattr(self, key) < 1, f"fit.{key}", getattr(self, key), "it must be in (0, 1)")
        require(
            self.rows_per_record is None or self.rows_per_record >= 1,
            "fit.rows_per_record",
            self.rows_per_record,
            "give at least 1",
        )
        require(self.positions in POSITIONS, "fit.positions", self.positions, f"known: {', '.join(POSITIONS)}")
        require(self.folds == 0 or self.folds >= 2, "fit.folds", self.folds, "give 0, or at least 2")
        require(self.memory_gib > 0, "fit.memory_gib", self.memory_gib, "give a positive number")

    @property
    def kind(self) -> ScorerKind:
        return kind_for(self.scorer)


@dataclass(frozen=True)
class Source:
    """One record, opened: the contexts of its layers, the densities of its removals and, for a graph network, `data`: the
    network with the statistics of its weights."""

    path: Path
    model: str
    tags: frozenset[str]
    layers: Mapping[str, Layer]
    contexts: Mapping[str, LayerContext]
    removal_densities: tuple[float, ...]
    config: Mapping[str, Any]
    data: Any = None

    @property
    def total(self) -> int:
        return sum(layer.numel for layer in self.layers.values())


def open_source(path: Path, features: Sequence[str], *, kind: ScorerKind | None = None, tags: bool = False) -> Source:
    """Open a record for fitting, with what scorers of `kind` need of the whole network.

    Raises:
        AutoSparseError: the record is missing, damaged, has no finished round, or lacks a signal.
    """
    record = read_record(path, signals_of(features))
    if record.rounds_done == 0:
        raise AutoSparseError(f"record {path} has no finished round: run autosparse generate on it again")
    view = View.of(features, record.layers, as_signals(record), record.graph() if record.operations else None)
    data = None if kind is None else kind.data(view)
    found: frozenset[str] = frozenset()
    if tags:
        found = tags_of(record)
    model = json.dumps(record.config.get("model", {}), sort_keys=True)
    return Source(
        path, model, found, record.layers, view.contexts, tuple(record.removal_densities), record.config, data
    )


def as_signals(record: Record) -> dict[str, dict[str, Tensor]]:
    return {s: {n: torch.from_numpy(a) for n, a in arrays.items()} for s, arrays in record.signals.items()}


@dataclass(frozen=True)
class Rows:
    """Rows of several records in shuffled batches, held in memory when they fit, else streamed block by block.

    `features`: the columns. `group`: how many records one batch may mix.
    """

    sources: Sequence[Source]
    features: tuple[str, ...]
    settings: FitSettings
    group: int

    def share(self, source: Source) -> float:
        limit = self.settings.kind.rows_per_record(self.settings.rows_per_record, len(self.sources))
        return 1.0 if limit is None else min(1.0, limit / source.total)

    @property
    def per_epoch(self) -> int:
        return sum(round(self.share(s) * s.total) for s in self.sources)

    @property
    def steps(self) -> int:
        """Batches of an epoch of rows in memory, at most: none mixes two groups."""
        groups = math.ceil(len(self.sources) / self.group)
        return math.ceil(self.per_epoch / self.settings.batch_size) + groups

    def held(self) -> bool:
        size = sum(s.total for s in self.sources) * (4 * len(self.features) + 8 + 8 + 24)
        return size <= self.settings.memory_gib * 2**30

    def load(self) -> list[RowBatch]:
        """All rows, a table for each record."""
        found = []
        for index, source in enumerate(self.sources):
            with open_record(source.path) as file:
                found.append(RowBatch.join([self._read(file, index, *block) for block in self._blocks(source)]))
        return found

    def _blocks(self, source: Source) -> Iterator[tuple[str, int, int]]:
        """Layer and range of leading rows, about `_BLOCK` weights each."""
        for name, layer in source.layers.items():
            lead = layer.shape[0]
            step = max(1, _BLOCK * lead // max(layer.numel, 1))
            for start in range(0, lead, step):
                yield name, start, min(start + step, lead)

    def _read(self, file: h5py.File, index: int, name: str, start: int, stop: int) -> RowBatch:
        """The weights of leading rows `start … stop` of one layer."""
        source = self.sources[index]
        group, layer = file[f"layers/{name}"], source.layers[name]
        part = {signal: torch.from_numpy(group[signal][start:stop]) for signal in signals_of(self.features)}
        y = torch.from_numpy(group["survival"][start:stop].ravel().astype(np.int64))
        shape = (stop - start, *layer.shape[1:])
        position = list(source.layers).index(name)
        earlier = list(source.layers.values())[:position]
        place = [torch.full((len(y),), position)]
        for side in ("out", "in"):
            along = channel_index(layer, side)
            along = along[start:stop] if len(along) > 1 else along
            place.append(along.expand(shape).flatten() + sum(channels(other, side) for other in earlier))
        x = rows(self.features, part, source.contexts[name], start)
        return RowBatch(x, y, torch.full((len(y),), index), torch.stack(place, dim=1))

    def epoch(self, held: Sequence[RowBatch] | None, generator: torch.Generator) -> Iterator[RowBatch]:
        """Batches in random order; `held` is what `load` gave, if anything."""
        order = torch.randperm(len(self.sources), generator=generator).split(self.group)
        for members in order:
            some = self._of_files if held is None else self._of_memory
            for table in some(members.tolist(), held or (), generator):
                # Batches of equal size: BatchNorm cannot train on a rest of one row.
                count = math.ceil(len(table.y) / self.settings.batch_size)
                for pick in torch.randperm(len(table.y), generator=generator).tensor_split(count):
                    yield table.pick(pick)

    def _of_memory(
        self, members: list[int], held: Sequence[RowBatch], generator: torch.Generator
    ) -> Iterator[RowBatch]:
        parts = []
        for index in members:
            source = self.sources[index]
            pick = torch.randperm(source.total, generator=generator)[: round(self.share(source) * source.total)]
            parts.append(held[index].pick(pick))
        yield RowBatch.join(parts)

    def _of_files(self, members: list[int], held: Sequence[RowBatch], generator: torch.Generator) -> Iterator[RowBatch]:
        plan = [(i, *block) for i in members for block in self._blocks(self.sources[i])]
        plan = [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
        files = {i: open_record(self.sources[i].path) for i in members}
        try:
            for start in range(0, len(plan), 32):  # about two million rows are mixed at a time
                parts = []
                for index, name, first, last in plan[start : start + 32]:
                    table = self._read(files[index], index, name, first, last)
                    count = max(1, round(self.share(self.sources[index]) * len(table.y)))
                    parts.append(table.pick(torch.randperm(len(table.y), generator=generator)[:count]))
                yield RowBatch.join(parts)
        finally:
            for file in files.values():
                file.close()


def features_of(fit_settings: FitSettings) -> tuple[str, ...]:
    return fit_settings.kind.features or check_features(fit_settings.features or DEFAULT)


def open_sources(records: Sequence[Path], fit_settings: FitSettings) -> list[Source]:
    features = features_of(fit_settings)
    tags = fit_settings.split.startswith("tag:")
    once, notes = distinct(records)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return [open_source(path, features, kind=fit_settings.kind, tags=tags) for path in once]
