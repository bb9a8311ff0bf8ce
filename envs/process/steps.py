"""The Markov decision process over the simulator: apply an action, run to the next choice.

One implementation for one environment and for many: every function works on row ``e``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import prange
from numpy.typing import NDArray

from servegym.envs.bundle import Bundle
from servegym.envs.jit import kernel, parallel_kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.process.actions import Settings, apply, legal_actions
from servegym.envs.process.blocks import observe
from servegym.envs.process.fetching import fetch_observed, fetch_rows
from servegym.envs.process.reward import loss
from servegym.envs.simulator.events import advance, sleep
from servegym.envs.simulator.state import NOBODY, State
from servegym.envs.simulator.view import deciding


@shared_kernel
def run_to_choice(
    state: State, costs: CostTables, settings: Settings, e: int, mask: NDArray[np.bool_]
) -> bool:
    """Run to the next decision point with a choice and write its mask; False at the end."""
    while True:
        r = advance(state, costs, e)
        if r == NOBODY:
            legal_actions(state, costs, settings, e, 0, mask)
            return False
        if has_choice(state, costs, settings, e, r, mask):
            return True


@kernel
def has_choice(
    state: State, costs: CostTables, settings: Settings, e: int, r: int, mask: NDArray[np.bool_]
) -> bool:
    """Return whether replica ``r``, which is to decide, has several legal actions; write the mask.

    Else carry out the only one; without any let it sleep.
    """
    legal = legal_actions(state, costs, settings, e, r, mask)
    if legal == 1:
        apply(state, costs, settings, e, r, int(np.argmax(mask)))
    elif legal == 0:
        sleep(state, e, r)
    return legal > 1


@shared_kernel
def run(
    state: State,
    costs: CostTables,
    settings: Settings,
    e: int,
    action: int,
    mask: NDArray[np.bool_],
) -> tuple[float, bool, bool]:
    """Carry out a legal action, run to the next choice; return reward, terminated, truncated.

    ``mask`` holds the legal actions, on entry and at the end.
    """
    episode = state.episodes[e]
    alive = False
    if episode.finished + episode.rejected < episode.requests:  # else it had no choice at all
        episode.decisions += 1
        apply(state, costs, settings, e, deciding(state, e), action)
        alive = run_to_choice(state, costs, settings, e, mask)
    late = 0 < settings.max_seconds < episode.now_s
    many = 0 < settings.max_decisions <= episode.decisions
    now_lost = loss(state, e, settings.reward)
    reward = episode.reported_loss - now_lost
    episode.reported_loss = now_lost
    return reward, not alive, alive and (late or many)


@dataclass(frozen=True, eq=False)
class Rows(Bundle):
    """What a step writes for each of E environments."""

    observations: NDArray[np.float32]  # (E, features)
    masks: NDArray[np.bool_]  # (E, actions); on entry of a step the legal actions
    rewards: NDArray[np.float64]  # (E,)
    terminated: NDArray[np.bool_]  # (E,)
    truncated: NDArray[np.bool_]  # (E,)
    illegal: NDArray[np.bool_]  # (E,) the action was replaced by the first legal one


def make_rows(environments: int, actions: int, features: int) -> Rows:
    """Allocate what steps of ``environments`` environments write."""
    return Rows(
        np.zeros((environments, features), np.float32),
        np.zeros((environments, actions), np.bool_),
        np.zeros(environments),
        *(np.zeros(environments, np.bool_) for _ in range(3)),
    )


@shared_kernel
def begin_row(state: State, costs: CostTables, settings: Settings, rows: Rows, e: int) -> None:
    """Start the episode loaded into environment ``e``; write its first observation and mask."""
    run_to_choice(state, costs, settings, e, rows.masks[e])
    _observe_row(state, costs, settings, rows, e)


@kernel
def _observe_row(state: State, costs: CostTables, settings: Settings, rows: Rows, e: int) -> None:
    observe(state, costs, settings, e, deciding(state, e), rows.observations[e])


@kernel
def _run_row(
    state: State, costs: CostTables, settings: Settings, rows: Rows, e: int, action: int
) -> None:
    """Step environment ``e``, all but the observation; see ``step_row``."""
    rows.illegal[e] = not rows.masks[e, action]
    if rows.illegal[e]:
        action = int(np.argmax(rows.masks[e]))
    rows.rewards[e], rows.terminated[e], rows.truncated[e] = run(
        state, costs, settings, e, action, rows.masks[e]
    )


@kernel
def step_row(
    state: State, costs: CostTables, settings: Settings, rows: Rows, e: int, action: int
) -> None:
    """Step environment ``e``; an illegal action is replaced by the first legal one."""
    _run_row(state, costs, settings, rows, e, action)
    _observe_row(state, costs, settings, rows, e)


@kernel
def step_rows(
    state: State, costs: CostTables, settings: Settings, rows: Rows, actions: NDArray[np.int64]
) -> None:
    """Step every environment once.

    A row is observed when the next one has run: what its observation reads is known only when it has run
    itself, and has to be fetched from memory.
    """
    for e in range(actions.size + 1):
        if e < actions.size:
            fetch_rows(state, e, actions.size)
            _run_row(state, costs, settings, rows, e, actions[e])
            fetch_observed(state, e)
        if e > 0:
            _observe_row(state, costs, settings, rows, e - 1)


@parallel_kernel
def step_rows_in_parallel(
    state: State, costs: CostTables, settings: Settings, rows: Rows, actions: NDArray[np.int64]
) -> None:
    """Step every environment once, on numba's threads; the same results, as rows are independent."""
    for e in prange(actions.size):
        row = np.int64(e)  # prange counts in uint64, for which all kernels would be compiled again
        step_row(state, costs, settings, rows, row, actions[row])
