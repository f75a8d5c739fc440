"""A pruned network in the forms that others run, each checked against the masked network, and what it costs as measured.

| form | files | what runs |
|---|---|---|
| `safetensors` | `.safetensors` | PyTorch, after `load_network` |
| `onnx` | `.onnx` | ONNX Runtime, or any other reader of ONNX; any batch size |
| `torch_export` | `.pt2` | `torch.export.load`; any batch size |
| `semi_structured` | `semi_structured.safetensors` | 2:4 kernels for Linear layers on a GPU, after `semi_structured` |
| `channels` | `channels` in each of the file forms asked for | the physically smaller network that `shrink` makes |

Masks alone save nothing but file size, and that in `safetensors` only: dense kernels compute the zeros too.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure, first_line, require, settings, suggest
from autosparse.files import replace_file
from autosparse.masks.layers import unwrap
from autosparse.masks.mask import Masks
from autosparse.masks.random import make_generator
from autosparse.network.graph import trace
from autosparse.network.restore import private_copy, restored
from autosparse.network.used import check_used, fused
from autosparse.trainability.cost import Cost, cost, take_turns, threads
from autosparse.trainability.shrink import shrink
from autosparse.trainability.stored import NetworkSettings, load_network, save_network

FORMS = ("safetensors", "onnx", "torch_export", "semi_structured", "channels")
# The largest difference to the outputs of the masked network, in units of its largest output (0: the same bits).
TOLERANCE = {"safetensors": 0.0, "onnx": 1e-4, "torch_export": 1e-5, "semi_structured": 1e-2, "channels": 1e-5}
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SAME = 0.1  # latencies that differ by less are called the same
_TURN = 0.005  # seconds that a turn of the dense network lasts at least

RUNTIMES = {
    "safetensors": "PyTorch",
    "onnx": "ONNX Runtime",
    "torch_export": "torch.export",
    "semi_structured": "PyTorch, 16 bits",
}

Run = Callable[[Tensor], Tensor]


@settings
class ExportSettings:
    """Which forms, and how their latency is measured.

    `sparse_storage`: the safetensors file holds only kept values and a bit per position. `precision` is that of
    `semi_structured`. Latency: on images of `batch_sizes`, by `threads` threads (`None`: torch's choice), the median of `rounds`
    rounds in which dense and pruned networks take turns; no new round begins after `seconds`. Without batch sizes nothing is timed.
    """

    forms: tuple[str, ...] = ("safetensors", "onnx", "torch_export")
    sparse_storage: bool = True
    precision: str = "float16"
    batch_sizes: tuple[int, ...] = (1, 32)
    threads: int | None = None
    rounds: int = 30
    seconds: float = 10.0

    def __post_init__(self) -> None:
        require(len(self.forms) > 0, "forms", list(self.forms), f"give at least one of {', '.join(FORMS)}")
        for form in self.forms:
            require(form in FORMS, "forms", form, suggest(form, FORMS))
        require(self.precision in PRECISIONS, "precision", self.precision, f"use {' or '.join(PRECISIONS)}")
        require(
            all(n >= 1 for n in self.batch_sizes), "batch_sizes", list(self.batch_sizes), "give whole numbers from 1"
        )
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "give at least 1")
        require(self.rounds >= 5, "rounds", self.rounds, "give at least 5")
        require(0 < self.seconds < math.inf, "seconds", self.seconds, "give a positive number")


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of one batch; `speedup`: the median over rounds of dense / this, both in the same runtime, with quartiles."""

    milliseconds: float
    speedup: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Row:
    """One line of the table: `network` (`"dense"`, `"masked"`, `"channels"`, `"semi_structured"`) in one `form`.

    `stored`: values of parameters in the file (of dense and of programs: in memory); `size`: bytes of the file.
    """

    network: str
    form: str
    cost: Cost
    stored: int
    size: int
    file: str = ""
    latency: Mapping[int, Latency] = field(default_factory=dict)

    @property
    def runtime(self) -> str:
        """What runs it."""
        return RUNTIMES[self.form]

    @property
    def verdict(self) -> str:
        """In words: how much faster than dense, or that it is not."""
        if self.network == "dense":
            return ""
        if not self.latency:
            return "latency not measured"
        texts = {size: _compared(found) for size, found in self.latency.items()}
        alone = "; masks alone do not make a network faster, its kernels compute the zeros too"
        found = next(iter(texts.values()))
        if len(set(texts.values())) > 1:
            found = "; ".join(f"batch {size}: {text}" for size, text in texts.items())
        return found + (alone if self.network == "masked" else "")


def _compared(found: Latency) -> str:
    if found.speedup > 1 + SAME and found.lower > 1:
        return f"{found.speedup:.2f} × as fast as dense"
    if found.speedup < 1 - SAME and found.upper < 1:
        return f"slower than dense ({found.speedup:.2f} × as fast)"
    return "same latency as dense"


@dataclass(frozen=True)
class Export:
    """What was made: the table, and for each form that could not be made why."""

    rows: tuple[Row, ...]
    failures: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Made:
    """A network in a form: where it lies, and how it runs."""

    network: str
    form: str
    stored: int
    size: int
    file: str
    run: Run | None


def export(
    model: nn.Module,
    masks: Masks,
    directory: str | Path,
    options: ExportSettings | None = None,
    *,
    example_input: Tensor,
    network: NetworkSettings | None = None,
    smaller: nn.Module | None = None,
    device: torch.device | str = "cpu",
    on_form: Callable[[str], None] | None = None,
) -> Export:
    """Write `model` under `masks` in each of the forms into `directory`, check and time them; the model stays as it is.

    Every file is read back, and the outputs of what it holds compared with the masked network's, `max |a − b| / max |b|`
    against `TOLERANCE`, on the CPU, before the file gets its name. Weights that `torch.nn.utils.parametrize` computes are
    written as plain ones, of the values that the network uses. A form that cannot be made is told in `failures`; the
    others are made all the same.

    Args:
        example_input: images as the model takes them; only their shape counts.
        network: how to build the model anew, for `load_network`.
        smaller: what `shrink` made of the model by these masks, trained since then. It is written in place of the masked
            network, and checked against itself; the dense network is the model.
        device: where latencies are measured.
        on_form: is called with what is being done.

    Raises:
        AutoSparseError: the masks are another model's, or the model does not take the images, or computes a weight anew that
            is not zero where the mask is.
    """
    model = unwrap(model)
    with restored(model, but=model.parameters()):  # what hooks of the copies write to is the model's too
        return _export(
            model,
            masks,
            Path(directory),
            options or ExportSettings(),
            example_input,
            network,
            smaller,
            torch.device(device),
            on_form or (lambda _: None),
        )


def _export(
    model: nn.Module,
    masks: Masks,
    directory: Path,
    options: ExportSettings,
    example_input: Tensor,
    network: NetworkSettings | None,
    smaller: nn.Module | None,
    device: torch.device,
    say: Callable[[str], None],
) -> Export:
    dense = private_copy(fused(model)).cpu().eval().requires_grad_(False)
    masked = private_copy(dense)
    masks.to("cpu").apply_(masked)
    images = _images(example_input, 3)
    for module in (dense, masked):
        _run(module, images)  # what a model builds in its first pass is there when it is written
    expected = _outputs(masked, images)
    check_used(dense, masks, trace(dense, images), images)
    job = _Job("masked", masked, dense, masks.to("cpu"), directory, options, network, images, device)
    jobs = [job if smaller is None else job.of("channels", private_copy(smaller).cpu().eval().requires_grad_(False))]
    costs = {"dense": cost(dense, None, images[:1]), "masked": cost(masked, job.masks, images[:1])}
    costs["semi_structured"] = costs["masked"]
    failures: dict[str, str] = {}

    @contextmanager
    def attempt(form: str) -> Iterator[None]:
        say(form)
        try:
            yield
        except (AutoSparseError, AutoSparseFailure) as error:
            failures[form] = str(error)

    if "channels" in options.forms and smaller is None:
        with attempt("channels"):
            found = shrink(masked, job.masks, images).eval().requires_grad_(False)
            _check("channels", "channels", expected, _outputs(found, images), _FOLDED)
            jobs.append(job.of("channels", found))
    for one in jobs:
        if one.name == "channels":
            left = {n: p != 0 for n, p in one.module.named_parameters() if n in masks}
            costs["channels"] = cost(one.module, left, images[:1])
    with tempfile.TemporaryDirectory() as folder:
        of_dense = replace(job.of("dense", dense), directory=Path(folder))
        made = [_in_pytorch(of_dense)]
        for form in [f for f in options.forms if f in _WRITERS] or ["safetensors"] * ("channels" in costs):
            if form == "onnx" and not _has_onnx():
                failures[form] = "onnx and onnxscript are not installed: pip install 'autosparse[onnx]'"
                continue
            for one in jobs:
                with attempt(form if one is jobs[0] else f"{one.name}, {form}"):
                    made.append(_WRITERS[form](one))
            if form != "safetensors" and options.batch_sizes and any(m.form == form and m.run for m in made):
                with attempt(f"dense, {form}"):
                    made.append(replace(_WRITERS[form](of_dense), file=""))
    if "channels" in costs and not any(m.network == "channels" and m.form == "safetensors" for m in made):
        made.append(_in_pytorch(jobs[-1]))
    if "semi_structured" in options.forms:
        with attempt("semi_structured"):
            made += _semi_structured(job.of("semi_structured", masked))
    rows = []
    for group in _groups(made):
        say(f"latency, {group[0].form}")
        timed = _timed(group, job)
        rows += [
            Row(m.network, m.form, costs[m.network], m.stored, m.size, m.file, timed.get(m.network, {})) for m in group
        ]
    untimed = options.batch_sizes and any(m.run is None for m in made)
    notes = ("onnx: onnxruntime is not installed or not for this device, so no latency",) if untimed else ()
    return Export(tuple(rows), failures, notes)


_FOLDED = (
    "the channels that the masks empty still pass on a bias or a norm's β, which training gave them; make the network smaller "
    "before it is trained (shrink), or train so that these go to zero (TPP)"
)


# -- forms --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One network to write in one form."""

    name: str
    module: nn.Module
    dense: nn.Module
    masks: Masks
    directory: Path
    options: ExportSettings
    network: NetworkSettings | None
    images: Tensor
    device: torch.device

    def of(self, name: str, module: nn.Module) -> _Job:
        """The same for another network."""
        return replace(self, name=name, module=module)

    def path(self, end: str) -> Path:
        return self.directory / f"{self.name}.{end}"

    @functools.cached_property
    def program(self) -> Any:
        """The network traced for any batch size."""
        dynamic = ({0: torch.export.Dim.DYNAMIC},)
        try:
            with _quiet(), restored(self.module):
                return torch.export.export(self.module, (self.images[:2],), dynamic_shapes=dynamic)
        except Exception as error:  # whatever tracing somebody's forward raises
            raise AutoSparseFailure(
                f"{type(self.module).__name__} cannot be traced for any batch size ({first_line(error)}): "
                "leave onnx and torch_export out, or change its forward"
            ) from error


def _safetensors(job: _Job) -> _Made:
    path, smaller = job.path("safetensors"), job.module if job.name == "channels" else None
    sparse = job.options.sparse_storage
    with replace_file(path) as temporary:
        save_network(temporary, job.dense, job.masks, job.network, sparse=sparse, smaller=smaller)
        found, masks = load_network(temporary, private_copy(job.dense))
        if masks != job.masks:
            raise AutoSparseFailure(f"{path.name} does not give back the masks: it is not written")
        _check(path.name, "safetensors", _outputs(job.module, job.images), _outputs(found, job.images))
    made = _in_pytorch(job)
    pruned = job.masks.total - job.masks.kept if sparse and smaller is None else 0
    return replace(made, stored=made.stored - pruned, size=path.stat().st_size, file=path.name)


def _torch_export(job: _Job) -> _Made:
    path, buffer = job.path("pt2"), io.BytesIO()
    try:
        torch.export.save(job.program, buffer)
        buffer.seek(0)
        program = torch.export.load(buffer)
    except Exception as error:  # torch's own checks of what it has traced
        raise AutoSparseFailure(
            f"{type(job.module).__name__} cannot be saved as a program: {first_line(error)}"
        ) from error
    _check_batches(path.name, "torch_export", job, program.module())
    _write(path, buffer.getvalue())
    if job.device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(job.device))
    return _made(job, "torch_export", path, program.module())


