"""Caps on running clients and reserves of memory, chosen with each admission."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines import make_policy
from servegym.envs import ServingEnv, make_requests, play
from servegym.envs.playing.evaluation import make_case
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.sections import ProcessConfig, WorkloadConfig
from tests.helpers import UNIT_COSTS, refused

CLUSTER = ClusterConfig(clients=4, kv_capacity_tokens=100)
PROCESS = ProcessConfig(rules=("fcfs", "longest"), caps=(1.0, 0.3), reserves=(0.0, 0.5))
TASK = TaskConfig("limits", CLUSTER, UNIT_COSTS, process=PROCESS)


def started(task: TaskConfig, prompts: list[int], outputs: list[int]) -> ServingEnv:
    env = ServingEnv(task)
    env.reset(options={"requests": make_requests(prompts, outputs)})
    return env


def held(env: ServingEnv) -> int:
    assert env.state is not None
    return 4 - int(env.state.replicas[0, 0].idle)


def test_actions_name_their_limits() -> None:
    assert TASK.actions[:5] == (
        "decode",
        "prefill:fcfs",
        "prefill:fcfs:reserve=0.5",
        "prefill:fcfs:cap=0.3",
        "prefill:fcfs:cap=0.3:reserve=0.5",
    )
    assert len(TASK.actions) == 9
    mixed = with_overrides(TASK, {"cluster": {"chunk_tokens": 8}})
    assert mixed.actions[9:11] == ("mixed:fcfs", "mixed:fcfs:reserve=0.5")


def test_a_reset_in_mid_episode_forgets_who_was_admitted() -> None:
    """Two of four clients are used, memory runs short, and the newer of the two is preempted."""
    env = started(TASK, [5] * 4, [20] * 4)
    env.step(np.int64(TASK.actions.index("prefill:fcfs")))  # the newest is on the last client
    for each in (env, ServingEnv(TASK)):
        each.reset(options={"requests": make_requests([40, 45], [20, 20])})
        over = False
        while not over:
            over = each.step(np.int64(each.action_masks().argmax()))[2]
        assert each.records().preemptions.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("action", "requests"),
    [
        ("prefill:fcfs", 4),
        ("prefill:fcfs:cap=0.3", 2),  # ⌈0.3 · 4⌉
        ("prefill:fcfs:reserve=0.5", 2),  # 2 · 20 tokens leave 60, three would leave 40
        ("prefill:longest:cap=0.3:reserve=0.5", 2),
    ],
)
def test_admission_stops_at_the_limit(action: str, requests: int) -> None:
    """Five prompts of 20 tokens on 4 clients and 100 tokens of memory."""
    env = started(TASK, [20] * 5, [5] * 5)
    env.step(np.int64(TASK.actions.index(action)))
    assert env.state is not None
    assert int(np.isfinite(env.records().admitted_s).sum()) == requests


def test_a_limit_that_is_reached_is_illegal_and_others_are_not() -> None:
    env = started(TASK, [20, 10, 10], [9, 9, 9])
    env.step(np.int64(TASK.actions.index("prefill:fcfs:cap=0.3")))
    legal = {name for name, ok in zip(TASK.actions, env.action_masks(), strict=True) if ok}
    assert held(env) == 2
    assert legal == {  # two run; 30 of 100 tokens are held, and 10 more leave half of them
        "decode",
        "prefill:fcfs",
        "prefill:fcfs:reserve=0.5",
        "prefill:longest",
        "prefill:longest:reserve=0.5",
    }


def test_a_reserve_does_not_bind_where_nothing_runs() -> None:
    env = started(TASK, [80], [5])
    assert env.action_masks()[TASK.actions.index("prefill:fcfs:reserve=0.5")]


@pytest.mark.parametrize("seed", range(8))
def test_any_limits_serve_everybody(seed: int) -> None:
    task = with_overrides(
        TASK,
        {
            "workload": {"requests": 40},
            "cluster": {"kv_capacity_tokens": 3000, "chunk_tokens": 64 * (seed % 2), "replicas": 2},
            "process": {"steals": ["waiting"]} if seed % 3 else {},
        },
    )
    env, rng, over = ServingEnv(task), np.random.default_rng(seed), False
    env.reset(seed=seed)
    while not over:
        legal = np.flatnonzero(env.action_masks())
        _, _, over, _, info = env.step(np.int64(rng.choice(legal)))
        assert not info["illegal_action"]
    assert np.isfinite(env.records().finished_s).all()


def test_rule_policies_admit_without_limits() -> None:
    task = TaskConfig("limits", CLUSTER, workload=WorkloadConfig(requests=20), process=PROCESS)
    task = with_overrides(task, {"cluster": {"kv_capacity_tokens": 4000}})
    plain = with_overrides(task, {"process": {"caps": [1.0], "reserves": [0.0]}})
    case = make_case(task, 0)
    rows = [play(each, "fcfs", make_policy("fcfs"), case, seed=0).row for each in (task, plain)]
    assert rows[0]["makespan_s"] == rows[1]["makespan_s"]


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("caps", [0.5], [0.5, 1.0]),
        ("caps", [1.0, 0.0], [1.0, 0.01]),
        ("caps", [1.0, 1.5], [1.0, 0.99]),
        ("caps", [1.0, 1.0], [1.0]),
        ("reserves", [0.5], [0.0, 0.5]),
        ("reserves", [0.0, 1.0], [0.0, 0.99]),
        ("reserves", [0.0, -0.1], [0.0, 0.1]),
    ],
)
def test_wrong_limits(key: str, wrong: list[float], right: list[float]) -> None:
    refused(lambda: with_overrides(TASK, {"process": {key: wrong}}), f"process.{key}")
    with_overrides(TASK, {"process": {key: right}})
