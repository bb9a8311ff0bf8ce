"""KV memory in blocks: what running requests hold, how long it lasts, who is preempted.

A decoding request of prompt p that has emitted k tokens holds p + k − 1 of them between stages; the
round that reads the last one raises that by 1. All decoding requests of a replica advance together: a
request's tokens less the replica's decode clock, modulo the block length, stay what they are while it
decodes. ``State.residues`` counts the requests by this number, so the blocks of any number of rounds
take at most one pass over it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.simulator.finishes import find, remove_one
from servegym.envs.simulator.gaps import end_decoding
from servegym.envs.simulator.queues import (
    await_plan,
    blocks_of,
    enqueue_first,
    push_front,
    push_last,
    queue_of,
    release_client,
    rounds_ahead,
    shares_pool,
    should_hold,
    tokens_to_prefill,
)
from servegym.envs.simulator.ranking import level_of
from servegym.envs.simulator.reserve import output_left, reserved_tokens, set_ratio_anew
from servegym.envs.simulator.state import HOST, NOBODY, UNLIMITED_BLOCKS, State
from servegym.envs.simulator.transfers import end_move_of
from servegym.envs.vocabulary import (
    FEWEST_EXPECTED,
    FEWEST_OUTPUT,
    GUARD_FULL,
    GUARD_NONE,
    GUARD_SGLANG,
    LEAST_COMPUTED,
    LOWEST_LEVEL,
)

_FOREVER: Final = 1 << 62
"""Rounds until a memory without limit is full."""


@kernel
def free_blocks(state: State, e: int, r: int) -> int:
    """Return the blocks of replica ``r`` that nobody holds."""
    return state.machines[r].blocks - state.replicas[e, r].used_blocks


@kernel
def count_held(state: State, e: int, r: int, tokens: int, sign: int) -> None:
    """Add (+1) or remove (−1) a decoding request that holds ``tokens``; its blocks are not counted."""
    length = state.cluster.block_tokens
    if length > 1:  # else every round takes a block of everyone
        state.residues[e, r, (tokens - state.replicas[e, r].rounds) % length] += sign


@kernel
def blocks_of_round(state: State, e: int, r: int) -> int:
    """Return the blocks that the next decode round takes."""
    length = state.cluster.block_tokens
    if length == 1:
        return state.replicas[e, r].active
    return state.residues[e, r, -state.replicas[e, r].rounds % length]


@kernel
def blocks_of_rounds(state: State, e: int, r: int, rounds: int) -> int:
    """Return the blocks that the next ``rounds`` decode rounds take, none finishing within."""
    length = state.cluster.block_tokens
    replica = state.replicas[e, r]
    if length == 1:
        return rounds * replica.active
    cycles = rounds // length
    blocks = cycles * replica.active
    place = -replica.rounds % length
    for _ in range(rounds - cycles * length):
        blocks += state.residues[e, r, place]
        place = (place if place > 0 else length) - 1
    return blocks


@kernel
def rounds_to_full(state: State, e: int, r: int) -> int:
    """Return how many decode rounds fit into the free blocks; a client must be active.

    Under the guard ``sglang`` it is one less: a round needs room for the token that it emits, too.
    """
    if state.machines[r].blocks == UNLIMITED_BLOCKS:
        return _FOREVER
    return _rounds_to_full(state, e, r)


@shared_kernel
def _rounds_to_full(state: State, e: int, r: int) -> int:
    length = state.cluster.block_tokens
    replica = state.replicas[e, r]
    free = free_blocks(state, e, r)
    cycles = free // replica.active
    rounds = cycles * length
    free -= cycles * replica.active
    if length > 1:
        place = -replica.rounds % length  # whole cycles later as well
        while state.residues[e, r, place] <= free:
            free -= state.residues[e, r, place]
            place = (place if place > 0 else length) - 1
            rounds += 1
    if state.cluster.guard == GUARD_SGLANG:
        rounds = max(rounds - 1, 1)
    return rounds


@kernel
def fits(state: State, e: int, r: int, i: int, taken: int, running: int) -> bool:
    """Return whether memory lets replica ``r`` admit waiting request ``i`` now.

    ``taken``: blocks that the stage needs besides; ``running``: requests that hold a client, those
    included that the stage has admitted. Watermark and guard do not bind where nothing runs: a request
    that is expected to be larger than the memory would never be admitted.
    """
    if state.machines[r].blocks == UNLIMITED_BLOCKS:
        return True
    return _fits(state, e, r, i, taken, running)


@shared_kernel
def _fits(state: State, e: int, r: int, i: int, taken: int, running: int) -> bool:
    blocks = blocks_to_admit(state, e, r, i, taken)
    if running > 0:
        blocks += state.replicas[e, r].reserve_blocks
    return blocks <= free_blocks(state, e, r) and guard_allows(state, e, r, i, blocks, running)


@kernel
def all_fit(state: State, e: int, r: int, taken: int) -> bool:
    """Return True if ``fits`` is true of every waiting request; False may also mean that it is not known."""
    if state.cluster.guard != GUARD_NONE:
        return False
    replica, queue = state.replicas[e, r], state.queues[e, queue_of(state, r)]
    blocks = min(queue.blocks, queue.most_blocks) + taken
    if state.cluster.moves:  # some may be fetched, see ``blocks_to_admit``
        blocks += 1 + blocks_of_round(state, e, r) + replica.incoming
    return blocks + replica.reserve_blocks <= free_blocks(state, e, r)


@kernel
def none_fits(state: State, e: int, r: int, taken: int) -> bool:
    """Return True if ``fits`` is false of every waiting request; False may also mean that it is not known.

    Somebody must be waiting. The others' next prefills take as much memory as the smallest, or more.
    """
    least = state.queues[e, queue_of(state, r)].least_blocks
    return least + taken > free_blocks(state, e, r)


@shared_kernel
def chunk_fits(state: State, e: int, r: int, i: int, tokens: int, running: int) -> bool:
    """Return whether the guard ``sglang`` lets a prefill stage compute ``tokens`` of request ``i``.

    ``running``: the other requests that hold a client; where there are none it does not bind.
    """
    if state.machines[r].blocks == UNLIMITED_BLOCKS or running == 0:
        return True
    done = np.int64(state.requests[e, i].computed)
    blocks = blocks_of(state, done + tokens) - blocks_of(state, done)
    blocks += blocks_of_round(state, e, r) + state.replicas[e, r].reserve_blocks
    ends = done + tokens == tokens_to_prefill(state, e, i)
    return _leaves_reserve(state, e, r, blocks, output_left(state, e, i) if ends else 0)


@kernel
def _leaves_reserve(state: State, e: int, r: int, blocks: int, tokens: int) -> bool:
    """Return whether ``blocks`` and an output of ``tokens`` fit beside what is reserved."""
    left = (free_blocks(state, e, r) - blocks) * state.cluster.block_tokens
    return left - tokens > reserved_tokens(state, e, r)


@kernel
def blocks_to_admit(state: State, e: int, r: int, i: int, taken: int) -> int:
    """Return the blocks that must be free to admit request ``i``, ``taken`` of them for something else.

    One that is fetched could be evicted and fetched again for ever, unless a round of everybody fits, too.
    """
    tokens = tokens_to_prefill(state, e, i)
    if state.requests[e, i].stored == NOBODY:
        return blocks_of(state, tokens) + taken
    round_blocks = blocks_of_round(state, e, r) + state.replicas[e, r].incoming
    return blocks_of(state, tokens + 1) + round_blocks


@shared_kernel
def guard_allows(state: State, e: int, r: int, i: int, blocks: int, running: int) -> bool:
    """Return whether the cluster's guard lets request ``i`` in, which takes ``blocks`` now.

    It does not bind where nothing runs.
    """
    guard = state.cluster.guard
    if guard == GUARD_NONE or running == 0:
        return True
    if guard == GUARD_SGLANG:
        return _leaves_reserve(state, e, r, blocks, output_left(state, e, i))
    return _guarded(state, e, r, i, guard)


@kernel
def _guarded(state: State, e: int, r: int, i: int, guard: int) -> bool:
    """Return whether the whole expected outputs fit: all at once, or at their largest in time."""
    replica, blocks = state.replicas[e, r], state.machines[r].blocks
    if guard == GUARD_FULL:
        total = _whole_blocks(state, e, i)
        for place in range(replica.active):
            total += _whole_blocks(state, e, state.expected[e, r, place].request)
        for k in range(replica.emitting):
            total += _whole_blocks(state, e, state.picked[e, r, k])
        if replica.partial != NOBODY:
            total += _whole_blocks(state, e, replica.partial)
        return total + replica.incoming_blocks <= blocks
    # Memory grows until a request finishes, so it is largest where one does.
    if _used_at(state, e, r, i, rounds_ahead(state, e, i)) > blocks:
        return False
    for place in range(replica.active):
        rounds = state.expected[e, r, place].due - replica.rounds
        if _used_at(state, e, r, i, rounds) > blocks:
            return False
    for k in range(replica.emitting):
        rounds = rounds_ahead(state, e, state.picked[e, r, k])
        if _used_at(state, e, r, i, rounds) > blocks:
            return False
    if replica.partial != NOBODY:
        rounds = rounds_ahead(state, e, replica.partial)
        if _used_at(state, e, r, i, rounds) > blocks:
            return False
    return True


@kernel
def _whole_blocks(state: State, e: int, i: int) -> int:
    request = state.requests[e, i]
    return blocks_of(state, np.int64(request.prompt_tokens) + request.expected_rounds + 1)


@kernel
def _used_at(state: State, e: int, r: int, i: int, rounds: int) -> int:
    """Return the blocks in use ``rounds`` from now if request ``i`` is admitted; finishing ones count."""
    replica = state.replicas[e, r]
    total = _held_at(state, e, r, i, rounds) + replica.incoming_blocks
    for place in range(replica.active):
        finish = state.expected[e, r, place]
        left = finish.due - replica.rounds
        if left >= rounds:
            request = state.requests[e, finish.request]
            held = np.int64(request.prompt_tokens) + request.expected_rounds - left
            total += blocks_of(state, held + rounds)
    for k in range(replica.emitting):
        total += _held_at(state, e, r, state.picked[e, r, k], rounds)
    if replica.partial != NOBODY:
        total += _held_at(state, e, r, replica.partial, rounds)
    return total


@kernel
def _held_at(state: State, e: int, r: int, i: int, rounds: int) -> int:
    if rounds_ahead(state, e, i) < rounds:
        return 0
    return blocks_of(state, tokens_to_prefill(state, e, i) + rounds)


# ---- preemption -----------------------------------------------------------------------------


@kernel
def make_room(state: State, e: int, r: int) -> bool:
    """Preempt until the next decode round fits; return whether anybody was preempted."""
    if state.machines[r].blocks == UNLIMITED_BLOCKS:
        return False
    return _make_room(state, e, r)


@shared_kernel
def _make_room(state: State, e: int, r: int) -> bool:
    preempted = False
    reserves = state.cluster.guard == GUARD_SGLANG
    rounds = 2 if reserves else 1  # with room for the token that the round emits
    while blocks_of_rounds(state, e, r, rounds) > free_blocks(state, e, r):
        preempt(state, e, r, find_victim(state, e, r))
        preempted = True
    if preempted and reserves:
        set_ratio_anew(state, e, r)
    return preempted


@kernel
def find_victim(state: State, e: int, r: int) -> int:
    """Return who is to be preempted: by the cluster's rule, of equals the newest.

    Under the guard ``sglang`` it is a decoding one, unless it were the last: then the half-computed one, if
    there is one. In a pool a replica may be too small for the last, too.
    """
    ends = state.admitted.shape[2] - 1
    if ends > 0:
        ring = state.admitted[e, r]
        return np.int64(ring[ring[ends].older].request)
    replica = state.replicas[e, r]
    best = replica.partial
    if state.cluster.guard == GUARD_SGLANG:
        if replica.active <= 1 and best != NOBODY:
            return best
        best = NOBODY
    for place in range(replica.active):
        i = state.finishes[e, r, place].request
        if best == NOBODY or _sooner(state, e, r, i, best):
            best = i
    return best


@kernel
def _sooner(state: State, e: int, r: int, i: int, j: int) -> bool:
    """Return whether request ``i`` is preempted before request ``j``."""
    one, other = state.requests[e, i], state.requests[e, j]
    rule = state.cluster.victim
    if rule == LEAST_COMPUTED:
        mine, theirs = computed_tokens(state, e, r, i), computed_tokens(state, e, r, j)
        if mine != theirs:
            return mine < theirs
    elif rule == FEWEST_OUTPUT:
        mine, theirs = emitted_tokens(state, e, r, i), emitted_tokens(state, e, r, j)
        if mine != theirs:
            return mine < theirs
        if one.prompt_tokens != other.prompt_tokens:
            return one.prompt_tokens > other.prompt_tokens
    elif rule == FEWEST_EXPECTED:
        if one.expected_rounds != other.expected_rounds:
            return one.expected_rounds < other.expected_rounds
    elif rule == LOWEST_LEVEL:
        mine, theirs = _running_level(state, e, r, i), _running_level(state, e, r, j)
        if mine != theirs:
            return mine > theirs
    return one.admission > other.admission


@kernel
def _running_level(state: State, e: int, r: int, i: int) -> int:
    tokens = np.int64(state.requests[e, i].prompt_tokens) + emitted_tokens(state, e, r, i)
    return level_of(tokens, state.cluster.level_tokens)


@kernel
def emitted_tokens(state: State, e: int, r: int, i: int) -> int:
    """Return the output tokens of a running request so far."""
    request, replica = state.requests[e, i], state.replicas[e, r]
    if i == replica.partial:
        return np.int64(request.emitted)
    # It decodes: what its finish says is true, how many it has emitted everybody knows.
    client = state.clients[e, r, request.client]
    left = client.expected_end - replica.rounds
    return np.int64(request.expected_rounds) + 1 - left


@kernel
def computed_tokens(state: State, e: int, r: int, i: int) -> int:
    """Return the tokens of a running request whose keys and values are held."""
    request = state.requests[e, i]
    if i == state.replicas[e, r].partial:
        return np.int64(request.computed)
    return np.int64(request.prompt_tokens) + emitted_tokens(state, e, r, i) - 1


@kernel
def preempt(state: State, e: int, r: int, i: int) -> None:
    """Drop a running request's memory; let it wait before all others, with SGLang behind them."""
    replica, request = state.replicas[e, r], state.requests[e, i]
    client = np.int64(request.client)
    replica.used_blocks -= blocks_of(state, computed_tokens(state, e, r, i))
    if i == replica.partial:
        replica.partial = NOBODY
        release_client(state, e, r, client)
    else:
        stop_decoding(state, e, r, i)
        if state.cluster.evicts_to_host:
            request.stored = HOST
            request.emitted -= 1  # what it fetches later is what it held
    if request.leaving:
        end_move_of(state, e, i)
    state.episodes[e].disturbed = 1
    request.computed = 0
    request.preemptions = min(request.preemptions + 1, 32_767)
    replica.preemptions += 1
    if shares_pool(state) and not should_hold(state, e, r, i):
        await_plan(state, e, 0, i)
    else:
        enqueue_first(state, e, r, client, i)
    if state.cluster.guard == GUARD_SGLANG:
        push_last(state, e, queue_of(state, r), i)
    else:
        push_front(state, e, queue_of(state, r), i)


