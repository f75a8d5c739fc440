"""Records with a known rule of survival, for the tests of scorers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from autosparse.masks.layers import Layer
from autosparse.network.graph import Graph, Operation
from autosparse.scorers.records import Record, write_record

Arrays = Mapping[str, np.ndarray]


def chain(names: Sequence[str]) -> Graph:
    """Layers in a row, with an activation between any two."""
    operations = [Operation("input", "", (), (), (1, 2))]
    for name in names:
        operations.append(Operation("linear", "", (len(operations) - 1,), (name,), (1, 2), weights=(name,)))
        operations.append(Operation("activation", "", (len(operations) - 1,), (), (1, 2)))
    return Graph(tuple(operations))


def write(
    path: Path,
    layers: Mapping[str, Layer],
    signals: Mapping[str, Arrays],
    worth: Arrays,
    *,
    densities: Sequence[float] = (0.5, 0.25, 0.1),
    model: str = "net",
    seed: int = 0,
    graph: Graph | None = None,
    settings: Mapping[str, object] | None = None,
) -> Path:
    """A record in which the weights of the highest worth survive, over the whole network."""
    import json

    flat = np.concatenate([worth[n].ravel() for n in layers])
    rank = flat.argsort(kind="stable").argsort() / len(flat)  # 0 the least
    rounds = sum((rank >= 1 - d).astype(np.uint8) for d in densities)
    cuts = np.cumsum([layer.numel for layer in layers.values()])[:-1]
    survival = {
        n: part.reshape(layer.shape).astype(np.uint8)
        for (n, layer), part in zip(layers.items(), np.split(rounds, cuts), strict=True)
    }
    operations = () if graph is None else tuple(json.dumps(op) for op in json.loads(graph.to_json())["operations"])
    record = Record(
        layers=dict(layers),
        signals={s: {n: a.astype(np.float32) for n, a in by.items()} for s, by in signals.items()},
        survival=survival,
        density=np.array([1.0, *densities]),
        accuracy=np.zeros(len(densities) + 1),
        loss=np.zeros(len(densities) + 1),
        config={
            "model": {"name": model},
            "data": {"name": "digits"},
            "seed": seed,
            "signals": {"n_batches": 3, "batch_size": 32, **(settings or {})},
        },
        seed=seed,
        rounds_done=len(densities),
        complete=True,
        operations=operations,
        edges=() if graph is None else graph.edges(),
    )
    write_record(path, record)
    return path


def plant(
    path: Path,
    seed: int = 0,
    densities: Sequence[float] = (0.5, 0.25, 0.1),
    model: str = "net",
    rule: str | Callable[[Mapping[str, Arrays]], Arrays] = "weight",
    sizes: Sequence[tuple[int, ...]] = ((8, 4, 3, 3), (20, 40)),
    extra: Sequence[str] = (),
) -> Path:
    """A record of a chain whose survival is a ranking of |w| (or |g|, …) alone; `extra`: signals besides these two."""
    rng = np.random.default_rng(seed)
    layers = {
        f"l{i}.weight": Layer(f"l{i}.weight", "linear" if len(size) == 2 else "conv", size)
        for i, size in enumerate(sizes)
    }
    signals = {
        s: {n: rng.normal(size=layer.shape).astype(np.float32) for n, layer in layers.items()}
        for s in ("weight", "gradient", *extra)
    }
    worth = rule(signals) if callable(rule) else {n: np.abs(a) for n, a in signals[rule].items()}
    return write(path, layers, signals, worth, densities=densities, model=model, seed=seed, graph=chain(list(layers)))


SMALL: dict[str, dict[str, object]] = {
    "mlp": {"hidden": (16,)},
    "gnn": {"width": 8, "rounds": 2},
    "image": {},
}  # options
