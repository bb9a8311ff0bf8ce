"""A_min beside A_max in the model of their paper (arXiv 2508.14544): lengths known by an interval each.

Rounds take one unit, prefills nothing, all prompts are alike, all requests present at t = 0. Intervals hold
every output, so they are told to the policies as they are, not as quantiles of a prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.sections import InformationConfig
from servegym.envs.workload.requests import make_requests
from servegym.studies.checks.hindsight import UNIT

Tokens = NDArray[np.int64]

LONGEST: Final = 100
"""Output tokens."""

PROMPT: Final = 5


def _bins(width: int) -> Callable[[Tokens], tuple[Tokens, Tokens]]:
    return lambda outputs: (
        (outputs - 1) // width * width + 1,
        (outputs - 1) // width * width + width,
    )


def _around(share: float) -> Callable[[Tokens], tuple[Tokens, Tokens]]:
    return lambda outputs: (
        np.maximum(np.floor((1 - share) * outputs), 1).astype(np.int64),
        np.ceil((1 + share) * outputs).astype(np.int64),
    )


INTERVALS: Final[dict[str, Callable[[Tokens], tuple[Tokens, Tokens]]]] = {
    f"[1, {LONGEST}] for all": lambda outputs: (
        np.ones_like(outputs),
        np.full_like(outputs, LONGEST),
    ),
    "ten bins of 10": _bins(10),
    "(1 ± 0.9) o": _around(0.9),
    "(1 ± 0.1) o": _around(0.1),
    "points": lambda outputs: (outputs, outputs),
}
"""The paper's kinds, for outputs of up to 100 tokens in the place of 1000."""


def draw_outputs(uniform: bool, requests: int, rng: np.random.Generator) -> Tokens:
    """Return outputs of 1 … 100 tokens: uniform, or lognormal with a median of 15."""
    if uniform:
        return rng.integers(1, LONGEST + 1, requests)
    tokens = np.rint(rng.lognormal(2.7, 1.0, requests))
    return np.clip(tokens, 1, LONGEST).astype(np.int64)


def mean_latency(policy: str, outputs: Tokens, told: Tokens, memory: int) -> tuple[float, int]:
    """Return mean latency in units and evictions if a policy is told ``told`` for the outputs."""
    cluster = ClusterConfig(clients=len(outputs), kv_capacity_tokens=memory)
    information = InformationConfig(output_lengths="predicted")
    task = TaskConfig("intervals", cluster, UNIT, information=information)
    certain = np.zeros(len(outputs))
    requests = make_requests(np.full(len(outputs), PROMPT), outputs, None, told, certain)
    player = replace(make_trigger_policy(policy), comparison={})
    metrics = play_compiled(task, player, bound_case(lower(task), requests))
    return metrics["e2e_mean_s"], int(metrics["preemptions"])
