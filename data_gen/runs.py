"""One recorded run, of IRP (`autosparse.search.irp`, round by round) or gradual, resumed after any stop."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import autosparse
from autosparse.errors import AutoSparseError
from autosparse.files import read_json, read_safetensors, write_json, write_safetensors
from autosparse.masks.layers import Layer, prunable_layers
from autosparse.masks.mask import Masks
from autosparse.network.graph import trace
from autosparse.network.signals import SignalSettings, measure
from autosparse.pruning.warmup import WarmupSettings, warmup
from autosparse.scorers.records import Record, read_record, write_record
from autosparse.search.irp import IRPSettings, Round, irp
from autosparse.training.content import of_start
from autosparse.training.data import DataSettings, ImageData, load_data
from autosparse.training.loop import fabric_for, full_state, put_back
from autosparse.training.models import ModelSettings, build_model
from autosparse.training.recipe import Recipe
from autosparse.training.threads import threads_for
from autosparse.training.train import train
from data_gen.gradual import GradualSettings, survival_of

_STATE = "autosparse.state/1"


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that determines one record; `device` does not belong to it."""

    model: ModelSettings
    data: DataSettings
    recipe: Recipe
    irp: IRPSettings
    signals: SignalSettings
    seed: int
    gradual: GradualSettings | None = None  # in place of IRP

    @property
    def rounds(self) -> int:
        """How many trainings are recorded after the first."""
        return self.irp.rounds if self.gradual is None else 1

    def label(self) -> str:
        return f"{self.model.label()}_{self.data.label()}_s{self.seed}"

    def config(self) -> dict[str, Any]:
        """The settings as plain values; not among them are where the data lie, and those of a warm-up that is not done."""
        values = dataclasses.asdict(self)
        values["data"].pop("root")
        values.pop("gradual" if self.gradual is None else "irp")
        if values.get("irp", {}).get("rewind") == "round":
            del values["irp"]["rewind"]  # as published; records of before it could be chosen say nothing
        if not self.signals.warmup_names():
            del values["signals"]["warmup_orders"], values["signals"]["warmup_lr"]
        return _plain(values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the lock of a run; a kill frees it.

    Raises:
        AutoSparseError: another process holds it.
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise AutoSparseError(
            f"{path} is being written by another process: wait for it, or choose another output directory"
        ) from error
    try:
        yield
    finally:
        lock.release()


def generate_record(
    run: Run,
    path: Path,
    *,
    device: str = "auto",
    data: ImageData | None = None,
    on_round: Callable[[int, int, Round | None], None] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Record:
    """Do the IRP run and write its record at `path`; what an earlier start finished is not done again.

    After every round the record is replaced as a whole, so that a kill at any instant loses at most the round in
    flight; the state needed besides (`path`'s name with `.state`) goes when the run is complete.

    Args:
        data: the loaded data set of `run.data`, when the caller has it at hand.
        on_round: called with the round, R, and what it gave (`None` for rounds found done).

    Raises:
        AutoSparseError: the record at `path` is of other settings, images or initial weights, or another process is
            writing it.
        AutoSparseFailure: a training diverged or the disk is full; the rounds before are kept.
    """
    images = load_data(run.data) if data is None else data
    model = build_model(run.model, images, run.seed)
    config = {**run.config(), "inputs": of_start(model, images)}
    with sole_writer(path):
        done = read_record(path) if path.exists() else None
        if done is not None:
            _check_same(config, done, path)
        if done is not None and done.complete:
            shutil.rmtree(_state_of(path), ignore_errors=True)  # a kill may have come before the end of the last start
            if on_round is not None:
                on_round(run.rounds, run.rounds, None)
            return done
        if run.gradual is not None:
            return continue_gradual(run, config, model, images, path, done, device, on_round, on_epoch)
        return _continue(run, config, model, images, path, done, device, on_round, on_epoch)


def _state_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.state")


def _check_same(config: Mapping[str, Any], record: Record, path: Path) -> None:
    mine, other = _flat(config), _flat(record.config)
    for key in sorted(mine.keys() | other.keys(), key=lambda key: (key == "inputs", key)):
        if key == "inputs" and mine[key] != other.get(key):
            raise AutoSparseError(
                f"record {path} was made from other images or initial weights: choose another output directory, or "
                "delete the record"
            )
        if mine.get(key) != other.get(key):
            raise AutoSparseError(
                f"record {path} was made with {key} = {other.get(key)!r}, now it is {mine.get(key)!r}: "
                "choose another output directory, or delete the record"
            )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _continue(
    run: Run,
    config: Mapping[str, Any],
    model: nn.Module,
    images: ImageData,
    path: Path,
    done: Record | None,
    device: str,
    on_round: Callable[[int, int, Round | None], None] | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> Record:
    place = fabric_for(device).device
    images, model = images.to(place), model.to(place)
    with threads_for(model, images, run.recipe.batch_size):
        state = _state_of(path)
        rewind: dict[str, Tensor] | None = None
        weights: dict[str, Tensor] | None = None
        if done is None:
            record = begin_record(run, config, model, images, device)
            masks, start = None, 0
            claim_state(state, config)
            if (state / "rewind.safetensors").exists():
                rewind = _load_state(state / "rewind.safetensors", path)
        else:
            record, start = done, len(done.density)
            masks = masks_of_round(done.survival, done.layers, done.rounds_done)
            for index in range(start):
                if on_round is not None:
                    on_round(index, run.irp.rounds, None)
            if run.irp.rewind_step:
                rewind = _load_state(state / "rewind.safetensors", path)
            if start and run.irp.rewind != "round" and not (run.irp.rewind == "end" and start == run.irp.rounds):
                weights = _load_state(state / f"weights{start}.safetensors", path)
        rounds = irp(
            model,
            record.layers,
            images,
            run.recipe,
            run.irp,
            seed=run.seed,
            device=device,
            start=start,
            masks=masks,
            rewind=rewind,
            weights=weights,
            checkpoint=state / "training.pt",
            on_rewind_state=lambda tensors: write_safetensors(state / "rewind.safetensors", tensors, _STATE),
            on_epoch=on_epoch,
        )
        for outcome in rounds:
            record = _add_round(record, outcome, run.irp.rounds)
            if outcome.weights is not None:  # before the record, which says that they are there
                write_safetensors(state / f"weights{outcome.index + 1}.safetensors", outcome.weights, _STATE)
            write_record(path, record)
            (state / f"weights{outcome.index}.safetensors").unlink(missing_ok=True)
            if on_round is not None:
                on_round(outcome.index, run.irp.rounds, outcome)
        shutil.rmtree(state, ignore_errors=True)
        return record


def claim_state(state: Path, config: Mapping[str, Any]) -> None:
    """Keep what a stop in the first round left, when it is this run's."""
    owner = state / "run.json"
    if not owner.exists() or read_json(owner, "state of a run") != config:
        shutil.rmtree(state, ignore_errors=True)
        write_json(owner, config)


def begin_record(run: Run, config: Mapping[str, Any], model: nn.Module, images: ImageData, device: str) -> Record:
    """The record before the first round: layers, graph, and the signals of `θ₀`."""
    batches = images.sample(run.signals.batch_size, run.signals.n_batches, run.seed)
    graph = trace(model, batches[0][0][:2])
    layers = prunable_layers(model, operands=graph.operands)
    early = run.signals.warmup_names()
    ordinary = [name for name in run.signals.names if name not in early]
    signals = measure(model, layers, ordinary, batches=batches, seed=run.seed)
    if early:
        short = WarmupSettings(run.signals.warmup_orders, run.signals.warmup_lr)
        signals |= warmup(model, layers, images, run.recipe, early, short, seed=run.seed, device=device).signals
    arrays = {s: {n: t.float().cpu().numpy() for n, t in by_name.items()} for s, by_name in signals.items()}
    return Record(
        layers=layers,
        signals=arrays,
        survival={n: np.zeros(layer.shape, dtype=np.uint8) for n, layer in layers.items()},
        density=np.empty(0),
        accuracy=np.empty(0),
        loss=np.empty(0),
        config=config,
        seed=run.seed,
        operations=tuple(json.dumps(dataclasses.asdict(op)) for op in graph.operations),
        edges=graph.edges(),
        versions={"autosparse": autosparse.__version__, "torch": str(torch.__version__)},
    )


def _add_round(record: Record, outcome: Round, rounds: int) -> Record:
    survival = record.survival
    if outcome.next_masks is not None:
        kept = outcome.next_masks
        survival = {n: s + kept[n].cpu().numpy().astype(np.uint8) for n, s in record.survival.items()}
    return dataclasses.replace(
        record,
        survival=survival,
        density=np.append(record.density, outcome.density),
        accuracy=np.append(record.accuracy, outcome.trained.accuracy),
        loss=np.append(record.loss, outcome.trained.loss),
        rounds_done=record.rounds_done + (outcome.next_masks is not None),
        complete=outcome.index == rounds,
    )


def masks_of_round(survival: Mapping[str, np.ndarray], layers: Mapping[str, Layer], index: int) -> Masks:
    """The masks in force in training `index`: the weights that survived `index` removals."""
    return Masks({n: torch.from_numpy(s >= index) for n, s in survival.items()}, layers)


def _load_state(path: Path, record: Path) -> dict[str, Tensor]:
    try:
        return read_safetensors(path, _STATE, "rewind state")[0]
    except AutoSparseError as error:
        raise AutoSparseError(f"{record} cannot be resumed: {error}; delete the record to start it again") from error


def continue_gradual(
    run: Run,
    config: Mapping[str, Any],
    model: nn.Module,
    images: ImageData,
    path: Path,
    done: Record | None,
    device: str,
    on_round: Callable[[int, int, Round | None], None] | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> Record:
    """The record of one gradual run, and of the training of its ticket; see `data_gen.gradual`."""
    assert run.gradual is not None
    place = fabric_for(device).device
    images, model = images.to(place), model.to(place)
    with threads_for(model, images, run.recipe.batch_size):
        state, initial = _state_of(path), full_state(model)
        how: dict[str, Any] = {
            "seed": run.seed,
            "device": device,
            "on_epoch": on_epoch,
            "validate": on_epoch is not None,
        }
        record = done
        if record is None:
            record = begin_record(run, config, model, images, device)
            claim_state(state, config)
            clock = time.perf_counter()
            schedule = run.gradual.schedule(record.layers, run.recipe.length(images))
            trained = train(
                model,
                images.without("test"),
                run.recipe,
                mask_schedule=schedule,
                checkpoint=state / "gradual.pt",
                **how,
            )
            assert trained.mask_state is not None
            survival, densities = survival_of(trained.mask_state)
            none = np.full(len(densities), np.nan)
            record = dataclasses.replace(
                record, survival=survival, density=densities, accuracy=none, loss=none, rounds_done=len(densities)
            )
            write_record(path, record)
            if on_round is not None:
                masks = masks_of_round(survival, record.layers, record.rounds_done)
                on_round(0, 1, Round(0, 1.0, trained, masks, masks, time.perf_counter() - clock))
        elif on_round is not None:
            on_round(0, 1, None)
        clock = time.perf_counter()
        put_back(model, initial)
        masks = masks_of_round(record.survival, record.layers, record.rounds_done)
        trained = train(model, images, run.recipe, masks=masks, checkpoint=state / "ticket.pt", **how)
        record = dataclasses.replace(
            record,
            density=np.append(record.density, masks.density),
            accuracy=np.append(record.accuracy, trained.accuracy),
            loss=np.append(record.loss, trained.loss),
            complete=True,
        )
        write_record(path, record)
        if on_round is not None:
            on_round(1, 1, Round(1, masks.density, trained, masks, None, time.perf_counter() - clock))
        shutil.rmtree(state, ignore_errors=True)
        return record
