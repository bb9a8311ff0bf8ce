"""Schedules of a batch on one replica: which requests each prefill stage admits, and when."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError
from servegym.envs.jit import kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.loading import load
from servegym.envs.simulator.stages import (
    pick,
    receive_arrivals,
    rounds_to_next_finish,
    run_decode,
    run_prefill,
    sort_idle,
)
from servegym.envs.simulator.state import State, make_state
from servegym.envs.workload.requests import Requests


class Stage(NamedTuple):
    """A prefill stage: the decode clock at which it runs and the requests that it admits."""

    clock: int  # decode rounds run before it
    requests: tuple[int, ...]  # ids


Schedule = tuple[Stage, ...]
"""Every prefill stage of an episode, in order."""


def replay(
    requests: Requests,
    clients: int,
    costs: CostTables,
    schedule: Schedule,
    max_prefill_tokens: int = 0,
) -> float:
    """Return the makespan of a schedule, carried out by the simulator's kernels.

    Raises
    ------
    ServegymError
        If a stage cannot happen when it should (its clock is past, or nobody is left to decode until
        then), admits nobody, more than are idle, a request a second time or, where it admits several,
        more prompt tokens than ``max_prefill_tokens`` (0: no limit), or if a request is left out.

    Examples
    --------
    >>> from servegym.envs import TASKS, lower, make_requests
    >>> clients, costs, _ = lower(TASKS["servegym/Tiny-v0"])
    >>> requests = make_requests([5, 5], [9, 4])  # prompt tokens, output tokens
    >>> together = replay(requests, clients, costs, (Stage(0, (0, 1)),))
    >>> together < replay(requests, clients, costs, (Stage(0, (0,)), Stage(8, (1,))))
    True
    """
    state = make_state(1, len(requests), clients)
    load(state, 0, requests, None)
    receive_arrivals(state, 0, 0)
    replica = state.replicas[0, 0]
    waiting = np.ones(len(requests), np.bool_)
    for place, stage in enumerate(schedule):
        ids = np.asarray(stage.requests, np.int64)
        where = f"stage {place} at decode clock {stage.clock}"
        known = np.unique(ids[(ids >= 0) & (ids < len(requests))])
        if len(ids) == 0 or len(known) < len(ids) or not waiting[known].all():
            raise ServegymError(
                f"{where} must admit requests that wait, each once, and at least one"
            )
        waiting[known] = False
        if not _decode_until(state, costs, stage.clock):
            raise ServegymError(
                f"{where} cannot happen: decoding stands at {int(replica.rounds)} with "
                f"{int(replica.active)} active clients"
            )
        idle = clients - int(replica.active)
        if len(ids) > idle:
            raise ServegymError(f"{where} admits {len(ids)} requests, but {idle} clients are idle")
        tokens = int(requests.prompt_tokens[ids].sum())
        if len(ids) > 1 and 0 < max_prefill_tokens < tokens:
            raise ServegymError(
                f"{where} admits {tokens} prompt tokens, over the token budget {max_prefill_tokens}"
            )
        _admit_these(state, costs, ids)
    if waiting.any():
        first = int(np.argmax(waiting))
        raise ServegymError(f"no stage admits request {first}, and {waiting.sum() - 1} others")
    _decode_until(state, costs, np.iinfo(np.int64).max)
    return float(replica.clock_s)


@kernel
def _decode_until(state: State, costs: CostTables, clock: int) -> bool:
    """Decode until the decode clock shows ``clock`` or nobody is active; return whether it does."""
    replica = state.replicas[0, 0]
    while replica.active > 0 and replica.rounds < clock:
        rounds = min(rounds_to_next_finish(state, 0, 0), clock - replica.rounds)
        run_decode(state, costs, 0, 0, rounds)
    return replica.rounds == clock


@kernel
def _admit_these(state: State, costs: CostTables, ids: NDArray[np.int64]) -> None:
    """Run a stage that gives the first idle clients these waiting requests."""
    sort_idle(state, 0, 0)
    idle = state.idle[0, 0]
    for k in range(ids.size):
        pick(state, 0, 0, idle[k], ids[k])
        state.picked[0, k] = ids[k]
    for k in range(ids.size, state.clients.shape[2] - state.replicas[0, 0].active):
        idle[k - ids.size] = idle[k]
    run_prefill(state, costs, 0, 0, ids.size)
