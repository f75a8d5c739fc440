"""Fused layers: exact where they can be, the optimum where they cannot, and what the network around them does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autosparse.errors import AutoSparseError
from autosparse.experiment.structured import FUSED, Thinning, run_thinnings, summary, thinnings
from autosparse.masks.layers import prunable_layers
from autosparse.trainability.fuse import FuseSettings, fresh, fuse
from autosparse.trainability.tpp import TPPSettings
from autosparse.training.data import DataSettings, load_data
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x, torch.zeros(len(x), dtype=torch.long))]


def test_one_relu_by_hand() -> None:
    """y = 2·relu(x + 1), x ~ N(0, 1): A = 2Φ(1) = 1.682689, c = 2(Φ(1) + φ(1)) = 2.166631."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    for layer, (weight, bias) in zip((model[0], model[2]), ((1.0, 1.0), (2.0, 0.0)), strict=True):
        nn.init.constant_(layer.weight, weight)
        nn.init.constant_(layer.bias, bias)
    fused = fuse(model, [("0", "2")], how="gaussian").model
    assert fused[0][0].weight.item() == pytest.approx(1.682689, abs=1e-6)
    assert fused[0][0].bias.item() == pytest.approx(2.166631, abs=1e-6)
    measured = fuse(model, [("0", "2")], pairs(gaussian(200_000, 1)), ridge=0).model
    assert measured[0][0].weight.item() == pytest.approx(1.6827, abs=0.01)
    assert measured[0][0].bias.item() == pytest.approx(2.1666, abs=0.01)


@pytest.mark.parametrize("how", ["data", "gaussian"])
@pytest.mark.parametrize("bias", [True, False])
def test_exact_without_an_activation(how: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Linear(6, 3, bias=bias), nn.ReLU(), nn.Linear(3, 2))
    x = gaussian(64, 4)
    fused = fuse(linear, [("0", "1")], pairs(x), how=how, ridge=0)
    assert len(fused.model) == 3 and torch.allclose(fused.model(x), linear(x), atol=1e-5)
    assert fused.errors["0 to 1"] < 1e-9
    convolutions = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, bias=bias), nn.Conv2d(3, 4, 3, bias=bias))
    images = gaussian(16, 2, 13, 13)
    smaller = fuse(convolutions, [("0", "1")], pairs(images), how=how, ridge=0).model
    assert smaller[0][0].kernel_size == (7, 7) and smaller[0][0].stride == (2, 2)
    assert torch.allclose(smaller(images), convolutions(images), atol=1e-5)


def test_padding_is_exact_inside_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1))
    x = gaussian(2, 1, 8, 8)
    fused = fuse(model, [("0", "1")], how="gaussian").model
    assert fused(x).shape == (2, 1, 8, 8)
    assert torch.allclose(fused(x)[..., 1:-1, 1:-1], model(x)[..., 1:-1, 1:-1], atol=1e-5)
    assert not torch.allclose(fused(x), model(x), atol=1e-3)


def test_the_fit_is_the_optimum_of_least_squares() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    x = gaussian(400, 5)
    fused = fuse(model, [("0", "2")], pairs(x), ridge=0)
    y = model(x).detach().numpy()
    rows = np.concatenate([x.numpy(), np.ones((400, 1))], axis=1)
    best = rows @ np.linalg.lstsq(rows, y, rcond=None)[0]
    assert np.allclose(fused.model(x).detach().numpy(), best, atol=1e-4)
    wanted = ((y - best) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert fused.errors["0 to 2"] == pytest.approx(wanted, rel=1e-4)
    closed = fuse(model, [("0", "2")], pairs(gaussian(20_000, 5, seed=1)), how="gaussian").errors["0 to 2"]
    optimum = fuse(model, [("0", "2")], pairs(gaussian(20_000, 5, seed=1))).errors["0 to 2"]
    assert optimum <= closed < 1.02 * optimum, "for Gaussian inputs the closed form is the optimum"


def test_batch_norm_tells_the_closed_form_its_moments() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3), nn.ReLU())
    nn.init.normal_(model[1].bias)
    x = 3 * gaussian(20_000, 4) + 1
    model.train()(x)
    for norm in (model[1], model[4]):
        norm.momentum = 1.0
    model.train()(x)
    model.eval()
    batches = pairs(x)
    closed, best = (fuse(model, [("0", "5")], batches, how=how).errors["0 to 5"] for how in ("gaussian", "data"))
    assert best <= closed < 1.05 * best
    fused = fuse(model, [("0", "5")], batches).model.eval()
    assert isinstance(fused[0][1], nn.BatchNorm1d) and isinstance(fused[1], nn.ReLU)
    before = fused(x)
    fused[0][1].momentum = 1.0
    fused.train()
    assert torch.allclose(fused(x), before, atol=1e-2), "the norm begins with the statistics of its inputs"


