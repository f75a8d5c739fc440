"""One network class for a whole distribution of architectures: a cell, repeated in stages, and plain options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autosparse.errors import require, suggest

CELLS = ("plain", "basic", "preact", "bottleneck", "inverted", "dense", "attention", "mlp", "resmlp")
POOLS = ("stride", "max", "avg")
NORMS = ("batch", "group", "layer", "none")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class CellNet(nn.Module):
    """A stem, stages of `blocks` cells each, global pooling, one Linear.

    `cell`: `"plain"` (convolution, norm, activation; no stem, so VGG-like), `"basic"` and `"bottleneck"` (He et al.
    2016; the inner convolution of a bottleneck has a quarter of its channels, at least 4), `"preact"` (norm and
    activation first, He et al. 2016b), `"inverted"` (Sandler et al. 2018, expansion 4), `"dense"` (each cell appends
    half of the stage's channels, Huang et al. 2017), `"attention"` (square patches of side `stem_stride`, learned
    positions, pre-norm transformer blocks with `heads` heads), `"mlp"` and `"resmlp"` (hidden Linear layers on the
    flattened image, without and with skips). Attention and MLPs have one width and `sum(blocks)` blocks.

    `width`: channels of the first stage, times `growth` in each later one. `kernel`: side of the convolutions that are
    not 1×1. `pool`: how later stages halve the image. `norm`: `"layer"` normalises over all of an image's units,
    `"group"` over up to four groups of channels; attention takes `"layer"` alone. `stem_stride`: stride of the first
    convolution.

    Raises:
        AutoSparseError: an option that is unknown or out of range.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        image_size: int,
        width: int = 16,
        cell: str = "basic",
        blocks: Sequence[int] = (1, 1, 1),
        growth: float = 2.0,
        kernel: int = 3,
        pool: str = "stride",
        norm: str = "batch",
        activation: str = "relu",
        stem_stride: int = 1,
        heads: int = 2,
    ) -> None:
        super().__init__()
        for key, value, known in (("cell", cell, CELLS), ("pool", pool, POOLS), ("norm", norm, NORMS)):
            require(value in known, key, value, suggest(value, known))
        require(activation in ACTIVATIONS, "activation", activation, suggest(activation, ACTIVATIONS))
        require(len(blocks) > 0 and min(blocks) >= 1, "blocks", list(blocks), "give at least one block in every stage")
        require(growth > 0, "growth", growth, "it is the factor of the width from stage to stage, above 0")
        require(kernel in (3, 5), "kernel", kernel, "give 3 or 5")
        require(1 <= stem_stride <= image_size, "stem_stride", stem_stride, f"it must lie in 1 … {image_size}")
        act = ACTIVATIONS[activation]
        if cell == "attention":
            require(norm == "layer", "norm", norm, "attention takes 'layer'")
            require(width % heads == 0, "heads", heads, f"it must divide the width {width}")
            modules, features = _attention(in_channels, image_size, width, sum(blocks), act, stem_stride, heads), width
        elif cell in ("mlp", "resmlp"):
            sizes = in_channels * image_size * image_size, width
            modules, features = _mlp(*sizes, sum(blocks), norm, act, residual=cell == "resmlp"), width
        else:
            widths = [max(1, round(width * growth**stage)) for stage in range(len(blocks))]
            modules, features = _convolutional(in_channels, cell, widths, blocks, kernel, pool, norm, act, stem_stride)
        self.body = nn.Sequential(*modules)
        self.classifier = nn.Linear(features, classes)
        self.has_norm = norm != "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


