"""The names that tasks, policies and kernels share: admission rules, rewards and their numbers.

Nothing is imported here, so that reading a task loads no kernels.
"""

from __future__ import annotations

from typing import Final

ADMISSION_RULES: Final = ("plan", "steal", "longest", "shortest", "fcfs", "aligned")
"""Names of the admission rules; kernels know a rule by its place here."""

PLAN: Final = 0
STEAL: Final = 1
LONGEST: Final = 2
SHORTEST: Final = 3
FCFS: Final = 4
ALIGNED: Final = 5

REWARDS: Final = ("gap", "latency")
"""Names of the rewards; kernels know a reward by its place here."""

GAP: Final = 0

ROUTER_TEXTS: Final = {
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
"""What each router goes by; of equal replicas it takes the lowest number."""

ROUTERS: Final = tuple(ROUTER_TEXTS)
"""Names of the routers; kernels know a router by its place here."""

ROUTE_ROUND_ROBIN: Final = 0
ROUTE_RANDOM: Final = 1
ROUTE_LEAST_REQUESTS: Final = 2
ROUTE_LEAST_WAITING: Final = 3
ROUTE_LEAST_TOKENS: Final = 4
ROUTE_VLLM_DP: Final = 5
ROUTE_LLUMNIX: Final = 6
ROUTE_DYNAMO: Final = 7
ROUTE_PLAN: Final = 8

VICTIM_TEXTS: Final = {
    "newest": "the last admitted, as vLLM",
    "least-computed": "the one with the fewest tokens in memory; of equals the newest",
    "fewest-output": "the one that has emitted the fewest tokens, as SGLang; of equals the newest",
}
"""Who gives up its memory when a decode round does not fit, and is computed again later."""

VICTIMS: Final = tuple(VICTIM_TEXTS)
"""Who is preempted when memory is full; kernels know a rule by its place here."""

NEWEST: Final = 0
LEAST_COMPUTED: Final = 1
FEWEST_OUTPUT: Final = 2

GUARD_TEXTS: Final = {
    "none": "a prompt must fit now",
    "full": "so must the whole expected outputs of all who run, as TensorRT-LLM without eviction",
    "peak": "all who run must fit at every expected finish",
}
"""What must fit into memory before a request is admitted."""

ADMISSION_GUARDS: Final = tuple(GUARD_TEXTS)
"""What must fit into memory before a request is admitted; kernels know a guard by its place here."""

GUARD_NONE: Final = 0
GUARD_FULL: Final = 1
GUARD_PEAK: Final = 2

OBSERVATION_BLOCKS: Final = ("replica", "memory", "cluster")
"""Names of the blocks of the observation, which holds them in this order: the clients, queue and stages of
the replica that decides; its memory and chunk budget; where it stands among all replicas."""

MIXED_COSTS: Final = ("one-pass", "sum")
"""What a mixed stage costs: one pass of the weights, or a prefill part and a decode part."""
