"""How well a network can train, measured before it does: Lipschitz constants, Jacobian, curvature and gradient flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from autosparse.errors import AutoSparseError, require, settings
from autosparse.masks.layers import Layer, check_real, check_values, prunable_layers, unwrap
from autosparse.masks.mask import Masks
from autosparse.masks.random import make_generator, seeded
from autosparse.network.graph import trace
from autosparse.network.inputs import first_of_batch
from autosparse.network.lipschitz import Pair, estimate, pairs, spectral_norm
from autosparse.network.onednn import safe_convolutions
from autosparse.network.operators import FACTORS, base_name, named_arguments
from autosparse.network.running import NORMS, Batch, Loss, batch_loss, batch_size, cross_entropy, forward, untouched
from autosparse.network.saliency import (
    Weights,
    batch_statistics,
    device_of,
    float_outputs,
    gradient,
    leaves_and_state,
    shares,
    twice_differentiable,
)
from autosparse.network.used import check_used, fused

MOST_OUTPUTS = 4096  # the Gram matrix of the Jacobian is dense, outputs × outputs, in float64
_CHUNK = 2**22  # elements of a Jacobian that are in float64 at once


@settings
class DiagnosticSettings:
    """What a diagnosis measures on, and how exactly.

    `n_batches` of `batch_size` training images; `samples` of them for the Jacobian (0: leave it out); at most `iterations`
    for each layer's Hessian (0: leave it out), fewer where its norm changes by less than `tolerance` of itself.
    """

    n_batches: int = 1
    batch_size: int = 128
    samples: int = 8
    iterations: int = 20
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        for key, least in (("n_batches", 1), ("batch_size", 1), ("samples", 0), ("iterations", 0)):
            require(getattr(self, key) >= least, key, getattr(self, key), f"give at least {least}")
        require(0 < self.tolerance < 1, "tolerance", self.tolerance, "it is a share, in (0, 1)")


@dataclass(frozen=True)
class LayerDiagnosis:
    """One prunable weight `W = θ ⊙ m`; `‖·‖` is the Euclidean norm, L the loss. NaN: does not apply, or was not measured.

    Attributes:
        norm: name of the norm layer that takes its output, if one does.
        spectral_norm: `σ`, the largest singular value of `W.reshape(out, n)`, n the fan-in; NaN, as `lipschitz`, where
            the forward pass computes another weight from W.
        lipschitz: an estimate of the Lipschitz constant of the layer and the norm that takes its output,
            `max|γ|·σ/√(0.5·n·Var(W))` for rectified Gaussian inputs; `σ` where no norm does.
        operator_norm: the Lipschitz constant of the layer as a map of its whole input, `max ‖W * x‖ / ‖x‖`: of a
            convolution on images of the size that it sees (in general not `σ`), of a product `σ` itself.
        second_moment: the mean square of its output.
        gradient_norm: `‖∂L/∂W‖` over the weights that are kept; `relative_gradient`: the same over `‖W‖`.
        hessian_norm: the largest |eigenvalue| of the Hessian of L with respect to the kept weights of this layer alone,
            see `hessian_norms`. It approaches the value from below; `hessian_converged` tells whether the last
            iteration changed it by less than `tolerance` of itself.
    """

    name: str
    kept: int
    total: int
    norm: str | None
    spectral_norm: float
    lipschitz: float
    operator_norm: float
    second_moment: float
    gradient_norm: float
    relative_gradient: float
    hessian_norm: float
    hessian_converged: bool


@dataclass(frozen=True)
class Diagnosis:
    """A network's figures, and those of its prunable weights in the order of execution.

    `loss` L; `gradient_norm` over all prunable weights that are kept, and `relative_gradient`, this over theirs.
    `singular_values` of the input–output Jacobian, float64, descending: samples × min(outputs, inputs), on the CPU; all near one
    value is dynamical isometry.
    """

    layers: tuple[LayerDiagnosis, ...]
    loss: float
    gradient_norm: float
    relative_gradient: float
    singular_values: Tensor

    @property
    def jacobian(self) -> dict[str, float]:
        """Mean, population standard deviation, smallest and largest of all singular values; NaN if there are none."""
        values = self.singular_values
        if not values.numel():
            return dict.fromkeys(("mean", "std", "min", "max"), math.nan)
        found = (values.mean(), values.std(correction=0), values.min(), values.max())
        return dict(zip(("mean", "std", "min", "max"), map(float, found), strict=True))


def diagnose(
    model: nn.Module,
    batches: Sequence[Batch],
    masks: Mapping[str, Tensor] | None = None,
    *,
    samples: int = 8,
    iterations: int = 20,
    tolerance: float = 0.02,
    loss: Loss | None = None,
    seed: int = 0,
) -> Diagnosis:
    """Measure how a network passes signals and gradients, at `θ ⊙ m`; nothing of it changes.

    `LayerDiagnosis` and `Diagnosis` say what is measured. L is the mean over all samples of `batches`. Norm layers use the
    statistics of the batch, as in training; in the Jacobian, where each sample stands alone, those of the first batch as
    constants. Dropout is off.

    Cost: forward and backward once for each batch and once for each output and sample; and for each batch, layer and
    iteration a second backward as far as that layer.

    Args:
        batches: pairs (inputs, targets) on the model's device.
        masks: boolean, by parameter name. Weights without a mask count as kept.
        samples, iterations: at most so many inputs of the first batch for the Jacobian, and iterations for each layer's
            Hessian; 0 leaves these out.
        loss: `loss(outputs, targets)`, a mean over the batch; cross-entropy by default.
        seed: of the vectors that iterations begin with.

    Raises:
        AutoSparseError: batches that the model cannot take, masks of another model, an operator without second
            derivative, a Jacobian of too many outputs or by inputs that are not of floats.

    Source: dynamical isometry: Saxe et al. 2014; the Hessian's use for initializations: derived here.
    """
    DiagnosticSettings(samples=samples, iterations=iterations, tolerance=tolerance)  # checks them
    require(len(batches) > 0, "batches", batches, "give at least one pair (inputs, targets)")
    model, chosen = fused(unwrap(model)), loss or cross_entropy
    check_values(model)
    if masks is not None:
        Masks(masks).check(model)
    graph = trace(model, example := batches[0][0])
    check_used(model, masks or {}, graph, example)
    known = prunable_layers(model, operands=graph.operands)
    layers = {n: known[n] for n in dict.fromkeys((*graph.layers(), *known)) if n in known}
    check_real(model, layers, "a diagnosis")
    own = dict(model.named_parameters())
    kept, weights = _kept_weights(own, layers, masks or {})
    with safe_convolutions(model):
        grads = gradient(model, weights, batches, chosen, seed)
        grads = {n: torch.where(kept[n], g, 0) if n in kept else g for n, g in grads.items()}
        value, seen = _signals(model, weights, batches, chosen, seed)
        how: dict[str, Any] = {"iterations": iterations, "tolerance": tolerance, "loss": chosen, "seed": seed}
        hessians = hessian_norms(model, weights, batches, masks=kept, **how)
    norms = pairs(graph, layers, own)
    rows = []
    for name, layer in layers.items():
        exact = None if name in graph.recomputed else weights[name].double()
        sigma, constant = _lipschitz(exact, layer, norms[name], own)
        convolution = seen.convolutions.get(name)
        norm = float(grads[name].norm())
        rows.append(
            LayerDiagnosis(
                name=name,
                kept=int(kept[name].sum()) if name in kept else layer.numel,
                total=layer.numel,
                norm=norms[name].norm,
                spectral_norm=sigma,
                lipschitz=constant,
                operator_norm=sigma if convolution is None else operator_norm(*convolution, seed=seed),
                second_moment=seen.squares[name] / seen.counts[name] if name in seen.counts else math.nan,
                gradient_norm=norm,
                relative_gradient=_ratio(norm, float(weights[name].norm())),
                hessian_norm=hessians[name][0],
                hessian_converged=hessians[name][1],
            )
        )
    total = math.hypot(*(row.gradient_norm for row in rows))
    relative = _ratio(total, math.hypot(*(float(w.norm()) for w in weights.values())))
    nothing = torch.empty(0, 0, dtype=torch.float64)
    spectra = jacobian_singular_values(model, weights, example, samples, seed) if samples else nothing
    return Diagnosis(tuple(rows), value, total, relative, spectra)


def _kept_weights(
    own: Mapping[str, Tensor], layers: Mapping[str, Layer], masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks that there are, and `θ ⊙ m` of every layer."""
    kept = {n: masks[n].to(own[n].device) for n in layers if n in masks}
    return kept, {n: torch.where(kept[n], own[n].detach(), 0) if n in kept else own[n].detach().clone() for n in layers}


