"""The simulator is the queues that are known exactly; laws that hold whatever the policy.

`scripts/check_queueing.py` serves 25 times as many requests: results/checks/queueing.md.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.task.cluster import ClusterConfig, ReplicaConfig
from servegym.envs.task.config import TaskConfig
from servegym.studies.checks import exact_queues as exact
from servegym.studies.checks.capacities import CAPACITIES
from servegym.studies.checks.queueing import QUEUES, batch_means
from servegym.studies.serving import Served, serve

Array = NDArray[np.float64]
Tokens = NDArray[np.int64]

REQUESTS = 30_000
TICK_S = 2.0**-10


# ---- the formulas ----------------------------------------------------------------------------


def test_formulas_give_published_values() -> None:
    """Values that were computed elsewhere, from chains of their own."""
    lognormal = exact.lognormal_square(1.0, 0.5452)
    assert exact.one_server_wait(0.7, 1.0, lognormal) == pytest.approx(1.513450, abs=1e-6)
    assert exact.erlang_wait(4, 0.8) == pytest.approx((0.59643247, 0.74554059), abs=1e-8)
    assert exact.erlang_wait(16, 0.9) == pytest.approx((0.59134339, 0.36958962), abs=1e-8)
    assert exact.erlang_wait(200, 0.95) == pytest.approx((0.36526386, 0.03652639), abs=1e-8)
    assert exact.fixed_service_wait(4, 0.8) == pytest.approx(0.38609493, abs=1e-8)
    assert exact.rounds_in_system(8, 0.7, 0.1) == pytest.approx(16.037205, abs=1e-6)


@pytest.mark.parametrize(
    ("rate", "base", "each", "sojourn"),
    [(1.0, 1.0, 0.0, 1.365529), (8.0, 1.0, 0.1, 7.888889), (0.5, 1.0, 0.5, 2.316876)],
)
def test_sojourn_of_static_batches(rate: float, base: float, each: float, sojourn: float) -> None:
    """Also below a bound that is known in closed form, but for the chain's own error."""
    found, _ = exact.take_all(rate, base, each)
    assert found == pytest.approx(sojourn, abs=1e-6)
    assert found <= exact.take_all_bound(rate, base, each) + 1e-9


# ---- mean waits ------------------------------------------------------------------------------


TESTED = [
    place
    for place, queue in enumerate(QUEUES)
    if "/16" not in queue.name and "λ = 5" not in queue.name and "λ = 2" not in queue.name
]
"""The others differ in numbers only; the page has them."""


@pytest.mark.parametrize("place", TESTED, ids=[QUEUES[place].name for place in TESTED])
def test_mean_wait(place: int) -> None:
    """Within twice the 95 % interval: the seeds are fixed."""
    for measured in QUEUES[place].play(REQUESTS, np.random.default_rng([2, place])):
        mean, half = batch_means(measured.values)
        assert abs(mean - measured.exact) <= 2.0 * half, measured.name
        assert half <= 0.25 * measured.exact, measured.name


# ---- what a replica can bear -----------------------------------------------------------------


@pytest.mark.parametrize("place", range(len(CAPACITIES)), ids=[c.name for c in CAPACITIES])
def test_rate_that_a_replica_can_bear(place: int) -> None:
    capacity, rng = CAPACITIES[place], np.random.default_rng([3, place])
    assert capacity.saturated(20_000, rng) == pytest.approx(1.0, abs=0.03)
    below, _ = capacity.left_over(0.95, 40_000, rng)
    above, growth = capacity.left_over(1.05, 40_000, rng)
    assert below < 0.01
    assert 0.03 < above < 0.08
    assert 0.03 < growth < 0.07


def test_mixed_passes_bear_what_prefilling_first_cannot() -> None:
    """The same requests, passes of the same size and time."""
    mixed, either_or = CAPACITIES[0], CAPACITIES[2]
    assert either_or.rate < 0.65 * mixed.rate
    load = 0.95 * mixed.rate / either_or.rate
    rng = np.random.default_rng(4)
    left, _ = either_or.left_over(load, 40_000, rng)
    assert left == pytest.approx(1.0 - 1.0 / load, abs=0.02)


# ---- laws ------------------------------------------------------------------------------------


@cache
def lengths(n: int) -> tuple[Tokens, Tokens, Array]:
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(0.05, n))
    return rng.integers(1, 60, n), rng.integers(1, 80, n), arrivals


def served(policy: str = "fcfs", arrive: bool = True, **cluster: Any) -> Served:
    """Rounds that cost by the cached token and next to nothing besides."""
    costs = StageCosts(AffineDecode(2.0**-20, 0.0, 2.0**-10), AffinePrefill(0.0, 2.0**-12))
    task = TaskConfig("law", replace(ClusterConfig(clients=8), **cluster), costs)
    prompts, outputs, arrivals = lengths(600)
    return serve(task, policy, prompts, outputs, arrivals if arrive else None)


