"""Which layers' filters live or die together: channel i of a residual sum goes only if all that add to it lose filter i.

Every dimension of every tensor of one forward pass either holds the output channels of some layers, in their order, or
nothing that is followed. Layers are coupled when their channels meet:

- elementwise: residual sums, whole chains of them, and products of two activations of the same channels. A gate
  (squeeze-and-excitation, GLU of two layers) thus joins what it gates, for its filter i acts on channel i alone; so do
  tensors that are concatenated along another dimension (tokens, space);
- in a depthwise convolution, which joins the layers that feed it.

Norms, activations, softmax, pools, resizing, dropout, padding of other dimensions, views and permutations that leave
the channels whole carry them on; products with a weight carry all dimensions but the one that they contract. What cuts
or rearranges channels (concatenation, slices, shuffles, heads, GLU of two halves) or is not known ends the following:
what lies behind is not coupled with what lies before. Parameters (biases, positions, layer scales), inputs and what is
not followed couple nothing and hinder nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.masks.layers import Layer
from autosparse.network.linearize import Step, Tape, is_pointwise, record, shared_storage
from autosparse.network.observe import EXAMPLES
from autosparse.network.operators import FACTORS, KIND, VIEWS

Channels = tuple[int | None, ...]  # per dimension of a tensor: the class of layers whose channels it holds

_CARRY = frozenset({"clone", "contiguous", "_to_copy", "native_dropout", "dropout", "alias", "detach", "lift_fresh"})
_REDUCED = "mean sum amax amin max min prod var std var_mean std_mean logsumexp norm"
_REDUCTIONS = frozenset(_REDUCED.split())


def coupled_filters(model: nn.Module, layers: Mapping[str, Layer], example_input: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more layers whose output channel i must be kept or removed in all of them, see this module.

    Output channels lie in each layer's `out_dim` and are equally many within a group. Layers that are not in `layers`
    are followed through, but are in no group; those that eval mode does not run are in none either.

    Args:
        layers: the prunable weights, as `prunable_layers` gives them.
        example_input: as for `trace`.

    Returns:
        Groups in the order of `layers`, as are the names within.

    Raises:
        AutoSparseError: the model does not take this input, or returns no tensor.

    >>> from torchvision.models import resnet18
    >>> from autosparse.masks.layers import prunable_layers
    >>> model = resnet18()
    >>> coupled_filters(model, prunable_layers(model), torch.zeros(1, 3, 32, 32))[0]
    ('conv1.weight', 'layer1.0.conv2.weight', 'layer1.1.conv2.weight')
    """
    tape = record(model, example_input, EXAMPLES)
    following = _Following(tape, layers)
    for index, step in enumerate(tape.steps):
        following.step(step, index in tape.seen_elsewhere)
    found: dict[int, list[str]] = {}
    for name, start in following.start.items():
        found.setdefault(following.root(start), []).append(name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)


