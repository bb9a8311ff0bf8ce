"""The core against a second simulator that knows only the page of exact rules; costs and ties are exact."""

from __future__ import annotations

import numpy as np
import pytest

from tests.against_second import differences, draw, is_known
from tests.second_simulator import Cluster, Costs, Machine, serve

UNIT = Costs(1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_equal_to_the_last_bit(first: int) -> None:
    for seed in range(first, first + 30):
        cluster, requests = draw(np.random.default_rng(seed))
        if is_known(cluster):
            assert differences(cluster, requests) == []


def test_samples_hold_what_is_to_be_compared() -> None:
    cases = [draw(np.random.default_rng(seed)) for seed in range(120)]
    served = [serve(*case) for case in cases]
    assert sum(request.preemptions for rows in served for request in rows) > 50
    assert sum(request.rejected for rows in served for request in rows) > 20
    assert len({cluster.router for cluster, _ in cases}) == 5
    assert sum(cluster.chunk > 0 for cluster, _ in cases) > 40


def test_a_trace_by_hand() -> None:
    """Memory of 6 tokens: the second request is evicted when both would hold 8, and computed again."""
    cluster = Cluster((Machine(2, 6),), UNIT)
    one, two = serve(cluster, [(0.0, 2, 3), (0.0, 2, 3)])
    assert (one.admitted, one.first_token, one.finish, one.preemptions) == (0.0, 1.0, 3.0, 0)
    assert (two.admitted, two.first_token, two.preemptions, two.prefilled) == (0.0, 1.0, 1, 6)
    assert two.finish == 4.0  # evicted at 2 s with two tokens, 4 tokens computed from 3 s on
