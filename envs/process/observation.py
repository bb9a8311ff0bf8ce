"""The block ``replica`` of the observation: float32 in [0, 1], of a size that no number of clients changes.

Shares, logarithms and histograms let one policy run on 50 or 5,000 clients. Output lengths are expected
ones, never true ones. Tasks may observe further blocks, see ``blocks``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import binary_parts, kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.order import highest, lowest, select
from servegym.envs.simulator.queues import queue_of
from servegym.envs.simulator.seconds import kv_token_seconds
from servegym.envs.simulator.state import LENGTH_BUCKETS, State
from servegym.envs.simulator.view import view

OBSERVATION_VERSION: Final = 2
"""Raised when the name of a feature changes its meaning: agents of the version before are then refused.

It stays when a block gets, loses or reorders names: agents find their features by name."""

FINISH_SHARES: Final = np.array([0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0])
"""Shares of all clients whose next finish the observation holds."""

STAGE_COSTS: Final = np.array([0.25, 0.5, 1.0, 2.0, 4.0])
"""Idle client-time from now on, in fixed costs of a stage, at which the observation looks ahead."""

_BUCKETS: Final = len(LENGTH_BUCKETS)

FEATURES: Final = (
    "active clients / clients",
    "clients a stage could fill now / clients",
    "waiting / arrived",
    "waiting per client, log-scaled",
    "finished / arrived",
    "cached tokens' share of the next decode round's seconds",
    "expected rounds waiting / rounds of all arrived",
    "expected rounds running / rounds of all arrived",
    "stage seconds / (stage + seconds until the next finish)",
    "idle time waited against the fixed cost of a stage, a / (a + b)",
    "idle time until the next finish against the fixed cost of a stage, a / (a + b)",
    "both idle times against the whole cost of a stage, a / (a + b)",
    "fixed share of a stage that fills the idle clients",
    "stage seconds / (stage + decode round seconds)",
    "longest waiting, log-scaled rounds",
    "median waiting, log-scaled rounds",
    "shortest waiting, log-scaled rounds",
    *(f"rounds until {share:.0%} of clients are done, log-scaled" for share in FINISH_SHARES),
    *(f"running with ≥ {low} rounds left / clients, in this bucket" for low in LENGTH_BUCKETS),
    *(f"waiting with ≥ {low} rounds / waiting, in this bucket" for low in LENGTH_BUCKETS),
    *(f"idle / clients once idling on costs {cost:g} stages" for cost in STAGE_COSTS),
    *(f"rounds until idling on costs {cost:g} stages, log-scaled" for cost in STAGE_COSTS),
)
"""What each entry of the block means, in order; the environment's specification."""

OBSERVATION_SIZE: Final = len(FEATURES)
"""Entries of the block ``replica``, all that a task observes unless it names more."""

ROUND_DOUBLINGS: Final = 14.0
"""Of log-scaled rounds: those beyond 16,384 read as 1."""

QUEUE_DOUBLINGS: Final = 8.0
"""Of log-scaled requests per client: those beyond 256 read as 1."""


@kernel
def log_scaled(x: float, doublings: float) -> float:
    """Return log₂(1 + x) / doublings, at most 1, linear between powers of two.

    Exact arithmetic only: a library's logarithm may differ in the last bit between machines.
    """
    mantissa, exponent = binary_parts(1.0 + max(x, 0.0))  # ½ ≤ mantissa < 1
    return min((exponent + 2.0 * mantissa - 2.0) / doublings, 1.0)


@kernel
def balance(a: float, b: float) -> float:
    """Return a / (a + b): ½ where both are equal, 0 where neither is positive."""
    return a / (a + b) if a + b > 0 else 0.0


