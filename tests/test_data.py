"""Data sets: splits, statistics, augmentation, and what is said about bad settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_readers import hdf5
from torch import Tensor

from autosparse.errors import AutoSparseError
from autosparse.masks.random import make_generator
from autosparse.training.data import DataSettings, ImageData, Split, load_data
from autosparse.training.readers import DATA, stratified


def fingerprints(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def make(count: int = 10, side: int = 8, channels: int = 2, augment: str = "crop+flip") -> ImageData:
    """Images whose pixels are all different as far as 256 values allow."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        images = torch.randint(256, (n, channels, side, side), generator=generator, dtype=torch.uint8)
        return Split(images, torch.arange(n) % 3)

    mean, std = torch.rand(channels, generator=generator), torch.rand(channels, generator=generator) + 0.1
    return ImageData(split(count), split(2), split(3), 3, mean, std, augment)


# -- splits ----------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_complete() -> None:
    data = load_data(DataSettings("digits", validation=0.1))
    train, validation, test = (fingerprints(s) for s in (data.train, data.validation, data.test))
    assert not (train & validation or train & test or validation & test)
    assert (len(data.train), len(data.validation), len(data.test)) == (1437 - 144, 144, 360)
    assert len(train | validation | test) == 1797
    assert (data.classes, data.channels, data.image_size, data.augment) == (10, 1, 8, "none")
    assert data.train.images.dtype == torch.uint8 and data.train.labels.dtype == torch.int64


def test_the_test_split_is_always_the_same() -> None:
    one, other = (load_data(DataSettings("digits", seed=s)) for s in (0, 1))
    assert torch.equal(one.test.images, other.test.images)
    assert fingerprints(one.validation) != fingerprints(other.validation)


def test_subset_and_split_are_functions_of_the_data_seed() -> None:
    one, two, other = (load_data(DataSettings("digits", limit=100, limit_test=50, seed=s)) for s in (0, 0, 1))
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(one, split).images, getattr(two, split).images)
        assert fingerprints(getattr(one, split)) != fingerprints(getattr(other, split))


def test_limits_are_exact_and_balanced() -> None:
    data = load_data(DataSettings("digits", limit=100, limit_test=50, validation=0.2))
    assert (len(data.train), len(data.validation), len(data.test)) == (80, 20, 50)
    for split, each in ((data.train, 8), (data.validation, 2), (data.test, 5)):
        assert (split.labels.bincount(minlength=10) - each).abs().max() <= 1
    assert data.classes == 10
    few = load_data(DataSettings("digits", limit=3, validation=0))
    assert len(few.train) == 3 and len(few.validation) == 0 and few.classes == 10


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.data(), st.integers(0, 9))
def test_stratified_choice(labels: list[int], data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(0, len(labels)))
    chosen = stratified(np.array(labels), count, seed)
    assert chosen.sum() == count
    assert (chosen == stratified(np.array(labels), count, seed)).all()
    for label in set(labels):
        here = np.array(labels) == label
        # each class gives the same share; which share makes the counts sum up moves it by less than one per class
        assert abs(chosen[here].sum() - count / len(labels) * here.sum()) < 1 + len(set(labels)) * here.mean()


def test_statistics_are_of_the_training_part_only() -> None:
    data = load_data(DataSettings("digits", limit=200, validation=0.5))
    images = data.train.images.double() / 255
    torch.testing.assert_close(data.mean.double(), images.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.std.double(), images.std((0, 2, 3), correction=0), atol=1e-6, rtol=0)
    everything = data.normalise(data.train.images)
    assert abs(everything.mean()) < 1e-5 and abs(everything.std(correction=0) - 1) < 1e-5


def test_normalise_by_hand() -> None:
    data = make()
    image = data.train.images[:1]
    expected = (image / 255 - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)
    torch.testing.assert_close(data.normalise(image), expected)


def test_images_of_one_colour_have_finite_statistics(tmp_path: Path) -> None:
    data = load_data(hdf5(tmp_path, **{"train/images": np.full((6, 4, 4, 3), 7, np.uint8)}))
    assert torch.isfinite(data.normalise(data.train.images)).all()


def test_resizing() -> None:
    data = load_data(DataSettings("digits", image_size=4, limit=20, validation=0.25))
    assert data.image_size == 4 and data.test.images.shape[2:] == (4, 4)
    assert load_data(DataSettings("digits", image_size=8, limit=20)).train.images.shape[2:] == (8, 8)
    empty = load_data(DataSettings("digits", image_size=16, limit=20, validation=0))
    assert empty.validation.images.shape == (0, 1, 16, 16)


def test_a_sample_per_class_is_balanced() -> None:
    data = load_data(DataSettings("digits", limit=100, validation=0))
    one, two, other = (data.sample_per_class(3, s, 8) for s in (0, 0, 1))
    assert [len(y) for _, y in one] == [8, 8, 8, 6]
    labels = torch.cat([y for _, y in one])
    assert labels.bincount().tolist() == [3] * 10 and labels[:8].unique().numel() > 3  # batches mix the classes
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    known = {image.numpy().tobytes() for image in data.normalise(data.train.images)}
    drawn = {image.numpy().tobytes() for x, _ in one for image in x}
    assert drawn <= known and len(drawn) == 30
    assert torch.cat([y for _, y in data.sample_per_class(1000, 0, 64)]).bincount().sum() == 100  # all there are


