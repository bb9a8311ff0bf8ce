"""The reference of the cluster: tiny instances solved by hand.

Unless said otherwise a decode round takes 1 s and a prefill stage 2 s, whatever they hold.
Requests are (arrival, prompt, output).
"""

from __future__ import annotations

from typing import Any

import pytest

from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from tests.helpers import UNIT_COSTS
from tests.reference_cluster import (
    Action,
    ClusterSpec,
    Outcome,
    ReferenceCluster,
    ReplicaSpec,
    serve,
)
from tests.reference_cluster_parts import Replica, View


def cluster(*replicas: ReplicaSpec, costs: StageCosts = UNIT_COSTS, **keys: Any) -> ClusterSpec:
    return ClusterSpec(replicas, costs, **keys)


def trace(outcome: Outcome) -> list[tuple]:
    """Of each stage: replica, kind, start, end, who decodes, whose tokens are prefilled."""
    return [
        (s.replica, s.kind, s.start_s, s.start_s + s.seconds, s.decodes, s.chunks)
        for s in outcome.stages
    ]


def times(outcome: Outcome) -> list[tuple]:
    return [(r.admitted_s, r.first_token_s, r.finished_s) for r in outcome.records]


def replicas_of(outcome: Outcome) -> list[int | None]:
    return [record.replica for record in outcome.records]


# ---- prefill first --------------------------------------------------------------------------


def test_prefill_first_preempts_the_newest_and_recomputes_it() -> None:
    """8 tokens: both hold 3 after the prefill, 4 after round one; the next round would need 10.

    The newer one has emitted 2 tokens by then. It comes back with 3 + 2 tokens to compute, once the
    older one has finished.
    """
    outcome = serve([(0.0, 3, 4), (0.0, 3, 4)], cluster(ReplicaSpec(2, 8)))
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 3), (1, 3))),
        (0, "decode", 2, 3, (0, 1), ()),
        (0, "decode", 3, 4, (0,), ()),
        (0, "decode", 4, 5, (0,), ()),
        (0, "prefill", 5, 7, (), ((1, 5),)),
        (0, "decode", 7, 8, (1,), ()),
    ]
    assert times(outcome) == [(0, 2, 5), (0, 2, 8)]
    assert [stage.preempted for stage in outcome.stages] == [(), (), (1,), (), (), ()]
    assert [stage.free_blocks for stage in outcome.stages] == [2, 0, 3, 2, 3, 2]
    first, second = outcome.records
    assert (first.preemptions, first.recomputed_tokens) == (0, 0)
    assert (second.preemptions, second.recomputed_tokens) == (1, 5)


def test_a_victim_waits_until_its_whole_prefill_fits() -> None:
    """Its next prefill computes prompt and emitted tokens at once."""
    outcome = serve([(0.0, 2, 6), (0.0, 2, 3)], cluster(ReplicaSpec(2, 8)))
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 2), (1, 2))),
        (0, "decode", 2, 3, (0, 1), ()),
        (0, "decode", 3, 4, (0, 1), ()),
        (0, "decode", 4, 5, (0,), ()),
        (0, "decode", 5, 6, (0,), ()),
        (0, "decode", 6, 7, (0,), ()),
    ]
    outcome = serve([(0.0, 2, 6), (0.0, 2, 5)], cluster(ReplicaSpec(2, 9)))
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 2), (1, 2))),
        (0, "decode", 2, 3, (0, 1), ()),
        (0, "decode", 3, 4, (0, 1), ()),
        (0, "decode", 4, 5, (0,), ()),  # 10 tokens do not fit; the victim has emitted 3
        (0, "decode", 5, 6, (0,), ()),  # 5 + 5 tokens do not fit either
        (0, "decode", 6, 7, (0,), ()),
        (0, "prefill", 7, 9, (), ((1, 5),)),
        (0, "decode", 9, 10, (1,), ()),
    ]


def test_the_head_that_does_not_fit_holds_up_the_others() -> None:
    outcome = serve([(0.0, 4, 2), (0.0, 5, 2), (0.0, 1, 1)], cluster(ReplicaSpec(3, 8)))
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 4),)),
        (0, "decode", 2, 3, (0,), ()),
        (0, "prefill", 3, 5, (), ((1, 5), (2, 1))),
        (0, "decode", 5, 6, (1,), ()),
    ]


