"""Admission rules: which waiting requests a prefill stage gives to the idle clients.

One loop serves every rule: idle clients in index order, each asks the rule for its next request,
until one does not fit into the stage's token budget (a later one that would is not looked for).
Equal lengths: longest first takes the lower id, shortest first the higher, stealing the earlier in
the victim's queue.
"""

from __future__ import annotations

from typing import Final

from servegym.envs.jit import kernel
from servegym.envs.simulator.aligned import forget_targets, longest_aligned
from servegym.envs.simulator.queues import first_waiting, head, waiting_at
from servegym.envs.simulator.stages import client_work, pick, sort_idle
from servegym.envs.simulator.state import NOBODY, WAITING, State
from servegym.envs.vocabulary import ALIGNED, FCFS, LONGEST, PLAN, SHORTEST, STEAL

_NOT_BUILT: Final = -1
"""Size of the heap of victims before a stage's first theft builds the heap."""


@kernel
def admits(state: State, e: int, r: int, rule: int) -> bool:
    """Return whether ``rule`` would admit at least one request now."""
    clients = state.clients.shape[2]
    if state.episodes[e].waiting == 0 or state.replicas[e, r].active == clients:
        return False
    if rule != PLAN:
        return True
    for client in state.idle[e, r, : clients - state.replicas[e, r].active]:
        if head(state, e, r, client) != NOBODY:
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
        forget_targets(state, e)
    elif rule == STEAL:
        state.keys[e, -1] = _NOT_BUILT
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
        return head(state, e, r, client)
    if rule == STEAL:
        own = head(state, e, r, client)
        return own if own != NOBODY else _stolen(state, e, r)
    if rule == LONGEST:
        return waiting_at(state, e, state.episodes[e].waiting - 1)
    if rule == SHORTEST:
        return waiting_at(state, e, 0)
    if rule == FCFS:
        return first_waiting(state, e)
    return longest_aligned(state, e, r)


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
    if size == _NOT_BUILT:
        size = 0
        for client in range(state.clients.shape[2]):
            if head(state, e, r, client) != NOBODY:
                heap[size] = client
                size += 1
        for place in range(size // 2 - 1, 0, -1):
            _sink(state, e, r, size, place)
    _sink(state, e, r, size, 0)
    while head(state, e, r, heap[0]) == NOBODY:
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
