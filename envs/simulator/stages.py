"""Stages of a replica: how each begins, at one of its boundaries; ``booking`` ends it at the next.

The semantics are those of CONTRIBUTING.md. At one replica stages never overlap. A prefill stage emits
each admitted request's first token; a decode round emits one token of every decoding client; a mixed
stage does both in one pass. ``begin_…`` takes requests, clients and memory and says when the stage ends
(``State.event_s``). ``booking`` writes what has come of it: tokens, finishes, free memory, lengths that a
finish reveals. Between the two nothing stored at time t is later than t, so others may look at any time.

Decode rounds in a row between which nothing can change are one stage of many rounds; ``cut`` ends it at
an earlier round.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.finishes import sort_keys
from servegym.envs.simulator.memory import (
    blocks_of_round,
    find_victim,
    free_blocks,
    make_room,
    preempt,
    rounds_to_full,
)
from servegym.envs.simulator.queues import (
    blocks_of,
    count_waiting,
    leave_plan,
    note_admission,
    queue_of,
    rounds_ahead,
    shares_pool,
    tokens_to_prefill,
)
from servegym.envs.simulator.seconds import decode_seconds, one_pass_seconds, prefill_seconds
from servegym.envs.simulator.state import (
    DECODE_RUN,
    MIXED,
    NOBODY,
    PREFILL,
    RUNNING,
    State,
)
from servegym.envs.vocabulary import GUARD_PEAK, GUARD_SGLANG, MIGRATE_BY_FREENESS

ANY_ROUNDS: Final = 1 << 62
"""More decode rounds than any run has."""

_MOST_COUNTED: Final = (1 << 31) - 1


# ---- what a replica finds at a boundary -----------------------------------------------------


@kernel
def sort_idle(state: State, e: int, r: int) -> None:
    """Sort the idle clients in ascending order; finishes have appended theirs at the end.

    Overwrites ``picked``.
    """
    replica = state.replicas[e, r]
    if replica.sorted >= replica.idle:
        return
    idle = state.idle[e, r, : replica.idle]
    ascending = max(replica.sorted, 1)
    replica.sorted = replica.idle
    while ascending < idle.size and idle[ascending - 1] < idle[ascending]:
        ascending += 1
    if ascending == idle.size:
        return
    appended = state.picked[e, r, : idle.size - ascending]
    for k in range(appended.size):
        appended[k] = idle[ascending + k]
    sort_keys(appended)
    place = idle.size - 1
    before = ascending - 1
    for k in range(appended.size - 1, -1, -1):
        while before >= 0 and idle[before] > appended[k]:
            idle[place] = idle[before]
            place -= 1
            before -= 1
        idle[place] = appended[k]
        place -= 1


@kernel
def rounds_to_next_finish(state: State, e: int, r: int) -> int:
    """Return the true decode rounds to the next finish; a client must be active. Not for schedulers."""
    replica = state.replicas[e, r]
    return state.finishes[e, r, replica.active - 1].due - replica.rounds


# ---- beginnings -----------------------------------------------------------------------------


@kernel
def pick(state: State, e: int, r: int, client: int, i: int) -> None:
    """Take waiting request ``i`` out of the queues and give it to a client.

    The caller takes the client out of ``idle`` and says what the stage computes of the request's prefill.
    """
    request, replica = state.requests[e, i], state.replicas[e, r]
    count_waiting(state, e, queue_of(state, r), i, -1)
    leave_plan(state, e, i)
    if request.prefilled_tokens == 0:  # else it has been admitted before
        state.times[e, i].admitted_s = replica.clock_s
    state.clients[e, r, client].expected_end = -1 - rounds_ahead(state, e, i)
    if request.stolen:
        request.stolen = 0
        state.queues[e, queue_of(state, r)].stolen -= 1
    request.phase = RUNNING
    request.client = client
    request.replica = r
    note_admission(state, e, r, i)


@kernel
def compute(state: State, e: int, r: int, i: int, tokens: int) -> None:
    """Let the stage that begins compute ``tokens`` of the request's prefill; take memory for them.

    A request whose prefill ends with the stage is put into ``picked``; another is the ``partial`` one.
    """
    request, replica = state.requests[e, i], state.replicas[e, r]
    start = np.int64(request.computed)
    end = start + tokens
    squares = float(end) * end - float(start) * start
    replica.stage_chunks += 1
    replica.stage_tokens += tokens
    replica.stage_squares += squares
    replica.used_blocks += blocks_of(state, end) - blocks_of(state, start)
    if start < request.prompt_tokens:
        replica.prompt_tokens += tokens
        replica.prompt_squares += squares
    request.computed = end
    request.prefilled_tokens = min(request.prefilled_tokens + tokens, _MOST_COUNTED)
    if end == tokens_to_prefill(state, e, i):
        state.picked[e, r, replica.emitting] = i
        replica.emitting += 1
        if replica.partial == i:
            replica.partial = NOBODY
    else:
        replica.partial = i


@kernel
def _begin(state: State, e: int, r: int, stage: int, seconds: float) -> None:
    replica = state.replicas[e, r]
    replica.stage = stage
    replica.stage_s = seconds
    state.event_s[e, r] = replica.clock_s + seconds


@kernel
def begin_prefill(state: State, costs: CostTables, e: int, r: int) -> None:
    """Begin a prefill stage of the picked requests."""
    replica = state.replicas[e, r]
    seconds = prefill_seconds(
        costs, r, replica.stage_tokens, replica.stage_squares, replica.stage_chunks
    )
    replica.stage_rounds = replica.rounds
    _begin(state, e, r, PREFILL, seconds)


@kernel
def begin_decode(state: State, costs: CostTables, e: int, r: int, most: int) -> bool:
    """Begin decode rounds up to the next finish or until memory is full, at most ``most`` ≥ 1.

    A round for which somebody is preempted stands alone: it changes whom the replica could admit. Returns
    False where nobody is left, as memory is kept for requests that wait or come: then no stage begins.
    """
    replica = state.replicas[e, r]
    rounds = 1
    preempted = make_room(state, e, r)
    if preempted and replica.active == 0:
        return False
    if not preempted and most > 1 and not (_guard_may_open(state, e, r) or time_tells(state, e)):
        rounds = min(most, rounds_to_next_finish(state, e, r), rounds_to_full(state, e, r))
    replica.work_waits = state.queues[e, queue_of(state, r)].waiting > 0
    run_for(state, costs, e, r, rounds)
    return True


@kernel
def run_for(state: State, costs: CostTables, e: int, r: int, rounds: int) -> None:
    """Let a run of decode rounds, from the replica's last boundary on, be of so many rounds."""
    replica = state.replicas[e, r]
    replica.run_rounds = rounds
    replica.boundary_s = replica.clock_s
    seconds = decode_seconds(costs, r, replica.active, replica.cached_tokens, rounds)
    _begin(state, e, r, DECODE_RUN, seconds)


