"""Synaptic flow: against path sums by hand, the usual SynFlow written naively, and conservation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import prunable_layers
from autosparse.masks.schedule import densities
from autosparse.masks.selection import select
from autosparse.network.flow import rescaled_flow, synaptic_flow, without_flow
from autosparse.network.graph import trace
from autosparse.network.reachability import effective_masks
from autosparse.training.models import ModelSettings, create_model


def flow_of(model: nn.Module, example: Any, masks: Mapping[str, Tensor] | None = None, **keywords: Any) -> Any:
    return synaptic_flow(model, prunable_layers(model), example, masks, **keywords)


def usual(model: nn.Module, shape: tuple[int, ...], masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """SynFlow as usually implemented, with clean statistics, and `R`."""
    model = copy.deepcopy(model).double().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.eps = 0.0
    for name, p in model.named_parameters():
        p.data.abs_()
        if name.endswith("bias"):
            p.data.zero_()
        if name in masks:
            p.data.mul_(masks[name])
    total = model(torch.ones(1, *shape, dtype=torch.float64)).sum()
    total.backward()
    parameters = dict(model.named_parameters())
    return {n: parameters[n].grad * parameters[n].data for n in prunable_layers(model)}, float(total.detach())  # type: ignore[operator]


def test_mlp_by_hand() -> None:
    """`R = 1·(1 + 2) + 2·(3 + 0) = 9`, and a weight's flow is the sum over the paths through it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    model[2].weight.data = torch.tensor([[-1.0, 2.0]])
    found = flow_of(model, torch.randn(5, 2))
    assert found["0.weight"].tolist() == [[1, 2], [6, 0]]
    assert found["2.weight"].tolist() == [[3, 6]]
    masks = {"0.weight": torch.tensor([[True, False], [True, True]])}
    found = flow_of(model, torch.randn(5, 2), masks)
    assert found["0.weight"].tolist() == [[1, 0], [6, 0]]
    assert found["2.weight"].tolist() == [[1, 6]]


def test_three_layers_against_all_paths() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.GELU(), nn.Linear(3, 2))
    a, b, c = (model[i].weight.detach().double().abs() for i in (0, 2, 4))
    paths = torch.einsum("ji,kj,lk->ijkl", a, b, c)
    found = flow_of(model, torch.randn(1, 3))
    assert torch.allclose(found["0.weight"], paths.sum((2, 3)).T)
    assert torch.allclose(found["2.weight"], paths.sum((0, 3)).T)
    assert torch.allclose(found["4.weight"], paths.sum((0, 1)).T)


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "resnet50", "convnet"])
def test_equals_the_usual_synflow_on_plain_networks(name: str) -> None:
    model = create_model(ModelSettings(name, width=4), image_size=16)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()  # type: ignore[union-attr]
    masks = {n: torch.rand(layer.shape) < 0.7 for n, layer in prunable_layers(model).items()}
    expected, total = usual(model, (3, 16, 16), masks)
    found = flow_of(model, torch.randn(2, 3, 16, 16), masks)
    for layer, score in found.items():
        assert torch.allclose(score, expected[layer], rtol=1e-10, atol=0), layer
        assert not score[~masks[layer]].any()
        if name in ("vgg11", "convnet"):  # what goes into each layer of a chain comes out of it
            assert float(score.sum()) == pytest.approx(total, rel=1e-10)


