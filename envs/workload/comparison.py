"""The length by which waiting requests are compared where true lengths are not known.

A predicted length is a lognormal distribution (``Requests``). The makespan is set by requests started
late that prove long: the upper tail of a prediction matters, not its mean. Expected finishes, and so
triggers and the observation, use the mean regardless.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from servegym.envs.workload.requests import MAX_TOKENS, Requests

COMPARISONS: Final = ("mean", "quantile", "mean-sd")
"""Values of ``[information] compare_by``."""


def compared_tokens(
    requests: Requests, compare_by: str, quantile: float, deviations: float
) -> NDArray[np.int64]:
    """Return the output tokens by which each request is compared, shape (requests,).

    ``mean``: the predicted mean. ``quantile``: the length exceeded with probability 1 − ``quantile``.
    ``mean-sd``: the mean plus ``deviations`` standard deviations. Requests without predictions have
    their true lengths.
    """
    mean, spread = requests.predicted_output_tokens, requests.predicted_spread
    if spread is None or compare_by == "mean":
        return mean
    if compare_by == "quantile":
        factor = np.exp(spread * ndtri(quantile) - spread**2 / 2.0)
    else:
        factor = 1.0 + deviations * _relative_deviations(spread)
    tokens = np.rint(mean * factor)
    return np.clip(tokens, 1, MAX_TOKENS).astype(np.int64)


def expected_at_end(requests: Requests, expect: str, interval: float) -> Requests:
    """Return requests predicted with certainty at one end of the interval where each length should lie.

    ``lower`` and ``upper``: the lengths below and above which it lies with probability (1 − ``interval``) / 2
    each. ``mean``, or without predictions: unchanged.
    """
    if expect == "mean" or requests.predicted_spread is None:
        return requests
    chance = (1 - interval) / 2 if expect == "lower" else (1 + interval) / 2
    tokens = compared_tokens(requests, "quantile", chance, 0.0)
    return requests.with_predictions(tokens, np.zeros(len(requests)))


def standard_deviations(requests: Requests) -> NDArray[np.float64]:
    """Return the standard deviation of each predicted length in tokens, shape (requests,)."""
    if requests.predicted_spread is None:
        return np.zeros(len(requests))
    return _relative_deviations(requests.predicted_spread) * requests.predicted_output_tokens


def _relative_deviations(spread: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviation of lognormal lengths, divided by their mean."""
    deviations: NDArray[np.float64] = np.sqrt(np.expm1(spread**2))
    return deviations
