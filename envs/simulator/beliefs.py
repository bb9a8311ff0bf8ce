"""What the scheduler believes of running requests where output lengths are not known.

``State.expected`` holds when each running request should finish, latest first, as ``finishes`` holds
when it will. An expectation stands until it is outlived: a request that still runs when it should
have finished is then expected at its conditional mean, that of a lognormal length given that it
exceeds the tokens emitted so far. A finish reveals the true length. Where lengths are known none of
this runs.
"""

from __future__ import annotations

import math
from typing import Final

from servegym.envs.requests import MAX_TOKENS
from servegym.envs.simulator.jit import kernel, rare_kernel
from servegym.envs.simulator.state import Records, State

_FAR: Final = 8.0
"""Standard deviations from where on a tail's ratio is its asymptote, before both parts underflow."""


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


@rare_kernel
def expect_admitted(state: State, e: int, r: int, admitted: int) -> None:
    """Expect the finishes of the ``admitted`` picked requests, which count as active already."""
    running = state.replicas[e, r].active - admitted
    for k in range(admitted):
        i = state.picked[e, k]
        due = state.clients[e, r, state.requests[e, i].client].expected_end
        _insert(state.expected[e, r], running + k, due, i)


@rare_kernel
def reveal(state: State, e: int, r: int, i: int) -> None:
    """Take in that request ``i``, active until now, has finished: its true length is known."""
    expected, request = state.expected[e, r], state.requests[e, i]
    place = state.replicas[e, r].active - 1
    due, who = expected[place].due, expected[place].request
    while who != i:  # close the gap from the back
        place -= 1
        next_due, next_who = expected[place].due, expected[place].request
        expected[place].due = due
        expected[place].request = who
        due, who = next_due, next_who
    state.episodes[e].arrived_rounds += request.decode_rounds - request.expected_rounds
    request.expected_rounds = request.decode_rounds


@rare_kernel
def revise(state: State, e: int, r: int) -> None:
    """Give every running request that should have finished by now a later expected finish."""
    replica, expected = state.replicas[e, r], state.expected[e, r]
    last = replica.active - 1
    while last >= 0 and expected[last].due <= replica.rounds:
        i = expected[last].request
        request, belief = state.requests[e, i], state.beliefs[e, i]
        own = state.clients[e, r, request.client]
        admitted = own.expected_end - request.expected_rounds  # decode clock of its stage
        emitted = replica.rounds - admitted + 1
        tokens = expected_output_tokens(belief.log_median, belief.spread, emitted)
        more = tokens - 1 - request.expected_rounds
        request.expected_rounds += more
        own.expected_end += more
        replica.due_sum += more
        state.episodes[e].arrived_rounds += more
        _insert(expected, last, own.expected_end, i)


@kernel
def _insert(expected: Records, count: int, due: int, i: int) -> None:
    """Put a finish among the first ``count``, latest first, of equal ones the higher id first."""
    place = count
    while place > 0 and (
        expected[place - 1].due < due
        or (expected[place - 1].due == due and expected[place - 1].request < i)
    ):
        expected[place].due = expected[place - 1].due
        expected[place].request = expected[place - 1].request
        place -= 1
    expected[place].due = due
    expected[place].request = i
