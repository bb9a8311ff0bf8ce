"""The joint problem of small cases as a time-indexed mixed-integer program, solved by HiGHS.

With t = 0 … H a decode clock, b a batch (a number of requests of each kind) and J clients:

* z[t, b]: stages at clock t that admit batch b; each costs the batch's seconds. Requests of a kind that
  start at t, the x[i, t] of the usual program, are sums of these; a batch in place of a token level
  makes the program exact for every cost model and token budget.
* y[t, n] = 1 where round t has n active clients, at b(n) seconds; where rounds count alone
  (``JointProblem.counts_rounds``) only n = J, at b₀ seconds, with "at most" in place of "exactly".
* w[t, m] = 1 where a stage at clock t admits m requests without rounds. Such requests leave with their
  stage, so several stages at a clock may admit more than J requests together. If any order of these
  stages fits, most such requests first does; in this order each stage must find enough idle clients.

Every request starts once; n requests whose rounds include round t are active in it. Cuts: no round
without one before it; stages and rounds at least those of ``servegym.envs.bounds.batch`` (⌈I/J⌉; area,
longest, pigeonhole). H comes from a known schedule: more rounds would cost more than it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import highspy
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csc_array

from servegym.baselines.exact.problem import JointProblem, Outcome, count_batches
from servegym.baselines.planning.highs import silent_highs, solve_interruptibly
from servegym.baselines.schedules import Schedule, Stage
from servegym.envs.bounds.batch import lower_bound
from servegym.envs.errors import ServegymError

MAX_STAGES: Final = 200_000
"""Most variables z; larger programs take longer to build than small cases take to solve."""

_TOLERANCE: Final = 1e-6  # relative; how far too high the solver's bound may be


@dataclass
class _Program:
    """Columns, all of whole numbers ≥ 0, and rows as they are added."""

    costs: list[NDArray[np.float64]] = field(default_factory=list)
    uppers: list[NDArray[np.float64]] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    entries: list[NDArray[np.float64]] = field(default_factory=list)
    columns: int = 0

    def add_columns(self, costs: ArrayLike, upper: ArrayLike) -> NDArray[np.int64]:
        """Add columns and return their places."""
        cost = np.asarray(costs, dtype=float)
        self.costs.append(cost)
        self.uppers.append(np.broadcast_to(np.asarray(upper, dtype=float), cost.shape))
        self.columns += len(cost)
        return np.arange(self.columns - len(cost), self.columns)

    def add_row(self, lower: float, upper: float, *terms: tuple[ArrayLike, ArrayLike]) -> None:
        """Add lower ≤ Σ values · columns ≤ upper; each term is columns and their values."""
        for columns, values in terms:
            places = np.atleast_1d(np.asarray(columns))
            entry = np.stack(np.broadcast_arrays(len(self.lower), places, values), axis=1)
            self.entries.append(entry[entry[:, 2] != 0].astype(float))
        self.lower.append(lower)
        self.upper.append(upper)

    def lowered(self, scale: float) -> highspy.HighsLp:
        """Return the program with all costs times ``scale``."""
        row, column, value = np.concatenate(self.entries).T
        shape = (len(self.lower), self.columns)
        matrix = csc_array((value, (row.astype(int), column.astype(int))), shape=shape)
        program = highspy.HighsLp()
        program.num_row_, program.num_col_ = shape
        program.col_cost_ = np.concatenate(self.costs) * scale
        program.col_lower_ = np.zeros(self.columns)
        program.col_upper_ = np.concatenate(self.uppers)
        program.row_lower_ = np.array(self.lower)
        program.row_upper_ = np.array(self.upper)
        program.integrality_ = [highspy.HighsVarType.kInteger] * self.columns
        program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        program.a_matrix_.start_ = matrix.indptr
        program.a_matrix_.index_ = matrix.indices
        program.a_matrix_.value_ = matrix.data
        return program


@dataclass(frozen=True, eq=False)
class _Batches:
    """All stages; K kinds, longest request of D rounds."""

    taken: NDArray[np.int64]  # (B, K) requests of each kind
    seconds: NDArray[np.float64]  # (B,)
    running: NDArray[np.int64]  # (B, D + 1) members that run in the n-th round after the stage
    brief: NDArray[np.int64]  # (B,) members without rounds
    copies: NDArray[np.int64]  # (B,) how often the requests suffice for it


def solve_joint_mip(problem: JointProblem, known: Schedule, time_limit_s: float) -> Outcome:
    """Look for the cheapest schedule; the cost of ``known``, any one, limits the rounds.

    Raises
    ------
    ServegymError
        If the program would be too large.
    """
    known_s = problem.makespan_s(known) - problem.constant_s
    horizon = _horizon(problem, known_s)
    stages = count_batches(problem.kinds.count.tolist(), problem.clients) * (horizon + 1)
    if stages > MAX_STAGES:
        raise ServegymError(
            f"{len(problem.requests)} requests on {problem.clients} clients are too many for the "
            f"exact program: up to {stages} different stages in {horizon} rounds, it can do "
            f"{MAX_STAGES}"
        )
    batches = _batches(problem)
    model = silent_highs()
    model.setOptionValue("time_limit", float(time_limit_s))
    model.setOptionValue("mip_rel_gap", 0.0)
    model.setOptionValue("mip_abs_gap", 1e-9)
    # The solver's tolerances are absolute: the known schedule is scaled to a cost of 16 … 32, by a
    # power of two, so that whole seconds keep a common divisor that the solver can find.
    scale = 2.0 ** (5 - math.ceil(math.log2(known_s))) if known_s > 0 else 1.0
    model.passModel(_build(problem, batches, horizon).lowered(scale))
    solve_interruptibly(model)
    info = model.getInfo()
    finished = model.getModelStatus() == highspy.HighsModelStatus.kOptimal
    bound_s = info.mip_dual_bound / scale if math.isfinite(info.mip_dual_bound) else 0.0
    schedule = None
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        values = np.rint(model.getSolution().col_value).astype(np.int64)
        stage = values[: len(batches.taken) * (horizon + 1)]
        schedule = _schedule(problem, batches, stage.reshape(horizon + 1, -1))
    return Outcome(schedule, max(0.0, bound_s - _TOLERANCE * known_s), finished)


def _horizon(problem: JointProblem, known_s: float) -> int:
    """Return the most decode rounds that a schedule as cheap as the known one can have."""
    work = int(problem.requests.decode_rounds.sum())
    if problem.counts_rounds:
        base_s, slope_s = problem.decode_line
        known_s -= slope_s * work
    else:
        base_s = float(problem.decode_s[1:].min())
    if base_s * work <= known_s:
        return work
    return math.floor(known_s / base_s * (1 + 1e-9))


def _batches(problem: JointProblem) -> _Batches:
    kinds = problem.kinds
    rows = sorted(problem.batches(), key=lambda row: (sum(row), [-count for count in row]))
    taken = np.array(rows, dtype=np.int64)
    elapsed = np.arange(kinds.rounds.max() + 1)
    with np.errstate(divide="ignore"):
        copies = np.where(taken > 0, kinds.count // np.maximum(taken, 1), len(problem.requests))
    return _Batches(
        taken,
        np.array([problem.batch_s(np.repeat(kinds.prompt, row)) for row in taken]),
        taken @ (kinds.rounds[:, None] > elapsed),
        taken @ (kinds.rounds == 0),
        copies.min(axis=1),
    )


def _build(problem: JointProblem, batches: _Batches, horizon: int) -> _Program:
    """Return the program; its first columns are z, clock by clock."""
    kinds, clients = problem.kinds, problem.clients
    program = _Program()
    slope_s = problem.decode_line[1] if problem.counts_rounds else 0.0
    seconds = batches.seconds + slope_s * (batches.taken @ kinds.rounds)
    longest = (batches.running > 0).sum(axis=1)
    stage = np.stack(
        [
            program.add_columns(seconds, np.where(t + longest <= horizon, batches.copies, 0))
            for t in range(horizon + 1)
        ]
    )  # (H + 1, B)
    for kind, count in enumerate(kinds.count):
        taken = np.broadcast_to(batches.taken[:, kind], stage.shape)
        program.add_row(count, count, (stage.ravel(), taken.ravel()))
    bound = lower_bound(problem.requests, clients, problem.costs, problem.max_prefill_tokens)
    program.add_row(bound.prefill_stages, math.inf, (stage.ravel(), 1.0))
    run = [_add_round(program, problem, _active(batches, stage, t)) for t in range(horizon)]
    if run:
        program.add_row(bound.decode_rounds, math.inf, (np.concatenate(run), 1.0))
    for before, after in pairwise(run):
        program.add_row(0.0, math.inf, (before, 1.0), (after, -1.0))
    for t in range(horizon + 1):
        _add_brief(program, problem, batches, stage, t)
    return program


def _active(
    batches: _Batches, stage: NDArray[np.int64], t: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the term that counts the clients active in round t."""
    first = max(0, t - batches.running.shape[1] + 1)
    elapsed = t - np.arange(first, t + 1)
    return stage[first : t + 1].ravel(), batches.running[:, elapsed].T.ravel()


