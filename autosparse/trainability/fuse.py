"""FuseInit: a shallower network that begins where a deeper, trained one is, by fusing neighbouring layers into one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from autosparse.errors import AutoSparseError, require, settings
from autosparse.masks.layers import prunable_layers, unwrap
from autosparse.masks.random import forked, make_generator, seed_global
from autosparse.network.graph import trace
from autosparse.network.inputs import as_call
from autosparse.network.restore import private_copy
from autosparse.network.running import NORMS, Batch, take_batches, untouched
from autosparse.training.models import initialize

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Mish)
HOW = ("data", "gaussian")
_ROWS = 1 << 14  # patches of one batch that the fit takes at most


@settings
class FuseSettings:
    """Which layers are fused, see `fuse`: `runs` of neighbours, by the first and last name of each; `how`; `n_batches` of
    `batch_size` training images; `kernel`."""

    runs: tuple[tuple[str, str], ...] = ()
    how: str = "data"
    n_batches: int = 16
    batch_size: int = 128
    kernel: int | None = None

    def __post_init__(self) -> None:
        require(self.how in HOW, "fuse.how", self.how, f"known: {', '.join(HOW)}")
        for key in ("n_batches", "batch_size"):
            require(getattr(self, key) >= 1, f"fuse.{key}", getattr(self, key), "give at least 1")
        odd = self.kernel is None or (self.kernel >= 1 and self.kernel % 2 == 1)
        require(odd, "fuse.kernel", self.kernel, "give an odd number")


@dataclass(frozen=True)
class Fused:
    """`model`: the shallower network. `errors`: of each run, the relative squared error `E‖y − ŷ‖² / E‖y − E y‖²` of what is
    put in its place, on the batches; `None` where there were none. `layers`: the new layers, by their names in `model`."""

    model: nn.Module
    errors: Mapping[str, float | None]
    layers: tuple[str, ...]


def fuse(
    model: nn.Module,
    runs: Iterable[tuple[str, str]],
    batches: Iterable[Batch] | None = None,
    *,
    how: str = "data",
    n_batches: int = 8,
    kernel: int | None = None,
    ridge: float = 1e-6,
) -> Fused:
    """A copy of `model` in which each run of layers is one Linear or convolution, as close to the run as it can be.

    With x what goes into a run and y what comes out, the new layer `A·x + c` has

        A = Cov(y, x)·(Cov(x) + λI)⁻¹,   c = E[y] − A·E[x]                              (`how="data"`)
        A = W₂·diag(Φ(μ/s))·W₁,          c = W₂·(E[σ(h)] − diag(Φ(μ/s))·(μ − b₁)) + b₂   (`how="gaussian"`)

    where the first is the optimum of the squared error on the batches. The second is its closed form for
    `y = W₂σ(h) + b₂`, `h = W₁x + b₁` with σ the ReLU and Gaussian h of mean μ and standard deviation s: β and |γ| of a
    BatchNorm between, otherwise those of `x ~ N(0, I)`. It takes no data. Convolutions become one of the composed kernel
    size, stride and padding; where the inner ones are padded, it is exact inside of the image alone. The new layer has a
    BatchNorm if the run has one, set so that it changes nothing in eval mode. An activation at the end of the run stays.
    A run may hold residual blocks, with data only; where what they give is never negative, a ReLU follows the new layer.

    Runs are fused in order, each to give what the deep network gives, from what the network fused so far gives.

    Args:
        runs: pairs of names, the first and the last of some neighbouring children of an `nn.Sequential`.
        batches: pairs of inputs and targets, of which the first `n_batches` are taken.
        kernel: size of the new convolutions, odd, in place of the composed one; with data only.
        ridge: λ in units of the mean variance of x.

    Raises:
        AutoSparseError: names that are no neighbours in an `nn.Sequential`, a run without two layers to fuse, or of
            another form than `how` takes.

    Source: FuseInit (2001.10509); the order, the fit on what is fused so far and BatchNorm's place are derived here.
    """
    require(how in HOW, "how", how, f"known: {', '.join(HOW)}")
    require(kernel is None or (kernel >= 1 and kernel % 2 == 1), "kernel", kernel, "give an odd number")
    model = unwrap(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    taken = [] if batches is None else take_batches(batches, n_batches, device, 0)
    if how == "data" and not taken:
        raise AutoSparseError("fuse with how='data' fits to data: give batches, or how='gaussian'")
    found = private_copy(model)
    errors: dict[str, float | None] = {}
    shortcuts: set[str] = set()
    if taken:
        graph = trace(model, taken[0][0])
        shortcuts = graph.projections(prunable_layers(model, operands=graph.operands))
    places = []
    for first, last in runs:
        run = _Run.of(model, first, last, kernel, shortcuts)
        if how == "gaussian":
            require(kernel is None, "kernel", kernel, "the closed form has the composed size; leave it out")
            layer = _layer(run, *_gaussian(run)).to(device)
        else:
            layer = _layer(run, *_fitted(run, model, found, taken, ridge)).to(device)
        _replace(found, run, layer)
        places.append(run)
        errors[f"{first} to {last}"] = _error(run, model, found, taken) if taken else None
    names = tuple(_compact(found, places))
    return Fused(found, errors, names)


def fresh(fused: Fused, seed: int = 0, equal_norms: bool = False, whole: bool = False) -> nn.Module:
    """A copy of the fused network whose new layers are random: He-initialized, or with the norms of the fused ones.

    Their BatchNorms start as usual. With `equal_norms` each filter has the norm of the fused filter in its place, and the
    BatchNorm stays: then only the directions are lost. With `whole`, all layers of the network are random.
    """
    model = private_copy(fused.model)
    with forked([next(model.parameters()).device]):
        seed_global(seed, "fresh layers", device=next(model.parameters()).device)
        for name in ("",) if whole else fused.layers:
            part = model.get_submodule(name)
            before = {n: p.detach().clone() for n, p in part.named_parameters()}
            initialize(part)
            for path, module in part.named_modules():
                if isinstance(module, NORMS) and not equal_norms:
                    module.reset_parameters()
                elif isinstance(module, (nn.Conv2d, nn.Linear)) and equal_norms:
                    _give_back(module, before, path)
    return model


@torch.no_grad()
def _give_back(module: nn.Conv2d | nn.Linear, before: Mapping[str, Tensor], path: str) -> None:
    """The norm of each filter, and the bias, as they were."""
    prefix = f"{path}." if path else ""
    old, new = (w.flatten(1).norm(dim=1) for w in (before[f"{prefix}weight"], module.weight))
    module.weight.mul_((old / new).view(-1, *[1] * (module.weight.dim() - 1)))
    if module.bias is not None:
        module.bias.copy_(before[f"{prefix}bias"])


@dataclass(frozen=True)
class _Run:
    """Neighbouring children of a Sequential: `parts` are what one layer replaces, `after` the activation that stays."""

    parent: str
    keys: tuple[str, ...]
    parts: tuple[nn.Module, ...]
    after: nn.Module | None
    chain: bool  # of layers, norms and activations alone
    norm: bool
    kernel: int  # 0 for Linear
    stride: int
    padding: int

    @property
    def first(self) -> str:
        return f"{self.parent}.{self.keys[0]}".lstrip(".")

    @property
    def last(self) -> str:
        """The module whose output the new layer gives."""
        return f"{self.parent}.{self.keys[len(self.parts) - 1]}".lstrip(".")

    @staticmethod
    def of(model: nn.Module, first: str, last: str, kernel: int | None, shortcuts: Collection[str]) -> _Run:
        what = f"run {first} to {last}"
        parent, _, begin = first.rpartition(".")
        other, _, end = last.rpartition(".")
        modules = dict(model.named_modules())
        for name in (first, last):
            if name not in modules:
                raise AutoSparseError(f"{what}: the network has no module {name!r}; see model.named_modules()")
        holder = modules[parent]
        if parent != other or not isinstance(holder, nn.Sequential):
            raise AutoSparseError(f"{what}: give the first and the last of neighbouring children of one nn.Sequential")
        keys = list(holder._modules)
        inside = keys[keys.index(begin) : keys.index(end) + 1]
        parts = [holder._modules[key] for key in inside]
        after = parts.pop() if parts and isinstance(parts[-1], ACTIVATIONS) else None
        layers = [m for part in parts for m in part.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        if len(layers) < 2:
            raise AutoSparseError(f"{what} has {len(layers)} Linear or Conv2d layers: two at least are fused into one")
        chain = all(isinstance(part, (nn.Conv2d, nn.Linear, _BatchNorm, nn.Identity, *ACTIVATIONS)) for part in parts)
        norm = any(isinstance(m, _BatchNorm) for part in parts for m in part.modules())
        if all(isinstance(m, nn.Linear) for m in layers):
            return _Run(parent, tuple(inside), tuple(parts), after, chain, norm, 0, 1, 0)
        convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
        if len(convolutions) < len(layers):
            raise AutoSparseError(f"{what} mixes Linear and Conv2d layers: fuse those of one kind")
        size, stride, padding = 1, 1, 0
        aside = {id(modules[name.removesuffix(".weight")]) for name in shortcuts}
        for module in (m for m in convolutions if id(m) not in aside):
            if isinstance(module.padding, str):
                raise AutoSparseError(f"{what} has padding {module.padding!r}: give the convolutions a number")
            size += (module.kernel_size[0] - 1) * module.dilation[0] * stride
            padding += module.padding[0] * stride
            stride *= module.stride[0]
        if kernel is not None:
            padding += (kernel - size) // 2
            size = kernel
        return _Run(parent, tuple(inside), tuple(parts), after, chain, norm, size, stride, max(padding, 0))


def _recorded(model: nn.Module, inputs: Any, before: str | None, after: str | None) -> dict[str, Tensor]:
    """What goes into one module and comes out of another in one pass in eval mode."""
    found: dict[str, Tensor] = {}

    def take(module: nn.Module, args: tuple[Any, ...]) -> None:
        found["x"] = args[0].detach().clone()

    def give(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        found["y"] = out.detach().clone()  # what follows may work in place

    args, kwargs = as_call(model, inputs)
    with untouched(model), torch.no_grad(), forked():
        hooks = []
        if before is not None:
            hooks.append(model.get_submodule(before).register_forward_pre_hook(take))
        if after is not None:
            hooks.append(model.get_submodule(after).register_forward_hook(give))
        try:
            model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    return found


def _pairs(run: _Run, deep: nn.Module, fused: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows of what goes into the run in the network fused so far, and of what comes out of it in the deep one."""
    x = _recorded(fused, batch[0], run.first, None)["x"]
    y = _recorded(deep, batch[0], None, run.last)["y"]
    if run.kernel == 0:
        return x.flatten(0, -2).double(), y.flatten(0, -2).double()
    patches = functional.unfold(x, run.kernel, padding=run.padding, stride=run.stride)
    if patches.shape[2] != y[0, 0].numel():
        raise AutoSparseError(
            f"run {run.first}: one convolution of kernel {run.kernel} gives {patches.shape[2]} positions where the run "
            f"gives {y[0, 0].numel()}; give another kernel, or end the run before what changes the size"
        )
    rows, targets = patches.transpose(1, 2).flatten(0, 1), y.flatten(2).transpose(1, 2).flatten(0, 1)
    if len(rows) > _ROWS:
        chosen = torch.randperm(len(rows), generator=make_generator(0, "patches"))[:_ROWS].to(rows.device)
        rows, targets = rows[chosen], targets[chosen]
    return rows.double(), targets.double()


