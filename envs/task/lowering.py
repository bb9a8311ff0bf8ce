"""The one door from a task to what kernels read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.bounds.cluster import cluster_bound
from servegym.envs.machine.costs import (
    CostModel,
    CostTables,
    EngineOverhead,
    StageCosts,
    checked_tables,
    slowed,
)
from servegym.envs.machine.layout import Layout
from servegym.envs.process.actions import Settings
from servegym.envs.process.blocks import features_of
from servegym.envs.process.reward import write_credits
from servegym.envs.simulator.loading import load
from servegym.envs.simulator.state import State, make_state
from servegym.envs.task.cases import Case
from servegym.envs.task.cluster import FullReplica
from servegym.envs.task.config import TaskConfig
from servegym.envs.vocabulary import (
    ADMISSION_GUARDS,
    ADMISSION_RULES,
    MIGRATIONS,
    MOVES,
    OBSERVATION_BLOCKS,
    ORDERS,
    REWARDS,
    ROLES,
    ROUTERS,
    STEAL_ORDERS,
    STEALS,
    VICTIMS,
)
from servegym.envs.workload.cells import is_file
from servegym.envs.workload.comparison import compared_tokens, expected_at_end
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import Requests

_LONGEST_PASS: Final = 65_536
"""Tokens of a mixed stage up to which its decode line is tabulated; beyond, it goes on straight."""

_FIRST_RATIO: Final = 0.7
"""Share of the outputs to come for which SGLang keeps memory free at first."""


class Machine(NamedTuple):
    """A task as kernels read it: the machine that serves, and what may be decided on it.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> lower(TASKS["servegym/Tiny-v0"]).clients
    3
    """

    clients: int  # of all replicas
    costs: CostTables
    settings: Settings
    layout: Layout
    features: tuple[str, ...]  # what each entry of the observation means


def lower(task: TaskConfig) -> Machine:
    """Return what kernels read of a task.

    Raises
    ------
    ServegymError
        If the task's cost model is a user's own and its tables are malformed.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> machine = lower(TASKS["servegym/Tiny-v0"])
    >>> machine.costs.decode_base_s.shape, machine.settings.every_round
    ((1, 4), False)
    """
    cluster, process, admissions = task.cluster, task.process, task.admissions
    layout = lay_out(task)
    rules, mixed_rules = (
        [ADMISSION_RULES.index(action.rule) for action in admissions if action.mixed == mixed]
        for mixed in (False, True)
    )
    most_running, reserve_blocks = _limits(task, layout)
    settings = Settings(
        rules=np.array(rules, np.int64),
        mixed_rules=np.array(mixed_rules, np.int64),
        rule_ends=_rule_ends(rules, mixed_rules),
        most_running=most_running,
        reserve_blocks=reserve_blocks,
        pads=np.array([np.nan if action.pad is None else action.pad for action in admissions]),
        limits=any(action.cap < 1 or action.reserve > 0 for action in admissions),
        steals=np.array([STEALS.index(kind) for kind in process.steals], np.int64),
        every_round=process.decisions == "rounds",
        observes=sum(1 << OBSERVATION_BLOCKS.index(block) for block in process.observe),
        max_prefill_tokens=cluster.max_prefill_tokens,
        reward=REWARDS.index(process.reward),
        max_decisions=process.max_decisions,
        max_seconds=process.max_seconds,
    )
    features = features_of(process.observe)
    return Machine(sum(layout.clients), _tabulate(task, layout), settings, layout, features)


def _rule_ends(rules: Sequence[int], mixed_rules: Sequence[int]) -> NDArray[np.int64]:
    """Return of each admission the first place behind it of another rule or kind of stage."""
    kinds = [(0, rule) for rule in rules] + [(1, rule) for rule in mixed_rules]
    ends = np.full(len(kinds), len(kinds), np.int64)
    for k in range(len(kinds) - 2, -1, -1):
        ends[k] = ends[k + 1] if kinds[k + 1] == kinds[k] else k + 1
    return ends


def _limits(task: TaskConfig, layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many clients and free blocks each admission lets run and leaves, at each replica."""
    caps = np.array([action.cap for action in task.admissions])
    shares = np.array([action.reserve for action in task.admissions])
    most_running = np.ceil(caps * np.array(layout.clients)[:, None]).astype(np.int64)
    reserve_blocks = np.zeros(most_running.shape, np.int64)
    for replica in range(len(layout.clients)):
        memory = layout.memory_blocks(replica)
        if memory is not None:
            blocks, watermark = memory
            reserve_blocks[replica] = np.maximum((shares * blocks).astype(np.int64), watermark)
    return most_running, reserve_blocks


