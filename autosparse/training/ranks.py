"""One training on several devices: a process for each (a rank), all in the one training loop with a share of each batch.

`torch.multiprocessing` starts the ranks and hands them model and data in shared memory, as pickles through its own pipes to
processes that it has started itself; nothing is read from a file.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.multiprocessing import start_processes

from autosparse.errors import AutoSparseError, AutoSparseFailure, first_line, require
from autosparse.network.restore import private_copy
from autosparse.processes import describe_exit, exit_with_parent, start_context, uninterrupted
from autosparse.training.data import ImageData
from autosparse.training.loop import Plan, Trained, fabric_for, full_state, put_back, train

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def train_on(
    devices: Sequence[str],
    model: nn.Module,
    data: ImageData,
    plan: Plan,
    *,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> Trained:
    """`train` by a process on each of `devices`.

    The ranks share a copy of the model, into which the first writes what was trained; `model` takes it over at the end, and
    stays as it was if there is none.

    Raises:
        AutoSparseError: what `train` raises; the batch cannot be split evenly; the model cannot be sent.
        AutoSparseFailure: what `train` raises; a rank died.
    """
    recipe = plan.recipe
    size = min(recipe.batch_size, len(data.train))
    require(size % len(devices) == 0, "batch size", size, f"{len(devices)} devices need a multiple of {len(devices)}")
    place, *_ = [fabric_for(device).device for device in devices]  # a device that is not there is an error here
    shared = private_copy(model).to("cpu")
    masks = None if plan.masks is None else plan.masks.to("cpu")
    context = start_context()
    pipes = [context.Pipe() for _ in devices]
    connections = [ours for ours, _ in pipes]
    threads = max(1, torch.get_num_threads() // len(devices))
    with tempfile.TemporaryDirectory(prefix="autosparse-") as folder:
        arguments = ([theirs for _, theirs in pipes], devices, str(Path(folder) / "store"), threads)
        with uninterrupted():
            ranks = start_processes(
                _rank, arguments, len(devices), join=False, daemon=True, start_method=context.get_start_method()
            )
        try:
            for ours, theirs in pipes:
                theirs.close()
                _send(ours, (shared, replace(data.to("cpu")), replace(plan, masks=masks)))
            trained = _follow(connections, ranks.processes, devices, on_epoch)
            for connection in connections:
                connection.close()
            for process in ranks.processes:  # a kill would leave what torch's compiler holds to be cleared away
                process.join(10)
        finally:
            _end(connections, ranks.processes)
    model.to(place)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    put_back(model, full_state(shared))
    model.train()
    return trained


def _send(connection: Connection, job: tuple[nn.Module, ImageData, Plan]) -> None:
    try:
        connection.send(job)
    except (BrokenPipeError, ConnectionResetError):  # `_follow` sees that the rank died
        pass
    except Exception as error:  # whatever the model's own modules raise
        raise _unsent(type(job[0]).__name__, error) from error


def _follow(
    connections: Sequence[Connection],
    processes: Sequence[Any],
    devices: Sequence[str],
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> Trained:
    while True:
        ready = wait([*connections, *(process.sentinel for process in processes)])
        message: tuple[str, Any] = ("died", None)
        for connection in connections:
            if connection in ready:
                with suppress(EOFError, OSError):
                    message = connection.recv()
                    break
        kind, value = message
        if kind == "done":
            return value
        if kind != "epoch":
            raise _failure(processes, devices, value)
        if on_epoch is not None:
            on_epoch(value)


def _failure(processes: Sequence[Any], devices: Sequence[str], error: Exception | None) -> Exception:
    """Why the training ended: a rank that dies takes the connections of the others with it, which fail too then."""
    if isinstance(error, (AutoSparseError, AutoSparseFailure)):
        return error
    ended = wait([process.sentinel for process in processes], timeout=None if error is None else 1)
    for process, device in zip(processes, devices, strict=True):
        if process.sentinel in ended:
            process.join()
            return AutoSparseFailure(
                f"a training on {len(devices)} devices ended: the process on {device} died, "
                f"{describe_exit(process.exitcode)}; run it again: what was computed before is kept"
            )
    assert error is not None
    return error


def _end(connections: Sequence[Connection], processes: Sequence[Any]) -> None:
    """All but rank 0 at once, which takes rank 0 out of waiting for them: it may be at writing a checkpoint."""
    for process in processes[1:]:
        process.kill()
    processes[0].terminate()
    processes[0].join(2)
    processes[0].kill()
    for process in processes:
        process.join()
    for connection in connections:
        connection.close()


# -- in a rank ----------------------------------------------------------------------------------------------------------


def _rank(rank: int, connections: Sequence[Connection], devices: Sequence[str], store: str, threads: int) -> None:
    exit_with_parent()
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # a stride of a dimension of size 1
    for index, connection in enumerate(connections):
        if index != rank:
            connection.close()
    connection = connections[rank]
    try:
        trained = _train(connection, rank, devices, store)
        if rank == 0:
            connection.send(("done", trained))
    except Exception as error:
        connection.send(("failed", _portable(error)))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to be cleared away
    with suppress(EOFError, OSError):
        connection.recv()  # to leave now would look like a death, to the caller and to the other ranks
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _train(connection: Connection, rank: int, devices: Sequence[str], store: str) -> Trained:
    try:
        shared, data, plan = connection.recv()
    except Exception as error:
        raise _unsent("the model", error) from error
    model, device, world = private_copy(shared), devices[rank], len(devices)
    place = fabric_for(device).device
    if place.type == "cuda":
        torch.cuda.set_device(place)
        _synchronise(model)
    elif "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=distributed.FileStore(store, world),
        rank=rank,
        world_size=world,
    )

    def on_epoch(row: dict[str, float]) -> None:
        connection.send(("epoch", row))

    trained = train(model, data, plan, device=device, rank=rank, world=world, on_epoch=on_epoch)
    if rank == 0:
        put_back(shared, full_state(model))
    return trained


def _synchronise(model: nn.Module) -> None:
    """Batch norms take their statistics over all ranks; those of other classes may do more than a batch norm does."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) in _BATCH_NORMS:
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def _unsent(what: str, error: Exception) -> AutoSparseError:
    full = "shared memory" in str(error)  # 64 MB in a container, unless its start says more
    way_out = "make /dev/shm larger" if full else "define its classes in a module that can be imported"
    return AutoSparseError(
        f"{what} cannot be sent to the processes of several devices: {first_line(error)}; {way_out}, or name one device"
    )


def _portable(error: Exception) -> Exception:
    """The error itself, if it is of ours; else its class and text, and its traceback as a note: not all can be pickled."""
    if isinstance(error, (AutoSparseError, AutoSparseFailure)):
        return error
    plain = RuntimeError(f"{type(error).__name__}: {first_line(error)}")
    plain.add_note("".join(traceback.format_exception(error)))
    return plain
