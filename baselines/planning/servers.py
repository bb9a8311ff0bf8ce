"""The clients that a plan is for: how long each takes for a round, which requests it can hold.

A plan is measured by its *span*: until its last client ends. Where all clients are equally fast that is
the largest load, in whole rounds; else it is in seconds. A client whose rounds take s seconds keeps
within a span T if it has at most ⌊T / s⌋ rounds, so every span is a limit of rounds for each client.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.machine.layout import Fleet

Whole = NDArray[np.int64]

_MOST_ROUNDS: Final = 2.0**52
"""Rounds beyond those of all requests of the largest instance, which floats still count exactly."""


@dataclass(frozen=True, eq=False)
class Servers:
    """The clients of a plan, and what its requests need of them.

    Examples
    --------
    >>> servers = Servers(np.array([1.0, 0.5]), np.array([100, 100]), np.array([7, 7, 7]))
    >>> servers.span(np.array([3, 4])), servers.limits(3.0).tolist()
    (3.0, [3, 6])
    """

    round_s: NDArray[np.float64]  # (clients,) seconds of a round; 1 where all are equally fast
    holds: Whole  # (clients,) most tokens of a request there
    needs: Whole  # (requests,) tokens

    @classmethod
    def alike(cls, clients: int, requests: int) -> Servers:
        """Return clients that differ in nothing."""
        nothing = np.zeros(clients, np.int64)
        return cls(np.ones(clients), nothing, np.zeros(requests, np.int64))

    @classmethod
    def of(cls, fleet: Fleet, tokens: Whole) -> Servers:
        """Return a cluster's clients for requests of so many prompt and output tokens."""
        round_s = np.asarray(fleet.round_s, float)
        if (round_s == round_s[0]).all():
            round_s = np.ones_like(round_s)
        if (fleet.tokens >= tokens.max(initial=0)).all():  # whoever might serve it, it fits
            return cls(round_s, np.zeros_like(fleet.tokens), np.zeros_like(tokens))
        return cls(round_s, fleet.tokens, tokens)

    def only(self, requests: Whole | NDArray[np.bool_]) -> Servers:
        """Return the same clients for some of the requests."""
        return Servers(self.round_s, self.holds, self.needs[requests])

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.round_s)

    @cached_property
    def equally_fast(self) -> bool:
        """Whether spans are whole numbers of rounds."""
        return bool((self.round_s == 1.0).all())

    @cached_property
    def limited(self) -> bool:
        """Whether some client holds less than another."""
        return bool((self.holds != self.holds[0]).any())

    @property
    def are_alike(self) -> bool:
        """Whether every client can take every request's place."""
        return self.equally_fast and not self.limited

    @cached_property
    def kinds(self) -> tuple[NDArray[np.float64], Whole, Whole, Whole]:
        """Clients that are alike: seconds, tokens and number of each kind; each client's kind."""
        # Tokens are exact as floats: at most 10¹², or the power of two that stands for no limit.
        rows = np.stack([self.round_s, self.holds.astype(float)])
        kinds, kind_of, count = np.unique(rows, axis=1, return_inverse=True, return_counts=True)
        return kinds[0], kinds[1].astype(np.int64), count, kind_of.ravel()

    def span(self, load: Whole) -> float:
        """Return when the last client ends, each having so many rounds, shape (clients,)."""
        span = float((load * self.round_s).max())
        return int(span) if self.equally_fast else span

    def before(self, span: float) -> float:
        """Return the longest span that is less."""
        return span - 1 if self.equally_fast else float(np.nextafter(span, 0.0))

    def limits(self, span: float) -> Whole:
        """Return the most rounds of each client within a span, shape (clients,)."""
        if self.equally_fast:
            return np.full(self.clients, int(span))
        round_s, _, _, kind_of = self.kinds
        return most_rounds(round_s, span)[kind_of]

    def next_span(self, least: float) -> float:
        """Return the least span of any plan that is no less than ``least``."""
        if self.equally_fast:
            return int(np.ceil(least))
        if least <= 0:
            return 0
        round_s = self.kinds[0]
        rounds = most_rounds(round_s, float(np.nextafter(least, 0.0))) + 1
        return float((rounds * round_s).min())


def most_rounds(round_s: NDArray[np.float64], span: float) -> Whole:
    """Return the most rounds whose product with ``round_s``, as floats multiply, is within ``span``."""
    rounds = np.floor(np.minimum(max(span, 0.0) / round_s, _MOST_ROUNDS)).astype(np.int64)
    rounds -= rounds * round_s > span
    rounds += (rounds + 1) * round_s <= span
    return np.maximum(rounds, 0)
