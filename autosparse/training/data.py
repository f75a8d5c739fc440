"""Image data sets that live on the device: one batched gather makes a batch, augmented or not."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autosparse.errors import AutoSparseError, require, settings
from autosparse.files import fingerprint
from autosparse.masks.random import derive, make_generator
from autosparse.training.readers import Raw, read, stratified

AUGMENTATIONS = ("none", "crop", "crop+flip")


@settings
class DataSettings:
    """Which images.

    `name`: one of `autosparse list data`; `imagefolder:PATH` (PATH/train/CLASS/…, PATH/test/CLASS/…; needs
    `image_size`); `hdf5:PATH` (train/images, train/labels, test/images, test/labels; images uint8, NHWC, square); or
    your own reader, `package.module:reader`. Image files become 8-bit RGB as `autosparse.training.readers` says.
    `root`: folder of torchvision's data sets; missing ones are downloaded there. `image_size`: side in pixels to resize
    to. `limit`, `limit_test`: number of training and test images, stratified by class. `validation`: share of the
    training images held out, stratified. `augment`: `"none"`, `"crop"` (pad by an eighth, random crop), `"crop+flip"`;
    `None`: the data set's default. `classes`: use only these, relabelled 0, 1, … in this order. `seed`: of subset and
    split, not of the run, so that all runs share one split.
    """

    name: str = "digits"
    root: str = "data"
    image_size: int | None = None
    limit: int | None = None
    limit_test: int | None = None
    validation: float = 0.1
    augment: str | None = None
    classes: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one = self.classes is None or (len(self.classes) > 0 and len(set(self.classes)) == len(self.classes))
        require(one, "data.classes", self.classes, "give each class once, and at least one")
        require(self.image_size is None or self.image_size >= 1, "data.image_size", self.image_size, "give pixels, ≥ 1")
        for key in ("limit", "limit_test"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"data.{key}", value, "give a number of images, at least 1")
        require(0 <= self.validation < 1, "data.validation", self.validation, "give a share of the training images")
        require(
            self.augment is None or self.augment in AUGMENTATIONS,
            "data.augment",
            self.augment,
            f"known are {', '.join(AUGMENTATIONS)}",
        )

    def label(self) -> str:
        """Short text, fit for a file name: `digits`, `cifar10-16px`."""
        name = Path(self.name.split(":", 1)[1]).stem if ":" in self.name else self.name
        name = name if self.image_size is None else f"{name}-{self.image_size}px"
        return name if self.classes is None else f"{name}-c{'_'.join(map(str, self.classes))}"


@dataclass(frozen=True)
class Split:
    """Images `(N, C, H, W)` uint8 and labels `(N,)` int64, on the device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def content(self) -> str:
        """Fingerprint of images and labels, made once."""
        return fingerprint(self.images, self.labels)

    def to(self, device: torch.device | str) -> Split:
        moved = Split(self.images.to(device), self.labels.to(device))
        if "content" in self.__dict__:
            moved.__dict__["content"] = self.content
        return moved


