"""When running requests finish, or should: arrays of FINISH, latest first, of equal ones the higher id.

Every operation takes one pass over the array, however many requests it puts in or takes out.
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
    """Put requests among the first ``running``, which are in order.

    ``keys``: (due − ``now``) · ``span`` + request of each, whose order ``keys`` does not keep; the array
    must have room for them.
    """
    sort_keys(keys)
    # From the back, soonest first: who finishes after all of the new ones stays in place.
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
    """Put one request among the first ``running``: as ``merge``, without its divisions."""
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
    """Return the place of request ``i`` that is due at ``due``, one of the first ``running``."""
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
    """Take out the finishes at ``places``, at least one, of the first ``running``; sorts ``places``."""
    sort_keys(places)
    kept = places[0]
    taken = 0
    for place in range(places[0], running):
        if taken < places.size and places[taken] == place:
            taken += 1
            continue
        finishes[kept].due = finishes[place].due
        finishes[kept].request = finishes[place].request
        kept += 1


@allocating_kernel
def _sort_many(keys: NDArray[np.int64]) -> None:
    keys.sort()


@kernel
def sort_keys(keys: NDArray[np.int64]) -> None:
    """Sort in place; most stages admit a handful, and then a call to a library costs more."""
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
