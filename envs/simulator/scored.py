"""The admission rule ``scored``: waiting requests ranked by a weighted score (``workload.scoring``).

Scores are computed once a stage, for each length that waits: what waits is read in the order of length, so
a stage takes O(requests that wait + lengths that wait · stages to come).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel, kernel
from servegym.envs.simulator.order import Tree, count_below, is_counted, next_counted
from servegym.envs.simulator.queues import queue_of, waiting_at
from servegym.envs.simulator.state import NOBODY, State

# Places of the weights, in the order of ScoreWeights.
_LENGTH: Final = 0
_LENGTH_SLOPE: Final = 1
_PAD: Final = 2
_PAD_SCALE: Final = 3
_LATER: Final = 4
_LATER_SLOPE: Final = 5
_LATER_SCALE: Final = 6
_COUNT: Final = 7
_URGENT: Final = 8
_URGENT_SLOPE: Final = 9
_URGENT_SCALE: Final = 10
_LATE: Final = 11
_SHORTEST_SHARE: Final = 12
_TAIL: Final = 13

TARGET_SIZE: Final = 2
"""Requests that make a target by finishing together, where there is no calendar."""

_FAR: Final = 1e9
"""Rounds to the next target where there is none."""


@kernel
def _saturated(x: float, scale: float) -> float:
    return x / (1.0 + x / scale)


@allocating_kernel
def rank_by_score(state: State, e: int, r: int) -> None:
    """Write into ``ranked`` the highest waiting rank of each length that is a candidate, best score first."""
    q = queue_of(state, r)
    tree, lengths, ranked = state.waiting_tree[e, q], state.lengths[e], state.ranked[e]
    groups = 0
    rank = next_counted(tree, 0)
    counts = np.empty(state.queues[e, q].waiting, np.int64)
    while rank != NOBODY:
        if groups > 0 and lengths[ranked[groups - 1]] == lengths[rank]:
            counts[groups - 1] += 1
        else:
            counts[groups] = 1
            groups += 1
        ranked[groups - 1] = rank
        rank = next_counted(tree, rank + 1)
    scores = np.empty(groups)
    if state.episodes[e].stages > 0:
        _score_by_calendar(state, e, r, counts, scores)
    else:
        groups = _score_by_finishes(state, e, r, counts, scores)
    _sort(scores, ranked, groups)
    state.episodes[e].ranked = groups


@kernel
def _score_by_calendar(
    state: State, e: int, r: int, counts: NDArray[np.int64], scores: NDArray[np.float64]
) -> None:
    """Score each length by how it fits the calendar now and how it would at a later stage."""
    calendar, weights, stages = state.calendar[e], state.weights[e], state.episodes[e].stages
    lengths, ranked = state.lengths[e], state.ranked[e]
    clock, end = np.int64(state.replicas[e, r].rounds), np.int64(calendar[stages])
    for group in range(scores.size):
        scores[group] = _FAR
    for stage in range(stages - 1, -1, -1):  # ``scores`` holds the best pad of later stages
        if calendar[stage] <= clock:
            break
        target = stage
        for group in range(scores.size):
            finish = calendar[stage] + np.int64(lengths[ranked[group]])
            while target < stages and calendar[target] < finish:
                target += 1
            scores[group] = min(scores[group], _pad(calendar[target], finish, weights[_LATE]))
    h = min(clock / end, 1.0)
    length = weights[_LENGTH] + weights[_LENGTH_SLOPE] * h
    later = weights[_LATER] + weights[_LATER_SLOPE] * h
    urgent = weights[_URGENT] + weights[_URGENT_SLOPE] * h
    target = 0
    for group in range(scores.size):
        rounds = np.int64(lengths[ranked[group]])
        finish = clock + rounds
        while target < stages and calendar[target] < finish:
            target += 1
        score = length * rounds
        score -= weights[_PAD] * _saturated(
            _pad(calendar[target], finish, weights[_LATE]), weights[_PAD_SCALE]
        )
        score += later * _saturated(scores[group], weights[_LATER_SCALE])
        score += weights[_COUNT] * counts[group]
        nearness = 1.0
        if finish < end:
            nearness = weights[_URGENT_SCALE] / (weights[_URGENT_SCALE] + (end - finish))
        scores[group] = score + urgent * nearness * nearness


@kernel
def _pad(target: int, finish: int, late: float) -> float:
    """Return the rounds from a finish to the target at or after it, or so many times those past the last."""
    return float(target - finish) if finish <= target else late * (finish - target)


@kernel
def _score_by_finishes(
    state: State, e: int, r: int, counts: NDArray[np.int64], scores: NDArray[np.float64]
) -> int:
    """Score each length by how it fits the finishes of those who run; return how many are candidates."""
    weights, lengths, ranked = state.weights[e], state.lengths[e], state.ranked[e]
    clock = state.replicas[e, r].rounds
    place = state.replicas[e, r].active
    finishes = state.expected[e, r]
    target = np.int64(-1)
    group = 0
    while group < scores.size:
        rounds = np.int64(lengths[ranked[group]])
        while target < rounds and place > 0:  # the next clock at which several finish
            due, together = finishes[place - 1].due, 0
            while place > 0 and finishes[place - 1].due == due:
                together += 1
                place -= 1
            if together >= TARGET_SIZE:
                target = due - clock
        if target < rounds:
            break
        score = weights[_LENGTH] * rounds
        score -= weights[_PAD] * _saturated(float(target - rounds), weights[_PAD_SCALE])
        scores[group] = score + weights[_COUNT] * counts[group]
        group += 1
    return group


@kernel
def _sort(scores: NDArray[np.float64], ranked: NDArray[np.int32], count: int) -> None:
    """Sort both by falling score; of equal scores the higher rank goes first (Shell 1959)."""
    gap = 1
    while gap < count // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for k in range(gap, count):
            score, rank = scores[k], ranked[k]
            place = k
            while place >= gap and (
                scores[place - gap] < score
                or (scores[place - gap] == score and ranked[place - gap] < rank)
            ):
                scores[place] = scores[place - gap]
                ranked[place] = ranked[place - gap]
                place -= gap
            scores[place] = score
            ranked[place] = rank
        gap //= 3


@kernel
def best_scored(state: State, e: int, r: int) -> int:
    """Return the waiting candidate with the best score; without one the longest of those waiting.

    ``rank_by_score`` must have ranked them for this stage.
    """
    q = queue_of(state, r)
    tree, lengths, ranked = state.waiting_tree[e, q], state.lengths[e], state.ranked[e]
    weights, waiting = state.weights[e], state.queues[e, q].waiting
    if waiting > weights[_TAIL] * state.machines[r].clients:
        first = int(waiting * weights[_SHORTEST_SHARE])
        for place in range(state.episodes[e].ranked):
            rank = ranked[place]
            if rank == NOBODY:
                continue
            if not is_counted(tree, rank):  # admitted in this stage; the next that is as long
                rank = _lower(tree, lengths, rank)
                ranked[place] = rank
                if rank == NOBODY:
                    continue
            if first == 0 or count_below(tree, rank) >= first:
                return state.by_length[e, rank]
    return waiting_at(state, e, q, waiting - 1)


@kernel
def _lower(tree: Tree, lengths: NDArray[np.int32], rank: int) -> int:
    """Return the next lower rank that waits and is of the same length, or NOBODY."""
    lower = rank - 1
    while lower >= 0 and lengths[lower] == lengths[rank]:
        if is_counted(tree, lower):
            return lower
        lower -= 1
    return NOBODY
