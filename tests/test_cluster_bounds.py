"""How near a cluster's bound comes where memory is limited, so that requests may be computed again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegym.baselines.registry import make_policy
from servegym.envs import TaskConfig, play
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.task.cluster import ClusterConfig, ReplicaConfig
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.sections import ProcessConfig
from tests.helpers import instance

DEAR = StageCosts(AffineDecode(1.0, 0.0, 0.01), AffinePrefill(2.0, 0.5))
CHEAP = StageCosts(AffineDecode(1.0, 0.0, 0.01), AffinePrefill(0.25, 0.125))


def row_of(
    costs: StageCosts, rows: list[tuple[Any, ...]], *steals: str, **keys: Any
) -> dict[str, Any]:
    cluster = ClusterConfig(kv_capacity_tokens=40, **keys)
    task = TaskConfig("limited", cluster, costs, process=ProcessConfig(steals=steals))
    policy = "vllm" if cluster.chunk_tokens else "fcfs"
    case = bound_case(lower(task), instance(*rows))
    return dict(play(task, policy, make_policy(policy), case, seed=0).row)


@pytest.mark.parametrize(
    ("costs", "steals", "keys"),
    [
        (CHEAP, (), {"clients": 4}),  # each preemption is followed by a round
        (DEAR, (), {"clients": 4, "chunk_tokens": 8}),  # a round takes less than computing again
        (DEAR, ("running",), {"clients": 4, "replicas": 2, "move": "recompute"}),
    ],
)
def test_one_request_alone_reaches_its_bound(
    costs: StageCosts, steals: tuple[str, ...], keys: dict[str, Any]
) -> None:
    row = row_of(costs, [(8, 20)], *steals, **keys)
    assert row["preemptions"] == row["moves"] == 0
    assert 0 <= row["gap"] + 1e-12 < 1e-9 or (keys.get("chunk_tokens") and row["gap"] < 0.2)


def test_cheap_computing_counts_for_what_it_costs() -> None:
    alone = row_of(CHEAP, [(8, 20)], clients=4, chunk_tokens=8)
    again_s = 0.25 + 0.125 * 9
    assert alone["lower_bound_s"] >= 0.25 + 8 * 0.125 + 19 * min(1.0, again_s) - 1e-9


def test_one_token_computed_again_may_save_a_whole_round() -> None:
    """Six tokens are held in all rounds, a memory has five: two rounds, had nobody been computed again."""
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(0.0, 0.26252625, 2**-9))
    cluster = ClusterConfig(
        2,
        8,
        kv_capacity_tokens=5,
        router="pool",
        replica=(ReplicaConfig(speed=2.0), ReplicaConfig()),
    )
    task = TaskConfig("two", cluster, costs)
    case = bound_case(lower(task), instance((1, 2), (1, 2), (1, 2)))
    row = play(task, "lpt", make_policy("lpt"), case, seed=0).row
    assert row["preemptions"] == 1
    assert row["gap"] >= 0  # was −0.0017


def test_in_a_pool_a_victim_may_go_on_elsewhere_at_once() -> None:
    """Whoever is evicted for a slow round is computed again at once by the other replica."""
    costs = StageCosts(AffineDecode(1.0), AffinePrefill(0.25, 2**-7))
    replicas = (ReplicaConfig(speed=0.25), ReplicaConfig())
    cluster = ClusterConfig(2, 2, kv_capacity_tokens=9, router="pool", replica=replicas)
    task = TaskConfig("pool", cluster, costs)
    for outputs in (2, 3, 4, 5, 6):
        requests = instance((3, 6), (3, outputs), (3, 6), (2, 2))
        row = play(task, "fcfs", make_policy("fcfs"), bound_case(lower(task), requests), seed=0).row
        assert row["gap"] >= 0


@pytest.mark.parametrize("chunk", [0, 6])
@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_no_schedule_is_faster(costs: StageCosts, chunk: int) -> None:
    rng = np.random.default_rng(chunk)
    preemptions = 0
    for _ in range(20):
        rows = [(int(rng.integers(1, 12)), int(rng.integers(1, 28))) for _ in range(10)]
        row = row_of(costs, rows, clients=4, chunk_tokens=chunk)
        assert row["gap"] >= 0
        preemptions += row["preemptions"]
    assert preemptions > 20
