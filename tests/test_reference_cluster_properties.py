"""The reference of the cluster: what must hold in every run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_clusters import ClusterCase, random_case
from tests.reference_cluster import Outcome, ReferenceCluster, serve


class Watched(ReferenceCluster):
    """Looks at the whole cluster after every event."""

    def next_event(self) -> bool:
        before_s = self.clock_s
        more = super().next_event()
        assert self.clock_s >= before_s
        places = [request for replica in self.replicas for request in replica.running]
        queues = {id(replica.queue): replica.queue for replica in self.replicas}
        places += [request for queue in queues.values() for request in queue]
        out = [r for r in self.records if r.phase in ("finished", "rejected")]
        everywhere = [*places, *self.future, *out]
        assert sorted(r.id for r in everywhere) == list(range(len(self.records)))
        for replica in self.replicas:
            assert replica.free_blocks >= 0
            assert len(replica.running) <= replica.spec.clients
            assert len({request.client for request in replica.running}) == len(replica.running)
            for request in replica.running:
                assert request.blocks >= replica.blocks_for(request.computed)
            halves = [r for r in replica.running if not r.decoding and r.computed]
            assert len(halves) <= 1
        return more


def checked(case: ClusterCase) -> Outcome:
    outcome = serve(case.requests, case.spec, Watched)
    for record in outcome.records:
        if record.rejected:
            assert record.first_token_s is None
            continue
        assert record.emitted == record.output
        assert record.prefilled_tokens == record.prompt + record.recomputed_tokens
        assert record.preemptions > 0 or record.recomputed_tokens == 0
        assert record.admitted_s is not None
        assert record.first_token_s is not None
        assert record.finished_s is not None
        assert record.arrival_s <= record.admitted_s <= record.first_token_s <= record.finished_s
    for replica in range(len(case.spec.replicas)):
        stages = [stage for stage in outcome.stages if stage.replica == replica]
        for earlier, later in pairwise(stages):
            assert earlier.start_s + earlier.seconds <= later.start_s
    if case.spec.chunk_tokens:
        for stage in outcome.stages:
            tokens = len(stage.decodes) + sum(count for _, count in stage.chunks)
            assert tokens <= case.spec.chunk_tokens
    prefilled = sum(count for stage in outcome.stages for _, count in stage.chunks)
    assert prefilled == sum(record.prefilled_tokens for record in outcome.records)
    rounds = sum(len(stage.decodes) for stage in outcome.stages)
    served = [record for record in outcome.records if not record.rejected]
    prefills = sum(record.output for record in served) - rounds  # each ends with a token
    assert len(served) <= prefills <= len(served) + outcome.preemptions
    return outcome


@given(seed=st.integers(0, 2**32 - 1), dyadic=st.booleans())
@settings(max_examples=150)
def test_nothing_is_lost_and_nothing_exceeds_its_limit(seed: int, dyadic: bool) -> None:
    checked(random_case(np.random.default_rng(seed), dyadic=dyadic, moving=False))


@given(seed=st.integers(0, 2**32 - 1), extra=st.integers(0, 1))
@settings(max_examples=100)
def test_memory_of_the_largest_request_starves_nobody(seed: int, extra: int) -> None:
    case = random_case(np.random.default_rng(seed), dyadic=True, rejections=False, moving=False)
    block = case.spec.kv_block_tokens
    most = max(-(-(prompt + output) // block) for _, prompt, output in case.requests) + extra
    tight = tuple(replace(r, kv_capacity_tokens=most * block) for r in case.spec.replicas)
    outcome = checked(ClusterCase(case.requests, replace(case.spec, replicas=tight)))
    assert all(record.phase == "finished" for record in outcome.records)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_a_guard_of_the_whole_output_prevents_preemption(seed: int) -> None:
    case = random_case(np.random.default_rng(seed), dyadic=True, moving=False)
    assert checked(replace_spec(case, admission_guard="full")).preemptions == 0


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_a_guard_of_the_peak_prevents_preemption_where_prefill_comes_first(seed: int) -> None:
    case = random_case(np.random.default_rng(seed), dyadic=True, chunked=False, moving=False)
    assert checked(replace_spec(case, admission_guard="peak")).preemptions == 0


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_the_order_of_rows_matters_only_among_equal_arrivals(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, dyadic=True, moving=False)
    apart = [(i / 1024, p, o) for i, (_, p, o) in enumerate(case.requests)]
    order = rng.permutation(len(apart))
    ours, theirs = serve(apart, case.spec), serve([apart[i] for i in order], case.spec)
    assert [times(ours)[i] for i in order] == times(theirs)


def replace_spec(case: ClusterCase, **keys: Any) -> ClusterCase:
    return ClusterCase(case.requests, replace(case.spec, **keys))


def times(outcome: Outcome) -> list[tuple]:
    return [(r.admitted_s, r.first_token_s, r.finished_s) for r in outcome.records]
