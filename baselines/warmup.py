"""Compile every kernel once, so that nobody waits for it later: ``python -m servegym.baselines.warmup``."""

from __future__ import annotations

from servegym.baselines.episodes import play_compiled
from servegym.baselines.policies import TriggerPolicy
from servegym.baselines.registry import REGISTRY, make_policy
from servegym.envs.evaluation import make_case, play
from servegym.envs.tasks import TASKS


def warm_up() -> None:
    """Play one tiny episode under each policy, in Python and in compiled code."""
    task = TASKS["servegym/Tiny-v0"]
    case = make_case(task, seed=0)
    for family, entry in REGISTRY.items():
        name = f"{family}-1" if entry.number == "K" else family
        policy = make_policy(name)
        play(task, name, policy, case, seed=0)
        if isinstance(policy, TriggerPolicy):
            play_compiled(task, policy, case)


if __name__ == "__main__":
    warm_up()
