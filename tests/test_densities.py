"""Rules for layer densities, solved by hand."""

from collections.abc import Mapping

import pytest
import torch

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.experiment.candidates import Candidate, identity
from autosparse.masks.densities import check_scope, erk, igq, layer_densities, smart_ratio
from autosparse.masks.layers import Layer


def linear(name: str, rows: int, cols: int) -> Layer:
    return Layer(name, "linear", (rows, cols))


def conv(name: str, out: int, into: int) -> Layer:
    return Layer(name, "conv", (out, into, 1, 1))


def test_erk_solved_by_hand() -> None:
    """Raw densities (4+4)/16 = 1/2 and (16+16)/256 = 1/8; ε(8 + 32) = 0.1·272."""
    layers = {"a": linear("a", 4, 4), "b": linear("b", 16, 16)}
    epsilon = 0.1 * 272 / 40
    assert erk(layers, 0.1) == pytest.approx({"a": epsilon / 2, "b": epsilon / 8})
    # at 0.5 ε would be 3.4: a is dense, and b takes the other 136 − 16 of its 256
    assert erk(layers, 0.5) == pytest.approx({"a": 1.0, "b": 120 / 256})
    assert erk(layers, 1) == {"a": 1.0, "b": 1.0}
    conv = {"c": Layer("c", "conv", (8, 4, 3, 3)), "d": Layer("d", "conv", (8, 8, 3, 3))}
    epsilon = 0.1 * (288 + 576) / (18 + 22)
    assert erk(conv, 0.1) == pytest.approx({"c": epsilon * 18 / 288, "d": epsilon * 22 / 576})


def test_igq_solved_by_hand() -> None:
    """F = 0.1: 10/(1 + 1) + 90/(1 + 9) = 14 of 100 weights."""
    assert igq({"a": linear("a", 2, 5), "b": linear("b", 9, 10)}, 0.14) == pytest.approx({"a": 0.5, "b": 0.1})
    assert igq({"a": linear("a", 2, 5), "b": linear("b", 9, 10)}, 1) == pytest.approx({"a": 1, "b": 1})


def test_smart_ratio_solved_by_hand() -> None:
    """(L−l+1)² + (L−l+1) = 12, 6, 2; a last linear layer of 20 weights has 0.3, half of what is kept at most."""
    layers = {name: conv(name, 10, 10) for name in "abc"}
    assert smart_ratio(layers, 0.1) == pytest.approx({"a": 0.18, "b": 0.09, "c": 0.03})
    layers["c"] = linear("c", 2, 10)
    assert smart_ratio(layers, 0.1) == pytest.approx({"a": 12 * 16 / 1800, "b": 6 * 16 / 1800, "c": 0.3})
    assert smart_ratio(layers, 0.02) == pytest.approx({"a": 12 * 2.2 / 1800, "b": 6 * 2.2 / 1800, "c": 2.2 / 20})
    assert smart_ratio(layers, 1) == pytest.approx({"a": 1, "b": 1, "c": 1})


def by_rows(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    """A rule of a user: the first layer whole, the rest of the budget to the others."""
    first, *others = layers
    left = density * sum(layer.numel for layer in layers.values()) - layers[first].numel
    return {first: 1.0, **dict.fromkeys(others, left / sum(layers[n].numel for n in others))}


def wrong(layers: Mapping[str, Layer], density: float) -> dict[str, float]:
    return dict.fromkeys(layers, 2.0)


def test_a_rule_from_outside() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 20))
    scope = "test_densities:by_rows"
    masks = autosparse.prune(model, 0.75, "magnitude", scope=scope, example_input=torch.ones(1, 4))
    assert [layer.kept for layer in masks.layers()] == [20, 10]
    candidate = Candidate("magnitude", scope=scope)
    assert identity(candidate)["scope_source"] and candidate.layer_densities is None
    with pytest.raises(
        AutoSparseError, match=r"density of '0.weight' in test_densities:wrong is 2.0: give each layer one"
    ):
        autosparse.prune(model, 0.75, "magnitude", scope="test_densities:wrong", example_input=torch.ones(1, 4))


def test_a_layer_without_a_density_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    for scope in ({"0.weight": 0.5}, {"1.weight": 2.0, "0.weight": 0.5}):
        match = "scope has no density of '1.weight'|density of '1.weight' in scope is 2.0"
        with pytest.raises(AutoSparseError, match=match):
            autosparse.prune(model, 0.5, "magnitude", scope=scope, example_input=torch.ones(1, 4))


@pytest.mark.parametrize("scope", ["ekr", "nowhere:rule", "test_densities:missing", "global:erk:x"])
def test_an_unknown_rule_is_one_line(scope: str) -> None:
    with pytest.raises(AutoSparseError, match="scope is"):
        check_scope(scope)


def test_given_densities_stay() -> None:
    assert layer_densities({"a": 0.25}, {"a": linear("a", 2, 2)}, 0.5) == {"a": 0.25}
