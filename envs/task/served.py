"""Registered tasks beyond one machine without a limit of memory: traffic, memory, several replicas.

Costs are kernel profiles of Llama on A100 with 80 GB (``COST_PRESETS``). A replica's memory is nine tenths of
its cards, as vLLM takes by default, less 16-bit weights, in whole blocks of 16 tokens: with 512 KiB of keys
and values a token Llama 2 7B has (72 − 13.48) GB / 524,288 B = 111,616 tokens; with 128 KiB Llama 3 8B has
(72 − 16.06) GB / 131,072 B = 426,784. Lengths are as measured, also where they exceed a model's window.

A memory of K tokens serves μ = K / (b · E[g]) requests a second (Nie, Si and Zhou, 2605.04595), with b the
mean seconds of a pass and g = p · o + o (o + 1) / 2 the tokens of a request, summed over its rounds.
``results/tasks/load.md`` has b, E[g] and μ of each task, what is served at most, and the load offered.
"""

from __future__ import annotations

from typing import Final

from servegym.envs.machine.presets import cost_preset
from servegym.envs.task.cluster import ClusterConfig, ReplicaConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.sections import InformationConfig, ProcessConfig, WorkloadConfig
from servegym.envs.task.slo import SloConfig
from servegym.envs.workload.arrivals import Arrivals

KV_7B: Final = 524_288
"""Bytes of the keys and values of one token of Llama 2 7B: 2 · 32 layers · 4096 · 2 bytes."""

KV_8B: Final = 131_072
"""… of Llama 3 8B: 2 · 32 layers · 8 heads · 128 · 2 bytes."""

KV_65B: Final = 2_621_440
"""… of LLaMA 65B, the paper's model: 2 · 80 layers · 8192 · 2 bytes."""

MEMORY_7B: Final = 111_616
MEMORY_8B: Final = 426_784
MEMORY_65B: Final = 60_032
"""Tokens that four cards hold of LLaMA 65B: (288 − 130.6) GB / 2,621,440 B."""

WORST_CASE_CAP: Final = 0.1875
"""Share of Elastic-v0's clients that memory can hold for sure: 48 of 256, as ⌊60,032 / (191 + 1024)⌋ = 49."""

CHAT: Final = TaskConfig(
    name="servegym/Chat-v0",
    cluster=ClusterConfig(
        clients=256,
        kv_capacity_tokens=MEMORY_7B,
        kv_block_tokens=16,
        watermark=0.01,
        chunk_tokens=2048,
        max_prefill_tokens=16_384,
        kv_bytes_per_token=KV_7B,
    ),
    cost=cost_preset("llama2-7b-a100x1").costs,
    workload=WorkloadConfig(
        source="azure-conv", requests=2000, arrivals=Arrivals("gamma", rate_per_s=4.5)
    ),
    process=ProcessConfig(observe=("replica", "memory", "latency"), reward="goodput"),
    slo=SloConfig(ttft_s=1.0, tpot_s=0.1),
)
"""A chat service on one card: conversations of Azure, 2023, in bursts as measured (cv 1.09).

256 clients are vLLM's classic ``max_num_seqs``, 2048 tokens a pass one of Sarathi's budgets, 16,384 a
prefill stage SGLang's default, a watermark of 1 % vLLM's classic one. 4.5 requests a second are four fifths
of what was measured and about nine tenths of what the card bears. The limits are servegym's choice: some
ten times what a lone request takes.
"""

ELASTIC: Final = TaskConfig(
    name="servegym/Elastic-v0",
    cluster=ClusterConfig(
        clients=256,
        kv_capacity_tokens=MEMORY_65B,
        kv_block_tokens=16,
        chunk_tokens=512,
        max_prefill_tokens=16_384,
        kv_bytes_per_token=KV_65B,
    ),
    information=InformationConfig(output_lengths="predicted", kendall_tau=0.55),
    process=ProcessConfig(
        rules=("longest", "shortest", "fcfs"),
        mixed_rules=("shortest", "fcfs"),
        caps=(1.0, 0.75, WORST_CASE_CAP),
        reserves=(0.0, 0.05, 0.1),
        observe=("replica", "memory"),
    ),
)
"""How many clients run is decided at every admission: the paper's third open question.

The requests of GSM8K-v0, lengths predicted as in GSM8KPredicted-v0, with the keys and values of the paper's
model and GSM8K-v0's costs. Memory holds 49 requests of the largest size, and 204 of the size that they have
on average. 512 tokens a pass are one of Sarathi's budgets.
"""

