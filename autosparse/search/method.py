"""What a method of search is: it trains to find masks. The table of all methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autosparse.errors import from_mapping, require
from autosparse.masks.mask import Masks
from autosparse.plugins import is_outside, load_outside
from autosparse.training.data import ImageData
from autosparse.training.recipe import Recipe


@dataclass(frozen=True)
class SearchResult:
    """Masks and their cost: seconds, and epochs' worth of forward and backward passes.

    `weights`: all parameters and buffers after `steps` optimizer steps under the masks, for a training that continues
    from there instead of rewinding to `θ₀`; its optimizer starts anew. `None` if the method trained none.
    `fitness`: of K-starts, what each start measured, in the order of training. `notes`: what the user should know.
    """

    masks: Masks
    epochs: float
    seconds: float
    weights: Mapping[str, Tensor] | None = None
    steps: int = 0
    fitness: tuple[tuple[float, ...], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A method: its settings, a dataclass that checks its own values, and its function.

    The function has the signature of `kstarts`: `(model, layers, data, recipe, settings, density, *, seed, device, scope,
    floor, state, on_epoch) -> SearchResult`. `scope` is `None` unless the user gave one. `continues`: whether the final
    training can go on with the weights of its result. `starts`: from the settings, the names of other candidates (criteria,
    scorers, variants) whose masks the function needs; it gets them as `starts={name: Masks}`, and their cost is added.
    `hands_on`: these masks are found with the scope and floor that the user gave; otherwise with their own.
    `check(settings, validation, density, scope)` raises `AutoSparseError` before any work where the settings do not fit
    the task; `validation` is the share or number of validation images. `check_length(settings, data, recipe)` raises it
    where they do not fit the length of a training.
    """

    settings: type
    search: Callable[..., SearchResult]
    continues: bool = False
    starts: Callable[[Any], Sequence[str]] = lambda settings: ()
    hands_on: bool = False
    check: Callable[[Any, float, float, Any], None] = lambda settings, validation, density, scope: None
    check_length: Callable[[Any, ImageData, Recipe], Any] = lambda settings, data, recipe: None


METHODS = {
    "irp": "autosparse.search.irp:METHOD",
    "kstarts": "autosparse.search.kstarts:METHOD",
    "gmp": "autosparse.search.gmp:METHOD",
    "acdc": "autosparse.search.gmp:ACDC",
    "set": "autosparse.search.dynamic:SET",
    "rigl": "autosparse.search.dynamic:RIGL",
    "granet": "autosparse.search.dynamic:GRANET",
    "concrete": "autosparse.search.concrete:METHOD",
    "halving": "autosparse.search.halving:METHOD",
    "dissipating": "autosparse.search.dissipating:METHOD",
    "kstarts_dissipating": "autosparse.search.dissipating:COMBINED",
}


def method_for(name: str, what: str = "criterion") -> Method | None:
    """The method of a name: one of `METHODS`, or a `Method` from outside as `package.module:name`; else `None`.

    `what`: the setting that has the name, for messages.
    """
    if name not in METHODS and not is_outside(name):
        return None
    method = load_outside(METHODS.get(name, name), what)
    return method if isinstance(method, Method) else None


def settings_for(name: str, method: Method, options: Any) -> Any:
    """The settings of a method from `options`: such settings already, or a mapping of their fields; defaults for `None`.

    Raises:
        AutoSparseError: an unknown field, or a value out of range.
    """
    if isinstance(options, method.settings):
        return options
    given = dict(options or {}) if isinstance(options, Mapping | None) else {}
    known = [field.name for field in dataclasses.fields(method.settings)]
    require(isinstance(options, Mapping | None), f"options of {name}", options, f"give {', '.join(known)}")
    return from_mapping(method.settings, given, name)
