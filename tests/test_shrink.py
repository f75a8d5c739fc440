"""Physical removal: by hand on small networks, and on public ones that the smaller network computes what the zeroed does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autosparse import AutoSparseError, Masks, prune
from autosparse.errors import AutoSparseFailure
from autosparse.network.size import Size, layer_macs, size
from autosparse.trainability import shrink as module
from autosparse.trainability.shrink import output_difference, remove, same_outputs, shrink
from autosparse.training.models import ModelSettings, create_model

Guard = Callable[[nn.Module], AbstractContextManager[None]]


class Net(nn.Module):
    """Modules by name and a forward pass over them."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in modules.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random statistics, shifts and biases, of which none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if t.is_floating_point() and t.dim() == 1:
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
                t.mul_(1 if "var" in name else -1) if "mean" in name or "bias" in name else None
    return model


def empties(model: nn.Module, **filters: list[int]) -> Masks:
    """Masks that empty filters of modules: `conv=[0, 2]`, `__` for a dot."""
    chosen = {}
    for key, indices in filters.items():
        name = key.replace("__", ".") + ".weight"
        chosen[name] = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
        chosen[name][indices] = False
    return Masks(chosen)


def plain() -> nn.Module:
    return drawn(
        nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 2)
        )
    )


def test_a_filter_goes_with_its_bias_its_norm_and_what_reads_it(unchanged: Guard) -> None:
    model = plain()
    masks = empties(model, **{"0": [1], "3": [0]})
    with unchanged(model):
        found = remove(model, masks, torch.zeros(2, 1, 4, 4))
    small = found.smaller
    assert dict(found.removed) == {"0.weight": (1,), "3.weight": (0,)} and not found.stays
    assert found.gone == {
        **dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias"), (0, (1,))),
        **dict.fromkeys(("3.weight", "3.bias"), (0, (0,))),
    }
    assert torch.equal(small[0].weight, model[0].weight[[0, 2]]) and torch.equal(small[0].bias, model[0].bias[[0, 2]])
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(small[1], key), getattr(model[1], key)[[0, 2]])
    assert torch.equal(small[3].weight, model[3].weight[1:][:, [0, 2]])
    assert torch.equal(small[5].weight, model[5].weight[:, 4:])  # channel 1 of 2, four positions each
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels, small[5].in_features) == (2, 2, 2, 4)
    assert [p.requires_grad for p in small.parameters()] == [True] * 8
    zero = found.zeroed
    assert (
        zero[0].weight[1].abs().sum() == 0 == zero[0].bias[1] == zero[1].weight[1] == zero[1].bias[1] == zero[3].bias[0]
    )
    assert torch.equal(zero[3].weight[1], model[3].weight[1]) and torch.equal(zero[5].weight, model[5].weight)
    x = torch.randn(4, 1, 4, 4)
    assert torch.allclose(zero.eval()(x), small.eval()(x), atol=1e-6)


def test_parameters_and_macs() -> None:
    model = plain()
    assert size(model, torch.zeros(2, 1, 4, 4)) == Size(27 + 3 + 6 + 6 + 2 + 16 + 2, 27 * 4 + 6 * 4 + 16)
    small = shrink(model, empties(model, **{"0": [1], "3": [0]}), torch.zeros(2, 1, 4, 4))
    assert size(small, torch.zeros(2, 1, 4, 4)) == Size(18 + 2 + 4 + 2 + 1 + 8 + 2, 18 * 4 + 2 * 4 + 8)


def test_each_use_of_a_stacked_projection_counts_its_own_rows() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.attend(x, context, context)[0]

    macs = layer_macs(Cross(), (torch.zeros(3, 3, 4), torch.zeros(3, 5, 4)))
    queries, keys_and_values = 3 * 4 * 4, 5 * 8 * 4
    assert macs == {"attend.in_proj_weight": queries + keys_and_values, "attend.out_proj.weight": 3 * 4 * 4}


