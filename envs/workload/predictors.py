"""Predictors of output lengths: calibrated distributions of a given accuracy.

A prediction is a lognormal distribution, given by its mean and by the standard deviation of the log
length (``Requests``). **Calibrated** by Kendall's τ, with r = sin(πτ/2) and m and s the mean and the
standard deviation of log y over the workload,

    log median = m + r² · (log y − m) + r · sqrt(1 − r²) · s · z,    spread = s · sqrt(1 − r²),

z standard normal: for lognormal lengths the rank correlation is τ and E[log y | prediction] = log median.
**Classified**: a classifier with a measured confusion matrix gives each request a class of lengths; the
prediction is the mean and the spread of the workload's lengths that are given this class. No prediction
exceeds the workload's longest length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.workload.requests import Requests

Generator = np.random.Generator
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Predictor:
    """A measured predictor: a rank correlation, or a confusion matrix of length classes."""

    source: str
    """Publication of the figures."""
    kendall_tau: float
    thresholds: tuple[int, ...] = ()
    """First token count of each class but the first; empty: calibrated by τ."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Number of requests by true class (row) and given class (column)."""

    def predict(self, requests: Requests, lengths: Tokens, rng: Generator) -> Requests:
        """Return the requests with predictions; ``lengths`` sample the workload's output tokens."""
        if not self.thresholds:
            return predict(requests, self.kendall_tau, lengths, rng)
        return _classify(requests, self, lengths, rng)


def predict(requests: Requests, kendall_tau: float, lengths: Tokens, rng: Generator) -> Requests:
    """Return the requests with predictions of rank correlation τ; see the module docstring.

    ``lengths`` sample the workload's output tokens, shape (any,). At τ = 1 the predictions are the true
    lengths, at τ = 0 all are equal.
    """
    _, center, deviation, _ = _figures_of(lengths)
    r = np.sin(np.pi * kendall_tau / 2.0)
    spread = deviation * np.sqrt(1.0 - r**2)
    noise = rng.standard_normal(len(requests))
    log_median = center + r**2 * (np.log(requests.output_tokens) - center) + r * spread * noise
    means = np.exp(log_median + spread**2 / 2.0)
    return _with_predictions(requests, means, np.full(len(requests), spread), lengths)


def expect_alike(requests: Requests, lengths: Tokens) -> Requests:
    """Return the requests, each predicted with the workload's mean length and spread."""
    n = len(requests)
    deviation = _figures_of(lengths).log_deviation
    return _with_predictions(requests, np.full(n, lengths.mean()), np.full(n, deviation), lengths)


class _Figures(NamedTuple):
    """What predictions take of a workload's lengths; with these, so that no other array has their id."""

    lengths: Tokens
    log_mean: float
    log_deviation: float
    longest: int


_FIGURES: Final[dict[int, _Figures]] = {}
"""By id, of arrays that nobody can write to: a preset's sample has 100,000 lengths, and each reset asks."""


def _figures_of(lengths: Tokens) -> _Figures:
    known = _FIGURES.get(id(lengths))
    if known is None:
        logs = np.log(lengths)
        known = _Figures(lengths, float(logs.mean()), float(logs.std()), int(lengths.max()))
        if not lengths.flags.writeable:
            _FIGURES[id(lengths)] = known
    return known


def _with_predictions(
    requests: Requests, means: NDArray[np.float64], spread: NDArray[np.float64], lengths: Tokens
) -> Requests:
    predicted = np.clip(np.rint(means), 1, _figures_of(lengths).longest).astype(np.int64)
    return requests.with_predictions(predicted, spread)


def _classify(
    requests: Requests, predictor: Predictor, lengths: Tokens, rng: Generator
) -> Requests:
    """Draw the class each request is given; predict the mean and spread of that class."""
    counts = np.array(predictor.confusion, dtype=float)
    chances = counts / counts.sum(axis=1, keepdims=True)  # (true, given)
    weights = chances[np.searchsorted(predictor.thresholds, lengths, side="right")]
    logs = np.log(lengths)
    total = np.maximum(weights.sum(axis=0), np.finfo(float).tiny)
    means = lengths @ weights / total
    centers = logs @ weights / total
    spreads = np.sqrt(np.maximum((logs**2) @ weights / total - centers**2, 0.0))
    true_class = np.searchsorted(predictor.thresholds, requests.output_tokens, side="right")
    bounds = np.cumsum(chances, axis=1)[true_class, :-1]
    given = (rng.random(len(requests))[:, None] >= bounds).sum(axis=1)
    return _with_predictions(requests, means[given], spreads[given], lengths)


def _read_predictors() -> dict[str, Predictor]:
    text = resources.files("servegym.envs.data").joinpath("predictors.json").read_text("utf-8")
    rows: dict[str, dict[str, Any]] = json.loads(text)["predictors"]
    return {
        name: Predictor(
            row["source"],
            row["kendall_tau"],
            tuple(row.get("thresholds", ())),
            tuple(tuple(counts) for counts in row.get("confusion", ())),
        )
        for name, row in rows.items()
    }


PREDICTORS: Final = _read_predictors()
"""Measured predictors by name, as ``[information] predictor = …`` takes them."""

PREDICTOR_NAMES: Final = ("calibrated", "column", *PREDICTORS)
"""All values of ``[information] predictor``."""
