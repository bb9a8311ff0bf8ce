"""Rewards, each the decrease of a loss that accumulates over the episode.

``gap``: loss = 100 · (clock − credit) / bound. Every decode token and every prompt token earns a
fixed share of the lower bound once it is served, and all shares add up to the bound. So the return is
exactly −100 · gap, minus the gap in percent. A step loses client-time spent idle or on the fixed cost of
stages. A truncated episode has no gap: its return is minus the loss until then and ignores the remaining
requests.

``latency``: loss = ∫ requests in the system dt / requests; the return is minus the mean latency in
seconds.
"""

from __future__ import annotations

from servegym.envs.bounds.batch import LowerBound
from servegym.envs.jit import kernel
from servegym.envs.simulator.state import State
from servegym.envs.vocabulary import GAP
from servegym.envs.workload.requests import Requests


@kernel
def loss(state: State, e: int, reward: int) -> float:
    """Return the loss accumulated so far."""
    episode = state.episodes[e]
    if reward == GAP:
        credit_s = episode.round_credit_s * episode.served_rounds
        credit_s += episode.prompt_credit_s * episode.admitted_prompt_tokens
        return 100.0 * (_latest_clock(state, e) - credit_s) / episode.bound_s
    return episode.in_system_s / episode.requests


@kernel
def _latest_clock(state: State, e: int) -> float:
    latest = state.replicas[e, 0].clock_s
    for r in range(1, state.replicas.shape[1]):
        latest = max(latest, state.replicas[e, r].clock_s)
    return latest


def write_credits(state: State, e: int, requests: Requests, bound: LowerBound) -> None:
    """Divide the bound among the tokens to decode (its decode share) and the prompt tokens (the rest)."""
    rounds = int(requests.decode_rounds.sum())
    decode_share = bound.decode_share if rounds > 0 else 0.0
    episode = state.episodes[e]
    episode.bound_s = bound.seconds
    episode.round_credit_s = decode_share * bound.seconds / max(rounds, 1)
    episode.prompt_credit_s = (1.0 - decode_share) * bound.seconds / requests.prompt_tokens.sum()
