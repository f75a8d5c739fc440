"""Narrow networks live through the fault of oneDNN in docs/known-faults.md, whatever the layout of their inputs."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from autosparse.network.onednn import faulty_convolution, safe_convolutions
from autosparse.training.data import DataSettings, load_data
from autosparse.training.loop import _layout

# On a CPU with AVX2 each part of this would crash, some of the time at once, without the guard.
PROGRAM = """
import torch
from torch.nn import functional as F
import autosparse
from autosparse.training.data import DataSettings, load_data
from autosparse.training.recipe import Recipe
from autosparse.training.train import train
from autosparse.training.models import ModelSettings, create_model

torch.set_num_threads(1)
for width in (2, 5, 6):
    model = create_model(ModelSettings("resnet8", width), in_channels=1, classes=10, image_size=8)
    data = load_data(DataSettings("digits", limit=256))
    for channels_last in (False, True):
        train(model, data, Recipe(steps=2, batch_size=64, channels_last=channels_last), device="cpu")
    images = torch.randn(64, 8, 8, 1).permute(0, 3, 1, 2)
    batches = [(images, torch.randint(10, (64,)))] * 2
    for criterion in ("snip", "grasp"):
        autosparse.prune(model, 0.5, criterion, batches=batches)
model = create_model(ModelSettings("resnet8", 7), in_channels=1, classes=10, image_size=32)
images = torch.randn(64, 32, 32, 1).permute(0, 3, 1, 2)
autosparse.prune(model, 0.5, "snip", batches=[(images, torch.randint(10, (64,)))], n_batches=1)
print("alive")
"""


def test_narrow_networks_train_and_are_scored_where_onednn_crashes() -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


@pytest.mark.parametrize(
    ("layer", "faulty"),
    [
        (nn.Conv2d(6, 8, 1, stride=2), True),
        (nn.Conv2d(5, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(7, 8, 1, stride=2), True),
        (nn.Conv2d(8, 8, 1, stride=2), False),
        (nn.Conv2d(5, 8, 1), False),
        (nn.Conv2d(5, 8, 3, stride=2), False),
        (nn.Conv2d(6, 6, 1, stride=2, groups=2), False),
    ],
)
def test_which_convolutions_are_faulty(layer: nn.Module, faulty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    model = nn.Sequential(nn.Conv2d(3, layer.in_channels, 3), layer)
    assert faulty_convolution(model) == ("1" if faulty else None)
    before = torch.backends.mkldnn.enabled
    with safe_convolutions(model):
        assert torch.backends.mkldnn.enabled == (before and not faulty)
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize("name", ["digits", "cifar"])
def test_batches_are_contiguous_to_the_last_stride(name: str, tmp_path) -> None:
    """Also with one channel, where torch takes the strides of NHWC for channels-last."""
    if name == "digits":
        data = load_data(DataSettings("digits", limit=100))
    else:
        import h5py
        import numpy as np

        with h5py.File(tmp_path / "d.h5", "w") as file:
            for split in ("train", "test"):
                file[f"{split}/images"] = np.arange(20 * 4 * 4 * 3, dtype=np.uint8).reshape(20, 4, 4, 3)
                file[f"{split}/labels"] = np.arange(20) % 2
        data = load_data(f"hdf5:{tmp_path / 'd.h5'}")
        assert data.train.images[0, :, 0, 1].tolist() == [3, 4, 5] or len(data.validation) > 0
    channels, side = data.channels, data.image_size
    strides = (channels * side * side, side * side, side, 1)
    batches = [
        next(data.batches()),
        next(iter(data.epoch(8, seed=0))),
        *data.sample(8, 1, 0),
        *data.sample_per_class(2, 0, 8),
    ]
    for images, _ in batches:
        assert images.stride() == strides
        assert _layout(images, channels_last=True).stride() == (channels * side * side, 1, channels * side, channels)