def test_macs_of_grouped_transposed_and_repeated_layers() -> None:
    layers = {"up": nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), "again": nn.Conv2d(6, 6, 3, padding=1, groups=3)}
    model = Net(lambda m, x: m.again(m.again(m.up(x))), **layers)
    macs = layer_macs(model, torch.zeros(5, 4, 3, 3))
    assert macs == {"up.weight": 4 * 3 * 3 * (3 * 2 * 2), "again.weight": 2 * 6 * 6 * 6 * (2 * 3 * 3)}


def test_without_a_batch_the_whole_input_is_one_example() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8)
    assert layer_macs(model, (torch.zeros(5, 4), torch.zeros(5, 5)))["linear1.weight"] == 5 * 4 * 8


def residual() -> nn.Module:
    """Two convolutions whose outputs add up, and a third between."""
    return drawn(
        Net(
            lambda m, x: m.fc((m.stem(x) + m.last(torch.relu(m.first(m.stem(x))))).mean((2, 3))),
            stem=nn.Conv2d(1, 4, 3, padding=1),
            first=nn.Conv2d(4, 4, 3, padding=1),
            last=nn.Conv2d(4, 4, 3, padding=1),
            fc=nn.Linear(4, 2),
        )
    )


def test_filters_of_a_residual_sum_go_only_together() -> None:
    model, x = residual(), torch.zeros(2, 1, 4, 4)
    found = remove(model, empties(model, stem=[0, 1], first=[3], last=[1, 2]), x)
    assert dict(found.removed) == {"stem.weight": (1,), "first.weight": (3,), "last.weight": (1,)}
    assert found.stays["stem.weight"] == "1 empty filter stays: coupled with filters of 'last' that are kept"
    small = found.smaller
    assert torch.equal(small.fc.weight, model.fc.weight[:, [0, 2, 3]])
    assert small.stem.weight[0].abs().sum() == 0 < small.stem.bias[0].abs()  # the filter stays empty, its bias stays
    assert small.last.weight[1].abs().sum() == 0
    assert torch.equal(found.zeroed.stem.bias[[0, 2, 3]], model.stem.bias[[0, 2, 3]])
    with pytest.warns(UserWarning, match="stem.weight: 1 empty filter stays"):
        shrink(model, empties(model, stem=[0]), x)


def test_a_layer_keeps_a_filter_and_the_classifier_all() -> None:
    model, x = residual(), torch.zeros(2, 1, 4, 4)
    found = remove(model, empties(model, first=[0, 1, 2, 3], fc=[1]), x)
    assert dict(found.removed) == {"first.weight": (1, 2, 3)}
    assert found.stays == {
        "first.weight": "1 empty filter stays: a layer keeps at least one",
        "fc.weight": "1 empty filter stays: the outputs of 'fc' are the model's",
    }
    assert found.smaller.first.weight.shape == (1, 4, 3, 3) and not found.smaller.first.weight.any()


def grouped(**options: Any) -> nn.Module:
    return drawn(
        nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 3, groups=2, **options), nn.ReLU(), nn.Conv2d(8, 2, 2))
    )


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ([], [0, 5], (4, 6)),  # one of each group
        ([], [0, 1, 5], (4, 6)),
        ([], [0, 1], (4, 8)),
        ([0, 2], [], (2, 8)),  # the same place in both groups
        ([0, 3], [], (4, 8)),
        ([0, 1, 2, 3], [0, 4], (4, 6)),
    ],
)
def test_groups_stay_equal(first: list[int], second: list[int], left: tuple[int, int]) -> None:
    model = grouped()
    found = remove(model, empties(model, **{"0": first, "1": second}), torch.zeros(2, 1, 4, 4))
    assert (found.smaller[0].out_channels, found.smaller[1].out_channels) == left
    assert found.smaller[1].weight.shape == (left[1], left[0] // 2, 3, 3)


def test_a_depthwise_filter_goes_with_the_filter_before_it() -> None:
    model = drawn(
        nn.Sequential(
            nn.Conv2d(1, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU6(),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.Flatten(),
            nn.Linear(16, 2),
        )
    )
    x = torch.zeros(2, 1, 4, 4)
    found = remove(model, empties(model, **{"0": [0, 1], "3": [1, 2]}), x)
    assert dict(found.removed) == {"0.weight": (1,), "3.weight": (1,)}
    assert (found.smaller[3].groups, found.smaller[3].weight.shape) == (3, (3, 1, 3, 3))
    assert not remove(model, empties(model, **{"0": [0, 1]}), x).removed


def test_channels_that_are_normalized_together_stay() -> None:
    model = drawn(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)))
    found = remove(model, empties(model, **{"0": [0], "2": [1, 5]}), torch.zeros(2, 3))
    assert dict(found.removed) == {"2.weight": (1, 5)}
    assert found.stays == {"0.weight": "1 empty filter stays: '1' normalizes them together with others"}


