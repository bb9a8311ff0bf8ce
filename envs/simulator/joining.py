"""Who has come to a queue: how a replica sees it, and whose planned queue it joins.

A request is counted when the replica, or one that may steal from it, looks at its queue. It joins a planned
queue at the replica's next boundary: that of the client with least work.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import allocating_kernel, kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.heap import tournament, update_tournament
from servegym.envs.simulator.queues import (
    count_all_waiting,
    enqueue,
    queue_of,
    rounds_ahead,
    shares_pool,
    should_hold,
)
from servegym.envs.simulator.stages import rounds_until
from servegym.envs.simulator.state import DECODE_RUN, NOBODY, State

_MANY_ARRIVALS: Final = 8
"""With more arrivals at once, ranking the clients once takes less time than a scan for each arrival."""

_MOST_WORK: Final = 1 << 62


@kernel
def client_work(state: State, e: int, r: int, client: int) -> int:
    """Return the decode rounds left to a client, of its running request and its planned queue."""
    record, replica = state.clients[e, r, client], state.replicas[e, r]
    left = -record.expected_end - 1
    if record.expected_end > 0:
        left = record.expected_end - replica.rounds - replica.passed
    return record.queue_rounds + max(left, 0)


@kernel
def see_arrivals(state: State, e: int, r: int) -> None:
    """Count the requests that have come into the replica's queue; the replica is at a boundary.

    An unplanned one joins a client's planned queue: a client of the replica, or of any if replicas share a
    pool.
    """
    queue = state.queues[e, queue_of(state, r)]
    count_arrivals(state, e, queue_of(state, r))
    if queue.unplanned == 0:
        return
    i = queue.first_unplanned
    if queue.unplanned > _MANY_ARRIVALS and not shares_pool(state):
        _queue_many(state, e, r, i)
    else:
        while i != NOBODY:
            if state.requests[e, i].plan_client == NOBODY:
                _queue_one(state, e, r, i)
            i = state.requests[e, i].next
    queue.unplanned = 0


@kernel
def count_arrivals(state: State, e: int, q: int) -> None:
    """Count the requests that have come into a queue since the last look; they join no planned queue yet."""
    queue = state.queues[e, q]
    if queue.unseen == 0:
        return
    unplanned = count_all_waiting(state, e, q, queue.first_unseen)
    if queue.unplanned == 0:
        queue.first_unplanned = queue.first_unseen
    queue.unplanned += unplanned
    queue.unseen = 0
    queue.unseen_work = 0
    queue.unseen_blocks = 0
    queue.first_unseen = NOBODY


@kernel
def look_at_others(state: State, costs: CostTables, e: int, r: int) -> None:
    """Note how many rounds of a run the others of a pool have ended by now; ``r`` is at a boundary."""
    then_s = np.nextafter(state.episodes[e].now_s, np.inf)
    for s in range(state.replicas.shape[1]):
        replica = state.replicas[e, s]
        replica.passed = 0
        if s != r and replica.stage == DECODE_RUN and replica.run_rounds > 1:
            replica.passed = rounds_until(state, costs, e, s, then_s) - 1


@kernel
def _queue_one(state: State, e: int, r: int, i: int) -> None:
    """Append an unplanned request to the planned queue of the client that suits it best.

    It has the least work left, then the fewest queued requests, then the lowest number. A request without
    rounds ahead adds no work, so many would join the same client: for it queued requests count before work. A
    running request is not counted as queued: while all clients decode, arrivals are seen only at the next
    finish, and must join as if seen at once. In a pool it joins a client of those that ``should_hold`` it.
    """
    by_work = rounds_ahead(state, e, i) > 0
    unlike = shares_pool(state) and state.cluster.limits_memory
    first_replica, last_replica = r, r
    if shares_pool(state):
        first_replica, last_replica = 0, state.replicas.shape[1] - 1
    best_replica, best = first_replica, 0
    least, fewest = _MOST_WORK, _MOST_WORK
    for s in range(first_replica, last_replica + 1):
        if unlike and not should_hold(state, e, s, i):
            continue
        for client in range(state.machines[s].clients):
            if least == 0 and fewest == 0:
                break
            work = client_work(state, e, s, client)
            requests = state.clients[e, s, client].queue_requests
            if by_work:
                better = work < least or (work == least and requests < fewest)
            else:
                better = requests < fewest or (requests == fewest and work < least)
            if better:
                best_replica, best, least, fewest = s, client, work, requests
    enqueue(state, e, best_replica, best, i)


@allocating_kernel
def _queue_many(state: State, e: int, r: int, first: int) -> None:
    """Queue the unplanned requests from ``first`` on in one pass, each as by ``_queue_one``."""
    clients = state.machines[r].clients
    work = np.empty(clients, np.int64)
    requests = np.empty(clients, np.int64)
    for client in range(clients):
        work[client] = client_work(state, e, r, client)
        requests[client] = state.clients[e, r, client].queue_requests
    least, fewest = tournament(work, requests), tournament(requests, work)
    i = first
    while i != NOBODY:
        if state.requests[e, i].plan_client == NOBODY:
            rounds = rounds_ahead(state, e, i)
            client = least[1] if rounds > 0 else fewest[1]
            enqueue(state, e, r, client, i)
            work[client] += rounds
            requests[client] += 1
            update_tournament(least, client, work, requests)
            update_tournament(fewest, client, requests, work)
        i = state.requests[e, i].next
