"""Moving requests between replicas: what a replica steals, how requests leave, land and join.

Rules are those of CLUSTER.md. A waiting request is stolen into the thief's queue. A running one is copied
while it goes on decoding, or dropped and computed again. A request whose keys and values are *stored*, by a
prefill replica or on the host, is *fetched* when it is admitted. Where requests may move, every replica that
could take part ends its run of decode rounds at the first boundary after something that others may act upon.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.finishes import insert
from servegym.envs.simulator.gaps import join_decoding
from servegym.envs.simulator.joining import see_arrivals
from servegym.envs.simulator.memory import (
    blocks_of_rounds,
    count_held,
    emitted_tokens,
    free_blocks,
    stop_decoding,
)
from servegym.envs.simulator.queues import (
    blocks_of,
    forget_admission,
    leave_lists,
    note_admission,
    push_routed,
    rounds_ahead,
    tokens_to_prefill,
)
from servegym.envs.simulator.slo import note_pace
from servegym.envs.simulator.stages import (
    cut,
    cut_to_see,
    end_at,
    pick,
    rounds_to_next_finish,
    rounds_until,
    time_tells,
)
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
from servegym.envs.vocabulary import ROLE_PREFILL

# ---- at and on the way to a replica --------------------------------------------------------


@kernel
def room_for(state: State, e: int, r: int) -> int:
    """Return how many more requests replica ``r`` has idle clients for than are at or on the way to it."""
    replica, queue = state.replicas[e, r], state.queues[e, r]
    return replica.idle - queue.waiting - queue.unseen - replica.coming


@kernel
def present(state: State, e: int, r: int) -> int:
    """Return the requests at or on the way to replica ``r``."""
    replica, queue = state.replicas[e, r], state.queues[e, r]
    held = state.machines[r].clients - replica.idle
    return held + queue.waiting + queue.unseen + replica.coming


@kernel
def wanted_blocks(state: State, e: int, i: int) -> int:
    """Return the blocks that the next prefill of a waiting request takes, or what it fetches."""
    return blocks_of(state, tokens_to_prefill(state, e, i))


@kernel
def held_now(state: State, costs: CostTables, e: int, s: int, i: int) -> int:
    """Return the tokens that a decoding request holds after the rounds that have ended by now."""
    replica, now_s = state.replicas[e, s], state.episodes[e].now_s
    rounds = 0
    if replica.stage == DECODE_RUN and replica.clock_s < now_s:
        rounds = rounds_until(state, costs, e, s, now_s) - 1  # what ends now has been booked
    return _held(state, e, s, i) + rounds


@kernel
def _held(state: State, e: int, s: int, i: int) -> int:
    """Return the tokens that a decoding request held when its replica's last stage was booked."""
    prompt = np.int64(state.requests[e, i].prompt_tokens)
    return prompt + emitted_tokens(state, e, s, i) - 1


@kernel
def copy_seconds(state: State, tokens: int) -> float:
    """Return how long the keys and values of so many tokens take from one replica to another."""
    return state.cluster.copy_latency_s + tokens * state.cluster.copy_token_s


@kernel
def send(state: State, costs: CostTables, e: int, s: int, r: int, i: int) -> None:
    """Let a request that has left ``s`` wait at ``r`` after the delay of a theft."""
    delay_s = state.cluster.steal_delay_s
    state.requests[e, i].phase = MOVING
    state.requests[e, i].stolen = 1
    if delay_s == 0.0:
        join_queue(state, costs, e, r, i)
        return
    state.replicas[e, r].coming += 1
    state.replicas[e, r].coming_blocks += wanted_blocks(state, e, i)
    due_s = state.episodes[e].now_s + delay_s
    start(state, e, TO_QUEUE, i, s, r, NOBODY, tokens_to_prefill(state, e, i), due_s)


@shared_kernel
def join_queue(state: State, costs: CostTables, e: int, r: int, i: int) -> None:
    """Let a request wait at the end of the queue of ``r``."""
    request = state.requests[e, i]
    request.replica = r
    state.queues[e, r].stolen += request.stolen
    state.replicas[e, r].told = 1
    push_routed(state, e, r, i)
    cut_to_see(state, costs, e, r)


# ---- leaving --------------------------------------------------------------------------------


@shared_kernel
def leave(state: State, costs: CostTables, e: int, s: int) -> None:
    """Let requests leave replica ``s``, which is at a boundary, whose moves wait for it."""
    delay_s = state.cluster.steal_delay_s
    k = 0
    while k < state.episodes[e].transfers:
        transfer = state.transfers[e, k]
        kind = transfer.kind
        if transfer.source != s or kind not in (PAUSING, DROPPING):
            k += 1
            continue
        see_arrivals(state, e, s)  # who came when those who leave were still there
        if kind == DROPPING:
            i, target = np.int64(transfer.request), np.int64(transfer.target)
            _stop(state, e, s, i, False)
            state.requests[e, i].computed = 0
            if delay_s > 0.0:  # the same transfer, with the blocks counted when it was made
                state.requests[e, i].phase = MOVING
                state.requests[e, i].stolen = 1
                transfer.kind = TO_QUEUE
                transfer.due_s = state.episodes[e].now_s + delay_s
                k += 1
                continue
            stop_coming(state, e, k)
            remove(state, e, k)
            send(state, costs, e, s, target, i)
        elif _keep_more(state, costs, e, k):
            _pause(state, e, s, k)
            k += 1
        else:
            end_move(state, e, k)
    find_next_due(state, e)


