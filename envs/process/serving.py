"""From one iteration of a real engine to the next: what it is to run, or that a policy must choose."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.process.actions import Settings, apply
from servegym.envs.process.steps import has_choice
from servegym.envs.simulator.events import begin_turn
from servegym.envs.simulator.serving import begin_iterations
from servegym.envs.simulator.state import IDLE, RecordArray, State

NOTHING: Final = 0
"""Nobody is there to be served."""
WORKS: Final = 1
"""A stage has begun."""
CHOOSES: Final = 2
"""Several actions are legal: a policy chooses."""


@shared_kernel
def begin_work(
    state: State,
    costs: CostTables,
    settings: Settings,
    progress: RecordArray,
    e: int,
    mask: NDArray[np.bool_],
) -> int:
    """Begin the next stage of row ``e``, which is at a boundary and has one replica, if it has no choice.

    As ``steps.run_to_choice``, which runs on through the stage. Returns NOTHING, WORKS or CHOOSES; then
    ``mask`` holds the legal actions.
    """
    replica = state.replicas[e, 0]
    state.episodes[e].turn = 0
    while replica.stage == IDLE:
        if state.event_s[e, 0] > state.episodes[e].now_s:
            return NOTHING
        if begin_turn(state, costs, e, 0) and has_choice(state, costs, settings, e, 0, mask):
            return CHOOSES
    begin_iterations(progress, e)
    return WORKS


@shared_kernel
def choose(
    state: State,
    costs: CostTables,
    settings: Settings,
    e: int,
    action: int,
) -> None:
    """Begin what a policy has chosen."""
    state.episodes[e].decisions += 1
    apply(state, costs, settings, e, 0, action)
