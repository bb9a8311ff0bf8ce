"""Requests that move, in the reference of the cluster: what holds in every run.

tests/test_reference_moves.py has the instances solved by hand.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import UNIT_COSTS
from tests.random_clusters import random_case
from tests.reference_cluster import ClusterSpec, ReferenceCluster, ReplicaSpec, serve
from tests.reference_cluster_parts import Replica, Stage
from tests.test_reference_cluster import replicas_of, times

UNMOVED = ClusterSpec((ReplicaSpec(1),), UNIT_COSTS)
MOVING = (
    "steal_takes steal_delay_s latency_s bytes_per_s kv_bytes_per_token move_by "
    "host_latency_s host_bytes_per_s"
).split()


class Watched(ReferenceCluster):
    """Looks at the whole cluster after every event, and counts tokens."""

    tokens = 0

    def next_event(self) -> bool:
        before_s = self.clock_s
        more = super().next_event()
        assert self.clock_s >= before_s
        self.everybody_is_in_one_place()
        for replica in self.replicas:
            self.memory_and_clients_add_up(replica)
        return more

    def everybody_is_in_one_place(self) -> None:
        queues = {id(replica.queue): replica.queue for replica in self.replicas}
        places = [request for replica in self.replicas for request in replica.running]
        places += [request for queue in queues.values() for request in queue]
        places += [move.request for move in self.moves if not move.leaving]
        places += [r for r in self.records if r.phase in ("finished", "rejected")]
        everywhere = [*places, *self.future]
        assert sorted(r.id for r in everywhere) == list(range(len(self.records)))

    def memory_and_clients_add_up(self, replica: Replica) -> None:
        assert replica.free_blocks >= 0
        clients = [request.client for request in replica.running]
        clients += [move.client for move in replica.reserved]
        assert len(set(clients)) == len(clients) <= replica.spec.clients
        for request in replica.running:
            assert request.blocks >= replica.blocks_for(request.computed)
        for request in replica.kept:
            assert request.blocks == replica.blocks_for(request.held_tokens)
            stored = request.stored == replica.id
            assert stored or any(m.source is replica and m.request is request for m in self.moves)
        assert len([r for r in replica.running if not r.decoding and r.computed]) <= 1
        if replica.spec.role == "prefill":
            assert not any(request.decoding for request in replica.running)

    def end_stage(self, replica: Replica, stage: Stage) -> None:
        before = sum(record.emitted for record in self.records)
        super().end_stage(replica, stage)
        self.tokens += sum(record.emitted for record in self.records) - before


@given(seed=st.integers(0, 2**32 - 1), dyadic=st.booleans())
@settings(max_examples=300)
def test_nothing_is_lost_on_the_way(seed: int, dyadic: bool) -> None:
    case = random_case(np.random.default_rng(seed), dyadic=dyadic, moving=True)
    served = Watched(case.requests, case.spec)
    for _ in range(50_000):  # as many events are a swap for ever
        if not served.next_event():
            break
    finished = [record for record in served.records if record.phase == "finished"]
    rejected = [record for record in served.records if record.phase == "rejected"]
    assert len(finished) + len(rejected) == len(case.requests)
    assert served.tokens == sum(record.output for record in finished)
    assert not served.moves
    for replica in served.replicas:
        assert [*replica.running, *replica.reserved, *replica.kept, *replica.queue] == []
        assert replica.free_blocks == replica.blocks
    for record in finished:
        assert record.emitted == record.output
        assert record.blocks == 0
        assert record.admitted_s is not None
        assert record.first_token_s is not None
        assert record.finished_s is not None
        assert record.arrival_s <= record.admitted_s <= record.first_token_s <= record.finished_s
        recomputing = [m for m in served.made if m.request is record and m.kind == "recompute"]
        assert record.recomputed_tokens == 0 or record.preemptions > 0 or recomputing
        assert not dyadic or (record.finished_s * 2**24).is_integer()  # exact in any order
    for move in served.made:
        assert move.state in ("queued", "joined", "failed", "void")
        assert move.ended_s is not None
        assert move.made_s <= move.ended_s
        assert (move.left_s is None) == (move.state in ("failed", "void"))


@given(seed=st.integers(0, 2**32 - 1), dyadic=st.booleans())
@settings(max_examples=60)
def test_stealing_from_one_queue_for_nothing_is_a_pool(seed: int, dyadic: bool) -> None:
    """Without budgets, as a thief takes for all its idle clients: it must be able to admit them."""
    rng = np.random.default_rng(seed)
    case = random_case(rng, dyadic=dyadic, chunked=bool(rng.random() < 0.3), moving=False)
    replicas = (ReplicaSpec(int(rng.integers(1, 6))),) * int(rng.integers(2, 5))
    spec = replace(
        case.spec,
        replicas=replicas,
        max_prefill_tokens=0,
        chunk_tokens=10**6 if case.spec.chunk_tokens else 0,
        router="pool",
        staleness_s=0.0,
    )
    pool = serve(case.requests, spec)
    thieves = replace(spec, router="first", steals=("waiting",), steal_takes="oldest")
    stolen = serve(case.requests, thieves)
    assert stolen.stages == pool.stages
    assert times(stolen) == times(pool)
    assert [r.client for r in stolen.records] == [r.client for r in pool.records]
    assert replicas_of(stolen) == replicas_of(pool)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_settings_of_moves_that_never_move_change_nothing(seed: int) -> None:
    """No steals, all replicas for both, victims recompute: delays and rates mean nothing."""
    case = random_case(np.random.default_rng(seed), dyadic=True, moving=True)
    replicas = tuple(replace(replica, role="both") for replica in case.spec.replicas)
    still = replace(case.spec, replicas=replicas, steals=(), preempt_to="recompute")
    plain = replace(
        still,
        **{name: getattr(UNMOVED, name) for name in MOVING},
    )
    ours, theirs = serve(case.requests, still), serve(case.requests, plain)
    assert ours.moves == []
    assert ours.stages == theirs.stages
    assert times(ours) == times(theirs)
