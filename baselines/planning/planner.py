"""The offline plan: the largest client load as small as can be, with a proof (paper, section IV.B).

Longest-first loads are evened out by exact splits of pairs (``rebalancing``). Mostly the largest
load meets the bound of area and pigeonhole within milliseconds, which proves it optimal. Where it
does not, pricing raises the bound (``pattern_bound``) while the walk goes on, until load and bound
meet or the time is up.

Clients that differ in speed or memory (a ``Fleet``) are planned so that the last one ends as early as can
be; loads are then in seconds, the bound is that of ``span_bound``, and nothing is priced.
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
from servegym.baselines.planning.servers import Servers
from servegym.baselines.planning.span_bound import span_lower_bound
from servegym.baselines.planning.walk import Walk, load_walk
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.machine.layout import Fleet
from servegym.envs.simulator.heap import deal_by_number
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
    load: float  # of the client that ends last: whole rounds, or seconds where speeds differ
    lower_bound: float  # in the same unit; no plan has a smaller load
    solver: str
    seconds: float  # of the search
    unit: str = "rounds"  # or s

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
            f"load {self.load} {self.unit}, lower bound {self.lower_bound}, {self.status} "
            f"(gap {self.gap:.3%}), {self.seconds:.3f} s, solver {self.solver}"
        )


@dataclass(frozen=True, eq=False)
class _Problem:
    """What a solver is given."""

    rounds: NDArray[np.int64]  # (requests,) ≥ 0
    servers: Servers
    deadline: float  # reading of time.perf_counter
    rng: np.random.Generator

    @property
    def time_left_s(self) -> float:
        return max(0.0, self.deadline - time.perf_counter())

    @property
    def clients(self) -> int:
        return self.servers.clients

    def bound(self) -> float:
        return span_lower_bound(self.rounds, self.servers)

    def walk(self) -> Walk:
        return Walk(self.rounds, self.servers, self.rng, self.deadline)


_Found = tuple[NDArray[np.int64], float]  # client of each request, −1: any; a lower bound


def plan_offline(
    rounds: NDArray[np.int64],
    clients: int | Fleet,
    *,
    tokens: NDArray[np.int64] | None = None,
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
        Number of clients, 1 … ``MAX_CLIENTS``, or what they are (``lay_out(task).fleet()``).
    tokens
        Prompt and output tokens of each request, shape (requests,). A client whose memory is smaller does
        not get it; a request that fits nowhere is in no queue. None: memory does not limit.
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
    served, problem = _pose(rounds, clients, tokens, started + time_limit_s, seed)
    client_of, lower_bound = SOLVERS[solver](problem)
    return _certify(problem, served, client_of, lower_bound, solver, started)


def rebalanced_plan(
    rounds: NDArray[np.int64],
    clients: int | Fleet,
    *,
    tokens: NDArray[np.int64] | None = None,
    tries: int = FIRST_TRIES,
    seed: int = 0,
) -> CertifiedPlan:
    """Plan by a fixed number of moves of the walk, whatever the clock says.

    The same arguments give the same plan on every machine. All else is as in ``plan_offline``.
    """
    load_kernels()
    started = time.perf_counter()
    if tries < 0:
        raise ServegymError(f"tries must be ≥ 0, got {tries}")
    served, problem = _pose(rounds, clients, tokens, math.inf, seed)
    bound = problem.bound()
    walk = problem.walk()
    walk.aim(bound, tries)
    return _certify(problem, served, walk.client_of(), bound, "rebalance", started)


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


def _close_gap(problem: _Problem, walk: Walk, bound: float) -> float:
    """Lower the load and raise the bound in turn until they meet; return the bound."""
    if not problem.servers.are_alike:
        _lower_load(problem, walk, bound)
        return bound
    prices = PatternBound(problem.rounds, problem.clients)
    while bound < walk.best and problem.time_left_s > 0:
        if walk.aim(walk.best - 1, TRIES_A_CLIENT * problem.clients):
            continue
        prices.learn(problem.rounds, walk.client_of())
        bound = prices.raise_bound(int(bound), int(walk.best), problem.deadline)
        walk.kick()
    return bound


def _lower_load(problem: _Problem, walk: Walk, bound: float) -> None:
    """Lower the load until it meets the bound or the time is up: by half the gap, else by anything."""
    tries = TRIES_A_CLIENT * problem.clients
    while bound < walk.best and problem.time_left_s > 0:
        halfway, least = bound + (walk.best - bound) / 2, problem.servers.before(walk.best)
        if not walk.aim(min(halfway, least), tries):
            walk.kick()
            walk.aim(least, tries)


def _milp(problem: _Problem) -> _Found:
    bound = problem.bound()
    walk = problem.walk()
    walk.aim(bound, FIRST_TRIES)
    return _solve_from(problem, walk.client_of(), bound)


def _solve_from(
    problem: _Problem, client_of: NDArray[np.int64], bound: float, *, break_symmetry: bool = False
) -> _Found:
    """Improve a plan by the mixed-integer program; requests without rounds stay out of it."""
    positive = np.flatnonzero(problem.rounds)
    if len(positive) == 0:
        return client_of, 0
    found = solve_mip(
        problem.rounds[positive],
        problem.servers.only(positive),
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
    servers = problem.servers.only(positive)
    found = solve_mip(problem.rounds[positive], servers, time_limit_s=problem.time_left_s)
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


def _pose(
    rounds: NDArray[np.int64],
    clients: int | Fleet,
    tokens: NDArray[np.int64] | None,
    deadline: float,
    seed: int,
) -> tuple[NDArray[np.int64], _Problem]:
    """Check the arguments; return the ids of the requests that fit somewhere, and their problem."""
    rounds = _checked_rounds(rounds)
    if not isinstance(clients, Fleet):
        servers = Servers.alike(_checked_clients(clients), len(rounds))
        return np.arange(len(rounds)), _Problem(rounds, servers, deadline, _generator(seed))
    _checked_clients(len(clients.round_s))
    needs = np.zeros_like(rounds) if tokens is None else np.asarray(tokens)
    if needs.shape != rounds.shape:
        raise ServegymError(
            f"tokens must have the shape of rounds, {rounds.shape}, got {needs.shape}"
        )
    served = np.flatnonzero(needs <= clients.tokens.max())
    servers = Servers.of(clients, needs[served])
    return served, _Problem(rounds[served], servers, deadline, _generator(seed))


def _certify(
    problem: _Problem,
    served: NDArray[np.int64],
    client_of: NDArray[np.int64],
    bound: float,
    solver: str,
    started: float,
) -> CertifiedPlan:
    plan = _plan_of(problem, served, client_of)
    loads = np.bincount(client_of, weights=problem.rounds, minlength=problem.clients)
    load = problem.servers.span(loads.astype(np.int64))
    unit = "rounds" if problem.servers.equally_fast else "s"
    return CertifiedPlan(plan, load, bound, solver, time.perf_counter() - started, unit)


def _plan_of(problem: _Problem, served: NDArray[np.int64], client_of: NDArray[np.int64]) -> Plan:
    """Queue every client's requests longest first, ties by id; write who is without rounds to clients."""
    rounds, servers = problem.rounds, problem.servers
    held = np.bincount(client_of[client_of >= 0], minlength=servers.clients)
    unplaced = np.flatnonzero(client_of < 0)
    # Requests without rounds are dealt round robin, the shortest queue first.
    if servers.limited:
        nothing, dealt = np.zeros(len(unplaced), np.int64), client_of[unplaced]
        alike = np.zeros(servers.clients)
        deal_by_number(nothing, servers.needs[unplaced], servers.holds, held, alike, dealt)
        client_of[unplaced] = dealt
    else:
        client_of[unplaced] = np.resize(np.argsort(held, kind="stable"), len(unplaced))
    order = np.lexsort((-rounds, client_of))
    held = np.bincount(client_of, minlength=servers.clients)
    return Plan(served[order], np.concatenate(([0], np.cumsum(held))))


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
