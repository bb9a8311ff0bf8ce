"""The compiled cluster equals the slow reference; the environment equals the compiled loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servegym.baselines import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import TASKS, Requests, ServingEnv, make_requests
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.sections import WorkloadConfig
from servegym.envs.vocabulary import ROUTERS
from tests.against_cluster import cluster_task, compare_cluster, with_draws
from tests.cluster_helpers import assert_empty, shared_case
from tests.helpers import changed, random_legal_action, refused
from tests.random_clusters import ClusterCase, in_step, random_case

pytestmark = pytest.mark.filterwarnings("ignore:decode table ends at batch")


def case_of(seed: int) -> ClusterCase:
    """A random case of what the core has: no padded budget, no memory reserved for whole prompts."""
    case = random_case(np.random.default_rng(seed), dyadic=bool(seed % 2), moving=False)
    return with_draws(ClusterCase(case.requests, replace(case.spec, padded=False, reserve="chunk")))


def posed(case: ClusterCase) -> tuple[TaskConfig, Requests]:
    arrivals, prompts, outputs = (np.array(column) for column in zip(*case.requests, strict=True))
    return cluster_task(case.spec), make_requests(prompts, outputs, arrivals)


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_the_compiled_core_equals_the_reference(first: int) -> None:
    for seed in range(first, first + 50):
        compare_cluster(case_of(seed))


def test_what_happens_together_happens_in_the_order_of_the_reference() -> None:
    for seed in (
        *range(40),
        306,
        403,
        587,
    ):  # the last three: a pool that changes within an instant
        rng = np.random.default_rng([78, seed])
        case = shared_case(rng, dyadic=True, moving=bool(seed % 2), routers=["pool", "random"])
        compare_cluster(in_step(rng, case))


@pytest.mark.parametrize("seed", range(60))
def test_any_legal_actions_serve_everybody(seed: int) -> None:
    """Nothing is lost under any rule; the return is the gap, and memory is empty at the end."""
    task, requests = posed(case_of(seed))
    rng = np.random.default_rng(seed)
    env = ServingEnv(changed(task, process={"decisions": str(rng.choice(["events", "rounds"]))}))
    env.reset(options={"requests": requests})
    state = env.state
    assert state is not None
    total, over, clock_s, steps = 0.0, False, 0.0, 0
    while not over and steps < 20_000:
        assert float(state.episodes[0].now_s) >= clock_s
        clock_s = float(state.episodes[0].now_s)
        assert (state.replicas[0].used_blocks <= state.machines.blocks).all()
        _, reward, over, _, info = env.step(np.int64(random_legal_action(env, rng)))
        assert not info["illegal_action"]
        total += float(reward)
        steps += 1
    assert over
    log, metrics = env.records(), env.metrics()
    assert np.isfinite(log.finished_s[~log.rejected]).all()
    assert_empty(state)
    assert int(state.episodes[0].served_rounds) == int(log.decode_rounds[~log.rejected].sum())
    if not log.rejected.all():
        assert total == pytest.approx(-100 * metrics["gap"], rel=1e-9, abs=1e-9)
        assert metrics["gap"] > -1e-9


@pytest.mark.parametrize("seed", range(40))
def test_the_environment_equals_the_compiled_loop(seed: int) -> None:
    task, requests = posed(case_of(seed))
    name = "vllm" if task.cluster.chunk_tokens > 0 else "fcfs"
    policy = make_trigger_policy(name)
    case = bound_case(lower(task), requests)
    compiled = play_compiled(task, policy, case)
    row = play(task, name, policy, case, seed=0).row
    for metric, value in compiled.items():
        if metric != "decisions":  # compiled code counts those where the rule has a choice
            assert row[metric] == value or np.isnan(value), metric


def test_equal_replicas_in_turn_are_as_many_machines() -> None:
    """Every third request on a machine of its own: the same times to the last bit."""
    task = TaskConfig("one", workload=WorkloadConfig("tiny", requests=1))
    three = with_overrides(task, {"cluster": {"replicas": 3, "clients": 4}})
    one = with_overrides(task, {"cluster": {"clients": 4}})
    rng = np.random.default_rng(0)
    columns = rng.integers(1, 30, 60), rng.integers(1, 50, 60), np.sort(rng.uniform(0, 40, 60))
    whole = play_records(three, make_requests(*columns))
    for r in range(3):
        alone = play_records(one, make_requests(*(column[r::3] for column in columns)))
        assert np.array_equal(whole.finished_s[r::3], alone.finished_s)
        assert np.array_equal(whole.client[r::3], alone.client)


def play_records(task: TaskConfig, requests: Requests) -> EpisodeLog:
    case = bound_case(lower(task), requests)
    return play(task, "fcfs", make_trigger_policy("fcfs"), case, seed=0).records


@pytest.mark.parametrize("seed", range(6))
def test_blocks_without_a_limit_and_one_replica_change_nothing(seed: int) -> None:
    task = TaskConfig("tiny", workload=WorkloadConfig("tiny", requests=30))
    blocks = {"kv_block_tokens": 16, "watermark": 0.5, "preempt": "fewest-output"}
    same: list[dict[str, dict[str, Any]]] = [
        {"cluster": blocks},
        {"cluster": {"router": "pool"}},
        {"cluster": {"router": "llumnix", "staleness_s": 3.0}},
        {"cluster": {"kv_capacity_tokens": 10**9, "kv_block_tokens": 16}},
    ]
    policy = make_trigger_policy("hybrid")
    case = make_case(task, seed)
    usual = play(task, "hybrid", policy, case, seed).records
    for sections in same:
        log = play(with_overrides(task, sections), "hybrid", policy, case, seed).records
        assert np.array_equal(log.finished_s, usual.finished_s), sections


def test_a_policy_of_mixed_stages_wants_a_budget() -> None:
    task = TaskConfig("tiny", workload=WorkloadConfig("tiny", requests=3))
    policy = make_trigger_policy("vllm")
    refused(lambda: play(task, "vllm", policy, make_case(task, 0), 0), "cluster.chunk_tokens")
    chunked = with_overrides(task, {"cluster": {"chunk_tokens": 64}})
    assert play(chunked, "vllm", policy, make_case(chunked, 0), 0).row["gap"] >= 0


def test_plans_cover_the_clients_of_all_replicas() -> None:
    task = TaskConfig("tiny", workload=WorkloadConfig("tiny", requests=40))
    task = with_overrides(task, {"cluster": {"replicas": 3, "clients": 4, "router": "plan"}})
    log = play(task, "offline", make_trigger_policy("offline"), make_case(task, 0), 0).records
    held = {(int(r), int(c)) for r, c in zip(log.replica, log.client, strict=True)}
    assert len(held) == 12
    for router in ("pool", "round-robin"):
        other = with_overrides(task, {"cluster": {"router": router}})
        row = play(other, "hybrid", make_trigger_policy("hybrid"), make_case(other, 0), 0).row
        assert row["gap"] >= 0


def test_a_rollout_plays_several_replicas() -> None:
    task = TaskConfig("tiny", workload=WorkloadConfig("tiny", requests=12))
    task = with_overrides(task, {"cluster": {"replicas": 2, "clients": 3}})
    policy = make_policy("rollout")
    assert play(task, "rollout", policy, make_case(task, 0), 0).row["gap"] >= 0
    unknown = with_overrides(task, {"information": {"output_lengths": "unknown"}})
    assert play(unknown, "rollout", policy, make_case(unknown, 0), 0).row["gap"] >= 0


@pytest.mark.parametrize("name", ["fcfs", "offline", "offline-steal", "round-robin"])
def test_a_pool_is_played_alike_in_python_and_compiled(name: str) -> None:
    """A replica whose clients have no planned request waits while others are busy."""
    cluster = {"replicas": 3, "clients": 4, "router": "pool"}
    task = with_overrides(TaskConfig("pool"), {"cluster": cluster, "workload": {"requests": 60}})
    for seed in range(3):
        case = make_case(task, seed)
        played = play(task, name, make_policy(name), case, seed=0).row
        compiled = play_compiled(task, make_trigger_policy(name), case)
        assert played["makespan_s"] == compiled["makespan_s"]
        assert played["prefill_stages"] == compiled["prefill_stages"]


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "pool"])
def test_a_small_replica_beside_one_without_a_limit_is_passed_over(router: str) -> None:
    """The first holds 8 tokens, each request 12: all go to the second."""
    replicas: tuple[dict[str, int], ...] = ({"kv_capacity_tokens": 8}, {})
    task = changed(
        TASKS["servegym/Tiny-v0"], cluster={"replicas": 2, "router": router, "replica": replicas}
    )
    case = bound_case(lower(task), make_requests([10, 10, 10], [2, 2, 2]))
    episode = play(task, "fcfs", make_policy("fcfs"), case, seed=0)
    assert episode.records.replica.tolist() == [1, 1, 1]