@dataclass(frozen=True)
class ImageData:
    """Train, validation and test images, kept apart; `mean` and `std` per channel in [0, 1], of the training images."""

    train: Split
    validation: Split
    test: Split
    classes: int
    mean: Tensor
    std: Tensor
    augment: str

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train.images.shape[2]

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    @property
    def content(self) -> str:
        """Fingerprint of all images and labels, and of what is done to them; the same on every device."""
        splits = [split.content for split in (self.train, self.validation, self.test)]
        return fingerprint(splits, self.classes, self.mean, self.std, self.augment)

    def to(self, device: torch.device | str) -> ImageData:
        if torch.device(device) == self.device:
            return self
        train, validation, test = (split.to(device) for split in (self.train, self.validation, self.test))
        return ImageData(train, validation, test, self.classes, self.mean.to(device), self.std.to(device), self.augment)

    def without(self, *splits: str) -> ImageData:
        """The same with these splits empty: for trainings that have no business with them."""
        empty: dict[str, Any] = {name: Split(self.train.images[:0], self.train.labels[:0]) for name in splits}
        return replace(self, **empty)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 `(B, C, H, W)` → float32 of zero mean and unit variance over the training images."""
        scale = (1 / (255 * self.std)).view(-1, 1, 1)
        shift = (-self.mean / self.std).view(-1, 1, 1)
        return torch.addcmul(shift, images.float(), scale)

    def batches(self, split: str = "test", batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of a split in order, normalised, not augmented."""
        part: Split = getattr(self, split)
        for start in range(0, len(part), batch_size):
            stop = start + batch_size
            yield self.normalise(part.images[start:stop]), part.labels[start:stop]

    def sample(self, batch_size: int, n_batches: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Fixed random training batches, not augmented: what criteria score on. Fewer when the data are fewer."""
        generator = make_generator(seed, "sample")
        order = torch.randperm(len(self.train), generator=generator)[: batch_size * n_batches].to(self.device)
        return [(self.normalise(self.train.images[i]), self.train.labels[i]) for i in order.split(batch_size)]

    def sample_per_class(self, per_class: int, seed: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Fixed random training batches of `per_class` images of every class (all where a class has fewer), not augmented."""
        generator = make_generator(seed, "sample per class")
        order = torch.randperm(len(self.train), generator=generator)
        labels = self.train.labels.cpu()[order]
        chosen = torch.cat([order[labels == label][:per_class] for label in range(self.classes)])
        mixed = chosen[torch.randperm(len(chosen), generator=generator)].to(self.device)
        return [(self.normalise(self.train.images[i]), self.train.labels[i]) for i in mixed.split(batch_size)]

    def epoch(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of training batches in random order, each image with its own crop and flip; the rest is dropped.

        A pure function of `seed`, wherever it runs; a training set smaller than a batch is one batch. Of each batch, the
        part of `rank` out of `world` equal ones.
        """
        generator = make_generator(seed, "epoch")
        count, channels, side = len(self.train), self.channels, self.image_size
        size = min(batch_size, count)
        used, share = count // size * size, size // world
        order = torch.randperm(count, generator=generator)[:used]
        padding = 0 if self.augment == "none" else max(1, side // 8)
        offsets = torch.randint(0, 2 * padding + 1, (2, used), generator=generator)
        flips = torch.rand(used, generator=generator) < 0.5 if self.augment == "crop+flip" else None
        order, offsets = order.to(self.device), offsets.to(self.device)
        if padding == 0:
            for index in order.split(share)[rank::world]:
                yield self.normalise(self.train.images[index]), self.train.labels[index]
            return
        padded = self._padded(padding)
        flat, wide = padded.view(-1), side + 2 * padding
        steps = torch.arange(side, device=self.device)
        plane = torch.arange(channels, device=self.device)[:, None, None] * (wide * wide)
        flips = None if flips is None else flips.to(self.device)
        for start in range(rank * share, used, size):
            part = slice(start, start + share)
            rows = offsets[0, part, None] + steps
            across = steps if flips is None else torch.where(flips[part, None], side - 1 - steps, steps)
            cols = offsets[1, part, None] + across
            pixels = (rows[:, :, None] * wide + cols[:, None, :])[:, None] + plane
            index = order[part]
            images = flat.take(index[:, None, None, None] * (channels * wide * wide) + pixels)
            yield self.normalise(images), self.train.labels[index]

    def _padded(self, padding: int) -> Tensor:
        cached = self.__dict__.get("_cache")
        if cached is None:
            cached = torch.nn.functional.pad(self.train.images, (padding,) * 4).contiguous()
            object.__setattr__(self, "_cache", cached)
        return cached


def load_data(data: DataSettings | str, device: torch.device | str = "cpu") -> ImageData:
    """Read a data set, take the stratified subset, split off the validation images, resize, and put all on the device.

    Raises:
        AutoSparseError: unknown name, files that are missing, damaged or of another form, a subset larger than the set,
            no training image left.
    """
    chosen = DataSettings(data) if isinstance(data, str) else data
    raw, augment = read(chosen.name, Path(chosen.root), chosen.image_size)
    if chosen.classes is not None:
        raw = _of_classes(raw, chosen.classes)
    train_images, train_labels = _subset(raw.train_images, raw.train_labels, chosen.limit, chosen.seed, "data.limit")
    test_images, test_labels = _subset(
        raw.test_images, raw.test_labels, chosen.limit_test, chosen.seed, "data.limit_test"
    )
    held_out = round(chosen.validation * len(train_labels))
    require(
        held_out < len(train_labels),
        "data.validation",
        chosen.validation,
        f"of {len(train_labels)} training images it leaves none to train on; lower it",
    )
    held = stratified(train_labels, held_out, derive(chosen.seed, "validation"))
    train = _split(train_images[~held], train_labels[~held], chosen.image_size)
    validation = _split(train_images[held], train_labels[held], chosen.image_size)
    test = _split(test_images, test_labels, chosen.image_size)
    classes = int(max(raw.train_labels.max(), raw.test_labels.max())) + 1
    mean, std = _moments(train.images)
    return ImageData(train, validation, test, classes, mean, std, chosen.augment or augment).to(device)


@functools.lru_cache(maxsize=8)
def shared_data(data: DataSettings, device: str) -> ImageData:
    """`load_data`, once for all jobs that a process does one after another; the last eight data sets stay loaded."""
    return load_data(data, device)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of uint8 images, in [0, 1], without a float copy of them all."""
    channels = images.shape[1]
    value = torch.arange(256, dtype=torch.float64) / 255
    histogram = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(channels)]).double()
    share = histogram / histogram.sum(1, keepdim=True)
    mean = share @ value
    std = (share @ value.square() - mean.square()).clamp(min=0).sqrt()
    return mean.float(), std.clamp(min=1 / 255).float()


