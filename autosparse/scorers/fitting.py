"""Records -> trained scorer; saving and loading."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from autosparse.errors import AutoSparseError, AutoSparseFailure, require, settings
from autosparse.files import read_safetensors, replace_file, sha256
from autosparse.network.signals import Signals
from autosparse.pruning.criteria import Context, Scores
from autosparse.scorers import heads
from autosparse.scorers.features import (
    DEFAULT,
    FEATURES,
    VERSION,
    LayerContext,
    check_features,
    contexts,
    rows,
    signals_of,
)
from autosparse.scorers.mlp import MLPScorer
from autosparse.scorers.records import Record, open_record, read_record

SCHEMA = "autosparse.scorer/1"
VALIDATIONS = ("run", "model", "none")
_BLOCK = 1 << 16  # rows that are read at a time
Table = tuple[Tensor, Tensor, Tensor]  # features (n, F), survival (n,), which record (n,)


@settings
class FitSettings:
    """How a scorer is fitted.

    `head`: `"hazard"` or `"mse"`. `features`: names, `None` for the default ones (`autosparse list features`). `hidden`:
    widths of the MLP. `validation`: `"run"` holds out whole IRP runs, `"model"` whole architectures (what tells whether
    it transfers), `"none"`; never single weights. `validation_share`: of the runs or architectures, at least one.
    `rows_per_record`: at most so many weights of each record in an epoch, so that large networks do not drown small
    ones. `memory_gib`: above this the rows are streamed from the files instead of held.
    """

    head: str = "hazard"
    features: tuple[str, ...] | None = None
    hidden: tuple[int, ...] = (64, 64)
    epochs: int = 20
    batch_size: int = 4096
    lr: float = 2e-3
    weight_decay: float = 1e-4
    validation: str = "run"
    validation_share: float = 0.25
    rows_per_record: int | None = 200_000
    memory_gib: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        heads.outputs(self.head)
        if self.features is not None:
            check_features(self.features)
        require(len(self.hidden) >= 1 and min(self.hidden) >= 1, "fit.hidden", self.hidden, "give widths of at least 1")
        require(self.epochs >= 1, "fit.epochs", self.epochs, "give at least 1")
        require(self.batch_size >= 1, "fit.batch_size", self.batch_size, "give at least 1")
        require(self.lr > 0, "fit.lr", self.lr, "give a positive number")
        require(self.validation in VALIDATIONS, "fit.validation", self.validation, f"known: {', '.join(VALIDATIONS)}")
        require(0 < self.validation_share < 1, "fit.validation_share", self.validation_share, "it must be in (0, 1)")
        require(
            self.rows_per_record is None or self.rows_per_record >= 1,
            "fit.rows_per_record",
            self.rows_per_record,
            "give at least 1",
        )
        require(self.memory_gib > 0, "fit.memory_gib", self.memory_gib, "give a positive number")


@dataclass(frozen=True)
class Scorer:
    """A trained criterion: call it like any other, or give it to `prune`.

    Raises:
        AutoSparseError: when called without the signals that its features are made of.
    """

    network: MLPScorer
    head: str
    features: tuple[str, ...]
    n_batches: int
    batch_size: int
    card: Mapping[str, Any] = field(default_factory=dict)
    name: str = "scorer"

    @property
    def signals(self) -> tuple[str, ...]:
        return signals_of(self.features)

    @torch.no_grad()
    def __call__(self, signals: Signals, context: Context) -> Scores:
        for name in self.signals:
            if name not in signals:
                raise AutoSparseError(f"scorer {self.name!r} needs the signal {name!r}: measure it too")
        device = next(iter(signals["weight"].values())).device
        network = self.network.to(device)
        found = contexts(context.layers, signals, context.graph, context.masks)
        scores: Scores = {}
        step = max(1, _BLOCK // 4)  # the activations of a quarter stay in the cache: half the time of whole blocks
        for name, layer in context.layers.items():
            weight = signals["weight"][name].flatten()
            gradient = signals["gradient"][name].flatten() if "gradient" in signals else None
            score = torch.empty(weight.numel(), device=device)
            for start in range(0, weight.numel(), step):
                part = slice(start, start + step)
                inputs = rows(self.features, weight[part], None if gradient is None else gradient[part], found[name])
                score[part] = heads.score(self.head, network(inputs), context.density)
            scores[name] = score.view(layer.shape)
        return scores

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that holds the weights, their own configuration, feature names and card."""
        from safetensors.torch import save_file

        config = {
            "kind": "mlp",
            "head": self.head,
            "features": self.features,
            "feature_version": VERSION,
            "hidden": [layer.out_features for layer in self.network.hidden],
            "n_batches": self.n_batches,
            "batch_size": self.batch_size,
            "name": self.name,
        }
        metadata = {"schema": SCHEMA, "config": json.dumps(config), "card": json.dumps(self.card)}
        with replace_file(Path(path)) as temporary:
            save_file({n: t.cpu() for n, t in self.network.state_dict().items()}, temporary, metadata=metadata)