def _onnx(job: _Job) -> _Made:
    path = job.path("onnx")
    program = job.program
    try:
        with _quiet():
            found = torch.onnx.export(program, (), dynamo=True, verbose=False)
            assert found is not None  # no path was given, so there is a program
            text = found.model_proto.SerializeToString()
    except Exception as error:  # the exporter, or protobuf beyond 2 GB
        raise AutoSparseFailure(
            f"{type(job.module).__name__} cannot be exported to ONNX: {first_line(error)}"
        ) from error
    _check_batches(
        path.name, "onnx", job, _onnx_run(text, torch.device("cpu"), job.options.threads) or _reference(text)
    )
    _write(path, text)
    return _made(job, "onnx", path, _onnx_run(text, job.device, job.options.threads))


_WRITERS: dict[str, Callable[[_Job], _Made]] = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torch_export": _torch_export,
}


def _has_onnx() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))


def _onnx_run(text: bytes, device: torch.device, count: int | None) -> Run | None:
    """The model in ONNX Runtime, where that is installed and knows the device."""
    try:
        import onnxruntime
    except ImportError:
        return None
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type, "")
    if provider not in onnxruntime.get_available_providers():
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    place = {"device_id": device.index or 0} if device.type == "cuda" else {}
    session = onnxruntime.InferenceSession(text, options, providers=[(provider, place)])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])


