"""Compile every kernel once, so that nobody waits for it later: ``python -m servegym.baselines.warmup``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from servegym.baselines.calendar.planner import plan_jointly
from servegym.baselines.catalogue import MIXED, REGISTRY
from servegym.baselines.exact.optimum import exact_optimum
from servegym.baselines.expert import make_rollout_expert
from servegym.baselines.lookahead.rollout import RolloutPolicy
from servegym.baselines.registry import make_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.compilation import NOTICE
from servegym.envs.playing.evaluation import brief, make_case, play
from servegym.envs.playing.parallel import run_parallel
from servegym.envs.playing.policy import Policy, Situation, asked_task
from servegym.envs.process.network import (
    CompiledAgent,
    choose,
    make_agent,
    make_choice,
    make_layers,
    run_agent,
    score_rows,
)
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import load_case, lower, make_task_state
from servegym.envs.task.registered import TASKS
from servegym.envs.vector_env import ServingVectorEnv

TASK: Final = TASKS["servegym/Tiny-v0"]


def warm_up() -> None:
    """Compile in two processes, first what has no kernel in common, then what calls all that."""
    for works in ((play_rules, plan_and_solve), (play_searches, ask_the_expert, play_a_network)):
        # One of the two tells of the work.
        for _ in run_parallel(_call, [(work, work is works[0]) for work in works], jobs=2):
            pass


def play_rules() -> None:
    """Play a tiny episode under each policy that follows a rule, in Python and in compiled code."""
    _play_all(rules=True)


def play_searches() -> None:
    """Play a tiny episode under each other policy."""
    _play_all(rules=False)


def plan_and_solve() -> None:
    """Plan a tiny case as each policy does, and solve it."""
    case, machine = make_case(TASK, seed=0), lower(TASK)
    for family in REGISTRY.keys() - set(MIXED):
        policy = make_policy(_full_name(family))
        policy.prepare(brief(asked_task(TASK, policy), case, seed=0))
    exact_optimum(case.requests, machine.clients, machine.costs)
    plan_jointly(case.requests, machine.clients, machine.costs, moves=1000)


def ask_the_expert() -> None:
    """Value the actions of two rows of a vector environment, and step them."""
    env = ServingVectorEnv(2, TASK)
    env.reset(seed=0)
    values = make_rollout_expert("aligned", TASK)(env)
    env.step(values.argmax(axis=1))


def play_a_network() -> None:
    """Play a tiny episode under an agent that has learned nothing, in Python, compiled, and in a rollout."""
    case, untrained = make_case(TASK, seed=0), _Untrained()
    play(TASK, "untrained", untrained, case, seed=0)
    play_compiled(TASK, untrained, case)
    play(TASK, "rollout", RolloutPolicy(untrained, variations=1), case, seed=0)
    machine, state = lower(TASK), make_task_state(TASK, 1, len(case.requests))
    load_case(TASK, state, 0, case)
    run_agent(state, machine.costs, 0, untrained.compiled(TASK))
    layers = untrained.network.layers
    observations = np.zeros((1, len(machine.features)), np.float32)
    score_rows(layers, observations, np.zeros((1, len(TASK.actions)), np.float32))


class _Untrained(Policy):
    """Two layers of zeros."""

    blocks: tuple[str, ...] = ("replica",)

    def __init__(self) -> None:
        inputs, outputs = len(lower(TASK).features), len(TASK.actions)
        hidden = np.zeros((4, inputs), np.float32), np.zeros(4, np.float32)
        last = np.zeros((outputs, 4), np.float32), np.zeros(outputs, np.float32)
        self.network = make_choice(
            make_layers([hidden, last]), np.arange(inputs), np.arange(outputs)
        )

    def act(self, situation: Situation) -> int:
        return choose(self.network, situation.observation, situation.mask, 0)

    def compiled(self, task: TaskConfig) -> CompiledAgent:
        machine = lower(task)
        return make_agent(self.network, machine.settings, len(machine.features), len(task.actions))


def _call(work: Callable[[], None], tells: bool) -> None:
    NOTICE.silent = not tells
    work()
    NOTICE.silent = False


def _play_all(*, rules: bool) -> None:
    case = make_case(TASK, seed=0)
    chunked = with_overrides(TASK, {"cluster": {"chunk_tokens": 16}})
    for family in REGISTRY:
        name = _full_name(family)
        policy = make_policy(name)
        task = chunked if name in MIXED else TASK
        if isinstance(policy, TriggerPolicy) == rules:
            play(task, name, policy, case, seed=0)
            if isinstance(policy, TriggerPolicy):
                play_compiled(task, policy, case)


def _full_name(family: str) -> str:
    """Return a name that is one policy, with a number where the family needs one."""
    return f"{family}-1" if REGISTRY[family].required else family


if __name__ == "__main__":
    warm_up()
