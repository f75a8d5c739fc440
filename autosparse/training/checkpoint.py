"""The file that a training in flight goes on from: sealed, read without pickle, and of one training alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from autosparse.errors import AutoSparseStateError, first_line
from autosparse.files import check_seal, replace_file, seal


def write_state(path: Path, of: str, state: Mapping[str, Any]) -> None:
    """Write a state whole or not at all; `of`: the fingerprint of what it belongs to."""
    buffer = io.BytesIO()  # torch's own writer does not say so when the disk is full
    torch.save({"of": of, **state}, buffer)
    with replace_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        seal(temporary)


@contextmanager
def reading_state(path: Path, of: str) -> Iterator[dict[str, Any]]:
    """Read what `write_state` wrote, on the CPU, and put it to use in the block.

    Raises:
        AutoSparseStateError: the file is damaged or of something else, or the block cannot use what it holds.
    """
    try:
        content = path.read_bytes()[: check_seal(path, "checkpoint")]
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state.get("of") != of:
            raise ValueError("it is of another training (recipe, seed, masks, steps, initial weights or data differ)")
        yield state
    except Exception as error:
        raise AutoSparseStateError(
            f"checkpoint {path} cannot be resumed: {first_line(error)}; delete it to train from the start"
        ) from error
