"""A task's configuration: frozen dataclasses that cannot be built wrong.

Every key has a documented default; CONTRIBUTING shows an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from servegym.envs.arguments import as_annotated, field_types
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.machine.costs import CostModel
from servegym.envs.machine.presets import cost_preset
from servegym.envs.task.building import build, cost_model, mixed_cost
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.sections import InformationConfig, ProcessConfig, WorkloadConfig
from servegym.envs.task.slo import SloConfig


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
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    information: InformationConfig = field(default_factory=InformationConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    slo: SloConfig = field(default_factory=SloConfig)

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
