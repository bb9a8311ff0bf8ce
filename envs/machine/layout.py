"""The replicas of a cluster, lowered: how many clients and how much memory each has, what they share."""

from __future__ import annotations

from typing import NamedTuple

from servegym.envs.vocabulary import GUARD_SGLANG


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
    one_pass: bool = True
    roles: tuple[int, ...] = ()  # of each replica; empty: all serve both
    steals_waiting: bool = False
    steals_running: bool = False
    steal_order: int = 0
    steal_delay_s: float = 0.0
    move: int = 0
    copy_latency_s: float = 0.0
    copy_token_s: float = 0.0  # seconds per token between replicas
    evicts_to_host: bool = False
    host_latency_s: float = 0.0
    host_token_s: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether a request may change its replica or have its keys and values elsewhere."""
        steals = self.steals_waiting or self.steals_running
        return steals or self.evicts_to_host or any(self.roles)

    @property
    def counts_memory(self) -> bool:
        """Whether anything depends on memory or chunks of prompts: limit, budget, router, guard."""
        chunks = self.chunk_tokens > 0 or self.guard == GUARD_SGLANG
        return any(self.kv_capacity_tokens) or chunks or len(self.clients) > 1


def one_replica(clients: int) -> Layout:
    """Return the layout of one replica without a memory limit."""
    return Layout((clients,), (0,))
