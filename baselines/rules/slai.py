"""SLAI: prompts as long as nobody who decodes misses the deadline of its next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from servegym.envs.errors import ServegymError
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.policy import Briefing, Policy, Situation
from servegym.envs.process.actions import Settings, apply
from servegym.envs.simulator.events import DECODE
from servegym.envs.simulator.seconds import decode_seconds
from servegym.envs.simulator.state import NOBODY, PREFILL
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.vocabulary import STEALS
from servegym.envs.workload.plan import Plan


@dataclass
class SlaiPolicy(Policy):
    """SLAI of Bari, Hegde and de Veciana (arXiv 2508.01002), read in its code (``agrimUT/SLAI``).

    There a decode waits until its last schedulable time: its last token plus the limit of the gap between
    tokens, less a share of the mean time of a batch. Until then prompts are computed, the shortest first;
    then whoever is due decodes, and prompts fill up the budget of tokens.

    Here all who decode do so together, so the one whose last token is oldest decides for all. At each round:

    1. Prefill, the shortest prompt first, if the stage and the round after it end within the limit after
       that token. The two are as long as the simulator says, in the place of a share of the mean.
    2. Else a mixed stage, in which all who decode get a token and prompts, or pieces, what is left of the
       budget: by ``mixed:shortest``, or ``mixed:fcfs`` where the task has no other.
    3. Else decode. Where nobody decodes, prefill.

    Left out: priority for paying users, and the two shares of the mean by how full memory is. On
    several replicas a request that arrives by a move counts as if it had emitted a token then.

    Parameters
    ----------
    gap_s
        The limit of the gap, > 0; None: ``slo.tpot_s`` of the task or of a class, the least, and without
        any no limit.

    Examples
    --------
    >>> from servegym.envs import TASKS, make_case, play
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> round(play(task, "slai", SlaiPolicy(5.0), make_case(task, 0), seed=0).row["gap"], 3)
    0.376
    """

    gap_s: float | None = None
    _limit_s: float = field(default=np.inf, init=False, repr=False)
    _steals: tuple[int, ...] = field(default=(), init=False, repr=False)
    _prefill: int = field(default=DECODE, init=False, repr=False)
    _mixed: int = field(default=DECODE, init=False, repr=False)
    _machine: tuple[CostTables, Settings] | None = field(default=None, init=False, repr=False)
    _tokens: dict[int, tuple[int, float]] = field(default_factory=dict, init=False, repr=False)
    """By replica: decode rounds when it was last asked, and when its oldest last token was emitted."""

    def __post_init__(self) -> None:
        if self.gap_s is not None and not self.gap_s > 0:
            raise ServegymError(f"gap_s must be > 0 seconds, got {self.gap_s}")

    @property
    def decisions(self) -> Literal["events", "rounds"]:
        """It looks at the deadlines at every round."""
        return "rounds"

    @property
    def cluster(self) -> Mapping[str, Any]:
        """The shortest prompt goes first."""
        return {"shortest_by": "prompt"}

    def check_task(self, task: TaskConfig) -> None:
        """Refuse a task that lacks the rule ``shortest``."""
        if "shortest" not in task.process.rules:
            raise ServegymError(
                f"this policy admits by 'shortest', which process.rules of {task.name} leaves "
                "out; add it there"
            )

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Find the actions and the limit in this task."""
        task = briefing.task
        self.check_task(task)
        machine = lower(task)
        self._machine, self._tokens = (machine.costs, machine.settings), {}
        own = [each.tpot_s for each in task.slo.classes if each.tpot_s is not None]
        self._limit_s = min([task.slo.limits[1], *own]) if self.gap_s is None else self.gap_s
        actions = task.actions
        self._prefill = actions.index("prefill:shortest")
        mixed = [name for name in ("mixed:shortest", "mixed:fcfs") if name in actions]
        self._mixed = actions.index(mixed[0]) if mixed else NOBODY
        self._steals = tuple(
            actions.index(f"steal:{kind}") for kind in STEALS if kind in task.process.steals
        )
        return None

    def act(self, situation: Situation) -> int:
        """Return what to steal; else a prefill that ends in time; else a mixed stage; else decode."""
        mask = situation.mask
        for action in self._steals:
            if mask[action]:
                return action
        if mask[self._prefill] and (
            not mask[DECODE] or situation.view.active == 0 or self._ends_in_time(situation)
        ):
            return self._prefill
        if self._mixed != NOBODY and mask[self._mixed]:
            return self._mixed
        return DECODE if mask[DECODE] else int(mask.argmax())

    def _ends_in_time(self, situation: Situation) -> bool:
        """Return whether a prefill stage now and the round after it keep the limit for all who decode."""
        if self._limit_s == np.inf:
            return True
        if self._machine is None:
            raise ServegymError("call prepare() before act()")
        costs, settings = self._machine
        state = situation.imagine()
        r = int(state.episodes[0].turn)
        replica = state.replicas[0, r]
        rounds, clock_s = int(replica.rounds), float(replica.clock_s)
        known, token_s = self._tokens.get(r, (NOBODY, clock_s))
        if rounds != known:  # else it has done nothing but prefill since it was last asked
            token_s = clock_s
        self._tokens[r] = rounds, token_s
        active, cached = int(replica.active), int(replica.cached_tokens)
        apply(state, costs, settings, 0, r, self._prefill)
        stage_s = float(replica.stage_s) if replica.stage == PREFILL else 0.0  # it may only fetch
        joined = int(replica.emitting)
        cached += int(replica.stage_tokens) + joined
        round_s = decode_seconds(costs, r, active + joined, cached, 1)
        return clock_s + stage_s + round_s <= token_s + self._limit_s
