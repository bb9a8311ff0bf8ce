"""The actions of a decision point: which are legal, and what each of them does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.bundle import Bundle
from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.admission import admits, mixes
from servegym.envs.simulator.events import DECODE, decode, mix, prefill, sleep, steal
from servegym.envs.simulator.queues import shares_pool
from servegym.envs.simulator.state import IDLE, NOBODY, UNLIMITED_BLOCKS, State
from servegym.envs.simulator.stealing import fullest_queue, stealable
from servegym.envs.vocabulary import STEAL_WAITING

ILLEGAL: Final = 0
LEGAL: Final = 1
UNKNOWN: Final = 2


@dataclass(frozen=True, eq=False)
class Settings(Bundle):
    """The task's choices that kernels read."""

    rules: NDArray[np.int64]  # (P,) admission rule of action 1 + k: a prefill stage
    mixed_rules: NDArray[np.int64]  # (M,) admission rule of action 1 + P + k: a mixed stage
    caps: NDArray[
        np.float64
    ]  # (P + M,) share of its clients that a replica may use after the action
    reserves: NDArray[np.float64]  # (P + M,) share of its memory that the action leaves free
    limits: bool  # whether any of these limits anything
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
    for k in range(settings.rules.size):
        known = UNKNOWN
        if settings.limits:
            known = _follows(settings, settings.rules, 0, k, mask)
        if known != UNKNOWN:
            mask[1 + k] = known == LEGAL
        else:
            if settings.limits:
                _limit(state, settings, e, r, k)
            mask[1 + k] = admits(state, e, r, settings.rules[k])
        count += int(mask[1 + k])
    first = 1 + settings.rules.size
    for k in range(settings.mixed_rules.size):
        known = UNKNOWN
        if settings.limits:
            known = _follows(settings, settings.mixed_rules, first - 1, k, mask)
        if known != UNKNOWN:
            mask[first + k] = known == LEGAL
        else:
            if settings.limits:
                _limit(state, settings, e, r, first - 1 + k)
            mask[first + k] = mixes(state, e, r, settings.mixed_rules[k])
        count += int(mask[first + k])
    if settings.limits:
        _free_of_limits(state, e, r)
    if settings.steals.size > 0:
        count += _legal_steals(state, costs, settings, e, r, count, mask)
    return count


@kernel
def _follows(
    settings: Settings, rules: NDArray[np.int64], first: int, k: int, mask: NDArray[np.bool_]
) -> int:
    """Return what the same rule's actions before say of the k-th: wider limits admit no less."""
    cap, reserve = settings.caps[first + k], settings.reserves[first + k]
    for j in range(k - 1, -1, -1):
        if rules[j] != rules[k]:
            break
        other, others_reserve = settings.caps[first + j], settings.reserves[first + j]
        if mask[1 + first + j]:
            if other <= cap and others_reserve >= reserve:
                return LEGAL
        elif other >= cap and others_reserve <= reserve:
            return ILLEGAL
    return UNKNOWN


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


@shared_kernel
def _limit(state: State, settings: Settings, e: int, r: int, k: int) -> None:
    """Let admission at replica ``r`` use as many clients and as much memory as action 1 + k says."""
    replica, machine = state.replicas[e, r], state.machines[r]
    replica.most_running = int(np.ceil(settings.caps[k] * machine.clients))
    replica.reserve_blocks = machine.watermark_blocks
    if machine.blocks != UNLIMITED_BLOCKS:
        reserve = int(settings.reserves[k] * machine.blocks)
        replica.reserve_blocks = max(replica.reserve_blocks, reserve)


@kernel
def _free_of_limits(state: State, e: int, r: int) -> None:
    state.replicas[e, r].most_running = state.machines[r].clients
    state.replicas[e, r].reserve_blocks = state.machines[r].watermark_blocks


@shared_kernel
def apply(state: State, costs: CostTables, settings: Settings, e: int, r: int, action: int) -> None:
    """Begin what a legal action says at replica ``r``."""
    if settings.limits and 0 < action <= settings.caps.size:
        _limit(state, settings, e, r, action - 1)
    prefills = settings.rules.size
    mixes_too = prefills + settings.mixed_rules.size
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
    if settings.limits:
        _free_of_limits(state, e, r)
