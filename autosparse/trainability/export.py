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
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure
from autosparse.files import replace_file
from autosparse.masks.layers import unwrap
from autosparse.masks.mask import Masks
from autosparse.network.graph import trace
from autosparse.network.restore import private_copy, restored
from autosparse.network.used import check_used, fused
from autosparse.trainability.cost import Cost, cost, take_turns, threads
from autosparse.trainability.forms import (
    PRECISIONS,
    ExportSettings,
    Forward,
    Job,
    Made,
    as_onnx,
    as_safetensors,
    as_semi_structured,
    as_torch_export,
    check_outputs,
    has_onnx,
    images_like,
    in_pytorch,
    outputs_of,
    run_on,
)
from autosparse.trainability.shrink import shrink
from autosparse.trainability.stored import NetworkSettings

SAME = 0.1  # latencies that differ by less are called the same
_TURN = 0.005  # seconds that a turn of the dense network lasts at least

RUNTIMES = {
    "safetensors": "PyTorch",
    "onnx": "ONNX Runtime",
    "torch_export": "torch.export",
    "semi_structured": "PyTorch, 16 bits",
}


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
    against 0 (safetensors), 1e-4 (onnx), 1e-5 (torch_export, channels) or 1e-2 (semi_structured), on the CPU (2:4 on the
    GPU), before the file gets its name. Weights that `torch.nn.utils.parametrize` computes are written as plain ones, of
    the values that the network uses. `failures` says which form cannot be made; the others are made all the same.

    Args:
        masks: as `prune` returns them.
        directory: where the files go; created if missing.
        options: which forms, and how latency is measured; see `ExportSettings`.
        example_input: images as the model takes them; only their shape counts.
        network: how to build the model anew, for `load_network`.
        smaller: what `shrink` made of the model by these masks, trained since then. It is written in place of the masked
            network, and checked against itself; the dense network is the model.
        device: where latencies are measured.
        on_form: is called with what is being done.

    Returns:
        An `Export`: `rows` of the table, `failures` (form: reason) and `notes`.

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
    images = images_like(example_input, 3)
    for module in (dense, masked):
        run_on(module, images)  # what a model builds in its first pass is there when it is written
    expected = outputs_of(masked, images)
    check_used(dense, masks, trace(dense, images), images)
    job = Job("masked", masked, dense, masks.to("cpu"), directory, options, network, images, device)
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
            check_outputs("channels", "channels", expected, outputs_of(found, images), _FOLDED)
            jobs.append(job.of("channels", found))
    for one in jobs:
        if one.name == "channels":
            left = {n: p != 0 for n, p in one.module.named_parameters() if n in masks}
            costs["channels"] = cost(one.module, left, images[:1])
    with tempfile.TemporaryDirectory() as folder:
        of_dense = replace(job.of("dense", dense), directory=Path(folder))
        made = [in_pytorch(of_dense)]
        for form in [f for f in options.forms if f in _WRITERS] or ["safetensors"] * ("channels" in costs):
            if form == "onnx" and not has_onnx():
                failures[form] = "onnx and onnxscript are not installed: pip install 'autosparse[onnx]'"
                continue
            for one in jobs:
                with attempt(form if one is jobs[0] else f"{one.name}, {form}"):
                    made.append(_WRITERS[form](one))
            if form != "safetensors" and options.batch_sizes and any(m.form == form and m.run for m in made):
                with attempt(f"dense, {form}"):
                    made.append(replace(_WRITERS[form](of_dense), file=""))
    if "channels" in costs and not any(m.network == "channels" and m.form == "safetensors" for m in made):
        made.append(in_pytorch(jobs[-1]))
    if "semi_structured" in options.forms:
        with attempt("semi_structured"):
            made += as_semi_structured(job.of("semi_structured", masked))
    rows = []
    for group in _groups(made):
        say(f"latency, {group[0].form}")
        timed = _timed(group, job)
        rows += [
            Row(m.network, m.form, costs[m.network], m.stored, m.size, m.file, timed.get(m.network, {})) for m in group
        ]
    untimed = options.batch_sizes and any(m.run is None for m in made)
    missing = "onnx: no latency, onnxruntime is missing or does not know the device: pip install onnxruntime (or -gpu)"
    notes = (missing,) if untimed else ()
    return Export(tuple(rows), failures, notes)


_FOLDED = (
    "the channels that the masks empty still pass on a bias or a norm's β, which training gave them; make the network smaller "
    "before it is trained (shrink), or train so that these go to zero (TPP)"
)


# -- forms --------------------------------------------------------------------------------------------------------------


_WRITERS: dict[str, Callable[[Job], Made]] = {
    "safetensors": as_safetensors,
    "onnx": as_onnx,
    "torch_export": as_torch_export,
}


# -- 2:4 ----------------------------------------------------------------------------------------------------------------


# -- checks -------------------------------------------------------------------------------------------------------------


# -- figures ------------------------------------------------------------------------------------------------------------


def _groups(made: Sequence[Made]) -> list[list[Made]]:
    """What is timed together: the networks of one form, dense first."""
    forms = dict.fromkeys(m.form for m in made)
    return [sorted((m for m in made if m.form == f), key=lambda m: m.network != "dense") for f in forms]


def _timed(group: Sequence[Made], job: Job) -> dict[str, dict[int, Latency]]:
    """Latencies of each network of a group against its dense one, by batch size."""
    options, device = job.options, job.device
    runs = {m.network: m.run for m in group if m.run is not None}
    if "dense" not in runs or len(runs) < 2:
        return {}
    dtype = PRECISIONS[options.precision] if group[0].form == "semi_structured" else job.images.dtype
    found: dict[str, dict[int, Latency]] = {name: {} for name in runs}
    for size in options.batch_sizes:
        batch = images_like(job.images, size).to(device, dtype)

        def side(run: Forward, calls: int, batch: Tensor = batch) -> Callable[[], None]:
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
