"""The paper's mixed-integer program for the offline plan (section IV.B), solved by HiGHS.

Minimise t over x ∈ {0, 1}: each request on one client, no client's rounds above t. Clients are
alike and so are requests of one length; a variant counts the requests of each length per client
instead (``counts``), which is the same problem with fewer variables. Where clients differ in speed
their rows count seconds, and what a client cannot hold has no variable above 0 there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import highspy
import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.highs import silent_highs, solve_interruptibly
from servegym.baselines.planning.servers import Servers
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
    lower_bound: float
    """Decode rounds, or seconds where speeds differ; proven up to the solver's tolerances."""


@dataclass(frozen=True, eq=False)
class _Kinds:
    """Requests that are alike: a column of the program stands for a kind on a client."""

    kind_of: NDArray[np.int64]  # (requests,)
    length: NDArray[np.int64]  # (kinds,) decode rounds, longest first
    needs: NDArray[np.int64]  # (kinds,) tokens
    count: NDArray[np.int64]  # (kinds,) requests


def solve_mip(
    rounds: NDArray[np.int64],
    clients: int | Servers,
    *,
    time_limit_s: float,
    start: NDArray[np.int64] | None = None,
    lower_bound: float = 0,
    formulation: str = "assignment",
    break_symmetry: bool = False,
) -> MipResult:
    """Assign requests to clients so that the largest load is least.

    Parameters
    ----------
    rounds
        Decode rounds of each request, shape (requests,), ≥ 0.
    clients
        Number of clients, ≥ 1, or what they are.
    time_limit_s
        Seconds for the solver; building the program comes on top.
    start
        Client of each request, a plan to start from; None starts cold.
    lower_bound
        A known bound on the largest load, added as t ≥ bound.
    formulation
        ``assignment``, the paper's, or ``counts``.
    break_symmetry
        Number the clients that are alike in the order of the longest request they hold: of the many
        plans that differ in the numbering alone, one is left. Helps small instances.

    Raises
    ------
    ServegymError
        If there is no such formulation, or the program would not fit into memory.
    """
    if not isinstance(clients, Servers):
        clients = Servers.alike(clients, len(rounds))
    servers = clients
    kinds = _kinds(rounds, servers, formulation)
    cells = len(kinds.length) * servers.clients
    if cells > MAX_CELLS:
        raise ServegymError(
            f"the program would have {cells} variables, at most {MAX_CELLS} "
            "are accepted; take the solver 'rebalance'"
        )
    unit = float(servers.round_s.min())  # the program counts rounds of the fastest client
    model = silent_highs()
    model.setOptionValue("time_limit", float(time_limit_s))
    model.setOptionValue("mip_rel_gap", 0.0)
    if servers.equally_fast:
        model.setOptionValue("mip_abs_gap", 1.0 - 2 * _BOUND_TOLERANCE)  # loads are whole
    program = _program(kinds, servers, lower_bound / unit)
    if break_symmetry:
        program.col_upper_ = _without_permutations(kinds, servers, np.array(program.col_upper_))
        start = None if start is None else _renumbered(kinds, servers, start)
    model.passModel(program)
    if start is not None:
        model.setSolution(_solution(kinds, servers, rounds, start))
    solve_interruptibly(model)
    info = model.getInfo()
    bound = max(lower_bound, _proven(info.mip_dual_bound, unit, servers))
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return MipResult(None, bound)
    values = np.rint(np.array(model.getSolution().col_value)[:-1]).astype(np.int64)
    client_of = _clients_of(kinds, values.reshape(-1, servers.clients))
    # The solver's bound holds up to its tolerances; a plan's load is exact.
    load = servers.span(_loads(servers, rounds, client_of))
    return MipResult(client_of, max(lower_bound, min(bound, load)))


def _kinds(rounds: NDArray[np.int64], servers: Servers, formulation: str) -> _Kinds:
    if formulation == "assignment":
        order = np.argsort(-rounds, kind="stable")
        ones = np.ones(len(rounds), dtype=np.int64)
        return _Kinds(np.argsort(order), rounds[order], servers.needs[order], ones)
    if formulation == "counts":
        # Requests that the same clients can hold need the same: the least memory that will do.
        memories = np.unique(servers.holds)
        needs = memories[np.searchsorted(memories, servers.needs)]
        pairs, kind_of, count = np.unique(
            np.stack([-rounds, needs]), axis=1, return_inverse=True, return_counts=True
        )
        return _Kinds(kind_of.ravel(), -pairs[0], pairs[1], count)
    raise unknown("formulation", formulation, FORMULATIONS)


