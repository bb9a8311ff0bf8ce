"""True or expected finishes of running requests: arrays of FINISH, latest first, ties by higher id.

Every operation takes one pass over the array, however many requests it inserts or removes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel, kernel

Finishes = Any
"""An array of FINISH records, as ``State.finishes[e, r]``."""


@kernel
def merge(finishes: Finishes, running: int, now: int, keys: NDArray[np.int64], span: int) -> None:
    """Insert requests into the first ``running`` finishes, which are sorted.

    ``keys`` holds (due − ``now``) · ``span`` + id of each request and is sorted in place. The array must
    have room.
    """
    sort_keys(keys)
    # From the back, soonest first: finishes after all the new ones stay in place.
    old = running - 1
    place = old + keys.size
    for k in range(keys.size):
        i = keys[k] % span
        due = now + keys[k] // span
        while old >= 0 and not _later(finishes, old, due, i):
            finishes[place].due = finishes[old].due
            finishes[place].request = finishes[old].request
            place -= 1
            old -= 1
        finishes[place].due = due
        finishes[place].request = i
        place -= 1


@kernel
def insert(finishes: Finishes, running: int, due: int, i: int) -> None:
    """Insert one request into the first ``running`` finishes: ``merge`` without its divisions."""
    place = running
    while place > 0 and not _later(finishes, place - 1, due, i):
        finishes[place].due = finishes[place - 1].due
        finishes[place].request = finishes[place - 1].request
        place -= 1
    finishes[place].due = due
    finishes[place].request = i


@kernel
def _later(finishes: Finishes, place: int, due: int, i: int) -> bool:
    """Return whether the finish at ``place`` comes after request ``i`` that is due at ``due``."""
    finish = finishes[place]
    return finish.due > due or (finish.due == due and finish.request > i)


@kernel
def find(finishes: Finishes, running: int, due: int, i: int) -> int:
    """Return the place of request ``i``, due at ``due``, among the first ``running`` finishes."""
    low, high = 0, running - 1
    while low < high:
        middle = (low + high) // 2
        if _later(finishes, middle, due, i):
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def remove(finishes: Finishes, running: int, places: NDArray[np.int64]) -> None:
    """Remove the finishes at ``places`` (≥ 1) from the first ``running``; sorts ``places``."""
    sort_keys(places)
    kept = places[0]
    removed = 0
    for place in range(places[0], running):
        if removed < places.size and places[removed] == place:
            removed += 1
            continue
        finishes[kept].due = finishes[place].due
        finishes[kept].request = finishes[place].request
        kept += 1


@kernel
def remove_one(finishes: Finishes, running: int, place: int) -> None:
    """Remove the finish at ``place`` from the first ``running``."""
    for k in range(place, running - 1):
        finishes[k].due = finishes[k + 1].due
        finishes[k].request = finishes[k + 1].request


@allocating_kernel
def _sort_many(keys: NDArray[np.int64]) -> None:
    keys.sort()


@kernel
def sort_keys(keys: NDArray[np.int64]) -> None:
    """Sort in place, a few keys without a library call: most stages admit a handful."""
    if keys.size > 16:
        _sort_many(keys)
        return
    for k in range(1, keys.size):
        key = keys[k]
        place = k
        while place > 0 and keys[place - 1] > key:
            keys[place] = keys[place - 1]
            place -= 1
        keys[place] = key
