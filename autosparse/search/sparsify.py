"""Masks that change while a network trains: the handle that follows an optimizer, and the search that is one training."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, require, settings
from autosparse.masks.densities import Scope, check_scope
from autosparse.masks.layers import Layer, check_values, prunable_layers, unwrap
from autosparse.masks.mask import Holder, MaskReport, Masks, Zeroing, dense_masks
from autosparse.masks.random import make_generator
from autosparse.masks.schedule import check_density, check_sparsity
from autosparse.masks.selection import select
from autosparse.network.graph import trace
from autosparse.network.running import NORMS
from autosparse.search.method import METHODS, SearchResult, method_for, settings_for
from autosparse.training.data import ImageData
from autosparse.training.loop import full_state, rewound
from autosparse.training.recipe import Recipe, steps_per_epoch
from autosparse.training.train import train


@dataclass(frozen=True)
class Update:
    """What a method sees when it changes masks.

    `weights`, `gradients` (of all weights, pruned ones too; those of the step before the update), `masks` on the device of
    the model. `step` optimizer steps of `steps` are done. `density` is the last one that is wanted, `scope` the user's or
    `None`, `floor` the smallest density of any layer.
    """

    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    masks: Mapping[str, Tensor]
    layers: Mapping[str, Layer]
    density: float
    scope: Scope | None
    floor: float
    step: int
    steps: int
    seed: int


@settings
class SparseTraining:
    """The settings of a method whose masks change in training; a subclass says when and how.

    `epochs`: length of the run where it searches for a mask, with the whole learning-rate schedule; `None`: that of the
    recipe. `every`: optimizer steps between two updates. `init_gain` g: the run begins
    with the weights of each layer scaled down to a root mean square of `g/√fan_in`, if it is larger; what is rewound
    afterwards begins with `θ₀` as it was. He initialization has 1.41, PyTorch's own 0.58. With smaller weights at the
    start, magnitudes tell more of what was learned and less of where a weight began, so that short runs choose better;
    that needs norm layers, before which the scale of a filter does not change what the network computes. `sparsify` leaves
    the weights as they are.
    """

    epochs: float | None = None
    every: int = 100
    init_gain: float | None = None
    grows_by_gradient: ClassVar[bool] = False
    skips_step: ClassVar[bool] = False
    gradual: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "give a positive number")
        require(self.every >= 1, "every", self.every, "give at least 1 optimizer step")
        positive = self.init_gain is None or 0 < self.init_gain < math.inf
        require(positive, "init_gain", self.init_gain, "give a positive number, such as 0.58; null changes no weights")

    @property
    def label(self) -> str:
        """What follows the method's name in tables."""
        length = "" if self.epochs is None else f"-{self.epochs:g}"
        return length if self.init_gain is None else f"{length}-gain{self.init_gain:g}"

    def check(self, density: float, scope: Scope | None) -> None:
        """Raise `AutoSparseError` where there is no way to masks of `density` in `scope`."""

    def start(self, layers: Mapping[str, Layer], density: float, scope: Scope | None, floor: float, seed: int) -> Masks:
        """The masks before the first step: every weight is kept, unless a method says otherwise."""
        return dense_masks(layers)

    def due(self, step: int, steps: int) -> bool:
        """Whether the masks change after `step` of `steps` optimizer steps."""
        raise NotImplementedError

    def update(self, now: Update) -> Mapping[str, Tensor]:
        """The new masks: a boolean tensor in its weight's shape for every name in `now.masks`; `True` = keep."""
        raise NotImplementedError


