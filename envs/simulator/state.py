"""The simulator's state: a few record arrays over environments, replicas, clients and requests.

E environments × R replicas × J clients × I requests (the most any environment holds). Everything a
kernel reads or writes during an episode is here; nothing is allocated while it runs, but for small
scratch. 132 bytes per request, 24 more where gaps between tokens are noted, and a tree of ``order`` for each
queue. ``record_types`` says what each record holds.

What the scheduler believes stands beside the truth: ``expected_rounds`` beside ``decode_rounds``,
``expected`` beside ``finishes``. Where output lengths are known, the last two are one array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.bundle import Bundle
from servegym.envs.jit import LINE_BYTES
from servegym.envs.machine.layout import Layout
from servegym.envs.simulator.order import tree_size
from servegym.envs.simulator.record_types import (
    ADMITTED,
    BELIEF,
    CARRIED,
    CLIENT,
    EPISODE,
    FINISH,
    FIT,
    GAP_GROUP,
    LOAD,
    MACHINE,
    PACE,
    QUEUE,
    REPLICA,
    REQUEST,
    TIMES,
    TRANSFER,
)
from servegym.envs.vocabulary import BY_BATCH, BY_DEADLINE, GUARD_SGLANG, NEWEST, ROLE_BOTH
from servegym.envs.workload.scoring import MOST_STAGES, WEIGHTS

# Phases of a request. Preemption takes a running one back to waiting.
FUTURE: Final = 0
WAITING: Final = 1
RUNNING: Final = 2  # holds a client: its prompt is computed, wholly or in part, or it decodes
FINISHED: Final = 3
REJECTED: Final = 4  # larger than the memory of any replica
MOVING: Final = 5  # on its way to a replica's queue or clients
SHED: Final = 6  # turned away, as its first token would come too late

NOBODY: Final = -1
"""No request, no client, no replica: the null id in every index array."""

HOST: Final = -2
"""In the place of a replica's number: the memory of the host."""

# Kinds of transfers, see ``transfers``.
TO_QUEUE: Final = 0  # lands at the end of the target's queue when it is due
DROPPING: Final = 1  # leaves the source at its next boundary, to be computed again at the target
COPYING: Final = 2  # decodes at the source while its keys and values are copied, until it is due
PAUSING: Final = 3  # copied but for the last tokens: leaves the source at its next boundary
LANDING: Final = 4  # lands on a client of the target when it is due
LANDED: Final = 5  # joins the target's clients at its next boundary

# What a replica does between two of its boundaries.
IDLE: Final = 0
PREFILL: Final = 1
DECODE_RUN: Final = 2  # one decode round or several in a row
MIXED: Final = 3  # one pass of decoding clients and chunks of prompts

UNLIMITED_BLOCKS: Final = 1 << 60
"""Blocks of a replica whose memory is not limited."""


LENGTH_BUCKETS: Final = np.array([0, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048])
"""First number of rounds of each length bucket of the observation; the last one is open."""


@dataclass(frozen=True, eq=False)
class Cluster(Bundle):
    """What all replicas share and no episode changes; named as in ``Layout``."""

    block_tokens: int  # tokens of one block of KV memory
    chunk_tokens: int  # token budget of a mixed stage; 0: no mixed stages
    router: int  # place in ROUTERS
    staleness_s: float  # age up to which a router keeps what it has seen
    victim: int  # place in VICTIMS: who is preempted
    guard: int  # place in ADMISSION_GUARDS
    first_ratio: float  # of the guard ``sglang``, see ``reserve``
    patience_s: float  # after which nobody shorter goes before, under the rule ``shortest``
    shortest_by: int  # place in ORDERS: who goes first under that rule
    level_tokens: int  # of the first level of feedback
    one_pass: bool  # a mixed stage is one pass, not a prefill and a decode part
    limits_memory: bool  # of some replica
    counts_memory: bool  # else nothing depends on memory or chunks: neither is counted
    moves: bool  # a request may change its replica or leave its memory elsewhere
    steals_waiting: bool
    steals_running: bool
    steal_order: int  # place in STEAL_ORDERS
    steals_half: bool  # of what waits more at the victim than at the thief
    migrate: int  # place in MIGRATIONS
    steal_period_s: float  # between thefts of running requests by one replica
    freeness_steps: float  # below which memory is short, in blocks a request
    shed_at: float  # of its limit, when a first token is too late to be worth it; 0: nobody is shed
    steal_delay_s: float
    move: int  # place in MOVES
    copy_latency_s: float  # between replicas
    copy_token_s: float  # seconds for the keys and values of one token
    evicts_to_host: bool
    host_latency_s: float
    host_token_s: float
    slo_ttft_s: float  # most seconds to the first token; ∞: any
    slo_tpot_s: float  # most seconds per token after it; ∞: any


