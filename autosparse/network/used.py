"""The weights that a network uses, where it computes these from its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, raise_out_of_memory
from autosparse.masks.parametrized import parametrized
from autosparse.network.graph import Graph, _Origin, _Provenance
from autosparse.network.inputs import cast_like, first_of_batch, refusal
from autosparse.network.observe import EXAMPLES, _observed
from autosparse.network.operators import FACTORS
from autosparse.network.restore import private_copy

_PLAIN = (
    "make it a plain weight first (torch.nn.utils.remove_weight_norm for weight norm; for weight standardization a plain "
    "layer with the standardized weight)"
)


def fused(model: nn.Module) -> nn.Module:
    """A copy of `model` in which parametrized tensors are plain ones, of the values that it uses now; `model` if it has none."""
    if not parametrized(model):
        return model
    model = private_copy(model)
    places = list(parametrized(model).values())
    values = [place.value() for place in places]
    for place, value in zip(places, values, strict=True):
        module, originals = place.module, place.originals()
        trains = any(t.requires_grad for t in originals)
        # Not remove_parametrizations: it deletes from the class, which the copy has in common with the model.
        if "parametrizations" in module._modules:
            del module._modules["parametrizations"]
            module.__class__ = module.__class__.__bases__[0]
        if any(isinstance(t, nn.Parameter) for t in originals):
            setattr(module, place.key, nn.Parameter(value, trains))  # recurrent modules keep a list of theirs
        else:
            module.register_buffer(place.key, value)
    return model


def check_used(model: nn.Module, masks: Mapping[str, Tensor], graph: Graph, example_input: Any) -> None:
    """Nothing, where each weight that the network uses is 0 wherever `masks` say so, and finite.

    Costs one forward pass with the masked parameters, and only in a network that computes some of them anew
    (`Graph.recomputed`). Scales, casts and other maps of 0 to 0 are fine; a weight standardization, or a weight norm whose
    mask empties a filter (0/0), is not. The model stays as it is.

    Raises:
        AutoSparseError: the weights for which that is not so, by name.
    """
    chosen = {n: masks[n] for n in graph.recomputed if n in masks and not bool(masks[n].all())}
    if not chosen:
        return
    example = cast_like(model, example_input)
    device = next(p.device for p in model.parameters())
    for inputs in (
        first_of_batch(example, EXAMPLES),
        example,
    ):  # what a weight is does not depend on how many there are
        seen = _Used(model, chosen)
        try:
            _observed(model, inputs, device, seen)
            break
        except Exception as error:
            raise_out_of_memory(error, f"running {type(model).__name__}")
            if inputs is example:
                raise refusal(model, example_input, error) from error
    if seen.wrong:
        names = list(seen.wrong)
        listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise AutoSparseError(
            f"{type(model).__name__} computes the weight that it uses from {listed}, and under the mask that weight "
            f"{seen.wrong[names[0]]}: leave it out (exclude={names[0]!r}, …), or {_PLAIN}"
        )


def refuse_recomputed(model: nn.Module, graph: Graph, names: Iterable[str]) -> None:
    """Raise `AutoSparseError` where the network does not use one of these weights as it is."""
    if found := [name for name in names if name in graph.recomputed]:
        raise AutoSparseError(
            f"{type(model).__name__} computes the weight that it uses from {found[0]!r}, so what is set here would not be what "
            f"it uses: {_PLAIN}"
        )


class _Used(_Provenance):
    """Fills the pruned positions of the given parameters, and looks at each factor that is made of them.

    In place of index bits the mask is followed: 1 for kept, −1 for pruned, times the number of the weight.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self._owned = set(self._parameters)  # layouts do not matter here
        self._masks = masks
        self._codes = {name: i + 1 for i, name in enumerate(masks)}
        self.wrong: dict[str, str] = {}

    def parameter(self, name: str, tensor: Tensor) -> None:
        followed = None
        if name in self._masks:
            kept = self._masks[name].to(tensor.device)
            tensor.masked_fill_(~kept, 0)
            followed = torch.where(kept, 1, -1).to(torch.int16) * self._codes[name]
        self._origins[tensor] = _Origin(parameters=(name,), bits=followed)

    def _product(self, name: str, func: Any, arguments: dict[str, Any], joined: _Origin, result: Tensor) -> _Origin:
        for key, _ in FACTORS[name]:
            origin = self._origin(arguments[key])
            if origin is not None and origin.fixed:
                for weight in filter(self._masks.__contains__, self._weights(origin)):
                    self._look(weight, arguments[key], origin.bits)
        return super()._product(name, func, arguments, joined, result)

    def _look(self, weight: str, factor: Tensor, followed: Tensor | None) -> None:
        mask, code = self._masks[weight].to(factor.device), self._codes[weight]
        if followed is not None and int(followed.abs().max()) == code:
            pruned = followed.to(factor.device) == -code
        elif factor.shape == mask.shape:
            pruned = ~mask
        else:
            self.wrong.setdefault(weight, "has none of its zeros")
            return
        if not bool(factor.isfinite().all()):
            self.wrong.setdefault(weight, "is not finite")
        elif bool(factor[pruned].any()):
            share = float(factor[pruned].count_nonzero()) / max(int(pruned.sum()), 1)
            self.wrong.setdefault(weight, f"is not 0 at {share:.0%} of the pruned positions")
