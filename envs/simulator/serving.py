"""What a real engine does to a row of the state: requests come, end and go; iterations take their time.

The simulator knows beforehand when a run of decode rounds ends, an engine says it afterwards: round by
round, who has finished. So a run stays open while the engine decodes, and nothing is booked until a
finish, an arrival for which a client is idle, a cancellation or the run's own end closes it. It is then
booked as one stage, as the simulator would have run it: in closed form, beliefs revised once. One replica.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.booking import book
from servegym.envs.simulator.events import receive_all
from servegym.envs.simulator.finishes import find, insert, remove_one
from servegym.envs.simulator.gaps import note_rounds
from servegym.envs.simulator.joining import see_arrivals
from servegym.envs.simulator.loading import write_request
from servegym.envs.simulator.order import add
from servegym.envs.simulator.queues import count_waiting, leave_lists, leave_plan
from servegym.envs.simulator.seconds import decode_seconds
from servegym.envs.simulator.state import (
    DECODE_RUN,
    FINISHED,
    IDLE,
    LENGTH_BUCKETS,
    PREFILL,
    WAITING,
    RecordArray,
    State,
)

PROGRESS: Final = np.dtype(
    [
        ("rounds", np.int64),  # of the run that the engine has finished
        ("ended", np.int64),  # 1: the stage ends with what the engine has run
        ("measured", np.int64),  # 1: ``seconds`` holds; else the cost model says how long it took
        ("seconds", np.float64),  # of the iterations so far
        ("first_s", np.float64),  # when the first round ended
        ("longest_s", np.float64),  # of the rounds after the first
        ("wait_s", np.float64),  # between the last iteration and the one that comes
    ],
    align=True,
)
"""How far the engine is with the stage of an environment."""


# ---- requests come and go -------------------------------------------------------------------


@shared_kernel
def append_request(
    state: State,
    e: int,
    arrival_s: float,
    prompt_tokens: int,
    most_rounds: int,
    expected_rounds: int,
    compared_rounds: int,
) -> None:
    """Add a request that nobody knew of, with the highest id; it arrives no earlier than all others.

    ``most_rounds`` stand for the true ones until it finishes. Among equal lengths it is the shortest, as
    ``load`` has it. The state must have room.
    """
    episode = state.episodes[e]
    i = episode.requests
    write_request(state, e, i, arrival_s, prompt_tokens, most_rounds, expected_rounds)
    place = i
    while place > 0 and state.lengths[e, place - 1] >= compared_rounds:
        place -= 1
        state.lengths[e, place + 1] = state.lengths[e, place]
        state.by_length[e, place + 1] = state.by_length[e, place]
        state.requests[e, state.by_length[e, place]].rank = place + 1
    state.lengths[e, place] = compared_rounds
    state.by_length[e, place] = i
    bucket = 0
    while bucket + 1 < LENGTH_BUCKETS.size and LENGTH_BUCKETS[bucket + 1] <= expected_rounds:
        bucket += 1
    state.requests[e, i].rank = place
    state.requests[e, i].bucket = bucket
    episode.requests += 1
    if place < i and state.queues[e, 0].waiting > 0:
        count_ranks(state, e)


@kernel
def count_ranks(state: State, e: int) -> None:
    """Count anew which ranks wait, of those that have been seen."""
    for k in range(state.waiting_tree.shape[2]):
        state.waiting_tree[e, 0, k] = 0
    queue = state.queues[e, 0]
    i = queue.first
    while i != queue.first_unseen:
        if state.requests[e, i].phase == WAITING:
            add(state.waiting_tree[e, 0], state.requests[e, i].rank, 1)
        i = state.requests[e, i].next


@shared_kernel
def withdraw(state: State, e: int, i: int) -> None:
    """Take a waiting request out of the episode; the replica is at a boundary.

    It counts as finished, without a token: its ``decode_rounds`` are −1.
    """
    see_arrivals(state, e, 0)
    episode, request = state.episodes[e], state.requests[e, i]
    count_waiting(state, e, 0, i, -1)
    leave_plan(state, e, i)
    leave_lists(state, e, 0, i)
    episode.arrived_rounds -= request.expected_rounds
    episode.finished += 1
    episode.in_system -= 1
    request.expected_rounds = 0
    request.decode_rounds = -1
    request.phase = FINISHED


@shared_kernel
def end_request(state: State, progress: RecordArray, e: int, i: int) -> None:
    """Let a running request finish with what the engine has run; the stage ends there.

    Where no stage is under way one without rounds stands for it.
    """
    replica, request = state.replicas[e, 0], state.requests[e, i]
    if replica.stage == IDLE:
        replica.stage = DECODE_RUN
        replica.work_waits = 0
        begin_iterations(progress, e)
    progress[e].ended = 1
    if replica.stage == PREFILL:
        for other in state.picked[e, 0, : replica.emitting]:
            if other == i:
                request.decode_rounds = 0
                return
    finishes = state.finishes[e, 0]
    admitted = state.clients[e, 0, request.client].expected_end - request.expected_rounds
    due = replica.rounds + progress[e].rounds
    remove_one(
        finishes,
        replica.active,
        find(finishes, replica.active, admitted + request.decode_rounds, i),
    )
    insert(finishes, replica.active - 1, due, i)
    request.decode_rounds = due - admitted


@kernel
def has_ended(state: State, progress: RecordArray, e: int, i: int) -> bool:
    """Return whether the engine has run a running request to its end, which is not booked yet."""
    request, replica = state.requests[e, i], state.replicas[e, 0]
    expected_end = state.clients[e, 0, request.client].expected_end
    if expected_end < 0:  # its prefill, which emits a token, is not booked yet
        return request.decode_rounds == 0
    admitted = expected_end - request.expected_rounds
    return admitted + request.decode_rounds <= replica.rounds + progress[e].rounds


# ---- iterations -----------------------------------------------------------------------------


@kernel
def begin_iterations(progress: RecordArray, e: int) -> None:
    """Note that a stage has begun of which the engine has run nothing."""
    own = progress[e]
    own.rounds = 0
    own.ended = 0
    own.measured = 0
    own.seconds = 0.0
    own.first_s = 0.0
    own.longest_s = 0.0
    own.wait_s = 0.0


@shared_kernel
def note_iteration(
    state: State, costs: CostTables, progress: RecordArray, e: int, seconds: float
) -> None:
    """Note that the engine has run an iteration: a decode round, or the whole prefill stage.

    ``seconds`` < 0: as long as the cost model says.
    """
    replica, own = state.replicas[e, 0], progress[e]
    if seconds >= 0.0:
        own.measured = 1
    elif replica.stage == DECODE_RUN:
        cached = replica.cached_tokens + own.rounds * replica.active
        seconds = decode_seconds(costs, 0, replica.active, cached, 1)
    else:
        seconds = replica.stage_s
    if own.wait_s > 0.0:
        own.measured = 1
        seconds += own.wait_s
        own.wait_s = 0.0
    own.seconds += seconds
    if replica.stage != DECODE_RUN:
        own.ended = 1
        return
    own.rounds += 1
    if own.rounds == 1:
        own.first_s = replica.clock_s + seconds
    else:
        own.longest_s = max(own.longest_s, seconds)
    if own.rounds == replica.run_rounds:
        own.ended = 1


@kernel
def _stage_seconds(state: State, costs: CostTables, progress: RecordArray, e: int) -> float:
    """Return how long the iterations of the stage have taken so far."""
    replica, own = state.replicas[e, 0], progress[e]
    if own.measured:
        return own.seconds
    if replica.stage == DECODE_RUN:
        return decode_seconds(costs, 0, replica.active, replica.cached_tokens, own.rounds)
    return replica.stage_s


@kernel
def present_s(state: State, costs: CostTables, progress: RecordArray, e: int) -> float:
    """Return the end of the engine's last iteration, or until when it has waited since."""
    replica, own = state.replicas[e, 0], progress[e]
    if replica.stage == IDLE:
        return state.episodes[e].now_s
    if replica.stage == PREFILL and not own.ended:
        return replica.clock_s
    return replica.clock_s + _stage_seconds(state, costs, progress, e) + own.wait_s


