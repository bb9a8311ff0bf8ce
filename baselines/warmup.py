"""Compile every kernel once, so that nobody waits for it later: ``python -m servegym.baselines.warmup``."""

from __future__ import annotations

from servegym.baselines.calendar.planner import plan_jointly
from servegym.baselines.exact.optimum import exact_optimum
from servegym.baselines.expert import make_rollout_expert
from servegym.baselines.registry import MIXED, REGISTRY, make_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.task.config import with_overrides
from servegym.envs.task.lowering import lower
from servegym.envs.task.registered import TASKS
from servegym.envs.vector_env import ServingVectorEnv


def warm_up() -> None:
    """Play a tiny episode under each policy, in Python and in compiled code; solve it; ask the expert."""
    task = TASKS["servegym/Tiny-v0"]
    case = make_case(task, seed=0)
    chunked = with_overrides(task, {"cluster": {"chunk_tokens": 16}})
    for family, entry in REGISTRY.items():
        name = f"{family}-1" if entry.required else family
        policy = make_policy(name)
        its_task = chunked if name in MIXED else task
        play(its_task, name, policy, case, seed=0)
        if isinstance(policy, TriggerPolicy):
            play_compiled(its_task, policy, case)
    machine = lower(task)
    exact_optimum(case.requests, machine.clients, machine.costs)
    plan_jointly(case.requests, machine.clients, machine.costs, moves=1000)
    env = ServingVectorEnv(2, task)
    env.reset(seed=0)
    make_rollout_expert("aligned", task)(env)


if __name__ == "__main__":
    warm_up()
