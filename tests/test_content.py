"""A result is known by the content of all that went in, not by names."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from autosparse.cli import main
from autosparse.experiment.benchmark import with_inputs
from autosparse.experiment.candidates import Candidate
from autosparse.experiment.states import State
from autosparse.files import fingerprint, sha256
from autosparse.masks.mask import Masks
from autosparse.training.content import of_network, of_start
from autosparse.training.data import DataSettings, ImageData, load_data

torch.set_num_threads(1)


def test_a_fingerprint_tells_everything_apart_and_nothing_else() -> None:
    zeros = torch.zeros(2, 3)
    facts: list[Any] = [
        (), (None,), (0,), (False,), (0.0,), ("0",), (b"0",), ([],), ({},), ([0], 0), ([0, 0],), ({"a": 0},), ({"b": 0},),
        (zeros,), (zeros.T,), (zeros.double(),), (zeros.bool(),), (zeros + 1,), (torch.zeros(6),),
        (DataSettings("digits"),), (DataSettings("digits", limit=5),),
    ]  # fmt: skip
    assert len({fingerprint(*one) for one in facts}) == len(facts)
    assert fingerprint({"a": 1, "b": zeros}) == fingerprint({"b": zeros.clone(), "a": 1})
    assert fingerprint((1, 2)) == fingerprint([1, 2]), "as JSON gives it back"
    ramp = torch.arange(6.0).view(2, 3)
    assert fingerprint(ramp.T.contiguous().T) == fingerprint(ramp), "the layout in memory does not count"
    assert fingerprint(torch.zeros(0)) != fingerprint(torch.zeros(0, dtype=torch.int64)), "as labels that none validate"
    with pytest.raises(TypeError, match="object has no fingerprint"):
        fingerprint(object())


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = sha256(path)
    assert sha256(path) == first
    path.write_bytes(b"other")
    assert sha256(path) != first


def test_images_are_known_by_what_they_are(digits: ImageData) -> None:
    again = load_data(DataSettings("digits", limit=96, limit_test=40, validation=1 / 3, root="elsewhere"))
    assert again.content == digits.content == digits.to("cpu").content
    for name in ("train", "validation", "test"):
        split = getattr(digits, name)
        for part in ("images", "labels"):
            changed = getattr(split, part).clone()
            changed[-1] += 1
            assert replace(digits, **{name: replace(split, **{part: changed})}).content != digits.content
    assert replace(digits, augment="crop").content != digits.content


def test_a_network_is_known_by_its_weights_and_modules(convnet: Callable[..., nn.Module]) -> None:
    assert of_network(convnet()) == of_network(convnet()) != of_network(convnet(seed=1))
    nets = [nn.Sequential(nn.Linear(2, 2), act) for act in (nn.ReLU(), nn.GELU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2))]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    assert len({of_network(net) for net in nets}) == 4
    norm = nn.BatchNorm1d(2)
    before = of_network(norm)
    norm.running_mean += 1
    assert of_network(norm) != before, "buffers count"


def test_a_network_from_elsewhere_is_known_by_its_source(
    tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return {}\n"
    (tmp_path / "elsewhere.py").write_text(source.format("x"))
    module = importlib.import_module("elsewhere")
    one = of_start(module.Net(), digits)
    assert of_start(module.Net(), digits) == one
    (tmp_path / "elsewhere.py").write_text(source.format("2 * x"))
    assert of_start(module.Net(), digits) != one


def test_a_state_is_known_by_its_masks(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    Masks({"a": torch.tensor([True, False])}).save(path)
    key = State(path).key("start")
    assert State(path).key("another start") != key
    Masks({"a": torch.tensor([False, True])}).save(path)
    assert State(path).key("start") != key
    assert State(Candidate("snip")).key("start") != State(Candidate("snip", steps=2)).key("start")


# -- the commands -------------------------------------------------------------------------------------------------------


def write_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    with h5py.File("images.h5", "w") as file:
        for split, count in (("train", 40), ("test", 20)):
            file[f"{split}/images"] = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
            file[f"{split}/labels"] = np.arange(count) % 2


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command on a config of two classes of random images, and give what it says."""
    monkeypatch.chdir(tmp_path)
    write_images(0)
    recipe = {"epochs": 1, "batch_size": 20, "lr": 0.05}
    common = {"data": "hdf5:images.h5", "device": "cpu", "tracking": False, "recipe": recipe}

    def command(name: str, **config: Any) -> str:
        if name == "prune":
            config = {k: v for k, v in (common | config).items() if k != "tracking"}
        elif name != "report":
            config = common | config
        Path("config.yaml").write_text(json.dumps(config))
        with pytest.raises(SystemExit) as end:
            main([name, "config.yaml"])
        said = capsys.readouterr()
        assert end.value.code in (0, None), said.err
        return said.out

    return command


MLP = {"name": "mlp", "width": 4}


def test_commands_know_their_results_by_content(run: Callable[..., str]) -> None:
    """A second start is complete; with other images or masks under the same names it is done anew."""

    def prune() -> str:
        return run("prune", output="prune", model=MLP, criterion="snip", sparsity=0.5)

    def train() -> str:
        return run("train", output="train", model=MLP, masks="prune/masks.safetensors")

    def benchmark() -> dict[str, str]:
        run("benchmark", output="benchmark", models=[MLP], criteria=["snip"], sparsities=[0.5], seeds=[0])
        with open("benchmark/results.csv", newline="") as file:
            return {row["criterion"]: row["loss"] for row in csv.DictReader(file)}

    assert "complete" not in prune() and "complete" in prune()
    assert "complete" not in train() and "complete" in train()
    first = benchmark()
    assert benchmark() == first and len(list(Path("benchmark/cells").glob("*.json"))) == 2

    masks = Masks.load("prune/masks.safetensors")
    Masks({n: ~m for n, m in masks.items()}, masks.layer_info, masks.report).save("prune/masks.safetensors")
    said = train()
    assert "trained anew: the masks are not those of the result in train" in said and "complete" not in said
    trained = Masks.load("prune/masks.safetensors")
    from safetensors.torch import load_file

    weights = load_file("train/model.safetensors")
    assert all(not weights[name][~mask].any() for name, mask in trained.items())
    assert "complete" in train()

    write_images(1)
    assert "complete" not in prune()
    assert "trained anew: the images and the masks are not" in train() and "complete" in train()
    assert all(benchmark()[name] != loss for name, loss in first.items())
    assert len(list(Path("benchmark/cells").glob("*.json"))) == 4


def test_cells_are_known_by_their_start(digits: ImageData) -> None:
    from autosparse.experiment.benchmark import grid
    from autosparse.training.models import ModelSettings
    from autosparse.training.recipe import Recipe

    models = [ModelSettings("mlp", 4), ModelSettings("mlp", 5)]
    cells = grid(models, DataSettings("digits"), Recipe(), [Candidate("snip")], [0.5], [0, 1])
    known = with_inputs(cells, digits)
    assert [c.inputs for c in known[::2]] == [c.inputs for c in known[1::2]], "dense and pruned begin alike"
    assert len({c.inputs for c in known}) == 4 and len({c.key() for c in known}) == 8
    assert [c.key() for c in with_inputs(known, digits)] == [c.key() for c in known]
    assert not {c.key() for c in with_inputs(cells, replace(digits, augment="crop"))} & {c.key() for c in known}
