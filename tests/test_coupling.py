"""Coupled filters: by hand on small networks, by known stages on public ones, and by removing channels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse import AutoSparseError, Masks, prune
from autosparse.masks.layers import prunable_layers
from autosparse.network.coupling import coupled_filters
from autosparse.network.graph import trace
from autosparse.pruning.criteria import HandMade
from autosparse.training.models import ModelSettings, create_model

Guard = Callable[[nn.Module], AbstractContextManager[None]]


class Net(nn.Module):
    """Modules by name and a forward pass over them."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def groups(model: nn.Module, *shape: int) -> list[str]:
    """Coupled groups in short: the modules' names."""
    found = coupled_filters(model, prunable_layers(model), torch.zeros(shape or (2, 4, 4, 4)))
    return [" ".join(name.removesuffix(".weight") for name in group) for group in found]


# -- by hand: a, b and c are 3×3 convolutions of 4 channels on maps of 4×4, so that no size tells which dimension is which

SUMS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "chain": (lambda m, x: m.c(F.relu(m.b(m.a(x)))), []),
    "two branches": (lambda m, x: m.c(m.a(x) + m.b(x)), ["a b"]),
    "difference": (lambda m, x: m.c(m.a(x) - 2 * F.relu(m.b(x))), ["a b"]),
    "stream": (lambda m, x: (y := (y := m.a(x)) + m.b(F.relu(y))) + m.c(y), ["a b c"]),
    "in place": (lambda m, x: m.c(F.relu_(m.a(x).add_(m.b(x)))), ["a b"]),
    "input": (lambda m, x: m.b(x + m.a(x)), []),
    "a weight twice": (lambda m, x: m.b(m.a(x) + m.a(F.relu(m.a(x)))), []),
    "product": (lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x))), ["a b"]),
    "gate": (lambda m, x: (y := m.a(x)) * torch.sigmoid(m.b(F.relu(m.c(y.mean((2, 3), True))))), ["a b"]),
    "gate over space": (lambda m, x: m.a(x) * m.b(x).mean(1, keepdim=True), []),
    "mean over space": (lambda m, x: m.a(x).mean((2, 3)) + m.b(x).amax((2, 3)), ["a b"]),
    "mean over channels and rows": (lambda m, x: m.a(x).mean((1, 2)) + m.b(x).mean((2, 3)), []),
    "pooled and resized": (lambda m, x: m.a(x) + F.interpolate(F.max_pool2d(m.b(x), 2), scale_factor=2), ["a b"]),
    "padded": (lambda m, x: F.pad(m.a(x)[..., 1:], (0, 1)) + m.b(x), ["a b"]),
    "padded channels": (lambda m, x: m.a(x) + F.pad(m.b(x)[:, :2], (0, 0, 0, 0, 1, 1)), []),
    "shifted channels": (lambda m, x: m.a(x) + F.pad(m.b(x), (0, 0, 0, 0, 1, -1)), []),
    "transposed": (lambda m, x: m.a(x) + m.b(x).transpose(1, 2), []),
    "transposed in space": (lambda m, x: m.a(x) + m.b(x).transpose(2, 3), ["a b"]),
    "there and back": (lambda m, x: m.a(x) + m.b(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), ["a b"]),
    "as tokens": (lambda m, x: m.a(x).flatten(2).transpose(1, 2) + m.b(x).flatten(2).transpose(1, 2), ["a b"]),
    "batch and channels": (lambda m, x: m.a(x).view(8, 4, 4) + m.b(x).view(8, 4, 4), []),
    "rolled in space": (lambda m, x: m.a(x) + m.b(x).roll(1, 2), ["a b"]),
    "rolled channels": (lambda m, x: m.a(x) + m.b(x).roll(1, 1), []),
    "flipped channels": (lambda m, x: m.a(x) + m.b(x).flip(1), []),
    "all rolled": (lambda m, x: m.a(x) + m.b(x).roll(1), []),
    "shuffled": (lambda m, x: m.a(x) + m.b(x).view(2, 2, 2, 4, 4).transpose(1, 2).reshape(2, 4, 4, 4), []),
    "joined": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1), []),
    "joined, then cut": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1)[:, :4] + m.c(x), []),
    "joined in space": (lambda m, x: torch.cat([m.a(x), m.b(x)], 2), ["a b"]),
    "stacked": (lambda m, x: torch.stack([m.a(x), m.b(x)], 1).sum(1), []),
    "every second row": (lambda m, x: m.a(x)[:, :, ::2] + m.b(x)[:, :, 1::2], ["a b"]),
    "one channel of all": (lambda m, x: m.a(x)[:, 0] + m.b(x)[:, 1], []),
    "one row": (lambda m, x: m.a(x)[:, :, 0] + m.b(x).select(3, 1), ["a b"]),
    "chunks": (lambda m, x: (h := m.a(x).chunk(2, 1))[0] * h[1] + m.b(x)[:, :2], []),
    "glu": (lambda m, x: F.glu(torch.cat([m.a(x), m.b(x)], 1), 1) + m.c(x), []),
    "outer product": (lambda m, x: m.a(x).flatten(2) @ m.b(x).flatten(2).transpose(1, 2), []),
    "choice": (lambda m, x: torch.where(x > 0, m.a(x), m.b(x)), ["a b"]),
    "unknown": (lambda m, x: m.a(x) + m.b(x).cumsum(1), []),
    "one of two in place": (lambda m, x: _half(m.a(x), m.b(x)[:, :2]) + m.c(x), []),
    "copied": (lambda m, x: torch.empty(2, 4, 4, 4, device=x.device).copy_(m.a(x)) + m.b(x), ["a b"]),
    "constant": (lambda m, x: m.a(x) + torch.ones(4, 1, 1, device=x.device), []),
}


