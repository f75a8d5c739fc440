"""Network factory: small networks of the literature, torchvision, timm, and anybody's own."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from autosparse.errors import AutoSparseError, first_line, require, settings, suggest
from autosparse.masks.random import seeded
from autosparse.network.running import eval_mode
from autosparse.plugins import load_outside
from autosparse.training.cells import CellNet, soften_branches

if TYPE_CHECKING:
    from autosparse.training.data import ImageData

M = TypeVar("M", bound=nn.Module)
_LONGEST_LABEL = 60  # characters


@settings
class ModelSettings:
    """Which network.

    `name`: one of `autosparse list models`, `torchvision:NAME`, `timm:NAME`, or `package.module:factory`, a callable
    that is given `in_channels`, `classes` (as far as its signature takes them) and `options` and returns a module.
    `width`: channels of the first stage (hidden units of `mlp`); `None` is the published one. `options`: keywords for
    the factory.
    """

    name: str = "resnet20"
    width: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.width is None or self.width >= 1, "model width", self.width, "give a whole number of at least 1")

    def label(self) -> str:
        """Short unique text, fit for a file name: `resnet20`, `resnet20-w8`, `convnet-w16-depth4`; of many options a hash."""
        parts = [self.name.replace(":", "-").replace(".", "-")]
        if self.width is not None:
            parts.append(f"w{self.width}")
        text = "-".join([*parts, *(f"{key}{value}" for key, value in self.options.items())])
        if len(text) > _LONGEST_LABEL and self.options:
            options = json.dumps(dict(self.options), sort_keys=True, default=str)
            text = "-".join([*parts, hashlib.sha256(options.encode()).hexdigest()[:8]])
        return re.sub(r"[^A-Za-z0-9._-]+", "_", text)


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class ConvNet(nn.Module):
    """`depth` 3×3 convolutions with BatchNorm (`norm=False`: biases) and ReLU (or `activation="tanh"`), a pooling after
    the first two, global pooling, one Linear.

    Width 16, depth 3 on one-channel images: 14,288 prunable weights.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: int = 16,
        depth: int = 3,
        norm: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        require(activation in ACTIVATIONS, "activation", activation, f"known: {', '.join(ACTIVATIONS)}")
        blocks: list[nn.Module] = []
        channels = in_channels
        for index in range(depth):
            out = width if index == 0 else 2 * width
            blocks += conv_bn(channels, out, 3) if norm else [nn.Conv2d(channels, out, 3, padding=1)]
            blocks.append(ACTIVATIONS[activation]())
            if index < 2:
                blocks.append(nn.MaxPool2d(2))
            channels = out
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class MLP(nn.Module):
    """`depth` hidden Linear layers of `width` units with ReLU on the flattened image, one Linear; input size as given."""

    def __init__(self, in_features: int, classes: int, width: int = 300, depth: int = 2) -> None:
        super().__init__()
        sizes = [in_features, *[width] * depth]
        hidden = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Sum(nn.Module):
    """`x + y`, or `α·x + β·y` with learnable α and β per channel that begin at the two numbers of `scales`."""

    def __init__(self, channels: int, scales: Sequence[float] | None) -> None:
        super().__init__()
        self.scaled = scales is not None
        if scales is not None:
            require(len(scales) == 2, "residual", scales, "give two numbers: the scales of shortcut and branch")
            self.alpha, self.beta = (nn.Parameter(torch.full((channels, 1, 1), float(scale))) for scale in scales)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.alpha * x + self.beta * y if self.scaled else y + x


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; a 1×1 convolution with BatchNorm where the shape changes (He et al. 2016, B)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, residual: Sequence[float] | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, channels, 3, stride)
        self.conv2, self.bn2 = conv_bn(channels, channels, 3)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.sum = Sum(channels, residual)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.sum(self.shortcut(x), self.bn2(self.conv2(out))))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions, four times as many channels out, and a shortcut (He et al. 2016)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, residual: Sequence[float] | None = None) -> None:
        super().__init__()
        out = channels * self.expansion
        self.conv1, self.bn1 = conv_bn(in_channels, channels, 1)
        self.conv2, self.bn2 = conv_bn(channels, channels, 3, stride)
        self.conv3, self.bn3 = conv_bn(channels, out, 1)
        self.shortcut = _shortcut(in_channels, out, stride)
        self.sum = Sum(out, residual)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.sum(self.shortcut(x), self.bn3(self.conv3(out))))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))


