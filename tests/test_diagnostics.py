"""Diagnostics: against dense matrices and Hessians, on masks, and on every network of the factory."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse import AutoSparseError, Masks
from autosparse.masks.layers import prunable_layers
from autosparse.network.diagnostics import Diagnosis, diagnose, hessian_norms, operator_norm
from autosparse.training.cells import CELLS
from autosparse.training.models import ModelSettings, create_model

Guard = Callable[[nn.Module], AbstractContextManager[None]]
NORM = {"attention": "layer"}
EXACT: dict[str, Any] = {"iterations": 60, "tolerance": 1e-7}


def net(*weights: list[list[float]]) -> nn.Sequential:
    """Linear layers without biases."""
    layers = [nn.Linear(len(w[0]), len(w), bias=False) for w in weights]
    for layer, w in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(torch.tensor(w))
    return nn.Sequential(*layers)


def close(value: Any, expected: Any, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=1e-6,
    )


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """½‖y − t‖² a sample."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


def dense_hessian(
    model: nn.Module, name: str, batches: list[tuple[Tensor, Tensor]], loss: Callable[..., Tensor], train: bool = False
) -> Tensor:
    """The Hessian of the mean loss by one weight, all of it."""
    model.train(train)
    weight = dict(model.named_parameters())[name].detach()

    def total(w: Tensor) -> Tensor:
        sizes = [len(t) for _, t in batches]
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        parts = [
            len(t) / sum(sizes) * loss(torch.func.functional_call(model, {name: w.view_as(weight), **buffers}, x), t)
            for x, t in batches
        ]
        return torch.stack(parts).sum()

    return torch.autograd.functional.hessian(total, weight.flatten())


# -- the Jacobian -------------------------------------------------------------------------------------------------------


def test_jacobian_of_a_linear_network() -> None:
    # (0 2; 1 0)·(3 0; 0 4) = (0 8; 3 0): singular values 8 and 3, mean 5.5, standard deviation 2.5
    found = diagnose(net([[3.0, 0], [0, 4]], [[0.0, 2], [1, 0]]), [(torch.ones(3, 2), torch.tensor([0, 1, 1]))])
    close(found.singular_values, [[8, 3]] * 3)
    close(list(found.jacobian.values()), [5.5, 2.5, 3, 8])


def test_jacobian_of_an_orthogonal_network_is_an_isometry() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    found = diagnose(model, [(torch.randn(2, 6), torch.tensor([0, 1]))], iterations=0)
    close(found.singular_values, torch.ones(2, 6))
    assert math.isnan(found.layers[0].hessian_norm) and not found.layers[0].hessian_converged


def test_jacobian_of_each_sample_on_its_own() -> None:
    # ReLU after (1 0; 0 2): at (1, 1) both pass, at (1, −1) the first, at (−1, −1) none
    model = nn.Sequential(*net([[1.0, 0], [0, 2]]), nn.ReLU())
    inputs = torch.tensor([[1.0, 1], [1, -1], [-1, -1]])
    close(diagnose(model, [(inputs, torch.tensor([0, 1, 0]))]).singular_values, [[2, 1], [1, 0], [0, 0]])
    close(diagnose(model, [(inputs, torch.tensor([0, 1, 0]))], samples=1).singular_values, [[2, 1]])
    assert diagnose(model, [(inputs, torch.tensor([0, 1, 0]))], samples=0).singular_values.numel() == 0


def test_jacobian_with_more_outputs_than_inputs() -> None:
    found = diagnose(net([[3.0], [4.0]]), [(torch.ones(1, 1), torch.tensor([1]))])
    close(found.singular_values, [[5]])


