"""The planner's bound by patterns, and the knapsack that prices them, against brute force."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from servegym.baselines.planning.knapsack import Knapsack
from servegym.baselines.planning.pattern_bound import PatternBound, Verdict
from servegym.envs.bounds.rounds import rounds_lower_bound
from servegym.envs.workload.requests import MAX_TOKENS
from tests.planner_helpers import least_load, tiny, whole


class TestPatternBound:
    @pytest.mark.parametrize(
        ("rounds", "clients", "target", "verdict"),
        [
            ([5, 5, 5, 3], 2, 9, Verdict.IMPOSSIBLE),  # three 5s need three clients
            ([5, 5, 5, 3], 2, 10, Verdict.OPEN),
            ([4, 4, 4], 1, 11, Verdict.IMPOSSIBLE),
            ([4, 4, 4], 1, 12, Verdict.OPEN),
            ([6, 5, 5, 4, 0], 2, 10, Verdict.OPEN),  # 6 + 4 and 5 + 5
        ],
    )
    def test_by_hand(self, rounds: list[int], clients: int, target: int, verdict: Verdict) -> None:
        assert PatternBound(whole(*rounds), clients).decide(target, math.inf) is verdict

    @given(tiny)
    def test_never_rules_out_the_optimum(self, case: tuple[NDArray[np.int64], int]) -> None:
        rounds, clients = case
        optimum = least_load(rounds, clients)
        bound = rounds_lower_bound(rounds, clients)
        prices = PatternBound(rounds, clients)
        for _ in range(optimum.bit_length() + 1):
            bound = prices.raise_bound(bound, optimum, math.inf)
        assert bound <= optimum

    def test_a_passed_deadline_decides_nothing(self) -> None:
        prices = PatternBound(whole(5, 5, 5, 3), 2)
        assert prices.decide(9, time.perf_counter()) is Verdict.UNDECIDED
        assert prices.raise_bound(9, 10, time.perf_counter()) == 9

    def test_a_table_beyond_memory_is_not_attempted(self) -> None:
        prices = PatternBound(np.arange(1, 1000) * 10_000, 2)
        assert prices.decide(MAX_TOKENS, math.inf) is Verdict.UNDECIDED

    def test_a_plans_own_queues_are_patterns(self) -> None:
        prices = PatternBound(whole(5, 0, 5, 5, 3), 2)
        prices.learn(whole(5, 0, 5, 5, 3), whole(0, -1, 0, 1, 1))
        assert prices.decide(9, math.inf) is Verdict.IMPOSSIBLE


class TestKnapsack:
    @given(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 9)), max_size=4),
        st.integers(9, 25),
    )
    def test_agrees_with_brute_force(self, kinds: list[tuple[int, int, int]], target: int) -> None:
        length, count, price = (
            (whole(*column) for column in zip(*kinds, strict=True)) if kinds else (whole(),) * 3
        )
        pattern = Knapsack(length, count, target).fill(price, count)
        choices = itertools.product(*(range(most + 1) for most in count.tolist()))
        fitting = (np.array(each) for each in choices if np.dot(each, length) <= target)
        assert (pattern <= count).all()
        assert pattern @ length <= target
        assert pattern @ price == max(each @ price for each in fitting)
