"""Baseline policies: a trigger (when to prefill) paired with an admission rule (whom to admit)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from servegym.baselines import triggers
from servegym.baselines.planner import rebalanced_plan
from servegym.envs.errors import ServegymError
from servegym.envs.plan import Plan
from servegym.envs.policy import Briefing, Situation
from servegym.envs.simulator.loop import DECODE


@dataclass
class TriggerPolicy:
    """Prefill under one admission rule whenever a trigger fires.

    ``planned``: solve the offline bin packing first and hand the plan to the environment.
    """

    rule: str
    trigger: int
    parameter: float = 0.0
    every_round: bool = False
    planned: bool = False
    _action: int = field(default=DECODE, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.parameter) and self.parameter >= 0):
            raise ServegymError(f"a trigger's parameter must be ≥ 0, got {self.parameter}")

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Find the rule's action in this task; plan if the policy does."""
        rules = briefing.task.process.rules
        if self.rule not in rules:
            raise ServegymError(
                f"this policy admits by {self.rule!r}, which process.rules of "
                f"{briefing.task.name} leaves out; add it there"
            )
        self._action = 1 + rules.index(self.rule)
        if not self.planned or briefing.requests is None:
            return None
        clients = briefing.task.cluster.clients
        # By moves, not by the clock: the same episode on every machine.
        return rebalanced_plan(briefing.requests.decode_rounds, clients).plan

    def act(self, situation: Situation) -> int:
        """Return the rule's action where it is forced or the trigger fires, else decode."""
        mask = situation.mask
        if not mask[self._action]:
            return DECODE
        if not mask[DECODE]:
            return self._action
        fires = triggers.fires(self.trigger, self.parameter, situation.view)
        return self._action if fires else DECODE


@dataclass
class RandomPolicy:
    """A legal action chosen uniformly, from the briefing's random generator."""

    every_round: bool = False
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