class ResNet(nn.Module):
    """A 3×3 stem, stages of residual blocks (each but the first halves the image), global pooling, one Linear.

    `residual`: `[α, β]`, initial values of learnable scales per channel, `α·x + β·F(x)` in each block; `None`: `x + F(x)`.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: int,
        blocks: tuple[int, ...],
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        residual: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, width, 3)
        channels = width
        stages: list[nn.Module] = []
        for stage, count in enumerate(blocks):
            units = []
            for index in range(count):
                units.append(block(channels, width * 2**stage, 2 if stage > 0 and index == 0 else 1, residual))
                channels = width * 2**stage * block.expansion
            stages.append(nn.Sequential(*units))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG with BatchNorm and one Linear after global pooling, the usual form on small images (Simonyan & Zisserman 2015).

    The poolings round up, so that images under 32×32 pass too.
    """

    def __init__(self, in_channels: int, classes: int, width: int, stages: tuple[int, ...]) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = in_channels
        for stage, count in enumerate(stages):
            out = width * min(2**stage, 8)
            for _ in range(count):
                blocks += [*conv_bn(channels, out, 3), nn.ReLU()]
                channels = out
            blocks.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def initialize(model: M) -> M:
    """He initialization (normal, fan-in) of convolutions, Linear layers and the projections of attention, zero biases;
    draws from the global RNG."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.kaiming_normal_(module.in_proj_weight, mode="fan_in", nonlinearity="relu")
    return model


def _cifar_resnet(depth: int) -> Callable[..., nn.Module]:
    blocks = ((depth - 2) // 6,) * 3
    return lambda c, k, size, width=16, **o: initialize(ResNet(c, k, width, blocks, **o))


def _resnet(blocks: tuple[int, ...], block: type[BasicBlock] | type[Bottleneck]) -> Callable[..., nn.Module]:
    return lambda c, k, size, width=64, **o: initialize(ResNet(c, k, width, blocks, block, **o))


def _vgg(stages: tuple[int, ...]) -> Callable[..., nn.Module]:
    return lambda c, k, size, width=64: initialize(VGG(c, k, width, stages))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda c, k, size, width=300, **o: initialize(MLP(c * size * size, k, width, **o)),
    "convnet": lambda c, k, size, width=16, **o: initialize(ConvNet(c, k, width, **o)),
    "cellnet": lambda c, k, size, width=16, **o: soften_branches(initialize(CellNet(c, k, size, width, **o))),
    **{f"resnet{depth}": _cifar_resnet(depth) for depth in (8, 20, 32, 44, 56, 110)},
    "resnet18": _resnet((2, 2, 2, 2), BasicBlock),
    "resnet34": _resnet((3, 4, 6, 3), BasicBlock),
    "resnet50": _resnet((3, 4, 6, 3), Bottleneck),
    "vgg11": _vgg((1, 1, 2, 2, 2)),
    "vgg13": _vgg((2, 2, 2, 2, 2)),
    "vgg16": _vgg((2, 2, 3, 3, 3)),
    "vgg19": _vgg((2, 2, 4, 4, 4)),
}


def create_model(
    model: ModelSettings | str, *, in_channels: int = 3, classes: int = 10, image_size: int = 32, seed: int = 0
) -> nn.Module:
    """A freshly initialized network for images of `(in_channels, image_size, image_size)`; the global RNG stays as it was.

    Same settings and seed: same weights.

    Raises:
        AutoSparseError: unknown name, a package that is not installed, or options that the factory refuses.
    """
    chosen = ModelSettings(model) if isinstance(model, str) else model
    with seeded(seed, "initialization"):
        try:
            return _filled(_build(chosen, in_channels, classes, image_size), (2, in_channels, image_size, image_size))
        except TypeError as error:
            raise AutoSparseError(
                f"model {chosen.name!r} does not take options {dict(chosen.options)} and width {chosen.width}: {error}"
            ) from error
        except AutoSparseError:
            raise
        except (ValueError, AssertionError, RuntimeError) as error:
            reason = first_line(error)
            raise AutoSparseError(
                f"model {chosen.name!r} cannot be built for images of {in_channels}×{image_size}×{image_size} with options "
                f"{dict(chosen.options)}: {reason}; change data.image_size or the options"
            ) from error


def build_model(model: ModelSettings, data: ImageData, seed: int = 0) -> nn.Module:
    """A freshly initialized network for the images and classes of `data`, see `create_model`."""
    return create_model(model, in_channels=data.channels, classes=data.classes, image_size=data.image_size, seed=seed)


@torch.no_grad()
def _filled(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """`network`, of whose lazy modules the shapes are set by one pass."""
    if any(isinstance(p, UninitializedParameter) for p in network.parameters()):
        with eval_mode(network):
            network(torch.zeros(shape))
    return network


def _build(model: ModelSettings, in_channels: int, classes: int, image_size: int) -> nn.Module:
    width = {} if model.width is None else {"width": model.width}
    if model.name in MODELS:
        return MODELS[model.name](in_channels, classes, image_size, **width, **model.options)
    source, _, name = model.name.partition(":")
    if not name:
        raise AutoSparseError(
            f"model is {model.name!r}: {suggest(model.name, MODELS)}; or torchvision:NAME, timm:NAME, package.module:factory"
        )
    if source == "torchvision":
        return _torchvision(name, in_channels, classes, image_size, {**width, **model.options})
    if source == "timm":
        return _timm(name, in_channels, classes, image_size, {**width, **model.options})
    return _own(source, name, in_channels, classes, {**width, **model.options})


def _torchvision(name: str, in_channels: int, classes: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise AutoSparseError(f"model is 'torchvision:{name}': {suggest(name, known)}")
    if name.startswith("vit_"):
        options = {"image_size": image_size, **options}
    network = models.get_model(name, weights=None, num_classes=classes, **options)
    if in_channels != 3:
        for path, module in network.named_modules():
            if isinstance(module, nn.Conv2d) and module.in_channels == 3:
                parent, _, attribute = path.rpartition(".")
                stem = nn.Conv2d(
                    in_channels,
                    module.out_channels,
                    module.kernel_size,  # type: ignore[arg-type]
                    module.stride,  # type: ignore[arg-type]
                    module.padding,  # type: ignore[arg-type]
                    bias=module.bias is not None,
                )
                nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
                setattr(network.get_submodule(parent), attribute, stem)
                break
    return network


def _timm(name: str, in_channels: int, classes: int, image_size: int, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise AutoSparseError(
            f"model is 'timm:{name}': timm is not installed; pip install 'autosparse[timm]'"
        ) from error
    if not timm.is_model(name):
        raise AutoSparseError(
            f"model is 'timm:{name}': timm {timm.__version__} has no such model; see timm.list_models()"
        )
    options = {"num_classes": classes, "in_chans": in_channels, **options}
    try:
        return timm.create_model(name, pretrained=False, img_size=image_size, **options)
    except TypeError:  # convolutional networks take any size and no such keyword
        return timm.create_model(name, pretrained=False, **options)


def _own(module_name: str, name: str, in_channels: int, classes: int, options: dict[str, Any]) -> nn.Module:
    factory = load_outside(f"{module_name}:{name}", "model")
    given = {"in_channels": in_channels, "classes": classes}
    accepted = inspect.signature(factory).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        given = {key: value for key, value in given.items() if key in accepted}
    network = factory(**given, **options)
    if not isinstance(network, nn.Module):
        raise AutoSparseError(
            f"model is '{module_name}:{name}': it gave a {type(network).__name__}, not a torch module"
        )
    return network
