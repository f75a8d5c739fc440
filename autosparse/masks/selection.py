"""Scores -> masks: scope, granularity, exact density. Knows no criterion."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autosparse.errors import AutoSparseError, require
from autosparse.masks.layers import Layer
from autosparse.masks.mask import MaskReport, Masks
from autosparse.masks.schedule import check_density

SCOPES = ("global", "uniform", "erk")


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
    """Output filters, kept or removed whole by their mean score."""


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


def erk_densities(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """Erdős–Rényi-kernel densities `d_l = ε·(n_in + n_out + k_h + k_w)/(n_in·n_out·k_h·k_w)`.

    ε is solved so that `Σ d_l·N_l = density·Σ N_l`; layers with `d_l > 1` are dense and ε is solved again.
    Source: Evci et al. 2020 (RigL), after Mocanu et al. 2018.
    """
    check_density(density)
    raw = {name: sum(layer.shape) / layer.numel for name, layer in layers.items()}
    dense: set[str] = set()
    while True:
        free = [name for name in layers if name not in dense]
        budget = density * sum(layer.numel for layer in layers.values()) - sum(layers[n].numel for n in dense)
        if not free:
            return dict.fromkeys(layers, 1.0)
        epsilon = budget / sum(raw[n] * layers[n].numel for n in free)
        over = {n for n in free if epsilon * raw[n] > 1}
        if not over:
            return {n: 1.0 if n in dense else epsilon * raw[n] for n in layers}
        dense |= over


def apportion(densities: Mapping[str, float], room: Mapping[str, int], sizes: Mapping[str, int], total: int) -> dict:
    """Whole counts near `densities·sizes`, none above `room`, that sum exactly to `total` (largest remainders first)."""
    ideal = {n: min(densities[n] * sizes[n], room[n]) for n in sizes}
    counts = {n: math.floor(ideal[n] + 1e-9) for n in sizes}
    left = total - sum(counts.values())
    while left != 0:
        step = 1 if left > 0 else -1
        movable = [n for n in sizes if (counts[n] < room[n] if step > 0 else counts[n] > 0)]
        movable.sort(key=lambda n: -step * (ideal[n] - counts[n]))
        if not movable:
            raise AutoSparseError(f"{total} weights cannot be kept: only {sum(room.values())} are left to choose from")
        for name in movable[: abs(left)]:
            counts[name] += step
        left = total - sum(counts.values())
    return counts


def select(
    scores: Mapping[str, Tensor],
    density: float,
    *,
    layers: Mapping[str, Layer],
    scope: str = "global",
    granularity: Granularity = None,
    floor: float = 0.0,
    within: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Masks:
    """Keep the highest scores: exactly `round(density·N)` weights.

    Args:
        scores: one float per prunable weight, higher = keep.
        density: fraction of all prunable weights kept, in (0, 1].
        layers: what the names are (for ERK, N:M, blocks and channels).
        scope: `"global"` ranks all weights together; `"uniform"` keeps the same fraction of every layer; `"erk"` the
            Erdős–Rényi-kernel densities. Per-layer counts are rounded so that their sum is exact.
        granularity: `None` (single weights), `NM`, `Block` or `Channel`. Blocks and channels have their mean score, and
            the count kept is the nearest that whole ones allow. `NM` keeps the best n of every m along the input
            dimension whatever the density; layers that m does not divide stay dense and are listed in the report.
        floor: smallest density of any layer, in [0, 1); at least one weight when it is positive.
        within: only these weights may be kept (what earlier steps left).
        seed: weights that tie at the cut are chosen by this seed, the same way every time.

    Raises:
        AutoSparseError: a score is not finite, all are zero, or floor and density contradict each other.
    """
    check_density(density)
    require(scope in SCOPES, "scope", scope, f"known are {', '.join(SCOPES)}")
    require(0 <= floor < 1, "floor", floor, "it is the smallest density of a layer, in [0, 1)")
    _check(scores, within)
    if isinstance(granularity, NM):
        return _select_nm(scores, granularity, layers, within)
    units = {name: _units(s, layers[name], granularity) for name, s in scores.items()}
    allowed = None if within is None else {n: _units(within[n], layers[n], granularity)[0] > 0 for n in units}
    keys = {n: u[0] if allowed is None else u[0].masked_fill(~allowed[n], -math.inf) for n, u in units.items()}
    sizes = {n: layers[n].numel for n in scores}
    total = round(density * sum(sizes.values()))
    room = {n: _held(keys[n] > -math.inf, u[1]) for n, u in units.items()}
    if total > sum(room.values()):
        raise AutoSparseError(f"{total} weights cannot be kept: earlier steps left only {sum(room.values())}")
    generator = torch.Generator().manual_seed(seed)
    if scope == "global":
        groups = [(list(scores), total)]
    else:
        wanted = erk_densities(layers, density) if scope == "erk" else dict.fromkeys(sizes, density)
        wanted = {n: max(d, floor) for n, d in wanted.items()}
        groups = [([n], c) for n, c in apportion(wanted, room, sizes, total).items()]
    if scope == "global" and floor > 0:
        keys = _raise_floor(keys, units, sizes, room, floor, total, generator)
    tied, chosen = 0, {}
    for names, count in groups:
        flat = torch.cat([keys[n] for n in names])
        held = [s for n in names if (s := units[n][1]) is not None]
        kept, ties = _top(flat, torch.cat(held) if held else None, count, generator)
        tied += ties
        for n, part in zip(names, kept.split([keys[n].numel() for n in names]), strict=True):
            chosen[n] = _expand(part, layers[n], granularity)
    masks = Masks({n: chosen[n] for n in scores}, {n: layers[n] for n in scores})
    notes = []
    if granularity is not None and masks.kept != total:
        notes.append(f"whole {type(granularity).__name__.lower()}s keep {masks.kept} weights, {total} were asked")
    masks.report = MaskReport(ties=tied / sum(u[0].numel() for u in units.values()), notes=tuple(notes))
    return masks


def _check(scores: Mapping[str, Tensor], within: Mapping[str, Tensor] | None) -> None:
    """Scores must be finite and not all zero where a choice is left."""
    some = False
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            bad = int((~torch.isfinite(score)).sum())
            raise AutoSparseError(
                f"{bad} of {score.numel()} scores of {name!r} are not finite: the weights or batches hold NaN or inf, "
                "or the criterion overflows (try float64 or fewer layers)"
            )
        some = some or bool((score if within is None else score[within[name]]).any())
    if not some:
        raise AutoSparseError(
            "all scores are zero: no gradient reaches the weights, as with a classifier initialized to zeros; "
            "initialize it, exclude what is zero, or take a criterion without gradients"
        )


def _units(score: Tensor, layer: Layer, granularity: Granularity) -> tuple[Tensor, Tensor | None]:
    """Flat mean scores of what is kept or removed whole, and how many weights each holds (`None`: one)."""
    score = score.detach()
    score = score if score.dtype == torch.float64 else score.float()
    if granularity is None:
        flat = score.flatten()
        return flat, None
    matrix = score.movedim(layer.out_dim, 0).flatten(1)
    rows, cols = matrix.shape
    height, width = (1, cols) if isinstance(granularity, Channel) else (granularity.height, granularity.width)  # type: ignore[union-attr]
    padding = (0, -cols % width, 0, -rows % height)

    def tile(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, padding)
        tiles = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width))
        return tiles.sum((1, 3)).flatten()

    counts = tile(torch.ones_like(matrix))
    return tile(matrix) / counts, counts.long()


def _expand(kept: Tensor, layer: Layer, granularity: Granularity) -> Tensor:
    """Flat units as a mask of the layer's shape."""
    if granularity is None:
        return kept.view(layer.shape)
    moved = [layer.shape[layer.out_dim], *(n for d, n in enumerate(layer.shape) if d != layer.out_dim)]
    rows, cols = moved[0], math.prod(moved[1:])
    height, width = (1, cols) if isinstance(granularity, Channel) else (granularity.height, granularity.width)  # type: ignore[union-attr]
    grid = kept.view(-(-rows // height), -(-cols // width))
    matrix = grid.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :cols]
    return matrix.reshape(moved).movedim(0, layer.out_dim).contiguous()


def _held(kept: Tensor, sizes: Tensor | None) -> int:
    return int(kept.sum() if sizes is None else sizes[kept].sum())


def _top(flat: Tensor, sizes: Tensor | None, count: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Boolean choice of the highest entries that hold `count` weights, and how many entries tie at the cut."""
    if count <= 0 or flat.numel() == 0:
        return torch.zeros_like(flat, dtype=torch.bool), 0
    available = int((flat > -math.inf).sum())
    if sizes is None:
        number = min(count, available)
    elif int(sizes.min()) == int(sizes.max()):
        number = min(round(count / int(sizes[0])), available)
    else:  # units of several sizes: the prefix of the ranking whose weight count is nearest
        order = flat.argsort(descending=True, stable=True)
        held = sizes[order].cumsum(0)[:available]
        number = int((held - count).abs().argmin()) + 1
        if count < int(held[0]) / 2:
            number = 0
    if number == 0:
        return torch.zeros_like(flat, dtype=torch.bool), 0
    cut = flat.kthvalue(flat.numel() - number + 1).values
    kept = flat > cut
    at_cut = (flat == cut).nonzero().flatten()
    need = number - int(kept.sum())
    if need < at_cut.numel():
        lucky = torch.randperm(at_cut.numel(), generator=generator)[:need].to(flat.device)
        kept[at_cut[lucky]] = True
        return kept, at_cut.numel()
    kept[at_cut] = True
    return kept, 0


def _raise_floor(
    keys: dict[str, Tensor],
    units: Mapping[str, tuple[Tensor, Tensor | None]],
    sizes: Mapping[str, int],
    room: Mapping[str, int],
    floor: float,
    total: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Put each layer's best `floor` share beyond competition."""
    least = {n: min(math.ceil(floor * size), room[n]) for n, size in sizes.items()}
    if sum(least.values()) > total:
        raise AutoSparseError(
            f"floor {floor} asks for {sum(least.values())} weights over all layers, the density keeps {total}: lower it"
        )
    raised = {}
    for name, key in keys.items():
        best, _ = _top(key, units[name][1], least[name], generator)
        raised[name] = key.masked_fill(best, math.inf)
    return raised


def _select_nm(
    scores: Mapping[str, Tensor], pattern: NM, layers: Mapping[str, Layer], within: Mapping[str, Tensor] | None
) -> Masks:
    chosen, dense = {}, []
    for name, score in scores.items():
        layer = layers[name]
        if layer.shape[layer.in_dim] % pattern.m:
            chosen[name] = torch.ones_like(score, dtype=torch.bool)
            dense.append(name)
            continue
        key = score.detach() if within is None else score.detach().masked_fill(~within[name], -math.inf)
        moved = key.movedim(layer.in_dim, -1)
        groups = moved.reshape(-1, pattern.m)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
        chosen[name] = kept.view(moved.shape).movedim(-1, layer.in_dim).contiguous()
    if len(dense) == len(chosen):
        raise AutoSparseError(f"pattern {pattern.n}:{pattern.m} fits no layer: M must divide the input channels of one")
    masks = Masks(chosen, {n: layers[n] for n in scores})
    masks.report = MaskReport(dense_layers=tuple(dense))
    return masks
