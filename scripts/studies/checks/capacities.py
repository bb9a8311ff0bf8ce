"""Arrival rates up to which a replica is stable by a fluid count, and what the simulator makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.studies.serving import serve

Tokens = NDArray[np.int64]

PASS_S: Final = 2.0**-5
"""A pass, whatever is in it."""


@dataclass(frozen=True)
class Capacity:
    """A replica under a policy, lengths, and the rate that it can just bear."""

    name: str
    formula: str
    policy: str
    task: TaskConfig
    rate: float
    """Requests per second."""
    lengths: Callable[[int, np.random.Generator], tuple[Tokens, Tokens]]

    def left_over(self, load: float, n: int, rng: np.random.Generator) -> tuple[float, float]:
        """Return the share of n requests in system at the last arrival, and of the second half of them.

        The second counts how many more there are than halfway, as a share of those who came since: 0 if
        stable, else 1 − 1 / load.
        """
        arrivals = np.cumsum(rng.exponential(1.0 / (load * self.rate), n))
        served = serve(self.task, self.policy, *self.lengths(n, rng), arrivals)
        finished = np.sort(served.log.finished_s)
        half = n // 2
        at_half = half - int(np.searchsorted(finished, arrivals[half - 1], side="right"))
        at_end = n - int(np.searchsorted(finished, arrivals[-1], side="right"))
        return at_end / n, (at_end - at_half) / (n - half)

    def saturated(self, n: int, rng: np.random.Generator) -> float:
        """Return what it serves where all n are present at the start, as a share of the formula's rate."""
        served = serve(self.task, self.policy, *self.lengths(n, rng))
        finished = np.sort(served.log.finished_s)
        first, last = int(0.2 * n), int(0.8 * n)
        return float((last - first) / (finished[last] - finished[first]) / self.rate)


def _constant_passes() -> StageCosts:
    return StageCosts(AffineDecode(PASS_S), AffinePrefill(PASS_S, 0.0))


def _drawn(prompt: int, ends: float) -> Callable[[int, np.random.Generator], tuple[Tokens, Tokens]]:
    """Equal prompts, and outputs with a geometric number of rounds."""

    def lengths(n: int, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        return np.full(n, prompt), rng.geometric(ends, n) + 1

    return lengths


def mixed(policy: str, budget: int, prompt: int, ends: float) -> Capacity:
    """Let every pass take as many tokens as there are, up to b: b / (t · (prompt + rounds))."""
    cluster = ClusterConfig(clients=budget, chunk_tokens=budget)
    rate = budget / (PASS_S * (prompt + 1.0 / ends))
    return Capacity(
        f"mixed passes of {budget} tokens",
        "b / (t (m_p + m_d))",
        policy,
        TaskConfig("mixed", cluster, _constant_passes()),
        rate,
        _drawn(prompt, ends),
    )


def either_or(policy: str, budget: int, prompt: int, ends: float) -> Capacity:
    """Prefill in a pass of its own as soon as anybody can be admitted: few, as few finish in a round.

    With all J = b clients busy, J · p finish a round on average and nobody in 1 − q of the rounds; each
    of the others is followed by a pass that only admits: J p / (t (1 + q)), q = 1 − (1 − p)^J.
    """
    cluster = ClusterConfig(clients=budget, max_prefill_tokens=budget)
    some = 1.0 - (1.0 - ends) ** budget
    return Capacity(
        f"prefill first, passes of {budget} tokens",
        "J p / (t (1 + q))",
        policy,
        TaskConfig("either-or", cluster, _constant_passes()),
        budget * ends / (PASS_S * (1.0 + some)),
        _drawn(prompt, ends),
    )


def additive(policy: str, clients: int, prompt: int, ends: float) -> Capacity:
    """Let prefill take seconds by the token: 1 / (E[P] + E[o − 1] · D / J)."""
    token_s = 2.0**-10
    costs = StageCosts(AffineDecode(PASS_S), AffinePrefill(0.0, token_s))
    return Capacity(
        f"prefill first, seconds by the token, {clients} clients",
        "1 / (E[P] + E[o − 1] D / J)",
        policy,
        TaskConfig("additive", ClusterConfig(clients=clients), costs),
        1.0 / (prompt * token_s + PASS_S / (ends * clients)),
        _drawn(prompt, ends),
    )


CAPACITIES: Final[Sequence[Capacity]] = (
    mixed("sarathi", 256, 20, 0.01),
    mixed("vllm", 256, 400, 0.01),
    either_or("vllm-classic", 256, 20, 0.01),
    additive("vllm-classic", 64, 100, 0.01),
)
"""The first and the third serve the same requests with passes of the same size and time."""
