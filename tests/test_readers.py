"""Readers: each kind of data set, what image files become, and what is said about bad files and folders."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from autosparse.errors import AutoSparseError
from autosparse.training.data import DataSettings, load_data
from autosparse.training.readers import _images


def hdf5(folder: Path, **changes: Any) -> str:
    """A small HDF5 data set; a change of `None` leaves a dataset out."""
    rng = np.random.default_rng(0)
    content = {
        "train/images": rng.integers(256, size=(6, 4, 4, 3), dtype=np.uint8),
        "train/labels": np.array([0, 1, 2, 0, 1, 2]),
        "test/images": rng.integers(256, size=(2, 4, 4, 3), dtype=np.uint8),
        "test/labels": np.array([0, 4], dtype=np.uint8),
    }
    with h5py.File(folder / "data.h5", "w") as file:
        for key, value in {**content, **changes}.items():
            if value == "group" if isinstance(value, str) else False:
                file.create_group(key)
            elif value is not None:
                file[key] = value
    return f"hdf5:{folder / 'data.h5'}"


def test_hdf5(tmp_path: Path) -> None:
    name = hdf5(tmp_path)
    data = load_data(DataSettings(name, validation=1 / 3))
    assert (len(data.train), len(data.validation), len(data.test)) == (4, 2, 2)
    assert (data.classes, data.channels, data.image_size, data.augment) == (5, 3, 4, "crop+flip")
    with h5py.File(tmp_path / "data.h5") as file:
        assert torch.equal(data.test.images, torch.from_numpy(file["test/images"][()]).permute(0, 3, 1, 2))
    assert DataSettings(name).label() == "data"
    assert load_data(DataSettings(name, augment="none")).augment == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test/labels": None}, "has no dataset 'test/labels'"),
        ({"train/images": "group"}, "has no dataset 'train/images'"),
        (
            {"train/images": np.zeros((6, 4, 4, 3), np.float32)},
            r"train/images is float32 \(6, 4, 4, 3\); it must be uint8",
        ),
        ({"train/images": np.zeros((6, 3, 4, 4), np.uint8)}, "it must be uint8"),
        ({"train/images": np.zeros((6, 48), np.uint8)}, "it must be uint8"),
        ({"train/labels": np.zeros(5, np.int64)}, r"train/labels is int64 \(5,\); it must be integers \(6,\)"),
        ({"train/labels": np.zeros((6, 1), np.int64)}, "it must be integers"),
        ({"train/labels": np.zeros(6)}, "train/labels is float64"),
        ({"train/labels": np.array([0, 1, -1, 0, 1, 2])}, "train/labels holds -1; classes are 0, 1"),
        (
            {"train/images": np.zeros((0, 4, 4, 3), np.uint8), "train/labels": np.zeros(0, int)},
            "train/images holds no im",
        ),
        ({"test/images": np.zeros((0, 4, 4, 3), np.uint8), "test/labels": np.zeros(0, int)}, "test/images holds no im"),
        ({"test/images": np.zeros((2, 5, 5, 3), np.uint8)}, "must be square and of one shape"),
        ({"test/images": np.zeros((2, 4, 4, 1), np.uint8)}, r"got train \(4, 4, 3\) and test \(4, 4, 1\)"),
        ({"train/images": np.zeros((6, 4, 5, 3), np.uint8)}, "must be square"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_bad_hdf5(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(AutoSparseError, match=message):
        load_data(hdf5(tmp_path, **changes))


def test_files_that_are_not_hdf5(tmp_path: Path) -> None:
    name = hdf5(tmp_path)
    path = tmp_path / "data.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(AutoSparseError, match="not a readable HDF5 file, or truncated"):
        load_data(name)
    path.write_text("not HDF5")
    with pytest.raises(AutoSparseError, match="not a readable HDF5 file"):
        load_data(name)
    with pytest.raises(AutoSparseError, match="the file does not exist"):
        load_data(f"hdf5:{tmp_path}/none.h5")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 4), ("val", 2)):
        for label, value in (("cat", 50), ("dog", 200)):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12 + i, 9), (value, 0, 255)).save(tmp_path / part / label / f"{i}.png")
    return tmp_path


def test_imagefolder(folder: Path) -> None:
    data = load_data(DataSettings(f"imagefolder:{folder}", image_size=8, validation=0.25))
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 2, 4)
    assert (data.classes, data.channels, data.image_size, data.augment) == (2, 3, 8, "crop+flip")
    assert data.test.images.shape == (4, 3, 8, 8)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.test.images[:, 0, 0, 0].tolist() == [50, 50, 200, 200]


def test_bad_imagefolders(folder: Path) -> None:
    settings = DataSettings(f"imagefolder:{folder}", image_size=8)
    with pytest.raises(AutoSparseError, match=r"set data\.image_size"):
        load_data(f"imagefolder:{folder}")
    with pytest.raises(AutoSparseError, match=r"needs the folders .*/none/train"):
        load_data(f"imagefolder:{folder}/none")
    damaged = folder / "train" / "cat" / "0.png"
    whole = damaged.read_bytes()
    for content in (b"", b"no image", whole[:40], whole[:45] + b"\xff" * 8 + whole[53:]):
        damaged.write_bytes(content)
        with pytest.raises(AutoSparseError, match=r"image .*train/cat/0\.png cannot be read: .*; remove or replace it"):
            load_data(settings)
    damaged.write_bytes(whole)


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    for name, value in (("n02", 200), ("n01", 50)):
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), (value,) * 3).save(root / "train" / name / "images" / f"{i}.JPEG")
    Image.new("L", (64, 64), 200).save(root / "val" / "images" / "v.JPEG")
    (root / "train" / ".ipynb_checkpoints" / "images").mkdir(parents=True)
    for hidden in (".ipynb_checkpoints/images/0.JPEG", "n01/images/._0.JPEG"):
        (root / "train" / hidden).write_bytes(b"")
    settings = DataSettings("tiny_imagenet", root=str(tmp_path), validation=0, image_size=32)
    with pytest.raises(AutoSparseError, match=r"tiny-imagenet-200 is incomplete \(.*val_annotations"):
        load_data(settings)
    (root / "val" / "val_annotations.txt").write_text("v.JPEG\tn02\t0\t0\t62\t62\n")
    data = load_data(settings)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test.labels.tolist() == [1]
    assert (data.train.images[:, 0, 0, 0] > 100).tolist() == [False] * 3 + [True] * 3
    assert data.test.images.shape == (1, 3, 32, 32)
    (root / "val" / "val_annotations.txt").write_text("v.JPEG\tn77\n")
    with pytest.raises(AutoSparseError, match="is incomplete"):
        load_data(settings)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_torchvision_sets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchvision gives, in its various layouts, without its files."""
    side, channels = (28, 1) if "mnist" in name else (32, 3)

    def fake(root: str, download: bool, train: bool = True, split: str = "train") -> SimpleNamespace:
        assert (root, download) == (str(tmp_path), True)
        count = 20 if train and split == "train" else 10
        images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, side, side, channels), np.uint8)
        labels = np.arange(count) % 10
        if name == "svhn":
            return SimpleNamespace(data=images.transpose(0, 3, 1, 2), labels=labels)
        if channels == 1:
            return SimpleNamespace(data=torch.from_numpy(images[..., 0]), targets=torch.from_numpy(labels))
        return SimpleNamespace(data=images, targets=labels.tolist())

    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
    monkeypatch.setattr(f"torchvision.datasets.{kind.get(name, 'SVHN')}", fake)
    data = load_data(DataSettings(name, root=str(tmp_path), validation=0))
    assert (data.channels, data.image_size, data.classes, len(data.train), len(data.test)) == (
        channels,
        side,
        10,
        20,
        10,
    )
    assert torch.equal(data.test.images, data.test.images[:, :1, :1, :1].expand_as(data.test.images))
    assert (data.test.images[:, 0, 0, 0] % 10).tolist() == data.test.labels.tolist()
    assert data.augment == ("crop+flip" if name.startswith("cifar") else "none")


