"""What a user of a service feels: whether a request has met the limits of ``[slo]``."""

from __future__ import annotations

from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.simulator.state import State


@kernel
def limits_of(state: State, e: int, i: int) -> tuple[float, float]:
    """Return the limits that hold for a request: seconds to its first token, and per token after it."""
    if state.limits.shape[1] > 0:
        return state.limits[e, i, 0], state.limits[e, i, 1]
    return state.cluster.slo_ttft_s, state.cluster.slo_tpot_s


@shared_kernel
def note_pace(state: State, e: int, r: int, i: int) -> None:
    """Note how request ``i``, which decodes at ``r`` from this boundary on, has come so far."""
    request = state.requests[e, i]
    pace = state.paces[e, r, request.client]
    pace.first_token_s = state.times[e, i].first_token_s
    pace.begun_rounds = state.replicas[e, r].rounds - request.emitted
    _, pace.limit_s = limits_of(state, e, i)


@shared_kernel
def count_met(state: State, e: int, i: int) -> None:
    """Count a request that finishes, if it has met both limits; one without rounds has no second."""
    times = state.times[e, i]
    ttft_s, tpot_s = limits_of(state, e, i)
    rounds = state.requests[e, i].decode_rounds
    if times.first_token_s - times.arrival_s > ttft_s:
        return
    if rounds > 0 and (times.finished_s - times.first_token_s) / rounds > tpot_s:
        return
    state.episodes[e].met += 1
