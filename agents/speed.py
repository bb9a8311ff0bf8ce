"""Speed of training, and the environment's share of the time."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, Final

import torch

from servegym.agents.hyperparameters import Hyperparameters
from servegym.agents.training import make_model
from servegym.envs.task.config import TaskConfig

_UPDATES: Final = 2  # rollouts and updates of one repeat


def training_speed(
    task: TaskConfig, hyperparameters: Hyperparameters, repeats: int
) -> tuple[float, float]:
    """Return decisions per second and the environment's share of the time, on one torch thread.

    Medians over ``repeats``. The environment's share is stepping, new episodes and finding the legal
    actions; the rest is the networks: choosing actions and learning.
    """
    torch.set_num_threads(1)
    model = make_model(task, hyperparameters)
    environments = model.get_env()
    assert environments is not None
    watch = _Stopwatch()
    for method in ("step", "env_method"):
        setattr(environments, method, watch.timed(getattr(environments, method)))
    decisions = _UPDATES * hyperparameters.rollout
    model.learn(decisions)  # compiles, and lets the rows fall out of step
    rates, shares = [], []
    for _ in range(repeats):
        watch.seconds = 0.0
        started = perf_counter()
        model.learn(decisions, reset_num_timesteps=False)
        taken = perf_counter() - started
        rates.append(decisions / taken)
        shares.append(watch.seconds / taken)
    return median(rates), median(shares)


class _Stopwatch:
    """Adds up what timed calls take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call``, timed."""

        def timed_call(*arguments: Any, **options: Any) -> Any:
            started = perf_counter()
            result = call(*arguments, **options)
            self.seconds += perf_counter() - started
            return result

        return timed_call
