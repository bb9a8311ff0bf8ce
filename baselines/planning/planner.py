"""The offline plan: the largest client load as small as can be, with a proof (paper, section IV.B).

Longest-first loads are evened out by exact splits of pairs (``rebalancing``). Mostly the largest
load meets the bound of area and pigeonhole within milliseconds, which proves it optimal. Where it
does not, pricing raises the bound (``pattern_bound``) while the walk goes on, until load and bound
meet or the time is up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.knapsack import Knapsack
from servegym.baselines.planning.milp import solve_mip
from servegym.baselines.planning.pattern_bound import PatternBound
from servegym.baselines.planning.walk import Walk, load_walk
from servegym.envs.bounds.rounds import rounds_lower_bound
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.task.cluster import MAX_CLIENTS
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import MAX_TOKENS

FIRST_TRIES: Final = 50_000
"""Moves of the walk before anything slower is tried; a twentieth of a second."""

SMALL_CELLS: Final = 60
"""Requests × clients up to which the mixed-integer program decides what the walk leaves open."""

TRIES_A_CLIENT: Final = 1000
"""Moves of the walk, for each client, before it counts as stuck and is kicked."""


@dataclass(frozen=True, eq=False)
class CertifiedPlan:
    """A plan, how good it is and how good any plan could be.

    Raises
    ------
    ServegymError
        If the bound is above the load, or the time is negative or not finite.

    Examples
    --------
    >>> found = plan_offline(np.array([9, 7, 4, 4]), clients=2)
    >>> found.lower_bound <= found.load
    True
    """

    plan: Plan
    load: int  # decode rounds of the busiest client
    lower_bound: int  # decode rounds; no plan has a smaller load
    solver: str
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.lower_bound <= self.load:
            raise ServegymError(
                f"a lower bound must lie in 0 … the load {self.load}, got {self.lower_bound}"
            )
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ServegymError(f"seconds must be ≥ 0, got {self.seconds}")

    @property
    def status(self) -> str:
        """``optimal`` if the load meets the bound, else ``feasible``."""
        return "optimal" if self.load == self.lower_bound else "feasible"

    @property
    def gap(self) -> float:
        """Load / lower bound − 1; 0 where both are 0."""
        return self.load / self.lower_bound - 1 if self.lower_bound else 0.0

    def summary(self) -> str:
        """Return load, bound, status, gap, time and solver in one line."""
        return (
            f"load {self.load} rounds, lower bound {self.lower_bound}, {self.status} "
            f"(gap {self.gap:.3%}), {self.seconds:.3f} s, solver {self.solver}"
        )


@dataclass(frozen=True, eq=False)
class _Problem:
    """What a solver is given."""

    rounds: NDArray[np.int64]  # (requests,) ≥ 0
    clients: int
    deadline: float  # reading of time.perf_counter
    rng: np.random.Generator

    @property
    def time_left_s(self) -> float:
        return max(0.0, self.deadline - time.perf_counter())

    def bound(self) -> int:
        return rounds_lower_bound(self.rounds, self.clients)

    def walk(self) -> Walk:
        return Walk(self.rounds, self.clients, self.rng, self.deadline)


_Found = tuple[NDArray[np.int64], int]  # client of each request, −1: any; a lower bound


def plan_offline(
    rounds: NDArray[np.int64],
    clients: int,
    *,
    time_limit_s: float = 1.0,
    solver: str = "rebalance",
    seed: int = 0,
) -> CertifiedPlan:
    """Assign requests to clients so that the largest load is least, and bound the least from below.

    Ends early when the plan is proven optimal. The result depends on the clock only where the time
    runs out; ``rebalanced_plan`` never looks at it. Compiling the kernels does not count as time.

    Parameters
    ----------
    rounds
        Decode rounds of each request, shape (requests,), 0 … ``MAX_TOKENS``.
    clients
        Number of clients, 1 … ``MAX_CLIENTS``.
    time_limit_s
        Seconds, > 0. The solvers of ``milp`` may overrun it while they set up.
    solver
        ``rebalance`` (the default), ``lpt`` (longest first alone), ``milp`` (the paper's program,
        started from the rebalanced plan) or ``milp-cold`` (started from nothing, as in the paper).
    seed
        Of the walk's random numbers, ≥ 0.

    Raises
    ------
    ServegymError
        If an argument is outside its range, or ``milp-cold`` finds no plan at all.

    Examples
    --------
    >>> found = plan_offline(np.array([9, 7, 4, 4]), clients=2)
    >>> found.load, found.status
    (13, 'optimal')
    """
    load_kernels()
    started = time.perf_counter()
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if not (math.isfinite(time_limit_s) and time_limit_s > 0):
        raise ServegymError(f"the time limit must be > 0 seconds, got {time_limit_s}")
    problem = _Problem(
        _checked_rounds(rounds),
        _checked_clients(clients),
        started + time_limit_s,
        _generator(seed),
    )
    client_of, lower_bound = SOLVERS[solver](problem)
    return _certify(problem, client_of, lower_bound, solver, started)


def rebalanced_plan(
    rounds: NDArray[np.int64], clients: int, *, tries: int = FIRST_TRIES, seed: int = 0
) -> CertifiedPlan:
    """Plan by a fixed number of moves of the walk, whatever the clock says.

    The same arguments give the same plan on every machine. All else is as in ``plan_offline``.
    """
    load_kernels()
    started = time.perf_counter()
    if tries < 0:
        raise ServegymError(f"tries must be ≥ 0, got {tries}")
    problem = _Problem(
        _checked_rounds(rounds), _checked_clients(clients), math.inf, _generator(seed)
    )
    bound = problem.bound()
    walk = problem.walk()
    walk.aim(bound, tries)
    return _certify(problem, walk.client_of(), bound, "rebalance", started)


@cache
def load_kernels() -> None:
    """Compile the planner's kernels or load them from disk, once."""
    load_walk()
    one = np.array([1])
    Knapsack(one, one, 1).fill(one, one)


