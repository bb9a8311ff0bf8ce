"""Arrivals, prefill stages and decode rounds: their effect on the state and their exact times.

The semantics are those of CONTRIBUTING.md. At one replica stages never overlap. A prefill stage emits each
admitted request's first token. Decode rounds between two events are one step, their times summed in
closed form.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import allocating_kernel, kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.beliefs import expect_admitted, reveal, revise
from servegym.envs.simulator.finishes import merge, sort_keys
from servegym.envs.simulator.heap import tournament, update_tournament
from servegym.envs.simulator.order import add
from servegym.envs.simulator.queues import enqueue
from servegym.envs.simulator.state import (
    FINISHED,
    NOBODY,
    RUNNING,
    WAITING,
    State,
)

_MANY_ARRIVALS: Final = 8
"""With more arrivals at once, ranking the clients once takes less time than a scan for each arrival."""


@kernel
def decode_seconds(
    costs: CostTables, r: int, active: int, cached_tokens: int, rounds: int
) -> float:
    """Return the time of ``rounds`` successive rounds of ``active`` clients, none finishing within.

    The k-th round (k = 0, 1, …) starts with ``cached_tokens`` + k · ``active`` tokens, so the sum is
    arithmetic. Floats, because a hundred thousand of the longest requests would overflow 64-bit integers.
    """
    n = float(rounds)
    cached = n * cached_tokens + active * (n * (n - 1.0) / 2.0)
    return rounds * costs.decode_base_s[r, active] + costs.rates[r].decode_per_kv_token_s * cached


@kernel
def prefill_seconds(costs: CostTables, r: int, tokens: int, squares: float, requests: int) -> float:
    """Return the time of a prefill stage of ``tokens`` prompt tokens (Σp² ``squares``)."""
    rates = costs.rates[r]
    levels = costs.prefill_level_tokens.shape[1]
    if levels > 0:
        top = costs.prefill_level_tokens[r, levels - 1]
        whole = tokens // top
        rest = tokens - whole * top
        seconds = whole * costs.prefill_level_s[r, levels - 1]
        if rest > 0:
            level = np.searchsorted(costs.prefill_level_tokens[r], rest)
            seconds += costs.prefill_level_s[r, level]
    else:
        line = (
            rates.prefill_base_s
            + rates.prefill_per_token_s * tokens
            + rates.prefill_per_token_squared_s * squares
        )
        seconds = max(rates.prefill_floor_s, line)
    return seconds + rates.overhead_base_s + rates.overhead_per_client_s * requests


@kernel
def client_work(state: State, e: int, r: int, client: int) -> int:
    """Return the decode rounds left to a client, of its running request and its planned queue."""
    record = state.clients[e, r, client]
    return record.queue_rounds + max(record.expected_end - state.replicas[e, r].rounds, 0)


@kernel
def receive_arrivals(state: State, e: int, r: int) -> None:
    """Make every request that has arrived wait; an unplanned request joins a client's queue.

    Arrivals during a stage are seen at its end.
    """
    episode = state.episodes[e]
    first = episode.arrived
    unplanned = 0
    now_s = state.replicas[e, r].clock_s
    while episode.arrived < episode.requests:
        i = episode.arrived
        request = state.requests[e, i]
        if request.arrival_s > now_s:
            break
        episode.arrived += 1
        episode.arrived_rounds += request.expected_rounds
        request.phase = WAITING
        _count_waiting(state, e, i, 1)
        episode.in_system_s += now_s - request.arrival_s
        unplanned += request.plan_client == NOBODY
    if unplanned > _MANY_ARRIVALS:
        _queue_many(state, e, r, first)
    elif unplanned > 0:
        for i in range(first, episode.arrived):
            if state.requests[e, i].plan_client == NOBODY:
                enqueue(state, e, r, _client_to_join(state, e, r, i), i)


@kernel
def _client_to_join(state: State, e: int, r: int, i: int) -> int:
    """Return the client whose queue an unplanned request joins.

    It has the least work left, then the fewest queued requests, then the lowest number. A request without
    rounds adds no work, so many would join the same client: for it queued requests count before work. A
    running request is not counted as queued: while all clients run, arrivals are received only at the
    next finish, and must join as if received at once.
    """
    by_work = state.requests[e, i].expected_rounds > 0
    best = 0
    least = client_work(state, e, r, 0)
    fewest = state.clients[e, r, 0].queue_requests
    for client in range(1, state.clients.shape[2]):
        if least == 0 and fewest == 0:
            break
        work = client_work(state, e, r, client)
        requests = state.clients[e, r, client].queue_requests
        if by_work:
            better = work < least or (work == least and requests < fewest)
        else:
            better = requests < fewest or (requests == fewest and work < least)
        if better:
            best, least, fewest = client, work, requests
    return best


@allocating_kernel
def _queue_many(state: State, e: int, r: int, first: int) -> None:
    """Queue the unplanned arrivals from ``first`` on in one pass, each as by ``_client_to_join``."""
    clients = state.clients.shape[2]
    work = np.empty(clients, np.int64)
    requests = np.empty(clients, np.int64)
    for client in range(clients):
        work[client] = client_work(state, e, r, client)
        requests[client] = state.clients[e, r, client].queue_requests
    least, fewest = tournament(work, requests), tournament(requests, work)
    for i in range(first, state.episodes[e].arrived):
        if state.requests[e, i].plan_client != NOBODY:
            continue
        rounds = state.requests[e, i].expected_rounds
        client = least[1] if rounds > 0 else fewest[1]
        enqueue(state, e, r, client, i)
        work[client] += rounds
        requests[client] += 1
        update_tournament(least, client, work, requests)
        update_tournament(fewest, client, requests, work)


@kernel
def _count_waiting(state: State, e: int, i: int, sign: int) -> None:
    """Add request ``i`` to the counts of waiting requests (``sign`` +1) or subtract it (−1)."""
    episode, request = state.episodes[e], state.requests[e, i]
    prompt = np.int64(request.prompt_tokens)
    episode.waiting += sign
    episode.waiting_rounds += sign * request.expected_rounds
    episode.waiting_prompt_tokens += sign * prompt
    episode.waiting_squares_high += sign * (prompt * prompt >> 32)
    episode.waiting_squares_low += sign * (prompt * prompt & 0xFFFFFFFF)
    state.waiting_lengths[e, request.bucket] += sign
    add(state.waiting_tree[e], request.rank, sign)


@kernel
def pick(state: State, e: int, r: int, client: int, i: int) -> None:
    """Take waiting request ``i`` out of the queues and give it to a client."""
    request, replica = state.requests[e, i], state.replicas[e, r]
    _count_waiting(state, e, i, -1)
    queue = state.clients[e, r, request.plan_client]
    queue.queue_rounds -= request.expected_rounds
    queue.queue_requests -= 1
    expected_end = replica.rounds + request.expected_rounds
    state.clients[e, r, client].expected_end = expected_end
    replica.due_sum += expected_end
    request.phase = RUNNING
    request.client = client


@kernel
def run_prefill(state: State, costs: CostTables, e: int, r: int, admitted: int) -> None:
    """Run one prefill stage for the first ``admitted`` picked requests."""
    episode, replica = state.episodes[e], state.replicas[e, r]
    tokens = 0
    squares = 0.0
    for i in state.picked[e, :admitted]:
        prompt = np.int64(state.requests[e, i].prompt_tokens)
        tokens += prompt
        squares += float(prompt) * prompt
    start_s = replica.clock_s
    seconds = prefill_seconds(costs, r, tokens, squares, admitted)
    episode.in_system_s += seconds * (episode.waiting + replica.active + admitted)
    episode.admitted_prompt_tokens += tokens
    replica.clock_s += seconds
    replica.prefill_s += seconds
    replica.prefill_stages += 1
    replica.idle_wait_s = 0.0
    replica.cached_tokens += tokens + admitted  # the stage emits each one's first token
    for i in state.picked[e, :admitted]:
        state.requests[e, i].admitted_s = start_s
        state.requests[e, i].first_token_s = replica.clock_s
    _schedule_finishes(state, e, r, admitted)
    if not episode.lengths_known:
        expect_admitted(state, e, r, admitted)
    _finish_due(state, e, r)
    receive_arrivals(state, e, r)


@kernel
def _schedule_finishes(state: State, e: int, r: int, admitted: int) -> None:
    """Merge the admitted requests into the replica's finishes."""
    replica = state.replicas[e, r]
    span = state.requests.shape[1]
    keys = state.keys[e, :admitted]
    for k in range(admitted):
        i = np.int64(state.picked[e, k])
        keys[k] = np.int64(state.requests[e, i].decode_rounds) * span + i
    merge(state.finishes[e, r], replica.active, replica.rounds, keys, span)
    replica.active += admitted