@kernel
def _guard_may_open(state: State, e: int, r: int) -> bool:
    """Return whether each round may let in a request that has been kept out, though nothing else happens."""
    guard, replica = state.cluster.guard, state.replicas[e, r]
    waits = state.queues[e, queue_of(state, r)].waiting > 0 and replica.idle > 0
    steals = state.cluster.steals_waiting and replica.idle > 0
    if guard == GUARD_SGLANG:
        return waits or steals or replica.partial != NOBODY
    if guard != GUARD_PEAK:  # somebody may lose patience who fits where the shortest does not
        return waits and state.cluster.limits_memory and state.cluster.patience_s < np.inf
    return waits or steals


@kernel
def time_tells(state: State, e: int) -> bool:
    """Return whether each round may change what is to be done, though nothing else happens.

    A replica may steal running requests again, memory may run short, somebody who waits may come too late.
    """
    cluster = state.cluster
    if cluster.steals_running and (
        cluster.steal_period_s > 0.0 or cluster.migrate == MIGRATE_BY_FREENESS
    ):
        return True
    if state.episodes[e].sheds > 0:
        for q in range(state.queues.shape[1]):
            if state.queues[e, q].waiting + state.queues[e, q].unseen > 0:
                return True
    return False


@kernel
def rounds_until(state: State, costs: CostTables, e: int, r: int, then_s: float) -> int:
    """Return the fewest rounds ≥ 1 of a run in progress that reach ``then_s``, at most all of them."""
    replica = state.replicas[e, r]
    active, cached = replica.active, replica.cached_tokens
    low, high = 1, replica.run_rounds
    first_s = decode_seconds(costs, r, active, cached, 1)
    if first_s > 0.0:
        # Between all as long as the last and all as the first, less and more a round and the clock's step.
        last_s = decode_seconds(costs, r, active, cached + (high - 1) * active, 1)
        wait_s, step_s = then_s - replica.clock_s, np.nextafter(then_s, np.inf) - then_s
        low = max(low, int(min((wait_s - step_s) / last_s, high)) - 1)
        high = min(high, max(int(min((wait_s + step_s) / first_s, high)) + 2, 1))
    while low < high:
        middle = (low + high) // 2
        run_s = decode_seconds(costs, r, active, cached, middle)
        if replica.clock_s + run_s >= then_s:
            high = middle
        else:
            low = middle + 1
    return low


@kernel
def cut(state: State, costs: CostTables, e: int, r: int, then_s: float) -> None:
    """End a run of decode rounds at the first round boundary at or after ``then_s``, which is now or next."""
    replica = state.replicas[e, r]
    if replica.stage != DECODE_RUN or replica.run_rounds == 1:
        return
    if replica.clock_s < replica.boundary_s == state.event_s[e, r]:
        return  # it ends there already
    rounds = rounds_until(state, costs, e, r, then_s)
    if rounds < replica.run_rounds:
        run_for(state, costs, e, r, rounds)
    replica.boundary_s = state.event_s[e, r]


