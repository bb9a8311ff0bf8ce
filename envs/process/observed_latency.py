"""The block ``latency`` of the observation: how far requests are from the limits of ``[slo]``.

Where classes have limits of their own, ages and shares go by these, the other entries by the limit of all.
Of the replica that decides, but for the share that has met the limits, which is the cluster's. Ages and
times of tokens are what a scheduler has seen; how long a request still runs is not used. A limit that
the task does not have leaves its entries at 0.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.process.observation import balance
from servegym.envs.simulator.queues import queue_of
from servegym.envs.simulator.slo import limits_of
from servegym.envs.simulator.state import WAITING, State
from servegym.envs.simulator.view import view

LATENCY_FEATURES: Final = (
    "the first token has a limit, 0 or 1",
    "the time per token has a limit, 0 or 1",
    "age of the oldest that waits for its first token against the limit, a / (a + b)",
    "waiting for their first token for less than ¼ of the limit / waiting",
    "waiting for their first token for ¼ of the limit or more / waiting, less than ½",
    "waiting for their first token for ½ of the limit or more / waiting, less than ¾",
    "waiting for their first token for ¾ of the limit or more / waiting, not beyond it",
    "waiting for their first token beyond the limit / waiting",
    "waiting again after their first token / waiting",
    "seconds of a stage that fills the idle clients against the first token's limit, a / (a + b)",
    "running above the limit per token so far / clients",
    "running within a fifth below the limit per token so far / clients",
    "mean seconds per token so far of the running against the limit, a / (a + b)",
    "seconds of a round against the limit per token, a / (a + b)",
    "finished within the limits / finished",
)
"""What each entry of the block means, in order."""

_FIRST_SHARE: Final = 3
_QUARTERS: Final = 4
_NEAR: Final = 0.8


@shared_kernel
def observe_latency(
    state: State, costs: CostTables, e: int, r: int, at: int, out: NDArray[np.float32]
) -> None:
    """Write the block of replica ``r`` in environment ``e`` into ``out``, from entry ``at`` on."""
    episode, cluster = state.episodes[e], state.cluster
    out[at : at + len(LATENCY_FEATURES)] = 0.0
    if not episode.counts_slo:  # an imagined episode, which has no times
        return
    now = view(state, costs, e, r)
    _observe_waiting(state, e, r, at, out)
    if cluster.slo_ttft_s < np.inf:
        out[at] = 1.0
        out[at + 9] = balance(now.prefill_s, cluster.slo_ttft_s)
    if cluster.slo_tpot_s < np.inf:
        out[at + 1] = 1.0
        _observe_running(state, e, r, at, out)
        out[at + 13] = balance(now.round_s, cluster.slo_tpot_s)
    out[at + 14] = episode.met / episode.finished if episode.finished > 0 else 1.0


@kernel
def _observe_waiting(state: State, e: int, r: int, at: int, out: NDArray[np.float32]) -> None:
    """Write how long those wait who have no token yet, in quarters of the limit."""
    queue = state.queues[e, queue_of(state, r)]
    if queue.waiting == 0:
        return
    now_s, oldest, again = state.episodes[e].now_s, 0.0, 0
    i = queue.first
    while i != queue.first_unseen:
        if state.requests[e, i].phase == WAITING:
            times = state.times[e, i]
            age_s = now_s - times.arrival_s
            limit_s, _ = limits_of(state, e, i)
            if not np.isnan(times.first_token_s):
                again += 1
            elif limit_s < np.inf:
                oldest = max(oldest, balance(age_s, limit_s))
                quarter = _QUARTERS
                if age_s <= limit_s:
                    quarter = min(int(age_s / limit_s * _QUARTERS), _QUARTERS - 1)
                out[at + _FIRST_SHARE + quarter] += 1.0
        i = state.requests[e, i].next
    for k in range(at + _FIRST_SHARE, at + _FIRST_SHARE + _QUARTERS + 1):
        out[k] /= queue.waiting
    out[at + 8] = again / queue.waiting
    out[at + 2] = oldest


@kernel
def _observe_running(state: State, e: int, r: int, at: int, out: NDArray[np.float32]) -> None:
    """Write how the time per token of the decoding stands, of those with a second token."""
    now_s, rounds, paces = state.episodes[e].now_s, state.replicas[e, r].rounds, state.paces[e, r]
    above, near, with_two, total_s = 0, 0, 0, 0.0
    client, left = 0, state.replicas[e, r].active
    while left > 0:
        pace = paces[client]
        client += 1
        if np.isnan(pace.first_token_s):
            continue
        left -= 1
        tokens = rounds - pace.begun_rounds  # after the first
        if tokens > 0:
            token_s = (now_s - pace.first_token_s) / tokens
            with_two += 1
            total_s += token_s
            above += token_s > pace.limit_s
            near += _NEAR * pace.limit_s <= token_s <= pace.limit_s
    out[at + 10] = above / state.machines[r].clients
    out[at + 11] = near / state.machines[r].clients
    if with_two > 0:
        out[at + 12] = balance(total_s / with_two, state.cluster.slo_tpot_s)
