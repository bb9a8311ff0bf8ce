"""Longest-first loads and the random walk that evens them out, compiled.

The walk makes one move: take two clients, pool their requests and split the pool anew. Which sums
a share of the pool can have is computed exactly, as a bitset (subset sum), so a pair that can be
evened out is. Lengths are small integers, so a split costs about a microsecond.
"""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.simulator.jit import kernel

MAX_FREE = 64
"""Requests of a pair that are split exactly; with more, the rest is first dealt out greedily."""

MAX_BITS = 1 << 17
"""Bits of a subset-sum row; with longer loads, sums are kept to the nearest 2^k instead."""

OVERLOADED_FIRST = 0.75
"""Share of the moves that begin at an overloaded client; the others stir the clients that fit."""


SHUFFLED = 0.25
"""Share of the moves that shuffle the pool first: among requests that sum to the same, others are
taken. That helps with many requests a client and hinders with three; this serves both."""

PARTNERS = 4
"""Clients drawn as partner of a move; the least loaded is taken."""

PORTION_S = 0.002
"""Seconds that the compiled walk runs between two looks at the clock, roughly."""


class Loads(NamedTuple):
    """Which client holds which request, as linked lists, with the walk's scratch space."""

    rounds: NDArray[np.int64]  # (requests,) decode rounds
    first: NDArray[np.int64]  # (clients,) a request of each client, −1: none
    after: NDArray[np.int64]  # (requests,) next request of the same client, −1: none
    load: NDArray[np.int64]  # (clients,) decode rounds
    over: NDArray[np.int64]  # (clients,) the clients above the target, then garbage
    place: NDArray[np.int64]  # (clients,) where each of them stands in ``over``, −1: nowhere
    count: NDArray[np.int64]  # (1,) how many clients are above the target
    pool: NDArray[np.int64]  # (requests,) scratch: the requests of a pair
    mine: NDArray[np.bool_]  # (requests,) scratch: which of the pool go to the pair's first client
    reach: NDArray[np.uint64]  # (MAX_FREE + 1, words) scratch: bit s of row k is set if some of the
    #                            first k requests of the pool sum to s · 2^shift rounds
    shift: int  # 0 unless loads are beyond MAX_BITS


