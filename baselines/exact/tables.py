"""What the search for the exact optimum looks up: batches, waiting sets, least times; its largest sizes."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.exact.problem import JointProblem, count_batches
from servegym.envs.bounds.batch import dual_vertices
from servegym.envs.errors import ServegymError
from servegym.envs.jit import allocating_kernel

# numpy's integers stand where int is written; numba converts, the checker does not.
# mypy: disable-error-code="arg-type,assignment"

MAX_WAITING_SETS: Final = 1 << 16
"""Most multisets of waiting requests: 16 requests, if all differ."""

MAX_BATCHES: Final = 8_000
"""Most different prefill stages."""

_KEY_BITS: Final = 62

Whole = NDArray[np.int64]
Real = NDArray[np.float64]


class Tables(NamedTuple):
    """What the search looks up; K kinds, B batches, W waiting sets, J clients.

    A waiting set is *packed*, a field of bits per kind with a guard bit above it, and *numbered*,
    0 … W − 1. In both forms a batch is removed by subtracting its own value.
    """

    rounds: Whole  # (K,) most first
    field: Whole  # (K,) lowest bit of each kind's field
    mask: Whole  # (K,) all bits of a field, without the guard
    guards: int
    first: Whole  # (J + 2,) batches of n requests are first[n] … first[n + 1] − 1
    batch_packed: Whole  # (B,)
    batch_number: Whole  # (B,)
    batch_s: Real  # (B,)
    batch_rounds: Whole  # (B, J) rounds of each member
    count: Whole  # (W,) requests
    work: Whole  # (W,) decode rounds
    prefill_s: Real  # (W, requests + 1) least time of at least so many stages
    decode_s: Real  # (J + 1,) round with n active clients
    duals: Real  # (V, 2) seconds per request-round and per round: the dual in servegym.envs.bounds.batch
    width: int  # bits of one client's rounds left
    counts_rounds: bool
    counts_stages: bool


def refuse_size(problem: JointProblem) -> None:
    """Raise ``ServegymError`` for a case too large for the tables; the message names a size that fits."""
    kinds, clients = problem.kinds, problem.clients
    sets = math.prod(int(count) + 1 for count in kinds.count)
    batches = count_batches(kinds.count.tolist(), clients)
    bits = sum(int(n).bit_length() + 1 for n in kinds.count) + clients * _width(problem)
    if sets > MAX_WAITING_SETS or batches > MAX_BATCHES or bits > _KEY_BITS:
        most = MAX_WAITING_SETS.bit_length() - 1
        while count_batches([1] * most, clients) > MAX_BATCHES or (
            2 * most + clients * _width(problem) > _KEY_BITS
        ):
            most -= 1
            if most == 0:
                break
        raise ServegymError(
            f"{len(problem.requests)} requests on {clients} clients are too many for the exact "
            f"search; with these clients and lengths it can do {most} different requests "
            "(more where some are equal)"
        )


def _width(problem: JointProblem) -> int:
    return int(problem.kinds.rounds.max()).bit_length()


def make_tables(problem: JointProblem) -> Tables:
    """Return the tables of a case; raise ``ServegymError`` if it has too many sets or batches."""
    refuse_size(problem)
    kinds, clients = problem.kinds, problem.clients
    widths = np.array([int(n).bit_length() for n in kinds.count], dtype=np.int64)
    field = np.concatenate(([0], np.cumsum(widths + 1)[:-1])).astype(np.int64)
    radix = np.concatenate(([1], np.cumprod(kinds.count + 1)[:-1])).astype(np.int64)
    taken = np.array(sorted(problem.batches(), key=sum), dtype=np.int64)  # (B, K)
    sizes = taken.sum(axis=1)
    batch_rounds = np.zeros((len(taken), clients), dtype=np.int64)
    for b, row in enumerate(taken):
        batch_rounds[b, : sizes[b]] = np.repeat(kinds.rounds, row)
    sets = np.arange(math.prod(int(count) + 1 for count in kinds.count))
    held = sets[:, None] // radix % (kinds.count + 1)  # (W, K)
    tables = Tables(
        rounds=kinds.rounds,
        field=field,
        mask=(1 << widths) - 1,
        guards=int((1 << (field + widths)).sum()),
        first=np.searchsorted(sizes, np.arange(clients + 2)),
        batch_packed=taken @ (1 << field),
        batch_number=taken @ radix,
        batch_s=np.array([problem.batch_s(np.repeat(kinds.prompt, row)) for row in taken]),
        batch_rounds=batch_rounds,
        count=held.sum(axis=1),
        work=held @ kinds.rounds,
        prefill_s=np.full((len(sets), len(problem.requests) + 1), np.inf),
        decode_s=problem.decode_s,
        duals=dual_vertices(problem.decode_s[1:], np.arange(1.0, clients + 1.0), exact=True),
        width=_width(problem),
        counts_rounds=problem.counts_rounds,
        counts_stages=problem.counts_stages,
    )
    if problem.counts_stages:
        least = -(-tables.count // clients)
        stages = np.maximum(np.arange(len(problem.requests) + 1), least[:, None])
        each_s = problem.batch_s(np.zeros(1, dtype=np.int64)) - problem.batch_s(kinds.prompt[:0])
        fixed_s = problem.batch_s(kinds.prompt[:0])
        tables.prefill_s[:] = stages * fixed_s + tables.count[:, None] * each_s
    else:
        _partition(tables, held @ (1 << field))
    return tables


@allocating_kernel
def _partition(tables: Tables, packed: Whole) -> None:
    """Fill ``prefill_s``: a waiting set's first batch holds its longest request."""
    prefill_s = tables.prefill_s
    prefill_s[0, 0] = 0.0
    for number in range(1, packed.size):
        kind = 0
        while (packed[number] >> tables.field[kind]) & tables.mask[kind] == 0:
            kind += 1
        for b in range(tables.batch_s.size):
            batch = tables.batch_packed[b]
            holds = (batch >> tables.field[kind]) & tables.mask[kind] > 0
            if (
                holds
                and ((packed[number] | tables.guards) - batch) & tables.guards == tables.guards
            ):
                rest = number - tables.batch_number[b]
                for stages in range(1, tables.count[number] + 1):
                    seconds = prefill_s[rest, stages - 1] + tables.batch_s[b]
                    prefill_s[number, stages] = min(prefill_s[number, stages], seconds)
    for number in range(packed.size):
        for stages in range(tables.count[number] - 1, -1, -1):
            later_s = prefill_s[number, stages + 1]
            prefill_s[number, stages] = min(prefill_s[number, stages], later_s)
