"""Copies of an episode for look-ahead, in which expected lengths replace the true ones."""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.finishes import insert
from servegym.envs.simulator.memory import rounds_to_full
from servegym.envs.simulator.order import add
from servegym.envs.simulator.queues import queue_of, shares_pool
from servegym.envs.simulator.routing import largest_servable
from servegym.envs.simulator.stages import (
    rounds_to_next_finish,
    rounds_until,
    run_for,
    sees_at_once,
)
from servegym.envs.simulator.state import (
    DECODE_RUN,
    LENGTH_BUCKETS,
    NOBODY,
    RUNNING,
    UNLIMITED_BLOCKS,
    WAITING,
    RecordArray,
    State,
)
from servegym.envs.vocabulary import ROLE_PREFILL


@shared_kernel
def copy_row(source: State, e: int, target: State, f: int) -> None:
    """Copy the episode in row ``e`` of ``source`` into row ``f`` of ``target``, of the same shape.

    Not copied are scratch arrays, times (but arrivals where patience ends), entries beyond the episode's
    requests, and expected finishes and beliefs: ``target`` is made for known lengths.
    """
    n = source.episodes[e].requests
    target.episodes[f] = source.episodes[e]
    target.episodes[f].counts_slo = 0
    target.episodes[f].sheds = 0
    target.episodes[f].keeps_gaps = 0
    _copy(source.requests[e], target.requests[f], n)
    _copy(source.before[e], target.before[f], n)
    _copy(source.plan_before[e], target.plan_before[f], n)
    _copy(source.by_length[e], target.by_length[f], n)
    _copy(source.lengths[e], target.lengths[f], n)
    _copy(source.weights[e], target.weights[f], source.weights.shape[1])
    if target.episodes[f].stages > 0:
        _copy(source.calendar[e], target.calendar[f], target.episodes[f].stages + 1)
        forget_fits(target, f)
    if source.cluster.patience_s < np.inf:  # it goes by when requests came
        for i in range(n):
            target.times[f, i].arrival_s = source.times[e, i].arrival_s
    if source.priority.shape[1] > 0:
        _copy(source.priority[e], target.priority[f], n)
    if source.cluster.moves:
        _copy(source.transfers[e], target.transfers[f], source.episodes[e].transfers)
    for q in range(source.queues.shape[1]):
        target.queues[f, q] = source.queues[e, q]
        _copy(source.waiting_lengths[e, q], target.waiting_lengths[f, q], LENGTH_BUCKETS.size)
        _copy(source.waiting_tree[e, q], target.waiting_tree[f, q], source.waiting_tree.shape[2])
    for r in range(source.replicas.shape[1]):
        replica = source.replicas[e, r]
        target.replicas[f, r] = replica
        target.loads[f, r] = source.loads[e, r]
        target.event_s[f, r] = source.event_s[e, r]
        _copy(source.clients[e, r], target.clients[f, r], source.clients.shape[2])
        _copy(source.admitted[e, r], target.admitted[f, r], source.admitted.shape[2])
        _copy(source.idle[e, r], target.idle[f, r], replica.idle)
        _copy(source.finishes[e, r], target.finishes[f, r], replica.active)
        _copy(source.residues[e, r], target.residues[f, r], source.residues.shape[2])
        _copy(source.picked[e, r], target.picked[f, r], replica.emitting)


@kernel
def forget_fits(state: State, e: int) -> None:
    """Let the rule ``scored`` find anew how lengths fit the calendar."""
    for rank in range(state.episodes[e].requests):
        state.fits[e, rank].since = 1
        state.fits[e, rank].stage = 0


@kernel
def _copy(source: RecordArray, target: RecordArray, count: int) -> None:
    """Copy the first entries; a loop, because numba's slices allocate."""
    for k in range(count):
        target[k] = source[k]


@shared_kernel
def imagine_row(source: State, costs: CostTables, e: int, target: State, f: int) -> None:
    """Copy row ``e`` of ``source`` into row ``f`` of ``target`` with expected as true lengths.

    ``target`` is made for known lengths. Requests that have not arrived are left out. Lower bound, credits
    and reported loss are 0, as the real ones depend on true lengths.
    """
    copy_row(source, e, target, f)
    episode = target.episodes[f]
    episode.bound_s = 0.0
    episode.round_credit_s = 0.0
    episode.prompt_credit_s = 0.0
    episode.reported_loss = 0.0
    episode.random_bits = 0  # they depend on requests to come
    uncertain = not episode.lengths_known
    episode.lengths_known = 1
    if episode.routed < episode.requests:
        _forget_future(target, f)
    for i in range(episode.routed):
        request = target.requests[f, i]
        request.decode_rounds = request.expected_rounds
    if target.beliefs.shape[1] > 0:
        _copy(source.beliefs[e], target.beliefs[f], episode.routed)
    if uncertain and target.cluster.limits_memory:
        _fit_into_memory(target, f)
    for r in range(target.replicas.shape[1]):
        _copy(source.expected[e, r], target.finishes[f, r], target.replicas[f, r].active)
        if uncertain and target.machines[r].blocks != UNLIMITED_BLOCKS:
            _shorten(target, f, r)
        if uncertain and target.replicas[f, r].stage == DECODE_RUN:
            _imagine_run(target, costs, f, r)


