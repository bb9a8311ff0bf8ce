"""Rollout: try a decision by finishing the episode in imagination, and take the best.

One-step policy improvement (Bertsekas, Tsitsiklis and Wu, 1997): each action is followed by a base
policy to the end of the episode as the scheduler believes it to be, in compiled code. It is
*fortified*: the best way to the end found so far is kept and followed until a better one is found, so
that with known lengths an episode never ends later than under the base policy.

The way to the end is a *schedule*: the base trigger with an admission rule and a parameter of its own
for each prefill stage to come. *Variations* change one of the next stages of the kept schedule at
random and replace it where they end earlier: a local search that each decision continues. Where the base
is an agent, its network goes on instead, see ``agents``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.lookahead.agents import AgentSearch, check_agent
from servegym.baselines.lookahead.sampled import Futures
from servegym.baselines.rules.compiled import (
    CompilablePolicy,
    CompiledPolicy,
    compile_policy,
    run_episode,
    take_turn,
)
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.baselines.rules.triggers import fires
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.jit import shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.policy import Briefing, Situation
from servegym.envs.process.actions import Settings, apply
from servegym.envs.simulator.events import DECODE, advance
from servegym.envs.simulator.imagination import copy_row, imagine_row
from servegym.envs.simulator.state import NOBODY, State, make_alike
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.vocabulary import ADMISSION_RULES, STEALS
from servegym.envs.workload.plan import Plan

RULES: Final = ("aligned", "longest")
"""Rules tried by default besides the base's own: on GSM8K-v0 the others' stages hardly ever win."""

FOLLOW: Final = -1
"""In the place of a first action: whatever the schedule does."""

USUAL_ERRORS: Final = 3.0
"""Standard errors that a sampled gain must exceed, unless a name says otherwise."""

_KINDS: Final = ("prefill", "mixed")  # of stages, as actions name them

# The local search's settings, from seeds 0 … 5 of GSM8K-v0; results hardly depend on them.
_STAGES_AHEAD: Final = 2  # a variation begins at one of so many next stages
_SPREAD: Final = 0.5  # standard deviation of the change of a parameter's logarithm
_RULE_SHARE: Final = 0.3  # of the variations, change a stage's rule
_ONWARD_SHARE: Final = 0.5  # of the variations, change the parameter of all later stages, too
_LEAST_GAIN: Final = 1e-9  # share of the makespan; less is rounding, and the kept schedule stays


class StageChoices(NamedTuple):
    """How to go on: what the k-th prefill stage of the episode admits by and waits for."""

    rules: NDArray[np.int64]  # (stages,) admission rule
    parameters: NDArray[np.float64]  # (stages,) of the trigger


@shared_kernel
def run_schedule(
    state: State, costs: CostTables, e: int, base: CompiledPolicy, schedule: StageChoices
) -> None:
    """Run row ``e`` to its end under the base trigger, as ``schedule`` says for each stage."""
    while True:
        r = advance(state, costs, e)
        if r == NOBODY:
            break
        stage = min(state.replicas[e, r].prefill_stages, schedule.rules.size - 1)
        rule, parameter = schedule.rules[stage], schedule.parameters[stage]
        policy = CompiledPolicy(
            rule,
            base.trigger,
            parameter,
            base.every_round,
            base.max_prefill_tokens,
            base.mixed,
            base.steals_waiting,
            base.steals_running,
            0.0,
            0.0,
            None,
        )
        take_turn(state, costs, e, r, policy)


@shared_kernel
def final_clock(
    imagined: State,
    costs: CostTables,
    settings: Settings,
    base: CompiledPolicy,
    schedule: StageChoices,
    first: int,
    scratch: State,
) -> float:
    """Return the clock at which row 0 ends if ``first`` is done now and the schedule goes on."""
    copy_row(imagined, 0, scratch, 0)
    if first != FOLLOW:
        apply(scratch, costs, settings, 0, scratch.episodes[0].turn, first)
    run_schedule(scratch, costs, 0, base, schedule)
    return float(scratch.episodes[0].now_s)


@shared_kernel
def action_values(
    state: State,
    costs: CostTables,
    settings: Settings,
    base: CompiledPolicy,
    e: int,
    mask: NDArray[np.bool_],
    scratch: State,
    t: int,
    values: NDArray[np.float64],
) -> None:
    """Write minus the gap in percent at which row ``e`` ends, for each action done now.

    The base policy goes on after it, in the episode as the scheduler believes it to be. ``mask`` and
    ``values`` have shape (actions,); an illegal action's value is −∞. Rows 2 · ``t`` and 2 · ``t`` + 1
    of ``scratch`` are overwritten.
    """
    bound_s = state.episodes[e].bound_s
    imagined, trial = 2 * t, 2 * t + 1
    imagine_row(state, costs, e, scratch, imagined)
    episode = scratch.episodes[imagined]
    ended = episode.finished + episode.rejected == episode.requests
    for action in range(mask.size):
        values[action] = -np.inf
        if not mask[action]:
            continue
        copy_row(scratch, imagined, scratch, trial)
        if not ended:
            apply(scratch, costs, settings, trial, scratch.episodes[trial].turn, action)
        run_episode(scratch, costs, trial, base)
        values[action] = 100.0 * (1.0 - scratch.episodes[trial].now_s / bound_s)


@dataclass
class RolloutPolicy:
    """The action that leads to the earliest end if ``base`` goes on, as the scheduler believes.

    Parameters
    ----------
    base
        The policy to improve on: one with a trigger, or an agent.
    variations
        Random changes of the kept schedule tried at each decision; 0: first actions only.
    rules
        Admission rules that are tried besides the base's own, where the task, or the agent, has them.
    budget_s
        Seconds after which a decision tries nothing more, checked before each trial; what is left
        is the best so far, or the kept schedule's own action. None: no limit. Only without a limit
        are results the same in every run.
    samples
        Where lengths are not known: futures that each decision draws from the beliefs, in which all legal
        first actions are played (``lookahead.sampled``); nothing is varied or kept then. 0, and where lengths
        are known: one future, of expected lengths. Only for one replica.
    errors
        With samples, standard errors by which a first action's mean gain must exceed 0 before it replaces
        the base's own.

    Examples
    --------
    >>> from servegym.baselines import make_trigger_policy
    >>> RolloutPolicy(make_trigger_policy("lpt"), variations=2).decisions is None
    True
    """

    base: CompilablePolicy
    variations: int = 0
    rules: tuple[str, ...] = RULES
    budget_s: float | None = None
    samples: int = 0
    errors: float = USUAL_ERRORS
    _briefing: Briefing | None = field(default=None, init=False, repr=False)
    _search: _Search | AgentSearch | None = field(default=None, init=False, repr=False)
    _futures: Futures | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.base, TriggerPolicy):
            check_agent(self.base)
            if self.samples > 0:
                raise ServegymError("a rollout by samples needs a rule as its base, not an agent")
        elif self.base.priced:
            raise ServegymError(
                "a rollout's base has no prices of memory or slo: imagined episodes have no limits to miss"
            )
        if self.variations < 0:
            raise ServegymError(f"a rollout's variations must be ≥ 0, got {self.variations}")
        for rule in self.rules:
            if rule not in ADMISSION_RULES:
                raise unknown("admission rule", rule, ADMISSION_RULES)
        if self.budget_s is not None and not self.budget_s >= 0:
            raise ServegymError(f"a rollout's budget must be ≥ 0 seconds, got {self.budget_s}")
        if self.samples < 0:
            raise ServegymError(f"a rollout's samples must be ≥ 0, got {self.samples}")
        if not 0 <= self.errors < np.inf:
            raise ServegymError(f"a rollout's errors must be ≥ 0 and finite, got {self.errors}")

    @property
    def decisions(self) -> Literal["events", "rounds"] | None:
        """Where the base wants to be asked."""
        return self.base.decisions

    @property
    def comparison(self) -> Mapping[str, Any]:
        """By what the base compares waiting requests."""
        return self.base.comparison

    @property
    def cluster(self) -> Mapping[str, Any]:
        """The guard that the base asks for."""
        return self.base.cluster

    @property
    def needed_rules(self) -> tuple[str, ...]:
        """The base's rule, where few tasks offer it."""
        return self.base.needed_rules

    def check_task(self, task: TaskConfig) -> None:
        """Refuse what the base refuses."""
        self.base.check_task(task)

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Forget the last episode's schedule; plan if the base does."""
        self._briefing, self._search, self._futures = briefing, None, None
        task = briefing.task
        if self.samples > 0 and task.information.output_lengths != "known":
            machine = lower(task)
            if len(machine.layout.clients) > 1:
                raise ServegymError(
                    f"a rollout's samples are for one replica, {task.name} has "
                    f"{len(machine.layout.clients)}; leave samples out"
                )
            base = compile_policy(self.base, task)
            self._futures = Futures(machine.costs, machine.settings, base, self.samples)
        return self.base.prepare(briefing)

    def act(self, situation: Situation) -> int:
        """Return the first action of the best way to the end that is found."""
        if self._briefing is None:
            raise ServegymError("call prepare() before act()")
        if self._futures is not None:
            return self._act_by_samples(situation, self._futures, self._briefing)
        deadline = np.inf if self.budget_s is None else perf_counter() + self.budget_s
        imagined = situation.imagine()
        if self._search is None:
            self._search = self._begin_search(self._briefing, imagined)
        return self._search.act(situation, imagined, self.variations, deadline)

    def _begin_search(self, briefing: Briefing, imagined: State) -> _Search | AgentSearch:
        if isinstance(self.base, TriggerPolicy):
            return _Search(self.base, self.rules, briefing, imagined)
        return AgentSearch(self.base, self.rules, briefing, imagined)

    def _act_by_samples(self, situation: Situation, futures: Futures, briefing: Briefing) -> int:
        """Return the base's own action, or another whose gain is beyond chance."""
        assert isinstance(self.base, TriggerPolicy)
        own, mask = self.base.act(situation), situation.mask
        tried = {"decode", *(f"{k}:{r}" for k in _KINDS for r in (self.base.rule, *self.rules))}
        names = briefing.task.actions
        others = [int(a) for a in np.flatnonzero(mask) if a != own and names[a] in tried]
        if not others:
            return own
        gain_s, error_s = futures.judge(situation.imagine(), own, others, briefing.rng)
        beyond = np.where(gain_s > self.errors * error_s, gain_s, 0.0)
        best = int(beyond.argmax())
        return others[best] if beyond[best] > 0 else own


