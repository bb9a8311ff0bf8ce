"""The simulator's state: a few record arrays over environments, replicas, clients and requests.

E environments × R replicas × J clients × I requests (the most any environment holds). Everything a
kernel reads or writes during an episode is here; nothing is allocated while it runs, but for small
scratch. About 110 bytes per request and queue.

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
from servegym.envs.machine.layout import Layout
from servegym.envs.simulator.order import tree_size
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


REQUESTS: Final = 1 << 32
"""More requests than an episode has."""

_LINE_BYTES: Final = 64

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
    counts_slo: bool  # of new episodes, see EPISODE
    keeps_gaps: bool


MACHINE: Final = np.dtype(
    [
        ("clients", np.int64),
        ("blocks", np.int64),  # of KV memory, or UNLIMITED_BLOCKS
        ("watermark_blocks", np.int64),  # free blocks that admission leaves while others run
        ("role", np.int64),  # place in ROLES
        ("round_s", np.float64),  # by which plans count, see ``layout.Fleet``
    ],
    align=True,
)
"""What one replica is."""

EPISODE: Final = np.dtype(
    [
        # The instance, written by ``load`` and ``write_credits``.
        ("requests", np.int64),  # how many requests the episode has
        ("lengths_known", np.int64),  # 1: expected lengths are the true ones; else 0
        ("bound_s", np.float64),  # lower bound of the makespan
        ("round_credit_s", np.float64),  # share of the bound that one request-round earns
        ("prompt_credit_s", np.float64),  # share of the bound that one prompt token earns
        ("random_bits", np.int64),  # the random router's luck
        # The clock: everything until ``now_s`` has been booked.
        ("now_s", np.float64),
        ("turn", np.int64),  # replicas from here on may still decide at ``now_s``
        # Who is where.
        ("routed", np.int64),  # requests 0 … routed − 1 have reached a queue or were rejected
        ("arrived", np.int64),  # how many of them replicas have seen in their queues
        ("arrived_rounds", np.int64),  # Σ expected_rounds over those
        ("finished", np.int64),
        ("rejected", np.int64),  # those that were shed included
        ("shed", np.int64),
        ("in_system", np.int64),  # arrived, neither finished nor rejected
        # Totals so far.
        ("admissions", np.int64),  # admissions after preemptions included
        ("router_turns", np.int64),  # requests that the router has sent somewhere
        ("looked_s", np.float64),  # when the router has last looked at the replicas
        ("served_rounds", np.int64),  # Σ over requests of tokens emitted after the first
        ("admitted_prompt_tokens", np.int64),  # of requests that have emitted a token
        ("in_system_s", np.float64),  # ∫ in_system dt
        ("transfers", np.int64),  # how many are under way
        ("transfer_s", np.float64),  # when the next of them is due; ∞: none
        ("disturbed", np.int64),  # 1: this decision has changed what others may steal or have kept
        ("again", np.int64),  # 1: replicas that sleep are to be asked again at ``now_s``
        ("first_pass", np.int64),  # 1: no replica has been asked twice at ``now_s``
        ("reported_loss", np.float64),  # the loss that rewards have told of
        ("decisions", np.int64),
        # Service, see ``slo``, ``gaps``, ``shedding``. Not in copies for look-ahead: they have no times.
        ("sheds", np.int64),  # 1: requests that would come too late are turned away
        ("counts_slo", np.int64),  # 1: ``met`` is counted
        ("met", np.int64),  # finished requests that met both limits
        ("stages", np.int64),  # of the calendar; 0: there is none
        ("ranked", np.int64),  # entries of ``State.ranked`` that the present stage reads
        ("keeps_gaps", np.int64),  # 1: the worst gap between two tokens of each request is noted
    ],
    align=True,
)

QUEUE: Final = np.dtype(
    [
        # Waiting requests in order of service, a linked list; see ``queues``.
        ("first", np.int32),  # or NOBODY
        ("last", np.int32),  # or NOBODY
        ("first_unseen", np.int32),  # it and all behind it have come since the last look; or NOBODY
        ("unseen", np.int32),  # how many they are
        ("unseen_work", np.int64),  # Σ of their tokens to prefill and expected rounds
        ("unseen_blocks", np.int64),  # Σ blocks of their prefills
        # Of those that have been seen.
        ("waiting", np.int64),
        ("stolen", np.int64),  # of them and of the unseen
        ("rounds", np.int64),  # Σ expected rounds left
        ("tokens", np.int64),  # Σ tokens to prefill
        ("blocks", np.int64),  # Σ blocks of these prefills
        # Σ t² of these is beyond 64 bits for a hundred thousand of the longest prompts: t² in two.
        ("squares_high", np.int64),  # Σ ⌊t² / 2³²⌋
        ("squares_low", np.int64),  # Σ t² mod 2³²
        (
            "unordered",
            np.int64,
        ),  # 1: somebody waits whom ``priority`` does not know, see ``ranking``
    ],
    align=True,
)

REQUEST: Final = np.dtype(
    [
        ("prompt_tokens", np.int32),
        ("decode_rounds", np.int32),  # true output tokens − 1: physics only
        ("expected_rounds", np.int32),  # what the scheduler believes by now: rules only
        ("rank", np.int32),  # place in ``by_length``
        ("plan_client", np.int32),  # of ``plan_replica``, or NOBODY
        ("plan_next", np.int32),  # the next in the same planned queue, or NOBODY
        ("next", np.int32),  # the next that waits in the same queue, or NOBODY
        ("client", np.int32),  # of its replica, or NOBODY
        ("emitted", np.int32),  # tokens emitted before its next or present prefill
        ("computed", np.int32),  # tokens of that prefill which are done
        ("admission", np.int32),  # running number; the newest has the highest
        ("prefilled_tokens", np.int32),  # in all of its prefills so far
        ("plan_replica", np.int16),
        ("replica", np.int16),  # or NOBODY
        ("preemptions", np.int16),
        ("moves", np.int16),
        ("stored", np.int16),  # the replica that keeps its keys and values while it waits, or HOST
        ("phase", np.int8),
        ("bucket", np.int8),  # of LENGTH_BUCKETS, by expected rounds
        ("listed", np.int8),  # 1: it is in the list of a queue, waiting or no more
        ("planned", np.int8),  # 1: it is in the list of a client's planned queue
        ("leaving", np.int8),  # 1: it decodes, and a transfer will take it elsewhere
        ("stolen", np.int8),  # 1: it waits where it has come by theft, and is not stolen again
    ],
    align=True,
)
"""What kernels read of a request at every turn: one cache line of 64 bytes."""

TIMES: Final = np.dtype(
    [
        ("arrival_s", np.float64),
        ("admitted_s", np.float64),  # start of its first prefill stage, NaN before
        ("first_token_s", np.float64),  # end of the stage that emits its first token, NaN before
        ("finished_s", np.float64),  # NaN before
        # Written only where gaps between tokens are noted, see ``gaps``.
        (
            "worst_gap_s",
            np.float64,
        ),  # whole once it has finished; before, without its present group's
        (
            "last_token_s",
            np.float64,
        ),  # of a request that has emitted tokens and does not decode now
        ("gap_stamp", np.int64),  # while it decodes; else NOBODY
    ],
    align=True,
)

REPLICA: Final = np.dtype(
    [
        ("clock_s", np.float64),  # its last boundary
        ("rounds", np.int64),  # decode rounds run so far: the decode clock
        ("active", np.int64),  # clients whose request decodes
        ("idle", np.int64),  # clients without a request
        ("sorted", np.int64),  # so many of these, the first, are known to be in ascending order
        ("partial", np.int64),  # the request whose prompt is half computed, or NOBODY
        ("most_running", np.int64),  # requests that may hold a client once this action has admitted
        ("reserve_blocks", np.int64),  # free blocks that it leaves while others run
        ("cached_tokens", np.int64),  # Σ prompt + emitted over the decoding
        ("used_blocks", np.int64),
        # Σ expected_end over the decoding. It may wrap; less active · rounds, Σ rounds left, it is exact.
        ("due_sum", np.int64),
        # What it does now, booked at ``State.event_s``.
        ("stage", np.int64),  # IDLE, PREFILL, DECODE_RUN or MIXED
        ("stage_s", np.float64),
        ("stage_rounds", np.int64),  # the decode clock when its last prefill began; −1: none has
        ("run_rounds", np.int64),  # of a DECODE_RUN
        ("continued_from", np.int64),  # tokens of a prefill begun before that it goes on with
        ("stage_chunks", np.int64),  # requests of whose prefill it computes something
        ("stage_tokens", np.int64),  # that it computes of prefills
        ("stage_squares", np.float64),  # Σ over these chunks of end² − start²
        ("prompt_tokens", np.int64),  # of chunks that begin within a prompt
        ("prompt_squares", np.float64),  # of the same chunks
        ("emitting", np.int64),  # how many of ``picked`` emit a token when it ends
        ("work_waits", np.int64),  # 1: requests waited when it began
        # Transfers.
        ("coming", np.int64),  # to its queue
        ("coming_blocks", np.int64),  # Σ blocks of their prefills
        ("incoming", np.int64),  # to its clients, which are kept for them
        ("incoming_blocks", np.int64),  # Σ blocks kept for these
        ("leaving", np.int64),  # of the decoding
        ("told", np.int64),  # 1: it may admit what it could not when it last decided
        ("stole_s", np.float64),  # when it last stole a running request; −∞: never
        ("ratio", np.float64),  # of outputs for which memory is kept, see ``reserve``
        ("ratio_rounds", np.int64),  # the decode clock from which it falls
        # Totals so far.
        ("idle_wait_s", np.float64),  # idle client-seconds since the last prefill, work waiting
        ("prefill_stages", np.int64),
        ("prefill_s", np.float64),
        ("mixed_stages", np.int64),
        ("busy_decode_s", np.float64),  # Σ over rounds of n / J · seconds
        ("preemptions", np.int64),
        ("overrun_blocks", np.int64),  # most blocks beyond its memory; 0, or there is a fault
        # Gaps between tokens, see ``gaps``.
        ("gap_groups", np.int64),  # in its stack
        (
            "fresh_groups",
            np.int64,
        ),  # of these, on top: those that have emitted nothing together yet
        ("gap_stamp", np.int64),  # of the next group
        ("emitted_s", np.float64),  # when all below the fresh have last emitted a token
    ],
    align=True,
)

TRANSFER: Final = np.dtype(
    [
        ("due_s", np.float64),  # ∞: it waits for a boundary
        ("request", np.int32),
        ("client", np.int32),  # of the target, kept for it; or NOBODY
        ("tokens", np.int32),  # that the target has kept memory for, or whose prefill is on the way
        ("source", np.int16),  # a replica, or HOST
        ("target", np.int16),
        ("kind", np.int64),
    ],
    align=True,
)

LOAD: Final = np.dtype(
    [
        ("waiting", np.int64),  # requests
        ("running", np.int64),  # requests that hold a client
        ("tokens", np.int64),  # expected tokens still to compute
        ("used_blocks", np.int64),
        ("wanted_blocks", np.int64),  # by the prefills of those who wait
        ("unfinished_blocks", np.int64),  # of what begun prefills have not computed
    ],
    align=True,
)
"""A replica as a router sees it."""

CLIENT: Final = np.dtype(
    [
        # A planned queue, a linked list; see ``queues``.
        ("queue_head", np.int32),  # or NOBODY
        ("queue_tail", np.int32),  # or NOBODY
        ("queue_rounds", np.int64),  # Σ expected rounds left of those in it
        ("queue_requests", np.int64),  # how many requests are in it
        ("expected_end", np.int64),  # decode clock when its request should finish; 0: it is idle
    ],
    align=True,
)

GAP_GROUP: Final = np.dtype(
    [
        ("stamp", np.int64),  # of the first that belonged to it
        ("members", np.int64),  # requests that decode
        ("worst_s", np.float64),  # gap between two of their tokens since they decode here
        ("since_s", np.float64),  # while it is fresh: when it began
        (
            "joined",
            np.int64,
        ),  # while it is fresh: the request that landed without a token, or NOBODY
    ],
    align=True,
)
"""Requests of a replica that have had the same worst gap, see ``gaps``."""

FIT: Final = np.dtype(
    [
        ("rounds", np.float64),  # that a request would idle, at least, at a later stage
        ("stage", np.int32),  # the stage of the calendar where
        ("since", np.int32),  # the first stage looked at; stage < since: not known
    ],
    align=True,
)
"""How well a length fits stages to come, see ``scored``."""

FINISH: Final = np.dtype([("due", np.int64), ("request", np.int64)])

BELIEF: Final = np.dtype([("log_median", np.float64), ("spread", np.float64)])
"""A lognormal distribution of output tokens: log of its median, standard deviation of the log."""


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
    by_length: NDArray[np.int32]  # (E, I) request ids, shortest first
    lengths: NDArray[np.int32]  # (E, I) the rounds that they are compared by, so ascending
    queues: RecordArray  # (E, Q) QUEUE; Q is R, or 1: one pool for all replicas
    waiting_lengths: NDArray[np.int32]  # (E, Q, B) waiting requests in each of LENGTH_BUCKETS
    waiting_tree: NDArray[np.int64]  # (E, Q, tree_size(I)) which ranks wait
    event_s: NDArray[np.float64]  # (E, R) the next boundary of each replica; ∞: it sleeps
    replicas: RecordArray  # (E, R) REPLICA
    loads: RecordArray  # (E, R) LOAD when the router last looked
    clients: RecordArray  # (E, R, J) CLIENT
    admitted: NDArray[
        np.int64
    ]  # (E, R, J) by client: its request's admission, from 1, · 2³² + id; 0: idle; (E, R, 0): not asked for
    idle: NDArray[
        np.int32
    ]  # (E, R, J) the idle clients [: replica.idle]; ascending after sort_idle
    finishes: RecordArray  # (E, R, J) FINISH of the decoding, latest first; [:active]; physics only
    expected: RecordArray  # (E, R, J) the same as the scheduler believes; ``finishes`` if known
    residues: NDArray[np.int32]  # (E, R, b) decoding requests by (tokens held − rounds) mod b
    beliefs: RecordArray  # (E, I) BELIEF at first, by id; (E, 0) if known
    picked: NDArray[np.int32]  # (E, R, J) the requests whose prefill ends with the present stage
    keys: NDArray[np.int64]  # (E, clients of all replicas) scratch
    calendar: NDArray[np.int64]  # (E, MOST_STAGES + 1) [: episode.stages + 1], see workload.scoring
    weights: NDArray[np.float64]  # (E, WEIGHTS) of the rule ``scored``
    ranked: NDArray[np.int32]  # (E, I) scratch of that rule
    fits: RecordArray  # (E, I) FIT by rank: what that rule has found; not read without a calendar
    limits: NDArray[np.float64]  # (E, I, 2) by id: of ``[slo]``; (E, 0, 2): the cluster's
    priority: NDArray[np.float64]  # (E, I) by id, the least goes first; (E, 0): nobody asks for it
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
    for replica, tokens in enumerate(layout.kv_capacity_tokens):
        blocks = tokens // layout.block_tokens if tokens > 0 else UNLIMITED_BLOCKS
        left = int(layout.watermark * blocks) if tokens > 0 else 0
        role = layout.roles[replica] if layout.roles else ROLE_BOTH
        round_s = layout.round_s[replica] if layout.round_s else 1.0
        machines[replica] = (layout.clients[replica], blocks, left, role, round_s)
    return State(
        cluster=cluster,
        machines=machines,
        episodes=_records(e, dtype=EPISODE),
        requests=_records(e, i, dtype=REQUEST),
        times=_records(e, i, dtype=TIMES),
        by_length=np.zeros((e, i), np.int32),
        lengths=np.zeros((e, i), np.int32),
        queues=_records(e, q, dtype=QUEUE),
        waiting_lengths=np.zeros((e, q, len(LENGTH_BUCKETS)), np.int32),
        waiting_tree=np.zeros((e, q, tree_size(i)), np.int64),
        event_s=np.zeros((e, r)),
        replicas=_records(e, r, dtype=REPLICA),
        loads=_records(e, r, dtype=LOAD),
        clients=_records(e, r, j, dtype=CLIENT),
        admitted=np.zeros((e, r, j if _asks_for_newest(layout) else 0), np.int64),
        idle=np.zeros((e, r, j), np.int32),
        finishes=finishes,
        expected=finishes if lengths_known else _records(e, r, j, dtype=FINISH),
        residues=np.zeros((e, r, layout.block_tokens), np.int32),
        beliefs=_records(e, 0 if lengths_known else i, dtype=BELIEF),
        picked=np.zeros((e, r, j), np.int32),
        keys=np.zeros((e, r * j), np.int64),
        calendar=np.zeros((e, MOST_STAGES + 1), np.int64),
        weights=np.zeros((e, WEIGHTS)),
        ranked=np.zeros((e, i), np.int32),
        fits=_records(e, i, dtype=FIT),
        limits=np.zeros((e, i if layout.class_limits else 0, 2)),
        priority=np.zeros((e, i if layout.shortest_by in (BY_DEADLINE, BY_BATCH) else 0)),
        gaps=_records(e, r, 2 * j if layout.keeps_gaps else 0, dtype=GAP_GROUP),
        # Each keeps a client of its target, or is one of as many as may come to a queue at once.
        transfers=_records(e, 2 * r * j if layout.moves else 0, dtype=TRANSFER),
    )


def _asks_for_newest(layout: Layout) -> bool:
    limits = any(tokens > 0 for tokens in layout.kv_capacity_tokens)
    return limits and layout.victim == NEWEST and layout.guard != GUARD_SGLANG


def make_alike(state: State, environments: int) -> State:
    """Allocate rows like those of ``state``, for known lengths."""
    rows = {
        name: _records(environments, *array.shape[1:], dtype=array.dtype)
        if array.dtype.names
        else np.zeros((environments, *array.shape[1:]), array.dtype)
        for name, array in row_arrays(state).items()
    }
    rows["expected"] = rows["finishes"]
    rows["beliefs"] = _records(environments, 0, dtype=BELIEF)
    return replace(state, **rows)


def _records(*shape: int, dtype: np.dtype[np.void]) -> RecordArray:
    """Return zeroed records whose fields are attributes, also where kernels run as plain Python.

    They begin at a cache line's start, so that a record of 64 bytes lies in one.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    return memory[start : start + size].view(dtype).reshape(shape).view(np.recarray)