def _half(y: Tensor, z: Tensor) -> Tensor:
    y[:, 2:] += z
    return y


@pytest.mark.parametrize("case", SUMS)
def test_sums_by_hand(case: str, unchanged: Guard) -> None:
    forward, wanted = SUMS[case]
    model = Net(forward, a=conv(), b=conv(), c=conv())
    with unchanged(model):
        assert groups(model) == wanted


def test_depthwise_joins_what_feeds_it() -> None:
    for middle, wanted in ((conv(groups=4), ["a b"]), (conv(groups=2), []), (conv(4, 8, groups=4), [])):
        model = Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), a=conv(), b=middle, c=conv(middle.out_channels, 4))
        assert groups(model) == wanted
    assert groups(Net(lambda m, x: m.b(m.a(x)), a=conv(groups=4), b=conv())) == []  # on the input: nothing feeds it
    assert groups(Net(lambda m, x: m.a(x) + m.b(x), a=conv(4, 1), b=conv(4, 1))) == []  # one filter is no choice


def test_transposed_convolutions() -> None:
    def up(**options: Any) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(4, 4, 3, padding=1, **options)

    assert groups(Net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=up())) == ["a b"]
    assert groups(Net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=up(groups=2))) == []


def test_linear_layers_keep_channels_in_the_last_dimension() -> None:
    class Block(nn.Module):
        """A gated MLP of two layers, or of the halves of one."""

        def __init__(self, halves: bool) -> None:
            super().__init__()
            self.halves, self.norm = halves, nn.LayerNorm(6)
            self.gate, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 12 if halves else 6), nn.Linear(6, 6)
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            up, gate = self.up(y).chunk(2, -1) if self.halves else (self.up(y), self.gate(y))
            return x + self.scale * self.down(F.silu(gate) * up)

    for halves, gates in ((False, ["1.gate 1.up", "2.gate 2.up"]), (True, [])):
        model = nn.Sequential(nn.Linear(3, 6), Block(halves), Block(halves), nn.Linear(6, 2))
        assert sorted(groups(model, 2, 5, 3)) == ["0 1.down 2.down", *gates]


def test_an_encoder_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    stream = [f"1.layers.{i}.{name}" for i in range(2) for name in ("self_attn.out_proj", "linear2")]
    assert groups(model, 2, 5, 3) == [" ".join(["0", *stream])]


def test_layers_that_are_not_asked_for_are_followed_only() -> None:
    model = Net(lambda m, x: (y := m.a(x) + m.b(x)) + m.c(y), a=conv(), b=conv(), c=conv())
    layers = prunable_layers(model, exclude="b.*")
    assert coupled_filters(model, layers, torch.zeros(1, 4, 4, 4)) == (("a.weight", "c.weight"),)


def test_an_input_that_does_not_fit() -> None:
    with pytest.raises(AutoSparseError, match="cannot run on example_input"):
        groups(conv(), 2, 3, 4, 4)


# -- public networks -------------------------------------------------------------------------------------------------


def network(name: str) -> nn.Module:
    if ":" in name:
        pytest.importorskip("torchvision")
    return create_model(ModelSettings(name, None if ":" in name else 4), image_size=32)


