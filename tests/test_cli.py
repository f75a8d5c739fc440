"""The command line: the whole path on tiny digits, and one clear line for whatever is wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
import yaml
from planted import plant
from safetensors.torch import load_file

import autosparse
from autosparse.cli import app, main
from autosparse.files import read_json
from autosparse.scorers import scorer
from autosparse.scorers.features import DEFAULT
from autosparse.scorers.kinds import build_network
from autosparse.scorers.scorer import Scorer
from autosparse.training.models import create_model
from autosparse.training.train import train

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(
    command.name or str(command.callback.__name__) for command in app.registered_commands if command.callback
)
CONVNET = {"name": "convnet", "width": 4}
TINY: dict[str, Any] = {
    "data": {"name": "digits", "limit": 300, "limit_test": 100},
    "recipe": {"epochs": 1, "batch_size": 50, "lr": 0.05, "schedule": "cosine"},
    "device": "cpu",
    "tracking": False,
}


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty directory; a dict becomes the config file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)

    def call(command: str, *arguments: Any) -> Answer:
        texts = []
        for argument in arguments:
            if isinstance(argument, dict):
                values = {k: v for k, v in argument.items() if not (command == "prune" and k == "tracking")}
                if command == "fit":
                    values = {k: v for k, v in values.items() if k not in ("data", "recipe")}
                if command in ("generate", "benchmark", "check", "shrink", "tune", "quickstart"):
                    values = {"executor": "inline", **values}
                Path(f"{command}.yaml").write_text(yaml.safe_dump(values))
                argument = f"{command}.yaml"
            texts.append(str(argument))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([command, *texts])
        output = capsys.readouterr()
        return Answer(int(caught.value.code or 0), output.out, output.err)

    return call


def refused(answer: Answer, *parts: str, code: int = 2) -> None:
    """One line on stderr that holds the parts, and the exit code."""
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), answer.err
    assert answer.code == code
    for part in parts:
        assert part in lines[0], lines[0]


# -- help ---------------------------------------------------------------------------------------------------------------


def test_help_of_every_command_needs_no_torch() -> None:
    """In a fresh process: help works, shows an example, and imports nothing heavy."""
    code = """
import sys
from autosparse.cli import main
for command in sys.argv[1:]:
    try:
        main([command, "--help"] if command else ["--help"])
    except SystemExit as end:
        assert not end.code, command
    print("=====")
heavy = {"torch", "torchvision", "torch_geometric", "mlflow", "matplotlib", "sklearn", "yaml", "h5py", "numpy"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "", *COMMANDS],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "160"},
    )
    *helps, imported = done.stdout.split("=====\n")
    assert imported.strip() == "[]"
    for command in COMMANDS:
        assert f" {command} " in helps[0], "the first page names every command"
    for command, text in zip(COMMANDS, helps[1:], strict=True):
        assert f"Example: autosparse {command}" in text


def test_every_example_names_a_config_that_exists() -> None:
    for command in app.registered_commands:
        words = (command.epilog or "").split()
        for word in words:
            if word.endswith(".yaml"):
                assert (ROOT / word).is_file(), command.epilog


def test_lists(run: Run) -> None:
    everything = run("list")
    assert everything.code == 0
    for name in (
        "resnet20",
        "digits",
        "snip",
        "gradient",
        "log_saliency",
        "preparations: rei, repair",
        "stamp: filters are chosen for a task",
    ):
        assert name in everything.out
    assert run("list", "models").out.startswith("models: ") and "snip" not in run("list", "models").out
    refused(run("list", "model"), "list 'model': did you mean 'models'?")


def test_unknown_commands_and_options_are_told(run: Run) -> None:
    for arguments in (["prun"], ["prune", "--sparsity", "0.5"], ["generate"]):
        answer = run(*arguments)
        assert answer.code == 2 and "Traceback" not in answer.err and answer.err.strip()


# -- the whole path -----------------------------------------------------------------------------------------------------


def generate_config(**changes: Any) -> dict[str, Any]:
    return {
        **TINY,
        "output": "irp",
        "models": [CONVNET],
        "irp": {"rounds": 2, "density": 0.2},
        "seeds": [0, 1],
        **changes,
    }


def fit_config(**changes: Any) -> dict[str, Any]:
    return {**TINY, "output": "scorer", "records": ["irp"], "fit": {"epochs": 2, "options": {"hidden": [8]}}, **changes}


