"""The one door from a task to what kernels read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.envs.bounds.batch import lower_bound
from servegym.envs.machine.costs import CostTables, StageCosts, checked_tables
from servegym.envs.process.actions import Settings
from servegym.envs.process.reward import write_credits
from servegym.envs.simulator.loading import load
from servegym.envs.simulator.state import State, make_state
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.vocabulary import ADMISSION_RULES, REWARDS
from servegym.envs.workload.comparison import compared_tokens
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import Requests


class Machine(NamedTuple):
    """A task as kernels read it: the machine that serves, and what may be decided on it.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> lower(TASKS["servegym/Tiny-v0"]).clients
    3
    """

    clients: int
    costs: CostTables
    settings: Settings


def lower(task: TaskConfig) -> Machine:
    """Return what kernels read of a task.

    Raises
    ------
    ServegymError
        If the task's cost model is a user's own and its tables are malformed.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> clients, costs, settings = lower(TASKS["servegym/Tiny-v0"])
    >>> costs.decode_base_s.shape, settings.every_round
    ((1, 4), False)
    """
    clients, process = task.cluster.clients, task.process
    costs = task.cost.tables(clients)
    if not isinstance(task.cost, StageCosts):
        costs = checked_tables(costs, clients)
    settings = Settings(
        rules=np.array([ADMISSION_RULES.index(rule) for rule in process.rules]),
        every_round=process.decisions == "rounds",
        max_prefill_tokens=task.cluster.max_prefill_tokens,
        reward=REWARDS.index(process.reward),
        max_decisions=process.max_decisions,
        max_seconds=process.max_seconds,
    )
    return Machine(clients, costs, settings)


def bound_case(machine: Machine, requests: Requests) -> Case:
    """Return the case of given requests: with the lower bound on their makespan on a machine."""
    budget = machine.settings.max_prefill_tokens
    return Case(requests, lower_bound(requests, machine.clients, machine.costs, budget))


def make_task_state(task: TaskConfig, environments: int, requests: int) -> State:
    """Allocate the state of ``environments`` episodes of ``task``, of up to ``requests`` each."""
    known = task.information.output_lengths == "known"
    return make_state(environments, requests, task.cluster.clients, lengths_known=known)


def load_case(task: TaskConfig, state: State, e: int, case: Case, plan: Plan | None = None) -> None:
    """Put a case of ``task`` into row ``e`` of the state, at its start."""
    information = task.information
    compared = None
    if information.output_lengths != "known" and information.compare_by != "mean":
        by, quantile = information.compare_by, information.quantile
        compared = compared_tokens(case.requests, by, quantile, information.deviations) - 1
    load(state, e, case.requests, plan, compared)
    write_credits(state, e, case.requests, case.bound)