NETWORKS = {
    "mobilenet_v3_small": ({}, 32),
    "efficientnet_b0": ({}, 32),
    "convnext_tiny": ({}, 32),
    "swin_t": ({}, 32),
    "swin_v2_t": ({}, 32),
    "vit_b_16": ({"image_size": 32}, 32),
    "densenet121": ({}, 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_flow_reaches_every_layer_but_those_named(name: str) -> None:
    keywords, size = NETWORKS[name]
    model = getattr(pytest.importorskip("torchvision").models, name)(**keywords)
    layers, example = prunable_layers(model), torch.randn(1, 3, size, size)
    found = synaptic_flow(model, layers, example)
    dry = without_flow(model, layers, example)
    for layer, score in found.items():
        assert torch.isfinite(score).all()
        assert (score >= 0).all()
        assert (score.sum() > 0) == (layer not in dry or not dry[layer].all()), layer
        assert layer not in dry or not score[dry[layer]].any()
    gates = (".cpb_mlp.", ".fc1.", ".fc2.") if "swin" in name else (".fc1.", ".fc2.")
    whole = {layer for layer in dry if dry[layer].all()}
    partly = dry.keys() - whole
    if name in ("mobilenet_v3_small", "efficientnet_b0", "swin_v2_t"):
        assert whole == {layer for layer in layers if any(gate in layer for gate in gates)}
    else:
        assert not whole
    if "swin" in name or "vit" in name:
        assert partly == {layer for layer in layers if layer.endswith(("qkv.weight", "in_proj_weight"))}
        for layer in partly:
            width = layers[layer].shape[0] // 3
            assert dry[layer][: 2 * width].all()
            assert not dry[layer][2 * width :].any()
    else:
        assert not partly


def test_timm_networks() -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet50", "convnextv2_atto", "efficientvit_b0", "nf_resnet26"):  # zero-initialised branches, too
        model = timm.create_model(name)
        layers, example = prunable_layers(model), torch.randn(1, 3, 32, 32)
        found = synaptic_flow(model, layers, example)
        dry = without_flow(model, layers, example)
        assert all(torch.isfinite(s).all() and (s >= 0).all() for s in found.values())
        assert {n for n, s in found.items() if not s.any()} == {n for n, d in dry.items() if d.all()} == set()


def test_attention_is_the_mean_of_the_values() -> None:
    """`R = Σ_tokens |O||V|·1` for any queries and keys."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True)

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    found = flow_of(Self(), torch.randn(1, 3, 4))
    v, o = model.in_proj_weight.detach().double().abs()[8:], model.out_proj.weight.detach().double().abs()
    stacked = found["attention.in_proj_weight"]
    assert not stacked[:8].any()
    assert torch.allclose(stacked[8:], 3 * o.sum(0)[:, None] * v)
    assert torch.allclose(found["attention.out_proj.weight"], 3 * o * v.sum(1))


class Gated(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.form == "mean":
            return a * b
        if self.form == "tanh":
            return torch.tanh(a) * torch.sigmoid(b)
        if self.form == "swish by hand":
            return a * (b * (1 / (1 + (-b).exp())))
        if self.form == "broadcast":
            return F.relu(a) * b.mean(-1, keepdim=True)
        if self.form == "norm by hand":
            centred = a - a.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * F.hardsigmoid(b)
        if self.form == "hard swish by hand":
            return torch.where(a > 0, a, 0.0 * a) + 0 * a * F.relu6(b + 3) / 6
        return a * F.silu(b)


@pytest.mark.parametrize(
    ("form", "share"),
    [
        ("swiglu", (1, 0)),
        ("swish by hand", (1, 0)),
        ("tanh", (1, 0)),
        ("broadcast", (1, 0)),
        ("norm by hand", (1, 0)),
        ("mean", (0.5, 0.5)),
        ("hard swish by hand", (0.5, 0)),  # of the two branches of `where` the mean
    ],
)
def test_gates_are_one(form: str, share: tuple[float, float]) -> None:
    model = Gated(form)
    found = flow_of(model, torch.randn(1, 2))
    for key, part in zip("ab", share, strict=True):
        weight = getattr(model, key).weight.detach().double().abs()
        assert torch.allclose(found[f"{key}.weight"], part * weight), form


def test_scales_count_and_zero_ones_are_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.norm = nn.LayerNorm(2)
            self.scale = nn.Parameter(torch.tensor([-3.0, 5.0]))
            self.skip = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.skip * self.scale * self.norm(self.a(x))

    model = Net()
    model.norm.weight.data = torch.tensor([-2.0, 1.0])
    weight = model.a.weight.detach().double().abs()
    assert torch.allclose(flow_of(model, torch.randn(1, 2))["a.weight"], weight * torch.tensor([[6.0], [5.0]]))
    nn.init.zeros_(model.a.weight)
    assert flow_of(model, torch.randn(1, 2))["a.weight"].tolist() == [[6, 6], [5, 5]]
    masks = {"a.weight": torch.zeros(2, 2, dtype=torch.bool)}
    assert not flow_of(model, torch.randn(1, 2), masks)["a.weight"].any()


def plain(depth: int, width: int) -> nn.Sequential:
    convolutions = [nn.Conv2d(width if i else 3, width, 3, padding=1) for i in range(depth)]
    return nn.Sequential(*(m for conv in convolutions for m in (conv, nn.ReLU())), nn.Flatten(), nn.LazyLinear(2))


def test_finite_at_any_depth() -> None:
    model = plain(100, 16)
    model(torch.randn(1, 3, 4, 4))
    found = flow_of(model, torch.randn(1, 3, 4, 4))
    sums = [float(s.sum()) for s in found.values()]
    assert sums == pytest.approx([sums[0]] * len(sums))
    assert all((s > 0).all() for s in found.values())
    deep = flow_of(create_model("resnet110"), torch.randn(1, 3, 8, 8))
    assert all(torch.isfinite(s).all() and s.sum() > 0 for s in deep.values())


@pytest.mark.parametrize(("factor", "dtype"), [(1e30, torch.float64), (1e-30, torch.float64), (1.0, torch.float32)])
def test_far_outside_of_the_range_scores_keep_their_ratios(factor: float, dtype: torch.dtype) -> None:
    """Also over skips: the same network with weights of order 1 gives the same scores, but for one factor."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + self.b(x) / 7)

    model = nn.Sequential(*(Block() for _ in range(40)), nn.Linear(8, 1))
    expected = flow_of(model, torch.randn(1, 8))
    weights = {n: model.get_parameter(n).detach().double() * factor for n in expected}
    found = flow_of(model, torch.randn(1, 8), dtype=dtype, weights=weights)
    ratio = found["40.weight"].double() / expected["40.weight"]
    assert all(torch.allclose(found[n].double(), expected[n] * ratio.mean(), rtol=1e-4, atol=0) for n in expected)


def test_a_hundred_steps_leave_no_dead_layer() -> None:
    model = create_model("convnet", in_channels=1, image_size=12)
    layers, example = prunable_layers(model), torch.ones(1, 1, 12, 12)
    masks = None
    for density in densities(0.005, 100):
        masks = select(synaptic_flow(model, layers, example, masks), density, layers=layers, within=masks)
    assert masks is not None
    assert masks.kept == round(0.005 * masks.total)
    assert all(mask.any() for mask in masks.values())
    final = synaptic_flow(model, layers, example, masks)
    assert all((final[n][mask] > 0).all() for n, mask in masks.items())  # every weight that is left lies on a path


def test_leaves_the_model_alone_and_takes_half_precision() -> None:
    model = create_model("resnet8", image_size=8).train()
    expected = flow_of(model, torch.randn(1, 3, 8, 8))
    half = copy.deepcopy(model).bfloat16()
    before, state = {n: t.clone() for n, t in half.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        found = flow_of(half, torch.zeros(1, 3, 8, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in half.state_dict().items())
    assert half.training
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in half.parameters())
    assert all(s.dtype == torch.float64 and torch.allclose(s, expected[n], rtol=0.1) for n, s in found.items())


def test_tied_weights_and_tokens() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(7, 4), nn.Parameter(torch.randn(3, 4))
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(F.gelu(self.a(self.tokens(ids) + self.places)))

    model = Net()
    w = model.a.weight.detach().double().abs()
    found = flow_of(model, torch.zeros(1, 3, dtype=torch.long))
    both = 3 * (w * w.sum(0)[:, None] + w * w.sum(1))
    assert list(found) == ["a.weight"]
    assert torch.allclose(found["a.weight"], both)
    masked = flow_of(model, torch.zeros(1, 3, dtype=torch.long), {"b.weight": torch.zeros(4, 4, dtype=torch.bool)})
    assert not masked["a.weight"].any()


class Shifted(nn.Module):
    """`h[:, 1:] += f(h[:, :-1])`, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.a, self.f, self.b = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.in_place:
            before = h[:, 1:]
            h[:, 1:] += self.f(h[:, :-1])
            return self.b(h * 2) + before.sum(1, keepdim=True)[..., :2]
        h = torch.cat([h[:, :1], h[:, 1:] + self.f(h[:, :-1])], 1)
        return self.b(h * 2) + h[:, 1:].sum(1, keepdim=True)[..., :2]


class Buffered(nn.Module):
    """Layer after layer into slices of one buffer, each reading what is there (as DenseNets with shared memory do)."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.steps, self.b = nn.ModuleList(nn.Linear(2 + 2 * i, 2) for i in range(40)), nn.Linear(82, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            held = torch.zeros(len(x), 82)
            held[:, :2] = x
            for i, step in enumerate(self.steps):
                held[:, 2 + 2 * i : 4 + 2 * i] = step(held[:, : 2 + 2 * i])
        else:
            held = x
            for step in self.steps:
                held = torch.cat([held, step(held)], 1)
        return self.b(held)


class Recurrent(nn.Module):
    """A GRU of one layer, as torch has it or written out."""

    def __init__(self, in_place: bool, bidirectional: bool = False) -> None:
        super().__init__()
        self.in_place = in_place
        self.cell = nn.GRU(3, 4, batch_first=True, bidirectional=bidirectional)
        self.b = nn.Linear(8 if bidirectional else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            return self.b(self.cell(x)[0])
        sides = [self.one_way(x, "l0")]
        if self.cell.bidirectional:
            sides.append(self.one_way(x.flip(1), "l0_reverse").flip(1))
        return self.b(torch.cat(sides, -1))

    def one_way(self, x: Tensor, key: str) -> Tensor:
        (wi, wh), (bi, bh) = ([getattr(self.cell, f"{kind}_{p}h_{key}") for p in "ih"] for kind in ("weight", "bias"))
        h, found = x.new_zeros(len(x), 4), []
        for t in range(x.shape[1]):
            (r, z, n), (hr, hz, hn) = F.linear(x[:, t], wi, bi).chunk(3, -1), F.linear(h, wh, bh).chunk(3, -1)
            r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
            n = torch.tanh(n + r * hn)
            h = (h - n) * z + n
            found.append(h)
        return torch.stack(found, 1)


@pytest.mark.parametrize("kind", ["shifted", "buffered", "gru", "bidirectional gru"])
def test_writes_through_views_give_the_flow_of_the_network_without(kind: str) -> None:
    def make(in_place: bool) -> nn.Module:
        torch.manual_seed(0)
        if "gru" in kind:
            return Recurrent(in_place, "bi" in kind)
        return Shifted(in_place) if kind == "shifted" else Buffered(in_place)

    x = torch.randn(1, 2) if kind == "buffered" else torch.randn(1, 5, 3)
    written, plain = make(in_place=True), make(in_place=False)
    assert torch.allclose(written(x), plain(x), atol=1e-5)
    layers = prunable_layers(written, operands=trace(written, x).operands)
    for measured in (synaptic_flow, rescaled_flow):
        found, expected = (measured(model, layers, x) for model in (written, plain))
        for name in layers:
            assert expected[name].sum() > 0
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=0, msg=name)
    kept = {name: torch.rand(layer.shape) > 0.7 for name, layer in layers.items()}
    one, other = (effective_masks(model, kept, x) for model in (written, plain))
    assert all(torch.equal(one[name], other[name]) for name in layers)


def test_writes_in_place_and_reparametrisations() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
            self.b = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros(x.shape[0], 4)
            left = out[:, :2]
            left[:] = self.a(x)
            out[:, 2:] = self.b(x).relu_()
            return out

    model = Net()
    found = synaptic_flow(model, trace(model, torch.randn(1, 2)).operands, torch.randn(1, 2))
    assert len(found) == 2
    for name, score in found.items():
        assert torch.allclose(score, model.get_parameter(name).detach().double().abs())


def test_operators_without_a_rule_are_named() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(self.a(x)).real

    with pytest.raises(AutoSparseError, match=r"cannot follow aten\._fft_r2c\.default in Spectrum"):
        flow_of(Spectrum(), torch.randn(1, 4))

    class Sorted(Spectrum):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y.gather(1, y.argmax(1, keepdim=True))

    with pytest.raises(AutoSparseError, match=r"aten\.gather\.default in Sorted \(activations choose"):
        flow_of(Sorted(), torch.randn(1, 4))


def test_mistakes() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AutoSparseError, match=r"mask 'x\.weight' fits no parameter"):
        flow_of(model, torch.randn(1, 2), {"x.weight": torch.ones(2, 2)})
    with pytest.raises(AutoSparseError, match=r"weight '0\.weight' has shape \(2, 3\)"):
        flow_of(model, torch.randn(1, 2), weights={"0.weight": torch.ones(2, 3)})
    with pytest.raises(AutoSparseError, match="give example_input of the shape"):
        flow_of(model, torch.randn(1, 3))
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(AutoSparseError, match=r"'0\.weight' is not finite"):
        flow_of(model, torch.randn(1, 2))


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_the_flow_lies_where_the_model_does(device: str) -> None:
    model = create_model("resnet20", image_size=8)
    expected = flow_of(model, torch.randn(1, 3, 8, 8))
    found = flow_of(model.to(device), torch.randn(1, 3, 8, 8))
    assert all(s.device.type == device and torch.allclose(s.cpu(), expected[n]) for n, s in found.items())
    assert without_flow(model, prunable_layers(model), torch.randn(1, 3, 8, 8)) == {}
