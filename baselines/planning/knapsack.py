"""The most valuable requests that fit within some rounds: a bounded knapsack, compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel

# numpy's integers stand where int is written; numba converts, the checker does not.
# mypy: disable-error-code="arg-type,assignment,return-value"

Whole = NDArray[np.int64]


class Knapsack:
    """Fills a client of ``target`` rounds with the requests of the highest price, exactly."""

    def __init__(self, lengths: Whole, counts: Whole, target: int) -> None:
        self._lengths = lengths
        self._target = target
        # A row per 0/1 choice: several requests of a length are bundled by powers of two.
        most = np.minimum(counts, target // lengths)
        self._shape = (int(np.frexp(most)[1].sum()), target + 1)
        self._taken: NDArray[np.bool_] | None = None

    @property
    def entries(self) -> int:
        """Entries of the table that a filling needs."""
        return self._shape[0] * self._shape[1]

    def fill(self, prices: Whole, counts: Whole) -> Whole:
        """Return how many requests of each length to take, shape (lengths,); never above counts."""
        if self._taken is None:
            self._taken = np.zeros(self._shape, dtype=np.bool_)
        pattern = np.zeros(len(self._lengths), dtype=np.int64)
        _fill(self._lengths, prices, counts, self._target, self._taken, pattern)
        return pattern


@allocating_kernel
def _fill(
    lengths: Whole,
    prices: Whole,
    counts: Whole,
    target: int,
    taken: NDArray[np.bool_],
    pattern: Whole,
) -> None:
    """Choose row by row, best value for every room up to ``target``, then read it backwards."""
    kinds = np.zeros(taken.shape[0], dtype=np.int64)
    sizes = np.zeros(taken.shape[0], dtype=np.int64)
    value = np.zeros(target + 1, dtype=np.int64)
    rows = 0
    for kind in range(lengths.size):
        left = min(counts[kind], target // lengths[kind]) if prices[kind] > 0 else 0
        bundle = 1
        while left > 0:
            kinds[rows] = kind
            sizes[rows] = min(bundle, left)
            weight = sizes[rows] * lengths[kind]
            _improve(value, taken[rows], weight, sizes[rows] * prices[kind])
            left -= sizes[rows]
            bundle *= 2
            rows += 1
    room = target
    for row in range(rows - 1, -1, -1):
        if taken[row, room]:
            pattern[kinds[row]] += sizes[row]
            room -= sizes[row] * lengths[kinds[row]]


@allocating_kernel
def _improve(value: Whole, taken: NDArray[np.bool_], weight: int, gain: int) -> None:
    """Offer one bundle to every room; from the largest down, so that it is taken once."""
    taken[:weight] = False
    for room in range(value.size - 1, weight - 1, -1):
        offered = value[room - weight] + gain
        taken[room] = offered > value[room]
        if taken[room]:
            value[room] = offered