@torch.no_grad()
def soften_branches(net: CellNet) -> CellNet:
    """Without norm, the last weights of each of B residual branches times `1/√B`, so that activations do not grow with B.

    To be called after the initialization (Zhang et al. 2019 go further, with zeros).
    """
    branches = [module.branch for module in net.modules() if isinstance(module, Residual)]
    if not net.has_norm:
        for branch in branches:
            last = [m for m in branch.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
            last.weight.mul_(1 / math.sqrt(len(branches)))
    return net


class Residual(nn.Module):
    """`after(branch(x) + shortcut(x))`."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.after = nn.Identity() if after is None else after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.branch(x) + self.shortcut(x))


class Append(nn.Module):
    """`[x, branch(x)]` along the channels."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.branch(x)), 1)


class SelfAttention(nn.Module):
    """Attention of the tokens `(N, T, D)` to one another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Patches(nn.Module):
    """Images as `(N, T, D)`: one token per patch, with a learned position."""

    def __init__(self, in_channels: int, image_size: int, width: int, side: int) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(in_channels, width, side, side)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // side) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x).flatten(2).transpose(1, 2) + self.positions


class Mean(nn.Module):
    """The mean over some dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


def _norm(kind: str, channels: int, batch: type[nn.Module] = nn.BatchNorm2d) -> list[nn.Module]:
    """The norm of `(N, channels, …)`, if any. A group has at least 4 channels: one of few units would be all zero."""
    if kind == "none":
        return []
    if kind == "batch":
        return [batch(channels)]
    groups = max(g for g in (1, 2, 4) if channels % g == 0 and (g == 1 or channels // g >= 4))
    return [nn.GroupNorm(1 if kind == "layer" else groups, channels)]


def _attention(
    in_channels: int, image_size: int, width: int, blocks: int, act: Callable[[], nn.Module], side: int, heads: int
) -> list[nn.Module]:
    modules: list[nn.Module] = [Patches(in_channels, image_size, width, side)]
    for _ in range(blocks):
        modules.append(Residual(nn.Sequential(nn.LayerNorm(width), SelfAttention(width, heads))))
        hidden = [nn.Linear(width, 2 * width), act(), nn.Linear(2 * width, width)]
        modules.append(Residual(nn.Sequential(nn.LayerNorm(width), *hidden)))
    return [*modules, nn.LayerNorm(width), Mean(1)]


def _mlp(
    inputs: int, width: int, blocks: int, norm: str, act: Callable[[], nn.Module], residual: bool
) -> list[nn.Module]:
    def before() -> list[nn.Module]:
        return [*_norm(norm, width, nn.BatchNorm1d), act()]

    modules: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, width)]
    for _ in range(blocks - 1):
        block = [*before(), nn.Linear(width, width)]
        modules += [Residual(nn.Sequential(*block))] if residual else block
    return [*modules, *before()]


def _convolutional(
    in_channels: int,
    cell: str,
    widths: Sequence[int],
    blocks: Sequence[int],
    kernel: int,
    pool: str,
    norm: str,
    act: Callable[[], nn.Module],
    stem_stride: int,
) -> tuple[list[nn.Module], int]:
    """The modules up to the global pooling, and the channels that come out."""

    def conv(before: int, after: int, side: int = kernel, stride: int = 1, groups: int = 1) -> nn.Module:
        bias = norm == "none"
        return nn.Conv2d(before, after, side, stride, side // 2, groups=groups, bias=bias)

    def normed(before: int, after: int, side: int = kernel, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        return [conv(before, after, side, stride, groups), *_norm(norm, after)]

    def ready(channels: int) -> list[nn.Module]:
        return [*_norm(norm, channels), act()]

    def build(before: int, after: int, stride: int) -> nn.Module:
        same = before == after and stride == 1
        if cell == "plain":
            return nn.Sequential(*normed(before, after, stride=stride), act())
        if cell == "preact":
            shortcut = None if same else conv(before, after, 1, stride)
            first = conv(before, after, stride=stride)
            return Residual(nn.Sequential(*ready(before), first, *ready(after), conv(after, after)), shortcut)
        if cell == "inverted":
            wide = 4 * before
            depthwise = normed(wide, wide, stride=stride, groups=wide)
            branch = nn.Sequential(*normed(before, wide, 1), act(), *depthwise, act(), *normed(wide, after, 1))
            return Residual(branch) if same else branch
        shortcut = None if same else nn.Sequential(*normed(before, after, 1, stride))
        if cell == "basic":
            layers = [*normed(before, after, stride=stride), act(), *normed(after, after)]
        else:
            inner = max(4, after // 4)
            reduced = [*normed(before, inner, 1), act(), *normed(inner, inner, stride=stride), act()]
            layers = [*reduced, *normed(inner, after, 1)]
        return Residual(nn.Sequential(*layers), shortcut, act())

    modules: list[nn.Module] = []
    channels, unfinished = in_channels, cell in ("preact", "dense")  # whose norm and activation come with the next cell
    if cell != "plain":
        stem = conv(in_channels, widths[0], stride=stem_stride)
        modules += [stem] if unfinished else [stem, *ready(widths[0])]
        channels = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        stride = 2 if stage > 0 and pool == "stride" else 1
        if cell == "plain" and stage == 0:
            stride = stem_stride
        if cell == "dense" and stage > 0:
            modules += [*ready(channels), conv(channels, width, 1, stride)]
            channels = width
        if stage > 0 and pool != "stride":
            pooling = nn.MaxPool2d if pool == "max" else nn.AvgPool2d
            modules.append(pooling(2, ceil_mode=True))  # images of any size keep a pixel
        for index in range(count):
            if cell == "dense":
                added = max(2, width // 2)
                modules.append(Append(nn.Sequential(*ready(channels), conv(channels, added))))
                channels += added
            else:
                modules.append(build(channels, width, stride if index == 0 else 1))
                channels = width
    return [*modules, *(ready(channels) if unfinished else []), Mean(2, 3)], channels
