"""Physical removal: a smaller network in place of one whose masks empty whole filters.

A filter goes if the masks empty it, and with it every filter that it is coupled with: those that add up with it in a
residual sum, the depthwise filter on its channel. With the filter go its bias, γ and β of the norms on its channel, and the
weights of later layers that read it. The smaller network computes what the *zeroed* network does: the same network with
all of these (but the weights that read the channel) at zero, so that the channel is exactly 0.

What cannot go stays, with its weights at zero as the masks say: filters coupled with kept ones, the model's outputs, channels
that are normalized together (LayerNorm, GroupNorm: to remove one changes the statistics of the others), projections of
attention, and in grouped convolutions what would leave the groups unequal. The last filter of a layer stays too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from autosparse.errors import AutoSparseError, AutoSparseFailure, first_line, warn
from autosparse.masks.layers import Layer, prunable_layers, unwrap
from autosparse.masks.mask import Masks
from autosparse.masks.random import forked, make_generator
from autosparse.network.graph import trace
from autosparse.network.inputs import as_call, cast_like, first_of_batch, map_tensors, tensors_in
from autosparse.network.restore import private_copy, restored
from autosparse.network.running import NORMS, untouched
from autosparse.network.used import fused

TOLERANCE = 1e-5
_PROBES = 4  # examples on which two networks are compared


@dataclass(frozen=True)
class Removal:
    """`smaller` computes what `zeroed` does, a copy of the network given; the latter has its shapes, so its state fits.

    `removed`: which filters went, by weight; `gone`: all that went with them and is zero in `zeroed`, by parameter or
    buffer, as a dimension and the indices in it; `stays`: why filters that the masks empty are still there, by weight.
    """

    smaller: nn.Module
    zeroed: nn.Module
    removed: Mapping[str, tuple[int, ...]]
    gone: Mapping[str, tuple[int, tuple[int, ...]]]
    stays: Mapping[str, str]


def shrink(model: nn.Module, masks: Masks, example_input: Any) -> nn.Module:
    """A physically smaller copy of `model`, without the filters that `masks` empty.

    It computes what `model` does with those filters, their biases and the γ and β of their channels at zero. Filters
    that cannot be removed stay, with a warning.

    Args:
        masks: each filter whole or empty, as `prune(…, granularity="channel")` gives them.
        example_input: inputs as the model takes them, for the trace.

    Raises:
        AutoSparseError: masks of single weights or of another model, or an input that the model cannot take.
        AutoSparseFailure: the network cannot be traced, or the smaller one computes something else.

    >>> import autosparse, torch
    >>> from torchvision.models import resnet18
    >>> model, example = resnet18(num_classes=10), torch.zeros(2, 3, 32, 32)
    >>> masks = autosparse.prune(model, 0.5, "magnitude", example_input=example, granularity="channel", scope="uniform")
    >>> shrink(model, masks, example).layer1[0].conv1
    Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    removal = remove(model, masks, example_input)
    if removal.stays:
        warn("; ".join(f"{name}: {why}" for name, why in itertools.islice(removal.stays.items(), 5)))
    return removal.smaller


def remove(model: nn.Module, masks: Masks, example_input: Any) -> Removal:
    """Remove the filters that `masks` empty from a copy of `model`, see this module; the model stays as it is.

    Weights that `torch.nn.utils.parametrize` computes become plain ones.

    Which channels belong together is found by torch-pruning (Fang et al. 2023, "DepGraph"); that the smaller network
    computes what the zeroed one does is then measured, see `output_difference`.

    Args:
        masks: each filter whole or empty, as `prune(…, granularity="channel")` gives them; layers without one stay whole.
        example_input: as for `trace`.

    Raises:
        AutoSparseError: masks that empty no whole filters, or are another model's; the model does not take this input.
        AutoSparseFailure: the network cannot be followed, or the smaller one computes something else; the message names
            the layer.
    """
    model = fused(unwrap(model))
    example = cast_like(model, first_of_batch(example_input, 2))
    layers = prunable_layers(model, operands=trace(model, example).operands)
    masks.check(model)
    empty = {name: _empty_filters(name, mask, layers.get(name)) for name, mask in masks.items()}
    try:
        found = _removed(model, masks, empty, example)
        proof = found if (seen := _seen(model)) is model else _removed(seen, masks, empty, example)
        if same_outputs(proof.zeroed, proof.smaller, example):
            return found
    except AutoSparseError:
        raise
    except Exception as error:  # torch-pruning, or a smaller network that does not run
        raise AutoSparseFailure(_blame(model, masks, empty, example, first_line(error))) from error
    raise AutoSparseFailure(_blame(model, masks, empty, example, "it computes other outputs"))


