"""By what waiting requests of uncertain length are compared: which one counts as the longest.

A predicted length is a lognormal distribution (``Requests``). Its mean says what a request costs on
average; who is pulled late and turns out long sets the makespan, which is a matter of the upper tail.
Expected finishes, and so triggers and observation, go by the mean all the same.
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
    """Return the output tokens that each request counts for, shape (requests,).

    ``mean``: those predicted. ``quantile``: exceeded with probability 1 − ``quantile``. ``mean-sd``: the
    mean plus ``deviations`` standard deviations. Requests without predictions count for their true
    lengths.
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


def standard_deviations(requests: Requests) -> NDArray[np.float64]:
    """Return the standard deviation of each predicted length in tokens, shape (requests,)."""
    if requests.predicted_spread is None:
        return np.zeros(len(requests))
    return _relative_deviations(requests.predicted_spread) * requests.predicted_output_tokens


def _relative_deviations(spread: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviation of lognormal lengths, divided by their mean."""
    deviations: NDArray[np.float64] = np.sqrt(np.expm1(spread**2))
    return deviations