@kernel
def _fit_into_memory(state: State, e: int) -> None:
    """Let no request be longer than the memory where it is holds: it would never finish."""
    largest = largest_servable(state)
    for i in range(state.episodes[e].routed):
        request = state.requests[e, i]
        if request.phase == RUNNING:
            _cap(state, e, i, _blocks_at(state, request.replica, largest))
        else:
            _cap(state, e, i, largest)
    if not shares_pool(state):
        for r in range(state.queues.shape[1]):
            i = state.queues[e, r].first
            while i != NOBODY:
                if state.requests[e, i].phase == WAITING:
                    _cap(state, e, i, _blocks_at(state, r, largest))
                i = state.requests[e, i].next


@kernel
def _blocks_at(state: State, r: int, largest: int) -> int:
    """Return the blocks of a replica at which a request may end."""
    return largest if state.machines[r].role == ROLE_PREFILL else state.machines[r].blocks


@kernel
def _cap(state: State, e: int, i: int, blocks: int) -> None:
    """Let a request emit no more tokens than so many blocks hold beside its prompt."""
    request = state.requests[e, i]
    if blocks != UNLIMITED_BLOCKS:
        most = blocks * state.cluster.block_tokens - request.prompt_tokens - 1
        request.decode_rounds = min(request.decode_rounds, most)


@kernel
def _shorten(state: State, e: int, r: int) -> None:
    """Bring the finishes forward of those that were shortened to fit into memory."""
    finishes = state.finishes[e, r]
    for place in range(state.replicas[e, r].active):
        i, due = finishes[place].request, finishes[place].due
        request = state.requests[e, i]
        insert(finishes, place, due - (request.expected_rounds - request.decode_rounds), i)


@shared_kernel
def _imagine_run(state: State, costs: CostTables, e: int, r: int) -> None:
    """Let a run of decode rounds under way at another replica end where it should: its true end is not known.

    That is the next expected finish or full memory, but at the first boundary from now on if something waits
    for that. Whoever should have finished by then finishes there.
    """
    replica, queue = state.replicas[e, r], state.queues[e, queue_of(state, r)]
    rounds = rounds_until(state, costs, e, r, state.episodes[e].now_s)
    _outlive(state, e, r, replica.rounds + rounds)
    awaited = replica.idle > 0 and queue.waiting + queue.unseen > 0
    awaited = awaited or (queue.unseen > 0 and sees_at_once(state, e, r))
    if state.cluster.moves:
        awaited = awaited or replica.idle + replica.leaving + replica.incoming > 0
    if not awaited:
        expected = min(rounds_to_next_finish(state, e, r), rounds_to_full(state, e, r))
        rounds = max(rounds, expected)
    run_for(state, costs, e, r, rounds)


@kernel
def _outlive(state: State, e: int, r: int, clock: int) -> None:
    """Let every decoding request finish at this decode clock or later."""
    episode, replica, finishes = state.episodes[e], state.replicas[e, r], state.finishes[e, r]
    first = replica.active
    while first > 0 and finishes[first - 1].due < clock:
        first -= 1
    for place in range(first, replica.active):
        i = finishes[place].request
        request, more = state.requests[e, i], clock - finishes[place].due
        request.expected_rounds += more
        request.decode_rounds += more
        state.clients[e, r, request.client].expected_end += more
        replica.due_sum += more
        episode.arrived_rounds += more
        insert(finishes, place, clock, i)


@kernel
def _forget_future(state: State, e: int) -> None:
    """Remove the requests that have not arrived; they have the highest ids."""
    episode = state.episodes[e]
    place = 0
    for q in range(state.queues.shape[1]):
        for k in range(state.waiting_tree.shape[2]):
            state.waiting_tree[e, q, k] = 0
    for old in range(episode.requests):
        i = state.by_length[e, old]
        if i < episode.routed:
            state.by_length[e, place] = i
            state.lengths[e, place] = state.lengths[e, old]
            state.requests[e, i].rank = place
            place += 1
    for q in range(state.queues.shape[1]):
        i = state.queues[e, q].first
        while i != state.queues[e, q].first_unseen:
            if state.requests[e, i].phase == WAITING:
                add(state.waiting_tree[e, q], state.requests[e, i].rank, 1)
            i = state.requests[e, i].next
    for i in range(episode.routed, episode.requests):
        state.by_length[e, i] = 0  # as many places as requests were removed
        state.lengths[e, i] = 0
        request = state.requests[e, i]
        request.prompt_tokens = 0
        request.decode_rounds = 0
        request.expected_rounds = 0
        request.rank = 0
        request.bucket = 0
    episode.requests = episode.routed
