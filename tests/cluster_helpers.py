"""Shared by the tests of clusters: cases without what only the reference has, episodes, recounts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from servegym.envs import Requests, ServingEnv, make_requests
from servegym.envs.simulator.order import select
from servegym.envs.simulator.state import (
    COPYING,
    DECODE_RUN,
    DROPPING,
    FINISHED,
    FUTURE,
    HOST,
    IDLE,
    LANDED,
    LANDING,
    LENGTH_BUCKETS,
    MIXED,
    MOVING,
    NOBODY,
    PAUSING,
    REJECTED,
    RUNNING,
    SHED,
    TO_QUEUE,
    WAITING,
    RecordArray,
    State,
)
from servegym.envs.task.config import InformationConfig, TaskConfig
from servegym.envs.vocabulary import ROLE_PREFILL, STEALS, VICTIMS
from tests.against_cluster import cluster_task
from tests.random_clusters import ClusterCase, balanced, random_case
from tests.reference_cluster import ClusterSpec
from tests.reference_costs import decode_round_s

MANY_STEPS = 20_000
"""More decisions than any episode of a random case has that comes to an end."""


def informed(lengths: str) -> InformationConfig:
    """What a scheduler knows of output lengths: known, predicted or unknown."""
    return InformationConfig(output_lengths=cast(Any, lengths))


def shared_case(rng: np.random.Generator, **settings: Any) -> ClusterCase:
    """A random case without what only the reference has: two options, and moves unless asked for."""
    case = random_case(rng, **{"moving": False, **settings})
    return ClusterCase(case.requests, replace(case.spec, padded=False, reserve="chunk"))


def ordered_case(
    rng: np.random.Generator, by: str, *, dyadic: bool, moving: bool | None = None
) -> ClusterCase:
    """A case under the rule `shortest`, which goes by `by`; any victim, patience or none."""
    case = shared_case(rng, dyadic=dyadic, moving=moving)
    unit_s = 1.0 if dyadic else 0.05
    spec = replace(
        case.spec,
        shortest_by=by,
        preempt=str(rng.choice(list(VICTIMS))),
        level_tokens=int(rng.integers(1, 20)),
        patience_s=float(rng.choice([np.inf, np.inf, 4.0, 16.0])) * unit_s,
    )
    return ClusterCase(case.requests, spec)


def interval_case(rng: np.random.Generator, *, dyadic: bool) -> tuple[ClusterCase, list[int]]:
    """A case of outputs known by one end of an interval, which may be far from them; and these ends."""
    case = shared_case(rng, dyadic=dyadic, routers=["round-robin", "least-requests", "pool"])
    spec = replace(
        case.spec,
        shortest_by=str(rng.choice(["expected", "expected", "batch"])),
        preempt=str(rng.choice(["fewest-expected", "fewest-expected", "newest"])),
        admission_guard=str(rng.choice(["peak", "peak", "none"])),
    )
    outputs = np.array([output for _, _, output in case.requests])
    ends = np.maximum(np.rint(outputs * rng.choice([0.1, 0.5, 1.0, 2.0], len(outputs))), 1)
    return ClusterCase(case.requests, spec), ends.astype(int).tolist()


def stealing_case(rng: np.random.Generator, **settings: Any) -> ClusterCase:
    """A case with moves, and both kinds of theft wherever there is something to steal from."""
    case = shared_case(rng, **{"moving": True, **settings})
    if len(case.spec.replicas) == 1 or case.spec.router == "pool":
        return case
    return ClusterCase(case.requests, replace(case.spec, steals=tuple(STEALS)))


def balancing_case(rng: np.random.Generator, *, dyadic: bool) -> ClusterCase:
    """A case with moves in which replicas balance their load, or turn away who is late."""
    case = shared_case(rng, dyadic=dyadic, moving=True)
    return balanced(rng, case, 1.0 if dyadic else decode_round_s(case.spec.costs, 1, 0))


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
        assert not info["illegal_action"]
        total += float(reward)
        over = terminated or truncated
    return total, info


def play_any(
    env: ServingEnv, rng: np.random.Generator, watch: Callable[[], None], prefer: str = "decode"
) -> tuple[float, dict[str, Any]]:
    """Take random legal actions to the end; `watch` looks before each.

    Half of the time it is the first legal one of a kind, or of all.
    """
    kind = np.array([name.startswith(prefer) for name in env.task.actions])
    total, over, steps, info = 0.0, False, 0, dict[str, Any]()
    while not over:
        steps += 1
        assert steps < MANY_STEPS
        watch()
        mask = env.action_masks()
        legal = np.flatnonzero(mask)
        first = np.flatnonzero(mask & kind)[:1]
        taken = int([*first, *legal][0] if rng.random() < 0.5 else rng.choice(legal))
        _, reward, terminated, truncated, info = env.step(np.int64(taken))
        assert not info["illegal_action"]
        total += float(reward)
        over = terminated or truncated
    watch()
    return total, info


def assert_empty(state: State) -> None:
    """At the end nobody holds, wants or is on the way to anything."""
    replicas, episode = state.replicas[0], state.episodes[0]
    for name in ("used_blocks", "cached_tokens", "active", "due_sum"):
        assert not replicas[name].any(), name
    for name in ("coming", "coming_blocks", "incoming", "incoming_blocks", "leaving"):
        assert not replicas[name].any(), name
    assert (replicas.idle == state.machines.clients).all()
    assert not state.residues[0].any()
    for name in ("waiting", "rounds", "tokens", "blocks", "squares_high", "squares_low", "unseen"):
        assert not state.queues[0][name].any(), name
    assert not state.waiting_lengths[0].any()
    assert not state.clients[0]["queue_rounds"].any()
    assert episode.in_system == 0
    assert episode.transfers == 0


# ---- a recount of everything that the simulator keeps in sums --------------------------------


def recount(state: State) -> None:
    """Assert that every sum and list of the episode in row 0 equals a count from its requests."""
    episode = state.episodes[0]
    requests = state.requests[0, : episode.requests]
    phases = requests.phase
    assert np.isin(phases[episode.routed :], [FUTURE]).all()
    assert not (phases[: episode.routed] == FUTURE).any()
    assert (phases == FINISHED).sum() == episode.finished
    assert (phases == SHED).sum() == episode.shed
    assert (phases == REJECTED).sum() == episode.rejected - episode.shed
    present = int(np.isin(phases, (WAITING, RUNNING, MOVING)).sum())
    assert episode.in_system == present
    assert (
        np.isfinite(state.times[0, : episode.requests].finished_s) == (phases == FINISHED)
    ).all()
    queues = [_waiting_in(state, q) for q in range(state.queues.shape[1])]
    listed = sorted(i for seen, unseen in queues for i in [*seen, *unseen])
    assert listed == np.flatnonzero(phases == WAITING).tolist()
    for q, (seen, unseen) in enumerate(queues):
        _recount_queue(state, q, seen, unseen)
        if state.queues.shape[1] > 1:
            assert all(requests[i].replica in (NOBODY, q) for i in [*seen, *unseen])
    _recount_transfers(state)
    for r in range(state.replicas.shape[1]):
        _recount_replica(state, r)
    new = [i for _, unseen in queues for i in unseen if requests[i].moves == 0]
    arrived = np.isin(phases, (WAITING, RUNNING, MOVING, FINISHED, SHED))
    arrived[new] = False
    assert episode.arrived == arrived.sum()
    assert episode.arrived_rounds == requests.expected_rounds[arrived].sum()
    served = [_served_rounds(state, int(i)) for i in np.flatnonzero(arrived)]
    assert episode.served_rounds == sum(served)
    _recount_plans(state, {i for seen, _ in queues for i in seen})


def _blocks(state: State, tokens: int) -> int:
    return -(-tokens // int(state.cluster.block_tokens))


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
    wanted = {i: _wanted(state, i) for i in seen + unseen}
    left = {i: int(requests[i].expected_rounds) - int(requests[i].emitted) for i in wanted}
    # What is stored elsewhere is fetched, not computed.
    todo = {i: tokens * int(requests[i].stored == NOBODY) for i, tokens in wanted.items()}
    assert queue.waiting == len(seen)
    assert queue.stolen == sum(int(requests[i].stolen) for i in wanted)
    assert queue.rounds == sum(left[i] for i in seen)
    assert queue.tokens == sum(todo[i] for i in seen)
    if state.cluster.counts_memory:
        assert queue.blocks == sum(_blocks(state, wanted[i]) for i in seen)
    squares = int(queue.squares_high) * 2**32 + int(queue.squares_low)
    assert squares == sum(todo[i] ** 2 for i in seen)
    assert queue.unseen == len(unseen)
    assert queue.unseen_work == sum(todo[i] + left[i] for i in unseen)
    assert queue.unseen_blocks == sum(_blocks(state, wanted[i]) for i in unseen)
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
    kept = [int(t.client) for t in _transfers(state) if t.target == r and t.kind in TO_CLIENTS]
    assert sorted(clients + kept + idle) == list(range(machine.clients))
    assert all(state.clients[0, r, client].expected_end > 0 for client in kept)
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
    if state.cluster.counts_memory:
        _recount_memory(state, r, list(held.values()), computed)
    ends = [int(state.clients[0, r, requests[i].client].expected_end) for i in decoding]
    assert replica.due_sum == sum(ends)
    for client in idle:
        assert state.clients[0, r, client].expected_end == 0


def _recount_memory(state: State, r: int, held: list[int], computed: list[int]) -> None:
    """Blocks and residues; what the stage under way will hold at its end fits, too."""
    replica, length = state.replicas[0, r], int(state.cluster.block_tokens)
    fixed = sum(_blocks(state, tokens) for tokens in computed)
    fixed += int(replica.incoming_blocks) + _kept_blocks(state, r)
    assert replica.used_blocks == fixed + sum(_blocks(state, tokens) for tokens in held)
    rounds = {DECODE_RUN: int(replica.run_rounds), MIXED: 1}.get(int(replica.stage), 0)
    used = fixed + sum(_blocks(state, tokens + rounds) for tokens in held)
    assert used <= state.machines[r].blocks
    if length > 1:
        places = [(tokens - int(replica.rounds)) % length for tokens in held]
        residues = np.bincount(np.array(places, np.int64), minlength=length)
        assert state.residues[0, r].tolist() == residues.tolist()


# ---- what moves ------------------------------------------------------------------------------

LEAVING = (DROPPING, COPYING, PAUSING)  # decodes at its source
TO_CLIENTS = (COPYING, PAUSING, LANDING, LANDED)  # has a client and memory of its target
WAITS_FOR_BOUNDARY = (DROPPING, PAUSING, LANDED)


def _transfers(state: State) -> list[RecordArray]:
    return [state.transfers[0, k] for k in range(int(state.episodes[0].transfers))]


def _wanted(state: State, i: int) -> int:
    """Tokens that a waiting request will hold once it is admitted; stored ones hold one less."""
    return int(state.requests[0, i].prompt_tokens) + int(state.requests[0, i].emitted)


def _served_rounds(state: State, i: int) -> int:
    """Tokens that a request has emitted after its first."""
    request = state.requests[0, i]
    if request.phase == FINISHED:
        return int(request.decode_rounds)
    places = state.finishes[0, request.replica, : state.replicas[0, request.replica].active]
    if request.phase == RUNNING and i in places.request:
        due = int(places.due[places.request == i][0])
        left = due - int(state.replicas[0, request.replica].rounds)
        return int(request.decode_rounds) - left
    landing = any(t.request == i and t.kind in (LANDING, LANDED) for t in _transfers(state))
    if landing or request.stored != NOBODY:
        return int(request.emitted)
    return max(int(request.emitted) - 1, 0)


def _recount_transfers(state: State) -> None:
    """Everybody who moves or leaves is in one transfer, and what its replicas keep for it adds up."""
    requests, now_s = state.requests[0, : state.episodes[0].requests], state.episodes[0].now_s
    transfers = _transfers(state)
    assert state.episodes[0].transfer_s == min((t.due_s for t in transfers), default=np.inf)
    of = {kind: [int(t.request) for t in transfers if t.kind == kind] for kind in range(LANDED + 1)}
    leaving = [i for kind in LEAVING for i in of[kind]]
    moving = [i for kind in (TO_QUEUE, LANDING, LANDED) for i in of[kind]]
    assert sorted(leaving) == np.flatnonzero(requests.leaving).tolist()
    assert sorted(moving) == np.flatnonzero(requests.phase == MOVING).tolist()
    for t in transfers:
        request, target = requests[t.request], state.replicas[0, t.target]
        assert t.due_s >= now_s
        assert np.isinf(t.due_s) == (t.kind in WAITS_FOR_BOUNDARY)
        assert (t.client == NOBODY) == (t.kind not in TO_CLIENTS)
        if t.kind in LEAVING:
            assert request.phase == RUNNING
            assert request.replica == t.source != t.target
        if t.kind == LANDED:
            assert target.stage != IDLE
        if t.kind in (LANDING, LANDED):
            assert t.tokens == _wanted(state, int(t.request))
        if t.kind == TO_QUEUE:  # it may have emitted a token since it was to be computed again
            assert t.tokens <= _wanted(state, int(t.request))
            assert request.stolen
            assert request.plan_client == NOBODY
            assert not request.listed
    assert np.isin(requests.phase[requests.stolen > 0], (WAITING, MOVING)).all()
    for i in np.flatnonzero(requests.stored != NOBODY):
        assert requests[i].phase == WAITING or i in of[TO_QUEUE]
        source = int(requests[i].stored)
        host = source == HOST and state.cluster.evicts_to_host
        assert host or state.machines[source].role == ROLE_PREFILL
    for r in range(state.replicas.shape[1]):
        replica = state.replicas[0, r]
        coming = [t for t in transfers if t.target == r and t.kind not in TO_CLIENTS]
        incoming = [t for t in transfers if t.target == r and t.kind in TO_CLIENTS]
        assert replica.coming == len(coming)
        assert replica.coming_blocks == sum(_blocks(state, int(t.tokens)) for t in coming)
        assert replica.incoming == len(incoming)
        assert replica.incoming_blocks == sum(_blocks(state, int(t.tokens)) for t in incoming)
        assert replica.leaving == sum(t.source == r for t in transfers if t.kind in LEAVING)
        assert state.machines[r].role != ROLE_PREFILL or replica.active == 0


def _kept_blocks(state: State, r: int) -> int:
    """Blocks of a replica that hold keys and values of requests that have left its clients."""
    requests = state.requests[0, : state.episodes[0].requests]
    kept = [_wanted(state, int(i)) for i in np.flatnonzero(requests.stored == r)]
    kept += [int(t.tokens) for t in _transfers(state) if t.source == r and t.kind == LANDING]
    return sum(_blocks(state, tokens) for tokens in kept)


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
