"""A trained scorer: a criterion like any other, saved with its own configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, require
from autosparse.files import fingerprint, read_safetensors, write_safetensors
from autosparse.network.signals import Signals
from autosparse.plugins import check_trusted, is_outside, source_of
from autosparse.pruning.criteria import Context, Scores, ranks_within, rearranged
from autosparse.scorers import heads
from autosparse.scorers.card import Card, read_card
from autosparse.scorers.features import VERSION, View, check_features, signals_of
from autosparse.scorers.kinds import build_network
from autosparse.scorers.rule import criteria_of, log_densities

SCHEMA = "autosparse.scorer/2"
DENSITIES = ("scores", "rule")


@dataclass(frozen=True)
class Scorer:
    """A trained criterion: call it like any other, or give it to `prune`.

    `kind`: `"mlp"` (one weight at a time), `"gnn"` (the whole network), `"image"` (the published form, as a table),
    `"rule"` (no network), or a `ScorerKind` from outside as `"package.module:name"`.
    `options` are those of its network. `rule`: coefficients of the layers' features, learned from outcomes: those of
    `scorers.features` (`"layer_depth"`, …), of `scorers.rule` (`"layer_area"`, …), and the logarithm of the densities that a
    criterion gives (`"densities:snip"`). `densities`: with `"scores"` the sum `Σ_f rule_f·x_f` is added to all scores of a layer and so moves its
    density; with `"rule"` that sum is the layer's log density, up to a constant and at most 0, and the scores order weights
    within layers alone (`{"layer_erk": 1}` is ERK). `positions`: where in
    a layer the weights stay whose number its scores set, see `pruning.criteria.rearranged`. `warmup`: the settings of the
    short training that its early signals were recorded with. `card`: where it comes from and what it is worth.

    Raises:
        AutoSparseError: when called without the signals that its features are made of.
    """

    kind: str
    network: nn.Module
    head: str
    features: tuple[str, ...]
    n_batches: int
    batch_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    rule: Mapping[str, float] = field(default_factory=dict)
    densities: str = "scores"
    positions: str = "scores"
    warmup: Mapping[str, Any] = field(default_factory=dict)
    card: Card = field(default_factory=Card)
    name: str = "scorer"

    @property
    def signals(self) -> tuple[str, ...]:
        return signals_of(self.features)

    @property
    def densities_of(self) -> tuple[str, ...]:
        """The criteria whose layer densities it asks for."""
        return criteria_of(self.rule)

    @torch.no_grad()
    def __call__(self, signals: Signals, context: Context) -> Scores:
        for name in self.signals:
            if name not in signals:
                raise AutoSparseError(
                    f"scorer {self.name!r} needs the signal {name!r}: "
                    + ("give the signals of a warm-up" if "@" in name else "measure it too")
                )
        device = next(iter(signals["weight"].values())).device
        network = self.network.to(device).eval()
        view = View.of(self.features, context.layers, signals, context.graph, context.masks)
        scores: Scores = {}
        for name, layer in context.layers.items():
            scores[name] = torch.empty(layer.shape, device=device)
        for name, start, stop, predicted in network.outputs(view):  # type: ignore[operator]
            score = heads.score(self.head, predicted, context.density)
            scores[name][start:stop] = score.view(stop - start, *scores[name].shape[1:])
        weights = signals["weight"]
        if self.densities == "rule":  # a cut at t leaves e^−t of a layer, at most all
            ranks = ranks_within(scores, self.positions, weights, context)
            scores = {name: -((rank + 0.5) / rank.numel()).log() for name, rank in ranks.items()}
        else:
            scores = rearranged(scores, self.positions, weights, context)
        constants = {name: view.contexts[name].constants for name in scores}
        logs = log_densities(self.rule, constants, context.layers, context.graph, context.densities)
        return {name: score + logs[name] for name, score in scores.items()}

    def content(self) -> str:
        """Fingerprint of all that its scores depend on: not its name, nor its card."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("network", "card", "name")}
        return fingerprint(values, self.network.state_dict(), source_of(self.kind) if is_outside(self.kind) else "")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that holds the weights, their own configuration, feature names and card."""
        config = {
            "kind": self.kind,
            "head": self.head,
            "features": self.features,
            "feature_version": VERSION,
            "options": self.options,
            "rule": self.rule,
            "densities": self.densities,
            "positions": self.positions,
            "n_batches": self.n_batches,
            "batch_size": self.batch_size,
            "warmup": self.warmup,
            "name": self.name,
        }
        texts = {"config": json.dumps(config), "card": json.dumps(self.card.plain())}
        write_safetensors(Path(path), self.network.state_dict(), SCHEMA, **texts)


def read_scorer(path: str | Path) -> Scorer:
    """Read a scorer saved by `Scorer.save`; no pickle.

    Raises:
        AutoSparseError: the file is missing, damaged or something else, or its features are not those of this version.
    """
    tensors, metadata = read_safetensors(Path(path), SCHEMA, "scorer")
    try:
        config, card = json.loads(metadata["config"]), read_card(json.loads(metadata["card"]))
        return _build(Path(path), tensors, config, card)
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise AutoSparseError(
            f"scorer {path} is damaged: its weights do not fit its configuration; fit it again"
        ) from error


def _build(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: Card) -> Scorer:
    if is_outside(kind := str(config["kind"])):
        check_trusted(kind, f"scorer {path}")
    try:
        version = config["feature_version"]
        require(version == VERSION, "feature version", version, f"this one has {VERSION}")
        features = check_features(config["features"])
        network = build_network(kind, features, heads.outputs(config["head"]), config["options"])
    except AutoSparseError as error:
        raise AutoSparseError(
            f"scorer {path} is of another AutoSparse ({error}): fit it again with this one"
        ) from error
    network.load_state_dict(tensors)
    network.eval()
    return Scorer(
        kind,
        network,
        config["head"],
        features,
        config["n_batches"],
        config["batch_size"],
        config["options"],
        config["rule"],
        config["densities"],
        config["positions"],
        config["warmup"],
        card,
        config["name"],
    )