def _lipschitz(weight: Tensor | None, layer: Layer, norm: Pair, own: Mapping[str, Tensor]) -> tuple[float, float]:
    """Spectral norm of a weight and the estimate of the Lipschitz constant with its norm; NaN if none is finite."""
    if weight is None or not bool(weight.isfinite().all()):
        return math.nan, math.nan
    sigma = spectral_norm(weight, layer)
    gamma = None if norm.gamma is None else own[norm.gamma].detach()
    return sigma, estimate(weight, sigma, layer, norm, gamma)


def operator_norm(
    linear: Callable[[Tensor], Tensor],
    example: Tensor,
    *,
    iterations: int = 200,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> float:
    """`max ‖A x‖ / ‖x‖` of a linear map of tensors like `example`, by power iteration on `Aᵀ A`, from below.

    >>> from torch.nn.functional import conv1d
    >>> kernel = torch.ones(1, 1, 2)
    >>> round(operator_norm(lambda x: conv1d(x, kernel, padding=1), torch.zeros(1, 1, 2)), 3)
    1.732
    """
    vector = _unit(_random(example, seed, "operator"))
    found = 0.0
    for _ in range(iterations):
        image, adjoint, *_ = torch.func.vjp(linear, vector)
        before, found = found, float(image.norm())
        if not found > 0 or not math.isfinite(found) or found - before <= tolerance * found:
            break
        vector = _unit(adjoint(image)[0])
    return found


def hessian_norms(
    model: nn.Module,
    weights: Weights,
    batches: Sequence[Batch],
    *,
    masks: Weights | None = None,
    iterations: int = 20,
    tolerance: float = 0.02,
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> dict[str, tuple[float, bool]]:
    """The largest |eigenvalue| of each weight's own block `H_ll` of the Hessian of L, and whether it has converged.

    Power iteration that keeps what it saw (Lanczos): the largest |eigenvalue| of `H_ll` within the span of `v, H_ll v, …,
    H_llᵏ v`. It never exceeds the value, takes half the products that plain power iteration takes, and does not mind
    eigenvalues of opposite sign; three vectors of each weight are held. All layers iterate at once on one gradient graph
    per batch and iteration; those that changed by less than `tolerance` of themselves drop out. NaN: nothing was iterated,
    or a product was not finite.

    Raises:
        AutoSparseError: the model has an operator without second derivative, or what `batch_loss` raises.

    Source: Lanczos 1950.
    """
    kept = masks or {}
    walks = {n: _Walk(_unit(_masked(_random(w, seed, n), kept.get(n)))) for n, w in weights.items()}
    active = dict(walks)
    way_out = "set iterations to 0, which leaves Hessians out"
    with untouched(model, but=NORMS), torch.enable_grad(), twice_differentiable(model, way_out):
        for _ in range(iterations):
            along = {n: walk.vector for n, walk in active.items()}
            for name, product in _hessian_products(model, weights, batches, along, loss, seed).items():
                if active[name].step(_masked(product, kept.get(name)), tolerance):
                    del active[name]
            if not active:
                break
    return {n: (walk.found, n not in active and math.isfinite(walk.found)) for n, walk in walks.items()}


class _Walk:
    """One Lanczos iteration: the last two vectors, and the tridiagonal matrix of the product in their span."""

    def __init__(self, vector: Tensor) -> None:
        self.vector, self._last = vector, torch.zeros_like(vector)
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self.found = math.nan

    def step(self, product: Tensor, tolerance: float) -> bool:
        """Go on with the product of `vector`; whether that is the end."""
        self._diagonal.append(float((product * self.vector).sum()))
        rest = product - self._diagonal[-1] * self.vector - (self._beside[-1] if self._beside else 0) * self._last
        matrix = torch.diag(torch.tensor(self._diagonal, dtype=torch.float64))
        if self._beside:
            beside = torch.tensor(self._beside, dtype=torch.float64)
            matrix = matrix + torch.diag(beside, 1) + torch.diag(beside, -1)
        before, self.found = self.found, math.nan
        if not bool(matrix.isfinite().all()):
            return True
        self.found = float(torch.linalg.eigvalsh(matrix).abs().max())
        self._beside.append(float(rest.norm()))
        self._last, self.vector = self.vector, _unit(rest)
        # A rest of rounding: the span holds all that H_ll does to it.
        return self._beside[-1] <= 1e-6 * self.found or abs(self.found - before) <= tolerance * self.found


def _hessian_products(
    model: nn.Module, weights: Weights, batches: Sequence[Batch], along: Weights, loss: Loss, seed: int
) -> dict[str, Tensor]:
    """`H_ll v_l` of every weight in `along`, L the mean loss over all samples."""
    total = {n: torch.zeros_like(v) for n, v in along.items()}
    for batch, share in zip(batches, shares(batches), strict=True):
        leaves, state = leaves_and_state(model, weights)
        with seeded(seed, "forward pass", device=device_of(weights)):
            value = batch_loss(model, state, batch, loss)
        wanted = [leaves[n] for n in along]
        grads = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True)
        for (name, vector), g in zip(along.items(), grads, strict=True):
            if g is not None and g.requires_grad:  # else the loss is linear in this weight
                (product,) = torch.autograd.grad((g * vector).sum(), leaves[name], retain_graph=True, allow_unused=True)
                if product is not None:
                    total[name].add_(product, alpha=share)
    return total


def jacobian_singular_values(
    model: nn.Module, weights: Weights, inputs: Any, samples: int = 8, seed: int = 0
) -> Tensor:
    """Singular values of `∂ outputs / ∂ inputs` at each of the first `samples` inputs: samples × min(outputs, inputs).

    Exact, one backward pass per output and sample; norm layers have the statistics of all `inputs`. By the eigenvalues of
    `J Jᵀ` in float64, so that values under 1e-7 of the largest are rounding.

    Raises:
        AutoSparseError: more than 4096 outputs, or inputs that are not of floats.
    """
    with seeded(seed, "forward pass", device=device_of(weights)):
        statistics = batch_statistics(model, dict(weights), inputs)
        few = first_of_batch(inputs, samples)
        with untouched(model), torch.enable_grad():
            spectra = [
                _spectrum(model, {**weights, **statistics}, tree_map(lambda t, i=i: _one(t, i), few))
                for i in range(min(samples, batch_size((few, None))))
            ]
    return torch.stack(spectra)


def _spectrum(model: nn.Module, state: Weights, example: Any) -> Tensor:
    example = tree_map(_differentiable, example)
    by = [t for t in tree_leaves(example) if isinstance(t, Tensor) and t.requires_grad]
    way_out = "set samples to 0, which leaves the Jacobian out"
    if not by:
        raise AutoSparseError(f"{type(model).__name__} takes no inputs of floats to differentiate by: {way_out}")
    outputs = torch.cat([t.flatten() for t in float_outputs(model, state, example)])
    if len(outputs) > MOST_OUTPUTS:
        raise AutoSparseError(f"{type(model).__name__} has {len(outputs)} outputs, more than {MOST_OUTPUTS}: {way_out}")
    rows = []
    for output in outputs:
        grads = torch.autograd.grad(output, by, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    jacobian = torch.stack(rows).detach()
    wide = jacobian if len(rows) <= jacobian.shape[1] else jacobian.T
    few = len(wide)
    gram = torch.zeros(few, few, dtype=torch.float64, device=wide.device)
    for part in wide.split(max(1, _CHUNK // few), dim=1):
        gram += part.double() @ part.double().T
    if not bool(gram.isfinite().all()):
        return torch.full((few,), math.nan, dtype=torch.float64)
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).cpu()


class _Signals(TorchDispatchMode):
    """Sees what comes out of products and convolutions with the given weights, and how the latter are called."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._names = {w.untyped_storage()._cdata: n for n, w in weights.items()}
        self.squares: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.convolutions: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operator = base_name(func)
        if operator in FACTORS:
            arguments = named_arguments(func, args, kwargs)
            for key, _ in FACTORS[operator]:
                name = self._names.get(arguments[key].untyped_storage()._cdata)
                if name is not None:
                    self.squares[name] = self.squares.get(name, 0.0) + float(result.double().square().sum())
                    self.counts[name] = self.counts.get(name, 0) + result.numel()
                    if operator == "convolution":
                        self.convolutions.setdefault(name, _as_map(func, arguments))
        return result


def _as_map(func: Any, arguments: Mapping[str, Any]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A convolution as a linear map of its input, without the bias; and one input."""
    given = {**arguments, "weight": arguments["weight"].detach(), "bias": None}
    return lambda x: func(**{**given, "input": x}), arguments["input"][:1]


def _signals(
    model: nn.Module, weights: Weights, batches: Sequence[Batch], loss: Loss, seed: int
) -> tuple[float, _Signals]:
    """The mean loss over all samples, and what was seen of the layers on the way."""
    seen, value = _Signals(weights), 0.0
    # Fused attention shows no single products.
    with (
        untouched(model, but=NORMS),
        seeded(seed, "forward pass", device=device_of(weights)),
        torch.no_grad(),
        twice_differentiable(model),
    ):
        for (inputs, targets), share in zip(batches, shares(batches), strict=True):
            _, state = leaves_and_state(model, weights)
            with seen:
                outputs = forward(model, state, inputs)
            value += share * float(loss(outputs, targets))
    return value, seen


def _random(like: Tensor, seed: int, name: str) -> Tensor:
    """Standard normal, the same on every device."""
    return torch.randn(like.shape, generator=make_generator(seed, "Lanczos", name), dtype=like.dtype).to(like.device)


def _unit(vector: Tensor) -> Tensor:
    norm = vector.norm()
    return vector / norm if norm > 0 else vector


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _one(value: Any, index: int) -> Any:
    return value[index : index + 1] if isinstance(value, Tensor) and value.dim() else value


def _differentiable(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if floats else value