@shared_kernel
def observe_replica(
    state: State, costs: CostTables, e: int, r: int, out: NDArray[np.float32]
) -> None:
    """Write the block of replica ``r`` in environment ``e`` into ``out`` [: OBSERVATION_SIZE]."""
    episode = state.episodes[e]
    now = view(state, costs, e, r)
    running = state.replicas[e, r].due_sum - now.active * now.round
    total = max(episode.arrived_rounds, 1)
    arrived = max(now.arrived, 1)  # nobody, where all were rejected
    cached_s = kv_token_seconds(costs, r, now.active) * state.replicas[e, r].cached_tokens
    fixed_cost = now.active * now.prefill_fixed_s
    expected_wait = now.idle * now.seconds_to_finish
    out[0] = now.active / now.clients
    out[1] = min(now.idle, now.waiting) / now.clients
    out[2] = now.waiting / arrived
    out[3] = log_scaled(now.waiting / now.clients, QUEUE_DOUBLINGS)
    out[4] = episode.finished / arrived
    out[5] = cached_s / now.round_s
    out[6] = state.queues[e, queue_of(state, r)].rounds / total
    out[7] = running / total
    out[8] = balance(now.prefill_s, now.seconds_to_finish)
    out[9] = balance(now.idle_wait_s, fixed_cost)
    out[10] = balance(expected_wait, fixed_cost)
    out[11] = balance(now.idle_wait_s + expected_wait, now.active * now.prefill_s)
    out[12] = min(now.prefill_fixed_s / now.prefill_s, 1.0) if now.prefill_s > 0 else 0.0
    out[13] = balance(now.prefill_s, now.round_s)
    _observe_waiting(state, e, queue_of(state, r), out)
    _observe_running(state, e, r, out)
    _observe_idling(state, e, r, fixed_cost / now.round_s, out)


@kernel
def _observe_waiting(state: State, e: int, q: int, out: NDArray[np.float32]) -> None:
    waiting = state.queues[e, q].waiting
    histogram = 17 + FINISH_SHARES.size + _BUCKETS
    if waiting == 0:
        out[14:17] = 0.0
        out[histogram : histogram + _BUCKETS] = 0.0
        return
    tree = state.waiting_tree[e, q]
    middle = select(tree, (waiting - 1) // 2)
    out[14] = log_scaled(state.lengths[e, highest(tree)], ROUND_DOUBLINGS)
    out[15] = log_scaled(state.lengths[e, middle], ROUND_DOUBLINGS)
    out[16] = log_scaled(state.lengths[e, lowest(tree)], ROUND_DOUBLINGS)
    for bucket in range(_BUCKETS):
        out[histogram + bucket] = state.waiting_lengths[e, q, bucket] / waiting


@kernel
def _observe_running(state: State, e: int, r: int, out: NDArray[np.float32]) -> None:
    clients = state.machines[r].clients
    active = state.replicas[e, r].active
    finishes = state.expected[e, r]
    now = state.replicas[e, r].rounds
    first = 17
    for k in range(FINISH_SHARES.size):
        # Idle clients count as done; the next to finish is the first of the active ones.
        done = max(int(np.ceil(FINISH_SHARES[k] * clients)) - (clients - active), 1)
        place = active - done
        out[first + k] = (
            log_scaled(finishes[place].due - now, ROUND_DOUBLINGS) if place >= 0 else 0.0
        )
    histogram = first + FINISH_SHARES.size
    longer = active  # requests with at least the bucket's first length left
    for bucket in range(_BUCKETS - 1):
        still = _due_from(state, e, r, now + LENGTH_BUCKETS[bucket + 1])
        out[histogram + bucket] = (longer - still) / clients
        longer = still
    out[histogram + _BUCKETS - 1] = longer / clients


@kernel
def _due_from(state: State, e: int, r: int, due: int) -> int:
    """Return how many running requests should finish at round ``due`` of the decode clock or later.

    A binary search without branches, its number of steps given by the active clients alone: a processor
    runs the searches of all buckets in parallel.
    """
    finishes = state.expected[e, r]
    first = 0
    size = state.replicas[e, r].active
    while size > 0:
        half = (size + 1) // 2
        first += half if finishes[first + half - 1].due >= due else 0
        size -= half
    return first


@kernel
def _observe_idling(
    state: State, e: int, r: int, stage_rounds: float, out: NDArray[np.float32]
) -> None:
    """Write idle clients and rounds passed when further idling has cost ``STAGE_COSTS`` stages.

    ``stage_rounds``: the fixed cost of one stage in client-rounds.
    """
    clients = state.machines[r].clients
    finishes = state.expected[e, r]
    place = state.replicas[e, r].active - 1
    idle = clients - 1 - place
    passed = 0  # rounds from now
    cost = 0  # idle client-rounds until then
    first = OBSERVATION_SIZE - 2 * STAGE_COSTS.size
    for k in range(STAGE_COSTS.size):
        limit = STAGE_COSTS[k] * stage_rounds
        while place >= 0:
            rounds = finishes[place].due - state.replicas[e, r].rounds - passed
            if cost + idle * rounds > limit:
                break
            cost += idle * rounds
            passed += rounds
            place -= 1
            idle += 1
        out[first + k] = idle / clients
        spent = passed + (limit - cost) / idle if place >= 0 else passed
        out[first + STAGE_COSTS.size + k] = log_scaled(spent, ROUND_DOUBLINGS)
