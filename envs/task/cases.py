"""Cases: the requests that a seed draws, what is known of them, and their lower bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from servegym.envs.bounds.batch import LowerBound
from servegym.envs.errors import ServegymError
from servegym.envs.task.config import TaskConfig
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.predictors import PREDICTORS, expect_alike, predict
from servegym.envs.workload.requests import Requests
from servegym.envs.workload.sources import make_workload, most_requests, output_lengths


@dataclass(frozen=True)
class Case:
    """One instance, the same for all policies that are compared on it.

    Examples
    --------
    >>> from servegym.envs import TASKS, make_case
    >>> case = make_case(TASKS["servegym/Tiny-v0"], seed=0)
    >>> len(case.requests)
    8
    """

    requests: Requests
    bound: LowerBound


PlanCase = Callable[[Case], Plan | None]
"""Returns the offline plan of a case, made from what a scheduler knows of it; None: the greedy one."""


def sample_requests(task: TaskConfig, rng: np.random.Generator) -> Requests:
    """Return the requests of one episode of ``task``, predicted as its ``[information]`` says.

    Raises
    ------
    ServegymError
        If the workload is a file that cannot be read or lacks the predictions that the task wants, or has
        no class that ``[slo]`` names.
    """
    workload = task.workload
    requests = make_workload(
        workload.source,
        workload.requests,
        workload.arrival_rate_per_s,
        rng,
        workload.arrivals,
        workload.trace,
    )
    own = requests.predicted_spread is not None
    if own and task.information.predictor != "column":
        requests = replace(requests, predicted_spread=None)  # the file's own are not asked for
    if task.slo.classes:
        task.slo.limits_of(requests)  # refuses a class that the workload does not have
    return inform(task, requests, rng)


def room_for(task: TaskConfig) -> int:
    """Return the most requests that an episode of ``task`` may have, whatever the seed."""
    workload = task.workload
    return most_requests(workload.source, workload.requests, workload.trace)


def inform(task: TaskConfig, requests: Requests, rng: np.random.Generator) -> Requests:
    """Return requests with what the scheduler of ``task`` is to know of their output lengths.

    Where lengths are known: unchanged. ``unknown``: the workload's mean and spread for everyone.
    ``predicted``: those that the requests carry, else those of the task's predictor. Apart from that
    predictor's own errors nothing is drawn from ``rng``.

    Raises
    ------
    ServegymError
        If the task wants the requests' own predictions and they have none.
    """
    information = task.information
    if information.output_lengths == "known":
        return requests
    if information.output_lengths == "unknown":
        return expect_alike(requests, output_lengths(task.workload.source, task.workload.trace))
    if requests.predicted_spread is not None:
        return requests
    if information.predictor == "column":
        raise ServegymError(
            "information.predictor 'column' needs a workload with the column "
            f"'predicted_output_tokens'; {task.workload.source!r} has none"
        )
    lengths = output_lengths(task.workload.source, task.workload.trace)
    if information.predictor == "calibrated":
        return predict(requests, information.kendall_tau, lengths, rng)
    return PREDICTORS[information.predictor].predict(requests, lengths, rng)
