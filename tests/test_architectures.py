"""Masks of torchvision and timm networks, at small image sizes; `benchmarks/architectures.py` has them at full size."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from autosparse.errors import AutoSparseError
from autosparse.pruning.criteria import PRESETS
from autosparse.pruning.prune import prune
from autosparse.training.models import create_model

SIDE, SPARSITY = 32, 0.95
AT_ONCE = [  # without those that take the layer densities of another, in a hundred steps
    name
    for name, preset in PRESETS.items()
    if not any("@" in s for s in preset.criterion.signals) and not str(preset.scope).startswith("densities:")
]
FEW = ["snip", "grasp", "synflow"]
NETWORKS = {
    "torchvision:mobilenet_v3_small": AT_ONCE,
    "torchvision:efficientnet_b0": FEW,
    "timm:regnety_002": FEW,
    "torchvision:resnet50": FEW,
    "torchvision:convnext_tiny": ["snip"],
    "torchvision:swin_t": FEW,
    "torchvision:vit_b_16": ["snip"],
}
BATCHES = [(torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)), torch.arange(4))]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str]]:
    model = create_model(request.param, image_size=SIDE)
    if "vit" in request.param:
        with pytest.raises(
            AutoSparseError, match="all scores are zero: no gradient reaches the weights, as with a class"
        ):
            prune(model, SPARSITY, "snip", batches=BATCHES)  # torchvision starts its head at zero
        nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return model, NETWORKS[request.param]


def test_masks_of_public_networks(network: tuple[nn.Module, list[str]]) -> None:
    """Each criterion, in at most two steps: the exact count; what is told of dead layers, paths and ties holds."""
    model, criteria = network
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in criteria:
        steps = min(PRESETS[name].steps, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # two steps, or none, cut networks through
            masks = prune(model, SPARSITY, name, batches=BATCHES, steps=steps, floor=0.001)
        report = masks.report
        assert masks.kept == round((1 - SPARSITY) * masks.total), name
        assert report.effective_sparsity is not None
        assert masks.sparsity - 1e-9 <= report.effective_sparsity <= 1, name
        assert all(row.kept >= math.ceil(0.001 * row.total) for row in masks.layers()), name
        assert set(report.dead_layers) <= set(masks) and 0 <= report.ties <= 1, name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
