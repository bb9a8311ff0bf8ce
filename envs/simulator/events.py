"""The event loop: from one decision to the next, over all replicas of a cluster.

The next event is the earliest of an arrival and the end of a replica's stage. At one instant all
arrivals come first, in order of id, each routed on what has been booked before; then all stages that
end are booked, by replica; then every replica without a stage decides, by number.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.admission import admit, admit_chunks, admit_pieces, patient_until
from servegym.envs.simulator.booking import book
from servegym.envs.simulator.gaps import note_stage
from servegym.envs.simulator.joining import look_at_others, see_arrivals
from servegym.envs.simulator.memory import make_room
from servegym.envs.simulator.moving import begin_instant, end_boundary, end_instant, wake_sleepers
from servegym.envs.simulator.queues import (
    blocks_of,
    forget_plan,
    push_back,
    push_routed,
    queue_of,
    shares_pool,
)
from servegym.envs.simulator.routing import largest_servable, route
from servegym.envs.simulator.shedding import shed_late
from servegym.envs.simulator.stages import (
    ANY_ROUNDS,
    begin_decode,
    begin_pass,
    begin_prefill,
    continue_partial,
    cut,
    cut_to_see,
)
from servegym.envs.simulator.state import IDLE, NOBODY, REJECTED, State
from servegym.envs.simulator.stealing import can_steal, cut_to_act, steal_running, steal_waiting
from servegym.envs.vocabulary import GUARD_SGLANG, MIGRATE_BY_FREENESS, STEAL_WAITING

DECODE: Final = 0
"""The action that continues decoding; action 1 + k prefills under the k-th admission rule of the task."""


@shared_kernel
def advance(state: State, costs: CostTables, e: int) -> int:
    """Run to the next decision; return the replica that is to decide, or NOBODY at the episode's end.

    The replica has an idle client and waiting requests, or a half-computed prompt, or may steal. Its caller
    begins a stage or puts it to ``sleep``; if it does neither, it is asked again.
    """
    episode = state.episodes[e]
    replicas = state.replicas.shape[1]
    while episode.finished + episode.rejected < episode.requests:
        for r in range(episode.turn, replicas):
            if state.event_s[e, r] == episode.now_s:
                if state.replicas[e, r].stage != IDLE:
                    if state.replicas[e, r].clock_s == episode.now_s:
                        continue  # it has begun a stage of no length
                    _end_stage(state, costs, e, r)
                if begin_turn(state, costs, e, r):
                    episode.turn = r
                    return r
        if episode.again:
            episode.again = 0
            episode.first_pass = 0
            episode.turn = 0
        elif episode.finished + episode.rejected < episode.requests:  # the last may have been shed
            _run_to_next_event(state, costs, e)
    return NOBODY


@kernel
def begin_turn(state: State, costs: CostTables, e: int, r: int) -> bool:
    """Let replica ``r``, which has no stage, begin what needs no decision; return whether it is to decide."""
    replica = state.replicas[e, r]
    if state.cluster.patience_s < np.inf:  # which may have ended while it slept
        replica.clock_s = state.episodes[e].now_s
    if shares_pool(state):
        look_at_others(state, costs, e, r)
    see_arrivals(state, e, r)
    if state.episodes[e].sheds and shed_late(state, costs, e, r):
        _tell_others(state, costs, e, r)
    replica.told = 0
    waiting = state.queues[e, queue_of(state, r)].waiting
    if (replica.idle > 0 and waiting > 0) or replica.partial != NOBODY:
        return True
    if state.cluster.moves and can_steal(state, costs, e, r):
        return True
    if replica.active > 0:
        decode(state, costs, e, r, False)
    else:
        sleep(state, e, r)
    return False


@kernel
def sleep(state: State, e: int, r: int) -> None:
    """Let a replica that can do nothing wait until what happens elsewhere wakes it, or patience ends."""
    state.event_s[e, r] = np.inf
    if state.cluster.patience_s < np.inf:
        state.event_s[e, r] = _end_of_patience(state, e, r)


@shared_kernel
def _end_of_patience(state: State, e: int, r: int) -> float:
    """Return when the first in the queue of ``r`` loses patience, who may fit then; ∞: never, or it has."""
    q = queue_of(state, r)
    if state.replicas[e, r].idle == 0 or state.queues[e, q].waiting == 0:
        return np.inf
    end_s = patient_until(state, e, q)
    return end_s if end_s > state.episodes[e].now_s else np.inf


@kernel
def _ask_later(state: State, e: int, r: int) -> None:
    """Ask a replica that has evicted all it had once more at this instant, when all others have decided."""
    state.episodes[e].again = 1
    state.episodes[e].turn = r + 1


@kernel
def _run_to_next_event(state: State, costs: CostTables, e: int) -> None:
    episode = state.episodes[e]
    replicas = state.replicas.shape[1]
    now_s = state.event_s[e, 0]
    for r in range(1, replicas):
        now_s = min(now_s, state.event_s[e, r])
    routed = episode.routed
    if routed < episode.requests:
        now_s = min(now_s, state.times[e, routed].arrival_s)
    moves = state.cluster.moves
    if moves:
        now_s = min(now_s, episode.transfer_s)
    if now_s == np.inf:  # a fault of the simulator, which would run for ever
        raise RuntimeError("requests are left, but nothing will ever happen to them")
    episode.in_system_s += (now_s - episode.now_s) * episode.in_system
    episode.first_pass = now_s > episode.now_s
    episode.now_s = now_s
    arrives = routed < episode.requests and state.times[e, routed].arrival_s == now_s
    changes = True
    if moves:
        changes = begin_instant(state, costs, e, arrives)
    if arrives:
        receive_all(state, costs, e)
    for r in range(replicas):
        if state.event_s[e, r] == now_s and state.replicas[e, r].stage != IDLE:
            _end_stage(state, costs, e, r)
    if moves:
        if changes:
            end_instant(state, e)
            cut_to_act(state, costs, e, NOBODY)
    elif shares_pool(state):  # what has ended may change what is best to take
        wake_sleepers(state, e)
    episode.turn = 0


@shared_kernel
def _end_stage(state: State, costs: CostTables, e: int, r: int) -> None:
    prefilled = state.replicas[e, r].emitting
    if state.episodes[e].keeps_gaps:
        note_stage(state, costs, e, r)
    book(state, e, r, state.replicas[e, r].stage_s)
    if state.cluster.moves:
        end_boundary(state, costs, e, r, prefilled)


@shared_kernel
def receive_all(state: State, costs: CostTables, e: int) -> None:
    """Receive every request that arrives now."""
    episode, replicas = state.episodes[e], state.replicas.shape[1]
    largest = largest_servable(state)
    shared = state.queues.shape[1] == 1
    i = episode.routed
    while i < episode.requests and state.times[e, i].arrival_s <= episode.now_s:
        blocks = 0
        if state.cluster.limits_memory:
            request = state.requests[e, i]
            blocks = blocks_of(state, np.int64(request.prompt_tokens) + request.decode_rounds + 1)
        if blocks > largest:
            _reject(state, e, i)
        else:
            episode.in_system += 1
            if shared:
                push_back(state, e, 0, i)
            else:
                _send(state, costs, e, i, blocks)
        i += 1
    episode.routed = i
    if shared and state.queues[e, 0].unseen > 0:
        for r in range(replicas):
            _notice(state, costs, e, r)


@kernel
def _reject(state: State, e: int, i: int) -> None:
    """Turn away a request that is larger than the memory of any replica."""
    state.requests[e, i].phase = REJECTED
    state.episodes[e].rejected += 1
    if state.requests[e, i].plan_client != NOBODY:
        forget_plan(state, e, i)


@kernel
def _send(state: State, costs: CostTables, e: int, i: int, blocks: int) -> None:
    """Route a request, which holds up to ``blocks``, to a replica's own queue."""
    r = route(state, costs, e, i, blocks)
    request = state.requests[e, i]
    if request.plan_client != NOBODY and request.plan_replica != r:
        forget_plan(state, e, i)
    push_routed(state, e, r, i)
    _notice(state, costs, e, r)


