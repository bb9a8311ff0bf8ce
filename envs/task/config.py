"""A task's configuration: frozen dataclasses that cannot be built wrong, and their TOML form.

Every key has a documented default; CONTRIBUTING shows an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from servegym.envs.arguments import as_annotated, check_fields, field_types
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    CostModel,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from servegym.envs.machine.presets import cost_preset
from servegym.envs.vocabulary import (
    ADMISSION_GUARDS,
    ADMISSION_RULES,
    MIXED_COSTS,
    OBSERVATION_BLOCKS,
    REWARDS,
    ROUTERS,
    VICTIMS,
)
from servegym.envs.workload.comparison import COMPARISONS
from servegym.envs.workload.predictors import PREDICTOR_NAMES
from servegym.envs.workload.presets import (
    MAX_ARRIVAL_RATE_PER_S,
    WORKLOAD_PRESETS,
    check_arrival_rate,
    check_source,
)
from servegym.envs.workload.requests import MAX_REQUESTS

MAX_CLIENTS: Final = 1_000_000
MAX_REPLICAS: Final = 4096


def _check_whole(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ServegymError(
            f"{name} must be a whole number in {least} … {most}, got {shown(value)}"
        )


@dataclass(frozen=True)
class ReplicaConfig:
    """``[[cluster.replica]]``: in what one replica differs from the others.

    Examples
    --------
    >>> ReplicaConfig(speed=2.0).clients is None
    True
    """

    clients: int | None = None
    """Its concurrency slots; None: as ``cluster.clients``."""
    kv_capacity_tokens: int | None = None
    """Its memory; None: as ``cluster.kv_capacity_tokens``."""
    speed: float = 1.0
    """Its stages take the cost model's seconds divided by this, 1e-6 … 1e6."""

    def __post_init__(self) -> None:
        check_fields("cluster.replica", self)
        if self.clients is not None:
            _check_whole("cluster.replica.clients", self.clients, 1, MAX_CLIENTS)
        if self.kv_capacity_tokens is not None:
            _check_whole("cluster.replica.kv_capacity_tokens", self.kv_capacity_tokens, 0, 10**12)
        if not 1e-6 <= self.speed <= 1e6:
            raise ServegymError(f"cluster.replica.speed must lie in 1e-6 … 1e6, got {self.speed}")


class FullReplica(NamedTuple):
    """All numbers of one replica."""

    clients: int
    kv_capacity_tokens: int
    speed: float


