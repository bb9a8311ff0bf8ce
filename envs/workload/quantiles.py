"""Requests drawn from published figures: quantiles of two lengths, joined by their rank correlation.

Between two quantiles lengths are uniform. Above the 95 % quantile they follow the generalized Pareto tail
that gives the published mean and standard deviation, cut at the longest; where that is none (the quantiles
below already explain the deviation) a power of the share that gives the mean. Prompt and output are joined
by a Gaussian copula, ρ = 2·sin(π·r/6) for Spearman's r.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from servegym.envs.workload.arrivals import Measured

Generator = np.random.Generator
Tokens = NDArray[np.int64]
Shares = NDArray[np.float64]

_STEP: Final = 0.05
_LEAST_RATIO: Final = (
    1.2  # E[x²] / E[x]² of the tail's excess; below, it has no Pareto form worth it
)


class Marginal:
    """The distribution of one length by its quantiles, mean and standard deviation.

    Examples
    --------
    >>> quantiles = np.linspace(0, 100, 21)
    >>> Marginal(quantiles, 50.0, 28.9).lengths(np.array([0.0, 0.5, 1.0]))
    array([  1,  50, 100])
    """

    def __init__(self, quantiles: NDArray[np.float64], mean: float, std: float) -> None:
        self._quantiles = quantiles
        self._knots = np.linspace(0.0, 1.0, len(quantiles))
        lows, highs = quantiles[:-2], quantiles[1:-1]
        last = quantiles[-2]
        body = _STEP * float((lows + highs).sum() / 2.0)
        body_squares = _STEP * float((lows**2 + lows * highs + highs**2).sum() / 3.0)
        excess = (mean - body) / _STEP - last
        squares = (std**2 + mean**2 - body_squares) / _STEP - 2.0 * last * excess - last**2
        self._tail = _tail(excess, squares, float(quantiles[-1] - last))

    def lengths(self, shares: Shares) -> Tokens:
        """Return the lengths below which these shares lie, at least 1; shape as ``shares``."""
        lengths = np.interp(shares, self._knots, self._quantiles)
        above = shares > 1.0 - _STEP
        longest, last = self._quantiles[-1], self._quantiles[-2]
        with np.errstate(divide="ignore"):
            excess = self._tail(np.clip((1.0 - shares[above]) / _STEP, 0.0, 1.0))
        lengths[above] = np.minimum(last + excess, longest)
        return np.maximum(np.rint(lengths), 1).astype(np.int64)


def _tail(excess: float, squares: float, most: float) -> Callable[[Shares], Shares]:
    """Return the excess over the last quantile by the share of the tail that is longer still."""
    if not 0 < excess < most:
        return lambda longer: most * (1.0 - longer)
    ratio = squares / excess**2
    if ratio < _LEAST_RATIO:
        power = most / excess - 1.0
        return lambda longer: most * (1.0 - longer) ** power
    shape = (ratio - 2.0) / (2.0 * (ratio - 1.0))
    if abs(shape) < 1e-9:
        return lambda longer: -excess * np.log(longer)
    scale = excess * (1.0 - shape) / shape
    return lambda longer: scale * (longer**-shape - 1.0)


@dataclass(frozen=True)
class Figures:
    """Published figures of a data set, and where they are from."""

    description: str
    source: str
    licence: str
    requests: int
    """How many the figures are of."""
    rank_correlation: float
    """Spearman's, of prompt and output tokens."""
    prompt: Marginal
    output: Marginal
    arrivals: Measured | None
    note: str

    def sample(self, requests: int, rng: Generator) -> tuple[Tokens, Tokens]:
        """Draw prompt and output tokens, each of shape (requests,)."""
        rho = 2.0 * np.sin(np.pi * self.rank_correlation / 6.0)
        scores = rng.standard_normal((2, requests))
        joined = rho * scores[0] + np.sqrt(1.0 - rho**2) * scores[1]
        return self.prompt.lengths(ndtr(scores[0])), self.output.lengths(ndtr(joined))


def _read_figures() -> dict[str, Figures]:
    rows: dict[str, dict[str, Any]] = json.loads(_text())["presets"]
    return {
        name: Figures(
            row["description"],
            row["source"],
            row["licence"],
            row["requests"],
            row["rank_correlation"],
            _marginal(row["prompt"]),
            _marginal(row["output"]),
            Measured(**row["arrivals"]) if "arrivals" in row else None,
            row.get("note", ""),
        )
        for name, row in rows.items()
    }


def _text() -> str:
    return resources.files("servegym.envs.data").joinpath("workloads.json").read_text("utf-8")


def _marginal(row: dict[str, Any]) -> Marginal:
    return Marginal(np.array(row["quantiles"], np.float64), row["mean"], row["std"])


FIGURES: Final = _read_figures()
"""Published figures by the name of their preset."""


def figures_text(name: str) -> str:
    """Return the figures of a preset as a text that changes when they do."""
    return json.dumps(json.loads(_text())["presets"][name], sort_keys=True)