def test_a_raw_parameter_per_channel_loses_what_its_channel_loses() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale, self.fc = nn.Conv2d(1, 4, 3), nn.Parameter(torch.rand(1, 4, 1, 1)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.conv(x) + self.scale).mean((2, 3)))

    model = drawn(Scaled())
    found = remove(model, empties(model, conv=[2]), torch.zeros(2, 1, 4, 4))
    assert torch.equal(found.smaller.scale, model.scale[:, [0, 1, 3]]) and found.zeroed.scale[0, 2] == 0


def test_shared_weights_stay() -> None:
    model = residual()
    model.last.weight = model.first.weight
    found = remove(model, empties(model, first=[0]), torch.zeros(2, 1, 4, 4))
    assert not found.removed and found.stays == {"first.weight": "1 empty filter stays: its weight is shared"}


def test_a_norm_without_affine_parameters() -> None:
    model = drawn(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 2, 2)))
    found = remove(model, empties(model, **{"0": [1, 2]}), torch.zeros(2, 1, 4, 4))
    assert found.smaller[1].running_mean.shape == (2,) and found.zeroed[1].running_mean[1] == 0
    assert found.gone["1.running_mean"] == (0, (1, 2))


# -- public networks ----------------------------------------------------------------------------------------------------


def mobilenet_v2() -> nn.Module:
    from torchvision.models import MobileNetV2

    return MobileNetV2(5, 0.5, [[1, 8, 1, 1], [4, 16, 2, 2], [4, 24, 1, 2]])


def mobilenet_v3() -> nn.Module:
    """With squeeze-and-excitation."""
    from torchvision.models.mobilenetv3 import InvertedResidualConfig as Block
    from torchvision.models.mobilenetv3 import MobileNetV3

    blocks = [(8, 3, 16, 8, True, "HS", 1), (8, 3, 32, 16, True, "RE", 2), (16, 5, 32, 16, False, "HS", 1)]
    return MobileNetV3([Block(*block, 1, 1.0) for block in blocks], 32, num_classes=5)


def densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(4, (2, 2), 8, num_classes=5)


def vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5)


