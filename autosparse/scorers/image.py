"""The published form of the scorer, for comparison: two numbers per weight, lifted to an image, into an image network."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, suggest
from autosparse.scorers.features import View
from autosparse.scorers.mlp import Outputs, Standard, by_rows

NETWORKS = ("resnet18", "resnet50", "vgg19")
FEATURES = ("raw_weight", "raw_gradient")
MOST_ROWS = 20_000  # to fit on: 150 weights a second on two CPU cores


class ImageScorer(nn.Module):
    """`(θ₀, g)` → Linear 2 → 64 → 3072, reshaped to 3×32×32 → a torchvision network with `outputs` outputs.

    About 1.1e9 FLOPs a weight with ResNet-18, so it is fitted on few weights, and scores through `TableScorer`.
    """

    def __init__(self, outputs: int, backbone: str = "resnet18") -> None:
        super().__init__()
        if backbone not in NETWORKS:
            raise AutoSparseError(f"fit.backbone is {backbone!r}: {suggest(backbone, NETWORKS)}")
        from torchvision import models

        self.inputs = Standard(2)
        self.lift = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 3 * 32 * 32))
        self.backbone = models.get_model(backbone, weights=None, num_classes=outputs)

    def forward(self, rows: Tensor) -> Tensor:
        return self.backbone(self.lift(self.inputs(rows)).view(-1, 3, 32, 32))

    @torch.no_grad()
    def table(self, size: int) -> TableScorer:
        """Its outputs on a grid of `size` × `size` points over the range of what it was fitted on."""
        self.eval()
        low, high = self.inputs.low, self.inputs.high
        axes = [torch.linspace(float(low[i]), float(high[i]), size) for i in range(2)]
        points = torch.tensor(list(itertools.product(*[axis.tolist() for axis in axes])), device=low.device)
        found = torch.cat([self(part) for part in points.split(64)])
        table = TableScorer(found.shape[1], size)
        table.low.copy_(low)
        table.high.copy_(high)
        table.values.copy_(found.view(size, size, -1))
        return table


class TableScorer(nn.Module):
    """A function of two numbers as a table `(size, size, outputs)` over their range, bilinear between its points.

    In eval mode the image scorer is such a function, so this is the same scorer up to the grid's spacing.
    """

    low: Tensor
    high: Tensor
    values: Tensor

    def __init__(self, outputs: int, size: int = 64) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(2))
        self.register_buffer("high", torch.ones(2))
        self.register_buffer("values", torch.zeros(size, size, outputs))

    def forward(self, rows: Tensor) -> Tensor:
        size = len(self.values)
        at = (rows.clamp(self.low, self.high) - self.low) / (self.high - self.low).clamp(min=1e-30) * (size - 1)
        corner = at.floor().clamp(max=size - 2).long()
        x, y = (at - corner).T[..., None]
        i, j = corner.T
        low = torch.lerp(self.values[i, j], self.values[i, j + 1], y)
        return torch.lerp(low, torch.lerp(self.values[i + 1, j], self.values[i + 1, j + 1], y), x)

    def outputs(self, view: View) -> Outputs:
        """The outputs for every weight of a network, chunk by chunk."""
        return by_rows(self, view)
