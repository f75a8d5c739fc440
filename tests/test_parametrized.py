"""What is masked is what is used: weights that the forward pass computes from parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

import autosparse
from autosparse import Masks
from autosparse.errors import AutoSparseError
from autosparse.network.diagnostics import diagnose
from autosparse.network.size import layer_macs
from autosparse.trainability.export import export
from autosparse.trainability.forms import ExportSettings
from autosparse.trainability.shrink import shrink
from autosparse.trainability.stored import load_network, save_network

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES, torch.tensor([0, 1, 2, 3]))]


class Centred(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w - w.mean()


class Binary(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return torch.where(w >= 0, 1.0, -1.0) + 0 * w


class LowRank(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).unflatten(1, (4, 1, 1))

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w.flatten(1)[:, :2].clone(), w.flatten(1)[:2].clone()


class Cast(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.to(torch.bfloat16).to(w.dtype)


def own(parametrization: nn.Module) -> Callable[[], nn.Module]:
    return lambda: parametrize.register_parametrization(nn.Conv2d(4, 6, 1), "weight", parametrization)


class Computed(nn.Conv2d):
    """A convolution whose forward pass computes its weight."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4, 6, 1)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.compute(self.weight), self.bias)


MASKED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 1)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(4, 6, 1)),
    "cayley": lambda: parametrizations.orthogonal(nn.Conv2d(4, 6, 1), orthogonal_map="cayley"),
    "centred": own(Centred()),
    "binary": own(Binary()),
    "low rank": own(LowRank()),
    "cast": own(Cast()),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Conv2d(4, 6, 1)),
    "scaled": lambda: Computed(lambda w: w * 0.5),
    "scaled by channel": lambda: Computed(lambda w: w / w.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)),
    "rounded": lambda: Computed(lambda w: torch.fake_quantize_per_tensor_affine(w, 0.01, 0, -128, 127)),
    "turned": lambda: Computed(lambda w: 2 * w.transpose(0, 1).contiguous().transpose(0, 1)),
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "old weight norm": lambda: nn.utils.weight_norm(nn.Conv2d(4, 6, 1)),
    "StdConv2d": lambda: StdConv2d(4, 6, 1),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(4, 6, 1),
    "centred in forward": lambda: Computed(lambda w: w - w.mean()),
    "binary in forward": lambda: Computed(Binary()),
    "filters mixed": lambda: Computed(lambda w: w.cumsum(0)),
}


def network(middle: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the old weight norm
        made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), middle(), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    return made


