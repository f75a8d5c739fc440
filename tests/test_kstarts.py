"""K-starts: fitness by hand, evolution that keeps counts, costs, controls, stops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.masks.layers import prunable_layers
from autosparse.masks.mask import Masks
from autosparse.search.kstarts import (
    KStartsSettings,
    child,
    crossover,
    kept_sum,
    kstarts,
    mutate,
    ranking,
    unbeaten,
    z_scores,
)
from autosparse.search.method import SearchResult
from autosparse.training import loop
from autosparse.training.data import ImageData, Split
from autosparse.training.loop import full_state, put_back
from autosparse.training.recipe import Recipe
from autosparse.training.train import train

Make = Callable[..., nn.Module]
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05)  # 4 steps an epoch


def run(
    model: nn.Module, data: ImageData, settings: KStartsSettings, density: float = 0.3, **options: Any
) -> SearchResult:
    recipe = options.pop("recipe", RECIPE)
    return kstarts(model, prunable_layers(model), data, recipe, settings, density, device="cpu", **options)


def same(one: SearchResult, other: SearchResult) -> bool:
    assert one.weights is not None and other.weights is not None
    return (
        one.masks == other.masks
        and (one.fitness, one.epochs, one.steps) == (other.fitness, other.epochs, other.steps)
        and all(torch.equal(t, other.weights[n]) for n, t in one.weights.items())
    )


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each training, with the whole state that it started from and what it ended in."""
    seen: list[dict[str, Any]] = []

    def spy(model: nn.Module, data: ImageData, recipe: Recipe, **options: Any) -> Any:
        before, sums = full_state(model), {}
        inner = options.pop("on_gradient", None)

        def on_gradient(step: int) -> None:
            for name in options["masks"]:
                sums[name] = sums.get(name, 0) + model.get_parameter(name).grad
            if inner is not None:
                inner(step)

        result = train(model, data, recipe, **options, on_gradient=on_gradient)
        seen.append({**options, "data": data, "before": before, "after": full_state(model), "sums": sums})
        return result

    monkeypatch.setattr("autosparse.search.kstarts.train", spy)
    return seen


def bits(text: str) -> Tensor:
    return torch.tensor([c == "1" for c in text])


def test_kept_sum_by_hand() -> None:
    tensors = {"a": torch.tensor([1.0, -2.0, 4.0]), "b": torch.tensor([[-8.0, 16.0]])}
    masks = {"a": bits("110"), "b": bits("10")[None]}
    assert kept_sum(tensors, masks) == 1 + 2 + 8


def test_z_scores_by_hand() -> None:
    assert z_scores([1.0, 3.0]) == [-1.0, 1.0]
    assert z_scores([0.0, 0.0, 3.0]) == pytest.approx([-1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)])
    assert z_scores([7.0, 7.0]) == [0.0, 0.0]


def test_ranking_by_hand() -> None:
    assert ranking([(1.0,), (3.0,), (2.0,)]) == [1, 2, 0]
    assert ranking([(2.0,), (3.0,), (3.0,)]) == [1, 2, 0], "the earlier of equals"
    # z of the first: −1.22, 0, 1.22; of the second: 1.41, −0.71, −0.71
    assert ranking([(1.0, 900.0), (2.0, 0.0), (3.0, 0.0)]) == [2, 0, 1], "where raw sums would put the 900 first"
    assert ranking([(5.0,), (5.0,)]) == [0, 1]


def test_unbeaten_by_hand() -> None:
    assert unbeaten([(1.0,), (3.0,), (3.0,)]) == [1]
    assert unbeaten([(1.0, 5.0), (2.0, 4.0), (0.0, 4.0), (2.0, 4.0)]) == [0, 1]


PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6)


@given(PAIRS, PAIRS)
def test_who_is_beaten_never_wins_a_larger_population(early: list, late: list) -> None:
    values = [(float(a), float(b)) for a, b in early]
    best = ranking([*values, *((float(a), float(b)) for a, b in late)])[0]
    assert best >= len(values) or best in unbeaten(values)


def test_crossover_by_hand() -> None:
    """What both keep stays; one of the two places that differ is drawn; what neither keeps never comes."""
    seen = set()
    for seed in range(20):
        made = crossover(bits("1100"), bits("1010"), torch.Generator().manual_seed(seed))
        seen.add(tuple(made.tolist()))
    assert seen == {tuple(bits("1100").tolist()), tuple(bits("1010").tolist())}
    assert crossover(bits("101"), bits("101"), torch.Generator()).equal(bits("101"))


def test_mutation_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    assert mutate(bits("1100"), 1.0, generator).equal(bits("0011"))
    assert mutate(bits("1100"), 0.0, generator).equal(bits("1100"))
    assert mutate(bits("1110"), 1.0, generator).sum() == 3, "one pruned place: one swap"
    half = mutate(bits("1111000000"), 0.5, generator)
    assert half.sum() == 4 and half[:4].sum() == 2


