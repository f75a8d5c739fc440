"""The front door: functions that users call, above all rooms."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from autosparse.errors import AutoSparseError, require
from autosparse.masks.densities import Scope
from autosparse.masks.granularity import Granularity, parse_granularity
from autosparse.masks.mask import Masks
from autosparse.network.running import Batch, Loss
from autosparse.network.signals import Signals
from autosparse.pruning.criteria import Criterion, Preset
from autosparse.pruning.prune import prune as _prune
from autosparse.report.checks import split
from autosparse.scorers.loading import criterion_for, is_scorer
from autosparse.search.method import METHODS


def prune(
    model: nn.Module,
    sparsity: float | None = None,
    criterion: str | Path | Criterion | Preset | None = None,
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
) -> Masks:
    """Choose which weights of `model` to keep. The model (weights, buffers, gradients, modes, hooks) is not changed.

    In each of `steps` steps the signals are measured on `θ ⊙ m`, the criterion scores them, and the weights with the
    highest scores are kept. After the last step these are exactly `round((1 − sparsity)·N)` of the N prunable weights.
    Blocks and channels come as near to that as whole ones can. With N:M, layers that M does not divide stay dense.
    Weights that `torch.nn.utils.parametrize` computes are scored and masked as the network uses them.

    Args:
        model: any module; its prunable weights are those of convolutions, linear layers and attention projections.
        sparsity: fraction of the prunable weights to remove, in [0, 1). `None` if an N:M pattern sets it, or if `scope`
            gives the density of each layer.
        criterion: name of a preset (`autosparse list criteria`), the name, file or `models:/` URI of a scorer, your own
            `package.module:name`, or a `Criterion` or `Preset` itself. `"densities:NAME"` keeps the layer densities of one of
            these and puts the positions at random (the layer-wise shuffle). By default `"narrow_igq"`, which had
            the highest mean of the masks without training in our comparison on unseen networks; without an example input or
            batches `"igq"`, the same up to a sparsity of 0.96; with another granularity `"magnitude"`.
        batches: iterable of `(inputs, targets)`. The first `n_batches` are taken once and used in every step.
        n_batches: number of batches; by default what the criterion needs, fewer if there are fewer.
        example_input: what the model takes, for tracing and for criteria without data; by default the inputs of the first
            batch. Here and in `batches`, a tuple is positional arguments, a dictionary keyword arguments, and anything
            else one argument; so is a list, unless `forward` needs several.
        scope: `"global"`; a rule for layer densities, `"uniform"`, `"erk"`, `"igq"`, `"smart_ratio"` or a function `(layers,
            density) -> densities` as `"package.module:name"`; `"densities:NAME"`, those of another criterion, such as
            `"densities:synflow"`; or the density of each layer. By default the preset's.
        granularity: `"unstructured"` (default), a pattern such as `"2:4"` or `"block4x4"`, or `"channel"`. Channels that are
            added up are kept or removed together, and layers that give the outputs stay whole (`report.dense_layers`).
        channels: share of each layer's output channels that stay in use, in (0, 1]; the weights that are kept lie between
            these. They are chosen at random, those that are added up together, and the layers that give the outputs keep all.
            By default all, except for `"narrow_igq"`. It needs an example input or batches.
        steps: number of removals, by default the preset's. Steps towards an N:M pattern go through n:m with larger n.
        schedule: of the density over the steps, `"exponential"` or `"linear"`; by default the preset's.
        loss: called as `loss(outputs, targets)`; cross-entropy by default.
        signals: measured signals, `{signal: {parameter name: tensor of its shape}}`, such as `warmup(…).signals`. They
            are used unchanged in every step.
        seed: for random scores, ties, data loaders, dropout, and signals that draw random numbers.
        include, exclude: shell patterns on parameter names; only these weights are pruned, or all but these.
        floor: smallest density of any layer.

    Returns:
        The masks. `report` has dead layers, effective sparsity and ties; a warning says where these spoil the mask.

    Raises:
        AutoSparseError: bad arguments, a model without prunable weights, batches that the model cannot take, or scores
            that are not finite or all zero. Also a weight that the forward pass computes from a parameter and that is not
            zero where the mask is (weight standardization, `torch.nn.utils.weight_norm`).

    Examples:
        >>> import torch, autosparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> masks = autosparse.prune(model, sparsity=0.5, criterion="magnitude", example_input=torch.ones(1, 8))
        >>> masks.kept, masks.total
        (80, 160)
    """
    common: dict[str, Any] = {"example_input": example_input, "loss": loss, "seed": seed, "floor": floor}
    common |= {"include": include, "exclude": exclude}
    variant, name = split(criterion) if isinstance(criterion, str) else (None, "")
    if variant is not None:
        require(variant == "densities", "criterion", criterion, f"give {name!r}, or use autosparse benchmark")
        pattern = parse_granularity(granularity) if isinstance(granularity, str) else granularity
        require(pattern is None, "granularity", granularity, f"{criterion} chooses single weights; leave it out")
        common["shuffled"], criterion = True, name
    if isinstance(criterion, str) and criterion in METHODS:
        raise AutoSparseError(
            f"criterion is {criterion!r}: this method trains the network to find its masks; use the command autosparse "
            "prune, or, in your own training loop, autosparse.sparsify"
        )
    if isinstance(scope, str) and scope.startswith("densities:") and is_scorer(scope.removeprefix("densities:")):
        first, batches = itertools.tee(batches) if isinstance(batches, Iterator) else (batches, batches)
        other = _prune(model, sparsity, criterion_for(scope.removeprefix("densities:")), batches=first, **common)
        scope = {layer.name: layer.density for layer in other.layers()}
    common |= {"scope": scope, "granularity": granularity, "channels": channels, "steps": steps}
    common |= {"schedule": schedule, "signals": signals}
    chosen = None if criterion is None else criterion_for(criterion)
    return _prune(model, sparsity, chosen, batches=batches, n_batches=n_batches, **common)