def _longest_first(problem: _Problem) -> _Found:
    return problem.walk().client_of(), problem.bound()


def _rebalance(problem: _Problem) -> _Found:
    bound = problem.bound()
    walk = problem.walk()
    if walk.aim(bound, min(FIRST_TRIES, TRIES_A_CLIENT * problem.clients)):
        return walk.client_of(), bound
    if len(problem.rounds) * problem.clients <= SMALL_CELLS:
        return _solve_from(problem, walk.client_of(), bound, break_symmetry=True)
    bound = _close_gap(problem, walk, bound)
    return walk.client_of(), bound


def _close_gap(problem: _Problem, walk: Walk, bound: int) -> int:
    """Lower the load and raise the bound in turn until they meet; return the bound."""
    prices = PatternBound(problem.rounds, problem.clients)
    while bound < walk.best and problem.time_left_s > 0:
        if walk.aim(walk.best - 1, TRIES_A_CLIENT * problem.clients):
            continue
        prices.learn(problem.rounds, walk.client_of())
        bound = prices.raise_bound(bound, walk.best, problem.deadline)
        walk.kick()
    return bound


def _milp(problem: _Problem) -> _Found:
    bound = problem.bound()
    walk = problem.walk()
    walk.aim(bound, FIRST_TRIES)
    return _solve_from(problem, walk.client_of(), bound)


def _solve_from(
    problem: _Problem, client_of: NDArray[np.int64], bound: int, *, break_symmetry: bool = False
) -> _Found:
    """Improve a plan by the mixed-integer program; requests without rounds stay out of it."""
    positive = np.flatnonzero(problem.rounds)
    if len(positive) == 0:
        return client_of, 0
    found = solve_mip(
        problem.rounds[positive],
        problem.clients,
        time_limit_s=problem.time_left_s,
        start=client_of[positive],
        lower_bound=bound,
        break_symmetry=break_symmetry,
    )
    if found.client_of is not None:
        client_of[positive] = found.client_of
    return client_of, found.lower_bound


def _milp_cold(problem: _Problem) -> _Found:
    positive = np.flatnonzero(problem.rounds)
    client_of = np.full(len(problem.rounds), -1)
    if len(positive) == 0:
        return client_of, 0
    found = solve_mip(problem.rounds[positive], problem.clients, time_limit_s=problem.time_left_s)
    if found.client_of is None:
        raise ServegymError(
            "milp-cold found no plan in time; give it more, or take the solver 'rebalance'"
        )
    client_of[positive] = found.client_of
    return client_of, max(found.lower_bound, problem.bound())


SOLVERS: Final[dict[str, Callable[[_Problem], _Found]]] = {
    "rebalance": _rebalance,
    "lpt": _longest_first,
    "milp": _milp,
    "milp-cold": _milp_cold,
}


def _certify(
    problem: _Problem, client_of: NDArray[np.int64], bound: int, solver: str, started: float
) -> CertifiedPlan:
    plan = _plan_of(problem.rounds, client_of, problem.clients)
    load = int(plan.loads(problem.rounds).max())
    return CertifiedPlan(plan, load, bound, solver, time.perf_counter() - started)


def _plan_of(rounds: NDArray[np.int64], client_of: NDArray[np.int64], clients: int) -> Plan:
    """Queue every client's requests longest first, ties by id."""
    held = np.bincount(client_of[client_of >= 0], minlength=clients)
    unplaced = np.flatnonzero(client_of < 0)
    # Requests without rounds are dealt round robin, the shortest queue first.
    client_of[unplaced] = np.resize(np.argsort(held, kind="stable"), len(unplaced))
    order = np.lexsort((-rounds, client_of))
    held = np.bincount(client_of, minlength=clients)
    return Plan(order, np.concatenate(([0], np.cumsum(held))))


def _checked_rounds(rounds: NDArray[np.int64]) -> NDArray[np.int64]:
    rounds = np.asarray(rounds)
    if rounds.ndim != 1 or not (rounds.size == 0 or np.issubdtype(rounds.dtype, np.integer)):
        raise ServegymError(
            f"rounds must be a row of whole numbers, got {rounds.dtype} of shape {rounds.shape}"
        )
    if rounds.size and not 0 <= rounds.min() <= rounds.max() <= MAX_TOKENS:
        raise ServegymError(
            f"rounds must lie in 0 … {MAX_TOKENS}, got {rounds.min()} … {rounds.max()}"
        )
    return np.ascontiguousarray(rounds, dtype=np.int64)


def _checked_clients(clients: int) -> int:
    if not 1 <= clients <= MAX_CLIENTS:
        raise ServegymError(f"clients must lie in 1 … {MAX_CLIENTS}, got {clients}")
    return int(clients)


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise ServegymError(f"the seed must be ≥ 0, got {seed}")
    return np.random.default_rng(seed)
