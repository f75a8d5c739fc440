"""Density over steps or rounds."""

from __future__ import annotations

from numbers import Integral, Real

from autosparse.errors import AutoSparseError, require

SCHEDULES = ("exponential", "geometric", "linear")


def check_density(density: float, name: str = "density") -> float:
    require(isinstance(density, Real) and 0 < density <= 1, name, density, "it must lie in (0, 1]")
    return float(density)


def check_sparsity(sparsity: float) -> float:
    require(
        isinstance(sparsity, Real) and 0 <= sparsity < 1,
        "sparsity",
        sparsity,
        "it is the share of weights removed, at least 0 and under 1 (0.95 keeps 5 %)",
    )
    return float(sparsity)


def densities(density: float, steps: int, schedule: str = "exponential") -> list[float]:
    """The densities `ρ_1 … ρ_T` after each of `T = steps` steps, the last exactly `density`.

    `"exponential"`: `ρ_t = ρ^{t/T}`, each step keeps the same fraction (IRP calls this `"geometric"`: the same thing);
    `"linear"`: `ρ_t = 1 − (1 − ρ)·t/T`, each step removes the same number.

    Raises:
        AutoSparseError: density outside (0, 1], no steps, unknown schedule.

    >>> densities(0.25, 2)
    [0.5, 0.25]
    """
    check_density(density)
    require(isinstance(steps, Integral) and steps >= 1, "steps", steps, "give a whole number of at least 1")
    if schedule in ("exponential", "geometric"):
        path = [density ** (t / steps) for t in range(1, steps)]
    elif schedule == "linear":
        path = [1 - (1 - density) * t / steps for t in range(1, steps)]
    else:
        raise AutoSparseError(f"schedule is {schedule!r}: known are {', '.join(SCHEDULES)}")
    return [*path, float(density)]