def _program(kinds: _Kinds, servers: Servers, lower_bound: float) -> highspy.HighsLp:
    """Columns: kind k on client j at k · clients + j, then t. Rows: kinds, then clients."""
    sizes, clients = len(kinds.length), servers.clients
    cells = sizes * clients
    kind, client = np.divmod(np.arange(cells), clients)
    held = kinds.needs[kind] <= servers.holds[client]
    program = highspy.HighsLp()
    program.num_col_ = cells + 1
    program.num_row_ = sizes + clients
    program.col_cost_ = np.append(np.zeros(cells), 1.0)
    program.col_lower_ = np.append(np.zeros(cells), float(lower_bound))
    program.col_upper_ = np.append(kinds.count[kind] * held, highspy.kHighsInf)
    program.row_lower_ = np.append(kinds.count, np.full(clients, -highspy.kHighsInf))
    program.row_upper_ = np.append(kinds.count, np.zeros(clients))
    program.integrality_ = [highspy.HighsVarType.kInteger] * cells + [
        highspy.HighsVarType.kContinuous
    ]
    # Each cell stands in its kind's row and its client's; t stands in every client's row.
    rows = np.stack([kind, sizes + client], axis=1).ravel()
    slowness = servers.round_s / servers.round_s.min()
    entries = np.stack([np.ones(cells), kinds.length[kind] * slowness[client]], axis=1).ravel()
    matrix = program.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kColwise
    matrix.start_ = np.append(np.arange(0, 2 * cells + 1, 2), 2 * cells + clients)
    matrix.index_ = np.append(rows, sizes + np.arange(clients))
    matrix.value_ = np.append(entries, np.full(clients, -1.0))
    return program


def _without_permutations(
    kinds: _Kinds, servers: Servers, upper: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Forbid to each kind the clients that only later kinds can be the first to use."""
    kind, client = np.divmod(np.arange(len(upper) - 1), servers.clients)
    place = _places(servers.kinds[3])
    upper[:-1][place[client] >= np.cumsum(kinds.count)[kind]] = 0
    return upper


def _places(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each item's place within its group."""
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], group[order])
    places = np.empty_like(group)
    places[order] = np.arange(len(group)) - first
    return places


def _renumbered(kinds: _Kinds, servers: Servers, client_of: NDArray[np.int64]) -> NDArray[np.int64]:
    """Renumber a plan's clients that are alike in the order of the first kind that they hold."""
    order = np.argsort(kinds.kind_of, kind="stable")
    used, first, number = np.unique(client_of[order], return_index=True, return_inverse=True)
    group = servers.kinds[3]
    # The clients in use, by group and then by the first kind, take each group's clients in order.
    by_group = np.lexsort((first, group[used]))
    place = _places(group[used[by_group]])
    in_order = np.argsort(group, kind="stable")
    begins = np.searchsorted(group[in_order], group[used[by_group]])
    renamed = np.empty_like(used)
    renamed[by_group] = in_order[begins + place]
    renumbered = np.empty_like(client_of)
    renumbered[order] = renamed[number]
    return renumbered


def _solution(
    kinds: _Kinds, servers: Servers, rounds: NDArray[np.int64], client_of: NDArray[np.int64]
) -> highspy.HighsSolution:
    """Write a plan as values of the columns."""
    cell = kinds.kind_of * servers.clients + client_of
    held = np.bincount(cell, minlength=len(kinds.length) * servers.clients)
    slowness = servers.round_s / servers.round_s.min()
    span = (_loads(servers, rounds, client_of) * slowness).max()
    solution = highspy.HighsSolution()
    solution.col_value = np.append(held, span).astype(float).tolist()
    return solution


def _loads(
    servers: Servers, rounds: NDArray[np.int64], client_of: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rounds of each client, shape (clients,)."""
    loads = np.bincount(client_of, weights=rounds, minlength=servers.clients)
    return loads.astype(np.int64)


def _clients_of(kinds: _Kinds, held: NDArray[np.int64]) -> NDArray[np.int64]:
    """Deal the requests of each kind, by id, to the clients that hold some; shape (requests,)."""
    client_of = np.empty(len(kinds.kind_of), dtype=np.int64)
    by_kind = np.argsort(kinds.kind_of, kind="stable")
    clients = np.tile(np.arange(held.shape[1]), held.shape[0])
    client_of[by_kind] = np.repeat(clients, held.ravel())
    return client_of


def _proven(dual_bound: float, unit: float, servers: Servers) -> float:
    """Round the solver's bound up to the next span of a plan, with care for its tolerances."""
    if not math.isfinite(dual_bound):
        return 0
    return servers.next_span(max(0.0, (dual_bound - _BOUND_TOLERANCE) * unit))