@given(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_children_keep_the_count_of_each_layer(size: int, share: float, mutation: float, seed: int) -> None:
    first = {"a": torch.arange(size) < round(share * size), "b": (torch.arange(12) < 5).view(3, 4)}
    parents = [Masks(first).shuffle(seed + i) for i in range(3)]
    made = child(parents, mutation, seed)
    assert [layer.kept for layer in made.layers()] == [layer.kept for layer in parents[0].layers()]
    assert made == child(parents, mutation, seed)
    unmutated = child(parents, 0.0, seed)
    for name in first:
        union = parents[0][name] | parents[1][name] | parents[2][name]
        assert not (unmutated[name] & ~union).any()


@pytest.mark.parametrize("fitness", ["weights", "gradients", "both", "validation"])
def test_the_fittest_wins(fitness: str, digits: ImageData, convnet: Make, trainings: list, unchanged: Any) -> None:
    """Every figure is recomputed here from what each training started from, saw and ended in."""
    model = convnet()
    origin = full_state(model)
    with unchanged(model):
        found = run(model, digits, KStartsSettings(k=3, epochs=0.5, fitness=fitness), seed=3)
    assert len(trainings) == 3
    expected = []
    for each in trainings:
        assert all(torch.equal(v, origin[n]) for n, v in each["before"].items())
        assert (each["seed"], each["stop_step"], len(each["data"].test)) == (3, 2, 0)
        masks = each["masks"]
        weights = sum(float((each["after"][n] * m).abs().sum()) for n, m in masks.items())
        gradients = sum(float((each["sums"][n] * m).abs().sum()) for n, m in masks.items())
        if fitness == "validation":
            put_back(model, each["after"])
            expected.append((-loop.evaluate(model, digits, "validation")[1],))
        else:
            expected.append({"weights": (weights,), "gradients": (gradients,), "both": (weights, gradients)}[fitness])
    for got, wanted in zip(found.fitness, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    winner = ranking(found.fitness)[0]
    assert found.masks == trainings[winner]["masks"]
    assert found.masks.report.origin["start"] == winner
    assert found.weights is not None
    assert all(torch.equal(found.weights[n], v) for n, v in trainings[winner]["after"].items())
    assert (found.epochs, found.steps) == (1.5, 2)


@pytest.mark.parametrize("scope", ["erk", "uniform"])
def test_starts_have_the_same_exact_layer_counts(scope: str, digits: ImageData, convnet: Make, trainings: list) -> None:
    found = run(convnet(), digits, KStartsSettings(k=4, epochs=0.25, generations=1, scope=scope), 0.1, floor=0.05)
    assert found.masks.kept == round(0.1 * found.masks.total)
    counts = [[layer.kept for layer in each["masks"].layers()] for each in trainings]
    assert len(counts) == 6 and all(c == counts[0] for c in counts)
    assert all(layer.density >= 0.05 for layer in found.masks.layers())
    assert all(trainings[0]["masks"] != each["masks"] for each in trainings[1:])


def test_evolution(digits: ImageData, convnet: Make, trainings: list) -> None:
    """The better half stays without training again; unmutated children lie within the union of the parents."""
    settings = KStartsSettings(k=5, epochs=0.25, generations=2, mutation=0.0)
    found = run(convnet(), digits, settings)
    assert len(trainings) == 5 + 2 + 2 and found.epochs == 9 / 4
    masks = [each["masks"] for each in trainings]
    present = list(range(5))
    for newcomers in ([5, 6], [7, 8]):
        present = [present[i] for i in ranking([found.fitness[i] for i in present])[:3]]
        for made in newcomers:
            for name in masks[0]:
                union = torch.stack([masks[i][name] for i in present]).any(0)
                assert not (masks[made][name] & ~union).any()
        present += newcomers
    assert found.masks == masks[max(range(9), key=lambda i: found.fitness[i])]


def test_random_trains_nothing(digits: ImageData, convnet: Make, trainings: list) -> None:
    model = convnet()
    found = run(model, digits, KStartsSettings(fitness="random"))
    assert (found.epochs, found.steps, found.weights, found.fitness, trainings) == (0.0, 0, None, (), [])
    assert found.masks.kept == round(0.3 * found.masks.total)
    run(model, digits, KStartsSettings(k=1, epochs=0.25))
    assert found.masks == trainings[0]["masks"], "it is one of the k"


def test_same_seed_same_choice(digits: ImageData, convnet: Make) -> None:
    settings = KStartsSettings(k=3, epochs=0.25, fitness="both", generations=1)
    one, two, other = (run(convnet(), digits, settings, seed=s) for s in (0, 0, 1))
    assert same(one, two) and one.masks != other.masks


class Stop(Exception):
    pass


def stopping(after: int, rows: list) -> Callable[[dict[str, float]], None]:
    def on_epoch(row: dict[str, float]) -> None:
        rows.append(row)
        if len(rows) == after:
            raise Stop

    return on_epoch


@pytest.mark.parametrize(("fitness", "after"), [("weights", 1), ("weights", 6), ("both", 3), ("both", 6)])
def test_a_stop_loses_only_the_start_in_flight(
    fitness: str, after: int, digits: ImageData, convnet: Make, tmp_path: Path
) -> None:
    settings = KStartsSettings(k=4, epochs=0.25, fitness=fitness, generations=1)
    whole = run(convnet(), digits, settings)
    rows: list[dict[str, float]] = []
    model = convnet()
    before = full_state(model)
    with pytest.raises(Stop):
        run(model, digits, settings, state=tmp_path, on_epoch=stopping(after, rows))
    assert all(torch.equal(v, before[n]) for n, v in full_state(model).items())
    rest: list[dict[str, float]] = []
    found = run(convnet(), digits, settings, state=tmp_path, on_epoch=rest.append)
    assert same(found, whole) and len(rest) == 6 - (after - 1)
    again = run(convnet(), digits, settings, state=tmp_path, on_epoch=stopping(1, []))
    assert same(again, whole) and again.seconds == found.seconds, "what is complete trains nothing"
    if fitness == "weights":
        assert len(list(tmp_path.glob("start*.safetensors"))) == 1, "weights only of who can still win"


@pytest.mark.parametrize("fitness", ["weights", "gradients"])
def test_a_stop_inside_a_start(
    fitness: str, digits: ImageData, convnet: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on from the checkpoint, but where the gradients of all steps are needed it starts again."""
    settings = KStartsSettings(k=2, epochs=3, fitness=fitness)
    whole = run(convnet(), digits, settings)
    plain = train
    monkeypatch.setattr("autosparse.search.kstarts.train", lambda *a, **o: plain(*a, **o, checkpoint_every=0.0))
    with pytest.raises(Stop):
        run(convnet(), digits, settings, state=tmp_path, on_epoch=stopping(5, []))
    rows: list[dict[str, float]] = []
    found = run(convnet(), digits, settings, state=tmp_path, on_epoch=rows.append)
    assert same(found, whole)
    assert [r["epoch"] for r in rows] == ([2, 3] if fitness == "weights" else [1, 2, 3])


def test_the_state_of_another_search_is_refused(digits: ImageData, convnet: Make, tmp_path: Path) -> None:
    settings = KStartsSettings(k=1, epochs=0.25)
    run(convnet(), digits, settings, state=tmp_path)
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"density": 0.2},
        {"recipe": dataclasses.replace(RECIPE, lr=0.1)},
        {"settings": KStartsSettings(k=2, epochs=0.25)},
        {"model": convnet(seed=1)},
    ]
    for other in others:
        options = {"model": convnet(), "settings": settings, "state": tmp_path, **other}
        with pytest.raises(AutoSparseError, match=r"kstarts\.json is of another search"):
            run(options.pop("model"), digits, options.pop("settings"), **options)


def test_mistakes_are_named(digits: ImageData, convnet: Make) -> None:
    none = Split(digits.validation.images[:0], digits.validation.labels[:0])
    with pytest.raises(AutoSparseError, match=r"kstarts\.fitness is 'validation': the data have no validation images"):
        run(convnet(), dataclasses.replace(digits, validation=none), KStartsSettings(fitness="validation"))
    with pytest.raises(AutoSparseError, match=r"kstarts\.epochs is 4: a training has 3 epochs; lower it"):
        run(convnet(), digits, KStartsSettings(epochs=4))
    with pytest.raises(AutoSparseError, match=r"density is 0: it must lie in"):
        run(convnet(), digits, KStartsSettings(), 0)
    with pytest.raises(AutoSparseError, match=r"floor 0\.5 needs"):
        run(convnet(), digits, KStartsSettings(), 0.3, floor=0.5)


def test_a_start_that_diverges(digits: ImageData, convnet: Make) -> None:
    """In its very last step, which no loss sees."""
    with pytest.raises(AutoSparseFailure, match=r"a start diverged: its fitness is not finite after 1 steps"):
        run(convnet(), digits, KStartsSettings(k=1, epochs=0.25), recipe=dataclasses.replace(RECIPE, lr=1e45))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"k": 0}, {"epochs": 0.0}, {"epochs": math.inf}, {"fitness": "loss"}, {"generations": -1}),
        *({"mutation": 1.5}, {"mutation": 0.5}, {"scope": "global"}),
        *({"k": 2, "generations": 1}, {"generations": 1, "fitness": "random"}),
    ],
    ids=str,
)
def test_bad_settings(wrong: dict) -> None:
    key, value = next(iter(wrong.items()))
    with pytest.raises(AutoSparseError, match=rf"kstarts\.{key} is {value!r}"):
        KStartsSettings(**wrong)