@dataclass(frozen=True)
class ClusterConfig:
    """``[cluster]``: the machines.

    Examples
    --------
    >>> ClusterConfig(clients=50).clients
    50
    """

    replicas: int = 1
    """Copies of the model, 1 … 4,096."""
    clients: int = 200
    """Concurrency slots of a replica, 1 … 1,000,000."""
    kv_capacity_tokens: int = 0
    """Tokens whose keys and values a replica's memory holds; 0: not limiting."""
    kv_block_tokens: int = 1
    """Tokens of one block of that memory, 1 … 65,536: a request holds whole blocks. 16 is vLLM's."""
    watermark: float = 0.0
    """Share of the blocks that admission leaves free while others run, ≥ 0 and < 1."""
    preempt: str = "newest"
    """Who gives up its memory when a decode round does not fit: the ``newest`` admitted, who has
    ``least-computed`` tokens, or the ``fewest-output`` tokens; of equals the newest."""
    admission_guard: str = "none"
    """``none``: a prompt must fit now; ``full``: so must the whole expected outputs of all who run;
    ``peak``: memory must hold all who run at every expected finish."""
    chunk_tokens: int = 0
    """Token budget of a mixed stage, which cuts prompts to what decoding clients leave of it; 0: no
    mixed stages."""
    mixed: str = "one-pass"
    """What a mixed stage costs: ``one-pass`` of the weights for all tokens, or the ``sum`` of a prefill
    part and a decode part, as some simulators have it."""
    max_prefill_tokens: int = 0
    """Token budget of one prefill stage; 0: none. A stage always admits at least one request."""
    router: str = "round-robin"
    """Which replica a request goes to when it arrives, see ``ROUTERS``; ``pool``: one queue for all."""
    staleness_s: float = 0.0
    """For how long a router goes by what it has seen of the replicas."""
    replica: tuple[ReplicaConfig, ...] = ()
    """``[[cluster.replica]]``: what differs, one table per replica; none: all are equal."""

    def __post_init__(self) -> None:
        check_fields("cluster", self)
        _check_whole("cluster.clients", self.clients, 1, MAX_CLIENTS)
        _check_whole("cluster.replicas", self.replicas, 1, MAX_REPLICAS)
        _check_whole("cluster.kv_capacity_tokens", self.kv_capacity_tokens, 0, 10**12)
        _check_whole("cluster.kv_block_tokens", self.kv_block_tokens, 1, 65_536)
        _check_whole("cluster.chunk_tokens", self.chunk_tokens, 0, 10**12)
        _check_whole("cluster.max_prefill_tokens", self.max_prefill_tokens, 0, 10**12)
        if not 0 <= self.watermark < 1:
            raise ServegymError(f"cluster.watermark must be ≥ 0 and < 1, got {self.watermark}")
        if not 0 <= self.staleness_s <= 1e9:
            raise ServegymError(f"cluster.staleness_s must lie in 0 … 1e9, got {self.staleness_s}")
        for key, value, names in (
            ("preempt", self.preempt, VICTIMS),
            ("admission_guard", self.admission_guard, ADMISSION_GUARDS),
            ("mixed", self.mixed, MIXED_COSTS),
            ("router", self.router, ROUTERS),
        ):
            if value not in names:
                raise unknown(f"value of cluster.{key}:", value, names)
        if self.replica and len(self.replica) != self.replicas:
            raise ServegymError(
                f"cluster.replicas is {self.replicas}, but there are {len(self.replica)} tables "
                "[[cluster.replica]]; give one for each replica or none"
            )
        total = sum(replica.clients for replica in self.replica_tables())
        if total > MAX_CLIENTS:
            raise ServegymError(
                f"all replicas together may have {MAX_CLIENTS} clients, got {total}"
            )
        for k, full in enumerate(self.replica_tables()):
            if 0 < full.kv_capacity_tokens < self.kv_block_tokens:
                own = bool(self.replica) and self.replica[k].kv_capacity_tokens is not None
                raise ServegymError(
                    f"cluster.{f'replica[{k}].' if own else ''}kv_capacity_tokens must be 0 or hold a "
                    f"block of {self.kv_block_tokens} tokens (cluster.kv_block_tokens), got "
                    f"{full.kv_capacity_tokens}"
                )

    @property
    def all_clients(self) -> int:
        """Clients of all replicas together: as many planned queues as a plan has."""
        return sum(replica.clients for replica in self.replica_tables())

    @property
    def is_batch_machine(self) -> bool:
        """Whether it is one replica without a memory limit and mixed stages, which exact methods know."""
        unlimited = all(replica.kv_capacity_tokens == 0 for replica in self.replica_tables())
        return self.replicas == 1 and unlimited and self.chunk_tokens == 0

    def replica_tables(self) -> tuple[FullReplica, ...]:
        """Return each replica's own numbers, with the cluster's in the place of what it leaves out."""
        tables = self.replica or (ReplicaConfig(),) * self.replicas
        return tuple(
            FullReplica(
                self.clients if table.clients is None else table.clients,
                self.kv_capacity_tokens
                if table.kv_capacity_tokens is None
                else table.kv_capacity_tokens,
                table.speed,
            )
            for table in tables
        )


