"""A recount of everything that the simulator keeps in sums and lists, from the records of requests."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from servegym.envs.simulator.order import select
from servegym.envs.simulator.slo import limits_of
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
from servegym.envs.vocabulary import ROLE_PREFILL


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
        assert not blocks or queue.least_blocks <= min(blocks)
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
    if row.state.paces.shape[2] > 0:
        _recount_paces(row, r, dict(zip(decoding, dues, strict=True)))


def _recount_paces(row: Row, r: int, dues: dict[int, int]) -> None:
    """A client has a pace if its request decodes: `dues` are the finishes of those."""
    paces, rounds = _tuples(row.state.paces[0, r]), row.replicas[r].rounds
    paced = [k for k, pace in enumerate(paces) if not np.isnan(pace.first_token_s)]
    assert paced == sorted(row.requests[i].client for i in dues)
    for i, due in dues.items():
        pace = paces[row.requests[i].client]
        assert pace.first_token_s == row.state.times[0, i].first_token_s
        assert rounds - pace.begun_rounds == row.requests[i].decode_rounds - (due - rounds)
        assert pace.limit_s == limits_of(row.state, 0, i)[1]


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
