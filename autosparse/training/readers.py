"""Readers of data sets: from the files of each kind to uint8 images and labels of its official splits.

An image file becomes RGB of 8 bits, by rules that look at no other file and at no statistics of its pixels:

- its EXIF orientation is applied; colour profiles are ignored (colours count as sRGB); of several frames, the first;
- grey, palette, 1-bit, CMYK and LAB images become RGB as Pillow converts them, three equal channels for grey ones;
- 16 bits a channel: the type's range is scaled to 0–255, `round(value / 257)` for one channel (`value / 4095` for 12 bits
  in TIFF), the high byte for several, as Pillow reads them;
- floats: [0, 1] is scaled to 0–255; an image with another value, or one not finite, is refused, and so are integers of
  more than 16 bits: nothing in the file says what is white;
- transparency (an alpha channel, or a transparent colour): over white;
- then the shorter side is resized to `image_size` (bicubic), and the centre cut out.

A file that cannot be read so, is damaged, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` is refused by its name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autosparse.errors import AutoSparseError, first_line, raise_out_of_memory, suggest, warn
from autosparse.masks.random import make_numpy_generator
from autosparse.plugins import is_outside, load_outside

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2")


@dataclass(frozen=True)
class Raw:
    """NHWC uint8 images of the official splits, before subset, split and resizing."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Boolean choice of exactly `count` items, class by class in equal shares as far as whole numbers allow."""
    rng = make_numpy_generator(seed, "subset")
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels))  # position of each item within its class, as a share of the class
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + rng.random()) / len(members)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.argsort(rank, kind="stable")[:count]] = True
    return chosen


def read(name: str, root: Path, image_size: int | None) -> tuple[Raw, str]:
    """The official splits and the augmentation that the data set takes by default.

    Raises:
        AutoSparseError: unknown name, files that are missing, damaged or of another form.
    """
    if name.startswith("hdf5:"):
        return _hdf5(Path(name.removeprefix("hdf5:"))), "crop+flip"
    if name.startswith("imagefolder:"):
        return _imagefolder(Path(name.removeprefix("imagefolder:")), image_size), "crop+flip"
    if is_outside(name):
        return _outside(name, root), "crop+flip"
    if name not in DATA:
        known = f"{suggest(name, DATA)}; or imagefolder:PATH, hdf5:PATH, package.module:reader"
        raise AutoSparseError(f"data is {name!r}: {known}")
    reader, augment = DATA[name]
    return reader(root), augment


def _outside(name: str, root: Path) -> Raw:
    """What a reader of the user gives for `root`: training images, their labels, test images, their labels."""
    arrays = load_outside(name, "data")(root)
    try:
        train, train_labels, test, test_labels = (np.asarray(a) for a in arrays)
        good = all(a.dtype == np.uint8 and a.ndim == 4 and a.shape[3] in (1, 3) for a in (train, test))
        good &= (len(train), len(test)) == (len(train_labels), len(test_labels)) and min(len(train), len(test)) > 0
    except (TypeError, ValueError):
        good = False
    if not good:
        raise AutoSparseError(
            f"data is {name!r}: the reader must give four arrays: training images, labels, test images, labels; images uint8 of "
            "shape (N, height, width, 1 or 3), and a label for each"
        )
    return Raw(train, train_labels.astype(np.int64), test, test_labels.astype(np.int64))


def _digits(root: Path) -> Raw:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    test = stratified(labels, 360, seed=0)  # the set has no official split: a fifth, always the same
    return Raw(images[~test], labels[~test], images[test], labels[test])