@dataclass(frozen=True)
class WorkloadConfig:
    """``[workload]``: the requests.

    Examples
    --------
    >>> WorkloadConfig(source="gsm8k-lognormal", requests=100).requests
    100
    """

    source: str = "gsm8k-lognormal"
    """A preset (see ``WORKLOAD_PRESETS``) or the path of a CSV file."""
    requests: int = 1319
    """How many requests a preset samples; a CSV file brings its own."""
    arrival_rate_per_s: float = 0.0
    """Poisson arrivals of a preset per second; 0: all requests are present at t = 0. Else high enough
    that they have arrived within 10⁹ s, and at most 10⁹."""

    def __post_init__(self) -> None:
        check_fields("workload", self)
        check_source(self.source)
        _check_whole("workload.requests", self.requests, 1, MAX_REQUESTS)
        if self.source in WORKLOAD_PRESETS:
            check_arrival_rate(self.requests, self.arrival_rate_per_s)
        elif not 0 <= self.arrival_rate_per_s <= MAX_ARRIVAL_RATE_PER_S:  # without meaning there
            raise ServegymError(
                f"workload.arrival_rate_per_s must lie in 0 … {MAX_ARRIVAL_RATE_PER_S:g}, got "
                f"{self.arrival_rate_per_s}"
            )


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


@dataclass(frozen=True)
class ProcessConfig:
    """``[process]``: the decision process.

    Examples
    --------
    >>> ProcessConfig(rules=("fcfs", "longest"), decisions="rounds").reward
    'gap'
    """

    rules: tuple[str, ...] = ADMISSION_RULES
    """Admission rules on offer: action 1 + k prefills under the k-th."""
    mixed_rules: tuple[str, ...] = ("fcfs",)
    """Admission rules of mixed stages, whose actions come behind; without meaning where
    ``cluster.chunk_tokens`` is 0."""
    decisions: Literal["events", "rounds"] = "events"
    """Ask where the choice has changed (a finish, an arrival), or at every decode round."""
    observe: tuple[str, ...] = ("replica",)
    """Blocks of the observation, ``replica``, ``memory`` and ``cluster``; it holds them in this order,
    whatever the order in which they are named."""
    reward: str = "gap"
    """``gap`` (the return is minus the gap in percent) or ``latency`` (minus mean latency, s)."""
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
        if not self.observe or len(set(self.observe)) != len(self.observe):
            raise ServegymError("process.observe must name at least one block, each once")
        for block in self.observe:
            if block not in OBSERVATION_BLOCKS:
                raise unknown("block of process.observe:", block, OBSERVATION_BLOCKS)
        blocks = tuple(block for block in OBSERVATION_BLOCKS if block in self.observe)
        object.__setattr__(self, "observe", blocks)
        if self.reward not in REWARDS:
            raise unknown("reward", self.reward, REWARDS)
        _check_whole("process.max_decisions", self.max_decisions, 0, 10**12)
        if not 0 <= self.max_seconds < np.inf:
            raise ServegymError(f"process.max_seconds must be ≥ 0, got {self.max_seconds}")


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
    cluster: ClusterConfig = ClusterConfig()
    cost: CostModel = field(default_factory=lambda: cost_preset("llama2-70b-a100x4").costs)
    workload: WorkloadConfig = WorkloadConfig()
    information: InformationConfig = InformationConfig()
    process: ProcessConfig = ProcessConfig()

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

    @property
    def actions(self) -> tuple[str, ...]:
        """What each action does: ``decode``, ``prefill:RULE`` or ``mixed:RULE``."""
        mixed = self.process.mixed_rules if self.cluster.chunk_tokens > 0 else ()
        return (
            "decode",
            *(f"prefill:{rule}" for rule in self.process.rules),
            *(f"mixed:{rule}" for rule in mixed),
        )


_COST_MODELS: Final = {
    "affine": (AffineDecode, AffinePrefill),
    "table": (TableDecode, AffinePrefill),
    "levelled": (AffineDecode, LevelledPrefill),
}
"""``[cost] model``: the classes of its ``decode`` and ``prefill`` tables."""