def _reference(text: bytes) -> Run:
    """The model in the evaluator that comes with ONNX: slow, and right."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_model_from_string(text))
    name = str(evaluator.input_names[0])
    return lambda images: torch.from_numpy(np.asarray(evaluator.run(None, {name: images.numpy()})[0]))


# -- 2:4 ----------------------------------------------------------------------------------------------------------------

_ROWS, _COLUMNS = 32, 64  # what both of PyTorch's 2:4 kernels divide weights of 16 bits into


def fits_semi_structured(model: nn.Module, masks: Masks) -> dict[str, str]:
    """For each Linear layer whether 2:4 kernels can run it: an empty text, or why not.

    A weight `(out, in)` fits if 32 divides out, 64 divides in, and its mask keeps at most two of every four along in.
    """
    found = {}
    for path, module in unwrap(model).named_modules():
        if type(module) is not nn.Linear:  # heirs do other things with their weight
            continue
        name = f"{path}.weight" if path else "weight"
        rows, columns = module.weight.shape
        if name not in masks:
            found[name] = "it has no mask"
        elif rows % _ROWS or columns % _COLUMNS:
            found[name] = f"its shape {rows}×{columns} is no multiple of {_ROWS}×{_COLUMNS}"
        elif bool((masks[name].reshape(rows, -1, 4).sum(-1) > 2).any()):
            found[name] = "its mask keeps more than two of four along the input; prune with granularity 2:4"
        else:
            found[name] = ""
    return found


def semi_structured(model: nn.Module, masks: Masks, precision: str = "float16") -> nn.Module:
    """A copy of `model` under `masks` in 16 bits, on its GPU, whose Linear layers run on 2:4 kernels where they fit.

    Each weight that fits becomes `torch.sparse.to_sparse_semi_structured(W ⊙ m)`: half of the values, and two bits for each.

    Raises:
        AutoSparseError: the model is not on an NVIDIA GPU of compute capability 8.0 or above, or no layer fits.
    """
    model = fused(unwrap(model))
    fits = fits_semi_structured(model, masks)
    device = next(model.parameters()).device
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        fit = sum(not why for why in fits.values())
        raise AutoSparseError(
            f"2:4 kernels need an NVIDIA GPU of compute capability 8.0 or above, the device is {device}: set device "
            f"({fit} of {len(fits)} Linear layers would fit)"
        )
    if all(fits.values()):
        example = next((f"{name}: {why}" for name, why in fits.items()), "it has none")
        raise AutoSparseError(
            f"no Linear layer of {type(model).__name__} fits 2:4 kernels ({example}): leave the form out"
        )
    return _with_sparse_weights(model, masks, [name for name, why in fits.items() if not why], PRECISIONS[precision])


def _with_sparse_weights(model: nn.Module, masks: Masks, names: Sequence[str], dtype: torch.dtype) -> nn.Module:
    found = private_copy(model)
    masks.apply_(found)
    found = found.to(dtype).eval().requires_grad_(False)
    for name in names:
        module = found.get_submodule(name.rpartition(".")[0])
        packed = torch.sparse.to_sparse_semi_structured(found.get_parameter(name).detach().contiguous())
        module.register_parameter("weight", nn.Parameter(packed, requires_grad=False))
    return found


def _semi_structured(job: _Job) -> list[_Made]:
    """The dense and the 2:4 network, both in 16 bits."""
    dtype, path, masks = PRECISIONS[job.options.precision], job.path("safetensors"), job.masks.to(job.device)
    found = semi_structured(private_copy(job.dense).to(job.device), masks, job.options.precision)
    dense, half = (private_copy(m).to(job.device, dtype) for m in (job.dense, job.module))
    images = job.images.to(job.device, dtype)
    _check(path.name, "semi_structured", _outputs(half, images), _outputs(found, images))
    save_network(path, half, masks, job.network, sparse=job.options.sparse_storage)
    total = _count(dense)
    return [
        _Made("dense", "semi_structured", total, _bytes(dense), "", dense),
        _Made(
            "semi_structured",
            "semi_structured",
            total - masks.total + masks.kept,
            path.stat().st_size,
            path.name,
            found,
        ),
    ]


# -- checks -------------------------------------------------------------------------------------------------------------


def difference(expected: Tensor, found: Tensor) -> float:
    """`max |found − expected| / max |expected|`; infinite where shapes differ or a number is not finite."""
    if expected.shape != found.shape or not (torch.isfinite(expected).all() and torch.isfinite(found).all()):
        return math.inf
    expected, found = expected.double(), found.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _check(what: str, form: str, expected: Tensor, found: Tensor, why: str = "it is not written") -> None:
    worst = difference(expected, found)
    if not worst <= TOLERANCE[form]:
        raise AutoSparseFailure(
            f"{what}: its outputs differ from the masked network's by {worst:.2g} of the largest, "
            f"more than {TOLERANCE[form]:g}: {why}"
        )


def _check_batches(what: str, form: str, job: _Job, run: Run) -> None:
    """Against the network on one and on three images: the batch size is free."""
    for images in (job.images[:1], job.images):
        expected = _outputs(job.module, images)
        try:
            with torch.no_grad():
                found = run(images)
        except Exception as error:  # what was written is somebody else's program
            raise AutoSparseFailure(f"{what} does not run ({first_line(error)}): it is not written") from error
        _check(what, form, expected, found)


def _outputs(module: nn.Module, images: Tensor) -> Tensor:
    with restored(module):
        return _run(module, images)


def _run(module: nn.Module, images: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            found = module(images)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        raise AutoSparseError(
            f"{type(module).__name__} cannot take images of shape {tuple(images.shape)}: {first_line(error)}; "
            "give those of its data"
        ) from error
    if not isinstance(found, Tensor):
        raise AutoSparseError(
            f"{type(module).__name__} gives a {type(found).__name__}: only one tensor can be exported"
        )
    return found


# -- figures ------------------------------------------------------------------------------------------------------------


def _in_pytorch(job: _Job) -> _Made:
    module = job.module if job.device.type == "cpu" else private_copy(job.module).to(job.device)
    return _Made(job.name, "safetensors", _count(module), _bytes(module), "", module)


def _made(job: _Job, form: str, path: Path, run: Run | None) -> _Made:
    return _Made(job.name, form, _count(job.module), path.stat().st_size, path.name, run)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: nn.Module) -> int:
    """Size of all parameters and buffers, each once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _groups(made: Sequence[_Made]) -> list[list[_Made]]:
    """What is timed together: the networks of one form, dense first."""
    forms = dict.fromkeys(m.form for m in made)
    return [sorted((m for m in made if m.form == f), key=lambda m: m.network != "dense") for f in forms]


