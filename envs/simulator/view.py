"""The numbers that rules read at a decision point, all known to a scheduler."""

from __future__ import annotations

from typing import NamedTuple

from servegym.envs.jit import kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.queues import queue_of
from servegym.envs.simulator.seconds import decode_seconds, prefill_seconds
from servegym.envs.simulator.state import NOBODY, State


class DecisionView(NamedTuple):
    """One replica at a decision point, without what a scheduler cannot know. Times in seconds.

    Examples
    --------
    >>> from servegym.envs import ServingEnv
    >>> env = ServingEnv("Tiny-v0")
    >>> _ = env.reset(seed=0)
    >>> view = env.view()
    >>> view.clients, view.idle, view.waiting
    (3, 3, 8)
    """

    clients: int
    active: int
    idle: int
    waiting: int  # requests that have arrived and are not admitted
    arrived: int  # requests so far, finished ones included
    finished: int
    served_rounds: int  # Σ over the decode rounds so far of active clients
    round: int  # decode rounds run so far
    clock_s: float
    idle_wait_s: float  # idle client-seconds since the last prefill stage, while requests waited
    round_s: float  # the next decode round
    rounds_to_finish: int  # until the next running request should finish (0: none runs)
    seconds_to_finish: float
    prefill_s: float  # a stage that fills the idle clients with waiting prompts of mean length
    prefill_fixed_s: float  # the part that grows with neither tokens nor requests
    next_stage: int = (
        NOBODY  # decode clock of the calendar's first stage after the last prefill; −1: none
    )


@kernel
def deciding(state: State, e: int) -> int:
    """Return the replica whose turn it is at a decision point; 0 at the end."""
    turn = state.episodes[e].turn
    return turn if turn < state.replicas.shape[1] else 0


@kernel
def view(state: State, costs: CostTables, e: int, r: int) -> DecisionView:
    """Return the decision view of replica ``r`` in environment ``e``."""
    episode, replica = state.episodes[e], state.replicas[e, r]
    queue = state.queues[e, queue_of(state, r)]
    active = replica.active
    idle = replica.idle
    waiting = queue.waiting
    rounds = state.expected[e, r, active - 1].due - replica.rounds if active > 0 else 0
    prefill_s = 0.0
    fixed_s = 0.0
    if waiting > 0:
        admitted = min(idle, waiting)
        tokens = queue.tokens
        if tokens < 1 << 40:
            tokens = tokens * admitted // waiting
        else:  # the same; the product may exceed 64 bits
            mean = tokens // waiting
            tokens = mean * admitted + (tokens - mean * waiting) * admitted // waiting
        squares = queue.squares_high * 4294967296.0 + queue.squares_low
        squares *= admitted / waiting
        prefill_s = prefill_seconds(costs, r, tokens, squares, admitted)
        rates = costs.rates[r]
        variable_s = (
            rates.prefill_per_token_s * tokens
            + rates.prefill_per_token_squared_s * squares
            + rates.prefill_per_batch_token_squared_s * (float(tokens) * tokens)
            + rates.overhead_per_client_s * admitted
        )
        fixed_s = max(prefill_s - variable_s, 0.0)
    return DecisionView(
        state.machines[r].clients,
        active,
        idle,
        waiting,
        episode.arrived,
        episode.finished,
        episode.served_rounds,
        replica.rounds,
        replica.clock_s,
        replica.idle_wait_s,
        decode_seconds(costs, r, active, replica.cached_tokens, 1),
        rounds,
        decode_seconds(costs, r, active, replica.cached_tokens, rounds),
        prefill_s,
        fixed_s,
        next_stage(state, e, r),
    )


@kernel
def next_stage(state: State, e: int, r: int) -> int:
    """Return the decode clock of the first stage in the calendar after the last prefill stage, or NOBODY."""
    low, high = 0, state.episodes[e].stages
    last = state.replicas[e, r].stage_rounds
    while low < high:
        middle = (low + high) // 2
        if state.calendar[e, middle] <= last:
            low = middle + 1
        else:
            high = middle
    return state.calendar[e, low] if low < state.episodes[e].stages else NOBODY