# -- batches ---------------------------------------------------------------------------------------------------------


def slow_epoch(data: ImageData, batch_size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pad, crop, flip, one image after the other, with the draws in the order that `epoch` states by its code."""
    generator = make_generator(seed, "epoch")
    size = min(batch_size, len(data.train))
    used = len(data.train) // size * size
    order = torch.randperm(len(data.train), generator=generator)[:used]
    padding = 0 if data.augment == "none" else max(1, data.image_size // 8)
    offsets = torch.randint(0, 2 * padding + 1, (2, used), generator=generator)
    flips = torch.rand(used, generator=generator) < 0.5
    batches = []
    for start in range(0, used, size):
        images = []
        for i in range(start, start + size):
            padded = torch.nn.functional.pad(data.train.images[order[i]], (padding,) * 4)
            top, left = offsets[:, i]
            image = padded[:, top : top + data.image_size, left : left + data.image_size]
            images.append(image.flip(2) if data.augment == "crop+flip" and flips[i] else image)
        batches.append((data.normalise(torch.stack(images)), data.train.labels[order[start : start + size]]))
    return batches


@pytest.mark.parametrize("augment", ["none", "crop", "crop+flip"])
@pytest.mark.parametrize(("side", "count", "batch_size"), [(8, 10, 3), (5, 10, 5), (16, 7, 100), (1, 4, 2)])
def test_augmentation_against_a_slow_reference(augment: str, side: int, count: int, batch_size: int) -> None:
    data = make(count, side, augment=augment)
    fast = list(data.epoch(batch_size, seed=3))
    slow = slow_epoch(data, batch_size, seed=3)
    assert len(fast) == len(slow) == max(1, count // batch_size)
    for (images, labels), (expected, truth) in zip(fast, slow, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, truth)


def test_padding_is_black_and_by_an_eighth() -> None:
    """All crops of a white image: the black border is at most an eighth of the side wide, and is met."""
    white = torch.full((512, 1, 16, 16), 255, dtype=torch.uint8)
    split = Split(white, torch.zeros(512, dtype=torch.int64))
    data = ImageData(split, split, split, 1, torch.zeros(1), torch.ones(1), "crop")
    ((images, _),) = data.epoch(512, seed=0)
    rows = images.amax((1, 3)).sum(1)
    assert sorted(set(rows.tolist())) == [14.0, 15.0, 16.0]
    assert set(images.unique().tolist()) == {0.0, 1.0}


def test_an_epoch_is_a_function_of_the_seed_and_sees_each_image_once() -> None:
    data = make(12, augment="none")
    one, two, other = (list(data.epoch(4, seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    seen = sorted(image.sum().item() for images, _ in one for image in images)
    assert seen == pytest.approx(sorted(i.sum().item() for i in data.normalise(data.train.images)), rel=1e-4)


def test_the_epoch_touches_no_global_random_state() -> None:
    state = torch.get_rng_state()
    list(make().epoch(4, seed=1))
    make().sample(4, 2, seed=1)
    load_data(DataSettings("digits", limit=20))
    assert torch.equal(state, torch.get_rng_state())


def test_samples_are_fixed_and_not_augmented() -> None:
    data = make(10)
    batches = data.sample(4, 3, seed=0)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(batches[1][0], data.sample(4, 3, seed=0)[1][0])
    assert not torch.equal(batches[0][0], data.sample(4, 3, seed=1)[0][0])
    known = {image.numpy().tobytes() for image in data.normalise(data.train.images)}
    images = [image.numpy().tobytes() for x, _ in batches for image in x]
    assert set(images) == known and len(images) == 10


def test_batches_of_a_split_are_in_order() -> None:
    data = make(10)
    images, labels = (torch.cat(parts) for parts in zip(*data.batches("train", 3), strict=True))
    assert torch.equal(images, data.normalise(data.train.images)) and torch.equal(labels, data.train.labels)


def test_to_another_device_and_back_to_itself() -> None:
    data = make()
    assert data.to("cpu") is data
    moved = data.to("meta")
    assert moved.device.type == "meta" and moved.mean.is_meta and moved.validation.labels.is_meta
    assert moved.augment == data.augment and moved.classes == 3


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "digit"}, "data is 'digit': did you mean 'digits'.*imagefolder:PATH"),
        ({"limit": 5000}, r"data\.limit is 5000: the data set has 1437 images"),
        ({"limit_test": 361}, r"data\.limit_test is 361: the data set has 360"),
        ({"limit": 0}, r"data\.limit is 0"),
        ({"limit_test": -1}, r"data\.limit_test is -1"),
        ({"image_size": 0}, r"data\.image_size is 0"),
        ({"validation": 1.0}, r"data\.validation is 1\.0"),
        ({"validation": -0.1}, r"data\.validation is -0\.1"),
        ({"limit": 10, "validation": 0.99}, "of 10 training images it leaves none to train on"),
        ({"augment": "flip"}, r"data\.augment is 'flip': known are none, crop"),
    ],
    ids=str,
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(AutoSparseError, match=message):
        load_data(DataSettings(**options))


def test_labels_of_settings() -> None:
    assert [DataSettings(n).label() for n in DATA] == list(DATA)
    assert DataSettings("cifar10", image_size=16).label() == "cifar10-16px"
    assert DataSettings("imagefolder:/data/my.pictures").label() == "my"
