"""The admission rule ``scored``: waiting requests ranked by a weighted score (``workload.scoring``).

Scores are computed once a stage, for each length that waits: what waits is read in the order of length, so
a stage takes O(requests that wait + idle clients²).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel, kernel
from servegym.envs.simulator.aligned import ALIGNED_TARGET_SIZE
from servegym.envs.simulator.order import Tree, count_below, is_counted, next_counted
from servegym.envs.simulator.queues import longest_waiting, queue_of
from servegym.envs.simulator.state import NOBODY, State

# Places of the weights, in the order of ScoreWeights.
_LENGTH: Final = 0
_LENGTH_SLOPE: Final = 1
PAD_WEIGHT: Final = 2
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
    # With a share left out, who is a candidate changes within the stage.
    all_count = state.weights[e, _SHORTEST_SHARE] > 0.0
    most = groups if all_count else min(groups, state.replicas[e, r].idle)
    state.episodes[e].ranked = _keep_best(scores, ranked, groups, most)


@kernel
def _score_by_calendar(
    state: State, e: int, r: int, counts: NDArray[np.int64], scores: NDArray[np.float64]
) -> None:
    """Score each length by how it fits the calendar now and how it would at a later stage."""
    calendar, weights, stages = state.calendar[e], state.weights[e], state.episodes[e].stages
    lengths, ranked = state.lengths[e], state.ranked[e]
    clock, end = np.int64(state.replicas[e, r].rounds), np.int64(calendar[stages])
    first = 0  # of the stages to come
    while first < stages and calendar[first] <= clock:
        first += 1
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
        score -= weights[PAD_WEIGHT] * _saturated(
            _pad(calendar[target], finish, weights[_LATE]), weights[_PAD_SCALE]
        )
        fit = state.fits[e, ranked[group]]
        if not fit.since <= first <= fit.stage:
            _find_fit(state, e, ranked[group], first)
        score += later * _saturated(fit.rounds, weights[_LATER_SCALE])
        score += weights[_COUNT] * counts[group]
        nearness = 1.0
        if finish < end:
            nearness = weights[_URGENT_SCALE] / (weights[_URGENT_SCALE] + (end - finish))
        scores[group] = score + urgent * nearness * nearness


@kernel
def _find_fit(state: State, e: int, rank: int, first: int) -> None:
    """Note at which of the stages from ``first`` on a length would idle least; of equals the last.

    It holds until that stage is reached, so that few are to be found anew at a stage.
    """
    calendar, stages, fit = state.calendar[e], state.episodes[e].stages, state.fits[e, rank]
    rounds, late = np.int64(state.lengths[e, rank]), state.weights[e, _LATE]
    fit.since, fit.stage, fit.rounds = first, stages, _FAR
    target = first
    for stage in range(first, stages):
        finish = calendar[stage] + rounds
        while target < stages and calendar[target] < finish:
            target += 1
        pad = _pad(calendar[target], finish, late)
        if pad <= fit.rounds:
            fit.stage, fit.rounds = stage, pad


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
            if together >= ALIGNED_TARGET_SIZE:
                target = due - clock
        if target < rounds:
            break
        score = weights[_LENGTH] * rounds
        score -= weights[PAD_WEIGHT] * _saturated(float(target - rounds), weights[_PAD_SCALE])
        scores[group] = score + weights[_COUNT] * counts[group]
        group += 1
    return group


@kernel
def _keep_best(
    scores: NDArray[np.float64], ranked: NDArray[np.int32], count: int, most: int
) -> int:
    """Bring the best ``most`` of the first entries to the front, in order; return how many there are.

    Of equal scores the higher rank goes first.
    """
    kept = 0
    for k in range(count):
        score, rank = scores[k], ranked[k]
        place = kept
        if kept == most:
            if scores[kept - 1] > score:
                continue
            place -= 1
        else:
            kept += 1
        # Ranks ascend, so that of equal scores the later entry goes first.
        while place > 0 and scores[place - 1] <= score:
            scores[place] = scores[place - 1]
            ranked[place] = ranked[place - 1]
            place -= 1
        scores[place] = score
        ranked[place] = rank
    return kept


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
    return longest_waiting(state, e, q)


@kernel
def _lower(tree: Tree, lengths: NDArray[np.int32], rank: int) -> int:
    """Return the next lower rank that waits and is of the same length, or NOBODY."""
    lower = rank - 1
    while lower >= 0 and lengths[lower] == lengths[rank]:
        if is_counted(tree, lower):
            return lower
        lower -= 1
    return NOBODY
