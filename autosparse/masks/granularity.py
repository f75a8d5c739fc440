"""In which pattern weights are kept: alone, N of every M, in blocks, in whole channels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autosparse.errors import AutoSparseError, require


@dataclass(frozen=True)
class NM:
    """At most `n` of every `m` weights along the input dimension (2:4 is what sparse tensor cores run)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        require(0 < self.n < self.m, "N:M pattern", f"{self.n}:{self.m}", "N must be at least 1 and under M")


@dataclass(frozen=True)
class Block:
    """Tiles of `height × width` of the `(out, in·k)` matrix, kept or removed whole by their mean score."""

    height: int
    width: int

    def __post_init__(self) -> None:
        require(
            min(self.height, self.width) >= 1, "block", f"{self.height}x{self.width}", "both sides must be at least 1"
        )


@dataclass(frozen=True)
class Channel:
    """Output filters, kept or removed whole by their mean score; coupled ones together."""


Granularity = NM | Block | Channel | None


def parse_granularity(text: str | Granularity) -> Granularity:
    """`"unstructured"`, `"2:4"`, `"block4x4"`, `"channel"` as a choice; choices pass through.

    >>> parse_granularity("2:4")
    NM(n=2, m=4)
    """
    if not isinstance(text, str):
        return text
    if text == "unstructured":
        return None
    if text == "channel":
        return Channel()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"block(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    raise AutoSparseError(f"granularity is {text!r}: use unstructured, N:M such as 2:4, blockHxW or channel")
