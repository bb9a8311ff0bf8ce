"""Who waits: the clients' planned queues, the order of arrival, the order of length."""

from __future__ import annotations

from servegym.envs.jit import kernel
from servegym.envs.simulator.order import select
from servegym.envs.simulator.state import NOBODY, WAITING, State


@kernel
def enqueue(state: State, e: int, r: int, client: int, request: int) -> None:
    """Append a request to a client's planned queue."""
    queue = state.clients[e, r, client]
    if queue.queue_tail == NOBODY:
        queue.queue_head = request
    else:
        state.requests[e, queue.queue_tail].plan_next = request
    queue.queue_tail = request
    queue.queue_rounds += state.requests[e, request].expected_rounds
    queue.queue_requests += 1
    state.requests[e, request].plan_client = client


@kernel
def head(state: State, e: int, r: int, client: int) -> int:
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
def first_waiting(state: State, e: int) -> int:
    """Return the earliest request that waits."""
    i = state.episodes[e].first_waiting
    while state.requests[e, i].phase != WAITING:
        i += 1
    state.episodes[e].first_waiting = i
    return i


@kernel
def waiting_at(state: State, e: int, place: int) -> int:
    """Return the waiting request at a place in the order of length, 0 the shortest."""
    return state.by_length[e, select(state.waiting_tree[e], place)]