def _add_round(
    program: _Program, problem: JointProblem, active: tuple[ArrayLike, ArrayLike]
) -> NDArray[np.int64]:
    """Add y of one round and return its columns."""
    clients = problem.clients
    if problem.counts_rounds:
        run = program.add_columns([problem.decode_line[0]], 1.0)
        program.add_row(-math.inf, 0.0, active, (run, -float(clients)))
        return run
    run = program.add_columns(problem.decode_s[1:], 1.0)
    program.add_row(0.0, 0.0, active, (run, -np.arange(1.0, clients + 1.0)))
    program.add_row(-math.inf, 1.0, (run, 1.0))
    return run


def _add_brief(
    program: _Program, problem: JointProblem, batches: _Batches, stage: NDArray[np.int64], t: int
) -> None:
    """Give requests without rounds a place for the time of their stage."""
    active = _active(batches, stage, t)
    for brief in np.unique(batches.brief[batches.brief > 0]):
        alike = np.flatnonzero(batches.brief == brief)
        later = np.flatnonzero(batches.brief < brief)
        held = program.add_columns([0.0], 1.0)
        most = float((problem.requests.decode_rounds == 0).sum() // brief)
        program.add_row(-math.inf, 0.0, (stage[t, alike], 1.0), (held, -most))
        program.add_row(
            -math.inf,
            problem.clients,
            active,
            (stage[t, later], -batches.running[later, 0]),
            (held, float(brief)),
        )


def _schedule(problem: JointProblem, batches: _Batches, values: NDArray[np.int64]) -> Schedule:
    """Read the stages off z; a clock at which no client is active does not count."""
    busy = np.zeros(len(values) + 1, dtype=np.int64)
    chosen = [(t, b) for t, b in np.argwhere(values > 0) for _ in range(values[t, b])]
    for t, b in chosen:
        busy[t + 1 : t + 1 + np.count_nonzero(batches.running[b])] = 1
    clock = np.cumsum(busy)
    waiting = [list(ids) for ids in problem.kinds.members]
    schedule: list[Stage] = []
    for t, b in sorted(chosen, key=lambda stage: (stage[0], -batches.brief[stage[1]])):
        ids = [waiting[k].pop(0) for k, n in enumerate(batches.taken[b]) for _ in range(n)]
        schedule.append(Stage(int(clock[t]), tuple(sorted(ids))))
    return schedule
