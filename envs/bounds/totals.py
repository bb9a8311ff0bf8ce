"""Sums over requests that lower bounds are made of, for all release times in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import shared_kernel

Whole = NDArray[np.int64]
Real = NDArray[np.float64]

_EXACT: Final = 2.0**53
"""Sums of whole numbers below this are the same in floats in any order."""


class Totals(NamedTuple):
    """Sums over some requests.

    Examples
    --------
    >>> totals_of(np.array([5, 3]), np.array([2, 0]))
    Totals(requests=2, prompts=8, squares=34.0, shortest=3, counted=0, rounds=2, held=13.0, longest=7)
    """

    requests: int
    prompts: int  # prompt tokens
    squares: float  # of prompt tokens
    shortest: int  # prompt, in tokens
    counted: int  # prompt tokens, each prompt at most as long as a stage's budget; 0 without one
    rounds: int  # decode rounds
    held: float  # tokens in the cache at the start of a round, over all rounds
    longest: int  # most tokens that a request holds in the cache at the start of a round


def totals_of(prompts: Whole, rounds: Whole, max_prefill_tokens: int = 0) -> Totals:
    """Return the totals of requests by prompt tokens and decode rounds, both (requests,), at least one."""
    return totals_from(prompts, rounds, [0], max_prefill_tokens)[0]


def totals_from(
    prompts: Whole, rounds: Whole, firsts: Sequence[int] | Whole, max_prefill_tokens: int = 0
) -> list[Totals]:
    """Return the totals of the requests from each of the places ``firsts`` on, which ascend."""
    places = np.asarray(firsts, np.int64)
    whole, real = np.empty((len(places), 5), np.int64), np.empty((len(places), 2))
    prompts, rounds = np.ascontiguousarray(prompts), np.ascontiguousarray(rounds)
    _sum_from(prompts, rounds, places, max_prefill_tokens, whole, real)
    if not real[0].max() < _EXACT:  # pairwise sums lose less
        for place, sums in zip(places, real, strict=True):
            sums[0] = (prompts[place:].astype(float) ** 2).sum()
            sums[1] = tokens_held(prompts[place:], rounds[place:]).sum()
    return [
        Totals(len(prompts) - first, tokens, squares, shortest, counted, many, held, longest)
        for first, (tokens, shortest, counted, many, longest), (squares, held) in zip(
            places.tolist(), whole.tolist(), real.tolist(), strict=True
        )
    ]


def tokens_held(prompts: Whole, rounds: Whole) -> Real:
    """Return each request's tokens in the cache at the start of a round, summed over its rounds."""
    d = rounds.astype(float)  # the sum may be beyond 64 bits
    return d * prompts + d * (d + 1.0) / 2.0


@shared_kernel
def _sum_from(
    prompts: Whole, rounds: Whole, firsts: Whole, budget: int, whole: Whole, real: Real
) -> None:
    """Write the sums from each place on, the last place first."""
    tokens: Any = 0
    counted: Any = 0
    many: Any = 0
    longest: Any = 0
    shortest: Any = np.int64(prompts[prompts.size - 1])
    squares, held = 0.0, 0.0
    after = prompts.size
    for k in range(firsts.size - 1, -1, -1):
        for i in range(firsts[k], after):
            p, d = np.int64(prompts[i]), np.int64(rounds[i])
            tokens += p
            shortest = min(shortest, p)
            longest = max(longest, p + d)
            if budget > 0:
                counted += min(p, budget)
            many += d
            squares += float(p) * float(p)
            held += float(d) * float(p) + float(d) * (float(d) + 1.0) / 2.0
        after = firsts[k]
        whole[k, 0] = tokens
        whole[k, 1] = shortest
        whole[k, 2] = counted
        whole[k, 3] = many
        whole[k, 4] = longest
        real[k, 0] = squares
        real[k, 1] = held
