"""Networks made of cells and plain options."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import prunable_layers
from autosparse.network.graph import trace
from autosparse.network.signals import measure
from autosparse.training.cells import ACTIVATIONS, CELLS, NORMS, POOLS, Residual
from autosparse.training.models import ModelSettings, create_model

torch.set_num_threads(1)


def network(
    cell: str, width: int = 8, channels: int = 3, size: int = 8, seed: int = 0, **options: Any
) -> torch.nn.Module:
    if cell == "attention":
        options = {"norm": "layer", "stem_stride": 4, **options}
    settings = ModelSettings("cellnet", width, {"cell": cell, **options})
    return create_model(settings, in_channels=channels, classes=5, image_size=size, seed=seed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_trains_a_step(cell: str, size: int, channels: int) -> None:
    model = network(cell, channels=channels, size=size, blocks=[2, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, channels, size, size, generator=generator), torch.arange(16) % 5
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(images)
        assert outputs.shape == (16, 5)
        loss = F.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_can_be_traced_and_measured(cell: str) -> None:
    model = network(cell, size=12, blocks=(1, 2))
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    graph = trace(model, images)
    layers = prunable_layers(model, operands=graph.operands)
    assert set(graph.layers()) == set(layers), "every weight is seen, and nothing else"
    signals = measure(model, layers, ("gradient", "flow"), batches=[(images, torch.tensor([0, 1, 2, 3]))])
    for name in layers:
        assert (signals["gradient"][name] != 0).any() and torch.isfinite(signals["flow"][name]).all()


@pytest.mark.parametrize(
    ("cell", "options", "weights"),
    [
        # width 4, then 8; 3 channels in, 5 classes
        ("plain", {}, 3 * 4 * 9 + 4 * 8 * 9 + 8 * 5),
        ("plain", {"kernel": 5}, 3 * 4 * 25 + 4 * 8 * 25 + 8 * 5),
        ("plain", {"growth": 1.0}, 3 * 4 * 9 + 4 * 4 * 9 + 4 * 5),
        ("basic", {}, 108 + 2 * 144 + (288 + 576 + 32) + 40),
        ("preact", {}, 108 + 2 * 144 + (288 + 576 + 32) + 40),
        ("bottleneck", {}, 108 + (16 + 144 + 16) + (16 + 144 + 32 + 32) + 40),
        ("inverted", {}, 108 + (64 + 144 + 64) + (64 + 144 + 128) + 40),
        ("dense", {}, 108 + 4 * 2 * 9 + 6 * 8 + 8 * 4 * 9 + 12 * 5),
        ("attention", {}, 3 * 4 * 16 + 2 * (48 + 16 + 32 + 32) + 20),
        ("mlp", {}, 192 * 4 + 16 + 20),
        ("resmlp", {"norm": "none"}, 192 * 4 + 16 + 20),
    ],
)  # fmt: skip
def test_counts(cell: str, options: dict[str, Any], weights: int) -> None:
    layers = prunable_layers(network(cell, width=4, blocks=(1, 1), **options))
    assert sum(layer.numel for layer in layers.values()) == weights


def test_an_image_of_one_pixel_is_not_halved() -> None:
    for pool in POOLS:
        model = network("plain", size=3, blocks=(1,) * 4, pool=pool).eval()
        assert model(torch.zeros(2, 3, 3, 3)).shape == (2, 5)


def test_norms() -> None:
    for norm, kind in zip(NORMS, (torch.nn.BatchNorm2d, torch.nn.GroupNorm, torch.nn.GroupNorm, None), strict=True):
        found = [m for m in network("basic", norm=norm).modules() if "Norm" in type(m).__name__]
        assert all(type(m) is kind for m in found) and bool(found) == (kind is not None)
    groups = [m.num_groups for m in network("plain", 16, norm="group", blocks=(1, 1), growth=0.5).modules()
              if isinstance(m, torch.nn.GroupNorm)]  # fmt: skip
    assert groups == [4, 2], "a group has at least 4 channels"


def test_activations() -> None:
    for name, kind in ACTIVATIONS.items():
        assert any(isinstance(m, kind) for m in network("preact", activation=name).modules())


@pytest.mark.parametrize("cell", ["basic", "preact", "bottleneck", "resmlp"])
def test_without_norm_the_activations_do_not_grow_with_depth(cell: str) -> None:
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    spread = []
    for blocks in ((1,), (12,)):
        model = network(cell, 16, norm="none", blocks=blocks)
        with torch.no_grad():
            spread.append(model.body(images).std().item())
    assert 0.2 < spread[1] / spread[0] < 5


def test_branches_are_softened_at_initialization_alone() -> None:
    def last(blocks: tuple[int, ...]) -> torch.Tensor:
        first = next(m for m in network("preact", 32, norm="none", blocks=blocks).modules() if isinstance(m, Residual))
        return [m for m in first.branch.modules() if isinstance(m, torch.nn.Conv2d)][-1].weight

    he = (2 / (32 * 9)) ** 0.5
    assert last((1,)).std().item() == pytest.approx(he, rel=0.05)
    assert last((4,)).std().item() == pytest.approx(he / 2, rel=0.05)


def test_attention_is_initialized_like_the_rest() -> None:
    projection = network("attention", 64).get_parameter("body.1.branch.1.attention.in_proj_weight")
    assert projection.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_options_of_a_record_build_the_same_network() -> None:
    settings = ModelSettings("cellnet", 6, {"cell": "dense", "blocks": (2, 1), "growth": 1.5})
    again = ModelSettings("cellnet", 6, json.loads(json.dumps(dict(settings.options))))
    one, two = (create_model(s, seed=3).state_dict() for s in (settings, again))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert settings.label() == again.label()


def test_long_labels_hold_a_hash() -> None:
    short = {"cell": "plain", "blocks": (1, 2)}
    assert ModelSettings("cellnet", 8, short).label() == "cellnet-w8-cellplain-blocks_1_2_"
    labels = {
        ModelSettings("cellnet", 8, {**short, "activation": "relu", "norm": norm, "pool": "stride"}).label()
        for norm in NORMS
    }
    assert len(labels) == 4
    for label in labels:
        assert label.startswith("cellnet-w8-") and len(label) == len("cellnet-w8-") + 8


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("plane", {}, "cell is 'plane': did you mean 'plain'?"),
        ("plain", {"pool": "min"}, "pool is 'min': "),
        ("plain", {"norm": "bach"}, "norm is 'bach': did you mean 'batch'?"),
        ("plain", {"activation": "rely"}, "activation is 'rely': did you mean 'relu'?"),
        ("plain", {"blocks": ()}, "blocks is []: give at least one block"),
        ("plain", {"blocks": (1, 0)}, "blocks is [1, 0]: give at least one block"),
        ("plain", {"growth": 0}, "growth is 0: "),
        ("plain", {"kernel": 1}, "kernel is 1: give 3 or 5"),
        ("plain", {"stem_stride": 9}, "stem_stride is 9: it must lie in 1 … 8"),
        ("attention", {"norm": "batch"}, "norm is 'batch': attention takes 'layer'"),
        ("attention", {"heads": 3}, "heads is 3: it must divide the width 8"),
        ("plain", {"depth": 3}, "does not take options"),
    ],
)
def test_wrong_options(cell: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AutoSparseError) as caught:
        network(cell, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
