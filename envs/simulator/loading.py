"""Write an instance into a row of the state, with the plan that its clients follow."""

from __future__ import annotations

import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError
from servegym.envs.jit import allocating_kernel, kernel
from servegym.envs.simulator.heap import deal, deal_by_time
from servegym.envs.simulator.queues import blocks_of, enqueue
from servegym.envs.simulator.record_types import EPISODE, FIT, QUEUE, REPLICA
from servegym.envs.simulator.state import (
    FUTURE,
    LENGTH_BUCKETS,
    NOBODY,
    UNLIMITED_BLOCKS,
    State,
)
from servegym.envs.vocabulary import ROUTE_PLAN
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import NOT_PREDICTED, Requests
from servegym.envs.workload.scoring import ScoreWeights, Scoring

_NO_EPISODE: Final = np.zeros((), EPISODE)
_NO_EPISODE["looked_s"] = -np.inf
_NO_REPLICA: Final = np.zeros((), REPLICA)
_NO_QUEUE: Final = np.zeros((), QUEUE)
_NO_FIT: Final = np.array((0.0, 0, 1), FIT)
_USUAL_WEIGHTS: Final = ScoreWeights().as_array()


def load(
    state: State,
    e: int,
    requests: Requests,
    plan: Plan | None,
    compared_rounds: NDArray[np.int64] | None = None,
) -> None:
    """Write an instance into row ``e`` and put its clock to 0.

    Without a plan the requests present at t = 0 go longest first to the least loaded client (``deal``), or,
    where replicas differ or have a limit of memory, to the client that would end first (``deal_by_time``).
    The bound and the reward's credits are the caller's to write. ``compared_rounds`` (requests,) decide
    which request is the longer one; None: the expected rounds do.

    Raises
    ------
    ServegymError
        If the state is for unknown lengths and the requests carry no predictions.
    """
    known = state.expected is state.finishes
    n, rounds = len(requests), requests.decode_rounds
    spread = requests.predicted_spread
    if not known and spread is None:
        raise ServegymError(NOT_PREDICTED)
    expected = rounds if known else requests.predicted_output_tokens - 1
    clear(state, e, 0 if state.event_s.shape[1] == 1 else router_luck(requests))
    if not known and spread is not None:
        beliefs = np.asarray(state.beliefs)[e, :n]
        beliefs["spread"] = spread
        beliefs["log_median"] = np.log(requests.predicted_output_tokens) - spread**2 / 2
    compared = expected if compared_rounds is None else compared_rounds
    # Among equal lengths the later request is "shorter", so that longest-first serves in order.
    order = n - 1 - np.sort(compared * n + np.arange(n)[::-1]) % n  # faster than argsort
    arrival_s, prompts = requests.arrival_s, requests.prompt_tokens
    _write_requests(state, e, arrival_s, prompts, rounds, expected, compared, order)
    queue_plan(state, e, plan)


def clear(state: State, e: int, luck: int = 0) -> None:
    """Empty row ``e`` of the state: nobody is known, every client is idle, the clock is at 0."""
    np.asarray(state.episodes)[e] = _NO_EPISODE  # as record arrays they take thrice as long
    np.asarray(state.replicas)[e] = _NO_REPLICA
    np.asarray(state.queues)[e] = _NO_QUEUE
    state.event_s[e] = np.inf
    state.residues[e] = 0
    state.waiting_lengths[e] = 0
    state.waiting_tree[e] = 0
    state.weights[e] = _USUAL_WEIGHTS
    _free_clients(state, e, state.expected is state.finishes, luck)


def queue_plan(state: State, e: int, plan: Plan | None) -> None:
    """Queue the requests present at t = 0 as the plan says, or greedily without one; note its scoring."""
    if plan is not None and plan.scoring is not None:
        _write_scoring(state, e, plan.scoring)
    if plan is not None and plan.has_queues:
        _enqueue_plan(state, e, plan.order, plan.offsets)
    elif state.queues.shape[1] == 1 or state.cluster.router == ROUTE_PLAN:
        _plan_greedily(state, e)