def _fitted(
    run: _Run, deep: nn.Module, fused: nn.Module, batches: Sequence[Batch], ridge: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """`A`, `c`, mean and standard deviation of `A·x`, by least squares over all batches; whether y is never negative."""
    count, sx, sy, xx, xy = 0, *[torch.zeros(())] * 4
    positive = True
    for batch in batches:
        x, y = _pairs(run, deep, fused, batch)
        count += len(x)
        positive &= bool((y >= 0).all())
        sx, sy, xx, xy = sx.to(x) + x.sum(0), sy.to(x) + y.sum(0), xx.to(x) + x.T @ x, xy.to(x) + x.T @ y
    mx, my = sx / count, sy / count
    cov, cross = xx / count - torch.outer(mx, mx), xy / count - torch.outer(mx, my)
    cov.diagonal().add_(ridge * cov.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(cov, cross).T
    offset = my - weight @ mx
    variance = ((weight @ cov) * weight).sum(1)
    return weight, offset, weight @ mx, variance.clamp(min=1e-12).sqrt(), positive


def _gaussian(run: _Run) -> tuple[Tensor, Tensor]:
    """The closed form for a chain of layers with ReLU between."""
    if not run.chain:
        raise AutoSparseError(
            f"run {run.first}: the closed form takes layers, BatchNorm and ReLU in a row; give batches"
        )
    if not isinstance(run.parts[0], (nn.Conv2d, nn.Linear)):
        raise AutoSparseError(f"run {run.first}: for the closed form it begins with a layer; give batches")
    weight, offset = _plain(run, run.parts[0])  # of what is composed so far, `(out, in, k, k)` and `(out,)`
    stride = _stride(run.parts[0])
    moments: tuple[Tensor, Tensor] | None = None
    for part in run.parts[1:]:
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            own, bias = _plain(run, part)
            weight, offset = _composed(weight, own, stride), own.sum((2, 3)) @ offset + bias
            stride, moments = stride * _stride(part), None
        elif isinstance(part, _BatchNorm) and part.running_var is not None:
            factor, shift = _affine(part)
            weight, offset = weight * factor[:, None, None, None], offset * factor + shift
            beta = shift.new_zeros(len(shift)) if part.bias is None else part.bias.detach().double()
            gamma = shift.new_ones(len(shift)) if part.weight is None else part.weight.detach().double().abs()
            moments = beta, gamma
        elif isinstance(part, nn.ReLU):
            mean, std = moments or (offset, weight.flatten(1).norm(dim=1))
            normal = torch.distributions.Normal(0.0, 1.0)
            ratio = mean / std.clamp(min=1e-12)
            gate = normal.cdf(ratio)
            positive = mean * gate + std * normal.log_prob(ratio).exp()  # E[relu(h)]
            weight, offset = weight * gate[:, None, None, None], gate * (offset - mean) + positive
        elif not isinstance(part, nn.Identity):
            raise AutoSparseError(
                f"run {run.first}: the closed form knows ReLU and BatchNorm with statistics, not {type(part).__name__}; "
                "give batches"
            )
    return weight.flatten(1), offset


def _plain(run: _Run, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight `(out, in, k, k)` and bias of a layer, in double precision."""
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.dilation != (1, 1)):
        raise AutoSparseError(f"run {run.first}: the closed form takes no groups and no dilation; give batches")
    weight = layer.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    return (weight[:, :, None, None] if weight.dim() == 2 else weight), bias


def _stride(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.stride[0] if isinstance(layer, nn.Conv2d) else 1


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Factor and shift of a BatchNorm in eval mode."""
    assert norm.running_var is not None and norm.running_mean is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.detach().double()


def _composed(first: Tensor, second: Tensor, stride: int) -> Tensor:
    """Kernel of one convolution that does what two do in a row, the first with this stride."""
    spread = second.new_zeros(*second.shape[:2], *(1 + (k - 1) * stride for k in second.shape[2:]))
    spread[:, :, ::stride, ::stride] = second
    rows, columns = (k - 1 for k in first.shape[2:])
    padded = functional.pad(spread, (columns, columns, rows, rows))
    return functional.conv2d(padded, first.flip(2, 3).transpose(0, 1))


def _layer(
    run: _Run,
    weight: Tensor,
    offset: Tensor,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    positive: bool = False,
) -> nn.Module:
    """The new layer, with its BatchNorm if the run has one, and a ReLU where residual blocks ended with one."""
    bias = not run.norm
    layer: nn.Module
    if run.kernel == 0:
        layer = nn.Linear(weight.shape[1], len(weight), bias=bias)
    else:
        channels = weight.shape[1] // run.kernel**2
        how: dict[str, Any] = {"stride": run.stride, "padding": run.padding, "bias": bias}
        layer = nn.Conv2d(channels, len(weight), run.kernel, **how)
    parts: list[nn.Module] = [layer]
    with torch.no_grad():
        layer.weight.copy_(weight.view_as(layer.weight))
        if bias:
            assert layer.bias is not None
            layer.bias.copy_(offset)
        else:
            if mean is None or scale is None:  # x ~ N(0, I)
                mean, scale = torch.zeros_like(offset), weight.norm(dim=1).clamp(min=1e-6)
            norm = (nn.BatchNorm1d if run.kernel == 0 else nn.BatchNorm2d)(len(weight))
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(scale**2)
            norm.weight.copy_((scale**2 + norm.eps).sqrt())
            norm.bias.copy_(offset + mean)
            parts.append(norm)
    if positive and run.after is None and not run.chain:
        parts.append(nn.ReLU())
    return nn.Sequential(*parts)


def _replace(fused: nn.Module, run: _Run, layer: nn.Module) -> None:
    """Put the layer in the first place of the run, and nothing in the others."""
    holder = fused.get_submodule(run.parent)
    for key in run.keys[: len(run.parts)]:
        setattr(holder, key, nn.Identity())
    setattr(holder, run.keys[0], layer)


def _error(run: _Run, deep: nn.Module, fused: nn.Module, batches: Sequence[Batch]) -> float:
    wrong = spread = 0.0
    for batch in batches:
        y = _recorded(deep, batch[0], None, run.last)["y"].double()
        given = _recorded(fused, batch[0], None, run.first)["y"].double()
        wrong += float((y - given).square().sum())
        spread += float((y - y.mean((0, *range(2, y.dim())), keepdim=True)).square().sum())
    return wrong / max(spread, 1e-30)


def _compact(fused: nn.Module, runs: Sequence[_Run]) -> list[str]:
    """Take the empty places out of the Sequentials, and give the names of the new layers."""
    new = {id(fused.get_submodule(run.first)) for run in runs}
    for parent in dict.fromkeys(run.parent for run in runs):
        holder = fused.get_submodule(parent)
        gone = {key for run in runs if run.parent == parent for key in run.keys[1 : len(run.parts)]}
        left = [module for key, module in holder._modules.items() if key not in gone]
        holder._modules.clear()
        for index, module in enumerate(left):
            holder.add_module(str(index), module)
    return [name for name, module in fused.named_modules() if id(module) in new]
