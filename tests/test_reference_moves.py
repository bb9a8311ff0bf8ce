"""Requests that move, in the reference of the cluster: instances solved by hand.

A decode round takes 1 s and a prefill stage 2 s, whatever they hold. Requests are (arrival, prompt,
output). The router `first` sends all to replica 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.reference_cluster import Outcome, ReferenceCluster, ReplicaSpec, serve
from tests.reference_cluster_parts import View
from tests.test_reference_cluster import cluster, replicas_of, times, trace

ONE, TWO = ReplicaSpec(1), ReplicaSpec(2)


def finishes(outcome: Outcome) -> list[float | None]:
    return [record.finished_s for record in outcome.records]


def moves_of(outcome: Outcome) -> list[tuple]:
    """Of each move: kind, request, begin, when the request left its source, end, how it ended."""
    return [(m.kind, m.request.id, m.made_s, m.left_s, m.ended_s, m.state) for m in outcome.moves]


# ---- stealing waiting requests --------------------------------------------------------------


def test_an_idle_replica_steals_the_oldest() -> None:
    """Replica 0 takes request 0, so 1 is the oldest that waits; at 4 s only 3 is left to steal."""
    requests = [(0.0, 1, 2), (0.0, 1, 3), (0.0, 1, 5), (0.0, 1, 4)]
    spec = cluster(ONE, ONE, router="first", steals=("waiting",), steal_takes="oldest")
    outcome = serve(requests, spec)
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 1),)),
        (1, "prefill", 0, 2, (), ((1, 1),)),
        (0, "decode", 2, 3, (0,), ()),
        (1, "decode", 2, 3, (1,), ()),
        (0, "prefill", 3, 5, (), ((2, 1),)),
        (1, "decode", 3, 4, (1,), ()),
        (1, "prefill", 4, 6, (), ((3, 1),)),
        (0, "decode", 5, 6, (2,), ()),
        (0, "decode", 6, 7, (2,), ()),
        (1, "decode", 6, 7, (3,), ()),
        (0, "decode", 7, 8, (2,), ()),
        (1, "decode", 7, 8, (3,), ()),
        (0, "decode", 8, 9, (2,), ()),
        (1, "decode", 8, 9, (3,), ()),
    ]
    assert [record.moves for record in outcome.records] == [0, 1, 0, 1]
    assert replicas_of(outcome) == [0, 1, 0, 1]
    assert moves_of(outcome) == [("queue", 1, 0, 0, 0, "queued"), ("queue", 3, 4, 4, 4, "queued")]


@pytest.mark.parametrize(
    ("takes", "stolen", "finished_s"),
    [
        ("oldest", [1, 3], [3, 4, 9, 9]),
        ("newest", [3, 2], [3, 7, 11, 5]),  # 3 until 2 + 3 s, meanwhile replica 0 took 1
        ("longest", [2, 3], [3, 7, 6, 11]),  # 2 until 2 + 4 s, then 2 + 3 s for 3
    ],
)
def test_which_waiting_request_is_stolen(
    takes: str, stolen: list[int], finished_s: list[float]
) -> None:
    requests = [(0.0, 1, 2), (0.0, 1, 3), (0.0, 1, 5), (0.0, 1, 4)]
    spec = cluster(ONE, ONE, router="first", steals=("waiting",), steal_takes=takes)
    outcome = serve(requests, spec)
    assert [move.request.id for move in outcome.moves] == stolen
    assert finishes(outcome) == finished_s


@pytest.mark.parametrize(
    ("takes", "order"), [("oldest", (1, 2)), ("newest", (3, 4)), ("longest", (3, 1))]
)
def test_several_are_stolen_in_the_order_of_the_rule(takes: str, order: tuple[int, int]) -> None:
    """Two clients are idle at replica 1, four requests wait. Of the two of output 4 the earlier."""
    requests = [(0.0, 1, 9), (0.0, 1, 4), (0.0, 1, 3), (0.0, 1, 8), (0.0, 1, 4)]
    spec = cluster(ONE, TWO, router="first", steals=("waiting",), steal_takes=takes)
    outcome = serve(requests, spec)
    assert tuple(move.request.id for move in outcome.moves[:2]) == order
    assert outcome.stages[1].chunks == ((order[0], 1), (order[1], 1))


def test_a_steal_that_takes_time() -> None:
    """Request 1 is in flight until 1.5 s; replica 1 has one client, so it leaves request 2 alone.

    At 3 s replica 0 is idle again and takes request 2 itself.
    """
    requests = [(0.0, 1, 2), (0.0, 1, 3), (1.0, 1, 1)]
    spec = cluster(ONE, ONE, router="first", steals=("waiting",), steal_delay_s=1.5)
    outcome = serve(requests, spec)
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 1),)),
        (1, "prefill", 1.5, 3.5, (), ((1, 1),)),
        (0, "decode", 2, 3, (0,), ()),
        (0, "prefill", 3, 5, (), ((2, 1),)),
        (1, "decode", 3.5, 4.5, (1,), ()),
        (1, "decode", 4.5, 5.5, (1,), ()),
    ]
    assert moves_of(outcome) == [("queue", 1, 0, 0, 1.5, "queued")]
    assert times(outcome)[1] == (1.5, 3.5, 5.5)


def test_the_queue_with_most_work_is_stolen_from() -> None:
    """1 + 5 − 1 tokens wait at replica 0, 4 + 9 − 1 at replica 1."""
    requests = [(0.0, 1, 2), (0.0, 1, 5), (0.0, 1, 2), (0.0, 4, 9)]
    spec = cluster(ONE, ONE, ONE, router="random", draws=[0, 0, 1, 1], steals=("waiting",))
    assert [move.request.id for move in serve(requests, spec).moves][:1] == [3]


def test_nobody_steals_what_it_might_not_hold() -> None:
    requests = [(0.0, 1, 2), (0.0, 1, 2)]
    small, large = ReplicaSpec(1, 8), ReplicaSpec(1, 9)
    for replicas, moves in (((small, large), 1), ((large, small), 0)):
        spec = cluster(*replicas, router="first", steals=("waiting",))
        assert len(serve(requests, spec).moves) == moves


# ---- stealing running requests --------------------------------------------------------------

LINK: dict[str, Any] = {
    "router": "first",
    "steals": ("running",),
    "latency_s": 1.5,
    "bytes_per_s": 4.0,
}


def test_a_live_copy() -> None:
    """At 2 s both have emitted one token; request 0 has most rounds left. Its token takes 1.75 s.

    It pauses at 4 s, the first boundary after 3.75 s, with 3 tokens; two tokens take 0.5 s more.
    """
    outcome = serve([(0.0, 1, 10), (0.0, 1, 6)], cluster(TWO, TWO, **LINK))
    assert trace(outcome)[:6] == [
        (0, "prefill", 0, 2, (), ((0, 1), (1, 1))),
        (0, "decode", 2, 3, (0, 1), ()),
        (0, "decode", 3, 4, (0, 1), ()),
        (0, "decode", 4, 5, (1,), ()),
        (1, "decode", 4.5, 5.5, (0,), ()),
        (0, "decode", 5, 6, (1,), ()),
    ]
    assert moves_of(outcome) == [("copy", 0, 2, 4, 4.5, "joined")]
    assert times(outcome) == [(0, 2, 11.5), (0, 2, 7)]
    mover = outcome.records[0]
    assert (mover.moves, mover.replica, mover.client, mover.recomputed_tokens) == (1, 1, 0, 0)


def test_who_lands_during_a_stage_joins_at_its_end_as_the_newest() -> None:
    """Request 2 arrives at 4.25 s and gets client 1: client 0 is reserved."""
    requests = [(0.0, 1, 20), (0.0, 1, 15), (4.25, 1, 2)]
    spec = cluster(TWO, TWO, **{**LINK, "router": "random", "draws": [0, 0, 1]})
    outcome = serve(requests, spec)
    assert [stage for stage in trace(outcome) if stage[0] == 1][:3] == [
        (1, "prefill", 4.25, 6.25, (), ((2, 1),)),
        (1, "decode", 6.25, 7.25, (2, 0), ()),
        (1, "decode", 7.25, 8.25, (0,), ()),
    ]
    assert moves_of(outcome) == [("copy", 0, 2, 4, 6.25, "joined")]
    assert [record.client for record in outcome.records] == [0, 1, 1]


def test_a_copy_that_comes_too_late() -> None:
    """Request 0 finishes at 5 s, long before its copy is there; its reservation ends then.

    The only client of replica 1 was reserved, so request 2 waits from 3 s to 5 s.
    """
    requests = [(0.0, 1, 4), (0.0, 1, 3), (3.0, 1, 1)]
    spec = cluster(TWO, ONE, **{**LINK, "router": "random", "draws": [0, 0, 1], "latency_s": 10.0})
    outcome = serve(requests, spec)
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 1), (1, 1))),
        (0, "decode", 2, 3, (0, 1), ()),
        (0, "decode", 3, 4, (0, 1), ()),
        (0, "decode", 4, 5, (0,), ()),
        (1, "prefill", 5, 7, (), ((2, 1),)),
    ]
    assert moves_of(outcome) == [("copy", 0, 2, None, 5, "void")]
    assert [record.moves for record in outcome.records] == [0, 0, 0]
    assert outcome.clock_s == 7  # nothing happens at 12.25 s


def test_a_copy_ends_when_its_request_is_preempted() -> None:
    """8 tokens: at 3 s both would need 5. The newer one is evicted while it is copied.

    It comes back with 3 + 2 tokens at 5 s, when request 0 has finished.
    """
    requests = [(0.0, 3, 4), (0.0, 3, 5)]
    replicas = (ReplicaSpec(2, 8), ReplicaSpec(2, 8))
    outcome = serve(requests, cluster(*replicas, **{**LINK, "latency_s": 5.0}))
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 3), (1, 3))),
        (0, "decode", 2, 3, (0, 1), ()),
        (0, "decode", 3, 4, (0,), ()),
        (0, "decode", 4, 5, (0,), ()),
        (0, "prefill", 5, 7, (), ((1, 5),)),
        (0, "decode", 7, 8, (1,), ()),
        (0, "decode", 8, 9, (1,), ()),
    ]
    assert moves_of(outcome) == [("copy", 1, 2, None, 3, "void")]


def test_a_copy_fails_where_memory_lacks() -> None:
    """Replica 1 reserves 4 of 16 tokens at 2 s and takes 11 for request 2 at 2.5 s.

    At 4 s request 0 holds 4 + 3 − 1 tokens, two more than reserved, and one is free. It stays.
    """
    requests = [(0.0, 4, 12), (0.0, 1, 3), (2.5, 11, 2)]
    replicas = (ReplicaSpec(2, 16), ReplicaSpec(2, 16))
    spec = cluster(*replicas, router="random", draws=[0, 0, 1], steals=("running",), latency_s=1.5)
    outcome = serve(requests, spec)
    assert trace(outcome)[:7] == [
        (0, "prefill", 0, 2, (), ((0, 4), (1, 1))),
        (0, "decode", 2, 3, (0, 1), ()),
        (1, "prefill", 2.5, 4.5, (), ((2, 11),)),
        (0, "decode", 3, 4, (0, 1), ()),
        (0, "decode", 4, 5, (0,), ()),
        (1, "decode", 4.5, 5.5, (2,), ()),
        (0, "decode", 5, 6, (0,), ()),
    ]
    assert moves_of(outcome) == [("copy", 0, 2, None, 4, "failed")]
    assert [stage.free_blocks for stage in outcome.stages[:6]] == [11, 9, 1, 7, 9, 4]
    assert finishes(outcome) == [13, 4, 5.5]


def test_guards_count_what_is_reserved_and_a_landing_due_now_repeats_the_instant() -> None:
    """20 tokens: 4 reserved ones and 14 + 3 of request 2 are more, so it waits.

    Request 0 pauses at 4 s, and as copying takes no time but the latency it lands and joins at 4 s.
    """
    requests = [(0.0, 4, 12), (0.0, 1, 3), (2.5, 14, 3)]
    spec = cluster(
        ReplicaSpec(2, 20),
        ReplicaSpec(2, 20),
        router="random",
        draws=[0, 0, 1],
        steals=("running",),
        latency_s=1.5,
        admission_guard="full",
    )
    outcome = serve(requests, spec)
    assert trace(outcome)[3] == (1, "decode", 4, 5, (0,), ())
    assert moves_of(outcome) == [("copy", 0, 2, 4, 4, "joined")]
    assert finishes(outcome) == [13, 4, 17]
    assert outcome.records[2].admitted_s == 13


def test_a_copy_begins_only_where_it_fits() -> None:
    """At 2 s 37 of 48 tokens are free at replica 1; request 0 needs 5 and the watermark 32 or 33."""
    requests = [(0.0, 4, 12), (0.0, 1, 11), (0.0, 1, 11), (0.0, 11, 4)]
    spec = cluster(
        ReplicaSpec(3, 48),
        ReplicaSpec(2, 48),
        router="random",
        draws=[0, 0, 0, 1],
        steals=("running",),
    )
    for watermark, moves in ((0.67, 1), (0.69, 0)):
        outcome = serve(requests, replace(spec, watermark=watermark))
        assert sum(move.made_s == 2 for move in outcome.moves) == moves


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_a_move_that_recomputes(delay_s: float) -> None:
    """Request 0 leaves at 3 s, the boundary after the steal, and prefills 1 + 2 tokens."""
    spec = cluster(TWO, TWO, **LINK, move_by="recompute", steal_delay_s=delay_s)
    outcome = serve([(0.0, 1, 10), (0.0, 1, 6)], spec)
    at = 3 + delay_s
    assert trace(outcome)[:4] == [
        (0, "prefill", 0, 2, (), ((0, 1), (1, 1))),
        (0, "decode", 2, 3, (0, 1), ()),
        (0, "decode", 3, 4, (1,), ()),
        (1, "prefill", at, at + 2, (), ((0, 3),)),
    ]
    assert moves_of(outcome) == [("recompute", 0, 2, 3, at, "queued")]
    assert times(outcome) == [(0, 2, at + 9), (0, 2, 7)]
    mover = outcome.records[0]
    assert (mover.moves, mover.preemptions, mover.recomputed_tokens) == (1, 0, 3)


def test_a_source_at_its_boundary_lets_go_at_once() -> None:
    """Replica 0 decides before replica 1 begins its round at 2 s."""
    keys = {**LINK, "router": "random", "draws": [1, 1], "move_by": "recompute"}
    outcome = serve([(0.0, 1, 10), (0.0, 1, 6)], cluster(TWO, TWO, **keys))
    assert trace(outcome)[1:3] == [
        (0, "prefill", 2, 4, (), ((0, 2),)),
        (1, "decode", 2, 3, (1,), ()),
    ]


@pytest.mark.parametrize(
    ("latency_s", "speed", "kind"),
    [(1.5, 1, "copy"), (1.75, 1, "copy"), (2.0, 1, "recompute"), (1.5, 2, "recompute")],
)
def test_the_cheaper_way(latency_s: float, speed: float, kind: str) -> None:
    """A prefill takes 2 s, copying a token 0.25 s after the latency; of equal ways the copy."""
    keys = {**LINK, "latency_s": latency_s, "move_by": "cheaper"}
    spec = cluster(TWO, ReplicaSpec(2, speed=speed), **keys)
    assert serve([(0.0, 1, 10), (0.0, 1, 6)], spec).moves[0].kind == kind


def test_a_router_sees_a_reservation_as_a_request_without_tokens() -> None:
    """After 3 s, when request 0 has emitted two tokens and one is reserved."""
    served = ReferenceCluster([(0.0, 1, 10), (0.0, 1, 6)], cluster(TWO, TWO, **LINK))
    while served.clock_s < 3:
        served.next_event()
    source, target = (replica.view() for replica in served.replicas)
    assert (source.waiting, source.running, source.tokens, source.held_blocks) == (0, 2, 12, 6)
    assert (target.waiting, target.running, target.tokens, target.held_blocks) == (0, 1, 0, 1)


# ---- keys and values stored elsewhere -------------------------------------------------------


def test_from_a_prefill_replica_to_a_decode_replica() -> None:
    """Copying 4 tokens takes 1 + 4/4 s. Replica 1 has one client: it fetches one after another.

    The 4 blocks of request 0 stay at replica 0 until 4 s; only then request 3 fits there.
    """
    requests = [(0.0, 4, 3), (0.0, 4, 2), (0.0, 3, 2), (2.0, 5, 1)]
    replicas = (ReplicaSpec(2, 12, role="prefill"), ReplicaSpec(1, 12, role="decode"))
    outcome = serve(requests, cluster(*replicas, latency_s=1.0, bytes_per_s=4.0))
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 4), (1, 4))),
        (0, "prefill", 2, 4, (), ((2, 3),)),
        (0, "prefill", 4, 6, (), ((3, 5),)),
        (1, "decode", 4, 5, (0,), ()),
        (1, "decode", 5, 6, (0,), ()),
        (1, "decode", 8, 9, (1,), ()),
        (1, "decode", 10.75, 11.75, (2,), ()),
    ]
    assert moves_of(outcome) == [
        ("fetch", 0, 2, 2, 4, "joined"),
        ("fetch", 1, 6, 6, 8, "joined"),
        ("fetch", 2, 9, 9, 10.75, "joined"),
    ]
    assert [stage.free_blocks for stage in outcome.stages] == [4, 1, 0, 7, 6, 7, 8]
    assert [record.moves for record in outcome.records] == [1, 1, 1, 0]
    assert replicas_of(outcome) == [1, 1, 1, 0]
    assert times(outcome) == [(0, 2, 6), (0, 2, 9), (2, 4, 11.75), (4, 6, 6)]


def test_a_router_sees_what_is_stored_where_it_is_and_what_it_will_take() -> None:
    """The same instance at 2 s: 8 tokens are kept and 3 taken; request 0 is fetched, 1 waits."""
    requests = [(0.0, 4, 3), (0.0, 4, 2), (0.0, 3, 2)]
    replicas = (ReplicaSpec(2, 12, role="prefill"), ReplicaSpec(1, 12, role="decode"))
    served = ReferenceCluster(requests, cluster(*replicas, latency_s=1.0, bytes_per_s=4.0))
    while served.clock_s < 2:
        served.next_event()
    assert [replica.view() for replica in served.replicas] == [
        View(0, 1, 3 + 1, 0, 3, held_blocks=11, free_blocks=1),
        View(1, 1, 1, 4, 0, held_blocks=4, free_blocks=8),
    ]


def test_what_no_replica_could_decode_is_rejected() -> None:
    prefill = ReplicaSpec(1, 16, role="prefill")
    for cap, rejected in ((8, True), (10, False)):
        spec = cluster(prefill, ReplicaSpec(1, cap, role="decode"))
        assert serve([(0.0, 4, 6)], spec).records[0].rejected is rejected


def test_a_victim_waits_on_the_host() -> None:
    """Request 1 is evicted at 3 s with 4 tokens: 2 · (0.25 + 4/8) s out and back, from 5 s on."""
    spec = cluster(ReplicaSpec(2, 8), preempt_to="host", host_latency_s=0.25, host_bytes_per_s=8.0)
    outcome = serve([(0.0, 3, 4), (0.0, 3, 4)], spec)
    assert trace(outcome) == [
        (0, "prefill", 0, 2, (), ((0, 3), (1, 3))),
        (0, "decode", 2, 3, (0, 1), ()),
        (0, "decode", 3, 4, (0,), ()),
        (0, "decode", 4, 5, (0,), ()),
        (0, "decode", 6.5, 7.5, (1,), ()),
        (0, "decode", 7.5, 8.5, (1,), ()),
    ]
    assert moves_of(outcome) == [("fetch", 1, 5, 5, 6.5, "joined")]
    victim = outcome.records[1]
    assert (victim.preemptions, victim.recomputed_tokens, victim.moves) == (1, 0, 0)


def test_a_fetch_leaves_room_for_the_next_round_of_all() -> None:
    """9 tokens. At 4 s request 0 holds 5 and wants a sixth, and request 1, on the host, 4: one too many.

    Fetched at once, it would leave no token for request 0, which would be evicted; and so on, in turns.
    """
    requests = [(0.0, 3, 6), (0.0, 3, 6)]
    outcome = serve(requests, cluster(ReplicaSpec(2, 9), preempt_to="host", host_latency_s=1.0))
    assert finishes(outcome) == [7, 13]
    assert moves_of(outcome) == [("fetch", 1, 7, 7, 9, "joined")]


def test_an_eviction_into_the_pool_wakes_whoever_can_hold_the_request() -> None:
    """Replica 1 has 9 tokens, one too few for request 1, and evicts it; replica 0 is idle by then."""
    spec = cluster(ReplicaSpec(1, 100), ReplicaSpec(1, 9), router="pool")
    outcome = serve([(0.0, 1, 1), (0.0, 8, 3)], spec)
    assert trace(outcome)[1:] == [
        (1, "prefill", 0, 2, (), ((1, 8),)),
        (1, "decode", 2, 3, (1,), ()),
        (0, "prefill", 3, 5, (), ((1, 10),)),
    ]


@pytest.mark.parametrize(
    ("replicas", "keys", "message"),
    [
        ((ONE,), {"steals": ("waiting",)}, "two replicas"),
        ((ONE, ONE), {"steals": ("running",), "router": "pool"}, "queues of their own"),
        ((ReplicaSpec(1, role="decode"),) * 2, {}, "prefill and decode"),
        ((ReplicaSpec(1, role="prefill"), ONE), {"router": "pool"}, "prefill and decode"),
    ],
)
def test_settings_that_cannot_be(replicas: tuple, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(*replicas, **keys)
