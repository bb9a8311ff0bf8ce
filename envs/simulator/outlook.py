"""What a stage now would cost later: memory that runs short, limits of ``[slo]`` that are missed.

All of it is known to a scheduler: expected lengths, memory held, times of arrivals and first tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.memory import free_blocks
from servegym.envs.simulator.queues import queue_of
from servegym.envs.simulator.seconds import prefill_seconds
from servegym.envs.simulator.slo import limits_of
from servegym.envs.simulator.state import NOBODY, UNLIMITED_BLOCKS, WAITING, State
from servegym.envs.simulator.view import DecisionView


class Outlook(NamedTuple):
    """What a prefill stage that fills the idle clients now changes for later, at one replica.

    Examples
    --------
    >>> from servegym.envs import ServingEnv
    >>> env = ServingEnv("Tiny-v0")
    >>> _ = env.reset(seed=0)
    >>> env.outlook()
    Outlook(admitted=3, overflow_tokens=0, recompute_s=0.0, saved=0, lost=0)
    """

    admitted: int  # requests, of mean length; no more than fit into free memory, but at least one
    overflow_tokens: int  # expected beyond the memory at its fullest, more than without the stage
    recompute_s: float  # a stage that computes these again
    saved: (
        int  # requests whose first token is in time now, but not at the next chance; up to the idle
    )
    lost: int  # running requests that meet the limit per token if there is no stage, but not else


@shared_kernel
def outlook(state: State, costs: CostTables, e: int, r: int, seen: DecisionView) -> Outlook:
    """Return the outlook of replica ``r``, of which ``seen`` is the view.

    The stage is that of ``seen.prefill_s``, the next chance the next expected finish.
    """
    tokens, admitted = 0, min(seen.idle, seen.waiting)
    if state.machines[r].blocks != UNLIMITED_BLOCKS and admitted > 0:
        prompt = max(state.queues[e, queue_of(state, r)].tokens // seen.waiting, 1)
        free = free_blocks(state, e, r) * state.cluster.block_tokens
        admitted = max(min(admitted, free // prompt), 1)
        tokens = _overflow(state, e, r, admitted)
    again_s = prefill_seconds(costs, r, tokens, 0.0, 1) if tokens > 0 else 0.0
    saved = 0
    by_class = state.limits.shape[1] > 0
    if by_class or state.cluster.slo_ttft_s < np.inf:
        saved = min(_saved(state, e, r, seen), seen.idle)
    limited = by_class or state.cluster.slo_tpot_s < np.inf
    lost = _lost(state, e, r, seen) if limited else 0
    return Outlook(admitted, tokens, again_s, saved, lost)


@kernel
def _overflow(state: State, e: int, r: int, admitted: int) -> int:
    """Return by how many tokens the fullest moment exceeds the memory, more than it does without the stage.

    Memory grows until a request finishes, so it is fullest at a finish. ``expected`` has the latest first:
    those met so far hold on at the finish of the next.
    """
    replica, queue = state.replicas[e, r], state.queues[e, queue_of(state, r)]
    prompt, rounds = queue.tokens // queue.waiting, queue.rounds // queue.waiting
    memory = (state.machines[r].blocks - replica.incoming_blocks) * state.cluster.block_tokens
    held, most, most_with = 0, 0, admitted * (prompt + rounds)
    before = UNLIMITED_BLOCKS  # rounds left of the one met last
    for place in range(replica.active):
        finish = state.expected[e, r, place]
        left = finish.due - replica.rounds
        request = state.requests[e, finish.request]
        if left < rounds <= before:  # the admitted finish between these two
            most_with = max(most_with, held + (place + admitted) * rounds + admitted * prompt)
        held += np.int64(request.prompt_tokens) + request.expected_rounds - left
        now = held + (place + 1) * left
        most = max(most, now)
        most_with = max(most_with, now + (admitted * (prompt + left) if left <= rounds else 0))
        before = left
    if before >= rounds:
        most_with = max(most_with, held + (replica.active + admitted) * rounds + admitted * prompt)
    return max(most_with - memory, 0) - max(most - memory, 0)


@kernel
def _saved(state: State, e: int, r: int, seen: DecisionView) -> int:
    """Return whose first token comes in time by a stage now, but not by one at the next chance."""
    now_s = state.episodes[e].now_s
    count = 0
    i = state.queues[e, queue_of(state, r)].first
    while i != NOBODY:
        if state.requests[e, i].phase == WAITING and np.isnan(state.times[e, i].first_token_s):
            limit_s = limits_of(state, e, i)[0]
            left_s = state.times[e, i].arrival_s + limit_s - now_s - seen.prefill_s
            count += int(0.0 <= left_s < seen.seconds_to_finish)
        i = state.requests[e, i].next
    return count


@kernel
def _lost(state: State, e: int, r: int, seen: DecisionView) -> int:
    """Return who decodes, should meet the limit per token at the present pace, and not after the stage."""
    now_s = state.episodes[e].now_s
    replica = state.replicas[e, r]
    count = 0
    for place in range(replica.active):
        finish = state.expected[e, r, place]
        rounds = state.requests[e, finish.request].expected_rounds
        first_s = state.times[e, finish.request].first_token_s
        left = finish.due - replica.rounds
        limit_s = limits_of(state, e, np.int64(finish.request))[1]
        spare_s = rounds * limit_s - (now_s - first_s) - left * seen.round_s
        count += int(0.0 <= spare_s < seen.prefill_s)
    return count
