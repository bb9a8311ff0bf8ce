"""A proven lower bound on the span of any plan for clients that differ in speed or memory.

A span is ruled out if, for some n and some memory, the n longest of the requests that need more than
that memory cannot all lie at the clients that have more:

* *area*: the clients that have room for the shortest of the n, the shortest alone, have too few rounds
  within the span for the sum of the n;
* *number*: no client holds more of the n than their shortest ones fit into its rounds, and over all
  clients that is fewer than n.

Both grow with the span, so bisection finds the least span that is not ruled out. For clients that are alike
this is ``rounds_lower_bound``. All sums are whole numbers, so the proof is exact.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.servers import Servers, most_rounds
from servegym.envs.bounds.rounds import rounds_lower_bound

Whole = NDArray[np.int64]

_MAX_PLACES: Final = 200_000
"""Kinds of clients × values of n looked at; of more, as many are taken evenly."""


def span_lower_bound(rounds: Whole, servers: Servers) -> float:
    """Bound the span of every plan from below.

    Parameters
    ----------
    rounds
        Decode rounds of each request, shape (requests,), ≥ 0. Some client can hold each.
    servers
        The clients, and what the requests need of them.
    """
    if servers.are_alike:
        return rounds_lower_bound(rounds, servers.clients)
    round_s, holds, count, _ = servers.kinds
    total = int(rounds.sum())
    if total == 0:
        return 0
    sets = _sets(rounds, servers.needs, holds)
    low = total / float((count / round_s).sum()) * 0.5
    high = total * float(round_s[holds == holds.max()].min())  # one client serves all
    while _may_fit(low, sets, round_s, holds, count):
        low *= 0.5  # rounding alone; a half is safely below
    while low < (middle := low + (high - low) / 2) < high:
        if _may_fit(middle, sets, round_s, holds, count):
            high = middle
        else:
            low = middle
    return int(high) if servers.equally_fast else high


_Set = tuple[int, Whole, Whole, Whole]  # memory that is too small, values of n, their lengths, sums


def _sets(rounds: Whole, needs: Whole, holds: Whole) -> list[_Set]:
    """Return the requests that need more than each memory, and than none."""
    sets = []
    for memory in (-1, *np.unique(holds)[:-1].tolist()):
        lengths = np.sort(rounds[(needs > memory) & (rounds > 0)])[::-1]
        if len(lengths) == 0:
            continue
        most = max(1, _MAX_PLACES // len(holds))
        places = np.unique(np.linspace(1, len(lengths), min(most, len(lengths))).astype(np.int64))
        sums = np.concatenate(([0], np.cumsum(lengths)))
        sets.append((memory, places, lengths[places - 1], sums))
    return sets


def _may_fit(
    span: float, sets: list[_Set], round_s: NDArray[np.float64], holds: Whole, count: Whole
) -> bool:
    """Whether no set of requests rules the span out."""
    limits = most_rounds(round_s, span)
    for memory, places, shortest, sums in sets:
        wanted = sums[places]
        room, number = np.zeros_like(wanted), np.zeros_like(wanted)
        for limit, clients in zip(limits[holds > memory], count[holds > memory], strict=True):
            most = min(int(limit), int(sums[-1]))
            enough = int(sums[-1])  # as much as all that is wanted: larger products may overflow
            together = enough if most > enough // int(clients) else most * int(clients)
            room += np.where(most >= shortest, together, 0)
            # The k shortest of the n longest sum to sums[n] − sums[n − k].
            fewest_left = np.searchsorted(sums, wanted - most)
            number += int(clients) * (places - fewest_left)
        if (room < wanted).any() or (number < places).any():
            return False
    return True
