"""Admission rules: which waiting requests a prefill stage gives to the idle clients.

One loop serves every rule: idle clients in index order, each asks the rule for its next request,
until one does not fit into the stage's token budget (a later one that would is not looked for).
Equal lengths: longest first takes the lower id, shortest first the higher, stealing the earlier in
the victim's queue.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import kernel
from servegym.envs.simulator.order import count_below, select
from servegym.envs.simulator.stages import client_work, pick, sort_idle
from servegym.envs.simulator.state import NOBODY, WAITING, State

ADMISSION_RULES: Final = ("plan", "steal", "longest", "shortest", "fcfs", "aligned")
"""Names of the rules; a rule's id in kernels is its place here."""

PLAN: Final = 0
STEAL: Final = 1
LONGEST: Final = 2
SHORTEST: Final = 3
FCFS: Final = 4
ALIGNED: Final = 5

# The aligned rule's parameters, from a throw-away study; results hardly depend on them.
ALIGNED_PAD_WEIGHT: Final = 3
ALIGNED_TARGET_SIZE: Final = 2
ALIGNED_TAIL_PER_CLIENT: Final = 2

_UNKNOWN: Final = -1
"""No number: of clients to steal from before a stage's first theft, of rounds behind the last target."""


@kernel
def admits(state: State, e: int, r: int, rule: int) -> bool:
    """Return whether ``rule`` would admit at least one request now."""
    clients = state.clients.shape[2]
    if state.episodes[e].waiting == 0 or state.replicas[e, r].active == clients:
        return False
    if rule != PLAN:
        return True
    for client in state.idle[e, r, : clients - state.replicas[e, r].active]:
        if _head(state, e, r, client) != NOBODY:
            return True
    return False


@kernel
def admit(state: State, e: int, r: int, rule: int, max_prefill_tokens: int) -> int:
    """Give waiting requests to idle clients under ``rule``; return how many were picked.

    ``max_prefill_tokens`` bounds the stage's prompt tokens (0: no bound) but never refuses the first.
    """
    admitted = 0
    tokens = 0
    sort_idle(state, e, r)
    if rule == ALIGNED:
        _forget_targets(state, e)
    elif rule == STEAL:
        state.keys[e, -1] = _UNKNOWN
    idle = state.idle[e, r, : state.clients.shape[2] - state.replicas[e, r].active]
    left_idle = 0
    full = False
    for client in idle:
        i = NOBODY
        if not full and state.episodes[e].waiting > 0:
            i = _candidate(state, e, r, rule, client)
        if i != NOBODY:
            tokens += state.requests[e, i].prompt_tokens
            full = admitted > 0 and 0 < max_prefill_tokens < tokens
        if i == NOBODY or full:
            idle[left_idle] = client
            left_idle += 1
            continue
        pick(state, e, r, client, i)
        state.picked[e, admitted] = i
        admitted += 1
    return admitted


@kernel
def _candidate(state: State, e: int, r: int, rule: int, client: int) -> int:
    """Return the request that ``rule`` gives to an idle client; some request must be waiting."""
    if rule == PLAN:
        return _head(state, e, r, client)
    if rule == STEAL:
        own = _head(state, e, r, client)
        return own if own != NOBODY else _stolen(state, e, r)
    if rule == LONGEST:
        return _waiting_at(state, e, state.episodes[e].waiting - 1)
    if rule == SHORTEST:
        return _waiting_at(state, e, 0)
    if rule == FCFS:
        return _first(state, e)
    return _aligned(state, e, r)


@kernel
def _waiting_at(state: State, e: int, place: int) -> int:
    """Return the waiting request at a place in the order of length, 0 the shortest."""
    return state.by_length[e, select(state.waiting_tree[e], place)]


@kernel
def _head(state: State, e: int, r: int, client: int) -> int:
    """Return the first request still waiting in a client's planned queue, or NOBODY."""
    queue = state.clients[e, r, client]
    i = queue.queue_head
    while i != NOBODY and state.requests[e, i].phase > WAITING:
        i = state.requests[e, i].plan_next
    queue.queue_head = i
    if i == NOBODY:
        queue.queue_tail = NOBODY
    return i


@kernel
def _first(state: State, e: int) -> int:
    """Return the earliest request that waits."""
    i = state.episodes[e].first_waiting
    while state.requests[e, i].phase != WAITING:
        i += 1
    state.episodes[e].first_waiting = i
    return i


@kernel
def _stolen(state: State, e: int, r: int) -> int:
    """Return the longest request in the queue of the client with most work (paper, Algorithm 1)."""
    victim = _busiest(state, e, r)
    best = state.clients[e, r, victim].queue_head
    i = state.requests[e, best].plan_next
    while i != NOBODY:
        longer = state.requests[e, i].expected_rounds > state.requests[e, best].expected_rounds
        if longer and state.requests[e, i].phase == WAITING:
            best = i
        i = state.requests[e, i].plan_next
    return best


