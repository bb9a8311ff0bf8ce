"""Routers: to which replica a request goes when it arrives, for good.

A router sees a replica as of its last round boundary; what the stage under way has taken, clients,
memory and requests from the queue, is taken. With ``staleness_s`` it looks at all replicas at
once, keeps what it has seen for so long, and adds what it sends meanwhile. A replica whose whole memory
a request does not fit into is passed over. Ties go to the lowest replica.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.memory import blocks_of_rounds
from servegym.envs.simulator.queues import (
    blocks_of,
    queue_of,
    rounds_ahead,
    tokens_to_prefill,
)
from servegym.envs.simulator.stages import rounds_until
from servegym.envs.simulator.state import DECODE_RUN, IDLE, MIXED, NOBODY, State
from servegym.envs.vocabulary import (
    ROLE_DECODE,
    ROLE_PREFILL,
    ROUTE_DYNAMO,
    ROUTE_LEAST_TOKENS,
    ROUTE_LEAST_WAITING,
    ROUTE_LLUMNIX,
    ROUTE_PLAN,
    ROUTE_RANDOM,
    ROUTE_ROUND_ROBIN,
    ROUTE_VLLM_DP,
)


@shared_kernel
def route(state: State, costs: CostTables, e: int, i: int, whole_blocks: int) -> int:
    """Return the replica to which request ``i`` goes; it holds up to ``whole_blocks``.

    Some replica has as many, if the memory of any is limited; else 0 is passed.
    """
    episode, router = state.episodes[e], state.cluster.router
    replicas = state.replicas.shape[1]
    turn = episode.router_turns
    episode.router_turns += 1
    if router in (ROUTE_ROUND_ROBIN, ROUTE_RANDOM):
        r = turn % replicas
        if router == ROUTE_RANDOM:
            r = random_replica(episode.random_bits, turn, replicas)
        while not _takes(state, r, whole_blocks):
            r = (r + 1) % replicas
        return r
    if router == ROUTE_PLAN and state.requests[e, i].plan_client != NOBODY:
        r = np.int64(state.requests[e, i].plan_replica)
        if _takes(state, r, whole_blocks):
            return r
    staleness_s = state.cluster.staleness_s
    if episode.now_s - episode.looked_s >= staleness_s:
        episode.looked_s = episode.now_s
        for r in range(replicas):
            _remember(state, e, r, look(state, costs, e, r))
    best = NOBODY
    least = 0.0
    for r in range(replicas):
        if _takes(state, r, whole_blocks):
            cost = _cost(state, e, r, router)
            if best == NOBODY or cost < least:
                best, least = r, cost
    load = state.loads[e, best]
    load.waiting += 1
    load.tokens += tokens_to_prefill(state, e, i) + rounds_ahead(state, e, i)
    load.wanted_blocks += blocks_of(state, tokens_to_prefill(state, e, i))
    return best


@kernel
def _takes(state: State, r: int, whole_blocks: int) -> bool:
    """Return whether replica ``r`` takes an arriving request that holds up to ``whole_blocks``."""
    machine = state.machines[r]
    return machine.blocks >= whole_blocks and machine.role != ROLE_DECODE


@kernel
def largest_servable(state: State) -> int:
    """Return the most blocks that a request may hold: of a replica for its prefill, and for its rounds."""
    prefill, decode = 0, 0
    for r in range(state.machines.size):
        machine = state.machines[r]
        if machine.role != ROLE_DECODE:
            prefill = max(prefill, machine.blocks)
        if machine.role != ROLE_PREFILL:
            decode = max(decode, machine.blocks)
    return min(prefill, decode)


@kernel
def _cost(state: State, e: int, r: int, router: int) -> float:
    """Return what a router minimises over replicas; see ``ROUTERS``."""
    load = state.loads[e, r]
    if router == ROUTE_LEAST_WAITING:
        return float(load.waiting)
    if router == ROUTE_LEAST_TOKENS:
        return float(load.tokens)
    if router == ROUTE_VLLM_DP:
        return 4.0 * load.waiting + load.running
    if router == ROUTE_LLUMNIX:  # minus the decode rounds until its memory is full
        requests = load.waiting + load.running
        free = float(state.machines[r].blocks - load.used_blocks - load.wanted_blocks)
        return -free / requests if requests > 0 else -np.inf
    if router == ROUTE_DYNAMO:
        return float(load.wanted_blocks + load.unfinished_blocks + load.used_blocks)
    return float(load.waiting + load.running)


class Load(NamedTuple):
    """A replica as a router sees it, and as the observation of another replica does; see ``LOAD``."""

    waiting: int
    running: int
    tokens: int
    used_blocks: int
    wanted_blocks: int
    unfinished_blocks: int
    rounds: int  # of its run of decode rounds, the one under way included


@kernel
def _remember(state: State, e: int, r: int, seen: Load) -> None:
    load = state.loads[e, r]
    load.waiting = seen.waiting
    load.running = seen.running
    load.tokens = seen.tokens
    load.used_blocks = seen.used_blocks
    load.wanted_blocks = seen.wanted_blocks
    load.unfinished_blocks = seen.unfinished_blocks


@kernel
def look(state: State, costs: CostTables, e: int, r: int) -> Load:
    """Return what others see of a replica; the queue is its own or the pool."""
    replica, queue = state.replicas[e, r], state.queues[e, queue_of(state, r)]
    rounds = 0  # that have ended before now; the one under way has taken its blocks
    run, begun = 0, int(replica.stage == MIXED)
    if replica.stage == DECODE_RUN:
        run = rounds_until(state, costs, e, r, state.episodes[e].now_s)
        begun = run
        rounds = run - 1
    tokens = queue.tokens + queue.rounds + queue.unseen_work
    tokens += replica.due_sum - replica.active * (replica.rounds + rounds)
    tokens += replica.stage_tokens
    unfinished = 0
    done = replica.continued_from  # of the first prefill of the stage, others begin with it
    for i in state.picked[e, r, : replica.emitting]:
        unfinished += blocks_of(state, tokens_to_prefill(state, e, i) - done)
        tokens += rounds_ahead(state, e, i)
        done = 0
    if replica.partial != NOBODY:
        i = replica.partial
        if replica.stage in (IDLE, DECODE_RUN):  # which does not go on with it
            done = np.int64(state.requests[e, i].computed)
        unfinished += blocks_of(state, tokens_to_prefill(state, e, i) - done)
        tokens += tokens_to_prefill(state, e, i) - state.requests[e, i].computed
        tokens += rounds_ahead(state, e, i)
    return Load(
        queue.waiting + queue.unseen,
        state.machines[r].clients - replica.idle,
        tokens,
        replica.used_blocks + blocks_of_rounds(state, e, r, begun),
        queue.blocks + queue.unseen_blocks,
        unfinished,
        run,
    )


@kernel
def random_replica(bits: int, turn: int, replicas: int) -> int:
    """Return a replica that looks random (the finalizer of splitmix64)."""
    mixed = np.uint64(bits + turn) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)) % replicas