def longest_first(rounds: NDArray[np.int64], clients: int) -> Loads:
    """Give every request, longest first, to the client with the least work (ties: lowest id).

    Requests without rounds weigh nothing and are left out.

    Parameters
    ----------
    rounds
        Decode rounds of each request, shape (requests,), ≥ 0.
    clients
        Number of clients, ≥ 1.
    """
    first = np.full(clients, -1)
    after = np.full(len(rounds), -1)
    load = np.zeros(clients, dtype=np.int64)
    order = np.argsort(-rounds, kind="stable")
    _deal_longest_first(rounds, order[: np.count_nonzero(rounds)], first, after, load)
    longest_load = int(load.max())
    shift = max(0, longest_load.bit_length() - MAX_BITS.bit_length() + 1)
    return Loads(
        rounds=rounds,
        first=first,
        after=after,
        load=load,
        over=np.zeros(clients, dtype=np.int64),
        place=np.full(clients, -1),
        count=np.zeros(1, dtype=np.int64),
        pool=np.zeros(len(rounds), dtype=np.int64),
        mine=np.zeros(len(rounds), dtype=np.bool_),
        reach=np.zeros((MAX_FREE + 1, (longest_load >> shift) // 64 + 1), dtype=np.uint64),
        shift=shift,
    )


@cache
def load_kernels() -> None:
    """Compile the kernels or load them from disk, once, on an instance that needs them all."""
    loads = longest_first(np.array([5, 4, 3, 3, 3]), 2)  # 10 and 8; 9 and 9 is possible
    set_target(loads, 9)
    walk(loads, 9, 100, np.random.default_rng(0))
    _write_clients(loads, np.zeros(5, dtype=np.int64))


@kernel
def _deal_longest_first(rounds, order, first, after, load):  # type: ignore[no-untyped-def]
    heap = np.arange(load.size)  # clients, the least loaded on top
    for request in order:
        client = heap[0]
        after[request] = first[client]
        first[client] = request
        load[client] += rounds[request]
        _sift_down(heap, load)


@kernel
def _sift_down(heap, load):  # type: ignore[no-untyped-def]
    """Restore the heap, ordered by (load, client), after the top's load has grown."""
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
def _lighter(one, other, load):  # type: ignore[no-untyped-def]
    return load[one] < load[other] or (load[one] == load[other] and one < other)


@kernel
def set_target(loads: Loads, target: int) -> None:
    """List the clients whose load is above ``target``."""
    loads.count[0] = 0
    for client in range(loads.load.size):
        loads.place[client] = -1
        _list_if_over(loads, client, target)


@kernel
def _list_if_over(loads, client, target):  # type: ignore[no-untyped-def]
    over = loads.load[client] > target
    listed = loads.place[client] >= 0
    if over and not listed:
        loads.over[loads.count[0]] = client
        loads.place[client] = loads.count[0]
        loads.count[0] += 1
    elif listed and not over:
        loads.count[0] -= 1
        moved = loads.over[loads.count[0]]
        loads.over[loads.place[client]] = moved
        loads.place[moved] = loads.place[client]
        loads.place[client] = -1


@kernel
def walk(loads: Loads, target: int, tries: int, rng: np.random.Generator) -> int:
    """Split pairs anew until no load is above ``target``; return how many of the tries are left.

    A move never adds to the pair's excess over the target, nor to its larger load unless that
    stays within the target; among the splits with the least excess it takes a random one. Most
    moves take an overloaded client, the others keep the rest from freezing. ``set_target`` goes
    first. At least two clients are needed.
    """
    clients = loads.load.size
    while tries > 0 and loads.count[0] > 0:
        tries -= 1
        if rng.random() < OVERLOADED_FIRST:
            one = loads.over[rng.integers(0, loads.count[0])]
        else:
            one = rng.integers(0, clients)
        other = _lightest_of_some(loads.load, one, rng)
        _split_anew(loads, one, other, target, rng)
    return tries


@kernel
def _lightest_of_some(load, one, rng):  # type: ignore[no-untyped-def]
    """Draw ``PARTNERS`` clients other than ``one``; return the least loaded."""
    best = -1
    for _ in range(PARTNERS):
        drawn = rng.integers(0, load.size - 1)
        if drawn >= one:
            drawn += 1
        if best < 0 or load[drawn] < load[best]:
            best = drawn
    return best


@kernel
def _split_anew(loads, one, other, target, rng):  # type: ignore[no-untyped-def]
    """Pool the requests of two clients and share them out anew, unless that does harm."""
    size = _pool(loads, one, other)
    if size > MAX_FREE or rng.random() < SHUFFLED:
        _shuffle(loads.pool, size, rng)
    free = min(size, MAX_FREE)
    light = _deal_rest(loads, free, size)
    total = loads.load[one] + loads.load[other]
    worst = max(loads.load[one], loads.load[other], target)
    limit = (total // 2 - light) >> loads.shift
    _fill_reach(loads, free, limit)
    highest = _highest(loads.reach[free], limit)
    # Shares between the two bounds of the window all leave the same excess over the target.
    lowest = (max(min(target, total - target), total - worst) - light) >> loads.shift
    wanted = highest
    if lowest < highest:
        wanted = _highest(loads.reach[free], rng.integers(max(lowest, 0), highest + 1))
    share = light + _mark_share(loads, free, max(wanted, 0))
    excess = max(0, share - target) + max(0, total - share - target)
    before = max(0, loads.load[one] - target) + max(0, loads.load[other] - target)
    if excess <= before and max(share, total - share) <= worst:
        _hand_out(loads, one, other, size)
        _list_if_over(loads, one, target)
        _list_if_over(loads, other, target)


@kernel
def _pool(loads, one, other):  # type: ignore[no-untyped-def]
    """Write the requests of both clients into ``pool``; return how many there are."""
    size = 0
    for client in (one, other):
        request = loads.first[client]
        while request >= 0:
            loads.pool[size] = request
            size += 1
            request = loads.after[request]
    return size


@kernel
def _shuffle(pool, size, rng):  # type: ignore[no-untyped-def]
    for last in range(size - 1, 0, -1):
        other = rng.integers(0, last + 1)
        pool[last], pool[other] = pool[other], pool[last]


@kernel
def _deal_rest(loads, free, size):  # type: ignore[no-untyped-def]
    """Deal what is not free to the lighter share in turn; the first share ends as the lighter."""
    shares = [0, 0]
    for k in range(free, size):
        to = 0 if shares[0] <= shares[1] else 1
        shares[to] += loads.rounds[loads.pool[k]]
        loads.mine[k] = to == 0
    if shares[0] > shares[1]:
        for k in range(free, size):
            loads.mine[k] = not loads.mine[k]
    return min(shares)


@kernel
def _fill_reach(loads, free, limit):  # type: ignore[no-untyped-def]
    """Row k + 1 of ``reach`` is row k, or row k moved up by the length of the k-th free request."""
    reach = loads.reach
    words = limit // 64 + 1
    reach[0, :words] = 0
    reach[0, 0] = 1
    for k in range(free):
        length = loads.rounds[loads.pool[k]] >> loads.shift
        whole = min(length >> 6, words)
        part = np.uint64(length & 63)
        back = np.uint64(63) - part
        below = np.uint64(0)
        for word in range(whole):
            reach[k + 1, word] = reach[k, word]
        for word in range(whole, words):
            moved = reach[k, word - whole]
            # Two shifts: by 64 at once is undefined, and happens where part is 0.
            carry = (below >> back) >> np.uint64(1)
            reach[k + 1, word] = reach[k, word] | (moved << part) | carry
            below = moved


@kernel
def _highest(row, limit):  # type: ignore[no-untyped-def]
    """Return the highest bit of ``row`` that is set and ≤ ``limit``, −1 if there is none."""
    word = limit >> 6
    bits = row[word] & (~np.uint64(0) >> np.uint64(63 - (limit & 63)))
    while bits == 0:
        word -= 1
        if word < 0:
            return -1
        bits = row[word]
    bit = 63
    while not (bits >> np.uint64(bit)) & np.uint64(1):
        bit -= 1
    return 64 * word + bit


@kernel
def _mark_share(loads, free, wanted):  # type: ignore[no-untyped-def]
    """Mark free requests that sum to ``wanted``, a sum that is reached; return their rounds."""
    rounds = 0
    for k in range(free - 1, -1, -1):
        request = loads.pool[k]
        word, bit = wanted >> 6, np.uint64(wanted & 63)
        loads.mine[k] = not (loads.reach[k, word] >> bit) & np.uint64(1)
        if loads.mine[k]:
            wanted -= loads.rounds[request] >> loads.shift
            rounds += loads.rounds[request]
    return rounds


@kernel
def _hand_out(loads, one, other, size):  # type: ignore[no-untyped-def]
    """Link the marked requests of the pool to ``one``, the others to ``other``."""
    for client in (one, other):
        loads.first[client] = -1
        loads.load[client] = 0
    for k in range(size):
        request = loads.pool[k]
        client = one if loads.mine[k] else other
        loads.after[request] = loads.first[client]
        loads.first[client] = request
        loads.load[client] += loads.rounds[request]


@kernel
def _write_clients(loads, client_of):  # type: ignore[no-untyped-def]
    """Write the client of each request that has rounds."""
    for client in range(loads.first.size):
        request = loads.first[client]
        while request >= 0:
            client_of[request] = client
            request = loads.after[request]


class Walk:
    """Longest-first loads, the walk that evens them out, and the best it has come by.

    Parameters
    ----------
    rounds
        Decode rounds of each request, shape (requests,), ≥ 0.
    clients
        Number of clients, ≥ 1.
    rng
        Chooses the moves.
    deadline
        Reading of ``time.perf_counter`` at which the walk stops.
    """

    def __init__(
        self,
        rounds: NDArray[np.int64],
        clients: int,
        rng: np.random.Generator,
        deadline: float,
    ) -> None:
        self._loads = longest_first(rounds, clients)
        self._rng = rng
        self._deadline = deadline
        self._client_of = np.full(len(rounds), -1)
        self._keep()

    def client_of(self) -> NDArray[np.int64]:
        """Client of each request in the best plan, shape (requests,); −1 without rounds."""
        return self._client_of

    def aim(self, target: int, tries: int) -> bool:
        """Walk until no load is above ``target`` or the tries or the time are used up.

        Returns whether the target was met. How the tries are portioned does not show in the result.
        """
        set_target(self._loads, target)
        portion = 64
        while tries > 0 and self._loads.count[0] > 0 and time.perf_counter() < self._deadline:
            started = time.perf_counter()
            portion = min(portion, tries)
            tries += walk(self._loads, target, portion, self._rng) - portion
            if time.perf_counter() - started < PORTION_S:
                portion *= 2
        if self._loads.load.max() < self.best:
            self._keep()
        return self._loads.count[0] == 0

    def _keep(self) -> None:
        self.best = int(self._loads.load.max())
        _write_clients(self._loads, self._client_of)
