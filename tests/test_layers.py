"""Which parameters are prunable, and what is known of them."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer, prunable_layers, unwrap
from autosparse.network.graph import trace


def only(module: nn.Module) -> Layer:
    (layer,) = prunable_layers(module).values()
    return layer


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        # kind, shape, out_dim, in_dim, groups; out, in, fan_in, fan_out, kernel
        (nn.Linear(3, 5), ("linear", (5, 3), 0, 1, 1, 5, 3, 3, 5, ())),
        (nn.Conv1d(4, 6, 3), ("conv", (6, 4, 3), 0, 1, 1, 6, 4, 12, 18, (3,))),
        (nn.Conv2d(4, 6, (3, 2)), ("conv", (6, 4, 3, 2), 0, 1, 1, 6, 4, 24, 36, (3, 2))),
        (nn.Conv3d(2, 6, 3), ("conv", (6, 2, 3, 3, 3), 0, 1, 1, 6, 2, 54, 162, (3, 3, 3))),
        (nn.Conv2d(4, 6, 3, groups=2), ("conv", (6, 2, 3, 3), 0, 1, 2, 6, 4, 18, 27, (3, 3))),
        (nn.Conv2d(4, 4, 3, groups=4), ("conv", (4, 1, 3, 3), 0, 1, 4, 4, 4, 9, 9, (3, 3))),
        (nn.ConvTranspose2d(4, 6, 3), ("conv_transpose", (4, 6, 3, 3), 1, 0, 1, 6, 4, 36, 54, (3, 3))),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), ("conv_transpose", (4, 3, 3, 3), 1, 0, 2, 6, 4, 18, 27, (3, 3))),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_dimensions(module: nn.Module, expected: tuple) -> None:
    layer = only(module)
    got = (
        *(layer.kind, layer.shape, layer.out_dim, layer.in_dim, layer.groups, layer.out_features, layer.in_features),
        *(layer.fan_in, layer.fan_out, layer.kernel),
    )
    assert got == expected
    assert layer.name == "weight"
    assert layer.numel == module.weight.numel()


def test_norms_biases_and_embeddings_are_never_prunable() -> None:
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.PReLU(), nn.EmbeddingBag(5, 4)
    )
    assert list(prunable_layers(model)) == ["1.weight"]


def test_attention_projections() -> None:
    assert {n: (l.kind, l.fan_in) for n, l in prunable_layers(nn.MultiheadAttention(8, 2)).items()} == {
        "in_proj_weight": ("attention", 8),
        "out_proj.weight": ("linear", 8),
    }
    names = list(prunable_layers(nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)))
    assert names == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight


def test_a_tied_weight_counts_once_under_its_first_name() -> None:
    assert list(prunable_layers(Tied())) == ["first.weight"]


def test_a_weight_tied_to_an_embedding_is_an_embedding() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4), "body": nn.Linear(4, 4)})
    model["head"].weight = model["table"].weight
    assert list(prunable_layers(model)) == ["body.weight"]


class Raw(nn.Module):
    """A product with a raw parameter, beside raw parameters that are only added or multiplied element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(4, 6))
        self.position = nn.Parameter(torch.randn(3, 4))
        self.scale = nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(((x + self.position) * self.scale) @ self.projection)


def test_raw_parameters_only_as_operands_of_products() -> None:
    model = Raw()
    assert list(prunable_layers(model)) == ["head.weight"]
    layers = prunable_layers(model, operands=trace(model, torch.ones(1, 3, 4)).operands)
    assert list(layers) == ["projection", "head.weight"]
    assert (layers["projection"].kind, layers["projection"].in_dim, layers["projection"].fan_in) == ("matmul", 0, 4)


def test_include_and_exclude() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert list(prunable_layers(model)) == ["0.weight", "1.0.weight", "1.1.weight"]
    assert list(prunable_layers(model, include=["1.*"])) == ["1.0.weight", "1.1.weight"]
    assert list(prunable_layers(model, include="1.*")) == ["1.0.weight", "1.1.weight"]
    assert list(prunable_layers(model, exclude=["0.*", "1.1.weight"])) == ["1.0.weight"]
    assert list(prunable_layers(model, include=["1.*"], exclude=["*.1.*"])) == ["1.0.weight"]
    with pytest.raises(AutoSparseError, match=r"include pattern 'layer9\.\*' matches no prunable weight.*'0\.weight'"):
        prunable_layers(model, include=["1.*", "layer9.*"])
    with pytest.raises(AutoSparseError, match="exclude pattern 'x' matches no"):
        prunable_layers(model, exclude="x")
    with pytest.raises(AutoSparseError, match="leave no prunable weight"):
        prunable_layers(model, include=["1.*"], exclude=["1.*"])


def test_nothing_to_prune_is_an_error() -> None:
    with pytest.raises(AutoSparseError, match="Sequential has no prunable weights"):
        prunable_layers(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))


def test_a_lazy_parameter_is_an_error() -> None:
    with pytest.raises(AutoSparseError, match=r"'1\.weight' is uninitialized: run the lazy model once"):
        prunable_layers(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


def test_wrappers_come_off() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped = [torch.compile(model), nn.DataParallel(model), fabric.setup(model), fabric.setup(torch.compile(model))]
    for module in wrapped:
        assert unwrap(module) is model
        assert list(prunable_layers(module)) == ["0.weight"]
