"""Percentiles in metrics equal numpy's to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.envs import make_requests
from servegym.envs.machine.layout import one_replica
from servegym.envs.process.metrics import episode_metrics, records
from servegym.envs.simulator.loading import load
from servegym.envs.simulator.state import make_state


@pytest.mark.parametrize("count", [1, 2, 3, 50, 100, 101, 102, 1319])
def test_percentiles_are_numpys_to_the_last_bit(count: int, rng: np.random.Generator) -> None:
    """The committed results were made with `np.percentile`."""
    state = make_state(1, count, one_replica(1))
    ones = np.ones(count, dtype=np.int64)
    load(state, 0, make_requests(ones, 2 * ones), None)
    state.episodes[0].bound_s = 1.0
    rows = state.times[0]
    rows["admitted_s"] = rows["arrival_s"]
    for _ in range(20):
        for name in ("first_token_s", "finished_s"):
            values = rng.lognormal(size=count)
            values[rng.random(count) < 0.3] = values[0]  # ties
            rows[name] = values
        metrics, log = episode_metrics(state, 0), records(state, 0)
        for name, values in (
            ("ttft", log.first_token_s),
            ("tpot", log.finished_s - log.first_token_s),  # one token after the first
        ):
            shown = metrics[f"{name}_p50_s"], metrics[f"{name}_p99_s"]
            assert shown == tuple(np.percentile(values, (50, 99)))


def test_no_percentiles_of_nothing() -> None:
    state = make_state(1, 1, one_replica(1))
    load(state, 0, make_requests([1], [2]), None)
    state.episodes[0].bound_s = 1.0
    metrics = episode_metrics(state, 0)
    for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s"):
        assert np.isnan(metrics[name])
