"""Patterns hold whatever the criterion: every preset × N:M, blocks and channels; and what N:M means in each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autosparse import Masks, prune
from autosparse.masks.granularity import NM, Block, Channel, parse_granularity
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.pruning.criteria import PRESETS
from autosparse.training.models import ModelSettings, create_model

# The others need a warm-up.
MEASURED = [name for name, preset in PRESETS.items() if not any("@" in signal for signal in preset.criterion.signals)]
PATTERNS = ["2:4", "1:4", "block4x4", "channel"]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convnet": lambda: create_model(ModelSettings("convnet", 4), in_channels=1, image_size=8),
    "mlp": lambda: create_model(ModelSettings("mlp", 12), in_channels=1, image_size=8),
}


def pruned(model: nn.Module, preset: str, pattern: str, sparsity: float | None, shape: tuple[int, ...]) -> Masks:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(20, *shape, generator=generator), torch.arange(20) % 10) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dead layers, ties
        return prune(
            model,
            sparsity,
            preset,
            batches=batches,
            granularity=pattern,
            steps=min(2, PRESETS[preset].steps),
            n_batches=2,
        )


def matrix(mask: Tensor, layer: Layer) -> Tensor:
    return mask.movedim(layer.out_dim, 0).flatten(1)


def sizes(layer: Layer, pattern: Block | Channel) -> list[int]:
    """How many weights the units of a layer hold."""
    rows, cols = matrix(torch.ones(layer.shape), layer).shape
    height, width = (1, cols) if isinstance(pattern, Channel) else (pattern.height, pattern.width)
    return [min(height, rows - i) * min(width, cols - j) for i in range(0, rows, height) for j in range(0, cols, width)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("preset", MEASURED)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_preset_keeps_every_pattern(network: str, preset: str, pattern: str) -> None:
    model, chosen = NETWORKS[network](), parse_granularity(pattern)
    layers = prunable_layers(model)
    sparsity = None if isinstance(chosen, NM) else 0.6
    masks = pruned(model, preset, pattern, sparsity, (1, 8, 8))
    dense = masks.report.dense_layers
    assert all(masks[name].all() for name in dense)
    if isinstance(chosen, NM):
        for name, layer in layers.items():
            assert (name in dense) == bool(layer.shape[layer.in_dim] % chosen.m)
            groups = masks[name].movedim(layer.in_dim, -1).reshape(-1, chosen.m).sum(1) if name not in dense else []
            assert all(count == chosen.n for count in groups)
        return
    assert dense == (("classifier.weight",) if network == "convnet" else ("layers.5.weight",)) * (pattern == "channel")
    for name, layer in layers.items():
        tiles = matrix(masks[name], layer)
        height, width = (1, tiles.shape[1]) if isinstance(chosen, Channel) else (4, 4)
        for rows in tiles.split(height):
            assert all(bool(tile.all()) == bool(tile.any()) for tile in rows.split(width, 1))
    asked = round(0.4 * masks.total)
    largest = [max(sizes(layer, chosen)) for name, layer in layers.items() if name not in dense]
    slack = max(largest) if PRESETS[preset].scope == "global" else sum(largest)
    assert abs(masks.kept - asked) <= slack / 2 + 1
    assert (masks.kept == asked) == (not any("were asked" in note for note in masks.report.notes))


class Mixed(nn.Module):
    """Convolutions, plain and grouped, attention and Linear layers, all of inputs that four divides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.grouped(torch.relu(self.stem(x))))).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize("preset", ["snip", "magnitude", "random", "synflow"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_four_inputs_of_one_output_and_kernel_position(preset: str, n: int, m: int) -> None:
    torch.manual_seed(0)
    masks = pruned(Mixed(), preset, f"{n}:{m}", None, (4, 6, 6))
    assert masks.report.dense_layers == ()
    for out, row, col in ((0, 0, 0), (5, 2, 1), (7, 1, 2)):
        assert int(masks["stem.weight"][out, :, row, col].sum()) == n
        assert int(masks["grouped.weight"][out, :, row, col].sum()) == n
    for out in (0, 7):  # of a transposed convolution the inputs come first
        assert masks["up.weight"][:, out, 1, 0].view(2, m).sum(1).tolist() == [n, n]
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "head.weight"):
        assert all(count == n for row in masks[name] for count in row.view(2, m).sum(1))
    assert masks.kept * m == masks.total * n


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured kernels need a CUDA device")
def test_torch_takes_two_of_four() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).cuda().half()
    masks = prune(model, None, "magnitude", granularity="2:4", example_input=torch.zeros(1, 128).cuda().half())
    masks.apply_(model)
    x = torch.randn(128, 128, device="cuda", dtype=torch.float16)
    weight = model[0].weight.detach()
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    assert torch.equal(sparse.to_dense(), weight)
    torch.testing.assert_close(nn.functional.linear(x, sparse), nn.functional.linear(x, weight), rtol=1e-2, atol=1e-2)
