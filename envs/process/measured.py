"""What the metrics of an episode are made of: one pass over its requests, and one over its events.

Compiled, as every episode of a vector environment ends here: numpy takes a pass for each expression. Sums
stay numpy's, which adds in an order of its own, so that no metric changes in its last bit.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import shared_kernel
from servegym.envs.simulator.slo import limits_of
from servegym.envs.simulator.state import REJECTED, SHED, State

COLUMNS: Final = 11
"""Rows of the scratch array of :func:`measure`, which holds one column of :class:`Columns` in each."""


class Counts(NamedTuple):
    """How many requests each column has, and what else is counted."""

    admitted: int
    emitting: int  # requests that have emitted a token
    done: int
    decoded: int  # finished requests with more than one token
    served: int  # that have arrived and were not turned away
    met: int  # finished within the limits of ``[slo]``
    gaps: int  # finished requests with a gap between tokens that is noted
    preempted: int  # finished requests that were preempted
    recomputed_tokens: int
    prefilled_tokens: int
    moves: int
    last_s: float  # when the last finished


class Columns(NamedTuple):
    """Numbers of requests in order of id, without those that have none. Times in seconds."""

    held_s: NDArray[np.float64]  # (admitted,) until now, or until it finished
    admitted_s: NDArray[np.float64]  # (admitted,)
    ttft_s: NDArray[np.float64]  # (emitting,)
    e2e_s: NDArray[np.float64]  # (done,)
    finished_s: NDArray[np.float64]  # (done,)
    tpot_s: NDArray[np.float64]  # (decoded,)
    arrived_s: NDArray[np.float64]  # (served,)
    rates: NDArray[np.float64]  # (served,) output tokens a second from arrival on; 0: not finished
    worst_gap_s: NDArray[np.float64]  # (gaps,)
    preempted_s: NDArray[np.float64]  # (preempted,) per output token from arrival on
    undisturbed_s: NDArray[np.float64]  # (done − preempted,) the same of the others


def columns_of(state: State, e: int) -> tuple[Counts, Columns]:
    """Return what is measured of the episode in environment ``e``."""
    scratch = np.empty((COLUMNS, int(np.asarray(state.episodes)["requests"][e])))
    *numbers, last_s = measure(state, e, scratch)
    counts = Counts._make([*map(int, numbers), float(last_s)])  # uncompiled they are numpy's
    admitted, emitting, done, decoded, served, _, gaps, preempted = counts[:8]
    sizes = (admitted, admitted, emitting, done, done, decoded, served, served, gaps)
    sizes += (preempted, done - preempted)
    return counts, Columns(*(scratch[k, :size] for k, size in enumerate(sizes)))


@shared_kernel
def measure(
    state: State, e: int, columns: NDArray[np.float64]
) -> tuple[int, int, int, int, int, int, int, int, int, int, int, float]:
    """Write the columns in the order of ``Columns``, (COLUMNS, requests); return ``Counts``."""
    episode = state.episodes[e]
    now_s, routed, keeps_gaps = episode.now_s, episode.routed, episode.keeps_gaps > 0
    admitted, emitting, done, decoded, served, met, gaps, preempted = 0, 0, 0, 0, 0, 0, 0, 0
    recomputed, prefilled, moves, last_s = 0, 0, 0, 0.0
    for i in range(episode.requests):
        request, times = state.requests[e, i], state.times[e, i]
        arrival_s, first_s, finished_s = times.arrival_s, times.first_token_s, times.finished_s
        finished = np.isfinite(finished_s)
        rounds = np.int64(request.decode_rounds)
        if np.isfinite(times.admitted_s):
            columns[0, admitted] = (finished_s if finished else now_s) - times.admitted_s
            columns[1, admitted] = times.admitted_s
            admitted += 1
        if np.isfinite(first_s):
            columns[2, emitting] = first_s - arrival_s
            emitting += 1
        rate = 0.0
        if finished:
            e2e_s, tpot_s = finished_s - arrival_s, 0.0
            columns[3, done] = e2e_s
            columns[4, done] = finished_s
            done += 1
            last_s = max(last_s, finished_s)
            if rounds > 0:
                tpot_s = (finished_s - first_s) / rounds
                columns[5, decoded] = tpot_s
                decoded += 1
                if keeps_gaps and np.isfinite(state.carried[e, i].worst_gap_s):
                    columns[8, gaps] = state.carried[e, i].worst_gap_s
                    gaps += 1
            rate = (rounds + 1) / e2e_s if e2e_s > 0.0 else np.inf
            ttft_limit_s, tpot_limit_s = limits_of(state, e, i)
            met += int(first_s - arrival_s <= ttft_limit_s and tpot_s <= tpot_limit_s)
            token_s = e2e_s / (rounds + 1)
            if request.preemptions > 0:
                columns[9, preempted] = token_s
                preempted += 1
            else:
                columns[10, done - 1 - preempted] = token_s
        if i < routed and request.phase != REJECTED and request.phase != SHED:
            columns[6, served] = arrival_s
            columns[7, served] = rate
            served += 1
        prefilled += request.prefilled_tokens
        recomputed += max(np.int64(request.prefilled_tokens) - request.prompt_tokens, 0)
        moves += request.moves
    return (
        admitted,
        emitting,
        done,
        decoded,
        served,
        met,
        gaps,
        preempted,
        recomputed,
        prefilled,
        moves,
        last_s,
    )


@shared_kernel
def weigh_queue(
    admitted_s: NDArray[np.float64],
    left_s: NDArray[np.float64],
    arrived_s: NDArray[np.float64],
    clients: int,
    until_s: float,
    wasted: NDArray[np.float64],
    lasts_s: NDArray[np.float64],
) -> int:
    """Go through all events of the requests; return the most that waited for their first admission at once.

    Parameters
    ----------
    admitted_s, left_s, arrived_s
        When clients first take requests, when they leave these, when they come: ascending, each on its own;
        not all of those that come need be admitted, or leave. Of what happens at one instant arrivals come
        last, so that whoever is admitted when it comes does not wait.
    clients
        Of all replicas.
    until_s
        When the last event's interval ends, if that is later.
    wasted, lasts_s
        (events,) Written: idle clients for which requests waited, and for how long, from each event on.
    """
    waiting, held, peak = 0, 0, 0
    taken, left, come = 0, 0, 0
    before_s = 0.0
    for k in range(wasted.size):
        take_s = admitted_s[taken] if taken < admitted_s.size else np.inf
        leave_s = left_s[left] if left < left_s.size else np.inf
        come_s = arrived_s[come] if come < arrived_s.size else np.inf
        if take_s <= leave_s and take_s <= come_s:
            time_s = take_s
            taken += 1
            waiting -= 1
            held += 1
        elif leave_s <= come_s:
            time_s = leave_s
            left += 1
            held -= 1
        else:
            time_s = come_s
            come += 1
            waiting += 1
        peak = max(peak, waiting)
        wasted[k] = min(clients - held, waiting)
        if k > 0:
            lasts_s[k - 1] = time_s - before_s
        before_s = time_s
    if wasted.size > 0:
        lasts_s[wasted.size - 1] = max(until_s, before_s) - before_s
    return peak
