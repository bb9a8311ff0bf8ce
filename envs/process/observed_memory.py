"""The block ``memory`` of the observation: KV memory, the half-computed prompt, the chunk budget.

All of the replica that decides. Where its memory is not limited, the first eleven entries are constants.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.jit import shared_kernel
from servegym.envs.process.observation import ROUND_DOUBLINGS, balance, log_scaled
from servegym.envs.simulator.memory import blocks_of_round, free_blocks, rounds_to_full
from servegym.envs.simulator.queues import queue_of, tokens_to_prefill
from servegym.envs.simulator.state import NOBODY, UNLIMITED_BLOCKS, State

MEMORY_FEATURES: Final = (
    "memory is limited, 0 or 1",
    "blocks in use / blocks",
    "blocks free beyond the watermark / blocks",
    "rounds until memory is full, log-scaled",
    "rounds until the next finish against rounds until memory is full, a / (a + b)",
    "blocks of the next decode round against free blocks, a / (a + b)",
    "tokens of the decoding at their finishes against memory, a / (a + b)",
    "blocks that waiting prefills want against all blocks, a / (a + b)",
    "blocks that waiting prefills want against free blocks, a / (a + b)",
    "mean blocks of a waiting prefill / blocks",
    "preemptions here against finished requests per replica, a / (a + b)",
    "half-computed prompt's share left",
    "tokens left of the half-computed prompt against the chunk budget left, a / (a + b)",
    "chunk budget that the decoding leave / chunk budget",
    "tokens of waiting prefills against the chunk budget left, a / (a + b)",
)
"""What each entry of the block means, in order."""


@shared_kernel
def observe_memory(state: State, e: int, r: int, at: int, out: NDArray[np.float32]) -> None:
    """Write the block of replica ``r`` in environment ``e`` into ``out``, from entry ``at`` on."""
    replica, queue = state.replicas[e, r], state.queues[e, queue_of(state, r)]
    blocks = state.machines[r].blocks
    active = replica.active
    out[at : at + len(MEMORY_FEATURES)] = 0.0
    out[at + 2] = 1.0
    out[at + 3] = 1.0
    if blocks != UNLIMITED_BLOCKS:
        free = free_blocks(state, e, r)
        out[at] = 1.0
        out[at + 1] = replica.used_blocks / blocks
        out[at + 2] = max(free - state.machines[r].watermark_blocks, 0) / blocks
        if active > 0:
            to_full = rounds_to_full(state, e, r)
            to_finish = state.expected[e, r, active - 1].due - replica.rounds
            at_finish = replica.cached_tokens + replica.due_sum - active * replica.rounds
            out[at + 3] = log_scaled(to_full, ROUND_DOUBLINGS)
            out[at + 4] = balance(to_finish, to_full)
            out[at + 5] = balance(blocks_of_round(state, e, r), free)
            out[at + 6] = balance(at_finish, float(blocks) * state.cluster.block_tokens)
        out[at + 7] = balance(queue.blocks, blocks)
        out[at + 8] = balance(queue.blocks, free)
        if queue.waiting > 0:  # in a pool some may be larger than this memory
            out[at + 9] = min(queue.blocks / queue.waiting / blocks, 1.0)
        finished = state.episodes[e].finished / state.replicas.shape[1]
        out[at + 10] = balance(replica.preemptions, finished)
    budget = state.cluster.chunk_tokens
    if budget > 0:
        left = max(budget - active, 0)
        i = replica.partial
        if i != NOBODY:
            whole = tokens_to_prefill(state, e, i)
            more = whole - state.requests[e, i].computed
            out[at + 11] = more / whole
            out[at + 12] = balance(more, left)
        out[at + 13] = left / budget
        out[at + 14] = balance(queue.tokens, left)
