"""The rules by length and by plan in clusters: reference, and planned queues by hand."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from tests.against_cluster import compare_cluster, play_fast
from tests.cluster_helpers import planned_case
from tests.random_clusters import ClusterCase
from tests.reference_cluster import ClusterSpec, ReplicaSpec
from tests.reference_planned import PLANNED_RULES

pytestmark = pytest.mark.filterwarnings("ignore:decode table ends at batch")


@pytest.mark.parametrize("rule", PLANNED_RULES)
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_every_rule_equals_the_reference(rule: str, first: int) -> None:
    moves = 0
    for seed in range(first, first + 20):
        case = planned_case(np.random.default_rng([seed, 13]), dyadic=bool(seed % 2))
        moves += sum(record.moves for record in compare_cluster(case, rule).records)
    assert moves > 5


# ---- by hand --------------------------------------------------------------------------------
# Rounds of 1 s, prefill stages of 2 s.

COSTS = StageCosts(AffineDecode(1.0, 0.0), AffinePrefill(2.0, 0.0, 0.0, 0.0))


def test_in_a_pool_nobody_joins_a_client_whose_memory_is_too_small() -> None:
    """The first has 4 tokens and is idle at 1 s; the second request, of 11, waits for the other's client."""
    spec = ClusterSpec((ReplicaSpec(1, 4), ReplicaSpec(1, 20)), COSTS, router="pool")
    case = ClusterCase([(0.0, 8, 3), (1.0, 8, 3)], spec)
    log = play_fast(case, "plan")[0]
    assert log.admitted_s.tolist() == [0, 4]
    assert log.replica.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("second", "ends"),
    [
        ((8, 3), [3, 90]),  # expected to fit nowhere
        ((1, 9), [3, 2]),  # expected to fit into the first, which it outgrows
    ],
)
@pytest.mark.parametrize("rule", ["plan", "steal"])
def test_in_a_pool_who_is_longer_or_shorter_than_expected_is_served(
    rule: str, second: tuple[int, int], ends: list[int]
) -> None:
    spec = ClusterSpec((ReplicaSpec(1, 4), ReplicaSpec(1, 20)), COSTS, router="pool")
    log = play_fast(ClusterCase([(0.0, 8, 3), (1.0, *second)], spec), rule, ends)[0]
    assert log.replica.tolist() == [1, 1]
    assert np.isfinite(log.finished_s).all()


@pytest.mark.parametrize("rule", PLANNED_RULES)
def test_thieves_take_planned_requests_before_unplanned_ones(rule: str) -> None:
    """Three are expected to fit nowhere and are in no queue; a thief looks before their replica does."""
    spec = ClusterSpec(
        (ReplicaSpec(3, 60, 0.125), ReplicaSpec(3, 60)),
        COSTS,
        router="plan",
        steals=("waiting",),
        steal_takes="oldest",
    )
    log, state, *_ = play_fast(ClusterCase([(0.0, 1, 9)] * 4, spec), rule, [90, 9, 90, 90])
    assert log.admitted_s.tolist() == [0] * 4
    assert not state.clients[0].queue_requests.any()
    assert not state.clients[0].queue_rounds.any()
    assert not state.queues[0].unplanned.any()


@pytest.mark.parametrize("rule", ["plan", "steal"])
def test_who_has_come_joins_before_a_thief_comes(rule: str) -> None:
    """At 10.5 s a request comes to two busy clients of work 91 and 152; at 30 s the 120 rounds are stolen."""
    spec = ClusterSpec(
        (ReplicaSpec(1, 0, 0.7), ReplicaSpec(2)), COSTS, router="round-robin", steals=("waiting",)
    )
    outputs = (1, 100, 1, 100, 1, 60, 12, 120)
    late = [(10.25, 1, 1), (10.5, 1, 5)]
    compare_cluster(ClusterCase([(0.0, 1, output) for output in outputs] + late, spec), rule)


@pytest.mark.parametrize("clients", [(1, 3), (3, 1)])
def test_who_has_come_joins_before_anybody_leaves(clients: tuple[int, int]) -> None:
    """At 10 s a thief drops a running request of a replica whose round ends then, to be computed again."""
    spec = ClusterSpec(
        tuple(ReplicaSpec(count) for count in clients),
        COSTS,
        router="round-robin",
        steals=("running",),
        move_by="recompute",
    )
    thief = [(0.0, 1, 3), (0.0, 1, 1), (0.0, 1, 1), (0.0, 1, 1)]
    source = [(0.0, 1, 30), (0.0, 1, 20), (0.0, 1, 40), (9.5, 1, 6)]
    turns = (thief, source) if clients == (1, 3) else (source, thief)
    rows = [row for pair in zip(*turns, strict=True) for row in pair]
    assert compare_cluster(ClusterCase(rows, spec), "plan").moves


@pytest.mark.parametrize("late", [2, 11])
def test_who_has_no_rounds_ahead_joins_by_the_number_of_those_queued(late: int) -> None:
    """At 6 s a thief with one busy client takes a request that has one token left when it leaves, at 6.25 s.

    At 7 s it joins, behind ``late`` others, all without rounds: most wait for the clients without work.
    """
    spec = ClusterSpec(
        (ReplicaSpec(3), ReplicaSpec(3, 0, 0.8)),
        COSTS,
        router="round-robin",
        steals=("running",),
        move_by="recompute",
    )
    rows = [(0.0, 1, output) for output in (20, 5, 5, 5, 1, 5)] + [(6.125, 1, 1)] * 2 * late
    outcome = compare_cluster(ClusterCase(rows, spec), "plan")
    moved = next(record for record in outcome.records if record.moves)
    assert moved.client == outcome.records[0].client
    assert (moved.finished_s or 0) > 20


def test_a_stale_router_looks_though_the_plan_has_sent_the_first() -> None:
    """At 1 s it sees that the first replica is busy; the third goes by what was seen and sent then."""
    spec = ClusterSpec((ReplicaSpec(2),) * 2, COSTS, router="plan", staleness_s=8.0)
    case = ClusterCase([(0.0, 1, 9), (1.0, 1, 2), (1.5, 1, 2)], spec)
    assert play_fast(case, "plan")[0].replica.tolist() == [0, 1, 0]
    assert play_fast(case, "plan")[0].admitted_s.tolist() == [0, 1, 2]