RecordArray = Any
"""An array of records: ``array[e].field`` reads and writes; numpy's types cannot express it."""


@dataclass(frozen=True, eq=False)
class State(Bundle):
    """All arrays of a simulation; see the module docstring for the axes.

    Kernels write ``state.replicas[e, r].clock_s``.
    """

    cluster: Cluster
    machines: RecordArray  # (R,) MACHINE
    episodes: RecordArray  # (E,) EPISODE
    requests: RecordArray  # (E, I) REQUEST, by id
    times: RecordArray  # (E, I) TIMES, by id
    before: NDArray[np.int32]  # (E, I) by id, whom it comes after in the list of ``next``
    plan_before: NDArray[np.int32]  # (E, I) the same in the list of ``plan_next``
    by_length: NDArray[np.int32]  # (E, I) request ids, shortest first
    lengths: NDArray[np.int32]  # (E, I) the rounds that they are compared by, so ascending
    queues: RecordArray  # (E, Q) QUEUE; Q is R, or 1: one pool for all replicas
    waiting_lengths: NDArray[np.int32]  # (E, Q, B) waiting requests in each of LENGTH_BUCKETS
    waiting_tree: NDArray[np.int64]  # (E, Q, tree_size(I)) which ranks wait
    event_s: NDArray[np.float64]  # (E, R) the next boundary of each replica; ∞: it sleeps
    replicas: RecordArray  # (E, R) REPLICA
    loads: RecordArray  # (E, R) LOAD when the router last looked
    clients: RecordArray  # (E, R, J) CLIENT
    admitted: (
        RecordArray  # (E, R, J + 1) ADMITTED by client, J: both ends; (E, R, 0): not asked for
    )
    idle: NDArray[
        np.int32
    ]  # (E, R, J) the idle clients [: replica.idle]; ascending after sort_idle
    finishes: RecordArray  # (E, R, J) FINISH of the decoding, latest first; [:active]; physics only
    expected: RecordArray  # (E, R, J) the same as the scheduler believes; ``finishes`` if known
    residues: NDArray[np.int32]  # (E, R, b) decoding requests by (tokens held − rounds) mod b
    beliefs: RecordArray  # (E, I) BELIEF at first, by id; (E, 0) if known
    picked: NDArray[np.int32]  # (E, R, J) the requests whose prefill ends with the present stage
    keys: NDArray[np.int64]  # (E, 2 · clients of all replicas) scratch
    calendar: NDArray[np.int64]  # (E, MOST_STAGES + 1) [: episode.stages + 1], see workload.scoring
    weights: NDArray[np.float64]  # (E, WEIGHTS) of the rule ``scored``
    ranked: NDArray[np.int32]  # (E, I) scratch of that rule
    fits: RecordArray  # (E, I) FIT by rank: what that rule has found; not read without a calendar
    limits: NDArray[np.float64]  # (E, I, 2) by id: of ``[slo]``; (E, 0, 2): the cluster's
    priority: NDArray[np.float64]  # (E, I) by id, the least goes first; (E, 0): nobody asks for it
    carried: RecordArray  # (E, I) CARRIED, by id; (E, 0): gaps are not noted
    paces: RecordArray  # (E, R, J) PACE; (E, R, 0): nobody asks who meets ``[slo]``
    gaps: RecordArray  # (E, R, 2 J) GAP_GROUP, a stack [: replica.gap_groups]; (E, R, 0): not noted
    transfers: (
        RecordArray  # (E, T) TRANSFER in order of making [: episode.transfers]; (E, 0): none ever
    )


def row_arrays(state: State) -> dict[str, NDArray[Any]]:
    """Return by name the arrays that have a row for each environment: what an episode changes."""
    shared = ("cluster", "machines")
    return {name: array for name, array in state.by_name().items() if name not in shared}