@kernel
def cut_to_see(state: State, costs: CostTables, e: int, r: int) -> None:
    """End a run at the first boundary from now on, if who has come into the queue of ``r`` is seen then."""
    if sees_at_once(state, e, r):
        cut(state, costs, e, r, state.episodes[e].now_s)


@kernel
def sees_at_once(state: State, e: int, r: int) -> bool:
    """Return whether ``r`` looks at its queue at the first boundary after a request has come.

    It may be admitted there, or shed. Or it joins the client with least work, which may be another at the
    run's end: work of others than those of this run falls by other amounts, and thieves take from queues.
    """
    replica = state.replicas[e, r]
    uneven = replica.incoming > 0 or replica.partial != NOBODY or shares_pool(state)
    may_lose = uneven or state.cluster.steals_waiting
    return replica.idle > 0 or may_lose or state.episodes[e].sheds > 0


@kernel
def end_at(state: State, costs: CostTables, e: int, r: int, now_s: float) -> None:
    """End a run of decode rounds at ``now_s``, if a round ends then; time never goes back between two calls.

    The boundary that the last look found tells that none ends before it.
    """
    replica = state.replicas[e, r]
    if replica.stage != DECODE_RUN or replica.run_rounds == 1 or replica.clock_s >= now_s:
        return
    if now_s < replica.boundary_s or state.event_s[e, r] <= now_s:
        return
    rounds = rounds_until(state, costs, e, r, now_s)
    run_s = decode_seconds(costs, r, replica.active, replica.cached_tokens, rounds)
    replica.boundary_s = replica.clock_s + run_s
    if rounds < replica.run_rounds and replica.boundary_s == now_s:
        run_for(state, costs, e, r, rounds)


@kernel
def continue_partial(state: State, e: int, r: int) -> bool:
    """Compute on at the half-computed prompt, if there is one; return whether somebody was preempted.

    Its chunk is what the token budget leaves after one token for every decoding client. Where its blocks
    are missing the cluster's victim is preempted, which may be the request itself; what a victim gives
    back of the budget does not lengthen the chunk.
    """
    replica = state.replicas[e, r]
    i = replica.partial
    replica.continued_from = 0
    if i == NOBODY:
        return False
    done = np.int64(state.requests[e, i].computed)
    budget = state.cluster.chunk_tokens - replica.active
    tokens = min(tokens_to_prefill(state, e, i) - done, budget)
    if tokens <= 0:
        return False
    more = blocks_of(state, done + tokens) - blocks_of(state, done)
    preempted = False
    while replica.partial == i:
        if more + blocks_of_round(state, e, r) <= free_blocks(state, e, r):
            replica.continued_from = done
            compute(state, e, r, i, tokens)
            break
        preempt(state, e, r, find_victim(state, e, r))
        preempted = True
    return preempted


@kernel
def begin_pass(state: State, costs: CostTables, e: int, r: int) -> None:
    """Begin one pass of the decoding clients and of the chunks that have been taken.

    Without chunks it is a decode round, without decoding clients a prefill stage.
    """
    replica, rates = state.replicas[e, r], costs.rates[r]
    active, tokens = replica.active, replica.stage_tokens
    replica.work_waits = state.queues[e, queue_of(state, r)].waiting > 0
    replica.run_rounds = 1
    stage = MIXED
    if tokens == 0:
        stage = DECODE_RUN
    elif active == 0:
        stage = PREFILL
    if tokens > 0:
        replica.stage_rounds = replica.rounds
    if not state.cluster.one_pass:
        seconds = _summed_seconds(state, costs, e, r)
    elif stage == DECODE_RUN:
        seconds = decode_seconds(costs, r, active, replica.cached_tokens, 1)
    elif stage == PREFILL:
        seconds = prefill_seconds(costs, r, tokens, replica.stage_squares, replica.stage_chunks)
    else:
        seconds = one_pass_seconds(
            costs, r, active, replica.cached_tokens, tokens, replica.stage_squares
        )
        seconds += rates.overhead_base_s
        seconds += rates.overhead_per_client_s * (active + replica.stage_chunks)
    _begin(state, e, r, stage, seconds)


@kernel
def _summed_seconds(state: State, costs: CostTables, e: int, r: int) -> float:
    """Return the time of a pass as a prefill part and a decode part in a row.

    The decode part serves all who emit a token that is not their first, also those whose recomputation
    ends. The prefill part has the chunks that begin within a prompt. Neither costs anything when empty.
    """
    replica = state.replicas[e, r]
    emitting, cached = replica.active, replica.cached_tokens
    for i in state.picked[e, r, : replica.emitting]:
        if state.requests[e, i].emitted > 0:
            emitting += 1
            cached += tokens_to_prefill(state, e, i)
    seconds = 0.0
    if emitting > 0:
        seconds += decode_seconds(costs, r, emitting, cached, 1)
    if replica.prompt_tokens > 0:
        seconds += prefill_seconds(
            costs, r, replica.prompt_tokens, replica.prompt_squares, replica.stage_chunks
        )
    return seconds
