"""A schedule of prefill stages, and its makespan by the simulator's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.arguments import whole_number, whole_numbers
from servegym.envs.errors import ServegymError
from servegym.envs.jit import kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.machine.layout import one_replica
from servegym.envs.simulator.booking import book
from servegym.envs.simulator.joining import see_arrivals
from servegym.envs.simulator.loading import load
from servegym.envs.simulator.queues import push_back, tokens_to_prefill
from servegym.envs.simulator.stages import (
    begin_decode,
    begin_prefill,
    compute,
    pick,
    rounds_to_next_finish,
    sort_idle,
)
from servegym.envs.simulator.state import State, make_state
from servegym.envs.workload.requests import Requests


class Stage(NamedTuple):
    """A prefill stage: the decode clock at which it runs and the requests that it admits."""

    clock: int  # decode rounds run before it
    requests: tuple[int, ...]  # ids


Schedule = Sequence[Stage]
"""Prefill stages in order; between stages every active client decodes."""


def replay(
    requests: Requests,
    clients: int,
    costs: CostTables,
    schedule: Schedule,
    max_prefill_tokens: int = 0,
) -> float:
    """Return the makespan of a schedule in seconds.

    Parameters
    ----------
    requests
        All present at t = 0; their true lengths are used.
    clients, costs, max_prefill_tokens
        One replica: its clients, its cost tables (of no fewer), the token budget of a stage (0: none).
    schedule
        Admits every request once.

    Raises
    ------
    ServegymError
        If an argument is not as above, or no whole number where it should be; if a stage cannot happen
        at its clock (the clock is past, or no client is active until then), admits no request, more
        requests than clients are idle, more prompt tokens than the budget (unless it admits one
        request) or a request a second time; or if a request is left out.
    """
    _check(requests, clients, costs, schedule, max_prefill_tokens)
    state = make_state(1, len(requests), one_replica(clients))
    load(state, 0, requests, None)
    _let_all_wait(state)
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
        tokens = int(requests.prompt_tokens[ids].sum())
        if len(ids) > 1 and 0 < max_prefill_tokens < tokens:
            raise ServegymError(
                f"{where} admits {tokens} prompt tokens, over the token budget of "
                f"{max_prefill_tokens}"
            )
        if not _decode_until(state, costs, stage.clock):
            raise ServegymError(
                f"{where} cannot happen: decoding stands at {int(replica.rounds)} with "
                f"{int(replica.active)} active clients"
            )
        idle = clients - int(replica.active)
        if len(ids) > idle:
            raise ServegymError(f"{where} admits {len(ids)} requests, but {idle} clients are idle")
        _run_stage(state, costs, ids)
    if waiting.any():
        first = int(np.argmax(waiting))
        raise ServegymError(f"no stage admits request {first}, and {waiting.sum() - 1} others")
    _decode_until(state, costs, np.iinfo(np.int64).max)
    return float(replica.clock_s)


def _check(
    requests: Requests,
    clients: int,
    costs: CostTables,
    schedule: Schedule,
    max_prefill_tokens: int,
) -> None:
    """Refuse what kernels would misread or never end on."""
    limits = np.iinfo(np.int64)
    whole_number("clients", clients, 1, costs.decode_base_s.shape[1] - 1)
    whole_number("max_prefill_tokens", max_prefill_tokens, 0)
    if requests.arrival_s.max() > 0:
        raise ServegymError(
            "a schedule serves requests that are present at t = 0, the last arrives at "
            f"{requests.arrival_s.max():g} s"
        )
    for place, stage in enumerate(schedule):
        whole_number(f"the decode clock of stage {place}", stage.clock, 0, limits.max)
        whole_numbers(f"the requests of stage {place}", stage.requests, limits.min, limits.max)


@kernel
def _let_all_wait(state: State) -> None:
    for i in range(state.episodes[0].requests):
        push_back(state, 0, 0, i)
    see_arrivals(state, 0, 0)


@kernel
def _decode_until(state: State, costs: CostTables, clock: int) -> bool:
    """Decode to clock ``clock`` or until no client is active; return whether the clock is reached."""
    replica = state.replicas[0, 0]
    while replica.active > 0 and replica.rounds < clock:
        begin_decode(
            state, costs, 0, 0, min(rounds_to_next_finish(state, 0, 0), clock - replica.rounds)
        )
        book(state, 0, 0, replica.stage_s)
    return replica.rounds == clock


@kernel
def _run_stage(state: State, costs: CostTables, ids: NDArray[np.int64]) -> None:
    """Run a stage that gives these waiting requests to the first idle clients."""
    sort_idle(state, 0, 0)
    idle, replica = state.idle[0, 0], state.replicas[0, 0]
    for k in range(ids.size):
        pick(state, 0, 0, idle[k], ids[k])
        compute(state, 0, 0, ids[k], tokens_to_prefill(state, 0, ids[k]))
    for k in range(ids.size, replica.idle):
        idle[k - ids.size] = idle[k]
    replica.idle -= ids.size
    begin_prefill(state, costs, 0, 0)
    book(state, 0, 0, replica.stage_s)
