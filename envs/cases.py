"""A case: the requests of one episode with the lower bound on their makespan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.envs.bounds import LowerBound, lower_bound
from servegym.envs.config import TaskConfig
from servegym.envs.cost_models import CostTables
from servegym.envs.plan import Plan
from servegym.envs.requests import Requests
from servegym.envs.reward import write_credits
from servegym.envs.simulator.state import State, load
from servegym.envs.workloads import make_workload


@dataclass(frozen=True)
class Case:
    """One instance, the same for all policies that are compared on it."""

    requests: Requests
    bound: LowerBound


def sample_requests(task: TaskConfig, rng: np.random.Generator) -> Requests:
    """Return the requests of one episode of ``task``."""
    workload = task.workload
    return make_workload(workload.source, workload.requests, workload.arrival_rate_per_s, rng)


def bound_case(task: TaskConfig, costs: CostTables, requests: Requests) -> Case:
    """Return the case of given requests; ``costs`` are the task's tables."""
    cluster = task.cluster
    return Case(requests, lower_bound(requests, cluster.clients, costs, cluster.max_prefill_tokens))


def load_case(state: State, e: int, case: Case, plan: Plan | None = None) -> None:
    """Put a case into row ``e`` of the state, at its start."""
    load(state, e, case.requests, plan)
    write_credits(state, e, case.requests, case.bound)
