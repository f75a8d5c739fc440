"""ReI and RePaIR: by hand on 2×2 weights, twice, on copies, and on every network of the factory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import autosparse
from autosparse import AutoSparseError, Masks, prune
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.network.graph import trace
from autosparse.network.lipschitz import pairs, spectral_norm
from autosparse.trainability.prepare import PREPARATIONS, prepare
from autosparse.trainability.repair import lipschitz, rei, repair
from autosparse.training.cells import CELLS
from autosparse.training.models import MODELS, ModelSettings, create_model

Guard = Callable[[nn.Module], AbstractContextManager[None]]
TWO = torch.zeros(2, 2)


def linear(*rows: list[float], bias: bool = False) -> nn.Sequential:
    """Linear and BatchNorm of two units with the weights given."""
    net = nn.Sequential(nn.Linear(2, 2, bias=bias), nn.BatchNorm1d(2))
    net[0].weight = nn.Parameter(torch.tensor(rows, dtype=torch.float32))
    return net


def mask(*rows: list[int]) -> Masks:
    return Masks({"0.weight": torch.tensor(rows, dtype=torch.bool)})


def close(tensor: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(tensor).float(), torch.as_tensor(expected).float())


# -- by hand ------------------------------------------------------------------------------------------------------------


def test_rei_of_a_diagonal() -> None:
    # σ = 3, mean 1 (stays), v = 10/4 - 1 = 1.5, n = 2: L = 3/√(0.5·2·1.5) = √6
    net = linear([3, 0], [0, 1])
    done = rei(net, TWO).layers
    close(net[0].weight, [[1, 0], [0, 1 / 3]])
    close(net[1].weight, [1 / math.sqrt(6)] * 2)
    assert [(d.name, d.norm, d.note) for d in done] == [("0.weight", "1", "")]
    close([done[0].lipschitz_before, done[0].lipschitz_after], [math.sqrt(6), 1])


def test_repair_counts_the_zeros() -> None:
    # σ = 3, v = 9/4 - 9/16 = 27/16: L = 3/√(27/16) = 4/√3
    net = linear([3, 0], [5, 1])
    done = repair(net, mask([1, 1], [0, 0]), TWO).layers[0]
    close(net[0].weight, [[1, 0], [0, 0]])
    close(net[1].weight, [math.sqrt(3) / 4] * 2)
    close([done.lipschitz_before, done.lipschitz_after], [4 / math.sqrt(3), 1])


def test_repair_subtracts_the_mean_of_those_kept() -> None:
    # kept: mean 0.005, then ±0.5; σ = √0.5, v = 0.5/4: L = √0.5/√0.125 = 2
    net = linear([0.505, -0.495], [7, 7])
    repair(net, mask([1, 1], [0, 0]), TWO)
    close(net[0].weight, [[math.sqrt(0.5), -math.sqrt(0.5)], [0, 0]])
    close(net[1].weight, [0.5, 0.5])


def test_rei_looks_at_pruned_weights_too() -> None:
    net = linear([3, 0], [0, 1])
    done = rei(net, TWO, mask([1, 1], [1, 0])).layers[0]
    close(net[0].weight, [[1, 0], [0, 0]])
    close(net[1].weight, [1 / math.sqrt(6)] * 2)
    close(done.lipschitz_after, 4 / math.sqrt(3) / math.sqrt(6))  # what trains is the masked layer


@pytest.mark.parametrize(("mode", "weight", "gamma"), [("weights", 1.0, 1.0), ("gamma", 3.0, 1 / math.sqrt(6))])
def test_modes(mode: str, weight: float, gamma: float) -> None:
    net = linear([3, 0], [0, 1])
    rei(net, TWO, mode=mode)
    close(net[0].weight[0, 0], weight)
    close(net[1].weight, [gamma] * 2)


def test_gamma_that_is_not_one() -> None:
    net = linear([3, 0], [0, 1])
    net[1].weight = nn.Parameter(torch.tensor([2.0, -4.0]))
    done = rei(net, TWO).layers[0]
    close(net[1].weight, [2 / math.sqrt(6), -4 / math.sqrt(6)])
    close([done.lipschitz_before, done.lipschitz_after], [4 * math.sqrt(6), 4])


def test_small_means_are_subtracted_and_larger_ones_stay() -> None:
    net = linear([0.505, -0.495], [0.505, -0.495])
    rei(net, TWO)
    close(net[0].weight, [[0.5, -0.5], [0.5, -0.5]])  # σ = 1
    net = linear([0.52, -0.48], [0.52, -0.48])
    rei(net, TWO)
    close(net[0].weight, torch.tensor([[0.52, -0.48]] * 2) / math.sqrt(2 * (0.52**2 + 0.48**2)))


@pytest.mark.parametrize("kept", [[[1, 0], [0, 0]], [[1, 1], [0, 0]], [[1, 1], [1, 0]]])
def test_equal_weights_keep_their_mean(kept: list[list[int]]) -> None:
    net = linear([0.003, 0.003], [0.003, 0.003])
    repair(net, mask(*kept), TWO)
    assert bool(net[0].weight.isfinite().all())
    close(torch.linalg.matrix_norm(net[0].weight.detach(), 2), 1)
    assert bool((net[0].weight[torch.tensor(kept).bool()] > 0).all())


def test_equal_weights_have_no_constant() -> None:
    net = linear([0.3, 0.3], [0.3, 0.3])
    done = repair(net, None, TWO).layers[0]
    assert math.isinf(done.lipschitz_after) and "equal" in done.note
    close(net[1].weight, [1, 1])


@pytest.mark.parametrize("how", ["rei", "repair"])
def test_an_empty_layer_is_left(how: str) -> None:
    net = linear([3, 0], [0, 1])
    done = prepare(net, mask([0, 0], [0, 0]), how, example_input=TWO).layers[0]
    assert (done.lipschitz_before, done.lipschitz_after, done.note) == (0, 0, "no weight is left: left as it is")
    close(net[1].weight, [1, 1])
    assert not net[0].weight.any()


def test_a_grouped_convolution_is_a_block_diagonal() -> None:
    # two maps of one number each: σ = 3, n = 1, v = 1
    net = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2, bias=False), nn.BatchNorm2d(2))
    net[0].weight = nn.Parameter(torch.tensor([3.0, 1.0]).view(2, 1, 1, 1))
    rei(net, torch.zeros(2, 2, 1, 1))
    close(net[0].weight.flatten(), [1, 1 / 3])
    close(net[1].weight, [math.sqrt(0.5) / 3] * 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_spectral_norm_is_that_of_the_map(kind: type[nn.Module], groups: int) -> None:
    module = kind(4, 6, 1, groups=groups, bias=False)
    layer = next(iter(prunable_layers(nn.Sequential(module)).values()))
    matrix = module(torch.eye(4).view(4, 4, 1, 1)).detach().flatten(1)
    close(spectral_norm(module.weight.detach(), layer), torch.linalg.matrix_norm(matrix, 2))


def test_rows_of_a_transposed_convolution_are_outputs() -> None:
    layer = Layer("w", "conv_transpose", (2, 1, 1, 2), out_dim=1, in_dim=0)
    close(spectral_norm(torch.arange(4.0).view(2, 1, 1, 2), layer), math.sqrt(14))  # one row: 0 1 2 3


def test_square_gaussian_convolutions_get_half_a_gamma() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(96, 96, 3, bias=False), nn.BatchNorm2d(96))
    rei(net, torch.zeros(1, 96, 3, 3))
    # ‖W‖₂ ≈ s·(√c + √9c), so γ ≈ √4.5/4
    assert net[1].weight.tolist() == pytest.approx([math.sqrt(4.5) / 4] * 96, rel=0.02)


# -- again --------------------------------------------------------------------------------------------------------------


def small(seed: int = 0) -> tuple[nn.Module, Tensor, Masks]:
    net = create_model(ModelSettings("resnet8", 4), image_size=8, seed=seed)
    example = torch.zeros(2, 3, 8, 8)
    return net, example, prune(net, 0.8, "erk", example_input=example)


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("how", ["rei", "repair"])
@pytest.mark.parametrize("mode", ["weights", "gamma", "both"])
def test_the_second_time_changes_no_bit(how: str, mode: str) -> None:
    net, example, masks = small()
    keys = list(net.state_dict())
    prepare(net, masks, how, example_input=example, mode=mode)
    if how == "rei":  # what is pruned is gone: the second one must see the first one's weights
        net, example, masks = small()
        masks = Masks({name: torch.ones_like(kept) for name, kept in masks.items()})
        prepare(net, masks, how, example_input=example, mode=mode)
    again = copy.deepcopy(net)
    prepare(again, masks, how, example_input=example, mode=mode)
    assert same(net, again)
    assert list(again.state_dict()) == keys


@settings(max_examples=20)
@given(mean=st.floats(-0.05, 0.05), scale=st.floats(0.01, 10), seed=st.integers(0, 99))
def test_repair_after_rei_is_repair(mean: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    net[0].weight = nn.Parameter(mean + scale * torch.randn(5, 6))
    example = torch.zeros(2, 6)
    masks = Masks({"0.weight": torch.rand(5, 6) < 0.6})
    alone = copy.deepcopy(net)
    repair(alone, masks, example)
    rei(net, example)
    repair(copy.deepcopy(net), masks, example)
    repair(net, masks, example)
    for one, other in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


def test_a_mean_that_was_too_large_stays_when_the_weights_are_smaller() -> None:
    net = linear([8.02, -7.98], [-7.98, 8.02])  # mean 0.02, σ = 16: 0.00125 afterwards
    rei(net, TWO)
    before = net[0].weight.clone()
    rei(net, TWO)
    assert torch.equal(net[0].weight, before)


# -- what becomes of the function ---------------------------------------------------------------------------------------


class WithBias(nn.Sequential):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 1), copy.deepcopy(norm))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8)], ids=["batch", "group"])
def test_scaling_before_a_norm_leaves_the_function(norm: nn.Module) -> None:
    torch.manual_seed(0)
    net = WithBias(norm)
    with torch.no_grad():
        for module in (net[0], net[3]):
            module.weight.add_(0.2)  # or the mean would go, which changes the function
    images = torch.randn(6, 3, 8, 8)
    before = net(images)
    repair(net, None, images, mode="weights")
    close(torch.linalg.matrix_norm(net[3].weight.detach().flatten(1), 2), 1)
    torch.testing.assert_close(net(images), before, atol=1e-3, rtol=1e-3)


def test_a_layer_without_norm_says_how_its_output_changed() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight = nn.Parameter(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    images = torch.randn(3, 2)
    before = net(images)
    done = repair(net, None, images).layers[0]
    close(net(images), before / 4)
    assert done.norm is None and "0.25 times" in done.note
    close([done.lipschitz_before, done.lipschitz_after], [4, 1])


def test_measuring_changes_nothing(unchanged: Guard) -> None:
    net, example, masks = small()
    with unchanged(net):
        found = lipschitz(net, example, masks)
    assert list(found) == list(masks)
    repaired = repair(net, masks, example).layers
    close(list(found.values()), [layer.lipschitz_before for layer in repaired])
    close(list(lipschitz(net, example).values()), [1.0] * len(found))


# -- pairs --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def paired(model: nn.Module, *shape: int) -> dict[str, str | None]:
    graph = trace(model, torch.zeros(shape))
    layers = prunable_layers(model, operands=graph.operands)
    found = pairs(graph, layers, dict(model.named_parameters()))
    return {
        name.removesuffix(".weight"): pair.gamma and pair.gamma.removesuffix(".weight") for name, pair in found.items()
    }


HAND: dict[str, tuple[Callable[..., Any], dict[str, str | None]]] = {
    "in order": (lambda m, x: m.q(m.b(F.relu(m.p(m.a(x))))), {"a": "p", "b": "q"}),
    "activation": (lambda m, x: m.b(m.p(F.relu(m.a(x)))), {"a": None, "b": None}),
    "pooled": (lambda m, x: m.b(m.p(F.avg_pool2d(m.a(x), 2))), {"a": None, "b": None}),
    "bias": (lambda m, x: m.b(m.p(m.a(x) + m.shift)), {"a": "p", "b": None}),
    "sum": (lambda m, x: m.p(m.a(x) + m.b(x)), {"a": None, "b": None}),
    "joined": (lambda m, x: m.p(torch.cat([m.a(x), m.b(x)], 2)), {"a": None, "b": None}),
    "two norms": (lambda m, x: m.b(m.p(y := m.a(x)) + m.q(y)), {"a": None, "b": None}),
    "two uses": (lambda m, x: m.b(m.p(y := m.a(x)) + y), {"a": None, "b": None}),
    "an output": (lambda m, x: (y := m.a(x), m.p(m.b(y))), {"a": None, "b": "p"}),
    "one norm for two": (lambda m, x: m.p(m.b(F.relu(m.p(m.a(x))))), {"a": None, "b": None}),
    "again": (lambda m, x: m.b(m.p(m.a(m.p(m.a(x))))), {"a": "p", "b": None}),
    "again, with another": (lambda m, x: m.b(m.q(m.a(m.p(m.a(x))))), {"a": None, "b": None}),
    "moved": (lambda m, x: m.b(m.p(m.a(x).flatten(2).unflatten(2, (4, 4)))), {"a": "p", "b": None}),
    "in place": (lambda m, x: m.b(F.relu_(m.p(m.a(x)))), {"a": "p", "b": None}),
}


@pytest.mark.parametrize("case", HAND)
def test_pairs_by_hand(case: str) -> None:
    forward, expected = HAND[case]
    convs = {name: nn.Conv2d(4, 4, 3, padding=1) for name in "ab"}
    net = Net(forward, **convs, **{name: nn.BatchNorm2d(4) for name in "pq"})
    net.shift = nn.Parameter(torch.zeros(4, 1, 1))
    assert paired(net, 2, 4, 4, 4) == expected


def test_what_is_shared_or_has_no_gamma_is_said() -> None:
    shared = Net(HAND["one norm for two"][0], a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), p=nn.BatchNorm2d(4))
    done = repair(shared, None, torch.zeros(2, 4, 4, 4)).layers
    assert [(d.norm, d.note) for d in done] == [
        ("p", "γ left as it is: b.weight shares it"),
        ("p", "γ left as it is: a.weight shares it"),
    ]
    close(shared.p.weight, [1.0] * 4)
    bare = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False))
    (layer,) = repair(bare, None, torch.zeros(2, 4, 4, 4)).layers
    assert (layer.norm, layer.note) == ("1", "its norm has no γ that can be set")


def test_pairs_of_resnet20() -> None:
    found = paired(create_model(ModelSettings("resnet20", 2)), 2, 3, 32, 32)
    assert found.pop("fc") is None
    assert found == {
        name: name.replace("conv", "bn") if "conv" in name else name.replace("shortcut.0", "shortcut.1")
        for name in found
    }
    assert sum("shortcut" in name for name in found) == 2 and len(found) == 21


def test_pairs_of_vgg11() -> None:
    found = paired(create_model(ModelSettings("vgg11", 2)), 2, 3, 32, 32)
    assert found.pop("classifier") is None
    assert list(found.items()) == [(f"features.{i}", f"features.{i + 1}") for i in (0, 4, 8, 11, 15, 18, 22, 25)]


def test_pairs_of_cells() -> None:
    def cells(cell: str, **options: Any) -> dict[str, str | None]:
        model = ModelSettings("cellnet", 4, {"cell": cell, "blocks": (1,), **options})
        return paired(create_model(model, image_size=8), 2, 3, 8, 8)

    preact = {"body.0": None, "body.1.branch.2": "body.1.branch.3", "body.1.branch.5": None}
    assert cells("preact") == {**preact, "classifier": None}
    branch = {f"body.3.branch.{i}": f"body.3.branch.{i + 1}" for i in (0, 3, 6)}  # the second is depthwise
    assert cells("inverted") == {"body.0": "body.1", **branch, "classifier": None}
    assert cells("mlp", blocks=(2,)) == {"body.1": "body.2", "body.4": "body.5", "classifier": None}
    assert set(cells("basic", norm="none").values()) == {None}
    assert set(cells("attention", norm="layer", stem_stride=4).values()) == {None}


# -- the front door -----------------------------------------------------------------------------------------------------

EVERY = [
    *(
        ModelSettings(name, 2 if name != "mlp" else 8)
        for name in MODELS
        if name in ("mlp", "convnet", "resnet8", "resnet50", "vgg11")  # the others are deeper ones of these
    ),
    *(ModelSettings("cellnet", 4, {"cell": cell}) for cell in CELLS if cell != "attention"),
    ModelSettings("cellnet", 4, {"cell": "attention", "norm": "layer", "stem_stride": 4}),
    ModelSettings("convnet", 4, {"norm": False}),
    ModelSettings("resnet8", 4, {"residual": [0.7, 0.3]}),
]


@pytest.mark.parametrize("model", EVERY, ids=ModelSettings.label)
@pytest.mark.parametrize("how", PREPARATIONS)
def test_every_network_can_be_prepared(model: ModelSettings, how: str) -> None:
    net = create_model(model, image_size=8)
    example = torch.zeros(2, 3, 8, 8)
    masks = prune(net, 0.5, "erk", example_input=example)
    masks.signs = {n: torch.rand(m.shape) < 0.5 for n, m in masks.items()}
    done = prepare(net, masks, how, example_input=example)
    assert done.how == how
    assert [layer.name for layer in done.layers] == list(masks)
    parameters = dict(net.named_parameters())
    for name, kept in done.masks.items():
        assert not parameters[name][~kept].any()
    if how == "repair":
        assert [layer.lipschitz_after for layer in done.layers] == pytest.approx([1.0] * len(masks), rel=1e-5)
    assert bool(net(torch.randn(2, 3, 8, 8)).isfinite().all())


def test_mistakes_have_one_line(unchanged: Guard) -> None:
    net = linear([3, 0], [0, 1])
    wrong = Masks({"0.weight": torch.ones(3, 2, dtype=torch.bool)})
    with unchanged(net):
        with pytest.raises(AutoSparseError, match="prepare is 'repiar': did you mean 'repair'"):
            autosparse.prepare(net, None, "repiar", example_input=TWO)
        with pytest.raises(AutoSparseError, match="option 'mod' of repair: did you mean 'mode'"):
            autosparse.prepare(net, None, "repair", example_input=TWO, mod="both")
        with pytest.raises(AutoSparseError, match="mode is 'all'"):
            autosparse.prepare(net, None, "repair", example_input=TWO, mode="all")
        with pytest.raises(AutoSparseError, match="made for"):
            autosparse.prepare(net, wrong, "repair", example_input=TWO)
    net[0].weight.data[0, 0] = math.nan
    with pytest.raises(AutoSparseError, match="weight' is not finite"):
        autosparse.prepare(net, None, "repair", example_input=TWO)


# -- residual scaling ---------------------------------------------------------------------------------------------------


def test_residual_scales() -> None:
    plain = create_model(ModelSettings("resnet8", 4), image_size=8, seed=3)
    net = create_model(ModelSettings("resnet8", 4, {"residual": [0.7, 0.3]}), image_size=8, seed=3)
    new = net.state_dict().keys() - plain.state_dict().keys()
    assert new == {f"stages.{stage}.0.sum.{scale}" for stage in range(3) for scale in ("alpha", "beta")}
    same_weights = plain.state_dict()
    assert all(torch.equal(tensor, same_weights[name]) for name, tensor in net.state_dict().items() if name not in new)
    block, images = net.stages[0][0], torch.randn(2, 4, 5, 5)
    assert block.sum.beta.shape == (4, 1, 1) and block.sum.beta.requires_grad
    block.conv2.weight.data.zero_()
    close(block(images), F.relu(0.7 * images))
    with pytest.raises(AutoSparseError, match="residual is"):
        create_model(ModelSettings("resnet8", 4, {"residual": [1]}))
