"""Effective weights, against counts by hand, paths enumerated one by one, and gradients of linear networks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data

from autosparse import Masks
from autosparse.errors import AutoSparseError
from autosparse.masks.layers import prunable_layers
from autosparse.network import reachability as module
from autosparse.network.graph import trace
from autosparse.network.reachability import effective_masks, reachability
from autosparse.pruning.prune import describe


def full(model: nn.Module, **layers: Any) -> dict[str, Tensor]:
    """All of the model's weights kept, but for those given."""
    masks = {name: torch.ones(layer.shape, dtype=torch.bool) for name, layer in prunable_layers(model).items()}
    return masks | {name.replace("__", "."): torch.as_tensor(mask, dtype=torch.bool) for name, mask in layers.items()}


def test_mlp_by_hand() -> None:
    """x0 -> h0 -> y0 is the only path: h1 has no output, h2 no input."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    masks = {"0.weight": torch.tensor([[1, 0], [0, 1], [0, 0]]).bool(), "2.weight": torch.tensor([[1, 0, 1]]).bool()}
    found = effective_masks(model, masks, torch.randn(7, 2))
    assert found["0.weight"].tolist() == [[True, False], [False, False], [False, False]]
    assert found["2.weight"].tolist() == [[True, False, False]]
    report = reachability(model, masks, torch.randn(7, 2))
    assert report.effective == {"0.weight": 1, "2.weight": 1}
    assert report.effective_sparsity == 1 - 2 / 9
    assert report.dead_layers == ()
    assert report.exact


def test_a_broken_chain_kills_every_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    masks = full(model, **{"2__weight": [[0, 0], [0, 1]], "0__weight": [[1, 1], [0, 0]]})
    report = reachability(model, masks, torch.randn(1, 2))
    assert report.dead_layers == ("0.weight", "2.weight", "4.weight")
    assert report.effective_sparsity == 1.0


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 2, 1)
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.norm(self.a(x)), inplace=True)
        x = x + self.b(y)
        return self.head(F.max_pool2d(x, 4).flatten(1))


def test_a_dead_branch_beside_a_living_skip() -> None:
    model = Residual()
    report = reachability(model, full(model, b__weight=torch.zeros(2, 2, 3, 3)), torch.randn(1, 2, 4, 4))
    assert report.dead_layers == ("a.weight", "b.weight")
    assert report.effective == {"stem.weight": 4, "a.weight": 0, "b.weight": 0, "head.weight": 4}


def test_biases_and_shifts_are_no_path() -> None:
    model = Residual()
    nn.init.ones_(model.norm.bias)
    report = reachability(model, full(model, a__weight=torch.zeros(2, 2, 3, 3)), torch.randn(1, 2, 4, 4))
    assert report.dead_layers == ("a.weight", "b.weight")


def test_outer_taps_on_a_map_of_one_pixel_see_only_padding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    found = effective_masks(model, full(model), torch.randn(1, 3, 1, 1))
    assert found["0.weight"].sum((0, 1)).tolist() == [[0, 0, 0], [0, 12, 0], [0, 0, 0]]
    assert found["3.weight"].all()


# The smallest images whose last feature map shows every kernel tap something else than padding.
DENSE = {
    "resnet18": ({}, 64),
    "vit_b_16": ({"image_size": 32}, 32),
    "mobilenet_v3_small": ({}, 96),
    "convnext_tiny": ({}, 128),
    "swin_t": ({}, 64),
    "densenet121": ({}, 64),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_masks_are_fully_effective(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    keywords, size = DENSE[name]
    model = getattr(models, name)(**keywords)
    report = reachability(model, full(model), torch.randn(1, 3, size, size))
    assert report.effective_sparsity == 0.0
    assert report.exact


def test_dense_timm_vit_is_fully_effective() -> None:
    model = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", img_size=32)
    assert reachability(model, full(model), torch.randn(1, 3, 32, 32)).effective_sparsity == 0.0


def test_operators_of_common_networks_are_all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_any_to_any", lambda *_: pytest.fail("an operator without a rule"))
    models = pytest.importorskip("torchvision").models
    for name in ("mobilenet_v3_small", "swin_v2_t", "shufflenet_v2_x1_0", "regnet_y_400mf"):
        model = getattr(models, name)()
        assert reachability(model, full(model), torch.randn(1, 3, 32, 32)).exact
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert reachability(encoder, full(encoder), torch.randn(1, 3, 8)).effective_sparsity == 0.0


@st.composite
def bits(draw: st.DrawFn, *shape: int) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(bits(3, 3), bits(3, 3), bits(2, 3))
def test_mlp_with_a_skip_against_all_paths(first: Tensor, second: Tensor, third: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.a(x))
            return self.c(h + torch.sigmoid(self.b(h)))

    wanted = {name: torch.zeros_like(m) for name, m in (("a.weight", first), ("b.weight", second), ("c.weight", third))}
    for x, h, y in itertools.product(range(3), range(3), range(2)):
        if first[h, x] and third[y, h]:  # over the skip
            wanted["a.weight"][h, x] = wanted["c.weight"][y, h] = True
        for k in range(3):
            if first[h, x] and second[k, h] and third[y, k]:
                wanted["a.weight"][h, x] = wanted["b.weight"][k, h] = wanted["c.weight"][y, k] = True
    found = effective_masks(Net(), {"a.weight": first, "b.weight": second, "c.weight": third}, torch.randn(2, 3))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def taps(size: int, stride: int) -> Iterator[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
    """(input pixel, output pixel, tap) of a 3×3 convolution with padding 1."""
    out = range((size - 1) // stride + 1)
    for y, x, i, j in itertools.product(out, out, range(3), range(3)):
        row, column = y * stride + i - 1, x * stride + j - 1
        if 0 <= row < size and 0 <= column < size:
            yield (row, column), (y, x), (i, j)


@settings(max_examples=30, deadline=None)
@given(bits(2, 1, 3, 3), bits(2, 1, 3, 3), bits(2, 8))
def test_conv_net_against_all_paths(first: Tensor, second: Tensor, third: Tensor) -> None:
    """A convolution, a depthwise one with stride, and a linear layer on its 2×2 maps."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU6(inplace=True),
        nn.Conv2d(2, 2, 3, padding=1, stride=2, groups=2),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    masks = {"0.weight": first, "3.weight": second, "6.weight": third}
    wanted = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for c, (_, middle, tap) in itertools.product(range(2), taps(3, 1)):
        for start, (row, column), tap2 in taps(3, 2):
            for y in range(2):
                unit = 4 * c + 2 * row + column
                if start == middle and first[c, 0][tap] and second[c, 0][tap2] and third[y, unit]:
                    wanted["0.weight"][c, 0][tap] = wanted["3.weight"][c, 0][tap2] = wanted["6.weight"][y, unit] = True
    found = effective_masks(model, masks, torch.randn(1, 1, 3, 3))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
