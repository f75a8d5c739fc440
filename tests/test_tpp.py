"""TPP: the penalty by hand, which filters are chosen, and the comparison with its stops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from autosparse import AutoSparseError, Masks, prune
from autosparse.experiment import making, structured
from autosparse.experiment.benchmark import with_inputs
from autosparse.experiment.structured import candidate, run_thinnings, summary, thinnings
from autosparse.jobs.cells import result_path
from autosparse.jobs.executor import Event
from autosparse.network.size import size
from autosparse.trainability.shrink import remove, shrink
from autosparse.trainability.tpp import (
    TPPSettings,
    _penalise,
    filter_densities,
    free_filters,
    gram_gradient,
    gram_penalty,
    push_out,
)
from autosparse.training import loop
from autosparse.training.data import DataSettings, ImageData
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe
from autosparse.training.train import train

W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
FIRST = torch.tensor([True, False])

# -- the penalty --------------------------------------------------------------------------------------------------------


def test_the_penalty_of_two_filters_by_hand() -> None:
    """G = [[5, 11], [11, 25]]: with the first filter to go, R = (5² + 2·11²)/4, without the 25 of the one that stays."""
    assert gram_penalty(W, FIRST) == (25 + 242) / 4
    assert gram_penalty(W, ~FIRST) == (625 + 242) / 4
    assert gram_penalty(W, torch.tensor([True, True])) == (25 + 242 + 625) / 4
    assert gram_penalty(W, torch.tensor([False, False])) == 0


def test_its_gradient_by_hand() -> None:
    """(4/4) [[5, 11], [11, 0]] W: the filter that stays is moved away from the one that goes, and by nothing else."""
    assert gram_gradient(W, FIRST).tolist() == [[5 + 33, 10 + 44], [11, 22]]
    assert not gram_gradient(W, torch.tensor([False, False])).any()
    orthogonal = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert gram_gradient(orthogonal, FIRST).tolist() == [[1, 0], [0, 0]]


@hypothesis.given(seed=st.integers(0, 99), filters=st.integers(1, 6), pruned=st.integers(0, 6))
def test_the_gradient_is_that_of_the_penalty(seed: int, filters: int, pruned: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(filters, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    gone = torch.arange(filters) < pruned
    (gradient,) = torch.autograd.grad(gram_penalty(weight, gone), weight)
    assert torch.allclose(gram_gradient(weight.detach(), gone), gradient)


def test_what_is_added_to_the_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(W)
        model[0].bias.copy_(torch.tensor([2.0, 7.0]))
        model[1].weight.copy_(torch.tensor([4.0, 7.0]))
        model[1].bias.copy_(torch.tensor([6.0, 7.0]))
    removal = remove(model, Masks({"0.weight": ~FIRST[:, None].expand(2, 2)}), torch.zeros(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    _penalise(dict(model.named_parameters()), removal, strength=0.5, weight=10)
    gradients = {n: (p.grad - 1).tolist() for n, p in model.named_parameters() if p.grad is not None}
    assert gradients == {
        "0.weight": [[5 * 38 + 0.5, 5 * 54 + 1], [5 * 11, 5 * 22]],
        "0.bias": [1, 0],
        "1.weight": [2, 0],
        "1.bias": [3, 0],
        "3.weight": [[0, 0]] * 3,
        "3.bias": [0] * 3,
    }


def test_its_factor_grows_and_stays() -> None:
    assert [TPPSettings().strength(s) for s in (0, 10, 50_000, 100_000, 109_999)] == pytest.approx([0, 1e-4, 0.5, 1, 1])
    short = TPPSettings(ramp=4, stabilise=2, delta=1, tau=2, ceiling=1.5)
    assert [short.strength(s) for s in range(6)] == [0, 0.5, 1, 1.5, 1.5, 1.5]
    low = TPPSettings(ramp=4, stabilise=9, delta=1, tau=10)
    assert low.strength(12) == low.strength(4) == 0.4


def test_the_recipe_of_its_steps() -> None:
    other = Recipe(epochs=7, batch_size=32, lr=0.5, momentum=0.8, schedule="onecycle", warmup=0.2)
    found = TPPSettings(ramp=30, stabilise=5, lr=0.01).recipe(other)
    assert found == Recipe(epochs=7, steps=35, batch_size=32, lr=0.01, momentum=0.8, schedule="constant")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ramp": 0}, "tpp.ramp is 0"),
        ({"stabilise": -1}, "tpp.stabilise is -1"),
        ({"delta": 0.0}, "tpp.delta is 0.0: give a positive number"),
        ({"tau": math.inf}, "tpp.tau is inf"),
        ({"weight": -1.0}, "tpp.weight is -1.0"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(AutoSparseError, match=message):
        TPPSettings(**values)


# -- which filters ------------------------------------------------------------------------------------------------------


def image(side: int = 16) -> torch.Tensor:
    return torch.zeros(2, 3, side, side)


def test_filters_that_can_go_alone() -> None:
    blocks = [f"stages.{stage}.{block}.conv1.weight" for stage in range(3) for block in range(3)]
    assert free_filters(create_model(ModelSettings("resnet20", 4)), image()) == tuple(blocks)
    vgg = create_model(ModelSettings("vgg16", 4))
    convolutions = [f"{n}.weight" for n, m in vgg.named_modules() if isinstance(m, nn.Conv2d)]
    assert free_filters(vgg, image()) == tuple(convolutions[1:]) and len(convolutions) == 13
    inverted = create_model(ModelSettings("cellnet", 4, {"cell": "inverted", "blocks": (1,)}), image_size=16)
    assert free_filters(inverted, image()) == ()  # what comes before a depthwise convolution is coupled with it


def densities(ratio: Any, name: str = "resnet8", width: int = 5) -> dict[str, float]:
    found = filter_densities(create_model(ModelSettings(name, width)), image(), ratio)
    return {n: d for n, d in found.items() if d < 1}


def test_whole_filters_go_rounded_up() -> None:
    found = densities(0.3)
    assert len(found) == 3
    assert found["stages.0.0.conv1.weight"] == pytest.approx(1 - 2 / 5)  # ⌈1.5⌉
    assert found["stages.1.0.conv1.weight"] == pytest.approx(1 - 3 / 10)  # and not ⌈3.0000000000000004⌉
    assert densities(0.99)["stages.0.0.conv1.weight"] == pytest.approx(1 / 5), "one stays"


def test_ratios_by_name() -> None:
    found = densities({"stages.*.conv1.weight": 0.4, "stages.2.*.conv1.weight": 0.8})
    assert found["stages.1.0.conv1.weight"] == pytest.approx(0.6)
    assert found["stages.2.0.conv1.weight"] == pytest.approx(0.2)
    coupled = densities({"conv1.weight": 0.2})
    assert set(coupled) == {"conv1.weight", "stages.0.0.conv2.weight"}


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (1.5, "ratio of 'stages.0.0.conv1.weight' is 1.5: it is the share of filters that go"),
        ({"stages.7.*": 0.5}, r"ratio pattern is 'stages.7.\*': no layer but the last fits; the names are like 'conv1.weight'"),
        ({"fc.weight": 0.5}, "ratio pattern is 'fc.weight': no layer but the last"),
        ({"conv1.weight": 0.2, "stages.0.0.conv2.weight": 0.4}, "'conv1.weight' is 0.2 and of 'stages.0.0.conv2.weight' 0.4"),
    ],
)  # fmt: skip
def test_ratios_that_cannot_be(ratio: Any, message: str) -> None:
    with pytest.raises(AutoSparseError, match=message):
        densities(ratio)


def test_a_network_without_free_filters_is_told() -> None:
    with pytest.raises(AutoSparseError, match=r"MLP has no convolution whose filters can go alone.*'layers.1.weight'"):
        filter_densities(create_model(ModelSettings("mlp", 8), image_size=8), image(8), 0.5)


@pytest.mark.parametrize("ratio", [0.5, {"*conv?.weight": 0.4}, {"stages.0.*.conv2.weight": 0.6}])
def test_the_lowest_filters_go_all_of_them(ratio: Any) -> None:
    model = create_model(ModelSettings("resnet8", 5))
    shares = filter_densities(model, image(), ratio)
    masks = prune(model, None, "magnitude", example_input=image(), granularity="channel", scope=shares)
    for name, mask in masks.items():
        kept = mask.flatten(1).all(1)
        assert int(kept.sum()) == round(shares[name] * len(kept))
        if ".conv1." in name and not kept.all():
            size = model.get_parameter(name).detach().flatten(1).abs().mean(1)
            assert size[~kept].max() <= size[kept].min()
    removal = remove(model, masks, image())
    assert not removal.stays and removal.removed.keys() == {n for n, d in shares.items() if d < 1}


# -- pushing out --------------------------------------------------------------------------------------------------------


def test_filters_are_pushed_out(convnet: Callable[..., nn.Module], digits: ImageData) -> None:
    recipe, chosen = Recipe(batch_size=32), TPPSettings(ramp=30, stabilise=10, lr=0.02, delta=1, tau=10, weight=50)
    example = digits.normalise(digits.train.images[:2])
    norms = {}
    for penalise in (True, False):
        model = convnet()
        shares = filter_densities(model, example, 0.5)
        masks = prune(model, None, "magnitude", example_input=example, granularity="channel", scope=shares)
        removal = remove(model, masks, example)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trained = push_out(model, digits, removal, chosen, recipe, penalise=penalise, device="cpu")
        assert trained.steps == 40
        norms[penalise] = [
            float((p if kept else p[list(gone)]).norm() / (before[n] if kept else before[n][list(gone)]).norm())
            for n, p in model.state_dict().items()
            for kept, gone in [(n not in removal.removed, removal.removed.get(n, ()))]
            if not kept or n == "classifier.weight"
        ]
    assert max(norms[True][:2]) < 0.3 < 0.8 < min(norms[False][:2]), "filters that go, with the penalty and without"
    assert norms[True][2] > 0.8, "the classifier"
    plain = convnet()
    train(plain, digits, chosen.recipe(recipe), device="cpu")
    assert all(map(torch.equal, plain.state_dict().values(), model.state_dict().values())), (
        "the baseline is plain training"
    )


# -- the comparison -----------------------------------------------------------------------------------------------------

DIGITS = DataSettings("digits", limit=96, limit_test=40, validation=1 / 3)
SHORT = Recipe(epochs=2, batch_size=32, lr=0.05, schedule="constant")
TPP = TPPSettings(ramp=4, stabilise=1, lr=0.01, delta=1, tau=4)


def plan(
    methods: Any = ("tpp", "l1"), ratios: Any = (0.5,), seeds: Any = (0,), **changes: Any
) -> list[structured.Thinning]:
    settings: dict[str, Any] = {"recipe": SHORT, "tpp": TPP, "finetune": SHORT, **changes}
    return thinnings(ModelSettings("convnet", 4), DIGITS, **settings, methods=methods, ratios=ratios, seeds=seeds)


def without_seconds(results: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in result.items() if k not in ("seconds", "total_seconds")} for result in results]


def test_the_comparison(tmp_path: Path, digits: ImageData) -> None:
    todo = plan(methods=("tpp", "snip"), ratios=(0.5, {"features.4.weight": 0.25}))
    results = run_thinnings(todo, tmp_path, digits, device="cpu")
    assert [(r["method"], r["ratio"]) for r in results] == [("dense", "")] + [
        (method, ratio) for ratio in ("0.5", "features.4.weight=0.25") for method in ("tpp", "snip")
    ]
    dense, *rest = results
    assert {r["dense_accuracy"] for r in rest} == {dense["accuracy"]}
    for thinning, result in zip(todo[1:], rest, strict=True):
        half = result["ratio"] == "0.5"
        assert result["filters"] == {
            "features.4.weight": 4 if half else 2,
            **({"features.8.weight": 4} if half else {}),
        }
        assert not result["stays"] and result["parameters"] < result["parameters_before"] == dense["parameters"]
        path = result_path(tmp_path, *with_inputs([thinning], digits))
        masks = Masks.load(path.with_suffix(".masks.safetensors"))
        example = digits.normalise(digits.train.images[:2])
        model = create_model(thinning.model, in_channels=1, image_size=8)
        smaller = shrink(model, masks, example)
        from safetensors.torch import load_file

        smaller.load_state_dict(load_file(path.with_suffix(".safetensors")))
        assert dataclasses.astuple(size(smaller, example)) == (result["parameters"], result["macs"])
        assert loop.evaluate(smaller, digits)[0] == result["accuracy"]
        assert not path.with_suffix(".state").exists()
    text = (tmp_path / "results.csv").read_text().splitlines()
    assert text[0] == ",".join(structured.COLUMNS) and len(text) == 6
    assert [row[:2] for row in summary(results).rows][:2] == [["0.5", "tpp"], ["0.5", "snip"]]
    again: list[Event] = []
    assert run_thinnings(todo, tmp_path, digits, device="cpu", on_event=again.append) == results and not again


def test_after_any_stops_it_gives_the_same(tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train.__kwdefaults__ is not None
    monkeypatch.setitem(train.__kwdefaults__, "checkpoint_every", 0.0)
    todo = plan()
    whole = run_thinnings(todo, tmp_path / "whole", digits, device="cpu")
    stops, epochs = 0, []
    for _ in range(30):
        seen: list[Mapping[str, Any]] = []

        def stop(event: Event, seen: list[Any] = seen) -> None:
            if event.kind == "progress" and "epoch" in event.values:
                seen.append(event.values)
                epochs.append((event.key, event.values["stage"], event.values["step"]))
                if len(seen) == 2:
                    raise KeyboardInterrupt

        try:
            parts = run_thinnings(todo, tmp_path / "parts", digits, device="cpu", on_event=stop)
            break
        except KeyboardInterrupt:
            stops += 1
    assert without_seconds(parts) == without_seconds(whole)
    assert stops > 5
    assert max(map(epochs.count, epochs)) == 2, "no more is lost than since the last checkpoint"
    for thinning in todo:
        (known,) = with_inputs([thinning], digits)
        a, b = (result_path(tmp_path / d, known).with_suffix(".safetensors") for d in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes()


def test_one_that_fails_is_recorded_and_tried_again(
    tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = plan(methods=("tpp",))
    real = making.push_out

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise AutoSparseError("model is 'x': choose another")

    monkeypatch.setattr(making, "push_out", fail)
    results = run_thinnings(todo, tmp_path, digits, device="cpu")
    assert results[1]["error"] == "model is 'x': choose another" and summary(results).rows == []
    assert "choose another" in (tmp_path / "results.csv").read_text()
    monkeypatch.setattr(making, "push_out", real)
    assert run_thinnings(todo, tmp_path, digits, device="cpu")[1]["accuracy"] >= 0


def test_a_dense_training_that_failed_is_told(tmp_path: Path, digits: ImageData) -> None:
    todo = plan(methods=("l1",), recipe=dataclasses.replace(SHORT, lr=1e30))
    results = run_thinnings(todo, tmp_path, digits, device="cpu")
    assert "diverged" in results[0]["error"]
    assert results[1]["error"] == "the dense network of seed 0 is missing: see why its training failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, r"methods is \[\]: give at least one"),
        ({"methods": ("tpp", "tpp")}, "method is 'tpp': give each once"),
        ({"methods": ("tpp:snap",)}, "methods holds .*snap': did you mean 'snip'"),
        ({"methods": ("snip@2",)}, "'snip' takes no horizon"),
        ({"methods": ("nowhere_to:be_found",)}, "No module named 'nowhere_to'"),
        ({"methods": ("irp",)}, "method is 'irp': it removes single weights"),
        ({"methods": ("no.safetensors",)}, "scorer file no.safetensors does not exist"),
        ({"ratios": (1.0,)}, "ratio is 1.0: it is the share of filters that go"),
        ({"ratios": ({"a": -1.0},)}, "ratio is -1.0"),
        ({"seeds": ()}, "seeds is"),
    ],
)
def test_comparisons_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AutoSparseError, match=message):
        plan(**changes)


def test_a_pattern_that_fits_nothing_is_told_before_anything_runs(tmp_path: Path, digits: ImageData) -> None:
    with pytest.raises(AutoSparseError, match="ratio pattern is 'layer9'"):
        run_thinnings(plan(ratios=({"layer9": 0.5},)), tmp_path, digits, device="cpu")
    assert not (tmp_path / "networks").exists()


def test_names_and_keys() -> None:
    assert candidate("tpp").criterion == candidate("l1").criterion == "magnitude"
    assert candidate("tpp:snip") == candidate("snip") and candidate("snip").granularity == "channel"
    dense, tpp, l1 = plan()
    assert tpp.dense() == l1.dense() == dense
    assert tpp.key().startswith("convnet-w4_tpp_0.5_s0_") and dense.key().startswith("convnet-w4_dense_s0_")
    assert (
        len({t.key() for t in (*plan(), *plan(ratios=({"features.4.weight": 0.5},)), *plan(tpp=TPPSettings())[1:])})
        == 7
    )
