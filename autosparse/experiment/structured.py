"""The comparison of ways to make a network physically smaller: filters that go, after TPP or at once after equal steps,
layers that are fused, and branches and units that leave in training.

`seconds` of a result are those after the dense training, `total_seconds` those of all that its method takes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure, of_state, require
from autosparse.experiment.benchmark import with_inputs
from autosparse.experiment.candidates import Candidate, find_masks, identity
from autosparse.files import fingerprint, read_json, read_safetensors, write_safetensors
from autosparse.jobs.cells import Progress, Result, result_path, run_cells, unfinished, write_table
from autosparse.jobs.executor import INLINE, Event, ExecutorSettings
from autosparse.masks.mask import Masks
from autosparse.network.size import size
from autosparse.report.text import Table, in_percent, stat
from autosparse.trainability.fuse import Fused, FuseSettings, fresh, fuse
from autosparse.trainability.gated import train_gated
from autosparse.trainability.gates import Gates, GateSettings
from autosparse.trainability.shrink import remove
from autosparse.trainability.stored import save_weights
from autosparse.trainability.tpp import Ratio, TPPSettings, filter_densities, push_out
from autosparse.training.data import DataSettings, ImageData
from autosparse.training.loop import check_fits, evaluate, full_state, put_back
from autosparse.training.models import ModelSettings, build_model
from autosparse.training.recipe import Recipe
from autosparse.training.threads import threads_for
from autosparse.training.train import train

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
    "fuse:random": "random, with the norms of the fused",
}
GATED = {  # by method: what gates close, and whether at random
    "layers": ("layers", False),
    "units": ("units", False),
    "layers:shuffled": ("layers", True),
    "units:shuffled": ("units", True),
}
NO_RATIO = (*FUSED, *GATED)
_SCHEMA = "autosparse.state/1"  # all parameters and buffers of a network


def candidate(method: str) -> Candidate:
    """How a method chooses its filters: `"tpp"` and `"l1"` by mean |w|, `"tpp:ANY"` and `"ANY"` by that criterion.

    Raises:
        AutoSparseError: an unknown criterion, or one that searches by training.
    """
    criterion = method.removeprefix("tpp:")
    chosen = Candidate("magnitude" if criterion in ("tpp", "l1") else criterion)
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
        return Thinning(self.model, self.data, self.recipe, self.seed, inputs=self.inputs)

    def key(self) -> str:
        """File name: readable, and unique through a hash of the settings and inputs."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        values["data"].pop("root")
        for part in ("fuse", "gates"):
            if values[part] is None:
                del values[part]
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
        train_network = _train_dense if self.method is None else _make_smaller
        if self.method in FUSED:
            train_network = _make_shallower
        elif self.method in GATED:
            train_network = _close_gates
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
        found.append(Thinning(model, data, recipe, seed))
        thinned = [m for m in methods if m not in NO_RATIO]
        found += [Thinning(model, data, recipe, seed, m, ratio, tpp, finetune) for ratio in ratios for m in thinned]
        found += [Thinning(model, data, recipe, seed, m, 0.0, None, finetune, fuse) for m in methods if m in FUSED]
        for method in (m for m in methods if m in GATED):
            of, shuffled = GATED[method]
            own = dataclasses.replace(gates or GateSettings(), of=of, shuffled=shuffled)
            found.append(Thinning(model, data, recipe, seed, method, 0.0, None, finetune, gates=own))
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
    for ratio, thinning in {t.ratio_label: t for t in unfinished(todo, directory)}.items():
        model = build_model(thinning.model, data)  # wrong input ends here, before hours are spent
        check_fits(model, data.to("cpu"))
        if thinning.fuse is not None:
            _fused(thinning.fuse, model, data.to("cpu"), 0, few=True)
        elif thinning.gates is not None:
            Gates.of(model, data.normalise(data.train.images[:2]).cpu(), thinning.gates, 0)
        elif ratio:
            filter_densities(model, data.normalise(data.train.images[:2]).cpu(), thinning.ratio)
    write = partial(write_table, directory / "results.csv", COLUMNS)
    return run_cells(todo, directory, data, write, device=device, executor=executor, on_event=on_event)


