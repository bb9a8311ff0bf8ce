"""The worst gap between two tokens: by hand, on long runs in small stacks, and where it is noted.

Random clusters, moves among them, are compared with the slow reference in ``against_cluster``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegym.envs import ServingEnv, make_requests
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import lay_out
from servegym.envs.task.registered import TASKS
from tests.cluster_helpers import play_any, play_eagerly
from tests.helpers import changed, instance, make_env, start
from tests.reference_cluster import ClusterSpec, ReplicaSpec, serve

NOTED = {"ttft_s": 1.0}


def noting(env: ServingEnv) -> ServingEnv:
    """The same with limits, so that gaps are noted."""
    return ServingEnv(changed(env.task, slo=NOTED))


def test_a_prefill_stage_stalls_those_who_decode() -> None:
    """Rounds of 1 s, stages of 2 s: request 1 waits 1 + 2 + … for the stage that admits request 2."""
    env = noting(make_env(2))
    start(env, instance((5, 2), (5, 4), (5, 2), (5, 1)))
    play_eagerly(env, "prefill:fcfs")
    log = env.records()
    assert log.worst_gap_s.tolist()[:3] == [1.0, 3.0, 1.0]
    assert np.isnan(log.worst_gap_s[3])  # one token: no gap


def test_rounds_take_longer_as_the_cache_grows() -> None:
    """A run in closed form: the last of 7 rounds reads 16 tokens and takes 1 + 16/8 s."""
    cost = {
        "model": "affine",
        "decode": {"base": 1.0, "per_kv_token": 0.125},
        "prefill": {"base": 2.0, "per_token": 0.0},
    }
    env = ServingEnv(with_overrides(make_env(1).task, {"cost": cost, "slo": NOTED}))
    start(env, instance((9, 8)))
    play_eagerly(env, "prefill:fcfs")
    assert env.records().worst_gap_s.tolist() == [1.0 + 16 / 8]


def test_a_preempted_request_waits_for_its_recomputation() -> None:
    """Memory of 8: two prompts of 3 grow to 4 each; then the newer one waits until the older has left."""
    env = ServingEnv(changed(make_env(2).task, cluster={"kv_capacity_tokens": 8}))
    requests = instance((3, 5), (3, 4))
    start(env, requests)
    play_eagerly(env, "prefill:fcfs")
    log = env.records()
    spec = ClusterSpec((ReplicaSpec(2, 8),), env.task.cost)  # type: ignore[arg-type]
    slow = serve([(0.0, 3, 5), (0.0, 3, 4)], spec)
    assert log.preemptions.tolist() == [0, 1]
    assert log.worst_gap_s.tolist() == [record.worst_gap_s for record in slow.records]
    assert log.worst_gap_s[1] > 3.0


@pytest.mark.parametrize("clients", [1, 2, 3, 9])
def test_small_stacks_hold_long_runs(clients: int) -> None:
    """Arrivals all the time, admitted one by one in any order, against all times of all tokens."""
    rng = np.random.default_rng(clients)
    count = 150
    env = noting(make_env(clients, max_prefill_tokens=1, decisions="rounds"))
    arrivals = np.sort(rng.uniform(0, 4.0 * count / clients, count))
    env.reset(
        options={
            "requests": make_requests(
                rng.integers(1, 5, count), rng.integers(1, 30, count), arrivals
            )
        }
    )
    tokens: list[list[float]] = [[] for _ in range(count)]
    state = env.state
    assert state is not None
    highest = 0

    def watch() -> None:
        nonlocal highest
        highest = max(highest, int(state.replicas[0, 0].gap_groups))
        living = state.gaps[0, 0, : state.replicas[0, 0].gap_groups]
        assert living["members"].sum() == state.replicas[0, 0].active
        assert (living["members"] >= 0).all()
        old = living["worst_s"][: len(living) - state.replicas[0, 0].fresh_groups]
        assert (np.diff(old) < 0).all()
        assert (np.diff(living["stamp"]) > 0).all()

    play_any(env, rng, watch)
    assert highest <= 2 * clients
    log = env.records()
    # Every stage is a prefill stage of 2 s or a round of 1 s, so the boundaries of rounds are known.
    starts = {float(time) for time in log.admitted_s}
    for i in range(count):
        time = float(log.first_token_s[i])
        tokens[i].append(time)
        while len(tokens[i]) <= log.decode_rounds[i]:
            while time in starts:
                time += 2.0
            time += 1.0
            tokens[i].append(time)
        if log.decode_rounds[i] > 0:
            assert time == pytest.approx(log.finished_s[i])
            assert log.worst_gap_s[i] == pytest.approx(np.diff(tokens[i]).max())


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_a_full_stack_drops_who_has_left(clients: int) -> None:
    """Every request has shorter rounds than all before it, so no group is ever merged into another."""
    cost = {
        "model": "affine",
        "decode": {"base": 1.0, "per_kv_token": 0.125},
        "prefill": {"base": 2.0, "per_token": 0.0},
    }
    env = ServingEnv(with_overrides(make_env(clients).task, {"cost": cost, "slo": NOTED}))
    rows = [(900 - 20 * k, 2 + k % 3) for k in range(40)]
    start(env, instance(*rows))
    play_eagerly(env, "prefill:fcfs")
    spec = ClusterSpec((ReplicaSpec(clients),), env.task.cost)  # type: ignore[arg-type]
    slow = serve([(0.0, *row) for row in rows], spec)
    found = env.records().worst_gap_s.tolist()
    assert found == [record.worst_gap_s for record in slow.records]
    assert env.state is not None
    assert env.state.replicas[0, 0].gap_stamp > 2 * clients >= env.state.replicas[0, 0].gap_groups


TASKS_OF_NOTES: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"workload": {"arrival_rate_per_s": 1.0}}, True),
    ({"workload": {"source": "mine.csv"}}, True),
    ({"cluster": {"kv_capacity_tokens": 1000}}, True),
    ({"slo": {"tpot_s": 1.0}}, True),
    ({"slo": {"tpot_s": float("inf")}}, False),
    ({"cluster": {"replicas": 2}}, False),
]


@pytest.mark.parametrize(("sections", "noted"), TASKS_OF_NOTES)
def test_where_gaps_are_noted(sections: dict[str, Any], noted: bool) -> None:
    task: TaskConfig = with_overrides(TASKS["servegym/GSM8K-v0"], sections)
    assert lay_out(task).keeps_gaps == noted


def test_where_gaps_are_not_noted_nothing_is_kept() -> None:
    env = ServingEnv("Tiny-v0")
    env.reset(seed=0)
    _, info = play_eagerly(env, "prefill:fcfs")
    assert env.state is not None
    assert env.state.gaps.size == 0
    assert np.isnan(info["gap_between_tokens_p99_s"])
    assert np.isnan(env.records().worst_gap_s).all()
