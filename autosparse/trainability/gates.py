"""Gates on residual branches and units: where they stand, how they are drawn, and how they learn to close."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from autosparse.errors import AutoSparseError, require, settings
from autosparse.masks.layers import prunable_layers, unwrap
from autosparse.masks.random import make_generator
from autosparse.network.coupling import coupled_filters
from autosparse.network.gating import SHUT, first_of, multiplied
from autosparse.network.graph import Graph, trace
from autosparse.network.inputs import as_call, tensors_in
from autosparse.network.lipschitz import pairs
from autosparse.network.restore import private_copy
from autosparse.network.running import untouched
from autosparse.trainability.shrink import output_difference
from autosparse.training.loop import training_loss

OF = ("layers", "units")
_PASSED = ("activation", "reshape", "slice", "mul", "add")  # of one operand, these may follow a branch's last layer
_SAME = 1e-5


@settings
class GateSettings:
    """How gates learn to close.

    A gate `ξ ~ B(π)` multiplies each residual branch (`of="layers"`), or each output channel of the layers whose filters
    can go alone (`of="units"`). The objective is `E_ξ[L(W ⊙ ξ)] + cost·Σπ`, with all C units of a layer at the cost of one
    branch, so `cost/C` each; projected gradient descent on π, from `start` on. `lr`: step size. With
    `of="layers"` one branch, drawn at random, learns in each training step; with `of="units"` all L layers learn in each
    step, with step size `lr·C/L`, so that both move equally far on average. Gates learn in the share `begin` … `end` of
    the training; what has reached 0 is removed at the end of the epoch, and at `end` all that is under ½. The gates that
    are left stay open. `shuffled` is a sanity check: as many go at the same time, but drawn at random (units
    within their layer).
    """

    of: str = "layers"
    cost: float = 0.02
    lr: float = 0.5
    start: float = 0.9
    begin: float = 0.1
    end: float = 0.6
    shuffled: bool = False

    def __post_init__(self) -> None:
        require(self.of in OF, "gates.of", self.of, f"known: {', '.join(OF)}")
        for key in ("cost", "lr"):
            value = getattr(self, key)
            require(0 < value < math.inf, f"gates.{key}", value, "give a positive number")
        require(0 < self.start <= 1, "gates.start", self.start, "it is a probability, above 0")
        shares = f"begin and end are shares of the training, 0 <= begin < end <= 1; end is {self.end}"
        require(0 <= self.begin < self.end <= 1, "gates.begin", self.begin, shares)


@dataclass(frozen=True)
class Branch:
    """A residual branch: the modules that are replaced when it goes, and the last of them, whose output goes into the sum;
    how many channels that has, and by how much its sides are smaller than those of what goes in. `outputs`: the length of
    the tuple that the last module returns, as attention does; 0 if it returns a tensor."""

    name: str
    last: str
    modules: tuple[str, ...]
    channels: int
    stride: int
    outputs: int = 0


class Entrance(nn.Module):
    """Where a branch was entered: lets one channel through, in memory of its own, since what follows may work in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(1 if x.dim() in (2, 4, 5) else -1, 0, 1).clone()


