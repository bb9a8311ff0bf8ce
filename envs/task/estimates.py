"""Estimates of output lengths that are right, statistical or wrong: the paper's T_i.

Each is a function of the requests that fills in what a predictor says of them: a mean for every
request, and as spread the root mean square of log(true / predicted), what a user knows of a
predictor's errors in general (``make_requests``). The true lengths, and so the bound, stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.workload.predictors import expect_alike, predict
from servegym.envs.workload.requests import MAX_SPREAD, MAX_TOKENS, Requests, make_requests

Tokens = NDArray[np.int64]
Estimate = Callable[[Requests, Tokens, np.random.Generator], Requests]
"""Takes the requests, lengths that stand for the workload, shape (any,), and a generator."""


def scaled(requests: Requests, factor: float) -> Requests:
    """Return the requests, each predicted at ``factor`` > 0 times its true length; 1: perfectly."""
    if not 0 < factor <= MAX_TOKENS:
        raise ServegymError(f"a factor of lengths must be > 0 and ≤ {MAX_TOKENS}, got {factor}")
    return _predicted(requests, requests.output_tokens * factor)


def noisy(requests: Requests, deviation: float, rng: np.random.Generator) -> Requests:
    """Return the requests, each predicted at its true length times an error of its own.

    The errors are lognormal of mean 1; ``deviation`` ≥ 0 is the standard deviation of their logarithm.
    """
    if not 0 <= deviation <= MAX_SPREAD:
        raise ServegymError(f"a deviation must be ≥ 0 and ≤ {MAX_SPREAD:g}, got {deviation}")
    errors = np.exp(deviation * rng.standard_normal(len(requests)) - deviation**2 / 2)
    return _predicted(requests, requests.output_tokens * errors)


def reversed_order(requests: Requests) -> Requests:
    """Return the requests with the true lengths predicted in the wrong order.

    The longest is predicted to be the shortest, and so on; among equal lengths the later request
    counts as the longer one.
    """
    order = np.argsort(requests.output_tokens, kind="stable")
    predictions = np.empty_like(requests.output_tokens)
    predictions[order] = requests.output_tokens[order[::-1]]
    return _predicted(requests, predictions)


def taken_as_exact(requests: Requests) -> Requests:
    """Return predicted requests with a spread of 0.

    A request that exceeds its estimate is then expected to finish in the next round.
    """
    return replace(requests, predicted_spread=np.zeros(len(requests)))


def _predicted(requests: Requests, means: NDArray[Any]) -> Requests:
    predictions = np.clip(np.rint(means), 1, MAX_TOKENS).astype(np.int64)
    return make_requests(
        requests.prompt_tokens, requests.output_tokens, requests.arrival_s, predictions
    )


def _of_scale(factor: float) -> Estimate:
    return lambda requests, lengths, rng: scaled(requests, factor)


def _of_noise(deviation: float) -> Estimate:
    return lambda requests, lengths, rng: noisy(requests, deviation, rng)


def _of_tau(tau: float) -> Estimate:
    return lambda requests, lengths, rng: predict(requests, tau, lengths, rng)


ESTIMATES: Final[dict[str, Estimate]] = {
    "perfect": _of_scale(1.0),
    "workload mean": lambda requests, lengths, rng: expect_alike(requests, lengths),
    "calibrated τ 0.2": _of_tau(0.2),
    "calibrated τ 0.55": _of_tau(0.55),
    "calibrated τ 0.9": _of_tau(0.9),
    "all −50 %": _of_scale(0.5),
    "all −50 %, taken as exact": lambda requests, lengths, rng: taken_as_exact(
        scaled(requests, 0.5)
    ),
    "all −25 %": _of_scale(0.75),
    "all +25 %": _of_scale(1.25),
    "all +50 %": _of_scale(1.5),
    "all +100 %": _of_scale(2.0),
    "random ±25 %": _of_noise(0.25),
    "random ±50 %": _of_noise(0.5),
    "reversed order": lambda requests, lengths, rng: reversed_order(requests),
}
"""Estimates by name, the perfect one first."""


def estimated_task(task: TaskConfig) -> TaskConfig:
    """Return the task whose scheduler believes what the requests themselves predict."""
    return with_overrides(
        task, {"information": {"output_lengths": "predicted", "predictor": "column"}}
    )