def _torchvision(name: str, **splits: dict[str, Any]) -> Callable[[Path], Raw]:
    def read(root: Path) -> Raw:
        from torchvision import datasets

        def part(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
            try:
                found = getattr(datasets, name)(str(root), download=True, **arguments)
            except Exception as error:  # torchvision raises whatever the network and the archive raise
                reason = first_line(error)
                raise AutoSparseError(
                    f"data {name} is not under {root} and cannot be downloaded ({reason}): put torchvision's files there "
                    "by hand, set data.root, or use hdf5:PATH"
                ) from error
            images = np.asarray(found.data)
            labels = np.asarray(found.targets if hasattr(found, "targets") else found.labels)
            if name == "SVHN":
                images = images.transpose(0, 2, 3, 1)
            return (images if images.ndim == 4 else images[..., None]), labels.astype(np.int64)

        return Raw(*part(splits["train"]), *part(splits["test"]))

    return read


def _tiny_imagenet(root: Path) -> Raw:
    """200 classes of 64×64 images in the layout of its archive; the official validation images are the test split."""
    from torchvision.datasets.utils import download_and_extract_archive

    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        try:
            download_and_extract_archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", str(root))
        except Exception as error:
            raise AutoSparseError(
                f"data tiny_imagenet: {folder} does not exist and cannot be downloaded ({error}): "
                "unpack tiny-imagenet-200.zip there, or set data.root"
            ) from error
    try:
        classes = {name: i for i, name in enumerate(_classes(folder / "train"))}
        train = [
            (path, label)
            for name, label in classes.items()
            for path in sorted((folder / "train" / name / "images").glob("[!.]*.JPEG"))
        ]
        rows = [
            line.split("\t")
            for line in (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
        ]
        test = [(folder / "val" / "images" / row[0], classes[row[1]]) for row in rows]
    except (OSError, KeyError, IndexError) as error:
        raise AutoSparseError(
            f"data tiny_imagenet: {folder} is incomplete ({error}): delete it and unpack tiny-imagenet-200.zip again"
        ) from error
    return Raw(*_images(train, 64), *_images(test, 64))


def _images(files: list[tuple[Path, int]], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode image files to `(N, side, side, 3)`: the shorter side is resized, the centre cut out."""
    from PIL import Image, ImageOps

    images = np.empty((len(files), side, side, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for index, (path, _) in enumerate(files):
            try:
                with Image.open(path) as image:
                    images[index] = np.asarray(ImageOps.fit(_rgb(image), (side, side)))
            except Exception as error:  # Pillow raises errors of any type on a damaged file
                raise_out_of_memory(error, f"reading the image {path}")
                reason = first_line(error).rstrip(".")
                raise AutoSparseError(f"image {path} cannot be read: {reason}; remove or replace it") from error
    return images, np.array([label for _, label in files], dtype=np.int64)


def _rgb(image: Image) -> Image:
    """RGB of 8 bits, upright and opaque, by the rules above; `ValueError` where they give none."""
    from PIL import Image, ImageOps

    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_one_channel(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _one_channel(image: Image) -> np.ndarray:
    """A grey image of 16 bits or floats as uint8."""
    values, tags = np.asarray(image).astype(np.float64), getattr(image, "tag_v2", {})  # the tags of a TIFF file
    if image.mode == "F":
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("it holds floats outside [0, 1]")
        white = 1
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # neither format holds more than 16 bits
        white = 4095 if tags.get(258) == (12,) else 65535  # BitsPerSample
    else:
        raise ValueError(
            "it holds integers of more than 16 bits, or signed ones, which say nothing about what is white"
        )
    scaled = values / white
    if tags.get(262) == 0:  # PhotometricInterpretation: 0 is white
        scaled = 1 - scaled
    if "transparency" in image.info:
        scaled[values == image.info["transparency"]] = 1
    return np.rint(scaled * 255).astype(np.uint8)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _classes(folder: Path) -> list[str]:
    """Names of the class folders, sorted; hidden folders are none."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image files in a folder and all below it, and the files that are none by their suffix; hidden ones are neither."""

    def refuse(error: OSError) -> None:
        raise error

    images: list[Path] = []
    others: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(name for name in names if not _hidden(name)):
            path = Path(parent, name)
            (images if path.suffix.lower() in SUFFIXES else others).append(path)
    return images, others


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _imagefolder(path: Path, image_size: int | None) -> Raw:
    what = f"data imagefolder:{path}"
    test = next((path / name for name in ("test", "val", "validation") if (path / name).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        raise AutoSparseError(f"{what}: needs the folders {path}/train and {path}/test (or val)")
    if image_size is None:
        raise AutoSparseError(f"{what}: set data.image_size, the side that all images are brought to")
    try:
        train_classes, test_classes = _classes(path / "train"), _classes(test)
        only = [(path / "train", sorted({*train_classes} - {*test_classes}))]
        only.append((test, sorted({*test_classes} - {*train_classes})))
        if differing := [f"only {folder.name} has {_listed(names)}" for folder, names in only if names]:
            raise AutoSparseError(
                f"{what}: train and {test.name} hold different classes ({'; '.join(differing)}); give both the same"
            )
        if not train_classes:
            raise AutoSparseError(f"{what}: {path}/train has no class folders; put the images into train/CLASS/")
        parts, others = [], []
        for split in (path / "train", test):
            found = [_files(split / name) for name in train_classes]
            if empty := [name for name, (images, _) in zip(train_classes, found, strict=True) if not images]:
                raise AutoSparseError(
                    f"{what}: no images ({' '.join(SUFFIXES)}) in {_listed([f'{split.name}/{name}' for name in empty])}; "
                    "put some there, or delete these class folders in train and test"
                )
            others += [file for _, more in found for file in more]
            parts.append([(file, label) for label, (images, _) in enumerate(found) for file in images])
    except OSError as error:
        raise AutoSparseError(
            f"{what}: cannot be read ({first_line(error)}); check the folder's permissions"
        ) from error
    if others:
        warn(f"{what}: files of other kinds than {' '.join(SUFFIXES)} are ignored: {_listed([str(o) for o in others])}")
    train, tested = (_images(part, image_size) for part in parts)
    return Raw(*train, *tested)


def _hdf5(path: Path) -> Raw:
    import h5py

    if not path.is_file():
        raise AutoSparseError(f"data hdf5:{path}: the file does not exist; check the path")
    arrays = []
    try:
        with h5py.File(path, "r") as file:
            for key in ("train/images", "train/labels", "test/images", "test/labels"):
                if not isinstance(file.get(key), h5py.Dataset):
                    raise AutoSparseError(
                        f"data hdf5:{path}: has no dataset {key!r}; it needs train/ and test/ of both"
                    )
                arrays.append(file[key][()])
    except OSError as error:
        raise AutoSparseError(f"data hdf5:{path}: not a readable HDF5 file, or truncated ({error})") from error
    for split, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise AutoSparseError(
                f"data hdf5:{path}: {split}/images is {images.dtype} {images.shape}; it must be uint8 (N, H, W, 1 or 3)"
            )
        if len(images) == 0:
            raise AutoSparseError(f"data hdf5:{path}: {split}/images holds no images; give at least one")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise AutoSparseError(
                f"data hdf5:{path}: {split}/labels is {labels.dtype} {labels.shape}; it must be integers ({len(images)},)"
            )
        if labels.min() < 0:
            raise AutoSparseError(f"data hdf5:{path}: {split}/labels holds {labels.min()}; classes are 0, 1, …")
    if arrays[0].shape[1] != arrays[0].shape[2] or arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise AutoSparseError(
            f"data hdf5:{path}: images must be square and of one shape, "
            f"got train {arrays[0].shape[1:]} and test {arrays[2].shape[1:]}"
        )
    return Raw(arrays[0], arrays[1].astype(np.int64), arrays[2], arrays[3].astype(np.int64))


_OFFICIAL = {"train": {"train": True}, "test": {"train": False}}
DATA: dict[str, tuple[Callable[[Path], Raw], str]] = {
    "digits": (_digits, "none"),
    "mnist": (_torchvision("MNIST", **_OFFICIAL), "none"),
    "fashion_mnist": (_torchvision("FashionMNIST", **_OFFICIAL), "none"),
    "cifar10": (_torchvision("CIFAR10", **_OFFICIAL), "crop+flip"),
    "cifar100": (_torchvision("CIFAR100", **_OFFICIAL), "crop+flip"),
    "svhn": (_torchvision("SVHN", train={"split": "train"}, test={"split": "test"}), "none"),
    "tiny_imagenet": (_tiny_imagenet, "crop+flip"),
}
