"""Measurements by differentiation: gradients, second derivatives, and gradients through training steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from autosparse.errors import AutoSparseError, first_line
from autosparse.masks.mask import masked
from autosparse.masks.random import seeded
from autosparse.network.inputs import map_tensors, tensors_in
from autosparse.network.running import NORMS, Batch, Loss, batch_loss, batch_size, forward, untouched

Weights = Mapping[str, Tensor]

TEMPERATURE = 200.0  # GraSP: what logits are divided by
INNER_STEPS = 3  # ProsPr: training steps that are differentiated through
INNER_RATE = 0.1  # ProsPr: their learning rate, the default of the authors' command line (as no momentum is)
NTK_NOISE = 0.01  # NTK-SAP: ε
NTK_DRAWS = 5  # NTK-SAP: R, the authors' on CIFAR-10 (1 where they have more than one batch of inputs)


def gradient(
    model: nn.Module, weights: Weights, batches: Sequence[Batch], loss: Loss, seed: int = 0
) -> dict[str, Tensor]:
    """`g = ∂L/∂w` at the given weights, L the mean loss over all samples of `batches`; norm layers in train mode."""
    leaves, state = leaves_and_state(model, weights)
    total = [torch.zeros_like(w) for w in leaves.values()]
    with untouched(model, but=NORMS), seeded(seed, "forward pass", device=device_of(weights)), torch.enable_grad():
        for batch, share in zip(batches, shares(batches), strict=True):
            value = batch_loss(model, state, batch, loss)
            _add(total, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), share)
    return dict(zip(leaves, total, strict=True))


def hessian_gradient(
    model: nn.Module,
    weights: Weights,
    batches: Sequence[Batch],
    loss: Loss,
    seed: int = 0,
    masks: Weights | None = None,
) -> dict[str, Tensor]:
    """`H g` at the given weights: how fast the gradient changes along itself.

    `g` is the gradient of the mean loss over all samples of `batches` with respect to `weights` only, and H the Hessian
    of that loss; both with the logits divided by 200 (outputs that are no tensor are taken as they are). First `g` of
    all batches, then its product with each batch's Hessian. With masks pruned weights have no part in `g`, for they do
    not train. Attention runs on its plain kernel, because the fused ones have no second derivative.

    Raises:
        AutoSparseError: the model has an operator without second derivative, or what `batch_loss` raises.

    Source: Wang, Zhang & Grosse 2020, "Picking winning tickets before training by preserving gradient flow".
    """

    def cooled(outputs: Any, targets: Any) -> Tensor:
        return loss(outputs / TEMPERATURE if isinstance(outputs, Tensor) else outputs, targets)

    along = gradient(model, weights, batches, cooled, seed)
    if masks is not None:
        along = {n: masked(g, masks[n]) for n, g in along.items()}
    leaves, state = leaves_and_state(model, weights)
    total = [torch.zeros_like(w) for w in leaves.values()]
    with (
        untouched(model, but=NORMS),
        seeded(seed, "forward pass", device=device_of(weights)),
        torch.enable_grad(),
        twice_differentiable(model),
    ):
        for batch, share in zip(batches, shares(batches), strict=True):
            value = batch_loss(model, state, batch, cooled)
            grads = torch.autograd.grad(value, list(leaves.values()), create_graph=True, allow_unused=True)
            terms = [
                (g * along[n].conj()).real.sum()
                for n, g in zip(leaves, grads, strict=True)
                if g is not None and g.requires_grad
            ]
            if terms:  # else the loss is linear in the weights
                product = torch.stack(terms).sum()
                _add(total, torch.autograd.grad(product, list(leaves.values()), allow_unused=True), share)
    return dict(zip(leaves, total, strict=True))


def meta_gradient(
    model: nn.Module,
    weights: Weights,
    batches: Sequence[Batch],
    loss: Loss,
    seed: int = 0,
    masks: Weights | None = None,
) -> dict[str, Tensor]:
    """`∂L(θ_M)/∂c` at c = 1, where M = 3 steps of plain SGD lead from `θ_0 = c ⊙ w` to `θ_M`.

    `θ_{i+1} = θ_i − 0.1·m ⊙ ∂L_i/∂θ_i` on batch i, for all parameters that train, biases and norms too (without m); then L
    on the next batch. Fewer batches than M + 1 are used in turn. All steps are differentiated through, so their
    activations are held at once. Norm layers are in train mode, attention runs on its plain kernel.

    Raises:
        AutoSparseError: the model has an operator without second derivative, or what `batch_loss` raises.

    Source: Alizadeh et al. 2022, "Prospect pruning: finding trainable weights at initialization using meta-gradients";
    M, learning rate and plain SGD as their code has them by default.
    """
    training = [n for n, p in model.named_parameters() if p.requires_grad]
    kept = {n: m.to(weights[n].device) for n, m in (masks or {}).items() if n in weights}
    with (
        untouched(model, but=NORMS),
        seeded(seed, "forward pass", device=device_of(weights)),
        torch.enable_grad(),
        twice_differentiable(model),
    ):
        scales = {n: torch.ones_like(w).requires_grad_() for n, w in weights.items()}
        state = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
        state.update({n: scales[n] * w for n, w in weights.items()})
        for step in range(INNER_STEPS):
            value = batch_loss(model, {**state, **_buffers(model)}, batches[step % len(batches)], loss)
            moving = [state[n] for n in training]
            grads = torch.autograd.grad(value, moving, create_graph=True, allow_unused=True) if moving else ()
            for name, g in zip(training, grads, strict=True):
                if g is not None:
                    state[name] = state[name] - INNER_RATE * (masked(g, kept[name]) if name in kept else g)
        value = batch_loss(model, {**state, **_buffers(model)}, batches[INNER_STEPS % len(batches)], loss)
        found = torch.autograd.grad(value, list(scales.values()), allow_unused=True)
    return {n: (torch.zeros_like(w) if g is None else g).real for (n, w), g in zip(weights.items(), found, strict=True)}


def ntk_sensitivity(
    model: nn.Module, weights: Weights, example_input: Any, seed: int = 0, masks: Weights | None = None
) -> dict[str, Tensor]:
    """`∂/∂m ‖f(x; θ⊙m) − f(x; (θ + εz)⊙m)‖²`, the mean over R = 5 draws of θ, `z ~ N(0, I)` and `x ~ N(0, I)`.

    ε = 0.01; the squared norm is the mean over the inputs of one draw, as many and of the same shape as
    `example_input`, whose whole numbers (tokens, edges of a graph) stay; 0 where the mask is 0. Each draw takes every weight anew from a normal of the tensor's own mean and
    standard deviation, which any network allows (ours: the authors call the initialization of their own networks
    again); biases and norms stay. Norm layers with running statistics take those of x under θ, for both networks.

    The authors draw 100 inputs on CIFAR-10 (10 for each class) and R = 5, on larger data several batches and R = 1.

    Args:
        weights: dense.

    Raises:
        AutoSparseError: inputs without any floats, or outputs without any.

    Source: Wang, Li & Sun 2023, "NTK-SAP: improving neural network pruning by aligning training dynamics".
    """
    given = tensors_in(example_input)
    if not any(t.is_floating_point() for t in given):
        kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in given})) or "no tensors"
        raise AutoSparseError(
            f"criterion 'ntk_sap' draws inputs from a normal, and {type(model).__name__} takes {kinds}: "
            "use a criterion that scores on batches"
        )
    device = device_of(weights)
    kept = {n: torch.ones_like(w) if masks is None else masks[n].to(w) for n, w in weights.items()}
    leaves = {n: m.clone().requires_grad_() for n, m in kept.items()}
    total = [torch.zeros_like(w) for w in weights.values()]
    with seeded(seed, "NTK draws", device=device), untouched(model), torch.enable_grad():
        for _ in range(NTK_DRAWS):
            drawn = {n: w.mean() + w.std(correction=0) * torch.randn_like(w) for n, w in weights.items()}
            moved = {n: w + NTK_NOISE * torch.randn_like(w) for n, w in drawn.items()}
            x = map_tensors(lambda t: torch.randn_like(t) if t.is_floating_point() else t, example_input)
            statistics = batch_statistics(model, {n: w * kept[n] for n, w in drawn.items()}, x)
            one, other = (
                float_outputs(model, {**{n: w * leaves[n] for n, w in values.items()}, **statistics}, x)
                for values in (drawn, moved)
            )
            if not any(t.requires_grad for t in one):
                raise AutoSparseError(
                    f"criterion 'ntk_sap' compares outputs, and {type(model).__name__} gives no tensors of floats that "
                    "depend on its weights: use another criterion"
                )
            distance = torch.stack([(a - b).square().sum() for a, b in zip(one, other, strict=True)]).sum()
            share = 1 / (batch_size((x, None)) * NTK_DRAWS)
            _add(total, torch.autograd.grad(distance, list(leaves.values()), allow_unused=True), share)
    return {n: (value * kept[n]).real for n, value in zip(weights, total, strict=True)}


def float_outputs(model: nn.Module, state: Weights, inputs: Any) -> list[Tensor]:
    """The tensors of floats in what the model gives."""
    return [t for t in tensors_in(forward(model, state, inputs)) if t.is_floating_point()]


def batch_statistics(model: nn.Module, weights: Weights, inputs: Any) -> dict[str, Tensor]:
    """The buffers after norm layers have seen `inputs` alone."""
    buffers = _buffers(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    if norms:
        momenta = [m.momentum for m in norms]
        try:
            for module in norms:
                module.momentum = 1.0
            with untouched(model, but=NORMS), torch.no_grad():
                forward(model, {**weights, **buffers}, inputs)
        finally:
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
    return buffers


class _Composed(TorchFunctionMode):
    """Functions whose backward pass torch cannot differentiate, in terms of others that it can."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("hardsigmoid", "hardsigmoid_"):
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable(model: nn.Module, way_out: str = "use another criterion") -> Iterator[None]:
    """Attention on the plain math kernel; an operator without second derivative is the user's error."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _Composed():
            yield
    except RuntimeError as error:
        if "derivative" not in str(error) and "differentiable" not in str(error):
            raise
        raise AutoSparseError(
            f"{type(model).__name__} cannot be differentiated twice: {first_line(error)}; {way_out}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def leaves_and_state(model: nn.Module, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights to differentiate by, and the state of a model that runs with them."""
    leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
    return leaves, {**leaves, **_buffers(model)}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers()}


def shares(batches: Sequence[Batch]) -> list[float]:
    sizes = [batch_size(batch) for batch in batches]
    return [size / sum(sizes) for size in sizes]


def _add(total: list[Tensor], grads: Sequence[Tensor | None], share: float) -> None:
    for value, g in zip(total, grads, strict=True):
        if g is not None:
            value.add_(g, alpha=share)


def device_of(weights: Weights) -> torch.device:
    return next(iter(weights.values())).device
