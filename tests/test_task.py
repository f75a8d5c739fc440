"""The task encoder: its invariance, exact counts, what it learns of planted tasks, and the comparison on another data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from autosparse.errors import AutoSparseError
from autosparse.experiment.structured import STAMP, Thinning, run_thinnings, thinnings
from autosparse.masks.mask import Masks
from autosparse.scorers.task import StampSettings, TaskEncoder, activations, keep_highest, learn_encoder
from autosparse.trainability.gates import unit_layers
from autosparse.trainability.tpp import TPPSettings
from autosparse.training.data import DataSettings, ImageData, Split, load_data
from autosparse.training.models import ModelSettings, create_model
from autosparse.training.recipe import Recipe

FEW = StampSettings(tasks=3, classes=2, images=4, batch_size=8)


def test_the_order_of_images_does_not_matter() -> None:
    torch.manual_seed(0)
    encoder = TaskEncoder({"a": 3, "b": 2}, 8)
    seen = torch.randn(6, 5)
    a, b = encoder(seen), encoder(seen[torch.randperm(6)])
    assert a.shape == (5,) and torch.allclose(a, b, atol=1e-6)
    assert not torch.allclose(a, encoder(seen + torch.tensor([1.0, 0, 0, 0, 0])), atol=1e-4)
    assert [(n, len(v)) for n, v in encoder.split(a).items()] == [("a", 3), ("b", 2)]


@hypothesis.given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99), extra=st.integers(0, 20)
)
def test_the_count_is_exact(counts: list[int], seed: int, extra: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = {str(i): torch.randn(c, generator=generator) for i, c in enumerate(counts)}
    count = min(len(counts) + extra, sum(counts))
    keep = keep_highest(logits, count)
    assert sum(int(k.sum()) for k in keep.values()) == count and all(k.any() for k in keep.values())
    for name, k in keep.items():
        if not k.all():
            assert logits[name][k].min() >= logits[name][~k].max()
    for wrong in (len(counts) - 1, sum(counts) + 1):
        with pytest.raises(AutoSparseError, match="channels to keep"):
            keep_highest(logits, wrong)


def test_activations_are_means_over_positions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 2))
    nn.init.constant_(model[0].weight, 2.0)
    images = torch.arange(8.0).view(2, 1, 2, 2)
    assert activations(model, {"0.weight": "0"}, images).tolist() == [[3, 3], [11, 11]]
    tokens = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.eye_(tokens[0].weight)
    assert activations(tokens, {"0.weight": "0"}, torch.arange(6.0).view(1, 3, 2)).tolist() == [[2, 3]]
    attention = create_model(
        ModelSettings("cellnet", 8, {"cell": "attention", "blocks": (1,), "norm": "layer", "stem_stride": 4}),
        image_size=16,
    )
    images = torch.randn(4, 3, 16, 16)
    places = unit_layers(attention, images)
    assert places and activations(attention, places, images).shape[0] == 4
    count = sum(attention.get_parameter(name).shape[0] for name in places)
    assert activations(attention, places, images).shape[1] == count


def planted() -> tuple[nn.Module, ImageData]:
    """Four classes: class c lights up pixel c; hidden unit c alone tells it. A task of two classes needs two units of four."""
    labels = torch.arange(400) % 4
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (400, 1, 2, 2), generator=generator, dtype=torch.uint8)
    images.view(400, 4)[torch.arange(400), labels] = 255
    split = Split(images, labels)
    data = ImageData(split, split, split, 4, torch.tensor([0.0]), torch.tensor([1.0]), "none")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4))
        model[1].bias.zero_()
        model[3].weight.copy_(8 * torch.eye(4))
        model[3].bias.zero_()
    return model, data


def test_it_learns_what_tasks_need() -> None:
    """Also on the pair of classes that one looks at: their units stay, and go for the images of the other two classes."""
    model, data = planted()
    places = unit_layers(model, data.normalise(data.train.images[:2]))
    assert places == {"1.weight": "1"}
    before = {n: p.clone() for n, p in model.named_parameters()}
    learned = learn_encoder(model, data, places, StampSettings(tasks=400, classes=2, images=16, keep=0.5), seed=0)
    right = 0
    for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        chosen = torch.isin(data.train.labels, torch.tensor(pair)).nonzero()[:16, 0]
        keep = keep_highest(learned.logits(model, data.normalise(data.train.images[chosen])), 2)["1.weight"]
        right += keep.nonzero()[:, 0].tolist() == list(pair)
    assert right == 6
    assert sum(learned.losses[-50:]) < 0.6 * sum(learned.losses[:50])
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())
    again = learn_encoder(model, data, places, StampSettings(tasks=400, classes=2, images=16, keep=0.5), seed=0)
    assert again.losses == learned.losses


def test_classes_of_a_data_set() -> None:
    whole = load_data(DataSettings("digits"))
    some = load_data(DataSettings("digits", classes=(7, 2)))
    assert some.classes == 2 and set(some.train.labels.tolist()) == {0, 1}
    count = sum(int((getattr(whole, s).labels == 7).sum()) for s in ("train", "validation", "test"))
    assert sum(int((getattr(some, s).labels == 0).sum()) for s in ("train", "validation", "test")) == count
    assert DataSettings("digits", classes=(7, 2)).label() == "digits-c7_2"
    for classes, message in (((1, 1), "give each class once"), ((), "at least one")):
        with pytest.raises(AutoSparseError, match=message):
            DataSettings("digits", classes=classes)
    with pytest.raises(AutoSparseError, match="the data set has the classes 0 … 9"):
        load_data(DataSettings("digits", classes=(3, 12)))


def plan(**changes: Any) -> list[Thinning]:
    recipe = Recipe(steps=30, batch_size=32, lr=0.05)
    values: dict[str, Any] = {
        "tpp": TPPSettings(ramp=3, stabilise=1, delta=1, tau=3),
        "finetune": recipe,
        "methods": (*STAMP, "l1", "random"),
        "ratios": (0.5,),
        "seeds": (0,),
        "stamp": FEW,
        "reference": DataSettings("digits", limit=200, classes=tuple(range(6))),
        **changes,
    }
    return thinnings(
        ModelSettings("resnet8", 8), DataSettings("digits", limit=120, classes=(6, 7, 8, 9)), recipe, **values
    )


def test_the_comparison(tmp_path: Path) -> None:
    """At the multiply-adds of L1 or under them, on four classes that the network was not trained on; again it does nothing."""
    todo = plan(stamp=replace(FEW, scope="global"))
    data = load_data(todo[0].data)
    dense, *rest = results = run_thinnings(todo, tmp_path, data, device="cpu")
    assert [r["method"] for r in results] == ["dense", *STAMP, "l1", "random"]
    by_method = {r["method"]: r for r in rest}
    most = by_method["l1"]["macs"]
    for result in rest:
        assert result["dense_accuracy"] == dense["accuracy"] and 0 <= result["accuracy"] <= 1
        assert 0.7 * most < result["macs"] <= most, result["method"]
    masks = [Masks.load(p) for p in (tmp_path / "networks").glob("*stamp_*.masks.safetensors")]
    assert len(masks) == 2 and any(not m.all() for m in masks[0].values())
    again: list[Any] = []
    assert run_thinnings(todo, tmp_path, data, device="cpu", on_event=again.append) == results and not again


def test_each_layer_keeps_as_many_as_with_the_other_methods(tmp_path: Path) -> None:
    todo = plan(methods=("stamp", "l1"))
    _, stamp, other = run_thinnings(todo, tmp_path, load_data(todo[0].data), device="cpu")
    assert (stamp["parameters"], stamp["macs"]) == (other["parameters"], other["macs"])


def test_what_it_refuses(tmp_path: Path) -> None:
    data = load_data(plan()[0].data)
    digits = DataSettings("digits", limit=200)
    for changes, message in (
        ({"reference": None}, "method stamp needs reference"),
        ({"methods": ("layers",)}, "leave reference out"),
        ({"stamp": replace(FEW, classes=7)}, "stamp.classes is 7: the reference has 6 classes"),
        ({"reference": replace(digits, image_size=12)}, "give both the same image_size"),
    ):
        with pytest.raises(AutoSparseError, match=message):
            run_thinnings(plan(**changes), tmp_path, data, device="cpu")
    with pytest.raises(AutoSparseError, match=r"stamp\.keep is 1\.0: it is a share"):
        StampSettings(keep=1.0)
    with pytest.raises(AutoSparseError, match=r"stamp\.scope is 'erk': known: global, uniform"):
        StampSettings(scope="erk")