@pytest.mark.parametrize(
    ("budget", "padded", "stages"),
    [
        (0, False, [((0, 9), (1, 2), (2, 3))]),
        (5, False, [((0, 9),), ((1, 2), (2, 3))]),  # the first always fits
        (11, False, [((0, 9), (1, 2)), ((2, 3),)]),
        (14, False, [((0, 9), (1, 2), (2, 3))]),
        (14, True, [((0, 9),), ((1, 2), (2, 3))]),  # 2 × 9 > 14
        (5, True, [((0, 9),), ((1, 2),), ((2, 3),)]),  # 2 × 3 > 5
    ],
)
def test_budget_of_a_prefill_stage(budget: int, padded: bool, stages: list) -> None:
    requests = [(0.0, 9, 1), (0.0, 2, 1), (0.0, 3, 1)]
    spec = cluster(ReplicaSpec(3), max_prefill_tokens=budget, padded=padded)
    assert [stage.chunks for stage in serve(requests, spec).stages] == stages


def test_a_client_is_the_lowest_idle_one() -> None:
    requests = [(0.0, 1, 2), (0.0, 1, 4), (0.0, 1, 1), (0.0, 1, 1)]
    outcome = serve(requests, cluster(ReplicaSpec(2)))
    assert [record.client for record in outcome.records] == [0, 1, 0, 0]


# ---- chunked prompts ------------------------------------------------------------------------


def test_a_prompt_of_150_tokens_takes_three_passes_of_64() -> None:
    """The second prompt joins the third pass; passes cost 10 ms for prompts plus 1 ms for decodes."""
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(10.0, 0.0))
    spec = cluster(ReplicaSpec(8), costs=costs, chunk_tokens=64, mixed="sum")
    outcome = serve([(0.0, 150, 3), (0.0, 30, 2)], spec)
    assert trace(outcome) == [
        (0, "prefill", 0, 10, (), ((0, 64),)),
        (0, "prefill", 10, 20, (), ((0, 64),)),
        (0, "prefill", 20, 30, (), ((0, 22), (1, 30))),
        (0, "decode", 30, 31, (0, 1), ()),
        (0, "decode", 31, 32, (0,), ()),
    ]
    assert times(outcome) == [(0, 30, 32), (20, 30, 31)]


def test_decodes_come_first_and_cut_the_chunk() -> None:
    outcome = serve([(0.0, 3, 4), (0.0, 9, 2)], cluster(ReplicaSpec(2), chunk_tokens=4))
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 3), (1, 1))),
        (0, "mixed", 2, 4, (0,), ((1, 3),)),
        (0, "mixed", 4, 6, (0,), ((1, 3),)),
        (0, "mixed", 6, 8, (0,), ((1, 2),)),
        (0, "decode", 8, 9, (1,), ()),
    ]


def test_a_half_computed_prompt_preempts_itself_and_nobody_is_admitted() -> None:
    """At 8 s request 0 reads its 7th token and takes the last of 9: request 1 cannot go on.

    It gives up 2 computed tokens, and request 2 waits behind it although its one token would fit.
    """
    requests = [(0.0, 4, 5), (0.0, 4, 1), (0.0, 1, 1)]
    outcome = serve(requests, cluster(ReplicaSpec(3, 9), chunk_tokens=2))
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 2),)),
        (0, "prefill", 2, 4, (), ((0, 2),)),
        (0, "mixed", 4, 6, (0,), ((1, 1),)),
        (0, "mixed", 6, 8, (0,), ((1, 1),)),
        (0, "decode", 8, 9, (0,), ()),
        (0, "decode", 9, 10, (0,), ()),
        (0, "prefill", 10, 12, (), ((1, 2),)),
        (0, "prefill", 12, 14, (), ((1, 2),)),
        (0, "prefill", 14, 16, (), ((2, 1),)),
    ]
    assert outcome.stages[4].preempted == (1,)
    assert [record.recomputed_tokens for record in outcome.records] == [0, 2, 0]
    assert times(outcome)[1] == (4, 14, 14)


# ---- memory ---------------------------------------------------------------------------------


def test_blocks_are_rounded_up_for_every_request() -> None:
    """Two prompts of 5 take 2 blocks of 4 each; of 3 blocks (15 tokens) one is left, too few."""
    requests = [(0.0, 5, 2), (0.0, 5, 2)]
    outcome = serve(requests, cluster(ReplicaSpec(2, 15), kv_block_tokens=4))
    assert [stage.chunks for stage in outcome.stages] == [((0, 5),), (), ((1, 5),), ()]
    assert [stage.free_blocks for stage in outcome.stages] == [1, 1, 1, 1]
    outcome = serve(requests, cluster(ReplicaSpec(2, 16), kv_block_tokens=4))
    assert [stage.chunks for stage in outcome.stages] == [((0, 5), (1, 5)), ()]