def prune_config(**changes: Any) -> dict[str, Any]:
    return {**TINY, "output": "prune", "model": {"name": "mlp", "width": 8}, "sparsity": 0.8, **changes}


def train_config(**changes: Any) -> dict[str, Any]:
    return {**TINY, "output": "train", "model": {"name": "mlp", "width": 8}, **changes}


def benchmark_config(**changes: Any) -> dict[str, Any]:
    return {
        **TINY,
        "output": "benchmark",
        "models": [{"name": "mlp", "width": 8}],
        "criteria": ["snip"],
        "sparsities": [0.8],
        "seeds": [0],
        **changes,
    }


def test_from_records_to_a_report(run: Run) -> None:
    """generate → fit → prune → train → benchmark → report, tracked where that could go wrong, each a second time."""
    file = "scorer/scorer.safetensors"
    steps = [
        ("generate", generate_config(tracking=True), "records: 2 complete in irp/records"),
        ("fit", fit_config(), f"scorer: {file}"),
        ("prune", prune_config(criterion={"criterion": file, "floor": 0.05}), "masks: prune/masks.safetensors"),
        ("train", train_config(masks="prune/masks.safetensors"), "after the last epoch"),
        ("benchmark", benchmark_config(criteria=["snip", file]), "results: benchmark/results.csv"),
    ]
    for command, config, said in steps:
        answer = run(command, config)
        assert answer.code == 0 and said in answer.out, answer.err
    assert {p.name for p in Path("irp/records").glob("*.h5")} == {f"convnet-w4_digits_s{s}.h5" for s in (0, 1)}
    assert Path("irp/mlflow.db").is_file() and len(list(Path("irp/mlartifacts").rglob("*.h5"))) == 2
    card = json.loads(Path("scorer/scorer.json").read_text())
    assert sorted(r["part"] for r in card["records"]) == ["fit", "test"], "MLflow's copies are no runs of their own"
    masks = autosparse.Masks.load("prune/masks.safetensors")
    assert masks.total == 64 * 8 + 8 * 8 + 8 * 10 and masks.kept == round(0.2 * masks.total)
    trained = load_file("train/model.safetensors")
    for name, mask in masks.items():
        assert not trained[name][~mask].any() and trained[name][mask].any()
    result = json.loads(Path("train/result.json").read_text())
    assert result["steps"] == 5 and 0 <= result["accuracy"] <= 1
    with open("benchmark/results.csv", newline="") as rows:
        assert [r["criterion"] for r in csv.DictReader(rows)] == ["dense", "snip", "scorer"]

    before = {p: p.read_bytes() for p in Path(".").rglob("*.safetensors")}
    again = ["records: 2 complete", f"complete: {file}", "complete: prune/", "complete: accuracy", "results: "]
    for (command, config, _), said in zip(steps, again, strict=True):
        answer = run(command, {**config, "tracking": False})
        assert answer.code == 0 and said in answer.out, answer.err
    assert {p: p.read_bytes() for p in Path(".").rglob("*.safetensors")} == before

    answer = run("report", ".")
    assert answer.code == 0 and answer.out.strip() == "report: report.html"
    page = Path("report.html").read_text()
    assert "mlp-w8" in page and "3 benchmark runs, 2 IRP records, 1 fitted scorer" in page

    Path("irp/records/convnet-w4_digits_s1.h5").unlink()
    refused(run("fit", fit_config()), "fit.split is 'run' but the records hold only one run")


