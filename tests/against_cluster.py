"""One random cluster case in the compiled simulator and in the slow reference, request by request."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from servegym.baselines.rules.compiled import play_loaded
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.baselines.rules.triggers import EAGER
from servegym.envs import make_requests
from servegym.envs.process.metrics import EpisodeLog, records
from servegym.envs.simulator.loading import router_luck
from servegym.envs.simulator.routing import random_replica
from servegym.envs.simulator.state import State
from servegym.envs.task.cluster import ClusterConfig, LinkConfig, ReplicaConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, load_case, lower, make_task_state
from servegym.envs.task.sections import InformationConfig, ProcessConfig
from servegym.envs.task.slo import SloConfig
from tests.random_clusters import ClusterCase
from tests.reference_cluster import (
    ClusterSpec,
    Outcome,
    ReferenceCluster,
    ReferenceRequest,
    serve,
)
from tests.reference_orders import IntervalCluster, OrderedCluster
from tests.reference_planned import PLANNED_RULES, PlannedCluster
from tests.reference_sglang import SglangCluster

FIRST_COME = TriggerPolicy("fcfs", EAGER)
CHUNKED = TriggerPolicy("fcfs", EAGER, mixed=True)

CHANGING_RULES = ("steal", "aligned")
"""As rounds go by they may have somebody else go first, who fits into memory: they are asked at each."""

TIE = 1e-12
"""By how much, relatively, moves of a case take longer or shorter where it is compared once more."""


def cluster_task(spec: ClusterSpec) -> TaskConfig:
    """The task of a reference's settings."""
    cluster = ClusterConfig(
        replicas=len(spec.replicas),
        clients=spec.replicas[0].clients,
        kv_block_tokens=spec.kv_block_tokens,
        watermark=spec.watermark,
        preempt=spec.preempt,
        admission_guard=spec.admission_guard,
        conservativeness=spec.conservativeness,
        patience_s=spec.patience_s if spec.patience_s < np.inf else 0.0,
        shortest_by=spec.shortest_by,
        level_tokens=spec.level_tokens,
        chunk_tokens=spec.chunk_tokens,
        mixed=spec.mixed,
        max_prefill_tokens=spec.max_prefill_tokens,
        router=spec.router,
        staleness_s=spec.staleness_s,
        replica=tuple(
            ReplicaConfig(part.clients, part.kv_capacity_tokens, part.speed, part.role)
            for part in spec.replicas
        ),
        steal_order=spec.steal_takes,
        steal_share=spec.steal_share,
        steal_delay_s=spec.steal_delay_s,
        migrate=spec.migrate,
        steal_period_s=spec.steal_period_s,
        freeness_steps=spec.freeness_steps,
        shed_at=spec.shed_s if spec.shed_s < np.inf else 0.0,  # of one second, see below
        move=spec.move_by,
        kv_bytes_per_token=spec.kv_bytes_per_token,
        link=LinkConfig(spec.latency_s, min(spec.bytes_per_s, 1e18)),
        evict=spec.preempt_to,
        host_link=LinkConfig(spec.host_latency_s, min(spec.host_bytes_per_s, 1e18)),
    )
    process = ProcessConfig(steals=spec.steals)
    slo = SloConfig(ttft_s=1.0, tpot_s=0.5)  # so that gaps between tokens are noted
    return TaskConfig("cluster", cluster=cluster, cost=spec.costs, process=process, slo=slo)


def play_fast(
    case: ClusterCase, rule: str = "fcfs", ends: Sequence[int] = ()
) -> tuple[EpisodeLog, State, list[int], float]:
    """Serve in the compiled simulator; return records, state, the row of each request and the bound.

    With ``ends`` (by row) outputs are not known, but an end of the interval where each lies.
    """
    task = cluster_task(case.spec)
    if rule in CHANGING_RULES and any(part.kv_capacity_tokens for part in case.spec.replicas):
        task = replace(task, process=replace(task.process, decisions="rounds"))
    arrivals, prompts, outputs = (np.array(column) for column in zip(*case.requests, strict=True))
    rows = np.argsort(arrivals, kind="stable").tolist()
    requests = make_requests(prompts, outputs, arrivals)
    if ends:
        requests = make_requests(prompts, outputs, arrivals, ends, np.zeros(len(ends)))
        task = replace(task, information=InformationConfig(output_lengths="predicted"))
    machine = lower(task)
    bounded = bound_case(machine, requests)
    state = make_task_state(task, 1, len(requests))
    load_case(task, state, 0, bounded)
    mixed = case.spec.chunk_tokens > 0 and case.spec.admission_guard != "sglang"
    policy = CHUNKED if mixed else FIRST_COME
    if rule != "fcfs":
        policy = TriggerPolicy(rule, EAGER, mixed=mixed)
    play_loaded(state, machine.costs, task, policy)
    return records(state, 0), state, rows, bounded.bound.seconds


