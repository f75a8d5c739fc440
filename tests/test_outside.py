"""Criteria and data sets of users, named as package.module:name."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import autosparse
from autosparse.cli import main
from autosparse.commands.loading import load_config, plain
from autosparse.commands.schemas import PruneConfig
from autosparse.errors import AutoSparseError
from autosparse.experiment.candidates import Candidate, identity
from autosparse.plugins import is_outside, source_of
from autosparse.training.data import load_data
from autosparse.training.models import create_model

BATCHES = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,)))]


def test_what_is_a_name_from_outside():
    assert is_outside("a.b:c") and is_outside("outside:largest")
    assert not any(map(is_outside, ("snip", "hdf5:data/a.h5", "models:/a/1", "a:b:c", "a b:c", ":c", "a:")))


@pytest.mark.parametrize(("mine", "theirs"), [("largest", "magnitude"), ("saliency", "snip")])
def test_a_function_is_a_criterion(mine: str, theirs: str):
    model = create_model("convnet", in_channels=1, classes=10, image_size=8)
    masks = autosparse.prune(model, 0.8, f"outside:{mine}", batches=BATCHES)
    assert masks == autosparse.prune(model, 0.8, theirs, batches=BATCHES)
    assert masks.report.origin["criterion"] == f"outside:{mine}"


def test_the_command_finds_modules_where_it_is_run(tmp_path: Path):
    """As the installed script does, which does not have the current folder on its path by itself (-P)."""
    (tmp_path / "mine_here.py").write_text(
        "def small(signals, context):\n    return {n: -w.abs() for n, w in signals['weight'].items()}\n\n\nsmall.signals = ('weight',)\n"
    )
    command = "from autosparse.cli import main; main()"
    (tmp_path / "c.yaml").write_text("model: convnet\ndata: digits\n")
    given = ["c.yaml", "device=cpu", "criterion=mine_here:small", "output=out"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", command, "prune", *given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    masks = autosparse.Masks.load(tmp_path / "out" / "masks.safetensors")
    assert masks.report.origin["criterion"] == "mine_here:small"


def test_a_preset_brings_its_settings():
    model = create_model("convnet", in_channels=1, classes=10, image_size=8)
    masks = autosparse.prune(model, 0.8, "outside:preset", batches=BATCHES)
    assert (masks.report.origin["scope"], masks.report.origin["steps"]) == ("erk", 2)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("outside:unnamed", "a function .* with an attribute `signals`"),
        ("outside:missing", "has no attribute 'missing'.*importable"),
        ("nowhere:largest", "No module named 'nowhere'.*PYTHONPATH"),
    ],
)
def test_what_cannot_be_a_criterion_is_one_line(name: str, match: str):
    with pytest.raises(AutoSparseError, match=match):
        autosparse.prune(torch.nn.Linear(4, 4), 0.5, name, example_input=torch.ones(1, 4))


def test_a_reader_gives_a_data_set():
    data = load_data("outside:stripes")
    assert (data.classes, data.channels, data.image_size, len(data.test)) == (2, 1, 8, 10)
    assert data.test.images[0, 0, :, 0].tolist() == [255, 0] * 4
    with pytest.raises(AutoSparseError, match=r"outside:no_images.*must give four arrays"):
        load_data("outside:no_images")


def test_in_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    config = {
        "models": [{"name": "convnet", "width": 4}],
        "data": {"name": "outside:stripes", "validation": 0},
        "criteria": ["outside:largest", "densities:outside:largest", {"criterion": "outside:method", "epochs": 2}],
        "recipe": {"epochs": 2, "batch_size": 10},
        "sparsities": [0.5],
        "seeds": [0],
        "executor": "inline",
        "tracking": False,
    }
    Path("c.yaml").write_text(yaml.safe_dump(config))
    main_code = None
    try:
        main(["benchmark", "c.yaml"])
    except SystemExit as end:
        main_code = end.code
    assert main_code == 0, capsys.readouterr().err
    assert "densities:outside:largest" in capsys.readouterr().out
    rows = {
        row["criterion"]: row
        for row in csv.DictReader(next(Path("runs").rglob("results.csv")).read_text().splitlines())
    }
    assert float(rows["outside:method"]["mask_epochs"]) == 2 and float(rows["outside:method"]["sparsity_got"]) == 0.5


def test_a_result_is_known_by_the_source():
    assert identity(Candidate("outside:largest"))["source"] == identity(Candidate("outside:saliency"))["source"] != ""
    assert identity(Candidate("outside:method"))["source"] == identity(Candidate("outside:largest"))["source"]


def test_the_settings_of_a_method_are_checked(tmp_path: Path):
    assert Candidate("outside:method", options={"epochs": 3}).options.epochs == 3
    with pytest.raises(AutoSparseError, match="rounds of outside:method is 3: known: epochs"):
        Candidate("outside:method", options={"rounds": 3})
    path = tmp_path / "c.yaml"
    for method, message in {
        "{criterion: outside:method, epochs: 1.5}": "outside:method: epochs is 1.5",
        "{criterion: irp, epoch: 2}": "epoch of irp is .*did you mean 'epochs'",
        "{criterion: kstarts, k: 0}": "kstarts.k is 0: give at least 1",
        "{criterion: kstarts_dissipating, kstarts: {k: many}}": "kstarts.k is 'many'",
    }.items():
        path.write_text(f"{{model: convnet, data: digits, criterion: {method}}}")
        with pytest.raises(AutoSparseError, match=message):
            load_config(PruneConfig, path)
    path.write_text(
        "{model: convnet, data: digits, criterion: {criterion: kstarts_dissipating, kstarts: {k: 3}, between: 0.4}}"
    )
    candidate = load_config(PruneConfig, path).criterion
    assert (candidate.options.kstarts.k, candidate.options.between) == (3, 0.4)
    path.write_text(yaml.safe_dump(plain(load_config(PruneConfig, path))))
    assert load_config(PruneConfig, path).criterion == candidate


def test_an_object_is_known_by_the_code_of_its_class_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that makes an object of a class in another of its files; a function is known by its own file alone."""
    package = tmp_path / "made_elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("from made_elsewhere.kinds import Kind, rule\n\nkind = Kind()\n")
    (package / "kinds.py").write_text("class Kind:\n    pass\n\n\ndef rule():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("made_elsewhere:kind", "made_elsewhere:Kind", "made_elsewhere:rule")
    kind, of_class, rule = map(source_of, names)
    assert of_class == rule != kind
    with (package / "__init__.py").open("a") as file:
        file.write("# changed\n")
    assert source_of("made_elsewhere:kind") != kind
    assert source_of("made_elsewhere:Kind") == of_class == source_of("made_elsewhere:rule")
    kind = source_of("made_elsewhere:kind")
    with (package / "kinds.py").open("a") as file:
        file.write("# changed\n")
    assert source_of("made_elsewhere:kind") != kind and source_of("made_elsewhere:rule") != rule
