"""What a mask is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, first_line, require
from autosparse.masks.layers import Layer, unwrap
from autosparse.masks.parametrized import Place, parametrized
from autosparse.masks.random import make_generator

SCHEMA = "autosparse.masks/1"
_SIGN = "sign of "  # before the names of weights in a file


@dataclass(frozen=True)
class LayerDensity:
    """Exact counts of one masked weight."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int

    @property
    def density(self) -> float:
        return self.kept / self.total


@dataclass(frozen=True)
class MaskReport:
    """Facts about a mask besides its bits.

    Attributes:
        dead_layers: layers without a weight on any path from input to output.
        effective_sparsity: sparsity if kept weights on no such path count as removed. `None` without an example input,
            or if the paths could not be followed.
        ties: fraction of the weights (or blocks, or channels) whose score equals that at the cut; chance chose there.
        dense_layers: layers that stay whole: M does not divide them, or, with channels, they give the model's outputs
            or are coupled to a layer that does.
        notes: warnings in words.
        origin: how the mask was found: criterion, seed, steps and so on.
    """

    dead_layers: tuple[str, ...] = ()
    effective_sparsity: float | None = None
    ties: float = 0.0
    dense_layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor` where the mask keeps it, 0 elsewhere: also where it is NaN or infinite, which a product would keep."""
    return torch.where(mask.to(device=tensor.device, dtype=torch.bool), tensor, 0)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: by their sum, which is far faster, unless that overflows."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as an element of so many bytes


class Zeroing:
    """Fills the pruned positions of tensors with 0 in place, whatever they held, as fast as a product would.

    Keeps the masks as words of ones or zeros, as wide as an element, and takes the bitwise and.
    """

    def __init__(self, masks: Iterable[Tensor]) -> None:
        self._masks = list(masks)
        self._words = list(self._masks)

    @torch.no_grad()
    def __call__(self, tensors: Iterable[Tensor | None]) -> None:
        """Of the tensors, one for each mask, `None` is left out."""
        for i, tensor in enumerate(tensors):
            if tensor is None:
                continue
            flat = tensor.detach()
            flat = torch.view_as_real(flat) if flat.is_complex() else flat
            values = flat.view(_WORDS[flat.element_size()])
            words = self._words[i]
            if words.dtype != values.dtype or words.device != values.device:
                mask = self._masks[i].to(values.device)
                words = -(mask[..., None] if tensor.is_complex() else mask).to(values.dtype)
                self._words[i] = words
            values.bitwise_and_(words)


class Holder:
    """What holds pruned weights at zero after each step of an optimizer, by a hook that is a method of it.

    `weights`: of its masks. `fixed`: these masks, or `None` if they change in training.
    """

    def __init__(
        self, weights: Iterable[Tensor], fixed: Iterable[Tensor] | None, optimizer: torch.optim.Optimizer
    ) -> None:
        """Raises `AutoSparseError` where two would not agree: another holds one of the weights, and masks change, or it
        removes what this one keeps."""
        self.weights = list(weights)
        self.fixed = None if fixed is None else {id(w): m for w, m in zip(self.weights, fixed, strict=True)}
        own = {id(weight) for weight in self.weights}
        for hook in optimizer._optimizer_step_post_hooks.values():
            other = getattr(hook, "__self__", None)
            if not isinstance(other, Holder) or not any(id(weight) in own for weight in other.weights):
                continue
            what = "sparsify" if other.fixed is None else "Masks.enforce"
            way_out = "call remove() on the handle that it returned"
            if self.fixed is None or other.fixed is None:
                raise AutoSparseError(f"{what} already holds weights of this optimizer at zero: {way_out}")
            both = self.fixed.keys() & other.fixed.keys()
            if any(bool((self.fixed[key].cpu() & ~other.fixed[key].cpu()).any()) for key in both):
                raise AutoSparseError(f"{what} already holds weights at zero that these masks keep: {way_out}")


class _Enforced(Holder):
    """Fixed masks."""

    def __init__(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], at: torch.optim.Optimizer) -> None:
        super().__init__(weights.values(), (masks[name] for name in weights), at)
        self._zero = Zeroing(masks[name] for name in weights)
        steered = {id(p) for group in at.param_groups for p in group["params"]}
        parametrized_too = len(weights) < len(masks)  # these need nothing of the optimizer
        trains = parametrized_too or any(id(weight) in steered for weight in self.weights)
        way_out = "it trains none of the masked weights; give the optimizer of this model"
        require(trains, "optimizer", type(at).__name__, way_out)

    def after_step(self, *_: Any) -> None:
        self._zero(self.weights)


class Masks(Mapping[str, Tensor]):
    """One boolean tensor per prunable weight, with the weight's own shape and name; `True` = keep.

    `signs`, if a method that trains gave them: `True` where the trained weight was at least 0, by weight.

    Raises:
        AutoSparseError: there are none, a tensor is not boolean, or its layer is not given or has another shape.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        layers: Mapping[str, Layer] | None = None,
        report: MaskReport | None = None,
        signs: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not tensors:
            raise AutoSparseError("masks are empty: give at least one boolean tensor")
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool:
                raise AutoSparseError(f"mask {name!r} has dtype {tensor.dtype}: give a boolean tensor (mask.bool())")
            if layers is not None and name not in layers:
                raise AutoSparseError(f"mask {name!r} has no layer: the layers given are {', '.join(layers) or 'none'}")
            if layers is not None and layers[name].shape != tuple(tensor.shape):
                raise AutoSparseError(
                    f"mask {name!r} has shape {tuple(tensor.shape)}, its layer {layers[name].shape}: they must agree"
                )
        self._tensors = dict(tensors)
        self.layer_info = {n: layers[n] for n in tensors} if layers is not None else {}
        self.report = report or MaskReport()
        self.signs = dict(signs or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        """The same names and the same bits; reports do not count."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(t, other[n].to(t.device)) for n, t in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Masks({len(self)} layers, {self.kept:,} of {self.total:,} weights kept, sparsity {self.sparsity:.4f})"

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(t.numel() for t in self._tensors.values())

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(int(t.sum()) for t in self._tensors.values())

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept."""
        return self.kept / self.total

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is removed."""
        return 1 - self.density

    def layers(self) -> list[LayerDensity]:
        """Exact counts of every layer, in the network's order."""
        return [LayerDensity(n, tuple(t.shape), int(t.sum()), t.numel()) for n, t in self._tensors.items()]

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device."""
        tensors, signs = ({n: t.to(device) for n, t in part.items()} for part in (self._tensors, self.signs))
        return Masks(tensors, self.layer_info or None, self.report, signs)

    def shuffle(self, seed: int = 0) -> Masks:
        """The layer-wise shuffle: the same number kept in each layer, at random positions."""
        generator = make_generator(seed, "shuffle")
        shuffled = {}
        for name, tensor in self._tensors.items():
            order = torch.randperm(tensor.numel(), generator=generator)
            shuffled[name] = tensor.flatten()[order.to(tensor.device)].view_as(tensor)
        return Masks(shuffled, self.layer_info or None, MaskReport(origin={**self.report.origin, "shuffled": seed}))

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter | Place]:
        """What each mask is for: a parameter, or a tensor that a parametrization computes."""
        model = unwrap(model)
        own, computed = dict(model.named_parameters()), parametrized(model)
        sources = {id(t): name for name, place in computed.items() for t in place.originals()}
        found: dict[str, nn.Parameter | Place] = {}
        for name, tensor in self._tensors.items():
            found[name] = weight = computed[name] if name in computed else own.get(name)  # type: ignore[assignment]
            if weight is None:
                raise AutoSparseError(
                    f"masks hold {name!r}, which {type(model).__name__} does not have: "
                    "give the model that they were made for"
                )
            if (used := sources.get(id(weight))) is not None:
                raise AutoSparseError(
                    f"the mask names {name!r}, from which {used!r} is computed: make a mask of {used!r}, which is used"
                )
            shape = tuple(weight.value().shape if isinstance(weight, Place) else weight.shape)
            if shape != tuple(tensor.shape):
                raise AutoSparseError(
                    f"the mask of {name!r} has shape {tuple(tensor.shape)}, the model's weight {shape}: "
                    "give the model that it was made for"
                )
        return found

    def check(self, model: nn.Module) -> None:
        """Check that every mask fits a weight of `model`.

        Raises:
            AutoSparseError: the mask was made for another model.
        """
        self._weights(model)

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of `model` to zero once: `θ ← θ ⊙ m`.

        A weight that `torch.nn.utils.parametrize` computes (weight norm, orthogonal, …) gets the mask as its last
        parametrization, in place of one before, and so stays zero; the parameters that it is computed from stay as they
        are.

        Raises:
            AutoSparseError: the mask was made for another model.
        """
        for name, weight in self._weights(model).items():
            if isinstance(weight, Place):
                weight.mask(self._tensors[name])
            else:  # masked_fill, not a product: a pruned weight that is infinite or NaN becomes 0 too
                weight.masked_fill_(~self._tensors[name].to(weight.device), 0)

    def enforce(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Set the pruned weights to zero now and after every step of `optimizer`.

        So momentum and weight decay cannot bring them back. Returns the handle of the hook; `handle.remove()` ends it.
        `copy.deepcopy(optimizer)` silently drops step hooks: call `enforce` again on the copy. Works with models that are
        wrapped by `torch.compile`, DDP or Fabric.

        Raises:
            AutoSparseError: the mask was made for another model, the optimizer trains none of its weights, or `sparsify` or
                other masks, which remove more, hold them already.
        """
        weights = {n: w for n, w in self._weights(model).items() if not isinstance(w, Place)}
        enforced = _Enforced(weights, self._tensors, optimizer)
        self.apply_(model)
        return optimizer.register_step_post_hook(enforced.after_step)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the boolean tensors, signs, layers and report. The write is atomic."""
        from autosparse.files import write_safetensors

        tensors = {n: t.clone() for n, t in self._tensors.items()}  # masks may share memory, tensors of a file may not
        tensors |= {f"{_SIGN}{n}": t.clone() for n, t in self.signs.items()}
        write_safetensors(Path(path), tensors, SCHEMA, **self.texts())

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read masks saved by `save`; no pickle.

        Raises:
            AutoSparseError: the file is missing, damaged, or holds something else.
        """
        from autosparse.files import read_safetensors

        tensors, texts = read_safetensors(Path(path), SCHEMA, "masks")
        try:
            signs = {n.removeprefix(_SIGN): t for n, t in tensors.items() if n.startswith(_SIGN)}
            masks = cls.restore({n: t for n, t in tensors.items() if not n.startswith(_SIGN)}, texts)
            masks.signs = {n: signs[n] for n in masks if n in signs}
            return masks
        except (KeyError, TypeError, ValueError) as error:
            raise AutoSparseError(
                f"masks {path} are damaged: {type(error).__name__} {first_line(error)}; make them again"
            ) from error

    def texts(self) -> dict[str, str]:
        """What masks hold besides their bits, layers and report, as JSON texts for a file's metadata."""
        layers = {n: asdict(layer) for n, layer in self.layer_info.items()}
        return {"layers": json.dumps(layers), "report": json.dumps(asdict(self.report))}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> Masks:
        """Masks from their bits and what `texts` gave."""
        layers = {
            n: Layer(**{**values, "shape": tuple(values["shape"])}) for n, values in json.loads(texts["layers"]).items()
        }
        report = json.loads(texts["report"])
        for key in ("dead_layers", "dense_layers", "notes"):
            report[key] = tuple(report[key])
        if layers and layers.keys() != tensors.keys():
            raise KeyError(f"there are masks of {len(tensors)} weights, and layers of {len(layers)}")
        order = list(layers) or list(tensors)  # safetensors sorts by name; the layers keep the network's order
        return cls({n: tensors[n] for n in order}, layers or None, MaskReport(**report))


def dense_masks(layers: Mapping[str, Layer]) -> Masks:
    """Masks that keep every weight."""
    return Masks({name: torch.ones(layer.shape, dtype=torch.bool) for name, layer in layers.items()}, layers)
