"""The comparison of ways to make a network physically smaller: filters that go, after TPP or at once after equal steps,
layers that are fused, and branches and units that leave in training.

`seconds` of a result are those after the dense training, `total_seconds` those of all that its method takes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from autosparse.errors import AutoSparseError, require, suggest
from autosparse.experiment.benchmark import with_inputs
from autosparse.experiment.candidates import Candidate, identity, is_name
from autosparse.experiment.making import close_gates, fused_network, make_shallower, make_smaller, train_dense
from autosparse.files import fingerprint
from autosparse.jobs.cells import Progress, Result, result_path, run_cells, unfinished, write_table
from autosparse.jobs.executor import INLINE, Event, ExecutorSettings
from autosparse.pruning.criteria import PRESETS
from autosparse.report.checks import split
from autosparse.report.text import Table, in_percent, stat
from autosparse.scorers.task import StampSettings
from autosparse.trainability.fuse import FuseSettings
from autosparse.trainability.gates import Gates, GateSettings
from autosparse.trainability.tpp import Ratio, TPPSettings, filter_densities
from autosparse.training.data import DataSettings, ImageData, shared_data
from autosparse.training.loop import check_fits
from autosparse.training.models import ModelSettings, build_model
from autosparse.training.recipe import Recipe
from autosparse.training.threads import threads_for

COLUMNS = (
    "model",
    "data",
    "method",
    "ratio",
    "seed",
    "dense_accuracy",
    "ramp_accuracy",
    "removed_accuracy",
    "accuracy",
    "parameters_before",
    "parameters",
    "macs_before",
    "macs",
    "seconds",
    "total_seconds",
    "error",
)
FUSED = {  # by method: how the fused layers begin
    "fuse": "from the layers that they replace",
    "fuse:fresh": "freshly initialized",
    "fuse:scratch": "freshly initialized, with the whole network",
    "fuse:random": "random, with the norms of the fused",
}
GATED = {  # by method: what gates close, and whether at random
    "layers": ("layers", False),
    "units": ("units", False),
    "layers:shuffled": ("layers", True),
    "units:shuffled": ("units", True),
}
NO_RATIO = (*FUSED, *GATED)
STAMP = {  # by method: what the task encoder sees
    "stamp": "images of the data",
    "stamp:other": "images of the reference data",
}
_SCHEMA = "autosparse.state/1"  # all parameters and buffers of a network


METHODS = {  # what each does, for a list
    "l1": "filters of the lowest mean |w| go",
    "tpp": "the same filters are pushed out before they go",
    "CRITERION, tpp:CRITERION": "filters of the lowest scores go, at once or pushed out",
    "layers": "residual branches leave in training; layers:shuffled, as many at random",
    "units": "filters leave in training; units:shuffled, as many at random",
    "fuse": "one fitted layer replaces several; controls with random weights: fuse:fresh, fuse:random, fuse:scratch",
    "stamp": "filters are chosen for a task from a few of its images; control, images of reference: stamp:other",
}


def candidate(method: str) -> Candidate:
    """How a method chooses its filters: `"tpp"` and `"l1"` by mean |w|, `"tpp:ANY"` and `"ANY"` by that criterion.

    Raises:
        AutoSparseError: an unknown criterion, or one that searches by training.
    """
    criterion = method.removeprefix("tpp:")
    if method in STAMP:
        criterion = "l1"
    criterion = "magnitude" if criterion in ("tpp", "l1") else criterion
    if not is_name(split(criterion)[1]):
        known = suggest(criterion, ["l1", "tpp", *NO_RATIO, *STAMP, *PRESETS])
        raise AutoSparseError(f"methods holds {method!r}: {known}; or a scorer; tpp: may stand before one")
    chosen = Candidate(criterion)
    require(not chosen.searches, "method", method, "it removes single weights; give a criterion or a scorer")
    return dataclasses.replace(chosen, granularity="channel")


@dataclass(frozen=True)
class Thinning:
    """One network made smaller: everything that its result depends on; the dense training has no `method` and the rest.

    `inputs`: fingerprint of its images and initial network, see `benchmark.with_inputs`.
    """

    model: ModelSettings
    data: DataSettings
    recipe: Recipe
    seed: int
    method: str | None = None
    ratio: Ratio = 0.0
    tpp: TPPSettings | None = None
    finetune: Recipe | None = None
    fuse: FuseSettings | None = None
    gates: GateSettings | None = None
    stamp: StampSettings | None = None
    reference: DataSettings | None = None
    inputs: str = ""
    folder: ClassVar[str] = "networks"

    @property
    def ratio_label(self) -> str:
        """As it stands in tables; of the dense training nothing."""
        if self.method is None:
            return ""
        if self.method in NO_RATIO:
            return "–"
        if isinstance(self.ratio, Mapping):
            return " ".join(f"{pattern}={value:g}" for pattern, value in self.ratio.items())
        return f"{self.ratio:g}"

    def dense(self) -> Thinning:
        """The dense training that it begins with, which all methods and ratios share."""
        return Thinning(self.model, self.data, self.recipe, self.seed, reference=self.reference, inputs=self.inputs)

    def candidate(self) -> Candidate:
        """How it chooses its filters."""
        return candidate(self.method or "")

    def key(self) -> str:
        """File name: readable, and unique through a hash of the settings and inputs."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        values["data"].pop("root")
        for part in ("fuse", "gates", "stamp", "reference"):
            if values[part] is None:
                del values[part]
        if self.reference is not None:
            values["reference"].pop("root")
        name = "dense"
        if self.method in NO_RATIO:
            name = self.method
        elif self.method is not None:
            values["criterion"] = identity(candidate(self.method))
            name = f"{self.method}_{self.ratio_label}"
        digest = fingerprint(values)[:10]
        return f"{self.model.label()}_{re.sub(r'[^A-Za-z0-9.-]+', '_', name)[:60]}_s{self.seed}_{digest}"

    def row(self) -> dict[str, Any]:
        """What names the network in the table."""
        return {
            "model": self.model.label(),
            "data": self.data.label(),
            "method": self.method or "dense",
            "ratio": self.ratio_label,
            "seed": self.seed,
        }

    def shared(self, directory: Path) -> Path | None:
        """The result of the dense training."""
        return result_path(directory, self.dense())

    def run(self, directory: Path, data: ImageData, *, device: str, state: Path, progress: Progress) -> dict[str, Any]:
        """Train it; its weights (`.safetensors`) and masks (`.masks.safetensors`) are written beside the result."""
        model = build_model(self.model, data, self.seed).to(data.device)
        train_network = train_dense if self.method is None else make_smaller
        if self.method in FUSED:
            train_network = make_shallower
        elif self.method in GATED:
            train_network = close_gates
        with threads_for(model, data, self.recipe.batch_size):
            return train_network(self, model, directory, data, device, state, progress)


