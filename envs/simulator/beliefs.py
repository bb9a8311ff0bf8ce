"""Expected finishes of running requests where output lengths are not known.

``State.expected`` holds the expected finishes, latest first, as ``finishes`` holds the true ones. An
expected finish stays until the request outlives it. The request's expected length then becomes its
conditional mean: that of a lognormal length given that it exceeds the tokens emitted so far. A finish
reveals the true length. None of this runs where lengths are known.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from servegym.envs.jit import kernel
from servegym.envs.simulator.finishes import find, insert, key_of, merge, remove
from servegym.envs.simulator.queues import rounds_ahead
from servegym.envs.simulator.state import State
from servegym.envs.workload.requests import MAX_TOKENS

_FAR: Final = 8.0
"""Standard deviations beyond which the ratio of tails takes its asymptote; both tails underflow later."""


@kernel
def expected_output_tokens(log_median: float, spread: float, emitted: int) -> int:
    """Return the mean of a lognormal length given that it exceeds ``emitted`` ≥ 1 tokens.

    E[Y | Y > k] = exp(μ + σ²/2) · Φ(σ − z) / Φ(−z) with z = (log k − μ) / σ, rounded, at least
    ``emitted`` + 1.
    """
    if spread == 0.0:
        return emitted + 1
    z = (math.log(emitted) - log_median) / spread
    if z > _FAR + spread:
        mean = emitted * z / (z - spread)
    else:
        tails = math.erfc((z - spread) / math.sqrt(2.0)) / math.erfc(z / math.sqrt(2.0))
        mean = math.exp(log_median + spread * spread / 2.0) * tails
    return max(round(min(mean, float(MAX_TOKENS))), emitted + 1)


@kernel
def expect_admitted(state: State, e: int, r: int, admitted: int) -> None:
    """Insert the expected finishes of the ``admitted`` picked requests, already counted as active."""
    replica = state.replicas[e, r]
    if admitted == 1:
        i = state.picked[e, r, 0]
        due = state.clients[e, r, state.requests[e, i].client].expected_end
        insert(state.expected[e, r], replica.active - 1, due, i)
        return
    keys = state.keys[e, :admitted]
    for k in range(admitted):
        i = np.int64(state.picked[e, r, k])
        keys[k] = key_of(rounds_ahead(state, e, i), i)
    merge(state.expected[e, r], replica.active - admitted, replica.rounds, keys)


@kernel
def reveal(state: State, e: int, r: int, done: int) -> None:
    """Replace expected by true lengths for the ``done`` requests due first, which are finishing."""
    active = state.replicas[e, r].active
    places = state.keys[e, :done]
    for k in range(done):
        i = state.finishes[e, r, active - 1 - k].request
        request = state.requests[e, i]
        due = state.clients[e, r, request.client].expected_end
        places[k] = find(state.expected[e, r], active, due, i)
        state.episodes[e].arrived_rounds += request.decode_rounds - request.expected_rounds
        request.expected_rounds = request.decode_rounds
    remove(state.expected[e, r], active, places)


@kernel
def revise(state: State, e: int, r: int) -> None:
    """Give every running request that has outlived its expected finish a later one."""
    replica, expected = state.replicas[e, r], state.expected[e, r]
    late = 0
    due, i = 0, 0
    while late < replica.active and expected[replica.active - 1 - late].due <= replica.rounds:
        i = expected[replica.active - 1 - late].request
        request, belief = state.requests[e, i], state.beliefs[e, i]
        client = state.clients[e, r, request.client]
        # Decode clock of its stage, or where that would have been had it never been preempted.
        admitted = client.expected_end - request.expected_rounds
        emitted = replica.rounds - admitted + 1
        tokens = expected_output_tokens(belief.log_median, belief.spread, emitted)
        more = tokens - 1 - request.expected_rounds
        request.expected_rounds += more
        client.expected_end += more
        replica.due_sum += more
        state.episodes[e].arrived_rounds += more
        due = client.expected_end
        state.keys[e, late] = key_of(due - replica.rounds, i)
        late += 1
    if late == 1:
        insert(expected, replica.active - 1, due, i)
    elif late > 1:
        merge(expected, replica.active - late, replica.rounds, state.keys[e, :late])
