"""When requests arrive: processes that draw arrival times, and their parameters.

All are stationary in the long run with a mean of ``rate_per_s``, and begin at t = 0 with a gap (or in the
middle of a burst or a day), so that no request is present at t = 0. The gaps of ``gamma`` and ``weibull``
are independent, as BurstGPT (arXiv 2401.17644) and ServeGen (arXiv 2505.09999) describe them; a coefficient
of variation (cv) of 1 is Poisson, above 1 bursty. ``on-off`` is the two-state Markov-modulated Poisson
process (Fischer and Meier-Hellstern 1993). ``day`` is a Poisson process whose rate follows the time of day:
a sinusoid by thinning (Lewis and Shedler 1979), or shares of the period by inversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.special import gamma as gamma_function

from servegym.envs.arguments import check_fields
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.workload.requests import MAX_ARRIVAL_S

Generator = np.random.Generator
Seconds = NDArray[np.float64]

MAX_ARRIVAL_RATE_PER_S: Final = 1e9

MAX_SWITCHES: Final = 10_000_000
"""Most changes between burst and calm that an episode of ``on-off`` is expected to need."""

MAX_SHARES: Final = 10_000

PROCESSES: Final = {
    "poisson": "independent arrivals; rate_per_s",
    "gamma": "gaps are gamma distributed; rate_per_s, and cv or shape",
    "weibull": "gaps are Weibull distributed; rate_per_s, and cv or shape",
    "on-off": "bursts and calms of exponential length, Poisson in each; burst_rate_per_s, burst_s, calm_s, "
    "calm_rate_per_s (0)",
    "day": "the rate follows the time of day; rate_per_s, period_s (86400), start_s (0), and amplitude (0.5) "
    "with peak_s (the middle), or shares of equal parts of the period",
}
"""Arrival processes by name, with the keys that each takes and their defaults."""

_KEYS: Final = {
    "poisson": ("rate_per_s",),
    "gamma": ("rate_per_s", "cv", "shape"),
    "weibull": ("rate_per_s", "cv", "shape"),
    "on-off": ("burst_rate_per_s", "calm_rate_per_s", "burst_s", "calm_s"),
    "day": ("rate_per_s", "period_s", "start_s", "amplitude", "peak_s", "shares"),
}

_RANGES: Final = {
    "rate_per_s": (1e-9, MAX_ARRIVAL_RATE_PER_S),
    "cv": (0.01, 100.0),
    "shape": (1e-4, 1e4),
    "burst_rate_per_s": (1e-9, MAX_ARRIVAL_RATE_PER_S),
    "calm_rate_per_s": (0.0, MAX_ARRIVAL_RATE_PER_S),
    "burst_s": (1e-6, 1e9),
    "calm_s": (1e-6, 1e9),
    "period_s": (1e-3, 1e9),
    "start_s": (0.0, 1e9),
    "amplitude": (0.0, 1.0),
    "peak_s": (0.0, 1e9),
}
_WEIBULL_SHAPES: Final = (0.1, 200.0)


class Measured(NamedTuple):
    """Arrival statistics of a trace: what a process takes where a task leaves them out."""

    rate_per_s: float
    cv: float | None  # standard deviation / mean of the gaps; None: not published


@dataclass(frozen=True)
class Arrivals:
    """``workload.arrivals``: the process that draws arrival times.

    Raises
    ------
    ServegymError
        If a value is out of its range, a key is missing or has no meaning for the process.

    Examples
    --------
    >>> Arrivals("gamma", rate_per_s=2.0, cv=3.0).sample(4, np.random.default_rng(0)).round(2).tolist()
    [0.08, 0.08, 0.78, 0.83]
    """

    process: str = "poisson"
    """One of ``PROCESSES``."""
    rate_per_s: float | None = None
    """Mean arrivals per second, 1e-9 … 1e9; None: as measured, where the source brings a rate."""
    cv: float | None = None
    """Of ``gamma`` and ``weibull``: standard deviation / mean of the gaps, 0.01 … 100; None: by ``shape``, or
    as measured."""
    shape: float | None = None
    """In place of ``cv``, the distribution's shape: 1 is Poisson, less is bursty. ``gamma`` 1e-4 … 1e4,
    ``weibull`` 0.1 … 200."""
    burst_rate_per_s: float | None = None
    """Of ``on-off``: arrivals per second in a burst."""
    calm_rate_per_s: float | None = None
    """Of ``on-off``: arrivals per second between bursts; None: 0."""
    burst_s: float | None = None
    """Of ``on-off``: mean seconds of a burst."""
    calm_s: float | None = None
    """Of ``on-off``: mean seconds between bursts."""
    period_s: float | None = None
    """Of ``day``: seconds after which the curve repeats itself; None: 86,400."""
    start_s: float | None = None
    """Of ``day``: where on the curve the episode begins; None: 0."""
    amplitude: float | None = None
    """Of ``day``: the rate swings between 1 − this and 1 + this times the mean, 0 … 1; None: 0.5."""
    peak_s: float | None = None
    """Of ``day``: when in the period the rate is highest; None: in the middle."""
    shares: tuple[float, ...] = ()
    """Of ``day``, in place of a sinusoid: relative rates of equal parts of the period, as 24 hourly ones."""

    def __post_init__(self) -> None:
        check_fields(_NAME, self)
        if self.process not in PROCESSES:
            raise unknown(f"value of {_NAME}.process:", self.process, PROCESSES)
        given = [
            item.name for item in fields(self)[1:] if getattr(self, item.name) not in (None, ())
        ]
        for key in given:
            if key not in _KEYS[self.process]:
                takes = ", ".join(_KEYS[self.process])
                raise ServegymError(
                    f"{_NAME}.{key} has no meaning for {self.process!r}, which takes {takes}"
                )
            if key != "shares":
                self._check_range(key, *_RANGES[key])
        if self.cv is not None and self.shape is not None:
            raise ServegymError(f"{_NAME} has both cv and shape; give one of them")
        if self.process == "weibull" and self.shape is not None:
            self._check_range("shape", *_WEIBULL_SHAPES)
        if self.process == "on-off":
            for key in ("burst_rate_per_s", "burst_s", "calm_s"):
                if key not in given:
                    self._refuse_missing(key)
            if (self.calm_rate_per_s or 0.0) > (self.burst_rate_per_s or 0.0):
                raise ServegymError(
                    f"{_NAME}.calm_rate_per_s must be at most burst_rate_per_s {self.burst_rate_per_s}, got "
                    f"{self.calm_rate_per_s}"
                )
        self._check_day()

    def _check_range(self, key: str, least: float, most: float) -> None:
        value = getattr(self, key)
        if not least <= value <= most:
            raise ServegymError(f"{_NAME}.{key} must lie in {least:g} … {most:g}, got {value}")

    def _check_day(self) -> None:
        if self.peak_s is not None and self.peak_s > self.period:
            raise ServegymError(
                f"{_NAME}.peak_s must lie in the period, 0 … {self.period:g}, got {self.peak_s}"
            )
        if not self.shares:
            return
        if self.amplitude is not None or self.peak_s is not None:
            raise ServegymError(f"{_NAME} has both shares and a sinusoid; give one of them")
        if len(self.shares) > MAX_SHARES:
            raise ServegymError(
                f"{_NAME}.shares must hold at most {MAX_SHARES} parts, got {len(self.shares)}"
            )
        if not (all(0 <= share <= 1e9 for share in self.shares) and sum(self.shares) > 1e-9):
            raise ServegymError(
                f"{_NAME}.shares must lie in 0 … 1e9, not all 0, got {shown(list(self.shares))}"
            )

    @staticmethod
    def _refuse_missing(key: str, why: str = "") -> NoReturn:
        raise ServegymError(f"{_NAME}.{key} is missing{why}")

    @property
    def period(self) -> float:
        """Seconds of the curve of ``day``."""
        return 86_400.0 if self.period_s is None else self.period_s

    def with_defaults(self, measured: Measured | None, source: str) -> Arrivals:
        """Return the process with what it leaves out as ``measured`` on a source.

        Raises
        ------
        ServegymError
            If a rate or a cv is missing and the source brings none.
        """
        return _with_defaults(self, measured, source)

    @property
    def names_rate(self) -> bool:
        """Whether it says how many arrive per second, instead of taking what was measured."""
        return self.process == "on-off" or self.rate_per_s is not None

    @property
    def mean_rate_per_s(self) -> float:
        """Arrivals per second in the long run; of a process with all its defaults filled in."""
        if self.process != "on-off":
            if self.rate_per_s is None:
                self._refuse_missing("rate_per_s")
            return self.rate_per_s
        burst_rate, calm_rate, burst_s, calm_s = self._states()
        return (burst_rate * burst_s + calm_rate * calm_s) / (burst_s + calm_s)

    def check(self, requests: int) -> None:
        """Refuse a process by which ``requests`` requests may arrive after ``MAX_ARRIVAL_S``.

        The last of n arrivals comes after n / rate on average. Later than (n + 10·√(n·d) + 50·d) / rate,
        d the long-run variance of counts over their mean, plus the longest gap or calm, it comes in about
        one episode of 10²⁰.
        """
        rate = self.mean_rate_per_s
        spread, longest_s = 1.0, 0.0
        if self.process in ("gamma", "weibull"):
            spread = max(self._cv() ** 2, 1.0)
        if self.process == "weibull":
            shape = self._weibull_shape()
            most = (50.0 + math.log(requests)) ** (1.0 / shape)
            longest_s = most / (rate * float(gamma_function(1.0 + 1.0 / shape)))
        if self.process == "on-off":
            burst_rate, calm_rate, burst_s, calm_s = self._states()
            switches = 2.0 * requests / (burst_rate * burst_s + calm_rate * calm_s)
            if switches > MAX_SWITCHES:
                raise ServegymError(
                    f"{_NAME}: {requests} requests would take {switches:.3g} bursts and calms, more than "
                    f"{MAX_SWITCHES}; make them longer"
                )
            leave, come = 1.0 / burst_s, 1.0 / calm_s
            spread += (
                2.0 * (burst_rate - calm_rate) ** 2 * leave * come
                / ((leave + come) ** 2 * (burst_rate * come + calm_rate * leave))
            )  # fmt: skip
            longest_s = 50.0 * calm_s
        if self.process == "day":
            longest_s = self.period
        last_s = longest_s + (requests + 10.0 * math.sqrt(requests * spread) + 50.0 * spread) / rate
        if last_s > MAX_ARRIVAL_S:
            raise ServegymError(
                f"{_NAME}: {requests} requests at {rate:g} a second may arrive until {last_s:.3g} s, later "
                f"than {MAX_ARRIVAL_S:g} s; raise the rate"
            )

    def sample(self, requests: int, rng: Generator) -> Seconds:
        """Draw the arrival times of ``requests`` requests, in order; shape (requests,)."""
        return _SAMPLERS[self.process](self, requests, rng)

    def _states(self) -> tuple[float, float, float, float]:
        """Return the rates of burst and calm and their mean seconds."""
        values = (self.burst_rate_per_s, self.calm_rate_per_s or 0.0, self.burst_s, self.calm_s)
        assert None not in values  # checked when it was made
        return values  # type: ignore[return-value]

    def _cv(self) -> float:
        if self.cv is not None:
            return self.cv
        if self.shape is None:
            self._refuse_missing("cv")
        return self.shape**-0.5 if self.process == "gamma" else _weibull_cv(self.shape)

    def _weibull_shape(self) -> float:
        if self.shape is not None:
            return self.shape
        low, high = _WEIBULL_SHAPES
        for _ in range(100):  # until both are neighbours
            middle = math.sqrt(low * high)
            low, high = (middle, high) if _weibull_cv(middle) > self._cv() else (low, middle)
        return high


_NAME: Final = "workload.arrivals"


@lru_cache(maxsize=64)  # for every episode the same
def _with_defaults(process: Arrivals, measured: Measured | None, source: str) -> Arrivals:
    filled = process
    if process.process != "on-off" and process.rate_per_s is None:
        if measured is None:
            process._refuse_missing("rate_per_s", f": {source} brings no rate of its own")
        filled = replace(filled, rate_per_s=measured.rate_per_s)
    if process.process in ("gamma", "weibull") and process.cv is None and process.shape is None:
        if measured is None or measured.cv is None:
            process._refuse_missing("cv", f": {source} brings none of its own; give it or shape")
        filled = replace(filled, cv=measured.cv)
    return filled


def _weibull_cv(shape: float) -> float:
    mean = gamma_function(1.0 + 1.0 / shape)
    return math.sqrt(max(float(gamma_function(1.0 + 2.0 / shape) / mean**2) - 1.0, 0.0))


def _poisson(process: Arrivals, requests: int, rng: Generator) -> Seconds:
    return np.cumsum(rng.exponential(1.0 / process.mean_rate_per_s, requests))


def _gamma(process: Arrivals, requests: int, rng: Generator) -> Seconds:
    shape = process._cv() ** -2.0 if process.shape is None else process.shape
    return np.cumsum(rng.gamma(shape, 1.0 / (shape * process.mean_rate_per_s), requests))


def _weibull(process: Arrivals, requests: int, rng: Generator) -> Seconds:
    shape = process._weibull_shape()
    scale_s = 1.0 / (process.mean_rate_per_s * float(gamma_function(1.0 + 1.0 / shape)))
    return np.cumsum(scale_s * rng.weibull(shape, requests))


def _on_off(process: Arrivals, requests: int, rng: Generator) -> Seconds:
    """Invert the expected number of arrivals, a line of one slope in a burst and another between them.

    The state at t = 0 is drawn from the long run; exponential lengths need no other beginning.
    """
    burst_rate, calm_rate, burst_s, calm_s = process._states()
    wanted = np.cumsum(rng.exponential(1.0, requests))  # as many arrivals are expected until each
    bursting = bool(rng.random() < burst_s / (burst_s + calm_s))
    states = [(burst_rate, burst_s), (calm_rate, calm_s)]
    if not bursting:
        states.reverse()
    rates, means_s = (np.array(values) for values in zip(*states, strict=True))
    per_pair = float(rates @ means_s)
    ends_s, expected = [np.zeros(1)], [np.zeros(1)]
    while expected[-1][-1] < wanted[-1]:
        pairs = 16 + int(1.1 * (wanted[-1] - expected[-1][-1]) / per_pair)
        lengths_s = (rng.exponential(1.0, (pairs, 2)) * means_s).ravel()
        ends_s.append(ends_s[-1][-1] + np.cumsum(lengths_s))
        expected.append(expected[-1][-1] + np.cumsum(lengths_s * np.tile(rates, pairs)))
    return np.interp(wanted, np.concatenate(expected), np.concatenate(ends_s))


def _day(process: Arrivals, requests: int, rng: Generator) -> Seconds:
    return (_by_shares if process.shares else _by_thinning)(process, requests, rng)


def _by_shares(process: Arrivals, requests: int, rng: Generator) -> Seconds:
    """Invert the expected number of arrivals, a line of one slope in each part of the period."""
    period_s, start_s = process.period, (process.start_s or 0.0) % process.period
    shares = np.array(process.shares) / np.sum(process.shares)
    per_period = process.mean_rate_per_s * period_s
    expected = np.concatenate([[0.0], np.cumsum(shares)]) * per_period
    ends_s = np.linspace(0.0, period_s, len(shares) + 1)
    wanted = np.cumsum(rng.exponential(1.0, requests)) + np.interp(start_s, ends_s, expected)
    periods = np.floor(wanted / expected[-1])
    within = np.minimum(wanted - periods * expected[-1], expected[-1])
    times_s = periods * period_s + np.interp(within, expected, ends_s) - start_s
    return np.maximum.accumulate(np.maximum(times_s, 0.0))  # rounding apart they are in order


def _by_thinning(process: Arrivals, requests: int, rng: Generator) -> Seconds:
    """Draw at the highest rate; keep each arrival with the share that the rate has of it."""
    amplitude = 0.5 if process.amplitude is None else process.amplitude
    period_s = process.period
    peak_s = period_s / 2.0 if process.peak_s is None else process.peak_s
    offset_s = (process.start_s or 0.0) - peak_s
    most = process.mean_rate_per_s * (1.0 + amplitude)
    kept: list[Seconds] = []
    count, now_s = 0, 0.0
    while count < requests:
        tries = 64 + int(1.1 * (1.0 + amplitude) * (requests - count))
        times_s = now_s + np.cumsum(rng.exponential(1.0 / most, tries))
        height = 1.0 + amplitude * np.cos(2.0 * np.pi * (times_s + offset_s) / period_s)
        kept.append(times_s[rng.random(tries) * (1.0 + amplitude) < height])
        count, now_s = count + len(kept[-1]), float(times_s[-1])
    return np.concatenate(kept)[:requests]


_SAMPLERS: Final[dict[str, Callable[[Arrivals, int, Generator], Seconds]]] = {
    "poisson": _poisson,
    "gamma": _gamma,
    "weibull": _weibull,
    "on-off": _on_off,
    "day": _day,
}
