"""Scores -> masks: scope, granularity, exact density. Knows no criterion."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autosparse.errors import AutoSparseError, require
from autosparse.masks.densities import Scope, apportion, check_scope, layer_densities
from autosparse.masks.granularity import NM, Channel, Granularity
from autosparse.masks.layers import Layer
from autosparse.masks.mask import MaskReport, Masks, all_finite, masked
from autosparse.masks.random import make_generator
from autosparse.masks.schedule import check_density


def select(
    scores: Mapping[str, Tensor],
    density: float,
    *,
    layers: Mapping[str, Layer],
    scope: Scope = "global",
    granularity: Granularity = None,
    floor: float = 0.0,
    within: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    coupled: Sequence[Sequence[str]] = (),
    dense: Sequence[str] = (),
) -> Masks:
    """Keep the highest scores: exactly `round(density·N)` weights.

    Args:
        scores: one float per prunable weight, higher = keep.
        density: fraction of all prunable weights kept, in (0, 1].
        layers: what the names are (for ERK, N:M, blocks and channels).
        scope: `"global"` ranks all weights together; a name of `DENSITIES`, such as `"erk"`, gives each layer its density;
            a mapping gives the densities themselves (scaled together, as far as layers have room, where they do not add
            up to `density`). Per-layer counts are rounded so that their sum is exact.
        granularity: `None` (single weights), `NM`, `Block` or `Channel`. Blocks and channels have their mean score, and
            the count kept is the nearest that whole ones allow. `NM` keeps the best n of every m along the input
            dimension (fewer where `within` leaves fewer) whatever the density; layers that m does not divide stay
            dense and are listed in the report.
        floor: smallest density of any layer, in [0, 1); at least one weight when it is positive, and whole units. N:M
            patterns have none.
        within: only these weights may be kept (what earlier steps left).
        seed: weights that tie at the cut are chosen by this seed, the same way every time.
        coupled: for channels: groups of layers of as many filters, such as those that add up to one residual stream.
            Filters i of a whole group are one unit, of their common mean score; a group has the budget of its layers.
        dense: for channels: layers whose filters all stay, such as classifiers, and with them what is coupled to them;
            listed in the report. The others are chosen so that the whole count is right.

    Raises:
        AutoSparseError: scores are not those of the layers, one is not finite, all are zero, or the density contradicts
            floor or dense layers; layers cannot be coupled.
    """
    check_density(density)
    check_scope(scope, layers)
    require(0 <= floor < 1, "floor", floor, "it is the smallest density of a layer, in [0, 1)")
    _check(scores, layers, within)
    if isinstance(granularity, NM):
        return _select_nm(scores, granularity, layers, within, seed)
    if isinstance(granularity, Channel) and (coupled or dense):
        return _select_coupled(scores, density, layers, scope, floor, within, seed, coupled, dense)
    if granularity is None and floor == 0:
        return _single_weights(scores, density, layers, scope, within, seed)
    units = {name: _units(s, layers[name], granularity) for name, s in scores.items()}
    allowed = None if within is None else {n: _units(within[n], layers[n], granularity)[0] > 0 for n in units}
    keys = {n: u[0] if allowed is None else u[0].masked_fill(~allowed[n], -math.inf) for n, u in units.items()}
    sizes = {n: layers[n].numel for n in scores}
    total = round(density * sum(sizes.values()))
    room = {n: _held(keys[n] > -math.inf, u[1]) for n, u in units.items()}
    if total > sum(room.values()):
        left = sum(room.values())
        raise AutoSparseError(
            f"density {density:g} keeps {total} weights, but only {left} are left to choose from: lower density"
        )
    generator = make_generator(seed, "ties")
    least = dict.fromkeys(sizes, 0)
    if floor > 0:
        keys, least = _raise_floor(keys, units, sizes, room, floor, generator)
        if sum(least.values()) > total:
            raise AutoSparseError(
                f"floor {floor} needs {sum(least.values())} weights in all, the density keeps {total}: lower floor"
            )
    groups = _shared_out(scope, density, layers, total, least, room)
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
        notes.append(f"whole {type(granularity).__name__.lower()}s keep {masks.kept} weights; {total} were asked for")
    masks.report = MaskReport(ties=tied / sum(u[0].numel() for u in units.values()), notes=tuple(notes))
    return masks


def _shared_out(
    scope: Scope,
    density: float,
    layers: Mapping[str, Layer],
    total: int,
    least: Mapping[str, int],
    room: Mapping[str, int],
) -> list[tuple[list[str], int]]:
    """The layers whose weights are ranked together, and how many weights they keep."""
    if scope == "global":
        return [(list(room), total)]
    sizes = {n: layers[n].numel for n in room}
    wanted = layer_densities(scope, layers, density)
    counts = apportion({n: wanted[n] * sizes[n] for n in sizes}, total, least, room)
    return [([n], c) for n, c in counts.items()]


def _single_weights(
    scores: Mapping[str, Tensor],
    density: float,
    layers: Mapping[str, Layer],
    scope: Scope,
    within: Mapping[str, Tensor] | None,
    seed: int,
) -> Masks:
    """`select` for single weights without a floor, by a few passes over the scores where they lie.

    Copies of all scores would take longer than the forward and backward pass that they come from.
    """
    flat = {n: _floating(s).flatten() for n, s in scores.items()}
    allowed = None if within is None else {n: within[n].to(flat[n].device).flatten() for n in flat}
    room = {n: s.numel() if allowed is None else int(allowed[n].count_nonzero()) for n, s in flat.items()}
    weights = sum(s.numel() for s in flat.values())
    total = round(density * weights)
    if total > sum(room.values()):
        left = sum(room.values())
        raise AutoSparseError(
            f"density {density:g} keeps {total} weights, but only {left} are left to choose from: lower density"
        )
    generator = make_generator(seed, "ties")
    tied, chosen = 0, {}
    for names, count in _shared_out(scope, density, layers, total, dict.fromkeys(room, 0), room):
        inside = None if allowed is None else [allowed[n] for n in names]
        kept, ties = _highest([flat[n] for n in names], inside, count, generator)
        tied += ties
        chosen.update({n: k.view(layers[n].shape) for n, k in zip(names, kept, strict=True)})
    masks = Masks({n: chosen[n] for n in scores}, {n: layers[n] for n in scores})
    masks.report = MaskReport(ties=tied / weights)
    return masks


def _highest(
    scores: Sequence[Tensor], allowed: Sequence[Tensor] | None, count: int, generator: torch.Generator
) -> tuple[list[Tensor], int]:
    """The `count` highest of several vectors, of those `allowed`, as booleans; and how many tie at the cut.

    A sample tells between which two scores the cut lies. What is above stays, and only what lies between is ranked.
    """
    if count == 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores], 0
    for low, high in (_bracket(scores, allowed, count), (-math.inf, math.inf)):
        above, places, values = [], [], []
        for i, s in enumerate(scores):
            over, within = s > high, s >= low
            if allowed is not None:
                over &= allowed[i]
                within &= allowed[i]
            place = within.logical_xor_(over).nonzero().flatten()
            above.append(over)
            places.append(place)
            values.append(s[place])
        need = count - sum(int(over.count_nonzero()) for over in above)
        between = torch.cat(values)
        if 0 < need <= between.numel():
            break
    cut = between.kthvalue(between.numel() - need + 1).values
    win, level = between > cut, (between == cut).nonzero().flatten()
    need -= int(win.count_nonzero())
    some = need < level.numel()
    win[level[torch.randperm(level.numel(), generator=generator)[:need].to(level.device)] if some else level] = True
    for over, place, won in zip(above, places, win.split([len(p) for p in places]), strict=True):
        over[place] = won
    return above, level.numel() if some else 0


_SAMPLE = 1 << 16


def _bracket(scores: Sequence[Tensor], allowed: Sequence[Tensor] | None, count: int) -> tuple[float, float]:
    """Two scores between which the one of rank `count` lies almost surely, by a sample; the extremes where there are few."""
    size = sum(s.numel() for s in scores)
    if size <= 4 * _SAMPLE:
        return -math.inf, math.inf
    stride = size // _SAMPLE | 1  # odd: along rows whose lengths are powers of two it meets all columns
    taken = [s[::stride] if allowed is None else s[::stride][allowed[i][::stride]] for i, s in enumerate(scores)]
    sample = torch.cat(taken).sort(descending=True).values
    at, margin = count / stride, 4 * math.sqrt(_SAMPLE)
    first, last = math.floor(at - margin), math.ceil(at + margin)
    high = float(sample[first]) if 0 <= first < len(sample) else math.inf
    low = float(sample[last]) if 0 <= last < len(sample) else -math.inf
    return low, high


def _select_coupled(
    scores: Mapping[str, Tensor],
    density: float,
    layers: Mapping[str, Layer],
    scope: str | Mapping[str, float],
    floor: float,
    within: Mapping[str, Tensor] | None,
    seed: int,
    coupled: Sequence[Sequence[str]],
    dense: Sequence[str],
) -> Masks:
    """Channels of each group as those of one layer, whose matrix has the filters of all members side by side."""
    stay = whole_layers(layers, density, coupled, dense)
    free = {n: members for n, members in _groups(layers, coupled).items() if n not in stay}
    chosen = {n: torch.ones_like(scores[n], dtype=torch.bool) if within is None else within[n].clone() for n in stay}
    held = sum(int(mask.sum()) for mask in chosen.values())
    total = round(density * sum(layer.numel for layer in layers.values()))
    ties = 0.0
    if free:
        inside = {name: layers[name] for members in free.values() for name in members}
        rest = (total - held) / sum(layer.numel for layer in inside.values()) if stay else density
        if scope not in ("global", "uniform"):
            scope = layer_densities(scope, inside, rest)

        def side_by_side(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: torch.cat([_matrix(tensors[m], layers[m]) for m in members], 1) for n, members in free.items()}

        joint = {n: Layer(n, "linear", tuple(s.shape)) for n, s in side_by_side(scores).items()}
        if isinstance(scope, Mapping):
            scope = {n: sum(scope[m] * layers[m].numel for m in free[n]) / layer.numel for n, layer in joint.items()}
        found = select(
            side_by_side(scores),
            rest,
            layers=joint,
            scope=scope,
            granularity=Channel(),
            floor=floor,
            within=None if within is None else side_by_side(within),
            seed=seed,
        )
        ties = found.report.ties
        for n, members in free.items():
            parts = found[n].split([layers[m].numel // joint[n].shape[0] for m in members], 1)
            chosen.update({m: _weights(part, layers[m]) for m, part in zip(members, parts, strict=True)})
    masks = Masks({n: chosen[n] for n in scores}, {n: layers[n] for n in scores})
    notes = (f"whole channels keep {masks.kept} weights; {total} were asked for",) if masks.kept != total else ()
    masks.report = MaskReport(ties=ties, dense_layers=stay, notes=notes)
    return masks


def whole_layers(
    layers: Mapping[str, Layer], density: float, coupled: Sequence[Sequence[str]], dense: Sequence[str]
) -> tuple[str, ...]:
    """The layers that keep all their channels: `dense` and what is coupled with them, see `select`.

    Raises:
        AutoSparseError: they hold so much that nothing of `density` is left for the others.
    """
    groups = [members for members in _groups(layers, coupled).values() if not {*dense}.isdisjoint(members)]
    stay = tuple(n for n in layers if any(n in members for members in groups))
    held, weights = (sum(layers[n].numel for n in names) for names in (stay, layers))
    total = round(density * weights)
    if stay and total < held + (held < weights):
        raise AutoSparseError(
            f"density {density:g} keeps {total} of {weights} weights, but {', '.join(map(repr, stay))}, which stay whole "
            f"because their channels are the model's outputs, hold {held}: keep more than {held / weights:.4g} or exclude them"
        )
    return stay


def _groups(layers: Mapping[str, Layer], coupled: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """All layers in groups, those coupled with nothing alone, by the name of their first member."""
    leader: dict[str, Sequence[str]] = {}
    for group in coupled:
        for name in group:
            require(name in layers, "coupled layer", name, "it is none of the layers")
            require(name not in leader, "coupled layer", name, "it may be in one group only")
            channels = [layers[n].shape[layers[n].out_dim] for n in (group[0], name)]
            require(channels[0] == channels[1], f"channels of {name!r}", channels[1], f"{group[0]!r} has {channels[0]}")
            leader[name] = group
    return {group[0]: tuple(group) for group in (leader.get(name, (name,)) for name in layers)}


def _matrix(tensor: Tensor, layer: Layer) -> Tensor:
    """One row per output."""
    return tensor.movedim(layer.out_dim, 0).flatten(1)


def _weights(matrix: Tensor, layer: Layer) -> Tensor:
    """The inverse of `_matrix`."""
    moved = [layer.shape[layer.out_dim], *(n for d, n in enumerate(layer.shape) if d != layer.out_dim)]
    return matrix.reshape(moved).movedim(0, layer.out_dim).contiguous()


def _check(scores: Mapping[str, Tensor], layers: Mapping[str, Layer], within: Mapping[str, Tensor] | None) -> None:
    """Scores must be those of the layers, finite, and not all zero where a choice is left."""
    if scores.keys() != layers.keys():
        name = min(scores.keys() ^ layers.keys())
        raise AutoSparseError(
            f"scores {'lack' if name in layers else 'name'} {name!r}: a criterion must score each of the "
            f"{len(layers)} layers and nothing else"
        )
    for name, score in scores.items():
        if tuple(score.shape) != layers[name].shape:
            raise AutoSparseError(
                f"scores of {name!r} have shape {tuple(score.shape)}: they must have the weight's, {layers[name].shape}"
            )
    some = False
    for name, score in scores.items():
        if not all_finite(score):
            bad = int((~torch.isfinite(score)).sum())
            raise AutoSparseError(
                f"{bad} of {score.numel()} scores of {name!r} are not finite: the weights or batches hold NaN or inf, "
                "or the criterion overflows (try float64 or fewer layers)"
            )
        some = some or bool((score if within is None else masked(score, within[name])).any())
    if not some and within is not None:
        raise AutoSparseError(
            "all weights that earlier steps left score zero: no path through the network is left; take more steps, set "
            "floor, or take another scope"
        )
    if not some:
        raise AutoSparseError(
            "all scores are zero: no gradient reaches the weights, as with a classifier initialized to zeros; "
            "initialize it, exclude what is zero, or take a criterion without gradients"
        )


def _floating(score: Tensor) -> Tensor:
    score = score.detach()
    return score if score.dtype == torch.float64 else score.float()


def _units(score: Tensor, layer: Layer, granularity: Granularity) -> tuple[Tensor, Tensor | None]:
    """Flat mean scores of what is kept or removed whole, and how many weights each holds (`None`: one)."""
    score = _floating(score)
    if granularity is None:
        flat = score.flatten()
        return flat, None
    matrix = _matrix(score, layer)
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
    rows = layer.shape[layer.out_dim]
    cols = layer.numel // max(rows, 1)
    height, width = (1, cols) if isinstance(granularity, Channel) else (granularity.height, granularity.width)  # type: ignore[union-attr]
    grid = kept.view(-(-rows // height), -(-cols // width))
    return _weights(grid.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :cols], layer)


def _held(kept: Tensor, sizes: Tensor | None) -> int:
    return int(kept.sum() if sizes is None else sizes[kept].sum())


def _top(
    flat: Tensor, sizes: Tensor | None, count: int, generator: torch.Generator, at_least: bool = False
) -> tuple[Tensor, int]:
    """Boolean choice of the highest entries that hold `count` weights, and how many entries tie at the cut.

    Where units of several weights cannot hold just `count`: the nearest, or (`at_least`) the next above. Entries of
    −inf are never chosen, those of +inf always.
    """
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if count <= 0 or flat.numel() == 0:
        return kept, 0
    available, forced = int((flat > -math.inf).sum()), int((flat == math.inf).sum())
    order = None
    if sizes is None:
        number = count
    elif int(sizes.min()) == int(sizes.max()):
        share = count / int(sizes[0])
        number = math.ceil(share) if at_least else round(share)
    else:  # units of several sizes: a prefix of the ranking, in which chance orders what ties
        shuffled = torch.randperm(flat.numel(), generator=generator).to(flat.device)
        order = shuffled[flat[shuffled].argsort(descending=True, stable=True)]
        held = sizes[order].cumsum(0)[:available].tolist()
        above = bisect.bisect_left(held, count)
        below = held[above - 1] if above else 0
        nearer = at_least or (above < len(held) and held[above] - count <= count - below)
        number = above + 1 if nearer else above
    number = min(max(number, forced), available)
    if number == 0:
        return kept, 0
    if order is not None:
        kept[order[:number]] = True
        at_cut = flat == flat[order[number - 1]]
        return kept, int(at_cut.sum()) if bool((at_cut & ~kept).any()) else 0
    cut = flat.kthvalue(flat.numel() - number + 1).values
    kept = flat > cut
    tied = (flat == cut).nonzero().flatten()
    need = number - int(kept.sum())
    if need < tied.numel():
        lucky = torch.randperm(tied.numel(), generator=generator)[:need].to(flat.device)
        kept[tied[lucky]] = True
        return kept, tied.numel()
    kept[tied] = True
    return kept, 0


def _raise_floor(
    keys: Mapping[str, Tensor],
    units: Mapping[str, tuple[Tensor, Tensor | None]],
    sizes: Mapping[str, int],
    room: Mapping[str, int],
    floor: float,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Put each layer's best `floor` share beyond competition; how many weights that is, in whole units."""
    raised, least = {}, {}
    for name, key in keys.items():
        count = min(math.ceil(floor * sizes[name]), room[name])
        best, _ = _top(key, units[name][1], count, generator, at_least=True)
        raised[name], least[name] = key.masked_fill(best, math.inf), _held(best, units[name][1])
    return raised, least