_SECTIONS: Final = {"cluster", "cost", "workload", "information", "process"}


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
    changed: dict[str, Any] = {}
    for section, values in sections.items():
        if section not in _SECTIONS:
            raise unknown("section", section, sorted(_SECTIONS))
        if not isinstance(values, Mapping):
            raise ServegymError(f"{section} must be a table of keys, got {shown(values)}")
        if section == "cost":
            changed["cost"] = _cost_model(values, task.cost)
        else:
            changed[section] = _build(section, getattr(task, section), values)
    return replace(task, **changed)


@contextmanager
def _blaming(*key: str) -> Iterator[None]:
    """Name the key to blame in errors that do not name one themselves."""
    try:
        yield
    except ServegymError as error:
        error.key = error.key or key
        raise


def _cost_model(values: Mapping[str, Any], base: CostModel) -> CostModel:
    """Build ``[cost]``: a preset and what replaces parts of it, or a model given in full."""
    known = ("preset", "model", "decode", "prefill", "engine_overhead")
    for key in values:
        if key not in known:
            options = [f"cost.{name}" for name in known]
            raise ServegymError(str(unknown("key", f"cost.{key}", options)), (key,))
    costs = base
    if "preset" in values:
        with _blaming("preset"):
            costs = cost_preset(as_annotated("cost.preset", values["preset"], str)).costs
    if not values:
        return base
    if not isinstance(costs, StageCosts):
        raise ServegymError(
            f"the parts of a {type(costs).__name__} are not servegym's to change; name a cost.preset"
        )
    if "model" in values:
        with _blaming("model"):
            costs = _replace_parts(values, costs)
    elif "decode" in values or "prefill" in values:
        raise ServegymError(f"cost.model is missing; choose from {', '.join(_COST_MODELS)}")
    if "engine_overhead" in values:
        with _blaming("engine_overhead"):
            table = values["engine_overhead"]
            overhead = _build("cost.engine_overhead", costs.engine_overhead, table)
            costs = replace(costs, engine_overhead=overhead)
    return costs


def _replace_parts(values: Mapping[str, Any], costs: StageCosts) -> StageCosts:
    """Replace ``decode`` and ``prefill`` by those of the model that ``values`` names."""
    model = as_annotated("cost.model", values["model"], str)
    if model not in _COST_MODELS:
        raise unknown("cost model", model, _COST_MODELS)
    for part, cls in zip(("decode", "prefill"), _COST_MODELS[model], strict=True):
        if part in values:
            with _blaming(part):
                costs = replace(costs, **{part: _build(f"cost.{part}", cls, values[part])})
        elif not isinstance(getattr(costs, part), cls):
            raise ServegymError(f"cost.{part} is missing for model {model!r}")
    return costs


def _build(section: str, base: Any, values: Any) -> Any:
    """Make a dataclass from a table of keys; ``base`` is the class, or an instance to change."""
    cls = base if isinstance(base, type) else type(base)
    if not isinstance(values, Mapping):
        raise ServegymError(f"{section} must be a table of keys, got {shown(values)}")
    hints = field_types(cls)
    names = [item.name for item in fields(cls)]
    checked: dict[str, Any] = {}
    above = section.split(".")[1:]
    for key, value in values.items():
        with _blaming(*above, key):
            if key not in names:
                raise unknown("key", f"{section}.{key}", [f"{section}.{name}" for name in names])
            checked[key] = as_annotated(f"{section}.{key}", value, hints[key])
    try:
        with _blaming(*above, *(values if len(values) == 1 else ())):
            return replace(base, **checked) if not isinstance(base, type) else cls(**checked)
    except TypeError as error:
        missing = str(error).split("argument")[-1].lstrip("s: ")
        raise ServegymError(f"{section} lacks {missing}") from None
