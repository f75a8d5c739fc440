"""What a kind of scorer is, and the table of all kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, from_mapping, require, suggest
from autosparse.plugins import is_outside, load_outside
from autosparse.scorers.batches import Moments, RowBatch

if TYPE_CHECKING:
    from autosparse.scorers.features import View


class ScorerKind:
    """How scorers of one kind are built, fitted and saved; a subclass changes what differs.

    `features`: the only ones that the kind takes; `None`: any. `settings`: a dataclass of its options that checks its own
    values; `None`: whatever is given, unchecked. The network of a kind has a buffer-holding module
    `inputs` with a method `set(moments)`, and a method `outputs(view)` that yields `(layer, start, stop, predicted)`:
    `predicted`, `(n, outputs)`, is for the n weights in rows `start … stop` of the layer; see `scorers.mlp.by_rows`.
    """

    features: tuple[str, ...] | None = None
    settings: type | None = None

    def options(self, given: Mapping[str, Any], of: str) -> dict[str, Any]:
        """All options by name, from those that are given for the kind that is called `of`.

        Raises:
            AutoSparseError: an unknown option, or a value out of range.
        """
        if self.settings is None:
            return dict(given)
        return json.loads(json.dumps(asdict(from_mapping(self.settings, given, of))))  # as they will be read back

    def build(self, features: Sequence[str], outputs: int, options: Mapping[str, Any]) -> nn.Module:
        """A network with `outputs` numbers for each weight; its initial weights are drawn from the global generator.

        Raises:
            AutoSparseError: features that it cannot take.
        """
        raise NotImplementedError

    def to_fit(self, features: Sequence[str], outputs: int, options: Mapping[str, Any]) -> nn.Module:
        """The network that is trained."""
        return self.build(features, outputs, options)

    def saved_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What `build` needs to make the network that scores, as plain values: they are saved with it."""
        return dict(options)

    def to_save(self, network: nn.Module) -> nn.Module:
        """The network that scores, from the one that was trained."""
        return network

    def columns(self, features: Sequence[str]) -> tuple[str, ...]:
        """The features that are read for every single weight."""
        return tuple(features)

    def data(self, view: View) -> Any:
        """What is known of a whole network, beside the rows of its weights; computed once for each record."""
        return None

    def records_per_step(self, wanted: int, records: int) -> int:
        """How many of the records one batch may mix, `wanted` by the settings."""
        return max(records, 1)

    def rows_per_record(self, wanted: int | None, records: int) -> int | None:
        """At most so many weights of each record in an epoch, `wanted` by the settings; `None`: all."""
        return wanted

    def uses(self, batch_size: int) -> int:
        """How often each parameter is used in a step: what decides between one thread and several."""
        return batch_size

    def standardise(self, network: nn.Module, moments: Moments, data: Sequence[Any]) -> None:
        """Set mean, standard deviation and range of the inputs: `moments` of the rows, `data` of every record."""
        network.inputs.set(moments)  # type: ignore[union-attr, operator]

    def predict(self, network: nn.Module, table: RowBatch, data: Sequence[Any], device: torch.device) -> Tensor:
        """`(n, outputs)` for the n rows of a table; `data` of every record."""
        return network(table.x.to(device))


FITTED = {
    "mlp": "autosparse.scorers.mlp:KIND",
    "gnn": "autosparse.scorers.gnn:KIND",
    "image": "autosparse.scorers.image:KIND",
}
KINDS = {**FITTED, "rule": "autosparse.scorers.mlp:RULE"}


def kind_for(name: str) -> ScorerKind:
    """The kind of a name: one of `KINDS`, or a `ScorerKind` from outside as `package.module:name`.

    Raises:
        AutoSparseError: it is none.
    """
    if name not in KINDS and not is_outside(name):
        raise AutoSparseError(f"fit.scorer is {name!r}: {suggest(name, KINDS)}, or package.module:name")
    kind = load_outside(KINDS.get(name, name), "fit.scorer")
    require(isinstance(kind, ScorerKind), "fit.scorer", name, "it must be a ScorerKind")
    return kind


def build_network(kind: str, features: Sequence[str], outputs: int, options: Mapping[str, Any]) -> nn.Module:
    """An untrained network of a kind, see `ScorerKind.build`."""
    return kind_for(kind).build(features, outputs, options)
