"""``[workload]``, ``[information]`` and ``[process]`` of a task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from servegym.envs.arguments import check_fields
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.task.cluster import check_whole
from servegym.envs.vocabulary import (
    ADMISSION_RULES,
    EXPECTATIONS,
    OBSERVATION_BLOCKS,
    REWARDS,
    STEALS,
    USUAL_RULES,
)
from servegym.envs.workload.arrivals import MAX_ARRIVAL_RATE_PER_S, Arrivals
from servegym.envs.workload.comparison import COMPARISONS
from servegym.envs.workload.predictors import PREDICTOR_NAMES
from servegym.envs.workload.presets import WORKLOAD_PRESETS
from servegym.envs.workload.requests import MAX_REQUESTS
from servegym.envs.workload.sources import (
    WHOLE,
    check_arrival_rate,
    check_source,
    measured_arrivals,
)
from servegym.envs.workload.windows import TraceWindow


@dataclass(frozen=True)
class WorkloadConfig:
    """``[workload]``: the requests; TRAFFIC.md has the exact rules.

    Examples
    --------
    >>> WorkloadConfig(source="gsm8k-lognormal", requests=100).requests
    100
    """

    source: str = "gsm8k-lognormal"
    """A preset (see ``WORKLOAD_PRESETS``) or the path of a workload file (see ``read_trace``)."""
    requests: int = 1319
    """How many requests a preset samples; a file brings its own."""
    arrival_rate_per_s: float = 0.0
    """Poisson arrivals per second, in place of those of a file; 0: the file's own, of a preset all at
    t = 0. Else high enough that they have arrived within 10⁹ s, and at most 10⁹."""
    arrivals: Arrivals | None = None
    """Another process that draws arrivals, in place of a rate; what it leaves out is as measured on the
    preset or in the file."""
    trace: TraceWindow = WHOLE
    """Which part of a file is played, and how fast."""

    def __post_init__(self) -> None:
        check_fields("workload", self)
        check_source(self.source)
        check_whole("workload.requests", self.requests, 1, MAX_REQUESTS)
        if self.source in WORKLOAD_PRESETS:
            check_arrival_rate(self.requests, self.arrival_rate_per_s)
        elif not 0 <= self.arrival_rate_per_s <= MAX_ARRIVAL_RATE_PER_S:  # of a file not yet read
            raise ServegymError(
                f"workload.arrival_rate_per_s must lie in 0 … {MAX_ARRIVAL_RATE_PER_S:g}, got "
                f"{self.arrival_rate_per_s}"
            )
        if self.arrivals is not None and self.arrival_rate_per_s != 0:
            raise ServegymError(
                "workload has both arrivals and arrival_rate_per_s, which is short for "
                f"arrivals = {{rate_per_s = {self.arrival_rate_per_s}}}; give one of them"
            )
        named = self.arrivals is not None and self.arrivals.names_rate
        if self.trace.rate_scale != 1 and (named or self.arrival_rate_per_s > 0):
            raise ServegymError(
                f"workload.trace.rate_scale {self.trace.rate_scale} has nothing to scale: the task names "
                "the rate of its arrivals"
            )
        if self.source in WORKLOAD_PRESETS:
            if self.arrivals is not None:
                measured = measured_arrivals(self.source)
                self.arrivals.with_defaults(measured, self.source).check(self.requests)
            if self.trace != WHOLE:
                raise ServegymError(
                    f"workload.trace is for files; workload.source {self.source!r} is a preset"
                )

    @property
    def draws_arrivals(self) -> bool:
        """Whether arrival times are drawn: requests are not present at t = 0."""
        return self.arrival_rate_per_s > 0 or self.arrivals is not None


@dataclass(frozen=True)
class InformationConfig:
    """``[information]``: what the scheduler knows.

    Examples
    --------
    >>> InformationConfig(output_lengths="predicted", kendall_tau=0.7).compare_by
    'mean'
    """

    output_lengths: Literal["known", "predicted", "unknown"] = "known"
    """``known`` in advance, as in the paper; ``predicted``: each request's mean and spread; or
    ``unknown``: only the workload's. The lower bound is always that of true lengths."""
    predictor: str = "calibrated"
    """Who predicts: ``calibrated``, a preset of ``PREDICTORS``, or ``column``, the workload's own
    ``predicted_output_tokens``, of a file or of ``gsm8k-mixed``. Without meaning unless lengths are
    ``predicted``."""
    kendall_tau: float = 0.55
    """Rank correlation of the ``calibrated`` predictor with the truth, 0 … 1."""
    compare_by: str = "mean"
    """What makes one waiting request longer than another where lengths are uncertain: its ``mean``, a
    ``quantile``, or ``mean-sd``, the mean plus some standard deviations."""
    quantile: float = 0.99
    """Of ``compare_by = "quantile"``, > 0 and < 1."""
    deviations: float = 1.0
    """Standard deviations of ``compare_by = "mean-sd"``, 0 … 100."""
    expect: str = "mean"
    """What is expected of an uncertain output when its request comes: its ``mean``, or the ``lower`` or
    ``upper`` end of the interval where it lies with probability ``interval``. Whoever goes beyond an end is
    expected to finish with its next token. Offline plans go by the mean."""
    interval: float = 0.9
    """Of ``expect = "lower"`` and ``"upper"``, > 0 and < 1."""

    def __post_init__(self) -> None:
        check_fields("information", self)
        if self.predictor not in PREDICTOR_NAMES:
            raise unknown("predictor", self.predictor, PREDICTOR_NAMES)
        if not 0 <= self.kendall_tau <= 1:
            raise ServegymError(
                f"information.kendall_tau must lie in 0 … 1, got {self.kendall_tau}"
            )
        if self.compare_by not in COMPARISONS:
            raise unknown("value of information.compare_by:", self.compare_by, COMPARISONS)
        if not 0 < self.quantile < 1:
            raise ServegymError(
                f"information.quantile must lie between 0 and 1, got {self.quantile}"
            )
        if not 0 <= self.deviations <= 100:
            raise ServegymError(
                f"information.deviations must lie in 0 … 100, got {self.deviations}"
            )
        if self.expect not in EXPECTATIONS:
            raise unknown("value of information.expect:", self.expect, EXPECTATIONS)
        if not 0 < self.interval < 1:
            raise ServegymError(
                f"information.interval must lie between 0 and 1, got {self.interval}"
            )


