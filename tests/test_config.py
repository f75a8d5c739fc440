"""What the commands read: YAML files and overrides, checked, and directories that belong to one config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from autosparse.commands.directory import claim_directory
from autosparse.commands.loading import load_config, plain
from autosparse.commands.schemas import (
    BenchmarkConfig,
    CheckConfig,
    DiagnoseConfig,
    ExportConfig,
    FitConfig,
    GenerateConfig,
    PruneConfig,
    QuickstartConfig,
    ShrinkConfig,
    TrainConfig,
    TuneConfig,
)
from autosparse.errors import AutoSparseError
from autosparse.experiment.candidates import Candidate
from autosparse.jobs.executor import ExecutorSettings
from autosparse.search.irp import IRPSettings
from autosparse.training.data import DataSettings
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe

ROOT = Path(__file__).parent.parent / "configs"
SCHEMAS: dict[str, type] = {
    "irp": GenerateConfig,
    "corpus": GenerateConfig,
    "scorer": FitConfig,
    "tune": TuneConfig,
    "design": TuneConfig,
    "benchmark": BenchmarkConfig,
    "check": CheckConfig,
    "diagnose": DiagnoseConfig,
    "prune": PruneConfig,
    "shrink": ShrinkConfig,
    "train": TrainConfig,
    "export": ExportConfig,
    "quickstart": QuickstartConfig,
}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- the configs that come with the package -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads_with_the_schema_of_its_place(path: Path) -> None:
    schema = SCHEMAS[path.parent.name if path.parent != ROOT else path.stem]
    loaded = load_config(schema, path)
    assert isinstance(loaded, schema)
    assert path.read_text().startswith("# "), "its first line says what it is for"


def test_there_is_a_config_for_every_command() -> None:
    found = {p.parent.name if p.parent != ROOT else p.stem for p in ROOT.rglob("*.yaml")}
    assert found == set(SCHEMAS)


def test_the_quickstart_config_is_the_default() -> None:
    assert load_config(QuickstartConfig, ROOT / "quickstart.yaml") == QuickstartConfig()
    written = yaml.safe_load((ROOT / "quickstart.yaml").read_text())
    assert written.keys() == {f.name for f in dataclasses.fields(QuickstartConfig)}


# -- what may be written ------------------------------------------------------------------------------------------------


def test_a_file_fills_nested_settings(tmp_path: Path) -> None:
    text = """