def _train_dense(
    thinning: Thinning, model: nn.Module, directory: Path, data: ImageData, device: str, state: Path, progress: Progress
) -> dict[str, Any]:
    trained = train(
        model,
        data,
        thinning.recipe,
        seed=thinning.seed,
        device=device,
        checkpoint=state / "dense.pt",
        on_epoch=_staged("dense", progress),
    )
    write_safetensors(result_path(directory, thinning).with_suffix(".safetensors"), full_state(model), _SCHEMA)
    before = size(model, data.normalise(data.train.images[:2]))
    return {
        **thinning.row(),
        "dense_accuracy": trained.accuracy,
        "accuracy": trained.accuracy,
        "parameters_before": before.parameters,
        "parameters": before.parameters,
        "macs_before": before.macs,
        "macs": before.macs,
        "seconds": trained.seconds,
        "total_seconds": trained.seconds,
        "history": trained.history,
        "arithmetic": trained.arithmetic,
    }


def _make_smaller(
    thinning: Thinning, model: nn.Module, directory: Path, data: ImageData, device: str, state: Path, progress: Progress
) -> dict[str, Any]:
    """Choose filters, push them out, remove them, fine-tune; each stage asks first for what an earlier try left."""
    assert thinning.method is not None and thinning.tpp is not None and thinning.finetune is not None
    path, dense = result_path(directory, thinning), _trained_dense(thinning, model, directory)
    example = data.normalise(data.train.images[:2])
    chosen = state / "masks.safetensors"
    if not chosen.exists():
        progress({"stage": "choosing filters"})
        _choose(thinning, model, data, example, device).save(chosen)
    with of_state():
        masks = Masks.load(chosen).to(data.device)
    removal = remove(model, masks, example)
    if not removal.removed:
        reasons = "; ".join(f"{name}: {why}" for name, why in removal.stays.items()) or "the ratios empty none"
        raise AutoSparseError(f"ratio {thinning.ratio_label} removes no filter of {thinning.model.label()} ({reasons})")
    ramped = state / "ramp.safetensors"
    if ramped.exists():
        with of_state():
            weights, figures = read_safetensors(ramped, _SCHEMA, "state of a cell")
        put_back(model, weights)
    else:
        trained = push_out(
            model,
            data,
            removal,
            thinning.tpp,
            thinning.finetune,
            penalise=thinning.method.split(":")[0] == "tpp",
            seed=thinning.seed,
            device=device,
            checkpoint=state / "ramp.pt",
            on_epoch=_staged("ramp", progress),
        )
        figures = {"accuracy": repr(trained.accuracy), "seconds": repr(trained.seconds)}
        write_safetensors(ramped, full_state(model), _SCHEMA, **figures)
    before = size(model, example)
    removal = remove(model, masks, example)
    smaller = removal.smaller
    removed_accuracy, _ = evaluate(smaller, data, channels_last=thinning.finetune.channels_last)
    trained = train(
        smaller,
        data,
        thinning.finetune,
        seed=thinning.seed,
        device=device,
        checkpoint=state / "finetune.pt",
        on_epoch=_staged("fine-tuning", progress),
    )
    after = size(smaller, example)
    masks.save(path.with_suffix(".masks.safetensors"))
    save_weights(path.with_suffix(".safetensors"), smaller)
    return {
        **thinning.row(),
        "dense_accuracy": dense["accuracy"],
        "ramp_accuracy": float(figures["accuracy"]),
        "removed_accuracy": removed_accuracy,
        "accuracy": trained.accuracy,
        "parameters_before": before.parameters,
        "parameters": after.parameters,
        "macs_before": before.macs,
        "macs": after.macs,
        "seconds": float(figures["seconds"]) + trained.seconds,
        "total_seconds": dense["seconds"] + float(figures["seconds"]) + trained.seconds,
        "filters": {name: len(filters) for name, filters in removal.removed.items()},
        "stays": dict(removal.stays),
        "history": trained.history,
        "arithmetic": trained.arithmetic,
    }


