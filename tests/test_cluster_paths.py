"""Clusters that must play the same episode, and many environments that must play each their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servegym.envs import Requests, ServingEnv, ServingVectorEnv, make_requests
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.sections import WorkloadConfig
from tests.cluster_helpers import play_eagerly, requests_of, shared_case, task_of
from tests.helpers import random_costs, random_requests
from tests.random_clusters import ClusterCase
from tests.reference_cluster import ClusterSpec, ReplicaSpec
from tests.reference_simulator import make_reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]

PREFILL, MIXED = "prefill:fcfs", "mixed:fcfs"
LOADED = ["least-requests", "least-waiting", "least-tokens", "vllm-dp", "llumnix", "dynamo"]


def logged(task: TaskConfig, requests: Requests, action: str | None = None) -> EpisodeLog:
    """The episode of the eager first-come rule."""
    env = ServingEnv(task)
    env.reset(options={"requests": requests})
    play_eagerly(env, action or (MIXED if task.cluster.chunk_tokens else PREFILL))
    return env.records()


def assert_same(first: EpisodeLog, second: EpisodeLog, *but: str) -> None:
    """To the last bit."""
    for name, values in vars(first).items():
        if name not in but:
            assert np.array_equal(values, getattr(second, name), equal_nan=True), name


def limited(rng: np.random.Generator, **keys: Any) -> ClusterCase:
    """A case whose replicas all have a limit of memory and room for every request."""
    case = shared_case(rng, dyadic=True, routers=["llumnix"], rejections=False)
    return ClusterCase(case.requests, replace(case.spec, staleness_s=0.0, **keys))


@pytest.mark.parametrize("router", LOADED)
def test_what_is_older_than_no_time_is_fresh(router: str) -> None:
    """An age below the least time between two arrivals is the same as none at all."""
    rng = np.random.default_rng(1)
    for _ in range(6):
        case = limited(rng, router=router)
        spread = requests_of(case)
        arrivals = np.arange(1, len(spread) + 1) * 0.5
        requests = make_requests(spread.prompt_tokens, spread.output_tokens, arrivals)
        fresh = logged(task_of(case.spec), requests)
        assert_same(fresh, logged(task_of(replace(case.spec, staleness_s=0.25)), requests))


@pytest.mark.parametrize("router", [*LOADED, "random", "plan", "pool"])
def test_every_router_is_the_same_on_one_replica(router: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(6):
        case = limited(rng, router="round-robin")
        task = task_of(replace(case.spec, replicas=case.spec.replicas[:1]))
        requests = requests_of(case)
        routed = replace(task, cluster=replace(task.cluster, router=router, staleness_s=2.0))
        assert_same(logged(task, requests), logged(routed, requests))


@pytest.mark.parametrize("block", [1, 7, 16])
def test_one_replica_without_limits_is_the_reference_of_one_machine(block: int) -> None:
    """The reference that is older than clusters, under prefills in order of arrival."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        requests = random_requests(rng, 30, dyadic=True)
        clients, budget = int(rng.integers(1, 8)), int(rng.choice([0, 1, 30]))
        costs = random_costs(rng, clients, dyadic=True)
        cluster = ClusterConfig(
            clients=clients, max_prefill_tokens=budget, kv_block_tokens=block, watermark=0.5
        )
        log = logged(TaskConfig("one", cluster=cluster, cost=costs), requests)
        reference = make_reference(requests, clients, costs, None, ("fcfs",), budget)
        while not reference.finished():
            legal = reference.legal_actions()
            reference.step(1 if legal[1] else 0)
        for name in ("admitted_s", "first_token_s", "finished_s", "client"):
            theirs = [getattr(request, name) for request in reference.requests]
            assert getattr(log, name).tolist() == theirs, name


@pytest.mark.parametrize("chunked", [False, True])
def test_requests_in_turn_are_as_many_machines(*, chunked: bool) -> None:
    """R equal replicas, each with memory of its own: R episodes of every R-th request."""
    rng = np.random.default_rng(4)
    for _ in range(10):
        case = limited(rng, router="round-robin", chunk_tokens=8 if chunked else 0)
        count = int(rng.integers(2, 5))
        spec = replace(case.spec, replicas=case.spec.replicas[:1] * count)
        requests = requests_of(case)
        whole = logged(task_of(spec), requests)
        for r in range(min(count, len(requests))):
            mine = part(requests, r, count)
            alone = logged(task_of(replace(spec, replicas=spec.replicas[:1])), mine)
            for name, values in vars(alone).items():
                if name != "replica":
                    theirs = getattr(whole, name)[r::count]
                    assert np.array_equal(values, theirs, equal_nan=True), name


