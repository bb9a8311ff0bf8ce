"""The least loaded client, by a heap or a tournament tree; and requests dealt by it. Compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel, kernel

Whole = NDArray[np.int64]


@allocating_kernel
def deal(rounds: Whole, clients: int) -> Whole:
    """Deal requests in their order to the least loaded client; return each request's client.

    ``rounds`` and the result have shape (requests,). Ties go to the lowest client. Requests without
    rounds add no load: all would go to one client and take a stage each. So they are dealt last, each to
    the client with the fewest requests, ties to the least loaded.
    """
    heap = np.arange(clients)
    load = np.zeros_like(heap)
    held = np.zeros_like(heap)
    client_of = np.empty(rounds.size, np.int64)
    without_rounds = 0
    for place in range(rounds.size):
        if rounds[place] == 0:
            without_rounds += 1
            continue
        client = heap[0]
        client_of[place] = client
        load[client] += rounds[place]
        held[client] += 1
        sift_down(heap, load)
    if without_rounds > 0:
        _deal_evenly(rounds, load, held, client_of)
    return client_of


@allocating_kernel
def _deal_evenly(rounds: Whole, load: Whole, held: Whole, client_of: Whole) -> None:
    """Deal the requests without rounds; ``held`` counts the others at each client."""
    winner = tournament(held, load)
    for place in range(rounds.size):
        if rounds[place] == 0:
            client = winner[1]
            client_of[place] = client
            held[client] += 1
            update_tournament(winner, client, held, load)


@kernel
def sift_down(heap: Whole, load: Whole) -> None:
    """Restore the heap after the load of its top has grown.

    ``heap`` (clients,) holds clients, the least loaded on top, ties to the lowest; ``load`` (clients,)
    is indexed by client.
    """
    client = heap[0]
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= heap.size:
            break
        if child + 1 < heap.size and _lighter(heap[child + 1], heap[child], load):
            child += 1
        if not _lighter(heap[child], client, load):
            break
        heap[hole] = heap[child]
        hole = child
    heap[hole] = client


@kernel
def _lighter(a: int, b: int, load: Whole) -> bool:
    return load[a] < load[b] or (load[a] == load[b] and a < b)


@allocating_kernel
def tournament(first: Whole, second: Whole) -> Whole:
    """Return a tree whose entry 1 is the client with the least ``first``.

    Ties go to the least ``second``, then to the lowest client; both have shape (clients,), the tree
    (2 · clients,). ``update_tournament`` restores it after a client's values have changed.
    """
    clients = first.size
    winner = np.empty(2 * clients, np.int64)
    for client in range(clients):
        winner[clients + client] = client
    for node in range(clients - 1, 0, -1):
        winner[node] = _winner(winner[2 * node], winner[2 * node + 1], first, second)
    return winner


@kernel
def update_tournament(winner: Whole, client: int, first: Whole, second: Whole) -> None:
    """Restore a tournament after the values of ``client`` have changed."""
    node = (first.size + client) // 2
    while node > 0:
        winner[node] = _winner(winner[2 * node], winner[2 * node + 1], first, second)
        node //= 2


@kernel
def _winner(a: int, b: int, first: Whole, second: Whole) -> int:
    if first[a] != first[b]:
        return a if first[a] < first[b] else b
    if second[a] != second[b]:
        return a if second[a] < second[b] else b
    return min(a, b)
