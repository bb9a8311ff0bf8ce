"""The simulator's state: one array per quantity, over environments, replicas, clients, requests.

E environments × R replicas × J clients × I requests (the most any environment holds). Everything a
kernel reads or writes during an episode is here; nothing is allocated while it runs. About 80 bytes
per request.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.plan import Plan
from servegym.envs.requests import Requests
from servegym.envs.simulator.jit import kernel

# Phases of a request, in the order it goes through them.
FUTURE: Final = 0
WAITING: Final = 1
RUNNING: Final = 2
FINISHED: Final = 3

NOBODY: Final = -1
"""No request, no client: the null id in every index array."""


LENGTH_BUCKETS: Final = np.array([0, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048])
"""First number of rounds of each length bucket of the observation; the last one is open."""


class State(NamedTuple):
    """All arrays of a simulation; see the module docstring for the axes."""

    # The instance, written by ``load``.
    requests: NDArray[np.int64]  # (E,) how many requests the episode has
    arrival_s: NDArray[np.float64]  # (E, I)
    prompt_tokens: NDArray[np.int32]  # (E, I)
    decode_rounds: NDArray[np.int32]  # (E, I) true output tokens − 1: physics only
    expected_rounds: NDArray[np.int32]  # (E, I) what the scheduler believes: rules only
    by_length: NDArray[np.int32]  # (E, I) request ids, shortest expected first
    rank: NDArray[np.int32]  # (E, I) place of each request in by_length
    bucket_rank: NDArray[np.int32]  # (E, B + 1) first rank of each length bucket (LENGTH_BUCKETS)
    total_expected_rounds: NDArray[np.int64]  # (E,) Σ expected_rounds
    total_prompt_tokens: NDArray[np.int64]  # (E,)
    bound_s: NDArray[np.float64]  # (E,) lower bound of the makespan
    round_credit_s: NDArray[np.float64]  # (E,) share of the bound one request-round earns
    prompt_credit_s: NDArray[np.float64]  # (E,) share of the bound one prompt token earns
    # Waiting requests.
    waiting_tree: NDArray[np.int32]  # (E, 2^k + 1) Fenwick tree over ranks
    first_waiting: NDArray[np.int64]  # (E,) no request with a smaller id is waiting
    arrived: NDArray[np.int64]  # (E,) requests 0 … arrived − 1 have arrived
    waiting: NDArray[np.int64]  # (E,)
    waiting_rounds: NDArray[np.int64]  # (E,) Σ expected_rounds over waiting
    waiting_prompt_tokens: NDArray[np.int64]  # (E,)
    waiting_prompt_squares: NDArray[np.int64]  # (E,) Σ p² over waiting
    # The plan's queues, as linked lists; entries that were stolen stay until they surface.
    plan_client: NDArray[np.int32]  # (E, I) or NOBODY
    plan_next: NDArray[np.int32]  # (E, I) or NOBODY
    queue_head: NDArray[np.int32]  # (E, J) or NOBODY
    queue_tail: NDArray[np.int32]  # (E, J) or NOBODY
    queue_rounds: NDArray[np.int64]  # (E, J) Σ expected_rounds still waiting in the queue
    # Per-request records.
    phase: NDArray[np.int8]  # (E, I)
    client: NDArray[np.int32]  # (E, I) or NOBODY
    admitted_s: NDArray[np.float64]  # (E, I) start of its prefill stage, NaN before
    admitted_round: NDArray[np.int64]  # (E, I) decode clock at its prefill stage
    first_token_s: NDArray[np.float64]  # (E, I) end of its prefill stage, NaN before
    finished_s: NDArray[np.float64]  # (E, I) NaN before
    # Replicas.
    clock_s: NDArray[np.float64]  # (E, R)
    round: NDArray[np.int64]  # (E, R) decode rounds run so far: the decode clock
    active: NDArray[np.int64]  # (E, R) clients that hold a request
    cached_tokens: NDArray[np.int64]  # (E, R)
    client_request: NDArray[np.int32]  # (E, R, J) or NOBODY
    finish_round: NDArray[
        np.int64
    ]  # (E, R, J) decode clock of each finish, latest first; [:active]
    finish_request: NDArray[np.int32]  # (E, R, J) the request that finishes then
    idle_wait_s: NDArray[
        np.float64
    ]  # (E, R) idle client-seconds since the last prefill, work waiting
    # Totals.
    finished: NDArray[np.int64]  # (E,)
    prefill_stages: NDArray[np.int64]  # (E, R)
    prefill_s: NDArray[np.float64]  # (E, R)
    busy_decode_s: NDArray[np.float64]  # (E, R) Σ over rounds of n / J · seconds
    served_rounds: NDArray[np.int64]  # (E,) Σ over rounds of active clients
    admitted_prompt_tokens: NDArray[np.int64]  # (E,)
    in_system_s: NDArray[np.float64]  # (E,) ∫ (waiting + running) dt over stages seen so far
    reported_loss: NDArray[np.float64]  # (E,) the loss that rewards have told of so far
    decisions: NDArray[np.int64]  # (E,)
    # Scratch: the requests one prefill stage admits.
    picked: NDArray[np.int32]  # (E, J)
    targets: NDArray[np.int64]  # (E, J) aligned rule: rounds in which several requests finish


_FILL: Final[dict[str, float]] = {
    **dict.fromkeys(("plan_client", "plan_next", "queue_head", "queue_tail"), NOBODY),
    **dict.fromkeys(("client", "client_request"), NOBODY),
    **dict.fromkeys(("admitted_s", "first_token_s", "finished_s"), np.nan),
}


def make_state(environments: int, requests: int, clients: int, replicas: int = 1) -> State:
    """Allocate the state of ``environments`` episodes of up to ``requests`` requests each."""
    e, i, j, r = environments, requests, clients, replicas
    tree = 1 << max(i - 1, 1).bit_length()
    per_env = (
        "requests total_expected_rounds total_prompt_tokens first_waiting arrived "
        "waiting waiting_rounds waiting_prompt_tokens waiting_prompt_squares finished decisions "
        "served_rounds admitted_prompt_tokens"
    )
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        **dict.fromkeys(per_env.split(), ((e,), np.int64)),
        **dict.fromkeys(
            "bound_s round_credit_s prompt_credit_s in_system_s reported_loss".split(),
            ((e,), float),
        ),
        **dict.fromkeys("arrival_s admitted_s first_token_s finished_s".split(), ((e, i), float)),
        **dict.fromkeys("prompt_tokens decode_rounds expected_rounds".split(), ((e, i), np.int32)),
        **dict.fromkeys("by_length rank plan_client plan_next client".split(), ((e, i), np.int32)),
        "phase": ((e, i), np.int8),
        "admitted_round": ((e, i), np.int64),
        "waiting_tree": ((e, tree + 1), np.int32),
        "bucket_rank": ((e, len(LENGTH_BUCKETS) + 1), np.int32),
        **dict.fromkeys("queue_head queue_tail picked".split(), ((e, j), np.int32)),
        **dict.fromkeys("queue_rounds targets".split(), ((e, j), np.int64)),
        **dict.fromkeys("round active cached_tokens prefill_stages".split(), ((e, r), np.int64)),
        **dict.fromkeys("clock_s idle_wait_s prefill_s busy_decode_s".split(), ((e, r), float)),
        **dict.fromkeys("client_request finish_request".split(), ((e, r, j), np.int32)),
        "finish_round": ((e, r, j), np.int64),
    }
    arrays = {
        name: np.full(shape, _FILL.get(name, 0), dtype) for name, (shape, dtype) in shapes.items()
    }
    return State(**arrays)


def load(state: State, e: int, requests: Requests, plan: Plan | None) -> None:
    """Write an instance into row ``e`` and put its clock to 0.

    Without a plan the requests present at t = 0 go longest first to the least loaded client. The
    bound and the reward's credits are the caller's to write.
    """
    n = len(requests)
    for name in State._fields:
        getattr(state, name)[e] = _FILL.get(name, 0)
    state.requests[e] = n
    state.arrival_s[e, :n] = requests.arrival_s
    state.prompt_tokens[e, :n] = requests.prompt_tokens
    state.decode_rounds[e, :n] = requests.decode_rounds
    state.expected_rounds[e, :n] = requests.decode_rounds
    # Among equal lengths the later request is "shorter", so that longest-first serves in order.
    order = np.lexsort((-np.arange(n), requests.decode_rounds))
    state.by_length[e, :n] = order
    state.rank[e, order] = np.arange(n)
    state.bucket_rank[e, :-1] = np.searchsorted(requests.decode_rounds[order], LENGTH_BUCKETS)
    state.bucket_rank[e, -1] = n
    state.total_expected_rounds[e] = requests.decode_rounds.sum()
    state.total_prompt_tokens[e] = requests.prompt_tokens.sum()
    if plan is None:
        plan_greedily(state, e)
    else:
        _enqueue_plan(state, e, plan.order, plan.offsets)


@kernel
def enqueue(state: State, e: int, client: int, request: int) -> None:
    """Append a request to a client's planned queue."""
    tail = state.queue_tail[e, client]
    if tail == NOBODY:
        state.queue_head[e, client] = request
    else:
        state.plan_next[e, tail] = request
    state.queue_tail[e, client] = request
    state.plan_client[e, request] = client
    state.queue_rounds[e, client] += state.expected_rounds[e, request]


