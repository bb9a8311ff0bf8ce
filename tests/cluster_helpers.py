"""Shared by the tests of clusters: cases without what only the reference has, episodes, recounts."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.sections import InformationConfig
from servegym.envs.vocabulary import ROLE_PREFILL, STEALS, VICTIMS
from tests.against_cluster import cluster_task
from tests.random_clusters import ClusterCase, balanced, in_step, random_case
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


def planned_case(rng: np.random.Generator, *, dyadic: bool) -> ClusterCase:
    """A case for the rules by length and by plan: still, moving, balancing, in step; also routed by plan."""
    kind = str(rng.choice(["still", "moving", "moving", "balancing"]))
    if kind == "balancing":
        case = balancing_case(rng, dyadic=dyadic)
    else:
        case = shared_case(rng, dyadic=dyadic, moving=kind == "moving")
    alike = all(part.role == "both" for part in case.spec.replicas)
    if alike and rng.random() < 0.15:
        case = ClusterCase(case.requests, replace(case.spec, router="plan"))
    return in_step(rng, case) if dyadic and rng.random() < 0.3 else case


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


@dataclass(frozen=True)
class Row:
    """Row 0 of a state as plain tuples with names: a look at a record array's field takes a microsecond."""

    state: State
    episode: Any
    requests: list[Any]
    queues: list[Any]
    replicas: list[Any]
    machines: list[Any]
    clients: list[list[Any]]  # by replica
    finishes: list[list[Any]]  # of the decoding, by replica
    transfers: list[Any]
    block_tokens: int

    @classmethod
    def of(cls, state: State) -> Row:
        episode = _tuples(state.episodes[:1])[0]
        replicas = _tuples(state.replicas[0])
        return cls(
            state,
            episode,
            _tuples(state.requests[0, : episode.requests]),
            _tuples(state.queues[0]),
            replicas,
            _tuples(state.machines),
            [_tuples(each) for each in state.clients[0]],
            [_tuples(state.finishes[0, r, : each.active]) for r, each in enumerate(replicas)],
            _tuples(state.transfers[0, : episode.transfers]),
            int(state.cluster.block_tokens),
        )

    def those(self, *phases: int) -> list[int]:
        """Return which requests are in one of the phases."""
        return [i for i, request in enumerate(self.requests) if request.phase in phases]

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def wanted(self, i: int) -> int:
        """Tokens that a waiting request will hold once it is admitted; stored ones hold one less."""
        return int(self.requests[i].prompt_tokens + self.requests[i].emitted)


@cache
def _named(dtype: np.dtype) -> Any:
    return namedtuple("_named", dtype.names or ())


def _tuples(records: RecordArray) -> list[Any]:
    """Return the records of an array of one axis as named tuples of Python's own numbers."""
    return list(map(_named(records.dtype)._make, records.tolist()))


def recount(state: State) -> None:
    """Assert that every sum and list of the episode in row 0 equals a count from its requests."""
    row = Row.of(state)
    episode, requests = row.episode, row.requests
    assert (episode.requests, episode.transfers) == (len(requests), len(row.transfers))
    assert all(request.phase == FUTURE for request in requests[episode.routed :])
    assert not any(request.phase == FUTURE for request in requests[: episode.routed])
    finished = row.those(FINISHED)
    assert len(finished) == episode.finished
    assert len(row.those(SHED)) == episode.shed
    assert len(row.those(REJECTED)) == episode.rejected - episode.shed
    assert episode.in_system == len(row.those(WAITING, RUNNING, MOVING))
    ended = np.isfinite(state.times[0, : episode.requests].finished_s)
    assert np.flatnonzero(ended).tolist() == finished
    queues = [waiting_in(row, q) for q in range(len(row.queues))]
    listed = sorted(i for seen, unseen in queues for i in [*seen, *unseen])
    assert listed == row.those(WAITING)
    for q, (seen, unseen) in enumerate(queues):
        _recount_queue(row, q, seen, unseen)
        if len(row.queues) > 1:
            assert all(requests[i].replica in (NOBODY, q) for i in [*seen, *unseen])
    _recount_transfers(row)
    for r in range(len(row.replicas)):
        _recount_replica(row, r)
    new = {i for _, unseen in queues for i in unseen if requests[i].moves == 0}
    arrived = [i for i in row.those(WAITING, RUNNING, MOVING, FINISHED, SHED) if i not in new]
    assert episode.arrived == len(arrived)
    assert episode.arrived_rounds == sum(requests[i].expected_rounds for i in arrived)
    assert episode.served_rounds == sum(_served_rounds(row, i) for i in arrived)
    _recount_plans(row, [seen for seen, _ in queues])


