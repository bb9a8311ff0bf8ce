"""The end of a stage: tokens, finishes, free memory and what they reveal, booked at one boundary.

``book`` takes the seconds that the stage has taken as an argument, so they need not be the cost model's.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.jit import kernel
from servegym.envs.simulator.beliefs import expect_admitted, reveal, revise
from servegym.envs.simulator.finishes import key_of, merge
from servegym.envs.simulator.gaps import begin_decoding, end_decoding
from servegym.envs.simulator.memory import blocks_of_rounds, count_held
from servegym.envs.simulator.queues import (
    blocks_of,
    release_client,
    rounds_ahead,
    tokens_to_prefill,
)
from servegym.envs.simulator.slo import count_met, note_pace
from servegym.envs.simulator.state import DECODE_RUN, FINISHED, IDLE, MIXED, PREFILL, State
from servegym.envs.simulator.transfers import end_move_of


@kernel
def book(state: State, e: int, r: int, seconds: float) -> None:
    """Book the stage of replica ``r`` that has taken ``seconds``; the replica is then at a boundary."""
    replica = state.replicas[e, r]
    stage = replica.stage
    replica.stage = IDLE
    replica.clock_s += seconds
    if stage != PREFILL:
        _book_rounds(state, e, r, replica.run_rounds, seconds)
    if state.cluster.counts_memory:
        overrun = replica.used_blocks - state.machines[r].blocks
        replica.overrun_blocks = max(replica.overrun_blocks, overrun)
    if stage == PREFILL:
        replica.prefill_s += seconds
        replica.prefill_stages += 1
    elif stage == MIXED:
        replica.mixed_stages += 1
    if stage != DECODE_RUN:
        replica.idle_wait_s = 0.0
        _book_prefills(state, e, r)
    _finish_due(state, e, r)


@kernel
def _book_rounds(state: State, e: int, r: int, rounds: int, seconds: float) -> None:
    """Emit the tokens of decode rounds."""
    replica, clients = state.replicas[e, r], state.machines[r].clients
    active = replica.active
    if state.cluster.counts_memory:
        replica.used_blocks += blocks_of_rounds(state, e, r, rounds)
    state.episodes[e].served_rounds += active * rounds
    replica.rounds += rounds
    replica.cached_tokens += active * rounds
    replica.busy_decode_s += seconds * active / clients
    if replica.work_waits:
        replica.idle_wait_s += seconds * replica.idle


@kernel
def _book_prefills(state: State, e: int, r: int) -> None:
    """Emit a token of every request whose prefill has ended; it decodes from now on."""
    episode, replica = state.episodes[e], state.replicas[e, r]
    emitting, clock_s, rounds = replica.emitting, replica.clock_s, replica.rounds
    counts_memory = state.cluster.counts_memory
    prompts, again, cached, due_sum = 0, 0, 0, 0
    for i in state.picked[e, r, :emitting]:
        request = state.requests[e, i]
        if request.emitted == 0:
            state.times[e, i].first_token_s = clock_s
            prompts += request.prompt_tokens
        else:
            again += 1
        tokens = tokens_to_prefill(state, e, i)
        cached += tokens + 1
        expected_end = rounds + rounds_ahead(state, e, i)
        state.clients[e, r, request.client].expected_end = expected_end
        due_sum += expected_end
        if counts_memory:
            count_held(state, e, r, tokens, 1)
        if episode.counts_slo:
            note_pace(state, e, r, i)
    episode.admitted_prompt_tokens += prompts
    episode.served_rounds += again
    replica.cached_tokens += cached
    replica.due_sum += due_sum
    if episode.keeps_gaps and emitting > 0:
        begin_decoding(state, e, r, emitting)
    _schedule_finishes(state, e, r, emitting)
    if not episode.lengths_known:
        expect_admitted(state, e, r, emitting)
    replica.emitting = 0
    replica.stage_chunks = 0
    replica.stage_tokens = 0
    replica.stage_squares = 0.0
    replica.prompt_tokens = 0
    replica.prompt_squares = 0.0


@kernel
def _schedule_finishes(state: State, e: int, r: int, emitting: int) -> None:
    """Merge the requests that begin to decode into the replica's finishes."""
    replica = state.replicas[e, r]
    keys = state.keys[e, :emitting]
    for k in range(emitting):
        i = np.int64(state.picked[e, r, k])
        rounds = np.int64(state.requests[e, i].decode_rounds) - state.requests[e, i].emitted
        keys[k] = key_of(rounds, i)
    merge(state.finishes[e, r], replica.active, replica.rounds, keys)
    replica.active += emitting


@kernel
def _finish_due(state: State, e: int, r: int) -> None:
    """Finish every request whose last token the stage that just ended has emitted.

    A request that has outlived its expected finish gets a later one.
    """
    replica, finishes = state.replicas[e, r], state.finishes[e, r]
    known = state.episodes[e].lengths_known
    done = 0
    while done < replica.active and finishes[replica.active - 1 - done].due <= replica.rounds:
        done += 1
    if not known and done > 0:
        reveal(state, e, r, done)
    for _ in range(done):
        i = finishes[replica.active - 1].request
        request = state.requests[e, i]
        if request.leaving:
            end_move_of(state, e, i)
        request.phase = FINISHED
        state.times[e, i].finished_s = replica.clock_s
        if state.episodes[e].keeps_gaps:
            end_decoding(state, e, r, i)
        if state.episodes[e].counts_slo:
            count_met(state, e, i)
        tokens = np.int64(request.prompt_tokens) + request.decode_rounds
        replica.cached_tokens -= tokens + 1
        if state.cluster.counts_memory:
            replica.used_blocks -= blocks_of(state, tokens)
            count_held(state, e, r, tokens, -1)
        replica.due_sum -= state.clients[e, r, request.client].expected_end
        replica.active -= 1
        release_client(state, e, r, request.client)
        state.episodes[e].finished += 1
        state.episodes[e].in_system -= 1
    if not known:
        revise(state, e, r)