def thinnings(
    model: ModelSettings,
    data: DataSettings,
    recipe: Recipe,
    tpp: TPPSettings,
    finetune: Recipe,
    methods: Sequence[str],
    ratios: Sequence[Ratio],
    seeds: Sequence[int],
    fuse: FuseSettings | None = None,
    gates: GateSettings | None = None,
    stamp: StampSettings | None = None,
    reference: DataSettings | None = None,
) -> list[Thinning]:
    """All of a comparison, seed by seed, so that a stop leaves whole comparisons; each seed's dense training first. The
    methods `FUSED` and `GATED` have no ratio.

    Raises:
        AutoSparseError: an empty axis, an unknown method or one that stands there twice, an unknown scorer file.
    """
    for what, axis in (("methods", methods), ("ratios", ratios), ("seeds", seeds)):
        require(len(axis) > 0, what, list(axis), "give at least one")
    for method in methods:
        require(list(methods).count(method) == 1, "method", method, "give each once")
        if method in STAMP and reference is None:
            raise AutoSparseError(f"method {method} needs reference: the data that the network is trained on first")
        if method in GATED and reference is not None:
            raise AutoSparseError(f"method {method} trains from the initialization: leave reference out, or the method")
        if method not in NO_RATIO:
            identity(candidate(method))
        elif method in FUSED and (fuse is None or not fuse.runs):
            raise AutoSparseError(
                f"method {method} needs fuse.runs: pairs of names, the first and last layer of each run"
            )
    for ratio in ratios:
        for value in ratio.values() if isinstance(ratio, Mapping) else (ratio,):
            require(0 < value < 1, "ratio", value, "it is the share of filters that go, in (0, 1)")
    found = []
    for seed in seeds:
        other: dict[str, Any] = {"reference": reference}
        found.append(Thinning(model, data, recipe, seed, **other))
        thinned = [m for m in methods if m not in NO_RATIO]
        for ratio in ratios:
            for m in thinned:
                own = {**other, "stamp": (stamp or StampSettings()) if m in STAMP else None}
                found.append(Thinning(model, data, recipe, seed, m, ratio, tpp, finetune, **own))
        for m in (m for m in methods if m in FUSED):
            found.append(Thinning(model, data, recipe, seed, m, 0.0, None, finetune, fuse, **other))
        for method in (m for m in methods if m in GATED):
            of, shuffled = GATED[method]
            closing = dataclasses.replace(gates or GateSettings(), of=of, shuffled=shuffled)
            found.append(Thinning(model, data, recipe, seed, method, 0.0, None, finetune, gates=closing))
    return found