def test_the_ranks_of_records_left_out_are_tables(run: Run) -> None:
    """Two folds over four architectures, and a split by tag: a row for each record that judged and each criterion."""
    for index in range(4):
        depth = 2 + index
        plant(Path(f"records/{index}.h5"), index, model=f"m{index}", sizes=((6, 6),) * (depth if index else 20))
    fit_ = {"epochs": 1, "options": {"hidden": [4]}, "split": "tag:deeper", "validation": "model", "folds": 2}
    answer = run("fit", {"output": "scorer", "records": ["records"], "fit": fit_, "tracking": False})
    assert answer.code == 0, answer.err
    assert "records: 2 to fit, 1 for validation, 1 for test; epoch 1 of 1 is kept" in answer.out
    names = ["scorer", "magnitude", "snip", "growth0"]
    with open("scorer/test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["record"], row["criterion"]) for row in rows] == [("0", name) for name in names]
    with open("scorer/folds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["record"] for row in rows if row["criterion"] == "scorer") == ["0", "1", "2", "3"]
    means = rows_of("scorer/folds-mean.csv")
    assert list(means) == names and means["magnitude"]["auc"] == "1.0" and means["snip"]["records"] == "4"
    assert means["snip"]["split"] == "2 folds" and 0 < float(means["snip"]["auc_std"]) < 0.5
    card = json.loads(Path("scorer/scorer.json").read_text())
    assert float(card["test"]["snip"]["auc"]) == float(rows_of("scorer/test.csv")["snip"]["auc"])


def rows_of(path: str) -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        return {row["criterion"]: row for row in csv.DictReader(file)}


def test_profiles(run: Run) -> None:
    recipe = {**TINY["recipe"], "epochs": 4}
    answer = run("train", train_config(recipe=recipe), "--profile")  # 20 steps: 15 before the clock starts
    assert answer.code == 0 and "5 steps by part" in answer.out, answer.err
    assert "profile: train/profile/parts.csv, train/profile/trace.json.gz" in answer.out
    assert "profile: nothing was trained" in run("train", train_config(recipe=recipe), "--profile").out
    answer = run("generate", generate_config(seeds=[0]), "--profile")
    assert answer.code == 0 and "profile: 15 training steps ran in this process" in answer.out, answer.err
    config = generate_config(output="spread", seeds=[0], recipe=recipe)
    answer = run("generate", config, "--profile", "executor=local")
    assert answer.code == 0 and "first job of each worker" in answer.out, answer.err
    files = "spread/profile/worker0/parts.csv, spread/profile/worker0/trace.json.gz"
    assert f"profile: {files}" in answer.out and all(Path(file).exists() for file in files.split(", "))
    assert "the first job of no worker was long enough" in run("generate", config, "--profile", "executor=local").out


def test_a_resolved_config_runs_again(run: Run) -> None:
    assert run("prune", prune_config(), "sparsity=0.5").code == 0
    answer = run("prune", "prune/config.yaml", "output=other")
    assert answer.code == 0 and "sparsity 0.5000" in answer.out
    a, b = (autosparse.Masks.load(f"{d}/masks.safetensors") for d in ("prune", "other"))
    assert all(bool((a[n] == b[n]).all()) for n in a)


def test_quickstart_in_small(run: Run) -> None:
    config = {
        **TINY,
        "output": "quick",
        "sources": [CONVNET],
        "irp": {"rounds": 1, "density": 0.5},
        "fit": {"epochs": 1},
        "target": {"name": "mlp", "width": 8},
        "sparsities": [0.5],
        "rounds": 1,
        "seeds": [0],
    }
    answer = run("quickstart", config)
    assert answer.code == 0 and "report: quick/report.html" in answer.out, answer.err
    with open("quick/benchmark/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    free = ["dense", "random", "erk", "snip", "densities:snip", "densities:synflow"]
    assert [r["criterion"] for r in rows] == [*free, "scorer", "densities:scorer", "short search", "ticket"]
    costs = [round(float(r["mask_cost"]), 2) for r in rows[-2:]]
    assert costs[0] <= 0.5 and costs[1] == 1 and [float(r["total_cost"]) for r in rows[-1:]] == [2.0]
    refused(run("quickstart", "sparsitie=[0.5]"), "unknown key 'sparsitie': did you mean 'sparsities'?")


def test_checks_end_with_their_table_and_grow(run: Run) -> None:
    config = {**benchmark_config(output="check", seeds=[0, 1]), "checks": ["densities"]}
    answer = run("check", config)
    assert answer.code == 0 and answer.err == "", answer.err
    assert "over its shuffle" in answer.out and "\nsnip: " in answer.out
    done = {p.name: p.read_bytes() for p in Path("check/cells").iterdir()}
    with open("check/results.csv", newline="") as rows:
        assert [r["criterion"] for r in csv.DictReader(rows)] == ["dense", "snip", "densities:snip"] * 2
    assert "Sanity checks" in Path("check/report.html").read_text()
    answer = run("check", config, "checks=[densities,reinit,inverted]", "seeds=[0]")
    assert answer.code == 0 and "snip: one seed: cannot tell" in answer.out, answer.err
    cells = {p.name: p.read_bytes() for p in Path("check/cells").iterdir()}
    assert done.items() <= cells.items() and len(cells) == len(done) + 2
    refused(run("benchmark", benchmark_config(output="check")), "there command is 'check', here 'benchmark'")


def test_prune_notes_what_a_mask_must_tell(run: Run) -> None:
    answer = run("prune", prune_config(sparsity=0.995))
    assert answer.code == 0 and "note: " in answer.out and "dead layers" in answer.out and answer.err == ""


# -- wrong input: exit code 2 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "config", "parts"),
    [
        ("generate", generate_config(recipe={"epoch": 3}), ["unknown key 'recipe.epoch': did you mean 'epochs'?"]),
        ("prune", prune_config(sparsity=1.2), ["sparsity is 1.2: it is the share of weights removed"]),
        ("benchmark", benchmark_config(sparsities=[1.2]), ["sparsity is 1.2: it is the share of weights removed"]),
        ("prune", prune_config(model="resnt20"), ["model is 'resnt20': did you mean 'resnet20'?"]),
        ("generate", generate_config(models=["convnt"]), ["model is 'convnt': did you mean 'convnet'?"]),
        ("train", train_config(model="torchvision:resnet19"), ["model is 'torchvision:resnet19': did you mean"]),
        ("train", train_config(model="timm:nothing"), ["model is 'timm:nothing': timm"]),
        ("train", train_config(model="nowhere.at:all"), ["model is 'nowhere.at:all': No module named 'nowhere'"]),
        ("train", train_config(model={"name": "mlp", "options": {"deep": 3}}), ["model 'mlp' does not take options"]),
        ("train", train_config(data="digit"), ["data is 'digit': did you mean 'digits'?"]),
        ("generate", generate_config(data="hdf5:no.h5"), ["data hdf5:no.h5: the file does not exist"]),
        ("generate", generate_config(data={"name": "digits", "limit": 9999}), ["data.limit is 9999: the data set has"]),
        ("train", train_config(device="tpux"), ["device is 'tpux'"]),
        ("fit", fit_config(records=["nowhere"]), ["records path nowhere does not exist"]),
        ("fit", fit_config(records=["."]), ["no records (*.h5) under ."]),
        ("prune", prune_config(criterion="no.safetensors"), ["scorer file no.safetensors does not exist"]),
        ("benchmark", benchmark_config(criteria=["no.safetensors"]), ["scorer file no.safetensors does not exist"]),
        ("train", train_config(masks="no.safetensors"), ["masks file no.safetensors does not exist"]),
        ("prune", prune_config(model="test_runs:Nothing"), ["Nothing has no prunable weights"]),
        ("generate", generate_config(models=["test_runs:Nothing"]), ["Nothing has no prunable weights"]),
        ("benchmark", benchmark_config(models=["test_runs:Nothing"]), ["Nothing has no prunable weights"]),
        ("prune", prune_config(model="test_runs:Large"), ["Sequential cannot take batches of shape (2, 1, 8, 8)"]),
        ("train", train_config(model="test_runs:Large"), ["Sequential cannot take batches of shape (2, 1, 8, 8)"]),
        ("generate", generate_config(models=["test_runs:Large"]), ["Sequential cannot take batches of shape (2, 1,"]),
        ("benchmark", benchmark_config(models=["test_runs:Large"]), ["Sequential cannot take batches of shape (2, 1,"]),
        ("train", train_config(model="test_runs:Eleven"), ["must give logits of shape (2, 10)"]),
        ("prune", prune_config(model="torchvision:vit_b_16"), ["model 'torchvision:vit_b_16' cannot be built for", "data.image_size"]),
        ("generate", generate_config(irp={"rounds": 1, "density": 0.5, "rewind_step": 5}),
         ["irp.rewind_step is 5: a training has 5 steps"]),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(run: Run, command: str, config: dict[str, Any], parts: list[str]) -> None:
    refused(run(command, config), *parts)


def test_wrong_files_are_one_line(run: Run) -> None:
    """Truncated and foreign HDF5, as data and as a record; scorers and masks that are something else."""
    assert run("generate", generate_config(seeds=[0])).code == 0
    record = Path("irp/records/convnet-w4_digits_s0.h5").read_bytes()
    Path("short.h5").write_bytes(record[: len(record) // 2])
    Path("text.h5").write_text("not HDF5 at all")
    with h5py.File("foreign.h5", "w") as file:
        file["x"] = np.zeros(3)
    Path("record.h5").write_bytes(record)
    for name, part in (("short", "truncated"), ("text", "not a readable HDF5 file"), ("foreign", "has no dataset")):
        for command, config in (("train", train_config()), ("generate", generate_config())):
            refused(run(command, {**config, "data": f"hdf5:{name}.h5"}, "output=data"), f"data hdf5:{name}.h5: ", part)
    refused(run("train", train_config(data="hdf5:record.h5")), "has no dataset 'train/images'")
    for name, part in (
        ("short", "truncated or not HDF5"),
        ("text", "truncated or not HDF5"),
        ("foreign", "holds no schema, not a whole autosparse.record/1"),
    ):
        refused(run("fit", fit_config(records=["irp", f"{name}.h5"])), f"{name}.h5", part)
    quick = {"epochs": 1, "split": "none"}
    assert run("fit", fit_config(fit=quick)).code == 0, "an output whose first config failed is free for the right one"
    Path("damaged.safetensors").write_bytes(Path("scorer/scorer.safetensors").read_bytes()[:500])
    assert run("prune", prune_config()).code == 0
    for file, part in (
        ("damaged.safetensors", "truncated or not safetensors"),
        ("prune/masks.safetensors", "holds autosparse.masks/1, not autosparse.scorer/2"),
    ):
        refused(run("prune", prune_config(criterion=file, output="p2")), part)
        refused(run("benchmark", benchmark_config(criteria=[file])), part)
    refused(run("train", train_config(masks="damaged.safetensors")), "truncated or not safetensors")
    refused(run("train", train_config(masks="scorer/scorer.safetensors")), "not autosparse.masks/1")
    other = train_config(masks="prune/masks.safetensors", model=CONVNET)
    refused(run("train", other), "which ConvNet does not have: give the model that they were made for")
    wider = train_config(masks="prune/masks.safetensors", model={"name": "mlp", "width": 9})
    refused(run("train", wider), "has shape (8, 64), the model's weight (9, 64): give the model that it was made for")
    Path("irp/records/convnet-w4_digits_s0.h5").write_bytes(record[:-100])
    refused(run("generate", generate_config(seeds=[0])), "truncated or not HDF5")


def test_a_scorer_with_other_features_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"hidden": [8]}
    with monkeypatch.context() as patch:
        patch.setattr(scorer, "VERSION", 99)
        network = build_network("mlp", DEFAULT, 12, options)
        Scorer("mlp", network, "hazard", DEFAULT, 1, 16, options).save("new.safetensors")
    odd = build_network("mlp", ("weight", "curvature"), 12, options)
    Scorer("mlp", odd, "hazard", ("weight", "curvature"), 1, 16, options).save("odd.safetensors")
    for name, part in (("new", "feature version is 99"), ("odd", "curvature")):
        refused(run("prune", prune_config(criterion=f"{name}.safetensors")), part, "fit it again with this one")
        refused(run("benchmark", benchmark_config(criteria=[f"{name}.safetensors"])), part)


@pytest.mark.parametrize(
    ("command", "config", "override", "part"),
    [
        ("generate", generate_config(seeds=[0]), "recipe.lr=0.06", "there recipe.lr is 0.05, here 0.06"),
        ("prune", prune_config(), "sparsity=0.7", "there sparsity is 0.8, here 0.7"),
        ("train", train_config(), "seed=1", "there seed is 0, here 1"),
        ("benchmark", benchmark_config(), "recipe.epochs=2", "there recipe.epochs is 1, here 2"),
    ],
)
def test_the_directory_of_another_config_is_refused(
    run: Run, command: str, config: dict[str, Any], override: str, part: str
) -> None:
    assert run(command, config).code == 0
    refused(run(command, config, override), f"output {config['output']} belongs to another config", part)
    assert run(command, config).code == 0


def test_a_run_that_is_being_written_is_refused(run: Run) -> None:
    """A second process, while this one holds the run."""
    from data_gen.runs import sole_writer

    Path("c.yaml").write_text(yaml.safe_dump(generate_config(seeds=[0])))
    with sole_writer(Path("irp/records/convnet-w4_digits_s0.h5")):
        done = subprocess.run([sys.executable, "-m", "data_gen", "c.yaml"], capture_output=True, text=True, check=False)
    refused(Answer(done.returncode, done.stdout, done.stderr), "is being written by another process: wait for it")


def test_a_directory_with_nothing_to_report(run: Run) -> None:
    for place in (".", "nowhere"):
        answer = run("report", place)
        refused(answer)
    assert not Path("nowhere").exists()


def test_status_of_campaigns_and_grids(run: Run) -> None:
    assert run("generate", generate_config(output="both/irp"), "executor=local").code == 0
    greedy = {"criterion": "snip", "label": "greedy", "floor": 0.2}
    assert run("benchmark", benchmark_config(output="both/grid", criteria=["random", greedy])).code == 1
    answer = run("status", "both")
    assert answer.code == 0
    grid, failed, campaign = answer.out.splitlines()
    assert grid == "both/grid: 3 jobs: 2 done, 0 running, 1 failed, 0 waiting; no process is running"
    assert failed.startswith("  failed: mlp-w8_greedy_0.8_s0_") and "floor 0.2 needs" in failed
    assert campaign == "both/irp: 2 jobs: 2 done, 0 running, 0 failed, 0 waiting; no process is running"
    refused(run("status", "nowhere"), "no campaign or grid under 'nowhere'")


# -- work that fails: exit code 1; stopped: 130 -------------------------------------------------------------------------


def test_diverged_work_exits_with_one(run: Run) -> None:
    wild = {**TINY["recipe"], "lr": 1e20}
    refused(run("train", train_config(recipe=wild)), "training diverged", "lower recipe.lr", code=1)
    refused(run("generate", generate_config(seeds=[0], recipe=wild)), "training diverged", code=1)
    answer = run("benchmark", benchmark_config(recipe=wild))
    assert answer.code == 1
    *reasons, last = answer.err.strip().splitlines()
    assert last == "error: 2 of 2 cells failed; start again to try them again" and len(reasons) == 2
    assert all(line.startswith("failed: mlp-w8 ") and "training diverged" in line for line in reasons)


def test_some_failed_runs_exit_with_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from autosparse.errors import AutoSparseFailure
    from data_gen import campaign

    real = campaign.generate_record

    def fragile(run_: Any, *rest: Any, **keywords: Any) -> Any:
        if run_.seed == 0:
            raise AutoSparseFailure("training diverged: as planned")
        return real(run_, *rest, **keywords)

    monkeypatch.setattr(campaign, "generate_record", fragile)
    answer = run("generate", generate_config())
    assert answer.code == 1 and answer.err.splitlines() == [
        "failed: convnet-w4_digits_s0: training diverged: as planned",
        "error: 1 of 2 runs failed; start again to try them again",
    ]
    assert Path("irp/records/convnet-w4_digits_s1.h5").is_file()


def test_a_stop_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from autosparse.commands import train as command

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    refused(run("train", train_config()), "stopped; run the same command again to continue", code=130)


def test_bugs_show_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from autosparse.commands import train as command

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "train", broken)
    Path("c.yaml").write_text(yaml.safe_dump(train_config()))
    with pytest.raises(ZeroDivisionError):
        main(["train", "c.yaml"])


def test_training_goes_on_from_its_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from autosparse.training import loop

    whole = run("train", train_config(output="whole"), "recipe.epochs=4")
    assert whole.code == 0
    assert train.__kwdefaults__ is not None
    monkeypatch.setitem(train.__kwdefaults__, "checkpoint_every", 0.0)
    real, calls = loop.evaluate, []

    def stop(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(loop, "evaluate", stop)
    assert run("train", train_config(), "recipe.epochs=4").code == 130
    assert run("train", train_config(), "recipe.epochs=4").code == 0
    assert len(calls) == 3 + 2 + 1, "two epochs were kept"
    a, b = (load_file(f"{d}/model.safetensors") for d in ("whole", "train"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    histories = [json.loads(Path(f"{d}/history.json").read_text()) for d in ("whole", "train")]
    assert histories[0] == histories[1] and len(histories[0]["epochs"]) == 4


def test_training_repaired_weights(run: Run) -> None:
    assert run("prune", prune_config(criterion="erk")).code == 0
    config = train_config(masks="prune/masks.safetensors", prepare="repair", recipe={"steps": 1, "lr": 1e-9})
    out = run("train", config).out
    assert "repair: Lipschitz constants of 3 layers" in out and "now 1.00 … 1.00" in out
    trained, masks = load_file("train/model.safetensors"), autosparse.Masks.load("prune/masks.safetensors")
    for name, kept in masks.items():
        assert not trained[name][~kept].any()
        assert float(torch.linalg.matrix_norm(trained[name], 2)) == pytest.approx(1, abs=1e-4)
    assert not Path("train/masks.safetensors").exists()
    assert "complete" in run("train", config).out


def test_the_same_initialization_is_pruned_and_trained(run: Run) -> None:
    """`prune` and `train` of one seed are about one network."""
    assert run("prune", prune_config(criterion="magnitude", seed=4)).code == 0
    masks = autosparse.Masks.load("prune/masks.safetensors")
    weight = create_model("mlp", in_channels=1, image_size=8, seed=4).get_parameter  # default width: another network
    assert weight("layers.1.weight").shape != masks["layers.1.weight"].shape
    from autosparse.training.models import ModelSettings

    model = create_model(ModelSettings("mlp", 8), in_channels=1, image_size=8, seed=4)
    kept = torch.cat([model.get_parameter(n).detach()[m].abs() for n, m in masks.items()])
    pruned = torch.cat([model.get_parameter(n).detach()[~m].abs() for n, m in masks.items()])
    assert float(kept.min()) >= float(pruned.max())
    here, elsewhere = ({**train_config(masks="prune/masks.safetensors", seed=s), "output": f"t{s}"} for s in (4, 5))
    assert "note:" not in run("train", here).out
    assert "prune/masks.safetensors was chosen for other initial weights" in run("train", elsewhere).out


def test_networks_are_made_smaller(run: Run) -> None:
    config: dict[str, Any] = {
        **TINY,
        "output": "small",
        "model": CONVNET,
        "tpp": {"ramp": 3, "stabilise": 1, "delta": 1, "tau": 3},
        "finetune": TINY["recipe"],
        "methods": ["tpp", "l1"],
        "seeds": [0],
    }
    answer = run("shrink", config)
    assert answer.code == 0 and answer.err == "", answer.err
    assert "after removal" in answer.out and "networks: small/networks" in answer.out
    with open("small/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["ratio"]) for r in rows] == [("dense", ""), ("tpp", "0.5"), ("l1", "0.5")]
    for row in rows[1:]:
        assert 0 <= float(row["removed_accuracy"]) <= 1 and int(row["parameters"]) < int(row["parameters_before"])
    report = Path("small/report.html").read_text()
    assert "Networks made smaller" in report and "2 smaller networks" in report and "<svg" in report
    before = {p.name: p.read_bytes() for p in Path("small/networks").iterdir()}
    assert run("shrink", config, "ratios=[0.5,{features.4.weight: 0.25}]", "methods=[l1]").code == 0
    assert before.items() < {p.name: p.read_bytes() for p in Path("small/networks").iterdir()}.items()
    refused(run("shrink", config, "tpp.ramp=4"), "belongs to another config", "there tpp.ramp is 3, here 4")
    refused(run("shrink", config, "methods=[tpq]"), "methods holds 'tpq': did you mean 'tpp'")
    refused(run("shrink", config, "ratios=[2.0]"), "ratio is 2.0: it is the share of filters that go")
    refused(run("shrink", config, "output=none", "model=mlp"), "MLP has no convolution whose filters can go alone")
    assert "3 jobs: 3 done" in run("status", "small").out


def test_python_users_call_what_the_commands_call(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from autosparse.commands import benchmark, train
    from autosparse.commands.loading import load_config
    from autosparse.commands.schemas import BenchmarkConfig, TrainConfig
    from autosparse.commands.terminal import quiet

    def config(schema: type, **values: Any) -> Any:
        Path("c.yaml").write_text(yaml.safe_dump(values))
        return load_config(schema, Path("c.yaml"))

    trained = config(TrainConfig, **train_config(output="t"))
    grid = config(
        BenchmarkConfig, **TINY, models=[CONVNET], criteria=["random"], sparsities=[0.5], seeds=[0], output="b"
    )
    with quiet():
        result, rows = train.run(trained), benchmark.run(grid)
    assert capsys.readouterr() == ("", "")
    assert result == read_json(Path("t/result.json"), "result")
    assert rows[["criterion", "sparsity"]].values.tolist() == [["dense", 0.0], ["random", 0.5]]
    answer = run("train", train_config(output="t"))
    assert answer.out.startswith("complete: accuracy")
    assert train.run(trained)["accuracy"] == result["accuracy"]
