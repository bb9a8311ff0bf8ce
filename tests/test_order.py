"""The order-statistics tree against a sorted list."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.envs.simulator.order import Tree, add, count_below, highest, lowest, select, tree_size


def empty_tree(ranks: int) -> Tree:
    """A tree over `ranks` ranks that counts nothing."""
    return np.zeros(tree_size(ranks), dtype=np.int64)


@given(st.lists(st.integers(0, 99), unique=True), st.lists(st.integers(0, 99), max_size=40))
def test_against_a_sorted_list(present: list[int], toggled: list[int]) -> None:
    """After any insertions and removals every count and every selection is right."""
    tree, held = empty_tree(100), set(present)
    for rank in present:
        add(tree, rank, 1)
    for rank in toggled:
        add(tree, rank, -1 if rank in held else 1)
        held ^= {rank}
    ordered = sorted(held)
    below = [sum(rank < limit for rank in ordered) for limit in range(101)]
    assert [count_below(tree, limit) for limit in range(101)] == below
    assert [select(tree, k) for k in range(len(ordered))] == ordered
    if ordered:
        assert (lowest(tree), highest(tree)) == (ordered[0], ordered[-1])


@pytest.mark.parametrize("ranks", [2, 3, 31, 32, 33, 64, 65, 1024, 1025])
def test_first_and_last_rank_of_every_size(ranks: int) -> None:
    tree = empty_tree(ranks)
    add(tree, 0, 1)
    add(tree, ranks - 1, 1)
    assert select(tree, 0) == 0
    assert select(tree, 1) == ranks - 1
    assert (lowest(tree), highest(tree)) == (0, ranks - 1)
    assert count_below(tree, ranks) == 2
    assert count_below(tree, 0) == 0


def test_full_tree_selects_itself() -> None:
    tree = empty_tree(100)
    for rank in range(100):
        add(tree, rank, 1)
    assert [select(tree, k) for k in range(100)] == list(range(100))