@kernel
def _notice(state: State, costs: CostTables, e: int, r: int) -> None:
    """Let replica ``r`` decide as soon as it can: something has come that it might admit."""
    replica, now_s = state.replicas[e, r], state.episodes[e].now_s
    if replica.stage == IDLE:
        replica.clock_s = now_s
        state.event_s[e, r] = now_s
    else:
        cut_to_see(state, costs, e, r)


# ---- what a replica does at its turn --------------------------------------------------------


@kernel
def decode(state: State, costs: CostTables, e: int, r: int, every_round: bool) -> None:
    """Decode until the choice changes (a finish, an arrival, full memory), or for one round."""
    if not begin_decode(state, costs, e, r, 1 if every_round else ANY_ROUNDS):
        _ask_later(state, e, r)
    _tell_others(state, costs, e, r)


@kernel
def prefill(
    state: State, costs: CostTables, e: int, r: int, rule: int, max_prefill_tokens: int
) -> None:
    """Begin a prefill stage under an admission rule, which must admit a request.

    Where all that are admitted fetch what is stored elsewhere no stage begins: the replica decides again.
    """
    if state.cluster.guard == GUARD_SGLANG:
        admit_pieces(state, e, r, rule, max_prefill_tokens)
    else:
        admit(state, e, r, rule, max_prefill_tokens)
    state.episodes[e].disturbed = 1
    if state.replicas[e, r].stage_chunks > 0:
        begin_prefill(state, costs, e, r)
    _tell_others(state, costs, e, r)


