"""The least loaded client, by a heap or a tournament tree; and requests dealt by it. Compiled.

``deal`` is for clients that are alike, ``deal_by_time`` for those that differ in speed or in memory.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel, kernel

Whole = NDArray[np.int64]

NO_CLIENT: Final = -1
"""Stands for the client of a request that fits into no client's memory."""


@allocating_kernel
def deal(rounds: Whole, clients: int) -> Whole:
    """Deal requests in their order to the least loaded client; return each request's client.

    ``rounds`` and the result have shape (requests,). Ties go to the lowest client. Requests without
    rounds add no load: all would go to one client and take a stage each. So they are dealt last, each to
    the client with the fewest requests, ties to the least loaded.
    """
    bits = 1
    while 1 << bits < clients:
        bits += 1
    leaves = 1 << bits
    # A tree of minima; a client's leaf is its load, shifted, and its number. No load is far above the mean,
    # so 64 bits suffice.
    least = np.full(2 * leaves, np.iinfo(np.int64).max)
    for client in range(clients):
        least[leaves + client] = client
    for node in range(leaves - 1, 0, -1):
        least[node] = min(least[2 * node], least[2 * node + 1])
    client_of = np.empty(rounds.size, np.int64)
    without_rounds = 0
    for place in range(rounds.size):
        if rounds[place] == 0:
            without_rounds += 1
            continue
        key = least[1]
        client = key & (leaves - 1)
        client_of[place] = client
        key += rounds[place] << bits
        node = leaves + client
        least[node] = key
        while node > 1:
            key = min(key, least[node ^ 1])
            node >>= 1
            least[node] = key
    if without_rounds > 0:
        load, held = np.empty(clients, np.int64), np.zeros(clients, np.int64)
        for client in range(clients):
            load[client] = least[leaves + client] >> bits
        for place in range(rounds.size):
            if rounds[place] > 0:
                held[client_of[place]] += 1
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


@allocating_kernel
def deal_by_time(rounds: Whole, needs: Whole, round_s: NDArray[np.float64], holds: Whole) -> Whole:
    """Deal requests in their order to the client that would end first; return each request's client.

    A client takes ``round_s`` for each of its rounds and no request that needs more than it ``holds``.
    ``rounds`` and ``needs`` have shape (requests,), ``round_s`` and ``holds`` (clients,); needs are tokens
    or blocks. Ties go to the lowest client. A request that no client holds gets ``NO_CLIENT``. Requests
    without rounds are dealt last, by number, as in ``deal``. Where all clients are alike, so is the result.
    """
    runs = _runs_alike(round_s, holds)
    heap = np.arange(round_s.size)
    load = np.zeros_like(heap)
    held = np.zeros_like(heap)
    client_of = np.full(rounds.size, NO_CLIENT)
    without_rounds = 0
    for place in range(rounds.size):
        if rounds[place] == 0:
            without_rounds += 1
            continue
        best, ends_s = -1, np.inf
        for run in range(runs.size - 1):
            client = heap[runs[run]]
            if holds[client] >= needs[place]:
                end_s = (load[client] + rounds[place]) * round_s[client]
                if end_s < ends_s or (end_s == ends_s and client < heap[runs[best]]):
                    best, ends_s = run, end_s
        if best >= 0:
            client = heap[runs[best]]
            client_of[place] = client
            load[client] += rounds[place]
            held[client] += 1
            sift_down(heap[runs[best] : runs[best + 1]], load)
    if without_rounds > 0:
        deal_by_number(rounds, needs, holds, held, load * round_s, client_of)
    return client_of


@allocating_kernel
def _runs_alike(round_s: NDArray[np.float64], holds: Whole) -> Whole:
    """Return the first client of each run of equal neighbours, and the number of clients."""
    runs = np.empty(round_s.size + 1, np.int64)
    count = 0
    for client in range(round_s.size):
        if (
            client == 0
            or round_s[client] != round_s[client - 1]
            or holds[client] != holds[client - 1]
        ):
            runs[count] = client
            count += 1
    runs[count] = round_s.size
    return runs[: count + 1]


@allocating_kernel
def deal_by_number(
    rounds: Whole,
    needs: Whole,
    holds: Whole,
    held: Whole,
    end_s: NDArray[np.float64],
    client_of: Whole,
) -> None:
    """Deal the requests without rounds, each to the client with the fewest; write ``client_of``.

    ``held`` (clients,) counts the requests that clients have. Ties go to who ends first, by ``end_s``
    (clients,), then to the lowest client.
    """
    clients = held.size
    by_end = np.argsort(end_s, kind="mergesort")
    key = np.empty_like(held)
    for place in range(clients):
        key[by_end[place]] = held[by_end[place]] * clients + place
    runs = _runs_alike(np.zeros(clients), holds)
    heap = np.arange(clients)
    for run in range(runs.size - 1):
        heap[runs[run] : runs[run + 1]] = runs[run] + np.argsort(key[runs[run] : runs[run + 1]])
    for place in range(rounds.size):
        if rounds[place] > 0:
            continue
        best = -1
        for run in range(runs.size - 1):
            client = heap[runs[run]]
            if holds[client] >= needs[place] and (best < 0 or key[client] < key[heap[runs[best]]]):
                best = run
        if best >= 0:
            client = heap[runs[best]]
            client_of[place] = client
            key[client] += clients
            sift_down(heap[runs[best] : runs[best + 1]], key)


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