def _make_shallower(
    thinning: Thinning, model: nn.Module, directory: Path, data: ImageData, device: str, state: Path, progress: Progress
) -> dict[str, Any]:
    """Fuse layers of the trained network, and train what comes of it."""
    assert thinning.fuse is not None and thinning.finetune is not None
    path, dense = result_path(directory, thinning), _trained_dense(thinning, model, directory)
    example = data.normalise(data.train.images[:2])
    progress({"stage": "fusing"})
    clock = time.perf_counter()
    fused = _fused(thinning.fuse, model, data, thinning.seed)
    seconds = time.perf_counter() - clock
    smaller = fused.model
    if thinning.method != "fuse":
        smaller = fresh(fused, thinning.seed, equal_norms=thinning.method == "fuse:random")
    before, after = size(model, example), size(smaller, example)
    fused_accuracy, _ = evaluate(smaller, data, channels_last=thinning.finetune.channels_last)
    trained = train(
        smaller,
        data,
        thinning.finetune,
        seed=thinning.seed,
        device=device,
        checkpoint=state / "finetune.pt",
        on_epoch=_staged("fine-tuning", progress),
    )
    save_weights(path.with_suffix(".safetensors"), smaller)
    return {
        **thinning.row(),
        "dense_accuracy": dense["accuracy"],
        "ramp_accuracy": None,
        "removed_accuracy": fused_accuracy,
        "accuracy": trained.accuracy,
        "parameters_before": before.parameters,
        "parameters": after.parameters,
        "macs_before": before.macs,
        "macs": after.macs,
        "seconds": seconds + trained.seconds,
        "total_seconds": dense["seconds"] + seconds + trained.seconds,
        "errors": dict(fused.errors),
        "history": trained.history,
        "arithmetic": trained.arithmetic,
    }


def _close_gates(
    thinning: Thinning, model: nn.Module, directory: Path, data: ImageData, device: str, state: Path, progress: Progress
) -> dict[str, Any]:
    """Train from the initialization with gates, and fine-tune what is left, as the other methods do."""
    assert thinning.gates is not None and thinning.finetune is not None
    path = result_path(directory, thinning)
    dense = read_json(result_path(directory, thinning.dense()), "result")
    example = data.normalise(data.train.images[:2])
    before = size(model, example)
    how: dict[str, Any] = {"seed": thinning.seed, "device": device}
    gated = train_gated(
        model,
        data,
        thinning.recipe,
        thinning.gates,
        checkpoint=state / "gated.pt",
        on_epoch=_staged("closing gates", progress),
        **how,
    )
    smaller, after = gated.model, size(gated.model, example)
    trained = train(
        smaller,
        data,
        thinning.finetune,
        checkpoint=state / "finetune.pt",
        on_epoch=_staged("fine-tuning", progress),
        **how,
    )
    save_weights(path.with_suffix(".safetensors"), smaller)
    return {
        **thinning.row(),
        "dense_accuracy": dense["accuracy"],
        "ramp_accuracy": None,
        "removed_accuracy": gated.accuracy,
        "accuracy": trained.accuracy,
        "parameters_before": before.parameters,
        "parameters": after.parameters,
        "macs_before": before.macs,
        "macs": after.macs,
        "seconds": gated.seconds + trained.seconds,
        "total_seconds": gated.seconds + trained.seconds,
        "removed": gated.removed,
        "history": [*gated.history, *trained.history],
        "arithmetic": trained.arithmetic,
    }


def _fused(chosen: FuseSettings, model: nn.Module, data: ImageData, seed: int, few: bool = False) -> Fused:
    """The fused network; `few`: from hardly any data, to see whether it can be made."""
    batches = data.sample(8 if few else chosen.batch_size, 1 if few else chosen.n_batches, seed)
    return fuse(model, chosen.runs, batches, how=chosen.how, n_batches=len(batches), kernel=chosen.kernel)


def _trained_dense(thinning: Thinning, model: nn.Module, directory: Path) -> dict[str, Any]:
    """The result of the dense training, whose weights are put into `model`."""
    origin = result_path(directory, thinning.dense())
    if not origin.exists():
        raise AutoSparseFailure(f"the dense network of seed {thinning.seed} is missing: see why its training failed")
    put_back(model, read_safetensors(origin.with_suffix(".safetensors"), _SCHEMA, "weights")[0])
    return read_json(origin, "result")


def _choose(thinning: Thinning, model: nn.Module, data: ImageData, example: Tensor, device: str) -> Masks:
    """The masks of the filters that will go, chosen on the trained dense network."""
    densities = filter_densities(model, example, thinning.ratio)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_masks(
            model,
            data,
            candidate(thinning.method or ""),
            None,
            recipe=thinning.recipe,
            seed=thinning.seed,
            device=device,
            scope=densities,
        ).masks


def _staged(stage: str, progress: Progress) -> Callable[[dict[str, float]], None]:
    return lambda row: progress({"stage": stage, **row})


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