@shared_kernel
def catch_up(state: State, costs: CostTables, progress: RecordArray, e: int, now_s: float) -> bool:
    """Bring the row up to the engine's last iteration and to ``now_s``, if that is later.

    Returns False where an open run goes on: nothing is booked then.
    """
    episode, replica, own = state.episodes[e], state.replicas[e, 0], progress[e]
    if replica.stage != IDLE:
        end_s = replica.clock_s + _stage_seconds(state, costs, progress, e)
        if not own.ended:
            reached_s = max(end_s, now_s)
            arrives = episode.routed < episode.requests
            arrives = arrives and state.times[e, episode.routed].arrival_s <= reached_s
            if not (arrives and replica.idle > 0):
                own.wait_s = reached_s - end_s
                return False
        _end_stage(state, costs, progress, e, end_s)
    reached_s = max(now_s, episode.now_s)
    _receive_until(state, costs, e, reached_s)
    if state.event_s[e, 0] < np.inf and episode.now_s < reached_s:
        _tick(state, e, reached_s)
    if state.event_s[e, 0] < np.inf:
        replica.clock_s = episode.now_s
        state.event_s[e, 0] = episode.now_s
    return True


@kernel
def _tick(state: State, e: int, now_s: float) -> None:
    episode = state.episodes[e]
    episode.in_system_s += (now_s - episode.now_s) * episode.in_system
    episode.now_s = now_s


@kernel
def _receive_until(state: State, costs: CostTables, e: int, until_s: float) -> None:
    """Let everybody join the queue who has arrived by then, at each one's own time."""
    episode = state.episodes[e]
    while episode.routed < episode.requests and state.times[e, episode.routed].arrival_s <= until_s:
        _tick(state, e, state.times[e, episode.routed].arrival_s)
        receive_all(state, costs, e)


@kernel
def _end_stage(
    state: State, costs: CostTables, progress: RecordArray, e: int, end_s: float
) -> None:
    """Book what the engine has run as one stage, behind the arrivals until its end."""
    episode, replica, own = state.episodes[e], state.replicas[e, 0], progress[e]
    seconds = _stage_seconds(state, costs, progress, e)
    replica.run_rounds = 1  # an arrival cuts no run: the engine has run these rounds
    state.event_s[e, 0] = end_s
    _receive_until(state, costs, e, end_s)
    _tick(state, e, end_s)
    if replica.stage == DECODE_RUN:
        replica.run_rounds = own.rounds
        if episode.keeps_gaps and own.rounds > 0:
            note_rounds(state, e, 0, own.first_s, own.longest_s)
    book(state, e, 0, seconds)
    begin_iterations(progress, e)