def tokens_to_read() -> int:
    """Cached tokens that all decode rounds of the requests read: p + k at the round after token k."""
    prompts, outputs, _ = lengths(600)
    return int(((outputs - 1) * prompts + outputs * (outputs - 1) // 2).sum())


def tokens_read(episode: Served) -> float:
    """What the rounds of an episode whose requests are all present at the start have read.

    A replica then never idles before its last finish: what is not prefill is decode rounds.
    """
    log, replicas = episode.log, episode.replicas
    ends = [log.finished_s[log.replica == r].max() for r in range(len(replicas))]
    seconds = sum(ends) - float(replicas.prefill_s.sum()) - float(replicas.rounds.sum()) * 2.0**-20
    return float(seconds) * 2.0**10


@pytest.mark.parametrize("policy", ["fcfs", "hybrid", "threshold-5", "lpt", "aligned"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_cached_tokens_read_do_not_depend_on_the_schedule(policy: str, replicas: int) -> None:
    episode = served(policy, arrive=False, replicas=replicas)
    assert tokens_read(episode) == pytest.approx(tokens_to_read(), rel=1e-9)


@pytest.mark.parametrize("victim", ["newest", "least-computed", "fewest-output"])
def test_what_is_computed_again_is_read_once_less(victim: str) -> None:
    """The prefill of p + k tokens after a preemption emits the token whose round would have read them."""
    episode = served(arrive=False, kv_capacity_tokens=400, preempt=victim)
    assert episode.preemptions > 20
    assert np.isfinite(episode.log.finished_s).all()
    read = tokens_to_read() - episode.recomputed_tokens
    assert tokens_read(episode) == pytest.approx(read, rel=1e-9)


@pytest.mark.parametrize(
    "cluster",
    [
        {},
        {"replicas": 3, "router": "least-requests"},
        {"replicas": 3, "router": "pool"},
        {"kv_capacity_tokens": 400},
        {"chunk_tokens": 32, "kv_capacity_tokens": 400},
    ],
)
def test_littles_law(cluster: dict[str, Any]) -> None:
    """∫ requests in system dt, which the simulator counts as it goes, is the sum of their times."""
    episode = served("vllm" if "chunk_tokens" in cluster else "fcfs", **cluster)
    total = float((episode.log.finished_s - episode.log.arrival_s).sum())
    assert episode.in_system_s == pytest.approx(total, rel=1e-9)


def test_each_replica_works_as_long_as_its_requests_take() -> None:
    """Little's law of the servers themselves, faster ones too: busy seconds are the sum of services."""
    n, rng = 3000, np.random.default_rng(6)
    machines = (ReplicaConfig(speed=1.0), ReplicaConfig(speed=2.0), ReplicaConfig(speed=4.0))
    cluster = ClusterConfig(clients=1, replicas=3, router="pool", replica=machines)
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(0.0, TICK_S))
    prompts = rng.integers(1, 3000, n)
    arrivals = np.cumsum(rng.exponential(0.3, n))
    episode = serve(TaskConfig("busy", cluster, costs), "fcfs", prompts, np.ones(n, int), arrivals)
    for r, machine in enumerate(machines):
        mine = episode.log.replica == r
        expected = float(prompts[mine].sum()) * TICK_S / machine.speed
        assert episode.replicas.prefill_s[r] == pytest.approx(expected, rel=1e-9)
        held = (episode.log.finished_s - episode.log.admitted_s)[mine].sum()
        assert held == pytest.approx(expected, rel=1e-9)


def test_no_schedule_is_shorter_than_its_memory_allows() -> None:
    """Rounds ≥ Σ token-rounds / memory, where nobody is computed twice."""
    n, memory = 300, 500
    prompts, outputs, _ = lengths(n)
    for policy in ("fcfs", "lpt", "hybrid"):
        cluster = ClusterConfig(clients=64, kv_capacity_tokens=memory, admission_guard="full")
        costs = StageCosts(AffineDecode(1.0), AffinePrefill(2.0**-30, 0.0))
        episode = serve(TaskConfig("area", cluster, costs), policy, prompts, outputs)
        assert episode.preemptions == 0
        # A round's cache: prompt and all tokens emitted, the one that it emits not yet among them.
        area = int(((outputs - 1) * prompts + outputs * (outputs - 1) // 2).sum())
        assert int(episode.replicas.rounds.sum()) >= area / memory


def flow_on_one_fast_server(rounds: Tokens, slots: Array, speed: int) -> float:
    """Least total time in system on one server that does so many rounds a slot: shortest left first."""
    left, total, now, i = list[float](), 0.0, 0.0, 0
    while i < len(rounds) or left:
        if not left:
            now = max(now, float(slots[i]))
        while i < len(rounds) and slots[i] <= now:
            heapq.heappush(left, int(rounds[i]))
            total -= float(slots[i])
            i += 1
        until = float(slots[i]) if i < len(rounds) else np.inf
        work = heapq.heappop(left)
        done = now + work / speed
        if done <= until:
            now, total = done, total + done
        else:  # arrivals may be shorter than what is left
            rest = work - (until - now) * speed
            heapq.heappush(left, rest)
            now = until
    return total


@pytest.mark.parametrize("policy", ["fcfs", "lpt", "hybrid", "threshold-3"])
def test_total_time_in_system_is_above_that_of_one_fast_server(policy: str) -> None:
    """A server J times as fast can do in each round what the J clients do."""
    rng = np.random.default_rng(7)
    for _ in range(20):
        clients, n = int(rng.integers(1, 5)), int(rng.integers(1, 25))
        rounds = rng.integers(1, 20, n)
        slots = np.sort(rng.integers(0, 40, n)).astype(float)
        costs = StageCosts(AffineDecode(1.0), AffinePrefill(2.0**-30, 0.0))
        task = TaskConfig("flow", ClusterConfig(clients=clients), costs)
        episode = serve(task, policy, np.ones(n, int), rounds + 1, slots)
        flow = float((episode.log.finished_s - episode.log.arrival_s).sum())
        assert flow >= flow_on_one_fast_server(rounds, slots, clients) - 1e-6