CLUSTER: Final = TaskConfig(
    name="servegym/Cluster-v0",
    cluster=ClusterConfig(
        replicas=8,
        clients=128,
        kv_capacity_tokens=MEMORY_7B,
        kv_block_tokens=16,
        watermark=0.01,
        chunk_tokens=2048,
        max_prefill_tokens=16_384,
        router="round-robin",
        steal_order="newest",
        steal_delay_s=0.01,
        kv_bytes_per_token=KV_7B,
        link="rdma1",
        replica=tuple(
            ReplicaConfig(speed=speed) for speed in (1.5, 1.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5)
        ),
    ),
    cost=cost_preset("llama2-7b-a100x1").costs,
    workload=WorkloadConfig(
        source="azure-conv", requests=2000, arrivals=Arrivals("gamma", rate_per_s=36.0)
    ),
    process=ProcessConfig(
        steals=("waiting", "running"),
        observe=("replica", "memory", "cluster", "latency"),
        reward="goodput",
    ),
    slo=SloConfig(ttft_s=1.0, tpot_s=0.05),
)
"""Eight replicas of unlike speed, to which requests are dealt in turn: each slow one gets twice its load.

Chat-v0's card at speed 1; the speeds are servegym's choice and sum to 8. A theft of a waiting request costs
10 ms, within the 5 … 100 ms that users report for control; a running one a copy over a 400 Gb/s card
(``rdma1``): 1 ms + 13 µs a token. 36 requests a second are Chat-v0's 4.5 a unit of speed.
"""

DISAGGREGATED: Final = TaskConfig(
    name="servegym/Disaggregated-v0",
    cluster=ClusterConfig(
        replicas=4,
        clients=128,
        kv_capacity_tokens=MEMORY_7B,
        kv_block_tokens=16,
        watermark=0.01,
        chunk_tokens=2048,
        max_prefill_tokens=4096,
        router="least-tokens",
        kv_bytes_per_token=KV_7B,
        link="rdma8",
        replica=tuple(
            ReplicaConfig(role=role) for role in ("prefill", "prefill", "decode", "decode")
        ),
    ),
    cost=cost_preset("llama2-7b-a100x1").costs,
    workload=WorkloadConfig(
        source="azure-conv", requests=2000, arrivals=Arrivals("gamma", rate_per_s=15.0)
    ),
    process=ProcessConfig(observe=("replica", "memory", "cluster", "latency"), reward="goodput"),
    slo=SloConfig(ttft_s=1.0, tpot_s=0.04),
)
"""Two replicas read prompts, two decode; keys and values go over Mooncake's measured network (``rdma8``).

Chat-v0's card. A prompt takes 0.08 s on average: at 15 a second prefill replicas are busy 0.6 of the time.
The limit of time per token is two fifths of Chat-v0's: steady rounds are what disaggregation is for.
"""

ROLLOUT: Final = TaskConfig(
    name="servegym/Rollout-v0",
    cluster=ClusterConfig(
        replicas=4,
        clients=128,
        kv_capacity_tokens=MEMORY_8B,
        kv_block_tokens=16,
        watermark=0.01,
        chunk_tokens=8192,
        max_prefill_tokens=16_384,
        kv_bytes_per_token=KV_8B,
        link="nvlink",
    ),
    cost=cost_preset("llama3-8b-a100x1").costs,
    workload=WorkloadConfig(source="servegen-deepseek-r1", requests=2048),
    information=InformationConfig(output_lengths="predicted", kendall_tau=0.55),
    process=ProcessConfig(steals=("waiting", "running"), observe=("replica", "memory", "cluster")),
)
"""Rollouts of reinforcement learning: all prompts at t = 0, the update waits for the last answer.

2048 answers of a reasoning model, 1527 tokens on average and up to 32,768, on four cards with 512 clients.
Who has room may steal what waits and what runs, over NVLink. 8192 tokens a pass are vLLM's default. No load
is stated: nothing arrives later.
"""

SERVED: Final = (CHAT, ELASTIC, CLUSTER, DISAGGREGATED, ROLLOUT)
