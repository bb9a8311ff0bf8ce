"""SGLang's reserve: the memory that admission leaves free for what running requests will still emit.

A replica keeps room for a share of these tokens, the *ratio*. It falls with every decode round, from
SGLang's first value to its least one in 600 rounds. A preemption sets it anew: to the share of their
outputs that those who go on will have emitted in 20 rounds.
"""

from __future__ import annotations

from typing import Final

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.simulator.queues import rounds_ahead
from servegym.envs.simulator.state import State

_LEAST_SHARE: Final = 0.14  # of the first ratio
_ROUNDS_TO_LEAST: Final = 600
_MOST_RESERVED: Final = 4096  # output tokens of one request
_ROUNDS_AHEAD: Final = 20


@kernel
def output_left(state: State, e: int, i: int) -> int:
    """Return the tokens that a request whose prefill is not done will emit, as far as they count."""
    return min(rounds_ahead(state, e, i) + 1, _MOST_RESERVED)


@shared_kernel
def reserved_tokens(state: State, e: int, r: int) -> float:
    """Return the tokens kept free: a share for those who decode, all for those whom the stage admits."""
    replica = state.replicas[e, r]
    left = replica.due_sum - replica.active * replica.rounds
    for place in range(replica.active):  # the latest first
        beyond = state.expected[e, r, place].due - replica.rounds - _MOST_RESERVED
        if beyond <= 0:
            break
        left -= beyond
    admitted = 0
    for k in range(replica.emitting):
        admitted += output_left(state, e, state.picked[e, r, k])
    return _ratio(state, e, r) * left + admitted


@kernel
def _ratio(state: State, e: int, r: int) -> float:
    first, replica = state.cluster.first_ratio, state.replicas[e, r]
    rounds = max(replica.rounds - replica.ratio_rounds, 0)
    fall = first * (1 - _LEAST_SHARE) / _ROUNDS_TO_LEAST
    return max(replica.ratio - rounds * fall, first * _LEAST_SHARE)


@shared_kernel
def set_ratio_anew(state: State, e: int, r: int) -> None:
    """Set the ratio after a preemption; the round for which it was does not lower it."""
    replica = state.replicas[e, r]
    outputs = 0
    for place in range(replica.active):
        outputs += state.requests[e, state.expected[e, r, place].request].expected_rounds + 1
    emitted = outputs - (replica.due_sum - replica.active * replica.rounds)
    replica.ratio = min((emitted + _ROUNDS_AHEAD * replica.active) / (outputs + 1), 1.0)
    replica.ratio_rounds = replica.rounds + 1
