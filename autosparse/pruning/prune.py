"""`prune`: criterion × schedule × scope × granularity."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import nn

from autosparse.errors import AutoSparseError, require, warn
from autosparse.masks.densities import DENSITIES, Scope, layer_densities
from autosparse.masks.granularity import NM, Channel, Granularity, parse_granularity
from autosparse.masks.layers import Layer, check_model, check_real, check_values, prunable_layers, unwrap
from autosparse.masks.mask import Masks
from autosparse.masks.random import derive
from autosparse.masks.schedule import check_sparsity, densities
from autosparse.masks.selection import select, whole_layers
from autosparse.network.coupling import coupled_filters
from autosparse.network.graph import Graph, trace
from autosparse.network.linearize import Traced
from autosparse.network.reachability import effective_masks, reachability
from autosparse.network.running import Batch, Loss, take_batches
from autosparse.network.signals import FIXED, FROM_BATCHES, Signals, images_seen, measure
from autosparse.network.used import check_used, fused
from autosparse.pruning.criteria import Context, Criterion, HandMade, Preset, preset_for, random


def prune(
    model: nn.Module,
    sparsity: float | None = None,
    criterion: str | Criterion | Preset | None = None,
    *,
    batches: Iterable[Batch] | None = None,
    n_batches: int | None = None,
    example_input: Any = None,
    scope: Scope | None = None,
    granularity: str | Granularity = None,
    channels: float | None = None,
    steps: int | None = None,
    schedule: str | None = None,
    loss: Loss | None = None,
    signals: Signals | None = None,
    seed: int = 0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    floor: float = 0.0,
    shuffled: bool = False,
) -> Masks:
    """`autosparse.prune`, which takes the names of scorers too and has the arguments explained.

    `shuffled`: positions are then drawn anew within each layer."""
    require(
        isinstance(model, nn.Module), "model", type(model).__name__, "give a torch.nn.Module, not its class or state"
    )
    model, seed = fused(unwrap(model)), int(seed)
    pattern = parse_granularity(granularity)
    preset = _preset(
        default_criterion(pattern, example_input is not None or batches is not None) if criterion is None else criterion
    )
    given = sparsity is None and isinstance(scope, Mapping)  # then the layer densities say it
    density = 1.0 if given else density_for(sparsity, pattern)
    rule = preset.criterion
    steps = preset.steps if steps is None else steps
    others: dict[str, Any] = {"loss": loss, "seed": seed, "include": include, "exclude": exclude}
    asked = 1 - density if sparsity is None else sparsity
    scope, spent, batches = _scope(
        model, asked, scope or preset.scope, batches, {**others, "floor": floor, "example_input": example_input}
    )
    check_model(model)
    check_values(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    taken, wanted = _batches(preset, batches, n_batches, device, seed)
    example = example_input if example_input is not None else (taken[0][0] if taken else None)
    layers, graph, traced = _traced(model, example, rule, include, exclude)
    if isinstance(scope, Mapping) and given:
        density = _mean_density(scope, layers)
    path = densities(density, steps, schedule or preset.schedule)
    coupled, dense = _coupled(model, layers, path[-1], pattern, graph, traced)
    used = taken[:wanted]
    known = {name: values for name, values in (signals or {}).items() if name in rule.signals}
    changing = [name for name in rule.signals if name not in (*FIXED, *known)]
    fixed = measure(model, layers, [n for n in rule.signals if n in FIXED and n not in known], example_input=traced)
    share = _share(channels, preset, layers, path[-1], granularity if pattern is not None else None)
    room = None if share == 1 else _room(model, layers, share, path[-1], graph, traced, seed)
    masks = room
    measured = 0
    for target in path:
        if measured and masks is not None and graph is not None:
            check_used(model, masks, graph, example)
        shape = _pattern(pattern, target)
        if shape is False or (room is not None and target != path[-1] and target >= room.kept / room.total):
            continue
        measured += 1
        drawn = seed if measured == 1 else derive(seed, "step", measured)
        found = measure(model, layers, changing, batches=used, example_input=traced, masks=masks, loss=loss, seed=drawn)
        other, images = _densities_of(
            model, rule, target, layers, {**others, "batches": taken or None, "example_input": example}
        )
        spent += images
        scores = rule({**known, **fixed, **found}, Context(layers, target, graph, masks, seed, other))
        how: dict[str, Any] = {"scope": scope, "granularity": shape, "floor": floor, "coupled": coupled, "dense": dense}
        within = room if preset.revive else masks
        masks = select(scores, target, layers=layers, within=within, seed=seed, **how)
        del found, scores  # so that the next step takes their memory and not new
    assert masks is not None
    masks = masks.to(device)
    origin = {
        "criterion": rule.name,
        "sparsity": None if sparsity is None else float(sparsity),
        "scope": "given densities" if isinstance(scope, Mapping) else scope,
        "granularity": str(granularity) if granularity is not None else "unstructured",
        "channels": share,
        "steps": len(path),
        "n_batches": len(used),
        "images": images_seen(changing, used, example) * measured + spent,
        "floor": float(floor),
        "seed": seed,
    }
    blind = isinstance(pattern, Channel) and graph is None
    notes = ("no example_input: which channels are coupled is not known",) if blind else ()
    masks.report = replace(masks.report, notes=masks.report.notes + notes, origin=origin)
    if shuffled:
        masks = masks.shuffle(seed)
    return describe(model, masks, traced, graph)


def default_criterion(pattern: Granularity, traceable: bool) -> str:
    """Where single weights go, IGQ's layer densities, in fewer channels where the network can be traced: the best masks
    without training in `docs/results.md`. For blocks, channels and N:M magnitude, as positions at random would be whole
    groups at random."""
    if pattern is not None:
        return "magnitude"
    return "narrow_igq" if traceable else "igq"


def _scope(
    model: nn.Module, sparsity: float, scope: Scope, batches: Iterable[Batch] | None, how: Mapping[str, Any]
) -> tuple[Scope, int, Iterable[Batch] | None]:
    """The scope with the layer densities of another criterion in place of `"densities:NAME"`, the images that it took, and
    the batches, which both criteria have from their beginning."""
    if not isinstance(scope, str) or not scope.startswith("densities:"):
        return scope, 0, batches
    first, batches = itertools.tee(batches) if isinstance(batches, Iterator) else (batches, batches)
    masks = prune(model, sparsity, scope.removeprefix("densities:"), batches=first, **how)
    return {layer.name: layer.density for layer in masks.layers()}, masks.report.origin["images"], batches


def _densities_of(
    model: nn.Module, rule: Criterion, density: float, layers: Mapping[str, Layer], how: Mapping[str, Any]
) -> tuple[dict[str, dict[str, float]], int]:
    """The layer densities of the other criteria that a criterion asks for, and the images that they took."""
    found, images = {}, 0
    for name in getattr(rule, "densities_of", ()):
        if name in DENSITIES:
            found[name] = layer_densities(name, layers, density)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is of a mask that nobody gets
            masks = prune(model, 1 - density, name, **how)
        found[name] = {layer.name: layer.density for layer in masks.layers()}
        images += masks.report.origin["images"]
    return found, images


def _batches(
    preset: Preset, batches: Iterable[Batch] | None, n_batches: int | None, device: torch.device, seed: int
) -> tuple[list[Batch], int]:
    """The batches that are taken, one at least for the trace if there are any, and how many the criterion wants."""
    rule = preset.criterion
    wanted = n_batches if n_batches is not None else (preset.n_batches or rule.n_batches)
    fewest = 1 if set(FROM_BATCHES) & set(rule.signals) else 0
    whole = isinstance(wanted, Integral) and wanted >= fewest
    require(whole, "n_batches", wanted, f"give a whole number of at least {fewest}")
    if batches is None and fewest:
        raise AutoSparseError(f"criterion {rule.name!r} needs gradients: give batches, pairs of (inputs, targets)")
    return [] if batches is None else take_batches(batches, max(wanted, 1), device, seed), wanted


def _traced(
    model: nn.Module,
    example: Any,
    rule: Criterion,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> tuple[dict[str, Layer], Graph | None, Traced | None]:
    """The prunable layers, and what is known of the network where there is an example input."""
    graph = None if example is None else trace(model, example)
    traced = None if example is None else Traced(model, example)
    operands = None if graph is None else graph.operands
    layers = prunable_layers(model, include=include, exclude=exclude, operands=operands)
    if not isinstance(rule, HandMade) or set(rule.signals) & {"flow", "rescaled_flow", "no_flow"}:
        check_real(model, layers, f"criterion {rule.name!r}", ": use magnitude, snip or grasp, or exclude the weight")
    return layers, graph, traced


def check_share(channels: float) -> float:
    require(
        isinstance(channels, Real) and 0 < channels <= 1,
        "channels",
        channels,
        "give the share that stays in use, in (0, 1]",
    )
    return float(channels)


def _share(
    channels: float | None,
    preset: Preset,
    layers: Mapping[str, Layer],
    density: float,
    granularity: str | Granularity,
) -> float:
    """The share of channels that stay in use: as given, or by the preset where single weights are chosen."""
    if channels is None:
        channels = preset.channels(layers, density) if preset.channels and granularity is None else 1.0
    share = check_share(channels)
    way_out = f"channels is {share:g}: between these, single weights are chosen; leave it out"
    require(share == 1 or granularity is None, "granularity", granularity, way_out)
    return share


def _room(
    model: nn.Module,
    layers: dict[str, Layer],
    share: float,
    density: float,
    graph: Graph | None,
    traced: Traced | None,
    seed: int,
) -> Masks:
    """The weights between the channels in use: a random `share` of those of every layer but the last ones.

    Coupled channels are in use together. Kernels between channels that are not in use are left out, as are those that no
    path from the input reaches.
    """
    if graph is None or traced is None:
        raise AutoSparseError(
            f"channels is {share:g}: which channels belong together is not known without example_input or batches; give one"
        )
    scores = random({}, Context(layers, share, seed=derive(seed, "channels")))
    coupled, dense = coupled_filters(model, layers, traced), graph.last_layers()
    stay = whole_layers(layers, 1.0, coupled, dense)
    shares = {name: 1.0 if name in stay else share for name in layers}
    in_use = select(
        scores,
        _mean_density(shares, layers),
        layers=layers,
        scope=shares,
        granularity=Channel(),
        floor=1e-9,  # one channel at least
        seed=seed,
        coupled=coupled,
        dense=dense,
    )
    found = {}
    for name, useful in effective_masks(model, in_use, traced).items():
        layer = layers[name]
        taps = tuple(d for d in range(useful.dim()) if d not in (layer.out_dim, layer.in_dim))
        kernels = useful.any(taps, keepdim=True) if taps else useful  # with the taps that see only padding
        found[name] = kernels.expand(layer.shape).clone()
    room = Masks(found, layers)
    wanted = round(density * room.total)
    if room.kept < wanted:
        raise AutoSparseError(
            f"channels is {share:g}: between them are {room.kept} weights, and the sparsity keeps {wanted}; "
            "give a larger share"
        )
    return room


def _coupled(
    model: nn.Module,
    layers: dict[str, Layer],
    density: float,
    pattern: Granularity,
    graph: Graph | None,
    traced: Traced | None,
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """For channels: which layers' filters go together, and which layers stay whole."""
    if not isinstance(pattern, Channel) or graph is None:
        return (), ()
    coupled, dense = coupled_filters(model, layers, traced), graph.last_layers()
    whole_layers(layers, density, coupled, dense)  # what cannot be is said before anything is measured
    return coupled, dense


