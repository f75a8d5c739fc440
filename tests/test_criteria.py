"""Every criterion by hand; every preset on every network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse.masks.layers import Layer, prunable_layers
from autosparse.network.signals import measure
from autosparse.pruning.criteria import CRITERIA, PRESETS, Context
from autosparse.pruning.prune import prune
from autosparse.training.models import MODELS, ModelSettings, create_model

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


def test_synflow_is_the_flow_but_where_none_can_come() -> None:
    """Of the four weights without flow the half of the largest magnitude goes above all others."""
    found = CRITERIA["synflow"](
        {
            "weight": {"a": torch.tensor([[1.0, -3.0, 0.0, 2.0]]), "b": torch.tensor([[1.0], [1.0]])},
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


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_on_every_network(
    preset: str, model_name: str, unchanged: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    model = create_model(
        ModelSettings(model_name, width=8 if model_name == "mlp" else 2), in_channels=1, classes=4, image_size=8, seed=3
    )
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 4) for n in (6, 3)]
    layers = prunable_layers(model)
    weights = sum(layer.numel for layer in layers.values())
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tiny networks die early
        steps = min(PRESETS[preset].steps, 2)  # all of them, 100 for synflow, on the small network below
        masks, again = (prune(model, 0.7, preset, batches=batches, steps=steps, seed=1) for _ in range(2))
    assert masks == again
    assert (masks.kept, masks.total) == (round((1 - 0.7) * weights), weights)
    assert {n: m.shape for n, m in masks.items()} == {n: torch.Size(l.shape) for n, l in layers.items()}
    rule = PRESETS[preset].criterion
    found = measure(model, layers, rule.signals, batches=batches[: rule.n_batches], example_input=batches[0][0], seed=1)
    scores = rule(found, Context(layers, 0.3, seed=1))
    assert all(torch.isfinite(s).all() and s.shape == layers[n].shape for n, s in scores.items())
    assert masks.report.effective_sparsity is not None and masks.report.effective_sparsity >= masks.sparsity - 1e-9
