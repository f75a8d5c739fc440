"""ReI and RePaIR: weights and norms scaled before training so that each layer's Lipschitz constant is about 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, require
from autosparse.masks.layers import Layer, check_real, check_values, prunable_layers, unwrap
from autosparse.masks.mask import Masks, dense_masks
from autosparse.network.graph import trace
from autosparse.network.lipschitz import Pair, constant, estimate, pairs, spectral_norm
from autosparse.network.used import refuse_recomputed
from autosparse.trainability.preparation import Preparation, PreparedLayer

MODES = ("weights", "gamma", "both")
_LARGEST_MEAN = 1e-2  # of weights, that is subtracted
_REMEMBERED = "_autosparse_prepared"  # attribute of the modules that own what was changed


def rei(model: nn.Module, example_input: Any, masks: Masks | None = None, mode: str = "both") -> Preparation:
    """ReI: each layer's `W ← W − mean(W)` where `|mean(W)| ≤ 0.01`, `W ← W/σ`, and `γ ← γ₀/L` of the norm that takes its
    output, in place.

    `σ = ‖W‖₂` is the spectral norm of `W` as a matrix of outputs × fan-in (of a grouped convolution the largest of its
    groups'), and `L = σ/√(0.5·n·v)` with fan-in `n` and `v = Var(W)`: the Lipschitz constant of layer and norm at γ = 1
    for inputs that are rectified standard Gaussians. Statistics are those of all weights, whatever `masks` say; pruned
    weights are zero afterwards. So call it before `masks.apply_`.

    γ₀ is γ before the first preparation. It is kept in an attribute of the norm, and what was subtracted from and divided
    out of a weight in one of its layer; they survive `copy.deepcopy` and are no part of the `state_dict`. So a second call
    changes nothing, and `repair` after `rei` gives what `repair` alone gives. For another γ₀ build the model anew.

    A bias is divided by σ with its weight, so `W/σ` divides a layer's output by σ. A norm behind it undoes that in train
    mode; where there is none, the note says what became of the output.

    Args:
        example_input: as the model takes it, for the trace that pairs layers with norms (see `pairs`).
        mode: `"weights"`, `"gamma"` or `"both"`.

    Raises:
        AutoSparseError: an unknown mode, masks of another model, weights that are not finite.

    Source: the formulas of the paper on ReI and RePaIR; γ ≈ 0.53 for square 3×3 layers.
    """
    return _rescaled("rei", model, example_input, masks, mode)


def repair(model: nn.Module, masks: Masks | None, example_input: Any, mode: str = "both") -> Preparation:
    """RePaIR: `rei` with the statistics of `W ⊙ m`: the mean of the weights kept, variance and spectral norm with the
    zeros in.

    A layer without a weight left, or with zeros alone (σ = 0), is left as it is, and its note says so. Arguments and errors as of `rei`.
    """
    return _rescaled("repair", model, example_input, masks, mode)


def lipschitz(model: nn.Module, example_input: Any, masks: Masks | None = None) -> dict[str, float]:
    """Estimated Lipschitz constant of each prunable layer of `θ ⊙ m`, and of the norm that takes its output, by weight.

    `L·max|γ|` with `L = σ/√(0.5·n·v)` (see `rei`; γ = 1 for a norm without), and σ for a layer without norm. 0 for an
    empty layer, infinite for equal weights before a norm. The model stays as it is.

    Raises:
        AutoSparseError: masks of another model, weights that are not finite.
    """
    found = _look(model, example_input, masks)
    constants = {}
    for name, layer in found.layers.items():
        weight = found.weight(name) * found.kept(name)
        sigma = spectral_norm(weight, layer)
        constants[name] = estimate(weight, sigma, layer, found.pairs[name], found.gamma(name))
    return constants


# -- what is measured ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Network:
    """A model as the formulas need it; tensors come in double precision on the CPU, so that no device differs."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    layers: dict[str, Layer]
    pairs: dict[str, Pair]
    masks: Masks

    def weight(self, name: str) -> Tensor:
        return _double(self.parameters[name])

    def kept(self, name: str) -> Tensor:
        return _double(self.masks[name]) if name in self.masks else torch.ones(self.layers[name].shape).double()

    def gamma(self, name: str) -> Tensor | None:
        gamma = self.pairs[name].gamma
        return None if gamma is None else _double(self.parameters[gamma])

    def bias(self, name: str) -> nn.Parameter | None:
        """The bias that is added to the product with a weight, if the module that holds both is one of torch's."""
        owner, _, key = name.rpartition(".")
        known = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(key, "")
        found = self.model.get_submodule(owner)._parameters.get(known) if self.layers[name].kind != "matmul" else None
        return found

    def remembered(self, name: str) -> dict[str, Any]:
        """What preparations remember of the parameter `name`."""
        owner, _, key = name.rpartition(".")
        every: dict[str, dict[str, Any]] = vars(self.model.get_submodule(owner)).setdefault(_REMEMBERED, {})
        return every.setdefault(key, {})


def _look(model: nn.Module, example_input: Any, masks: Masks | None) -> _Network:
    model = unwrap(model)
    graph = trace(model, example_input)
    layers = prunable_layers(model, operands=graph.operands)
    check_values(model)
    check_real(model, layers, "a preparation")
    refuse_recomputed(model, graph, layers)
    parameters = dict(model.named_parameters())
    if masks is None:
        masks = dense_masks(layers)
    masks.check(model)
    for name in layers:
        if not bool(parameters[name].isfinite().all()):
            raise AutoSparseError(f"weight {name!r} is not finite: prepare a network at its initialization")
    return _Network(model, parameters, layers, pairs(graph, layers, parameters), masks)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


# -- what is changed ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _rescaled(how: str, model: nn.Module, example_input: Any, masks: Masks | None, mode: str) -> Preparation:
    require(mode in MODES, "mode", mode, f"known: {', '.join(MODES)}")
    found = _look(model, example_input, masks)
    done = tuple(_rescale(found, name, how, mode) for name in found.layers)
    found.masks.apply_(model)
    return Preparation(how, found.masks, done)


def _rescale(found: _Network, name: str, how: str, mode: str) -> PreparedLayer:
    layer, pair, kept = found.layers[name], found.pairs[name], found.kept(name)
    weight, gamma = found.weight(name), found.gamma(name)
    sigma = spectral_norm(weight * kept, layer)
    if sigma == 0:
        why = "all its weights are zero" if bool(kept.any()) else "no weight is left"
        return PreparedLayer(name, pair.norm, 0.0, 0.0, f"{why}: left as it is")
    before = estimate(weight * kept, sigma, layer, pair, gamma)
    whole = how == "rei" and not bool(kept.all())  # then what counts is not what trains
    counted = torch.ones_like(kept) if whole else kept
    notes = [pair.note] if pair.note else []
    weight = weight * counted
    if mode != "gamma":
        known = found.remembered(name)
        shift, scale = known.get("shift", 0.0), known.get("scale", 1.0)
        weight, shift, divisor = _unit((weight * scale + shift) * counted, counted > 0, layer)
        sigma = 1.0
        known.update(shift=shift, scale=divisor)
        _set(found.parameters[name], weight)
        if (bias := found.bias(name)) is not None:
            _set(bias, _double(bias) * (scale / divisor))
        if pair.norm is None and abs(scale / divisor - 1) > 1e-6:
            notes.append(f"its output is {scale / divisor:.3g} times what it was")
    elif whole:
        sigma = spectral_norm(weight, layer)
    if mode != "weights" and pair.gamma is not None and gamma is not None:
        factor = constant(weight, sigma, layer)
        if math.isinf(factor):
            notes.append("γ left as it is: all weights are equal")
        else:
            gamma = found.remembered(pair.gamma).setdefault("initial", gamma) / factor
            _set(found.parameters[pair.gamma], gamma)
    trained = weight * kept
    after = estimate(trained, spectral_norm(trained, layer) if whole else sigma, layer, pair, gamma)
    return PreparedLayer(name, pair.norm, before, after, "; ".join(notes))


def _unit(weight: Tensor, counted: Tensor, layer: Layer) -> tuple[Tensor, float, float]:
    """`(W − mean)/σ` on the positions that count, what was subtracted (0 if nothing) and σ.

    A few equal weights have nothing but their mean: it stays.
    """
    mean, spread = float(weight[counted].mean()), float(weight[counted].std(correction=0))
    shift = mean if abs(mean) <= _LARGEST_MEAN and spread > 1e-5 * abs(mean) else 0.0
    weight = torch.where(counted, weight - shift, 0)
    sigma = spectral_norm(weight, layer)
    return weight / sigma, shift, sigma


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    """Write `value`, but for what is rounding: so a second preparation changes no bit."""
    old = _double(parameter)
    if float((value - old).abs().max()) > 8 * torch.finfo(parameter.dtype).eps * float(old.abs().max()):
        parameter.copy_(value)
