"""The exact optimum of small cases, two independent ways: a search and a mixed-integer program.

The optimum is over *all* schedules: at any value of the decode clock a prefill stage may admit any
waiting requests to idle clients. The environment's actions are some of these (a rule fills all idle
clients), so no policy is faster. Assumed: one replica, all requests present at t = 0, lengths known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from servegym.baselines.exact.mip import solve_joint_mip
from servegym.baselines.exact.problem import JointProblem, greedy_schedule
from servegym.baselines.exact.search import search
from servegym.baselines.schedules import Schedule
from servegym.envs.bounds.batch import lower_bound
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.machine.costs import CostTables
from servegym.envs.workload.requests import Requests

METHODS: Final = ("search", "mip")

_ROUNDING: Final = 1e-12  # relative; sums of the same seconds in another order differ by less


@dataclass(frozen=True)
class ExactOptimum:
    """The best schedule found and what is proven about it. Times in seconds."""

    makespan_s: float
    lower_bound_s: float
    """No schedule is faster. Equal to ``makespan_s`` where that is proven optimal."""
    proven: bool
    schedule: Schedule

    @property
    def gap(self) -> float:
        """How far above the bound the schedule is: makespan / bound − 1."""
        return self.makespan_s / self.lower_bound_s - 1.0


def exact_optimum(
    requests: Requests,
    clients: int,
    costs: CostTables,
    max_prefill_tokens: int = 0,
    *,
    method: str = "search",
    time_limit_s: float = 60.0,
) -> ExactOptimum:
    """Return the fastest of all schedules, or the best one found within the time limit.

    Parameters
    ----------
    requests
        All present at t = 0.
    clients, costs, max_prefill_tokens
        One replica: its clients, its cost tables, the token budget of a stage (0: none).
    method
        ``search``, best first; or ``mip``, by HiGHS, much slower (its proof holds up to the solver's
        tolerances).
    time_limit_s
        Seconds; when they are over, the best schedule is returned and ``proven`` is False.

    Raises
    ------
    ServegymError
        If requests arrive later, there is no such method, the time limit is not positive, what a round
        takes depends on whose tokens are cached together, or the case is too large; the message then names
        a size that fits, and a lower bound.

    Examples
    --------
    >>> from servegym.envs import TASKS, lower, make_case
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> machine = lower(task)
    >>> optimum = exact_optimum(make_case(task, 0).requests, machine.clients, machine.costs)
    >>> optimum.proven, round(optimum.makespan_s, 2)
    (True, 24.0)
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if not (math.isfinite(time_limit_s) and time_limit_s > 0):
        raise ServegymError(f"time_limit_s must be finite and > 0, got {time_limit_s}")
    if clients < 1:
        raise ServegymError(f"clients must be ≥ 1, got {clients}")
    if costs.decode_base_s.shape != (1, clients + 1):
        raise ServegymError(
            f"the cost tables are for {costs.decode_base_s.shape[1] - 1} clients, not {clients}"
        )
    if np.any(requests.arrival_s > 0):
        raise ServegymError(
            "the exact optimum needs all requests at t = 0, the last arrives at "
            f"{requests.arrival_s[-1]:g} s"
        )
    shared_s = float(costs.rates[0].decode_per_client_kv_token_s)
    if shared_s > 0:  # both methods take the cache's seconds for those of every schedule
        raise ServegymError(
            f"the exact optimum is found for cost.decode.per_client_kv_token = 0, got {shared_s:g}"
        )
    if clients > len(requests):  # the others stay idle in every schedule
        clients = len(requests)
        costs = replace(costs, decode_base_s=costs.decode_base_s[:, : clients + 1])
    problem = JointProblem(requests, clients, costs, max_prefill_tokens)
    bound_s = lower_bound(requests, clients, costs, max_prefill_tokens).seconds
    known = greedy_schedule(problem)
    try:
        found, proven_s, finished = _solve(problem, method, known, time_limit_s)
    except ServegymError as error:
        raise ServegymError(
            f"{error}; a lower bound is {bound_s:.6g} s (servegym.envs.bounds.batch)"
        ) from None
    best = min((known, *found), key=problem.makespan_s)
    makespan_s = problem.makespan_s(best)
    if finished:
        return ExactOptimum(makespan_s, makespan_s, True, best)
    return ExactOptimum(makespan_s, min(makespan_s, max(bound_s, proven_s)), False, best)


def _solve(
    problem: JointProblem, method: str, known: Schedule, time_limit_s: float
) -> tuple[list[Schedule], float, bool]:
    """Return schedules found, if any; a proven bound in seconds; whether the best is optimal."""
    if method == "search":
        known_s = problem.makespan_s(known) - problem.constant_s
        result = search(problem, known_s * (1 - _ROUNDING), time_limit_s)
    else:
        result = solve_joint_mip(problem, known, time_limit_s)
    found = [] if result.schedule is None else [result.schedule]
    return found, result.bound_s + problem.constant_s, result.finished
