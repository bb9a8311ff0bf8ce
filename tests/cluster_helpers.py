"""Shared by the tests of clusters: cases without what only the reference has, episodes, recounts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from servegym.envs import Requests, ServingEnv, make_requests
from servegym.envs.simulator.order import select
from servegym.envs.simulator.state import (
    DECODE_RUN,
    FINISHED,
    FUTURE,
    LENGTH_BUCKETS,
    MIXED,
    NOBODY,
    REJECTED,
    RUNNING,
    WAITING,
    State,
)
from servegym.envs.task.config import TaskConfig
from tests.against_cluster import cluster_task
from tests.random_clusters import ClusterCase, random_case
from tests.reference_cluster import ClusterSpec


def shared_case(rng: np.random.Generator, **settings: Any) -> ClusterCase:
    """A random case without what only the reference has: two options, and moves unless asked for."""
    case = random_case(rng, **{"moving": False, **settings})
    return ClusterCase(case.requests, replace(case.spec, padded=False, reserve="chunk"))


def requests_of(case: ClusterCase, predicted: Sequence[int] | None = None) -> Requests:
    """The requests in the order of their rows; `predicted` names a length for each row."""
    arrivals, prompts, outputs = (np.array(column) for column in zip(*case.requests, strict=True))
    return make_requests(
        prompts, outputs, arrivals, None if predicted is None else np.array(predicted)
    )


def task_of(spec: ClusterSpec, **process: Any) -> TaskConfig:
    """The task of a reference's settings, with keys of `[process]`."""
    task = cluster_task(spec)
    return replace(task, process=replace(task.process, **process))


def play_eagerly(env: ServingEnv, action: str) -> tuple[float, dict[str, Any]]:
    """Take an action wherever it is legal, else the first that is; return the return and last info."""
    chosen = env.task.actions.index(action)
    total, over, info = 0.0, False, dict[str, Any]()
    while not over:
        mask = env.action_masks()
        taken = chosen if mask[chosen] else int(np.argmax(mask))
        _, reward, terminated, truncated, info = env.step(np.int64(taken))
        assert "illegal_action" not in info
        total += float(reward)
        over = terminated or truncated
    return total, info


def play_any(
    env: ServingEnv, rng: np.random.Generator, watch: Callable[[], None]
) -> tuple[float, dict[str, Any]]:
    """Take random legal actions to the end, decoding half of the time; `watch` looks before each."""
    total, over, info = 0.0, False, dict[str, Any]()
    while not over:
        watch()
        legal = np.flatnonzero(env.action_masks())
        taken = int(legal[0] if rng.random() < 0.5 else rng.choice(legal))
        _, reward, terminated, truncated, info = env.step(np.int64(taken))
        assert "illegal_action" not in info
        total += float(reward)
        over = terminated or truncated
    watch()
    return total, info


# ---- a recount of everything that the simulator keeps in sums --------------------------------


def recount(state: State) -> None:
    """Assert that every sum and list of the episode in row 0 equals a count from its requests."""
    episode = state.episodes[0]
    requests = state.requests[0, : episode.requests]
    phases = requests.phase
    assert np.isin(phases[episode.routed :], [FUTURE]).all()
    assert not (phases[: episode.routed] == FUTURE).any()
    assert (phases == FINISHED).sum() == episode.finished
    assert (phases == REJECTED).sum() == episode.rejected
    present = int(np.isin(phases, (WAITING, RUNNING)).sum())
    assert episode.in_system == present
    assert (
        np.isfinite(state.times[0, : episode.requests].finished_s) == (phases == FINISHED)
    ).all()
    queues = [_waiting_in(state, q) for q in range(state.queues.shape[1])]
    listed = sorted(i for seen, unseen in queues for i in [*seen, *unseen])
    assert listed == np.flatnonzero(phases == WAITING).tolist()
    for q, (seen, unseen) in enumerate(queues):
        _recount_queue(state, q, seen, unseen)
    for r in range(state.replicas.shape[1]):
        _recount_replica(state, r)
    _recount_plans(state, {i for seen, _ in queues for i in seen})


