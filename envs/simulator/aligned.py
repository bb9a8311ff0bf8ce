"""The aligned rule: admit the request that will finish together with running ones."""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import kernel
from servegym.envs.simulator.order import count_below
from servegym.envs.simulator.queues import longest_waiting, queue_of, waiting_at
from servegym.envs.simulator.state import State

# The aligned rule's parameters, from a throw-away study; results hardly depend on them.
ALIGNED_PAD_WEIGHT: Final = 3
ALIGNED_TARGET_SIZE: Final = 2
ALIGNED_TAIL_PER_CLIENT: Final = 2

_NO_TARGET: Final = -1
"""What ``_target`` returns behind the last target; no number of rounds."""


@kernel
def forget_targets(state: State, e: int) -> None:
    """Begin a stage's list of targets; see ``_target``."""
    if state.keys.shape[1] >= ALIGNED_TARGET_SIZE + 1:
        state.keys[e, -1] = 0  # how many are listed
        state.keys[e, -2] = 0  # how many finishes have been read


@kernel
def _target(state: State, e: int, r: int, k: int) -> int:
    """Return the rounds to the k-th target of ``longest_aligned``, the latest first, or ``_NO_TARGET``.

    A stage's candidates share a list of them in ``keys``, which is read on as far as one of them asks.
    Fewer than half as many targets as clients leave the two last places for the counts.
    """
    if state.keys.shape[1] <= ALIGNED_TARGET_SIZE:
        return _NO_TARGET  # with a client idle, no two run
    keys = state.keys[e]
    if k < keys[-1]:
        return keys[k]
    replica, finishes = state.replicas[e, r], state.expected[e, r]
    place = keys[-2]
    while place < replica.active:
        due = finishes[place].due
        together = 0
        while place < replica.active and finishes[place].due == due:
            together += 1
            place += 1
        if together >= ALIGNED_TARGET_SIZE:
            keys[k] = due - replica.rounds
            keys[-1] = k + 1
            keys[-2] = place
            return keys[k]
    keys[-2] = place
    return _NO_TARGET


@kernel
def longest_aligned(state: State, e: int, r: int) -> int:
    """Return the waiting request with the best score L − α · pad.

    L is its expected rounds, pad the rounds from its finish to the next target at or after it; a
    target is when several running requests should finish together. Candidates are the longer half of those
    waiting that finish by the last target; without any, and for the last two requests per client, the
    longest goes first. Between two targets the score grows with L, so only the longest request that
    finishes by each target can win: one search a target.
    """
    q = queue_of(state, r)
    waiting = state.queues[e, q].waiting
    best = longest_waiting(state, e, q)
    if waiting <= ALIGNED_TAIL_PER_CLIENT * state.machines[r].clients:
        return best
    best_score = np.int64(-(1 << 62))
    k = 0
    target = _target(state, e, r, k)
    while (
        target != _NO_TARGET and target >= best_score
    ):  # no score exceeds its target, the next is sooner
        longest = count_below(state.waiting_tree[e, q], _rank_above(state, e, target)) - 1
        if longest < waiting // 2:
            break
        i = waiting_at(state, e, q, longest)
        rounds = state.requests[e, i].expected_rounds
        score = rounds - ALIGNED_PAD_WEIGHT * (target - rounds)
        if score > best_score:
            best, best_score = i, score
        k += 1
        target = _target(state, e, r, k)
    return best


@kernel
def _rank_above(state: State, e: int, rounds: int) -> int:
    """Return the first rank whose request expects more than ``rounds`` rounds."""
    low, high = 0, state.episodes[e].requests
    while low < high:
        middle = (low + high) // 2
        if state.lengths[e, middle] <= rounds:
            low = middle + 1
        else:
            high = middle
    return low
