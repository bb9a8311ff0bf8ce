"""The joint bound: never above the optimum, never below the ordinary bound, its padding exact."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.baselines.exact.optimum import exact_optimum
from servegym.envs import Requests, make_requests
from servegym.envs.bounds.batch import LowerBound, lower_bound
from servegym.envs.bounds.padding import joint_bound, least_padding
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts, TableDecode
from tests.helpers import UNIT_COSTS, instance, random_costs
from tests.reference_simulator import optimal_makespan

GROUPS = 12
CASES_PER_GROUP = 30


def both(
    requests: Requests, clients: int, costs: StageCosts, budget: int = 0
) -> tuple[LowerBound, LowerBound]:
    """Return the ordinary bound and the joint one."""
    tables = costs.tables(clients)
    return (
        lower_bound(requests, clients, tables, budget),
        joint_bound(requests, clients, tables, budget),
    )


def random_case(rng: np.random.Generator) -> tuple[Requests, int, StageCosts, int]:
    """Up to six requests, many of differing lengths; cheap stages and dear ones."""
    clients, n = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    longest = int(rng.choice([4, 9]))
    requests = make_requests(rng.integers(1, 30, n), rng.integers(1, longest + 1, n))
    costs = random_costs(rng, clients, dyadic=False)
    if rng.random() < 0.3:  # a table with a dip, or a mountain
        table = TableDecode(tuple(range(1, clients + 1)), tuple(rng.uniform(0.1, 2, clients)), 0.01)
        costs = replace(costs, decode=table)
    if rng.random() < 0.5:  # so dear that few stages are best, and idling decides
        costs = replace(costs, prefill=AffinePrefill(float(rng.uniform(1, 9)), 0.01))
    return requests, clients, costs, int(rng.choice([0, 0, 10, 30]))


@pytest.mark.filterwarnings("ignore:decode table ends")
@pytest.mark.parametrize("group", range(GROUPS))
def test_at_most_the_optimum_and_at_least_the_ordinary_bound(group: int) -> None:
    rng = np.random.default_rng([78, group])
    for _ in range(CASES_PER_GROUP):
        requests, clients, costs, budget = random_case(rng)
        ordinary, joint = both(requests, clients, costs, budget)
        optimum = optimal_makespan(requests, clients, costs, budget)
        assert ordinary.seconds <= joint.seconds <= optimum * (1 + 1e-12)


def test_larger_cases_with_dear_stages() -> None:
    """Up to eight requests of up to 25 rounds, solved by the exact search; many bounds are stronger."""
    rng = np.random.default_rng(79)
    stronger = 0
    for _ in range(40):
        clients, n = int(rng.integers(2, 4)), int(rng.integers(4, 9))
        requests = make_requests(rng.integers(1, 30, n), rng.integers(2, 27, n))
        costs = StageCosts(
            AffineDecode(1.0, *rng.uniform(0, [0.3, 0.01])),
            AffinePrefill(*rng.uniform(0, [9, 0.1, 0.001, 9])),
        )
        ordinary, joint = both(requests, clients, costs)
        optimum = exact_optimum(requests, clients, costs.tables(clients))
        assert ordinary.seconds <= joint.seconds <= optimum.makespan_s * (1 + 1e-12)
        stronger += joint.seconds > ordinary.seconds * (1 + 1e-9)
    assert stronger >= 8


# Each row: requests, clients, cost; seconds of the ordinary bound and of the joint one.
BY_HAND = [
    # Rounds 2 and 1 twice on two clients. In one round there is no room for all, so S ≥ 2: the
    # differences are three, all fits: 2 · 2 + 3. The ordinary bound says so, too.
    (instance((5, 3), (5, 3), (5, 2), (5, 2)), 2, UNIT_COSTS, 7.0, 7.0),
    # Rounds 1 … 4 on two clients: ⌈10/2⌉ = 5. Two stages have three differences: padding 1 to 2 (or
    # any other by one) makes 11, so 6 rounds, 2 · 2 + 6. Three stages: 3 · 2 + 5.
    (instance((5, 2), (5, 3), (5, 4), (5, 5)), 2, UNIT_COSTS, 9.0, 10.0),
    # As many clients as requests: one stage, one difference, the longest of them; nothing is lost.
    (instance((5, 2), (5, 3), (5, 5)), 3, UNIT_COSTS, 6.0, 6.0),
    # One client never idles.
    (instance((5, 2), (5, 5)), 1, UNIT_COSTS, 9.0, 9.0),
]


@pytest.mark.parametrize(("requests", "clients", "costs", "ordinary_s", "joint_s"), BY_HAND)
def test_by_hand(
    requests: Requests, clients: int, costs: StageCosts, ordinary_s: float, joint_s: float
) -> None:
    ordinary, joint = both(requests, clients, costs)
    assert (ordinary.seconds, joint.seconds) == (ordinary_s, joint_s)
    assert joint.seconds == joint.decode_s + joint.prefill_s
    assert joint_s <= optimal_makespan(requests, clients, costs)


def test_far_points_count_as_one() -> None:
    """Rounds 1, 2, 3, 3, 3 and 3 on three clients, a stage 2 s.

    Fifteen in all, so R = 5 < 2 · 3, and two stages have three differences: 2 · 2 + 5. With nine of
    them of three rounds, R = 8 ≥ 6, and four stages have seven differences at most.
    """
    few = instance((5, 2), (5, 3), *[(5, 4)] * 4)
    assert [bound.seconds for bound in both(few, 3, UNIT_COSTS)] == [10.0, 10.0]
    many = instance((5, 2), (5, 3), *[(5, 4)] * 7)
    assert [bound.seconds for bound in both(many, 3, UNIT_COSTS)] == [15.0, 15.0]


def test_stages_for_nothing_leave_the_ordinary_bound() -> None:
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(0.0, 0.125))
    requests = instance(*((8, 1 + rounds) for rounds in (1, 2, 3, 4, 5, 6, 7, 8)))
    ordinary, joint = both(requests, 3, costs)
    assert joint.seconds == ordinary.seconds


def test_arrivals_leave_the_ordinary_bound() -> None:
    requests = instance((5, 2), (5, 3), (5, 4), (5, 5, 0.25))
    ordinary, joint = both(requests, 2, UNIT_COSTS)
    assert joint == ordinary


def test_nothing_to_decode_leaves_the_ordinary_bound() -> None:
    ordinary, joint = both(instance(*[(5, 1)] * 5), 2, UNIT_COSTS)
    assert joint == ordinary


@given(st.integers(0, 10**6))
def test_padding_is_the_least_of_all_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    lengths = np.sort(rng.choice(np.arange(1, 20), n, replace=False))
    counts = rng.integers(1, 5, n)
    differences = int(rng.integers(1, 10))

    @cache
    def least(first: int, left: int) -> float:
        """Of the lengths from ``first`` on, in at most so many clusters."""
        if first == n:
            return 0
        if left == 0:
            return np.inf
        return min(
            int(((lengths[after - 1] - lengths[first:after]) * counts[first:after]).sum())
            + least(after, left - 1)
            for after in range(first + 1, n + 1)
        )

    padding = least_padding(lengths, counts, differences)
    assert padding == least(0, differences)
    # And by the definition: sets of lengths of which one is the longest.
    sets = itertools.combinations(lengths[:-1], min(differences, n) - 1)
    assert padding == min(
        int(((chosen_lengths[np.searchsorted(chosen_lengths, lengths)] - lengths) * counts).sum())
        for chosen_lengths in (np.array([*chosen, lengths[-1]]) for chosen in sets)
    )


def test_a_large_workload_of_long_requests() -> None:
    """Requests of all lengths up to ten million: nothing overflows."""
    rng = np.random.default_rng(0)
    requests = make_requests(np.full(20_000, 9), rng.integers(1, 10**7, 20_000))
    ordinary, joint = both(requests, 1000, UNIT_COSTS)
    assert ordinary.seconds < joint.seconds < 1.5 * ordinary.seconds