def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route to host\nat line 7")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fail)
    with pytest.raises(AutoSparseError, match=r"CIFAR10 is not under .* \(no route to host\): .*set data\.root"):
        load_data(DataSettings("cifar10", root=str(tmp_path)))
    with pytest.raises(AutoSparseError, match="tiny-imagenet-200 does not exist and cannot be downloaded"):
        load_data(DataSettings("tiny_imagenet", root=str(tmp_path)))


# -- images ----------------------------------------------------------------------------------------------------------


def decoded(path: Path) -> list[list[int]]:
    """The pixels of a square image, row by row, at its own size."""
    with Image.open(path) as image:
        side = image.size[0]
    return _images([(path, 0)], side)[0].reshape(-1, 3).tolist()


def grey(*values: int) -> list[list[int]]:
    return [[v, v, v] for v in values]


def png(depth: int, colour: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one pixel, written by hand: Pillow writes no 16 bits with colour or alpha."""
    head = struct.pack(">IIBBBBB", 1, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


SHORTS = np.array([[0, 257 * 10], [257 * 100 + 128, 65535]], np.uint16)  # 0, 10, 100.498, 255


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_16_bits_are_scaled_by_their_type(name: str, tmp_path: Path) -> None:
    Image.fromarray(SHORTS).save(tmp_path / name)
    assert decoded(tmp_path / name) == grey(0, 10, 100, 255)


def test_two_16_bit_images_share_one_scale(tmp_path: Path) -> None:
    """No image is stretched to its own extremes: a dark one stays dark."""
    Image.fromarray(np.full((2, 2), 257 * 3, np.uint16)).save(tmp_path / "dark.png")
    assert decoded(tmp_path / "dark.png") == grey(3, 3, 3, 3)


@pytest.mark.parametrize(
    ("content", "pixel"),
    [
        (png(16, 2, struct.pack(">3H", 65535, 32768, 255)), [255, 128, 0]),
        (png(16, 6, struct.pack(">4H", 65535, 0, 0, 0)), [255, 255, 255]),
        (png(16, 4, struct.pack(">2H", 25700, 65535)), [100, 100, 100]),
        (png(16, 0, struct.pack(">H", 25700)), [100, 100, 100]),
        (png(16, 0, struct.pack(">H", 25700), (b"tRNS", struct.pack(">H", 25700))), [255, 255, 255]),
        (png(16, 0, struct.pack(">H", 25700), (b"tRNS", struct.pack(">H", 25701))), [100, 100, 100]),
    ],
    ids=["rgb", "rgba", "la", "grey", "transparent grey", "other transparent grey"],
)
def test_png_of_16_bits(content: bytes, pixel: list[int], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert decoded(tmp_path / "a.png") == [pixel]


def test_tiff_of_12_bits_and_white_is_zero(tmp_path: Path) -> None:
    def tiff(bits: int, photometric: int, row: bytes) -> Path:
        tags = [(256, 2), (257, 2), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 2)]
        tags.append((279, len(row)))
        entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
        body = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
        path = tmp_path / f"{bits}-{photometric}.tif"
        path.write_bytes(body.ljust(122, b"\0") + row)
        return path

    twelve = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00])  # 0, 4095 | 2048, 0
    assert decoded(tiff(12, 1, twelve)) == grey(0, 255, 128, 0)
    assert decoded(tiff(16, 0, struct.pack("<4H", *SHORTS.flatten()))) == grey(255, 245, 155, 0)  # 154.502 → 155


def test_floats_in_the_unit_interval(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.1], [0.5, 1]], np.float32)).save(tmp_path / "a.tif")
    assert decoded(tmp_path / "a.tif") == grey(0, 26, 128, 255)  # 25.5 is 25.50000038 in float32


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.array([[0, 255]] * 2, np.float32), r"it holds floats outside \[0, 1\]"),
        (np.array([[0, -0.1]] * 2, np.float32), r"it holds floats outside \[0, 1\]"),
        (np.array([[0, np.nan]] * 2, np.float32), r"it holds floats outside \[0, 1\]"),
        (np.array([[0, 65535]] * 2, np.int32), "it holds integers of more than 16 bits"),
    ],
    ids=["large", "negative", "nan", "int32"],
)
def test_images_without_a_known_white_are_refused(pixels: np.ndarray, reason: str, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(AutoSparseError, match=rf"^image .*/a\.tif cannot be read: {reason}.*; remove or replace it$"):
        decoded(tmp_path / "a.tif")


def palette() -> Image.Image:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    return image


@pytest.mark.parametrize(
    ("image", "name", "options", "pixel"),
    [
        (Image.new("RGBA", (1, 1), (100, 0, 255, 128)), "a.png", {}, [177, 127, 255]),  # 100·128/255 + 127 = 177.2
        (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), "a.tif", {}, [255, 255, 255]),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 255)), "a.png", {}, [1, 2, 3]),
        (Image.new("LA", (1, 1), (100, 128)), "a.png", {}, [177, 177, 177]),
        (Image.new("RGB", (1, 1), (9, 8, 7)), "a.png", {"transparency": (9, 8, 7)}, [255, 255, 255]),
        (Image.new("L", (1, 1), 9), "a.png", {"transparency": 9}, [255, 255, 255]),
        (palette(), "a.png", {}, [200, 100, 50]),
        (palette(), "a.png", {"transparency": 1}, [255, 255, 255]),
        (palette(), "a.png", {"transparency": b"\xff\x80"}, [227, 177, 152]),  # 200·128/255 + 127 = 227.4
        (palette(), "a.gif", {"transparency": 1}, [255, 255, 255]),
        (Image.new("1", (1, 1), 1), "a.png", {}, [255, 255, 255]),
        (Image.new("CMYK", (1, 1), (0, 255, 0, 0)), "a.tif", {}, [255, 0, 255]),
        (Image.new("RGB", (1, 1), "red"), "a.gif", {"save_all": True, "append_images": [Image.new("RGB", (1, 1))]}, [255, 0, 0]),
        (Image.new("RGB", (1, 1), "red"), "a.tif", {"save_all": True, "append_images": [Image.new("RGB", (1, 1))]}, [255, 0, 0]),
    ],
    ids=[
        "rgba", "clear", "opaque", "la", "rgb+transparent", "l+transparent", "palette", "palette+transparent",
        "palette+alpha", "gif+transparent", "1 bit", "cmyk", "animated", "pages",
    ],
)  # fmt: skip
def test_other_kinds_of_pixels(
    image: Image.Image, name: str, options: dict[str, Any], pixel: list[int], tmp_path: Path
) -> None:
    image.save(tmp_path / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(tmp_path / name) == [pixel]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize(("orientation", "order"), [(1, "abcd"), (2, "badc"), (3, "dcba"), (6, "cadb"), (8, "bdac")])
def test_the_exif_orientation_is_applied(orientation: int, order: str, name: str, tmp_path: Path) -> None:
    """2 mirrors, 3 turns by 180°, 6 by 90° clockwise, 8 by 90° the other way."""
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.array([[0, 80], [160, 240]], np.uint8)).convert("RGB")
    image.save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
    assert decoded(tmp_path / name) == grey(*({"a": 0, "b": 80, "c": 160, "d": 240}[pixel] for pixel in order))


@pytest.mark.parametrize("factor", [1.5, 3])
def test_a_decompression_bomb_is_one_line(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow only warns up to twice its limit, without the name of the file."""
    Image.new("L", (30, 10)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(300 / factor))
    with pytest.raises(
        AutoSparseError, match=r"^image .*/bomb\.png cannot be read: Image size \(300 pixels\).*bomb[^\n]*$"
    ):
        _images([(tmp_path / "bomb.png", 0)], 8)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.tif", "a.webp", "a.bmp", "a.ppm", "a.jp2", "a.avif"])
def test_truncated_and_damaged_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for keep in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:keep])
        with pytest.raises(AutoSparseError, match=rf"image .*{name} cannot be read: .*; remove or replace it"):
            _images([(path, 0)], 8)