def _blocks(state: State, tokens: int) -> int:
    return -(-tokens // int(state.cluster[0].block_tokens))


def _waiting_in(state: State, q: int) -> tuple[list[int], list[int]]:
    """Who waits in a queue in order of service: seen, and come since the last look."""
    queue = state.queues[0, q]
    seen, unseen = list[int](), list[int]()
    i, new = int(queue.first), False
    last = NOBODY
    while i != NOBODY:
        new = new or i == queue.first_unseen
        if state.requests[0, i].phase == WAITING:
            assert i not in seen
            assert i not in unseen
            (unseen if new else seen).append(i)
        last, i = i, int(state.requests[0, i].next)
    assert last == queue.last
    return seen, unseen


def _recount_queue(state: State, q: int, seen: list[int], unseen: list[int]) -> None:
    queue = state.queues[0, q]
    requests = state.requests[0]
    todo = {i: int(requests[i].prompt_tokens) + int(requests[i].emitted) for i in seen + unseen}
    left = {i: int(requests[i].expected_rounds) - int(requests[i].emitted) for i in todo}
    assert queue.waiting == len(seen)
    assert queue.rounds == sum(left[i] for i in seen)
    assert queue.tokens == sum(todo[i] for i in seen)
    if state.cluster[0].counts_memory:
        assert queue.blocks == sum(_blocks(state, todo[i]) for i in seen)
    squares = int(queue.squares_high) * 2**32 + int(queue.squares_low)
    assert squares == sum(todo[i] ** 2 for i in seen)
    assert queue.unseen == len(unseen)
    assert queue.unseen_work == sum(todo[i] + left[i] for i in unseen)
    assert queue.unseen_blocks == sum(_blocks(state, todo[i]) for i in unseen)
    buckets = np.bincount([int(requests[i].bucket) for i in seen], minlength=len(LENGTH_BUCKETS))
    assert state.waiting_lengths[0, q].tolist() == buckets.tolist()
    ranks = [int(select(state.waiting_tree[0, q], place)) for place in range(len(seen))]
    assert ranks == sorted(int(requests[i].rank) for i in seen)
    assert sorted(int(i) for i in state.by_length[0, ranks]) == sorted(seen)


def _recount_replica(state: State, r: int) -> None:
    replica, machine, requests = state.replicas[0, r], state.machines[r], state.requests[0]
    running = [
        i
        for i in range(int(state.episodes[0].requests))
        if requests[i].phase == RUNNING and requests[i].replica == r
    ]
    clients = [int(requests[i].client) for i in running]
    assert len(set(clients)) == len(clients)
    idle = state.idle[0, r, : replica.idle].tolist()
    assert sorted(clients + idle) == list(range(machine.clients))
    decoding = state.finishes[0, r, : replica.active].request.tolist()
    picked = state.picked[0, r, : replica.emitting].tolist()
    partial = [] if replica.partial == NOBODY else [int(replica.partial)]
    assert sorted(decoding + picked + partial) == sorted(running)
    dues = state.finishes[0, r, : replica.active].due.tolist()
    assert dues == sorted(dues, reverse=True)
    held = {}  # tokens of each decoding request whose keys and values are there
    for i, due in zip(decoding, dues, strict=True):
        left = due - int(replica.rounds)
        assert 0 < left <= requests[i].decode_rounds
        held[i] = int(requests[i].prompt_tokens) + int(requests[i].decode_rounds) - left
    assert replica.cached_tokens == sum(tokens + 1 for tokens in held.values())
    computed = [int(requests[i].computed) for i in picked + partial]
    if state.cluster[0].counts_memory:
        _recount_memory(state, r, list(held.values()), computed)
    ends = [int(state.clients[0, r, requests[i].client].expected_end) for i in decoding]
    assert replica.due_sum == sum(ends)
    for client in idle:
        assert state.clients[0, r, client].expected_end == 0


def _recount_memory(state: State, r: int, held: list[int], computed: list[int]) -> None:
    """Blocks and residues; what the stage under way will hold at its end fits, too."""
    replica, length = state.replicas[0, r], int(state.cluster[0].block_tokens)
    prefills = sum(_blocks(state, tokens) for tokens in computed)
    assert replica.used_blocks == prefills + sum(_blocks(state, tokens) for tokens in held)
    rounds = {DECODE_RUN: int(replica.run_rounds), MIXED: 1}.get(int(replica.stage), 0)
    used = prefills + sum(_blocks(state, tokens + rounds) for tokens in held)
    assert used <= state.machines[r].blocks
    if length > 1:
        places = [(tokens - int(replica.rounds)) % length for tokens in held]
        residues = np.bincount(np.array(places, np.int64), minlength=length)
        assert state.residues[0, r].tolist() == residues.tolist()


def _recount_plans(state: State, seen: set[int]) -> None:
    """Every waiting request that was seen is in one client's planned queue; counts are right."""
    requests, found = state.requests[0], list[int]()
    for r in range(state.replicas.shape[1]):
        for client in range(state.machines[r].clients):
            queue = state.clients[0, r, client]
            i, here = int(queue.queue_head), list[int]()
            while i != NOBODY:
                if requests[i].phase in (WAITING, FUTURE):
                    assert requests[i].plan_replica == r
                    assert requests[i].plan_client == client
                    here.append(i)
                i = int(requests[i].plan_next)
            assert queue.queue_requests == len(here)
            left = [int(requests[i].expected_rounds) - int(requests[i].emitted) for i in here]
            assert queue.queue_rounds == sum(left)
            found += here
    assert len(set(found)) == len(found)
    assert seen <= set(found)