@kernel
def _finish_due(state: State, e: int, r: int) -> None:
    """Finish every request whose last token the stage that just ended has emitted.

    A request that has outlived its expected finish gets a later one.
    """
    replica, finishes = state.replicas[e, r], state.finishes[e, r]
    known = state.episodes[e].lengths_known
    done = 0
    while done < replica.active and finishes[replica.active - 1 - done].due <= replica.rounds:
        done += 1
    if not known and done > 0:
        reveal(state, e, r, done)
    for _ in range(done):
        i = finishes[replica.active - 1].request
        request = state.requests[e, i]
        request.phase = FINISHED
        request.finished_s = replica.clock_s
        replica.cached_tokens -= request.prompt_tokens + request.decode_rounds + 1
        _leave_idle(state, e, r, request.client)
        state.episodes[e].finished += 1
    if not known:
        revise(state, e, r)


@kernel
def _leave_idle(state: State, e: int, r: int, client: int) -> None:
    """Append a client whose request has finished to the idle clients."""
    replica = state.replicas[e, r]
    replica.due_sum -= state.clients[e, r, client].expected_end
    state.clients[e, r, client].expected_end = 0
    state.idle[e, r, state.clients.shape[2] - replica.active] = client
    replica.active -= 1


@kernel
def sort_idle(state: State, e: int, r: int) -> None:
    """Sort the idle clients in ascending order; finishes have appended theirs at the end.

    Overwrites ``picked``.
    """
    idle = state.idle[e, r, : state.clients.shape[2] - state.replicas[e, r].active]
    ascending = 1
    while ascending < idle.size and idle[ascending - 1] < idle[ascending]:
        ascending += 1
    if ascending >= idle.size:
        return
    appended = state.picked[e, : idle.size - ascending]
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


