"""Every criterion by hand; every preset on every network."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse.errors import AutoSparseError
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.network.signals import measure, parse_warmup
from autosparse.pruning.criteria import CRITERIA, PRESETS, Context, preset_for
from autosparse.pruning.prune import prune
from autosparse.pruning.warmup import warmup
from autosparse.training.data import ImageData, Split
from autosparse.training.models import MODELS, ModelSettings, create_model
from autosparse.training.recipe import Recipe

LAYERS = {"a": Layer("a", "linear", (1, 4)), "b": Layer("b", "linear", (2, 1))}


def signals(**values: list[list[float]]) -> dict[str, dict[str, Tensor]]:
    return {name: {"a": torch.tensor(value)} for name, value in values.items()}


def test_magnitude() -> None:
    scores = CRITERIA["magnitude"](signals(weight=[[1.0, -3.0, 0.0, 0.5]]), Context(LAYERS, 0.5))
    assert scores["a"].tolist() == [[1.0, 3.0, 0.0, 0.5]]


def test_snip() -> None:
    found = CRITERIA["snip"](
        signals(weight=[[1.0, -3.0, 0.0, 0.5]], gradient=[[2.0, 1.0, 9.0, -4.0]]), Context(LAYERS, 0.5)
    )
    assert found["a"].tolist() == [[2.0, 3.0, 0.0, 2.0]]


def test_random_is_a_function_of_the_seed() -> None:
    one, two, other = (CRITERIA["random"]({}, Context(LAYERS, 0.5, seed=s)) for s in (0, 0, 1))
    assert {n: s.shape for n, s in one.items()} == {"a": (1, 4), "b": (2, 1)}
    assert all(torch.equal(one[n], two[n]) and not torch.equal(one[n], other[n]) for n in one)


def test_snip_is_the_change_of_the_loss_when_a_weight_goes() -> None:
    """To first order: `L(θ) − L(θ without a small share of θ_i)`, by finite differences in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(6, 3).double(), torch.tensor([0, 1, 0, 1, 1, 1]))
    layers = prunable_layers(model)
    scores = CRITERIA["snip"](measure(model, layers, CRITERIA["snip"].signals, batches=[batch]), Context(layers, 0.5))
    for name in layers:
        for index in range(layers[name].numel):
            values = []
            for sign in (1, -1):
                other = copy.deepcopy(model)
                with torch.no_grad():
                    dict(other.named_parameters())[name].view(-1)[index].mul_(1 + sign * 1e-6)
                    values.append(F.cross_entropy(other(batch[0]), batch[1]).item())
            slope = abs(values[0] - values[1]) / 2e-6
            assert scores[name].flatten()[index].item() == pytest.approx(slope, abs=1e-8)


def test_growth0_is_snip_with_the_sign_of_growth() -> None:
    """A descent step makes a weight larger where weight and gradient have opposite signs."""
    found = CRITERIA["growth0"](
        signals(weight=[[1.0, -3.0, 0.5, 2.0]], gradient=[[2.0, 1.0, -4.0, 0.0]]), Context(LAYERS, 0.5)
    )
    assert found["a"].tolist() == [[-2.0, 3.0, 2.0, 0.0]]


def test_what_a_warmup_tells() -> None:
    """The weights 1, −3, 0.5, −2 go to 3, −2, −0.25, −2.5."""
    found = signals(
        weight=[[1.0, -3.0, 0.5, -2.0]],
        **{"displacement@1": [[2.0, 1.0, -0.75, -0.5]], "warm_weight@1": [[3.0, -2.0, -0.25, -2.5]]},
    )
    for name, wanted in (
        ("early_magnitude", [[3.0, 2.0, 0.25, 2.5]]),
        ("movement", [[2.0, 1.0, 0.75, 0.5]]),
        ("growth", [[2.0, -1.0, -0.25, 0.5]]),
    ):
        assert CRITERIA[name](found, Context(LAYERS, 0.5))["a"].tolist() == wanted, name


def test_a_horizon_stands_in_the_name() -> None:
    assert preset_for("movement") is PRESETS["movement"] and preset_for("snip") is PRESETS["snip"]
    assert preset_for("movement").criterion.signals == ("displacement@1",)
    for text, wanted in (
        ("movement@0.5", ("displacement@0.5",)),
        ("growth@2", ("weight", "displacement@2")),
        ("early_magnitude@0.10", ("warm_weight@0.1",)),
    ):
        assert preset_for(text).criterion.signals == wanted
    rule = preset_for("growth@2").criterion
    both = signals(weight=[[1.0]], **{"displacement@1": [[9.0]], "displacement@2": [[-0.5]]})
    assert rule.name == "growth@2" and rule(both, Context(LAYERS, 0.5))["a"].tolist() == [[-0.5]]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("movment@1", "criterion is 'movment@1': did you mean 'movement'"),
        ("snipp", "criterion is 'snipp': did you mean 'snip'"),
        ("snip@1", "criterion is 'snip@1': 'snip' takes no horizon, only early_magnitude, movement, growth do"),
        ("movement@", "criterion is 'movement@': give its horizon, a positive number of epochs, as in 'movement@0.5'"),
        ("growth@0", "criterion is 'growth@0': give its horizon"),
    ],
)
def test_mistakes_in_a_presets_name(text: str, match: str) -> None:
    with pytest.raises(AutoSparseError, match=match):
        preset_for(text)