def make_state(
    environments: int, requests: int, layout: Layout, *, lengths_known: bool = True
) -> State:
    """Allocate the state of ``environments`` episodes of up to ``requests`` requests each.

    With ``lengths_known`` schedulers see true output lengths, else those that the requests predict.
    """
    e, i, r, j = environments, requests, len(layout.clients), max(layout.clients)
    q = 1 if layout.pool else r
    finishes = _records(e, r, j, dtype=FINISH)
    machines = _records(r, dtype=MACHINE)
    cluster = Cluster(**{each.name: getattr(layout, each.name) for each in fields(Cluster)})
    for replica in range(r):
        blocks, left = layout.memory_blocks(replica) or (UNLIMITED_BLOCKS, 0)
        role = layout.roles[replica] if layout.roles else ROLE_BOTH
        round_s = layout.round_s[replica] if layout.round_s else 1.0
        machines[replica] = (layout.clients[replica], blocks, left, role, round_s)
    return State(
        cluster=cluster,
        machines=machines,
        episodes=_records(e, dtype=EPISODE),
        requests=_records(e, i, dtype=REQUEST),
        times=_records(e, i, dtype=TIMES),
        before=np.zeros((e, i), np.int32),
        plan_before=np.zeros((e, i), np.int32),
        by_length=np.zeros((e, i), np.int32),
        lengths=np.zeros((e, i), np.int32),
        queues=_records(e, q, dtype=QUEUE),
        waiting_lengths=np.zeros((e, q, len(LENGTH_BUCKETS)), np.int32),
        waiting_tree=np.zeros((e, q, tree_size(i)), np.int64),
        event_s=np.zeros((e, r)),
        replicas=_records(e, r, dtype=REPLICA),
        loads=_records(e, r, dtype=LOAD),
        clients=_records(e, r, j, dtype=CLIENT),
        admitted=_records(e, r, j + 1 if _asks_for_newest(layout) else 0, dtype=ADMITTED),
        idle=np.zeros((e, r, j), np.int32),
        finishes=finishes,
        expected=finishes if lengths_known else _records(e, r, j, dtype=FINISH),
        residues=np.zeros((e, r, layout.block_tokens), np.int32),
        beliefs=_records(e, 0 if lengths_known else i, dtype=BELIEF),
        picked=np.zeros((e, r, j), np.int32),
        keys=np.zeros((e, 2 * r * j), np.int64),
        calendar=np.zeros((e, MOST_STAGES + 1), np.int64),
        weights=np.zeros((e, WEIGHTS)),
        ranked=np.zeros((e, i), np.int32),
        fits=_records(e, i, dtype=FIT),
        limits=np.zeros((e, i if layout.class_limits else 0, 2)),
        priority=np.zeros((e, i if layout.shortest_by in (BY_DEADLINE, BY_BATCH) else 0)),
        carried=_records(e, i if layout.keeps_gaps else 0, dtype=CARRIED),
        paces=_records(e, r, j if layout.counts_slo else 0, dtype=PACE),
        gaps=_records(e, r, 2 * j if layout.keeps_gaps else 0, dtype=GAP_GROUP),
        # Each keeps a client of its target, or is one of as many as may come to a queue at once.
        transfers=_records(e, 2 * r * j if layout.moves else 0, dtype=TRANSFER),
    )


def _asks_for_newest(layout: Layout) -> bool:
    limits = any(tokens > 0 for tokens in layout.kv_capacity_tokens)
    return limits and layout.victim == NEWEST and layout.guard != GUARD_SGLANG


def make_alike(state: State, environments: int, *, lengths_known: bool = True) -> State:
    """Allocate rows like those of ``state``, for look-ahead and known lengths.

    What only episodes with times note has no places in them. Beliefs have, if they have in ``state``. With
    ``lengths_known = False`` rows are for lengths that are not known, though ``state`` may be for known ones.
    """
    rows = {}
    for name, array in row_arrays(state).items():
        shape = (environments, *array.shape[1:])
        if name in ("carried", "paces", "gaps"):
            shape = (*shape[:-1], 0)
        named = array.dtype.names is not None
        rows[name] = _records(*shape, dtype=array.dtype) if named else np.zeros(shape, array.dtype)
    if lengths_known:
        rows["expected"] = rows["finishes"]
    return replace(state, **rows)


def _records(*shape: int, dtype: np.dtype[np.void]) -> RecordArray:
    """Return zeroed records whose fields are attributes, also where kernels run as plain Python.

    They begin at a cache line's start, so that a record of 64 bytes lies in one.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % LINE_BYTES
    return memory[start : start + size].view(dtype).reshape(shape).view(np.recarray)
