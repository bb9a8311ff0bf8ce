"""The actions of a decision point: which are legal, and what each of them does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servegym.envs.bundle import Bundle
from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.admission import (
    admits,
    first_within_limits,
    mixes,
)
from servegym.envs.simulator.events import DECODE, decode, mix, prefill, sleep, steal
from servegym.envs.simulator.memory import (
    blocks_of_round,
    blocks_to_admit,
    free_blocks,
    guard_allows,
    none_fits,
)
from servegym.envs.simulator.queues import queue_of, shares_pool
from servegym.envs.simulator.scored import PAD_WEIGHT
from servegym.envs.simulator.state import IDLE, NOBODY, UNLIMITED_BLOCKS, State
from servegym.envs.simulator.stealing import fullest_queue, stealable
from servegym.envs.vocabulary import BY_BATCH, GUARD_SGLANG, STEAL_WAITING


@dataclass(frozen=True, eq=False)
class Settings(Bundle):
    """The task's choices that kernels read."""

    rules: NDArray[np.int64]  # (P,) admission rule of action 1 + k: a prefill stage
    mixed_rules: NDArray[np.int64]  # (M,) admission rule of action 1 + P + k: a mixed stage
    # (P + M,) where the next rule or kind of stage begins behind action 1 + k
    rule_ends: NDArray[np.int64]
    most_running: NDArray[np.int64]  # (R, P + M) requests that may hold a client after the action
    reserve_blocks: NDArray[np.int64]  # (R, P + M) free blocks that it leaves while others run
    limits: bool  # whether any of these limits more than the machine does
    pads: NDArray[np.float64]  # (P + M,) weight of the rule ``scored``; NaN: as it is
    steals: NDArray[np.int64]  # (S,) of action 1 + P + M + k: place in STEALS
    every_round: bool  # ask at every decode round, not only where the choice has changed
    max_prefill_tokens: int  # prompt tokens of one prefill stage, 0: no limit
    observes: int  # bit k: the k-th of OBSERVATION_BLOCKS
    reward: int
    max_decisions: int  # truncate after so many, 0: never
    max_seconds: float  # truncate once the clock has passed it, 0: never


@shared_kernel
def legal_actions(
    state: State, costs: CostTables, settings: Settings, e: int, r: int, mask: NDArray[np.bool_]
) -> int:
    """Write which actions are legal; return how many. After the end, decode counts as legal.

    Where nobody decodes, decode means to wait. It is legal where nothing can be admitted, but something can
    be stolen; where the replica keeps memory for requests that come or have left, as who is first under one
    rule may fit, under another not; and where replicas share a pool and another one is busy.
    """
    episode = state.episodes[e]
    ended = episode.finished + episode.rejected == episode.requests
    mask[DECODE] = ended or state.replicas[e, r].active > 0
    if not mask[DECODE] and state.replicas.shape[1] > 1:
        mask[DECODE] = _may_wait(state, e, r)
    count = int(mask[DECODE])
    first = 1 + settings.rules.size
    if settings.limits:
        count += _legal_within_limits(state, settings, e, r, mask)
    else:
        for k in range(settings.rules.size):
            mask[1 + k] = admits(state, e, r, settings.rules[k])
            count += int(mask[1 + k])
        for k in range(settings.mixed_rules.size):
            mask[first + k] = mixes(state, e, r, settings.mixed_rules[k])
            count += int(mask[first + k])
    if settings.steals.size > 0:
        count += _legal_steals(state, costs, settings, e, r, count, mask)
    return count


@shared_kernel
def _legal_within_limits(
    state: State, settings: Settings, e: int, r: int, mask: NDArray[np.bool_]
) -> int:
    """Write which prefills and mixed stages are legal, each within its limits; return how many.

    Whom a rule takes first, and what that takes, is looked up once for all limits.
    """
    replica, prefills = state.replicas[e, r], settings.rules.size
    looks_up = state.machines[r].blocks != UNLIMITED_BLOCKS and replica.partial == NOBODY
    looks_up = looks_up and state.cluster.guard != GUARD_SGLANG
    running, free = state.machines[r].clients - replica.idle, free_blocks(state, e, r)
    most_running, reserves = settings.most_running[r], settings.reserve_blocks[r]
    count, k, actions = 0, 0, most_running.size
    # Of batches a look makes the next.
    if looks_up and state.cluster.shortest_by != BY_BATCH and _keeps_all_out(state, e, r):
        mask[1 : 1 + actions] = False
        return 0
    while k < actions:
        mixed = k >= prefills
        rule = _rule_of(settings, k)
        if not looks_up:
            _limit(state, settings, e, r, k)
            mask[1 + k] = mixes(state, e, r, rule) if mixed else admits(state, e, r, rule)
            count += int(mask[1 + k])
            k += 1
            continue
        i = first_within_limits(state, e, r, rule, mixed)
        left = -1  # blocks that are left for a reserve; −1: the request may not be taken at all
        taken = blocks_of_round(state, e, r) if mixed else 0
        if i != NOBODY and taken <= free:
            blocks = blocks_to_admit(state, e, r, i, taken)
            if blocks <= free and guard_allows(state, e, r, i, blocks, running):
                left = free - blocks
                if running == 0:  # reserves do not bind
                    left = UNLIMITED_BLOCKS
        end = settings.rule_ends[k]
        for j in range(k, end):
            legal = (reserves[j] <= left) & (running < most_running[j])
            mask[1 + j] = legal
            count += int(legal)
        k = end
    if not looks_up:
        _free_of_limits(state, e, r)
    return count


