"""The walk through plans, in portions: the clock and Ctrl-C are looked at between them."""

from __future__ import annotations

import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.rebalancing import (
    kick,
    longest_first,
    set_targets,
    walk,
    write_clients,
)
from servegym.baselines.planning.servers import Servers

KICKED_PAIRS: Final = 2
"""Pairs of clients that a kick disturbs."""

PORTION_S: Final = 0.002
"""Seconds that the compiled walk runs between two looks at the clock, roughly."""


def load_walk() -> None:
    """Compile the kernels or load them from disk, once, on an instance that needs them all."""
    rounds = np.array([5, 4, 3, 3, 3])  # longest first 10 and 8; 9 and 9 is possible
    loads = longest_first(rounds, Servers.alike(2, 5))
    set_targets(loads, np.array([9, 9]))
    walk(loads, 100, np.random.default_rng(0))
    kick(loads, 1, np.random.default_rng(0))
    write_clients(loads, np.zeros(5, dtype=np.int64))


class Walk:
    """Longest-first loads, the walk that evens them out, and the best plan so far.

    Parameters
    ----------
    rounds
        Decode rounds of each request, shape (requests,), ≥ 0.
    clients
        Number of clients, ≥ 1, or what they are.
    rng
        Chooses the moves.
    deadline
        Reading of ``time.perf_counter`` at which the walk stops.
    """

    def __init__(
        self,
        rounds: NDArray[np.int64],
        clients: int | Servers,
        rng: np.random.Generator,
        deadline: float,
    ) -> None:
        if not isinstance(clients, Servers):
            clients = Servers.alike(clients, len(rounds))
        self._servers = clients
        self._loads = longest_first(rounds, self._servers)
        self._rng = rng
        self._deadline = deadline
        self._client_of = np.full(len(rounds), -1)
        self._keep()

    def client_of(self) -> NDArray[np.int64]:
        """Client of each request in the best plan, shape (requests,); −1 without rounds."""
        return self._client_of

    def aim(self, target: float, tries: int) -> bool:
        """Walk until all ends are within the span ``target``, or the tries or the time are used up.

        Returns whether the target was met. The result does not depend on how the tries are portioned.
        """
        set_targets(self._loads, self._servers.limits(target))
        if len(self._loads.load) < 2:
            tries = 0  # no pair to split
        portion = 64
        while tries > 0 and self._loads.over[0] > 0 and time.perf_counter() < self._deadline:
            started = time.perf_counter()
            portion = min(portion, tries)
            tries += walk(self._loads, portion, self._rng) - portion
            if time.perf_counter() - started < PORTION_S:
                portion *= 2
        if self._servers.span(self._loads.load) < self.best:
            self._keep()
        return bool(self._loads.over[0] == 0)

    def kick(self) -> None:
        """Disturb the loads before another ``aim``; the best plan is kept."""
        kick(self._loads, KICKED_PAIRS, self._rng)

    def _keep(self) -> None:
        self.best = self._servers.span(self._loads.load)
        write_clients(self._loads, self._client_of)
