"""Who waits: in order of service, in order of length, in the clients' planned queues."""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.simulator.order import add, highest, lowest, select
from servegym.envs.simulator.state import NOBODY, UNLIMITED_BLOCKS, WAITING, State


@kernel
def blocks_of(state: State, tokens: int) -> int:
    """Return the blocks of KV memory that ``tokens`` computed tokens of one request take."""
    length = state.cluster.block_tokens
    return tokens if length == 1 else -(-tokens // length)


@kernel
def queue_of(state: State, r: int) -> int:
    """Return the queue that replica ``r`` admits from: its own, or the pool."""
    return min(r, state.queues.shape[1] - 1)


@kernel
def shares_pool(state: State) -> bool:
    """Return whether several replicas have one queue."""
    return state.queues.shape[1] < state.replicas.shape[1]


@kernel
def tokens_to_prefill(state: State, e: int, i: int) -> int:
    """Return the tokens of a waiting request's next prefill: its prompt and what it has emitted.

    Of a request whose keys and values are stored elsewhere these are what it fetches: all but the last
    emitted token, which ``emitted`` does not count then.
    """
    request = state.requests[e, i]
    return np.int64(request.prompt_tokens) + request.emitted


@kernel
def rounds_ahead(state: State, e: int, i: int) -> int:
    """Return the decode rounds that should follow a waiting request's next prefill."""
    request = state.requests[e, i]
    return np.int64(request.expected_rounds) - request.emitted


@kernel
def should_hold(state: State, e: int, r: int, i: int) -> bool:
    """Return whether replica ``r`` should hold a request of the pool to its end, or is the largest."""
    request, blocks, most = state.requests[e, i], state.machines[r].blocks, 0
    for s in range(state.machines.size):
        most = max(most, state.machines[s].blocks)
    whole = blocks_of(state, np.int64(request.prompt_tokens) + request.expected_rounds + 1)
    return blocks >= min(whole, most)


# ---- in order of service --------------------------------------------------------------------
# A linked list. Whoever is taken from its middle stays in it until it comes to the front, or until it is
# preempted or leaves. ``State.before`` is the way back, but for the first.


@kernel
def _append(state: State, e: int, q: int, i: int) -> None:
    """Let a request wait at the end of a queue; it is not counted yet."""
    queue, request = state.queues[e, q], state.requests[e, i]
    request.phase = WAITING
    request.next = NOBODY
    request.listed = 1
    if queue.last == NOBODY:
        queue.first = i
    else:
        state.requests[e, queue.last].next = i
        state.before[e, i] = queue.last
    queue.last = i


@kernel
def push_back(state: State, e: int, q: int, i: int) -> None:
    """Let a request that has just come wait at the end of a queue, unseen until the next look."""
    queue = state.queues[e, q]
    _append(state, e, q, i)
    if queue.first_unseen == NOBODY:
        queue.first_unseen = i
    queue.unseen += 1


@kernel
def push_routed(state: State, e: int, r: int, i: int) -> None:
    """Do as ``push_back`` at a replica's own queue, of which routers and thieves see the unseen, too."""
    queue, tokens = state.queues[e, r], tokens_to_prefill(state, e, i)
    push_back(state, e, r, i)
    queue.unseen_blocks += blocks_of(state, tokens)
    queue.unseen_work += rounds_ahead(state, e, i)
    if state.requests[e, i].stored == NOBODY:
        queue.unseen_work += tokens


@kernel
def push_front(state: State, e: int, q: int, i: int) -> None:
    """Let a preempted request wait before all others."""
    queue, request = state.queues[e, q], state.requests[e, i]
    if request.listed:
        _unlist(state, e, q, i)
    request.phase = WAITING
    request.listed = 1
    request.next = queue.first
    if queue.first == NOBODY:
        queue.last = i
    else:
        state.before[e, queue.first] = i
    queue.first = i
    count_waiting(state, e, q, i, 1)


@shared_kernel
def push_last(state: State, e: int, q: int, i: int) -> None:
    """Let a preempted request wait behind all others, who have been seen."""
    if state.requests[e, i].listed:
        _unlist(state, e, q, i)
    _append(state, e, q, i)
    count_waiting(state, e, q, i, 1)


@kernel
def leave_lists(state: State, e: int, q: int, i: int) -> None:
    """Take a request that no longer waits, and goes elsewhere, out of the lists that it is still in."""
    request = state.requests[e, i]
    if request.listed:
        _unlist(state, e, q, i)
        request.listed = 0
    if request.planned:
        _drop_planned(state, e, i)
        request.planned = 0


@kernel
def note_admission(state: State, e: int, r: int, i: int) -> None:
    """Give the admission of request ``i``, which has its client, a running number."""
    request, episode = state.requests[e, i], state.episodes[e]
    request.admission = episode.admissions
    episode.admissions += 1
    ends = state.admitted.shape[2] - 1
    if ends > 0:
        ring, client = state.admitted[e, r], np.int64(request.client)
        newest = np.int64(ring[ends].older)
        ring[client].request = i
        ring[client].older = newest
        ring[client].newer = ends
        ring[newest].newer = client
        ring[ends].older = client


@kernel
def forget_admission(state: State, e: int, r: int, client: int) -> None:
    """Take a client out of the ring of those that have requests, if it is in it."""
    if state.admitted.shape[2] > 0:
        ring = state.admitted[e, r]
        older, newer = np.int64(ring[client].older), np.int64(ring[client].newer)
        ring[older].newer = newer
        ring[newer].older = older
        ring[client].older = client
        ring[client].newer = client


@kernel
def release_client(state: State, e: int, r: int, client: int) -> None:
    """Append a client that has lost its request to the idle ones."""
    replica = state.replicas[e, r]
    state.clients[e, r, client].expected_end = 0
    if state.paces.shape[2] > 0:
        state.paces[e, r, client].first_token_s = np.nan
    forget_admission(state, e, r, client)
    state.idle[e, r, replica.idle] = client
    replica.sorted = min(replica.sorted, replica.idle)
    replica.idle += 1


@kernel
def _unlist(state: State, e: int, q: int, i: int) -> None:
    """Take a request that no longer waits out of the list that it is still in."""
    queue = state.queues[e, q]
    after = state.requests[e, i].next
    if queue.first == i:
        queue.first = after
        if after == NOBODY:
            queue.last = NOBODY
        return
    before = state.before[e, i]
    state.requests[e, before].next = after
    if after == NOBODY:
        queue.last = before
    else:
        state.before[e, after] = before


@kernel
def first_waiting(state: State, e: int, q: int) -> int:
    """Return the first in the order of service; somebody must be waiting."""
    queue = state.queues[e, q]
    i = queue.first
    while state.requests[e, i].phase != WAITING:
        state.requests[e, i].listed = 0
        i = state.requests[e, i].next
    queue.first = i
    return i


@kernel
def count_waiting(state: State, e: int, q: int, i: int, sign: int) -> None:
    """Add request ``i`` to the counts of waiting requests (``sign`` +1) or subtract it (−1)."""
    queue, request = state.queues[e, q], state.requests[e, i]
    tokens = tokens_to_prefill(state, e, i)
    queue.waiting += sign
    queue.rounds += sign * rounds_ahead(state, e, i)
    if state.cluster.counts_memory:
        blocks = blocks_of(state, tokens)
        queue.blocks += sign * blocks
        if sign > 0:
            queue.most_blocks = max(queue.most_blocks, blocks)
            least_blocks = min(queue.least_blocks, blocks)
            queue.least_blocks = blocks if queue.waiting == 1 else least_blocks
        elif queue.waiting == 0:
            queue.most_blocks = 0
        if request.stored != NOBODY:
            tokens = 0  # they are computed already
    queue.tokens += sign * tokens
    queue.squares_high += sign * (tokens * tokens >> 32)
    queue.squares_low += sign * (tokens * tokens & 0xFFFFFFFF)
    if sign > 0:
        queue.unordered = 1
    state.waiting_lengths[e, q, request.bucket] += sign
    add(state.waiting_tree[e, q], request.rank, sign)


@kernel
def count_all_waiting(state: State, e: int, q: int, first: int) -> int:
    """Count request ``first`` and all behind it, who have just been seen; return how many have no plan.

    Among those who wait, as ``count_waiting`` does one by one, and among those who have arrived. Sums of
    local numbers take half the time.
    """
    counts_memory, queue = state.cluster.counts_memory, state.queues[e, q]
    least_blocks = queue.least_blocks if queue.waiting > 0 else UNLIMITED_BLOCKS
    count, rounds, all_tokens, blocks, most_blocks, high, low = 0, 0, 0, 0, 0, 0, 0
    arrived, arrived_rounds, unplanned = 0, 0, 0
    i = first
    while i != NOBODY:
        request, tokens = state.requests[e, i], np.int64(tokens_to_prefill(state, e, i))
        if request.moves == 0:  # else it has been seen elsewhere
            arrived += 1
            arrived_rounds += np.int64(request.expected_rounds)
        unplanned += request.plan_client == NOBODY
        count += 1
        rounds += rounds_ahead(state, e, i)
        if counts_memory:
            its_blocks = blocks_of(state, tokens)
            blocks += its_blocks
            most_blocks = max(most_blocks, its_blocks)
            least_blocks = min(least_blocks, its_blocks)
            if request.stored != NOBODY:
                tokens = 0
        all_tokens += tokens
        high += tokens * tokens >> 32
        low += tokens * tokens & 0xFFFFFFFF
        state.waiting_lengths[e, q, request.bucket] += 1
        add(state.waiting_tree[e, q], request.rank, 1)
        i = request.next
    episode = state.episodes[e]
    queue.waiting += count
    queue.rounds += rounds
    queue.blocks += blocks
    queue.most_blocks = max(queue.most_blocks, most_blocks)
    queue.least_blocks = least_blocks
    queue.tokens += all_tokens
    queue.squares_high += high
    queue.squares_low += low
    queue.unordered = 1
    episode.arrived += arrived
    episode.arrived_rounds += arrived_rounds
    return unplanned


@kernel
def waiting_at(state: State, e: int, q: int, place: int) -> int:
    """Return the waiting request at a place in the order of length, 0 the shortest."""
    return state.by_length[e, select(state.waiting_tree[e, q], place)]


@kernel
def shortest_waiting(state: State, e: int, q: int) -> int:
    """Return the first in the order of length; somebody must be waiting."""
    return state.by_length[e, lowest(state.waiting_tree[e, q])]


@kernel
def longest_waiting(state: State, e: int, q: int) -> int:
    """Return the last in the order of length; somebody must be waiting."""
    return state.by_length[e, highest(state.waiting_tree[e, q])]


# ---- the clients' planned queues ------------------------------------------------------------
# Linked lists, which keep whoever was stolen or preempted as the order of service does, with
# ``State.plan_before`` as the way back, but for the first.


@kernel
def enqueue(state: State, e: int, r: int, client: int, i: int) -> None:
    """Append a request to a client's planned queue."""
    queue, request = state.clients[e, r, client], state.requests[e, i]
    request.plan_next = NOBODY
    if queue.queue_tail == NOBODY:
        queue.queue_head = i
    else:
        state.requests[e, queue.queue_tail].plan_next = i
        state.plan_before[e, i] = queue.queue_tail
    queue.queue_tail = i
    _count_queued(state, e, r, client, i, 1)


@kernel
def enqueue_first(state: State, e: int, r: int, client: int, i: int) -> None:
    """Put a preempted request before all others of a client's planned queue."""
    request = state.requests[e, i]
    if request.planned:
        _drop_planned(state, e, i)
    queue = state.clients[e, r, client]
    request.plan_next = queue.queue_head
    if queue.queue_head == NOBODY:
        queue.queue_tail = i
    else:
        state.plan_before[e, queue.queue_head] = i
    queue.queue_head = i
    _count_queued(state, e, r, client, i, 1)


@kernel
def _drop_planned(state: State, e: int, i: int) -> None:
    """Take a request out of the planned queue that it is still in."""
    request = state.requests[e, i]
    queue = state.clients[e, request.plan_replica, request.plan_client]
    after = state.requests[e, i].plan_next
    if queue.queue_head == i:
        queue.queue_head = after
        if after == NOBODY:
            queue.queue_tail = NOBODY
        return
    before = state.plan_before[e, i]
    state.requests[e, before].plan_next = after
    if after == NOBODY:
        queue.queue_tail = before
    else:
        state.plan_before[e, after] = before


@kernel
def leave_plan(state: State, e: int, i: int) -> None:
    """Count a request no more among those of its planned queue."""
    request = state.requests[e, i]
    _count_queued(state, e, request.plan_replica, request.plan_client, i, -1)


@kernel
def forget_plan(state: State, e: int, i: int) -> None:
    """Take a request that has never run out of its planned queue: it goes elsewhere."""
    leave_plan(state, e, i)
    _drop_planned(state, e, i)
    state.requests[e, i].plan_client = NOBODY
    state.requests[e, i].planned = 0


@kernel
def leave_unplanned(state: State, e: int, q: int, i: int) -> None:
    """Count a request that leaves queue ``q`` no more among those that are in no planned queue yet."""
    queue, request = state.queues[e, q], state.requests[e, i]
    if request.plan_client == NOBODY:
        queue.unplanned -= 1
    if queue.first_unplanned == i:
        queue.first_unplanned = request.next


@kernel
def await_plan(state: State, e: int, q: int, i: int) -> None:
    """Let a request that is to wait before all others in queue ``q`` have no planned queue."""
    queue, request = state.queues[e, q], state.requests[e, i]
    if request.planned:
        _drop_planned(state, e, i)
        request.planned = 0
    request.plan_client = NOBODY
    queue.unplanned += 1
    queue.first_unplanned = i


@kernel
def _count_queued(state: State, e: int, r: int, client: int, i: int, sign: int) -> None:
    queue = state.clients[e, r, client]
    queue.queue_rounds += sign * rounds_ahead(state, e, i)
    queue.queue_requests += sign
    if sign > 0:
        state.requests[e, i].plan_replica = r
        state.requests[e, i].plan_client = client
        state.requests[e, i].planned = 1


@kernel
def head(state: State, e: int, r: int, client: int) -> int:
    """Return the first request still waiting in a client's planned queue, or NOBODY."""
    queue = state.clients[e, r, client]
    if queue.queue_requests == 0:
        return NOBODY
    i = queue.queue_head
    while i != NOBODY and state.requests[e, i].phase > WAITING:
        state.requests[e, i].planned = 0
        i = state.requests[e, i].plan_next
    queue.queue_head = i
    if i == NOBODY:
        queue.queue_tail = NOBODY
    return i