@kernel
def _stop(state: State, e: int, s: int, i: int, stores: bool) -> None:
    """Take a decoding request away from its client; ``s`` keeps its memory if it ``stores`` it."""
    request = state.requests[e, i]
    held = _held(state, e, s, i)
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
def _keep_more(state: State, costs: CostTables, e: int, place: int) -> bool:
    """Keep memory at the target for what the request has emitted since; return whether it was free."""
    transfer = state.transfers[e, place]
    s, i = np.int64(transfer.source), np.int64(transfer.request)
    held = _held(state, e, s, i)  # the source is at a boundary
    more = blocks_of(state, held) - blocks_of(state, np.int64(transfer.tokens))
    r = np.int64(transfer.target)
    replica = state.replicas[e, r]
    cut(state, costs, e, r, state.episodes[e].now_s)  # its memory is full sooner
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
    transfer.due_s = episode.now_s + (held - copied) * state.cluster.copy_token_s


@shared_kernel
def hand_over(state: State, costs: CostTables, e: int, s: int, prefilled: int) -> None:
    """Let the first ``prefilled`` of ``picked`` leave a prefill replica that has booked their stage."""
    for k in range(prefilled):
        i = np.int64(state.picked[e, s, k])
        if state.requests[e, i].phase == RUNNING:
            _stop(state, e, s, i, True)
            state.requests[e, i].stored = s
            state.requests[e, i].computed = 0
            join_queue(state, costs, e, _decode_replica(state, e, i), i)


@kernel
def _decode_replica(state: State, e: int, i: int) -> int:
    """Return where a request whose prompt is computed goes on: the least requests at or on the way."""
    request = state.requests[e, i]
    whole = blocks_of(state, np.int64(request.prompt_tokens) + request.decode_rounds + 1)
    best, least = NOBODY, 0
    for r in range(state.replicas.shape[1]):
        if state.machines[r].role != ROLE_PREFILL and state.machines[r].blocks >= whole:
            requests = present(state, e, r)
            if best == NOBODY or requests < least:
                best, least = r, requests
    return best


# ---- fetching, landing, joining -------------------------------------------------------------


@shared_kernel
def fetch(state: State, e: int, r: int, client: int, i: int) -> None:
    """Admit a request whose keys and values are stored elsewhere; the caller takes the client."""
    request, cluster = state.requests[e, i], state.cluster
    tokens = tokens_to_prefill(state, e, i)
    source = np.int64(request.stored)
    pick(state, e, r, client, i)
    forget_admission(state, e, r, client)  # it decodes when it has landed
    request.phase = MOVING
    request.stored = NOBODY
    seconds = copy_seconds(state, tokens)
    if source == HOST:
        seconds = 2.0 * (cluster.host_latency_s + tokens * cluster.host_token_s)  # out and back
    keep_room(state, e, r, client, tokens, rounds_ahead(state, e, i))
    start(state, e, LANDING, i, source, r, client, tokens, state.episodes[e].now_s + seconds)


@shared_kernel
def begin_instant(state: State, costs: CostTables, e: int, arrives: bool) -> bool:
    """End runs at a boundary that is now and serve the transfers that are due, in order of their making.

    Return whether this instant, at which a request ``arrives`` or none, may change what others can do.
    """
    episode = state.episodes[e]
    lands = episode.transfer_s <= episode.now_s
    changes = arrives or lands or _something_ends(state, e)
    for r in range(state.replicas.shape[1]):
        end_at(state, costs, e, r, episode.now_s)
    if lands:
        _serve_transfers(state, costs, e)
    return changes


@kernel
def _something_ends(state: State, e: int) -> bool:
    """Return whether a stage ends now that changes what others may steal, or who comes or leaves."""
    for r in range(state.replicas.shape[1]):
        replica = state.replicas[e, r]
        if replica.stage == IDLE or state.event_s[e, r] > state.episodes[e].now_s:
            continue
        if replica.stage != DECODE_RUN or replica.incoming > 0 or replica.leaving > 0:
            return True
        if time_tells(state, e):
            return True
        # Who decodes most may be another once somebody has finished.
        finishes = rounds_to_next_finish(state, e, r) <= replica.run_rounds
        if finishes and state.cluster.steals_running:
            return True
    return False


@kernel
def _serve_transfers(state: State, costs: CostTables, e: int) -> None:
    episode = state.episodes[e]
    k = 0
    while k < episode.transfers:
        transfer = state.transfers[e, k]
        if transfer.due_s > episode.now_s:
            k += 1
            continue
        transfer.due_s = np.inf
        if transfer.kind == TO_QUEUE:
            stop_coming(state, e, k)
            join_queue(state, costs, e, np.int64(transfer.target), np.int64(transfer.request))
            remove(state, e, k)
            continue
        if transfer.kind == COPYING:
            transfer.kind = PAUSING
            cut(state, costs, e, np.int64(transfer.source), episode.now_s)
        else:
            transfer.kind = LANDED
            cut(state, costs, e, np.int64(transfer.target), episode.now_s)
            if transfer.source != HOST:
                blocks = blocks_of(state, np.int64(transfer.tokens))
                state.replicas[e, transfer.source].used_blocks -= blocks
                state.replicas[e, transfer.source].told = 1
        k += 1
    find_next_due(state, e)


@shared_kernel
def end_boundary(state: State, costs: CostTables, e: int, r: int, prefilled: int) -> None:
    """Let requests leave a replica that has booked a stage, which has completed ``prefilled`` prompts."""
    if state.machines[r].role == ROLE_PREFILL and prefilled > 0:
        hand_over(state, costs, e, r, prefilled)
    if state.replicas[e, r].leaving > 0:
        leave(state, costs, e, r)


@shared_kernel
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
    note_admission(state, e, r, i)
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
    if episode.keeps_gaps:
        join_decoding(state, e, r, i)
    if episode.counts_slo:
        note_pace(state, e, r, i)
