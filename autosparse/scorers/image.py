"""The published form of the scorer, for comparison: two numbers per weight, lifted to an image, into an image network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.errors import require, settings, suggest
from autosparse.scorers.features import View
from autosparse.scorers.kinds import ScorerKind
from autosparse.scorers.mlp import Outputs, Standard, by_rows

NETWORKS = ("resnet18", "resnet50", "vgg19")
FEATURES = ("raw_weight", "raw_gradient")
MOST_ROWS = 20_000  # to fit on: 150 weights a second on two CPU cores
TABLE = 128  # points of the table along each of its two inputs
_FINE = 0.1  # standard deviations around the mean within which a table's points are equally far apart


class ImageScorer(nn.Module):
    """`(θ₀, g)` → Linear 2 → 64 → 3072, reshaped to 3×32×32 → a torchvision network with `outputs` outputs.

    About 1.1e9 FLOPs a weight with ResNet-18, so it is fitted on few weights, and scores through `TableScorer`.
    """

    def __init__(self, outputs: int, backbone: str = "resnet18") -> None:
        super().__init__()
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
        table = TableScorer(1, size).to(self.inputs.low.device)
        table.center.copy_(self.inputs.mean)
        table.scale.copy_(_FINE * self.inputs.std)
        table.low.copy_(self.inputs.low)
        table.high.copy_(self.inputs.high)
        table.values = torch.cat([self(part) for part in table.points().split(64)]).view(size, size, -1)
        return table


class TableScorer(nn.Module):
    """A function of two numbers as a table `(size, size, outputs)` over their range, bilinear between its points.

    In eval mode the image scorer is such a function, so this is the same scorer up to the grid's spacing. The points are
    equally far apart on `u = asinh((x − center) / scale)`: raw weights and gradients of all layers differ by orders of
    magnitude, and most lie close to zero.
    """

    center: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    values: Tensor

    def __init__(self, outputs: int, size: int = TABLE) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2))
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("low", torch.zeros(2))
        self.register_buffer("high", torch.ones(2))
        self.register_buffer("values", torch.zeros(size, size, outputs))

    def _axis(self, rows: Tensor) -> Tensor:
        return torch.asinh((rows - self.center) / self.scale)

    def points(self) -> Tensor:
        """The pairs of numbers `(size², 2)` at which the values are those of the function."""
        size = len(self.values)
        low, high = self._axis(self.low), self._axis(self.high)
        along = torch.linspace(0, 1, size, device=low.device)[:, None]
        x, y = (torch.sinh(low + along * (high - low)) * self.scale + self.center).T
        return torch.cartesian_prod(x, y)

    def forward(self, rows: Tensor) -> Tensor:
        size = len(self.values)
        low, high = self._axis(self.low), self._axis(self.high)
        at = (self._axis(rows.clamp(self.low, self.high)) - low) / (high - low).clamp(min=1e-30) * (size - 1)
        corner = at.floor().clamp(max=size - 2).long()
        x, y = (at - corner).T[..., None]
        i, j = corner.T
        low = torch.lerp(self.values[i, j], self.values[i, j + 1], y)
        return torch.lerp(low, torch.lerp(self.values[i + 1, j], self.values[i + 1, j + 1], y), x)

    def outputs(self, view: View) -> Outputs:
        """The outputs for every weight of a network, chunk by chunk."""
        return by_rows(self, view)


@settings
class ImageSettings:
    """`backbone`: the image network."""

    backbone: str = "resnet18"

    def __post_init__(self) -> None:
        require(self.backbone in NETWORKS, "backbone", self.backbone, suggest(self.backbone, NETWORKS))


class _Image(ScorerKind):
    features = FEATURES
    settings = ImageSettings

    def saved_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"size": TABLE}

    def build(self, features: Sequence[str], outputs: int, options: Mapping[str, Any]) -> nn.Module:
        return TableScorer(outputs, **options)

    def to_fit(self, features: Sequence[str], outputs: int, options: Mapping[str, Any]) -> nn.Module:
        return ImageScorer(outputs, **options)

    def to_save(self, network: nn.Module) -> nn.Module:
        assert isinstance(network, ImageScorer)
        return network.table(TABLE)

    def rows_per_record(self, wanted: int | None, records: int) -> int | None:
        return min(wanted or MOST_ROWS, max(1, MOST_ROWS // records))

    def uses(self, batch_size: int) -> int:
        return 1_000_000  # an image network uses a weight once for each of its points, not once a row


KIND = _Image()
