"""Records -> trained scorer."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure, require, settings
from autosparse.files import sha256
from autosparse.masks.layers import Layer
from autosparse.masks.random import make_generator, seeded
from autosparse.pruning.criteria import POSITIONS
from autosparse.scorers import heads, image
from autosparse.scorers.card import Card
from autosparse.scorers.corpus import hash_of, tags_of
from autosparse.scorers.evaluation import evaluate, means
from autosparse.scorers.features import (
    DEFAULT,
    LayerContext,
    View,
    channel_index,
    channels,
    check_features,
    of_weights,
    rows,
    signals_of,
)
from autosparse.scorers.mlp import Moments
from autosparse.scorers.records import Record, distinct, open_record, read_record
from autosparse.scorers.scorer import FITTED, Scorer, build_network
from autosparse.scorers.splits import UNITS, Parts, folds, split_records
from autosparse.training.threads import threads_of_step

_BLOCK = 1 << 16  # rows that are read at a time


@settings
class FitSettings:
    """How a scorer is fitted.

    `scorer`: `"mlp"` (one weight at a time), `"gnn"` (the whole network) or `"image"` (the published form, for comparison:
    its features are the raw weight and gradient, and it sees 20,000 weights in all). `head`: `"hazard"`,
    `"cumulative"` or `"mse"`. `features`: names of features or groups (`autosparse list features`), `None` for the default
    ones. `hidden`: widths of the MLP. `width`, `rounds`: of the graph network, states and rounds of message passing.
    `backbone`: of the image scorer. `split`: the records that judge the scorer, and do nothing else: `"run"`, whole IRP
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
    first, each without another part of the architectures, and judge them there.
    """

    scorer: str = "mlp"
    head: str = "hazard"
    features: tuple[str, ...] | None = None
    hidden: tuple[int, ...] = (64, 64)
    width: int = 32
    rounds: int = 3
    backbone: str = "resnet18"
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
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.scorer in FITTED, "fit.scorer", self.scorer, f"known: {', '.join(FITTED)}")
        heads.outputs(self.head)
        if self.features is not None:
            raw = check_features(self.features) == image.FEATURES
            require(self.scorer != "image" or raw, "fit.features", self.features, "an image scorer takes its own only")
        require(len(self.hidden) >= 1 and min(self.hidden) >= 1, "fit.hidden", self.hidden, "give widths of at least 1")
        require(self.width >= 1, "fit.width", self.width, "give at least 1")
        require(self.rounds >= 0, "fit.rounds", self.rounds, "it must not be negative")
        require(self.backbone in image.NETWORKS, "fit.backbone", self.backbone, f"known: {', '.join(image.NETWORKS)}")
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

    def options(self) -> dict[str, Any]:
        """Those of the network."""
        if self.scorer == "mlp":
            return {"hidden": list(self.hidden)}
        return {"width": self.width, "rounds": self.rounds} if self.scorer == "gnn" else {"size": _TABLE}


_TABLE = 128  # points of an image scorer's table along each of its two inputs


# -- rows of records ----------------------------------------------------------------------------------------------------


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


def open_source(path: Path, features: Sequence[str], *, graph: bool = False, tags: bool = False) -> Source:
    """Open a record for fitting; with `graph` one pass over its weights is made.

    Raises:
        AutoSparseError: the record is missing, damaged, has no finished round, or lacks a signal.
    """
    record = read_record(path, signals_of(features))
    if record.rounds_done == 0:
        raise AutoSparseError(f"record {path} has no finished round: run autosparse generate on it again")
    view = View.of(features, record.layers, as_signals(record), record.graph() if record.operations else None)
    data = None
    if graph:
        from autosparse.scorers.gnn import network_data

        data = network_data(view)
    found: frozenset[str] = frozenset()
    if tags:
        found = tags_of(record)
    model = json.dumps(record.config.get("model", {}), sort_keys=True)
    return Source(
        path, model, found, record.layers, view.contexts, tuple(record.removal_densities), record.config, data
    )


def as_signals(record: Record) -> dict[str, dict[str, Tensor]]:
    return {s: {n: torch.from_numpy(a) for n, a in arrays.items()} for s, arrays in record.signals.items()}


class Table(NamedTuple):
    """Rows of several records: features `(n, F)`, survival `(n,)`, which record `(n,)`, and where in it the weight is
    `(n, 3)`: its layer, its output channel and its input channel, counted over all layers."""

    x: Tensor
    y: Tensor
    owner: Tensor
    place: Tensor

    def pick(self, index: Tensor) -> Table:
        return Table(*(column[index] for column in self))

    @staticmethod
    def join(parts: Sequence[Table]) -> Table:
        return Table(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


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
        limit = self.settings.rows_per_record
        if self.settings.scorer == "image":
            limit = min(limit or image.MOST_ROWS, max(1, image.MOST_ROWS // len(self.sources)))
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

    def load(self) -> list[Table]:
        """All rows, a table for each record."""
        found = []
        for index, source in enumerate(self.sources):
            with open_record(source.path) as file:
                found.append(Table.join([self._read(file, index, *block) for block in self._blocks(source)]))
        return found

    def _blocks(self, source: Source) -> Iterator[tuple[str, int, int]]:
        """Layer and range of leading rows, about `_BLOCK` weights each."""
        for name, layer in source.layers.items():
            lead = layer.shape[0]
            step = max(1, _BLOCK * lead // max(layer.numel, 1))
            for start in range(0, lead, step):
                yield name, start, min(start + step, lead)

    def _read(self, file: h5py.File, index: int, name: str, start: int, stop: int) -> Table:
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
        return Table(x, y, torch.full((len(y),), index), torch.stack(place, dim=1))

    def epoch(self, held: Sequence[Table] | None, generator: torch.Generator) -> Iterator[Table]:
        """Batches in random order; `held` is what `load` gave, if anything."""
        order = torch.randperm(len(self.sources), generator=generator).split(self.group)
        for members in order:
            some = self._of_files if held is None else self._of_memory
            for table in some(members.tolist(), held or (), generator):
                # Batches of equal size: BatchNorm cannot train on a rest of one row.
                count = math.ceil(len(table.y) / self.settings.batch_size)
                for pick in torch.randperm(len(table.y), generator=generator).tensor_split(count):
                    yield table.pick(pick)

    def _of_memory(self, members: list[int], held: Sequence[Table], generator: torch.Generator) -> Iterator[Table]:
        parts = []
        for index in members:
            source = self.sources[index]
            pick = torch.randperm(source.total, generator=generator)[: round(self.share(source) * source.total)]
            parts.append(held[index].pick(pick))
        yield Table.join(parts)

    def _of_files(self, members: list[int], held: Sequence[Table], generator: torch.Generator) -> Iterator[Table]:
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
                yield Table.join(parts)
        finally:
            for file in files.values():
                file.close()


# -- fitting ------------------------------------------------------------------------------------------------------------


def fit(
    records: Sequence[Path],
    fit_settings: FitSettings,
    *,
    name: str = "scorer",
    device: str = "cpu",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_test: Callable[[list[dict[str, Any]]], None] | None = None,
) -> Scorer:
    """Train a scorer to predict survival from the signals at initialization.

    Some records are learned from, others choose the epoch (that of the lowest validation loss is kept, else the last), and
    others judge: they are looked at once, after all else. The card tells which did what, and how the scorer ranks the
    judges, beside the hand-made criteria (see `evaluation.py`).

    Args:
        on_epoch: called after each epoch with its losses.
        on_test: called with the rows of `evaluation.evaluate` on the judges, if there are any.

    Raises:
        AutoSparseError: records missing, damaged, without rounds or without the signals that the features need.
        AutoSparseFailure: the loss is no longer finite.
    """
    sources = open_sources(records, fit_settings)
    parts = split_records(sources, fit_settings)
    scorer, rows = fit_parts(sources, parts, fit_settings, name=name, device=device, on_epoch=on_epoch)
    if rows and on_test is not None:
        on_test(rows)
    return scorer


def cross_validate(
    records: Sequence[Path],
    fit_settings: FitSettings,
    *,
    device: str = "cpu",
    known: Mapping[int, list[dict[str, Any]]] | None = None,
    on_fold: Callable[[int, list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Leave architectures out: `folds` scorers, each fitted without a part of the architectures and judged on that part.

    Args:
        known: rows of folds that were done before.
        on_fold: called with each fold and its rows.

    Returns:
        The rows of `evaluation.evaluate` on each record, with its fold.

    Raises:
        AutoSparseError: as `fit`, or there are fewer architectures than folds.
    """
    sources = open_sources(records, fit_settings)
    done = []
    for fold, parts in enumerate(folds(sources, fit_settings)):
        rows = list((known or {}).get(fold, ()))
        if not rows:
            _, found = fit_parts(sources, parts, fit_settings, device=device)
            rows = [{"fold": fold, **row} for row in found]
            if on_fold is not None:
                on_fold(fold, rows)
        done += rows
    return done


