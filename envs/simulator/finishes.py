"""True or expected finishes of running requests: arrays of FINISH, latest first, ties by higher id.

Every operation takes one pass over the array, however many requests it inserts or removes.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import allocating_kernel, kernel, move_records

Finishes = Any
"""An array of FINISH records, as ``State.finishes[e, r]``."""

_FEW: Final = 128

_ID_BITS: Final = 24  # an id is less than ``MAX_REQUESTS``, 10⁷
_IDS: Final = (1 << _ID_BITS) - 1

_NEAR: Final = 4
"""So many places from the end are looked at in a row, before half of the rest is looked at each time."""


@kernel
def key_of(rounds: int, i: int) -> int:
    """Return a number that sorts request ``i`` by rounds, then by id."""
    return (rounds << _ID_BITS) + i


@kernel
def merge(finishes: Finishes, running: int, now: int, keys: NDArray[np.int64]) -> None:
    """Insert requests into the first ``running`` finishes, which are sorted.

    ``keys`` holds ``key_of`` (due − ``now``) and id of each request and is sorted in place. The array must
    have room.
    """
    sort_keys(keys)
    # From the back, soonest first: finishes after all the new ones stay in place.
    old = running
    for k in range(keys.size):
        i = keys[k] & _IDS
        due = now + (keys[k] >> _ID_BITS)
        after = _count_later(finishes, old, due, i)
        move_records(finishes, after + keys.size - k, after, old - after)
        old = after
        place = after + keys.size - 1 - k
        finishes[place].due = due
        finishes[place].request = i


@kernel
def insert(finishes: Finishes, running: int, due: int, i: int) -> None:
    """Insert one request into the first ``running`` finishes: ``merge`` without its divisions."""
    place = _count_later(finishes, running, due, i)
    move_records(finishes, place + 1, place, running - place)
    finishes[place].due = due
    finishes[place].request = i


@kernel
def _count_later(finishes: Finishes, running: int, due: int, i: int) -> int:
    """Return how many of the first ``running`` finishes come after request ``i`` that is due at ``due``."""
    high = running
    while high > max(running - _NEAR, 0):
        if _later(finishes, high - 1, due, i):
            return high
        high -= 1
    low = 0
    while low < high:
        middle = (low + high) // 2
        if _later(finishes, middle, due, i):
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _later(finishes: Finishes, place: int, due: int, i: int) -> bool:
    """Return whether the finish at ``place`` comes after request ``i`` that is due at ``due``."""
    finish = finishes[place]
    return finish.due > due or (finish.due == due and finish.request > i)


@kernel
def find(finishes: Finishes, running: int, due: int, i: int) -> int:
    """Return the place of request ``i``, due at ``due``, among the first ``running`` finishes."""
    return _count_later(finishes, running, due, i)


@kernel
def remove(finishes: Finishes, running: int, places: NDArray[np.int64]) -> None:
    """Remove the finishes at ``places`` (≥ 1) from the first ``running``; sorts ``places``."""
    sort_keys(places)
    for k in range(places.size):
        after = places[k + 1] if k + 1 < places.size else running
        move_records(finishes, places[k] - k, places[k] + 1, after - places[k] - 1)


@kernel
def remove_one(finishes: Finishes, running: int, place: int) -> None:
    """Remove the finish at ``place`` from the first ``running``."""
    move_records(finishes, place, place + 1, running - 1 - place)


@allocating_kernel
def _sort_many(keys: NDArray[np.int64]) -> None:
    keys.sort()


@kernel
def sort_keys(keys: NDArray[np.int64]) -> None:
    """Sort in place: up to 128 keys by insertion, which takes half the time of the library's sort."""
    if keys.size > _FEW:
        _sort_many(keys)
        return
    for k in range(1, keys.size):
        key = keys[k]
        place = k
        while place > 0 and keys[place - 1] > key:
            keys[place] = keys[place - 1]
            place -= 1
        keys[place] = key
