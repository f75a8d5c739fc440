"""Gates: where they stand, their gradient by enumeration, what leaves and what stays, and stops in between."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autosparse.errors import AutoSparseError, AutoSparseStateError
from autosparse.experiment.structured import GATED, run_thinnings, thinnings
from autosparse.masks.layers import prunable_layers
from autosparse.masks.mask import Masks
from autosparse.network.gating import multiplied
from autosparse.trainability import gated
from autosparse.trainability.gated import train_gated
from autosparse.trainability.gates import Gates, GateSettings, branches, take_out, unit_layers
from autosparse.trainability.shrink import output_difference, remove, survivors
from autosparse.trainability.tpp import TPPSettings
from autosparse.training.data import DataSettings, ImageData, load_data
from autosparse.training.loop import evaluate
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe

RECIPE = Recipe(steps=60, batch_size=32, lr=0.05)


class Sum(nn.Module):
    def __init__(self, branch: nn.Module, keep: float = 1.0) -> None:
        super().__init__()
        self.branch, self.keep = branch, keep

    def forward(self, x: Tensor) -> Tensor:
        return self.keep * x + self.branch(x)


class Noisy(nn.Linear):
    """Adds noise alone."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * super().forward(x) + 3 * torch.randn_like(x)


def two_branches() -> nn.Sequential:
    torch.manual_seed(0)
    inner = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)]
    return nn.Sequential(Sum(inner[0]), nn.ReLU(), Sum(inner[1]), nn.Linear(4, 3))


@pytest.mark.parametrize(("name", "count"), [("resnet20", 9), ("resnet50", 16), ("vgg11", 0)])
def test_branches_of_networks(name: str, count: int) -> None:
    model, example = create_model(ModelSettings(name, 4), image_size=16), torch.randn(2, 3, 16, 16)
    found = branches(model, example)
    assert len(found) == count
    for branch in found:
        assert branch.last.endswith("bn3" if name == "resnet50" else "bn2")
        assert not any("shortcut" in module for module in branch.modules)
    whole = sum(p.numel() for p in model.parameters())
    for branch in found:
        take_out(model, branch)
    assert model(example).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) < 0.2 * whole or not found


@pytest.mark.parametrize("cell", ["basic", "preact", "bottleneck", "inverted", "resmlp", "attention"])
def test_branches_of_cells(cell: str) -> None:
    options = {"cell": cell, "blocks": (2,), **({"norm": "layer", "stem_stride": 4} if cell == "attention" else {})}
    model = create_model(ModelSettings("cellnet", 8, options), image_size=16)
    assert len(branches(model, torch.randn(2, 3, 16, 16))) == {"resmlp": 1, "attention": 4}.get(cell, 2)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v2"])
def test_branches_of_public_networks(name: str) -> None:
    model = create_model(name, image_size=32)
    assert len(branches(model, torch.randn(2, 3, 32, 32))) == (8 if "resnet" in name else 10)


class Reshaped(nn.Module):
    """Attention as timm writes it: two layers, and reshapes to two heads between them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class Paired(Reshaped):
    """The same, which returns a tuple, as in transformers."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), attention

    def forward(self, x: Tensor) -> Tensor:
        given = self.attention(self.norm(x))
        return x + (given[0] if isinstance(given, tuple) else given)


