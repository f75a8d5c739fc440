"""The network factory."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import prunable_layers
from autosparse.training.models import MODELS, ModelSettings, create_model


@pytest.mark.parametrize("name", MODELS)
def test_every_network_takes_images_and_is_a_function_of_the_seed(name: str) -> None:
    settings = ModelSettings(name, width=4)
    state = torch.get_rng_state()
    one, two, other = (create_model(settings, in_channels=2, classes=5, image_size=8, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    for n, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(n)), n
    assert any(not torch.equal(p, other.get_parameter(n)) for n, p in one.named_parameters())
    with torch.no_grad():
        assert one.eval()(torch.randn(3, 2, 8, 8)).shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "image_size", "weights"),
    [
        ("resnet20", 32, 270_896),  # 0.27 M (He et al. 2016)
        ("resnet56", 32, 851_504),  # 0.85 M
        ("resnet18", 32, 11_164_352),  # 11.17 M with the norm layers and biases
        ("vgg16", 32, 14_715_584),
        ("mlp", 28, 784 * 300 + 300 * 300 + 300 * 10),
    ],
)
def test_published_sizes(name: str, image_size: int, weights: int) -> None:
    channels = 1 if name == "mlp" else 3
    model = create_model(name, in_channels=channels, image_size=image_size)
    assert sum(layer.numel for layer in prunable_layers(model).values()) == weights


def test_the_size_that_the_docstring_gives() -> None:
    model = create_model("convnet", in_channels=1)
    assert sum(layer.numel for layer in prunable_layers(model).values()) == 14_288


@pytest.mark.parametrize("size", [4, 8, 28, 33])
def test_image_sizes(size: int) -> None:
    for name in ("convnet", "resnet8", "vgg11", "mlp"):
        model = create_model(ModelSettings(name, width=4), in_channels=1, image_size=size)
        assert model.eval()(torch.zeros(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_options(depth: int) -> None:
    model = create_model(ModelSettings("mlp", 6, {"depth": depth}), in_channels=1, image_size=4)
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 10)
    assert len(prunable_layers(model)) == depth + 1


def test_a_deep_plain_network() -> None:
    """50 layers with weights, nothing between them but tanh and two poolings."""
    options = {"depth": 49, "norm": False, "activation": "tanh"}
    model = create_model(ModelSettings("convnet", 16, options), image_size=16)
    assert len(prunable_layers(model)) == 50
    kinds = [type(m) for m in model.features]
    assert kinds.count(nn.Tanh) == 49 and kinds.count(nn.MaxPool2d) == 2 and len(kinds) == 2 * 49 + 2
    with pytest.raises(AutoSparseError, match="activation is 'tan': known: relu, tanh"):
        create_model(ModelSettings("convnet", options={"activation": "tan"}))


def test_initialization() -> None:
    model = create_model("resnet20", in_channels=3)
    conv = model.get_submodule("stages.2.1.conv1")
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert (model.fc.bias == 0).all()


def test_torchvision() -> None:
    model = create_model("torchvision:mobilenet_v3_small", in_channels=1, classes=7)
    assert model.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with torch.device("meta"):  # which image size it takes, not what it computes
        model = create_model("torchvision:vit_b_16", in_channels=3, classes=3, image_size=32)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of timm as the factory uses: transformers take an image size, convolutional networks refuse it."""

    def build(name: str, *, pretrained: bool, num_classes: int, in_chans: int, **options: int) -> nn.Module:
        assert not pretrained
        size = options.pop("img_size", 1) if name == "vit" else 1
        if options:
            raise TypeError(f"unexpected keyword {next(iter(options))}")
        return nn.Conv2d(in_chans, num_classes, size)

    known = ("vit", "resnet")
    module = SimpleNamespace(create_model=build, is_model=known.__contains__, __version__="1.0")
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("timm")
def test_timm() -> None:
    assert create_model("timm:resnet", in_channels=1, classes=4, image_size=32).weight.shape == (4, 1, 1, 1)
    assert create_model("timm:vit", in_channels=1, classes=4, image_size=32).weight.shape == (4, 1, 32, 32)
    with pytest.raises(AutoSparseError, match=r"'timm:nothing': timm 1\.0 has no such model"):
        create_model("timm:nothing")
    with pytest.raises(AutoSparseError, match="does not take options"):
        create_model(ModelSettings("timm:resnet", options={"depth": 3}))


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(AutoSparseError, match=r"timm is not installed; pip install 'autosparse\[timm\]'"):
        create_model("timm:resnet18")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "def plain(hidden): return nn.Linear(hidden, 2)\n"
        "def full(in_channels, classes): return nn.Conv2d(in_channels, classes, 1)\n"
        "def open_ended(**given): return nn.Linear(len(given), given['classes'])\n"
        "def wrong(): return 'no module'\n"
        "def broken(): raise KeyError('inner')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own")
def test_own_factories() -> None:
    assert create_model(ModelSettings("own_networks:plain", options={"hidden": 3})).in_features == 3
    assert create_model("own_networks:full", in_channels=4, classes=6).weight.shape == (6, 4, 1, 1)
    assert create_model("own_networks:open_ended", classes=6).weight.shape == (6, 2)
    one, two = (create_model("own_networks:full", seed=5) for _ in range(2))
    assert isinstance(one, nn.Conv2d) and torch.equal(one.weight, two.weight)
    with pytest.raises(AutoSparseError, match="gave a str, not a torch module"):
        create_model("own_networks:wrong")
    with pytest.raises(AutoSparseError, match="does not take options"):
        create_model("own_networks:plain")
    with pytest.raises(AutoSparseError, match="has no attribute 'none'; the module must be importable"):
        create_model("own_networks:none")
    with pytest.raises(KeyError):  # a mistake inside of the factory shows its own traceback
        create_model("own_networks:broken")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", "model is 'resnet21': did you mean .*torchvision:NAME"),
        ("torchvision:resnet19", "model is 'torchvision:resnet19': did you mean 'resnet1"),
        ("nowhere.networks:net", "No module named 'nowhere'"),
        ("torchvision:", "model is 'torchvision:'"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(AutoSparseError, match=message):
        create_model(name)


def test_bad_settings() -> None:
    with pytest.raises(AutoSparseError, match="model width is 0"):
        ModelSettings(width=0)
    with pytest.raises(AutoSparseError, match=r"'resnet20' does not take options \{'depth': 3\}"):
        create_model(ModelSettings("resnet20", options={"depth": 3}))


def test_labels() -> None:
    assert ModelSettings("resnet20").label() == "resnet20"
    assert ModelSettings("convnet", 16, {"depth": 4}).label() == "convnet-w16-depth4"
    assert ModelSettings("my.networks:net").label() == "my-networks-net"
    assert ModelSettings("mlp", options={"a": "x/y z"}).label() == "mlp-ax_y_z"