def _write_scoring(state: State, e: int, scoring: Scoring) -> None:
    state.weights[e] = scoring.weights.as_array()
    state.calendar[e, : len(scoring.calendar)] = scoring.calendar
    state.episodes[e].stages = scoring.stages
    state.fits[e] = _NO_FIT


def _plan_greedily(state: State, e: int) -> None:
    """Queue the requests present at t = 0 longest first."""
    if not plan_alike(state, e):
        _plan_by_time(state, e)


def _plan_by_time(state: State, e: int) -> None:
    """Queue them as ``deal_by_time`` says, but for those that are expected to fit into no memory."""
    requests = np.asarray(state.requests)[e]
    by_length = state.by_length[e, : state.episodes[e].requests][::-1].astype(np.int64)
    order = by_length[np.asarray(state.times)[e]["arrival_s"][by_length] == 0]
    rounds = requests["expected_rounds"][order].astype(np.int64)
    tokens = requests["prompt_tokens"][order] + rounds + 1
    needs = -(-tokens // state.cluster.block_tokens)
    clients = state.machines.clients
    round_s, holds = (
        np.repeat(values, clients) for values in (state.machines.round_s, state.machines.blocks)
    )
    client_of = deal_by_time(rounds, needs, round_s, holds)
    by_client = np.argsort(client_of, kind="stable")
    offsets = np.searchsorted(client_of[by_client], np.arange(len(holds) + 1))
    _enqueue_plan(state, e, order[by_client], offsets)


def router_luck(requests: Requests) -> int:
    """Return the number from which the random router draws: the same for the same instance."""
    return zlib.crc32(requests.prompt_tokens.tobytes(), zlib.crc32(requests.arrival_s.tobytes()))


@kernel
def _free_clients(state: State, e: int, lengths_known: int, luck: int) -> None:
    """Put every replica to sleep, its queues empty and its clients idle."""
    episode = state.episodes[e]
    episode.lengths_known = lengths_known
    episode.random_bits = luck
    episode.turn = state.replicas.shape[1]
    episode.transfer_s = np.inf
    episode.counts_slo = state.paces.shape[2] > 0  # not in copies for look-ahead
    episode.sheds = state.cluster.shed_at > 0.0
    episode.keeps_gaps = state.carried.shape[1] > 0
    for q in range(state.queues.shape[1]):
        queue = state.queues[e, q]
        queue.first = NOBODY
        queue.last = NOBODY
        queue.first_unseen = NOBODY
    for r in range(state.clients.shape[1]):
        state.replicas[e, r].idle = state.machines[r].clients
        state.replicas[e, r].sorted = state.machines[r].clients
        state.replicas[e, r].most_running = state.machines[r].clients
        state.replicas[e, r].reserve_blocks = state.machines[r].watermark_blocks
        state.replicas[e, r].partial = NOBODY
        state.replicas[e, r].stage_rounds = -1
        state.replicas[e, r].stole_s = -np.inf
        state.replicas[e, r].ratio = state.cluster.first_ratio
        for client in range(state.clients.shape[2]):
            own = state.clients[e, r, client]
            own.queue_head = NOBODY
            own.queue_tail = NOBODY
            own.queue_rounds = 0
            own.queue_requests = 0
            own.expected_end = 0
            state.idle[e, r, client] = client
        for client in range(state.paces.shape[2]):
            state.paces[e, r, client].first_token_s = np.nan
        for client in range(state.admitted.shape[2]):
            state.admitted[e, r, client].older = client
            state.admitted[e, r, client].newer = client


@kernel
def write_request(
    state: State,
    e: int,
    i: int,
    arrival_s: float,
    prompt_tokens: int,
    decode_rounds: int,
    expected_rounds: int,
) -> None:
    """Write request ``i``, which has not arrived; its place in the order of length is not written."""
    request, times = state.requests[e, i], state.times[e, i]
    request.prompt_tokens = prompt_tokens
    request.decode_rounds = decode_rounds
    request.expected_rounds = expected_rounds
    request.phase = FUTURE
    request.plan_client = NOBODY
    request.plan_next = NOBODY
    request.listed = 0
    request.planned = 0
    request.client = NOBODY
    request.replica = NOBODY
    request.emitted = 0
    request.computed = 0
    request.prefilled_tokens = 0
    request.preemptions = 0
    request.moves = 0
    request.stored = NOBODY
    request.leaving = 0
    request.stolen = 0
    if state.priority.shape[1] > 0:  # it has no class yet
        state.priority[e, i] = arrival_s + state.cluster.slo_ttft_s
    if state.limits.shape[1] > 0:
        state.limits[e, i, 0] = state.cluster.slo_ttft_s
        state.limits[e, i, 1] = state.cluster.slo_tpot_s
    times.arrival_s = arrival_s
    times.admitted_s = np.nan
    times.first_token_s = np.nan
    times.finished_s = np.nan


@kernel
def _write_requests(
    state: State,
    e: int,
    arrival_s: NDArray[np.float64],
    prompt_tokens: NDArray[np.int64],
    decode_rounds: NDArray[np.int64],
    expected_rounds: NDArray[np.int64],
    compared_rounds: NDArray[np.int64],
    order: NDArray[np.int64],
) -> None:
    """Write the requests, none of them arrived; ``order``: the fewest compared rounds first."""
    state.episodes[e].requests = order.size
    for i in range(order.size):  # in the order of memory, which takes half the time
        write_request(
            state, e, i, arrival_s[i], prompt_tokens[i], decode_rounds[i], expected_rounds[i]
        )
    bucket = 0
    for rank in range(order.size):
        i = order[rank]
        rounds = expected_rounds[i]
        while LENGTH_BUCKETS[bucket] > rounds:  # only where they are compared by something else
            bucket -= 1
        while bucket + 1 < LENGTH_BUCKETS.size and LENGTH_BUCKETS[bucket + 1] <= rounds:
            bucket += 1
        state.by_length[e, rank] = i
        state.lengths[e, rank] = compared_rounds[i]
        state.requests[e, i].rank = rank
        state.requests[e, i].bucket = bucket


@kernel
def _enqueue_plan(
    state: State, e: int, order: NDArray[np.int64], offsets: NDArray[np.int64]
) -> None:
    """Queue the requests of a plan, whose clients are those of all replicas in order."""
    r, client = 0, 0
    for queue in range(offsets.size - 1):
        if client == state.machines[r].clients:
            r, client = r + 1, 0
        for place in range(offsets[queue], offsets[queue + 1]):
            enqueue(state, e, r, client, order[place])
        client += 1


@allocating_kernel
def plan_alike(state: State, e: int) -> bool:
    """Queue them as ``deal`` says if clients are alike: equally fast, with equal memories.

    But for those that are expected to fit into none. Returns whether clients are alike; else nothing is done.
    """
    blocks = state.machines[0].blocks
    clients = 0
    for r in range(state.machines.size):
        if state.machines[r].blocks != blocks:
            return False
        if state.machines[r].round_s != state.machines[0].round_s:
            return False
        clients += state.machines[r].clients
    requests = state.episodes[e].requests
    order = np.empty(requests, np.int64)
    rounds = np.empty(requests, np.int64)
    present = 0
    for place in range(requests - 1, -1, -1):
        i = state.by_length[e, place]
        if state.times[e, i].arrival_s != 0:
            continue
        request = state.requests[e, i]
        expected = np.int64(request.expected_rounds)
        if blocks == UNLIMITED_BLOCKS or (
            blocks_of(state, request.prompt_tokens + expected + 1) <= blocks
        ):
            order[present] = i
            rounds[present] = expected
            present += 1
    client_of = deal(rounds[:present], clients)
    for place in range(present):
        r, client = 0, client_of[place]
        while client >= state.machines[r].clients:
            client -= state.machines[r].clients
            r += 1
        enqueue(state, e, r, client, order[place])
    return True
