"""SGLang's rule in the core: the reference, small cases by hand, progress; and Orca's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servegym.baselines.registry import make_policy
from servegym.envs import ServingEnv, TaskConfig, make_requests, play
from servegym.envs.playing.evaluation import Episode
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import with_overrides
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.sections import InformationConfig
from servegym.envs.vocabulary import ADMISSION_RULES, VICTIMS
from tests.against_cluster import cluster_task, compare_cluster
from tests.cluster_helpers import requests_of, shared_case, task_of
from tests.helpers import UNIT_COSTS, instance, refused
from tests.random_clusters import ClusterCase
from tests.test_aisimulate import cluster_case, golden_cases
from tests.test_cluster_recount import watched

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]


def case_of(seed: int) -> ClusterCase:
    return shared_case(np.random.default_rng([seed, 77]), dyadic=bool(seed % 2), sglang=True)


def played(task: TaskConfig, name: str, requests: Any) -> Episode:
    return play(task, name, make_policy(name), bound_case(lower(task), requests), seed=0)


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_the_compiled_core_equals_the_reference(first: int) -> None:
    for seed in range(first, first + 25):
        compare_cluster(case_of(seed))


def test_a_router_sees_a_half_computed_prompt_while_others_decode() -> None:
    """Here a request is routed while a prompt waits for memory to go on."""
    compare_cluster(case_of(887))


def test_the_policy_is_the_guard() -> None:
    """What the task says of guard, victim and share does not matter."""
    for case in golden_cases("sglang")[:20]:
        posed = cluster_case(case, "sglang")
        task = with_overrides(
            cluster_task(posed.spec),
            {"cluster": {"admission_guard": "peak", "preempt": "newest", "conservativeness": 7}},
        )
        rows = np.argsort([arrival for arrival, _, _ in posed.requests], kind="stable")
        log = played(task, "sglang", requests_of(posed)).records
        assert log.finished_s == pytest.approx([case["answers"][row][2] for row in rows], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "admitted_s"),
    [("sglang", 2.0), ("sglang-1.3", 21.0), ("sglang(conservativeness=0)", 2.0)],
)
def test_what_is_kept_for_outputs_to_come(name: str, admitted_s: float) -> None:
    """30 tokens. At 0 s the first holds 4 and counts with all its 20: the second, of 10, must wait.

    At 2 s it has emitted one: 25 are free, less a share of 19. Of 0.7 that leaves 11.7; of 0.91 it
    leaves 7.7, and no more until it finishes, for it takes a token a round.
    """
    task = TaskConfig("two", ClusterConfig(clients=2, kv_capacity_tokens=30), UNIT_COSTS)
    log = played(task, name, instance((4, 20), (4, 6))).records
    assert log.admitted_s.tolist() == [0.0, admitted_s]


def test_a_prompt_goes_on_in_pieces_when_it_fits() -> None:
    """A budget of 8: 5 + 3 of 11, then 8. Two are served at a time, so the last waits until 5 s."""
    cluster = ClusterConfig(clients=2, kv_capacity_tokens=100, chunk_tokens=8)
    task = TaskConfig("pieces", cluster, UNIT_COSTS)
    log = played(task, "sglang", instance((5, 3), (11, 2), (4, 1))).records
    assert log.admitted_s.tolist() == [0.0, 0.0, 5.0]
    assert log.first_token_s.tolist() == [2.0, 4.0, 7.0]


def test_without_a_limit_of_memory_it_is_first_come_first_served() -> None:
    task = TaskConfig("free", ClusterConfig(clients=3, max_prefill_tokens=40), UNIT_COSTS)
    rng = np.random.default_rng(0)
    arrivals = np.sort(rng.integers(0, 60, 40)).astype(float)
    requests = make_requests(rng.integers(1, 30, 40), rng.integers(1, 30, 40), arrivals)
    for overrides in ({}, {"replicas": 2, "router": "pool"}):
        posed = with_overrides(task, {"cluster": overrides})
        usual = played(posed, "fcfs", requests).records
        for name, values in vars(played(posed, "sglang", requests).records).items():
            assert np.array_equal(values, getattr(usual, name), equal_nan=True), name


@pytest.mark.parametrize("chunk", [0, 1, 5, 32])
@pytest.mark.parametrize("preempt", VICTIMS)
def test_progress_never_stops(chunk: int, preempt: str) -> None:
    """Memory of the largest request alone: whoever would wait for ever is admitted where nobody runs."""
    rng = np.random.default_rng(chunk)
    for block in (1, 3, 16):
        rows = [(int(p), int(o), float(a)) for p, o, a in rng.integers(1, 30, (20, 3))]
        largest = max(-(-(prompt + output) // block) for prompt, output, _ in rows)
        cluster = ClusterConfig(
            int(rng.integers(1, 3)),
            8,
            kv_capacity_tokens=(largest + int(rng.integers(2))) * block,
            kv_block_tokens=block,
            watermark=float(rng.choice([0.0, 0.5, 0.99])),
            preempt=preempt,
            chunk_tokens=chunk,
            admission_guard="sglang",
        )
        row = played(TaskConfig("tight", cluster, UNIT_COSTS), "fcfs", instance(*rows)).row
        assert (row["rejected"], row["unfinished_requests"]) == (0, 0)
        assert row["gap"] >= 0


@pytest.mark.parametrize("seed", range(30))
def test_any_actions_under_the_guard(seed: int) -> None:
    """Mixed stages and every rule, lengths known or not: all sums are right and all is served."""
    case, rng = case_of(seed), np.random.default_rng(seed)
    task = task_of(
        case.spec, mixed_rules=ADMISSION_RULES, decisions=str(rng.choice(["events", "rounds"]))
    )
    requests = requests_of(case)
    if seed % 3 == 0:
        expected = np.maximum(requests.output_tokens // rng.integers(1, 4, len(requests)), 1)
        spread = np.full(len(requests), rng.choice([0.0, 0.3, 1.5]))
        requests = make_requests(
            requests.prompt_tokens, requests.output_tokens, requests.arrival_s, expected, spread
        )
        task = replace(task, information=InformationConfig(output_lengths="predicted"))
    env = ServingEnv(task)
    env.reset(options={"requests": requests})
    watched(env, rng)
    log = env.records()
    assert np.isfinite(log.finished_s[~log.rejected]).all()


def test_a_wrong_share() -> None:
    refused(lambda: make_policy("sglang-101"), "c must lie in 0 … 100")
    assert make_policy("sglang-0.3").cluster["conservativeness"] == 0.3


# ---- Orca -----------------------------------------------------------------------------------


def test_orca_cuts_no_prompt_and_keeps_memory_for_whole_outputs() -> None:
    rng = np.random.default_rng(3)
    for _ in range(12):
        case = shared_case(rng, dyadic=True, chunked=True, rejections=False)
        task = task_of(replace(case.spec, admission_guard="none"))
        requests = requests_of(case)
        orca = played(task, "orca", requests)
        assert orca.row["preemptions"] == 0
        assert orca.row["gap"] >= 0
        usual = with_overrides(
            task, {"cluster": {"chunk_tokens": 100_000, "admission_guard": "full"}}
        )
        for name, values in vars(played(usual, "vllm", requests).records).items():
            assert np.array_equal(values, getattr(orca.records, name), equal_nan=True), name


def test_orca_wants_mixed_stages() -> None:
    task = TaskConfig("two", ClusterConfig(clients=2), UNIT_COSTS)
    refused(lambda: played(task, "orca", instance((4, 20))), "cluster.chunk_tokens is 0")