def test_stages_of_residual_networks() -> None:
    stages = [f"layer{i}.0.conv2 layer{i}.0.downsample.0 layer{i}.1.conv2" for i in (2, 3, 4)]
    assert groups(network("torchvision:resnet18"), 1, 3, 32, 32) == ["conv1 layer1.0.conv2 layer1.1.conv2", *stages]
    first, *others = groups(network("resnet20"), 1, 3, 32, 32)
    assert first == "conv1 stages.0.0.conv2 stages.0.1.conv2 stages.0.2.conv2"
    assert others == [
        f"stages.{i}.0.conv2 stages.{i}.0.shortcut.0 stages.{i}.1.conv2 stages.{i}.2.conv2" for i in (1, 2)
    ]


@pytest.mark.parametrize("name", ["convnet", "mlp", "vgg11", "torchvision:densenet121", "torchvision:squeezenet1_1"])
def test_networks_without_sums(name: str) -> None:
    assert groups(network(name), 1, 3, 32, 32) == []


def test_a_vision_transformer_has_one_stream() -> None:
    pytest.importorskip("torchvision")
    (stream,) = groups(network("torchvision:vit_b_16"), 1, 3, 32, 32)
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
    assert stream.split() == [
        "conv_proj",
        *(f"{b}.{layer}" for b in blocks for layer in ("self_attention.out_proj", "mlp.3")),
    ]


def test_shifted_windows() -> None:
    """Rolls, windows and patch merging: one stream per stage."""
    found = [g.split() for g in groups(network("torchvision:swin_t"), 1, 3, 32, 32)]
    assert [len(g) for g in found] == [5, 5, 13, 5]
    assert [g[0] for g in found] == [
        "features.0.0",
        "features.2.reduction",
        "features.4.reduction",
        "features.6.reduction",
    ]


def sources(model: nn.Module) -> dict[str, set[str]]:
    """Per layer, those whose output it reads, by the trace: an account that knows no channels."""
    found: dict[str, set[str]] = {}
    for source, target in trace(model, torch.zeros(1, 3, 32, 32)).edges():
        found.setdefault(target, set()).add(source)
    return found


def carried(model: nn.Module, removed: dict[str, Tensor]) -> dict[str, tuple[bool, bool]]:
    """Silence the filters `removed` (True = gone) with their biases and the norms behind them; per layer that reads only
    layers silenced alike: whether some of the channels gone, and some of the others, carry anything."""
    modules, read = list(model.named_modules()), sources(model)
    following = {
        name + ".weight": (module, after)
        for (name, module), (_, after) in itertools.pairwise([*modules, ("", nn.Identity())])
    }
    inputs: dict[str, Tensor] = {}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))  # biases and shifts begin at zero
        for name, gone in removed.items():
            module, after = following[name]
            module.weight[gone] = 0
            for parameter in (module.bias, *(after.parameters() if isinstance(after, nn.BatchNorm2d) else ())):
                if parameter is not None:
                    parameter[gone] = 0
        for name, module in modules:
            module.register_forward_pre_hook(lambda _, args, key=name + ".weight": inputs.update({key: args[0]}))
        model.eval()(torch.randn(2, 3, 32, 32))
    found = {}
    for target, before in read.items():
        if before <= removed.keys():
            gone = removed[min(before)]
            assert all(torch.equal(gone, removed[name]) for name in before), target
            channels = inputs[target].movedim(1, 0)
            found[target] = (bool(channels[gone].any()), bool(channels[~gone].any()))
    return found


@pytest.mark.parametrize(
    "name",
    ["resnet8", "resnet50", "torchvision:resnet18", "torchvision:mobilenet_v3_small"],
)
def test_channels_removed_from_a_group_carry_nothing(name: str) -> None:
    model = network(name)
    layers = prunable_layers(model)
    found = coupled_filters(model, layers, torch.zeros(1, 3, 32, 32))
    removed = {
        name: torch.arange(layers[name].shape[0]) % 3 == index % 3
        for index, group in enumerate(found)
        for name in group
    }
    seen = carried(model, removed)
    assert len(seen) >= len(found)
    assert all(flags == (False, True) for flags in seen.values())
    # Nothing is missing: where a layer reads the sum or product of several, they are one group.
    several = [before for before in sources(model).values() if len(before) > 1]
    assert several and all(any(before <= set(group) for group in found) for before in several)


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
def test_what_prune_removes_carries_nothing(scope: str) -> None:
    model = network("resnet8")
    masks = prune(
        model, 0.5, "magnitude", example_input=torch.zeros(1, 3, 32, 32), granularity="channel", scope=scope, floor=0.05
    )
    assert masks.report.dense_layers == trace(model, torch.zeros(1, 3, 32, 32)).last_layers()
    removed = {n: ~m.flatten(1).any(1) for n, m in masks.items()}
    assert all(m.flatten(1)[~removed[n]].all() for n, m in masks.items())
    assert not any(gone for gone, _ in carried(model, removed).values())
    assert any(gone.any() for gone in removed.values())


