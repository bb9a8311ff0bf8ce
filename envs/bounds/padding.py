"""A stronger lower bound on the makespan: the fewer prefill stages, the longer clients idle.

``batch.py`` bounds decoding and prefilling separately. But a client that has finished idles until
the next stage, and the fewer stages there are, the fewer lengths fit between two of them.

**Padding.** Let a schedule run S prefill stages at the values t_1 ≤ … ≤ t_S of the decode clock, and
let it end at C. Nothing is decoded before the first stage, so t_1 = 0. A client that takes request i at
stage a holds it for d_i rounds and then idles until a later stage b gives it another one, or to the end:
together t_b − t_a or C − t_a. So each d_i is padded to one of the differences of the S + 1 points
t_1 … t_S, C, at most M = S(S + 1)/2 of them. These times of one client are disjoint and lie in
0 … C, hence

    J·C ≥ D + pad(M),   pad(m) = min over sets of m whole numbers of Σ_i (the least one ≥ d_i) − d_i.

Requests without rounds hold no client for a round and are left out.

**Far points.** Let L be the longest d_i. Differences of L and more pad no better than L itself, so
they count as one. If C ≥ 2L, each of t_2 … t_S lies at least L after t_1 or at least L before C, and so
do t_1 and C themselves: S of the M pairs are far, and S(S − 1)/2 + 1 differences remain.

**The bound.** With R rounds by ``batch.py``, a schedule of S stages takes at least (decoding with
⌈(D + pad(M))/J⌉ rounds or R, if that is more) + (prefilling with S stages). The least over S ≥ the
fewest stages possible holds for every schedule. Prefilling does not fall with S, so the search over S
ends where R rounds and S stages reach the best sum.

**pad(m)** is a clustering of sorted numbers, each cluster padded to its largest. Its cost satisfies the
Monge condition, so pad is convex in m (Aggarwal, Schieber, Tokuyama 1994, "Finding a minimum-weight
k-link path in graphs with the concave Monge property"), and pad(m) = max over whole λ ≥ 0 of
F(λ) − λm, where F(λ) is the least cost with λ more for each cluster. Every λ proves a bound by itself (weak
duality), and all of it is in whole numbers. F(λ) takes linear time: the last cluster's start is the
lowest of some lines, whose slopes and arguments are both in order.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.bounds.batch import (
    LowerBound,
    decode_bound,
    least_stages,
    lower_bound,
    prefill_bound,
)
from servegym.envs.bounds.totals import totals_of
from servegym.envs.jit import allocating_kernel, kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.workload.requests import Requests

# numpy's integers stand where int is written; numba converts, the checker does not.
# mypy: disable-error-code="arg-type,assignment,return-value"

Whole = NDArray[np.int64]

_HALF: Final = 24  # bits
_LOW_BITS: Final = (1 << _HALF) - 1


def joint_bound(
    requests: Requests, clients: int, costs: CostTables, max_prefill_tokens: int = 0
) -> LowerBound:
    """Return a bound that is never below ``lower_bound``; see the module docstring for the proof.

    Parameters
    ----------
    requests
        If any arrives after t = 0, the result is that of ``lower_bound``.
    clients, costs, max_prefill_tokens
        One replica: its clients, its cost tables, the token budget of a stage (0: none).

    Returns
    -------
    LowerBound
        Its stages are the S with the least bound, its rounds those for this S.
    """
    ordinary = lower_bound(requests, clients, costs, max_prefill_tokens)
    if np.any(requests.arrival_s > 0):
        return ordinary
    prompts, rounds = requests.prompt_tokens, requests.decode_rounds
    lengths, counts = np.unique(rounds[rounds > 0], return_counts=True)
    if len(lengths) == 0:
        return ordinary
    totals = totals_of(prompts, rounds, max_prefill_tokens)
    total, far = totals.rounds, ordinary.decode_rounds >= 2 * int(lengths[-1])
    best: LowerBound | None = None
    stages = least_stages(totals, clients, max_prefill_tokens)
    while True:
        prefill_s = prefill_bound(totals, stages, costs)
        if best is not None and ordinary.decode_s + prefill_s >= best.seconds:
            return best
        differences = stages * (stages - 1) // 2 + 1 if far else stages * (stages + 1) // 2
        padded = total + least_padding(lengths, counts, differences)
        least_rounds = max(ordinary.decode_rounds, -(-padded // clients))
        decode_s = decode_bound(totals, least_rounds, costs, alone=True)
        seconds = decode_s + prefill_s
        if best is None or seconds < best.seconds:
            best = LowerBound(seconds, 0.0, decode_s, prefill_s, least_rounds, stages)
        if least_rounds == ordinary.decode_rounds:
            return best  # more stages only add to prefilling
        stages += 1


def least_padding(lengths: Whole, counts: Whole, differences: int) -> int:
    """Return pad(``differences``): the fewest client-rounds added by padding to so many lengths.

    Parameters
    ----------
    lengths
        Distinct decode rounds, strictly ascending, ≥ 1, shape (lengths,).
    counts
        Requests of each, ≥ 1, shape (lengths,).
    differences
        Number of lengths to pad to, ≥ 1.
    """
    if differences >= len(lengths):
        return 0
    return int(_padding(lengths.astype(np.int64), counts.astype(np.int64), differences))


@allocating_kernel
def _padding(lengths: Whole, counts: Whole, clusters: int) -> int:
    """Maximise F(λ) − λ·clusters, a concave function of λ, by bisecting the clusters it uses."""
    # pad is convex, so the last cluster saves at most the mean saving: no higher price is the best, and
    # price · clusters stays within 64 bits.
    low = np.int64(0)
    high = counts.sum() * lengths[-1] // clusters + 1
    best = np.int64(0)
    while low <= high:
        price = (low + high) // 2
        cost, used = _cluster(lengths, counts, price)
        best = max(best, cost - price * clusters)
        if used > clusters:
            low = price + 1
        else:
            high = price - 1
    return best


@allocating_kernel
def _cluster(lengths: Whole, counts: Whole, price: int) -> tuple[int, int]:
    """Return F(``price``) and the clusters it uses, the fewest at equal cost.

    The first j lengths cost f(j) = min over i < j of f(i) + (N_j − N_i)·length_j − (W_j − W_i) +
    price, with N and W the requests and their rounds up to there: for each i a line in length_j.
    """
    n = lengths.size
    heights, slopes = np.empty(n + 1, np.int64), np.empty(n + 1, np.int64)  # of the lower lines
    links = np.empty(n + 1, np.int64)  # clusters behind each line
    heights[0], slopes[0], links[0] = 0, 0, 0
    first, after = 0, 1
    requests, rounds = np.int64(0), np.int64(0)
    cost, used = np.int64(0), np.int64(0)
    for j in range(n):
        x = lengths[j]
        requests += counts[j]
        rounds += counts[j] * x
        while first + 1 < after:
            value = heights[first] - slopes[first] * x
            following = heights[first + 1] - slopes[first + 1] * x
            if following > value or (following == value and links[first + 1] >= links[first]):
                break
            first += 1
        cost = heights[first] - slopes[first] * x + requests * x - rounds + price
        used = links[first] + 1
        height = cost + rounds
        while first + 1 < after:
            # Drop the last line if the new one passes below where it crosses the one before it.
            if _less(
                heights[after - 1] - heights[after - 2],
                requests - slopes[after - 1],
                height - heights[after - 1],
                slopes[after - 1] - slopes[after - 2],
            ):
                break
            after -= 1
        heights[after], slopes[after], links[after] = height, requests, used
        after += 1
    return cost, used


@kernel
def _less(a: int, b: int, c: int, d: int) -> bool:
    """Return whether a·b < c·d, whole numbers ≥ 0 below 2⁵⁰, 2²⁴, 2⁵⁰ and 2²⁴.

    The products may exceed 64 bits, so a and c are split in halves.
    """
    high = (a >> _HALF) * b - (c >> _HALF) * d
    low = (a & _LOW_BITS) * b - (c & _LOW_BITS) * d
    return high + (low >> _HALF) < 0  # the rest of low is ≥ 0 and below one unit of high