class _Following:
    """The channels of every tensor of a tape, and the classes of layers that have met so far."""

    def __init__(self, tape: Tape, layers: Mapping[str, Layer]) -> None:
        self.tape = tape
        self.parent: list[int] = []
        self.channels: dict[int, Channels] = {}  # by id of the tensor
        self.start: dict[str, int] = {}
        for name, layer in layers.items():
            # One filter is no choice; rows of a grouped transposed convolution are no single channels.
            plain = layer.kind != "conv_transpose" or layer.groups == 1
            if name in tape.state and layer.shape[layer.out_dim] > 1 and plain:
                self.start[name] = len(self.parent)
                self.channels[id(tape.state[name])] = tuple(
                    len(self.parent) if d == layer.out_dim else None for d in range(len(layer.shape))
                )
                self.parent.append(len(self.parent))

    def root(self, index: int) -> int:
        while self.parent[index] != index:
            index = self.parent[index]
        return index

    def meet(self, *classes: int | None) -> int | None:
        """The one class of all that meet here."""
        roots = [self.root(c) for c in classes if c is not None]
        for other in roots:
            self.parent[other] = roots[0]
        return roots[0] if roots else None

    def of(self, t: Tensor) -> Channels:
        found = self.channels.get(id(t), ())
        return found if len(found) == t.dim() else (None,) * t.dim()

    def step(self, step: Step, seen_elsewhere: bool) -> None:
        if not any(any(c is not None for c in self.of(t)) for t in step.operands):
            found: list[Channels] = []
        else:
            found = self._after(step)
        for i, (t, shape) in enumerate(zip(step.results, step.shapes, strict=True)):
            known = found[i] if i < len(found) and len(found[i]) == len(shape) else (None,) * len(shape)
            self.channels[id(t)] = known
        if seen_elsewhere:  # other views of this memory hold something else from now on
            changed = {shared_storage(t) for t in step.written}
            for later in self.tape.steps:
                for t in (*later.operands, *later.results):
                    if shared_storage(t) in changed:
                        self.channels.pop(id(t), None)

    def _after(self, step: Step) -> list[Channels]:
        """The channels of the results; none where they are not known."""
        name, arguments, shapes = step.name, step.arguments, step.shapes
        kind = KIND.get(name)
        if name in FACTORS:
            return [self._product(name, arguments, shapes[0])]
        if name == "cat":
            return [self._side_by_side(arguments["tensors"], arguments.get("dim", 0))]
        x = next((t for t in step.operands if t.dim()), None)
        if x is None:
            return []
        before = self.of(x)
        if name in _REDUCTIONS and not is_pointwise(step.func):
            return [_reduced(before, arguments.get("dim"), len(shape)) for shape in shapes]
        if kind == "pool" or name.startswith(("reflection_pad", "replication_pad")):
            spatial = int(next(c for c in name if c.isdigit()))
            return [(*before[:-spatial], *(None,) * spatial)] * len(shapes)
        if kind == "resize":
            return [(*before[:2], *(None,) * (len(before) - 2))]
        if name == "constant_pad_nd":
            return [_padded(before, arguments["pad"])]
        if name in ("roll", "flip"):
            moved = arguments.get("dims") or range(x.dim())
            return [_without(before, [moved] if isinstance(moved, int) else moved)]
        if name == "glu":
            return [_without(before, [arguments.get("dim", -1)])]
        if name in VIEWS:
            return [_viewed(before, x.shape, shapes[0])]
        if name == "copy":
            return [self._elementwise([arguments["src"]], shapes[0])]
        if is_pointwise(step.func):
            return [self._elementwise(step.operands, shape) for shape in shapes]
        if kind in ("norm", "softmax", "activation") or name in _CARRY:
            return [before]
        if getattr(step.func, "is_view", False) and name != "as_strided":
            return _moved(step, x, before)
        return []

    def _product(self, name: str, arguments: Mapping[str, Any], shape: Sequence[int]) -> Channels:
        (first, _), (second, _) = FACTORS[name]
        x, w = arguments[first], arguments[second]
        a, b = self.of(x), self.of(w)
        if name == "convolution":
            made = b[1] if arguments["transposed"] else b[0]
            if arguments["groups"] > 1 and arguments["groups"] == x.shape[1] == shape[1]:
                made = self.meet(made, a[1])
            return (a[0], made, *(None,) * (len(shape) - 2))
        if name == "linear":
            return (*a[:-1], *b[:-1])
        if name in ("mm", "addmm", "_addmm_activation"):
            found: Channels = (a[0], b[1])
        elif name in ("bmm", "baddbmm"):
            found = (self.meet(a[0], b[0]), a[1], b[2])
        elif name in ("mv", "addmv"):
            found = (a[0],)
        else:
            return ()
        added = arguments.get("self") if first != "self" else None
        return found if not isinstance(added, Tensor) else self._met([found, self._aligned(added, shape)])

    def _elementwise(self, operands: Sequence[Tensor], shape: Sequence[int]) -> Channels:
        return self._met([self._aligned(t, shape) for t in operands])

    def _met(self, listed: Sequence[Channels]) -> Channels:
        return tuple(self.meet(*classes) for classes in zip(*listed, strict=True))

    def _aligned(self, t: Tensor, shape: Sequence[int]) -> Channels:
        """The channels of `t` when it is broadcast to `shape`."""
        missing = len(shape) - t.dim()
        if missing < 0:
            return (None,) * len(shape)
        kept = (c if n == m else None for c, n, m in zip(self.of(t), t.shape, shape[missing:], strict=True))
        return (*(None,) * missing, *kept)

    def _side_by_side(self, tensors: Sequence[Tensor], dim: int) -> Channels:
        most = max(t.dim() for t in tensors)  # vectors without elements are allowed beside anything
        return self._met([_without(self.of(t), [dim]) for t in tensors if t.dim() == most])


def _without(channels: Channels, dims: Sequence[int]) -> Channels:
    gone = {d % max(len(channels), 1) for d in dims}
    return tuple(None if d in gone else c for d, c in enumerate(channels))


def _reduced(channels: Channels, dim: Any, left: int) -> Channels:
    """After a reduction along `dim` (`None` or nothing: all) to `left` dimensions."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(len(channels)))
    if left == len(channels):
        return _without(channels, dims)
    gone = {d % len(channels) for d in dims}
    return tuple(c for d, c in enumerate(channels) if d not in gone)


def _padded(channels: Channels, pad: Sequence[int]) -> Channels:
    """`pad` holds what is added before and after, beginning with the last dimension."""
    return _without(channels, [-1 - i // 2 for i, n in enumerate(pad) if n])


def _viewed(channels: Channels, before: Sequence[int], after: Sequence[int]) -> Channels:
    """A dimension stays whole in a view if it has the same size and as many elements stand before and after it."""
    found: list[int | None] = [None] * len(after)
    for d, channel in enumerate(channels):
        for e, size in enumerate(after):
            if channel is not None and size == before[d] and math.prod(after[:e]) == math.prod(before[:d]):
                found[e] = channel
    return tuple(found)


def _moved(step: Step, x: Tensor, channels: Channels) -> list[Channels]:
    """After any view of `x`: strides that differ between all dimensions tell which became which."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * (size + 2))
    marked = torch.empty_strided(x.shape, strides, dtype=torch.uint8, device="meta")
    views = step.func(*(marked if a is x else a for a in step.args), **step.kwargs)
    origin = {(stride, size): c for stride, size, c in zip(strides, x.shape, channels, strict=True)}
    return [
        tuple(origin.get((s, n)) for s, n in zip(view.stride(), view.shape, strict=True))
        for view in ([views] if isinstance(views, Tensor) else views)
    ]
