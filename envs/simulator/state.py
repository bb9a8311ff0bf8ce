"""The simulator's state: a few record arrays over environments, replicas, clients and requests.

E environments × R replicas × J clients × I requests (the most any environment holds). Everything a
kernel reads or writes during an episode is here; nothing is allocated while it runs, but for small
scratch. About 72 bytes per request.

What the scheduler believes stands beside the truth: ``expected_rounds`` beside ``decode_rounds``,
``expected`` beside ``finishes``. Where output lengths are known, the last two are one array.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.simulator.order import Tree, tree_size

# Phases of a request, in the order it goes through them.
FUTURE: Final = 0
WAITING: Final = 1
RUNNING: Final = 2
FINISHED: Final = 3

NOBODY: Final = -1
"""No request, no client: the null id in every index array."""


_LINE_BYTES: Final = 64

LENGTH_BUCKETS: Final = np.array([0, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048])
"""First number of rounds of each length bucket of the observation; the last one is open."""


EPISODE: Final = np.dtype(
    [
        # The instance, written by ``load`` and ``write_credits``.
        ("requests", np.int64),  # how many requests the episode has
        ("lengths_known", np.int64),  # 1: expected lengths are the true ones; else 0
        ("bound_s", np.float64),  # lower bound of the makespan
        ("round_credit_s", np.float64),  # share of the bound that one request-round earns
        ("prompt_credit_s", np.float64),  # share of the bound that one prompt token earns
        # Who is where.
        ("arrived", np.int64),  # requests 0 … arrived − 1 have arrived
        ("arrived_rounds", np.int64),  # Σ expected_rounds over arrived
        ("finished", np.int64),
        ("waiting", np.int64),
        ("first_waiting", np.int64),  # no request with a smaller id is waiting
        ("waiting_rounds", np.int64),  # Σ expected_rounds over waiting
        ("waiting_prompt_tokens", np.int64),
        # Σ p² over waiting is beyond 64 bits for a hundred thousand of the longest prompts: p² in two.
        ("waiting_squares_high", np.int64),  # Σ ⌊p² / 2³²⌋
        ("waiting_squares_low", np.int64),  # Σ p² mod 2³²
        # Totals so far.
        ("served_rounds", np.int64),  # Σ over decode rounds of active clients
        ("admitted_prompt_tokens", np.int64),
        ("in_system_s", np.float64),  # ∫ (waiting + running) dt
        ("reported_loss", np.float64),  # the loss that rewards have told of
        ("decisions", np.int64),
    ],
    align=True,
)

REQUEST: Final = np.dtype(
    [
        ("arrival_s", np.float64),
        ("prompt_tokens", np.int32),
        ("decode_rounds", np.int32),  # true output tokens − 1: physics only
        ("expected_rounds", np.int32),  # what the scheduler believes by now: rules only
        ("rank", np.int32),  # place in ``by_length``
        ("plan_client", np.int32),  # or NOBODY
        ("plan_next", np.int32),  # the next in the same queue, or NOBODY
        # Records.
        ("client", np.int32),  # or NOBODY
        ("phase", np.int8),
        ("bucket", np.int8),  # of LENGTH_BUCKETS, by expected rounds
        ("admitted_s", np.float64),  # start of its prefill stage, NaN before
        ("first_token_s", np.float64),  # end of its prefill stage, NaN before
        ("finished_s", np.float64),  # NaN before
    ],
    align=True,
)

REPLICA: Final = np.dtype(
    [
        ("clock_s", np.float64),
        ("rounds", np.int64),  # decode rounds run so far: the decode clock
        ("active", np.int64),  # clients that hold a request
        ("cached_tokens", np.int64),
        # Σ expected_end over the running. It may wrap; less active · rounds, Σ rounds left, it is exact.
        ("due_sum", np.int64),
        ("idle_wait_s", np.float64),  # idle client-seconds since the last prefill, work waiting
        ("prefill_stages", np.int64),
        ("prefill_s", np.float64),
        ("busy_decode_s", np.float64),  # Σ over rounds of n / J · seconds
    ],
    align=True,
)

CLIENT: Final = np.dtype(
    [
        # A planned queue, a linked list; stolen entries stay until they surface.
        ("queue_head", np.int32),  # or NOBODY
        ("queue_tail", np.int32),  # or NOBODY
        ("queue_rounds", np.int64),  # Σ expected_rounds still waiting in it
        ("queue_requests", np.int64),  # how many requests still wait in it
        ("expected_end", np.int64),  # decode clock when its request should finish; 0: it is idle
    ],
    align=True,
)

FINISH: Final = np.dtype([("due", np.int64), ("request", np.int64)])

BELIEF: Final = np.dtype([("log_median", np.float64), ("spread", np.float64)])
"""A lognormal distribution of output tokens: log of its median, standard deviation of the log."""


RecordArray = Any
"""An array of records: ``array[e].field`` reads and writes; numpy's types cannot express it."""


