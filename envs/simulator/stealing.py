"""Stealing: which requests a replica may take from others at its turn, and how it takes them.

Rules are those of CLUSTER.md. Waiting requests go from the queue with most work into the thief's queue. A
running request comes from the replica that ``balancing`` says; ``moving`` brings it over.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.balancing import (
    may_serve,
    one_to_move,
    share_of,
    source_of_running,
)
from servegym.envs.simulator.joining import count_arrivals
from servegym.envs.simulator.memory import blocks_to_admit, free_blocks, guard_allows
from servegym.envs.simulator.moving import (
    copy_seconds,
    held_now,
    leave,
    present,
    room_for,
    send,
)
from servegym.envs.simulator.queues import (
    blocks_of,
    count_waiting,
    first_waiting,
    forget_plan,
    leave_lists,
    leave_unplanned,
    waiting_at,
)
from servegym.envs.simulator.seconds import prefill_seconds
from servegym.envs.simulator.stages import cut, sort_idle, time_tells
from servegym.envs.simulator.state import (
    COPYING,
    DECODE_RUN,
    DROPPING,
    IDLE,
    NOBODY,
    UNLIMITED_BLOCKS,
    WAITING,
    State,
)
from servegym.envs.simulator.transfers import keep_room, start
from servegym.envs.vocabulary import MOVE_CHEAPER, MOVE_COPY, TAKE_LONGEST, TAKE_OLDEST

# ---- what a replica may steal ---------------------------------------------------------------


@kernel
def _fits(state: State, e: int, r: int, blocks: int) -> bool:
    """Return whether ``r`` has memory for ``blocks`` besides those of all at and on the way to its queue."""
    machine, replica, queue = state.machines[r], state.replicas[e, r], state.queues[e, r]
    if machine.blocks == UNLIMITED_BLOCKS:
        return True
    blocks += queue.blocks + queue.unseen_blocks + replica.coming_blocks
    if present(state, e, r) > 0:
        blocks += machine.watermark_blocks
    return blocks <= free_blocks(state, e, r)


@shared_kernel
def fullest_queue(state: State, e: int, r: int) -> int:
    """Return the replica that ``r`` may steal waiting requests from, or NOBODY.

    It has most expected work waiting; the first request that would be taken must fit into memory.
    """
    best, most = NOBODY, 0
    if not state.cluster.steals_waiting or room_for(state, e, r) <= 0:
        return NOBODY
    for s in range(state.replicas.shape[1]):
        queue = state.queues[e, s]
        takes = queue.waiting + queue.unseen > queue.stolen and share_of(state, e, s, r) > 0
        if takes and may_serve(state, r, s):
            work = queue.tokens + queue.rounds + queue.unseen_work
            if best == NOBODY or work > most:
                best, most = s, work
    if best == NOBODY or state.machines[r].blocks == UNLIMITED_BLOCKS:
        return best
    count_arrivals(state, e, best)
    i = _first_taken(state, e, best, _most_taken(state, e, best, r))
    return best if _admissible(state, e, r, i) else NOBODY


@kernel
def _admissible(state: State, e: int, r: int, i: int) -> bool:
    """Return whether ``r`` could admit waiting request ``i`` if the queue before it were admitted."""
    blocks = blocks_to_admit(state, e, r, i, 0)
    if not _fits(state, e, r, blocks):
        return False
    if state.machines[r].blocks == UNLIMITED_BLOCKS:
        return True
    held = state.machines[r].clients - state.replicas[e, r].idle
    return guard_allows(state, e, r, i, blocks, held)


@kernel
def _most_taken(state: State, e: int, s: int, r: int) -> int:
    """Return how many requests ``r`` may steal from the queue of ``s``, which has been seen."""
    queue = state.queues[e, s]
    return min(room_for(state, e, r), queue.waiting - queue.stolen, share_of(state, e, s, r))


@kernel
def _may_take(state: State, e: int, i: int) -> bool:
    return state.requests[e, i].phase == WAITING and state.requests[e, i].stolen == 0


@kernel
def _first_taken(state: State, e: int, s: int, most: int) -> int:
    """Return which waiting request is stolen first if up to ``most`` ≥ 1 are."""
    queue, order = state.queues[e, s], state.cluster.steal_order
    if order == TAKE_LONGEST:
        place = queue.waiting - 1
        while state.requests[e, waiting_at(state, e, s, place)].stolen:
            place -= 1
        return waiting_at(state, e, s, place)
    skipped = 0 if order == TAKE_OLDEST else queue.waiting - queue.stolen - most
    i = first_waiting(state, e, s)
    while skipped > 0 or not _may_take(state, e, i):
        skipped -= int(_may_take(state, e, i))
        i = state.requests[e, i].next
    return i


@shared_kernel
def stealable(state: State, costs: CostTables, e: int, r: int) -> int:
    """Return the running request that replica ``r`` may steal, or NOBODY; it must fit into memory."""
    source = _source(state, costs, e, r)
    if source == NOBODY:
        return NOBODY
    i = one_to_move(state, e, source)
    return i if _fits(state, e, r, _moved_blocks(state, costs, e, source, i)) else NOBODY


@kernel
def _source(state: State, costs: CostTables, e: int, r: int) -> int:
    """Return the replica that a running request would come from if ``r`` has a client for it, or NOBODY."""
    if not state.cluster.steals_running or room_for(state, e, r) <= 0:
        return NOBODY
    return source_of_running(state, costs, e, r)


@kernel
def _moved_blocks(state: State, costs: CostTables, e: int, s: int, i: int) -> int:
    """Return the blocks that a request which decodes at ``s`` takes elsewhere with its next token."""
    return blocks_of(state, held_now(state, costs, e, s, i) + 1)


@kernel
def _copies(state: State, costs: CostTables, e: int, r: int, held: int) -> bool:
    """Return whether a running request that holds so many tokens moves to ``r`` by copy."""
    move = state.cluster.move
    if move != MOVE_CHEAPER:
        return move == MOVE_COPY
    tokens = held + 1
    again_s = prefill_seconds(costs, r, tokens, float(tokens) * tokens, 1)
    return copy_seconds(state, held) <= again_s


@kernel
def can_steal(state: State, costs: CostTables, e: int, r: int) -> bool:
    """Return whether replica ``r``, at its turn, may steal something."""
    if fullest_queue(state, e, r) != NOBODY:
        return True
    return stealable(state, costs, e, r) != NOBODY


@shared_kernel
def cut_to_act(state: State, costs: CostTables, e: int, decided: int) -> None:
    """End the runs of all replicas that may admit, steal or shed at the boundary that comes.

    Where replica ``decided`` has just begun something, or NOBODY: of others that have an idle client. What
    there is to steal is looked up once for all of them.
    """
    then_s = np.nextafter(state.episodes[e].now_s, np.inf)
    tells, waits = time_tells(state, e), _somebody_waits(state, e)
    # The last replica that a running request might come from, and the blocks of that request.
    source, blocks = NOBODY, 0
    for r in range(state.replicas.shape[1]):
        replica = state.replicas[e, r]
        if replica.stage != DECODE_RUN or replica.run_rounds == 1:
            continue
        if decided != NOBODY and (r == decided or replica.idle == 0):
            continue
        acts = tells
        if not acts and replica.idle > 0:
            acts = replica.told or (waits and fullest_queue(state, e, r) != NOBODY)
            best = NOBODY if acts else _source(state, costs, e, r)
            if best != NOBODY:
                if best != source:
                    i = one_to_move(state, e, best)
                    source, blocks = best, _moved_blocks(state, costs, e, best, i)
                acts = _fits(state, e, r, blocks)
        if acts:
            cut(state, costs, e, r, then_s)


@kernel
def _somebody_waits(state: State, e: int) -> bool:
    """Return whether some queue has a waiting request that has not been stolen, and thefts of such count."""
    if state.cluster.steals_waiting:
        for s in range(state.replicas.shape[1]):
            queue = state.queues[e, s]
            if queue.waiting + queue.unseen > queue.stolen:
                return True
    return False


# ---- stealing -------------------------------------------------------------------------------


@shared_kernel
def steal_waiting(state: State, costs: CostTables, e: int, r: int) -> None:
    """Take as many requests as ``r`` has room and memory for from the queue that it may steal from."""
    s = fullest_queue(state, e, r)
    count_arrivals(state, e, s)
    state.replicas[e, s].told = 1  # its next may fit where the first did not
    order = state.cluster.steal_order
    left = _most_taken(state, e, s, r)
    i = _first_taken(state, e, s, left)
    while left > 0 and _admissible(state, e, r, i):
        after = state.requests[e, i].next
        _take(state, costs, e, s, r, i)
        left -= 1
        if left > 0 and order in (TAKE_LONGEST, TAKE_OLDEST):
            i = _first_taken(state, e, s, left)
        elif left > 0:
            i = after
            while not _may_take(state, e, i):
                i = state.requests[e, i].next


@kernel
def _take(state: State, costs: CostTables, e: int, s: int, r: int, i: int) -> None:
    """Send waiting request ``i`` from the queue of ``s`` to that of ``r``."""
    request = state.requests[e, i]
    count_waiting(state, e, s, i, -1)
    leave_unplanned(state, e, s, i)
    if request.plan_client != NOBODY:
        forget_plan(state, e, i)
    leave_lists(state, e, s, i)
    request.moves = min(request.moves + 1, 32_767)
    send(state, costs, e, s, r, i)


@shared_kernel
def steal_running(state: State, costs: CostTables, e: int, r: int) -> None:
    """Begin to move the running request that ``r`` may steal, of which there must be one."""
    episode = state.episodes[e]
    i = stealable(state, costs, e, r)
    request = state.requests[e, i]
    s = np.int64(request.replica)
    held = held_now(state, costs, e, s, i)
    source = state.replicas[e, s]
    request.leaving = 1
    source.leaving += 1
    state.replicas[e, r].stole_s = episode.now_s
    if _copies(state, costs, e, r, held):
        client = _lowest_idle(state, e, r)
        rounds = request.expected_rounds - (held - request.prompt_tokens)
        keep_room(state, e, r, client, held, max(rounds, 0))
        due_s = episode.now_s + copy_seconds(state, held)
        start(state, e, COPYING, i, s, r, client, held, due_s)
        return
    state.replicas[e, r].coming += 1
    state.replicas[e, r].coming_blocks += blocks_of(state, held + 1)
    start(state, e, DROPPING, i, s, r, NOBODY, held + 1, np.inf)
    if source.stage == IDLE:
        leave(state, costs, e, s)
    else:
        cut(state, costs, e, s, np.nextafter(episode.now_s, np.inf))


@kernel
def _lowest_idle(state: State, e: int, r: int) -> int:
    """Take the lowest idle client; the replica must be between two stages."""
    sort_idle(state, e, r)
    replica, idle = state.replicas[e, r], state.idle[e, r]
    client = np.int64(idle[0])
    replica.idle -= 1
    for k in range(replica.idle):
        idle[k] = idle[k + 1]
    return client
