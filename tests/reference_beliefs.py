"""The slow reference where output lengths are not known: what a scheduler believes, written anew.

A prediction is a lognormal length: its mean and the standard deviation of its logarithm. The scheduler
believes in the mean. Decode rounds at which nobody could choose run on to the next finish, or to an arrival
if a client is idle for it; where such a run, a single round or a prefill stage ends, every request that
has emitted as many tokens as were expected of it is expected at its mean given that there are more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from scipy.special import log_ndtr

from servegym.envs.workload.requests import MAX_TOKENS
from tests.reference_simulator import ReferenceSimulator, Request

Comparison = Literal["mean", "quantile", "mean-sd"]


@dataclass(eq=False)
class PredictedRequest(Request):
    """A request and its predicted length."""

    mean: int = 0  # output tokens
    spread: float = 0.0  # standard deviation of log(true / predicted)

    def __post_init__(self) -> None:
        self.believed = self.mean


def mean_beyond(mean: int, spread: float, emitted: int) -> int:
    """E[Y | Y > emitted] of a lognormal length, rounded, at least one token more than emitted.

    Where both tails are eight deviations away or more, their ratio is that of its leading terms.
    """
    if spread == 0:
        return emitted + 1
    center = math.log(mean) - spread * spread / 2
    z = (math.log(emitted) - center) / spread
    if z > 8 + spread:
        expected = emitted * z / (z - spread)
    else:
        expected = mean * math.exp(log_ndtr(spread - z) - log_ndtr(-z))
    return max(round(min(expected, MAX_TOKENS)), emitted + 1)


def compared_tokens(mean: int, spread: float, by: Comparison, number: float) -> int:
    """The tokens by which a waiting request is compared: mean, quantile, or mean plus deviations."""
    if by == "quantile":
        center = math.log(mean) - spread * spread / 2
        tokens = math.exp(center + spread * NormalDist().inv_cdf(number))
    elif by == "mean-sd":
        tokens = mean + number * mean * math.sqrt(math.exp(spread * spread) - 1)
    else:
        tokens = mean
    return min(max(round(tokens), 1), MAX_TOKENS)


class BelievingSimulator(ReferenceSimulator):
    """The reference with expected lengths for its scheduler; requests must be `PredictedRequest`s."""

    def apply(self, action: int) -> None:
        if action == 0:
            self.decode_run(once=self.every_round)
        else:
            super().apply(action)

    def apply_one_round(self, action: int) -> None:
        if action == 0:
            free = bool(self.waiting()) and bool(self.idle_clients())
            self.decode_run(once=self.every_round and free)
        else:
            super().apply(action)

    def decode_run(self, *, once: bool) -> None:
        """Decode once, or to the next finish, or to an arrival if a client is idle for it."""
        idle = bool(self.idle_clients())
        while True:
            active = self.emit_tokens()
            finished = any(request.emitted == request.output for request in active)
            if once or finished or (idle and self.someone_arrives()):
                break
        self.end_stage(active)

    def someone_arrives(self) -> bool:
        coming = [request for request in self.requests if request.phase == "future"]
        return any(request.arrival_s <= self.clock_s for request in coming)

    def learn(self) -> None:
        for request in self.requests:
            assert isinstance(request, PredictedRequest)
            if request.phase == "finished":
                request.believed = request.output
            elif request.phase == "running" and request.expected_left <= 0:
                request.believed = mean_beyond(request.mean, request.spread, request.emitted)


def expected_finishes(simulator: ReferenceSimulator) -> list[tuple[int, int]]:
    """Rounds until each running request should finish, and its id; the latest first."""
    left = [(request.expected_left, request.id) for request in simulator.running()]
    return sorted(left, reverse=True)


def predicted(rows: Any, by: Comparison, number: float) -> list[PredictedRequest]:
    """Requests from (arrival, prompt, output, mean, spread), compared as told."""
    return [
        PredictedRequest(
            i,
            arrival_s,
            prompt,
            output,
            None,
            compared_tokens(mean, spread, by, number),
            mean=mean,
            spread=spread,
        )
        for i, (arrival_s, prompt, output, mean, spread) in enumerate(rows)
    ]