@shared_kernel
def mix(state: State, costs: CostTables, e: int, r: int, rule: int) -> None:
    """Begin one pass: a token for every decoding client, and chunks of prompts in what is left.

    First room is made for the decoding, then the half-computed prompt goes on, then an admission rule
    admits, unless somebody was preempted. Where nobody decodes and all that are admitted fetch what is stored
    elsewhere no stage begins: the replica decides again.
    """
    preempted = make_room(state, e, r)
    preempted = continue_partial(state, e, r) or preempted
    if not preempted:
        admit_chunks(state, e, r, rule)
    if state.replicas[e, r].active > 0 or state.replicas[e, r].stage_tokens > 0:
        begin_pass(state, costs, e, r)
    elif preempted:
        _ask_later(state, e, r)
    state.episodes[e].disturbed = 1
    _tell_others(state, costs, e, r)


@shared_kernel
def steal(state: State, costs: CostTables, e: int, r: int, kind: int) -> None:
    """Steal waiting requests, or a running one, which replica ``r`` must be allowed to."""
    if kind == STEAL_WAITING:
        steal_waiting(state, costs, e, r)
    else:
        steal_running(state, costs, e, r)
    state.episodes[e].disturbed = 1
    _tell_others(state, costs, e, r)


@kernel
def _tell_others(state: State, costs: CostTables, e: int, r: int) -> None:
    """Let other replicas look at what a decision of ``r`` has changed for them."""
    if shares_pool(state) and state.cluster.limits_memory:
        _tell_of_pool(state, costs, e, r)
    elif state.cluster.moves:
        # A stage takes memory when it begins: who has least of it may be another then.
        weighs = state.cluster.steals_running and state.cluster.migrate == MIGRATE_BY_FREENESS
        if weighs or state.episodes[e].disturbed:
            _tell_of_change(state, costs, e, r)


@shared_kernel
def _tell_of_change(state: State, costs: CostTables, e: int, r: int) -> None:
    """Let replicas with idle clients look for what they may steal after a decision of ``r``.

    All without a stage decide again, when all others have decided. The rest look at the end of their round.
    """
    episode = state.episodes[e]
    episode.disturbed = 0
    for other in range(state.replicas.shape[1]):
        replica = state.replicas[e, other]
        if other != r and replica.idle > 0 and replica.stage == IDLE:
            replica.clock_s = state.event_s[e, other] = episode.now_s
            episode.again = 1
    cut_to_act(state, costs, e, r)


@shared_kernel
def _tell_of_pool(state: State, costs: CostTables, e: int, r: int) -> None:
    """Let replicas with idle clients look at the pool after ``r`` has changed it.

    Whoever is first in it now may fit into their memory. A replica without a stage looks at this instant.
    One whose round ends now looks at its turn, if that is to come, else at the end of its next round.
    """
    now_s, first_pass = state.episodes[e].now_s, state.episodes[e].first_pass
    for other in range(state.replicas.shape[1]):
        replica = state.replicas[e, other]
        if other == r:
            continue
        if replica.stage == IDLE:
            _notice(state, costs, e, other)
            if other < r:  # before anything lands that leaves now
                state.episodes[e].again = 1
        elif replica.idle > 0:
            to_come = first_pass and other > r
            cut(state, costs, e, other, now_s if to_come else np.nextafter(now_s, np.inf))
