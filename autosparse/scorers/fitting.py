"""Records -> trained scorer."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseFailure
from autosparse.files import sha256
from autosparse.masks.random import make_generator, seeded
from autosparse.scorers import heads
from autosparse.scorers.batches import Moments, RowBatch
from autosparse.scorers.card import Card
from autosparse.scorers.corpus import hash_of
from autosparse.scorers.evaluation import evaluate, means
from autosparse.scorers.rows import FitSettings, Rows, Source, features_of, open_sources
from autosparse.scorers.scorer import Scorer
from autosparse.scorers.splits import Parts, folds, split_records
from autosparse.training.threads import threads_of_step


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
    others test the scorer: they are looked at once, after all else. The card lists them, and says how the scorer ranks the
    test records, beside the hand-made criteria (see `evaluation.py`).

    Args:
        on_epoch: called after each epoch with its losses.
        on_test: called with the rows of `evaluation.evaluate` on the test records, if there are any.

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
    """Leave architectures out: `folds` scorers, each fitted without a part of the architectures and tested on that part.

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


def fit_parts(
    sources: Sequence[Source],
    parts: Parts,
    fit_settings: FitSettings,
    *,
    name: str = "scorer",
    device: str = "cpu",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> tuple[Scorer, list[dict[str, Any]]]:
    """`fit` of records that are open already and split; also the rows of `evaluation.evaluate` on the test records."""
    clock = time.perf_counter()
    features = features_of(fit_settings)
    kind = fit_settings.kind
    options = kind.options(fit_settings.options, fit_settings.scorer)

    def part(which: Sequence[int]) -> Rows:
        group = kind.records_per_step(fit_settings.records_per_step, len(which))
        return Rows([sources[i] for i in which], kind.columns(features), fit_settings, group)

    with seeded(fit_settings.seed, "initialization of a scorer"):
        network = kind.to_fit(features, heads.outputs(fit_settings.head), options)
        with threads_of_step(sum(p.numel() for p in network.parameters()) * kind.uses(fit_settings.batch_size)):
            history, kept = _train(
                network, part(parts.fit), part(parts.validation), fit_settings, torch.device(device), on_epoch
            )
        network = kind.to_save(network)
    network.cpu().eval()
    first = sources[0].config.get("signals", {})
    scorer = Scorer(
        fit_settings.scorer,
        network,
        fit_settings.head,
        features,
        int(first.get("n_batches", 1)),
        int(first.get("batch_size", 128)),
        kind.saved_options(options),
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

    def loss(self, network: nn.Module, table: RowBatch) -> Tensor:
        settings, device = self._part.settings, self._device
        owner, y = table.owner.to(device), table.y.to(device)
        data = [source.data for source in self._part.sources]
        predicted = settings.kind.predict(network, table, data, device)
        return heads.loss(settings.head, predicted, self._survived[owner, y], self._fell[owner, y], settings.balance)


@torch.no_grad()
def _validation_loss(network: nn.Module, part: Rows, held: Sequence[RowBatch] | None, task: _Task) -> float:
    network.eval()
    total, count = 0.0, 0
    for table in part.epoch(held, make_generator(0, "rows of validation")):  # the same rows after every epoch
        total += float(task.loss(network, table)) * len(table.y)
        count += len(table.y)
    return total / max(count, 1)


def _standardise(network: nn.Module, part: Rows, held: Sequence[RowBatch] | None, generator: torch.Generator) -> None:
    """Mean, standard deviation and range of the features over one epoch's rows: all of them, since a streamed epoch
    begins with a few layers only."""
    own = Moments(len(part.features))
    for table in part.epoch(held, generator):
        own.see(table.x)
    part.settings.kind.standardise(network, own, [source.data for source in part.sources])
