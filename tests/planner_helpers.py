"""Shared by the tests of the planner and of its bound: rounds, brute force, tiny instances."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray


def whole(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def least_load(rounds: NDArray[np.int64], clients: int) -> int:
    """The least load of the busiest client, by trying every assignment."""
    assignments = itertools.product(range(clients), repeat=len(rounds))
    return int(
        min(np.bincount(each, weights=rounds, minlength=clients).max() for each in assignments)
    )


lengths = st.integers(0, 12) | st.integers(0, 1000)
tiny = st.tuples(
    st.lists(lengths, min_size=1, max_size=6).map(lambda numbers: whole(*numbers)),
    st.integers(1, 3),
)
"""At most 3^6 assignments: brute force is instant."""