def _of_classes(raw: Raw, classes: Sequence[int]) -> Raw:
    """The images of these classes, with labels 0, 1, … in this order."""
    known = sorted({*raw.train_labels.tolist()})
    for wanted in classes:
        require(wanted in known, "data.classes", wanted, f"the data set has the classes {known[0]} … {known[-1]}")
    number = np.full(known[-1] + 1, -1)
    number[list(classes)] = np.arange(len(classes))
    parts: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        images, labels = getattr(raw, f"{split}_images"), getattr(raw, f"{split}_labels")
        chosen = np.isin(labels, classes)
        parts |= {f"{split}_images": images[chosen], f"{split}_labels": number[labels[chosen]].astype(labels.dtype)}
    return replace(raw, **parts)


def _subset(
    images: np.ndarray, labels: np.ndarray, limit: int | None, seed: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    if limit is None:
        return images, labels
    if limit > len(labels):
        raise AutoSparseError(f"{what} is {limit}: the data set has {len(labels)} images; lower it or leave it out")
    chosen = stratified(labels, limit, seed)
    return images[chosen], labels[chosen]


def _split(images: np.ndarray, labels: np.ndarray, image_size: int | None) -> Split:
    # A copy with the strides of NCHW: with one channel, a transposed array counts as contiguous with those of NHWC, and
    # torch then takes every batch for channels-last.
    tensor = torch.empty(tuple(images.shape[i] for i in (0, 3, 1, 2)), dtype=torch.uint8)
    tensor.copy_(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2))
    if image_size is not None and len(tensor) and tuple(tensor.shape[2:]) != (image_size, image_size):
        resized = [
            torch.nn.functional.interpolate(
                part.float(), size=(image_size, image_size), mode="bilinear", antialias=True, align_corners=False
            )
            for part in tensor.split(4096)
        ]
        tensor = torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in resized])
    elif image_size is not None and len(tensor) == 0:
        tensor = tensor.new_empty((0, tensor.shape[1], image_size, image_size))
    return Split(tensor.contiguous(), torch.from_numpy(labels.astype(np.int64)))
