"""From one decision point to the next: the loop of every environment and every rule."""

from __future__ import annotations

from typing import Final

from servegym.envs.jit import kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.admission import admit
from servegym.envs.simulator.stages import (
    receive_arrivals,
    rounds_to_arrival,
    rounds_to_next_finish,
    run_decode,
    run_prefill,
)
from servegym.envs.simulator.state import State

DECODE: Final = 0
"""The action that continues decoding; action 1 + k prefills under the k-th admission rule of the task."""


@kernel
def advance(state: State, costs: CostTables, e: int, r: int) -> bool:
    """Run while there is no choice; return True at a decision point, False at the episode's end."""
    episode, replica = state.episodes[e], state.replicas[e, r]
    receive_arrivals(state, e, r)
    clients = state.clients.shape[2]
    while episode.finished < episode.requests:
        active = replica.active
        if active < clients and episode.waiting > 0:
            return True
        if active == 0:
            next_s = state.requests[e, episode.arrived].arrival_s
            replica.clock_s = max(replica.clock_s, next_s)
            receive_arrivals(state, e, r)
            continue
        rounds = rounds_to_next_finish(state, e, r)
        if active < clients:
            rounds = rounds_to_arrival(state, costs, e, r, rounds)
        run_decode(state, costs, e, r, rounds)
    return False


@kernel
def decode(state: State, costs: CostTables, e: int, r: int, every_round: bool) -> None:
    """Decode until the choice changes (a finish or an arrival), or for one round."""
    rounds = 1
    if not every_round:
        rounds = rounds_to_arrival(state, costs, e, r, rounds_to_next_finish(state, e, r))
    run_decode(state, costs, e, r, rounds)


@kernel
def prefill(
    state: State, costs: CostTables, e: int, r: int, rule: int, max_prefill_tokens: int
) -> None:
    """Run one prefill stage under an admission rule, which must admit a request."""
    admitted = admit(state, e, r, rule, max_prefill_tokens)
    run_prefill(state, costs, e, r, admitted)