@kernel
def _enqueue_plan(
    state: State, e: int, order: NDArray[np.int64], offsets: NDArray[np.int64]
) -> None:
    for client in range(offsets.size - 1):
        for place in range(offsets[client], offsets[client + 1]):
            enqueue(state, e, client, order[place])


@kernel
def plan_greedily(state: State, e: int) -> None:
    """Queue the requests present at t = 0 longest first, each at the least loaded client."""
    clients = state.queue_rounds.shape[1]
    # A binary heap of (load, client), smallest first; equal loads go to the lower client.
    heap = np.arange(clients)
    for place in range(state.requests[e] - 1, -1, -1):
        request = state.by_length[e, place]
        if state.arrival_s[e, request] > 0:
            continue
        client = heap[0]
        enqueue(state, e, client, request)
        _sift_down(heap, state.queue_rounds[e])


@kernel
def _sift_down(heap: NDArray[np.int64], loads: NDArray[np.int64]) -> None:
    """Restore the heap after the load of its root has grown."""
    root = 0
    moved = heap[0]
    while 2 * root + 1 < heap.size:
        child = 2 * root + 1
        other = child + 1
        if other < heap.size and _lighter(loads, heap[other], heap[child]):
            child = other
        if _lighter(loads, moved, heap[child]):
            break
        heap[root] = heap[child]
        root = child
    heap[root] = moved


@kernel
def _lighter(loads: NDArray[np.int64], a: int, b: int) -> bool:
    return loads[a] < loads[b] or (loads[a] == loads[b] and a < b)
