"""Who goes first under the rule ``shortest`` where it does not go by length: see ``ORDERS``.

``batch`` is Sorted-F (Wang, Ye and Zhou, arXiv 2508.06133): batch after batch X of those who wait, each with
the least Σ o / |X|² of those that the replica, were it empty, could begin at once and see to their ends;
within a batch the shortest output first. To find the least of all batches is hard. Tried are the beginnings
of two orders: by output o, of which no batch of the same size has a smaller sum, and by prompt and output,
of which more fit into memory. Of equal ones the larger is taken, then the one by output. The sequence is
made anew when somebody waits who is not in it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel, kernel, shared_kernel
from servegym.envs.simulator.finishes import sort_keys
from servegym.envs.simulator.queues import blocks_of, queue_of, rounds_ahead, tokens_to_prefill
from servegym.envs.simulator.state import NOBODY, WAITING, State
from servegym.envs.vocabulary import BY_BATCH, BY_EXPECTED, BY_LEVEL, BY_PROMPT

Whole = NDArray[np.int64]

_TOKENS: Final = 0  # of the next prefill
_ROUNDS: Final = 1  # after it
_OUTPUT: Final = 2  # still to emit

_BY_OUTPUT: Final = 0
_BY_SIZE: Final = 1

_LEFT: Final = 0
_TAKEN: Final = 1
_PLACED: Final = 2


@shared_kernel
def first_in_order(state: State, e: int, r: int) -> int:
    """Return who goes first at replica ``r``; somebody must be waiting.

    Of equals it is the first to come; of equal expected lengths the last, as where the rule goes by length.
    """
    by, queue = state.cluster.shortest_by, state.queues[e, queue_of(state, r)]
    if by == BY_BATCH and queue.unordered:
        _order_batches(state, e, r)
        queue.unordered = 0
    best, least = NOBODY, np.inf
    i = queue.first
    while i != queue.first_unseen:
        if state.requests[e, i].phase == WAITING:
            key = _key(state, e, i, by)
            before = i > best if by == BY_EXPECTED else i < best
            if best == NOBODY or key < least or (key == least and before):
                best, least = i, key
        i = state.requests[e, i].next
    return best


@kernel
def _key(state: State, e: int, i: int, by: int) -> float:
    request = state.requests[e, i]
    if by == BY_EXPECTED:
        return float(request.expected_rounds)
    if by == BY_PROMPT:
        return float(request.prompt_tokens)
    if by == BY_LEVEL:
        return float(level_of(tokens_to_prefill(state, e, i), state.cluster.level_tokens))
    return state.priority[e, i]


@kernel
def level_of(tokens: int, first: int) -> int:
    """Return how often ``first`` tokens must be doubled to hold ``tokens``.

    Examples
    --------
    >>> [level_of(tokens, 256) for tokens in (1, 256, 257, 1024, 1025)]
    [0, 0, 1, 2, 3]
    """
    level, most = 0, first
    while tokens > most:
        level += 1
        most *= 2
    return level


# ---- batches --------------------------------------------------------------------------------


@allocating_kernel
def _order_batches(state: State, e: int, r: int) -> None:
    """Write the place of everybody who waits at replica ``r`` in a sequence of batches."""
    queue = state.queues[e, queue_of(state, r)]
    size = queue.waiting
    ids = np.empty(size, np.int64)
    count = 0
    i = queue.first
    while i != queue.first_unseen:
        if state.requests[e, i].phase == WAITING:
            ids[count] = i
            count += 1
        i = state.requests[e, i].next
    sort_keys(ids)
    waiting = np.empty((3, size), np.int64)
    orders = np.empty((2, size), np.int64)
    for k in range(size):
        tokens, rounds = tokens_to_prefill(state, e, ids[k]), rounds_ahead(state, e, ids[k])
        output = rounds + (state.requests[e, ids[k]].stored == NOBODY)
        waiting[_TOKENS, k] = tokens
        waiting[_ROUNDS, k] = rounds
        waiting[_OUTPUT, k] = output
        orders[_BY_OUTPUT, k] = output * size + k
        orders[_BY_SIZE, k] = (tokens + rounds) * size + k
    for which in range(2):
        sort_keys(orders[which])
        for k in range(size):
            orders[which, k] %= size
    marks = np.zeros(size, np.int64)
    placed = 0
    while placed < size:
        chosen, members, value = _BY_OUTPUT, 0, np.inf
        for which in range(2):
            count, least = _best_beginning(state, r, orders[which], marks, waiting)
            if least < value or (least == value and count > members):
                chosen, members, value = which, count, least
        for k in orders[chosen]:
            if members > 0 and marks[k] == _LEFT:
                marks[k] = _TAKEN
                members -= 1
        for k in orders[_BY_OUTPUT]:
            if marks[k] == _TAKEN:
                marks[k] = _PLACED
                state.priority[e, ids[k]] = placed
                placed += 1


@allocating_kernel
def _best_beginning(
    state: State, r: int, order: Whole, marks: Whole, waiting: Whole
) -> tuple[int, float]:
    """Return how many of those left in an order make the best batch, and its Σ o / |X|².

    ``order`` and ``marks`` have shape (waiting,), ``waiting`` (3, waiting). Who fits into no memory makes a
    batch alone.
    """
    blocks = state.machines[r].blocks
    most = min(state.machines[r].clients, order.size)
    members = np.empty(most, np.int64)
    used = np.empty(most, np.int64)  # blocks at each member's end, were there nobody else
    count, total = 0, 0
    best, least = 0, np.inf
    for k in order:
        if marks[k] != _LEFT:
            continue
        tokens, rounds = waiting[_TOKENS, k], waiting[_ROUNDS, k]
        held = blocks_of(state, tokens + rounds)
        fits = count < most
        for place in range(count):
            other = members[place]
            others_rounds = waiting[_ROUNDS, other]
            if others_rounds <= rounds:
                fits = fits and used[place] + blocks_of(state, tokens + others_rounds) <= blocks
            if others_rounds >= rounds:
                held += blocks_of(state, waiting[_TOKENS, other] + rounds)
        if not fits or (count > 0 and held > blocks):
            break
        for place in range(count):
            others_rounds = waiting[_ROUNDS, members[place]]
            if others_rounds <= rounds:
                used[place] += blocks_of(state, tokens + others_rounds)
        members[count] = k
        used[count] = held
        count += 1
        total += waiting[_OUTPUT, k]
        value = total / (count * count)
        if value <= least:
            best, least = count, value
    return best, least