class Scaled(nn.Module):
    """A learned scale of the branch belongs to the block, as in ConvNeXt; the block holds the shortcut too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(4)), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


def test_a_block_does_not_leave_with_its_shortcut() -> None:
    assert branches(nn.Sequential(Scaled(), nn.Linear(4, 3)), torch.randn(2, 4)) == ()


@pytest.mark.parametrize(("kind", "outputs"), [(Reshaped, 0), (Paired, 2)])
def test_attention_leaves_as_a_whole(kind: type[nn.Module], outputs: int) -> None:
    model = nn.Sequential(Block(kind()), nn.Linear(8, 3))
    (branch,) = branches(model, torch.randn(2, 5, 8))
    assert (branch.modules, branch.last, branch.outputs) == (("0.norm", "0.attention"), "0.attention", outputs)
    tokens = torch.randn(4, 5, 8)
    gates = Gates(GateSettings(), {branch.name: branch.last}, {branch.name: torch.tensor(0.0)}, 0)
    with gates.attached(model.eval()):
        shut = model(tokens)
    take_out(model, branch)
    assert torch.equal(model(tokens), shut) and torch.equal(shut, model[1](tokens))


@pytest.mark.parametrize("norm_first", [False, True])
def test_branches_of_the_transformer_of_torch(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model, tokens = nn.Sequential(layer, nn.Linear(8, 3)).eval(), torch.randn(4, 5, 8)
    found = branches(model, torch.randn(2, 5, 8))
    assert [branch.last for branch in found] == ["0.self_attn", "0.linear2"]
    for branch in found:
        take_out(model, branch)
    norms = (lambda x: x) if norm_first else (lambda x: layer.norm2(layer.norm1(x)))
    assert torch.allclose(model(tokens), model[1](norms(tokens)), atol=1e-6)


def test_the_gradient_of_layers_is_that_of_enumeration() -> None:
    """∂/∂π_b E[L] = E[L(ξ_b=1) − L(ξ_b=0)] over the other gate; the estimate of each step is of one branch."""
    model, x, labels = two_branches(), torch.randn(16, 4), torch.arange(16) % 3
    chosen = GateSettings(cost=0.1, lr=1e-6, start=0.7)
    gates, known = Gates.of(model, x[:2], chosen, seed=3)
    names = list(known)
    assert names == ["0.branch.0", "2.branch.0"]

    def loss(first: float, second: float) -> float:
        gates._drawn = {names[0]: torch.tensor(first), names[1]: torch.tensor(second)}
        return float(functional.cross_entropy(model(x), labels).detach())

    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    with gates.attached(model.train()):
        table = {pair: loss(*pair) for pair in itertools.product((0.0, 1.0), repeat=2)}
        for step in range(600):
            gates.draw(step, x, labels)
            model(x)
            before = {n: pi.clone() for n, pi in gates.pi.items()}
            gates.pi = {n: pi.double() for n, pi in gates.pi.items()}
            gates.learn(model, step, contextlib.nullcontext)
            for name in names:
                if (moved := float(before[name].double() - gates.pi[name])) != 0:
                    sums[name], counts[name] = sums[name] + moved / 1e-6, counts[name] + 1
            gates.pi = before
    wanted = {
        names[0]: sum(p * (table[1.0, b] - table[0.0, b]) for b, p in ((1.0, 0.7), (0.0, 0.3))) + 0.1,
        names[1]: sum(p * (table[a, 1.0] - table[a, 0.0]) for a, p in ((1.0, 0.7), (0.0, 0.3))) + 0.1,
    }
    assert sum(counts.values()) == 600 and min(counts.values()) > 200
    for name in names:
        assert sums[name] / counts[name] == pytest.approx(wanted[name], abs=0.03)


def test_the_gradient_of_units_is_the_losss() -> None:
    """`g = C·∂L/∂ξ + cost`, by finite differences on a network of two units."""
    torch.manual_seed(0)
    model, x, labels = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), torch.randn(8, 3), torch.arange(8) % 2
    gates, _ = Gates.of(model, x[:2], GateSettings("units", cost=0.2, lr=0.01, start=0.5), seed=0)
    assert list(gates.pi) == ["0.weight"] and gates.pi["0.weight"].tolist() == [0.5, 0.5]
    with gates.attached(model.train()):
        gates.draw(0, x, labels)
        functional.cross_entropy(model(x), labels).backward()
        gates.learn(model, 0, contextlib.nullcontext)
        drawn = gates._drawn["0.weight"].detach().clone()
        for unit in range(2):
            losses = []
            for sign in (1, -1):
                moved = drawn.clone()
                moved[unit] += sign * 1e-2
                gates._drawn["0.weight"] = moved
                losses.append(float(functional.cross_entropy(model(x), labels).detach()))
            slope = (losses[0] - losses[1]) / 2e-2
            assert float(gates.pi["0.weight"][unit]) == pytest.approx(0.5 - 0.01 * (2 * slope + 0.2), abs=2e-5)


def test_noise_leaves_and_the_signal_stays() -> None:
    torch.manual_seed(0)
    signal = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = nn.Sequential(nn.Flatten(), Sum(signal, keep=0.0), Sum(Noisy(64, 64)), nn.Linear(64, 10))
    seen: list[dict[str, float]] = []
    chosen = GateSettings(cost=0.05, lr=0.5, end=0.9)
    digits = load_data(DataSettings("digits", limit=400), "cpu")
    recipe = Recipe(steps=160, batch_size=32, lr=0.05)
    found = train_gated(model, digits, recipe, chosen, device="cpu", on_epoch=seen.append)
    assert found.removed == {"2.branch": 1} and found.accuracy > 0.8
    assert len(prunable_layers(found.model)) == 3 and len(prunable_layers(model)) == 4
    assert seen == found.history and seen[0]["open"] == 2 and seen[-1]["open"] == 1
    assert seen[-1]["macs"] < seen[0]["macs"] and seen[-1]["step"] == 160
    drawn = [
        train_gated(model, digits, recipe, replace(chosen, shuffled=True), seed=seed, device="cpu").removed
        for seed in range(4)
    ]
    assert any("1.branch.0" in removed for removed in drawn), "shuffled gates take out the signal as well"


def test_units_leave_and_the_network_computes_the_same(digits: ImageData) -> None:
    model = create_model(ModelSettings("convnet", 8), in_channels=1, image_size=8)
    places = unit_layers(model, digits.normalise(digits.train.images[:2]))
    assert places == {
        "features.0.weight": "features.1",
        "features.4.weight": "features.5",
        "features.8.weight": "features.9",
    }
    chosen = GateSettings("units", cost=2.0, lr=0.5)
    found = train_gated(model, digits, RECIPE, chosen, device="cpu")
    assert found.removed and all(0 < n < 16 for n in found.removed.values())
    assert found.history[-1]["open"] < 1 and found.history[-1]["macs"] < found.history[0]["macs"]
    assert 0 <= found.accuracy <= 1 and sum(p.numel() for p in found.model.parameters()) < sum(
        p.numel() for p in model.parameters()
    )
    costless = train_gated(model, digits, RECIPE, GateSettings("units", cost=1e-9, lr=1e-9), device="cpu")
    assert not costless.removed


def test_the_places_of_what_survives() -> None:
    """Carried over by `survivors`, the weights are those of the smaller network; batch statistics too."""
    model, example = create_model(ModelSettings("resnet8", 4), image_size=16), torch.randn(2, 3, 16, 16)
    keep = torch.tensor([True, False, True, True])
    name = "stages.0.0.conv1.weight"
    layers = prunable_layers(model)
    masks = Masks({name: keep.view(4, 1, 1, 1).expand(layers[name].shape).clone()}, {name: layers[name]})
    places, smaller = survivors(model, masks, example), remove(model, masks, example).smaller
    for n, tensor in smaller.named_parameters():
        assert torch.equal(tensor, model.get_parameter(n).flatten()[places[n]]), n
    assert places["stages.0.0.bn1.running_var"].tolist() == [0, 2, 3]
    assert places["stages.0.0.conv2.weight"].shape == (4, 3, 3, 3)


ATTENTION = ModelSettings("cellnet", 8, {"cell": "attention", "blocks": (1,), "norm": "layer", "stem_stride": 4})


@pytest.mark.parametrize(
    ("of", "network"),
    [("layers", ModelSettings("resnet8", 4)), ("units", ModelSettings("resnet8", 4)), ("layers", ATTENTION)],
)
def test_a_stop_after_something_left_changes_nothing(
    of: str, network: ModelSettings, digits: ImageData, tmp_path: Path
) -> None:
    model = create_model(network, in_channels=1, image_size=8)
    chosen = GateSettings(of, cost=1.0 if of == "layers" else 3.0, lr=0.5, end=0.8)
    how: dict[str, Any] = {"seed": 1, "device": "cpu"}
    whole = train_gated(model, digits, RECIPE, chosen, **how)
    assert whole.removed

    class Stop(BaseException):
        pass

    stops = 0
    for _ in range(20):
        epochs: list[float] = []

        def stop(row: dict[str, float], epochs: list[float] = epochs) -> None:
            epochs.append(row["epoch"])
            raise Stop

        try:
            parts = train_gated(model, digits, RECIPE, chosen, checkpoint=tmp_path / "g.pt", on_epoch=stop, **how)
            break
        except Stop:
            stops += 1
    else:
        parts = None
    assert parts is None and stops == 20, "the last epoch stops too"
    parts = train_gated(model, digits, RECIPE, chosen, checkpoint=tmp_path / "g.pt", **how)
    assert parts.removed == whole.removed and parts.accuracy == whole.accuracy
    assert all(torch.equal(a, b) for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True))
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in g.history] for g in (parts, whole)]
    assert str(timeless[0]) == str(timeless[1])
    with pytest.raises(AutoSparseStateError, match="another training"):
        train_gated(model, digits, RECIPE, GateSettings(of), checkpoint=tmp_path / "g.pt", **how)


def test_what_it_refuses(digits: ImageData) -> None:
    vgg = create_model(ModelSettings("convnet", 4), in_channels=1, image_size=8)
    with pytest.raises(AutoSparseError, match="ConvNet has no residual branch that can go"):
        train_gated(vgg, digits, RECIPE, GateSettings(), device="cpu")
    with pytest.raises(AutoSparseError, match="a network that changes is not compiled"):
        train_gated(vgg, digits, Recipe(steps=2, compile=True), GateSettings("units"), device="cpu")
    for values, message in (({"of": "heads"}, "known: layers, units"), ({"begin": 0.9}, "end is 0.6")):
        with pytest.raises(AutoSparseError, match=message):
            GateSettings(**values)


def test_the_network_without_a_branch_is_that_with_it_at_zero() -> None:
    model, example = create_model(ModelSettings("resnet8", 4), image_size=16), torch.randn(2, 3, 16, 16)
    branch = branches(model, example)[1]
    shut, gone = (create_model(ModelSettings("resnet8", 4), image_size=16) for _ in range(2))
    nn.init.zeros_(shut.get_parameter(f"{branch.last}.weight"))
    nn.init.zeros_(shut.get_parameter(f"{branch.last}.bias"))
    take_out(gone, branch)
    assert output_difference(shut, gone, example) < 1e-6


def test_the_comparison(tmp_path: Path, digits: ImageData) -> None:
    """Branches and units beside TPP, each with its shuffle; what it says of sizes is so, and again it does nothing."""
    recipe, data = (
        Recipe(steps=30, batch_size=32, lr=0.05),
        DataSettings("digits", limit=96, limit_test=40, validation=1 / 3),
    )
    methods = (*GATED, "tpp")
    todo = thinnings(
        ModelSettings("resnet8", 4),
        data,
        recipe,
        TPPSettings(ramp=3, stabilise=1, delta=1, tau=3),
        recipe,
        methods,
        (0.5,),
        (0,),
        gates=GateSettings(cost=1.0, lr=0.5),
    )
    results = run_thinnings(todo, tmp_path, digits, device="cpu")
    dense, *rest = results
    assert [r["method"] for r in rest] == ["tpp", *GATED]
    for result in rest[1:]:
        assert result["removed"] and result["macs"] < result["macs_before"] == dense["macs"]
        assert result["seconds"] == result["total_seconds"] and len(result["history"]) == 30
    assert rest[0]["total_seconds"] == pytest.approx(dense["seconds"] + rest[0]["seconds"])
    assert sum(rest[1]["removed"].values()) == sum(rest[3]["removed"].values()), "as many branches go at random"
    again: list[Any] = []
    assert run_thinnings(todo, tmp_path, digits, device="cpu", on_event=again.append) == results and not again


@pytest.mark.parametrize("of", ["layers", "units"])
def test_gates_that_learn_to_the_end_are_tested_without(of: str, digits: ImageData) -> None:
    """The accuracy is that of the network that is given back, after the last removal and with the others open."""
    model = create_model(ModelSettings("resnet8", 4), in_channels=1, image_size=8)
    chosen = GateSettings(of, cost=0.5, lr=0.05, start=0.6, end=1.0)
    found = train_gated(model, digits, RECIPE, chosen, device="cpu")
    assert found.removed and (found.accuracy, found.loss) == evaluate(found.model, digits)


def test_units_that_cannot_go_stay_open(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next layer has groups: what would leave them unequal stays, and is not tried again."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    calls: list[int] = []
    real = gated.remove

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(gated, "remove", counted)
    chosen = GateSettings("units", cost=4.0, lr=0.5)
    recipe = Recipe(steps=80, batch_size=16, lr=0.02)
    found = train_gated(model, digits, recipe, chosen, device="cpu")
    left = found.model[0].out_channels
    assert left % 2 == 0 and found.removed.get("0.weight", 0) == 8 - left
    assert len(calls) <= 8 < len(found.history), "the surgery is not repeated for what must stay"


def test_gates_on_units_of_tokens_and_of_images() -> None:
    """The last dimension of a Linear's output has its units, dimension 1 of a convolution's its channels."""
    value = torch.tensor([0.0, 1.0, 2.0])
    for module, shape in (
        (nn.Linear(5, 3), (2, 4, 5)),
        (nn.Linear(5, 3), (2, 5)),
        (nn.Conv1d(5, 3, 1), (2, 5, 4)),
        (nn.Conv2d(5, 3, 1), (2, 5, 3, 3)),
    ):
        model, x = nn.Sequential(module), torch.randn(shape)
        plain = model(x)
        with multiplied(model, {"0.weight": "0"}, lambda name: value):
            gated_output = model(x)
        dim = -1 if isinstance(module, nn.Linear) else 1
        wanted = plain.movedim(dim, -1) * value
        assert torch.equal(gated_output.movedim(dim, -1), wanted)
        assert torch.equal(model(x), plain)
