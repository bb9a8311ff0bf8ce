"""Shedding: a request that has waited in vain is turned away, so that others come in time.

What cannot meet its limit any more costs as much as what can, and counts for nothing: admission control
as in Mooncake (arXiv 2407.00079), which refuses who would get a first token too late.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.queues import (
    count_waiting,
    forget_plan,
    leave_lists,
    queue_of,
    shares_pool,
    tokens_to_prefill,
)
from servegym.envs.simulator.seconds import prefill_seconds
from servegym.envs.simulator.slo import limits_of
from servegym.envs.simulator.state import NOBODY, SHED, WAITING, State


@shared_kernel
def shed_late(state: State, costs: CostTables, e: int, r: int) -> bool:
    """Turn away who waits for replica ``r`` and would have a first token too late; return whether anybody is.

    Who has never been admitted is looked at, as if alone: a prefill stage of its own would have to end
    within ``cluster.shed_at`` of its limit; in a pool on the fastest replica. Arrivals have been seen.
    """
    q = queue_of(state, r)
    shed = False
    i = state.queues[e, q].first
    while i != NOBODY:
        after = state.requests[e, i].next
        if state.requests[e, i].phase == WAITING and np.isnan(state.times[e, i].admitted_s):
            limit_s = limits_of(state, e, i)[0]
            last_s = state.times[e, i].arrival_s + state.cluster.shed_at * limit_s
            if state.episodes[e].now_s + _alone_s(state, costs, e, r, i) > last_s:
                _shed(state, e, q, i)
                shed = True
        i = after
    return shed


@kernel
def _alone_s(state: State, costs: CostTables, e: int, r: int, i: int) -> float:
    """Return the seconds of a prefill stage of request ``i`` alone."""
    tokens = tokens_to_prefill(state, e, i)
    squares = float(tokens) * tokens
    seconds = prefill_seconds(costs, r, tokens, squares, 1)
    if shares_pool(state):
        for other in range(state.replicas.shape[1]):
            seconds = min(seconds, prefill_seconds(costs, other, tokens, squares, 1))
    return seconds


@kernel
def _shed(state: State, e: int, q: int, i: int) -> None:
    request, episode = state.requests[e, i], state.episodes[e]
    count_waiting(state, e, q, i, -1)
    state.queues[e, q].stolen -= request.stolen
    request.stolen = 0
    forget_plan(state, e, i)
    leave_lists(state, e, q, i)
    request.phase = SHED
    episode.rejected += 1
    episode.shed += 1
    episode.in_system -= 1
    episode.disturbed = 1
