"""The model of arXiv 2502.07115: policies in the simulator, and the best that hindsight could have done.

Rounds take one unit, prefills nothing. A request of prompt s and o rounds that starts at a whole time t
holds s + j tokens in its j-th round and ends at t + o. Nobody is interrupted. Latency is the end less the
arrival; their sum is to be least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import highspy
import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.highs import silent_highs, solve_interruptibly
from servegym.baselines.rules import triggers
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.studies.serving import serve

UNIT: Final = StageCosts(AffineDecode(1.0), AffinePrefill(1e-9, 0.0))
"""Rounds of one second; a stage must take some time."""

POLICIES: Final[dict[str, str | TriggerPolicy]] = {
    "mc-sf": "mc-sf",
    "sorted-f": "sorted-f",
    "fcfs, guard peak": TriggerPolicy("fcfs", triggers.EAGER, cluster={"admission_guard": "peak"}),
}
"""Nobody is evicted under these, so the program's best bounds them all."""


@dataclass(frozen=True)
class Instance:
    """Requests and a memory that holds each of them."""

    arrivals: NDArray[np.int64]  # (requests,) whole units, ascending
    prompts: NDArray[np.int64]  # (requests,) tokens s
    rounds: NDArray[np.int64]  # (requests,) o
    memory: int  # tokens


def draw(requests: int, memory: tuple[int, int], rate: float, rng: np.random.Generator) -> Instance:
    """Return an instance drawn as in the paper, but smaller.

    ``memory``: the least and the most, all as likely; prompts 1 … 5, rounds 1 … memory − prompt − 1, as the
    simulator's prefill emits a token that must fit, too.
    ``rate``: of Poisson arrivals in units; 0: all present at t = 0.
    """
    tokens = int(rng.integers(memory[0], memory[1] + 1))
    prompts = rng.integers(1, 6, requests)
    rounds = rng.integers(1, tokens - prompts)
    gaps = rng.exponential(1.0 / rate, requests) if rate > 0 else np.zeros(requests)
    return Instance(np.floor(np.cumsum(gaps)).astype(np.int64), prompts, rounds, tokens)


def total_latency(instance: Instance, policy: str | TriggerPolicy) -> float:
    """Return the sum of latencies under a policy in the simulator, in units."""
    cluster = ClusterConfig(clients=len(instance.rounds), kv_capacity_tokens=instance.memory)
    task = TaskConfig("hindsight", cluster, UNIT)
    served = serve(task, policy, instance.prompts, instance.rounds + 1, instance.arrivals)
    return float(np.rint((served.log.finished_s - served.log.arrival_s).sum()))


def least_latency(instance: Instance, at_most: float, limit_s: float = np.inf) -> float | None:
    """Return the least sum of latencies; None: not proven within the limit.

    ``at_most`` is a sum that can be had: it bounds when each request starts.

    Raises
    ------
    ValueError
        If no schedule is as good as ``at_most``.
    """
    model = silent_highs()
    if limit_s < np.inf:
        model.setOptionValue("time_limit", limit_s)
    latest = (
        int(at_most) - int(instance.rounds.sum()) + instance.arrivals
    )  # the others start at once
    starts: list[dict[int, highspy.highs.highs_var]] = [
        {t: model.addBinary() for t in range(first, last + 1)}
        for first, last in zip(instance.arrivals.tolist(), latest.tolist(), strict=True)
    ]
    if not all(starts):
        raise ValueError(f"no schedule has latencies of {at_most} in all")
    for own in starts:
        model.addConstr(_sum([*own.values()]) == 1)
    rows = list(zip(instance.prompts.tolist(), instance.rounds.tolist(), strict=True))
    for t in range(1, int((latest + instance.rounds).max()) + 1):
        held = [
            (s + t - k) * own[k]
            for own, (s, o) in zip(starts, rows, strict=True)
            for k in range(max(0, t - o), t)
            if k in own
        ]
        if len(held) > 1:
            model.addConstr(_sum(held) <= instance.memory)
    ends = [
        (k + o - first) * variable
        for own, (_, o), first in zip(starts, rows, instance.arrivals.tolist(), strict=True)
        for k, variable in own.items()
    ]
    model.setObjective(_sum(ends), sense=highspy.ObjSense.kMinimize)
    solve_interruptibly(model)
    status = model.getModelStatus()
    proven = status == highspy.HighsModelStatus.kOptimal
    least = float(np.rint(model.getObjectiveValue())) if proven else None
    if status == highspy.HighsModelStatus.kInfeasible or (least is not None and least > at_most):
        raise ValueError(f"no schedule has latencies of {at_most} in all")
    return least


def _sum(terms: Sequence[Any]) -> Any:
    """Return the sum of HiGHS's variables or expressions."""
    return sum(terms[1:], terms[0])