def _pattern(pattern: Granularity, density: float) -> Granularity | Literal[False]:
    """The pattern at a density on the way: an N:M pattern is thinned out, so that the last step finds it whole.

    `False` where it would keep every weight.
    """
    if not isinstance(pattern, NM):
        return pattern
    n = max(pattern.n, math.ceil(density * pattern.m - 1e-9))
    return False if n == pattern.m else NM(n, pattern.m)


def describe(model: nn.Module, masks: Masks, example: Any, graph: Graph | None = None) -> Masks:
    """Fill in the report of `masks`: dead layers, effective sparsity, notes; and warn where the mask means little.

    Raises:
        AutoSparseError: the network computes a weight anew, and what it uses is not zero where the mask is.
    """
    report = masks.report
    notes = list(report.notes)
    empty = tuple(layer.name for layer in masks.layers() if layer.kept == 0)
    dead, effective = empty, None
    if example is None:
        notes.append(
            "no example_input: effective sparsity is unknown, only layers without a weight are reported as dead, and "
            "weights that forward computes from parameters are not checked"
        )
    else:
        model = fused(unwrap(model))
        given = example.example if isinstance(example, Traced) else example
        graph = graph or trace(model, given)
        check_used(model, masks, graph, given)
        notes += [
            f"{' and '.join(op.weights)} are multiplied with each other before data: the product is dense"
            for op in graph.operations
            if len(op.weights) > 1 and not op.inputs and set(op.weights) & set(masks)
        ]
        found = reachability(model, masks, example)
        effective = found.effective_sparsity
        dead = found.dead_layers
        if not found.exact:
            notes.append(
                "the network's paths could not be followed: effective sparsity is unknown, and only layers without a "
                "weight are reported as dead"
            )
    alarms = []
    if dead:
        alarms.append(
            f"{len(dead)} of {len(masks)} layers are dead ({', '.join(dead[:3])}{', …' if len(dead) > 3 else ''}); "
            "set floor, or take another scope"
        )
    if effective is not None and effective >= 1:
        alarms.append("no path from input to output is left; lower the sparsity, set floor, or take another scope")
    if report.ties > 0.1 * masks.density:
        alarms.append(f"{report.ties:.1%} of the weights tie at the cut, so chance chose among them")
    for alarm in alarms:
        warn(f"mask at sparsity {masks.sparsity:.4f}: {alarm}")
    masks.report = replace(report, dead_layers=tuple(dead), effective_sparsity=effective, notes=(*notes, *alarms))
    return masks