class Sparsifier(Holder):
    """Changes the masks of a model as its optimizer steps, and holds pruned weights at zero. Made by `sparsify`.

    It follows `optimizer.step()` by hooks, which `copy.deepcopy(optimizer)` silently drops. It works with gradient
    accumulation, gradient scalers (a step that is skipped for infinite gradients is not counted, so a training ends that many
    steps before `steps`: `remove()` warns if an update is left), `torch.compile`, and DDP
    (every rank makes the same choice, because gradients and seed are the same). Momentum and other state of the optimizer are set to zero for each weight that leaves or returns.
    With RigL an update takes the place of an optimizer step: the gradients are set to `None`, so that nothing moves. With a
    closure, as in `optimizer.step(closure)`, the update sees the gradients that the closure computes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Mapping[str, Layer],
        method: SparseTraining,
        *,
        density: float,
        steps: int,
        scope: Scope | None = None,
        floor: float = 0.0,
        masks: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        check_density(density)
        whole = isinstance(steps, Integral) and not isinstance(steps, bool) and steps >= 1
        require(whole, "steps", steps, "give the number of optimizer steps of the whole training, a whole number")
        if scope is not None:
            check_scope(scope, layers, "densities")
        method.check(density, scope)
        require(0 <= floor < 1, "floor", floor, "it is the smallest density of a layer, in [0, 1)")
        sizes = [layer.numel for layer in layers.values()]
        least, kept = sum(math.ceil(floor * size) for size in sizes), round(density * sum(sizes))
        require(
            least <= kept, "floor", floor, f"it needs {least} weights in all, the sparsity keeps {kept}; lower floor"
        )
        require(isinstance(seed, Integral), "seed", seed, "give a whole number")
        count_updates(method, steps)
        for note in remarks(method, steps):
            warnings.warn(note, stacklevel=3)
        own = dict(unwrap(model).named_parameters())
        self.method, self.optimizer, self.steps, self.step = method, optimizer, steps, 0
        self._layers, self._density, self._scope, self._floor, self._seed = dict(layers), density, scope, floor, seed
        self._weights = {name: own[name] for name in layers}
        steered = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, weight in self._weights.items():
            require(id(weight) in steered, "weight", name, "the optimizer lacks it: add it there, or exclude it")
        super().__init__(self._weights.values(), None, optimizer)
        for hook in optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if not isinstance(other, Sparsifier):
                continue
            one, two = method, other.method
            if (one.skips_step and two.grows_by_gradient) or (two.skips_step and one.grows_by_gradient):
                raise AutoSparseError(
                    f"this optimizer has two handles, {type(one).__name__} and {type(two).__name__}, and in an update of RigL "
                    "no gradient is left for the other: give each model an optimizer of its own"
                )
        start: Mapping[str, Tensor] = method.start(layers, density, scope, floor, seed)
        if masks is not None:
            _check_masks(masks, start, method)
            start = masks
        self._masks = {n: start[n].to(w.device, copy=True) for n, w in self._weights.items()}
        self._removed_in = {n: torch.zeros_like(w, dtype=torch.int32) for n, w in self._weights.items()}
        self.path: list[float] = []
        self._skipped = self._ignored = False
        # A model that was loaded from a checkpoint before this call keeps other weights than `start`; until the first step
        # `load_state_dict` can still bring them back.
        self._given = {n: w.detach().clone() for n, w in self._weights.items() if not bool(start[n].all())}
        self._hold()
        self._versions = {n: self._weights[n]._version for n in self._given}
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    @property
    def masks(self) -> Masks:
        """The masks as they are now, a copy on the CPU."""
        origin = {"density": self._density, "step": self.step, "seed": self._seed}
        tensors = {n: m.cpu().clone() for n, m in self._masks.items()}
        return Masks(tensors, self._layers, MaskReport(origin=origin))

    @property
    def removed_in(self) -> dict[str, Tensor]:
        """For each weight the number of the update, from 1, in which it was last removed; 0 while it is kept. int32, CPU.

        `path[i]` is the density after update i + 1.
        """
        return {n: t.cpu().masked_fill(self._masks[n].cpu(), 0) for n, t in self._removed_in.items()}

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, so that clipping counts only what is there; call it before.

        Gradients that the next update needs stay: RigL takes no step then, and for GraNet that step's norm counts all.
        """
        if self.method.grows_by_gradient and self.method.due(self.step + 1, self.steps):
            return
        self._zero(weight.grad for weight in self._weights.values())

    def state_dict(self) -> dict[str, Any]:
        """All that a training needs to go on: tensors, numbers and lists, which `torch.load(weights_only=True)` reads."""
        tensors = {"masks": self._masks, "removed_in": self._removed_in}
        return {
            "step": self.step,
            "steps": self.steps,
            "density": self._density,
            "method": self._described(),
            "densities": self._scope if self._scope is None or isinstance(self._scope, str) else dict(self._scope),
            "floor": self._floor,
            "path": list(self.path),
            **{key: {n: t.cpu().clone() for n, t in values.items()} for key, values in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; load the model and the optimizer too, before or after this, in any order.

        Raises:
            AutoSparseError: the state is another model's, or of a training of another length or sparsity.
        """
        if not isinstance(state, Mapping):
            raise AutoSparseError(f"the state of sparsify is {state!r}: give what state_dict() returned")
        absent = [
            key for key in ("step", "steps", "density", "densities", "floor", "path", "method") if key not in state
        ]
        if absent:
            raise AutoSparseError(f"the state of sparsify has no {absent[0]}: give what state_dict() returned")
        own = self._described()
        require(state["method"] == own, "method", own, f"the saved state is of {state['method']}; give the same")
        steps, density = state["steps"], state["density"]
        require(steps == self.steps, "steps", self.steps, f"the saved state is of a training of {steps}; give the same")
        held: Any
        for key, held in (("densities", self._scope), ("floor", self._floor)):
            require(state[key] == held, key, held, f"the saved state is for {state[key]!r}; give the same")
        same = math.isclose(density, self._density, rel_tol=1e-9)
        require(same, "sparsity", 1 - self._density, f"the saved state is for {1 - density:.6g}; give the same")
        for key, values in (("masks", self._masks), ("removed_in", self._removed_in)):
            given = state.get(key, {})
            shapes = {n: tuple(t.shape) for n, t in given.items()}
            if shapes != {n: tuple(t.shape) for n, t in values.items()}:
                raise AutoSparseError(f"the state of sparsify does not fit: its {key} are those of another model")
            for name, tensor in values.items():
                tensor.copy_(given[name])
        self.step, self.path = int(state["step"]), [float(d) for d in state["path"]]
        with torch.no_grad():
            for name, given_weight in self._given.items():
                weight = self._weights[name]
                if weight._version == self._versions[name]:  # else the model was loaded after `sparsify`
                    weight.copy_(given_weight)
        self._given = {}
        self._hold()

    def _described(self) -> str:
        """The method and its settings."""
        values = ", ".join(f"{key}={value!r}" for key, value in dataclasses.asdict(self.method).items())
        return f"{type(self.method).__name__}({values})"

    def remove(self) -> None:
        """End: from now on the masks neither change nor hold. Warns where updates are left that the sparsity needs."""
        left = sum(self.method.due(step, self.steps) for step in range(self.step + 1, self.steps + 1))
        if self._hooks and self.step and left and abs(self.masks.density - self._density) > 1e-3:
            warnings.warn(
                f"sparsify: the training ended after {self.step} of {self.steps} steps, and {left} updates of the masks are "
                f"left: the sparsity is {self.masks.sparsity:.4g}, {1 - self._density:.4g} was asked for; set steps to "
                "the number of optimizer steps that you run",
                stacklevel=2,
            )
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hold(self) -> None:
        self._zero = Zeroing(self._masks.values())
        self._zero(self._weights.values())

    def _before(
        self, optimizer: torch.optim.Optimizer, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A scaler leaves it to an optimizer with fused=True to do nothing where gradients are infinite.
        infinite = getattr(optimizer, "found_inf", None)
        self._ignored = infinite is not None and bool(infinite)
        if self._ignored:
            return None
        self._given = {}
        self._skipped = self.method.skips_step and self.method.due(self.step + 1, self.steps)
        if not self._skipped:
            return None
        closure = named.get("closure", given[1] if len(given) > 1 else None)
        if closure is None:
            self._update_instead()
            return None

        def and_update() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._update_instead()
            return loss

        return (given[0], and_update), {k: v for k, v in named.items() if k != "closure"}

    def _update_instead(self) -> None:
        """The update in place of the optimizer's step: no gradient is left that could move a weight."""
        self._update()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _after(self, *_: Any) -> None:
        if self._ignored:
            return
        self.step += 1
        if self._skipped:
            return
        self._zero(self._weights.values())
        if self.method.due(self.step, self.steps):
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        step = self.step + 1 if self._skipped else self.step
        for known in (self._masks, self._removed_in):  # the model may have been moved to another device
            known.update({n: t.to(self._weights[n].device) for n, t in known.items()})
        now = Update(
            {n: w.detach() for n, w in self._weights.items()},
            {n: w.grad for n, w in self._weights.items()},
            self._masks,
            self._layers,
            self._density,
            self._scope,
            self._floor,
            step,
            self.steps,
            self._seed,
        )
        masks = {n: m.to(self._masks[n].device) for n, m in self.method.update(now).items()}
        for name, mask in masks.items():
            before, weight = self._masks[name], self._weights[name]
            changed = before != mask
            self._removed_in[name][before & ~mask] = len(self.path) + 1
            for value in self.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(changed.to(value.device), 0)
        self._masks = masks
        total = sum(m.numel() for m in masks.values())
        self.path.append(sum(int(m.sum()) for m in masks.values()) / total)
        self._hold()


def _check_masks(masks: Mapping[str, Tensor], own: Mapping[str, Tensor], method: SparseTraining) -> None:
    """Masks to start with have the shapes of the method's own, and keep as many weights in all."""
    if not isinstance(masks, Mapping) or set(masks) != set(own) or any(masks[n].shape != own[n].shape for n in own):
        raise AutoSparseError("the masks to start with are another model's: give masks of its prunable weights")
    other = [n for n in own if masks[n].dtype != torch.bool]
    if other:
        raise AutoSparseError(f"the mask of {other[0]} is {masks[other[0]].dtype}: give boolean tensors")
    kept, needed = (sum(int(m.sum()) for m in one.values()) for one in (masks, own))
    if kept != needed:
        raise AutoSparseError(
            f"the masks to start with keep {kept} weights, and {type(method).__name__} starts with {needed}: give masks "
            "that keep as many, or leave masks out"
        )


def sparsify(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: str = "gmp",
    *,
    sparsity: float,
    steps: int,
    densities: Scope | None = None,
    masks: Mapping[str, Tensor] | None = None,
    floor: float = 0.0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_input: Any = None,
    seed: int = 0,
    **options: Any,
) -> Sparsifier:
    """Sparsify `model` in your own training loop: the masks change as `optimizer` steps, and end at exactly `sparsity`.

    Args:
        model: may be wrapped by `torch.compile`, DDP or Fabric.
        optimizer: must train all prunable weights.
        method: `"gmp"` (gradual magnitude pruning), `"set"`, `"rigl"`, `"granet"`, `"acdc"`, or `package.module:name`.
        sparsity: fraction of the prunable weights that is removed at the end.
        steps: optimizer steps of the whole training; the schedules of the methods are shares of it.
        densities: of the layers at the end: a rule such as `"erk"`, or one density for each layer. `None`: the method's
            own, which is a global ranking for GMP, GraNet and AC/DC, and `"erk"` for SET and RigL.
        masks: to start with, in place of the method's own.
        floor: smallest density of any layer.
        include, exclude: shell patterns on parameter names, as in `prune`.
        example_input: for weights that only a trace shows to be prunable, as in `prune`.
        seed: of random masks and random growth.
        options: the settings of the method, such as `every=200`; see `GMPSettings`, `SETSettings`, `RigLSettings`,
            `GraNetSettings` and `ACDCSettings`.

    Returns:
        A handle with `masks`, `mask_gradients()` (call it before clipping), `state_dict()`, `load_state_dict()` and
            `remove()`.

    Raises:
        AutoSparseError: bad settings, a weight that the optimizer does not train, or masks of another model.

    Examples:
        >>> import torch, autosparse
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = autosparse.sparsify(model, optimizer, "gmp", sparsity=0.75, steps=10, every=1)
        >>> for _ in range(10):
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> handle.masks.kept
        8
    """
    entry = method_for(method, "method") if isinstance(method, str) else None
    known = [name for name in METHODS if issubclass(method_for(name).settings, SparseTraining)]  # type: ignore[union-attr]
    if entry is None or not issubclass(entry.settings, SparseTraining):
        raise AutoSparseError(f"method is {method!r}: known are {', '.join(known)}, or package.module:name")
    require("epochs" not in options, "epochs", options.get("epochs"), "steps is the length here; leave epochs out")
    gain = options.get("init_gain")
    require(
        gain is None, "init_gain", gain, "it is for a search that rewinds; scale the weights yourself, or leave it out"
    )
    chosen = settings_for(method, entry, options)
    require(hasattr(optimizer, "param_groups"), "optimizer", optimizer, "give the optimizer that trains the model")
    check_values(model)
    operands = None if example_input is None else trace(model, example_input).operands
    layers = prunable_layers(model, include=include, exclude=exclude, operands=operands)
    density = 1 - check_sparsity(sparsity)
    return Sparsifier(
        model,
        optimizer,
        layers,
        chosen,
        density=density,
        steps=steps,
        scope=densities,
        floor=floor,
        masks=masks,
        seed=seed,
    )


@dataclass(frozen=True)
class MaskSchedule:
    """Masks that change in a training of `training.train`, which attaches them to its own model and optimizer."""

    method: SparseTraining
    layers: Mapping[str, Layer]
    density: float
    scope: Scope | None = None
    floor: float = 0.0

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> Sparsifier:
        """The handle that changes the masks of `model` over `steps` steps of `optimizer`."""
        how: dict[str, Any] = {"density": self.density, "scope": self.scope, "floor": self.floor}
        return Sparsifier(model, optimizer, self.layers, self.method, steps=steps, seed=seed, **how)


def search(
    model: nn.Module,
    layers: Mapping[str, Layer],
    data: ImageData,
    recipe: Recipe,
    settings: SparseTraining,
    density: float,
    *,
    seed: int = 0,
    device: str = "auto",
    scope: Scope | None = None,
    floor: float = 0.0,
    state: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> SearchResult:
    """The masks at the end of one training in which they change; the model is left as it was.

    The run has the length of `settings.epochs`, annealed as the recipe says, or that of the recipe: then a training that
    continues is at its end, and the masks cost nothing beside it.

    Args:
        scope: layer densities in place of the method's own.
        state: directory for what is done, to continue after a stop; the caller deletes it.

    Raises:
        AutoSparseError: as `sparsify`; the state is another search's.
        AutoSparseFailure: the training diverged.
    """
    per_epoch, length = steps_per_epoch(data, recipe.batch_size), check_length(settings, data, recipe)
    recipe = replace(recipe, steps=length)
    schedule = MaskSchedule(settings, dict(layers), density, scope, floor)
    with rewound(model):
        if settings.init_gain is not None:
            _scale_down(model, layers, settings.init_gain)
        trained = train(
            model,
            data.without("test"),
            recipe,
            mask_schedule=schedule,
            seed=seed,
            device=device,
            checkpoint=None if state is None else state / "training.pt",
            validate=on_epoch is not None,
            on_epoch=on_epoch,
        )
        weights = {n: t.cpu() for n, t in full_state(model).items()}
    masks = trained.masks
    assert masks is not None
    origin = {**dataclasses.asdict(settings), "density": density, "floor": floor, "seed": seed, "steps": length}
    masks.report = replace(masks.report, origin=origin)
    masks.signs = {n: weights[n] >= 0 for n in masks}
    done = length if settings.epochs is None else 0
    notes = remarks(settings, length)
    if settings.init_gain is not None and not any(isinstance(module, NORMS) for module in model.modules()):
        notes += (
            f"init_gain is {settings.init_gain}: the network has no norm layers, so smaller weights change what it computes; "
            "leave it out",
        )
    return SearchResult(masks, length / per_epoch, trained.seconds, weights=weights, steps=done, notes=notes)


def count_updates(method: SparseTraining, steps: int) -> int:
    """How often the masks change in a training of so many steps.

    Raises:
        AutoSparseError: it is never.
    """
    updates = sum(method.due(step, steps) for step in range(1, steps + 1))
    none = f"no update fits into a training of {steps} steps; give a smaller number"
    require(updates > 0, "every", method.every, none)
    return updates


def remarks(method: SparseTraining, steps: int) -> tuple[str, ...]:
    """What a user should know of a method in a training of so many steps."""
    if count_updates(method, steps) > 1 or not method.gradual:
        return ()
    return (
        f"every is {method.every}: one update fits into a training of {steps} steps, so the masks do not change "
        "gradually; give a smaller number, or more steps",
    )


def check_task(settings: SparseTraining, validation: float, density: float, scope: Scope | None) -> None:
    """`Method.check` of a method that is one training."""
    settings.check(density, scope)


def check_length(settings: SparseTraining, data: ImageData, recipe: Recipe) -> int:
    """Optimizer steps of the search; the `Method.check_length` of a method that is one training."""
    if settings.epochs is not None:
        recipe = replace(recipe, steps=max(1, round(settings.epochs * steps_per_epoch(data, recipe.batch_size))))
    length = recipe.length(data)
    count_updates(settings, length)
    return length


def random_masks(layers: Mapping[str, Layer], density: float, scope: Scope | None, floor: float, seed: int) -> Masks:
    """Masks with ERK's densities, or those of `scope`, and random positions: what SET and RigL start from."""
    generator = make_generator(seed, "sparse start")
    noise = {n: torch.rand(layer.shape, generator=generator) for n, layer in layers.items()}
    return select(noise, density, layers=layers, scope=scope or "erk", floor=floor, seed=seed)


def at_share(share: float, steps: int) -> int:
    """The step at a share of a training."""
    return math.floor(share * steps + 0.5)


@torch.no_grad()
def _scale_down(model: nn.Module, layers: Mapping[str, Layer], gain: float) -> None:
    """Scale the weights of each layer to a root mean square of `gain/√fan_in`, in place, where it is larger."""
    own = dict(unwrap(model).named_parameters())
    for name, layer in layers.items():
        size = float(own[name].float().square().mean().sqrt()) * math.sqrt(layer.fan_in)
        if size > gain:
            own[name].mul_(gain / size)
