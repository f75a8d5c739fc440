"""The published form of the scorer and its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import plant
from torch import Tensor, nn

from autosparse.masks.layers import Layer
from autosparse.scorers import image
from autosparse.scorers.features import View
from autosparse.scorers.fitting import fit
from autosparse.scorers.image import ImageScorer, TableScorer
from autosparse.scorers.rows import FitSettings, Rows, open_source

torch.set_num_threads(1)

QUICK = FitSettings(scorer="image", head="mse", epochs=1, batch_size=32, split="none", validation="none")


class Tiny(nn.Module):
    """In place of a torchvision network: a mean of each colour, BatchNorm, one Linear."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 32, 32)
        return self.out(torch.tanh(self.norm(x.mean((2, 3)))))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    monkeypatch.setattr(models, "get_model", lambda name, weights, num_classes: Tiny(num_classes))


def test_the_published_form() -> None:
    torch.manual_seed(0)
    network = ImageScorer(2).eval()
    assert [m.out_features for m in network.lift] == [64, 3072]
    assert type(network.backbone).__name__ == "ResNet" and network.backbone.fc.out_features == 2
    with torch.no_grad():
        assert network(torch.randn(2, 2)).shape == (2, 2)


def test_a_table_by_hand() -> None:
    """On [0, 1] × [0, 2] with values at the corners 0, 1, 2, 5: exact there, bilinear between, its border beyond. Of a
    scale so wide that asinh is linear."""
    table = TableScorer(1, 2)
    table.scale.fill_(1e4)
    table.high.copy_(torch.tensor([1.0, 2.0]))
    table.values.copy_(torch.tensor([[[0.0], [1.0]], [[2.0], [5.0]]]))
    points = torch.tensor([[0.0, 0], [0, 2], [1, 0], [1, 2], [0.5, 1], [0, 1], [0.25, 2], [9, 9], [-9, 0]])
    torch.testing.assert_close(table(points)[:, 0], torch.tensor([0.0, 1, 2, 5, 2, 0.5, 2, 5, 0]))


def test_points_of_a_table_are_dense_where_most_weights_are() -> None:
    """`u = asinh(x)` from −asinh(8) to asinh(8) in 3 points: −8, 0, 8; in 5 the others are sinh(asinh(8) / 2)."""
    table = TableScorer(1, 3)
    table.low.fill_(-8.0)
    table.high.fill_(8.0)
    wanted = torch.cartesian_prod(torch.tensor([-8.0, 0.0, 8.0]), torch.tensor([-8.0, 0.0, 8.0]))
    torch.testing.assert_close(table.points(), wanted)
    table.values = torch.zeros(5, 5, 1)
    half = ((65**0.5 - 1) / 2) ** 0.5  # sinh(u/2)² = (cosh(u) − 1) / 2, and cosh(asinh(8)) = √65
    torch.testing.assert_close(table.points()[:5, 1], torch.tensor([-8.0, -half, 0.0, half, 8.0]))


def test_a_table_of_one_value_only() -> None:
    table = TableScorer(1, 4)
    table.high.zero_()
    assert torch.isfinite(table(torch.randn(5, 2))).all()


@pytest.mark.usefixtures("tiny")
def test_the_table_is_the_network_up_to_its_spacing() -> None:
    torch.manual_seed(0)
    network = ImageScorer(3).eval()
    network.inputs.low.copy_(torch.tensor([-1.0, -0.1]))
    network.inputs.high.copy_(torch.tensor([2.0, 0.1]))
    network.inputs.std.copy_(torch.tensor([1.0, 0.05]))
    rows = torch.rand(300, 2) * torch.tensor([3.0, 0.2]) + torch.tensor([-1.0, -0.1])
    with torch.no_grad():
        wanted = network(rows)
        errors = [float((network.table(size)(rows) - wanted).abs().max()) for size in (3, 9, 65)]
        assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-2 * float(wanted.std())
        corners = torch.tensor([[-1.0, -0.1], [2.0, 0.1], [-1.0, 0.1]])
        torch.testing.assert_close(network.table(5)(corners), network(corners))
        torch.testing.assert_close(network.table(5)(corners * 10), network(corners * 10), msg="clipped alike")


@pytest.mark.usefixtures("tiny")
def test_it_is_scored_chunk_by_chunk() -> None:
    layers = {"w": Layer("w", "linear", (5, 4))}
    given = {s: {"w": torch.randn(5, 4)} for s in ("weight", "gradient")}
    table = TableScorer(2, 8)
    table.values.normal_()
    view = View.of(image.FEATURES, layers, given)
    found = torch.cat([values for _, _, _, values in table.outputs(view)])
    assert torch.equal(found, table(torch.stack([given["weight"]["w"].ravel(), given["gradient"]["w"].ravel()], 1)))


@pytest.mark.usefixtures("tiny")
def test_it_is_fitted_on_few_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MOST_ROWS", 130)
    paths = [plant(tmp_path / f"{i}.h5", i) for i in range(2)]
    part = Rows([open_source(p, image.FEATURES) for p in paths], image.FEATURES, QUICK, 2)
    assert part.per_epoch == 130
    scorer = fit(paths, QUICK)
    assert isinstance(scorer.network, TableScorer) and scorer.features == image.FEATURES
    assert scorer.signals == ("weight", "gradient") and scorer.card.test == {}


@pytest.mark.usefixtures("tiny")
def test_a_rest_of_one_row_does_not_stop_batch_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MOST_ROWS", 65)
    fit([plant(tmp_path / "r.h5")], replace(QUICK, batch_size=32))
