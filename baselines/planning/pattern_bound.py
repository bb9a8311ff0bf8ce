"""A stronger lower bound on the largest client load, by pricing (Gilmore–Gomory patterns).

Give every request a price that depends on its length alone. If no client can hold more than value
V within ``target`` rounds, but all requests together are worth more than clients · V, then no plan
keeps every client within ``target``. The area bound is the case price = length. The best prices
solve a linear program with one row per *pattern* (a set of requests that fits within the target);
the rows are generated as needed, each by a knapsack. Prices are rounded to whole numbers before
they are used, so that the proof is exact whatever the linear program's tolerances.
"""

from __future__ import annotations

import time
from enum import Enum
from typing import Final

import highspy
import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.highs import silent_highs
from servegym.baselines.planning.knapsack import Knapsack

MAX_TABLE: Final = 50_000_000
"""Largest knapsack table, in entries (bytes); beyond it the bound is not attempted."""

PRICE_UNIT: Final = 1 << 36
"""A price of 1, the value of a whole client, as an integer."""

PATTERNS_A_ROUND: Final = 50
"""Patterns generated per solution of the linear program, disjoint in their requests."""


class Verdict(Enum):
    """What the prices say of a target."""

    IMPOSSIBLE = "no plan keeps every client within the target"
    OPEN = "the best prices prove nothing"
    UNDECIDED = "stopped before the best prices were found"


class PatternBound:
    """Proves for one instance that loads within a target are impossible; keeps the patterns."""

    def __init__(self, rounds: NDArray[np.int64], clients: int) -> None:
        self._lengths, self._counts = np.unique(rounds[rounds > 0], return_counts=True)
        self._clients = clients
        self._patterns: dict[bytes, NDArray[np.int64]] = {}
        self._open_from: int | None = None  # the least target known to be open

    def learn(self, rounds: NDArray[np.int64], client_of: NDArray[np.int64]) -> None:
        """Take what each client of a plan holds as patterns to start from."""
        if 8 * self._clients * len(self._lengths) > MAX_TABLE:
            return
        patterns = np.zeros((self._clients, len(self._lengths)), dtype=np.int64)
        held = rounds > 0
        kind = np.searchsorted(self._lengths, rounds[held])
        np.add.at(patterns, (client_of[held], kind), 1)
        self._patterns.update({pattern.tobytes(): pattern for pattern in patterns})

    def raise_bound(self, bound: int, load: int, deadline: float) -> int:
        """Try one target between a bound and the load of a plan; return the bound, raised or not.

        The load is most often optimal, so the first target is just below it; bisection follows.
        Repeated calls find the best bound that prices give.

        Parameters
        ----------
        bound
            Rounds that the largest load is known to need, at least the longest request.
        load
            Largest load of the best plan, in rounds.
        deadline
            Reading of ``time.perf_counter`` to stop at.
        """
        top = load if self._open_from is None else min(load, self._open_from)
        if bound >= top:
            return bound
        target = top - 1 if top == load else (bound + top - 1) // 2
        verdict = self.decide(target, deadline)
        if verdict is Verdict.IMPOSSIBLE:
            return target + 1
        self._open_from = target if verdict is Verdict.OPEN else bound
        return bound

    def decide(self, target: int, deadline: float) -> Verdict:
        """Look for prices that rule out loads within ``target`` rounds.

        Parameters
        ----------
        target
            Rounds, at least the longest request.
        deadline
            Reading of ``time.perf_counter`` to stop at.
        """
        knapsack = Knapsack(self._lengths, self._counts, target)
        if knapsack.entries > MAX_TABLE:
            return Verdict.UNDECIDED
        model = self._price_model(target)
        while (time_left := deadline - time.perf_counter()) > 0:
            model.setOptionValue("time_limit", model.getRunTime() + time_left)
            model.run()
            if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
                break
            prices = np.clip(np.array(model.getSolution().col_value), 0.0, 1.0)
            whole = (prices * PRICE_UNIT).astype(np.int64)
            patterns = self._generate(knapsack, whole, deadline)
            if self._exceeds(whole, int(whole @ patterns[0])):
                return Verdict.IMPOSSIBLE
            # The program's value bounds what any prices can reach.
            if prices @ self._counts <= self._clients or not self._extend(model, patterns):
                return Verdict.OPEN
        return Verdict.UNDECIDED

    def _exceeds(self, prices: NDArray[np.int64], most: int) -> bool:
        """Whether the requests are worth more than all clients can hold, in exact integers."""
        worth = sum(
            int(price) * int(count) for price, count in zip(prices, self._counts, strict=True)
        )
        return worth > self._clients * most

    def _price_model(self, target: int) -> highspy.Highs:
        """Build the program over the known patterns: maximise the worth, no pattern above 1."""
        model = silent_highs()
        lengths = len(self._lengths)
        model.addVars(lengths, np.zeros(lengths), np.ones(lengths))
        model.changeColsCost(
            lengths, np.arange(lengths, dtype=np.int32), -self._counts.astype(float)
        )
        # A longer request is worth no less: the best prices obey this, and it damps their oscillation.
        for shorter in range(lengths - 1):
            pair = np.array([shorter, shorter + 1], dtype=np.int32)
            model.addRow(-highspy.kHighsInf, 0.0, 2, pair, np.array([1.0, -1.0]))
        for pattern in self._patterns.values():
            if pattern @ self._lengths <= target:
                _add_pattern(model, pattern)
        return model

    def _generate(
        self, knapsack: Knapsack, prices: NDArray[np.int64], deadline: float
    ) -> list[NDArray[np.int64]]:
        """Take the most valuable pattern, then the best of the rest while it is worth more than a client."""
        left = self._counts.copy()
        patterns: list[NDArray[np.int64]] = []
        while len(patterns) < PATTERNS_A_ROUND:
            pattern = knapsack.fill(prices, left)
            if patterns and (pattern @ prices <= PRICE_UNIT or time.perf_counter() > deadline):
                break
            patterns.append(pattern)
            left -= pattern
        return patterns

    def _extend(self, model: highspy.Highs, patterns: list[NDArray[np.int64]]) -> bool:
        """Add the patterns that are new; return whether there were any."""
        new = [pattern for pattern in patterns if pattern.tobytes() not in self._patterns]
        for pattern in new:
            self._patterns[pattern.tobytes()] = pattern
            _add_pattern(model, pattern)
        return bool(new)


def _add_pattern(model: highspy.Highs, pattern: NDArray[np.int64]) -> None:
    held = np.flatnonzero(pattern).astype(np.int32)
    model.addRow(-highspy.kHighsInf, 1.0, len(held), held, pattern[held].astype(float))
