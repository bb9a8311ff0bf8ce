"""Dealing work to the least loaded client: a binary heap of clients, compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.envs.simulator.jit import kernel


@kernel
def sift_down(heap: NDArray[np.int64], load: NDArray[np.int64]) -> None:
    """Restore the heap after the load of its top has grown.

    ``heap`` (clients,) holds clients, the least loaded on top, of equal loads the lowest; ``load``
    (clients,) is indexed by client.
    """
    client = heap[0]
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= heap.size:
            break
        if child + 1 < heap.size and _lighter(heap[child + 1], heap[child], load):
            child += 1
        if not _lighter(heap[child], client, load):
            break
        heap[hole] = heap[child]
        hole = child
    heap[hole] = client


@kernel
def _lighter(one: int, other: int, load: NDArray[np.int64]) -> bool:
    return load[one] < load[other] or (load[one] == load[other] and one < other)
