"""The forms of a pruned network, one function each: written, read back, and compared with the masked network."""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from autosparse.network.restore import private_copy, restored
from autosparse.network.used import fused
from autosparse.trainability.stored import NetworkSettings, load_network, save_network

FORMS = ("safetensors", "onnx", "torch_export", "semi_structured", "channels")
_ROWS, _COLUMNS = 32, 64  # what both of PyTorch's 2:4 kernels divide weights of 16 bits into


# The largest difference to the outputs of the masked network, in units of its largest output (0: the same bits).
TOLERANCE = {"safetensors": 0.0, "onnx": 1e-4, "torch_export": 1e-5, "semi_structured": 1e-2, "channels": 1e-5}


PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


Forward = Callable[[Tensor], Tensor]


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
class Made:
    """A network in a form: where it lies, and how it runs."""

    network: str
    form: str
    stored: int
    size: int
    file: str
    run: Forward | None


@dataclass(frozen=True)
class Job:
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

    def of(self, name: str, module: nn.Module) -> Job:
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


def as_safetensors(job: Job) -> Made:
    path, smaller = job.path("safetensors"), job.module if job.name == "channels" else None
    sparse = job.options.sparse_storage
    with replace_file(path) as temporary:
        save_network(temporary, job.dense, job.masks, job.network, sparse=sparse, smaller=smaller)
        found, masks = load_network(temporary, private_copy(job.dense))
        if masks != job.masks:
            raise AutoSparseFailure(f"{path.name} does not give back the masks: it is not written")
        check_outputs(path.name, "safetensors", outputs_of(job.module, job.images), outputs_of(found, job.images))
    made = in_pytorch(job)
    pruned = job.masks.total - job.masks.kept if sparse and smaller is None else 0
    return replace(made, stored=made.stored - pruned, size=path.stat().st_size, file=path.name)


def as_torch_export(job: Job) -> Made:
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


def as_onnx(job: Job) -> Made:
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


def has_onnx() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))


def _onnx_run(text: bytes, device: torch.device, count: int | None) -> Forward | None:
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


def _reference(text: bytes) -> Forward:
    """The model in the evaluator that comes with ONNX: slow, and right."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_model_from_string(text))
    name = str(evaluator.input_names[0])
    return lambda images: torch.from_numpy(np.asarray(evaluator.run(None, {name: images.numpy()})[0]))


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


def as_semi_structured(job: Job) -> list[Made]:
    """The dense and the 2:4 network, both in 16 bits."""
    dtype, path, masks = PRECISIONS[job.options.precision], job.path("safetensors"), job.masks.to(job.device)
    found = semi_structured(private_copy(job.dense).to(job.device), masks, job.options.precision)
    dense, half = (private_copy(m).to(job.device, dtype) for m in (job.dense, job.module))
    images = job.images.to(job.device, dtype)
    check_outputs(path.name, "semi_structured", outputs_of(half, images), outputs_of(found, images))
    save_network(path, half, masks, job.network, sparse=job.options.sparse_storage)
    total = _count(dense)
    return [
        Made("dense", "semi_structured", total, _bytes(dense), "", dense),
        Made(
            "semi_structured",
            "semi_structured",
            total - masks.total + masks.kept,
            path.stat().st_size,
            path.name,
            found,
        ),
    ]


def difference(expected: Tensor, found: Tensor) -> float:
    """`max |found − expected| / max |expected|`; infinite where shapes differ or a number is not finite."""
    if expected.shape != found.shape or not (torch.isfinite(expected).all() and torch.isfinite(found).all()):
        return math.inf
    expected, found = expected.double(), found.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def check_outputs(what: str, form: str, expected: Tensor, found: Tensor, why: str = "it is not written") -> None:
    worst = difference(expected, found)
    if not worst <= TOLERANCE[form]:
        raise AutoSparseFailure(
            f"{what}: its outputs differ from the masked network's by {worst:.2g} of the largest, "
            f"more than {TOLERANCE[form]:g}: {why}"
        )


def _check_batches(what: str, form: str, job: Job, run: Forward) -> None:
    """Against the network on one and on three images: the batch size is free."""
    for images in (job.images[:1], job.images):
        expected = outputs_of(job.module, images)
        try:
            with torch.no_grad():
                found = run(images)
        except Exception as error:  # what was written is somebody else's program
            raise AutoSparseFailure(f"{what} does not run ({first_line(error)}): it is not written") from error
        check_outputs(what, form, expected, found)


def outputs_of(module: nn.Module, images: Tensor) -> Tensor:
    with restored(module):
        return run_on(module, images)


def run_on(module: nn.Module, images: Tensor) -> Tensor:
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


def in_pytorch(job: Job) -> Made:
    module = job.module if job.device.type == "cpu" else private_copy(job.module).to(job.device)
    return Made(job.name, "safetensors", _count(module), _bytes(module), "", module)


def _made(job: Job, form: str, path: Path, run: Forward | None) -> Made:
    return Made(job.name, form, _count(job.module), path.stat().st_size, path.name, run)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: nn.Module) -> int:
    """Size of all parameters and buffers, each once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def images_like(example: Tensor, count: int) -> Tensor:
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