def test_norms_have_the_statistics_of_the_batch_in_the_jacobian() -> None:
    # Inputs 0 and 4 under weight 1: their unbiased variance is 8, whatever the norm has gathered.
    model = nn.Sequential(*net([[1.0]]), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[1].running_var.fill_(100)
    found = diagnose(model, [(torch.tensor([[0.0], [4.0]]), torch.zeros(2, 1))], loss=F.mse_loss)
    close(found.singular_values, [[8**-0.5]] * 2)


# -- Hessians -----------------------------------------------------------------------------------------------------------


def test_hessian_of_a_quadratic() -> None:
    # ½‖Wx − t‖²: each row of W has the Hessian x xᵀ, whose only eigenvalue is ‖x‖² = 25
    found = diagnose(net([[1.0, 2], [3, 4]]), [(torch.tensor([[3.0, 4]]), torch.zeros(1, 2))], loss=half_square)
    close(found.layers[0].hessian_norm, 25)
    assert found.layers[0].hessian_converged


def test_hessian_on_the_weights_kept_only() -> None:
    # Of the first row only the weight at x₂ = 4 is left: 16; the second has none.
    model = net([[1.0, 2], [3, 4]])
    masks = Masks({"0.weight": torch.tensor([[False, True], [False, False]])})
    found = diagnose(model, [(torch.tensor([[3.0, 4]]), torch.zeros(1, 2))], masks, loss=half_square)
    (layer,) = found.layers
    close([layer.hessian_norm, layer.kept, layer.total], [16, 1, 4])
    # y = (8, 0): the loss is 32 and the gradient at the weight 8·4 = 32
    close([found.loss, layer.gradient_norm, layer.relative_gradient], [32, 32, 16])
    close([found.gradient_norm, found.relative_gradient], [32, 16])


def test_hessian_of_softmax_at_2_by_2() -> None:
    # p = (½, ½): (diag(p) − ppᵀ) ⊗ xxᵀ has the eigenvalue ½·‖x‖² = ½·5
    found = diagnose(net([[0.0, 0], [0, 0]]), [(torch.tensor([[1.0, 2]]), torch.tensor([0]))])
    close(found.layers[0].hessian_norm, 2.5)


def test_a_negative_eigenvalue_counts_by_its_size() -> None:
    # −½(w·x)² has the Hessian −xxᵀ
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return -0.5 * outputs.square().sum(1).mean()

    found = diagnose(net([[1.0, 2]]), [(torch.tensor([[3.0, 4]]), torch.zeros(1))], loss=loss)
    close(found.layers[0].hessian_norm, 25)


@pytest.mark.parametrize("norm", [True, False])
def test_hessians_of_a_network_against_dense_ones(norm: bool) -> None:
    torch.manual_seed(1)
    middle: list[nn.Module] = [nn.BatchNorm2d(3)] if norm else []
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), *middle, nn.Tanh(), nn.Conv2d(3, 2, 2, groups=1), nn.Flatten(), nn.Linear(8, 3)
    )
    batches = [(torch.randn(n, 1, 5, 5), torch.randint(3, (n,))) for n in (4, 2)]
    found = diagnose(model, batches, **EXACT)
    for layer in found.layers:
        dense = dense_hessian(model, layer.name, batches, F.cross_entropy, train=norm)
        close(layer.hessian_norm, torch.linalg.eigvalsh(dense).abs().max(), rtol=1e-3)
        assert layer.hessian_converged


def test_masked_hessian_is_a_block_of_the_dense_one() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    masks = Masks({"0.weight": torch.rand(5, 4) > 0.5, "2.weight": torch.rand(3, 5) > 0.5})
    batches = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    found = diagnose(model, batches, masks, **EXACT)
    masks.apply_(model)
    for layer in found.layers:
        kept = masks[layer.name].flatten()
        dense = dense_hessian(model, layer.name, batches, F.cross_entropy)[kept][:, kept]
        close(layer.hessian_norm, torch.linalg.eigvalsh(dense).abs().max(), rtol=1e-3)


def test_what_has_not_converged_is_a_lower_bound_and_says_so() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
    batches = [(torch.randn(8, 6), torch.randint(4, (8,)))]
    values = []
    for iterations in (1, 2, 4, 8):
        found = hessian_norms(model, weights, batches, iterations=iterations, tolerance=1e-7)
        values.append([norm for norm, _ in found.values()])
        assert not any(converged for _, converged in found.values())
    exact = [
        float(torch.linalg.eigvalsh(dense_hessian(model, n, batches, F.cross_entropy)).abs().max()) for n in weights
    ]
    for smaller, larger in zip(values, [*values[1:], exact], strict=True):
        assert all(s <= la * (1 + 1e-5) for s, la in zip(smaller, larger, strict=True))


