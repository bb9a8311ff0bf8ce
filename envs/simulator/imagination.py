"""Copies of an episode to try things on: what a scheduler believes is to come, without the truth."""

from __future__ import annotations

import numpy as np

from servegym.envs.simulator.jit import kernel
from servegym.envs.simulator.order import add
from servegym.envs.simulator.physics import expected_remaining
from servegym.envs.simulator.state import WAITING, State


@kernel
def copy_row(source: State, e: int, target: State, f: int) -> None:
    """Copy the episode in row ``e`` of ``source`` into row ``f`` of ``target``, made for as many.

    Only what an episode is made of: scratch arrays and what lies behind its requests stay.
    """
    n = source.episodes[e].requests
    target.episodes[f] = source.episodes[e]
    target.requests[f, :n] = source.requests[e, :n]
    target.by_length[f, :n] = source.by_length[e, :n]
    target.waiting_lengths[f] = source.waiting_lengths[e]
    target.waiting_tree[f] = source.waiting_tree[e]
    for r in range(source.replicas.shape[1]):
        target.replicas[f, r] = source.replicas[e, r]
        target.clients[f, r] = source.clients[e, r]
        target.holding[f, r] = source.holding[e, r]
        active = source.replicas[e, r].active
        target.finishes[f, r, :active] = source.finishes[e, r, :active]


@kernel
def imagine_row(source: State, e: int, target: State, f: int) -> None:
    """Copy row ``e`` of ``source`` as its scheduler believes it to be into row ``f`` of ``target``.

    Lengths that are still open are the expected ones; a running request that has outlived its
    expectation is believed to finish in the next round. Requests that have not arrived are left
    out: the imagined episode ends with those present. Its lower bound, credits and reported loss
    are 0, as the true ones depend on true lengths.
    """
    copy_row(source, e, target, f)
    episode = target.episodes[f]
    episode.bound_s = 0.0
    episode.round_credit_s = 0.0
    episode.prompt_credit_s = 0.0
    episode.reported_loss = 0.0
    if episode.arrived < episode.requests:
        _forget_future(target, f)
    for i in range(episode.arrived):
        request = target.requests[f, i]
        if request.phase == WAITING:
            request.decode_rounds = request.expected_rounds
    for r in range(target.replicas.shape[1]):
        _expect_finishes(target, f, r)


@kernel
def _forget_future(state: State, e: int) -> None:
    """Leave out the requests that have not arrived; they have the highest ids."""
    episode = state.episodes[e]
    place = 0
    state.waiting_tree[e] = 0
    for old in range(episode.requests):
        i = state.by_length[e, old]
        if i < episode.arrived:
            state.by_length[e, place] = i
            state.requests[e, i].rank = place
            if state.requests[e, i].phase == WAITING:
                add(state.waiting_tree[e], place, 1)
            place += 1
    state.by_length[e, place : episode.requests] = 0
    for i in range(episode.arrived, episode.requests):
        request = state.requests[e, i]
        request.arrival_s = np.inf
        request.prompt_tokens = 0
        request.decode_rounds = 0
        request.expected_rounds = 0
        request.rank = 0
        request.bucket = 0
    episode.requests = episode.arrived


@kernel
def _expect_finishes(state: State, e: int, r: int) -> None:
    """Put the running requests' expected finishes in the place of the true ones."""
    replica, finishes = state.replicas[e, r], state.finishes[e, r]
    active = replica.active
    span = state.requests.shape[1]
    keys = np.empty(active, np.int64)  # rounds left and id of each in one sortable number
    for k in range(active):
        i = finishes[k].request
        left = max(expected_remaining(state, e, r, i), 1)
        request = state.requests[e, i]
        request.decode_rounds = replica.rounds - request.admitted_round + left
        keys[k] = left * span + i
    keys.sort()
    replica.due_sum = 0
    for k in range(active):
        key = keys[active - 1 - k]
        finishes[k].due = replica.rounds + key // span
        finishes[k].request = key % span
        replica.due_sum += finishes[k].due
