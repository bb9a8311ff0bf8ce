"""What stages do to the state: arrivals, prefill stages, decode rounds and their exact times.

The semantics of CONTRIBUTING.md. At one replica stages never overlap; a prefill stage emits each
admitted request's first token; decode rounds between two events are run in one go, their exact times
summed in closed form.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.envs.cost_models import CostTables
from servegym.envs.simulator.beliefs import expect_admitted, reveal, revise
from servegym.envs.simulator.jit import allocating_kernel, kernel
from servegym.envs.simulator.order import add
from servegym.envs.simulator.state import (
    FINISHED,
    NOBODY,
    RUNNING,
    WAITING,
    Records,
    State,
    enqueue,
)


@kernel
def decode_seconds(
    costs: CostTables, r: int, active: int, cached_tokens: int, rounds: int
) -> float:
    """Return the time of ``rounds`` successive rounds of ``active`` clients, none finishing within.

    The k-th round (k = 0, 1, …) starts with ``cached_tokens`` + k · ``active`` tokens, so the sum is
    arithmetic.
    """
    cached = rounds * cached_tokens + active * (rounds * (rounds - 1) // 2)
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
    """Return the decode rounds a client has before it: its running request and its planned queue."""
    own = state.clients[e, r, client]
    return own.queue_rounds + max(own.expected_end - state.replicas[e, r].rounds, 0)


@kernel
def receive_arrivals(state: State, e: int, r: int) -> None:
    """Let every request that has arrived by now wait; an unplanned one joins the least loaded client.

    Arrivals during a stage are seen at its end.
    """
    episode = state.episodes[e]
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
        if request.plan_client == NOBODY:
            enqueue(state, e, r, _least_loaded(state, e, r), i)


@kernel
def _least_loaded(state: State, e: int, r: int) -> int:
    best = 0
    least = client_work(state, e, r, 0)
    for client in range(1, state.clients.shape[2]):
        work = client_work(state, e, r, client)
        if work < least:
            best, least = client, work
    return best


@kernel
def _count_waiting(state: State, e: int, i: int, sign: int) -> None:
    """Count request ``i`` in (+1) or out (−1) of those waiting."""
    episode, request = state.episodes[e], state.requests[e, i]
    prompt = np.int64(request.prompt_tokens)
    episode.waiting += sign
    episode.waiting_rounds += sign * request.expected_rounds
    episode.waiting_prompt_tokens += sign * prompt
    episode.waiting_prompt_squares += sign * prompt * prompt
    state.waiting_lengths[e, request.bucket] += sign
    add(state.waiting_tree[e], request.rank, sign)


@kernel
def pick(state: State, e: int, r: int, client: int, i: int) -> None:
    """Take waiting request ``i`` out of the queues and give it to a client."""
    request, replica = state.requests[e, i], state.replicas[e, r]
    _count_waiting(state, e, i, -1)
    state.clients[e, r, request.plan_client].queue_rounds -= request.expected_rounds
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
    """Merge the admitted requests into the order of finishing: latest first, ties by request id."""
    replica, finishes = state.replicas[e, r], state.finishes[e, r]
    span = state.requests.shape[1]
    keys = state.keys[e, :admitted]  # rounds and id of each in one sortable number
    for k in range(admitted):
        i = np.int64(state.picked[e, k])
        keys[k] = np.int64(state.requests[e, i].decode_rounds) * span + i
    sort_keys(keys)
    # From the back, soonest first: who finishes after all of the admitted stays in place.
    running = replica.active - 1
    replica.active += admitted
    merged = 0
    place = replica.active - 1
    while merged < admitted:
        i = keys[merged] % span
        due = replica.rounds + keys[merged] // span
        while running >= 0 and not _later(finishes[running], due, i):
            finishes[place].due = finishes[running].due
            finishes[place].request = finishes[running].request
            place -= 1
            running -= 1
        finishes[place].due = due
        finishes[place].request = i
        place -= 1
        merged += 1


@allocating_kernel
def _sort_many(keys: NDArray[np.int64]) -> None:
    keys.sort()


@kernel
def sort_keys(keys: NDArray[np.int64]) -> None:
    """Sort in place; most stages admit a handful, and then a call to a library costs more."""
    if keys.size > 16:
        _sort_many(keys)
        return
    for k in range(1, keys.size):
        key = keys[k]
        place = k
        while place > 0 and keys[place - 1] > key:
            keys[place] = keys[place - 1]
            place -= 1
        keys[place] = key


@kernel
def _later(finish: Records, due: int, i: int) -> bool:
    """Return whether ``finish`` comes after request ``i`` that is due at round ``due``."""
    return finish.due > due or (finish.due == due and finish.request > i)


@kernel
def _finish_due(state: State, e: int, r: int) -> None:
    """Finish every running request whose last token the stage that just ended has emitted.

    Whoever has not finished by now although it should have gets a new expected finish.
    """
    replica = state.replicas[e, r]
    known = state.episodes[e].lengths_known
    while replica.active > 0:
        finish = state.finishes[e, r, replica.active - 1]
        if finish.due > replica.rounds:
            break
        request = state.requests[e, finish.request]
        request.phase = FINISHED
        request.finished_s = replica.clock_s
        replica.cached_tokens -= request.prompt_tokens + request.decode_rounds + 1
        if not known:
            reveal(state, e, r, finish.request)
        _leave_idle(state, e, r, request.client)
        state.episodes[e].finished += 1
    if not known:
        revise(state, e, r)


@kernel
def _leave_idle(state: State, e: int, r: int, client: int) -> None:
    """Put a client whose request has finished among the idle ones."""
    replica, idle = state.replicas[e, r], state.idle[e, r]
    replica.due_sum -= state.clients[e, r, client].expected_end
    state.clients[e, r, client].expected_end = 0
    place = state.clients.shape[2] - replica.active
    while place > 0 and idle[place - 1] > client:
        idle[place] = idle[place - 1]
        place -= 1
    idle[place] = client
    replica.active -= 1


@kernel
def rounds_to_next_finish(state: State, e: int, r: int) -> int:
    """Return the true decode rounds to the next finish; a client must be active. Physics only."""
    replica = state.replicas[e, r]
    return state.finishes[e, r, replica.active - 1].due - replica.rounds


@kernel
def rounds_to_arrival(state: State, costs: CostTables, e: int, r: int, most: int) -> int:
    """Return the fewest rounds ≥ 1 after which the next arrival is seen, at most ``most``."""
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
    """Run decode rounds, at most as many as to the next finish."""
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
