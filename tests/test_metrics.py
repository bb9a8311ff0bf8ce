"""Percentiles in metrics equal numpy's to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.envs.process.metrics import _percentiles


@pytest.mark.parametrize("count", [1, 2, 3, 50, 100, 101, 102, 1319])
def test_percentiles_are_numpys_to_the_last_bit(count: int, rng: np.random.Generator) -> None:
    """The committed results were made with `np.percentile`."""
    for _ in range(20):
        values = rng.lognormal(size=count)
        values[rng.random(count) < 0.3] = values[0]  # ties
        assert _percentiles(values) == tuple(np.percentile(values, (50, 99)))


def test_no_percentiles_of_nothing() -> None:
    assert np.isnan(_percentiles(np.zeros(0))).all()