# -- folders ---------------------------------------------------------------------------------------------------------


def image_at(path: Path, value: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value,) * 3).save(path)


def test_hidden_folders_and_files_are_neither_classes_nor_images(folder: Path) -> None:
    settings = DataSettings(f"imagefolder:{folder}", image_size=8, validation=0)
    before = load_data(settings)
    image_at(folder / "train" / ".ipynb_checkpoints" / "0.png")
    image_at(folder / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (folder / "train" / "dog" / "._0.png").write_bytes(b"what macOS leaves beside 0.png")
    (folder / "train" / ".DS_Store").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_data(settings).content == before.content
    image_at(folder / "train" / "cat" / "more" / "1.PNG")  # folders of folders, and suffixes in capitals, count
    assert load_data(settings).train.labels.bincount().tolist() == [5, 4]


def test_files_that_are_no_images_are_told(folder: Path) -> None:
    settings = DataSettings(f"imagefolder:{folder}", image_size=8)
    (folder / "val" / "dog" / "labels.txt").write_text("dog")
    with pytest.warns(UserWarning, match=r"files of other kinds than .* are ignored: .*/val/dog/labels\.txt$"):
        load_data(settings)


def renamed(folder: Path) -> None:
    (folder / "val" / "cat").rename(folder / "val" / "cow")


def emptied(folder: Path) -> None:
    for file in (folder / "val" / "cat").iterdir():
        file.unlink()


def one_more(folder: Path) -> None:
    for label in "abcdefg":
        image_at(folder / "train" / label / "0.png")


def flat(folder: Path) -> None:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / split / label / "0.png").rename(folder / split / f"{label}.png")
            for file in (folder / split / label).iterdir():
                file.unlink()
            (folder / split / label).rmdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed,
            r"train and val hold different classes \(only train has cat; only val has cow\); give both the same$",
        ),
        (one_more, r"different classes \(only train has a, b, c, d, e and 2 more\); give"),
        (emptied, r"no images \(\.jpg .*\) in val/cat; put some there, or delete these class folders"),
        (flat, r"/train has no class folders; put the images into train/CLASS/"),
    ],
    ids=["renamed", "more", "empty", "flat"],
)
def test_bad_class_folders(change: Callable[[Path], None], message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(AutoSparseError, match=rf"^data imagefolder:.*: .*{message}"):
        load_data(DataSettings(f"imagefolder:{folder}", image_size=8))
