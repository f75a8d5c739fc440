"""`autosparse diagnose`: states of one network on tiny digits, stopped and resumed, and one line for whatever is wrong."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from autosparse import AutoSparseError, Masks
from autosparse.cli import main
from autosparse.experiment import states as module
from autosparse.experiment.candidates import Candidate
from autosparse.experiment.states import State, states
from autosparse.files import write_json, write_safetensors
from autosparse.jobs.status import statuses
from autosparse.report.collect import read_diagnosis
from autosparse.report.figures import plot_diagnosis
from autosparse.report.page import build, diagnosis_table

Run = Callable[..., tuple[int, str, str]]
CONFIG: dict[str, Any] = {
    "output": "out",
    "model": {"name": "convnet", "width": 4},
    "data": {"name": "digits", "limit": 200, "limit_test": 50},
    "criteria": ["erk", "snip"],
    "sparsity": 0.8,
    "prepare": ["repair"],
    "diagnostics": {"batch_size": 16, "samples": 2, "iterations": 3},
    "device": "cpu",
}
NAMES = ["dense", "erk", "erk+repair", "snip", "snip+repair"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`autosparse diagnose` with changes to the config, in an empty directory: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str, command: str = "diagnose", **changes: Any) -> tuple[int, str, str]:
        Path("config.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([command, "config.yaml", *overrides])
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def rows(name: str) -> list[dict[str, str]]:
    with (Path("out") / name).open() as file:
        return list(csv.DictReader(file))


def test_from_the_dense_network_to_the_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run()
    assert code == 0, err
    assert all(text in out for text in ("convnet-w4 on digits", "snip+repair", "report: out/report.html"))
    layers, summary = rows("diagnosis.csv"), rows("summary.csv")
    assert [row["state"] for row in summary] == NAMES
    assert [row["name"] for row in layers[:4]] == [f"features.{i}.weight" for i in (0, 4, 8)] + ["classifier.weight"]
    assert len(layers) == 5 * 4 and layers[0]["norm"] == "features.1"
    assert [float(row["sparsity"]) for row in summary] == pytest.approx([0, *[0.8] * 4], abs=1e-3)
    repaired = [float(row["lipschitz"]) for row in layers if row["state"] == "erk+repair" and row["norm"]]
    assert repaired == pytest.approx([1, 1, 1], abs=1e-4)
    found = read_diagnosis(Path("out/diagnosis.json"))
    assert [len(state["singular_values"][0]) for state in found] == [10] * 5
    page = Path("out/report.html").read_text()
    assert "How well the network can train" in page and "<svg" in page and "snip+repair" in page
    assert Path("out/figures/diagnosis.svg").is_file()

    # A state more: those that are done are read, masks are not searched again.
    done = {path: path.stat().st_mtime_ns for path in Path("out/states").iterdir()}
    assert len(done) == 5 and len(list(Path("out/masks").iterdir())) == 2
    monkeypatch.setattr(module, "find_masks", lambda *_, **__: pytest.fail("the masks are there already"))
    code, _, err = run("prepare=[repair,rei]")
    assert code == 0, err
    assert [row["state"] for row in rows("summary.csv")] == [*NAMES[:3], "erk+rei", *NAMES[3:], "snip+rei"]
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_it_goes_on_after_a_stop(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = module.diagnose, []

    def stop(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **keywords)

    monkeypatch.setattr(module, "diagnose", stop)
    assert run(criteria=["erk"])[0] == 130
    assert run(criteria=["erk"])[0] == 0 and len(calls) == 4
    assert [row["state"] for row in rows("summary.csv")] == NAMES[:3]


def test_one_that_fails_does_not_stop_the_others(run: Run) -> None:
    greedy = {"criterion": "snip", "label": "greedy", "floor": 0.5}
    code, _, err = run(criteria=[greedy, "erk"])
    assert code == 2 and "floor 0.5 needs" in err and len(err.strip().splitlines()) == 1
    assert [row["state"] for row in rows("summary.csv")] == NAMES[:3]
    (found,) = statuses(Path("out"))
    assert (found.count("done"), found.count("failed"), found.alive) == (3, 2, False)


def test_trained_weights_and_their_masks(run: Run) -> None:
    ours = {key: CONFIG[key] for key in ("model", "data", "device")}
    Path("prune.yaml").write_text(yaml.safe_dump({**ours, "output": "pruned", "criterion": "erk", "sparsity": 0.8}))
    with pytest.raises(SystemExit):
        main(["prune", "prune.yaml"])
    recipe = {"epochs": 1, "batch_size": 50}
    files = {"masks": "pruned/masks.safetensors"}
    trained = {**ours, **files, "output": "trained", "recipe": recipe, "tracking": False}
    Path("train.yaml").write_text(yaml.safe_dump(trained))
    with pytest.raises(SystemExit):
        main(["train", "train.yaml"])
    code, _, err = run(weights="trained/model.safetensors", **files, criteria=[])
    assert code == 0, err
    dense, masked, repaired = rows("summary.csv")
    assert [row["state"] for row in (dense, masked, repaired)] == ["dense", "masks", "masks+repair"]
    assert dense["loss"] == masked["loss"] != repaired["loss"]  # its pruned weights are zero already
    assert float(dense["gradient_norm"]) > float(masked["gradient_norm"])
    before = float(dense["loss"])
    assert run(masks=files["masks"], criteria=[], output="new")[0] == 0
    with open("new/summary.csv") as file:
        assert float(next(csv.DictReader(file))["loss"]) != before


def test_hessians_and_jacobian_may_be_left_out(run: Run) -> None:
    code, _, err = run("diagnostics.samples=0", "diagnostics.iterations=0", criteria=[])
    assert code == 0, err
    (row,) = rows("summary.csv")
    assert math.isnan(float(row["jacobian_mean"])) and math.isnan(float(row["hessian_max"]))
    axes = plot_diagnosis(read_diagnosis(Path("out/diagnosis.json"))).axes
    assert [ax.get_ylabel().split("\n")[0] for ax in axes] == ["Lipschitz", "second moment", "gradient norm"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prepare": ["repare"]}, "prepare is 'repare': did you mean 'repair'?"),
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"criteria": ["snap"]}, "criterion is 'snap'"),
        ({"prepare": ["signs"]}, "prepare of erk is 'signs': signs need a method that searches by training"),
        ({"criteria": ["erk", "erk"]}, "state is 'erk': it is there twice: give criteria a label"),
        (
            {"criteria": ["reinit:erk"]},
            "criteria is 'reinit:erk': diagnose measures masks on the network's own weights",
        ),
        ({"criteria": [{"criterion": "erk", "prepare": "rei"}]}, "prepare of erk is 'rei': prepare of the config adds"),
        ({"weights": "no.safetensors"}, "weights file no.safetensors does not exist: check the path"),
        ({"masks": "no.safetensors"}, "masks file no.safetensors does not exist: check the path"),
        ({"weights": "config.yaml"}, "config.yaml cannot be read as weights: "),
        (
            {"weights": "plain.safetensors"},
            "plain.safetensors holds 'far.weight', unlike",
        ),
        ({"masks": "other.safetensors"}, "other.safetensors holds other, not autosparse.masks/1"),
        ({"masks": "masks.safetensors"}, "masks hold 'far.weight', which ConvNet does not have"),
        ({"diagnostics": {"iterations": -1}}, "iterations is -1: give at least 0"),
        ({"diagnostics": {"steps": 1}}, "unknown key 'diagnostics.steps'"),
    ],
)
def test_mistakes_are_told_in_one_line(run: Run, changes: dict[str, Any], message: str) -> None:
    write_safetensors(Path("other.safetensors"), {"far.weight": torch.ones(2)}, "other")
    save_file({"far.weight": torch.ones(2)}, "plain.safetensors")
    Masks({"far.weight": torch.ones(2, dtype=torch.bool)}).save("masks.safetensors")
    code, _, err = run(**changes)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


def test_another_config_does_not_take_the_directory(run: Run) -> None:
    assert run(criteria=[])[0] == 0
    code, _, err = run(criteria=[], sparsity=0.9)
    assert code == 2 and "there sparsity is 0.8, here 0.9" in err


def test_names_and_order_of_states() -> None:
    found = states([Candidate("erk"), Candidate("snip", label="s")], None, ["repair", "rei"])
    assert [s.name for s in found] == ["dense", "erk", "erk+repair", "erk+rei", "s", "s+repair", "s+rei"]
    keys = {state.key("") for state in found}
    assert len(keys) == 7 and all(re.fullmatch(r"[A-Za-z0-9.+_-]+", key) for key in keys)
    # What it is called does not count, what it does counts.
    named = [State(Candidate("erk", label="a", steps=n)).key("").rpartition("_")[2] for n in (1, 1, 2)]
    assert named[0] == named[1] != named[2]
    with pytest.raises(AutoSparseError, match="state is 'erk\\+repair': it is there twice"):
        states([Candidate("erk")], None, ["repair", "repair"])


def layer(name: str, **values: Any) -> dict[str, Any]:
    figures = ("spectral_norm", "operator_norm", "lipschitz", "second_moment", "gradient_norm", "hessian_norm")
    return {"name": name, "kept": 1, "total": 2, "norm": None, **dict.fromkeys(figures, 1.0), **values}


def write_states(path: Path, *all_layers: list[dict[str, Any]]) -> None:
    keys = ("sparsity", "dead_layers", "loss", "gradient_norm", "relative_gradient", "lipschitz_max", "hessian_max")
    network = dict.fromkeys((*keys, "hessian_spread", *(f"jacobian_{k}" for k in ("mean", "std", "min", "max"))), 1.0)
    found = [
        {"state": f"s{i}", "criterion": f"s{i}", "prepare": None, "network": network, "layers": layers}
        for i, layers in enumerate(all_layers)
    ]
    write_json(path, {"states": [{**s, "singular_values": [[2.0, 0.0]]} for s in found]})


def test_a_figure_of_zeros_infinities_and_many_layers(tmp_path: Path) -> None:
    odd = [layer("a", hessian_norm=0.0, lipschitz=math.inf), layer("b", gradient_norm=math.nan)]
    write_states(tmp_path / "diagnosis.json", odd, [layer(f"l{i}") for i in range(70)], [layer("a", hessian_norm=0.0)])
    page = build(tmp_path).read_text()
    assert "3 diagnosed networks" in page and "<svg" in page
    headers, lines = diagnosis_table(read_diagnosis(tmp_path / "diagnosis.json"))
    assert len(headers) == len(lines[0]) and [line[0] for line in lines] == ["s0", "s1", "s2"]


def test_a_damaged_file_is_a_note(tmp_path: Path) -> None:
    for name, some in (("bad", []), ("worse", [{"state": "x"}]), ("none", [])):
        write_json(tmp_path / name / "diagnosis.json", {"states": some})
    (tmp_path / "bad" / "diagnosis.json").write_text("{")
    write_states(tmp_path / "good" / "diagnosis.json", [layer("a")])
    page = build(tmp_path).read_text()
    assert page.count("diagnosis.json ignored: ") == 3
    assert "How well the network can train: good" in page
