"""What stands in a comparison: a criterion, a scorer or a method that searches by training, and the masks it finds."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from autosparse.errors import AutoSparseError, require, require_unset, settings, suggest
from autosparse.files import fingerprint, sha256
from autosparse.masks.densities import Scope, check_scope
from autosparse.masks.granularity import parse_granularity
from autosparse.masks.layers import prunable_layers
from autosparse.masks.schedule import SCHEDULES, check_sparsity
from autosparse.network.graph import trace
from autosparse.network.signals import parse_warmup
from autosparse.plugins import is_outside, source_of
from autosparse.pruning.criteria import PRESETS, Inverted, Preset, preset_for
from autosparse.pruning.prune import check_share, density_for, describe, prune
from autosparse.pruning.warmup import WarmupSettings, warmup
from autosparse.report.checks import CHECKS, split
from autosparse.report.text import unique
from autosparse.scorers.loading import criterion_for, find_scorer, is_scorer
from autosparse.scorers.scorer import read_scorer
from autosparse.search.method import METHODS, Method, SearchResult, method_for, settings_for
from autosparse.trainability.prepare import check_preparation, prepare
from autosparse.training.content import of_start
from autosparse.training.data import ImageData
from autosparse.training.recipe import Recipe


def is_name(text: str) -> bool:
    """Whether `text` has the form of a criterion, scorer or method; what it names may still be missing or wrong."""
    return text.partition("@")[0] in (*PRESETS, *METHODS) or is_scorer(text) or is_outside(text)


@settings
class Candidate:
    """A criterion or method in a comparison.

    Attributes:
        criterion: a preset or a method (`autosparse list criteria`), or a scorer: one of `autosparse list scorers`, its
            file, or an MLflow `models:/` URI. Before any of them may stand a variant, one of the field's sanity checks
            (Frankle et al. 2021, Su et al. 2020). `"densities:"` keeps its layer densities and puts the positions
            within each layer at random (the layer-wise shuffle): a criterion that is not better than its shuffle has
            chosen layer densities only. `"reinit:"` trains its mask from newly drawn weights. `"inverted:"` keeps the
            lowest scores of each layer at its densities.
        label: its name in tables.
        scope: as in `prune` (`"global"`, or a rule for layer densities such as `"erk"` or `"igq"`), or
            `"densities:ANY"`: the layer densities that another candidate finds, at its cost, with this one's positions.
        granularity, channels, steps, schedule, n_batches, floor: as in `prune`.
        batch_size: of the batches it scores on; `None`: a scorer's own, else 128.
        warmup: of criteria that look at a short training, whose length in epochs stands in their name
            (`"movement@0.5"`).
        options: the settings of a method, an instance or a mapping of its fields; in YAML they stand beside
            `criterion`: `{criterion: irp, rounds: 7, epochs: 2}`.
        continues: the final training goes on with the weights that the method ended with, instead of rewinding to the
            initialization.
        prepare: what is done to the remaining weights before the final training (`autosparse list preparations`); the
            masks are those of the candidate without it.
    """

    criterion: str
    label: str | None = None
    scope: str | None = None
    granularity: str | None = None
    channels: float | None = None
    steps: int | None = None
    schedule: str | None = None
    n_batches: int | None = None
    batch_size: int | None = None
    floor: float = 0.0
    warmup: WarmupSettings | None = None
    options: Any = None
    continues: bool = False
    prepare: str | None = None

    def __post_init__(self) -> None:
        require(
            split(self.base)[0] is None, "criterion", self.criterion, "give one variant only, such as densities:snip"
        )
        if not is_name(self.base):
            raise AutoSparseError(
                f"criterion is {self.criterion!r}: {suggest(self.base, [*PRESETS, *METHODS])}; "
                f"or a scorer's file, NAME.safetensors; or package.module:name; or {': or '.join(CHECKS)}: before one of them"
            )
        if (method := self.method) is not None:
            object.__setattr__(self, "options", settings_for(self.base, method, self.options))
        else:
            require(
                self.options is None, f"options of {self.base}", self.options, "only methods have them; leave it out"
            )
        if self.scope is not None and self.layer_densities is None:
            check_scope(self.scope)
        if self.schedule is not None:
            require(self.schedule in SCHEDULES, "schedule", self.schedule, f"known: {', '.join(SCHEDULES)}")
        if self.granularity is not None:
            parse_granularity(self.granularity)
        for key in ("steps", "n_batches", "batch_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "give at least 1")
        if self.channels is not None:
            check_share(self.channels)
            require(
                self.channels == 1 or self.granularity in (None, "unstructured"),
                f"granularity of {self.base}",
                self.granularity,
                f"channels is {self.channels:g}: between these, single weights are chosen; leave it out",
            )
        for key in ("channels", "steps", "n_batches", "batch_size", "schedule"):
            value = getattr(self, key)
            require(
                value is None or not self.searches,
                f"{key} of {self.base}",
                value,
                f"{self.base} has no such setting; leave it out",
            )
        if not self.searches and not is_scorer(self.base):
            preset = preset_for(self.base)  # raises where the horizon of a warm-up is wrong
            if (preset.n_batches or preset.criterion.n_batches) == 0:
                require_unset(self, ("n_batches",), "", f"{self.base} takes no batches")
        if self._steps == 1:
            require_unset(self, ("schedule",), "", "one step goes straight to the sparsity")
        require(
            self.granularity in (None, "unstructured") or not self.searches,
            f"granularity of {self.base}",
            self.granularity,
            "it removes single weights; leave it out",
        )
        require(
            self.granularity in (None, "unstructured") or self.variant not in ("densities", "inverted"),
            f"granularity of {self.criterion}",
            self.granularity,
            "this variant chooses single weights; leave granularity out",
        )
        require(
            self.variant != "inverted" or not self.searches,
            "criterion",
            self.criterion,
            "a method that searches by training has no scores to invert",
        )
        require(0 <= self.floor < 1, "floor", self.floor, "it is the smallest density of a layer, in [0, 1)")
        early = self.warms_up or is_scorer(self.base)
        require(
            self.warmup is None or early,
            f"warmup of {self.base}",
            self.warmup,
            "it looks at no warm-up training; leave warmup out",
        )
        always = getattr(self.options, "continues", False)
        if always and self.variant is None:
            object.__setattr__(self, "continues", True)
        can = method is not None and (method.continues or always)
        require(
            not self.continues or (self.variant is None and can),
            f"continues of {self.criterion}",
            self.continues,
            "only a method that returns its trained weights can continue, and none of its variants; leave it out",
        )
        check_preparation(self.prepare)
        require(
            self.prepare != "signs" or (self.searches and self.variant is None),
            f"prepare of {self.criterion}",
            self.prepare,
            "signs need a method that searches by training, such as gmp, without a variant",
        )
        require(
            self.prepare is None or not self.continues,
            f"prepare of {self.criterion}",
            self.prepare,
            "it continues with trained weights: leave prepare or continues out",
        )

    @property
    def variant(self) -> str | None:
        """The sanity check that stands before the criterion."""
        return split(self.criterion)[0]

    @property
    def base(self) -> str:
        """The criterion without its variant."""
        return split(self.criterion)[1]

    @property
    def layer_densities(self) -> Candidate | None:
        """Whose layer densities are its scope."""
        first, sign, rest = (self.scope or "").partition(":")
        return Candidate(rest) if sign and first == "densities" else None

    @property
    def method(self) -> Method | None:
        """The method that it is, if it trains to find its masks."""
        return None if is_scorer(self.base) else method_for(self.base)

    @property
    def searches(self) -> bool:
        """Whether it trains to find its masks."""
        return self.method is not None

    @property
    def warms_up(self) -> bool:
        """Whether its criterion looks at a short training."""
        known = not is_scorer(self.base) and not self.searches
        return known and any(parse_warmup(name) for name in preset_for(self.base).criterion.signals)

    @property
    def repeats(self) -> bool:
        """Whether finding its masks takes many passes, so that they are worth keeping."""
        if self.searches or self.warms_up or (self.layer_densities is not None and self.layer_densities.repeats):
            return True
        return not is_scorer(self.base) and self._steps > 1

    @property
    def _steps(self) -> int:
        """How many steps it takes; 0 for a method."""
        if self.searches:
            return 0
        return self.steps or (1 if is_scorer(self.base) else preset_for(self.base).steps)

    @property
    def name(self) -> str:
        if self.label is not None:
            return self.label
        name = self.base
        if self.searches:
            name += getattr(self.options, "label", "")
            if self.continues and not getattr(self.options, "continues", False):
                name += "-continues"
        elif self.base.endswith(".safetensors"):
            name = Path(self.base).stem
        if self.granularity not in (None, "unstructured"):
            name = f"{name} {self.granularity}"
        if self.channels is not None:
            name = f"{name} {self.channels:g} of channels"
        if (other := self.layer_densities) is not None:
            name = f"{name} in {other.name}"
        elif self.scope is not None:
            name = f"{name} in {self.scope}"
        if self.prepare is not None:
            name = f"{name}+{self.prepare}"
        return name if self.variant is None else f"{self.variant}:{name}"

    def plain(self) -> Candidate:
        """The same without its variant and its preparation: what searches for the masks."""
        return dataclasses.replace(self, criterion=self.base, label=None, prepare=None)

    @property
    def starts(self) -> list[Candidate]:
        """Other candidates whose masks its method needs."""
        if (method := self.method) is None:
            return []
        floor = self.floor if method.hands_on else 0.0
        return [Candidate(name, floor=floor) for name in method.starts(self.options)]

    def check(self, validation: float, sparsity: float) -> None:
        """Raise `AutoSparseError` where it cannot find masks of `sparsity` with this share of validation images."""
        density_for(sparsity, parse_granularity(self.granularity))
        require(self.floor <= 1 - sparsity + 1e-9, "floor", self.floor, f"the density is {1 - sparsity:g}; lower it")
        method = self.method
        if method is not None:
            method.check(self.options, validation, 1 - sparsity, self.scope)
        if (other := self.layer_densities) is not None:
            other.check(validation, sparsity)
        for start in self.starts:
            scope = self.scope if method is not None and method.hands_on else None
            replace(start, scope=scope).check(validation, sparsity)

    def check_length(self, data: ImageData, recipe: Recipe) -> None:
        """Raise `AutoSparseError` where a method that it is, or needs, does not fit into the trainings of `recipe`."""
        if self.method is not None:
            self.method.check_length(self.options, data, recipe)
        for other in (*self.starts, *([self.layer_densities] if self.layer_densities is not None else [])):
            other.check_length(data, recipe)


def expand(candidates: Sequence[Candidate], checks: Sequence[str]) -> list[Candidate]:
    """Every candidate, followed by its variants; a method that searches by training has no scores to invert.

    Raises:
        AutoSparseError: a variant that the candidate cannot have, or one that continues with its trained weights: variants
            train from the initialization, so the difference would tell of the weights, not of the mask.
    """
    result = []
    for candidate in candidates:
        from_start = "checks train masks from the initialization; leave continues out (for irp also rewind: never)"
        require(not (candidate.continues and checks), "criterion", candidate.name, from_start)
        result.append(candidate)
        for check in unique(checks):
            if check != "inverted" or not candidate.searches:
                label = candidate.label and f"{check}:{candidate.label}"
                result.append(replace(candidate, criterion=f"{check}:{candidate.criterion}", label=label))
    return result


def identity(candidate: Candidate) -> dict[str, Any]:
    """What a result depends on, as plain values: what is given but for its label, and for a scorer what its file holds.

    Raises:
        AutoSparseError: the scorer's file does not exist.
    """
    values = json.loads(json.dumps(dataclasses.asdict(candidate)))
    given = {k: v for k, v in values.items() if v is not None and v is not False and k != "label"}
    if is_scorer(candidate.base):
        variant = "" if candidate.variant is None else f"{candidate.variant}:"
        given["criterion"] = variant + sha256(path := find_scorer(candidate.base))
        if is_outside(kind := read_scorer(path).kind):
            given["source"] = source_of(kind)
    elif is_outside(candidate.base):
        given["source"] = source_of(candidate.base)
    if candidate.starts:
        given["starts"] = [identity(start) for start in candidate.starts]
    if (other := candidate.layer_densities) is not None:
        given["scope"] = {"densities": identity(other)}
    elif candidate.scope is not None and is_outside(candidate.scope):
        given["scope_source"] = source_of(candidate.scope)
    return given


def find_masks(
    model: nn.Module,
    data: ImageData,
    candidate: Candidate,
    sparsity: float | None,
    *,
    recipe: Recipe,
    seed: int = 0,
    device: str = "auto",
    state: Path | None = None,
    result: SearchResult | None = None,
    scope: Scope | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> SearchResult:
    """Masks of `model` (at its initialization, left as it is) by a preset, a scorer or a method that trains.

    Args:
        data: on the device of `model`.
        recipe: of the trainings of a method.
        state: directory in which a method keeps its progress until it is done.
        result: the result of `candidate.plain()`, if that is known: its variants begin with it.
        scope: in place of the candidate's: layer densities.
    """
    work = _Work(model, data, sparsity, scope or candidate.scope, recipe, seed, device, state, on_epoch)
    if result is None:
        result = _search(work, candidate)
    if candidate.variant == "densities":
        masks = describe(model, result.masks.shuffle(seed), data.normalise(data.train.images[:2]))
        result = replace(result, masks=masks)
    elif candidate.variant == "inverted":
        densities = {layer.name: layer.density for layer in result.masks.layers()}
        masks = _scored(replace(work, scope=densities), candidate, inverted=True).masks
        result = replace(result, masks=masks)  # a check, so at the cost of what it checks
    masks = result.masks
    origin = {**masks.report.origin, "candidate": candidate.name, "inputs": inputs(model, data, candidate)}
    masks.report = replace(masks.report, origin=origin)
    return result


def inputs(model: nn.Module, data: ImageData, candidate: Candidate) -> str:
    """Fingerprint of what the masks of a candidate come from, beside sparsity, seed and recipe."""
    return fingerprint(of_start(model, data), identity(candidate))


def prepare_result(model: nn.Module, data: ImageData, how: str, result: SearchResult, seed: int = 0) -> SearchResult:
    """Prepare `model` in place for its masks; gives the masks to train under, and counts the seconds that it took."""
    clock = time.perf_counter()
    example = data.normalise(data.train.images[:2])
    masks = prepare(model, result.masks, how, example_input=example, seed=seed).masks
    return replace(result, masks=masks, seconds=result.seconds + time.perf_counter() - clock)


@dataclass(frozen=True)
class _Work:
    """What every search for masks is given; see `find_masks`."""

    model: nn.Module
    data: ImageData
    sparsity: float | None
    scope: Scope | None
    recipe: Recipe
    seed: int
    device: str
    state: Path | None
    on_epoch: Callable[[dict[str, float]], None] | None

    def common(self) -> dict[str, Any]:
        return {"seed": self.seed, "device": self.device, "on_epoch": self.on_epoch}


def _search(work: _Work, candidate: Candidate) -> SearchResult:
    """The masks of a candidate without its variant, and all that they cost."""
    seconds = epochs = 0.0
    if (other := candidate.layer_densities) is not None:
        inner = replace(work, scope=other.scope, state=work.state and work.state / "scope")
        densities = _search(inner, other)
        work = replace(work, scope={layer.name: layer.density for layer in densities.masks.layers()})
        seconds, epochs = densities.seconds, densities.epochs
    method = candidate.method
    if method is None:
        result = _scored(work, candidate)
    elif work.sparsity is None:
        raise AutoSparseError("sparsity is None: give the share of weights to remove, such as 0.95")
    else:
        density = 1 - check_sparsity(work.sparsity)
        example = work.data.normalise(work.data.train.images[:2])
        layers = prunable_layers(work.model, operands=trace(work.model, example).operands)
        given: dict[str, Any] = {}
        if candidate.starts:
            scope = work.scope if method.hands_on else None
            found = {start.name: _start(work, start, scope) for start in candidate.starts}
            given["starts"] = {name: result.masks for name, result in found.items()}
            seconds += sum(result.seconds for result in found.values())
            epochs += sum(result.epochs for result in found.values())
        result = method.search(
            work.model,
            layers,
            work.data,
            work.recipe,
            candidate.options,
            density,
            scope=work.scope,
            floor=candidate.floor,
            state=work.state,
            **given,
            **work.common(),
        )
        if not candidate.continues:
            result = replace(result, weights=None, steps=0)
        origin = {"criterion": candidate.base, "sparsity": work.sparsity, "seed": work.seed}
        masks = result.masks
        notes = (*masks.report.notes, *result.notes)
        masks.report = replace(masks.report, origin={**masks.report.origin, **origin}, notes=notes)
        result = replace(result, masks=describe(work.model, masks, example))
    return replace(result, seconds=result.seconds + seconds, epochs=result.epochs + epochs)


def _start(work: _Work, start: Candidate, scope: Scope | None) -> SearchResult:
    """The masks of a candidate that another one begins with."""
    state = work.state and work.state / fingerprint(start.name)[:8]
    how: dict[str, Any] = {"recipe": work.recipe, "state": state, **work.common()}
    return find_masks(work.model, work.data, start, work.sparsity, scope=scope, **how)


def _scored(work: _Work, candidate: Candidate, inverted: bool = False) -> SearchResult:
    """Masks by a criterion or scorer, after its warm-up; `inverted`: by its lowest scores."""
    model, data, seed = work.model, work.data, work.seed
    clock = time.perf_counter()
    rule = criterion_for(candidate.base)
    preset = rule if isinstance(rule, Preset) else Preset(rule)
    rule = preset.criterion
    size = candidate.batch_size or int(getattr(rule, "batch_size", 128))
    wanted = candidate.n_batches or preset.n_batches or rule.n_batches
    per_class = getattr(rule, "per_class", None)
    if per_class and not candidate.batch_size and not candidate.n_batches:
        batches = data.sample_per_class(per_class, seed, size)
    else:
        batches = data.sample(size, max(wanted, 1), seed)
    signals, epochs = None, 0.0
    early = [name for name in rule.signals if parse_warmup(name)]
    if early:
        layers = prunable_layers(model, operands=trace(model, batches[0][0][:2]).operands)
        settings = candidate.warmup or WarmupSettings(**getattr(rule, "warmup", {}))
        warm = warmup(model, layers, data, work.recipe, early, settings, **work.common())
        signals, epochs = warm.signals, warm.epochs
    masks = prune(
        model,
        work.sparsity,
        replace(preset, criterion=Inverted(rule)) if inverted else preset,
        batches=batches,
        n_batches=len(batches) if per_class else candidate.n_batches,
        scope=work.scope,
        granularity=candidate.granularity,
        channels=candidate.channels,
        steps=candidate.steps,
        schedule=candidate.schedule,
        signals=signals,
        floor=candidate.floor,
        seed=seed,
    )
    epochs += masks.report.origin["images"] / len(data.train)
    return SearchResult(masks, epochs, time.perf_counter() - clock)
