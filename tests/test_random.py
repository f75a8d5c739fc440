"""Chance is chance: no random choice of the package knows anything of a network's weights."""

import ast
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import autosparse
from autosparse.masks.layers import prunable_layers
from autosparse.masks.mask import Masks
from autosparse.masks.random import derive, make_generator, make_numpy_generator, make_python_generator, seeded
from autosparse.masks.selection import select
from autosparse.search.kstarts import KStartsSettings, kstarts
from autosparse.training.data import load_data
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe

PACKAGES = [Path(autosparse.__file__).parent, Path(autosparse.__file__).parents[1] / "data_gen"]


def test_seeds_are_a_function_of_seed_and_purpose():
    assert derive(0, "ties") == derive(0, "ties")
    seeds = [derive(s, p, k) for s in (-1, 0, 1, 10**23) for p in ("ties", "shuffle") for k in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


def test_every_kind_of_generator_repeats_itself():
    for make in (make_generator, make_numpy_generator, make_python_generator):
        draw = (lambda g: torch.rand(3, generator=g).tolist()) if make is make_generator else (lambda g: g.random())
        assert draw(make(3, "a")) == draw(make(3, "a")) != draw(make(3, "b"))


def test_seeded_leaves_the_global_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(5, "a"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.equal(inside, expected)


def test_no_other_file_makes_or_seeds_a_generator():
    forbidden = {"manual_seed", "manual_seed_all", "seed_all", "default_rng", "RandomState", "Random", "SeedSequence"}
    for path in (p for package in PACKAGES for p in package.rglob("*.py")):
        if path.parts[-2:] == ("masks", "random.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert called not in forbidden, f"{path.name}:{node.lineno} calls {called}"


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 32, 3, bias=False), nn.Flatten(), nn.Linear(2048, 10)
    )


# After torch.manual_seed(seed), as users make them; the factory draws from a stream of its own.
MODELS = {
    "sequential": lambda seed: plain(),
    "torchvision-densenet": lambda seed: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
    "torchvision-squeezenet": lambda seed: torchvision.models.squeezenet1_1(num_classes=10),
    "timm-vit": lambda seed: timm.create_model("test_vit", num_classes=10),
    "timm-resnet": lambda seed: timm.create_model("test_resnet", num_classes=10),
    "resnet8": lambda seed: create_model(ModelSettings("resnet8"), seed=seed),
    "cellnet": lambda seed: create_model(ModelSettings("cellnet"), seed=seed),
}


def by_criterion(name: str):
    return lambda model, seed: autosparse.prune(model, 0.8, name, seed=seed)


def ties(model: nn.Module, seed: int) -> Masks:
    layers = prunable_layers(model)
    return select({n: torch.ones(layer.shape) for n, layer in layers.items()}, 0.2, layers=layers, seed=seed)


def starts(model: nn.Module, seed: int) -> Masks:
    layers = prunable_layers(model)
    settings = KStartsSettings(k=2, fitness="random")
    return kstarts(model, layers, load_data("digits"), Recipe(epochs=1), settings, 0.2, seed=seed).masks


CHOICES = {
    "random": by_criterion("random"),
    "erk": by_criterion("erk"),
    "spread": by_criterion("spread"),
    "shuffle": lambda model, seed: autosparse.prune(model, 0.8, "magnitude", seed=seed).shuffle(seed),
    "ties": ties,
    "kstarts": starts,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_random_choices_are_independent_of_the_weights(name):
    for seed in range(10):
        torch.manual_seed(seed)
        model = MODELS[name](seed)
        weights = dict(model.named_parameters())
        for choice, choose in CHOICES.items():
            masks = choose(model, seed)
            for layer, mask in masks.items():
                kept, weight = mask.flatten().double(), weights[layer].detach().flatten().double()
                if len(kept) < 100 or not 0 < int(mask.sum()) < len(kept) or float(weight.std()) == 0:
                    continue
                for values in (weight, weight.sign()):
                    correlation = float(torch.corrcoef(torch.stack([kept, values]))[0, 1])
                    # Of independent draws its standard deviation is 1/√n; about 10⁵ are looked at over all cases.
                    assert abs(correlation) < 5.5 / len(kept) ** 0.5, (
                        f"{choice}, seed {seed}, {layer}: {correlation:.3f}"
                    )
