"""Rules of layer densities: their features by hand, and densities that follow them exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.masks.layers import prunable_layers
from autosparse.network.graph import trace
from autosparse.pruning.criteria import Context
from autosparse.scorers.outcome import no_scorer
from autosparse.scorers.scorer import Scorer
from autosparse.training.models import create_model

IMAGE = torch.zeros(2, 3, 16, 16)


def rule(**values: float) -> Scorer:
    return replace(
        no_scorer("mine"), n_batches=1, positions="spread", rule={k.replace("__", ":"): v for k, v in values.items()}
    )


def test_areas_by_hand() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3, stride=2, padding=1), torch.nn.Flatten(), torch.nn.Linear(2 * 16, 3)
    )
    assert trace(model, torch.zeros(2, 1, 8, 8)).areas() == {"0.weight": 16, "2.weight": 1}


@pytest.mark.parametrize("name", ["resnet8", "resnet50", "torchvision:mobilenet_v2"])
def test_projection_shortcuts(name: str) -> None:
    """Not the last 1×1 convolution of a bottleneck, nor that of an inverted residual."""
    model = create_model(name, image_size=32)
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    found = graph.projections(prunable_layers(model))
    named = {n for n in prunable_layers(model) if "shortcut" in n or "downsample" in n}
    assert found == named and bool(found) == (name != "torchvision:mobilenet_v2")


def test_densities_of_another_criterion() -> None:
    """A coefficient of 1 gives that criterion's layer densities, two of ½ their geometric mean."""
    model = create_model("resnet8", image_size=16)
    batches = [(torch.randn(32, 3, 16, 16), torch.arange(32) % 10)]
    dense = {}
    for name in ("erk", "snip", "synflow"):
        masks = autosparse.prune(model, 0.9, name, batches=batches)
        dense[name] = {layer.name: layer.density for layer in masks.layers()}
        mine = autosparse.prune(model, 0.9, rule(**{f"densities__{name}": 1.0}), batches=batches)
        for layer in mine.layers():
            assert abs(layer.kept - dense[name][layer.name] * layer.total) <= 2, layer.name
    mixed = autosparse.prune(model, 0.9, rule(densities__erk=0.5, densities__snip=0.5), batches=batches)
    ratios = [
        layer.density / math.sqrt(dense["erk"][layer.name] * dense["snip"][layer.name])
        for layer in mixed.layers()
        if layer.density < 1 and layer.kept > 50
    ]
    assert max(ratios) / min(ratios) < 1.1
    assert mixed.kept == round(0.1 * mixed.total) and mixed.report.origin["images"] > 0


def test_a_rule_is_saved_and_shuffled_like_any_scorer(tmp_path: Path) -> None:
    model = create_model("resnet8", image_size=16)
    one = rule(densities__synflow=1.0, layer_shortcut=-3.0)
    one.save(tmp_path / "r.safetensors")
    read = autosparse.load_scorer(str(tmp_path / "r.safetensors"))
    assert read.densities_of == ("synflow",) and read.content() == one.content()
    a, b = (autosparse.prune(model, 0.9, c, example_input=IMAGE) for c in (one, read))
    assert all(torch.equal(a[n], b[n]) for n in a)
    plain = autosparse.prune(model, 0.9, rule(densities__synflow=1.0), example_input=IMAGE)
    lost = [n for n in a if a[n].sum() < plain[n].sum()]
    assert lost and all("shortcut" in n for n in lost)


def test_what_is_not_known_is_said() -> None:
    model = create_model("resnet8", image_size=16)
    with pytest.raises(AutoSparseError, match="needs gradients: give batches"):
        autosparse.prune(model, 0.9, rule(densities__snip=1.0), example_input=IMAGE)
    with pytest.raises(AutoSparseError, match="feature 'layer_area': give prune an example input"):
        autosparse.prune(model, 0.9, rule(layer_area=1.0))
    with pytest.raises(AutoSparseError, match="did you mean 'layer_depth'"):
        autosparse.prune(model, 0.9, rule(layer_dept=1.0), example_input=IMAGE)
    layers = prunable_layers(model)
    weights = {"weight": {n: p.detach() for n, p in model.named_parameters() if n in layers}}
    with pytest.raises(AutoSparseError, match="feature 'densities:igq'"):
        rule(densities__igq=1.0)(weights, Context(layers, 0.1))
