"""Learning from outcomes: which layers should keep more, measured by networks that were trained under the masks.

Imitating tickets teaches which weights survive; that a mask like the ticket's is the best to train from is another matter.
Here the layers' share of a scorer's scores, a few coefficients, is changed towards what trains to a lower loss.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autosparse.errors import AutoSparseError, AutoSparseFailure, require, settings, suggest
from autosparse.files import fingerprint, read_json, write_json
from autosparse.masks.layers import prunable_layers
from autosparse.masks.random import make_generator
from autosparse.masks.schedule import check_sparsity
from autosparse.masks.selection import select
from autosparse.network.graph import trace
from autosparse.network.signals import Signals, measure, parse_warmup
from autosparse.pruning.criteria import POSITIONS, Context
from autosparse.pruning.warmup import WarmupSettings, warmup
from autosparse.scorers.features import contexts
from autosparse.scorers.mlp import NoNetwork
from autosparse.scorers.rule import STRUCTURE
from autosparse.scorers.scorer import DENSITIES, Scorer, read_scorer
from autosparse.training.content import of_settings
from autosparse.training.data import DataSettings, shared_data
from autosparse.training.loop import evaluate, fabric_for
from autosparse.training.models import ModelSettings, build_model
from autosparse.training.recipe import Recipe
from autosparse.training.threads import threads_for
from autosparse.training.train import train


@settings
class OutcomeSettings:
    """How the rule of layers is learned: evolution strategies (Salimans et al. 2017) with antithetic pairs and ranks.

    In each of `generations`, `pairs` directions are drawn; both signs of each train one task, alike in all else, and the
    rule moves towards the signs that ended with the lower validation loss. `sigma`: standard deviation of the change of
    each coefficient, in units of the score (log survival or log density) per standard deviation of the feature. `lr`:
    step size, as a factor on `sigma`. `features`: those that the rule may use. `held_out`: number of tasks that are not
    learned from; they compare the result with the scorer as it was. `densities`, `positions` of the scorer (`None`: as they
    are); `"rule"` densities start from ERK's if the scorer has no rule.
    """

    generations: int = 10
    pairs: int = 16
    sigma: float = 0.5
    lr: float = 0.5
    sparsities: tuple[float, ...] = (0.95, 0.98)
    features: tuple[str, ...] = STRUCTURE
    floor: float = 0.0
    held_out: int = 8
    densities: str | None = None
    positions: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("generations", "pairs"):
            require(getattr(self, key) >= 1, f"tune.{key}", getattr(self, key), "give at least 1")
        for key in ("sigma", "lr"):
            value = getattr(self, key)
            require(0 < value < math.inf, f"tune.{key}", value, "give a positive number")
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        require(len(self.sparsities) > 0, "tune.sparsities", list(self.sparsities), "give at least one")
        require(len(self.features) > 0, "tune.features", list(self.features), "give at least one")
        for name in self.features:
            require(name in STRUCTURE, "tune.features", name, suggest(name, STRUCTURE))
        for key, known in (("densities", DENSITIES), ("positions", POSITIONS)):
            value = getattr(self, key)
            require(value is None or value in known, f"tune.{key}", value, f"known: {', '.join(known)}")
        require(0 <= self.floor < 1, "tune.floor", self.floor, "it is the smallest density of a layer, in [0, 1)")
        require(self.held_out >= 0, "tune.held_out", self.held_out, "it must not be negative")


@dataclass(frozen=True)
class Task:
    """One network to prune at initialization and train."""

    model: ModelSettings
    data: DataSettings
    recipe: Recipe
    seed: int


RunTrials = Callable[[Sequence["Trial"]], Mapping[str, dict[str, float]]]  # what each trial gave, by its key


@dataclass(frozen=True)
class Trial:
    """One training of a task under the mask of the scorer with a rule; `scorer`: its file.

    `inputs`: fingerprint of what the scorer holds, and of the images and the initial network of the task.
    """

    task: Task
    scorer: str
    rule: tuple[tuple[str, float], ...]
    sparsity: float
    floor: float
    inputs: str

    @property
    def key(self) -> str:
        """A hash of what determines its result; not among it where the data and the scorer lie."""
        values = asdict(self)
        values["task"]["data"].pop("root")
        values.pop("scorer")
        return fingerprint(values)[:16]


def inputs_of(task: Task) -> str:
    """Fingerprint of the images and of the initial network of a task."""
    return of_settings(task.model, shared_data(task.data, "cpu"), task.seed)


def no_scorer(name: str) -> Scorer:
    """A scorer without a network, to learn a rule of densities from nothing."""
    return Scorer("rule", NoNetwork(), "mse", STRUCTURE, 0, 128, densities="rule", positions="spread_small", name=name)


def starting_point(scorer: Scorer, chosen: OutcomeSettings) -> Scorer:
    """The scorer with the densities and positions of the settings."""
    found = replace(
        scorer,
        densities=chosen.densities or scorer.densities,
        positions=chosen.positions or scorer.positions,
    )
    return replace(found, rule={"layer_erk": 1.0}) if found.densities == "rule" and not found.rule else found


def do_trial(
    trial: Trial, path: Path, *, device: str, progress: Callable[[Mapping[str, Any]], None]
) -> dict[str, float]:
    """Prune, train, and look at the validation images: their loss and accuracy, and how many layers died; a job."""
    if path.exists():
        return read_json(path, "result of a trial")
    task, place = trial.task, fabric_for(device).device
    data = shared_data(task.data, str(place))
    if len(data.validation) == 0:
        raise AutoSparseError(f"data.validation is {task.data.validation}: trials are compared on validation images")
    model = build_model(task.model, data, task.seed).to(place)
    with threads_for(model, data, task.recipe.batch_size):
        scorer = replace(read_scorer(trial.scorer), rule=dict(trial.rule))
        batches = data.sample(scorer.batch_size, max(scorer.n_batches, 1), task.seed)
        graph = trace(model, batches[0][0][:2])
        layers = prunable_layers(model, operands=graph.operands)
        early = [name for name in scorer.signals if parse_warmup(name)]
        signals: Signals = measure(
            model,
            layers,
            [name for name in scorer.signals if name not in early],
            batches=batches,
            example_input=batches[0][0],
            seed=task.seed,
        )
        if early:
            short = WarmupSettings(**scorer.warmup)
            signals |= warmup(model, layers, data, task.recipe, early, short, seed=task.seed, device=device).signals
        scores = scorer(signals, Context(layers, 1 - trial.sparsity, graph, seed=task.seed))
        masks = select(scores, 1 - trial.sparsity, layers=layers, floor=trial.floor, seed=task.seed)
        masks.apply_(model)
        recipe = task.recipe
        train(model, data.without("test"), recipe, masks=masks, seed=task.seed, device=device, validate=False)
        accuracy, loss = evaluate(model, data, "validation", recipe.channels_last)
    found = {"loss": loss, "accuracy": accuracy, "dead": sum(layer.kept == 0 for layer in masks.layers())}
    write_json(path, found)
    return found


def tune(
    scorer: Scorer,
    file: Path,
    tasks: Sequence[Task],
    chosen: OutcomeSettings,
    run: RunTrials,
    on_generation: Callable[[dict[str, Any]], None] | None = None,
) -> Scorer:
    """The scorer with a rule of layers learned from the outcome of trainings.

    With v the rule in standard deviations of the features, ε_i ~ N(0, 1), and L the validation loss after training,

        v ← v + lr·σ·Σ_i r_i·ε_i / n,   r_i = centred rank of L(v − σ·ε_i) − L(v + σ·ε_i) in [−1, 1]·√3,

    the result being the mean of v over the second half of the generations. What `run` finds done is not done again, so a
    search that starts again goes on where it was.

    Args:
        file: where `scorer` is saved.
        tasks: the last `held_out` are held out.
        run: does trials, and gives what came of them; without those that failed.

    Returns:
        The scorer whose card tells `outcome`: the course of the search, and the paired difference on held-out tasks.

    Raises:
        AutoSparseError: too few tasks. AutoSparseFailure: all trials of a generation failed.
    """
    clock = time.perf_counter()
    learning, held_out = tasks[: len(tasks) - chosen.held_out], tasks[len(tasks) - chosen.held_out :]
    if not learning:
        raise AutoSparseError(f"tune.held_out is {chosen.held_out}, of {len(tasks)} tasks: none is left to learn from")
    scales = feature_scales(learning, chosen.features)
    value = torch.tensor([scorer.rule.get(name, 0.0) * scales[name] for name in chosen.features], dtype=torch.float64)
    history: list[dict[str, Any]] = []
    before, course = value, []
    content = scorer.content()
    inputs = {id(task): fingerprint(content, inputs_of(task)) for task in tasks}

    def trial(task: Task, at: torch.Tensor, sparsity: float) -> Trial:
        moved = {n: round(float(v) / scales[n], 6) for n, v in zip(chosen.features, at, strict=True)}
        return Trial(task, str(file), tuple({**scorer.rule, **moved}.items()), sparsity, chosen.floor, inputs[id(task)])

    for generation in range(chosen.generations):
        generator = make_generator(chosen.seed, "directions", generation)
        directions = torch.randn(chosen.pairs, len(value), generator=generator, dtype=torch.float64)
        pairs = []
        for index, direction in enumerate(directions):
            number = generation * chosen.pairs + index
            task = learning[number % len(learning)]
            sparsity = chosen.sparsities[(number // len(learning)) % len(chosen.sparsities)]
            pairs.append(tuple(trial(task, value + s * chosen.sigma * direction, sparsity) for s in (1, -1)))
        found = run([one for pair in pairs for one in pair])
        known = [i for i, pair in enumerate(pairs) if all(one.key in found for one in pair)]
        if not known:
            raise AutoSparseFailure(f"all trials of generation {generation + 1} failed; see what each said")
        gains = torch.tensor([found[pairs[i][1].key]["loss"] - found[pairs[i][0].key]["loss"] for i in known])
        step = centred_ranks(gains.double()) @ directions[known] / len(known)
        value = value + chosen.lr * chosen.sigma * step
        course.append(value)
        losses = [found[one.key]["loss"] for i in known for one in pairs[i]]
        row = {"generation": generation + 1, "loss": statistics.fmean(losses), "rule": value.tolist()}
        history.append(row)
        if on_generation is not None:
            on_generation(row)
    value = torch.stack(course[len(course) // 2 :]).mean(0)
    rule = {name: float(v) / scales[name] for name, v in zip(chosen.features, value, strict=True)}
    both = [(trial(t, value, s), trial(t, before, s)) for t in held_out for s in chosen.sparsities]
    outcome = {
        "inputs": sought(scorer, tasks, chosen),
        "settings": asdict(chosen),
        "tasks": len(learning),
        "history": history,
        "held_out": _held_out(both, run),
        "seconds": time.perf_counter() - clock,
    }
    return replace(scorer, rule={**scorer.rule, **rule}, card=replace(scorer.card, outcome=outcome))


def _held_out(pairs: Sequence[tuple[Trial, Trial]], run: RunTrials) -> dict[str, Any]:
    """Accuracy and loss of the first of each pair less those of the second, where both were done."""
    found = run([one for pair in pairs for one in pair])
    done = [(found[a.key], found[b.key]) for a, b in pairs if a.key in found and b.key in found]
    return {key: paired([a[key] - b[key] for a, b in done]) for key in ("accuracy", "loss") if len(done) > 1}


def sought(scorer: Scorer, tasks: Sequence[Task], chosen: OutcomeSettings) -> str:
    """Fingerprint of everything that `tune` makes its result from."""
    parts = [[inputs_of(task), task.model.label(), asdict(task.recipe), task.seed] for task in tasks]
    return fingerprint(scorer.content(), parts, chosen)


def feature_scales(tasks: Sequence[Task], names: Sequence[str]) -> dict[str, float]:
    """Standard deviation of the features over the layers of all tasks; 1 where there is none."""
    values: dict[str, list[float]] = {name: [] for name in names}
    for task in {task.model.label(): task for task in tasks}.values():
        data = shared_data(task.data, "cpu")
        model = build_model(task.model, data)
        graph = trace(model, data.normalise(data.train.images[:2]))
        layers = prunable_layers(model, operands=graph.operands)
        weights = {"weight": {n: p.detach() for n, p in model.named_parameters() if n in layers}}
        for context in contexts(layers, weights, ("weight",), graph).values():
            for name in names:
                values[name].append(context.constants[name])
    return {name: statistics.pstdev(of) or 1.0 for name, of in values.items()}


def centred_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from −√3 to √3, of unit variance in the limit; equal values share theirs."""
    if len(values) == 1:
        return values.sign()
    ranks = (values[:, None] > values).double().sum(1) + 0.5 * ((values[:, None] == values).double().sum(1) - 1)
    return (2 * ranks / (len(values) - 1) - 1) * math.sqrt(3)


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, number and p (two-sided t-test) of paired differences."""
    from scipy.stats import ttest_1samp

    p = float(ttest_1samp(differences, 0.0).pvalue)
    return {"mean": statistics.fmean(differences), "std": statistics.stdev(differences), "n": len(differences), "p": p}