@pytest.mark.parametrize("density", [0.002, 0.02])
def test_agrees_with_gradients_of_a_linear_network(name: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without activations and shifts, at random weights, a gradient is zero exactly where there is no path."""
    torch.manual_seed(0)
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: x)
    model = getattr(pytest.importorskip("torchvision").models, name)().double().eval()
    for owner in list(model.modules()):
        for key, child in list(owner.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(owner, key, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                setattr(owner, key, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    masks = {n: torch.rand(layer.shape) < density for n, layer in prunable_layers(model).items()}
    for n, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape) * masks[n] if n in masks else torch.rand(p.shape) + 0.5)
            if n.endswith("bias"):
                p.zero_()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    out = model(x)
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), [model.get_parameter(n) for n in masks])
    found = effective_masks(model, masks, x)
    for (n, mask), g in zip(masks.items(), gradients, strict=True):
        assert torch.equal(found[n], mask & (g != 0)), n
    assert sum(int(f.sum()) for f in found.values()) < sum(int(m.sum()) for m in masks.values())


def test_a_hundred_layers_neither_overflow_nor_vanish() -> None:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(100)), nn.AdaptiveAvgPool2d(1))
    report = reachability(model, full(model), torch.randn(1, 8, 8, 8))
    assert report.effective_sparsity == 0.0
    thin = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(100)))
    identity = {name: torch.eye(4, dtype=torch.bool) for name in full(thin)}
    assert set(reachability(thin, identity, torch.randn(1, 4)).effective.values()) == {4}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_attention_by_hand() -> None:
    """Two heads of two channels. With the output projection of head 0 pruned, its queries, keys and values are dead."""
    model = Attention()
    masks = full(model)
    masks["attention.out_proj.weight"][:, :2] = False
    found = effective_masks(model, masks, torch.randn(1, 3, 4))
    rows = found["attention.in_proj_weight"].all(1).tolist()
    assert rows == [False, False, True, True] * 3
    assert found["attention.in_proj_weight"].any(1).tolist() == rows
    assert found["attention.out_proj.weight"].sum() == 8


def test_a_gate_passes_paths_from_either_factor() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.value(x) * torch.sigmoid(self.gate(x))

    model = Gated()
    masks = full(model, gate__weight=[[0, 0], [1, 0]], value__weight=[[1, 0], [0, 0]])
    assert reachability(model, masks, torch.randn(1, 2)).effective == {"value.weight": 1, "gate.weight": 1}


@pytest.mark.parametrize("form", ["where", "mul", "masked_fill"])
def test_a_constant_mask_in_the_model_cuts_paths(form: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("keep", torch.tensor([True, False, True, False]))

        def forward(self, x: Tensor) -> Tensor:
            h = F.normalize(self.a(x))
            if form == "where":
                h = torch.where(self.keep, h, torch.zeros_like(h))
            elif form == "mul":
                h = h * self.keep
            else:
                h = h.masked_fill(~self.keep, -1.0)
            return self.b(h)

    model = Masked()
    with torch.inference_mode():
        found = effective_masks(model, full(model), torch.randn(2, 4))
    assert found["a.weight"].any(1).tolist() == found["b.weight"].any(0).tolist() == [True, False, True, False]


def test_recurrent_network_with_raw_weights() -> None:
    class Last(nn.Module):
        def __init__(self, kind: type[nn.RNNBase]) -> None:
            super().__init__()
            self.rnn, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    for kind in (nn.LSTM, nn.GRU):
        model, x = Last(kind), torch.randn(2, 5, 3)
        masks = {
            name: torch.ones(layer.shape, dtype=torch.bool)
            for name, layer in prunable_layers(model, operands=trace(model, x).operands).items()
        }
        assert set(masks) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight"}
        report = reachability(model, masks, x)
        assert (report.effective_sparsity, report.exact) == (0.0, True)
        masks["rnn.weight_ih_l0"].zero_()
        assert set(reachability(model, masks, x).dead_layers) == set(masks)


def test_tokens_tied_embedding_and_weight_norm() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.mid = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Any:
            return {"logits": self.head(self.mid(self.embed(tokens)).relu_()), "loss": None}

    model, direction = Language(), "mid.parametrizations.weight.original1"
    masks = {direction: torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]]).bool(), "head.weight": torch.zeros(5, 3).bool()}
    masks["head.weight"][0] = True
    report = reachability(model, masks, torch.zeros(2, 4, dtype=torch.long))
    assert report.effective == {direction: 4, "head.weight": 2}


def test_writes_into_slices() -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.ones(len(x), 4, device=x.device)
            y[:, :2] = self.a(x)
            y[:, 2:] += self.b(x)
            return self.c(y)

    model = Slices()
    assert reachability(model, full(model), torch.randn(2, 4)).effective_sparsity == 0.0
    report = reachability(model, full(model, b__weight=torch.zeros(2, 4)), torch.randn(2, 4))
    assert report.effective == {"a.weight": 8, "b.weight": 0, "c.weight": 2}


def test_an_unknown_operator_connects_everything() -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.fft.fft(self.a(x)).real)

    model = Fourier()
    masks = full(model, a__weight=[[1, 0], [0, 0], [0, 0], [0, 0]])
    assert reachability(model, masks, torch.randn(1, 2)).effective == {"a.weight": 1, "b.weight": 8}


def test_control_flow_that_depends_on_values() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    model = Gated()
    assert reachability(model, full(model), torch.ones(3, 4)).dead_layers == ("b.weight",)


def test_a_network_that_cannot_be_followed_counts_kept_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(module._Replay, "run", fail)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    masks = full(model, **{"0__weight": [[0, 0], [0, 0]], "1__weight": [[0, 1], [0, 0]]})
    report = reachability(model, masks, torch.randn(1, 2))
    assert not report.exact
    assert report.effective == {"0.weight": 0, "1.weight": 1}
    assert report.dead_layers == ("0.weight",)


class Hidden(nn.Module):
    """Where paths cannot be seen: through numpy, or where activations choose how many elements there are."""

    def __init__(self, choose: bool) -> None:
        super().__init__()
        self.choose = choose
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.choose:
            return self.b(h[h.sum(1) > 0])
        return torch.from_numpy(self.b(h).detach().numpy())


@pytest.mark.parametrize("choose", [True, False])
def test_what_cannot_be_followed_is_unknown_and_not_dead(choose: bool) -> None:
    model = Hidden(choose)
    masks = full(model, a__weight=[[0] * 4] * 4)
    report = reachability(model, masks, torch.zeros(3, 4))
    assert report.effective_sparsity is None and not report.exact
    assert report.dead_layers == ("a.weight",)  # empty, which needs no path
    with pytest.warns(UserWarning, match="1 of 2 layers are dead"):
        filled = describe(model, Masks({n: m.bool() for n, m in masks.items()}), torch.zeros(3, 4))
    assert filled.report.effective_sparsity is None
    assert "the network's paths could not be followed" in filled.report.notes[0]


def test_edges_of_a_graph_are_followed_exactly() -> None:
    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(6, 1, bias=False)

        def forward(self, data: Data) -> Tensor:
            source, target = data.edge_index
            h = self.a(data.x)
            return self.b(torch.zeros_like(h).index_add(0, target, h[source]).flatten())

    data = Data(x=torch.zeros(3, 2), edge_index=torch.tensor([[0, 1], [1, 1]]))
    found = effective_masks(Neighbours(), full(Neighbours()), data)
    assert found["b.weight"].tolist() == [[False, False, True, True, False, False]]  # only node 1 receives anything
    assert found["a.weight"].all()


def test_nothing_changes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2)
    ).bfloat16()
    model(torch.randn(2, 3, 4, 4).bfloat16()).sum().backward()
    before = copy.deepcopy(model)
    grads = [p.grad for p in model.parameters()]
    masks = full(model)
    masks["0.weight"][0] = False
    kept = {name: mask.clone() for name, mask in masks.items()}
    rng = torch.get_rng_state()
    with torch.no_grad():
        found = effective_masks(model, masks, torch.zeros(2, 3, 4, 4))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(m.training for m in model.modules())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert all(torch.equal(masks[name], kept[name]) for name in masks)
    assert all(mask.dtype == torch.bool and not mask.requires_grad for mask in found.values())


def test_masks_that_fit_nothing_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AutoSparseError, match=r"'1.weight' fits no parameter of Sequential.*'0.weight'"):
        effective_masks(model, {"1.weight": torch.ones(2, 2)}, torch.randn(1, 2))
    with pytest.raises(AutoSparseError, match=r"'0.weight' has shape \(3, 2\): give one of shape \(2, 2\)"):
        effective_masks(model, {"0.weight": torch.ones(3, 2)}, torch.randn(1, 2))
    with pytest.raises(AutoSparseError, match="give example_input of the shape"):
        effective_masks(model, full(model), torch.randn(1, 5))