def test_a_loss_linear_in_the_weights_has_no_curvature() -> None:
    found = diagnose(net([[1.0, 2]]), [(torch.tensor([[3.0, 4]]), torch.zeros(1))], loss=lambda y, _: y.mean())
    assert found.layers[0].hessian_norm == 0 and found.layers[0].hessian_converged
    close(found.layers[0].gradient_norm, 5)


# -- layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "stride", "groups"),
    [(0, 1, 1), (1, 1, 1), (1, 2, 1), (1, 1, 2)],
    ids=["valid", "same", "stride", "groups"],
)
def test_operator_norm_of_a_convolution_against_the_dense_matrix(padding: int, stride: int, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, padding=padding, stride=stride, groups=groups)
    images = torch.randn(2, 2, 5, 4)
    bias, conv.bias = conv.bias, None
    dense = torch.stack([conv(e.view(1, 2, 5, 4)).flatten() for e in torch.eye(40)]).detach()
    conv.bias = bias
    expected = float(torch.linalg.matrix_norm(dense, 2))
    (layer,) = diagnose(nn.Sequential(conv, nn.Flatten()), [(images, torch.tensor([0, 1]))], iterations=0).layers
    close(layer.operator_norm, expected, rtol=1e-3)


def test_operator_norm_of_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.ConvTranspose1d(2, 3, 2, stride=2, bias=False)
    dense = torch.stack([conv(e.view(1, 2, 3)).flatten() for e in torch.eye(6)]).detach()
    model = nn.Sequential(conv, nn.Flatten())
    (layer,) = diagnose(model, [(torch.randn(1, 2, 3), torch.tensor([0]))], iterations=0).layers
    close(layer.operator_norm, float(torch.linalg.matrix_norm(dense, 2)), rtol=1e-3)


def test_operator_norm_of_zero_is_zero() -> None:
    assert operator_norm(lambda x: 0 * x, torch.zeros(1, 3)) == 0


def test_lipschitz_estimate_with_and_without_a_norm() -> None:
    # σ = 3, n = 2, v = 10/4 − 1 = 1.5: L = 3/√1.5 = √6, times the largest |γ| = 2; the last layer has σ alone.
    model = nn.Sequential(*net([[3.0, 0], [0, 1]]), nn.BatchNorm1d(2), *net([[0.0, 5], [5, 0]]))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2]))
    first, last = diagnose(model, [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))], iterations=0).layers
    close([first.spectral_norm, first.lipschitz, last.spectral_norm, last.lipschitz], [3, 2 * 6**0.5, 5, 5])
    assert (first.norm, last.norm) == ("1", None)


def test_second_moments_of_outputs() -> None:
    # (1, 1)·(1 2; 3 4)ᵀ = (3, 7): (9 + 49)/2
    found = diagnose(net([[1.0, 2], [3, 4]]), [(torch.ones(3, 2), torch.tensor([0, 1, 1]))])
    close(found.layers[0].second_moment, 29)


def test_an_empty_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    masks = Masks({"0.weight": torch.ones(2, 2, dtype=torch.bool), "1.weight": torch.zeros(2, 2, dtype=torch.bool)})
    found = diagnose(model, [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))], masks)
    empty = found.layers[1]
    assert (empty.kept, empty.spectral_norm, empty.operator_norm, empty.gradient_norm) == (0, 0, 0, 0)
    assert empty.hessian_norm == 0 and empty.hessian_converged and math.isnan(empty.relative_gradient)
    close(found.singular_values, torch.zeros(4, 2))


def test_layers_come_in_the_order_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first, self.never = nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    found = diagnose(Backwards(), [(torch.randn(2, 2), torch.tensor([0, 1]))])
    assert [layer.name for layer in found.layers] == ["first.weight", "second.weight", "never.weight"]
    assert found.layers[2].gradient_norm == 0 and math.isnan(found.layers[2].second_moment)


