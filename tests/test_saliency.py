"""Second derivatives, meta-gradients and NTK-SAP against finite differences and plain reimplementations in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import prunable_layers
from autosparse.masks.random import seeded
from autosparse.network.saliency import INNER_RATE, NTK_DRAWS, NTK_NOISE
from autosparse.network.signals import images_seen, measure

Guard = Callable[[nn.Module], AbstractContextManager[None]]
Batches = list[tuple[Tensor, Tensor]]


class Classifier(nn.Module):
    """Two layers of attention."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))


NETWORKS = {"mlp": (mlp, (3,)), "normed": (normed, (3,)), "attention": (Classifier, (3, 4))}


def make(kind: str, *sizes: int) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    build, shape = NETWORKS[kind]
    model = build().double()
    return model, [(torch.randn(n, *shape).double(), torch.arange(n) % 2) for n in sizes]


def half(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(l.shape, generator=generator) < 0.6 for n, l in prunable_layers(model).items()}


def signal(model: nn.Module, name: str, **options) -> dict[str, Tensor]:
    layers = prunable_layers(model)
    found = measure(model, layers, (name,), **options)[name]
    assert all(found[n].shape == layers[n].shape and not found[n].requires_grad for n in layers)
    return found


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy in the state in which gradients are taken: norm layers in train mode, dropout off."""
    other = copy.deepcopy(model).eval()
    for module in other.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.LayerNorm)):
            module.train()
    parameters = dict(other.named_parameters())
    for name, weight in weights.items():
        parameters[name].data.copy_(weight)
    return other


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(e.abs().max()) for e in expected.values())
    assert scale > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * scale, msg=name)


# -- Hessian–gradient product --------------------------------------------------------------------------------------------


def cooled_gradient(model: nn.Module, weights: dict[str, Tensor], batches: Batches) -> dict[str, Tensor]:
    """Of the mean loss over all samples, logits divided by 200."""
    other = with_weights(model, weights)
    parameters = [dict(other.named_parameters())[n] for n in weights]
    count = sum(len(y) for _, y in batches)
    total = sum(F.cross_entropy(other(x) / 200, y, reduction="sum") for x, y in batches) / count
    return dict(zip(weights, torch.autograd.grad(total, parameters), strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_hessian_gradient_is_the_change_of_the_gradient_along_itself(kind: str, masked: bool, unchanged: Guard) -> None:
    model, batches = make(kind, 5, 3)
    masks = half(model) if masked else None
    layers = prunable_layers(model)
    parameters = {n: p.detach() for n, p in model.named_parameters() if n in layers}
    weights = parameters if masks is None else {n: p * masks[n] for n, p in parameters.items()}
    along = cooled_gradient(model, weights, batches)
    if masks is not None:
        along = {n: g * masks[n] for n, g in along.items()}
    step = 1e-4 / max(float(g.abs().max()) for g in along.values())
    ahead, back = (
        cooled_gradient(model, {n: w + sign * step * along[n] for n, w in weights.items()}, batches) for sign in (1, -1)
    )
    fast = torch.backends.mha.get_fastpath_enabled()
    with unchanged(model):
        found = signal(model, "hessian_gradient", batches=batches, masks=masks)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert_near(found, {n: (ahead[n] - back[n]) / (2 * step) for n in weights})


def test_outputs_that_are_no_tensor_are_not_cooled() -> None:
    class Named(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    model, batches = make("mlp", 6)
    plain = signal(model, "hessian_gradient", batches=batches, loss=lambda o, t: F.cross_entropy(o * 200, t))
    named = signal(Named(model), "hessian_gradient", batches=batches, loss=lambda o, t: F.cross_entropy(o["logits"], t))
    for name, value in plain.items():
        torch.testing.assert_close(named[f"inner.{name}"], value)


def test_the_hessian_of_a_linear_loss_is_zero() -> None:
    model = nn.Linear(3, 2)
    found = signal(model, "hessian_gradient", batches=[(torch.randn(4, 3), torch.zeros(4))], loss=lambda o, t: o.mean())
    assert found["weight"].tolist() == torch.zeros(2, 3).tolist()


@pytest.mark.parametrize("name", ["hessian_gradient", "meta_gradient"])
def test_operators_without_second_derivative_are_named(name: str, unchanged: Guard) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            q = self.layer(x).view(-1, 1, 2, 2)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0].flatten(1)  # type: ignore[no-any-return]

    model, batch = Net(), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with unchanged(model), pytest.raises(AutoSparseError, match=r"Net cannot be differentiated twice: .*use another"):
        signal(model, name, batches=[batch])


# -- meta-gradients ------------------------------------------------------------------------------------------------------


def after_training(
    model: nn.Module, weights: dict[str, Tensor], batches: Batches, masks: dict[str, Tensor] | None
) -> float:
    """The loss on the next batch after three steps of `torch.optim.SGD`, masks enforced."""
    other = with_weights(model, weights)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=INNER_RATE)
    for step in range(3):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(other(x), y).backward()
        for name, p in other.named_parameters():
            if masks is not None and name in masks:
                p.grad.mul_(masks[name])  # type: ignore[union-attr]
        optimizer.step()
    x, y = batches[3 % len(batches)]
    with torch.no_grad():
        return F.cross_entropy(other(x), y).item()


@pytest.mark.parametrize(("kind", "sizes"), [("mlp", (5, 3, 4, 6)), ("normed", (5, 4)), ("attention", (4,))])
@pytest.mark.parametrize("masked", [False, True])
def test_meta_gradient_against_finite_differences(
    kind: str, sizes: tuple[int, ...], masked: bool, unchanged: Guard
) -> None:
    model, batches = make(kind, *sizes)
    model.get_parameter("0.bias" if kind != "attention" else "head.bias").requires_grad_(False)  # it does not train
    masks = half(model) if masked else None
    with unchanged(model):
        found = signal(model, "meta_gradient", batches=batches, masks=masks)
    weights = {n: model.get_parameter(n).detach() * (1 if masks is None else masks[n]) for n in found}
    checked: dict[str, Tensor] = {}
    for name, weight in weights.items():
        slope = torch.full_like(weight, float("nan"))
        every = 1 if kind != "attention" else 7
        for index in range(0, weight.numel(), every):
            values = []
            for sign in (1, -1):
                scale = torch.ones_like(weight)
                scale.view(-1)[index] += sign * 1e-5
                values.append(after_training(model, {**weights, name: weight * scale}, batches, masks))
            slope.view(-1)[index] = (values[0] - values[1]) / 2e-5
        known = ~slope.isnan()
        checked[name] = torch.where(known, slope, found[name])
    for name, value in checked.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8)
        assert masks is None or (found[name][~masks[name]] == 0).all()
    assert any((value != 0).any() for value in found.values())


def test_where_nothing_trains_the_meta_gradient_is_that_of_the_weights() -> None:
    model, batches = make("mlp", 4)
    model.requires_grad_(False)
    found, plain = (signal(model, name, batches=batches) for name in ("meta_gradient", "gradient"))
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value * model.get_parameter(name))


# -- NTK-SAP -------------------------------------------------------------------------------------------------------------


def test_ntk_sensitivity_of_one_linear_layer() -> None:
    """`f = (θ⊙m)x` gives `−ε(z⊙m)x` for the difference, so the derivative by `m_ij` is `2ε² z_ij x_j Σ_k z_ik m_ik x_k`."""
    torch.manual_seed(1)
    model = nn.Linear(3, 2).double()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = signal(model, "ntk_sensitivity", example_input=torch.zeros(4, 3).double(), masks={"weight": mask}, seed=7)
    expected = torch.zeros(2, 3).double()
    with seeded(7, "NTK draws"):
        for _ in range(NTK_DRAWS):
            _, z = torch.randn_like(expected), torch.randn_like(expected)
            x = torch.randn(4, 3, dtype=torch.float64)
            expected += 2 * NTK_NOISE**2 * z * torch.einsum("ni,nj->ij", x @ (z * mask).T, x) / (4 * NTK_DRAWS)
    torch.testing.assert_close(found["weight"], expected * mask)


@pytest.mark.parametrize("kind", NETWORKS)
def test_ntk_sensitivity_against_finite_differences(kind: str, unchanged: Guard) -> None:
    """The same draws, and the masks as real numbers; running statistics are those of the unmoved masks."""
    model, ((example, _),) = make(kind, 6)
    masks = half(model)
    with unchanged(model):
        found = signal(model, "ntk_sensitivity", example_input=example, masks=masks, seed=2)
    weights = {n: model.get_parameter(n).detach() for n in found}
    draws = []
    with seeded(2, "NTK draws"):
        for _ in range(NTK_DRAWS):
            drawn = {n: w.mean() + w.std(correction=0) * torch.randn_like(w) for n, w in weights.items()}
            moved = {n: w + 0.01 * torch.randn_like(w) for n, w in drawn.items()}
            x = torch.randn_like(example)
            seen = with_weights(model, {n: w * masks[n] for n, w in drawn.items()})
            for module in seen.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.momentum = 1.0
            with torch.no_grad():
                seen(x)
            draws.append((seen.eval(), drawn, moved, x))

    def distance(scales: dict[str, Tensor]) -> float:
        total = 0.0
        with torch.no_grad():
            for seen, drawn, moved, x in draws:
                one, other = (
                    with_weights(seen, {n: w * scales[n] for n, w in values.items()}).eval()(x)
                    for values in (drawn, moved)
                )
                total += (one - other).square().sum().item() / (len(x) * NTK_DRAWS)
        return total

    base = {n: m.double() for n, m in masks.items()}
    for name, mask in masks.items():
        for index in range(0, mask.numel(), 1 if kind != "attention" else 11):
            values = []
            for sign in (1, -1):
                scales = {**base, name: base[name].clone()}
                scales[name].view(-1)[index] += sign * 1e-5
                values.append(distance(scales))
            slope = (values[0] - values[1]) / 2e-5 * mask.flatten()[index].item()
            assert found[name].flatten()[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_ntk_sensitivity_is_a_function_of_the_seed_and_of_no_values_of_the_input() -> None:
    model, ((example, _),) = make("normed", 6)
    one, two, other = (
        signal(model, "ntk_sensitivity", example_input=x, seed=s)["0.weight"]
        for x, s in ((example, 0), (example + 1, 0), (example, 1))
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_what_ntk_sap_refuses() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids).mean(1))

    class Silent(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(AutoSparseError, match="ntk_sap' draws inputs from a normal, and Tokens takes int64: use a"):
        signal(Tokens(), "ntk_sensitivity", example_input=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(AutoSparseError, match="ntk_sap' compares outputs, and Silent gives no tensors of floats"):
        signal(Silent(3, 2), "ntk_sensitivity", example_input=torch.zeros(2, 3))


# -- all of them -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["hessian_gradient", "meta_gradient", "ntk_sensitivity"])
def test_other_precisions_inputs_by_keyword_ties_and_idle_layers(
    name: str, dtype: torch.dtype, unchanged: Guard
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.idle, self.head = (nn.Linear(4, n) for n in (4, 4, 4, 2))
            self.two.weight = self.one.weight

        def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
            return self.head(self.two(torch.tanh(self.one(a) + b)))

    torch.manual_seed(0)
    model = Net().to(dtype)
    inputs = {key: torch.randn(5, 4, dtype=dtype) for key in "ab"}
    with unchanged(model), torch.no_grad():
        found = signal(model, name, batches=[(inputs, torch.tensor([0, 1, 0, 1, 1]))])
    assert set(found) == {"one.weight", "idle.weight", "head.weight"}
    assert all(v.dtype == dtype and torch.isfinite(v).all() for v in found.values())
    assert (found["idle.weight"] == 0).all() and (found["one.weight"] != 0).any()


def test_images_seen() -> None:
    """By hand: three passes each; steps on 4, 2, 4 and the loss on 2; five draws of 6 through 2 networks and ⅓."""
    _, batches = make("mlp", 4, 2)
    assert images_seen(["weight", "gradient"], batches) == 6
    assert images_seen(["hessian_gradient"], batches) == 18
    assert images_seen(["meta_gradient"], batches) == 3 * (4 + 2 + 4) + 2
    assert images_seen(["ntk_sensitivity"], batches, torch.zeros(6, 3)) == 70
    assert images_seen(["flow", "no_flow", "rescaled_flow", "weight"], batches, torch.zeros(6, 3)) == 0
