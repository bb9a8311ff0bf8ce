"""Figures that others have published of real engines, beside what the simulator makes of their workloads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.machine.presets import cost_preset
from servegym.envs.serving_env import ServingEnv
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.workload.requests import make_requests
from servegym.studies.serving import Served, serve

Array = NDArray[np.float64]
Tokens = NDArray[np.int64]

BLOCK: Final = 16

# ---- a watermark (vLLM, pull request 44594) ----------------------------------------------------

CONCURRENT: Final = 128
PROMPTS: Final = 450
MEMORY_TOKENS: Final = 299_584

GB200: Final = StageCosts(AffineDecode(3.74e-3, 1e-5, 5e-9), AffinePrefill(3.74e-3, 1e-5))
"""Guessed seconds of a 7B model: 10 µs a token, 5 ns a cached one; the base is fitted to the published
tokens per second at a watermark of 0.05, and to nothing else."""


@dataclass(frozen=True)
class Watermark:
    """One row of vLLM's table, theirs or ours."""

    watermark: float
    preemptions: float
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    gap_p99_ms: float
    e2e_p50_s: float


PUBLISHED_WATERMARKS: Final = (
    Watermark(0.0, 1065, 11582, 6.56, 25.51, 40.62, 51.6),
    Watermark(0.02, 400, 12134, 11.80, 26.49, 18.80, 48.4),
    Watermark(0.05, 187, 12167, 11.20, 28.94, 17.70, 47.9),
    Watermark(0.10, 168, 11835, 8.96, 31.02, 17.57, 48.6),
)


def watermark_requests(seed: int) -> tuple[Tokens, Tokens]:
    """Prompts of about 1000 and outputs of about 5000 tokens, each ± 20 %."""
    rng = np.random.default_rng(seed)
    return rng.integers(800, 1201, PROMPTS), rng.integers(4000, 6001, PROMPTS)


def watermark_task(watermark: float) -> TaskConfig:
    """Return the machine of that table; 128 clients stand for 128 concurrent users, see ``users_ask``."""
    cluster = ClusterConfig(
        clients=CONCURRENT,
        kv_capacity_tokens=MEMORY_TOKENS,
        kv_block_tokens=BLOCK,
        chunk_tokens=8192,
        watermark=watermark,
    )
    return TaskConfig("watermark", cluster, GB200)


def users_ask(served: Served) -> Array:
    """When each request would have arrived from users who ask again once they are answered.

    With all requests present and as many clients as users, a new one is admitted when one has finished and
    nobody waits who was preempted: just when it would be if it had come then, at the end of the queue.
    """
    finished = np.sort(served.log.finished_s)
    return np.concatenate([np.zeros(CONCURRENT), finished[: PROMPTS - CONCURRENT]])


def gap_p99_s(task: TaskConfig, prompts: Tokens, outputs: Tokens) -> float:
    """99th percentile of the seconds between two tokens of a request, over all tokens.

    From the passes: each request that decodes waits for as long as the pass takes. The waits of those who
    are preempted are left out, fewer than one token in a thousand. Of passes between two decisions the one
    that computes prompts takes what the others, which decode only, leave of the time.
    """
    env = ServingEnv(task)
    env.reset(options={"requests": make_requests(prompts, outputs)})
    state = env.state
    if state is None:
        raise AssertionError("reset makes the state")
    admit = task.actions.index("mixed:fcfs")
    episode, replica = state.episodes[0], state.replicas[0, 0]
    counters = [(episode, "now_s"), (episode, "served_rounds")]
    counters += [(replica, name) for name in ("rounds", "mixed_stages", "prefill_stages")]
    gaps, tokens = list[float](), list[float]()
    over, plain_s = False, 0.0
    while not over:
        before = [record[name] for record, name in counters]
        _, _, over, _, _ = env.step(admit if env.action_masks()[admit] else 0)
        took_s, emitted, passes, prompted, alone = (
            float(record[name] - value)
            for (record, name), value in zip(counters, before, strict=True)
        )
        if passes == 0 or alone > 0:
            continue  # nobody decodes, or not all the time: the first prompts
        decodes = passes - prompted
        if prompted == 0:
            plain_s = took_s / passes
        else:
            gaps.append((took_s - decodes * plain_s) / prompted)
            tokens.append(emitted * prompted / passes)
        gaps.append(plain_s)
        tokens.append(emitted * decodes / passes)
    order = np.argsort(gaps)
    reached = np.cumsum(np.array(tokens)[order])
    return float(np.array(gaps)[order][np.searchsorted(reached, 0.99 * reached[-1])])


def watermark_row(watermark: float, seed: int) -> Watermark:
    """Serve vLLM's workload."""
    task = watermark_task(watermark)
    prompts, outputs = watermark_requests(seed)
    served = serve(task, "vllm", prompts, outputs)
    asked = users_ask(served)
    ttft = served.log.first_token_s - asked
    return Watermark(
        watermark=watermark,
        preemptions=served.preemptions,
        tokens_per_s=float(outputs.sum()) / served.seconds,
        ttft_p50_s=float(np.median(ttft)),
        ttft_p99_s=float(np.percentile(ttft, 99)),
        gap_p99_ms=1e3 * gap_p99_s(task, prompts, outputs),
        e2e_p50_s=float(np.median(served.log.finished_s - asked)),
    )


# ---- the service rate of a memory (Nie, Si and Zhou, 2605.04595) --------------------------------


