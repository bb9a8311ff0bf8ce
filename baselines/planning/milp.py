"""The paper's mixed-integer program for the offline plan (section IV.B), solved by HiGHS.

Minimise t over x ∈ {0, 1}: each request on one client, no client's rounds above t. Clients are
alike and so are requests of one length; a variant counts the requests of each length per client
instead (``counts``), which is the same problem with fewer variables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import highspy
import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.highs import silent_highs, solve_interruptibly
from servegym.envs.errors import ServegymError, unknown

FORMULATIONS: Final = ("assignment", "counts")

MAX_CELLS: Final = 5_000_000
"""Requests × clients accepted; a program of this size takes gigabytes."""

_BOUND_TOLERANCE: Final = 1e-3
"""Rounds that the solver's bound may be too high by; far above its feasibility tolerance."""


@dataclass(frozen=True, eq=False)
class MipResult:
    """What HiGHS found and proved before the time was up."""

    client_of: NDArray[np.int64] | None  # (requests,) None: no plan found
    lower_bound: int
    """Decode rounds; proven up to the solver's tolerances."""


@dataclass(frozen=True, eq=False)
class _Kinds:
    """Requests that are alike: a column of the program stands for a kind on a client."""

    kind_of: NDArray[np.int64]  # (requests,)
    length: NDArray[np.int64]  # (kinds,) decode rounds, longest first
    count: NDArray[np.int64]  # (kinds,) requests


def solve_mip(
    rounds: NDArray[np.int64],
    clients: int,
    *,
    time_limit_s: float,
    start: NDArray[np.int64] | None = None,
    lower_bound: int = 0,
    formulation: str = "assignment",
    break_symmetry: bool = False,
) -> MipResult:
    """Assign requests to clients so that the largest load is least.

    Parameters
    ----------
    rounds
        Decode rounds of each request, shape (requests,), ≥ 0.
    clients
        Number of clients, ≥ 1.
    time_limit_s
        Seconds for the solver; building the program comes on top.
    start
        Client of each request, a plan to start from; None starts cold.
    lower_bound
        A known bound on the largest load, added as t ≥ bound.
    formulation
        ``assignment``, the paper's, or ``counts``.
    break_symmetry
        Number the clients in the order of the longest request they hold: of the many plans that
        differ in the numbering alone, one is left. Helps small instances.

    Raises
    ------
    ServegymError
        If there is no such formulation, or the program would not fit into memory.
    """
    kinds = _kinds(rounds, formulation)
    if len(kinds.length) * clients > MAX_CELLS:
        raise ServegymError(
            f"the program would have {len(kinds.length) * clients} variables, at most {MAX_CELLS} "
            "are accepted; take the solver 'rebalance'"
        )
    model = silent_highs()
    model.setOptionValue("time_limit", float(time_limit_s))
    model.setOptionValue("mip_rel_gap", 0.0)
    model.setOptionValue("mip_abs_gap", 1.0 - 2 * _BOUND_TOLERANCE)  # loads are whole
    program = _program(kinds, clients, lower_bound)
    if break_symmetry:
        program.col_upper_ = _without_permutations(kinds, clients, np.array(program.col_upper_))
        start = None if start is None else _renumbered(kinds, start)
    model.passModel(program)
    if start is not None:
        model.setSolution(_solution(kinds, clients, rounds, start))
    solve_interruptibly(model)
    info = model.getInfo()
    bound = max(lower_bound, _whole_bound(info.mip_dual_bound))
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return MipResult(None, bound)
    values = np.rint(np.array(model.getSolution().col_value)[:-1]).astype(np.int64)
    client_of = _clients_of(kinds, values.reshape(-1, clients))
    # The solver's bound holds up to its tolerances; a plan's load is exact.
    load = int(np.bincount(client_of, weights=rounds, minlength=clients).max())
    return MipResult(client_of, max(lower_bound, min(bound, load)))


