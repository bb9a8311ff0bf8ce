"""Dealing work to clients: who has least to do, compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel, kernel

Whole = NDArray[np.int64]


@allocating_kernel
def deal(rounds: Whole, clients: int) -> Whole:
    """Deal requests in their order to the least loaded client; return each one's client.

    ``rounds`` and what is returned have shape (requests,). Of equal loads the lowest client is taken.
    Requests without rounds add no load and would all go to one client, one stage each: they are dealt
    last, each to the client with the fewest requests, of these the least loaded.
    """
    heap = np.arange(clients)
    load = np.zeros_like(heap)
    held = np.zeros_like(heap)
    client_of = np.empty(rounds.size, np.int64)
    without = 0
    for place in range(rounds.size):
        if rounds[place] == 0:
            without += 1
            continue
        client = heap[0]
        client_of[place] = client
        load[client] += rounds[place]
        held[client] += 1
        sift_down(heap, load)
    if without > 0:
        _deal_evenly(rounds, load, held, client_of)
    return client_of


@allocating_kernel
def _deal_evenly(rounds: Whole, load: Whole, held: Whole, client_of: Whole) -> None:
    """Deal the requests without rounds to clients that hold ``held`` of the others."""
    clients = load.size
    by_load = np.argsort(load, kind="mergesort")
    # What a client holds and, below that, its place by load, in one number.
    key = np.empty_like(load)
    for place in range(clients):
        key[by_load[place]] = held[by_load[place]] * clients + place
    heap = np.argsort(key)
    for place in range(rounds.size):
        if rounds[place] == 0:
            client_of[place] = heap[0]
            key[heap[0]] += clients
            sift_down(heap, key)


@kernel
def sift_down(heap: Whole, load: Whole) -> None:
    """Restore the heap after the load of its top has grown.

    ``heap`` (clients,) holds clients, the least loaded on top, of equal loads the lowest; ``load``
    (clients,) is indexed by client.
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
def _lighter(one: int, other: int, load: Whole) -> bool:
    return load[one] < load[other] or (load[one] == load[other] and one < other)


@allocating_kernel
def tournament(first: Whole, second: Whole) -> Whole:
    """Return a tree whose entry 1 is the client with the least ``first``.

    Of equal ones it is the client with the least ``second``, then the lowest; both have shape (clients,).
    ``play_again`` keeps the tree, of shape (2 · clients,), when a client's values have changed.
    """
    clients = first.size
    winner = np.empty(2 * clients, np.int64)
    for client in range(clients):
        winner[clients + client] = client
    for node in range(clients - 1, 0, -1):
        winner[node] = _winner(winner[2 * node], winner[2 * node + 1], first, second)
    return winner


@kernel
def play_again(winner: Whole, client: int, first: Whole, second: Whole) -> None:
    """Restore a tournament after the values of ``client`` have changed."""
    node = (first.size + client) // 2
    while node > 0:
        winner[node] = _winner(winner[2 * node], winner[2 * node + 1], first, second)
        node //= 2


@kernel
def _winner(one: int, other: int, first: Whole, second: Whole) -> int:
    if first[one] != first[other]:
        return one if first[one] < first[other] else other
    if second[one] != second[other]:
        return one if second[one] < second[other] else other
    return min(one, other)