@kernel
def stop_decoding(state: State, e: int, r: int, i: int) -> None:
    """Take a decoding request from its client and note what it has emitted; blocks are not counted."""
    replica, request = state.replicas[e, r], state.requests[e, i]
    if state.episodes[e].keeps_gaps:
        end_decoding(state, e, r, i)
    emitted = emitted_tokens(state, e, r, i)
    held = np.int64(request.prompt_tokens) + emitted - 1
    count_held(state, e, r, held, -1)
    replica.cached_tokens -= held + 1
    replica.due_sum -= state.clients[e, r, request.client].expected_end
    _forget_finish(state, e, r, i, emitted)
    replica.active -= 1
    request.emitted = emitted
    release_client(state, e, r, np.int64(request.client))


@kernel
def _forget_finish(state: State, e: int, r: int, i: int, emitted: int) -> None:
    """Remove a request from the true and the expected finishes."""
    replica, request = state.replicas[e, r], state.requests[e, i]
    due = replica.rounds + request.decode_rounds + 1 - emitted
    remove_one(
        state.finishes[e, r], replica.active, find(state.finishes[e, r], replica.active, due, i)
    )
    if not state.episodes[e].lengths_known:
        due = state.clients[e, r, request.client].expected_end
        place = find(state.expected[e, r], replica.active, due, i)
        remove_one(state.expected[e, r], replica.active, place)