def _kinds(rounds: NDArray[np.int64], formulation: str) -> _Kinds:
    if formulation == "assignment":
        order = np.argsort(-rounds, kind="stable")
        return _Kinds(np.argsort(order), rounds[order], np.ones(len(rounds), dtype=np.int64))
    if formulation == "counts":
        length, kind_of, count = np.unique(-rounds, return_inverse=True, return_counts=True)
        return _Kinds(kind_of, -length, count)
    raise unknown("formulation", formulation, FORMULATIONS)


def _program(kinds: _Kinds, clients: int, lower_bound: int) -> highspy.HighsLp:
    """Columns: kind k on client j at k · clients + j, then t. Rows: kinds, then clients."""
    sizes = len(kinds.length)
    cells = sizes * clients
    program = highspy.HighsLp()
    program.num_col_ = cells + 1
    program.num_row_ = sizes + clients
    program.col_cost_ = np.append(np.zeros(cells), 1.0)
    program.col_lower_ = np.append(np.zeros(cells), float(lower_bound))
    program.col_upper_ = np.append(np.repeat(kinds.count, clients), highspy.kHighsInf)
    program.row_lower_ = np.append(kinds.count, np.full(clients, -highspy.kHighsInf))
    program.row_upper_ = np.append(kinds.count, np.zeros(clients))
    program.integrality_ = [highspy.HighsVarType.kInteger] * cells + [
        highspy.HighsVarType.kContinuous
    ]
    kind, client = np.divmod(np.arange(cells), clients)
    # Each cell stands in its kind's row and its client's; t stands in every client's row.
    rows = np.stack([kind, sizes + client], axis=1).ravel()
    entries = np.stack([np.ones(cells), kinds.length[kind]], axis=1).ravel()
    matrix = program.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kColwise
    matrix.start_ = np.append(np.arange(0, 2 * cells + 1, 2), 2 * cells + clients)
    matrix.index_ = np.append(rows, sizes + np.arange(clients))
    matrix.value_ = np.append(entries, np.full(clients, -1.0))
    return program


def _without_permutations(
    kinds: _Kinds, clients: int, upper: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Forbid to each kind the clients that only later kinds can be the first to use."""
    kind, client = np.divmod(np.arange(len(upper) - 1), clients)
    upper[:-1][client >= np.cumsum(kinds.count)[kind]] = 0
    return upper


def _renumbered(kinds: _Kinds, client_of: NDArray[np.int64]) -> NDArray[np.int64]:
    """Renumber a plan's clients in the order of the first kind that they hold."""
    by_kind = client_of[np.argsort(kinds.kind_of, kind="stable")]
    used, first, number = np.unique(by_kind, return_index=True, return_inverse=True)
    rank = np.empty(len(used), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(used))
    renumbered = np.empty_like(client_of)
    renumbered[np.argsort(kinds.kind_of, kind="stable")] = rank[number]
    return renumbered


def _solution(
    kinds: _Kinds, clients: int, rounds: NDArray[np.int64], client_of: NDArray[np.int64]
) -> highspy.HighsSolution:
    """Write a plan as values of the columns."""
    cell = kinds.kind_of * clients + client_of
    held = np.bincount(cell, minlength=len(kinds.length) * clients)
    load = np.bincount(client_of, weights=rounds, minlength=clients).max()
    solution = highspy.HighsSolution()
    solution.col_value = np.append(held, load).astype(float).tolist()
    return solution


def _clients_of(kinds: _Kinds, held: NDArray[np.int64]) -> NDArray[np.int64]:
    """Deal the requests of each kind, by id, to the clients that hold some; shape (requests,)."""
    client_of = np.empty(len(kinds.kind_of), dtype=np.int64)
    by_kind = np.argsort(kinds.kind_of, kind="stable")
    clients = np.tile(np.arange(held.shape[1]), held.shape[0])
    client_of[by_kind] = np.repeat(clients, held.ravel())
    return client_of


def _whole_bound(dual_bound: float) -> int:
    """Round the solver's bound up to whole rounds, with care for its tolerances."""
    return math.ceil(dual_bound - _BOUND_TOLERANCE) if math.isfinite(dual_bound) else 0