def own(name: str, width: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: create_model(ModelSettings(name, width, options), image_size=16)


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (own("resnet20", 4), 0.3),
        (own("resnet8", 4, residual=(0.7, 0.3)), 0.35),
        (own("resnet18", 4), 0.3),
        (own("resnet50", 4), 0.3),
        (own("vgg11", 4), 0.3),
        (own("mlp", 16), 0.6),
        (mobilenet_v2, 0.4),
        (mobilenet_v3, 0.4),
        (densenet, 0.45),
        (vit, 0.9),
        *((own("cellnet", 8, cell=cell, blocks=(1, 1)), 0.35) for cell in ("preact", "inverted", "bottleneck", "dense")),
        (own("cellnet", 8, cell="attention", norm="layer", blocks=(1,)), 0.95),
    ],
)  # fmt: skip
def test_the_smaller_network_computes_what_the_zeroed_does(make: Callable[[], nn.Module], share: float) -> None:
    torch.manual_seed(0)
    model = drawn(make())
    x = torch.randn(3, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = prune(model, 0.5, "random", example_input=x, granularity="channel", scope="uniform")
    found = remove(model, masks, x)
    apart = [why for why in found.stays.values() if "coupled with filters" in why]
    assert apart == [], "what the masks couple (network.coupling) and what torch-pruning couples is the same"
    before, after = size(model, x), size(found.smaller, x)
    assert after.parameters <= share * before.parameters or share > 0.6
    assert after.macs < share * before.macs and found.removed
    assert output_difference(found.zeroed, found.smaller, x) < 1e-10
    state = found.zeroed.state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in model.state_dict().items()}
    for name, mask in masks.items():
        assert not state[name][~mask].any()
    loss = found.smaller.train()(x).square().sum()  # it trains
    loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in found.smaller.parameters())


def test_it_is_rebuilt_from_its_masks_and_its_state() -> None:
    model = drawn(own("resnet8", 4)())
    x = torch.randn(2, 3, 16, 16)
    masks = prune(model, 0.5, "magnitude", example_input=x, granularity="channel", scope="uniform")
    small = shrink(model, masks, x)
    other = shrink(own("resnet8", 4)(), masks, x)
    other.load_state_dict(small.state_dict())
    assert torch.equal(small.eval()(x), other.eval()(x))


# -- the check ----------------------------------------------------------------------------------------------------------


def test_other_outputs_are_seen(unchanged: Guard) -> None:
    model = plain()
    x = torch.zeros(2, 1, 4, 4)
    other = copy.deepcopy(model)
    with unchanged(model), unchanged(other):
        assert same_outputs(model, other, x)
    with torch.no_grad():
        other[5].bias += 1e-3
    assert not same_outputs(model, other, x)
    other = copy.deepcopy(model)
    other[1].running_mean += 1  # of no effect in train mode, but in eval mode
    assert not same_outputs(model, other, x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].bias += 1
        other[1].running_mean += 1
    assert same_outputs(model, other, x)
    other[1].eps = 0.1  # in either
    assert not same_outputs(model, other, x)


def test_an_activation_that_is_not_0_at_0_is_told_with_its_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 2)
    )
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(
        AutoSparseFailure, match=r"Sequential cannot be made smaller by the filters of '2.weight'"
    ) as caught:
        shrink(model, empties(model, **{"0": [1], "2": [0]}), x)
    assert "\n" not in str(caught.value) and "leaving the layer out of the masks" in str(caught.value)
    nn.init.zeros_(model[5].weight)  # a classifier at 0 does not hide it
    with pytest.raises(AutoSparseFailure, match="it computes other outputs"):
        shrink(model, empties(model, **{"2": [0]}), x)


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_masks_of_single_weights_are_told() -> None:
    model = plain()
    masks = prune(model, 0.5, "magnitude", example_input=torch.zeros(2, 1, 4, 4))
    with pytest.raises(AutoSparseError, match=r"'0.weight' removes single weights.*granularity='channel'"):
        shrink(model, masks, torch.zeros(2, 1, 4, 4))


def test_masks_of_another_model_and_inputs_that_do_not_fit_are_told() -> None:
    model = plain()
    with pytest.raises(AutoSparseError, match="made for"):
        shrink(model, empties(residual(), stem=[0]), torch.zeros(2, 1, 4, 4))
    with pytest.raises(AutoSparseError, match="cannot run on example_input of shape"):
        shrink(model, empties(model, **{"0": [0]}), torch.zeros(2, 7, 4, 4))


def test_nothing_to_remove_is_a_copy() -> None:
    model = plain()
    small = shrink(model, empties(model, **{"0": []}), torch.zeros(2, 1, 4, 4))
    assert small is not model and all(map(torch.equal, small.state_dict().values(), model.state_dict().values()))
    assert module.TOLERANCE == 1e-5
