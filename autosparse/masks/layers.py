"""Which parameters are prunable."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autosparse.errors import AutoSparseError
from autosparse.masks.parametrized import parametrized

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Layer:
    """A prunable weight.

    `name` is the parameter's `state_dict` name; `kind` is `"conv"`, `"conv_transpose"`, `"linear"`, `"attention"` (the
    stacked or single input projections of attention) or `"matmul"` (a raw parameter that the trace saw as an operand of
    a matrix product or convolution); `out_dim` and `in_dim` are the dimensions of `shape` that hold outputs and inputs. With
    groups dimension 0 holds the channels of all of them, the other those of one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    out_dim: int = 0
    in_dim: int = 1
    groups: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the dimensions that are neither in nor out: `(k_h, k_w)` of a convolution, `()` of a matrix."""
        return tuple(n for d, n in enumerate(self.shape) if d not in (self.out_dim, self.in_dim))

    @property
    def out_features(self) -> int:
        """Output units (channels), over all groups."""
        return self.shape[self.out_dim] * (1 if self.out_dim == 0 else self.groups)

    @property
    def in_features(self) -> int:
        """Input units (channels), over all groups."""
        return self.shape[self.in_dim] * (1 if self.in_dim == 0 else self.groups)

    @property
    def fan_in(self) -> int:
        """Weights that enter one output unit."""
        return self.numel // max(self.out_features, 1)

    @property
    def fan_out(self) -> int:
        """Weights that leave one input unit."""
        return self.numel // max(self.in_features, 1)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile`, DDP, Fabric or checkpoint wrappers, whose names are those of the masks.

    Where a module inside is wrapped, the result is another module without these wrappers that holds the same parameters and
    buffers, so that the names are those of the plain network.
    """
    return _unwrapped(model, {})


