"""Balancing replicas: how much of an imbalance a replica steals, and migration by free memory.

Rules are those of CLUSTER.md. ``freeness`` is that of Llumnix (Sun and others, OSDI 2024; code at commit
24220fb8): the decode steps that a replica's free memory lasts, in blocks a request.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.memory import emitted_tokens
from servegym.envs.simulator.moving import present
from servegym.envs.simulator.queues import first_waiting
from servegym.envs.simulator.routing import look
from servegym.envs.simulator.state import NOBODY, UNLIMITED_BLOCKS, State
from servegym.envs.vocabulary import MIGRATE_BY_FREENESS, MIGRATE_LONGEST


@kernel
def may_serve(state: State, r: int, s: int) -> bool:
    """Return whether replica ``r`` can serve whatever replica ``s`` can."""
    thief, victim = state.machines[r], state.machines[s]
    return r != s and thief.role == victim.role and thief.blocks >= victim.blocks


@kernel
def share_of(state: State, e: int, s: int, r: int) -> int:
    """Return how many of the requests that wait at ``s`` replica ``r`` may steal by the cluster's share."""
    theirs, own = state.queues[e, s], state.queues[e, r]
    more = theirs.waiting + theirs.unseen
    if state.cluster.steals_half:
        more -= own.waiting + own.unseen + state.replicas[e, r].coming
        more = (more + 1) // 2
    return more


@kernel
def source_of_running(state: State, costs: CostTables, e: int, r: int) -> int:
    """Return the replica that ``r`` may steal a running request from, or NOBODY; it may be too early."""
    since_s = state.episodes[e].now_s - state.replicas[e, r].stole_s
    if 0.0 < since_s < state.cluster.steal_period_s:
        return NOBODY
    if state.cluster.migrate == MIGRATE_BY_FREENESS:
        return _paired_source(state, costs, e, r)
    best, most = NOBODY, present(state, e, r) + 1
    for s in range(state.replicas.shape[1]):
        staying = state.replicas[e, s].active - state.replicas[e, s].leaving
        if staying > most and may_serve(state, r, s):
            best, most = s, staying
    return best


@kernel
def one_to_move(state: State, e: int, s: int) -> int:
    """Return which of those that stay at ``s``, of whom there is one, moves by the cluster's rule."""
    if state.cluster.migrate != MIGRATE_LONGEST:
        return _fewest_tokens(state, e, s)
    i, due = NOBODY, 0
    for place in range(state.replicas[e, s].active):
        finish = state.expected[e, s, place]
        if i != NOBODY and finish.due < due:
            break
        if not state.requests[e, finish.request].leaving and (i == NOBODY or finish.request < i):
            i, due = finish.request, finish.due
    return i


@kernel
def _fewest_tokens(state: State, e: int, s: int) -> int:
    """Return who holds the fewest tokens; of equals the first to have come. All grow by one a round."""
    best, fewest = NOBODY, 0
    for place in range(state.replicas[e, s].active):
        i = np.int64(state.finishes[e, s, place].request)
        if state.requests[e, i].leaving:
            continue
        tokens = np.int64(state.requests[e, i].prompt_tokens) + emitted_tokens(state, e, s, i)
        if best == NOBODY or tokens < fewest or (tokens == fewest and i < best):
            best, fewest = i, tokens
    return best


# ---- free memory ----------------------------------------------------------------------------


@kernel
def _freeness(state: State, costs: CostTables, e: int, r: int) -> float:
    """Return the free blocks of a replica, less what waiting prompts want, per request, as routers see it."""
    if state.machines[r].blocks == UNLIMITED_BLOCKS:
        return np.inf
    load = look(state, costs, e, r)
    requests = load.waiting + load.running
    if requests == 0:
        return np.inf
    return float(state.machines[r].blocks - load.used_blocks - load.wanted_blocks) / requests


@kernel
def _has_preempted(state: State, e: int, r: int) -> bool:
    """Return whether the first in a replica's queue has been preempted."""
    queue = state.queues[e, r]
    if queue.waiting + queue.unseen == 0:
        return False
    return state.requests[e, first_waiting(state, e, r)].preemptions > 0


@shared_kernel
def _paired_source(state: State, costs: CostTables, e: int, r: int) -> int:
    """Return the replica that is as short of memory, by rank, as ``r`` has ample, or NOBODY.

    Memory is short below the cluster's steps and where somebody preempted is first in line, ample above
    them. One request at a time leaves a replica and comes to one.
    """
    steps, replicas = state.cluster.freeness_steps, state.replicas.shape[1]
    own = _freeness(state, costs, e, r)
    if not own > steps or state.replicas[e, r].incoming > 0 or _has_preempted(state, e, r):
        return NOBODY
    rank = 0
    for s in range(replicas):
        if s != r and not _has_preempted(state, e, s):
            free = _freeness(state, costs, e, s)
            rank += int(free > steps and (free > own or (free == own and s < r)))
    # The one with ``rank`` others before it: the next in order, so many times and once more.
    source, least = NOBODY, -np.inf
    for _ in range(rank + 1):
        after, before = least, source
        source, least = NOBODY, np.inf
        for s in range(replicas):
            free = _freeness(state, costs, e, s)
            if not (free < steps or _has_preempted(state, e, s)):
                continue
            behind = free > after or (free == after and s > before)
            if behind and (source == NOBODY or free < least):
                source, least = s, free
        if source == NOBODY:
            return NOBODY
    stays = state.replicas[e, source].active > 0 and state.replicas[e, source].leaving == 0
    return source if stays and may_serve(state, r, source) else NOBODY