def read_scorer(path: str | Path) -> Scorer:
    """Read a scorer saved by `Scorer.save`; no pickle.

    Raises:
        AutoSparseError: the file is missing, damaged or something else, or its features are not those of this version.
    """
    tensors, metadata = read_safetensors(Path(path), SCHEMA, "scorer")
    try:
        return _build(Path(path), tensors, json.loads(metadata["config"]), json.loads(metadata["card"]))
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise AutoSparseError(f"scorer {path} is damaged: its weights do not fit its own configuration") from error


def _build(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: Mapping[str, Any]) -> Scorer:
    unknown = [name for name in config["features"] if name not in FEATURES]
    if unknown or config["feature_version"] != VERSION:
        what = f"feature {unknown[0]!r}" if unknown else f"feature version {config['feature_version']}"
        raise AutoSparseError(
            f"scorer {path} uses {what}, this AutoSparse has version {VERSION} of {', '.join(FEATURES)}: "
            "fit it again with this version"
        )
    network = MLPScorer(len(config["features"]), heads.outputs(config["head"]), config["hidden"])
    network.load_state_dict(tensors)
    network.eval()
    return Scorer(
        network,
        config["head"],
        tuple(config["features"]),
        config["n_batches"],
        config["batch_size"],
        card,
        config["name"],
    )


# -- rows of records ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One record, opened: the contexts of its layers and the exposure tables of its labels."""

    path: Path
    model: str
    contexts: Mapping[str, LayerContext]
    sizes: Mapping[str, int]
    removal_densities: tuple[float, ...]
    config: Mapping[str, Any]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def _open_source(path: Path, features: Sequence[str]) -> _Source:
    record = read_record(path, signals_of(features))
    if record.rounds_done == 0:
        raise AutoSparseError(f"record {path} has no finished round: run autosparse generate on it again")
    signals = as_signals(record)
    return _Source(
        path,
        str(_model_label(record.config)),
        contexts(record.layers, signals, record.graph()),
        {name: layer.numel for name, layer in record.layers.items()},
        tuple(record.removal_densities),
        record.config,
    )


def as_signals(record: Record) -> Signals:
    return {s: {n: torch.from_numpy(a) for n, a in arrays.items()} for s, arrays in record.signals.items()}


def _model_label(config: Mapping[str, Any]) -> str:
    model = config.get("model", {})
    return json.dumps(model, sort_keys=True)


