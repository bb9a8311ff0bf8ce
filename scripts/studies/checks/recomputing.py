"""Workloads under which vLLM's issue 54644 might have been measured: a search by what it tells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.studies.checks.published import (
    BLOCK,
    GB200,
    PUBLISHED_SAVING,
    PUBLISHED_TAX,
    TAX_BLOCKS,
    TAX_REQUESTS,
)
from servegym.studies.serving import serve

Tokens = NDArray[np.int64]

WASTED: Final = 623_948
"""Tokens computed again with 400 blocks and vLLM's victim, as told."""
WASTED_LEAST: Final = 354_882
"""… with the least computed as victim."""
EACH: Final = round(WASTED * (1 / PUBLISHED_TAX[-1] - 1) / TAX_REQUESTS)
"""Tokens computed once, a request, by these figures: 560."""

SHARES: Final = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the prompt in a request's tokens."""
SPREADS: Final = ((0.0, 0.0), (0.9, 0.0), (0.0, 0.9), (0.9, 0.9))
"""Of prompts and outputs about their means, uniform."""
CLIENTS: Final = (64, 256)
BUDGETS: Final = (8192, 512, 128)
"""Tokens a pass."""


@dataclass(frozen=True)
class Found:
    """What a workload gives by memory, ``TAX_BLOCKS``."""

    prompt: int
    output: int
    spreads: tuple[float, float]
    clients: int
    budget: int
    tax: tuple[float, ...]
    """Recomputed, of all computed tokens."""
    saving: tuple[float, ...]
    """Fewer recomputed tokens with the least computed as victim; NaN where nothing is recomputed."""
    again: tuple[int, int]
    """Tokens recomputed in the smallest memory, with either victim."""
    a_preemption: tuple[float, float]
    """The same by preemption."""

    @property
    def off(self) -> float:
        """The largest distance from the published tax."""
        return max(abs(ours - theirs) for ours, theirs in zip(self.tax, PUBLISHED_TAX, strict=True))

    @property
    def off_saving(self) -> float:
        """The largest distance from the published saving; infinite where nothing is recomputed."""
        pairs = list(zip(self.saving, PUBLISHED_SAVING, strict=True))[1:]
        return max(np.inf if np.isnan(ours) else abs(ours - theirs) for ours, theirs in pairs)


def lengths(
    prompt: int, output: int, spreads: tuple[float, float], seed: int
) -> tuple[Tokens, Tokens]:
    """Draw prompts and outputs, uniform about their means."""
    rng = np.random.default_rng(seed)
    both = [
        np.maximum(np.rint(mean * rng.uniform(1 - spread, 1 + spread, TAX_REQUESTS)), 1)
        for mean, spread in zip((prompt, output), spreads, strict=True)
    ]
    return both[0].astype(np.int64), both[1].astype(np.int64)


def try_workload(workload: tuple[int, int, tuple[float, float], int, int], seed: int) -> Found:
    """Serve one draw of one of ``workloads()`` with each memory and both victims."""
    prompt, output, spreads, clients, budget = workload
    prompts, outputs = lengths(prompt, output, spreads, seed)
    once = int((prompts + outputs).sum())
    tax, saving = list[float](), list[float]()
    again, preemptions = (0, 0), (0, 0)
    for blocks in TAX_BLOCKS:
        served = [
            serve(
                TaskConfig(
                    "tax",
                    ClusterConfig(
                        clients=clients,
                        kv_capacity_tokens=BLOCK * blocks,
                        kv_block_tokens=BLOCK,
                        chunk_tokens=budget,
                        preempt=victim,
                    ),
                    GB200,
                ),
                "vllm",
                prompts,
                outputs,
            )
            for victim in ("newest", "least-computed")
        ]
        again = served[0].recomputed_tokens, served[1].recomputed_tokens
        preemptions = served[0].preemptions, served[1].preemptions
        tax.append(again[0] / (again[0] + once))
        saving.append(1 - again[1] / again[0] if again[0] else np.nan)
    a_preemption = again[0] / max(preemptions[0], 1), again[1] / max(preemptions[1], 1)
    return Found(
        prompt, output, spreads, clients, budget, tuple(tax), tuple(saving), again, a_preemption
    )


def workloads() -> Iterator[tuple[int, int, tuple[float, float], int, int]]:
    """Mean prompt and output, together ``EACH``; spreads; clients; budget."""
    for share, spreads, clients, budget in itertools.product(SHARES, SPREADS, CLIENTS, BUDGETS):
        prompt = round(share * EACH)
        yield prompt, EACH - prompt, spreads, clients, budget
