"""Whom the rule ``steal`` takes from: the client with most work in its planned queue."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import kernel
from servegym.envs.simulator.joining import client_work
from servegym.envs.simulator.queues import shares_pool
from servegym.envs.simulator.state import NOBODY, State

REPLICA_BITS: Final = 32
"""Bits by which the replica is shifted in the number of a client of any replica."""
CLIENT_MASK: Final = (1 << REPLICA_BITS) - 1

_FEW_THIEVES: Final = 4
"""Up to so many idle clients look for their victims one by one: that takes less time than the heap."""

_NOT_BUILT: Final = -1
"""Size of the heap of victims before a stage's first theft builds the heap."""


@kernel
def begin_thefts(state: State, e: int) -> None:
    """Forget the victims of the stage before."""
    state.keys[e, -1] = _NOT_BUILT


@kernel
def busiest(state: State, e: int, r: int) -> int:
    """Return the client with most work of those with a request in their queue; some client has none.

    A client is written as (replica << 32) + client. Few thieves look at all. Else a stage's first theft lines
    the victims up in the first half of ``keys``, a heap whose size is in the last place; the second half
    holds the work of each. A client that takes a request of its own keeps its work; one that has been stolen
    from is on top.
    """
    if state.replicas[e, r].idle <= _FEW_THIEVES:
        return _busiest_of_all(state, e, r)
    heap = state.keys[e]
    size, work = heap[-1], heap.size // 2
    if size == _NOT_BUILT:
        size = 0
        first, last = r, r
        if shares_pool(state):
            first, last = 0, state.replicas.shape[1] - 1
        for s in range(first, last + 1):
            for client in range(state.machines[s].clients):
                if state.clients[e, s, client].queue_requests > 0:
                    heap[size] = (np.int64(s) << REPLICA_BITS) + client
                    heap[work + size] = client_work(state, e, s, client)
                    size += 1
        for place in range(size // 2 - 1, 0, -1):
            _sink(heap, size, place)
    else:
        heap[work] = client_work(state, e, heap[0] >> REPLICA_BITS, heap[0] & CLIENT_MASK)
    _sink(heap, size, 0)
    while _queued_at(state, e, heap[0]) == 0:
        size -= 1
        heap[0] = heap[size]
        heap[work] = heap[work + size]
        _sink(heap, size, 0)
    heap[-1] = size
    return heap[0]


@kernel
def _busiest_of_all(state: State, e: int, r: int) -> int:
    """Return the same by one look at each."""
    first, last = r, r
    if shares_pool(state):
        first, last = 0, state.replicas.shape[1] - 1
    best, most = np.int64(NOBODY), np.int64(NOBODY)
    for s in range(first, last + 1):
        for client in range(state.machines[s].clients):
            if state.clients[e, s, client].queue_requests > 0:
                work = client_work(state, e, s, client)
                if work > most:
                    best, most = (np.int64(s) << REPLICA_BITS) + client, work
    return best


@kernel
def _queued_at(state: State, e: int, client: int) -> int:
    return state.clients[e, client >> REPLICA_BITS, client & CLIENT_MASK].queue_requests


@kernel
def _sink(heap: NDArray[np.int64], size: int, place: int) -> None:
    """Move the client at ``place`` of the heap down to where it belongs."""
    works = heap.size // 2
    client, work = heap[place], heap[works + place]
    while 2 * place + 1 < size:
        below = 2 * place + 1
        most = heap[works + below]
        if below + 1 < size:
            other = heap[works + below + 1]
            if other > most or (other == most and heap[below + 1] < heap[below]):
                below, most = below + 1, other
        if most < work or (most == work and heap[below] > client):
            break
        heap[place] = heap[below]
        heap[works + place] = most
        place = below
    heap[place] = client
    heap[works + place] = work
