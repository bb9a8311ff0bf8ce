"""Forget requests that have finished, so that others take their places: an engine outlasts any episode.

What is counted over all requests (how many have arrived and finished, the rounds of these) is from then on
counted over those that are left. One replica without a limit of memory. It is no kernel: it is called once in
thousands of requests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.envs.simulator.serving import count_ranks
from servegym.envs.simulator.slo import count_met
from servegym.envs.simulator.state import FINISHED, NOBODY, PREFILL, WAITING, State


def forget(state: State, e: int, gone: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Take finished requests out of row ``e``; the ids of the others move up, in their order.

    Parameters
    ----------
    state, e
        The row.
    gone
        (requests,) Who is to be forgotten; all of them have finished.

    Returns
    -------
    ids
        (requests,) The new id of each; ``NOBODY`` of those who have been forgotten.
    """
    known = int(state.episodes["requests"][e])
    ids = np.where(gone, NOBODY, np.cumsum(~gone) - 1)
    _count_out(state, e, np.flatnonzero(gone))
    _relink_order(state, e, ids)
    _relink_plans(state, e, ids)

    left = int(known - gone.sum())
    by_id = (
        state.requests,
        state.times,
        state.before,
        state.plan_before,
        state.carried,
        state.beliefs,
        state.priority,
        state.limits,
    )
    for array in by_id:
        if array.shape[1] > 0:
            array[e, :left] = array[e, :known][~gone]
    by_length = state.by_length[e, :known].copy()
    stays = ~gone[by_length]
    state.by_length[e, :left] = ids[by_length[stays]]
    state.lengths[e, :left] = state.lengths[e, :known][stays]
    state.by_length[e, left:known] = 0
    state.lengths[e, left:known] = 0
    state.requests["rank"][e, state.by_length[e, :left]] = np.arange(left)
    count_ranks(state, e)

    replica = state.replicas[e, 0]
    same = state.expected is state.finishes
    for finishes in [state.finishes] if same else [state.finishes, state.expected]:
        running = finishes["request"][e, 0, : replica["active"]]
        running[:] = ids[running]
    if replica["stage"] == PREFILL:
        picked = state.picked[e, 0, : replica["emitting"]]
        picked[:] = ids[picked]
    return ids


def has_finished(state: State, e: int) -> NDArray[np.bool_]:
    """Return who may be forgotten."""
    known = int(state.episodes["requests"][e])
    finished: NDArray[np.bool_] = state.requests["phase"][e, :known] == FINISHED
    return finished


def _count_out(state: State, e: int, gone: NDArray[np.int64]) -> None:
    """Count over those that are left."""
    episode, requests = state.episodes[e], state.requests[e]
    if episode["counts_slo"]:
        before = int(episode["met"])
        for i in gone:
            if requests["decode_rounds"][i] >= 0:
                count_met(state, e, i)
        episode["met"] = before - (int(episode["met"]) - before)
    episode["requests"] -= len(gone)
    episode["routed"] -= len(gone)
    episode["arrived"] -= len(gone)
    episode["finished"] -= len(gone)
    episode["arrived_rounds"] -= requests["expected_rounds"][gone].sum(dtype=np.int64)
    served = np.maximum(requests["decode_rounds"][gone], 0)  # −1: it never ran
    episode["served_rounds"] -= served.sum(dtype=np.int64)


def _relink_order(state: State, e: int, ids: NDArray[np.int64]) -> None:
    """Leave those in the order of service who wait, under their new ids."""
    queue, requests = state.queues[e, 0], state.requests[e]
    listed = _members(int(queue["first"]), requests["next"])
    waiting = [i for i in listed if requests["phase"][i] == WAITING]
    requests["listed"][listed] = 0
    requests["listed"][waiting] = 1
    queue["first"], queue["last"] = _linked(waiting, requests["next"], ids)
    state.before[e, waiting[1:]] = ids[waiting[:-1]]
    if queue["first_unseen"] != NOBODY:
        queue["first_unseen"] = ids[queue["first_unseen"]]


def _relink_plans(state: State, e: int, ids: NDArray[np.int64]) -> None:
    """Do so with the clients' planned queues."""
    requests = state.requests[e]
    for client in state.clients[e, 0]:
        planned = _members(int(client["queue_head"]), requests["plan_next"])
        due = [i for i in planned if requests["phase"][i] <= WAITING]
        requests["planned"][planned] = 0
        requests["planned"][due] = 1
        client["queue_head"], client["queue_tail"] = _linked(due, requests["plan_next"], ids)
        state.plan_before[e, due[1:]] = ids[due[:-1]]


def _members(first: int, following: NDArray[np.int32]) -> list[int]:
    """Return the members of a linked list in their order."""
    members, i = [], first
    while i != NOBODY:
        members.append(i)
        i = int(following[i])
    return members


def _linked(
    members: list[int], following: NDArray[np.int32], ids: NDArray[np.int64]
) -> tuple[int, int]:
    """Link members anew by their new ids; return the first and the last of these."""
    named = [int(ids[i]) for i in members]
    following[members] = [*named[1:], NOBODY] if members else []
    return (named[0], named[-1]) if named else (NOBODY, NOBODY)
