"""Order statistics of the waiting requests: a Fenwick tree over length ranks.

``tree`` has shape (2^k + 1,) with 2^k ≥ requests; entry 0 is unused. All operations are O(k).
Rank 0 is the shortest request.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.envs.simulator.jit import kernel

Tree = NDArray[np.int32]


@kernel
def add(tree: Tree, rank: int, amount: int) -> None:
    """Add ``amount`` (+1 or −1) to the count at ``rank``."""
    position = rank + 1
    while position < tree.size:
        tree[position] += amount
        position += position & -position


@kernel
def count_below(tree: Tree, rank: int) -> int:
    """Return how many counted entries have a rank < ``rank``."""
    total = 0
    position = rank
    while position > 0:
        total += tree[position]
        position -= position & -position
    return total


@kernel
def select(tree: Tree, k: int) -> int:
    """Return the rank of the ``k``-th counted entry from the bottom, ``k`` ≥ 0 and < the count."""
    position = 0
    step = (tree.size - 1) >> 1
    while step > 0:
        below = tree[position + step]
        taken = below <= k
        position += step if taken else 0
        k -= below if taken else 0
        step >>= 1
    return position