@torch.no_grad()
def survivors(model: nn.Module, masks: Masks, example_input: Any) -> dict[str, Tensor]:
    """For each parameter and floating buffer of `remove(…).smaller`, the places of its values in that of `model`.

    Flat int64 indices in the smaller shape: `tensor.flatten()[indices]` carries over whatever belongs to the weights, such
    as an optimizer's momentum. Takes what `remove` takes.
    """
    model = fused(unwrap(model))
    example = cast_like(model, first_of_batch(example_input, 2))
    layers = prunable_layers(model, operands=trace(model, example).operands)
    numbered = private_copy(model).double()  # whose values are their own places
    for tensor in (*numbered.parameters(), *numbered.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape))
    empty = {name: _empty_filters(name, mask, layers.get(name)) for name, mask in masks.items()}
    surgery = _Surgery(numbered, empty, cast_like(numbered, example))
    for name in empty:
        surgery.remove(name)
    left = [*numbered.named_parameters(), *numbered.named_buffers()]
    return {name: tensor.detach().round().long() for name, tensor in left if tensor.is_floating_point()}


def same_outputs(a: nn.Module, b: nn.Module, example_input: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two networks compute the same to `tolerance`, see `output_difference`."""
    return output_difference(a, b, example_input) <= tolerance


def output_difference(a: nn.Module, b: nn.Module, example_input: Any) -> float:
    """The largest difference between the outputs of two networks, in eval mode and with norms in train mode.

    `max |a(x) − b(x)| / max(1, max |a(x)|)` over four inputs `x ~ N(0, I)` of the shape of `example_input` (of which what is
    not floating is taken as it is), in float64, so that a difference is one of the networks and not of rounding. Both stay
    as they are; `inf` where an output is not finite or has another shape.
    """
    worst = 0.0
    a, b = (private_copy(unwrap(m)).double() for m in (a, b))
    for norms in ((), NORMS):
        inputs = _probe(a, example_input)
        found = []
        for network in (a, b):
            with untouched(network, but=norms), torch.no_grad(), forked():
                args, kwargs = as_call(network, inputs)
                found.append(tensors_in(network(*args, **kwargs)))
        for x, y in zip(*found, strict=True):
            if x.shape != y.shape or not (torch.isfinite(x).all() and torch.isfinite(y).all()):
                return float("inf")
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp(min=1)))
    return worst


def _probe(model: nn.Module, example: Any) -> Any:
    """Random inputs like the example, the same at each call."""
    generator = make_generator(0, "probe")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def draw(t: Tensor) -> Tensor:
        shape = (_PROBES, *t.shape[1:]) if t.dim() else t.shape
        if not t.is_floating_point():
            return (t.repeat_interleave(-(-_PROBES // len(t)), 0)[:_PROBES] if t.dim() else t).to(device)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    return map_tensors(draw, example)


def _empty_filters(name: str, mask: Tensor, layer: Layer | None) -> list[int]:
    """The filters that the mask empties."""
    kept = mask.movedim(0 if layer is None else layer.out_dim, 0).flatten(1).float().mean(1)
    if bool(((kept > 0) & (kept < 1)).any()):
        raise AutoSparseError(
            f"the mask of {name!r} removes single weights, and only whole filters can be removed physically: make masks with "
            "granularity channel, as in autosparse.prune(model, 0.5, granularity='channel', example_input=…)"
        )
    return (kept == 0).nonzero().flatten().tolist()


def _blame(model: nn.Module, masks: Masks, empty: Mapping[str, list[int]], example: Any, reason: str) -> str:
    """The message of a failure: which layer's removal alone fails."""
    layer = "several layers together"
    for name in (name for name, filters in empty.items() if filters):
        try:
            found = _removed(_seen(model), masks, empty, example, [name])
            fine = same_outputs(found.zeroed, found.smaller, example)
        except Exception as error:
            fine, reason = False, first_line(error)
        if not fine:
            layer = repr(name)
            break
    return (
        f"{type(model).__name__} cannot be made smaller by the filters of {layer} ({reason}): "
        "keep these filters, by leaving the layer out of the masks"
    )


def _seen(model: nn.Module) -> nn.Module:
    """The model, or a copy of it in which every channel reaches the outputs.

    Classifiers and the last norms of residual branches often begin at 0, and would hide any difference.
    """
    hidden = [n for n, p in model.named_parameters() if n.rpartition(".")[2] != "bias" and not p.any()]
    if not hidden:
        return model
    seen = private_copy(model)
    with torch.no_grad():
        for name in hidden:
            seen.get_parameter(name).fill_(1)
    return seen


def _removed(
    model: nn.Module,
    masks: Masks,
    empty: Mapping[str, list[int]],
    example: Any,
    roots: Iterable[str] | None = None,
) -> Removal:
    """Remove the empty filters of the layers `roots` (all), with what they are coupled with."""
    smaller, zeroed, parameters = private_copy(model), private_copy(model), dict(model.named_parameters())
    masks.apply_(smaller)
    masks.apply_(zeroed)
    surgery = _Surgery(smaller, empty, example)
    for name in empty if roots is None else roots:
        surgery.remove(name)
    gone = surgery.gone(zeroed)
    with torch.no_grad():
        for name, (dim, indices) in gone.items():
            tensor = zeroed.get_parameter(name) if name in parameters else zeroed.get_buffer(name)
            tensor.index_fill_(dim, torch.tensor(indices, device=tensor.device), 0)
    for name, parameter in parameters.items():
        smaller.get_parameter(name).requires_grad_(parameter.requires_grad).grad = None
    for name, module in model.named_modules():
        smaller.get_submodule(name).training = module.training
    removed = {name: gone[name][1] for name in empty if name in gone}
    return Removal(smaller, zeroed, removed, gone, surgery.stays)


class _Surgery:
    """Removes filters from a network in place, layer by layer, and keeps account in the indices of the whole network."""

    def __init__(self, model: nn.Module, empty: Mapping[str, list[int]], example: Any) -> None:
        from torch_pruning import DependencyGraph

        self.model = model
        self._gone: dict[str, list[int]] = {}  # by name of a module or raw parameter
        self.stays: dict[str, str] = {}
        self._dims: dict[str, int] = {}  # of raw parameters
        self._left: dict[str, list[int]] = {}  # original indices of the channels that are still there
        self._last = {name.removesuffix(".weight") for name in trace(model, example).last_layers()}
        self._empty = {name.removesuffix(".weight"): set(filters) for name, filters in empty.items()}
        users = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
        self._shared = {i for i in users if users.count(i) > 1} if len(users) > len(set(users)) else set()
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # the graph is that of the gradients
        args, kwargs = as_call(model, example)
        with restored(model), untouched(model), torch.inference_mode(False), torch.enable_grad(), forked():
            self.graph = DependencyGraph().build_dependency(
                model,
                example_inputs=None,
                forward_fn=lambda network, _: network(*args, **kwargs),
                output_transform=tensors_in,
                verbose=False,
            )

    def remove(self, name: str) -> None:
        """Remove the filters of one layer that are empty and still there, as far as possible."""
        path = name.removesuffix(".weight")
        module = dict(self.model.named_modules()).get(path)
        wanted = self._positions(path, self._empty[path])
        if not wanted:
            return
        if not isinstance(module, (_ConvNd, nn.Linear)) or module not in self.graph.module2node:
            self._stay(name, len(wanted), "only filters of convolutions and Linear layers can go")
            return
        if id(module.weight) in self._shared:
            self._stay(name, len(wanted), "its weight is shared")
            return
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        reasons: dict[int, str] = {}
        while wanted:
            group = self.graph.get_pruning_group(module, prune, wanted)
            refused = self._refused(group)
            if not refused:
                break
            reasons |= refused
            wanted = [i for i in wanted if i not in refused]
        if reasons:
            self._stay(name, len(reasons), next(iter(reasons.values())))
        if not wanted:
            return
        for item in group:
            if self._holds(item.dep):
                path, gone = self._name(item.dep.target.module), set(item.idxs)
                left = self._channels(path, item.dep.target.module)
                self._gone[path] = sorted([*self._gone.get(path, []), *(left[i] for i in gone)])
                self._left[path] = [channel for i, channel in enumerate(left) if i not in gone]
        group.prune()

    def gone(self, whole: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
        """What has been removed of the whole network: filters, biases, γ, β, entries of raw parameters."""
        modules, found = dict(whole.named_modules()), {}
        for path, channels in self._gone.items():
            indices = tuple(channels)
            if path in self._dims:
                found[path] = (self._dims[path], indices)
                continue
            module = modules[path]
            for key, _ in module.named_parameters(recurse=False):
                outputs_second = key == "weight" and isinstance(module, _ConvNd) and module.transposed
                found[f"{path}.{key}"] = (int(outputs_second and module.groups == 1), indices)
            if isinstance(module, _NormBase) and not module.affine and module.running_mean is not None:
                found[f"{path}.running_mean"] = (0, indices)  # only a mean of 0 leaves such a channel at 0
        return found

    def _stay(self, name: str, count: int, why: str) -> None:
        filters = "filter stays" if count == 1 else "filters stay"
        self.stays[name] = f"{count} empty {filters}: {why}"

    def _name(self, target: Any) -> str:
        names = self.graph._param_to_name if isinstance(target, nn.Parameter) else self.graph._module2name
        return str(names[target])

    def _holds(self, dep: Any) -> bool:
        """Whether what goes are outputs of a layer, or what a norm or a raw parameter holds for each channel."""
        target = dep.target.module
        if isinstance(target, (_ConvNd, nn.Linear)):
            return bool(self.graph.is_out_channel_pruning_fn(dep.handler))
        return isinstance(target, (_NormBase, nn.PReLU, nn.Parameter))

    def _channels(self, path: str, target: Any) -> list[int]:
        if path not in self._left:
            if isinstance(target, nn.Parameter):
                self._dims[path] = dim = self.graph.module2node[target].pruning_dim
                count = target.shape[dim]
            else:
                count = self.graph.get_out_channels(target)
            self._left[path] = list(range(count))
        return self._left[path]

    def _positions(self, path: str, channels: set[int]) -> list[int]:
        """Where channels of the whole network are now."""
        if path not in self._left:
            return sorted(channels)
        return [i for i, channel in enumerate(self._left[path]) if channel in channels]

    def _refused(self, group: Any) -> dict[int, str]:
        """Filters of the root of a group that cannot go, with the reason."""
        refused: dict[int, str] = {}
        for item in group:
            target, roots = item.dep.target.module, dict(zip(item.idxs, item.root_idxs, strict=True))
            refused |= {roots[i]: why for i, why in self._bad(item.dep, target, list(item.idxs)).items()}
        return refused

    def _bad(self, dep: Any, target: Any, indices: list[int]) -> dict[int, str]:
        """Of the indices that go in one layer those that cannot, with the reason."""
        from torch_pruning.ops import OPTYPE

        if dep.target.type in (OPTYPE.LN, OPTYPE.GN):
            return dict.fromkeys(indices, f"{self._name(target)!r} normalizes them together with others")
        if dep.target.type in (OPTYPE.MHA, OPTYPE.LSTM, OPTYPE.EMBED):
            return dict.fromkeys(indices, f"{self._name(target)!r} is a {type(target).__name__}")
        if not isinstance(target, (_ConvNd, nn.Linear)):
            return {}
        path = self._name(target)
        if any(id(p) in self._shared for p in target.parameters()):
            return dict.fromkeys(indices, f"the weight of {path!r} is shared")
        if path in self._last and self._holds(dep):
            return dict.fromkeys(indices, f"the outputs of {path!r} are the model's")
        groups = int(getattr(target, "groups", 1))
        bad: dict[int, str] = {}
        if self._holds(dep):
            empty = set(self._positions(path, self._empty.get(path, set())))
            bad = {i: f"coupled with filters of {path!r} that are kept" for i in indices if i not in empty}
            self._channels(path, target)
            if len(indices) == self.graph.get_out_channels(target):
                bad.setdefault(indices[0], "a layer keeps at least one")
        if isinstance(target, _ConvNd) and groups > 1 and not groups == target.in_channels == target.out_channels:
            outputs = self._holds(dep)
            count = (target.out_channels if outputs else target.in_channels) // groups
            bad |= dict.fromkeys(_uneven(indices, groups, count, not outputs), f"the groups of {path!r} stay equal")
        return bad


def _uneven(indices: list[int], groups: int, count: int, alike: bool) -> list[int]:
    """Which indices must stay so that as many go in each group of `count`; `alike`: the same ones in each."""
    gone = [sorted(i % count for i in indices if i // count == group) for group in range(groups)]
    if alike:
        common = set(gone[0]).intersection(*gone)
        common = common if len(common) < count else set()
        return [i for i in indices if i % count not in common]
    least = min(min(map(len, gone)), count - 1)
    return [group * count + i for group, inside in enumerate(gone) for i in inside[least:]]
