"""Rollouts over an agent: its network goes on in imagination, with other bonuses on its scores.

The way to the end is what the agent does when at each stage every action's score gets a bonus, 0 at first:
the first trial is the agent itself. *Variations* draw new bonuses for one of the next stages and are kept
where they end earlier. A bonus moves the margin at which the agent begins a stage, and makes its second-best
action the best where the margin is small, so that a variation departs from the agent where it is unsure.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.rules.compiled import Agent, CompiledPolicy, compile_policy, run_episode
from servegym.envs.errors import ServegymError
from servegym.envs.jit import shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.policy import Briefing, Situation
from servegym.envs.process.actions import Settings, apply
from servegym.envs.process.network import choose, stages_of
from servegym.envs.simulator.events import DECODE
from servegym.envs.simulator.imagination import copy_row
from servegym.envs.simulator.state import State, make_alike
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import lower

# From seeds 0 … 9 of GSM8K-v0; results hardly depend on them.
_STAGES_AHEAD: Final = 2  # a variation begins at one of so many next stages
_SPREAD: Final = 3.0  # standard deviation of a bonus, in logits
_ONWARD_SHARE: Final = 0.5  # of the variations, go for all later stages, too
_LEAST_GAIN: Final = 1e-9  # share of the makespan; less is rounding, and the kept bonuses stay


@shared_kernel
def clock_under_agent(
    imagined: State,
    costs: CostTables,
    settings: Settings,
    policy: CompiledPolicy,
    first: int,
    scratch: State,
) -> float:
    """Return the clock at which row 0 ends if ``first`` is done now (< 0: nothing) and the policy goes on."""
    copy_row(imagined, 0, scratch, 0)
    if first >= 0:
        apply(scratch, costs, settings, 0, scratch.episodes[0].turn, first)
    run_episode(scratch, costs, 0, policy)
    return float(scratch.episodes[0].now_s)


class AgentSearch:
    """One episode's kept bonuses and what trying others needs.

    Parameters
    ----------
    base
        The agent that goes on.
    rules
        Admission rules that are tried where the agent has them, besides decoding on, stealing and what the
        agent itself does until the episode's end.
    briefing
        Of the episode.
    imagined
        Gives the shape of imagined episodes.

    Raises
    ------
    ServegymError
        If the agent observes the block ``latency``.
    """

    def __init__(
        self, base: Agent, rules: tuple[str, ...], briefing: Briefing, imagined: State
    ) -> None:
        task = _without_caps(briefing.task)
        machine = lower(task)
        self._costs, self._settings = machine.costs, machine.settings
        self._rng = briefing.rng
        policy = compile_policy(base, task)
        agent = policy.agent
        assert agent is not None
        stages = imagined.requests.shape[1] + 1
        shape = stages, len(agent.network.actions)
        self._kept = np.zeros(shape, np.float32)
        self._network = replace(agent.network, bonuses=np.zeros(shape, np.float32))
        self._policy = policy._replace(agent=replace(agent, network=self._network))
        self._names, self._rules = task.actions, rules
        self._tried: list[int] = []  # of the agent's actions; found by the first trial
        self._scratch = make_alike(imagined, 1)

    def act(self, situation: Situation, imagined: State, variations: int, deadline: float) -> int:
        """Try candidates until the deadline, keep the best bonuses, return their first action."""
        stage = int(stages_of(imagined, 0, int(imagined.episodes[0].turn)))
        best_action = own = self._own_action(situation, stage)
        if perf_counter() >= deadline:
            return own
        best_s = self._try(imagined, -1)
        self._tried = self._tried or self._find_tried()
        for action in self._network.actions[self._tried].tolist():
            if action == own or not situation.mask[action]:
                continue
            if perf_counter() >= deadline:
                return best_action
            seconds = self._try(imagined, action)
            if seconds < best_s * (1 - _LEAST_GAIN):
                best_action, best_s = action, seconds
        for _ in range(variations):
            if perf_counter() >= deadline:
                break
            first, end = self._vary(stage)
            seconds = self._try(imagined, -1)
            if seconds < best_s * (1 - _LEAST_GAIN):
                best_s = seconds
                self._kept[first:end] = self._network.bonuses[first:end]
                best_action = self._own_action(situation, stage)
            else:
                self._network.bonuses[first:end] = self._kept[first:end]
        return best_action

    def _find_tried(self) -> list[int]:
        """Return which of the agent's actions to try."""
        agent = self._policy.agent
        assert agent is not None
        return [
            k
            for k, action in enumerate(self._network.actions.tolist())
            if action == DECODE
            or agent.taken[action] > 0
            or _is_tried(self._names[action], self._rules)
        ]

    def _try(self, imagined: State, first: int) -> float:
        costs, settings = self._costs, self._settings
        return clock_under_agent(imagined, costs, settings, self._policy, first, self._scratch)

    def _own_action(self, situation: Situation, stage: int) -> int:
        """Return what the agent does now with the present bonuses."""
        return int(choose(self._network, situation.observation, situation.mask, stage))

    def _vary(self, stage: int) -> tuple[int, int]:
        """Draw new bonuses for one of the next stages, or from there on; return which."""
        stages, outputs = self._kept.shape
        first = min(stage + int(self._rng.integers(_STAGES_AHEAD)), stages - 1)
        end = stages if self._rng.random() < _ONWARD_SHARE else first + 1
        drawn: NDArray[np.float64] = _SPREAD * self._rng.standard_normal(len(self._tried))
        added = np.zeros(outputs, np.float32)
        added[self._tried] = drawn
        self._network.bonuses[first:end] += added
        return first, end


def check_agent(agent: Agent) -> None:
    """Refuse an agent that imagination cannot show what it observes.

    Raises
    ------
    ServegymError
        If it observes the block ``latency``.
    """
    if "latency" in agent.blocks:
        raise ServegymError(
            "a rollout's base observes no block 'latency': imagined episodes keep no times of tokens"
        )


def _is_tried(action: str, rules: tuple[str, ...]) -> bool:
    kind, _, choice = action.partition(":")
    return kind == "steal" or choice.partition(":")[0] in rules


def _without_caps(task: TaskConfig) -> TaskConfig:
    """Return the task without limits of decisions and seconds: imagined episodes run to their end."""
    return with_overrides(task, {"process": {"max_decisions": 0, "max_seconds": 0.0}})
