"""Baseline policies: a trigger (when to prefill) paired with an admission rule (what to admit)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from servegym.baselines.rules import triggers
from servegym.baselines.rules.plans import Planner
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.playing.policy import Briefing, Policy, Situation
from servegym.envs.simulator.events import DECODE
from servegym.envs.task.config import TaskConfig
from servegym.envs.vocabulary import STEALS
from servegym.envs.workload.plan import Plan


@dataclass
class TriggerPolicy:
    """Prefill under one admission rule whenever a trigger fires.

    Where the task lets a replica steal, it first steals whatever it may, waiting requests before running
    ones.

    Parameters
    ----------
    rule, trigger, parameter
        Whom to admit, when, and the trigger's one number.
    decisions
        Where the trigger is asked: ``rounds`` where it may fire between finishes; None: as the task says.
    planner
        Makes an offline plan, which is handed to the environment; None: no plan.
    comparison
        Keys of the task's ``[information]``: by what waiting requests are compared.
    mixed
        Admit in mixed stages, not in prefill stages.
    cluster
        Keys of the task's ``[cluster]`` that belong to the scheduler, as ``admission_guard``.
    steals
        What it steals of what the task lets it; None: all of that.
    memory, slo
        Prices of the Lagrangian trigger, see :func:`servegym.baselines.rules.triggers.priced`; 0: none.

    Examples
    --------
    >>> patient = TriggerPolicy("longest", triggers.THRESHOLD, 2.0)
    >>> from servegym.envs import TASKS, make_case, play
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> round(play(task, "patient", patient, make_case(task, 0), seed=0).row["gap"], 3)
    0.186
    """

    rule: str
    trigger: int
    parameter: float = 0.0
    decisions: Literal["events", "rounds"] | None = None
    planner: Planner | None = None
    comparison: Mapping[str, Any] = field(default_factory=dict)
    mixed: bool = False
    cluster: Mapping[str, Any] = field(default_factory=dict)
    steals: tuple[str, ...] | None = None
    memory: float = 0.0
    slo: float = 0.0
    _steals: tuple[int, ...] = field(default=(), init=False, repr=False)
    _action: int = field(default=DECODE, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.parameter) and self.parameter >= 0):
            raise ServegymError(f"a trigger's parameter must be ≥ 0, got {self.parameter}")
        for name in ("memory", "slo"):
            price = getattr(self, name)
            if not (np.isfinite(price) and price >= 0):
                raise ServegymError(f"a trigger's price of {name} must be ≥ 0, got {price}")
        if self.priced and self.trigger != triggers.LAGRANGIAN:
            raise ServegymError("only the Lagrangian trigger has prices of memory and slo")
        for kind in self.steals or ():
            if kind not in STEALS:
                raise unknown("value of steals:", kind, STEALS)

    @property
    def needs_mixed_stages(self) -> bool:
        """Whether the rule admits in mixed stages."""
        return self.mixed

    @property
    def priced(self) -> bool:
        """Whether its rule has a price of memory or of missed limits."""
        return self.memory > 0 or self.slo > 0

    @property
    def needed_rules(self) -> tuple[str, ...]:
        """``scored`` if it admits by it: few tasks offer it."""
        return (self.rule,) if self.rule == "scored" and not self.mixed else ()

    def takes(self, kind: str) -> bool:
        """Return whether it steals this kind where it may."""
        return self.steals is None or kind in self.steals

    def check_task(self, task: TaskConfig) -> None:
        """Refuse a task that lacks the rule."""
        if self._rule_action not in task.actions:
            key = "process.mixed_rules" if self.mixed else "process.rules"
            raise ServegymError(
                f"this policy admits by {self.rule!r}, which {key} of {task.name} leaves out; "
                "add it there"
            )

    @property
    def _rule_action(self) -> str:
        return f"{'mixed' if self.mixed else 'prefill'}:{self.rule}"

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Find the rule's action in this task; plan if the policy does."""
        task = briefing.task
        self.check_task(task)
        self._action = task.actions.index(self._rule_action)
        self._steals = tuple(
            task.actions.index(f"steal:{kind}")
            for kind in STEALS
            if kind in task.process.steals and self.takes(kind)
        )
        if self.planner is None or briefing.requests is None:
            return None
        return self.planner(briefing.requests, briefing)

    def act(self, situation: Situation) -> int:
        """Return what to steal; else the rule's action if it is forced or the trigger fires; else decode."""
        mask = situation.mask
        for action in self._steals:
            if mask[action]:
                return action
        if not mask[self._action]:
            return DECODE if mask[DECODE] else int(mask.argmax())  # another has begun a prompt
        if not mask[DECODE] or situation.view.active == 0:  # else decode means to wait
            return self._action
        if self.priced:
            seen, ahead = situation.view, situation.outlook()
            fires = triggers.priced(self.parameter, self.memory, self.slo, seen, ahead)
        else:
            fires = triggers.fires(self.trigger, self.parameter, situation.view)
        return self._action if fires else DECODE


@dataclass
class RandomPolicy(Policy):
    """A legal action chosen uniformly, from the briefing's random generator.

    Examples
    --------
    >>> from servegym.envs import TASKS, make_case, play
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> round(play(task, "random", RandomPolicy(), make_case(task, 0), seed=0).row["gap"], 3)
    0.47
    """

    _rng: np.random.Generator | None = field(default=None, init=False, repr=False)

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Take the episode's random generator."""
        self._rng = briefing.rng
        return None

    def act(self, situation: Situation) -> int:
        """Return one of the legal actions."""
        if self._rng is None:
            raise ServegymError("call prepare() before act()")
        return int(self._rng.choice(np.flatnonzero(situation.mask)))
