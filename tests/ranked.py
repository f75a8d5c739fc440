"""Networks and a job that `test_ddp` trains on several devices; a module of its own, quick to import in many processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from autosparse.training.data import DataSettings, load_data
from autosparse.training.recipe import Recipe
from autosparse.training.train import train


class Net(nn.Module):
    """Without batch norm; with a weight that has no gradient, a buffer that steps change, and one that no file keeps."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
        self.idle = nn.Linear(3, 3)
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return self.body(x)


class Doomed(Net):
    """Its second rank is killed in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.body(x)


class Buggy(Net):
    """Its second rank raises in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and distributed.is_initialized() and distributed.get_rank() == 1:
            raise ZeroDivisionError("of rank 1")
        return self.body(x)


def net(kind: type[Net] = Net) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind()


class Loud(Net):
    """Says which process trains it."""

    place = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            (Path(self.place) / str(os.getpid())).touch()
        return self.body(x)


def endless(place: str, *, device: str, progress: Any) -> None:
    """A job for the executor."""
    model = net(Loud)
    model.place = place
    recipe = Recipe(epochs=10**6, batch_size=16, lr=1e-6)
    train(model, load_data(DataSettings("digits", limit=96)), recipe, device=device)
