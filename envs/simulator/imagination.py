"""Copies of an episode for look-ahead, in which expected lengths replace the true ones."""

from __future__ import annotations

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.simulator.order import add
from servegym.envs.simulator.state import LENGTH_BUCKETS, WAITING, RecordArray, State


@shared_kernel
def copy_row(source: State, e: int, target: State, f: int) -> None:
    """Copy the episode in row ``e`` of ``source`` into row ``f`` of ``target``, of the same shape.

    Not copied are scratch arrays, times, entries beyond the episode's requests, and expected finishes and
    beliefs: ``target`` is made for known lengths.
    """
    n = source.episodes[e].requests
    target.episodes[f] = source.episodes[e]
    target.episodes[f].counts_slo = 0
    target.episodes[f].keeps_gaps = 0
    _copy(source.requests[e], target.requests[f], n)
    _copy(source.by_length[e], target.by_length[f], n)
    _copy(source.lengths[e], target.lengths[f], n)
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
        _copy(source.idle[e, r], target.idle[f, r], replica.idle)
        _copy(source.finishes[e, r], target.finishes[f, r], replica.active)
        _copy(source.residues[e, r], target.residues[f, r], source.residues.shape[2])
        _copy(source.picked[e, r], target.picked[f, r], replica.emitting)


@kernel
def _copy(source: RecordArray, target: RecordArray, count: int) -> None:
    """Copy the first entries; a loop, because numba's slices allocate."""
    for k in range(count):
        target[k] = source[k]


@shared_kernel
def imagine_row(source: State, e: int, target: State, f: int) -> None:
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
    episode.lengths_known = 1
    if episode.routed < episode.requests:
        _forget_future(target, f)
    for i in range(episode.routed):
        request = target.requests[f, i]
        request.decode_rounds = request.expected_rounds
    for r in range(target.replicas.shape[1]):
        _copy(source.expected[e, r], target.finishes[f, r], target.replicas[f, r].active)


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
