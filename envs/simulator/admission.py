"""Admission rules: which waiting requests a prefill stage gives to the idle clients.

One loop serves every rule: idle clients in index order, each asks the rule for its next request,
until one does not fit into the stage's token budget (a later one that would is not looked for).
Equal lengths: longest first takes the lower id, shortest first the higher, stealing the earlier in
the victim's queue.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from servegym.envs.jit import kernel, move_records, shared_kernel
from servegym.envs.simulator.aligned import forget_targets, longest_aligned
from servegym.envs.simulator.busiest import CLIENT_MASK, REPLICA_BITS, begin_thefts, busiest
from servegym.envs.simulator.memory import (
    all_fit,
    blocks_of_round,
    chunk_fits,
    fits,
    free_blocks,
    none_fits,
)
from servegym.envs.simulator.moving import fetch
from servegym.envs.simulator.queues import (
    blocks_of,
    first_waiting,
    head,
    longest_waiting,
    queue_of,
    rounds_ahead,
    shortest_waiting,
    tokens_to_prefill,
)
from servegym.envs.simulator.ranking import first_in_order
from servegym.envs.simulator.scored import best_scored, rank_by_score
from servegym.envs.simulator.stages import compute, pick, sort_idle
from servegym.envs.simulator.state import NOBODY, UNLIMITED_BLOCKS, WAITING, State
from servegym.envs.vocabulary import (
    ALIGNED,
    BY_BATCH,
    BY_LENGTH,
    FCFS,
    GUARD_SGLANG,
    LONGEST,
    PLAN,
    SCORED,
    SHORTEST,
    STEAL,
)

_ANY_TOKENS: Final = 1 << 60


@kernel
def _takes_more(state: State, e: int, r: int) -> bool:
    """Return whether somebody waits and a client may be given away."""
    replica = state.replicas[e, r]
    if state.queues[e, queue_of(state, r)].waiting == 0:
        return False
    return state.machines[r].clients - replica.idle < replica.most_running


@kernel
def admits(state: State, e: int, r: int, rule: int) -> bool:
    """Return whether a prefill stage under ``rule`` would admit at least one request now."""
    replica = state.replicas[e, r]
    if state.cluster.guard == GUARD_SGLANG:
        return _piece_fits(state, e, r, rule)
    if replica.partial != NOBODY or not _takes_more(state, e, r):
        return False  # a half-computed prompt goes on in mixed stages
    if state.machines[r].blocks != UNLIMITED_BLOCKS:
        return _first_fits(state, e, r, rule, 0)
    return _gives(state, e, r, rule)


@kernel
def _gives(state: State, e: int, r: int, rule: int) -> bool:
    """Return whether ``rule`` has a waiting request for one of the idle clients."""
    if rule != PLAN:
        return True
    for client in state.idle[e, r, : state.replicas[e, r].idle]:
        if state.clients[e, r, client].queue_requests > 0:
            return True
    return False


@shared_kernel
def _first_fits(state: State, e: int, r: int, rule: int, taken: int) -> bool:
    """Return whether the first request that ``rule`` gives to an idle client fits into memory."""
    makes_batches = rule == SHORTEST and state.cluster.shortest_by == BY_BATCH
    if not makes_batches:  # of batches a look makes the next
        if all_fit(state, e, r, taken):
            return _gives(state, e, r, rule)
        if none_fits(state, e, r, taken):
            return False
    i = _first_given(state, e, r, rule)
    running = state.machines[r].clients - state.replicas[e, r].idle
    return i != NOBODY and fits(state, e, r, i, taken, running)


@shared_kernel
def _first_given(state: State, e: int, r: int, rule: int) -> int:
    """Return the first request that ``rule`` gives to an idle client, or NOBODY; somebody must wait."""
    if rule in (PLAN, STEAL):  # of the others every client gets the same
        sort_idle(state, e, r)
    _forget_choices(state, e, r, rule)
    for client in state.idle[e, r, : state.replicas[e, r].idle]:
        i = _candidate(state, e, r, rule, client)
        if i != NOBODY:
            return i
    return NOBODY


@shared_kernel
def _piece_fits(state: State, e: int, r: int, rule: int) -> bool:
    """Return whether ``admit_pieces`` would compute something now."""
    replica = state.replicas[e, r]
    i = replica.partial
    others = state.machines[r].clients - replica.idle
    if i != NOBODY:
        others -= 1
    elif _takes_more(state, e, r):
        i = _first_given(state, e, r, rule)
    if i == NOBODY:
        return False
    return chunk_fits(state, e, r, i, _piece(state, e, i, _budget(state), True), others)


@kernel
def _budget(state: State) -> int:
    tokens = state.cluster.chunk_tokens
    return tokens if tokens > 0 else _ANY_TOKENS


@kernel
def _piece(state: State, e: int, i: int, left: int, first: bool) -> int:
    """Return the tokens of a prefill to compute where ``left`` of the budget are left: whole blocks.

    All of a budget below one block where the stage has nothing else.
    """
    rest = tokens_to_prefill(state, e, i) - state.requests[e, i].computed
    if rest <= left:
        return rest
    length = state.cluster.block_tokens
    whole = max(left, 0) // length * length
    return left if first and whole == 0 else whole


@kernel
def mixes(state: State, e: int, r: int, rule: int) -> bool:
    """Return whether a mixed stage under ``rule`` would compute a part of some prompt now.

    Where its own decoding clients lack memory, or a half-computed prompt does, the stage preempts
    somebody; whoever is half computed then counts as served.
    """
    left = _has_budget(state, e, r)
    if state.replicas[e, r].partial != NOBODY:  # the budget of whoever is preempted is left, too
        return left or blocks_of_round(state, e, r) > free_blocks(state, e, r)
    if not (left and _takes_more(state, e, r)):
        return False
    if state.machines[r].blocks == UNLIMITED_BLOCKS:
        return _gives(state, e, r, rule)
    return _chunk_fits(state, e, r, rule)


@kernel
def _has_budget(state: State, e: int, r: int) -> bool:
    """Return whether a mixed stage has tokens left for prompts."""
    return state.cluster.chunk_tokens > state.replicas[e, r].active


@shared_kernel
def _chunk_fits(state: State, e: int, r: int, rule: int) -> bool:
    round_blocks = blocks_of_round(state, e, r)
    if round_blocks > free_blocks(state, e, r):
        return False
    return _first_fits(state, e, r, rule, round_blocks)


@kernel
def first_within_limits(state: State, e: int, r: int, rule: int, mixed: bool) -> int:
    """Return whom a stage under ``rule`` takes first if the limits of an action let it, or NOBODY.

    For replicas with a limit of memory and without a half-computed prompt, and not under SGLang's guard.
    """
    if not _takes_more(state, e, r) or (mixed and not _has_budget(state, e, r)):
        return NOBODY
    return _first_given(state, e, r, rule)


@kernel
def _begin_choosing(state: State, e: int, r: int, rule: int) -> None:
    """Bring the idle clients into order; forget what the rule has noted for the stage before."""
    sort_idle(state, e, r)
    _forget_choices(state, e, r, rule)


@kernel
def _forget_choices(state: State, e: int, r: int, rule: int) -> None:
    """Forget what a rule has noted for the stage before."""
    if rule == ALIGNED:
        forget_targets(state, e)
    elif rule == STEAL:
        begin_thefts(state, e)
    elif rule == SCORED:
        rank_by_score(state, e, r)


@kernel
def admit(state: State, e: int, r: int, rule: int, max_prefill_tokens: int) -> None:
    """Give waiting requests to idle clients under ``rule``, whole prompts each.

    ``max_prefill_tokens`` bounds the stage's tokens (0: no bound) but never refuses the first. The stage
    admits no more behind a request that does not fit, into the bound or into memory.
    """
    _begin_choosing(state, e, r, rule)
    replica, q = state.replicas[e, r], queue_of(state, r)
    clients = replica.idle
    idle = state.idle[e, r, :clients]
    left_idle, seen = 0, 0
    room = replica.most_running - (state.machines[r].clients - clients)
    counts_memory = state.cluster.counts_memory
    tokens, squares, admitted = 0, 0.0, 0
    while seen < clients and room > 0 and state.queues[e, q].waiting > 0:
        client = idle[seen]
        i = _candidate(state, e, r, rule, client)
        if i == NOBODY:
            idle[left_idle] = client
            left_idle += 1
            seen += 1
            continue
        stored = counts_memory and state.requests[e, i].stored != NOBODY
        needed = tokens_to_prefill(state, e, i)
        if admitted > 0 and 0 < max_prefill_tokens < tokens + needed and not stored:
            break
        running = state.machines[r].clients - replica.idle
        if counts_memory and not fits(state, e, r, i, 0, running):
            break
        seen += 1
        room -= 1
        if stored:
            replica.idle -= 1
            fetch(state, e, r, client, i)
            continue
        pick(state, e, r, client, i)
        admitted += 1
        tokens += needed
        squares += float(needed) * needed
        if counts_memory:
            replica.idle -= 1
            compute(state, e, r, i, needed)
        else:
            state.picked[e, r, admitted - 1] = i
    move_records(state.idle[e, r], left_idle, seen, clients - seen)
    replica.idle = left_idle + clients - seen
    replica.emitting = admitted
    replica.stage_chunks = admitted
    replica.stage_tokens = tokens
    replica.stage_squares = squares


@kernel
def admit_chunks(state: State, e: int, r: int, rule: int) -> None:
    """Give waiting requests to idle clients under ``rule`` within a mixed stage.

    The last one's prompt is cut to what is left of the token budget; its whole prompt must fit into
    memory all the same.
    """
    replica = state.replicas[e, r]
    left = state.cluster.chunk_tokens - replica.active - replica.stage_tokens
    _admit_parts(state, e, r, rule, left, _ANY_TOKENS, False)


@shared_kernel
def admit_pieces(state: State, e: int, r: int, rule: int, max_prefill_tokens: int) -> None:
    """Let a prefill stage compute prompts as SGLang does, under the guard ``sglang``.

    The half-computed prompt goes on, then idle clients get waiting requests under ``rule``. The one that
    exceeds ``chunk_tokens`` is cut and ends the stage; it goes on in the next one. ``max_prefill_tokens``
    bounds the stage, too, but cuts nobody. Both count whole blocks.
    """
    replica = state.replicas[e, r]
    left = _budget(state)
    limit = max_prefill_tokens if max_prefill_tokens > 0 else _ANY_TOKENS
    replica.continued_from = 0
    i = replica.partial
    if i != NOBODY:
        done = np.int64(state.requests[e, i].computed)
        tokens = _piece(state, e, i, left, True)
        blocks = blocks_of(state, done + tokens) - blocks_of(state, done)
        left -= blocks * state.cluster.block_tokens
        limit -= blocks * state.cluster.block_tokens
        replica.continued_from = done
        compute(state, e, r, i, tokens)
    _admit_parts(state, e, r, rule, left, limit, True)


@shared_kernel
def _admit_parts(
    state: State, e: int, r: int, rule: int, left: int, limit: int, pieces: bool
) -> None:
    """Give waiting requests to idle clients until one is cut or does not fit.

    ``left`` and ``limit``: what is left of the token budgets that cut prompts and do not cut them.
    ``pieces``: by the rules of ``admit_pieces``, not those of ``admit_chunks``.
    """
    replica, q = state.replicas[e, r], queue_of(state, r)
    if replica.partial != NOBODY or replica.idle == 0:
        return
    held = replica.emitting  # a half-computed prompt that this stage completes; sorting moves it
    first = state.picked[e, r, 0]
    _begin_choosing(state, e, r, rule)
    if held > 0:
        state.picked[e, r, 0] = first
    clients = replica.idle
    idle = state.idle[e, r, :clients]
    left_idle, seen = 0, 0
    round_blocks = blocks_of_round(state, e, r)
    while seen < clients and left > 0 and replica.partial == NOBODY:
        running = state.machines[r].clients - replica.idle
        if running >= replica.most_running or state.queues[e, q].waiting == 0:
            break
        client = idle[seen]
        i = _candidate(state, e, r, rule, client)
        if i == NOBODY:
            idle[left_idle] = client
            left_idle += 1
            seen += 1
            continue
        if pieces:
            tokens = _piece(state, e, i, left, replica.stage_chunks == 0)
            needed = blocks_of(state, tokens) * state.cluster.block_tokens
            if tokens == 0 or (replica.stage_chunks > 0 and needed > limit):
                break
            if not chunk_fits(state, e, r, i, tokens, running):
                break
        else:
            tokens = min(tokens_to_prefill(state, e, i), left)
            needed = tokens
            if not fits(state, e, r, i, round_blocks, running):
                break
        seen += 1
        replica.idle -= 1
        if state.requests[e, i].stored != NOBODY:
            fetch(state, e, r, client, i)
            continue
        left -= needed
        limit -= needed
        pick(state, e, r, client, i)
        compute(state, e, r, i, tokens)
    move_records(state.idle[e, r], left_idle, seen, clients - seen)


@kernel
def _candidate(state: State, e: int, r: int, rule: int, client: int) -> int:
    """Return the request that ``rule`` gives to an idle client; some request must be waiting."""
    q = queue_of(state, r)
    if rule == PLAN:
        return head(state, e, r, client)
    if rule == STEAL:
        own = head(state, e, r, client)
        return own if own != NOBODY else _stolen(state, e, r)
    if rule == LONGEST:
        return longest_waiting(state, e, q)
    if rule == SHORTEST:
        if state.cluster.patience_s < np.inf and (
            patient_until(state, e, q) <= state.episodes[e].now_s
        ):
            return first_waiting(state, e, q)
        if state.cluster.shortest_by != BY_LENGTH:
            return first_in_order(state, e, r)
        return shortest_waiting(state, e, q)
    if rule == FCFS:
        return first_waiting(state, e, q)
    if rule == SCORED:
        return best_scored(state, e, r)
    return longest_aligned(state, e, r)


@kernel
def patient_until(state: State, e: int, q: int) -> float:
    """Return when the first in the order of service will have come so long ago that nobody goes before it."""
    return state.times[e, first_waiting(state, e, q)].arrival_s + state.cluster.patience_s


@kernel
def _stolen(state: State, e: int, r: int) -> int:
    """Return the longest request in the queue of the client with most work (paper, Algorithm 1)."""
    victim = busiest(state, e, r)
    best = head(state, e, victim >> REPLICA_BITS, victim & CLIENT_MASK)
    most = rounds_ahead(state, e, best)
    i = state.requests[e, best].plan_next
    while i != NOBODY:
        rounds = rounds_ahead(state, e, i)
        if rounds > most and state.requests[e, i].phase == WAITING:
            best, most = i, rounds
        i = state.requests[e, i].plan_next
    return best