def test_synflow_is_the_flow_but_where_none_can_come() -> None:
    """Of the four weights without flow the half of the largest magnitude goes above all others."""
    found = CRITERIA["synflow"](
        {
            "dense_weight": {"a": torch.tensor([[1.0, -3.0, 0.0, 2.0]]), "b": torch.tensor([[1.0], [1.0]])},
            "flow": {"a": torch.zeros(1, 4).double(), "b": torch.tensor([[5.0], [7.0]]).double()},
            "no_flow": {"a": torch.ones(1, 4, dtype=torch.bool), "b": torch.zeros(2, 1, dtype=torch.bool)},
        },
        Context(LAYERS, 0.5),
    )
    assert found["a"].tolist() == [[0.0, 14.0, 0.0, 14.0]] and found["b"].tolist() == [[5.0], [7.0]]


def test_synflow_scores_are_sums_over_paths() -> None:
    """2 → 2 → 1, no biases: through w₀₀ = −1 go two paths' worth of |1|·|3| on an input of ones."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-1.0, 2.0], [0.5, 0.0]]))
        model[2].weight.copy_(torch.tensor([[3.0, -4.0]]))
    layers = prunable_layers(model)
    rule = CRITERIA["synflow"]
    found = rule(measure(model, layers, rule.signals, example_input=torch.zeros(1, 2)), Context(layers, 0.5))
    assert found["0.weight"].tolist() == [[3.0, 6.0], [2.0, 0.0]]
    assert found["2.weight"].tolist() == [[9.0, 2.0]]


def test_force_scores_all_weights_at_the_masked_ones() -> None:
    found = CRITERIA["force"](
        signals(dense_weight=[[1.0, -3.0, 2.0, 0.5]], gradient=[[2.0, 1.0, 9.0, -4.0]]), Context(LAYERS, 0.5)
    )
    assert found["a"].tolist() == [[2.0, 3.0, 18.0, 2.0]]
    model = nn.Linear(4, 2).double()
    masks = {"weight": torch.arange(8).view(2, 4) % 3 == 0}
    batch = (torch.randn(5, 4).double(), torch.tensor([0, 1, 0, 1, 1]))
    layers, rule = prunable_layers(model), CRITERIA["force"]
    scores = rule(measure(model, layers, rule.signals, batches=[batch], masks=masks), Context(layers, 0.5))
    thin = (model.weight * masks["weight"]).detach().requires_grad_()
    F.cross_entropy(F.linear(batch[0], thin, model.bias), batch[1]).backward()
    torch.testing.assert_close(scores["weight"], (model.weight.detach() * thin.grad).abs())


def test_with_force_pruned_weights_return() -> None:
    """The first row fits its target, so its scores are 0 and it goes; without it its error is the largest."""
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.9, 2.1, 1.8], [1.0, 1.1, 1.2, 1.3]]))
    batch = (torch.ones(1, 4).double(), torch.tensor([[7.8, 0.0]]).double())
    options = {"batches": [batch], "steps": 2, "loss": F.mse_loss}
    kept = prune(model, 0.75, "force", **options)["weight"]
    assert kept.tolist() == [[True, False, True, False], [False] * 4]
    kept = prune(model, 0.75, "iterative_snip", **options)["weight"]
    assert kept.tolist() == [[False] * 4, [False, False, True, True]]


def test_grasp() -> None:
    found = CRITERIA["grasp"](
        signals(weight=[[1.0, -3.0, 0.0, 0.5]], hessian_gradient=[[2.0, 1.0, 9.0, -4.0]]), Context(LAYERS, 0.5)
    )
    assert found["a"].tolist() == [[2.0, -3.0, 0.0, -2.0]]


def test_grasp_is_what_the_gradient_loses_of_its_norm_when_a_weight_goes() -> None:
    """To first order, by finite differences of `½‖g‖²` of logits divided by 200."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(6, 3).double(), torch.tensor([0, 1, 0, 1, 1, 1]))
    layers, rule = prunable_layers(model), CRITERIA["grasp"]
    scores = rule(measure(model, layers, rule.signals, batches=[batch]), Context(layers, 0.5))

    def half_norm(name: str, index: int, factor: float) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[index].mul_(factor)
        F.cross_entropy(other(batch[0]) / 200, batch[1]).backward()
        return sum(float(other.get_parameter(n).grad.square().sum()) for n in layers) / 2  # type: ignore[union-attr]

    for name in layers:
        for index in range(layers[name].numel):
            slope = (half_norm(name, index, 1 + 1e-5) - half_norm(name, index, 1 - 1e-5)) / 2e-5
            assert scores[name].flatten()[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(("name", "signal"), [("ntk_sap", "ntk_sensitivity"), ("prospr", "meta_gradient")])
def test_absolute_values(name: str, signal: str) -> None:
    found = CRITERIA[name](signals(**{signal: [[1.0, -3.0, 0.0, 0.5]]}), Context(LAYERS, 0.5))
    assert found["a"].tolist() == [[1.0, 3.0, 0.0, 0.5]]


def test_resynflow_scores_are_sums_over_paths_of_weights_of_norm_one() -> None:
    """Two layers and a shortcut, some weights pruned: the shortcut has path 1 whatever the layers' norms."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.two(torch.relu(self.one(x))))

    torch.manual_seed(0)
    model = Residual()
    layers, rule = prunable_layers(model), CRITERIA["resynflow"]
    masks = {n: torch.rand(l.shape) < 0.7 for n, l in layers.items()}
    found = rule(
        measure(model, layers, rule.signals, example_input=torch.zeros(1, 3), masks=masks), Context(layers, 0.5)
    )
    thin = {n: model.get_parameter(n).detach().double().abs() * masks[n] for n in layers}
    a, b, c = (w / torch.linalg.matrix_norm(w, ord=2) for w in (thin[f"{n}.weight"] for n in ("one", "two", "head")))
    through = torch.einsum("ji,kj,lk->ijkl", a, b, c)  # input, hidden, sum, output
    torch.testing.assert_close(found["one.weight"], through.sum((2, 3)).T)
    torch.testing.assert_close(found["two.weight"], through.sum((0, 3)).T)
    torch.testing.assert_close(found["head.weight"], through.sum((0, 1)).T + c)


def test_resynflow_of_convolutions_and_empty_layers() -> None:
    """A kernel's matrix is (out, in·k); of a transposed one too; scores of a chain are those of synflow but for one
    factor, and an empty layer makes no flow but no NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 2))
    layers, example = prunable_layers(model), torch.zeros(1, 2, 3, 3)
    found = {
        n: measure(model, layers, CRITERIA[n].signals, example_input=example)[s]
        for n, s in (("synflow", "flow"), ("resynflow", "rescaled_flow"))
    }
    weights = {n: model.get_parameter(n).detach().double().abs() for n in layers}
    norms = [
        torch.linalg.matrix_norm(w, ord=2)
        for w in (
            weights["0.weight"].flatten(1),
            weights["2.weight"].transpose(0, 1).flatten(1),
            weights["4.weight"],
        )
    ]
    for name, flow in found["synflow"].items():
        torch.testing.assert_close(found["resynflow"][name], flow / norms[0] / norms[1] / norms[2])
    masks = {"0.weight": torch.zeros(3, 2, 2, 2, dtype=torch.bool)}
    masks |= {n: torch.ones(layers[n].shape, dtype=torch.bool) for n in ("2.weight", "4.weight")}
    empty = measure(model, layers, ("rescaled_flow",), example_input=example, masks=masks)["rescaled_flow"]
    assert all((flow == 0).all() for flow in empty.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", ["force", "grasp", "ntk_sap", "prospr", "resynflow"])
def test_attention(
    preset: str, dtype: torch.dtype, unchanged: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).mean(1))

    torch.manual_seed(0)
    model = Tokens().to(dtype)
    batches = [(torch.randn(6, 5, 8, dtype=dtype), torch.arange(6) % 3) for _ in range(4)]
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        one, two = (prune(model, 0.6, preset, batches=batches, steps=2, seed=1) for _ in range(2))
    assert one == two and one.kept == round(0.4 * one.total)
    assert one.report.dead_layers == ()


