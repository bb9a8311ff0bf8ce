"""Rewards, each the decrease of a loss that accumulates over the episode.

``gap``: loss = 100 · (clock − credit) / bound. Every decode token and every prompt token earns a
fixed share of the lower bound once it is served, and all shares add up to the bound. So the return is
exactly −100 · gap, minus the gap in percent. A step loses client-time spent idle or on the fixed cost of
stages. A truncated episode has no gap: its return is minus the loss until then and ignores the remaining
requests; so does one in which requests were shed, which earn nothing.

``latency``: loss = ∫ requests in the system dt / requests; the return is minus the mean latency in
seconds, over all requests: one that is rejected has waited for nothing, one that is shed until then.

``goodput``: loss = −(requests that have finished and met ``[slo]``); the return is their number, exactly:
every reward is a whole number. Without limits each request counts that finishes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servegym.envs.bounds.batch import LowerBound
from servegym.envs.jit import kernel
from servegym.envs.simulator.queues import blocks_of
from servegym.envs.simulator.routing import largest_servable
from servegym.envs.simulator.state import UNLIMITED_BLOCKS, State
from servegym.envs.vocabulary import GAP, GOODPUT
from servegym.envs.workload.requests import Requests


@kernel
def loss(state: State, e: int, reward: int) -> float:
    """Return the loss accumulated so far."""
    episode = state.episodes[e]
    if reward == GAP:
        if episode.bound_s == 0.0:
            return 0.0  # every request was rejected
        credit_s = episode.round_credit_s * episode.served_rounds
        credit_s += episode.prompt_credit_s * episode.admitted_prompt_tokens
        return 100.0 * (episode.now_s - credit_s) / episode.bound_s
    if reward == GOODPUT:
        return -float(episode.met)
    return episode.in_system_s / episode.requests


def write_credits(state: State, e: int, requests: Requests, bound: LowerBound) -> None:
    """Divide the bound among the tokens to decode (its decode share) and the prompt tokens (the rest)."""
    prompts, rounds = requests.prompt_tokens, requests.decode_rounds
    _write_credits(state, e, prompts, rounds, bound.seconds, bound.decode_share)


@kernel
def _write_credits(
    state: State,
    e: int,
    prompt_tokens: NDArray[np.int64],
    decode_rounds: NDArray[np.int64],
    bound_s: float,
    decode_share: float,
) -> None:
    """Do so; requests that fit into no replica's memory are rejected and earn nothing."""
    largest = largest_servable(state)
    rounds, prompts = 0, 0
    for i in range(prompt_tokens.size):
        tokens = prompt_tokens[i] + decode_rounds[i] + 1
        if largest == UNLIMITED_BLOCKS or blocks_of(state, tokens) <= largest:
            rounds += decode_rounds[i]
            prompts += prompt_tokens[i]
    share = decode_share if rounds > 0 else 0.0
    episode = state.episodes[e]
    episode.bound_s = bound_s
    episode.round_credit_s = share * bound_s / max(rounds, 1)
    episode.prompt_credit_s = (1.0 - share) * bound_s / max(prompts, 1)
