"""What a user of a service feels: whether a request has met the limits of ``[slo]``."""

from __future__ import annotations

from servegym.envs.jit import shared_kernel
from servegym.envs.simulator.state import State


@shared_kernel
def count_met(state: State, e: int, i: int) -> None:
    """Count a request that finishes, if it has met both limits; one without rounds has no second."""
    times, cluster = state.times[e, i], state.cluster
    rounds = state.requests[e, i].decode_rounds
    if times.first_token_s - times.arrival_s > cluster.slo_ttft_s:
        return
    if rounds > 0 and (times.finished_s - times.first_token_s) / rounds > cluster.slo_tpot_s:
        return
    state.episodes[e].met += 1
