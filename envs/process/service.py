"""What users of a service feel and what is lost on the way: figures over the requests of an episode.

All are pure functions of arrays, a number a request. They tell what ``[slo]`` asks for, fairness, queues,
clients that idle while requests wait, and what preemption does to those who are preempted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
NAN = float("nan")


def has_met(
    ttft_s: Seconds,
    decode_s: Seconds,
    decode_rounds: NDArray[np.integer],
    limits: tuple[float | Seconds, float | Seconds],
) -> NDArray[np.bool_]:
    """Return who has finished within both limits of ``[slo]``: seconds to the first token, per token after.

    Parameters
    ----------
    ttft_s, decode_s
        Seconds from arrival to first token, and from there to the last; NaN where it has not come.
    decode_rounds
        Tokens after the first; without any there is no time per token, and that limit is met.
    limits
        Most seconds of each, of all or of each request; inf: any.
    """
    per_token_s = np.zeros(len(decode_s))
    np.divide(decode_s, decode_rounds, out=per_token_s, where=decode_rounds > 0)
    return (ttft_s <= limits[0]) & (per_token_s <= limits[1]) & np.isfinite(decode_s)


def jain_index(rates: Seconds) -> float:
    """Return (Σx)² / (n · Σx²): 1 where all get the same, 1/n where one gets all; NaN of nothing.

    R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness and discrimination", DEC-TR-301, 1984.
    """
    squares = float(rates @ rates)
    return float(rates.sum()) ** 2 / (len(rates) * squares) if squares > 0 else NAN


def waiting_and_held(
    arrived_s: Seconds, admitted_s: Seconds, left_s: Seconds
) -> tuple[Seconds, NDArray[np.int64], NDArray[np.int64]]:
    """Return the times at which something changes, and how many wait and are held from each of them on.

    Parameters
    ----------
    arrived_s, admitted_s, left_s
        When requests come, when clients first take them, when they leave these: ascending, each on its
        own; not all of those that come need be admitted, or leave. Of what happens at one instant arrivals
        come last, so that whoever is admitted when it comes does not wait.
    """
    parts = admitted_s, left_s, arrived_s
    times, sizes = np.concatenate(parts), [len(part) for part in parts]
    order = np.argsort(times, kind="stable")  # three runs to merge
    waiting = np.repeat((-1, 0, 1), sizes)[order].cumsum()
    held = np.repeat((1, -1, 0), sizes)[order].cumsum()
    return times[order], waiting, held


def peak_queue(waiting: NDArray[np.int64]) -> float:
    """Return the most requests that waited for their first admission at once."""
    return float(waiting.max(initial=0))


def idle_while_waiting_s(
    times: Seconds,
    waiting: NDArray[np.int64],
    held: NDArray[np.int64],
    clients: int,
    until_s: float,
) -> float:
    """Return the client-seconds that were idle although a request waited: ∫ min(idle, waiting) dt."""
    wasted = np.minimum(clients - held, waiting)
    lasts_s = np.diff(times, append=max(until_s, times[-1]) if len(times) else until_s)
    return float(wasted @ lasts_s)


def preempted_slowdown(token_s: Seconds, preempted: NDArray[np.bool_]) -> float:
    """Return mean seconds per output token, from arrival on, of the preempted, over those of the others.

    NaN where nobody was preempted or everybody was.
    """
    if not preempted.any() or preempted.all():
        return NAN
    return float(token_s[preempted].mean() / token_s[~preempted].mean())