# -- every network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "size", "options"),
    [
        ("mlp", 8, 8, {}),
        *((name, 2, 8, {}) for name in ("convnet", "resnet8", "resnet20", "resnet18", "vgg11")),
        ("resnet50", 4, 8, {}),
        *(("cellnet", 8, 8, {"cell": cell, "blocks": [1], "norm": NORM.get(cell, "batch")}) for cell in CELLS),
    ],
)
def test_every_kind_of_network_is_diagnosed_and_unchanged(
    name: str, width: int, size: int, options: dict[str, Any], unchanged: Guard
) -> None:
    model = create_model(ModelSettings(name, width, options), in_channels=1, classes=3, image_size=size)
    torch.manual_seed(0)
    batches = [(torch.randn(4, 1, size, size), torch.tensor([0, 1, 2, 1]))]
    masks = Masks({n: torch.rand(layer.shape) > 0.2 for n, layer in prunable_layers(model).items()})
    with unchanged(model):
        found = diagnose(model, batches, masks, samples=1, iterations=1)
    assert {layer.name for layer in found.layers} == set(prunable_layers(model))
    assert finite(found) and found.gradient_norm > 0 and found.jacobian["max"] > 0


def finite(found: Diagnosis) -> bool:
    figures = ("spectral_norm", "operator_norm", "lipschitz", "second_moment", "gradient_norm", "hessian_norm")
    return all(math.isfinite(getattr(layer, key)) for layer in found.layers for key in figures)


def same(one: Diagnosis, other: Diagnosis) -> bool:
    return one.layers == other.layers and torch.equal(one.singular_values, other.singular_values)


def test_dropout_and_models_in_train_mode(unchanged: Guard) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    batches = [(torch.randn(6, 4), torch.randint(2, (6,)))]
    with unchanged(model):
        found = diagnose(model, batches)
    assert same(found, diagnose(model.eval(), batches))


def test_networks_that_blow_up_are_told_by_their_figures() -> None:
    model = net([[1e30, 0], [0, 1e30]], [[1e30, 0], [0, 1e30]])
    found = diagnose(model, [(torch.ones(2, 2), torch.zeros(2, 2))], loss=F.mse_loss)
    assert not math.isfinite(found.loss) and not found.layers[0].hessian_converged
    close(found.layers[0].spectral_norm, 1e30)


# -- mistakes -----------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).mean(1))


@pytest.mark.parametrize(
    ("model", "batches", "options", "message"),
    [
        (net([[1.0]]), [], {}, "batches is []: give at least one pair"),
        (net([[1.0]]), [(torch.ones(1, 1), torch.tensor([0]))], {"samples": -1}, "samples is -1: give at least 0"),
        (
            net([[1.0]]),
            [(torch.ones(1, 1), torch.tensor([0]))],
            {"iterations": -1},
            "iterations is -1: give at least 0",
        ),
        (net([[1.0]]), [(torch.ones(1, 1), torch.tensor([0]))], {"tolerance": 0.0}, "tolerance is 0.0: it is a share"),
        (net([[1.0], [1.0]]), [(torch.ones(1, 1), torch.tensor([3]))], {}, "Target 3 is out of bounds"),
        (
            Tokens(),
            [(torch.tensor([[1, 2]]), torch.tensor([0]))],
            {},
            "takes no inputs of floats to differentiate by: set",
        ),
        (
            nn.Linear(1, 4097),
            [(torch.ones(1, 1), torch.tensor([0]))],
            {"iterations": 0},
            "has 4097 outputs, more than 4096: set samples to 0",
        ),
    ],
)
def test_mistakes(model: nn.Module, batches: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AutoSparseError) as caught:
        diagnose(model, batches, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_its_jacobian_a_model_of_tokens_is_diagnosed() -> None:
    found = diagnose(Tokens(), [(torch.tensor([[1, 2]]), torch.tensor([0]))], samples=0)
    assert math.isnan(found.jacobian["mean"]) and found.layers[0].hessian_norm > 0