def test_the_watermark_does_not_bind_where_nothing_runs() -> None:
    """A quarter of 8 tokens: the first may take 7 of them, the second not 2 beside 5."""
    outcome = serve([(0.0, 7, 1), (0.0, 5, 2), (0.0, 2, 1)], cluster(ReplicaSpec(3, 8)))
    assert [stage.chunks for stage in outcome.stages] == [((0, 7),), ((1, 5), (2, 2)), ()]
    spec = cluster(ReplicaSpec(3, 8), watermark=0.25)
    outcome = serve([(0.0, 7, 1), (0.0, 5, 2), (0.0, 2, 1)], spec)
    assert [s.chunks for s in outcome.stages] == [((0, 7),), ((1, 5),), (), ((2, 2),)]


def test_what_fits_nowhere_is_rejected_and_takes_no_turn() -> None:
    requests = [(0.0, 2, 2), (0.0, 8, 1), (0.0, 2, 2), (0.0, 7, 1)]
    outcome = serve(requests, cluster(ReplicaSpec(1, 8), ReplicaSpec(1, 8)))
    assert [record.rejected for record in outcome.records] == [False, True, False, False]
    assert replicas_of(outcome) == [0, None, 1, 0]
    assert times(outcome)[1] == (None, None, None)


def test_a_turn_goes_to_the_next_replica_that_can_hold_the_request() -> None:
    outcome = serve([(0.0, 9, 1), (0.0, 1, 1)], cluster(ReplicaSpec(1, 4), ReplicaSpec(1, 16)))
    assert replicas_of(outcome) == [1, 1]


@pytest.mark.parametrize(
    ("victims", "preempted"),
    [("newest", 2), ("least-computed", 1), ("fewest-output", 0)],
)
def test_victims(victims: str, preempted: int) -> None:
    """Prompts of 6, 2 and 4; all have emitted as much: the newest goes, or the longest prompt."""
    requests = [(0.0, 6, 5), (0.0, 2, 5), (0.0, 4, 5)]
    outcome = serve(requests, cluster(ReplicaSpec(3, 15), preempt=victims))
    assert next(s.preempted for s in outcome.stages if s.preempted) == (preempted,)


@pytest.mark.parametrize(
    ("guard", "admitted_s", "preemptions"),
    [("none", 0.0, 1), ("full", 5.0, 0), ("peak", 4.0, 0)],
)
def test_guards(guard: str, admitted_s: float, preemptions: int) -> None:
    """10 tokens, and each request needs 4, 5 and 6 in its three rounds.

    Together they need 12 in the third. Admitted at 3 s, request 1 would need 5 when request 0 needs
    6; admitted at 4 s it needs 4.
    """
    outcome = serve([(0.0, 3, 4), (0.0, 3, 4)], cluster(ReplicaSpec(2, 10), admission_guard=guard))
    assert outcome.preemptions == preemptions
    assert outcome.records[1].admitted_s == admitted_s


# ---- clocks ---------------------------------------------------------------------------------


def test_an_arrival_at_the_end_of_a_stage_is_seen_there() -> None:
    outcome = serve([(0.0, 1, 3), (2.0, 1, 1), (2.0, 1, 1)], cluster(ReplicaSpec(3)))
    assert trace(outcome)[1] == (0, "prefill", 2, 4, (), ((1, 1), (2, 1)))


def test_an_idle_replica_sees_all_arrivals_of_an_instant() -> None:
    """Rows need not be in order of arrival; of equal arrivals the lower row is served first."""
    outcome = serve([(5.0, 1, 1), (1.0, 1, 1), (5.0, 2, 1)], cluster(ReplicaSpec(2)))
    assert trace(outcome) == [
        (0, "prefill", 1, 3, (), ((1, 1),)),
        (0, "prefill", 5, 7, (), ((0, 1), (2, 2))),
    ]


def test_stages_that_end_together_are_booked_before_anyone_decides() -> None:
    """In a pool the lower replica takes the head."""
    requests = [(0.0, 1, 1), (0.0, 1, 1), (0.5, 1, 1), (0.75, 1, 1)]
    spec = cluster(ReplicaSpec(1), ReplicaSpec(1), router="pool")
    outcome = serve(requests, spec)
    assert replicas_of(outcome) == [0, 1, 0, 1]
    assert [record.admitted_s for record in outcome.records] == [0, 0, 2, 2]


def test_a_faster_replica_divides_all_its_seconds() -> None:
    outcome = serve([(0.0, 1, 3), (0.0, 1, 3)], cluster(ReplicaSpec(1), ReplicaSpec(1, speed=2)))
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 1),)),
        (1, "prefill", 0, 1, (), ((1, 1),)),
        (1, "decode", 1, 1.5, (1,), ()),
        (1, "decode", 1.5, 2, (1,), ()),
        (0, "decode", 2, 3, (0,), ()),
        (0, "decode", 3, 4, (0,), ()),
    ]