@dataclass(frozen=True)
class ProcessConfig:
    """``[process]``: the decision process.

    Examples
    --------
    >>> ProcessConfig(rules=("fcfs", "longest"), decisions="rounds").reward
    'gap'
    """

    rules: tuple[str, ...] = USUAL_RULES
    """Admission rules on offer: action 1 + k prefills under the k-th."""
    mixed_rules: tuple[str, ...] = ("fcfs",)
    """Admission rules of mixed stages, whose actions come behind; without meaning where
    ``cluster.chunk_tokens`` is 0."""
    caps: tuple[float, ...] = (1.0,)
    """Shares of a replica's clients up to which it may admit, > 0: every rule is on offer with each. Some
    action must offer all clients: 1."""
    reserves: tuple[float, ...] = (0.0,)
    """Shares of a replica's memory that admission leaves free while others run, < 1: every rule is on
    offer with each, also with 0. The watermark is left free in any case."""
    pads: tuple[float, ...] = ()
    """Weights ``pad`` of the rule ``scored``, ≥ 0: it is on offer with each, and with the plan's own."""
    steals: tuple[str, ...] = ()
    """What a replica with idle clients may take from another, whose actions come last: ``waiting``
    requests, and ``running`` ones. Replicas then need queues of their own."""
    decisions: Literal["events", "rounds"] = "events"
    """Ask where the choice has changed (a finish, an arrival), or at every decode round."""
    observe: tuple[str, ...] = ("replica",)
    """Blocks of the observation, ``replica``, ``memory``, ``cluster`` and ``latency``; it holds them in this
    order, whatever the order in which they are named."""
    reward: str = "gap"
    """``gap`` (the return is minus the gap in percent), ``latency`` (minus mean latency, s) or ``goodput``
    (the number of requests that met ``[slo]``)."""
    max_decisions: int = 0
    """Truncate after so many decisions; 0: never."""
    max_seconds: float = 0.0
    """Truncate when the simulated clock has passed this; 0: never."""

    def __post_init__(self) -> None:
        check_fields("process", self)
        _check_named("rules", self.rules, "rule", 1)
        _check_named("mixed_rules", self.mixed_rules, "rule", 1)
        _check_known("admission rule", (*self.rules, *self.mixed_rules), ADMISSION_RULES)
        for name, shares, needed in (("caps", self.caps, 1.0), ("reserves", self.reserves, 0.0)):
            if len(set(shares)) != len(shares) or needed not in shares:
                raise ServegymError(f"process.{name} must hold {needed:g}, and each share once")
        if not all(0 < cap <= 1 for cap in self.caps):
            raise ServegymError(f"process.caps must be > 0 and at most 1, got {list(self.caps)}")
        if not all(0 <= reserve < 1 for reserve in self.reserves):
            raise ServegymError(f"process.reserves must be ≥ 0 and < 1, got {list(self.reserves)}")
        if not all(0 <= pad <= 1e12 for pad in self.pads) or len(set(self.pads)) < len(self.pads):
            raise ServegymError(
                f"process.pads must lie in 0 … 1e12, each once, got {list(self.pads)}"
            )
        if self.pads and "scored" not in (*self.rules, *self.mixed_rules):
            raise ServegymError(
                "process.pads belongs to the rule 'scored'; name that in process.rules"
            )
        _check_named("steals", self.steals, "kind", 0)
        _check_known("value of process.steals:", self.steals, STEALS)
        _check_named("observe", self.observe, "block", 1)
        _check_known("block of process.observe:", self.observe, OBSERVATION_BLOCKS)
        blocks = tuple(block for block in OBSERVATION_BLOCKS if block in self.observe)
        object.__setattr__(self, "observe", blocks)
        if self.reward not in REWARDS:
            raise unknown("reward", self.reward, REWARDS)
        check_whole("process.max_decisions", self.max_decisions, 0, 10**12)
        if not 0 <= self.max_seconds < np.inf:
            raise ServegymError(f"process.max_seconds must be ≥ 0, got {self.max_seconds}")


def _check_named(key: str, names: tuple[str, ...], each: str, least: int) -> None:
    """Refuse too few names, and one that stands twice."""
    if len(names) < least or len(set(names)) != len(names):
        raise ServegymError(
            f"process.{key} must name at least one {each}, each once"
            if least
            else f"process.{key} must name each {each} once"
        )


def _check_known(what: str, names: Iterable[str], choices: Iterable[str]) -> None:
    for name in names:
        if name not in choices:
            raise unknown(what, name, choices)