def test_networks_of_the_factory() -> None:
    """VGG-13 to the depth of VGG-11; one residual block of three to one convolution, the ReLU after its sum staying."""
    batches = pairs(gaussian(32, 3, 16, 16))
    vgg = create_model(ModelSettings("vgg13", 4), image_size=16)
    before = {n: p.clone() for n, p in vgg.state_dict().items()}
    fused = fuse(vgg, [("features.0", "features.5"), ("features.7", "features.12")], batches)
    assert len(prunable_layers(fused.model)) == 9 == len(prunable_layers(vgg)) - 2
    assert fused.model(batches[0][0]).shape == (32, 10) and all(0 <= e < 1 for e in fused.errors.values())
    assert all(torch.equal(p, before[n]) for n, p in vgg.state_dict().items()), "the deep network stays as it is"
    small = fuse(vgg, [("features.0", "features.5")], batches, kernel=3)
    assert small.model.get_submodule(small.layers[0])[0].kernel_size == (3, 3)
    resnet = create_model(ModelSettings("resnet20", 4), image_size=16)
    blocks = [(f"stages.{stage}.{i}", f"stages.{stage}.{i}") for stage in range(3) for i in (1, 2)]
    shallow = fuse(resnet, blocks, batches)
    assert len(shallow.layers) == 6 and len(shallow.model.stages[0]) == 3
    names = {module.weight.shape for module in shallow.model.stages[2].modules() if isinstance(module, nn.Conv2d)}
    assert (16, 16, 5, 5) in names
    assert isinstance(shallow.model.get_submodule(shallow.layers[0])[-1], nn.ReLU)
    shallow.model(batches[0][0]).sum().backward()
    preact = create_model(ModelSettings("cellnet", 4, {"cell": "preact", "blocks": (2,)}), image_size=16)
    block = next(n for n, m in preact.named_modules() if n.startswith("body.") and hasattr(m, "shortcut"))
    plain = fuse(preact, [(block, block)], batches)
    (name,) = plain.layers
    assert not any(isinstance(m, nn.ReLU) for m in plain.model.get_submodule(name).modules()), "its sum may be negative"
    public = create_model("torchvision:resnet18", image_size=32)
    images = pairs(gaussian(16, 3, 32, 32))
    found = fuse(public, [("layer2.0", "layer2.0")], images, kernel=3)
    assert found.model.get_submodule(found.layers[0])[0].stride == (2, 2), "the shortcut's stride is not counted"


