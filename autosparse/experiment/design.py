"""A designed experiment on layer densities: drawn around a base, one training each, and a rule fitted to the outcomes.

Each task is a network, a data set, a sparsity and a seed. Its base is the geometric mean of hand-made layer densities; a
draw multiplies them by independent log-normal factors and scales them to the exact total. Positions are spread.
Draws, base and hand-made densities of a task train from the same weights in the same data order, so that differences are
paired.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from autosparse.errors import AutoSparseError, require, settings
from autosparse.files import fingerprint
from autosparse.jobs.cells import Progress, Result, run_cells, write_table
from autosparse.jobs.executor import INLINE, Event, ExecutorSettings
from autosparse.masks.densities import DENSITIES, layer_densities
from autosparse.masks.layers import Layer
from autosparse.masks.mask import Masks
from autosparse.masks.random import make_generator, make_numpy_generator
from autosparse.masks.schedule import check_sparsity
from autosparse.network.graph import trace
from autosparse.network.signals import measure
from autosparse.pruning.criteria import POSITIONS
from autosparse.pruning.prune import prune
from autosparse.report.text import plural
from autosparse.scorers.features import contexts
from autosparse.scorers.outcome import Task, inputs_of
from autosparse.scorers.rule import FROM_GRAPH, LEAST, OF_CRITERION, STRUCTURE, structure
from autosparse.training.data import DataSettings, ImageData
from autosparse.training.models import ModelSettings, build_model
from autosparse.training.recipe import Recipe
from autosparse.training.threads import threads_for
from autosparse.training.train import train

COLUMNS = (
    *("model", "data", "sparsity", "seed", "source", "accuracy", "loss", "validation_loss", "base_accuracy"),
    *("train_seconds", "recipe", "error"),
)
BASE, DENSE = "base", "dense"
BATCH = 128  # images of the one batch that criteria are measured on
CRITERIA = ("erk", "igq", "synflow", "snip")
MEASURED = ("synflow", "snip")  # the others follow from the shapes of the layers alone
FEATURES = (
    *(name for name in STRUCTURE if name != "layer_erk"),
    *FROM_GRAPH,
    *(OF_CRITERION + name for name in CRITERIA),
)


@settings
class DesignSettings:
    """What is drawn for each task.

    `draws` layer densities with log-normal factors of standard deviation `sigma`, besides the base itself and the densities of
    `rivals`. Draws come in pairs, the second with the inverse factors of the first, so that what is linear in the log
    densities stands apart from what is not. `along`: features of `FEATURES`; then the factors of a network's layers are
    `exp(σ·Σ_k ε_k·f_lk/√K)`, with each feature standardised over its layers and `ε_k` of variance 1: fewer directions, and
    each is learned from fewer trainings. The rule has only these features then. `base`: the geometric mean of the layer
    densities of these. Tasks take `sparsities` in turn. `positions`: `"spread"` or `"spread_small"`, where weights stay
    within a layer.
    """

    draws: int = 24
    sigma: float = 0.8
    base: tuple[str, ...] = ("igq",)
    sparsities: tuple[float, ...] = (0.95,)
    rivals: tuple[str, ...] = ("erk", "igq", "snip", "synflow")
    positions: str = "spread"
    along: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.draws >= 1, "design.draws", self.draws, "give at least 1")
        require(0 < self.sigma < math.inf, "design.sigma", self.sigma, "give a positive number")
        unknown = [name for name in self.base if name not in CRITERIA]
        good = len(self.base) > 0 and not unknown and len(set(self.base)) == len(self.base)
        require(good, "design.base", list(self.base), f"give some of these, each once: {', '.join(CRITERIA)}")
        every = (*DENSITIES, *MEASURED)
        once = len(set(self.rivals)) == len(self.rivals) and set(self.rivals) <= set(every)
        require(once, "design.rivals", list(self.rivals), f"give each once, of: {', '.join(every)}")
        require(len(self.sparsities) > 0, "design.sparsities", list(self.sparsities), "give at least one")
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        strange = [name for name in self.along if name not in FEATURES]
        good = not strange and len(set(self.along)) == len(self.along)
        require(
            good, "design.along", list(self.along), f"give some of these, each once: {', '.join(FEATURES)}; or none"
        )
        known = [p for p in POSITIONS if p.startswith("spread") and p != "spread_scores"]
        require(self.positions in known, "design.positions", self.positions, f"known: {', '.join(known)}")


@dataclass(frozen=True)
class DesignCell:
    """One training: everything that its result depends on. `source`: `"dense"`, `"base"`, a rival, or `"draw 3"`."""

    model: ModelSettings
    data: DataSettings
    recipe: Recipe
    seed: int
    sparsity: float
    source: str
    design: DesignSettings
    inputs: str = ""
    folder: ClassVar[str] = "trials"

    def key(self) -> str:
        """File name: readable, and unique through a hash of the settings and inputs; not of how many draws there are."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        values["data"].pop("root")
        values["design"] = {k: values["design"][k] for k in ("sigma", "base", "positions", "along", "seed")}
        name = self.source.replace(" ", "_").replace(":", "_")
        return f"{self.model.label()[:60]}_{name}_{self.sparsity:g}_s{self.seed}_{fingerprint(values)[:10]}"

    def row(self) -> dict[str, Any]:
        """What names the cell in the table."""
        return {
            "model": self.model.label(),
            "data": self.data.label(),
            "sparsity": self.sparsity,
            "seed": self.seed,
            "source": self.source,
            "recipe": fingerprint(self.recipe)[:8],
        }

    def shared(self, directory: Path) -> Path | None:
        """Nothing is shared: each process computes the base densities of a task once."""
        return None

    def run(self, directory: Path, data: ImageData, *, device: str, state: Path, progress: Progress) -> dict[str, Any]:
        """Train under its layer densities."""
        model = build_model(self.model, data, self.seed).to(data.device)
        masks, layers = None, []
        with threads_for(model, data, self.recipe.batch_size):
            if self.source != DENSE:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a draw may leave a layer empty; its row says so
                    known, masks = self.masks(model, data)
                kept = {layer.name: layer.kept for layer in masks.layers()}
                layers = [{**known.rows[name], "kept": kept[name]} for name in known.rows]
            trained = train(
                model,
                data,
                self.recipe,
                masks=masks,
                seed=self.seed,
                device=device,
                checkpoint=state / "training.pt",
                on_epoch=progress,
            )
        last = trained.history[-1]
        return {
            **self.row(),
            "accuracy": trained.accuracy,
            "loss": trained.loss,
            "validation_loss": last["validation_loss"],
            "validation_accuracy": last["accuracy"],
            "train_seconds": trained.seconds,
            "layers": layers,
        }

    def masks(self, model: torch.nn.Module, data: ImageData) -> tuple[Known, Masks]:
        """What is known of the task's layers, and the masks of this cell."""
        key = fingerprint(self.inputs, self.sparsity, self.seed, self.design.base)
        if key not in _known:
            _known[key] = known_densities(model, data, self.sparsity, self.seed, self.design.base)
        known = _known[key]
        example = data.normalise(data.train.images[:2])
        how: dict[str, Any] = {"scope": self.densities(known), "example_input": example, "seed": self.seed}
        return known, prune(model, self.sparsity, self.design.positions, **how)

    def densities(self, known: Known) -> dict[str, float]:
        """The layer densities of this cell, before they are scaled to the exact total."""
        if self.source in known.densities:
            return known.densities[self.source]
        number = int(self.source.removeprefix("draw "))
        task = self.model.label(), self.data.label(), self.seed, self.sparsity
        generator = make_generator(self.design.seed, "layer densities", number // 2, *task)
        base, sigma = known.densities[BASE], self.design.sigma * (-1) ** number
        along = self.design.along
        noise = torch.randn(len(along) or len(base), generator=generator, dtype=torch.float64)
        if along:
            values = torch.tensor([[known.rows[n][f] for f in along] for n in base], dtype=torch.float64)
            values = (values - values.mean(0)) / values.std(0, correction=0).clamp(min=1e-9)
            noise = values @ noise / math.sqrt(len(along))
        return {n: min(1.0, d * math.exp(sigma * e)) for (n, d), e in zip(base.items(), noise.tolist(), strict=True)}


@dataclass(frozen=True)
class Known:
    """Layer densities of the base and of hand-made rules, and the features of each layer."""

    densities: Mapping[str, dict[str, float]]
    rows: Mapping[str, dict[str, Any]]


_known: dict[str, Known] = {}  # a few numbers for each task that this process has seen


def known_densities(model: torch.nn.Module, data: ImageData, sparsity: float, seed: int, base: Sequence[str]) -> Known:
    """What is known of a network's layers before it trains; the base is the geometric mean of `base`."""
    batches = data.sample(BATCH, 1, seed)
    graph = trace(model, batches[0][0][:2])
    found: dict[str, dict[str, float]] = {}
    for name in MEASURED:
        masks = prune(model, sparsity, name, batches=batches, seed=seed)
        found[name] = {layer.name: layer.density for layer in masks.layers()}
    layers: Mapping[str, Layer] = masks.layer_info
    for name in DENSITIES:
        found[name] = layer_densities(name, layers, 1 - sparsity)
    found[BASE] = {n: math.exp(sum(math.log(max(found[k][n], LEAST)) for k in base) / len(base)) for n in layers}
    weights = measure(model, layers, ("weight",))
    own = contexts(layers, weights, ("weight",), graph)
    more = structure(layers, graph)
    rows = {
        name: {
            "name": name,
            "total": layer.numel,
            **{key: float(own[name].constants[key]) for key in STRUCTURE},
            **more[name],
            **{OF_CRITERION + key: math.log(max(found[key][name], LEAST)) for key in (*CRITERIA, BASE)},
        }
        for name, layer in layers.items()
    }
    return Known(found, rows)


def design(tasks: Iterable[Task], chosen: DesignSettings) -> list[DesignCell]:
    """All trainings: of every task the base and the rivals first, then draw by draw over all tasks, so that a stop leaves as
    many draws of each; the dense ones last, which no rule needs."""
    starts = [(task, inputs_of(task), chosen.sparsities[i % len(chosen.sparsities)]) for i, task in enumerate(tasks)]
    return [
        DesignCell(task.model, task.data, task.recipe, task.seed, sparsity, source, chosen, start)
        for source in (BASE, *chosen.rivals, *(f"draw {i}" for i in range(chosen.draws)), DENSE)
        for task, start, sparsity in ((task, start, 0.0 if source == DENSE else s) for task, start, s in starts)
    ]


def run_design(
    cells: Sequence[DesignCell],
    directory: Path,
    *,
    device: str = "auto",
    executor: ExecutorSettings = INLINE,
    on_cell: Callable[[int, DesignCell, Result, bool], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> list[Result]:
    """Do the trainings that are not done yet, and keep `directory/design.csv` up to date; see `run_cells`."""

    def write(results: Sequence[Mapping[str, Any]]) -> None:
        base = {place_of(r): r.get("accuracy") for r in results if r["source"] == BASE}
        write_table(directory / "design.csv", COLUMNS, [{**r, "base_accuracy": base.get(place_of(r))} for r in results])

    return run_cells(
        cells, directory, None, write, device=device, executor=executor, on_cell=on_cell, on_event=on_event
    )


def place_of(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """The task that a result is of."""
    return result["model"], result["data"], result["sparsity"], result["seed"]


@dataclass(frozen=True)
class Rule:
    """What was fitted: `coefficients` and their standard errors by feature, in points of accuracy per standard deviation of the
    feature and unit of log density; `scales`, those standard deviations; `curvature`, what a squared unit costs;
    `correlation`, Spearman's between predicted and measured differences on networks that were left out, and `slope` of
    measured on predicted; `ridge`, the penalty; `gain`, points that its best densities are predicted to be above the base,
    mean over networks; `trainings` and `networks` it is from; `base`, the criteria whose mean it starts from."""

    coefficients: Mapping[str, float]
    errors: Mapping[str, float]
    scales: Mapping[str, float]
    curvature: float
    correlation: float
    slope: float
    ridge: float
    gain: float
    trainings: int
    networks: int
    base: tuple[str, ...]

    def densities(self, sigma: float) -> dict[str, float]:
        """The rule that `Scorer.rule` takes: the base, and the step to where the fitted gain is largest, or as far towards
        it as draws of `sigma` went: in root mean square over layers, since the fit knows nothing beyond."""
        length = math.sqrt(max(self.gain, 0.0) / self.curvature)  # the gain is that of r, curvature·mean(r²)
        share = min(1.0, sigma / max(length, 1e-12))
        steps = {n: share * a / (2 * self.curvature * self.scales[n]) for n, a in self.coefficients.items()}
        base = {OF_CRITERION + name: 1 / len(self.base) for name in self.base}
        return {name: base.get(name, 0.0) + steps.get(name, 0.0) for name in {**steps, **base}}


def fit_rule(
    results: Sequence[Mapping[str, Any]],
    base: Sequence[str],
    along: Sequence[str] = (),
    ridges: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0),
    folds: int = 10,
) -> Rule:
    """A rule of layer densities from the outcomes of draws around `base`, with the features `along`, or all of `FEATURES`.

    With `r_l = log(d_l/base_l)` of layer l and its standardised features `f_l`, the difference in accuracy to the base is
    modelled as `Σ_k a_k·mean_l(f_lk·r_l) − c·mean_l(r_l²)`; ridge regression in standardised columns, which is largest
    at `r_l = Σ_k a_k·f_lk / 2c`. The penalty is the one of `ridges` that predicts networks left out best (so the figures on
    these flatter a little). A training counts by `1/(s² + s̄²)`, with s the standard deviation of its network's differences
    and s̄² the mean over networks, so that one whose trainings scatter widely does not decide; networks that end at the same
    accuracy whatever is kept do not count. Standard errors are those of a bootstrap over networks.

    Raises:
        AutoSparseError: fewer than two networks with draws, or no best densities: the fitted curvature is not positive.
    """
    from scipy.stats import spearmanr
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold

    names = tuple(along) or FEATURES
    table = _regressors(results, names)
    networks = sorted(set(table.owners))
    if len(networks) < 2:
        trained = {r["model"] for r in results if not r.get("error") and r["source"] not in (DENSE, BASE)}
        same = len(trained) - len(networks)
        more = f" ({same} more: base not trained, or the same accuracy for all densities)" if same else ""
        found = plural(len(networks), "network")
        raise AutoSparseError(f"design: {found} with draws to compare{more}; a rule needs two, raise tasks.count")
    scale = table.columns.std(0) + 1e-12
    x, y = table.columns / scale, np.array(table.differences)
    group = np.array([networks.index(owner) for owner in table.owners])
    spread = np.array([y[group == g].std() for g in group]) ** 2
    weight = 1 / (spread + spread.mean() + 1e-12)
    weight /= weight.mean()

    def fitted(part: np.ndarray, ridge: float) -> np.ndarray:
        return Ridge(alpha=ridge, fit_intercept=False).fit(x[part], y[part], weight[part]).coef_

    def left_out(ridge: float) -> np.ndarray:
        found = np.zeros(len(y))
        for train_part, test_part in GroupKFold(min(folds, len(networks))).split(x, y, group):
            found[test_part] = x[test_part] @ fitted(train_part, ridge)
        return found

    everything = np.arange(len(y))
    predictions = {ridge: left_out(ridge) for ridge in ridges}
    ridge = min(ridges, key=lambda r: float(weight @ (y - predictions[r]) ** 2))
    predicted, whole = predictions[ridge], fitted(everything, ridge) / scale
    drawn = make_numpy_generator(0, "bootstrap").integers(len(networks), size=(200, len(networks)))
    samples = [fitted(np.concatenate([everything[group == g] for g in one]), ridge) / scale for one in drawn]
    errors = np.std(samples, axis=0)
    curvature = -float(whole[-1])
    if curvature <= 0:
        raise AutoSparseError(
            f"design: {len(y)} trainings show no best densities (the fitted curvature is {100 * curvature:.2f}, not "
            "positive); raise design.draws or tasks.count"
        )
    return Rule(
        coefficients={n: 100 * float(v) for n, v in zip(names, whole, strict=False)},
        errors={n: 100 * float(v) for n, v in zip(names, errors, strict=False)},
        scales=dict(zip(names, table.scales.tolist(), strict=True)),
        curvature=100 * curvature,
        correlation=float(spearmanr(predicted, y).statistic),
        slope=float((weight * predicted) @ y / max(float((weight * predicted) @ predicted), 1e-12)),
        ridge=ridge,
        gain=100 * float(np.mean([((f @ whole[:-1]) ** 2).mean() / (4 * curvature) for f in table.features])),
        trainings=len(y),
        networks=len(networks),
        base=tuple(base),
    )


@dataclass(frozen=True)
class _Table:
    """A row of `columns`, difference in accuracy to the base and network for each draw and rival: means over layers of
    features times log ratio, and of its square. `scales`: the features' standard deviations; `features`: standardised, of
    each base."""

    columns: np.ndarray
    differences: list[float]
    owners: list[str]
    scales: np.ndarray
    features: list[np.ndarray]


def _regressors(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> _Table:
    done = [r for r in results if not r.get("error") and r["source"] != DENSE]
    seen: dict[tuple[Any, ...], set[float]] = {}
    for result in done:
        seen.setdefault(place_of(result), set()).add(result["accuracy"])
    done = [r for r in done if len(seen[place_of(r)]) > 1]  # networks that are at chance whatever is kept tell nothing
    base = {place_of(r): r for r in done if r["source"] == BASE}
    if not base:
        return _Table(np.zeros((0, len(names) + 1)), [], [], np.ones(len(names)), [])
    own = {place: np.array([[layer[key] for key in names] for layer in r["layers"]]) for place, r in base.items()}
    every = np.concatenate(list(own.values()))
    mean, std = every.mean(0), np.where(every.std(0) > 1e-9, every.std(0), 1.0)
    own = {place: (values - mean) / std for place, values in own.items()}
    rows, differences, owners = [], [], []
    for result in done:
        place = place_of(result)
        if place not in base or result["source"] == BASE:
            continue
        pairs = zip(result["layers"], base[place]["layers"], strict=True)
        ratio = np.array([math.log(max(a["kept"], 0.5) / max(b["kept"], 0.5)) for a, b in pairs])
        rows.append([*(own[place].T @ ratio / len(ratio)), ratio @ ratio / len(ratio)])
        differences.append(result["accuracy"] - base[place]["accuracy"])
        owners.append(result["model"])
    return _Table(np.array(rows), differences, owners, std, list(own.values()))