@dataclass(frozen=True)
class MemoryCase:
    """A replica that memory limits, not clients."""

    name: str
    task: TaskConfig
    prompts: tuple[int, int]
    """Least and most."""
    outputs: tuple[int, int]

    def requests(self, n: int, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        """Lengths, uniform."""
        (least, most), (short, long) = self.prompts, self.outputs
        return rng.integers(least, most + 1, n), rng.integers(short, long + 1, n)


def area(prompts: Tokens, outputs: Tokens, budget: int) -> Array:
    """Token-passes that each request holds: its prompt piece by piece, then all of it and its output."""
    pieces = -(-prompts // budget)
    whole = budget * pieces * (pieces - 1) // 2 + prompts
    return (whole + (outputs - 1) * prompts + outputs * (outputs - 1) // 2).astype(float)


def service_rate(case: MemoryCase, n: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return requests per second by the formula and as served, and the share that is computed again.

    The formula is μ = M / (b · E[g]): memory, mean seconds of a pass, mean token-passes of a request. All n
    requests are present; the rate is that of the middle ones.
    """
    prompts, outputs = case.requests(n, rng)
    served = serve(case.task, "vllm", prompts, outputs)
    finished = np.sort(served.log.finished_s)
    first, last = int(0.2 * n), int(0.8 * n)
    rate = (last - first) / (finished[last] - finished[first])
    pass_s = served.seconds / served.passes[0]
    cluster = case.task.cluster
    known = cluster.kv_capacity_tokens / (
        pass_s * area(prompts, outputs, cluster.chunk_tokens).mean()
    )
    again = served.recomputed_tokens / (served.recomputed_tokens + int((prompts + outputs).sum()))
    return float(known), float(rate), again


def memory_case(
    name: str,
    capacity: int,
    prompts: tuple[int, int],
    outputs: tuple[int, int],
    budget: int = 2048,
    watermark: float = 0.0,
) -> MemoryCase:
    """Give a replica under vLLM V1 more clients than memory has room for."""
    cluster = ClusterConfig(
        clients=1024,
        kv_capacity_tokens=capacity,
        kv_block_tokens=BLOCK,
        chunk_tokens=budget,
        watermark=watermark,
    )
    costs = cost_preset("llama3-8b-a100x1").costs
    return MemoryCase(name, TaskConfig("memory", cluster, costs), prompts, outputs)


MEMORY_CASES: Final[Sequence[MemoryCase]] = (
    memory_case("prompts 8 × outputs, long", 420_000, (2000, 14_000), (500, 1500)),
    memory_case("the same, watermark 0.02", 420_000, (2000, 14_000), (500, 1500), watermark=0.02),
    memory_case("the same, budget 8192", 420_000, (2000, 14_000), (500, 1500), budget=8192),
    memory_case("prompts 8 × outputs, short", 100_000, (400, 1200), (50, 150)),
    memory_case("outputs 3 × prompts", 40_000, (40, 200), (100, 600)),
    memory_case("the same, watermark 0.02", 40_000, (40, 200), (100, 600), watermark=0.02),
    memory_case("outputs 5 × prompts", MEMORY_TOKENS, (800, 1200), (4000, 6000), budget=8192),
)
"""The published figure is of the first kind, of eight replicas."""


# ---- what preemption computes again (vLLM, issue 54644) -----------------------------------------

TAX_REQUESTS: Final = 300
TAX_BLOCKS: Final = (2800, 1600, 800, 400)
PUBLISHED_TAX: Final = (0.0, 0.322, 0.579, 0.788)
PUBLISHED_SAVING: Final = (float("nan"), 0.59, 0.40, 0.43)


@dataclass(frozen=True)
class TaxCase:
    """Lengths that the issue leaves open: mean prompt and output, spread about them, and clients."""

    name: str
    prompt: int
    prompt_spread: float
    """Prompts are uniform from (1 − spread) to (1 + spread) times the mean."""
    output: int
    clients: int

    def requests(self, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        """Lengths; outputs are spread by half of their mean."""
        spread = self.prompt_spread
        prompts = np.rint(self.prompt * rng.uniform(1 - spread, 1 + spread, TAX_REQUESTS))
        outputs = np.rint(self.output * rng.uniform(0.5, 1.5, TAX_REQUESTS))
        return np.maximum(prompts, 1).astype(np.int64), np.maximum(outputs, 1).astype(np.int64)


TAX_CASES: Final[Sequence[TaxCase]] = (
    TaxCase("outputs long", 150, 0.9, 350, 72),
    TaxCase("prompts long", 300, 0.9, 128, 128),
)
"""Of 900 combinations that were tried the first is nearest to the published tax, as a share of what prefills
compute, and the second to the published saving."""


@dataclass(frozen=True)
class Tax:
    """What was computed again, and what was computed."""

    again: int
    prompts: int
    tokens: int
    """Of prompts and outputs."""
    preemptions: int

    @property
    def of_prefills(self) -> float:
        """Share of the tokens that prefills computed."""
        return self.again / (self.again + self.prompts)

    @property
    def of_all(self) -> float:
        """Share of all tokens that were computed."""
        return self.again / (self.again + self.tokens)


def recompute_tax(case: TaxCase, blocks: int, victim: str, seed: int) -> Tax:
    """Serve the requests under vLLM's rule with so little memory."""
    cluster = ClusterConfig(
        clients=case.clients,
        kv_capacity_tokens=BLOCK * blocks,
        kv_block_tokens=BLOCK,
        chunk_tokens=8192,
        preempt=victim,
    )
    prompts, outputs = case.requests(np.random.default_rng(seed))
    served = serve(TaskConfig("tax", cluster, GB200), "vllm", prompts, outputs)
    tokens = int((prompts + outputs).sum())
    return Tax(served.recomputed_tokens, int(prompts.sum()), tokens, served.preemptions)
