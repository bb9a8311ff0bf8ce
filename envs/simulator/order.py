"""Order statistics of waiting requests: one bit per length rank, and a Fenwick tree over words of bits.

A word holds 32 ranks. ``tree`` has shape (``tree_size(requests)``,): entry 0 is unused, 1 … W are the
Fenwick tree of the words' counts (W a power of two), then come the words and a spare. All operations
are O(log W) and touch few cache lines: a tree over 1319 requests is 1 kB. Rank 0 is the shortest
request.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import kernel

Tree = NDArray[np.int64]

_BITS: Final = 32  # so few that signed 64-bit arithmetic never reaches the sign


def tree_size(ranks: int) -> int:
    """Return the entries of a tree over ``ranks`` ≥ 1 ranks."""
    words = -(-ranks // _BITS)
    return 2 * (1 << (words - 1).bit_length()) + 2


@kernel
def add(tree: Tree, rank: int, amount: int) -> None:
    """Count ``rank``, not counted yet (``amount`` +1), or uncount it (−1)."""
    words = tree.size // 2 - 1
    position = rank // _BITS + 1
    tree[words + position] ^= 1 << (rank % _BITS)
    while position <= words:
        tree[position] += amount
        position += position & -position


@kernel
def count_below(tree: Tree, rank: int) -> int:
    """Return how many counted entries have a rank < ``rank``."""
    words = tree.size // 2 - 1
    position = rank // _BITS
    total = _count_bits(tree[words + 1 + position] & ((1 << (rank % _BITS)) - 1))
    while position > 0:
        total += tree[position]
        position -= position & -position
    return total


@kernel
def select(tree: Tree, k: int) -> int:
    """Return the rank of the ``k``-th counted entry from the bottom, ``k`` ≥ 0 and < the count."""
    words = tree.size // 2 - 1
    position = 0
    step = words >> 1
    while step > 0:
        below = tree[position + step]
        if below <= k:
            position += step
            k -= below
        step >>= 1
    word = tree[words + 1 + position]
    for _ in range(k):
        word &= word - 1  # clear the lowest set bit
    return position * _BITS + _count_bits((word & -word) - 1)


@kernel
def _count_bits(word: int) -> int:
    """Return how many of the low 32 bits are set; no other bit is."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8
    return (word + (word >> 16)) & 0x3F