class _Search:
    """One episode's kept schedule and what trying others needs."""

    def __init__(
        self, base: TriggerPolicy, rules: tuple[str, ...], briefing: Briefing, imagined: State
    ) -> None:
        task = briefing.task
        machine = lower(task)
        self._costs, self._settings = machine.costs, machine.settings
        self._base = compile_policy(base, task)
        self._rng = briefing.rng
        kinds = ("mixed", "prefill") if base.mixed else ("prefill",)  # the base's own kind first
        places = [
            {
                ADMISSION_RULES.index(rule): task.actions.index(f"{kind}:{rule}")
                for rule in (task.process.mixed_rules if kind == "mixed" else task.process.rules)
                if rule in (base.rule, *rules)
            }
            for kind in kinds
        ]
        self._action_of = places[0]
        self._rules = list(self._action_of)
        self._actions = [DECODE, *(action for each in places for action in each.values())]
        steals = [kind for kind in STEALS if kind in task.process.steals]
        self._steals = [task.actions.index(f"steal:{kind}") for kind in steals]
        _, requests = imagined.requests.shape
        self._scratch = make_alike(imagined, 1)
        stages = requests + 1  # each admits someone; the last entry is looked at, never used
        self._schedule = StageChoices(
            np.full(stages, self._base.rule), np.full(stages, self._base.parameter)
        )

    def act(self, situation: Situation, imagined: State, variations: int, deadline: float) -> int:
        """Try candidates until the deadline, keep the best schedule, return its first action."""
        turn = int(imagined.episodes[0].turn)
        stage = int(imagined.replicas[0, turn].prefill_stages)
        stage = min(stage, self._schedule.rules.size - 1)  # more where somebody was preempted
        best_action = own = self._own_action(situation, stage)
        if perf_counter() >= deadline:
            return own
        best_s = self._try(imagined, self._schedule, FOLLOW)
        for action in self._actions:
            if action == own or not situation.mask[action]:
                continue
            if perf_counter() >= deadline:
                return best_action
            seconds = self._try(imagined, self._schedule, action)
            if seconds < best_s * (1 - _LEAST_GAIN):
                best_action, best_s = action, seconds
        for _ in range(variations):
            if perf_counter() >= deadline:
                break
            schedule = self._vary(stage)
            seconds = self._try(imagined, schedule, FOLLOW)
            if seconds < best_s * (1 - _LEAST_GAIN):
                self._schedule, best_s = schedule, seconds
                best_action = self._own_action(situation, stage)
        return best_action

    def _try(self, imagined: State, schedule: StageChoices, first: int) -> float:
        costs, settings, base = self._costs, self._settings, self._base
        return final_clock(imagined, costs, settings, base, schedule, first, self._scratch)

    def _own_action(self, situation: Situation, stage: int) -> int:
        """Return what the kept schedule does now."""
        for steal in self._steals:  # as `take_turn` does
            if situation.mask[steal]:
                return steal
        action = self._action_of[int(self._schedule.rules[stage])]
        if not situation.mask[action]:
            return DECODE
        if not situation.mask[DECODE] or situation.view.active == 0:
            return action
        parameter = self._schedule.parameters[stage]
        return action if fires(self._base.trigger, parameter, situation.view) else DECODE

    def _vary(self, stage: int) -> StageChoices:
        """Return the kept schedule with one of the next stages changed at random."""
        rules, parameters = self._schedule.rules.copy(), self._schedule.parameters.copy()
        changed = min(stage + int(self._rng.integers(_STAGES_AHEAD)), rules.size - 1)
        if self._rng.random() < _RULE_SHARE:
            rules[changed] = self._rng.choice(self._rules)
        end = rules.size if self._rng.random() < _ONWARD_SHARE else changed + 1
        parameters[changed:end] *= np.exp(_SPREAD * self._rng.standard_normal())
        return StageChoices(rules, parameters)