def _preset(criterion: str | Criterion | Preset) -> Preset:
    if isinstance(criterion, str):
        return preset_for(criterion)
    preset = criterion if isinstance(criterion, Preset) else Preset(criterion)
    rule = preset.criterion
    fits = callable(rule) and all(hasattr(rule, part) for part in ("name", "signals", "n_batches"))
    way_out = "give a preset's name, a scorer's name or file, a Preset, or a criterion with name, signals and n_batches"
    if preset is criterion:
        way_out = "a Preset holds a criterion with name, signals and n_batches; prune takes the names of presets"
    require(fits, "criterion", rule, way_out)
    return preset


def _mean_density(scope: Mapping[str, float], layers: Mapping[str, Layer]) -> float:
    kept = sum(scope.get(n, 1.0) * layer.numel for n, layer in layers.items())
    return kept / sum(layer.numel for layer in layers.values())


def density_for(sparsity: float | None, pattern: Granularity) -> float:
    """The density that a sparsity and a granularity ask for; N:M patterns set it.

    Raises:
        AutoSparseError: they disagree, or neither says it.
    """
    if isinstance(pattern, NM):
        density = pattern.n / pattern.m
        if sparsity is not None and abs(1 - density - sparsity) > 1e-9:
            raise AutoSparseError(
                f"sparsity is {sparsity}, but {pattern.n}:{pattern.m} sets {1 - density:g}: give that, or None (null)"
            )
        return density
    if sparsity is None:
        raise AutoSparseError("sparsity is None: give the share of weights to remove, such as 0.95")
    return 1 - check_sparsity(sparsity)
