"""One training on several devices: a process for each (a rank), all in the one training loop with a share of each batch."""

from __future__ import annotations

import io
import os
import signal
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from autosparse.errors import AutoSparseError, AutoSparseFailure, first_line, require
from autosparse.processes import describe_exit, exit_with_parent, start_context, uninterrupted
from autosparse.training.data import ImageData
from autosparse.training.loop import Plan, Trained, fabric_for, full_state, put_back, train

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Found = tuple[Trained, dict[str, Tensor]]


def train_on(
    devices: Sequence[str],
    model: nn.Module,
    data: ImageData,
    plan: Plan,
    *,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> Trained:
    """`train` by a process on each of `devices`.

    Model and data go to the ranks as copies through pipes, what was trained comes back into `model`; a training that
    does not reach its end leaves `model` as it was.

    Raises:
        AutoSparseError: what `train` raises; the batch cannot be split evenly; the model cannot be sent.
        AutoSparseFailure: what `train` raises; a rank died.
    """
    recipe = plan.recipe
    size = min(recipe.batch_size, len(data.train))
    require(size % len(devices) == 0, "batch size", size, f"{len(devices)} devices need a multiple of {len(devices)}")
    places = [fabric_for(device).device for device in devices]  # one that is not there is told here
    try:
        given = _packed((model, replace(data.to("cpu")), plan))
    except Exception as error:  # whatever the model's own modules raise
        raise _unsent(type(model).__name__, error) from error
    team: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="autosparse-") as folder:
        try:
            for rank in range(len(devices)):
                team.append(_Rank(rank, devices, Path(folder) / "store"))
            for member in team:
                member.give(given)
            del given  # with all the data in it
            trained, state = _follow(team, on_epoch)
            _dismiss(team)
        finally:
            _end(team)
    model.to(places[0])
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    put_back(model, state)
    model.train()
    return trained


def _follow(team: Sequence[_Rank], on_epoch: Callable[[dict[str, float]], None] | None) -> Found:
    while True:
        wait([waitable for member in team for waitable in (member.connection, member.process.sentinel)])
        for member in team:
            for kind, value in member.messages():
                if kind == "done":
                    return value
                if kind != "epoch":
                    raise _failure(team, value)
                if on_epoch is not None:
                    on_epoch(value)


def _failure(team: Sequence[_Rank], error: Exception | None) -> Exception:
    """Why the training ended: a rank that dies takes the connections of the others with it, which they tell too."""
    if isinstance(error, (AutoSparseError, AutoSparseFailure)):
        return error
    ended = wait([member.process.sentinel for member in team], timeout=None if error is None else 1)
    for member in team:
        if member.process.sentinel in ended:
            member.process.join()
            return AutoSparseFailure(
                f"a training on {len(team)} devices ended: the process on {member.device} died, "
                f"{describe_exit(member.process.exitcode)}; run it again: what was computed before is kept"
            )
    assert error is not None
    return error


def _dismiss(team: Sequence[_Rank]) -> None:
    """Let them leave in their own time: a kill would leave what torch's compiler holds to be cleared away."""
    for member in team:
        member.connection.close()
    for member in team:
        member.process.join(10)


def _end(team: Sequence[_Rank]) -> None:
    """All but rank 0 at once, which takes rank 0 out of waiting for them: it may be at writing a checkpoint."""
    for member in team[1:]:
        member.process.kill()
    for member in team[:1]:
        member.process.terminate()
        member.process.join(2)
        member.process.kill()
    for member in team:
        member.process.join()
        member.connection.close()


class _Rank:
    """A spawned process that trains on one device."""

    def __init__(self, rank: int, devices: Sequence[str], store: Path) -> None:
        self.device = devices[rank]
        context = start_context()
        self.connection, theirs = context.Pipe()
        threads = max(1, torch.get_num_threads() // len(devices))
        self.process = context.Process(
            target=_serve, args=(theirs, rank, len(devices), self.device, str(store), threads), daemon=True
        )
        with uninterrupted():
            self.process.start()
        theirs.close()

    def give(self, given: memoryview) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # that it died is told by `messages`
            self.connection.send_bytes(given)

    def messages(self) -> Iterator[tuple[str, Any]]:
        """What it has said; lastly that it died, if it did."""
        alive = self.process.is_alive()  # asked before: what it said is in the pipe
        try:
            while self.connection.poll():
                yield _unpacked(self.connection.recv_bytes())
        except (EOFError, OSError):
            alive = False
        if not alive:
            yield "died", None


def _serve(connection: Connection, rank: int, world: int, device: str, store: str, threads: int) -> None:
    exit_with_parent()
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # a stride of a dimension of size 1
    try:
        found = _train(connection, rank, world, device, store)
        if rank == 0:
            connection.send_bytes(_packed(("done", found)))
    except Exception as error:
        connection.send_bytes(_packed(("failed", _portable(error))))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to be cleared away
    with suppress(EOFError, OSError):
        connection.recv_bytes()  # to leave now would look like a death, to the caller and to the other ranks
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _train(connection: Connection, rank: int, world: int, device: str, store: str) -> Found:
    given = connection.recv_bytes()
    try:
        model, data, plan = _unpacked(given)
    except Exception as error:
        raise _unsent("the model", error) from error
    del given
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
        connection.send_bytes(_packed(("epoch", row)))

    trained = train(model, data, plan, device=device, rank=rank, world=world, on_epoch=on_epoch)
    return trained, full_state(model)


def _synchronise(model: nn.Module) -> None:
    """Batch norms take their statistics over all ranks; those of other classes may do more than a batch norm does."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) in _BATCH_NORMS:
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def _unsent(what: str, error: Exception) -> AutoSparseError:
    return AutoSparseError(
        f"{what} cannot be sent to the processes of several devices: {first_line(error)}; "
        "define its classes in a module that can be imported, or name one device"
    )


def _portable(error: Exception) -> Exception:
    if isinstance(error, (AutoSparseError, AutoSparseFailure)):
        return error
    text = "".join(traceback.format_exception(error))
    try:
        copy: Exception = _unpacked(_packed(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {first_line(error)}")
    copy.add_note(text)
    return copy


def _packed(value: Any) -> memoryview:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()


def _unpacked(given: bytes | memoryview) -> Any:
    """What a process of ours sent through a pipe of ours, the model's own class among it; nothing is read from a file."""
    return torch.load(io.BytesIO(given), map_location="cpu", weights_only=False)