def test_a_stage_may_take_no_time() -> None:
    """Request 1 recomputes its prompt of 3 and 5 emitted tokens: 3, 3 and 2 in a pass.

    Under `sum` the second chunk is no prefill and emits nothing; the third emits a token.
    """
    spec = cluster(ReplicaSpec(2, 16), chunk_tokens=3, mixed="sum")
    outcome = serve([(0.0, 3, 8), (0.0, 3, 8)], spec)
    alone_s = outcome.records[0].finished_s
    assert alone_s is not None
    alone = [stage for stage in outcome.stages if stage.start_s >= alone_s]
    assert [(stage.chunks, stage.seconds) for stage in alone] == [
        (((1, 3),), 2),
        (((1, 3),), 0),
        (((1, 2),), 1),
        ((), 1),
        ((), 1),
    ]


# ---- routers --------------------------------------------------------------------------------

TWO = (ReplicaSpec(1, 64), ReplicaSpec(1, 64))


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ("round-robin", [0, 1, 0, 1, 0]),
        ("random", [1, 1, 0, 1, 0]),
        ("least-requests", [0, 1, 0, 1, 0]),
        ("least-waiting", [0, 1, 0, 1, 0]),
        ("vllm-dp", [0, 1, 0, 1, 0]),
        ("least-tokens", [0, 1, 1, 1, 1]),  # 29 tokens against 3, 6, 9
        ("llumnix", [0, 1, 1, 0, 1]),  # 44 free steps against 62 and 30, then 21
        ("dynamo", [0, 1, 1, 1, 1]),  # 20 blocks against 2, 4, 6
    ],
)
def test_routers_and_their_ties(router: str, expected: list[int]) -> None:
    requests = [(0.0, 20, 10), *[(0.0, 2, 2)] * 4]
    outcome = serve(requests, cluster(*TWO, router=router, draws=[1, 1, 0, 1, 0]))
    assert replicas_of(outcome) == expected


def test_waiting_and_running_count_differently() -> None:
    """At 1 s replica 0 runs two and has none waiting, replica 1 runs one and has one waiting."""
    requests = [(0.0, 1, 9), (0.0, 1, 9), (0.0, 1, 9), (0.0, 1, 9), (1.0, 1, 1)]
    replicas = (ReplicaSpec(2), ReplicaSpec(1))
    for router, last in [("least-requests", 0), ("least-waiting", 0), ("vllm-dp", 0)]:
        outcome = serve(requests, cluster(*replicas, router=router))
        assert replicas_of(outcome) == [0, 1, 0, 1, last]
    busy = View(0, 5, 0, 0, 0, 0, 0)
    queued = View(1, 0, 0, 0, 0, 0, 0)
    assert busy.score("least-requests") > queued.score("least-requests")
    assert busy.score("least-waiting") < queued.score("least-waiting")
    assert busy.score("vllm-dp") > queued.score("vllm-dp")


def test_a_router_sees_a_replica_before_a_stage_that_ends_with_the_arrival() -> None:
    """At 2 s request 0 finishes; the router still counts it, so request 1 goes to replica 1."""
    outcome = serve([(0.0, 1, 1), (2.0, 1, 1)], cluster(*TWO, router="least-requests"))
    assert replicas_of(outcome) == [0, 1]


def test_a_stale_router_sees_what_was() -> None:
    """It looks at 0 s and at 4 s. At 3.75 s it still counts request 0, which has finished."""
    requests = [(0.0, 1, 1), (3.75, 1, 30), (4.0, 1, 30)]
    for staleness_s, replicas in ((0.0, [0, 0, 1]), (4.0, [0, 1, 0])):
        spec = cluster(*TWO, router="least-requests", staleness_s=staleness_s)
        assert replicas_of(serve(requests, spec)) == replicas


def test_llumnix_needs_a_limit() -> None:
    with pytest.raises(ValueError, match="limited memory"):
        cluster(ReplicaSpec(1), router="llumnix")


# ---- another policy -------------------------------------------------------------------------


class LongestWhenAllIdle(ReferenceCluster):
    """Prefills only when nothing runs, the longest output first."""

    def choose(self, replica: Replica) -> Action:
        if replica.running:
            return Action("decode")
        return Action("prefill", "longest") if replica.queue else Action("wait")

    def candidate(self, replica: Replica, rule: str, client: int) -> Any:
        assert rule == "longest"
        return max(replica.queue, key=lambda request: request.output, default=None)


def test_a_policy_of_ones_own() -> None:
    requests = [(0.0, 1, 2), (0.0, 1, 3), (0.0, 1, 4)]
    outcome = serve(requests, cluster(ReplicaSpec(2)), LongestWhenAllIdle)
    assert [stage.chunks for stage in outcome.stages if stage.chunks] == [
        ((2, 1), (1, 1)),
        ((0, 1),),
    ]