models: [resnet20, {name: convnet, width: 8, options: {depth: 4}}]
data: {name: digits, limit: 300}
recipe: {epochs: 3, lr: 1e-3, weight_decay: 5.0e-4, milestones: [0.3, 0.6], clip_norm: 1}
irp: {rounds: 4, density: .1}
seeds: [1, 2]
tracking: no
"""
    assert load_config(GenerateConfig, write(tmp_path / "c.yaml", text)) == GenerateConfig(
        models=(ModelSettings("resnet20"), ModelSettings("convnet", 8, {"depth": 4})),
        data=DataSettings("digits", limit=300),
        recipe=Recipe(epochs=3, lr=0.001, weight_decay=5e-4, milestones=(0.3, 0.6), clip_norm=1.0),
        irp=IRPSettings(rounds=4, density=0.1),
        seeds=(1, 2),
        tracking=False,
    )


@pytest.mark.parametrize(
    ("schema", "override", "wanted"),
    [
        (TrainConfig, "model=resnet20", {"model": ModelSettings("resnet20")}),
        (TrainConfig, "model={name: convnet, width: 4}", {"model": ModelSettings("convnet", 4)}),
        (TrainConfig, "data=digits", {"data": DataSettings("digits")}),
        (TrainConfig, "data.name=hdf5:a/b.h5", {"data": DataSettings("hdf5:a/b.h5")}),
        (TrainConfig, "recipe.lr=1e-3", {"recipe": Recipe(lr=0.001)}),
        (TrainConfig, "recipe.lr=1", {"recipe": Recipe(lr=1.0)}),
        (TrainConfig, "recipe.steps=null", {}),
        (TrainConfig, "recipe.compile=true", {"recipe": Recipe(compile=True)}),
        (TrainConfig, "recipe.compile=graphs", {"recipe": Recipe(compile="graphs")}),
        (TrainConfig, "recipe.milestones=[0.1,0.2,0.9]", {"recipe": Recipe(milestones=(0.1, 0.2, 0.9))}),
        (TrainConfig, "model.options.depth=4", {"model": ModelSettings("resnet20", options={"depth": 4})}),
        (TrainConfig, "masks=a=b.safetensors", {"masks": "a=b.safetensors"}),
        (TrainConfig, "tracking=false", {"tracking": False}),
        (PruneConfig, "criterion=magnitude", {"criterion": Candidate("magnitude")}),
        (PruneConfig, "sparsity=1e-2", {"sparsity": 0.01}),
        (PruneConfig, "sparsity=.5", {"sparsity": 0.5}),
        (PruneConfig, "criterion={criterion: snip, granularity: 2:4}",
         {"criterion": Candidate("snip", granularity="2:4")}),
        (TrainConfig, "model.options={a: 1e-3, b: 1E6, c: -3, d: 1_000, e: .inf, f: 12:30, g: on, h: 1.5e+2}",
         {"model": ModelSettings("resnet20", options={
             "a": 0.001, "b": 1e6, "c": -3, "d": 1000, "e": float("inf"), "f": "12:30", "g": True, "h": 150.0})}),
        (PruneConfig, "sparsity=0", {"sparsity": 0.0}),
        (BenchmarkConfig, "criteria=[snip, {criterion: irp, rounds: 2}]",
         {"criteria": (Candidate("snip"), Candidate("irp", options={"rounds": 2}))}),
        (BenchmarkConfig, "models=[vgg11, mlp]", {"models": (ModelSettings("vgg11"), ModelSettings("mlp"))}),
        (QuickstartConfig, "target=vgg11", {"target": ModelSettings("vgg11")}),
        (QuickstartConfig, "sources=[mlp]", {"sources": (ModelSettings("mlp"),)}),
    ],
)  # fmt: skip
def test_overrides(schema: type, override: str, wanted: dict[str, Any]) -> None:
    assert load_config(schema, None, [override]) == schema(**wanted)


def test_overrides_win_over_the_file_and_the_last_over_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "model: convnet\nrecipe: {epochs: 3, lr: 0.5}\nseed: 1\ndata: digits")
    found = load_config(TrainConfig, path, ["model.width=4", "recipe.epochs=5", "seed=2", "seed=3"])
    assert found == TrainConfig(
        model=ModelSettings("convnet", 4), data=DataSettings("digits"), recipe=Recipe(epochs=5, lr=0.5), seed=3
    )


@pytest.mark.parametrize(
    ("schema", "text", "overrides", "missing"),
    [
        (TrainConfig, "# nothing", [], "data and model must be given"),
        (TrainConfig, "model: mlp", [], "data must be given"),
        (TrainConfig, "seed: 3", ["data=digits", "model=mlp"], None),
        (GenerateConfig, "{}", [], "data and models must be given"),
        (GenerateConfig, "tasks: {count: 3}", [], "data must be given"),
        (GenerateConfig, "tasks: {data: [digits]}", [], None),
        (FitConfig, "", [], "records must be given"),
        (ExportConfig, "model: mlp", ["input_size=[1, 8, 8]", "classes=10"], None),
        (QuickstartConfig, "", [], None),
    ],
)
def test_what_the_work_is_about_has_to_be_given(
    tmp_path: Path, schema: type, text: str, overrides: list[str], missing: str | None
) -> None:
    """An empty file began to download CIFAR-10."""
    path = write(tmp_path / "c.yaml", text)
    if missing is None:
        load_config(schema, path, overrides)
    else:
        with pytest.raises(AutoSparseError, match=f"config .*: {missing}"):
            load_config(schema, path, overrides)


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "override", "message"),
    [
        (TrainConfig, "recipe.epoch=3", "unknown key 'recipe.epoch': did you mean 'epochs'? known: batch_size, "),
        (TrainConfig, "modell=resnet20", "unknown key 'modell': did you mean 'model'? known: data, device, "),
        (TrainConfig, "model.widht=3", "unknown key 'model.widht': did you mean 'width'? known: name, options, width"),
        (BenchmarkConfig, "criteria=[{criterion: snip, flor: 0.1}]",
         "unknown key 'criteria.0.flor': did you mean 'floor'?"),
        (GenerateConfig, "irp.round=3", "unknown key 'irp.round': did you mean 'rounds'?"),
        (TrainConfig, "7=3", "unknown key '7': known: "),
        (TrainConfig, "recipe.epochs=many", "recipe.epochs is 'many': input should be a valid integer"),
        (TrainConfig, "recipe.epochs=1.5", "recipe.epochs is 1.5: input should be a valid integer"),
        (TrainConfig, "recipe.lr=[1]", "recipe.lr is [1]: input should be a valid number"),
        (TrainConfig, "recipe=fast", "recipe is 'fast': input should be a dictionary"),
        (TrainConfig, "model.name=7", "model.name is 7: input should be a valid string"),
        (TrainConfig, "tracking=perhaps", "tracking is 'perhaps': input should be a valid boolean"),
        (TrainConfig, "tracking=1", "tracking is 1: input should be a valid boolean: true or false"),
        (TrainConfig, "recipe.epochs=true", "recipe.epochs is True: input should be a valid integer"),
        (TrainConfig, "recipe.epochs='3'", "recipe.epochs is '3': input should be a valid integer"),
        (PruneConfig, "sparsity=true", "sparsity is True: input should be a valid number"),
        (PruneConfig, "sparsity='0.9'", "sparsity is '0.9': input should be a valid number"),
        (BenchmarkConfig, "sparsities=[0.5, on]", "sparsities.1 is True: input should be a valid number"),
        (BenchmarkConfig, "models=[mlp, {name: mlp, width: yes}]", "models.1.width is True: input should be a valid"),
        (BenchmarkConfig, "seeds=[0, no]", "seeds.1 is False: input should be a valid integer"),
        (ExportConfig, "input_size=[true, 3, 3]", "input_size.0 is True: input should be a valid integer"),
        (ShrinkConfig, "ratios=[{'*': true}]", "ratios.0.* is True: input should be a valid number"),
        (TrainConfig, f"seed={10**23}", f"seed is {10**23}: a seed is a whole number from 0 to 2^63 - 1"),
        (TrainConfig, "seed=-1", "seed is -1: a seed is a whole number from 0"),
        (TrainConfig, "seed=0.5", "seed is 0.5: input should be a valid integer"),
        (TrainConfig, "seed=true", "seed is True: input should be a valid integer"),
        (TrainConfig, "seed=1" + 5000 * "0", "the value is not YAML"),
        (BenchmarkConfig, f"seeds=[0, {2**63}]", f"seeds.1 is {2**63}: a seed is a whole number"),
        (TuneConfig, "tasks.seed=-5", "tasks.seed is -5: a seed is a whole number"),
        (BenchmarkConfig, "seeds=0", "seeds is 0: input should be a valid "),
        (PruneConfig, "sparsity=1.2", "sparsity is 1.2: it is the share of weights removed"),
        (PruneConfig, "sparsity=1", "sparsity is 1.0: it is the share of weights removed"),
        (PruneConfig, "sparsity=-0.1", "sparsity is -0.1: it is the share"),
        (PruneConfig, "sparsity=.nan", "sparsity is nan: it is the share"),
        (BenchmarkConfig, "sparsities=[0.5,95]", "sparsity is 95.0: it is the share"),
        (QuickstartConfig, "sparsities=[2]", "sparsity is 2.0: it is the share"),
        (QuickstartConfig, "floor=1", "floor is 1.0: it is the smallest density"),
        (TrainConfig, "recipe.epochs=0", "recipe.epochs is 0: give at least 1"),
        (TrainConfig, "recipe.lr=.nan", "recipe.lr is nan: give a positive number"),
        (TrainConfig, "recipe.optimizer=adam", "recipe.optimizer is 'adam': known: sgd, adamw"),
        (GenerateConfig, "irp.density=0", "irp.density is 0.0: it must lie in (0, 1]"),
        (GenerateConfig, "irp.rounds=256", "irp.rounds is 256: it must lie in 1 … 255"),
        (GenerateConfig, "signals.names=[jacobian]", "signals: signal is 'jacobian': known: accumulated_gradient@1, dense_weight, displacement@1"),
        (FitConfig, "fit.features=[weigth]", "fit: feature is 'weigth': did you mean 'weight'?"),
        (FitConfig, "fit.head=cox", "fit: head is 'cox': known: hazard, cumulative, mse"),
        (TrainConfig, "data.image_size=0", "data.image_size is 0: give pixels"),
        (TrainConfig, "model.width=0", "model width is 0: give a whole number"),
        (PruneConfig, "criterion=snap", "criterion is 'snap': did you mean 'snip'?"),
        (PruneConfig, "criterion={criterion: snip, scope: galactic}", "scope is 'galactic': known: global, "),
        (PruneConfig, "criterion={criterion: snip, granularity: 4:2}", "N:M pattern is '4:2'"),
        (PruneConfig, "criterion={criterion: snip, schedule: cosine}", "schedule is 'cosine': known: "),
        (PruneConfig, "criterion={criterion: snip, steps: 0}", "steps is 0: give at least 1"),
        (PruneConfig, "criterion={criterion: snip, batch_size: 0}", "batch_size is 0: give at least 1"),
        (PruneConfig, "criterion={criterion: irp, rounds: 256}", "rounds is 256: "),
        (PruneConfig, "criterion={criterion: irp, granularity: channel}", "granularity of irp is 'channel'"),
        (PruneConfig, "criterion.granularity=2:4", "criterion.criterion is missing: give it"),
        (PruneConfig, "criterion={criterion: irp, steps: 5}", "steps of irp is 5"),
        (PruneConfig, "criterion={criterion: acdc, every: 20}", "every is 20: AC/DC changes its masks when a phase begins"),
        (PruneConfig, "criterion={criterion: irp, rewind: never}", "criterion is 'irp-5-rewind-never': prune writes masks"),
        (PruneConfig, "criterion={criterion: gmp, continues: true}", "continues is True: prune writes masks"),
        (PruneConfig, "criterion={criterion:gmp, every: 3}", "is not YAML: 'criterion:gmp' has no value: put a space after"),
        (PruneConfig, "criterion=densities:densities:snip", "criterion is 'densities:densities:snip': give one variant"),
        (PruneConfig, "criterion={criterion: gmp, flor: 0.1}", "flor of gmp is 0.1: did you mean 'floor'? known: "),
        (PruneConfig, "criterion={criterion: gmp, gain: 0.1}", "gain of gmp is 0.1: did you mean 'begin'? known: "),
        (PruneConfig, "criterion={criterion: snip, prepare: repair}", "prepare is 'repair': prune writes masks, and this changes the weights too"),
        (TrainConfig, "prepare=repiar", "prepare is 'repiar': did you mean 'repair'?"),
        (CheckConfig, "checks=[densitys]", "checks is 'densitys': did you mean 'densities'?"),
        (CheckConfig, "checks=[]", "checks is []: give at least one of densities, reinit, inverted"),
        (CheckConfig, "criteria=[densities:snip]", "criteria is 'densities:snip': give 'snip'"),
        (CheckConfig, "criteria=[{criterion: snip, granularity: 2:4}]", "granularity of densities:snip is '2:4'"),
        (CheckConfig, "sparsities=[7]", "sparsity is 7.0: it is the share"),
        (CheckConfig, "seeds=3", "seeds is 3: input should be a valid list"),
        (TuneConfig, "name=../x", "name is '../x': it becomes NAME.safetensors"),
        (FitConfig, "name=''", "name is '': it becomes NAME.safetensors"),
        (TuneConfig, "design={base: [igq, igq]}", "design.base is ['igq', 'igq']: give some of these, each once"),
        (TuneConfig, "design={along: [layer_last, layer_last]}", "give some of these, each once"),
        (TuneConfig, "recipe.epochs=.inf", "recipe.epochs is inf"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(schema: type, override: str, message: str) -> None:
    with pytest.raises(AutoSparseError) as caught:
        load_config(schema, None, [override])
    assert message in str(caught.value) and str(caught.value).startswith(("config: ", "override "))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.lr", "override 'recipe.lr': write key=value or key.sub=value"),
        ("=3", "override '=3': write key=value"),
        ("recipe.lr=[1", "override 'recipe.lr=[1': the value is not YAML"),
        ("seeds.0=3", "override 'seeds.0=3': seeds holds [1], which has no keys; write seeds=VALUE"),
    ],
)
def test_overrides_of_another_form_are_told(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path / "c.yaml", "seeds: [1]")
    with pytest.raises(AutoSparseError) as caught:
        load_config(GenerateConfig, path, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scorer=a.safetensors", "scorer is 'a.safetensors': a design begins at design.base; leave it out"),
        ("tune.pairs=3", "tune.pairs is 3: a design does not use it; leave it out"),
    ],
)
def test_what_a_design_does_not_use_is_told(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path / "c.yaml", "{data: digits, design: {draws: 2}}")
    assert load_config(TuneConfig, path).design is not None
    with pytest.raises(AutoSparseError) as caught:
        load_config(TuneConfig, path, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("irp: {n_batches: 3}", "irp.n_batches is 3: only snip takes batches; leave it out"),
        (
            "irp: {density: 0.1, floor: 0.2}",
            "irp.floor is 0.2: it is above the final density irp.density; lower irp.floor",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AutoSparseError) as caught:
        load_config(GenerateConfig, write(tmp_path / "c.yaml", text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML: "),
        ("just text", "holds a str: it must hold keys with values"),
        ("- 1\n- 2", "holds a list: it must hold keys"),
        ("recipe: {epochs: 0}", "recipe.epochs is 0: give at least 1"),
        ("recipe:\n  epochs: 3\n epochs: 4", "is not YAML: "),
        ("recipe:\n\tepochs: 3", "is not YAML: "),
        ("seed: 1\nrecipe: {}\nseed: 2", "is not YAML: 'seed' is given twice, in lines 1 and 3: keep one"),
        ("recipe: {lr: 1, lr: 1}", "is not YAML: 'lr' is given twice, in line 1: keep one"),
        ("a: &b [*b]", "is not YAML: "),
        ("seed: 1" + 5000 * "0", "is not YAML: "),
        (3000 * "[", "is not YAML: it nests too deeply"),
        ("recipe: {epochs:3}", "is not YAML: 'epochs:3' has no value: put a space after the colon"),
        ("? [1, 2]\n: 3", "is not YAML: the key in line 1 is not text"),
        ("seed: !!python/object:os.system x", "is not YAML: "),
        ("command: fit\nseed: 3", "is for autosparse fit: run that command, or give another config"),
    ],
)
def test_files_that_are_no_config_are_told(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(AutoSparseError) as caught:
        load_config(TrainConfig, path)
    assert str(caught.value).startswith(f"config {path}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_and_missing_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\x89HDF\r\n\xff\xfe\x00")
    with pytest.raises(AutoSparseError, match="is not YAML"):
        load_config(TrainConfig, tmp_path / "c.yaml")
    for path, message in (
        (tmp_path / "none.yaml", "does not exist: give a YAML file such as those in configs/"),
        (tmp_path, "is a directory: give a file"),
        (tmp_path / ("n" * 300), "cannot be read: File name too long"),
        (tmp_path / "c.yaml" / "d.yaml", "does not exist"),
    ):
        with pytest.raises(AutoSparseError, match=message):
            load_config(TrainConfig, path)
    for encoding, good in (("utf-8-sig", True), ("utf-16", False), ("utf-8", True)):
        (tmp_path / "c.yaml").write_text("model: {name: mlp}  # θ\ndata: digits", encoding=encoding)
        if good:
            assert load_config(TrainConfig, tmp_path / "c.yaml").data.name == "digits"
        else:
            with pytest.raises(AutoSparseError, match="is not YAML: it is not encoded in UTF-8"):
                load_config(TrainConfig, tmp_path / "c.yaml")


# -- directories --------------------------------------------------------------------------------------------------------


def example(schema: type, tmp_path: Path, *overrides: str) -> Any:
    return load_config(schema, None, [f"output={tmp_path / 'out'}", *overrides])


@pytest.mark.parametrize("schema", list(SCHEMAS.values()), ids=list(SCHEMAS))
def test_the_resolved_config_is_a_config(tmp_path: Path, schema: type) -> None:
    config = example(schema, tmp_path)
    directory = claim_directory(config)
    assert directory == tmp_path / "out"
    assert load_config(schema, directory / "config.yaml") == config
    command = yaml.safe_load((directory / "config.yaml").read_text())["command"]
    assert command == schema.__name__.removesuffix("Config").lower()


def test_small_and_odd_values_come_back(tmp_path: Path) -> None:
    config = example(GenerateConfig, tmp_path, "recipe.weight_decay=1e-05", "models=[{name: mlp, options: {a: yes}}]")
    assert load_config(GenerateConfig, claim_directory(config) / "config.yaml") == config


def fill(directory: Path) -> None:
    (directory / "records").mkdir(exist_ok=True)
    (directory / "records" / "r.h5").write_text("result")


def test_another_config_is_refused_by_the_key_that_differs(tmp_path: Path) -> None:
    first = example(GenerateConfig, tmp_path)
    directory = claim_directory(first)
    fill(directory)
    before = (directory / "config.yaml").read_text()
    for override, message in (
        ("recipe.lr=0.2", "(there recipe.lr is 0.1, here 0.2): choose another output, or delete the directory"),
        ("data=digits", "there data.name is 'cifar10', here 'digits'"),
        ("irp.scope=erk", "there irp.scope is 'global', here 'erk'"),
    ):
        with pytest.raises(AutoSparseError) as caught:
            claim_directory(example(GenerateConfig, tmp_path, override))
        assert f"output {directory} belongs to another config" in str(caught.value) and message in str(caught.value)
    with pytest.raises(AutoSparseError, match="there command is 'generate', here 'train'"):
        claim_directory(example(TrainConfig, tmp_path))
    assert (directory / "config.yaml").read_text() == before
    claim_directory(first)


def test_a_setting_that_an_older_version_did_not_have_is_no_other_config(tmp_path: Path) -> None:
    config = example(PruneConfig, tmp_path)
    directory = claim_directory(config)
    fill(directory)
    path = directory / "config.yaml"
    path.write_text(path.read_text().replace("  prepare: null\n", ""))
    assert "prepare" not in path.read_text()
    claim_directory(config)


def test_more_of_the_same_is_no_other_config(tmp_path: Path) -> None:
    fill(claim_directory(example(GenerateConfig, tmp_path)))
    claim_directory(example(GenerateConfig, tmp_path, "seeds=[0,1]", "models=[mlp]", "device=cpu", "tracking=false"))
    wider = tmp_path / "benchmark"
    for overrides in ([], ["seeds=[5]", "sparsities=[0.5]", "criteria=[snip]", "models=[mlp]"]):
        claim_directory(load_config(BenchmarkConfig, None, [f"output={wider}", *overrides]))
        fill(wider)
    checks = tmp_path / "check"
    for overrides in (["checks=[densities]"], ["seeds=[5]", "criteria=[snip]", "checks=[densities,reinit]"]):
        claim_directory(load_config(CheckConfig, None, [f"output={checks}", *overrides]))
        fill(checks)


def test_a_directory_without_results_belongs_to_nobody(tmp_path: Path) -> None:
    """A run that failed on its input must not bar the corrected one from its own directory."""
    directory = claim_directory(example(GenerateConfig, tmp_path))
    (directory / "records" / "r.state").mkdir(parents=True)
    (directory / "records" / "r.state" / "training.pt").write_text("half a round")
    (directory / "records" / ".r.h5.lock").write_text("")
    (directory / "mlflow.db").write_text("")
    (directory / "mlflow.db.lock").write_text("")
    claim_directory(example(GenerateConfig, tmp_path, "recipe.lr=0.2"))
    fill(directory)
    with pytest.raises(AutoSparseError, match=r"there recipe.lr is 0.2, here 0.1"):
        claim_directory(example(GenerateConfig, tmp_path))


def test_places_that_are_no_directory_are_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(AutoSparseError, match=r"out is a file: choose a directory"):
        claim_directory(example(TrainConfig, tmp_path))


def test_a_damaged_config_in_the_directory_is_another_config(tmp_path: Path) -> None:
    directory = claim_directory(example(TrainConfig, tmp_path))
    fill(directory)
    (directory / "config.yaml").write_text("a: [1")
    with pytest.raises(AutoSparseError, match="belongs to another config"):
        claim_directory(example(TrainConfig, tmp_path))


def test_plain_values_are_yaml(tmp_path: Path) -> None:
    for schema in SCHEMAS.values():
        assert yaml.safe_load(yaml.safe_dump(plain(schema()))) == plain(schema())
    assert load_config(FitConfig, None).fit.features is None


def test_an_executor_is_how_and_not_what(tmp_path: Path) -> None:
    for schema in (GenerateConfig, BenchmarkConfig, CheckConfig):
        output = tmp_path / schema.__name__
        assert load_config(schema, None).executor == ExecutorSettings()
        chosen = load_config(schema, None, [f"output={output}", "executor=local", "executor.workers=2"])
        assert chosen.executor == ExecutorSettings("local", workers=2)
        claim_directory(chosen)
        (output / "results.csv").write_text("")
        claim_directory(load_config(schema, None, [f"output={output}", "executor=ray"]))
    with pytest.raises(AutoSparseError, match=r"executor.kind is 'locl': did you mean 'local'"):
        load_config(GenerateConfig, None, ["executor=locl"])


def test_an_unknown_setting_of_a_method_is_named_with_its_value(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("criteria: [{criterion: gmp, evry: 2}]")
    with pytest.raises(AutoSparseError, match=r"evry of gmp is 2: did you mean 'every'"):
        load_config(BenchmarkConfig, path)
