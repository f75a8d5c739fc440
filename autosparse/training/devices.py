"""What the name of a device means."""

from __future__ import annotations

import re

from autosparse.errors import require

SUPPORTED = "use auto, cpu or cuda, one GPU by its number (cuda:1), several GPUs (cuda:0,1) or CPU processes (cpu:2)"


def device_names(device: str) -> tuple[str, ...]:
    """The devices in one name: `"cuda:0,1"` is two GPUs, `"cpu:2"` the CPU for two processes; any other name is one.

    Raises:
        AutoSparseError: another kind of device than the CPU and NVIDIA's or AMD's GPUs, GPUs that are no numbers, or one
            of them twice.
    """
    kind, _, index = device.partition(":")
    known = re.fullmatch(r"auto|cpu(:0*[1-9][0-9]*)?|cuda(:[0-9]+(,[0-9]+)*)?", device)
    require(known is not None, "device", device, SUPPORTED)
    if kind == "cpu":
        return (kind,) * int(index or 1)
    if "," in index:
        gpus = [int(gpu) for gpu in index.split(",")]
        require(len(set(gpus)) == len(gpus), "device", device, "name different GPUs by their numbers, such as cuda:0,1")
        return tuple(f"{kind}:{gpu}" for gpu in gpus)
    return (device,)