def waiting_in(row: Row, q: int) -> tuple[list[int], list[int]]:
    """Who waits in a queue in order of service: seen, and come since the last look."""
    queue = row.queues[q]
    seen, unseen = list[int](), list[int]()
    i, new = queue.first, False
    last = NOBODY
    while i != NOBODY:
        new = new or i == queue.first_unseen
        if row.requests[i].phase == WAITING:
            assert i not in seen
            assert i not in unseen
            (unseen if new else seen).append(i)
        assert last in (NOBODY, row.state.before[0, i])
        last, i = i, row.requests[i].next
    assert last == queue.last
    return seen, unseen


def _recount_queue(row: Row, q: int, seen: list[int], unseen: list[int]) -> None:
    queue, requests, state = row.queues[q], row.requests, row.state
    wanted = {i: row.wanted(i) for i in seen + unseen}
    left = {i: requests[i].expected_rounds - requests[i].emitted for i in wanted}
    # What is stored elsewhere is fetched, not computed.
    todo = {i: tokens * int(requests[i].stored == NOBODY) for i, tokens in wanted.items()}
    assert queue.waiting == len(seen)
    assert queue.stolen == sum(requests[i].stolen for i in wanted)
    assert queue.rounds == sum(left[i] for i in seen)
    assert queue.tokens == sum(todo[i] for i in seen)
    if state.cluster.counts_memory:
        blocks = [row.blocks(wanted[i]) for i in seen]
        assert queue.blocks == sum(blocks)
        assert queue.most_blocks >= max(blocks, default=0)
        assert queue.most_blocks == 0 or seen
    squares = queue.squares_high * 2**32 + queue.squares_low
    assert squares == sum(todo[i] ** 2 for i in seen)
    assert queue.unseen == len(unseen)
    assert queue.unseen_work == sum(todo[i] + left[i] for i in unseen)
    assert queue.unseen_blocks == sum(row.blocks(wanted[i]) for i in unseen)
    buckets = np.bincount([requests[i].bucket for i in seen], minlength=len(LENGTH_BUCKETS))
    assert state.waiting_lengths[0, q].tolist() == buckets.tolist()
    ranks = [int(select(state.waiting_tree[0, q], place)) for place in range(len(seen))]
    assert ranks == sorted(requests[i].rank for i in seen)
    assert sorted(state.by_length[0, ranks].tolist()) == sorted(seen)


def _recount_replica(row: Row, r: int) -> None:
    replica, requests, clients = row.replicas[r], row.requests, row.clients[r]
    running = [i for i in row.those(RUNNING) if requests[i].replica == r]
    taken = [requests[i].client for i in running]
    assert len(set(taken)) == len(taken)
    idle = row.state.idle[0, r, : replica.idle].tolist()
    kept = [t.client for t in row.transfers if t.target == r and t.kind in TO_CLIENTS]
    assert sorted(taken + kept + idle) == list(range(row.machines[r].clients))
    assert all(clients[client].expected_end < 0 for client in kept)
    decoding = [finish.request for finish in row.finishes[r]]
    picked = row.state.picked[0, r, : replica.emitting].tolist()
    partial = [] if replica.partial == NOBODY else [replica.partial]
    assert sorted(decoding + picked + partial) == sorted(running)
    dues = [finish.due for finish in row.finishes[r]]
    assert dues == sorted(dues, reverse=True)
    held = {}  # tokens of each decoding request whose keys and values are there
    for i, due in zip(decoding, dues, strict=True):
        left = due - replica.rounds
        assert 0 < left <= requests[i].decode_rounds
        held[i] = requests[i].prompt_tokens + requests[i].decode_rounds - left
    assert replica.cached_tokens == sum(tokens + 1 for tokens in held.values())
    if row.state.cluster.counts_memory:
        computed = [requests[i].computed for i in picked + partial]
        _recount_memory(row, r, list(held.values()), computed)
    assert replica.due_sum == sum(clients[requests[i].client].expected_end for i in decoding)
    for client in idle:
        assert clients[client].expected_end == 0


def _recount_memory(row: Row, r: int, held: list[int], computed: list[int]) -> None:
    """Blocks and residues; what the stage under way will hold at its end fits, too."""
    replica, length = row.replicas[r], row.block_tokens
    fixed = sum(row.blocks(tokens) for tokens in computed)
    fixed += replica.incoming_blocks + _kept_blocks(row, r)
    assert replica.used_blocks == fixed + sum(row.blocks(tokens) for tokens in held)
    rounds = {DECODE_RUN: replica.run_rounds, MIXED: 1}.get(replica.stage, 0)
    used = fixed + sum(row.blocks(tokens + rounds) for tokens in held)
    assert used <= row.machines[r].blocks
    if length > 1:
        places = [(tokens - replica.rounds) % length for tokens in held]
        residues = np.bincount(np.array(places, np.int64), minlength=length)
        assert row.state.residues[0, r].tolist() == residues.tolist()


# ---- what moves ------------------------------------------------------------------------------

LEAVING = (DROPPING, COPYING, PAUSING)  # decodes at its source
TO_CLIENTS = (COPYING, PAUSING, LANDING, LANDED)  # has a client and memory of its target
WAITS_FOR_BOUNDARY = (DROPPING, PAUSING, LANDED)


