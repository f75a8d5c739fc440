"""The card of a scorer: what it was fitted on, and how it ranks records that it never saw. Written by `fit`, read by the report.

Plain text and numbers, so that a report can read it without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autosparse.errors import AutoSparseError

PARTS = ("fit", "validation", "test")
OWN = "scorer"  # the scorer's own figures in `Card.test`, beside those of the rivals by their names
FIGURES = {
    "auc": "AUC for 'in the last ticket', over the whole network",
    "auc_within_layers": "the same within layers, mean over pairs",
    "auc_within_magnitude_bins": "the same within bins of equal layer and nearly equal |θ₀|, where 0.5 is chance",
    "overlap": "share of the ticket's weights that a mask of the same size keeps",
    "overlap_within_layers": "the same with the ticket's own layer densities",
    "density_error": "share of the kept weights that lie in the wrong layer: ½·Σ_l |k_l − k_l*| / k",
}


@dataclass(frozen=True)
class Card:
    """What is known of a scorer; a field that does not apply has its default.

    `records`: name, sha256 and part of each: `"fit"` (it learned from them), `"validation"` (they chose its epoch) or `"test"` (they tested it).
    `weights`: of the records that it learned from. `epoch`: the one that was kept, of `history`. `test`: means over the
    test records of `FIGURES`, of the scorer (`OWN`) and of the rivals by name. `outcome`: of `autosparse tune`.
    """

    name: str = ""
    summary: str = ""
    scorer: str = ""
    head: str = ""
    features: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    corpus: str = ""
    records: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()
    weights: int = 0
    parameters: int = 0
    seconds: float = 0.0
    epoch: int = 0
    history: Sequence[Mapping[str, float]] = ()
    test: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    outcome: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            wanted = _KINDS[str(one.type).partition("[")[0]]
            if not isinstance(value, wanted) or (isinstance(value, str) and str not in wanted):
                raise AutoSparseError(f"scorer card is damaged: its {one.name} is {value!r}; fit the scorer again")

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def part(self, name: str) -> list[str]:
        """Names of the records of one of `PARTS`."""
        return [row["name"] for row in self.records if row["part"] == name]


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "Sequence": (Sequence,),
    "Mapping": (Mapping,),
}


def read_card(values: Mapping[str, Any]) -> Card:
    """The card of a `scorer.json` or of a scorer's file.

    Raises:
        AutoSparseError: a field is unknown or of another kind.
    """
    unknown = sorted(set(values) - {one.name for one in dataclasses.fields(Card)})
    if unknown:
        raise AutoSparseError(
            f"scorer card has the unknown field {unknown[0]!r}: it is of another version; fit the scorer again"
        )
    return Card(**values)
