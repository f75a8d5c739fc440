"""Density over steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosparse.errors import AutoSparseError
from autosparse.masks.schedule import SCHEDULES, check_density, check_sparsity, densities


def test_exponential() -> None:
    assert densities(0.125, 3) == pytest.approx([0.5, 0.25, 0.125])
    assert densities(0.125, 3, "geometric") == densities(0.125, 3, "exponential")


def test_linear() -> None:
    assert densities(0.2, 4, "linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])


@given(st.floats(1e-4, 1), st.integers(1, 100), st.sampled_from(SCHEDULES))
def test_falls_to_exactly_the_density(density: float, steps: int, schedule: str) -> None:
    path = densities(density, steps, schedule)
    assert len(path) == steps
    assert path[-1] == density
    assert all(0 < b <= a * (1 + 1e-12) <= 1 + 1e-12 for a, b in itertools.pairwise(path))


def test_numbers_of_numpy_are_numbers() -> None:
    assert densities(np.float32(0.25), np.int64(2)) == [0.5, 0.25]
    assert check_sparsity(np.float32(0.5)) == 0.5


@pytest.mark.parametrize("density", [0, -0.1, 1.1, math.nan, "0.5", None])
def test_bad_density(density: object) -> None:
    with pytest.raises(AutoSparseError, match=r"density is .*: it must lie in \(0, 1\]"):
        check_density(density)


@pytest.mark.parametrize("sparsity", [1, 95, -0.1, math.nan, "0.5"])
def test_bad_sparsity(sparsity: object) -> None:
    with pytest.raises(AutoSparseError, match=r"sparsity is .*0\.95 keeps 5 %"):
        check_sparsity(sparsity)


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_bad_steps(steps: float) -> None:
    with pytest.raises(AutoSparseError, match=r"steps is .*whole number"):
        densities(0.5, steps)


def test_unknown_schedule() -> None:
    with pytest.raises(AutoSparseError, match="schedule is 'cubic': known are exponential"):
        densities(0.5, 2, "cubic")