def _select_nm(
    scores: Mapping[str, Tensor],
    pattern: NM,
    layers: Mapping[str, Layer],
    within: Mapping[str, Tensor] | None,
    seed: int,
) -> Masks:
    generator = make_generator(seed, "ties")
    chosen, dense, tied, total = {}, [], 0, 0
    for name, score in scores.items():
        layer = layers[name]
        allowed = torch.ones_like(score, dtype=torch.bool) if within is None else within[name].to(score.device)
        total += score.numel()
        if layer.shape[layer.in_dim] % pattern.m:
            chosen[name] = allowed.clone()
            dense.append(name)
            continue
        moved = _floating(score).masked_fill(~allowed, -math.inf).movedim(layer.in_dim, -1)
        groups = moved.reshape(-1, pattern.m)
        shuffled = torch.rand(groups.shape, generator=generator).argsort(dim=1).to(groups.device)  # chance orders ties
        ranking = shuffled.gather(1, groups.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, ranking[:, : pattern.n], True)
        kept &= groups > -math.inf
        cut = groups.gather(1, ranking[:, pattern.n - 1 : pattern.n])
        at_cut = (groups == cut) & (cut > -math.inf)
        tied += int((at_cut & (at_cut & ~kept).any(1, keepdim=True)).sum())
        chosen[name] = kept.view(moved.shape).movedim(-1, layer.in_dim).contiguous()
    if len(dense) == len(chosen):
        raise AutoSparseError(f"pattern {pattern.n}:{pattern.m} fits no layer: M must divide the input channels of one")
    masks = Masks(chosen, {n: layers[n] for n in scores})
    masks.report = MaskReport(ties=tied / total, dense_layers=tuple(dense))
    return masks
