"""The block ``cluster`` of the observation: where the replica that decides stands among all.

Of other replicas it tells what a router sees that looks now: their last round boundary. It never tells when
their runs of decode rounds end, which depends on true output lengths. Where there is one replica, and
where nothing distinguishes them, comparisons read ½ and shares of other replicas 0.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.process.observation import QUEUE_DOUBLINGS, balance, log_scaled
from servegym.envs.simulator.moving import copy_seconds, room_for
from servegym.envs.simulator.queues import shares_pool
from servegym.envs.simulator.routing import look
from servegym.envs.simulator.seconds import decode_seconds, prefill_seconds
from servegym.envs.simulator.state import DECODE_RUN, IDLE, UNLIMITED_BLOCKS, State

CLUSTER_FEATURES: Final = (
    "1 / replicas",
    "waiting here against the mean of all replicas, a / (a + b)",
    "waiting here against the most elsewhere, a / (a + b)",
    "running here against the mean of all replicas, a / (a + b)",
    "expected tokens to compute here against the mean of all replicas, a / (a + b)",
    "expected tokens to compute here against the most elsewhere, a / (a + b)",
    "free share of memory here against the mean of all replicas, a / (a + b)",
    "blocks in use or wanted here against the mean of all replicas, a / (a + b)",
    "clients here against the mean of all replicas, a / (a + b)",
    "mean seconds of a token, all clients busy, against those here, a / (a + b)",
    "replicas without a request / other replicas",
    "replicas in a prefill or mixed stage / other replicas",
    "idle clients elsewhere / clients elsewhere",
    "waiting elsewhere / waiting",
    "waiting elsewhere per client there, log-scaled",
    "waiting elsewhere against idle clients here, a / (a + b)",
    "mean seconds until a round or stage elsewhere ends against a round here, a / (a + b)",
    "idle clients here that no request waits or comes for / clients, where replicas may steal",
    "requests on the way here / clients",
    "seconds to copy a cached request of mean length against prefilling it again, a / (a + b)",
)
"""What each entry of the block means, in order."""


@kernel
def _against(a: float, b: float) -> float:
    """Return a / (a + b), and ½ also where both are 0: they are equal."""
    return a / (a + b) if a + b > 0 else 0.5


@shared_kernel
def observe_cluster(
    state: State, costs: CostTables, e: int, r: int, at: int, out: NDArray[np.float32]
) -> None:
    """Write the block of replica ``r`` in environment ``e`` into ``out``, from entry ``at`` on."""
    replicas = state.replicas.shape[1]
    _observe_moves(state, costs, e, r, at + len(CLUSTER_FEATURES) - 3, out)
    pool = shares_pool(state)
    waiting_here, running_here, tokens_here, blocks_here, free_here = 0.0, 0.0, 0.0, 0.0, 0.0
    waiting, running, tokens, blocks, free = 0.0, 0.0, 0.0, 0.0, 0.0  # of all replicas
    clients, token_s = 0.0, 0.0
    most_waiting, most_tokens, boundary_s = 0.0, 0.0, 0.0  # of the others
    empty, in_prefill = 0, 0
    for s in range(replicas):
        seen = look(state, costs, e, s)
        its_waiting, its_running = float(seen.waiting), float(seen.running)
        its_tokens = max(
            float(seen.tokens), 0.0
        )  # who has outlived its length counts less than nothing
        its_blocks = float(seen.used_blocks + seen.wanted_blocks)
        its_free = _free_share(state, s, seen.used_blocks)
        waiting += its_waiting
        running += its_running
        tokens += its_tokens
        blocks += its_blocks
        free += its_free
        clients += state.machines[s].clients
        token_s += _token_seconds(state, costs, s)
        if s == r:
            waiting_here, running_here, tokens_here = its_waiting, its_running, its_tokens
            blocks_here, free_here = its_blocks, its_free
        else:
            stage = state.replicas[e, s].stage
            most_waiting = max(most_waiting, its_waiting)
            most_tokens = max(most_tokens, its_tokens)
            empty += int(its_running == 0.0 and (pool or its_waiting == 0.0))
            in_prefill += int(stage not in (IDLE, DECODE_RUN))
            boundary_s += _seconds_to_boundary(state, costs, e, s, seen.rounds)
    clients_here = float(state.machines[r].clients)
    idle_here = clients_here - running_here
    idle_elsewhere = clients - running - idle_here
    waiting_elsewhere = 0.0 if pool else waiting - waiting_here
    out[at] = 1.0 / replicas
    out[at + 1] = _against(waiting_here, waiting / replicas)
    out[at + 2] = _against(waiting_here, most_waiting)
    out[at + 3] = _against(running_here, running / replicas)
    out[at + 4] = _against(tokens_here, tokens / replicas)
    out[at + 5] = _against(tokens_here, most_tokens)
    out[at + 6] = _against(free_here, free / replicas)
    out[at + 7] = _against(blocks_here, blocks / replicas)
    out[at + 8] = _against(clients_here, clients / replicas)
    out[at + 9] = _against(token_s / replicas, _token_seconds(state, costs, r))
    if replicas == 1:  # nobody to be compared with
        out[at + 2] = 0.5
        out[at + 5] = 0.5
        out[at + 10 : at + len(CLUSTER_FEATURES) - 3] = 0.0
        return
    others = replicas - 1
    own = state.replicas[e, r]
    round_s = decode_seconds(costs, r, own.active, own.cached_tokens, 1)
    out[at + 10] = empty / others
    out[at + 11] = in_prefill / others
    out[at + 12] = idle_elsewhere / (clients - clients_here)
    out[at + 13] = waiting_elsewhere / waiting if waiting > 0 else 0.0
    out[at + 14] = log_scaled(waiting_elsewhere / (clients - clients_here), QUEUE_DOUBLINGS)
    out[at + 15] = balance(waiting_elsewhere, idle_here)
    out[at + 16] = balance(boundary_s / others, round_s)


@kernel
def _observe_moves(
    state: State, costs: CostTables, e: int, r: int, at: int, out: NDArray[np.float32]
) -> None:
    """Write the three entries about moves, 0 where no request ever moves."""
    out[at : at + 3] = 0.0
    if not state.cluster.moves:
        return
    replica, clients = state.replicas[e, r], state.machines[r].clients
    if state.cluster.steals_waiting or state.cluster.steals_running:
        out[at] = max(room_for(state, e, r), 0) / clients
    out[at + 1] = min((replica.coming + replica.incoming) / clients, 1.0)
    active, cached = 0, 0
    for s in range(state.replicas.shape[1]):
        active += state.replicas[e, s].active
        cached += state.replicas[e, s].cached_tokens
    if active > 0:
        tokens = cached // active
        again_s = prefill_seconds(costs, r, tokens, float(tokens) * tokens, 1)
        out[at + 2] = balance(copy_seconds(state, tokens), again_s)


@kernel
def _free_share(state: State, s: int, used_blocks: int) -> float:
    """Return the share of a replica's blocks that nobody holds; 1 where memory is not limited."""
    blocks = state.machines[s].blocks
    return 1.0 if blocks == UNLIMITED_BLOCKS else (blocks - used_blocks) / blocks


@kernel
def _token_seconds(state: State, costs: CostTables, s: int) -> float:
    """Return the seconds that replica ``s`` takes for a token, all of its clients busy, none cached."""
    clients = state.machines[s].clients
    return costs.decode_base_s[s, clients] / clients


@kernel
def _seconds_to_boundary(state: State, costs: CostTables, e: int, s: int, rounds: int) -> float:
    """Return the seconds until the present stage of replica ``s`` ends, 0 where there is none.

    Of a run of decode rounds the first ``rounds`` count, the last of which is under way.
    """
    replica, now_s = state.replicas[e, s], state.episodes[e].now_s
    if replica.stage == IDLE:
        return 0.0
    end_s = state.event_s[e, s]
    if replica.stage == DECODE_RUN:
        run_s = decode_seconds(costs, s, replica.active, replica.cached_tokens, rounds)
        end_s = replica.clock_s + run_s
    return max(end_s - now_s, 0.0)
