"""Longest-first loads and the random walk that evens them out, compiled.

The walk makes one move: take two clients, pool their requests and split the pool anew. Which sums
a share of the pool can have is computed exactly, as a bitset (subset sum), so the best split of a
pair is found. Lengths are small integers, so a split costs about a microsecond. Where clients
differ each has a target of its own, and a request that one of a pair cannot hold stays with the other.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.servers import Servers
from servegym.envs.jit import allocating_kernel, kernel
from servegym.envs.simulator.heap import deal, deal_by_time

# numpy's integers stand where int is written; numba converts, the checker does not.
# mypy: disable-error-code="arg-type,assignment,return-value"

Whole = NDArray[np.int64]

MAX_FREE: Final = 64
"""Requests of a pair that are split exactly; with more, the rest is first dealt out greedily."""

MAX_BITS: Final = 1 << 17
"""Bits of a subset-sum row; longer sums are kept in units of the least power of two that fits."""

OVERLOADED_FIRST: Final = 0.75
"""Share of the moves that begin at an overloaded client; the others stir the clients that fit."""

SHUFFLED: Final = 0.25
"""Share of the moves that shuffle the pool first: among requests that sum to the same, others are
taken. That helps where clients hold many requests and harms where they hold three; this suits both."""

PARTNERS: Final = 4
"""Clients drawn as partner of a move; the least loaded is taken."""


class Loads(NamedTuple):
    """Which client holds which request, as linked lists, with the walk's scratch space.

    Twelve arrays: with a thirteenth, a compiled move took half as long again.
    """

    rounds: Whole  # (requests,) decode rounds
    first: Whole  # (clients,) a request of each client, −1: none
    after: Whole  # (requests,) next request of the same client, −1: none
    load: Whole  # (clients,) decode rounds
    target: Whole  # (clients,) decode rounds that each should have at most
    needs: Whole  # (requests,) tokens
    holds: Whole  # (clients,) most tokens of a request there
    over: Whole  # (clients + 1,) how many clients are above their targets, these, unused places
    place: Whole  # (clients,) where each of them stands in ``over``, 0: nowhere
    pool: Whole  # (requests,) scratch: the requests of a pair
    mine: NDArray[np.bool_]  # (requests,) scratch: which of the pool go to the pair's first client
    reach: NDArray[np.uint64]  # (MAX_FREE + 1, words) scratch: bit s of row k is set if some of the
    #                            first k requests of the pool sum to s, all in units of 2^shift


def longest_first(rounds: Whole, servers: Servers) -> Loads:
    """Give every request, longest first, to the client that would end first (ties: lowest id).

    Requests without rounds weigh nothing and are left out.

    Parameters
    ----------
    rounds
        Decode rounds of each request, shape (requests,), ≥ 0. Some client can hold each.
    servers
        The clients, and what the requests need of them.
    """
    clients = servers.clients
    first = np.full(clients, -1)
    after = np.full(len(rounds), -1)
    load = np.zeros(clients, dtype=np.int64)
    order = np.argsort(-rounds, kind="stable")
    dealt = order[: np.count_nonzero(rounds)]
    longest_sum = 1
    if servers.are_alike:
        client_of = deal(rounds[dealt], clients)
    else:
        needs, holds = servers.needs[dealt], servers.holds
        client_of = deal_by_time(rounds[dealt], needs, servers.round_s, holds)
        longest_sum = 2  # times the largest load; longer ones are kept in larger units
    _hold(rounds, dealt, client_of, first, after, load)
    words = min(longest_sum * int(load.max()), MAX_BITS) // 64 + 1
    return Loads(
        rounds=rounds,
        first=first,
        after=after,
        load=load,
        target=np.zeros(clients, dtype=np.int64),
        needs=servers.needs,
        holds=servers.holds,
        over=np.zeros(clients + 1, dtype=np.int64),
        place=np.zeros(clients, dtype=np.int64),
        pool=np.zeros(len(rounds), dtype=np.int64),
        mine=np.zeros(len(rounds), dtype=np.bool_),
        reach=np.zeros((MAX_FREE + 1, words), dtype=np.uint64),
    )


@allocating_kernel
def _hold(
    rounds: Whole, dealt: Whole, client_of: Whole, first: Whole, after: Whole, load: Whole
) -> None:
    """Write the lists and loads of clients that hold these requests, dealt in this order."""
    for place in range(dealt.size):
        request, client = dealt[place], client_of[place]
        after[request] = first[client]
        first[client] = request
        load[client] += rounds[request]


@allocating_kernel
def set_targets(loads: Loads, targets: Whole) -> None:
    """List the clients whose loads are above their ``targets``, shape (clients,)."""
    loads.over[0] = 0
    for client in range(loads.load.size):
        loads.target[client] = targets[client]
        loads.place[client] = 0
        _list_if_over(loads, client)


@kernel
def _list_if_over(loads: Loads, client: int) -> None:
    over = loads.load[client] > loads.target[client]
    place = loads.place[client]
    if over and place == 0:
        loads.over[0] += 1
        loads.over[loads.over[0]] = client
        loads.place[client] = loads.over[0]
    elif place > 0 and not over:
        moved = loads.over[loads.over[0]]
        loads.over[0] -= 1
        loads.over[place] = moved
        loads.place[moved] = place
        loads.place[client] = 0


@allocating_kernel
def walk(loads: Loads, tries: int, rng: np.random.Generator) -> int:
    """Split pairs anew until no load is above its target; return how many of the tries are left.

    A move never adds to the pair's excess over the targets, nor to its larger one unless that
    stays within the target; among the splits with the least excess it takes a random one. Most
    moves take an overloaded client, the others keep the remaining clients changing. Call
    ``set_targets`` first. At least two clients are needed.
    """
    clients = loads.load.size
    while tries > 0 and loads.over[0] > 0:
        tries -= 1
        if rng.random() < OVERLOADED_FIRST:
            one = loads.over[1 + rng.integers(0, loads.over[0])]
        else:
            one = rng.integers(0, clients)
        other = _lightest_of_some(loads.load, loads.target, one, rng)
        _split_anew(loads, one, other, rng)
    return tries


@allocating_kernel
def _lightest_of_some(load: Whole, target: Whole, one: int, rng: np.random.Generator) -> int:
    """Draw ``PARTNERS`` clients other than ``one``; return the one furthest below its target."""
    best = -1
    least = 0
    for _ in range(PARTNERS):
        drawn = rng.integers(0, load.size - 1)
        if drawn >= one:
            drawn += 1
        excess = load[drawn] - target[drawn]
        if best < 0 or excess < least:
            best, least = drawn, excess
    return best


@allocating_kernel
def _split_anew(loads: Loads, one: int, other: int, rng: np.random.Generator) -> None:
    """Pool the requests of two clients and share them out anew, unless that does harm.

    The first client's share is at most the one that leaves both the same excess.
    """
    unlike = loads.target[one] != loads.target[other] or loads.holds[one] != loads.holds[other]
    if unlike and rng.random() < 0.5:  # alike, the two shares might as well be swapped
        one, other = other, one
    size = _pool(loads, one, other)
    loose = _bind(loads, one, other, size) if unlike else size
    if loose > MAX_FREE or rng.random() < SHUFFLED:
        _shuffle(loads.pool, loose, rng)
    free = min(loose, MAX_FREE)
    settled = _deal_rest(loads, one, other, free, loose, size, unlike)
    total = loads.load[one] + loads.load[other]
    mine, theirs = loads.target[one], loads.target[other]
    worst = max(loads.load[one] - mine, loads.load[other] - theirs, 0)
    most = min((total + mine - theirs) // 2, total) - settled
    if most < 0:
        return
    shift = 0
    while most >> shift >= 64 * loads.reach.shape[1]:
        shift += 1
    limit = most >> shift
    _fill_reach(loads, free, limit, shift)
    wanted = _highest(loads.reach[free], limit)
    # Shares between the two ends of the window all leave the same excess over the targets.
    lowest = (max(min(mine, total - theirs), total - theirs - worst) - settled) >> shift
    if lowest < wanted:
        wanted = _highest(loads.reach[free], rng.integers(max(lowest, 0), wanted + 1))
    share = settled + _mark_share(loads, free, wanted, shift)
    over, over_other = share - mine, total - share - theirs
    excess = max(0, over) + max(0, over_other)
    before = max(0, loads.load[one] - mine) + max(0, loads.load[other] - theirs)
    if excess <= before and max(over, over_other) <= worst:
        _hand_out(loads, one, other, size)
        _list_if_over(loads, one)
        _list_if_over(loads, other)


@kernel
def _pool(loads: Loads, one: int, other: int) -> int:
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
def _bind(loads: Loads, one: int, other: int, size: int) -> int:
    """Move what only one of the pair can hold to the pool's end, marked; return how many are loose."""
    if loads.holds[one] == loads.holds[other]:
        return size
    least = min(loads.holds[one], loads.holds[other])
    loose = 0
    for k in range(size):
        request = loads.pool[k]
        if loads.needs[request] <= least:
            loads.pool[k], loads.pool[loose] = loads.pool[loose], request
            loose += 1
    for k in range(loose, size):
        loads.mine[k] = loads.holds[one] > least
    return loose


