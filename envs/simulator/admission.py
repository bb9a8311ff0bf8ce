"""Admission rules: which waiting requests a prefill stage gives to the idle clients.

One loop serves every rule: idle clients in index order, each asks the rule for its next request,
until the stage's token budget is spent. Ties are broken by request id.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.simulator.jit import kernel
from servegym.envs.simulator.order import count_below, select
from servegym.envs.simulator.physics import client_work, pick
from servegym.envs.simulator.state import NOBODY, WAITING, State

ADMISSION_RULES: Final = ("plan", "steal", "longest", "shortest", "fcfs", "aligned")
"""Names of the rules; a rule's id in kernels is its place here."""

PLAN: Final = 0
STEAL: Final = 1
LONGEST: Final = 2
SHORTEST: Final = 3
FCFS: Final = 4
ALIGNED: Final = 5

# The aligned rule's parameters, from the spike in DESIGN §4.
ALIGNED_PAD_WEIGHT: Final = 3
ALIGNED_TARGET_SIZE: Final = 2
ALIGNED_TAIL_PER_CLIENT: Final = 2


@kernel
def admits(state: State, e: int, r: int, rule: int) -> bool:
    """Return whether ``rule`` would admit at least one request now."""
    clients = state.client_request.shape[2]
    if state.waiting[e] == 0 or state.active[e, r] == clients:
        return False
    if rule != PLAN:
        return True
    for client in range(clients):
        if state.client_request[e, r, client] == NOBODY and _head(state, e, client) != NOBODY:
            return True
    return False


@kernel
def admit(state: State, e: int, r: int, rule: int, max_prefill_tokens: int) -> int:
    """Give waiting requests to idle clients under ``rule``; return how many were picked.

    ``max_prefill_tokens`` bounds the stage's prompt tokens (0: no bound) but never refuses the first.
    """
    admitted = 0
    tokens = 0
    target_count = _find_targets(state, e, r) if rule == ALIGNED else 0
    for client in range(state.client_request.shape[2]):
        if state.client_request[e, r, client] != NOBODY:
            continue
        if state.waiting[e] == 0:
            break
        request = _candidate(state, e, r, rule, client, target_count)
        if request == NOBODY:
            continue
        tokens += state.prompt_tokens[e, request]
        if admitted > 0 and 0 < max_prefill_tokens < tokens:
            break
        pick(state, e, r, client, request)
        state.picked[e, admitted] = request
        admitted += 1
    return admitted


@kernel
def _candidate(state: State, e: int, r: int, rule: int, client: int, target_count: int) -> int:
    """Return the request that ``rule`` gives to an idle client; some request must be waiting."""
    if rule == PLAN:
        return _head(state, e, client)
    if rule == STEAL:
        own = _head(state, e, client)
        return own if own != NOBODY else _stolen(state, e, r)
    if rule == LONGEST:
        return state.by_length[e, select(state.waiting_tree[e], state.waiting[e] - 1)]
    if rule == SHORTEST:
        return state.by_length[e, select(state.waiting_tree[e], 0)]
    if rule == FCFS:
        return _first(state, e)
    return _aligned(state, e, r, target_count)


@kernel
def _head(state: State, e: int, client: int) -> int:
    """Return the first request still waiting in a client's planned queue."""
    request = state.queue_head[e, client]
    while request != NOBODY and state.phase[e, request] > WAITING:
        request = state.plan_next[e, request]
    state.queue_head[e, client] = request
    if request == NOBODY:
        state.queue_tail[e, client] = NOBODY
    return request


@kernel
def _first(state: State, e: int) -> int:
    """Return the earliest request that waits."""
    request = state.first_waiting[e]
    while state.phase[e, request] != WAITING:
        request += 1
    state.first_waiting[e] = request
    return request


@kernel
def _stolen(state: State, e: int, r: int) -> int:
    """Return the longest request in the queue of the client with most work (paper, Algorithm 1)."""
    victim = NOBODY
    most = -1
    for client in range(state.queue_head.shape[1]):
        work = client_work(state, e, r, client)
        if work > most and _head(state, e, client) != NOBODY:
            victim, most = client, work
    best = _head(state, e, victim)
    request = state.plan_next[e, best]
    while request != NOBODY:
        longer = state.expected_rounds[e, request] > state.expected_rounds[e, best]
        if longer and state.phase[e, request] == WAITING:
            best = request
        request = state.plan_next[e, request]
    return best


@kernel
def _find_targets(state: State, e: int, r: int) -> int:
    """Write the rounds from now in which several running requests finish, soonest first.

    Returns their number. DESIGN §4: "the next round in which at least m running requests finish".
    """
    count = 0
    size = 0
    for place in range(state.active[e, r] - 1, -1, -1):
        due = state.finish_round[e, r, place]
        size += 1
        if place == 0 or state.finish_round[e, r, place - 1] != due:
            if size >= ALIGNED_TARGET_SIZE:
                state.targets[e, count] = due - state.round[e, r]
                count += 1
            size = 0
    return count


@kernel
def _aligned(state: State, e: int, r: int, target_count: int) -> int:
    """Return the waiting request with the best score L − α · pad (DESIGN §4).

    L is its expected rounds, pad the rounds from its finish to the next target at or after it (0 past
    the last target, where nothing is left to align with). Candidates are the longer half of those
    waiting; the last two per client go longest first. Between two targets the score grows with L, so
    only the longest request that finishes by each target can win: one tree search a target.
    """
    waiting = state.waiting[e]
    longest = state.by_length[e, select(state.waiting_tree[e], waiting - 1)]
    if waiting <= ALIGNED_TAIL_PER_CLIENT * state.client_request.shape[2]:
        return longest
    shortest_allowed = waiting // 2
    best = longest
    best_score = np.int64(-(1 << 62))
    if target_count == 0:
        return longest
    for k in range(target_count - 1, -1, -1):
        target = state.targets[e, k]
        if target < best_score:
            break  # a score never exceeds its target
        place = count_below(state.waiting_tree[e], _rank_above(state, e, target)) - 1
        if place < shortest_allowed:
            break
        request = state.by_length[e, select(state.waiting_tree[e], place)]
        rounds = state.expected_rounds[e, request]
        score = rounds - ALIGNED_PAD_WEIGHT * (target - rounds)
        if score > best_score:
            best, best_score = request, score
    return best


@kernel
def _rank_above(state: State, e: int, rounds: int) -> int:
    """Return the first rank whose request expects more than ``rounds`` rounds."""
    low, high = 0, state.requests[e]
    while low < high:
        middle = (low + high) // 2
        if state.expected_rounds[e, state.by_length[e, middle]] <= rounds:
            low = middle + 1
        else:
            high = middle
    return low