def _unwrapped(model: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    if model in known:
        return known[model]
    inner = next((model._modules[name] for name in _WRAPPED if name in model._modules), None)
    if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        inner = model._modules.get("module")
    if inner is not None:
        known[model] = _unwrapped(inner, known)
        return known[model]
    children = {name: None if m is None else _unwrapped(m, known) for name, m in model._modules.items()}
    found = model
    if any(child is not model._modules[name] for name, child in children.items()):
        found = type(model).__new__(type(model))
        vars(found).update(vars(model), _modules=children)
    known[model] = found
    return found


_WRAPPED = ("_orig_mod", "_forward_module", "_checkpoint_wrapped_module")  # torch.compile, Fabric, checkpoint_wrapper


def check_model(model: nn.Module) -> None:
    """Raise `AutoSparseError` where a model has nothing that masks could be made for: TorchScript, or a lazy module."""
    if isinstance(model, torch.jit.ScriptModule):
        raise AutoSparseError(
            f"{type(model).__name__} is a TorchScript program, whose weights cannot be replaced: give the nn.Module it was made of"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise AutoSparseError(f"parameter {name!r} is uninitialized: run the lazy model once before pruning it")


def check_values(model: nn.Module) -> None:
    """Raise `AutoSparseError` where parameters have no values, on the meta device."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise AutoSparseError(
                f"parameter {name!r} is on the meta device and has no values: build the model on a real device, or load its weights"
            )


def check_real(model: nn.Module, names: Iterable[str], what: str, way_out: str = "") -> None:
    """Raise `AutoSparseError` where one of the weights is complex and `what` is for real ones."""
    own = dict(model.named_parameters())
    for name in names:
        if own[name].is_complex():
            raise AutoSparseError(f"weight {name!r} is complex, and {what} is for real weights only{way_out}")


def _check_memory(model: nn.Module, names: Iterable[str]) -> None:
    """Two Parameters in the same memory: what a mask prunes of one goes from the other too, and no figure would be right."""
    spans = []
    for name, p in model.named_parameters():
        if p.numel() and not p.is_meta and p.layout is torch.strided:
            size = 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
            spans.append((p.untyped_storage()._cdata, p.storage_offset(), p.storage_offset() + size, name))
    wanted = set(names)
    for (memory, _, end, a), (other, start, _, b) in itertools.pairwise(sorted(spans)):
        if memory == other and start < end and {a, b} & wanted:
            raise AutoSparseError(
                f"{a!r} and {b!r} are two Parameters in the same memory, which no optimizer or mask can tell apart: make them "
                "one Parameter (a.weight = b.weight), or give one its own memory (clone)"
            )


def prunable_layers(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    operands: Mapping[str, Layer] | None = None,
) -> dict[str, Layer]:
    """The prunable weights of `model`, in `state_dict` order.

    Weights of Conv, transposed Conv, Linear and attention input projections; of other raw parameters only `operands`,
    those that a trace saw in a matrix product or convolution (`Graph.operands`). Never embeddings, positions, norms or
    biases. A tied weight counts once, under its first name; one tied to an embedding is an embedding. `include` and
    `exclude` are shell patterns on names (`"layer1.*"`; one or several), each of which must match something.

    Raises:
        AutoSparseError: nothing is prunable, a lazy parameter has no shape yet, a weight is parametrized (give a `fused`
            model), a pattern matches nothing, two Parameters share memory, or the model is a TorchScript program.
    """
    model = unwrap(model)
    check_model(model)
    for name, place in parametrized(model).items():
        raw = [n for n, p in model.named_parameters() if any(p is t for t in place.originals())]
        if _layer(name, place.key, place.module, (1, 1)) or any(n in (operands or {}) for n in raw):
            raise AutoSparseError(
                f"weight {name!r} is computed by a parametrization, so what would be changed here is not what the network "
                f"uses: call torch.nn.utils.parametrize.remove_parametrizations(module, {place.key!r}) first"
            )
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    owners: dict[int, Layer] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in embeddings or id(parameter) in owners or parameter.dim() < 2:
                continue
            layer = _layer(f"{prefix}.{key}" if prefix else key, key, module, tuple(parameter.shape))
            if layer is not None:
                owners[id(parameter)] = layer
    found: dict[str, Layer] = {}
    for name, parameter in model.named_parameters():  # first name of each tied parameter, in state_dict order
        if id(parameter) in owners:
            known = owners[id(parameter)]
            found[name] = known if known.name == name else Layer(**{**known.__dict__, "name": name})
        elif operands and name in operands and id(parameter) not in embeddings:
            found[name] = operands[name]
    if not found:
        raise AutoSparseError(
            f"{type(model).__name__} has no prunable weights: give a model with Conv, Linear or attention layers"
        )
    found = _filter(found, include, exclude)
    _check_memory(model, found)
    return found


def _layer(name: str, key: str, module: nn.Module, shape: tuple[int, ...]) -> Layer | None:
    if isinstance(module, _ConvTransposeNd) and key == "weight":
        return Layer(name, "conv_transpose", shape, out_dim=1, in_dim=0, groups=module.groups)
    if isinstance(module, _ConvNd) and key == "weight":
        return Layer(name, "conv", shape, groups=module.groups)
    if isinstance(module, nn.Linear) and key == "weight":
        return Layer(name, "linear", shape)
    if isinstance(module, nn.MultiheadAttention) and key in _PROJECTIONS:
        return Layer(name, "attention", shape)
    return None


def _filter(
    layers: dict[str, Layer], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> dict[str, Layer]:
    def matching(patterns: str | Sequence[str], what: str) -> set[str]:
        names: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            hits = fnmatch.filter(layers, pattern)
            if not hits:
                raise AutoSparseError(
                    f"{what} pattern {pattern!r} matches no prunable weight: the names are like {next(iter(layers))!r}"
                )
            names.update(hits)
        return names

    kept = set(layers) if include is None else matching(include, "include")
    if exclude is not None:
        kept -= matching(exclude, "exclude")
    if not kept:
        raise AutoSparseError(f"include {include!r} and exclude {exclude!r} leave no prunable weight: widen them")
    return {name: layer for name, layer in layers.items() if name in kept}