@allocating_kernel
def _shuffle(pool: Whole, size: int, rng: np.random.Generator) -> None:
    for last in range(size - 1, 0, -1):
        other = rng.integers(0, last + 1)
        pool[last], pool[other] = pool[other], pool[last]


@kernel
def _deal_rest(
    loads: Loads, one: int, other: int, free: int, loose: int, size: int, unlike: bool
) -> int:
    """Deal what is not free in turn to the share that is further behind its target; return the first's.

    Where the clients are alike it ends as the lighter one.
    """
    ours = theirs = 0
    for k in range(loose, size):
        if loads.mine[k]:
            ours += loads.rounds[loads.pool[k]]
        else:
            theirs += loads.rounds[loads.pool[k]]
    target, their_target = float(loads.target[one]), float(loads.target[other])
    for k in range(free, loose):
        loads.mine[k] = ours * their_target <= theirs * target
        if loads.mine[k]:
            ours += loads.rounds[loads.pool[k]]
        else:
            theirs += loads.rounds[loads.pool[k]]
    if ours > theirs and not unlike:
        for k in range(free, size):
            loads.mine[k] = not loads.mine[k]
        return theirs
    return ours


@kernel
def _fill_reach(loads: Loads, free: int, limit: int, shift: int) -> None:
    """Row k + 1 of ``reach`` is row k, or row k moved up by the length of the k-th free request."""
    reach = loads.reach
    words = limit // 64 + 1
    reach[0, :words] = 0
    reach[0, 0] = 1
    for k in range(free):
        length = loads.rounds[loads.pool[k]] >> shift
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
def _highest(row: NDArray[np.uint64], limit: int) -> int:
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
def _mark_share(loads: Loads, free: int, wanted: int, shift: int) -> int:
    """Mark free requests that sum to ``wanted``, a sum that is reached; return their rounds."""
    rounds = 0
    for k in range(free - 1, -1, -1):
        request = loads.pool[k]
        word, bit = wanted >> 6, np.uint64(wanted & 63)
        loads.mine[k] = not (loads.reach[k, word] >> bit) & np.uint64(1)
        if loads.mine[k]:
            wanted -= loads.rounds[request] >> shift
            rounds += loads.rounds[request]
    return rounds


@kernel
def _hand_out(loads: Loads, one: int, other: int, size: int) -> None:
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


@allocating_kernel
def kick(loads: Loads, pairs: int, rng: np.random.Generator) -> None:
    """Split some pairs at random, even for the worse, to leave a local optimum."""
    for _ in range(pairs):
        one = rng.integers(0, loads.load.size)
        other = _lightest_of_some(loads.load, loads.target, one, rng)
        size = _pool(loads, one, other)
        for k in range(_bind(loads, one, other, size)):
            loads.mine[k] = rng.random() < 0.5
        _hand_out(loads, one, other, size)


@allocating_kernel
def write_clients(loads: Loads, client_of: Whole) -> None:
    """Write the client of each request that has rounds."""
    for client in range(loads.first.size):
        request = loads.first[client]
        while request >= 0:
            client_of[request] = client
            request = loads.after[request]