class Nothing(nn.Module):
    """What a branch gave that is gone: zeros of its shape, with so many channels, and sides divided by the stride.

    With `outputs`, a tuple of zeros and so many `None` less one.
    """

    batch_first = False  # nn.TransformerEncoderLayer asks its attention, and then takes no fused path

    def __init__(self, channels: int, stride: int, outputs: int = 0) -> None:
        super().__init__()
        self.channels, self.stride, self.outputs = channels, stride, outputs

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dim() < 4:
            zeros = x.new_zeros(*x.shape[:-1], self.channels)
        else:
            zeros = x.new_zeros(len(x), self.channels, *(-(-side // self.stride) for side in x.shape[2:]))
        return (zeros, *[None] * (self.outputs - 1)) if self.outputs else zeros


def branches(model: nn.Module, example_input: Any) -> tuple[Branch, ...]:
    """The residual branches that can be removed from `model`, in execution order.

    A branch is all that lies between where a sum's two operands part and the sum, on the side with more layers; nothing of
    it may be used elsewhere. Its layers are taken out one by one, or with the modules around them where these compute
    something in between, such as attention. That the network without the branch computes what it does with the branch at
    zero is measured on a copy; branches of which this does not hold are left out.
    """
    model = unwrap(model)
    found = []
    for branch in _branches(trace(model, example_input)):
        ways = (_removable(model, branch, way, example_input) for way in _ways_out(model, branch))
        found += [next(filter(None, ways), None)]
    return tuple(branch for branch in found if branch is not None)


def _branches(graph: Graph) -> Iterator[Branch]:
    operations = graph.operations
    above: list[frozenset[int]] = []  # each operation with all before it
    for index, operation in enumerate(operations):
        above.append(frozenset({index}).union(*(above[i] for i in operation.inputs)))
    users: dict[int, set[int]] = {}
    for index, operation in enumerate(operations):
        for i in operation.inputs:
            users.setdefault(i, set()).add(index)
    for index, operation in enumerate(operations):
        if operation.kind != "add" or len(set(operation.inputs)) != 2:
            continue
        a, b = operation.inputs
        sides = {a: above[a] - above[b], b: above[b] - above[a]}
        layers = {i: sum(bool(operations[o].weights) for o in own) for i, own in sides.items()}
        if layers[a] == layers[b]:
            continue
        last = max(layers, key=lambda i: layers[i])
        inside = sides[last]
        if any(not users.get(o, set()) <= inside | {index} for o in inside):
            continue
        end = last
        while operations[end].kind in _PASSED and not operations[end].parameters and len(operations[end].inputs) == 1:
            end = operations[end].inputs[0]
        if end not in inside or not operations[end].parameters:
            continue
        modules = dict.fromkeys(p.rpartition(".")[0] for o in sorted(inside) for p in operations[o].parameters)
        place = operations[end].parameters[0].rpartition(".")[0]
        into = next(o for o in sorted(inside) if operations[o].parameters)
        before, after = operations[operations[into].inputs[0]].shape, operations[last].shape
        images = len(before) == len(after) >= 4
        stride = -(-before[2] // after[2]) if images else 1
        yield Branch(next(iter(modules)), place, tuple(modules), after[1] if images else after[-1], stride)


def _ways_out(model: nn.Module, branch: Branch) -> Iterator[Branch]:
    """The branch as its layers, and as ever larger modules around them that hold no other parameters."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    inside = {name for name in names if name.rpartition(".")[0] in branch.modules}

    def around(module: str, depth: int) -> str:
        while module.count(".") > depth:
            parent = module.rpartition(".")[0]
            if not all(name in inside for name in names if name.startswith(f"{parent}.")):
                break
            module = parent
        return module

    tried = set()
    for depth in range(max(module.count(".") for module in branch.modules), -1, -1):
        chosen = dict.fromkeys(around(module, depth) for module in branch.modules)
        outer = tuple(m for m in chosen if not any(m.startswith(f"{other}.") for other in chosen))
        if outer in tried or not all(outer):
            continue
        tried.add(outer)
        last = next(m for m in outer if f"{branch.last}.".startswith(f"{m}."))
        yield replace(branch, name=outer[0], last=last, modules=outer)


def _removable(model: nn.Module, branch: Branch, way: Branch, example: Any) -> Branch | None:
    """The way out with the number of its outputs, if the network without it is that with the branch at zero."""
    shut, gone = private_copy(model), private_copy(model)
    given: list[Any] = []
    whole = way.last != branch.last or any(shut.get_submodule(way.last).children())

    def silence(module: nn.Module, args: Any, out: Any) -> Any:
        given.append(out)
        return first_of(out, lambda tensor: tensor * 0)

    hook = shut.get_submodule(way.last).register_forward_hook(silence)
    try:
        if whole:  # a module around layers gives what its last layer does, or it holds more than the branch
            for parameter in shut.get_submodule(branch.last).parameters():
                parameter.data.zero_()
        with untouched(shut), torch.no_grad():
            args, kwargs = as_call(shut, example)
            shut(*args, **kwargs)
            out = given[0]  # here, since what hooks hold is restored too
        if whole and bool(tensors_in(out)[0].any()):
            return None
        way = replace(way, outputs=len(out) if isinstance(out, tuple) else 0)
        take_out(gone, way)
        difference = output_difference(shut, gone, example)
    except Exception:  # whatever a module says to inputs of another shape
        return None
    finally:
        hook.remove()
    return way if difference <= _SAME else None


def take_out(model: nn.Module, branch: Branch) -> None:
    """Remove a branch from `model` in place."""
    for name in branch.modules:
        parent, _, key = name.rpartition(".")
        put: nn.Module = Entrance() if name == branch.name else nn.Identity()
        if name == branch.last:
            put = Nothing(branch.channels, branch.stride, branch.outputs)
        owner = model.get_submodule(parent)
        setattr(owner, key, put)
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0  # no fused path, which reads weights that are gone


def unit_layers(model: nn.Module, example_input: Any) -> dict[str, str]:
    """The layers whose filters or units can be removed alone, each with the module at whose output its gates stand: the
    norm that takes its output, or itself."""
    model = unwrap(model)
    graph = trace(model, example_input)
    layers = prunable_layers(model, operands=graph.operands)
    bound = {*graph.last_layers(), *(n for group in coupled_filters(model, layers, example_input) for n in group)}
    modules = dict(model.named_modules())
    norms = pairs(graph, layers, dict(model.named_parameters()))
    found = {}
    for name, layer in layers.items():
        path = name.removesuffix(".weight")
        plain = isinstance(modules.get(path), (nn.Linear, _ConvNd))
        if not plain or layer.groups > 1 or layer.shape[layer.out_dim] < 2 or name in bound:
            continue
        norm = norms[name].norm
        if norm is not None and not isinstance(modules.get(norm), _BatchNorm):
            continue  # channels that are normalized together cannot go
        found[name] = path if norm is None else norm
    return found


@dataclass
class Gates:
    """The gates of a network while it trains: `pi` by the name of the branch or layer, `()` or `(channels,)`.

    `places`: the module at whose output each stands.
    """

    settings: GateSettings
    places: dict[str, str]
    pi: dict[str, Tensor]
    seed: int
    _drawn: dict[str, Tensor] = field(default_factory=dict)
    _labels: Tensor | None = None
    _images: Tensor | None = None
    _logits: Any = None
    _paused: bool = False

    @staticmethod
    def of(model: nn.Module, example_input: Any, chosen: GateSettings, seed: int) -> tuple[Gates, dict[str, Branch]]:
        """Gates of all branches or units that can go.

        Raises:
            AutoSparseError: there are none.
        """
        known: dict[str, Branch] = {}
        if chosen.of == "layers":
            known = {branch.name: branch for branch in branches(model, example_input)}
            places = {name: branch.last for name, branch in known.items()}
            shapes: dict[str, tuple[int, ...]] = dict.fromkeys(places, ())
        else:
            places = unit_layers(model, example_input)
            own = dict(unwrap(model).named_parameters())
            layers = prunable_layers(model)
            shapes = {n: (own[n].shape[layers[n].out_dim],) for n in places}
        if not places:
            what = "residual branch" if chosen.of == "layers" else "layer with units"
            raise AutoSparseError(
                f"gates.of is {chosen.of!r}: {type(unwrap(model)).__name__} has no {what} that can go"
            )
        pi = {name: torch.full(shape, chosen.start) for name, shape in shapes.items()}
        return Gates(chosen, places, pi, seed), known

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Within the block, the outputs at the gates are multiplied by what was drawn; in eval mode by π."""

        def factor(name: str) -> Tensor:
            return self._drawn.get(name, self.pi[name]) if model.training else self.pi[name]

        hook = model.register_forward_hook(self._keep)
        try:
            with multiplied(model, self.places, factor):
                yield
        finally:
            hook.remove()
            self._drawn = {}

    def _keep(self, module: nn.Module, args: Any, out: Any) -> None:
        if module.training and not self._paused:
            self._logits = out

    def draw(self, step: int, images: Tensor, labels: Tensor) -> None:
        """Draw `ξ` for one step."""
        generator = make_generator(self.seed, "gates", step)
        self._images, self._labels = images, labels
        for name, pi in self.pi.items():
            drawn = (torch.rand(pi.shape, generator=generator) < pi.cpu()).float().to(images.device)
            units = self.settings.of == "units"
            self._drawn[name] = drawn.clamp(min=SHUT).requires_grad_() if units else drawn

    def learn(self, model: nn.Module, step: int, context: Callable[[], Any]) -> None:
        """One step on π, after the backward pass of the weights.

        `π ← clip(π − lr·g, 0, 1)`. Of layers: for one branch, drawn at random, `g = L(ξ=1) − L(ξ=0) + cost`, from one more
        forward pass; the branches take turns by chance. Of units: `g = C·∂L/∂ξ + cost`, the same to
        first order, from the pass that is there, with `lr/layers`.
        """
        rate, cost = self.settings.lr, self.settings.cost
        if self.settings.of == "units":
            for name, pi in self.pi.items():
                gradient = self._drawn[name].grad
                if gradient is not None:
                    pi.sub_(rate / len(self.pi) * (len(pi) * gradient.to(pi) + cost)).clamp_(0, 1)
            return
        names = list(self.pi)
        if not names:
            return
        chosen = names[int(torch.randint(len(names), (), generator=make_generator(self.seed, "branch", step)))]
        drawn, loss = self._drawn[chosen], self._loss(self._logits)
        self._drawn[chosen] = 1 - drawn
        self._paused = True
        with torch.no_grad(), context(), _statistics_kept(model):
            flipped = self._loss(model(self._images))
        self._paused = False
        self._drawn[chosen] = drawn
        gain = (loss - flipped) if drawn > 0.5 else (flipped - loss)  # L(ξ=1) − L(ξ=0)
        self.pi[chosen].sub_(rate * (gain + cost)).clamp_(0, 1)

    def _loss(self, logits: Any) -> float:
        assert self._labels is not None
        return float(training_loss(logits, self._labels).detach())


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """A pass in train mode leaves the running statistics as they are."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    held = [(norm, norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        yield
    finally:
        for norm, mean, var in held:
            norm.track_running_stats, norm.running_mean, norm.running_var = True, mean, var
