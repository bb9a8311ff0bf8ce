"""Order statistics of waiting requests: one bit per length rank, under a tree of counts.

A word holds 32 ranks; each entry of the tree counts eight words or eight entries below. ``tree`` has shape
(``tree_size(requests)``,): the top level of eight entries comes first, the words come last, then a spare.
All operations are O(log requests) and touch few cache lines: a tree over 1319 requests is 0.6 kB. Rank 0
is the shortest request.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import count_bits, highest_bit, kernel, lowest_bit

Tree = NDArray[np.int64]

_BITS: Final = 32  # so few that signed 64-bit arithmetic never reaches the sign


def tree_size(ranks: int) -> int:
    """Return the entries of a tree over ``ranks`` ≥ 1 ranks."""
    level = size = 8
    while level * _BITS < ranks:
        level *= 8
        size += level
    return size + 1


@kernel
def _words(tree: Tree) -> int:
    """Return where the words begin: behind 8 + 64 + … entries."""
    return tree.size // 8 - 1


@kernel
def add(tree: Tree, rank: int, amount: int) -> None:
    """Count ``rank``, not counted yet (``amount`` +1), or uncount it (−1)."""
    level, place = _words(tree), rank // _BITS
    tree[level + place] ^= np.int64(1) << rank % _BITS
    while level > 0:
        level = level // 8 - 1
        place //= 8
        tree[level + place] += amount


@kernel
def count_below(tree: Tree, rank: int) -> int:
    """Return how many counted entries have a rank < ``rank``."""
    level, place = _words(tree), rank // _BITS
    total = count_bits(tree[level + place] & ((np.int64(1) << rank % _BITS) - 1))
    for k in range(level + place // 8 * 8, level + place):
        total += count_bits(tree[k])
    while level > 0:
        level = level // 8 - 1
        place //= 8
        for k in range(level + place // 8 * 8, level + place):
            total += tree[k]
    return total


@kernel
def lowest(tree: Tree) -> int:
    """Return the lowest counted rank; one must be counted."""
    words = _words(tree)
    level, place = 0, 0
    while level < words:
        while tree[level + place] == 0:
            place += 1
        level = level * 8 + 8
        place *= 8
    while tree[words + place] == 0:
        place += 1
    return place * _BITS + lowest_bit(tree[words + place])


@kernel
def highest(tree: Tree) -> int:
    """Return the highest counted rank; one must be counted."""
    words = _words(tree)
    level, place = 0, 7
    while level < words:
        while tree[level + place] == 0:
            place -= 1
        level = level * 8 + 8
        place = place * 8 + 7
    while tree[words + place] == 0:
        place -= 1
    return place * _BITS + highest_bit(tree[words + place])


@kernel
def select(tree: Tree, k: int) -> int:
    """Return the rank of the ``k``-th counted entry from the bottom, ``k`` ≥ 0 and < the count."""
    words = _words(tree)
    level, place = 0, 0
    while level < words:
        while tree[level + place] <= k:
            k -= tree[level + place]
            place += 1
        level = level * 8 + 8
        place *= 8
    below = count_bits(tree[words + place])
    while below <= k:
        k -= below
        place += 1
        below = count_bits(tree[words + place])
    word, bit = tree[words + place], 0
    width = _BITS // 2
    while width > 0:
        below = count_bits(word & ((1 << width) - 1))
        if below <= k:
            k -= below
            word >>= width
            bit += width
        width //= 2
    return place * _BITS + bit


@kernel
def is_counted(tree: Tree, rank: int) -> bool:
    """Return whether ``rank`` is counted."""
    return (tree[_words(tree) + rank // _BITS] >> rank % _BITS) & 1 == 1


@kernel
def next_counted(tree: Tree, rank: int) -> int:
    """Return the first counted rank that is ``rank`` or higher, or −1."""
    words, place = _words(tree), rank // _BITS
    last = tree.size - 1 - words  # the spare is no word
    if place >= last:
        return -1
    word = tree[words + place] >> rank % _BITS << rank % _BITS
    while word == 0:
        place += 1
        if place == last:
            return -1
        word = tree[words + place]
    return place * _BITS + count_bits((word & -word) - 1)