def test_fresh_layers_of_the_same_shape() -> None:
    batches = pairs(gaussian(32, 3, 16, 16))
    fused = fuse(create_model(ModelSettings("vgg13", 4), image_size=16), [("features.0", "features.5")], batches)
    (name,) = fused.layers
    old = fused.model.get_submodule(name)
    for equal in (True, False):
        new = fresh(fused, seed=1, equal_norms=equal)
        drawn = new.get_submodule(name)
        assert not torch.equal(drawn[0].weight, old[0].weight)
        norms = [layer[0].weight.flatten(1).norm(dim=1) for layer in (drawn, old)]
        assert torch.allclose(*norms, rtol=1e-4) == equal
        assert torch.equal(drawn[1].weight, old[1].weight if equal else torch.ones(4))
        rest = [n for n, p in new.named_parameters() if not n.startswith(name)]
        assert all(torch.equal(new.get_parameter(n), fused.model.get_parameter(n)) for n in rest)
    scratch = fresh(fused, seed=1, whole=True)
    weights = [n for n in prunable_layers(scratch) if scratch.get_parameter(n).numel() > 200]
    for n in weights:
        drawn = scratch.get_parameter(n).detach()
        assert not torch.equal(drawn, fused.model.get_parameter(n))
        assert float(drawn.std()) == pytest.approx(math.sqrt(2 / drawn[0].numel()), rel=0.2), n
    one = fresh(fused, seed=1).get_submodule(name)[0].weight
    assert float(one.detach().std()) == pytest.approx(math.sqrt(2 / one[0].numel()), rel=0.15)


def test_what_cannot_be_fused() -> None:
    vgg = create_model(ModelSettings("vgg13", 4), image_size=16)
    batches = pairs(gaussian(4, 3, 16, 16))
    for runs, how, message in (
        ([("features.0", "features.1")], "data", "has 1 Linear or Conv2d layers: two at least"),
        ([("features.0", "classifier")], "data", "neighbouring children of one nn.Sequential"),
        ([("features.0", "features.99")], "data", "the network has no module"),
        ([("features.0", "features.10")], "data", "end the run before what changes the size"),
        ([("features.0", "features.10")], "gaussian", "in a row; give batches"),
        ([("features.0", "features.3")], "best", "known: data, gaussian"),
    ):
        with pytest.raises(AutoSparseError, match=message):
            fuse(vgg, runs, batches, how=how)
    with pytest.raises(AutoSparseError, match="give batches, or how='gaussian'"):
        fuse(vgg, [("features.0", "features.3")])
    gelu = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    with pytest.raises(AutoSparseError, match="not GELU"):
        fuse(gelu, [("0", "2")], how="gaussian")


def test_the_comparison(tmp_path: Path) -> None:
    """One dense training, the fused network, and the two beside it; again it does nothing, and a wrong run ends at once."""
    recipe = Recipe(steps=20, batch_size=32, lr=0.05)
    data = DataSettings("digits", limit=128, limit_test=64)
    chosen = FuseSettings((("stages.0.0", "stages.0.0"),), n_batches=2, batch_size=32)
    how: dict[str, Any] = {"recipe": recipe, "finetune": recipe, "tpp": TPPSettings(), "seeds": (0,), "ratios": (0.5,)}

    def plan(fuse: FuseSettings) -> list[Thinning]:
        return thinnings(ModelSettings("resnet8", 4), data, methods=tuple(FUSED), fuse=fuse, **how)

    images = load_data(data)
    results = run_thinnings(plan(chosen), tmp_path, images, device="cpu")
    dense, *rest = results
    assert [r["method"] for r in results] == ["dense", *FUSED] and {r["ratio"] for r in rest} == {"–"}
    assert len({(r["parameters"], r["macs"]) for r in rest}) == 1 and rest[0]["parameters"] != dense["parameters"]
    assert rest[0]["removed_accuracy"] > rest[2]["removed_accuracy"] + 0.1, "the fused network still knows something"
    assert 0 < rest[0]["errors"]["stages.0.0 to stages.0.0"] < 1
    assert [row[1] for row in summary(results).rows] == list(FUSED) and summary(results).rows[0][3] == "–"
    again: list[Any] = []
    assert run_thinnings(plan(chosen), tmp_path, images, device="cpu", on_event=again.append) == results and not again
    for wrong, message in (((), "needs fuse.runs"), ((("features.0", "features.77"),), "the network has no module")):
        with pytest.raises(AutoSparseError, match=message):
            run_thinnings(plan(FuseSettings(wrong)), tmp_path / "none", images, device="cpu")
    assert not (tmp_path / "none" / "networks").exists()
