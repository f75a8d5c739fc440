"""What the commands take: one dataclass each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from autosparse.errors import require, require_unset, settings, suggest
from autosparse.experiment.candidates import Candidate, expand
from autosparse.experiment.design import DesignSettings
from autosparse.experiment.structured import Thinning, thinnings
from autosparse.jobs.executor import ExecutorSettings
from autosparse.masks.schedule import check_sparsity
from autosparse.network.diagnostics import DiagnosticSettings
from autosparse.network.signals import SignalSettings
from autosparse.report.checks import CHECKS
from autosparse.scorers.outcome import OutcomeSettings
from autosparse.scorers.rows import FitSettings
from autosparse.scorers.task import StampSettings
from autosparse.search.irp import IRPSettings
from autosparse.trainability.forms import ExportSettings
from autosparse.trainability.fuse import FuseSettings
from autosparse.trainability.gates import GateSettings
from autosparse.trainability.prepare import check_preparation
from autosparse.trainability.tpp import TPPSettings
from autosparse.training.data import DataSettings
from autosparse.training.models import ModelSettings
from autosparse.training.recipe import Recipe
from autosparse.training.tasks import TaskSettings
from data_gen.gradual import GradualSettings


@settings
class GenerateConfig:
    """`autosparse generate`: record IRP runs of every model with every seed, into `output/records`.

    `gradual`: record one gradual pruning run in place of each IRP run, at the cost of two trainings; `irp` is
    not used then. `tasks`: draw the networks at random; leave `models` and `seeds` out. In a YAML file, each entry of
    `tasks.data` inherits from `data` what it does not set.
    """

    output: str = "runs/irp"
    models: tuple[ModelSettings, ...] = (ModelSettings("resnet20"),)
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    irp: IRPSettings = IRPSettings()
    gradual: GradualSettings | None = None
    signals: SignalSettings = SignalSettings()
    seeds: tuple[int, ...] = (0,)
    tasks: TaskSettings | None = None
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        if self.tasks is not None:
            require_unset(self, ("models", "seeds"), "", "tasks draws the networks")


def _check_file_name(name: str) -> None:
    plain = bool(name) and Path(name).name == name and name.isprintable()
    require(plain, "name", name, "it becomes NAME.safetensors in output: give a name without a folder")


@settings
class FitConfig:
    """`autosparse fit`: fit a scorer to records, into `output/NAME.safetensors`.

    `records`: files, or directories that are searched for `*.h5`. `alias`: given to the new version in MLflow's
    registry, so that `models:/NAME@ALIAS` finds it.
    """

    output: str = "runs/scorer"
    records: tuple[str, ...] = ("runs/irp",)
    name: str = "scorer"
    alias: str | None = None
    fit: FitSettings = FitSettings()
    device: str = "cpu"
    tracking: bool = True

    def __post_init__(self) -> None:
        _check_file_name(self.name)


@settings
class TuneConfig:
    """`autosparse tune`: learn a scorer's layer densities from the outcome of short trainings.

    `scorer`: name or file to start from; `null`: start from ERK densities, without a network. `tasks`: drawn as for
    `generate`; use another seed than the scorer's corpus. `tune` needs validation images. With `design`, a designed
    experiment replaces `tune`: it starts from `design.base`, and its rule is fitted to accuracy on the test images.
    """

    output: str = "runs/tune"
    scorer: str | None = None
    name: str = "tuned"
    tasks: TaskSettings = TaskSettings(seed=1)
    data: DataSettings = DataSettings("cifar10", image_size=16, limit=5000, validation=0.4)
    recipe: Recipe = Recipe()
    tune: OutcomeSettings = OutcomeSettings()
    design: DesignSettings | None = None
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()

    def __post_init__(self) -> None:
        _check_file_name(self.name)
        if self.design is not None:
            require_unset(self, ("scorer",), "", "a design begins at design.base")
            names = [field.name for field in dataclasses.fields(OutcomeSettings)]
            require_unset(self.tune, names, "tune.", "a design does not use it")


@settings
class PruneConfig:
    """`autosparse prune`: masks of one freshly initialized network, into `output/masks.safetensors`.

    `sparsity` is `null` with an N:M pattern, which sets it.
    """

    output: str = "runs/prune"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    criterion: Candidate = Candidate("narrow_igq")
    sparsity: float | None = 0.95
    recipe: Recipe = Recipe()
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        chosen = self.criterion
        no_weights = "prune writes masks, and this changes the weights too: use autosparse benchmark, or leave it out"
        always = getattr(chosen.options, "continues", False)
        require(chosen.variant != "reinit" and not always, "criterion", chosen.name, no_weights)
        require(not chosen.continues, "continues", chosen.continues, no_weights)
        require(chosen.prepare is None, "prepare", chosen.prepare, no_weights)


@settings
class TrainConfig:
    """`autosparse train`: train one network, dense or with masks, into `output/model.safetensors`.

    `prepare`: changes the remaining weights before training (`autosparse list preparations`); masks that it chooses
    itself go into `output/masks.safetensors`. `device`, in every command: `auto`, `cpu`, `cuda`, `cuda:1`, or several,
    `cuda:0,1` (`cpu:2`: two processes). Trainings use all of them, everything else the first.
    """

    output: str = "runs/train"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    masks: str | None = None
    prepare: str | None = None
    seed: int = 0
    device: str = "auto"
    tracking: bool = True

    def __post_init__(self) -> None:
        check_preparation(self.prepare)


@settings
class ExportConfig:
    """`autosparse export`: write a pruned network in the forms of `export.forms`, and a table of them, into `output`.

    `weights`: model.safetensors of `autosparse train`; `null`: the initialization of `seed`. `masks`: a file of
    `autosparse prune`. To need no data, give `input_size` ([channels, height, width]) and `classes` in place of `data`.
    `smaller: true`: `weights` are of the smaller network, without the masked filters; `false`: of the whole network, to
    which the masks apply.
    """

    output: str = "runs/export"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    input_size: tuple[int, int, int] | None = None
    classes: int | None = None
    weights: str | None = None
    masks: str = "runs/prune/masks.safetensors"
    smaller: bool = False
    seed: int = 0
    export: ExportSettings = ExportSettings()
    device: str = "auto"

    def __post_init__(self) -> None:
        both = (self.input_size is None) == (self.classes is None)
        require(both, "input_size", self.input_size, "give both input_size and classes, or neither and set data")
        if self.input_size is not None and self.classes is not None:
            channels, height, width = self.input_size
            good = channels >= 1 and height == width >= 1
            require(good, "input_size", list(self.input_size), "give [channels, side, side], such as [3, 32, 32]")
            require(self.classes >= 1, "classes", self.classes, "give at least 1")


@settings
class BenchmarkConfig:
    """`autosparse benchmark`: the grid models × criteria × sparsities × seeds, into `output/results.csv`."""

    output: str = "runs/benchmark"
    models: tuple[ModelSettings, ...] = (ModelSettings("resnet20"),)
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    criteria: tuple[Candidate, ...] = (Candidate("erk"), Candidate("magnitude"), Candidate("snip"))
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            check_sparsity(sparsity)


@settings
class CheckConfig:
    """`autosparse check`: every criterion beside its variants, into `output/results.csv`.

    `criteria`: without variants. `checks`: the variants to add; methods that search by training get no `inverted`.
    """

    output: str = "runs/check"
    models: tuple[ModelSettings, ...] = (ModelSettings("resnet20"),)
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    criteria: tuple[Candidate, ...] = (Candidate("magnitude"), Candidate("snip"))
    sparsities: tuple[float, ...] = (0.95,)
    seeds: tuple[int, ...] = (0, 1, 2)
    checks: tuple[str, ...] = tuple(CHECKS)
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        require(len(self.checks) > 0, "checks", list(self.checks), f"give at least one of {', '.join(CHECKS)}")
        for check in self.checks:
            require(check in CHECKS, "checks", check, suggest(check, CHECKS))
        for criterion in self.criteria:
            require(
                criterion.variant is None,
                "criteria",
                criterion.criterion,
                f"give {criterion.base!r}: checks adds the variants",
            )
        expand(self.criteria, self.checks)  # raises where a criterion cannot have a variant


@settings
class DiagnoseConfig:
    """`autosparse diagnose`: measure one network dense, pruned by each of `criteria`, and then prepared.

    Writes `output/diagnosis.csv` (a row per layer and state) and `output/summary.csv` (a row per state). `weights`: a
    file of `autosparse train`; `null`: the initialization of `seed`. `masks`: a file of `autosparse prune`, one more
    state. `criteria` must keep the network's weights: no `reinit:`, no `continues`.
    """

    output: str = "runs/diagnose"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    weights: str | None = None
    masks: str | None = None
    criteria: tuple[Candidate, ...] = (Candidate("erk"), Candidate("snip"))
    sparsity: float | None = 0.95
    prepare: tuple[str, ...] = ("repair",)
    diagnostics: DiagnosticSettings = DiagnosticSettings()
    recipe: Recipe = Recipe()
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        for how in self.prepare:
            check_preparation(how)
        for one in self.criteria:
            require(one.prepare is None, f"prepare of {one.criterion}", one.prepare, "prepare of the config adds them")
            draws = one.variant == "reinit" or one.continues
            require(not draws, "criteria", one.criterion, "diagnose measures masks on the network's own weights")
            for how in self.prepare:
                dataclasses.replace(one, prepare=how)  # raises where the two do not go together


@settings
class ShrinkConfig:
    """`autosparse shrink`: train dense networks, make each smaller by every method, fine-tune what is left.

    Writes `output/results.csv` and `output/networks`. `recipe`: the dense training, which methods with a ratio and fuse
    share. `tpp`: the steps between that and the removal; every method with a ratio trains them, only tpp methods with
    the penalty, with batch size and optimizer of `finetune`. `finetune`: training of the smaller network. `methods`:

    - `l1` removes the filters of lowest mean |w|; `tpp` first pushes them towards zero; `snip` or `tpp:snip` (any
      criterion or scorer) chooses by that criterion. `ratios`: share of filters to remove from each convolution whose
      filters can be removed alone, or shares by pattern on weight names.
    - `fuse` replaces each run of layers in `fuse.runs` by one fitted layer; `fuse:fresh` initializes that layer anew,
      `fuse:random` keeps only the norms of its filters, `fuse:scratch` initializes the whole network. No ratio.
    - `layers` and `units` train from the initialization with `gates` on residual branches or filters, which are removed
      during the training of `recipe`; `layers:shuffled`, `units:shuffled` remove as many at random. No ratio.
    - `stamp` needs `reference`: the dense network is trained on that data and gets a new last layer for `data`. A few
      images of `data` decide which filters stay, at the multiply-adds of `l1`; for `stamp:other`, of `reference`.
    """

    output: str = "runs/shrink"
    model: ModelSettings = ModelSettings("resnet20")
    data: DataSettings = DataSettings("cifar10")
    recipe: Recipe = Recipe()
    tpp: TPPSettings = TPPSettings()
    finetune: Recipe = Recipe(epochs=120, lr=0.01)
    fuse: FuseSettings = FuseSettings()
    gates: GateSettings = GateSettings()
    stamp: StampSettings = StampSettings()
    reference: DataSettings | None = None
    methods: tuple[str, ...] = ("tpp", "l1")
    ratios: tuple[float | Mapping[str, float], ...] = (0.5,)
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        self.networks()

    def networks(self) -> list[Thinning]:
        """All that is trained."""
        return thinnings(
            self.model,
            self.data,
            self.recipe,
            self.tpp,
            self.finetune,
            self.methods,
            self.ratios,
            self.seeds,
            fuse=self.fuse,
            gates=self.gates,
            stamp=self.stamp,
            reference=self.reference,
        )


@settings
class QuickstartConfig:
    """`autosparse quickstart`: generate, fit and benchmark on the digits, into one directory.

    `irp`: of the recorded runs. `rounds`: IRP rounds of the ticket in the comparison. `floor`: smallest density of a
    layer, for every criterion.
    """

    output: str = "runs/quickstart"
    data: DataSettings = DataSettings("digits")
    recipe: Recipe = Recipe(epochs=15, schedule="cosine")
    sources: tuple[ModelSettings, ...] = (ModelSettings("convnet"), ModelSettings("resnet8", 8))
    source_seeds: tuple[int, ...] = (0, 1)
    irp: IRPSettings = IRPSettings(rounds=8, density=0.02)
    signals: SignalSettings = SignalSettings(n_batches=8)
    fit: FitSettings = FitSettings(validation="none")  # four runs: one is for test, none for validation
    target: ModelSettings = ModelSettings("vgg11", 8)
    sparsities: tuple[float, ...] = (0.9, 0.98)
    rounds: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)
    floor: float = 0.005
    device: str = "cpu"
    executor: ExecutorSettings = ExecutorSettings()
    tracking: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.floor < 1, "floor", self.floor, "it is the smallest density of a layer, in [0, 1)")
        require(self.rounds >= 1, "rounds", self.rounds, "give at least 1")
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
