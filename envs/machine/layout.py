"""The replicas of a cluster, lowered: how many clients and how much memory each has, what they share."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.vocabulary import GUARD_SGLANG

UNLIMITED_TOKENS: Final = 1 << 60
"""Tokens of a replica whose memory is not limited."""


class Fleet(NamedTuple):
    """The clients of all replicas, as an offline plan counts them.

    Examples
    --------
    >>> Layout((1, 2), (640, 0), block_tokens=16, round_s=(0.5, 0.25)).fleet().round_s
    array([0.5 , 0.25, 0.25])
    """

    round_s: NDArray[np.float64]  # (clients,) a decode round with all clients of its replica active
    tokens: NDArray[np.int64]  # (clients,) most prompt and output tokens of a request there


class Layout(NamedTuple):
    """The replicas of a cluster and what they share; see ``[cluster]`` for each field's meaning."""

    clients: tuple[int, ...]  # of each replica
    kv_capacity_tokens: tuple[int, ...]  # of each replica, 0: not limited
    pool: bool = False  # one queue for all replicas, not one each
    block_tokens: int = 1
    watermark: float = 0.0
    chunk_tokens: int = 0
    router: int = 0
    staleness_s: float = 0.0
    victim: int = 0
    guard: int = 0
    first_ratio: float = 0.0  # of the guard ``sglang``
    patience_s: float = math.inf  # of the rule ``shortest``
    shortest_by: int = 0  # place in ORDERS, of the same rule
    level_tokens: int = 256
    one_pass: bool = True
    roles: tuple[int, ...] = ()  # of each replica; empty: all serve both
    steals_waiting: bool = False
    steals_running: bool = False
    steal_order: int = 0
    steals_half: bool = False
    migrate: int = 0
    steal_period_s: float = 0.0
    freeness_steps: float = 3.0
    shed_at: float = 0.0
    steal_delay_s: float = 0.0
    move: int = 0
    copy_latency_s: float = 0.0
    copy_token_s: float = 0.0  # seconds per token between replicas
    evicts_to_host: bool = False
    host_latency_s: float = 0.0
    host_token_s: float = 0.0
    round_s: tuple[float, ...] = ()  # of each replica, see ``Fleet``; (): all take equally long
    slo_ttft_s: float = math.inf
    slo_tpot_s: float = math.inf
    class_limits: bool = False  # classes of requests have limits of their own
    counts_slo: bool = False  # count the requests that meet both when they finish
    keeps_gaps: bool = False  # note the worst gap between two tokens of each request

    @property
    def moves(self) -> bool:
        """Whether a request may change its replica or have its keys and values elsewhere."""
        steals = self.steals_waiting or self.steals_running
        return steals or self.evicts_to_host or any(self.roles)

    @property
    def limits_memory(self) -> bool:
        """Whether the memory of some replica is limited."""
        return any(self.kv_capacity_tokens)

    @property
    def counts_memory(self) -> bool:
        """Whether anything depends on memory or chunks of prompts: limit, budget, router, guard."""
        chunks = self.chunk_tokens > 0 or self.guard == GUARD_SGLANG
        return self.limits_memory or chunks or len(self.clients) > 1

    def memory_blocks(self, replica: int) -> tuple[int, int] | None:
        """Return the blocks of a replica's memory and those of its watermark; None: not limited."""
        tokens = self.kv_capacity_tokens[replica]
        if tokens == 0:
            return None
        blocks = tokens // self.block_tokens
        return blocks, int(self.watermark * blocks)

    def fleet(self) -> Fleet:
        """Return the clients of all replicas, in order of replica."""
        length = self.block_tokens
        tokens = [
            most // length * length if most > 0 else UNLIMITED_TOKENS
            for most in self.kv_capacity_tokens
        ]
        round_s = self.round_s or (1.0,) * len(self.clients)
        return Fleet(np.repeat(round_s, self.clients), np.repeat(tokens, self.clients))


def one_replica(clients: int) -> Layout:
    """Return the layout of one replica without a memory limit."""
    return Layout((clients,), (0,))