def features_of(fit_settings: FitSettings) -> tuple[str, ...]:
    if fit_settings.scorer == "image":
        return image.FEATURES
    return check_features(fit_settings.features or DEFAULT)


def open_sources(records: Sequence[Path], fit_settings: FitSettings) -> list[Source]:
    features, graph = features_of(fit_settings), fit_settings.scorer == "gnn"
    tags = fit_settings.split.startswith("tag:")
    once, notes = distinct(records)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return [open_source(path, features, graph=graph, tags=tags) for path in once]


def fit_parts(
    sources: Sequence[Source],
    parts: Parts,
    fit_settings: FitSettings,
    *,
    name: str = "scorer",
    device: str = "cpu",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> tuple[Scorer, list[dict[str, Any]]]:
    """`fit` of records that are open already and split; also the rows of `evaluation.evaluate` on those that judge."""
    clock = time.perf_counter()
    features = features_of(fit_settings)
    columns = of_weights(features) if fit_settings.scorer == "gnn" else features

    def part(which: Sequence[int]) -> Rows:
        group = fit_settings.records_per_step if fit_settings.scorer == "gnn" else max(len(which), 1)
        return Rows([sources[i] for i in which], columns, fit_settings, group)

    with seeded(fit_settings.seed, "initialization of a scorer"):
        if fit_settings.scorer == "image":
            network: nn.Module = image.ImageScorer(heads.outputs(fit_settings.head), fit_settings.backbone)
        else:
            network = build_network(
                fit_settings.scorer, features, heads.outputs(fit_settings.head), fit_settings.options()
            )
        # A weight of a row's network is used once for each row; an image's for each of its points.
        uses = 1_000_000 if fit_settings.scorer == "image" else fit_settings.batch_size
        with threads_of_step(sum(p.numel() for p in network.parameters()) * uses):
            history, kept = _train(
                network, part(parts.fit), part(parts.validation), fit_settings, torch.device(device), on_epoch
            )
        if isinstance(network, image.ImageScorer):
            network = network.table(_TABLE)
    network.cpu().eval()
    first = sources[0].config.get("signals", {})
    scorer = Scorer(
        fit_settings.scorer,
        network,
        fit_settings.head,
        features,
        int(first.get("n_batches", 1)),
        int(first.get("batch_size", 128)),
        fit_settings.options(),
        positions=fit_settings.positions,
        warmup={"orders": first["warmup_orders"], "lr": first["warmup_lr"]} if "warmup_orders" in first else {},
        name=name,
    )
    rows = evaluate(scorer, [sources[i].path for i in parts.test])
    hashes = [
        {"name": s.path.name, "sha256": sha256(s.path), "part": parts.of(index)} for index, s in enumerate(sources)
    ]
    card = Card(
        name=name,
        scorer=fit_settings.scorer,
        head=fit_settings.head,
        features=list(features),
        settings=dataclasses.asdict(fit_settings),
        corpus=hash_of(row["sha256"] for row in hashes),
        records=hashes,
        notes=[parts.note] if parts.note else [],
        weights=sum(sources[i].total for i in parts.fit),
        parameters=sum(p.numel() for p in network.parameters()),
        seconds=time.perf_counter() - clock,
        epoch=kept,
        history=history,
        test=means(rows),
    )
    return dataclasses.replace(scorer, card=card), rows


def _train(
    network: nn.Module,
    train_rows: Rows,
    held_rows: Rows,
    fit_settings: FitSettings,
    device: torch.device,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> tuple[list[dict[str, float]], int]:
    """Train on `train_rows` and keep the epoch that does best on `held_rows`, if there are any: losses, and the epoch kept."""
    generator = make_generator(fit_settings.seed, "rows")
    held = train_rows.load() if train_rows.held() else None
    held_validation = held_rows.load() if held_rows.sources and held_rows.held() else None
    _standardise(network, train_rows, held, generator)
    network.to(device)
    task, validation_task = _Task(train_rows, device), _Task(held_rows, device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=fit_settings.lr, weight_decay=fit_settings.weight_decay, fused=True
    )
    steps = fit_settings.epochs * train_rows.steps
    rise = max(1, round(0.1 * steps))  # whole, since OneCycleLR divides by the length of the rise
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, fit_settings.lr, total_steps=steps + 1, pct_start=(rise + 1) / (steps + 1)
    )
    history: list[dict[str, float]] = []
    best, best_state, kept = math.inf, None, fit_settings.epochs
    done = 0
    for epoch in range(1, fit_settings.epochs + 1):
        network.train()
        total, count = 0.0, 0
        for table in train_rows.epoch(held, generator):
            value = task.loss(network, table)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            if done < steps:
                schedule.step()
            done += 1
            total += float(value.detach()) * len(table.y)
            count += len(table.y)
        row = {"epoch": float(epoch), "train_loss": total / max(count, 1)}
        if not math.isfinite(row["train_loss"]):
            raise AutoSparseFailure(
                f"fitting diverged in epoch {epoch}: the loss is not finite; lower fit.lr ({fit_settings.lr})"
            )
        if held_rows.sources:
            row["validation_loss"] = _validation_loss(network, held_rows, held_validation, validation_task)
            if row["validation_loss"] < best:
                best, kept = row["validation_loss"], epoch
                best_state = {n: t.detach().clone() for n, t in network.state_dict().items()}
        history.append(row)
        if on_epoch is not None:
            on_epoch(row)
    if best_state is not None:
        network.load_state_dict(best_state)
    return history, kept


class _Task:
    """The loss of a network on batches of rows."""

    def __init__(self, part: Rows, device: torch.device) -> None:
        self._part, self._device = part, device
        longest = max((len(s.removal_densities) for s in part.sources), default=0) + 1
        pairs = [heads.interval_tables(s.removal_densities, longest) for s in part.sources]
        empty = torch.zeros(0)
        self._survived = torch.stack([p[0] for p in pairs]).to(device) if pairs else empty
        self._fell = torch.stack([p[1] for p in pairs]).to(device) if pairs else empty

    def loss(self, network: nn.Module, table: Table) -> Tensor:
        settings, device = self._part.settings, self._device
        owner, y = table.owner.to(device), table.y.to(device)
        predicted = self._predict(network, table)
        return heads.loss(settings.head, predicted, self._survived[owner, y], self._fell[owner, y], settings.balance)

    def _predict(self, network: nn.Module, table: Table) -> Tensor:
        x = table.x.to(self._device)
        if self._part.settings.scorer != "gnn":
            return network(x)
        from autosparse.scorers.gnn import batch

        members, owner = table.owner.unique(return_inverse=True)
        data = [self._part.sources[i].data for i in members.tolist()]
        u_layer, u_out, u_in, share = network.encode(batch(data).to(self._device))  # type: ignore[operator]
        index = []
        for column, sizes in enumerate(
            ([len(d.x) for d in data], [len(d.out_stats) for d in data], [len(d.in_stats) for d in data])
        ):
            starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
            index.append((starts[owner] + table.place[:, column]).to(self._device))
        place = u_layer[index[0]] + u_out[index[1]] + u_in[index[2]]
        return network(x, place, share[index[0]])


@torch.no_grad()
def _validation_loss(network: nn.Module, part: Rows, held: Sequence[Table] | None, task: _Task) -> float:
    network.eval()
    total, count = 0.0, 0
    for table in part.epoch(held, make_generator(0, "rows of validation")):  # the same rows after every epoch
        total += float(task.loss(network, table)) * len(table.y)
        count += len(table.y)
    return total / max(count, 1)


def _standardise(network: nn.Module, part: Rows, held: Sequence[Table] | None, generator: torch.Generator) -> None:
    """Mean, standard deviation and range of the features over one epoch's rows: all of them, since a streamed epoch
    begins with a few layers only."""
    own = Moments(len(part.features))
    for table in part.epoch(held, generator):
        own.see(table.x)
    network.inputs.set(own)  # type: ignore[union-attr, operator]
    if part.settings.scorer == "gnn":
        data = [source.data for source in part.sources]
        nodes, stats = Moments(data[0].x.shape[1]), Moments(2 * len(part.features))
        for one in data:
            nodes.see(one.x)
            stats.see(one.out_stats)
            stats.see(one.in_stats)
        network.node_inputs.set(nodes)  # type: ignore[union-attr, operator]
        network.channel_inputs.set(stats)  # type: ignore[union-attr, operator]