# -- prune -----------------------------------------------------------------------------------------------------------


def residual() -> nn.Module:
    """Two residual blocks of three channels: 3 + 9 + 9 weights in one group, and a classifier of 6."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + F.relu(m.a(x))
        x = x + F.relu(m.b(x))
        return m.head(x.mean((2, 3)))

    one = {name: nn.Conv2d(inputs, 3, 1) for name, inputs in (("stem", 1), ("a", 3), ("b", 3))}
    return Net(forward, **one, head=nn.Linear(3, 2))


SCORES = {
    "stem.weight": torch.tensor([5.0, 1.0, 0.0]).view(3, 1, 1, 1),
    "a.weight": torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]).view(3, 3, 1, 1),
    "b.weight": torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 2.0]]).view(3, 3, 1, 1),
    "head.weight": torch.zeros(2, 3),
}


def by_score(density: float, example: Tensor | None, **options: Any) -> Masks:
    rule = HandMade("literal", lambda signals, context: {name: SCORES[name] for name in context.layers})
    return prune(residual(), 1 - density, rule, granularity="channel", example_input=example, **options)


def test_the_exact_mask_of_two_residual_blocks() -> None:
    """Channels have the means 5/7, 10/7 and 11/7, though the stem alone would keep the first."""
    masks = by_score(20 / 27, torch.zeros(1, 1, 2, 2))
    for name in ("stem.weight", "a.weight", "b.weight"):
        assert masks[name].flatten(1).int().tolist() == [[k] * masks[name].shape[1] for k in (0, 1, 1)]
    assert masks["head.weight"].all() and masks.kept == 20
    assert masks.report.dense_layers == ("head.weight",) and masks.report.notes == ()
    assert by_score(0.5, torch.zeros(1, 1, 2, 2)).kept == 13
    assert by_score(0.6, torch.zeros(1, 1, 2, 2)).report.notes == ("whole channels keep 13 weights; 16 were asked for",)


def test_the_outputs_alone_hold_more_than_was_asked() -> None:
    for density, asked in ((0.1, 3), (6 / 27, 6)):
        with pytest.raises(
            AutoSparseError, match=rf"keeps {asked} of 27 weights, but 'head.weight'.* hold 6: keep more"
        ):
            by_score(density, torch.zeros(1, 1, 2, 2), steps=3)
    masks = by_score(7 / 21, torch.zeros(1, 1, 2, 2), exclude="head.*")
    assert masks.kept == 7 and masks.report.dense_layers == ()


def test_without_an_input_nothing_is_known_to_be_coupled() -> None:
    with pytest.warns(UserWarning, match="1 of 4 layers are dead"):
        masks = by_score(7 / 27, None)
    kept = {name: masks[name].flatten(1).any(1).tolist() for name in SCORES}
    assert kept["stem.weight"] == [True, False, False] and kept["a.weight"] == [False, False, True]
    assert masks.report.dense_layers == ()
    assert "no example_input: which channels are coupled is not known" in masks.report.notes


def test_what_is_coupled_with_an_output_stays_too() -> None:
    model = Net(lambda m, x: m.a(x) + m.b(F.relu(m.c(x))), a=conv(), b=conv(), c=conv())
    masks = prune(model, 0.2, "magnitude", granularity="channel", example_input=torch.zeros(1, 4, 4, 4))
    assert masks.report.dense_layers == ("a.weight", "b.weight")
    assert (masks["a.weight"].all(), masks["b.weight"].all()) == (True, True)
    assert masks["c.weight"].flatten(1).any(1).sum() == 2  # 0.8·432 − 288 = 58 of 36 each


def test_last_layers() -> None:
    def last(model: nn.Module, *shape: int) -> tuple[str, ...]:
        return trace(model, torch.zeros(shape)).last_layers()

    assert last(residual(), 1, 1, 2, 2) == ("head.weight",)
    assert last(nn.Sequential(conv(), nn.PixelShuffle(2)), 1, 4, 4, 4) == ("0.weight",)
    assert last(Net(lambda m, x: (m.a(y := m.c(x)), {"b": m.b(y)}), a=conv(), b=conv(), c=conv()), 1, 4, 4, 4) == (
        "a.weight",
        "b.weight",
    )


def test_steps_remove_whole_channels_of_groups_only() -> None:
    model = network("resnet8")
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    masks = prune(model, 0.5, "iterative_snip", batches=batches, granularity="channel", steps=3, floor=0.1)
    for group in coupled_filters(model, prunable_layers(model), batches[0][0]):
        kept = [masks[name].flatten(1).any(1) for name in group]
        assert all(torch.equal(kept[0], other) for other in kept)