def run_thinnings(
    todo: Sequence[Thinning],
    directory: Path,
    data: ImageData,
    *,
    device: str = "auto",
    executor: ExecutorSettings = INLINE,
    on_event: Callable[[Event], None] | None = None,
) -> list[Result]:
    """Run what has no result in `directory/networks` yet, and keep `directory/results.csv` up to date; see `run_cells`.

    The smaller networks and their masks are written there too.

    Raises:
        AutoSparseError: the network cannot take the images, a ratio fits no layer, or another process works on the
            directory.
    """
    todo = with_inputs(todo, data)
    left = unfinished(todo, directory)
    for thinning in {(t.ratio_label, t.fuse, t.gates, t.stamp): t for t in left}.values():
        model = build_model(thinning.model, data)  # wrong input ends here, before hours are spent
        check_fits(model, data.to("cpu"))
        if thinning.reference is not None:
            _check_reference(thinning, data)
        if thinning.fuse is not None:
            fused_network(thinning.fuse, model, data.to("cpu"), 0, few=True)
        elif thinning.gates is not None:
            Gates.of(model, data.normalise(data.train.images[:2]).cpu(), thinning.gates, 0)
        elif thinning.method is not None:
            filter_densities(model, data.normalise(data.train.images[:2]).cpu(), thinning.ratio)
    write = partial(write_table, directory / "results.csv", COLUMNS)
    return run_cells(todo, directory, data, write, device=device, executor=executor, on_event=on_event)


def _check_reference(thinning: Thinning, data: ImageData) -> None:
    assert thinning.reference is not None
    reference = shared_data(thinning.reference, "cpu")
    shapes = {what: (d.channels, d.image_size) for what, d in (("data", data), ("reference", reference))}
    if len(set(shapes.values())) > 1:
        raise AutoSparseError(
            f"reference has images of {shapes['reference']} channels and pixels, data of {shapes['data']}: give both the same "
            "image_size"
        )
    if thinning.stamp is not None and thinning.stamp.classes > reference.classes:
        raise AutoSparseError(
            f"stamp.classes is {thinning.stamp.classes}: the reference has {reference.classes} classes"
        )


def summary(results: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracies in percent at each stage, mean ± std over seeds, and what is left of parameters and MACs."""
    headers = [
        "ratio",
        "method",
        "dense",
        "after the ramp",
        "after removal",
        "fine-tuned",
        "parameters",
        "MACs",
        "seconds in all",
        "seeds",
    ]
    rows = []
    done = [r for r in results if not r.get("error") and r["method"] != "dense"]
    for ratio, method in dict.fromkeys((r["ratio"], r["method"]) for r in done):
        group = [r for r in done if (r["ratio"], r["method"]) == (ratio, method)]
        stages = ("dense_accuracy", "ramp_accuracy", "removed_accuracy", "accuracy")
        accuracies = [in_percent(stat(r[stage] for r in group if r[stage] is not None)) for stage in stages]
        shares = [stat(r[key] / r[f"{key}_before"] for r in group)[0] for key in ("parameters", "macs")]
        seconds = f"{stat(r['total_seconds'] for r in group).mean:.0f}"
        rows.append([ratio, method, *accuracies, *(f"{100 * s:.1f} %" for s in shares), seconds, str(len(group))])
    return Table("accuracy at each stage, %, and what is left of the network", headers, rows)