def _served_rounds(row: Row, i: int) -> int:
    """Tokens that a request has emitted after its first."""
    request = row.requests[i]
    if request.phase == FINISHED:
        return int(request.decode_rounds)
    if request.phase == RUNNING:
        for finish in row.finishes[request.replica]:
            if finish.request == i:
                left = finish.due - row.replicas[request.replica].rounds
                return int(request.decode_rounds - left)
    landing = any(t.request == i and t.kind in (LANDING, LANDED) for t in row.transfers)
    if landing or request.stored != NOBODY:
        return int(request.emitted)
    return max(int(request.emitted) - 1, 0)


def _recount_transfers(row: Row) -> None:
    """Everybody who moves or leaves is in one transfer, and what its replicas keep for it adds up."""
    requests, transfers = row.requests, row.transfers
    assert row.episode.transfer_s == min((t.due_s for t in transfers), default=np.inf)
    of = {kind: [t.request for t in transfers if t.kind == kind] for kind in range(LANDED + 1)}
    leaving = [i for kind in LEAVING for i in of[kind]]
    moving = [i for kind in (TO_QUEUE, LANDING, LANDED) for i in of[kind]]
    assert sorted(leaving) == [i for i, request in enumerate(requests) if request.leaving]
    assert sorted(moving) == row.those(MOVING)
    for t in transfers:
        request, target = requests[t.request], row.replicas[t.target]
        assert t.due_s >= row.episode.now_s
        assert np.isinf(t.due_s) == (t.kind in WAITS_FOR_BOUNDARY)
        assert (t.client == NOBODY) == (t.kind not in TO_CLIENTS)
        if t.kind in LEAVING:
            assert request.phase == RUNNING
            assert request.replica == t.source != t.target
        if t.kind == LANDED:
            assert target.stage != IDLE
        if t.kind in (LANDING, LANDED):
            assert t.tokens == row.wanted(t.request)
        if t.kind == TO_QUEUE:  # it may have emitted a token since it was to be computed again
            assert t.tokens <= row.wanted(t.request)
            assert request.stolen
            assert request.plan_client == NOBODY
            assert not request.listed
    for i, request in enumerate(requests):
        assert request.stolen <= 0 or request.phase in (WAITING, MOVING)
        if request.stored != NOBODY:
            assert request.phase == WAITING or i in of[TO_QUEUE]
            host = request.stored == HOST and row.state.cluster.evicts_to_host
            assert host or row.machines[request.stored].role == ROLE_PREFILL
    for r, replica in enumerate(row.replicas):
        coming = [t for t in transfers if t.target == r and t.kind not in TO_CLIENTS]
        incoming = [t for t in transfers if t.target == r and t.kind in TO_CLIENTS]
        assert replica.coming == len(coming)
        assert replica.coming_blocks == sum(row.blocks(t.tokens) for t in coming)
        assert replica.incoming == len(incoming)
        assert replica.incoming_blocks == sum(row.blocks(t.tokens) for t in incoming)
        assert replica.leaving == sum(t.source == r for t in transfers if t.kind in LEAVING)
        assert row.machines[r].role != ROLE_PREFILL or replica.active == 0


def _kept_blocks(row: Row, r: int) -> int:
    """Blocks of a replica that hold keys and values of requests that have left its clients."""
    kept = [row.wanted(i) for i, request in enumerate(row.requests) if request.stored == r]
    kept += [t.tokens for t in row.transfers if t.source == r and t.kind == LANDING]
    return sum(row.blocks(tokens) for tokens in kept)


def _recount_plans(row: Row, queues: list[list[int]]) -> None:
    """Whoever waits and was seen is in one planned queue, but for the unplanned; counts are right."""
    requests, found = row.requests, list[int]()
    for r, machine in enumerate(row.machines):
        for client in range(machine.clients):
            queue = row.clients[r][client]
            i, here = queue.queue_head, list[int]()
            last = NOBODY
            while i != NOBODY:
                if requests[i].phase in (WAITING, FUTURE):
                    assert requests[i].plan_replica == r
                    assert requests[i].plan_client == client
                    here.append(i)
                assert last in (NOBODY, row.state.plan_before[0, i])
                last, i = i, requests[i].plan_next
            assert queue.queue_requests == len(here)
            left = [requests[i].expected_rounds - requests[i].emitted for i in here]
            assert queue.queue_rounds == sum(left)
            found += here
    assert len(set(found)) == len(found)
    for queue, seen in zip(row.queues, queues, strict=True):
        unplanned = [i for i in seen if requests[i].plan_client == NOBODY]
        assert queue.unplanned == len(unplanned)
        assert set(seen) - set(found) == set(unplanned)
        if unplanned:  # the mark is in the list, at the first of them or before
            place = queue.first_unplanned
            while place not in (unplanned[0], NOBODY):
                place = requests[place].next
            assert place == unplanned[0]