def serve_case(case: ClusterCase, rule: str = "fcfs", ends: Sequence[int] = ()) -> Outcome:
    """Serve in the slow reference."""
    if ends:
        interval = IntervalCluster(case.requests, case.spec)
        interval.ends = ends
        return interval.run()
    reference = SglangCluster if case.spec.admission_guard == "sglang" else ReferenceCluster
    if rule == "shortest":
        reference = OrderedCluster
    if rule in PLANNED_RULES:
        planned = PlannedCluster(case.requests, case.spec)
        planned.rule = rule
        return planned.run()
    return serve(case.requests, case.spec, reference)


def with_draws(case: ClusterCase) -> ClusterCase:
    """The same with the draws of the compiled simulator's random router."""
    count = len(case.spec.replicas)
    arrivals, prompts, outputs = (np.array(column) for column in zip(*case.requests, strict=True))
    luck = router_luck(make_requests(prompts, outputs, arrivals))
    draws = [random_replica(luck, turn, count) for turn in range(len(case.requests))]
    return ClusterCase(case.requests, ClusterSpec(**{**vars(case.spec), "draws": draws}))


def compare_gaps(ours: float, theirs: ReferenceRequest) -> None:
    """The worst gap between two tokens; a difference of two times of the clock is only as exact as these."""
    if theirs.worst_gap_s is None:
        assert np.isnan(ours), theirs.id
        return
    assert theirs.finished_s is not None
    off = abs(ours - theirs.worst_gap_s)
    assert off <= 1e-12 + 1e-9 * theirs.finished_s, (theirs.id, ours, theirs.worst_gap_s)


def compare_or_nearly(
    case: ClusterCase, rule: str = "fcfs", ends: Sequence[int] = ()
) -> tuple[Outcome, bool]:
    """Serve in both; AssertionError where they differ, also if the reference's moves take 1e-12 more or less.

    The compiled simulator adds the rounds of a run in closed form, the reference one by one: the sums differ
    in their last bits. Where a move ends within such a rounding of a round's end, neither tells which comes
    first, and all that follows may differ. Returns whether the case is such a tie. Not for cases whose
    seconds are multiples of powers of two: there ties are ties for both.
    """
    try:
        return compare_cluster(case, rule, ends), False
    except AssertionError as error:
        for factor in (1.0 - TIE, 1.0 + TIE):
            spec = case.spec
            nearly = replace(
                spec,
                steal_delay_s=spec.steal_delay_s * factor,
                latency_s=spec.latency_s * factor,
                bytes_per_s=spec.bytes_per_s / factor,
                host_latency_s=spec.host_latency_s * factor,
                host_bytes_per_s=spec.host_bytes_per_s / factor,
            )
            with suppress(AssertionError):
                return compare_cluster(case, rule, ends, ClusterCase(case.requests, nearly)), True
        raise error


def compare_cluster(
    case: ClusterCase,
    rule: str = "fcfs",
    ends: Sequence[int] = (),
    reference: ClusterCase | None = None,
) -> Outcome:
    """Serve in both; AssertionError where they differ. The reference serves ``reference``, if given."""
    slow = serve_case(with_draws(reference or case), rule, ends)
    case = with_draws(case)
    log, state, rows, bound_s = play_fast(case, rule, ends)
    for i, row in enumerate(rows):
        theirs = slow.records[row]
        assert bool(log.rejected[i]) == theirs.rejected, row
        assert int(log.preemptions[i]) == theirs.preemptions, (row, "preemptions")
        assert int(log.recomputed_tokens[i]) == theirs.recomputed_tokens, (row, "recomputed")
        assert int(log.moves[i]) == theirs.moves, (row, "moves")
        if theirs.rejected:
            continue
        assert int(log.replica[i]) == theirs.replica, (row, "replica")
        assert int(log.client[i]) == theirs.client, (row, "client")
        for name in ("admitted_s", "first_token_s", "finished_s"):
            ours, other = float(getattr(log, name)[i]), getattr(theirs, name)
            assert abs(ours - other) <= 1e-12 + 1e-9 * abs(other), (row, name, ours, other)
        compare_gaps(float(log.worst_gap_s[i]), theirs)
    replicas = state.replicas[0]
    for r in range(len(case.spec.replicas)):
        stages = [stage for stage in slow.stages if stage.replica == r]
        rounds = sum(bool(stage.decodes) for stage in stages)
        assert int(replicas[r].rounds) == rounds, (r, "rounds")
        assert int(replicas[r].prefill_stages) == sum(s.kind == "prefill" for s in stages)
        assert int(replicas[r].mixed_stages) == sum(s.kind == "mixed" for s in stages)
        for name in ("used_blocks", "cached_tokens", "coming", "coming_blocks"):
            assert not replicas[r][name], (r, name)
        for name in ("incoming", "incoming_blocks", "leaving"):
            assert not replicas[r][name], (r, name)
        assert not state.residues[0, r].any()
    assert not state.episodes[0].transfers
    done = [record for record in slow.records if not record.rejected]
    if done and len(done) == len(slow.records):
        assert bound_s <= slow.makespan_s * (1 + 1e-9), (bound_s, slow.makespan_s)
    return slow