class Uses(TorchFunctionMode):
    """The weights of convolutions as they are used, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func in (F.conv2d, torch.conv2d):
            self.weights.append(args[1].detach().clone())
        return func(*args, **(kwargs or {}))


def used(model: nn.Module) -> Tensor:
    with Uses() as uses:
        assert model(IMAGES).isfinite().all()
    return uses.weights[1]


def emptied(mask: Tensor) -> Tensor:
    return mask.index_fill(0, torch.tensor([0]), False)


def middle_of(masks: Masks) -> str:
    (name,) = (n for n in masks if n.startswith("2."))
    return name


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("criterion", ["snip", "synflow"])
def test_claimed_zeros_are_zeros_of_the_weight_that_is_used(kind: str, criterion: str) -> None:
    model = network(MASKED[kind])
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    masks = autosparse.prune(model, 0.6, criterion, batches=BATCHES, steps=3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    name = middle_of(masks)
    emptied_masks = Masks({n: emptied(m) if n == name else m for n, m in masks.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    emptied_masks.enforce(model, optimizer)
    masks = emptied_masks
    pruned = ~masks[name]
    assert pruned.any() and (used(model)[pruned] == 0).all() and list(model.state_dict()) == keys
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), BATCHES[0][1]).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        assert (used(model)[pruned] == 0).all()
    if not kind.startswith("old"):  # torch copies none of these after a backward pass
        assert (used(copy.deepcopy(model).eval())[pruned] == 0).all()
    model.double()
    with Uses() as uses:
        assert model(IMAGES.double()).isfinite().all()
    assert (uses.weights[1][pruned] == 0).all()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_weight_that_cannot_be_masked_where_it_is_used_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    model = network(REFUSED[kind])
    name = "2.weight_v" if kind == "old weight norm" else "2.weight"
    some = {n: torch.rand(dict(model.named_parameters())[n].shape) < 0.5 for n in (name, "5.weight")}
    masks = Masks({n: emptied(m) if n == name else m for n, m in some.items()})
    calls: dict[str, Callable[[], object]] = {
        "prune": lambda: autosparse.prune(model, 0.97, "random", example_input=IMAGES),
        "several steps": lambda: autosparse.prune(model, 0.97, "snip", batches=BATCHES, steps=4),
        "diagnose": lambda: diagnose(model, BATCHES, masks, iterations=0),
        "export": lambda: export(model, masks, tmp_path, ExportSettings(batch_sizes=()), example_input=IMAGES),
        "prepare": lambda: autosparse.prepare(model, masks, "isometry", example_input=IMAGES),
        "repair": lambda: autosparse.prepare(model, None, "rei", example_input=IMAGES),
    }
    before = copy.deepcopy(model.state_dict())
    for call in calls.values():
        with pytest.raises(AutoSparseError, match=f"computes the weight that it uses from '{name}'"):
            call()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    masks = autosparse.prune(model, 0.5, "snip", batches=BATCHES, exclude=name)
    assert name not in masks


def test_figures_of_a_parametrized_network_are_those_of_the_weights_that_it_uses(tmp_path: Path) -> None:
    model = network(MASKED["orthogonal"]).eval()
    plain = network(lambda: nn.Conv2d(4, 6, 1)).eval()
    for module, other in zip(model, plain, strict=True):
        for key, parameter in other.named_parameters():
            parameter.data = getattr(module, key).detach().clone()
    masks, expected = (autosparse.prune(m, 0.5, "snip", batches=BATCHES) for m in (model, plain))
    assert masks == expected and masks.report == expected.report and masks.layer_info == expected.layer_info
    figures, others = (diagnose(m, BATCHES, masks, iterations=0) for m in (model, plain))
    assert [(l.name, l.spectral_norm, l.gradient_norm) for l in figures.layers] == [
        (l.name, pytest.approx(l.spectral_norm), pytest.approx(l.gradient_norm)) for l in others.layers
    ]
    assert layer_macs(model, IMAGES) == layer_macs(plain, IMAGES)
    found = export(model, masks, tmp_path, ExportSettings(("safetensors",), batch_sizes=()), example_input=IMAGES)
    assert not found.failures and found.rows[1].cost.nonzero == masks.kept + 4 + 6 + 4
    loaded = load_network(tmp_path / "masked.safetensors", copy.deepcopy(plain))[0]
    masks.apply_(model)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    save_network(tmp_path / "own.safetensors", model, masks)
    assert torch.equal(
        load_network(tmp_path / "own.safetensors", network(MASKED["orthogonal"]))[0](IMAGES), model(IMAGES)
    )
    filters = Masks({"2.weight": emptied(torch.ones(6, 4, 1, 1, dtype=torch.bool))})
    assert (
        shrink(plain, filters, IMAGES)[2].weight.shape == shrink(model, filters, IMAGES)[2].weight.shape == (5, 4, 1, 1)
    )
    with pytest.raises(AutoSparseError, match=r"weight '2.weight' is computed by a parametrization"):
        autosparse.prepare(model, masks, "isometry", example_input=IMAGES)


def test_masks_of_a_parametrized_weight() -> None:
    """They fit the network with and without the parametrization, replace each other, and name what is used."""
    model = network(MASKED["weight norm"])
    first = torch.rand(6, 4, 1, 1, generator=torch.Generator().manual_seed(1)) < 0.5
    dense = used(model)
    for mask in (emptied(first), ~emptied(first), first):
        Masks({"2.weight": mask}).apply_(model)
        assert torch.equal(used(model), dense.masked_fill(~mask, 0))
    parametrize.remove_parametrizations(model[2], "weight")
    Masks({"2.weight": first}).check(model)
    assert torch.equal(model[2].weight, dense.masked_fill(~first, 0))
    with pytest.raises(AutoSparseError, match=r"make a mask of '2.weight', which is used"):
        Masks({"2.parametrizations.weight.original1": first}).apply_(network(MASKED["weight norm"]))
    with pytest.raises(AutoSparseError, match=r"'2.weight' has shape \(2,\)"):
        Masks({"2.weight": torch.ones(2, dtype=torch.bool)}).apply_(network(MASKED["weight norm"]))


def test_factors_of_a_product_of_parameters_are_noted() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a @ self.b)

    masks = autosparse.prune(Product(), 0.5, "magnitude", example_input=torch.ones(1, 4))
    assert "a and b are multiplied with each other before data: the product is dense" in masks.report.notes
