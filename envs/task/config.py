"""A task's configuration: frozen dataclasses that cannot be built wrong.

Every key has a documented default; CONTRIBUTING shows an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.arguments import as_annotated, check_fields, field_types
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.machine.costs import CostModel
from servegym.envs.machine.presets import cost_preset
from servegym.envs.task.building import build, cost_model, mixed_cost
from servegym.envs.task.cluster import ClusterConfig, check_whole
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
from servegym.envs.workload.requests import EVERYBODY, MAX_REQUESTS, Requests
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
        if not self.rules or len(set(self.rules)) != len(self.rules):
            raise ServegymError("process.rules must name at least one rule, each once")
        if not self.mixed_rules or len(set(self.mixed_rules)) != len(self.mixed_rules):
            raise ServegymError("process.mixed_rules must name at least one rule, each once")
        for rule in (*self.rules, *self.mixed_rules):
            if rule not in ADMISSION_RULES:
                raise unknown("admission rule", rule, ADMISSION_RULES)
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
        if len(set(self.steals)) != len(self.steals):
            raise ServegymError("process.steals must name each kind once")
        for kind in self.steals:
            if kind not in STEALS:
                raise unknown("value of process.steals:", kind, STEALS)
        if not self.observe or len(set(self.observe)) != len(self.observe):
            raise ServegymError("process.observe must name at least one block, each once")
        for block in self.observe:
            if block not in OBSERVATION_BLOCKS:
                raise unknown("block of process.observe:", block, OBSERVATION_BLOCKS)
        blocks = tuple(block for block in OBSERVATION_BLOCKS if block in self.observe)
        object.__setattr__(self, "observe", blocks)
        if self.reward not in REWARDS:
            raise unknown("reward", self.reward, REWARDS)
        check_whole("process.max_decisions", self.max_decisions, 0, 10**12)
        if not 0 <= self.max_seconds < np.inf:
            raise ServegymError(f"process.max_seconds must be ≥ 0, got {self.max_seconds}")


@dataclass(frozen=True)
class ClassSlo:
    """``[[slo.classes]]``: limits of one class of requests in the place of those of all.

    Examples
    --------
    >>> ClassSlo("batch", ttft_s=60.0).tpot_s is None
    True
    """

    name: str = ""
    """As the workload's column ``class`` has it."""
    ttft_s: float | None = None
    """None: as ``slo.ttft_s``; inf: any."""
    tpot_s: float | None = None
    """None: as ``slo.tpot_s``; inf: any."""

    def __post_init__(self) -> None:
        check_fields("slo.classes", self)
        if not self.name or self.name == EVERYBODY:
            raise ServegymError(f"slo.classes.name must name a class, got {shown(self.name)}")
        for name in ("ttft_s", "tpot_s"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ServegymError(
                    f"slo.classes.{name} must be > 0 seconds, got {limit}; inf for no limit"
                )


@dataclass(frozen=True)
class SloConfig:
    """``[slo]``: what a request must meet to count for goodput (service level objectives).

    Examples
    --------
    >>> SloConfig(ttft_s=1.0).tpot_s is None
    True
    """

    ttft_s: float | None = None
    """Most seconds from its arrival to its first token, > 0; None or inf: any."""
    tpot_s: float | None = None
    """Most seconds per token after the first, on average, > 0; None or inf: any. A request of one token
    meets it."""
    classes: tuple[ClassSlo, ...] = ()
    """``[[slo.classes]]``: classes with limits of their own, each once."""

    def __post_init__(self) -> None:
        check_fields("slo", self)
        names = [own.name for own in self.classes]
        for name in names:
            if names.count(name) > 1:
                raise ServegymError(f"slo.classes must name each class once, got {name!r} twice")
        for name in ("ttft_s", "tpot_s"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ServegymError(
                    f"slo.{name} must be > 0 seconds, got {limit}; leave it out for no limit"
                )
            if limit == np.inf:
                object.__setattr__(self, name, None)

    @property
    def limits(self) -> tuple[float, float]:
        """Most seconds to the first token and per token after it; inf: any."""
        ttft_s, tpot_s = (
            np.inf if limit is None else limit for limit in (self.ttft_s, self.tpot_s)
        )
        return ttft_s, tpot_s

    def __bool__(self) -> bool:
        """Whether there is anything to meet."""
        own = any(each.ttft_s is not None or each.tpot_s is not None for each in self.classes)
        return self.ttft_s is not None or self.tpot_s is not None or own

    def limits_of(self, requests: Requests) -> NDArray[np.float64]:
        """Return the limits of each request, shape (requests, 2): its class's own, else those of all.

        Raises
        ------
        ServegymError
            If a class that has limits is none of the requests' classes, used or not.
        """
        limits = np.tile(self.limits, (len(requests), 1))
        for own in self.classes:
            if requests.class_of is None:
                raise ServegymError(
                    f"slo.classes has limits for {own.name!r}, but the workload has no classes; give it a "
                    "column 'class'"
                )
            if own.name not in requests.class_names:
                raise unknown("class in slo.classes:", own.name, requests.class_names)
            members = requests.class_of == requests.class_names.index(own.name)
            for place, limit in enumerate((own.ttft_s, own.tpot_s)):
                if limit is not None:
                    limits[members, place] = limit
        return limits


class Admission(NamedTuple):
    """An action that admits: by which rule, in which stage, within which limits."""

    rule: str
    mixed: bool
    cap: float
    reserve: float
    pad: float | None = None  # weight of the rule ``scored`` in the place of the plan's

    @property
    def name(self) -> str:
        """Its name among ``TaskConfig.actions``; limits that do not limit are left out."""
        cap = "" if self.cap == 1 else f":cap={self.cap:g}"
        reserve = "" if self.reserve == 0 else f":reserve={self.reserve:g}"
        pad = "" if self.pad is None else f":pad={self.pad:g}"
        return f"{'mixed' if self.mixed else 'prefill'}:{self.rule}{cap}{reserve}{pad}"


@dataclass(frozen=True)
class TaskConfig:
    """One task: what is served, on what, at what cost, and what may be decided.

    Examples
    --------
    >>> task = TaskConfig("mine", cluster=ClusterConfig(clients=50))
    >>> task.workload.requests
    1319
    """

    name: str
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    cost: CostModel = field(default_factory=lambda: cost_preset("llama2-70b-a100x4").costs)
    workload: WorkloadConfig = WorkloadConfig()
    information: InformationConfig = InformationConfig()
    process: ProcessConfig = ProcessConfig()
    slo: SloConfig = SloConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", as_annotated("name", self.name, str))
        for section, kind in field_types(TaskConfig).items():
            if isinstance(getattr(self, section), type):  # a class has a cost model's method, too
                wrong = getattr(self, section).__name__
                raise ServegymError(f"{section} must be an object, got the class {wrong}")
            if not isinstance(getattr(self, section), kind):
                raise ServegymError(
                    f"{section} must be a {kind.__name__}, got {shown(getattr(self, section))}"
                )

        self._check_moves()

    def _check_moves(self) -> None:
        """Refuse steals that can take nothing, and moves under a guard that has no rule for them."""
        cluster, steals = self.cluster, self.process.steals
        lacks = "cluster.replicas is 1" if cluster.replicas == 1 else "replicas share a pool"
        if steals and (cluster.replicas == 1 or cluster.router == "pool"):
            raise ServegymError(
                f"process.steals has nothing to steal from: {lacks}; leave it empty"
            )
        roles = {replica.role for replica in cluster.replica_tables()}
        moves = steals or roles != {"both"} or cluster.evict == "host"
        if moves and cluster.admission_guard == "sglang":
            raise ServegymError(
                "cluster.admission_guard 'sglang' has no rule for requests that move: leave out "
                "process.steals, roles and cluster.evict 'host', or choose the guard 'full'"
            )

    @property
    def actions(self) -> tuple[str, ...]:
        """What each action does: ``decode``, ``prefill:RULE``, ``mixed:RULE`` or ``steal:KIND``.

        Behind a rule may stand a cap or a reserve, as in ``prefill:fcfs:cap=0.5:reserve=0.1``, and behind
        ``scored`` a weight, as in ``prefill:scored:pad=1``. Where a replica has no request to decode,
        ``decode`` lets it wait.
        """
        steals = (f"steal:{kind}" for kind in self.process.steals)
        return ("decode", *(admission.name for admission in self.admissions), *steals)

    @property
    def admissions(self) -> tuple[Admission, ...]:
        """The actions that admit, in order: prefill stages, then mixed ones."""
        process = self.process
        mixed = process.mixed_rules if self.cluster.chunk_tokens > 0 else ()
        offers = [(rule, False) for rule in process.rules] + [(rule, True) for rule in mixed]
        return tuple(
            Admission(rule, is_mixed, cap, reserve, pad)
            for rule, is_mixed in offers
            for cap in process.caps
            for reserve in process.reserves
            for pad in (None, *(process.pads if rule == "scored" else ()))
        )


_SECTIONS: Final = {"cluster", "cost", "workload", "information", "process", "slo"}


def with_overrides(task: TaskConfig, sections: Mapping[str, Any]) -> TaskConfig:
    """Return ``task`` with keys replaced, given as ``{"cluster": {"clients": 50}, …}``.

    numpy's numbers, texts and arrays and paths are taken where Python's own are.

    Raises
    ------
    ServegymError
        If ``sections`` is not such a table, or a key or value is none that the task may have.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> with_overrides(TASKS["servegym/GSM8K-v0"], {"cluster": {"clients": 50}}).cluster.clients
    50
    """
    if not isinstance(sections, Mapping):
        raise ServegymError(
            f"overrides must be a table of sections, as {{'cluster': {{'clients': 50}}}}, "
            f"got {shown(sections)}"
        )
    check_mixed_once(sections)
    changed: dict[str, Any] = {}
    for section, values in sections.items():
        if section not in _SECTIONS:
            raise unknown("section", section, sorted(_SECTIONS))
        if not isinstance(values, Mapping):
            raise ServegymError(f"{section} must be a table of keys, got {shown(values)}")
        base = changed.get(section, getattr(task, section))
        if section != "cost":
            changed[section] = build(section, base, values)
            continue
        parts = {key: value for key, value in values.items() if key != "mixed"}
        changed["cost"] = cost_model(parts, base)
        if "mixed" in values:  # what a mixed stage costs stands with what it is
            cluster = changed.get("cluster", task.cluster)
            changed["cluster"] = replace(cluster, mixed=mixed_cost(values["mixed"]))
    return replace(task, **changed)


def check_mixed_once(sections: Mapping[str, Any]) -> None:
    """Refuse ``cost.mixed`` beside ``cluster.mixed``: the two are one key."""
    holders = [sections.get(name) for name in ("cluster", "cost")]
    if all(isinstance(holder, Mapping) and "mixed" in holder for holder in holders):
        raise ServegymError(
            "cost.mixed and cluster.mixed are one key; leave out one of them", ("mixed",)
        )
