"""The joint problem of small cases as a time-indexed mixed-integer program, solved by HiGHS.

With t = 0 … H a decode clock, k = 0 … K − 1 the stages at one clock, q a kind of requests:

* x[q, t, k] requests of kind q start at clock t in stage k (whole, at most their number);
* o[t, k] = 1 where that stage is run; it costs the overhead and an affine prefill's base;
* y[t, n] = 1 where round t has n active clients, at b(n) seconds; where rounds count alone
  (``JointProblem.counts_rounds``) only n = J, at b₀ seconds, and "at most" in place of "exactly";
* levelled prefill: z[t, k, l] = 1 for the level, u[t, k] whole top levels before it; affine prefill with
  a floor: f[t, k] ≥ 0 seconds that the floor adds.

Every request starts once; those running into clock t and those admitted up to stage k fit on J clients
(requests of no rounds leave at once); a stage that is not run admits nobody. Cuts: no round without one
before it, Σ o ≥ ⌈I/J⌉, Σ y ≥ the bound on rounds, y[t] ≥ the share of a kind that runs at t.

H comes from a known schedule: more rounds cost more than it. K = 1 + the number of requests without
rounds where two stages cost no less than one of both (they can be merged where both fit at once, and
they do if all their members run on); else every request at a clock may have a stage of its own.
The program is exact for every cost model of ``CostTables``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array

from servegym.baselines.exact_problem import JointProblem, Schedule, replay
from servegym.baselines.highs import silent_highs, solve_interruptibly
from servegym.envs.errors import ServegymError
from servegym.envs.makespan_bound import rounds_lower_bound

MAX_STARTS: Final = 20_000
"""Most variables x; a program of this size takes seconds to build and, most often, hours to solve."""

_MOST_TOKENS: Final = 20_000  # tokens of a stage up to which levels are compared in pairs

_TOLERANCE: Final = 1e-6  # relative; what the solver's bound may be too high by

Term = tuple[int, float]


@dataclass(frozen=True)
class MipOptimum:
    """What HiGHS found; seconds without ``JointProblem.constant_s``."""

    schedule: Schedule | None
    bound_s: float
    finished: bool


@dataclass
class _Program:
    """Columns and rows as they are added; all columns begin at 0."""

    cost: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    bounds: list[tuple[float, float]] = field(default_factory=list)
    entries: list[tuple[int, int, float]] = field(default_factory=list)

    def column(self, cost: float, upper: float, *, whole: bool = True) -> int:
        self.cost.append(cost)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.cost) - 1

    def row(self, lower: float, upper: float, terms: list[Term]) -> None:
        self.entries += [(len(self.bounds), column, value) for column, value in terms]
        self.bounds.append((lower, upper))

    def at_most(self, upper: float, terms: list[Term]) -> None:
        self.row(-math.inf, upper, terms)

    def at_least(self, lower: float, terms: list[Term]) -> None:
        self.row(lower, math.inf, terms)

    def lowered(self) -> highspy.HighsLp:
        rows, columns, values = (np.array(part) for part in zip(*self.entries, strict=True))
        shape = (len(self.bounds), len(self.cost))
        matrix = csc_array((values, (rows.astype(int), columns.astype(int))), shape=shape)
        kinds = highspy.HighsVarType
        program = highspy.HighsLp()
        program.num_row_, program.num_col_ = shape
        program.col_cost_ = np.array(self.cost)
        program.col_lower_ = np.zeros(len(self.cost))
        program.col_upper_ = np.array(self.upper)
        program.row_lower_, program.row_upper_ = np.array(self.bounds).T
        program.integrality_ = [kinds.kInteger if w else kinds.kContinuous for w in self.whole]
        program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        program.a_matrix_.start_ = matrix.indptr
        program.a_matrix_.index_ = matrix.indices
        program.a_matrix_.value_ = matrix.data
        return program


def solve_joint_mip(problem: JointProblem, known: Schedule, time_limit_s: float) -> MipOptimum:
    """Look for the cheapest schedule; ``known`` is any one, its cost limits the rounds.

    Raises
    ------
    ServegymError
        If the program would be too large.
    """
    known_s = replay(problem, known) - problem.constant_s
    horizon = _horizon(problem, known_s)
    stages = _stages_at_a_clock(problem)
    starts = len(problem.kinds.count) * (horizon + 1) * stages
    if starts > MAX_STARTS:
        raise ServegymError(
            f"{len(problem.requests)} requests of these lengths on {problem.clients} clients are too "
            f"many for the exact program: {starts} variables for starts, it can do {MAX_STARTS}"
        )
    program, start = _build(problem, horizon, stages)
    model = silent_highs()
    model.setOptionValue("time_limit", float(time_limit_s))
    model.setOptionValue("mip_rel_gap", 0.0)
    model.setOptionValue("mip_abs_gap", 1e-9)
    # Seconds of kernels are milliseconds: scaled so that tolerances are relative to the whole.
    scale = 1.0 / known_s
    lowered = program.lowered()
    lowered.col_cost_ = np.array(program.cost) * scale
    model.passModel(lowered)
    solve_interruptibly(model)
    info = model.getInfo()
    finished = model.getModelStatus() == highspy.HighsModelStatus.kOptimal
    bound = info.mip_dual_bound if math.isfinite(info.mip_dual_bound) else 0.0
    schedule = None
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        values = np.rint(np.array(model.getSolution().col_value)[start]).astype(np.int64)
        schedule = _schedule(problem, values)
    return MipOptimum(schedule, max(0.0, bound - _TOLERANCE) * known_s, finished)


def _horizon(problem: JointProblem, known_s: float) -> int:
    """Return the most decode rounds that a schedule as cheap as the known one can have."""
    rounds = problem.requests.decode_rounds
    work = int(rounds.sum())
    if problem.counts_rounds:
        base_s, slope_s = problem.decode_line
        known_s -= slope_s * work
    else:
        base_s = float(problem.decode_s[1:].min())
    if base_s * work <= known_s:
        return work
    return math.floor(known_s / base_s * (1 + 1e-9))


def _stages_at_a_clock(problem: JointProblem) -> int:
    idle = int((problem.requests.decode_rounds == 0).sum())
    if problem.max_prefill_tokens == 0 and _merging_pays(problem):
        return 1 + idle
    return min(len(problem.requests), problem.clients + idle)


def _merging_pays(problem: JointProblem) -> bool:
    """Return whether one stage never costs more than two with the same members."""
    if not problem.is_levelled:
        return True
    most = _most_tokens(problem)
    if most > _MOST_TOKENS:
        return False
    tokens = np.arange(most + 1)
    cost_s = np.array([problem.batch_s(np.array([n])) for n in tokens])
    cost_s[0] = 0.0
    return all(
        bool(np.all(cost_s[n : most + 1] <= cost_s[n] + cost_s[: most + 1 - n] + 1e-12))
        for n in range(1, most // 2 + 1)
    )


def _most_tokens(problem: JointProblem) -> int:
    return int(np.sort(problem.requests.prompt_tokens)[-problem.clients :].sum())


def _build(
    problem: JointProblem, horizon: int, stages: int
) -> tuple[_Program, NDArray[np.int64]]:
    """Return the program and the columns of x, shape (kinds, horizon + 1, stages)."""
    kinds, clients = problem.kinds, problem.clients
    program = _Program()
    member_s = _member_seconds(problem)
    slope_s = problem.decode_line[1] if problem.counts_rounds else 0.0
    start = np.zeros((len(kinds.count), horizon + 1, stages), dtype=np.int64)
    for q, (count, rounds) in enumerate(zip(kinds.count, kinds.rounds, strict=True)):
        for t in range(horizon + 1):
            for k in range(stages):
                upper = float(count) if t + rounds <= horizon else 0.0
                start[q, t, k] = program.column(member_s[q] + slope_s * float(rounds), upper)
        program.row(count, count, [(int(x), 1.0) for x in start[q].ravel()])
    run = _add_rounds(program, problem, start)
    opened: list[Term] = []
    for t in range(horizon + 1):
        previous: int | None = None
        for k in range(stages):
            stage = _add_stage(program, problem, start[:, t, k])
            opened.append((stage, 1.0))
            if previous is not None:
                program.at_least(0.0, [(previous, 1.0), (stage, -1.0)])
            previous = stage
            admitted = [(int(x), 1.0) for x in start[:, t, k]]
            earlier = [
                (int(x), 1.0) for x in start[kinds.rounds > 0, t, :k].ravel()
            ]
            program.at_most(clients, [*_running(problem, start, t), *earlier, *admitted])
    program.at_least(math.ceil(len(problem.requests) / clients), opened)
    least = rounds_lower_bound(problem.requests.decode_rounds, clients)
    if least > 0:
        program.at_least(least, [term for terms in run for term in terms])
    return program, start


def _member_seconds(problem: JointProblem) -> NDArray[np.float64]:
    """Return what a request adds to its stage whatever its company, by kind."""
    rates, prompts = problem.costs.rates[0], problem.kinds.prompt.astype(float)
    member_s = np.full(len(prompts), float(rates.overhead_per_client_s))
    if not problem.is_levelled:
        member_s += rates.prefill_per_token_s * prompts
        member_s += rates.prefill_per_token_squared_s * prompts**2
    return member_s


def _running(problem: JointProblem, start: NDArray[np.int64], t: int) -> list[Term]:
    """Return the requests that started before clock t and run on past it."""
    terms: list[Term] = []
    for q, rounds in enumerate(problem.kinds.rounds):
        terms += [(int(x), 1.0) for x in start[q, max(0, t - int(rounds) + 1) : t].ravel()]
    return terms


def _add_rounds(
    program: _Program, problem: JointProblem, start: NDArray[np.int64]
) -> list[list[Term]]:
    """Add y and what makes it; return for each round the columns that say whether it is run."""
    kinds, clients = problem.kinds, problem.clients
    sizes, costs = list(range(1, clients + 1)), problem.decode_s[1:].tolist()
    if problem.counts_rounds:
        sizes, costs = [clients], [problem.decode_line[0]]
    run: list[list[Term]] = []
    for t in range(start.shape[1] - 1):
        columns = [program.column(cost, 1.0) for cost in costs]
        run.append([(column, 1.0) for column in columns])
        program.at_most(1.0, run[t])
        active = _running(problem, start, t)
        now = start[kinds.rounds > 0, t, :].ravel()
        active += [(int(x), 1.0) for x in now]
        held = [(column, -float(size)) for column, size in zip(columns, sizes, strict=True)]
        program.row(-math.inf if problem.counts_rounds else 0.0, 0.0, [*active, *held])
        if t > 0:
            program.at_least(0.0, [*run[t - 1], *((column, -1.0) for column in columns)])
        for q, rounds in enumerate(kinds.rounds):
            own = start[q, max(0, t - int(rounds) + 1) : t + 1].ravel() if rounds > 0 else []
            share = float(min(int(kinds.count[q]), clients))
            program.at_most(
                0.0, [*((int(x), 1.0) for x in own), *((column, -share) for column in columns)]
            )
    return run


def _add_stage(program: _Program, problem: JointProblem, admitted: NDArray[np.int64]) -> int:
    """Add a stage that may admit these columns of x; return the column that says it is run."""
    rates, kinds = problem.costs.rates[0], problem.kinds
    budget = problem.max_prefill_tokens
    base_s = float(rates.overhead_base_s)
    if not problem.is_levelled:
        base_s += float(rates.prefill_base_s)
    stage = program.column(base_s, 1.0)
    program.at_most(0.0, [*((int(x), 1.0) for x in admitted), (stage, -float(problem.clients))])
    tokens = [(int(x), float(p)) for x, p in zip(admitted, kinds.prompt, strict=True)]
    if budget > 0:  # a prompt above the budget fills it, so it is alone
        filled = [(x, min(p, float(budget))) for x, p in tokens]
        program.at_most(0.0, [*filled, (stage, -float(budget))])
    if problem.is_levelled:
        _add_levels(program, problem, tokens, stage)
    elif rates.prefill_floor_s > rates.prefill_base_s:
        short_s = float(rates.prefill_floor_s - rates.prefill_base_s)
        added = program.column(1.0, math.inf, whole=False)
        squared_s = float(rates.prefill_per_token_squared_s)
        line = [
            (x, float(rates.prefill_per_token_s) * p + squared_s * p * p) for x, p in tokens
        ]
        program.at_least(0.0, [(added, 1.0), *line, (stage, -short_s)])
    return stage


def _add_levels(
    program: _Program, problem: JointProblem, tokens: list[Term], stage: int
) -> None:
    most = _most_tokens(problem)
    capacity, seconds = problem.costs.prefill_level_tokens[0], problem.costs.prefill_level_s[0]
    needed = min(int(np.searchsorted(capacity, most)) + 1, len(capacity))
    levels = [program.column(float(seconds[level]), 1.0) for level in range(needed)]
    holds = [
        (column, -float(size)) for column, size in zip(levels, capacity[:needed], strict=True)
    ]
    whole = most // int(capacity[-1])
    if whole > 0:
        tops = program.column(float(seconds[-1]), float(whole))
        holds.append((tops, -float(capacity[-1])))
        program.at_most(0.0, [(tops, 1.0), (stage, -float(whole))])
        program.at_most(0.0, [*((column, 1.0) for column in levels), (stage, -1.0)])
    else:
        program.row(0.0, 0.0, [*((column, 1.0) for column in levels), (stage, -1.0)])
    program.at_most(0.0, [*tokens, *holds])


def _schedule(problem: JointProblem, values: NDArray[np.int64]) -> Schedule:
    """Read the stages off x; a clock at which nobody is active does not count."""
    kinds = problem.kinds
    busy = np.zeros(values.shape[1], dtype=np.int64)
    for q, t, _ in np.argwhere(values > 0):
        busy[t : t + kinds.rounds[q]] = 1
    clock = np.concatenate(([0], np.cumsum(busy)))
    waiting = [list(ids) for ids in kinds.members]
    schedule: Schedule = []
    for t in range(values.shape[1]):
        for k in range(values.shape[2]):
            ids = [i for q in range(len(waiting)) for i in _take(waiting[q], int(values[q, t, k]))]
            if ids:
                schedule.append((int(clock[t]), tuple(sorted(ids))))
    return schedule


def _take(ids: list[int], count: int) -> list[int]:
    taken = ids[:count]
    del ids[:count]
    return taken
