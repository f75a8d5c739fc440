"""Orthogonal weights for sparse networks: exact, on positions of their own choice, or approximate, under a mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import require
from autosparse.masks.layers import Layer, check_real, check_values, prunable_layers, unwrap
from autosparse.masks.mask import MaskReport, Masks
from autosparse.masks.random import make_generator
from autosparse.network.graph import Operation, trace
from autosparse.network.lipschitz import Pair, estimate, pairs, spectral_norm
from autosparse.network.used import refuse_recomputed
from autosparse.pruning.prune import describe
from autosparse.trainability.preparation import Preparation, PreparedLayer

_PATIENCE = 32  # rounds in which no pair may be rotated, after which the rest of the density is left to zeros


def eoi(model: nn.Module, masks: Masks | None, example_input: Any, *, seed: int = 0, gain: float = 1.0) -> Preparation:
    """Exact orthogonal sparse initialization: new positions at the layer densities of `masks`, and weights for them.

    Every weight matrix (of a convolution: the one at the kernel's centre; all other taps start at 0) becomes `gain` × a
    matrix with orthonormal rows or columns, whichever are fewer: see `orthogonal_kernel`. Each group of a convolution
    and each projection of an `in_proj_weight` has a matrix of its own. A convolution whose windows do not overlap
    (stride ≥ kernel: 1×1, patches) is one matrix over the whole window. One with a stride under its kernel is
    orthogonal on the positions that its centre reads.

    Every layer keeps exactly as many weights as in `masks` (`None`: all). Those that orthogonality leaves over are
    *unfrozen zeros*: they belong to the mask, start at 0 and train. A matrix of r rows and c columns needs min(r, c)
    weights, a density of 1/max(r, c); a layer that keeps fewer becomes a partial isometry, with as many singular values
    as it has weights, which its note says.

    Biases and norm layers stay as they are, as do weights that the masks do not name. A norm layer sets the scale of
    what it takes anyway; of orthogonality the directions remain. `gain` 1 suits tanh and linear networks, √2 ReLU. A
    second call with the same seed, with these masks or with the returned ones, changes nothing.

    Raises:
        AutoSparseError: `gain` is not positive, the masks are another model's, or it cannot take `example_input`.

    Source: Nowak et al. 2024, "Sparser, Better, Deeper, Stronger: Improving Static Sparse Training with Exact
    Orthogonal Initialization". Ours are: counts met from below and filled up with unfrozen zeros, where the paper takes
    the nearer of two rotations; rotations in rounds of disjoint pairs.

    >>> import torch, autosparse
    >>> from autosparse.trainability.orthogonal import eoi
    >>> layer = torch.nn.Linear(8, 4, bias=False)
    >>> masks = autosparse.prune(layer, 0.5, "random", example_input=torch.ones(1, 8))
    >>> masks = eoi(layer, masks, torch.ones(1, 8)).masks
    >>> masks.kept, torch.allclose(layer.weight @ layer.weight.T, torch.eye(4), atol=1e-6)
    (16, True)
    """
    generator = make_generator(seed, "orthogonal")
    targets, tensors, done = _targets(model, masks, example_input, gain), {}, []
    for target in targets:
        blocks, rows, columns, taps = target.places.shape
        kept, least = int(target.mask.sum()), blocks * min(rows, columns)
        before = target.lipschitz()
        values, bits = orthogonal_kernel((blocks, rows, columns, taps), target.centre, kept, generator)
        _put(target.weight, target.places, gain * values)
        tensors[target.layer.name] = torch.empty_like(target.mask)
        _put(tensors[target.layer.name], target.places, bits)
        if kept < least:
            form = "a partial isometry" if kept else "empty"
            note = f"{form}: it keeps {kept} weights and needs {least} to be orthogonal"
        else:
            note = f"orthogonal; {kept - int(values.count_nonzero())} of its {kept} weights start at 0"
        done.append(target.prepared(before, note))
    origin = {**(masks.report.origin if masks is not None else {}), "prepared": "eoi", "eoi_seed": int(seed)}
    chosen = Masks(tensors, {t.layer.name: t.layer for t in targets}, MaskReport(origin=origin))
    return Preparation("eoi", describe(unwrap(model), chosen, example_input), tuple(done))


def isometry(
    model: nn.Module, masks: Masks | None, example_input: Any, *, gain: float = 1.0, steps: int = 50
) -> Preparation:
    """Approximate isometry by optimization: the masks stay, and the weights that they keep come near to orthogonal.

    Layer by layer, from the weights that are there, at most `steps` iterations on

        min over W of ‖(W⊙m)ᵀ(W⊙m) − I‖²_F        (W Wᵀ where W has fewer rows than columns)

    with `W` of shape (out, in·k_h·k_w), of a transposed convolution (in, out·k_h·k_w); a matrix for each group and each
    projection of an `in_proj_weight`. Then they are multiplied by `gain`. The note of a layer gives `isometry_error`
    before and after: 0 at isometry, 1 for an empty layer; many sparse masks allow no 0. Biases and norm layers stay as
    they are. An iteration costs about three products of `W` with its transpose.

    Raises:
        AutoSparseError: as `eoi`; `steps` is under 1.

    Source: Lee et al. 2020, "A Signal Propagation Perspective for Pruning Neural Networks at Initialization"; the
    optimizer (L-BFGS) is ours.
    """
    require(steps >= 1, "steps", steps, "give at least 1")

    targets, done = _targets(model, masks, example_input, gain), []
    for target in targets:
        before = target.lipschitz()
        places = _rows_with_taps(target.places) if target.transposed else target.places.flatten(2)
        places = places.to(target.weight.device)
        given = target.weight.detach().flatten()[places].float() / gain
        found = nearest_isometry(given, target.mask.to(places.device).flatten()[places], steps)
        _put(target.weight, places, gain * found)
        note = f"isometry error {isometry_error(given):.3g} before, {isometry_error(found):.3g} after"
        done.append(target.prepared(before, note))
    given_masks = masks or Masks({t.layer.name: t.mask for t in targets}, {t.layer.name: t.layer for t in targets})
    return Preparation("isometry", given_masks, tuple(done))


def sparse_orthogonal(rows: int, columns: int, kept: int, generator: torch.Generator) -> Tensor:
    """A matrix of at most `kept` nonzeros with orthonormal rows or columns, whichever are fewer; float64.

    Starts from the rectangular identity. Random disjoint pairs of its rows (of a wide matrix: columns) are turned by
    random angles (Givens rotations): `WᵀW = I` holds, and both get the union of their supports. A pair that would go
    past `kept` is left; it ends at `kept`, or where no pair that fits is found. With `kept` under `min(rows, columns)`
    only the first `kept` ones of the identity stand.
    """
    long, short = max(rows, columns), min(rows, columns)
    w = torch.eye(long, short, dtype=torch.float64)
    w[kept:] = 0
    sizes = w.count_nonzero(1)
    room, idle = kept - short, 0
    while room > 0 and idle < _PATIENCE:
        order = torch.randperm(long, generator=generator)
        first, second = order[: long // 2], order[long // 2 : 2 * (long // 2)]
        union = ((w[first] != 0) | (w[second] != 0)).sum(1)
        chosen = []
        for pair, grown in enumerate((2 * union - sizes[first] - sizes[second]).tolist()):
            if 0 < grown <= room:
                chosen.append(pair)
                room -= grown
        idle = 0 if chosen else idle + 1
        a, b = first[chosen], second[chosen]
        angle = 2 * math.pi * torch.rand(len(chosen), 1, dtype=torch.float64, generator=generator)
        upper, lower = w[a], w[b]
        w[a], w[b] = angle.cos() * upper - angle.sin() * lower, angle.sin() * upper + angle.cos() * lower
        sizes[a], sizes[b] = w[a].count_nonzero(1), w[b].count_nonzero(1)
        room = kept - int(sizes.sum())  # more than foreseen where values cancelled
    return w if rows >= columns else w.T


def orthogonal_kernel(
    shape: tuple[int, int, int, int], centre: int, kept: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Values (float64) and mask of `kept` weights of `shape` = (blocks, rows, columns, taps), orthogonal at one tap.

    With d the density, each block has at its tap `centre` a `sparse_orthogonal` matrix of density `min(taps·d, 1, √d)`,
    or as much more as orthogonality takes, where there are enough weights; what is left are unfrozen zeros at
    random places of all taps. Under one weight per row or column the first blocks and entries have them.
    """
    blocks, rows, columns, taps = shape
    size = blocks * rows * columns
    density = kept / max(size * taps, 1)
    wanted = max(round(min(taps * density, 1.0, math.sqrt(density)) * size), blocks * min(rows, columns))
    share, more = divmod(min(kept, wanted), max(blocks, 1))
    values = torch.zeros(shape, dtype=torch.float64)
    for block in range(blocks):
        values[block, :, :, centre] = sparse_orthogonal(rows, columns, share + (block < more), generator)
    mask = values != 0
    zeros = (~mask).flatten().nonzero().squeeze(1)
    unfrozen = torch.randperm(len(zeros), generator=generator)[: kept - int(mask.sum())]
    mask.view(-1)[zeros[unfrozen]] = True
    return values, mask


def nearest_isometry(matrices: Tensor, kept: Tensor, steps: int) -> Tensor:
    """`matrices` (blocks, rows, columns) moved to a local minimum of `Σ ‖WᵀW − I‖²_F` (on the smaller side) under the
    mask `kept`; at most `steps` iterations of L-BFGS. Never worse than what is given."""
    given = matrices.masked_fill(~kept, 0)
    gram = _gram(given)
    size = float(gram.square().sum())
    if size == 0 or not math.isfinite(size):
        return given
    # c² = tr G / ‖G‖² minimises ‖c²G − I‖², so that the search begins at the right scale
    start = given * math.sqrt(float(gram.diagonal(dim1=1, dim2=2).sum()) / size)
    values = start[kept].requires_grad_()
    optimizer = torch.optim.LBFGS([values], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")
    identity = torch.eye(gram.shape[-1], device=gram.device)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = (_gram(torch.zeros_like(start).masked_scatter(kept, values)) - identity).square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    return min((torch.zeros_like(start).masked_scatter(kept, values.detach()), start, given), key=isometry_error)


def isometry_error(matrices: Tensor) -> float:
    """`√(Σ ‖WᵀW − I‖²_F / Σ n)` of `matrices` (blocks, rows, columns), n their smaller side; infinite if not finite."""
    gram = _gram(matrices)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    error = math.sqrt(float((gram - identity).square().sum()) / max(gram.shape[0] * gram.shape[-1], 1))
    return error if math.isfinite(error) else math.inf


def _gram(matrices: Tensor) -> Tensor:
    small = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    return small @ small.mT


@dataclass(frozen=True)
class _Target:
    """A weight as matrices: `places` (blocks, rows, columns, taps) are positions in the flattened weight, rows its
    outputs and columns its inputs; the taps of a convolution belong to the inputs, if `transposed` to the outputs."""

    layer: Layer
    weight: nn.Parameter
    mask: Tensor
    places: Tensor
    centre: int
    transposed: bool
    pair: Pair
    gamma: nn.Parameter | None

    def lipschitz(self) -> float:
        weight = self.weight.detach().to("cpu", torch.float64)
        gamma = None if self.gamma is None else self.gamma.detach()
        return estimate(weight, spectral_norm(weight, self.layer), self.layer, self.pair, gamma)

    def prepared(self, before: float, note: str) -> PreparedLayer:
        return PreparedLayer(self.layer.name, self.pair.norm, before, self.lipschitz(), note)


def _targets(model: nn.Module, masks: Masks | None, example_input: Any, gain: float) -> list[_Target]:
    """The weights as matrices, with the masks (`None`: all ones), which are applied."""
    require(gain > 0 and math.isfinite(gain), "gain", gain, "give a positive number, such as 1, or √2 before a ReLU")
    model = unwrap(model)
    graph = trace(model, example_input)
    layers = prunable_layers(model, operands=graph.operands)
    check_values(model)
    check_real(model, layers, "a preparation")
    refuse_recomputed(model, graph, layers if masks is None else masks)
    if masks is not None:
        masks.apply_(model)
    parameters = dict(model.named_parameters())
    norms = pairs(graph, layers, parameters)
    uses = {name: op for op in reversed(graph.operations) for name in op.weights}
    targets = []
    for name in layers if masks is None else masks:
        require(name in layers, "mask", name, f"no prunable weight of {type(model).__name__}; leave it out")
        layer, use, pair = layers[name], uses.get(name), norms[name]
        mask = torch.ones(layer.shape, dtype=torch.bool) if masks is None else masks[name]
        places, centre = _places(layer, use)
        gamma = None if pair.gamma is None else parameters[pair.gamma]
        transposed = _transposed(layer, use)
        targets.append(_Target(layer, parameters[name], mask, places, centre, transposed, pair, gamma))
    return targets


def _places(layer: Layer, use: Operation | None) -> tuple[Tensor, int]:
    """Positions as matrices (blocks, rows, columns, taps), and the tap at the kernel's centre."""
    rest = [d for d in range(len(layer.shape)) if d not in (layer.out_dim, layer.in_dim)]
    places = torch.arange(layer.numel).view(layer.shape).permute(layer.out_dim, layer.in_dim, *rest)
    places = places.flatten(2) if rest else places.unsqueeze(2)
    if not _convolves(layer, use):
        stacked = 3 if layer.name.endswith("in_proj_weight") and layer.shape[0] == 3 * layer.shape[1] else 1
        return places.unflatten(0, (stacked, -1)).permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(3), 0
    grouped = 0 if layer.out_dim == 0 else 1
    places = places.unflatten(grouped, (layer.groups, -1)).movedim(grouped, 0)
    if use is not None and all(s >= k for s, k in zip(use.stride, layer.kernel, strict=True)):
        return (_rows_with_taps(places) if _transposed(layer, use) else places.flatten(2)).unsqueeze(3), 0
    centre = 0
    for k in layer.kernel:
        centre = centre * k + k // 2
    return places, centre


def _convolves(layer: Layer, use: Operation | None) -> bool:
    return layer.kind.startswith("conv") or (use is not None and use.kind.startswith("conv"))


def _transposed(layer: Layer, use: Operation | None) -> bool:
    return _convolves(layer, use) and layer.out_dim == 1


def _rows_with_taps(places: Tensor) -> Tensor:
    """(blocks, rows, columns, taps) as matrices (blocks, taps·rows, columns)."""
    return places.movedim(3, 1).flatten(1, 2)


def _put(into: Tensor, places: Tensor, values: Tensor) -> None:
    """Write `values` at `places` of the flattened `into`, which together are all of it."""
    flat = torch.empty(into.numel(), dtype=into.dtype, device=into.device)
    flat[places.flatten().to(into.device)] = values.flatten().to(flat)
    with torch.no_grad():
        into.copy_(flat.view(into.shape))
