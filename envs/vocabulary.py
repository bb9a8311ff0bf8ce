"""The names that tasks, policies and kernels share: admission rules, rewards, routers and the like.

Kernels know a name by its place in its table, a number; some of these numbers have names of their own.
Nothing is imported here, so that reading a task loads no kernels.
"""

from __future__ import annotations

from typing import Final

ADMISSION_RULES: Final = ("plan", "steal", "longest", "shortest", "fcfs", "aligned", "scored")
"""Names of the admission rules."""

USUAL_RULES: Final = ADMISSION_RULES[:6]
"""Those that a task offers unless it says otherwise; policies by ``scored`` add it."""

PLAN: Final = 0
STEAL: Final = 1
LONGEST: Final = 2
SHORTEST: Final = 3
FCFS: Final = 4
ALIGNED: Final = 5
SCORED: Final = 6

REWARDS: Final = ("gap", "latency", "goodput")
"""Names of the rewards."""

GAP: Final = 0
GOODPUT: Final = 2

ROUTERS: Final = {
    "round-robin": "one replica after another",
    "random": "any replica, all as likely",
    "least-requests": "fewest requests, waiting and running",
    "least-waiting": "fewest waiting requests",
    "least-tokens": "fewest expected tokens still to compute",
    "vllm-dp": "least 4 · waiting + running requests, as vLLM's data-parallel router",
    "llumnix": "most free blocks, less those that waiting prompts want, per request, as Llumnix",
    "dynamo": "fewest blocks still to prefill or in use, as NVIDIA Dynamo",
    "plan": "as the offline plan over all replicas says",
    "pool": "no router: one queue for all replicas, who take from it when they can",
}
"""Each router and what it goes by; of equal replicas it takes the lowest number."""

ROUTE_ROUND_ROBIN: Final = 0
ROUTE_RANDOM: Final = 1
ROUTE_LEAST_WAITING: Final = 3
ROUTE_LEAST_TOKENS: Final = 4
ROUTE_VLLM_DP: Final = 5
ROUTE_LLUMNIX: Final = 6
ROUTE_DYNAMO: Final = 7
ROUTE_PLAN: Final = 8

VICTIMS: Final = {
    "newest": "the last admitted, as vLLM",
    "least-computed": "the one with the fewest tokens in memory; of equals the newest",
    "fewest-output": "the one that has emitted the fewest tokens, as SGLang; of equals the newest",
    "fewest-expected": "the one with the shortest expected output, as A_min; of equals the newest",
    "lowest-level": "the one whose level of feedback is the last, as FastServe; of equals the newest",
}
"""Who gives up its memory when a decode round does not fit, and is computed again later."""

NEWEST: Final = 0
LEAST_COMPUTED: Final = 1
FEWEST_OUTPUT: Final = 2
FEWEST_EXPECTED: Final = 3
LOWEST_LEVEL: Final = 4

ORDERS: Final = {
    "length": "the shortest output, by information.compare_by, when it came",
    "expected": "the shortest output that is expected by now",
    "prompt": "the shortest prompt",
    "deadline": "the first whose first token is due, slo.ttft_s after its arrival",
    "level": "the first level of feedback by tokens so far, then the first to come",
    "batch": "the first of a sequence of batches, each with the least sum of outputs over squared size",
}
"""What goes first under the rule ``shortest``; of equals the first to come, of ``length`` and ``expected``
the last."""

BY_LENGTH: Final = 0
BY_EXPECTED: Final = 1
BY_PROMPT: Final = 2
BY_DEADLINE: Final = 3
BY_LEVEL: Final = 4
BY_BATCH: Final = 5

EXPECTATIONS: Final = ("mean", "lower", "upper")
"""What is expected of an uncertain output: its mean, or an end of the interval where it should lie."""

ADMISSION_GUARDS: Final = {
    "none": "a prompt must fit now",
    "full": "so must the whole expected outputs of all who run, as TensorRT-LLM without eviction",
    "peak": "all who run must fit at every expected finish",
    "sglang": "so must its expected output beside a falling share of all others', as SGLang",
}
"""What must fit into memory before a request is admitted."""

GUARD_NONE: Final = 0
GUARD_FULL: Final = 1
GUARD_PEAK: Final = 2
GUARD_SGLANG: Final = 3

STEALS: Final = ("waiting", "running")
"""What a replica may steal from another."""

STEAL_WAITING: Final = 0
STEAL_RUNNING: Final = 1

STEAL_ORDERS: Final = {
    "longest": "those with the longest outputs, as Algorithm 1 of the paper",
    "newest": "those that have waited least, the last of the queue",
    "oldest": "those that have waited longest, the first of the queue",
}
"""Which waiting requests a replica steals."""

TAKE_LONGEST: Final = 0
TAKE_OLDEST: Final = 2

STEAL_SHARES: Final = {
    "room": "as many as the thief has idle clients for",
    "half": "of these at most half of what waits there more than at the thief, rounded up",
}
"""How many waiting requests a replica steals."""

MIGRATIONS: Final = {
    "longest": "from where most decode the one with most rounds left",
    "shortest": "from where most decode the one with fewest tokens in memory",
    "freeness": "the same from the replica with least free memory a request to that with most, as Llumnix",
}
"""Which running request a replica steals, and from where."""

MIGRATE_LONGEST: Final = 0
MIGRATE_BY_FREENESS: Final = 2

MOVES: Final = {
    "copy": "its keys and values are copied while it goes on decoding (live migration)",
    "recompute": "it waits at the other replica and is computed again",
    "cheaper": "whichever of the two takes fewer seconds",
}
"""How a running request moves to another replica."""

MOVE_COPY: Final = 0
MOVE_CHEAPER: Final = 2

EVICTIONS: Final = ("recompute", "host")
"""What becomes of a preempted request's keys and values: dropped, or kept in the host's memory."""

ROLES: Final = ("both", "prefill", "decode")
"""What a replica serves."""

ROLE_BOTH: Final = 0
ROLE_PREFILL: Final = 1
ROLE_DECODE: Final = 2

OBSERVATION_BLOCKS: Final = ("replica", "memory", "cluster", "latency")
"""Names of the blocks of the observation, which holds them in this order: the clients, queue and stages of
the replica that decides; its memory and chunk budget; where it stands among all replicas; how far its
requests are from the limits of ``[slo]``."""

MIXED_COSTS: Final = ("one-pass", "sum")
"""What a mixed stage costs: one pass of the weights, or a prefill part and a decode part."""