def lay_out(task: TaskConfig) -> Layout:
    """Return the replicas of a task as kernels and planners read them.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> lay_out(TASKS["servegym/Tiny-v0"]).clients
    (3,)
    """
    cluster, steals = task.cluster, task.process.steals
    replicas = cluster.replica_tables()
    between, host = cluster.link_numbers()
    roles = tuple(ROLES.index(replica.role) for replica in replicas)
    return Layout(
        clients=tuple(replica.clients for replica in replicas),
        kv_capacity_tokens=tuple(replica.kv_capacity_tokens for replica in replicas),
        pool=cluster.router == "pool",
        block_tokens=cluster.kv_block_tokens,
        watermark=cluster.watermark,
        chunk_tokens=cluster.chunk_tokens,
        router=list(ROUTERS).index(cluster.router),
        staleness_s=cluster.staleness_s,
        victim=list(VICTIMS).index(cluster.preempt),
        guard=list(ADMISSION_GUARDS).index(cluster.admission_guard),
        first_ratio=min(_FIRST_RATIO * cluster.conservativeness, 1.0),
        patience_s=cluster.patience_s or np.inf,
        shortest_by=list(ORDERS).index(cluster.shortest_by),
        level_tokens=cluster.level_tokens,
        one_pass=cluster.mixed == "one-pass",
        roles=roles,
        steals_waiting="waiting" in steals,
        steals_running="running" in steals,
        steal_order=list(STEAL_ORDERS).index(cluster.steal_order),
        steals_half=cluster.steal_share == "half",
        migrate=list(MIGRATIONS).index(cluster.migrate),
        steal_period_s=cluster.steal_period_s,
        freeness_steps=cluster.freeness_steps,
        shed_at=cluster.shed_at,
        steal_delay_s=cluster.steal_delay_s,
        move=list(MOVES).index(cluster.move),
        copy_latency_s=between.latency_s,
        copy_token_s=cluster.kv_bytes_per_token / between.bytes_per_s,
        evicts_to_host=cluster.evict == "host" and any(r.kv_capacity_tokens for r in replicas),
        host_latency_s=host.latency_s,
        host_token_s=cluster.kv_bytes_per_token / host.bytes_per_s,
        round_s=_full_rounds(task.cost, replicas),
        slo_ttft_s=task.slo.limits[0],
        slo_tpot_s=task.slo.limits[1],
        class_limits=bool(task.slo.classes),
        counts_slo=_counts_slo(task),
        keeps_gaps=_keeps_gaps(task, replicas),
    )


def _counts_slo(task: TaskConfig) -> bool:
    """Return whether a reward or an observation asks how many requests have met ``[slo]``."""
    return task.process.reward == "goodput" or "latency" in task.process.observe


def _keeps_gaps(task: TaskConfig, replicas: tuple[FullReplica, ...]) -> bool:
    """Return whether gaps between tokens are of interest: somebody waits for tokens, or loses memory."""
    workload = task.workload
    arriving = workload.arrival_rate_per_s > 0 or workload.arrivals is not None
    over_time = arriving or is_file(workload.source)
    limited = any(replica.kv_capacity_tokens > 0 for replica in replicas)
    return bool(task.slo) or over_time or limited


def _full_rounds(cost: CostModel, replicas: tuple[FullReplica, ...]) -> tuple[float, ...]:
    """Return the seconds of each replica's round with all its clients active, without their cache."""
    if len(replicas) == 1:
        return ()  # nobody to be faster than
    with warnings.catch_warnings():  # that a table ends is said where the costs are tabulated
        warnings.simplefilter("ignore")
        base_s = _tables(cost, max(replica.clients for replica in replicas)).decode_base_s[0]
    return tuple(float(base_s[replica.clients]) / replica.speed for replica in replicas)


def _tabulate(task: TaskConfig, layout: Layout) -> CostTables:
    """Return the costs of all replicas, those of a faster one divided by its speed."""
    clients = max(layout.clients)
    replicas = task.cluster.replica_tables()
    tables = _tables(task.cost, clients)
    passes = np.zeros((1, 0))
    if layout.chunk_tokens > 0:
        cost = task.cost
        if isinstance(cost, StageCosts):  # overhead is per request, not per token of a pass
            cost = replace(cost, engine_overhead=EngineOverhead())
        with warnings.catch_warnings():  # a pass has more tokens than a table has clients
            warnings.simplefilter("ignore")
            passes = _tables(cost, min(max(layout.chunk_tokens, 2), _LONGEST_PASS)).decode_base_s
    tables = replace(tables, pass_base_s=passes)
    speeds = np.array([replica.speed for replica in replicas])
    if len(replicas) == 1 and speeds[0] == 1.0:
        return tables
    return slowed(tables, 1.0 / speeds)


def _tables(cost: CostModel, clients: int) -> CostTables:
    tables = cost.tables(clients)
    return tables if isinstance(cost, StageCosts) else checked_tables(tables, clients)


def bound_case(machine: Machine, requests: Requests) -> Case:
    """Return the case of given requests: with the lower bound on their makespan on a machine."""
    budget = machine.settings.max_prefill_tokens
    return Case(requests, cluster_bound(requests, machine.layout, machine.costs, budget))


def make_task_state(task: TaskConfig, environments: int, requests: int) -> State:
    """Allocate the state of ``environments`` episodes of ``task``, of up to ``requests`` each."""
    known = task.information.output_lengths == "known"
    return make_state(environments, requests, lay_out(task), lengths_known=known)


def load_case(task: TaskConfig, state: State, e: int, case: Case, plan: Plan | None = None) -> None:
    """Put a case of ``task`` into row ``e`` of the state, at its start."""
    information = task.information
    compared = None
    if information.output_lengths != "known" and information.compare_by != "mean":
        by, quantile = information.compare_by, information.quantile
        compared = compared_tokens(case.requests, by, quantile, information.deviations) - 1
    requests = expected_at_end(case.requests, information.expect, information.interval)
    load(state, e, requests, plan, compared)
    if task.slo.classes:
        n, limits = len(requests), task.slo.limits_of(requests)
        state.limits[e, :n] = limits
        if task.cluster.shortest_by == "deadline":
            state.priority[e, :n] = requests.arrival_s + limits[:, 0]
    write_credits(state, e, case.requests, case.bound)