class State(NamedTuple):
    """All arrays of a simulation; see the module docstring for the axes.

    Kernels write ``state.replicas[e, r].clock_s``. Few arrays of records, not many plain ones:
    passing a tuple to a compiled function costs about 2 ns an array.
    """

    episodes: RecordArray  # (E,) EPISODE
    requests: RecordArray  # (E, I) REQUEST, by id
    by_length: NDArray[np.int32]  # (E, I) request ids, shortest first
    lengths: NDArray[np.int32]  # (E, I) the rounds that they are compared by, so ascending
    waiting_lengths: NDArray[np.int32]  # (E, B) waiting requests in each of LENGTH_BUCKETS
    waiting_tree: Tree  # (E, tree_size(I)) which ranks wait
    replicas: RecordArray  # (E, R) REPLICA
    clients: RecordArray  # (E, R, J) CLIENT
    idle: NDArray[np.int32]  # (E, R, J) the idle clients [: J − active]; ascending after sort_idle
    finishes: RecordArray  # (E, R, J) FINISH of the running, latest first; [:active]; physics only
    expected: RecordArray  # (E, R, J) the same as the scheduler believes; ``finishes`` if known
    beliefs: RecordArray  # (E, I) BELIEF at first, by id; (E, 0) if known
    picked: NDArray[np.int32]  # (E, J) the requests one prefill stage admits; scratch before
    keys: NDArray[np.int64]  # (E, J) scratch


def make_state(
    environments: int,
    requests: int,
    clients: int,
    replicas: int = 1,
    *,
    lengths_known: bool = True,
) -> State:
    """Allocate the state of ``environments`` episodes of up to ``requests`` requests each.

    With ``lengths_known`` schedulers see true output lengths, else those that the requests predict.
    """
    e, i, j, r = environments, requests, clients, replicas
    finishes = _records(e, r, j, dtype=FINISH)
    return State(
        episodes=_records(e, dtype=EPISODE),
        requests=_records(e, i, dtype=REQUEST),
        by_length=np.zeros((e, i), np.int32),
        lengths=np.zeros((e, i), np.int32),
        waiting_lengths=np.zeros((e, len(LENGTH_BUCKETS)), np.int32),
        waiting_tree=np.zeros((e, tree_size(i)), np.int64),
        replicas=_records(e, r, dtype=REPLICA),
        clients=_records(e, r, j, dtype=CLIENT),
        idle=np.zeros((e, r, j), np.int32),
        finishes=finishes,
        expected=finishes if lengths_known else _records(e, r, j, dtype=FINISH),
        beliefs=_records(e, 0 if lengths_known else i, dtype=BELIEF),
        picked=np.zeros((e, j), np.int32),
        keys=np.zeros((e, j), np.int64),
    )


def _records(*shape: int, dtype: np.dtype[np.void]) -> RecordArray:
    """Return zeroed records whose fields are attributes, also where kernels run as plain Python.

    They begin at a cache line's start, so that a record of 64 bytes lies in one.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    return memory[start : start + size].view(dtype).reshape(shape).view(np.recarray)