@pytest.mark.parametrize(
    ("preset", "steps", "images"),
    [
        ("snip", 1, 6),
        ("force", 60, 6 * 60),
        ("grasp", 1, 18),
        ("prospr", 1, 3 * 14 + 4),
        ("ntk_sap", 20, 70 * 20),
        ("resynflow", 10, 0),
        ("synflow", 100, 0),
    ],
)
def test_published_steps_and_what_they_cost(preset: str, steps: int, images: int) -> None:
    """Batches of 6, 4, 4 and 4: prospr takes all, the others the first; ntk_sap 5 draws of 6 images, 2⅓ passes each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [(torch.randn(n, 3), torch.arange(n) % 2) for n in (6, 4, 4, 4)]
    origin = prune(model, 0.5, preset, batches=batches).report.origin
    assert (origin["steps"], origin["images"]) == (steps, images)


def test_what_a_criterion_draws_is_new_in_every_step() -> None:
    seen = []

    class Noise:
        name, signals, n_batches = "noise", ("ntk_sensitivity",), 0

        def __call__(self, signals: dict[str, dict[str, Tensor]], context: Context) -> dict[str, Tensor]:
            seen.append(signals["ntk_sensitivity"]["weight"])
            return {"weight": torch.arange(6.0).view(2, 3)}  # the mask stays the same

    prune(nn.Linear(3, 2), 0.0, Noise(), example_input=torch.zeros(4, 3), steps=2)  # type: ignore[arg-type]
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])


def test_synflow_in_100_steps_keeps_layers_that_one_step_kills() -> None:
    model = create_model(ModelSettings("convnet", 8, {"depth": 12}), in_channels=1, image_size=8, seed=0)
    example = torch.zeros(1, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        once = prune(model, 0.99, "synflow", example_input=example, steps=1)
    often = prune(model, 0.99, "synflow", example_input=example)
    assert often.report.dead_layers == () and often.kept == once.kept
    assert often.report.effective_sparsity == pytest.approx(often.sparsity, abs=1e-3)  # hardly a weight in vain
    assert len(once.report.dead_layers) > 0


@functools.cache
def few_images() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 1, 8, 8), generator=generator).to(torch.uint8)
    split = Split(images, torch.arange(8) % 4)
    return ImageData(split, split, split, 4, torch.full((1,), 0.5), torch.full((1,), 0.3), "none")


@pytest.mark.parametrize("preset", ["synflow", "resynflow"])
def test_a_hundred_layers_keep_a_path_when_the_schedule_is_exponential(preset: str) -> None:
    """Without norms and shortcuts, at 99.5 %: ten linear steps, as ReSynFlow was published with, leave none."""
    model = create_model(ModelSettings("convnet", 8, {"depth": 100, "norm": False}), image_size=8)
    example = torch.zeros(1, 3, 8, 8)
    masks = prune(model, 0.995, preset, example_input=example, steps=10, schedule="exponential")
    assert masks.report.dead_layers == () and masks.report.effective_sparsity == pytest.approx(0.995, abs=1e-3)
    with pytest.warns(UserWarning, match="no path from input to output is left"):
        prune(model, 0.995, preset, example_input=example, steps=10, schedule="linear")


KINDS = [  # one of every kind; the others are deeper ones of these
    *(ModelSettings(name, 8 if name == "mlp" else 2) for name in ("mlp", "convnet", "resnet8", "vgg11")),
    ModelSettings("cellnet", 4, {"cell": "bottleneck", "blocks": (1, 1)}),
]
DEEPER = [ModelSettings(name, 2) for name in MODELS if name not in ("mlp", "convnet", "resnet8", "vgg11", "cellnet")]


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        *((p, m) for p in PRESETS for m in KINDS),
        *(("snip", m) for m in DEEPER),
        ("synflow", ModelSettings("resnet50", 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.label(),
)
def test_every_preset_on_every_network(
    preset: str, settings: ModelSettings, unchanged: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    model = create_model(settings, in_channels=1, classes=4, image_size=8, seed=3)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 4) for n in (6, 3)]
    layers = prunable_layers(model)
    weights = sum(layer.numel for layer in layers.values())
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tiny networks die early
        rule = PRESETS[preset].criterion
        early = [name for name in rule.signals if parse_warmup(name)]
        recipe = Recipe(batch_size=4, lr=0.01)
        warm = warmup(model, layers, few_images(), recipe, early, device="cpu").signals if early else {}
        steps = min(PRESETS[preset].steps, 2)  # all of them, 100 for synflow, on the small network below
        masks, again = (prune(model, 0.7, preset, batches=batches, steps=steps, signals=warm, seed=1) for _ in range(2))
    assert masks == again
    assert (masks.kept, masks.total) == (round((1 - 0.7) * weights), weights)
    assert {n: m.shape for n, m in masks.items()} == {n: torch.Size(l.shape) for n, l in layers.items()}
    ordinary = [name for name in rule.signals if name not in early]
    found = warm | measure(
        model, layers, ordinary, batches=batches[: rule.n_batches], example_input=batches[0][0], seed=1
    )
    scores = rule(found, Context(layers, 0.3, seed=1))
    assert all(torch.isfinite(s).all() and s.shape == layers[n].shape for n, s in scores.items())
    assert masks.report.effective_sparsity is not None and masks.report.effective_sparsity >= masks.sparsity - 1e-9
