"""What stages do to the state: arrivals, prefill stages, decode rounds and their exact times.

DESIGN §3. At one replica stages never overlap; a prefill stage emits each admitted request's first
token; decode rounds between two events are run in one go, their exact times summed in closed form.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.cost_models import CostTables
from servegym.envs.simulator.jit import kernel
from servegym.envs.simulator.order import add
from servegym.envs.simulator.state import (
    FINISHED,
    NOBODY,
    RUNNING,
    WAITING,
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
    return rounds * costs.decode_base_s[r, active] + costs.decode_per_kv_token_s[r] * cached


@kernel
def prefill_seconds(costs: CostTables, r: int, tokens: int, squares: int, requests: int) -> float:
    """Return the time of a prefill stage of ``tokens`` prompt tokens (Σp² ``squares``)."""
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
            costs.prefill_base_s[r]
            + costs.prefill_per_token_s[r] * tokens
            + costs.prefill_per_token_squared_s[r] * squares
        )
        seconds = max(costs.prefill_floor_s[r], line)
    return seconds + costs.overhead_base_s[r] + costs.overhead_per_client_s[r] * requests


@kernel
def expected_remaining(state: State, e: int, r: int, request: int) -> int:
    """Return the decode rounds a running request is believed to need still, ≥ 0."""
    done = state.round[e, r] - state.admitted_round[e, request]
    return max(state.expected_rounds[e, request] - done, 0)


@kernel
def client_work(state: State, e: int, r: int, client: int) -> int:
    """Return the decode rounds a client has before it: its running request and its planned queue."""
    work = state.queue_rounds[e, client]
    request = state.client_request[e, r, client]
    if request != NOBODY:
        work += expected_remaining(state, e, r, request)
    return work


@kernel
def receive_arrivals(state: State, e: int, r: int) -> None:
    """Let every request that has arrived by now wait; an unplanned one joins the least loaded client.

    Arrivals during a stage are seen at its end.
    """
    now_s = state.clock_s[e, r]
    while state.arrived[e] < state.requests[e]:
        request = state.arrived[e]
        if state.arrival_s[e, request] > now_s:
            break
        state.arrived[e] += 1
        state.phase[e, request] = WAITING
        _count_waiting(state, e, request, 1)
        state.in_system_s[e] += now_s - state.arrival_s[e, request]
        if state.plan_client[e, request] == NOBODY:
            enqueue(state, e, _least_loaded(state, e, r), request)


@kernel
def _least_loaded(state: State, e: int, r: int) -> int:
    best = 0
    least = client_work(state, e, r, 0)
    for client in range(1, state.queue_rounds.shape[1]):
        work = client_work(state, e, r, client)
        if work < least:
            best, least = client, work
    return best


@kernel
def _count_waiting(state: State, e: int, request: int, sign: int) -> None:
    prompt = np.int64(state.prompt_tokens[e, request])
    state.waiting[e] += sign
    state.waiting_rounds[e] += sign * state.expected_rounds[e, request]
    state.waiting_prompt_tokens[e] += sign * prompt
    state.waiting_prompt_squares[e] += sign * prompt * prompt
    add(state.waiting_tree[e], state.rank[e, request], sign)


@kernel
def pick(state: State, e: int, r: int, client: int, request: int) -> None:
    """Take a waiting request out of the queues and give it to an idle client."""
    _count_waiting(state, e, request, -1)
    state.queue_rounds[e, state.plan_client[e, request]] -= state.expected_rounds[e, request]
    state.phase[e, request] = RUNNING
    state.client[e, request] = client
    state.admitted_round[e, request] = state.round[e, r]
    state.client_request[e, r, client] = request


@kernel
def run_prefill(state: State, costs: CostTables, e: int, r: int, admitted: int) -> float:
    """Run one prefill stage for the first ``admitted`` picked requests; return its seconds."""
    tokens = 0
    squares = 0
    for request in state.picked[e, :admitted]:
        prompt = np.int64(state.prompt_tokens[e, request])
        tokens += prompt
        squares += prompt * prompt
    start_s = state.clock_s[e, r]
    seconds = prefill_seconds(costs, r, tokens, squares, admitted)
    state.in_system_s[e] += seconds * (state.waiting[e] + state.active[e, r] + admitted)
    state.clock_s[e, r] += seconds
    state.prefill_s[e, r] += seconds
    state.prefill_stages[e, r] += 1
    state.admitted_prompt_tokens[e] += tokens
    state.idle_wait_s[e, r] = 0.0
    state.cached_tokens[e, r] += tokens + admitted  # the stage emits each one's first token
    for request in state.picked[e, :admitted]:
        state.admitted_s[e, request] = start_s
        state.first_token_s[e, request] = state.clock_s[e, r]
    _schedule_finishes(state, e, r, admitted)
    _finish_due(state, e, r)
    receive_arrivals(state, e, r)
    return seconds


@kernel
def _schedule_finishes(state: State, e: int, r: int, admitted: int) -> None:
    """Merge the admitted requests into the order of finishing: latest first, ties by request id."""
    rounds = state.decode_rounds[e]
    picked = state.picked[e, :admitted]
    # Sort the few by (rounds, id) ascending: key both into one integer.
    keys = np.empty(admitted, np.int64)
    span = np.int64(state.decode_rounds.shape[1])
    for k in range(admitted):
        keys[k] = np.int64(rounds[picked[k]]) * span + picked[k]
    keys.sort()
    now = state.round[e, r]
    old = state.active[e, r] - 1
    state.active[e, r] += admitted
    finish = state.finish_round[e, r]
    request_at = state.finish_request[e, r]
    # Move what runs already to the back of the new length, then merge forward.
    for k in range(old, -1, -1):
        finish[k + admitted] = finish[k]
        request_at[k + admitted] = request_at[k]
    source = admitted
    end = state.active[e, r]
    place = 0
    for k in range(admitted - 1, -1, -1):
        request = keys[k] % span
        due = now + keys[k] // span
        while source < end and (
            finish[source] > due or (finish[source] == due and request_at[source] > request)
        ):
            finish[place] = finish[source]
            request_at[place] = request_at[source]
            place += 1
            source += 1
        finish[place] = due
        request_at[place] = request
        place += 1


@kernel
def _finish_due(state: State, e: int, r: int) -> None:
    """Finish every running request whose last token the stage that just ended has emitted."""
    now_s = state.clock_s[e, r]
    last = state.active[e, r] - 1
    while last >= 0 and state.finish_round[e, r, last] <= state.round[e, r]:
        request = state.finish_request[e, r, last]
        state.phase[e, request] = FINISHED
        state.finished_s[e, request] = now_s
        state.cached_tokens[e, r] -= (
            state.prompt_tokens[e, request] + state.decode_rounds[e, request] + 1
        )
        state.client_request[e, r, state.client[e, request]] = NOBODY
        state.finished[e] += 1
        last -= 1
    state.active[e, r] = last + 1


@kernel
def rounds_to_next_finish(state: State, e: int, r: int) -> int:
    """Return the decode rounds until the next request finishes; a client must be active."""
    return state.finish_round[e, r, state.active[e, r] - 1] - state.round[e, r]


@kernel
def rounds_to_arrival(state: State, costs: CostTables, e: int, r: int, most: int) -> int:
    """Return the fewest rounds ≥ 1 after which the next arrival is seen, at most ``most``."""
    if state.arrived[e] == state.requests[e]:
        return most
    ahead_s = state.arrival_s[e, state.arrived[e]]
    active, cached = state.active[e, r], state.cached_tokens[e, r]
    now_s = state.clock_s[e, r]
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if now_s + decode_seconds(costs, r, active, cached, middle) >= ahead_s:
            high = middle
        else:
            low = middle + 1
    return low


@kernel
def run_decode(state: State, costs: CostTables, e: int, r: int, rounds: int) -> float:
    """Run decode rounds, at most as many as to the next finish; return their seconds."""
    active = state.active[e, r]
    clients = state.client_request.shape[2]
    seconds = decode_seconds(costs, r, active, state.cached_tokens[e, r], rounds)
    state.in_system_s[e] += seconds * (state.waiting[e] + active)
    state.clock_s[e, r] += seconds
    state.round[e, r] += rounds
    state.cached_tokens[e, r] += active * rounds
    state.served_rounds[e] += active * rounds
    state.busy_decode_s[e, r] += seconds * active / clients
    if state.waiting[e] > 0:
        state.idle_wait_s[e, r] += seconds * (clients - active)
    _finish_due(state, e, r)
    receive_arrivals(state, e, r)
    return seconds