def _timed(group: Sequence[_Made], job: _Job) -> dict[str, dict[int, Latency]]:
    """Latencies of each network of a group against its dense one, by batch size."""
    options, device = job.options, job.device
    runs = {m.network: m.run for m in group if m.run is not None}
    if "dense" not in runs or len(runs) < 2:
        return {}
    dtype = PRECISIONS[options.precision] if group[0].form == "semi_structured" else job.images.dtype
    found: dict[str, dict[int, Latency]] = {name: {} for name in runs}
    for size in options.batch_sizes:
        batch = _images(job.images, size).to(device, dtype)

        def side(run: Run, calls: int, batch: Tensor = batch) -> Callable[[], None]:
            def turn() -> None:
                for _ in range(calls):
                    run(batch)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            return turn

        with threads(options.threads), torch.inference_mode():
            # A turn of microseconds would measure the clock and whatever else the machine does.
            alone = take_turns({"dense": side(runs["dense"], 1)}, 1, 0.0)["dense"]
            calls = max(1, math.ceil(_TURN / max(float(alone.min()), 1e-6)))
            times = take_turns({n: side(run, calls) for n, run in runs.items()}, options.rounds, options.seconds)
        for name, turns in times.items():
            seconds = turns / calls
            lower, middle, upper = np.quantile(times["dense"] / turns, [0.25, 0.5, 0.75])
            found[name][size] = Latency(1e3 * float(np.median(seconds)), float(middle), float(lower), float(upper))
    return found


def _images(example: Tensor, count: int) -> Tensor:
    """So many images of the example's shape from N(0, I), the same at each call."""
    generator = make_generator(0, "images of a latency")
    return torch.randn((count, *example.shape[1:]), generator=generator)


def _write(path: Path, content: bytes) -> None:
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that exporters give to their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """The table as CSV; a column `speedup_N` is dense / this at batch size N, beside its quartiles."""
    lines = []
    for row in rows:
        line: dict[str, Any] = {
            "network": row.network,
            "runtime": row.runtime,
            "file": row.file,
            "nonzero_parameters": row.cost.nonzero,
            "stored_parameters": row.stored,
            "flops": row.cost.flops,
            "effective_flops": row.cost.effective_flops,
            "bytes": row.size,
        }
        for size, found in row.latency.items():
            line |= {f"ms_{size}": f"{found.milliseconds:.4g}", f"speedup_{size}": f"{found.speedup:.3f}"}
            line |= {f"speedup_{size}_lower": f"{found.lower:.3f}", f"speedup_{size}_upper": f"{found.upper:.3f}"}
        lines.append({**line, "verdict": row.verdict})
    names = [n for n in dict.fromkeys(n for line in lines for n in line) if n != "verdict"] + ["verdict"]
    with replace_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