@kernel
def _busiest(state: State, e: int, r: int) -> int:
    """Return the client with most work of those with a request in their queue; some client has none.

    A stage's first theft lines the victims up in ``keys``, a heap whose size is in the last place. A client
    that takes a request of its own keeps its work; one that has been stolen from is on top.
    """
    heap = state.keys[e]
    size = heap[-1]
    if size == _UNKNOWN:
        size = 0
        for client in range(state.clients.shape[2]):
            if _head(state, e, r, client) != NOBODY:
                heap[size] = client
                size += 1
        for place in range(size // 2 - 1, 0, -1):
            _sink(state, e, r, size, place)
    _sink(state, e, r, size, 0)
    while _head(state, e, r, heap[0]) == NOBODY:
        size -= 1
        heap[0] = heap[size]
        _sink(state, e, r, size, 0)
    heap[-1] = size
    return heap[0]


@kernel
def _sink(state: State, e: int, r: int, size: int, place: int) -> None:
    """Move the client at ``place`` of the heap down to where it belongs."""
    heap = state.keys[e]
    client = heap[place]
    work = client_work(state, e, r, client)
    while 2 * place + 1 < size:
        below = 2 * place + 1
        most = client_work(state, e, r, heap[below])
        if below + 1 < size:
            other = client_work(state, e, r, heap[below + 1])
            if other > most or (other == most and heap[below + 1] < heap[below]):
                below, most = below + 1, other
        if most < work or (most == work and heap[below] > client):
            break
        heap[place] = heap[below]
        place = below
    heap[place] = client


@kernel
def _forget_targets(state: State, e: int) -> None:
    """Begin a stage's list of targets; see ``_target``."""
    if state.keys.shape[1] >= ALIGNED_TARGET_SIZE + 1:
        state.keys[e, -1] = 0  # how many are listed
        state.keys[e, -2] = 0  # how many finishes have been read


@kernel
def _target(state: State, e: int, r: int, k: int) -> int:
    """Return the rounds to the k-th target of ``_aligned``, the latest first; ``_UNKNOWN`` behind the last.

    A stage's candidates share a list of them in ``keys``, which is read on as far as one of them asks.
    Fewer than half as many targets as clients leave the two last places for the counts.
    """
    if state.keys.shape[1] <= ALIGNED_TARGET_SIZE:
        return _UNKNOWN  # with a client idle, no two run
    keys = state.keys[e]
    if k < keys[-1]:
        return keys[k]
    replica, finishes = state.replicas[e, r], state.expected[e, r]
    place = keys[-2]
    while place < replica.active:
        due = finishes[place].due
        together = 0
        while place < replica.active and finishes[place].due == due:
            together += 1
            place += 1
        if together >= ALIGNED_TARGET_SIZE:
            keys[k] = due - replica.rounds
            keys[-1] = k + 1
            keys[-2] = place
            return keys[k]
    keys[-2] = place
    return _UNKNOWN


@kernel
def _aligned(state: State, e: int, r: int) -> int:
    """Return the waiting request with the best score L − α · pad.

    L is its expected rounds, pad the rounds from its finish to the next target at or after it; a
    target is when several running requests should finish together. Candidates are the longer half of those
    waiting that finish by the last target; without any, and for the last two requests per client, the
    longest goes first. Between two targets the score grows with L, so only the longest request that
    finishes by each target can win: one search a target.
    """
    waiting = state.episodes[e].waiting
    best = _waiting_at(state, e, waiting - 1)
    if waiting <= ALIGNED_TAIL_PER_CLIENT * state.clients.shape[2]:
        return best
    best_score = np.int64(-(1 << 62))
    k = 0
    target = _target(state, e, r, k)
    while (
        target != _UNKNOWN and target >= best_score
    ):  # no score exceeds its target, the next is sooner
        longest = count_below(state.waiting_tree[e], _rank_above(state, e, target)) - 1
        if longest < waiting // 2:
            break
        i = _waiting_at(state, e, longest)
        rounds = state.requests[e, i].expected_rounds
        score = rounds - ALIGNED_PAD_WEIGHT * (target - rounds)
        if score > best_score:
            best, best_score = i, score
        k += 1
        target = _target(state, e, r, k)
    return best


@kernel
def _rank_above(state: State, e: int, rounds: int) -> int:
    """Return the first rank whose request expects more than ``rounds`` rounds."""
    low, high = 0, state.episodes[e].requests
    while low < high:
        middle = (low + high) // 2
        if state.lengths[e, middle] <= rounds:
            low = middle + 1
        else:
            high = middle
    return low