@kernel
def _keeps_all_out(state: State, e: int, r: int) -> bool:
    """Return whether nobody waits, or memory is known to be too full for all who do."""
    return state.queues[e, queue_of(state, r)].waiting == 0 or none_fits(state, e, r, 0)


@kernel
def _rule_of(settings: Settings, k: int) -> int:
    """Return the admission rule of action 1 + k."""
    prefills = settings.rules.size
    return settings.mixed_rules[k - prefills] if k >= prefills else settings.rules[k]


@shared_kernel
def _may_wait(state: State, e: int, r: int) -> bool:
    """Return whether a replica where nobody decodes may leave what it could admit to a later decision."""
    replica = state.replicas[e, r]
    if replica.partial != NOBODY:
        return False
    if state.cluster.moves and replica.used_blocks > 0:
        return True
    if shares_pool(state):
        for other in range(state.replicas.shape[1]):
            if state.replicas[e, other].stage != IDLE:
                return True
    return False


@shared_kernel
def _legal_steals(
    state: State,
    costs: CostTables,
    settings: Settings,
    e: int,
    r: int,
    others: int,
    mask: NDArray[np.bool_],
) -> int:
    """Write which steals are legal, and that waiting is if ``others`` are 0; return how many are added."""
    first = 1 + settings.rules.size + settings.mixed_rules.size
    ended = state.episodes[e].finished + state.episodes[e].rejected == state.episodes[e].requests
    count = 0
    for k in range(settings.steals.size):
        legal = False
        if not ended and settings.steals[k] == STEAL_WAITING:
            legal = fullest_queue(state, e, r) != NOBODY
        elif not ended:
            legal = stealable(state, costs, e, r) != NOBODY
        mask[first + k] = legal
        count += int(legal)
    if others == 0 and count > 0:
        mask[DECODE] = True
        count += 1
    return count


@kernel
def _limit(state: State, settings: Settings, e: int, r: int, k: int) -> None:
    """Let admission at replica ``r`` use as many clients and as much memory as action 1 + k says."""
    state.replicas[e, r].most_running = settings.most_running[r, k]
    state.replicas[e, r].reserve_blocks = settings.reserve_blocks[r, k]


@kernel
def _free_of_limits(state: State, e: int, r: int) -> None:
    state.replicas[e, r].most_running = state.machines[r].clients
    state.replicas[e, r].reserve_blocks = state.machines[r].watermark_blocks


@shared_kernel
def apply(state: State, costs: CostTables, settings: Settings, e: int, r: int, action: int) -> None:
    """Begin what a legal action says at replica ``r``."""
    if settings.limits and 0 < action <= settings.most_running.shape[1]:
        _limit(state, settings, e, r, action - 1)
    prefills = settings.rules.size
    mixes_too = prefills + settings.mixed_rules.size
    own_pad = state.weights[e, PAD_WEIGHT]
    if 0 < action <= settings.pads.size and not np.isnan(settings.pads[action - 1]):
        state.weights[e, PAD_WEIGHT] = settings.pads[action - 1]
    if action == DECODE:
        if state.replicas[e, r].active == 0:
            sleep(state, e, r)
        else:
            decode(state, costs, e, r, settings.every_round)
    elif action <= prefills:
        prefill(state, costs, e, r, settings.rules[action - 1], settings.max_prefill_tokens)
    elif action <= mixes_too:
        mix(state, costs, e, r, settings.mixed_rules[action - 1 - prefills])
    else:
        steal(state, costs, e, r, settings.steals[action - 1 - mixes_too])
    state.weights[e, PAD_WEIGHT] = own_pad
    if settings.limits:
        _free_of_limits(state, e, r)
