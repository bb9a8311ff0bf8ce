"""Moving requests between replicas: what a replica steals, how requests leave, land and join.

Rules are those of CLUSTER.md. A waiting request is stolen into the thief's queue. A running one is copied
while it goes on decoding, or dropped and computed again. A request whose keys and values are *stored*, by a
prefill replica or on the host, is *fetched* when it is admitted. Where requests may move, every replica that
could take part ends its run of decode rounds at the first boundary after anything happens.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel, rare_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.finishes import insert
from servegym.envs.simulator.memory import (
    blocks_of_rounds,
    count_held,
    emitted_tokens,
    free_blocks,
    guard_allows,
    stop_decoding,
)
from servegym.envs.simulator.queues import (
    blocks_of,
    count_waiting,
    first_waiting,
    forget_plan,
    leave_lists,
    push_back,
    rounds_ahead,
    tokens_to_prefill,
    waiting_at,
)
from servegym.envs.simulator.seconds import prefill_seconds
from servegym.envs.simulator.stages import cut, pick, see_arrivals, sort_idle
from servegym.envs.simulator.state import (
    COPYING,
    DECODE_RUN,
    DROPPING,
    HOST,
    IDLE,
    LANDED,
    LANDING,
    MIXED,
    MOVING,
    NOBODY,
    PAUSING,
    RUNNING,
    TO_QUEUE,
    UNLIMITED_BLOCKS,
    WAITING,
    State,
)
from servegym.envs.simulator.transfers import (
    end_move,
    find_next_due,
    keep_room,
    remove,
    start,
    stop_coming,
)
from servegym.envs.vocabulary import (
    MOVE_CHEAPER,
    MOVE_COPY,
    ROLE_PREFILL,
    TAKE_LONGEST,
    TAKE_OLDEST,
)

# ---- what a replica may steal ---------------------------------------------------------------


@kernel
def room_for(state: State, e: int, r: int) -> int:
    """Return how many more requests replica ``r`` has idle clients for than are at or on the way to it."""
    replica, queue = state.replicas[e, r], state.queues[e, r]
    return replica.idle - queue.waiting - queue.unseen - replica.coming


@kernel
def _present(state: State, e: int, r: int) -> int:
    """Return the requests at or on the way to replica ``r``."""
    replica, queue = state.replicas[e, r], state.queues[e, r]
    held = state.machines[r].clients - replica.idle
    return held + queue.waiting + queue.unseen + replica.coming


@kernel
def _may_serve(state: State, r: int, s: int) -> bool:
    """Return whether replica ``r`` can serve whatever replica ``s`` can."""
    thief, victim = state.machines[r], state.machines[s]
    return r != s and thief.role == victim.role and thief.blocks >= victim.blocks


@kernel
def _fits(state: State, e: int, r: int, blocks: int) -> bool:
    """Return whether ``r`` has memory for ``blocks`` besides those wanted by its queue and on the way there."""
    machine, replica, queue = state.machines[r], state.replicas[e, r], state.queues[e, r]
    if machine.blocks == UNLIMITED_BLOCKS:
        return True
    blocks += queue.blocks + queue.unseen_blocks + replica.coming_blocks
    if _present(state, e, r) > 0:
        blocks += machine.watermark_blocks
    return blocks <= free_blocks(state, e, r)


@rare_kernel
def fullest_queue(state: State, e: int, r: int) -> int:
    """Return the replica that ``r`` may steal waiting requests from, or NOBODY.

    It has most expected work waiting; the first request that would be taken must fit into memory.
    """
    best, most = NOBODY, 0
    if not state.cluster[0].steals_waiting or room_for(state, e, r) <= 0:
        return NOBODY
    for s in range(state.replicas.shape[1]):
        queue = state.queues[e, s]
        if queue.waiting + queue.unseen > 0 and _may_serve(state, r, s):
            work = queue.tokens + queue.rounds + queue.unseen_work
            if best == NOBODY or work > most:
                best, most = s, work
    if best == NOBODY or state.machines[r].blocks == UNLIMITED_BLOCKS:
        return best
    see_arrivals(state, e, best)
    i = _first_taken(state, e, best, min(room_for(state, e, r), state.queues[e, best].waiting))
    return best if _admissible(state, e, r, i) else NOBODY


@kernel
def _admissible(state: State, e: int, r: int, i: int) -> bool:
    """Return whether ``r`` could admit waiting request ``i`` if the queue before it were admitted."""
    if not _fits(state, e, r, _wanted_blocks(state, e, i)):
        return False
    if state.machines[r].blocks == UNLIMITED_BLOCKS:
        return True
    return guard_allows(state, e, r, i, state.machines[r].clients - state.replicas[e, r].idle)


@kernel
def _wanted_blocks(state: State, e: int, i: int) -> int:
    return blocks_of(state, tokens_to_prefill(state, e, i))


@kernel
def _first_taken(state: State, e: int, s: int, most: int) -> int:
    """Return which waiting request is stolen first if up to ``most`` are."""
    order, waiting = state.cluster[0].steal_order, state.queues[e, s].waiting
    if order == TAKE_LONGEST:
        return waiting_at(state, e, s, waiting - 1)
    i = first_waiting(state, e, s)
    if order == TAKE_OLDEST:
        return i
    skipped = waiting - most
    while skipped > 0:
        i = state.requests[e, i].next
        skipped -= state.requests[e, i].phase == WAITING
    return i


@rare_kernel
def stealable(state: State, costs: CostTables, e: int, r: int) -> int:
    """Return the running request that replica ``r`` may steal, or NOBODY.

    It has most rounds left of those at the replica where most decode, and must fit into memory.
    """
    if not state.cluster[0].steals_running or room_for(state, e, r) <= 0:
        return NOBODY
    best, most = NOBODY, _present(state, e, r) + 1
    for s in range(state.replicas.shape[1]):
        staying = state.replicas[e, s].active - state.replicas[e, s].leaving
        if staying > most and _may_serve(state, r, s):
            best, most = s, staying
    if best == NOBODY:
        return NOBODY
    i, due = NOBODY, 0
    for place in range(state.replicas[e, best].active):
        finish = state.expected[e, best, place]
        if i != NOBODY and finish.due < due:
            break
        if not state.requests[e, finish.request].leaving and (i == NOBODY or finish.request < i):
            i, due = finish.request, finish.due
    tokens = _held_now(state, e, best, i)
    if not _copies(state, costs, e, r, tokens):
        tokens += 1
    return i if _fits(state, e, r, blocks_of(state, tokens)) else NOBODY


@kernel
def _held_now(state: State, e: int, s: int, i: int) -> int:
    """Return the tokens that a decoding request holds after the rounds that have ended by now."""
    replica = state.replicas[e, s]
    rounds = 0
    if replica.stage == DECODE_RUN and replica.clock_s < state.episodes[e].now_s:
        rounds = replica.run_rounds - 1  # the run has been cut at the boundary that comes
    prompt = np.int64(state.requests[e, i].prompt_tokens)
    return prompt + emitted_tokens(state, e, s, i) + rounds - 1


@kernel
def _copies(state: State, costs: CostTables, e: int, r: int, held: int) -> bool:
    """Return whether a running request that holds so many tokens moves to ``r`` by copy."""
    move = state.cluster[0].move
    if move != MOVE_CHEAPER:
        return move == MOVE_COPY
    tokens = held + 1
    again_s = prefill_seconds(costs, r, tokens, float(tokens) * tokens, 1)
    return _copy_seconds(state, held) <= again_s


@kernel
def _copy_seconds(state: State, tokens: int) -> float:
    return state.cluster[0].copy_latency_s + tokens * state.cluster[0].copy_token_s


@kernel
def can_steal(state: State, costs: CostTables, e: int, r: int) -> bool:
    """Return whether replica ``r``, at its turn, may steal something."""
    if fullest_queue(state, e, r) != NOBODY:
        return True
    return stealable(state, costs, e, r) != NOBODY


# ---- stealing -------------------------------------------------------------------------------


@rare_kernel
def steal_waiting(state: State, e: int, r: int) -> None:
    """Take as many requests as ``r`` has room and memory for from the queue that it may steal from."""
    s = fullest_queue(state, e, r)
    see_arrivals(state, e, s)
    order = state.cluster[0].steal_order
    left = min(room_for(state, e, r), state.queues[e, s].waiting)
    i = _first_taken(state, e, s, left)
    while left > 0 and _admissible(state, e, r, i):
        after = state.requests[e, i].next
        _take(state, e, s, r, i)
        left -= 1
        if left > 0 and order in (TAKE_LONGEST, TAKE_OLDEST):
            i = _first_taken(state, e, s, left)
        elif left > 0:
            i = after
            while state.requests[e, i].phase != WAITING:
                i = state.requests[e, i].next


@kernel
def _take(state: State, e: int, s: int, r: int, i: int) -> None:
    """Send waiting request ``i`` from the queue of ``s`` to that of ``r``."""
    request = state.requests[e, i]
    count_waiting(state, e, s, i, -1)
    forget_plan(state, e, i)
    leave_lists(state, e, s, i)
    request.moves = min(request.moves + 1, 32_767)
    _send(state, e, s, r, i)


@kernel
def _send(state: State, e: int, s: int, r: int, i: int) -> None:
    """Let a request that has left ``s`` wait at ``r`` after the delay of a theft."""
    delay_s = state.cluster[0].steal_delay_s
    state.requests[e, i].phase = MOVING
    if delay_s == 0.0:
        join_queue(state, e, r, i)
        return
    state.replicas[e, r].coming += 1
    state.replicas[e, r].coming_blocks += _wanted_blocks(state, e, i)
    due_s = state.episodes[e].now_s + delay_s
    start(state, e, TO_QUEUE, i, s, r, NOBODY, tokens_to_prefill(state, e, i), due_s)


@rare_kernel
def join_queue(state: State, e: int, r: int, i: int) -> None:
    """Let a request wait at the end of the queue of ``r``."""
    request, queue = state.requests[e, i], state.queues[e, r]
    request.replica = r
    push_back(state, e, r, i)
    tokens = tokens_to_prefill(state, e, i)
    queue.unseen_blocks += blocks_of(state, tokens)
    queue.unseen_work += rounds_ahead(state, e, i)
    if request.stored == NOBODY:
        queue.unseen_work += tokens


@rare_kernel
def steal_running(state: State, costs: CostTables, e: int, r: int) -> None:
    """Begin to move the running request that ``r`` may steal, of which there must be one."""
    episode = state.episodes[e]
    i = stealable(state, costs, e, r)
    request = state.requests[e, i]
    s = np.int64(request.replica)
    held = _held_now(state, e, s, i)
    source = state.replicas[e, s]
    request.leaving = 1
    source.leaving += 1
    if _copies(state, costs, e, r, held):
        client = _lowest_idle(state, e, r)
        keep_room(state, e, r, client, held)
        due_s = episode.now_s + _copy_seconds(state, held)
        start(state, e, COPYING, i, s, r, client, held, due_s)
        return
    state.replicas[e, r].coming += 1
    state.replicas[e, r].coming_blocks += blocks_of(state, held + 1)
    start(state, e, DROPPING, i, s, r, NOBODY, held + 1, np.inf)
    if source.stage == IDLE:
        leave(state, e, s)
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


# ---- leaving --------------------------------------------------------------------------------


@rare_kernel
def leave(state: State, e: int, s: int) -> None:
    """Let requests leave replica ``s``, which is at a boundary, whose moves wait for it."""
    k = 0
    while k < state.episodes[e].transfers:
        transfer = state.transfers[e, k]
        kind = transfer.kind
        if transfer.source != s or kind not in (PAUSING, DROPPING):
            k += 1
        elif kind == DROPPING:
            i, target = np.int64(transfer.request), np.int64(transfer.target)
            _stop(state, e, s, i, False)
            state.requests[e, i].computed = 0
            stop_coming(state, e, k)
            remove(state, e, k)
            _send(state, e, s, target, i)
            if state.cluster[0].steal_delay_s > 0.0:
                _put_last_at(state, e, k)
        elif _keep_more(state, e, k):
            _pause(state, e, s, k)
            k += 1
        else:
            end_move(state, e, k)
    find_next_due(state, e)


@kernel
def _put_last_at(state: State, e: int, place: int) -> None:
    """Move the last transfer to ``place``: it goes on with the move that was there."""
    transfers, last = state.transfers[e], state.episodes[e].transfers - 1
    kind, request, source = transfers[last].kind, transfers[last].request, transfers[last].source
    target, due_s, tokens = transfers[last].target, transfers[last].due_s, transfers[last].tokens
    for k in range(last, place, -1):
        transfers[k] = transfers[k - 1]
    moved = transfers[place]
    moved.kind = kind
    moved.request = request
    moved.source = source
    moved.target = target
    moved.client = NOBODY
    moved.tokens = tokens
    moved.due_s = due_s


@kernel
def _stop(state: State, e: int, s: int, i: int, stores: bool) -> None:
    """Take a decoding request away from its client; ``s`` keeps its memory if it ``stores`` it."""
    request = state.requests[e, i]
    held = np.int64(request.prompt_tokens) + emitted_tokens(state, e, s, i) - 1
    client = np.int64(request.client)
    stop_decoding(state, e, s, i)
    if stores:
        request.emitted -= 1  # so that what is to be fetched is what it holds
    else:
        state.replicas[e, s].used_blocks -= blocks_of(state, held)
    leave_lists(state, e, s, i)
    request.plan_client = NOBODY
    if request.leaving:
        request.leaving = 0
        state.replicas[e, s].leaving -= 1
    request.client = client
    request.moves = min(request.moves + 1, 32_767)


@kernel
def _keep_more(state: State, e: int, place: int) -> bool:
    """Keep memory at the target for what the request has emitted since; return whether it was free."""
    transfer = state.transfers[e, place]
    s, i = np.int64(transfer.source), np.int64(transfer.request)
    held = _held_now(state, e, s, i)
    more = blocks_of(state, held) - blocks_of(state, np.int64(transfer.tokens))
    r = np.int64(transfer.target)
    replica = state.replicas[e, r]
    begun = 0  # rounds, that have taken their blocks
    if replica.stage == MIXED:
        begun = 1
    elif replica.stage == DECODE_RUN:
        begun = replica.run_rounds
    if more > free_blocks(state, e, r) - blocks_of_rounds(state, e, r, begun):
        return False
    replica.used_blocks += more
    replica.incoming_blocks += more
    return True


@kernel
def _pause(state: State, e: int, s: int, place: int) -> None:
    """Let a request leave ``s``; it lands when its last tokens have been copied."""
    transfer, episode = state.transfers[e, place], state.episodes[e]
    i = np.int64(transfer.request)
    copied = np.int64(transfer.tokens)
    _stop(state, e, s, i, True)
    request = state.requests[e, i]
    request.phase = MOVING
    request.client = transfer.client
    held = tokens_to_prefill(state, e, i)
    transfer.tokens = held
    transfer.kind = LANDING
    transfer.due_s = episode.now_s + (held - copied) * state.cluster[0].copy_token_s


@rare_kernel
def hand_over(state: State, e: int, s: int, prefilled: int) -> None:
    """Let the first ``prefilled`` of ``picked`` leave a prefill replica that has booked their stage."""
    for k in range(prefilled):
        i = np.int64(state.picked[e, s, k])
        if state.requests[e, i].phase == RUNNING:
            _stop(state, e, s, i, True)
            state.requests[e, i].stored = s
            state.requests[e, i].computed = 0
            join_queue(state, e, _decode_replica(state, e, i), i)


@kernel
def _decode_replica(state: State, e: int, i: int) -> int:
    """Return where a request whose prompt is computed goes on: the least requests at or on the way."""
    request = state.requests[e, i]
    whole = blocks_of(state, np.int64(request.prompt_tokens) + request.decode_rounds + 1)
    best, least = NOBODY, 0
    for r in range(state.replicas.shape[1]):
        if state.machines[r].role != ROLE_PREFILL and state.machines[r].blocks >= whole:
            present = _present(state, e, r)
            if best == NOBODY or present < least:
                best, least = r, present
    return best


# ---- fetching, landing, joining -------------------------------------------------------------


@rare_kernel
def fetch(state: State, e: int, r: int, client: int, i: int) -> None:
    """Admit a request whose keys and values are stored elsewhere; the caller takes the client."""
    request, cluster = state.requests[e, i], state.cluster[0]
    tokens = tokens_to_prefill(state, e, i)
    source = np.int64(request.stored)
    pick(state, e, r, client, i)
    request.phase = MOVING
    request.stored = NOBODY
    seconds = _copy_seconds(state, tokens)
    if source == HOST:
        seconds = 2.0 * (cluster.host_latency_s + tokens * cluster.host_token_s)  # out and back
    keep_room(state, e, r, client, tokens)
    start(state, e, LANDING, i, source, r, client, tokens, state.episodes[e].now_s + seconds)


@rare_kernel
def begin_instant(state: State, costs: CostTables, e: int) -> None:
    """Cut runs at the present instant and serve the transfers that are due, in order of their making."""
    episode = state.episodes[e]
    everybody = state.cluster[0].steals_running > 0
    for r in range(state.replicas.shape[1]):
        replica = state.replicas[e, r]
        if everybody or replica.idle > 0 or replica.incoming > 0 or replica.leaving > 0:
            cut(state, costs, e, r, episode.now_s)
    if episode.transfer_s > episode.now_s:
        return
    k = 0
    while k < episode.transfers:
        transfer = state.transfers[e, k]
        if transfer.due_s > episode.now_s:
            k += 1
            continue
        transfer.due_s = np.inf
        if transfer.kind == TO_QUEUE:
            stop_coming(state, e, k)
            join_queue(state, e, np.int64(transfer.target), np.int64(transfer.request))
            remove(state, e, k)
            continue
        if transfer.kind == COPYING:
            transfer.kind = PAUSING
        else:
            transfer.kind = LANDED
            if transfer.source != HOST:
                blocks = blocks_of(state, np.int64(transfer.tokens))
                state.replicas[e, transfer.source].used_blocks -= blocks
        k += 1
    find_next_due(state, e)


@rare_kernel
def end_boundary(state: State, e: int, r: int, prefilled: int) -> None:
    """Let requests leave a replica that has booked a stage, which has completed ``prefilled`` prompts."""
    if state.machines[r].role == ROLE_PREFILL and prefilled > 0:
        hand_over(state, e, r, prefilled)
    if state.replicas[e, r].leaving > 0:
        leave(state, e, r)


@rare_kernel
def end_instant(state: State, e: int) -> None:
    """Let landed requests join and wake every replica without a stage."""
    k = 0
    while k < state.episodes[e].transfers:
        transfer = state.transfers[e, k]
        r = np.int64(transfer.target)
        if transfer.kind == LANDED and state.replicas[e, r].stage == IDLE:
            _join(state, e, r, np.int64(transfer.request), np.int64(transfer.tokens))
            remove(state, e, k)
        else:
            k += 1
    wake_sleepers(state, e)


@kernel
def wake_sleepers(state: State, e: int) -> None:
    """Let every replica without a stage decide now."""
    for r in range(state.replicas.shape[1]):
        if state.replicas[e, r].stage == IDLE:
            state.replicas[e, r].clock_s = state.episodes[e].now_s
            state.event_s[e, r] = state.episodes[e].now_s


@kernel
def _join(state: State, e: int, r: int, i: int, tokens: int) -> None:
    """Let a landed request, which holds so many tokens, decode at ``r`` from now on."""
    request, replica, episode = state.requests[e, i], state.replicas[e, r], state.episodes[e]
    replica.incoming -= 1
    replica.incoming_blocks -= blocks_of(state, tokens)
    request.phase = RUNNING
    request.replica = r
    request.computed = tokens
    request.admission = episode.admissions
    episode.admissions += 1
    expected_end = replica.rounds + rounds_ahead(state, e, i)
    state.clients[e, r, request.client].expected_end = expected_end
    replica.due_sum += expected_end
    replica.cached_tokens += tokens + 1
    count_held(state, e, r, tokens, 1)
    due = replica.rounds + np.int64(request.decode_rounds) - request.emitted
    insert(state.finishes[e, r], replica.active, due, i)
    if not episode.lengths_known:
        insert(state.expected[e, r], replica.active, expected_end, i)
    replica.active += 1
