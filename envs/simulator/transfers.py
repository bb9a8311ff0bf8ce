"""What is on its way between replicas: a list in order of making, and the room kept for it.

Rules are those of CLUSTER.md. A transfer to a replica's *clients* keeps one of them, and memory,
from its making on; one to its *queue* keeps nothing but its place. Its kind says what it waits for.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.simulator.queues import blocks_of, release_client
from servegym.envs.simulator.state import DROPPING, State


@shared_kernel
def start(
    state: State,
    e: int,
    kind: int,
    i: int,
    source: int,
    target: int,
    client: int,
    tokens: int,
    due_s: float,
) -> None:
    """Put a transfer of request ``i`` at the end of the list; see TRANSFER for the rest."""
    episode = state.episodes[e]
    transfer = state.transfers[e, episode.transfers]
    transfer.kind = kind
    transfer.request = i
    transfer.source = source
    transfer.target = target
    transfer.client = client
    transfer.tokens = tokens
    transfer.due_s = due_s
    episode.transfers += 1
    episode.transfer_s = min(episode.transfer_s, due_s)


@shared_kernel
def remove(state: State, e: int, place: int) -> None:
    """Take a transfer out of the list; ``find_next_due`` is then to be called."""
    episode, transfers = state.episodes[e], state.transfers[e]
    episode.transfers -= 1
    for k in range(place, episode.transfers):
        transfers[k] = transfers[k + 1]


@shared_kernel
def find_next_due(state: State, e: int) -> None:
    """Note when the next transfer is due."""
    episode = state.episodes[e]
    due_s = np.inf
    for k in range(episode.transfers):
        due_s = min(due_s, state.transfers[e, k].due_s)
    episode.transfer_s = due_s


@shared_kernel
def keep_room(state: State, e: int, r: int, client: int, tokens: int, rounds: int) -> None:
    """Count a client of ``r``, no longer idle, and blocks for so many tokens as kept for a transfer.

    The request should take so many ``rounds`` more.
    """
    replica = state.replicas[e, r]
    blocks = blocks_of(state, tokens)
    replica.used_blocks += blocks
    replica.incoming += 1
    replica.incoming_blocks += blocks
    state.clients[e, r, client].expected_end = -1 - rounds


@kernel
def stop_coming(state: State, e: int, place: int) -> None:
    """Count a transfer no more among those on their way to its target's queue."""
    transfer = state.transfers[e, place]
    target = state.replicas[e, transfer.target]
    target.coming -= 1
    target.coming_blocks -= blocks_of(state, np.int64(transfer.tokens))


@shared_kernel
def end_move(state: State, e: int, place: int) -> None:
    """Give up the move of a request that has not left yet: the room kept for it is free again."""
    transfer = state.transfers[e, place]
    target = state.replicas[e, transfer.target]
    if transfer.kind == DROPPING:
        stop_coming(state, e, place)
    else:
        blocks = blocks_of(state, transfer.tokens)
        target.used_blocks -= blocks
        target.incoming -= 1
        target.incoming_blocks -= blocks
        release_client(state, e, transfer.target, transfer.client)
        target.told = 1
    state.replicas[e, transfer.source].leaving -= 1
    state.requests[e, transfer.request].leaving = 0
    remove(state, e, place)
    find_next_due(state, e)


@shared_kernel
def end_move_of(state: State, e: int, i: int) -> None:
    """Give up the move of request ``i``, which finishes or is preempted before it has left."""
    for k in range(state.episodes[e].transfers):
        if state.transfers[e, k].request == i:
            end_move(state, e, k)
            break