def _read_block(
    file: h5py.File, source: _Source, layer: str, start: int, stop: int, features: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Features and labels of the weights of leading rows `start … stop` of one layer."""
    group = file[f"layers/{layer}"]
    weight = torch.from_numpy(group["weight"][start:stop].ravel())
    needs_gradient = "gradient" in signals_of(features)
    gradient = torch.from_numpy(group["gradient"][start:stop].ravel()) if needs_gradient else None
    labels = torch.from_numpy(group["survival"][start:stop].ravel().astype(np.int64))
    return rows(features, weight, gradient, source.contexts[layer]), labels


@dataclass(frozen=True)
class Rows:
    """Rows of several records in shuffled batches, held in memory when they fit, else streamed block by block."""

    sources: Sequence[_Source]
    features: tuple[str, ...]
    settings: FitSettings

    def share(self, source: _Source) -> float:
        limit = self.settings.rows_per_record
        return 1.0 if limit is None else min(1.0, limit / source.total)

    @property
    def per_epoch(self) -> int:
        return sum(round(self.share(s) * s.total) for s in self.sources)

    def held(self) -> bool:
        size = sum(s.total for s in self.sources) * (4 * len(self.features) + 16)  # features, label, record index
        return size <= self.settings.memory_gib * 2**30

    def blocks(self, index: int) -> Iterator[tuple[str, int, int]]:
        """Layer and range of leading rows, about `_BLOCK` weights each."""
        source = self.sources[index]
        with open_record(source.path) as file:
            for layer, size in source.sizes.items():
                lead = file[f"layers/{layer}/weight"].shape[0]
                step = max(1, _BLOCK * lead // max(size, 1))
                for start in range(0, lead, step):
                    yield layer, start, min(start + step, lead)

    def load(self) -> Table:
        """All rows, record after record."""
        xs, ys, owners = [], [], []
        for index, source in enumerate(self.sources):
            with open_record(source.path) as file:
                for block in self.blocks(index):
                    x, y = _read_block(file, source, *block, self.features)
                    xs.append(x)
                    ys.append(y)
                    owners.append(torch.full((len(x),), index))
        return torch.cat(xs), torch.cat(ys), torch.cat(owners)

    def epoch(self, held: Table | None, generator: torch.Generator) -> Iterator[Table]:
        """Batches of features, labels and record indices, in random order; `held` is what `load` gave, if anything."""
        size = self.settings.batch_size
        if held is not None:
            x, y, owner = held
            picks, start = [], 0
            for source in self.sources:
                order = torch.randperm(source.total, generator=generator)
                picks.append(start + order[: round(self.share(source) * source.total)])
                start += source.total
            chosen = torch.cat(picks)
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
            for pick in chosen.split(size):
                yield x[pick], y[pick], owner[pick]
            return
        plan = [(i, *block) for i in range(len(self.sources)) for block in self.blocks(i)]
        plan = [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
        files = [open_record(s.path) for s in self.sources]
        try:
            for start in range(0, len(plan), 32):  # about two million rows are mixed at a time
                xs, ys, owners = [], [], []
                for index, layer, first, last in plan[start : start + 32]:
                    x, y = _read_block(files[index], self.sources[index], layer, first, last, self.features)
                    count = max(1, round(self.share(self.sources[index]) * len(x)))
                    pick = torch.randperm(len(x), generator=generator)[:count]
                    xs.append(x[pick])
                    ys.append(y[pick])
                    owners.append(torch.full((count,), index))
                x, y, owner = torch.cat(xs), torch.cat(ys), torch.cat(owners)
                for pick in torch.randperm(len(x), generator=generator).split(size):
                    yield x[pick], y[pick], owner[pick]
        finally:
            for file in files:
                file.close()


# -- fitting ------------------------------------------------------------------------------------------------------------


def split_records(sources: Sequence[_Source], how: str, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and validation, by whole run (of which there may be copies) or whole architecture.

    Raises:
        AutoSparseError: there is only one run or architecture.
    """
    if how == "none":
        return list(range(len(sources))), []
    keys = [s.model if how == "model" else json.dumps(s.config, sort_keys=True) for s in sources]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise AutoSparseError(
            f"fit.validation is {how!r} but the records hold only one {how}: generate more, or set fit.validation=none"
        )
    order = np.random.default_rng(seed).permutation(len(distinct))
    held = {distinct[i] for i in order[: max(1, round(share * len(distinct)))]}
    training = [i for i, key in enumerate(keys) if key not in held]
    return training, [i for i, key in enumerate(keys) if key in held]


def fit(
    records: Sequence[Path],
    fit_settings: FitSettings,
    *,
    name: str = "scorer",
    device: str = "cpu",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Scorer:
    """Train a scorer to predict survival from the signals at initialization.

    The network of the epoch with the best validation loss is kept (the last one without validation); its card tells how
    it ranks held-out runs, beside `|θ₀|` alone: overall, within layers, and within bins of equal layer and `|θ₀|`.

    Raises:
        AutoSparseError: records missing, damaged, without rounds or without the signals that the features need.
        AutoSparseFailure: the loss is no longer finite.
    """
    features = fit_settings.features or DEFAULT
    clock = time.perf_counter()
    sources = [_open_source(path, features) for path in records]
    training, held_out = split_records(
        sources, fit_settings.validation, fit_settings.validation_share, fit_settings.seed
    )
    train_rows = Rows([sources[i] for i in training], features, fit_settings)
    held_rows = Rows([sources[i] for i in held_out], features, fit_settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit_settings.seed)
        network = MLPScorer(len(features), heads.outputs(fit_settings.head), fit_settings.hidden)
        history = _train(network, train_rows, held_rows, fit_settings, torch.device(device), on_epoch)
    network.cpu().eval()
    first = sources[0].config.get("signals", {})
    scorer = Scorer(
        network,
        fit_settings.head,
        tuple(features),
        int(first.get("n_batches", 1)),
        int(first.get("batch_size", 128)),
        name=name,
    )
    card = {
        "name": name,
        "head": fit_settings.head,
        "features": list(features),
        "settings": asdict(fit_settings),
        "records": [{"name": s.path.name, "sha256": sha256(s.path)} for s in sources],
        "held_out": [sources[i].path.name for i in held_out],
        "weights": sum(s.total for s in sources),
        "seconds": time.perf_counter() - clock,
        "history": history,
        "validation": validate(scorer, [sources[i].path for i in held_out]),
    }
    return Scorer(network, scorer.head, scorer.features, scorer.n_batches, scorer.batch_size, card, name)


def _train(
    network: MLPScorer,
    train_rows: Rows,
    held_rows: Rows,
    fit_settings: FitSettings,
    device: torch.device,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(fit_settings.seed)
    held = train_rows.load() if train_rows.held() else None
    held_validation = held_rows.load() if held_rows.sources and held_rows.held() else None
    _standardise(network, train_rows, held, generator)
    network.to(device)
    tables = _tables(train_rows, device)
    validation_tables = _tables(held_rows, device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=fit_settings.lr, weight_decay=fit_settings.weight_decay, fused=True
    )
    steps = fit_settings.epochs * max(1, math.ceil(train_rows.per_epoch / fit_settings.batch_size))
    rise = max(1, round(0.1 * steps))  # whole, since OneCycleLR divides by the length of the rise
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, fit_settings.lr, total_steps=steps + 1, pct_start=(rise + 1) / (steps + 1)
    )
    history: list[dict[str, float]] = []
    best, best_state = math.inf, None
    done = 0
    for epoch in range(1, fit_settings.epochs + 1):
        network.train()
        total, count = 0.0, 0
        for x, y, owner in train_rows.epoch(held, generator):
            value = _loss(network, fit_settings.head, x, y, owner, tables, device)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            if done < steps:
                schedule.step()
            done += 1
            total += float(value.detach()) * len(x)
            count += len(x)
        row = {"epoch": float(epoch), "train_loss": total / max(count, 1)}
        if not math.isfinite(row["train_loss"]):
            raise AutoSparseFailure(
                f"fitting diverged in epoch {epoch}: the loss is not finite; lower fit.lr ({fit_settings.lr})"
            )
        if held_rows.sources:
            row["validation_loss"] = _validation_loss(
                network, held_rows, held_validation, fit_settings, validation_tables, device
            )
            if row["validation_loss"] < best:
                best = row["validation_loss"]
                best_state = {n: t.detach().clone() for n, t in network.state_dict().items()}
        history.append(row)
        if on_epoch is not None:
            on_epoch(row)
    if best_state is not None:
        network.load_state_dict(best_state)
    return history


def _tables(part: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Exposure tables of all records, `(records, longest R + 1, BINS)`."""
    longest = max((len(s.removal_densities) for s in part.sources), default=0) + 1
    pairs = [heads.interval_tables(s.removal_densities, longest) for s in part.sources]
    if not pairs:
        return torch.zeros(0), torch.zeros(0)
    return torch.stack([p[0] for p in pairs]).to(device), torch.stack([p[1] for p in pairs]).to(device)


def _loss(
    network: MLPScorer,
    head: str,
    x: Tensor,
    y: Tensor,
    owner: Tensor,
    tables: tuple[Tensor, Tensor],
    device: torch.device,
) -> Tensor:
    survived, fell = (table[owner.to(device), y.to(device)] for table in tables)
    return heads.loss(head, network(x.to(device)), survived, fell)


@torch.no_grad()
def _validation_loss(
    network: MLPScorer,
    part: Rows,
    held: Table | None,
    fit_settings: FitSettings,
    tables: tuple[Tensor, Tensor],
    device: torch.device,
) -> float:
    network.eval()
    total, count = 0.0, 0
    for x, y, owner in part.epoch(held, torch.Generator().manual_seed(0)):  # the same rows after every epoch
        total += float(_loss(network, fit_settings.head, x, y, owner, tables, device)) * len(x)
        count += len(x)
    return total / max(count, 1)


def _standardise(network: MLPScorer, part: Rows, held: Table | None, generator: torch.Generator) -> None:
    """Mean, standard deviation and range of the features over one epoch's rows: all of them, since a streamed epoch
    begins with a few layers only."""
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    low, high = torch.full_like(network.low, math.inf), torch.full_like(network.high, -math.inf)
    for x, _, _ in part.epoch(held, generator):
        count += len(x)
        total = total + x.double().sum(0)
        squares = squares + x.double().square().sum(0)
        low, high = torch.minimum(low, x.amin(0)), torch.maximum(high, x.amax(0))
    mean = total / count
    network.low.copy_(low)
    network.high.copy_(high)
    network.mean.copy_(mean)
    network.std.copy_((squares / count - mean.square()).clamp(min=1e-6).sqrt())


# -- what it is worth ---------------------------------------------------------------------------------------------------


def validate(scorer: Scorer, paths: Sequence[Path]) -> dict[str, float]:
    """Ranking of the final ticket's weights on whole records, mean over records; beside `|θ₀|` alone.

    `auc`: over the whole network; `auc_within_layers`: mean over layers; `auc_within_magnitude_bins`: over bins of equal
    layer and equal decile of `|θ₀|`, where magnitude knows nothing and 0.5 is chance. None is accuracy after training.
    """
    figures: list[dict[str, float]] = []
    for path in paths:
        record = read_record(path, scorer.signals)
        density = float(record.removal_densities[-1])
        signals = as_signals(record)
        scores = scorer(signals, Context(record.layers, density, record.graph()))
        labels = {n: (s == record.rounds_done).ravel() for n, s in record.survival.items()}
        own = {n: s.numpy().ravel() for n, s in scores.items()}
        magnitude = {n: np.abs(a).ravel() for n, a in record.signals["weight"].items()}
        figures.append(
            {
                "auc": _auc(np.concatenate(list(labels.values())), np.concatenate(list(own.values()))),
                "auc_magnitude": _auc(np.concatenate(list(labels.values())), np.concatenate(list(magnitude.values()))),
                "auc_within_layers": _mean_auc([(labels[n], own[n]) for n in own]),
                "auc_magnitude_within_layers": _mean_auc([(labels[n], magnitude[n]) for n in own]),
                "auc_within_magnitude_bins": _mean_auc(
                    [(labels[n][b], own[n][b]) for n in own for b in _deciles(magnitude[n])]
                ),
            }
        )
    if not figures:
        return {}
    return {key: _mean([f[key] for f in figures]) for key in figures[0]}


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that exist; NaN where none does."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _deciles(values: np.ndarray) -> list[np.ndarray]:
    return np.array_split(np.argsort(values, kind="stable"), 10)


def _auc(labels: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    if labels.all() or not labels.any():
        return math.nan
    return float(roc_auc_score(labels, scores))


def _mean_auc(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over parts that hold both classes, weighted by the pairs that each compares."""
    total, weight = 0.0, 0.0
    for labels, scores in parts:
        pairs = float(labels.sum()) * float((~labels).sum())
        if pairs > 0:
            total += pairs * _auc(labels, scores)
            weight += pairs
    return total / weight if weight else math.nan