def part(requests: Requests, first: int, step: int) -> Requests:
    """Every `step`-th request from the first on."""
    rows = slice(first, None, step)
    columns = (requests.prompt_tokens, requests.output_tokens, requests.arrival_s)
    return make_requests(*(column[rows] for column in columns))


def test_a_pass_without_a_budget_never_cuts_a_prompt() -> None:
    """Orca: any budget above all tokens is the same, and every prompt is computed in one pass."""
    rng = np.random.default_rng(5)
    for _ in range(12):
        case = limited(rng, preempt="newest")
        requests = requests_of(case)
        most = int(requests.prompt_tokens.sum() + requests.output_tokens.sum()) + len(requests)
        orca = logged(task_of(replace(case.spec, chunk_tokens=10**9)), requests)
        assert_same(orca, logged(task_of(replace(case.spec, chunk_tokens=most)), requests))
    # Nobody runs yet when the first are admitted: a pass of prompts alone costs a prefill stage.
    spec = ClusterSpec((ReplicaSpec(4),), case.spec.costs, chunk_tokens=10**9)
    rows = ClusterCase([(0.0, 50, 1)] * 4, spec)
    chunks = logged(task_of(spec), requests_of(rows))
    stages = logged(task_of(replace(spec, chunk_tokens=0)), requests_of(rows))
    assert_same(chunks, stages)


def test_one_pool_without_load_is_the_lowest_idle_replica() -> None:
    """One client each and no memory limit: whoever falls idle takes the head of the queue."""
    spec = limited(np.random.default_rng(6)).spec
    spec = replace(spec, replicas=(ReplicaSpec(1),) * 3, router="pool", chunk_tokens=0)
    rows = ClusterCase([(0.0, 4, 1 + k % 3) for k in range(12)], spec)
    log = logged(task_of(spec), requests_of(rows))
    assert log.replica[:3].tolist() == [0, 1, 2]
    assert (np.diff(log.admitted_s) >= 0).all()
    ends = [log.finished_s[log.replica == r].max() for r in range(3)]
    longest = max(log.finished_s - log.admitted_s)
    assert max(ends) - min(ends) <= longest


# ---- the vector environment ------------------------------------------------------------------

CLUSTERS: dict[str, dict[str, Any]] = {
    "replicas": {"replicas": 3, "router": "least-requests"},
    "pool": {"replicas": 2, "router": "pool"},
    "memory": {"replicas": 2, "kv_capacity_tokens": 512, "kv_block_tokens": 16},
    "chunks": {"replicas": 2, "chunk_tokens": 32, "kv_capacity_tokens": 600, "router": "dynamo"},
}


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_single_environments(name: str, threads: int) -> None:
    workload = WorkloadConfig("tiny", requests=24, arrival_rate_per_s=2.0)
    cluster = ClusterConfig(clients=3, **CLUSTERS[name])
    task = TaskConfig("rows", cluster=cluster, workload=workload)
    rows = 3
    vector = ServingVectorEnv(rows, task, threads=threads)
    singles = [ServingEnv(task) for _ in range(rows)]
    observations, _ = vector.reset(seed=7)
    for e, env in enumerate(singles):
        assert env.reset(seed=7 + e)[0].tobytes() == observations[e].tobytes()
    rng = np.random.default_rng(0)
    ended = 0
    while ended < 2 * rows:
        masks = vector.action_masks()
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        observations, rewards, terminated, truncated, infos = vector.step(actions)
        for e, env in enumerate(singles):
            assert env.action_masks().tolist() == masks[e].tolist()
            seen, reward, over, cut, info = env.step(actions[e])
            assert (rewards[e], terminated[e], truncated[e]) == (reward, over, cut)
            if over:
                ended += 1
                for metric in ("makespan_s", "gap", "preemptions", "mixed_stages", "decode_rounds"):
                    assert infos["final_info"][metric][e] == info[metric]
                assert infos["final_obs"][e].tobytes() == seen.tobytes()
                seen, _ = env.reset()
            assert observations[e].tobytes() == seen.tobytes()
