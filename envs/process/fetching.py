"""What steps of the next rows read first, asked for while a row is stepped: many rows fit into no cache.

Nothing waits for it, and it changes no result. Several looks are taken at a row, each of which needs what the
one before has brought. Before it runs: at its records, at the arrays of the replicas that are next, at the
requests in these. After it has run: at the arrays of the replica that decides.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import fetch_ahead, kernel, shared_kernel
from servegym.envs.simulator.queues import queue_of
from servegym.envs.simulator.state import State
from servegym.envs.simulator.view import deciding

_LOOKS: Final = 4
_NEAR_FINISHES: Final = 4


@kernel
def fetch_rows(state: State, e: int, rows: int) -> None:
    """Take a look at each of the rows that run after ``e``, of ``rows``.

    The last look comes first: it asks for least, and a processor drops what it cannot remember.
    """
    for look in range(_LOOKS - 1, -1, -1):
        after = e + _LOOKS - look
        if after < rows:
            _fetch(state, after, look)


@shared_kernel
def _fetch(state: State, e: int, look: int) -> None:
    if look == 0:
        fetch_ahead(state.episodes, e, 1)
        fetch_ahead(state.replicas[e], 0, state.replicas.shape[1])
        fetch_ahead(state.queues[e], 0, state.queues.shape[1])
        fetch_ahead(state.event_s[e], 0, state.event_s.shape[1])
        return
    r = deciding(state, e)
    s = _next_after(state, e, r)
    active = state.replicas[e, s].active
    if look == 1:
        q, routed = queue_of(state, r), state.episodes[e].routed
        fetch_ahead(state.waiting_tree[e, q], 0, state.waiting_tree.shape[2])
        fetch_ahead(state.waiting_lengths[e, q], 0, state.waiting_lengths.shape[2])
        fetch_ahead(state.expected[e, r], 0, state.replicas[e, r].active)
        fetch_ahead(state.idle[e, r], 0, state.replicas[e, r].idle)
        if s != r:
            fetch_ahead(state.expected[e, s], 0, active)
        near = max(active - _NEAR_FINISHES, 0)
        fetch_ahead(state.finishes[e, s], near, active - near)
        if routed < state.episodes[e].requests:
            fetch_ahead(state.requests[e], routed, 1)
            fetch_ahead(state.times[e], routed, 1)
        return
    if active > 0:
        i = state.finishes[e, s, active - 1].request
        if look == 3:
            client = state.requests[e, i].client
            fetch_ahead(state.clients[e, s], client, 1)
            if state.admitted.shape[2] > 0:
                fetch_ahead(state.admitted[e, s], client, 1)
            return
        fetch_ahead(state.requests[e], i, 1)
        fetch_ahead(state.times[e], i, 1)
        if state.carried.shape[1] > 0:
            fetch_ahead(state.carried[e], i, 1)


@shared_kernel
def fetch_observed(state: State, e: int) -> None:
    """Take a look at the replica that decides in row ``e``, which has run and is to be observed."""
    r = deciding(state, e)
    q, active = queue_of(state, r), state.replicas[e, r].active
    fetch_ahead(state.expected[e, r], 0, active)
    fetch_ahead(state.waiting_tree[e, q], 0, state.waiting_tree.shape[2])
    fetch_ahead(state.waiting_lengths[e, q], 0, state.waiting_lengths.shape[2])
    if state.paces.shape[2] > 0:
        fetch_ahead(state.paces[e, r], 0, active)  # the first clients are the first to be used


@kernel
def _next_after(state: State, e: int, r: int) -> int:
    """Return which replica is likely to decide after ``r``: of the others the one with the next boundary."""
    best, best_s = r, np.inf
    for s in range(state.replicas.shape[1]):
        if s != r and state.event_s[e, s] < best_s:
            best, best_s = s, state.event_s[e, s]
    return best
