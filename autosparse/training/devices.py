"""What the name of a device means."""

from __future__ import annotations

from autosparse.errors import require


def device_names(device: str) -> tuple[str, ...]:
    """The devices in one name: `"cuda:0,1"` is two GPUs, `"cpu:2"` the CPU for two processes; any other name is one.

    Raises:
        AutoSparseError: GPUs that are no numbers, or one of them twice.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu" and index.isdecimal() and int(index) >= 1:
        return (kind,) * int(index)
    if kind == "cuda" and "," in index:
        gpus = index.split(",")
        good = all(gpu.isdecimal() for gpu in gpus) and len(set(map(int, gpus))) == len(gpus)
        require(good, "device", device, "name different GPUs by their numbers, such as cuda:0,1")
        return tuple(f"{kind}:{int(gpu)}" for gpu in gpus)
    return (device,)
