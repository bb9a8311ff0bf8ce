"""Percentiles in metrics equal numpy's to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from servegym.envs.process.metrics import episode_metrics
from servegym.envs.simulator.state import State, make_state


def served(ttft_s: NDArray[np.float64]) -> State:
    """The records of requests that arrived at 0 s; each second token took as long as the first."""
    state = make_state(1, max(1, len(ttft_s)), 1)
    state.episodes["requests"], state.episodes["bound_s"] = len(ttft_s), 1.0
    rows = state.requests[0, : len(ttft_s)]
    rows["first_token_s"], rows["finished_s"], rows["decode_rounds"] = ttft_s, 2 * ttft_s, 1
    return state


@pytest.mark.parametrize("count", [1, 2, 3, 50, 100, 101, 102, 1319])
def test_percentiles_are_numpys_to_the_last_bit(count: int, rng: np.random.Generator) -> None:
    """The committed results were made with `np.percentile`."""
    for _ in range(20):
        values = rng.lognormal(size=count)
        values[rng.random(count) < 0.3] = values[0]  # ties
        metrics = episode_metrics(served(values), 0)
        for name in ("ttft", "tpot"):
            percentiles = metrics[f"{name}_p50_s"], metrics[f"{name}_p99_s"]
            assert percentiles == tuple(np.percentile(values, (50, 99))), name


def test_no_percentiles_of_nothing() -> None:
    state = served(np.ones(2))
    state.requests["admitted_s"] = np.nan
    state.requests["finished_s"] = np.nan
    metrics = episode_metrics(state, 0)
    assert np.isnan(
        [metrics[f"{name}_p{k}_s"] for name in ("ttft", "tpot") for k in (50, 99)]
    ).all()
