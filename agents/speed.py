"""Speed of training: decisions a second, the environment's share, CPU time a decision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from statistics import median
from time import perf_counter, process_time
from typing import Any, Final

import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import nn

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


def training_costs(
    task: TaskConfig,
    ways: Mapping[str, Hyperparameters],
    repeats: int,
    plain: Collection[str] = (),
) -> dict[str, tuple[float, float]]:
    """Return the CPU time of a decision by name, in µs: to collect it, and to learn from it.

    On one torch thread, with the environments' part in collecting. The ways take turns, a rollout and
    an update each, and the least of ``repeats`` is taken: what other work on the machine adds varies.
    Those named in ``plain`` are measured as the libraries have it (see :func:`make_plain`).
    """
    torch.set_num_threads(1)
    models = {name: make_model(task, h) for name, h in ways.items()}
    for name in plain:
        make_plain(models[name])
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            environments = model.get_env()
            assert environments is not None
            _, callback = model._setup_learn(ways[name].rollout, reset_num_timesteps=repeat == 0)
            started = process_time()
            model.collect_rollouts(environments, callback, model.rollout_buffer, ways[name].steps)
            collected = process_time()
            model.train()
            parts = collected - started, process_time() - collected
            if repeat > 0:  # the first compiles
                taken[name].append((parts[0], parts[1]))
    costs = {}
    for name, rows in taken.items():
        collect_s, learn_s = (min(part) for part in zip(*rows, strict=True))
        decisions = ways[name].rollout
        costs[name] = 1e6 * collect_s / decisions, 1e6 * learn_s / decisions
    return costs


def make_plain(model: OnPolicyAlgorithm) -> None:
    """Give a MaskablePPO of ``make_model`` torch's tanh and sb3-contrib's policy; weights stay."""
    policy: Any = model.policy
    policy.__class__ = MaskableActorCriticPolicy
    for network in (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net):
        for k, module in enumerate(network):
            if isinstance(module, nn.Tanh):
                network[k] = nn.Tanh()


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