@kernel
def rounds_to_arrival(state: State, costs: CostTables, e: int, r: int, most: int) -> int:
    """Return the fewest rounds ≥ 1 that reach the next arrival, at most ``most``."""
    arrived = state.episodes[e].arrived
    if arrived == state.episodes[e].requests:
        return most
    replica = state.replicas[e, r]
    ahead_s = state.requests[e, arrived].arrival_s
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        run_s = decode_seconds(costs, r, replica.active, replica.cached_tokens, middle)
        if replica.clock_s + run_s >= ahead_s:
            high = middle
        else:
            low = middle + 1
    return low


@kernel
def run_decode(state: State, costs: CostTables, e: int, r: int, rounds: int) -> None:
    """Run decode rounds, none beyond the next finish."""
    episode, replica = state.episodes[e], state.replicas[e, r]
    active = replica.active
    clients = state.clients.shape[2]
    seconds = decode_seconds(costs, r, active, replica.cached_tokens, rounds)
    episode.in_system_s += seconds * (episode.waiting + active)
    episode.served_rounds += active * rounds
    replica.clock_s += seconds
    replica.rounds += rounds
    replica.cached_tokens += active * rounds
    replica.busy_decode_s += seconds * active / clients
    if episode.waiting > 0:
        replica.idle_wait_s += seconds * (clients - active)
    _finish_due(state, e, r)
    receive_arrivals(state, e, r)
