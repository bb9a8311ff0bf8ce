"""Clusters that cannot be, each refused in one line, beside legal ones; memory that hardly suffices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.baselines.registry import make_policy
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.baselines.rules.triggers import EAGER
from servegym.envs import ServegymError, ServingEnv, TaskConfig, load_task, make_case, play
from servegym.envs.machine.costs import AffineDecode, LevelledPrefill, StageCosts
from servegym.envs.task.cluster import ClusterConfig, ReplicaConfig
from servegym.envs.task.config import with_overrides
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.task.registered import TASKS
from servegym.envs.workload.plan import plan_from_queues
from tests.helpers import UNIT_COSTS, instance, refused

Write = Callable[[str, str], Path]

TINY = TASKS["servegym/Tiny-v0"]

# Keys of [cluster], what is refused, and the same made legal.
BAD_CLUSTERS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"replicas": 0}, "cluster.replicas must be a whole number in 1 … 4096, got 0", {"replicas": 1}),
    ({"replicas": 4097}, "cluster.replicas must be a whole", {"replicas": 4096, "clients": 1}),
    ({"replicas": 4096, "clients": 245}, "may have 1000000 clients, got 1003520", {"clients": 244}),
    ({"kv_capacity_tokens": 15, "kv_block_tokens": 16},
     "cluster.kv_capacity_tokens must be 0 or hold a block of 16 tokens (cluster.kv_block_tokens), got 15",
     {"kv_capacity_tokens": 16}),
    ({"replicas": 2, "replica": [{}]}, "cluster.replicas is 2, but there are 1 tables",
     {"replica": [{}, {}]}),
    ({"replicas": 2, "replica": [{}, {}, {}]}, "cluster.replicas is 2, but there are 3 tables",
     {"replicas": 3}),
    ({"replica": [{"clients": 0}]},
     "cluster.replica[0].clients must be a whole number in 1 … 1000000, got 0",
     {"replica": [{"clients": 1}]}),
    ({"replicas": 2, "replica": [{}, {"clients": 2.5}]},
     "cluster.replica[1].clients must be a whole number, got 2.5", {"replica": [{}, {"clients": 2}]}),
    ({"replica": [{"kv_capacity_tokens": -1}]}, "cluster.replica[0].kv_capacity_tokens must be a whole",
     {"replica": [{"kv_capacity_tokens": 0}]}),
    ({"replicas": 2, "kv_block_tokens": 4, "replica": [{}, {"kv_capacity_tokens": 3}]},
     "cluster.replica[1].kv_capacity_tokens must be 0 or hold a block of 4",
     {"replica": [{}, {"kv_capacity_tokens": 4}]}),
    ({"replicas": 2, "replica": [{}, {"sped": 2.0}]},
     "unknown key 'cluster.replica[1].sped'; did you mean 'cluster.replica[1].speed'?",
     {"replica": [{}, {"speed": 2.0}]}),
    ({"replica": [{"speed": 0}]}, "cluster.replica[0].speed must lie in 1e-6 … 1e6, got 0.0",
     {"replica": [{"speed": 1e-6}]}),
    ({"replica": [{"speed": -1.0}]}, "cluster.replica[0].speed must lie in", {"replica": [{"speed": 1e6}]}),
    ({"replica": [{"speed": float("nan")}]}, "cluster.replica[0].speed must lie in 1e-6 … 1e6, got nan",
     {"replica": [{"speed": 1}]}),
    ({"replica": [{"speed": float("inf")}]}, "cluster.replica[0].speed must lie in",
     {"replica": [{"speed": 1.5}]}),
    ({"replica": [{"speed": "fast"}]}, "cluster.replica[0].speed must be a number, got 'fast'",
     {"replica": [{"speed": 2}]}),
    ({"replica": [[]]}, "cluster.replica[0] must be a table of keys, got []", {"replica": [{}]}),
    ({"replica": {"clients": 5}}, "cluster.replica must be a list, got {'clients': 5}",
     {"replica": [{"clients": 5}]}),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "words", "good"), BAD_CLUSTERS)
def test_bad_cluster(bad: dict[str, Any], words: str, good: dict[str, Any]) -> None:
    with pytest.raises(ServegymError) as error:
        with_overrides(TINY, {"cluster": bad})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    with_overrides(TINY, {"cluster": bad | good})


@pytest.mark.parametrize(("bad", "words", "good"), BAD_CLUSTERS)
def test_bad_cluster_file(
    write: Write, bad: dict[str, Any], words: str, good: dict[str, Any]
) -> None:
    if bad in ({"replica": [[]]}, {"replica": {"clients": 5}}):
        return  # see below
    path = write("bad.toml", as_toml(bad))
    with pytest.raises(ServegymError) as error:
        load_task(str(path))
    assert str(error.value).startswith(f"{path}: line ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    load_task(str(write("good.toml", as_toml(bad | good))))


def as_toml(cluster: dict[str, Any]) -> str:
    """A task file with these keys."""
    cluster = dict(cluster)
    tables = cluster.pop("replica", [])
    lines = ["[cluster]", *(f"{key} = {_toml(value)}" for key, value in cluster.items())]
    for table in tables:
        lines += [
            "[[cluster.replica]]",
            *(f"{key} = {_toml(value)}" for key, value in table.items()),
        ]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


LINES = [
    # A file and the line of the key to blame.
    ("[cluster]\nreplicas = 2\nclients = 3\n[[cluster.replica]]\n[[cluster.replica]]\nspeed = 0\n", 6),
    ("[cluster]\nreplicas = 2\n[[cluster.replica]]\nsped = 1\n[[cluster.replica]]\nspeed = 1\n", 4),
    ("[cluster]\nclients = 3\n\nreplicas = 2\n[[cluster.replica]]\nspeed = 2\n", 4),
    ("[cluster]\nclients = 3\n[[cluster.replica]]\nspeed = 2\n[[cluster.replica]]\n", 3),
    ("[cluster]\nkv_block_tokens = 16\nkv_capacity_tokens = 8\n", 3),
    ("[cluster]\nkv_capacity_tokens = 8\nkv_block_tokens = 16\n", 2),
    ("[cluster]\nreplica = [\n  {clients = 5},\n]\nwatermark = nan\n", 5),
    ("[cluster]\nreplica = [[]]\n", 2),
    ("[cluster]\n[cluster.replica]\nclients = 5\n", 2),
    (as_toml({"replicas": 2, "kv_block_tokens": 4, "replica": [{}, {"kv_capacity_tokens": 3}]}), 6),
    ("[cluster]\nclients = 2\nreplicas = 4096\n[cluster.nodes]\n", 4),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), LINES)
def test_message_names_the_line(write: Write, text: str, line: int) -> None:
    path = write("bad.toml", text)
    with pytest.raises(ServegymError) as error:
        load_task(str(path))
    assert str(error.value).startswith(f"{path}: line {line}: ")


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_keys_means_nothing(write: Write, order: int) -> None:
    keys = ["kv_capacity_tokens = 8", "kv_block_tokens = 8", "clients = 500000", "replicas = 2"][
        ::order
    ]
    task = load_task(str(write("task.toml", "\n".join(["[cluster]", *keys, ""]))))
    assert task.cluster.replicas == 2


def test_tables_round_trip(write: Write) -> None:
    cluster = {
        "replicas": 3,
        "clients": 7,
        "kv_capacity_tokens": 64,
        "router": "pool",
        "replica": [{}, {"clients": 2, "kv_capacity_tokens": 0}, {"speed": 2.0}],
    }
    task = load_task(str(write("task.toml", as_toml(cluster))))
    tables = task.cluster.replica_tables()
    assert [table[:3] for table in tables] == [(7, 64, 1.0), (2, 0, 1.0), (7, 64, 2.0)]
    notes = asdict(task.cluster)  # as JSON files hold it
    assert with_overrides(TINY, {"cluster": notes}).cluster == task.cluster
    assert with_overrides(TINY, {"cluster": cluster}).cluster == task.cluster
    lean = [{k: v for k, v in table.items() if v is not None} for table in notes["replica"]]
    again = load_task(str(write("again.toml", as_toml(notes | {"replica": lean}))))
    assert again.cluster == task.cluster


def test_wrong_types_in_python() -> None:
    for bad in ([ReplicaConfig(), {}], (1,), "no"):
        with pytest.raises(ServegymError, match=r"cluster\.replica"):
            ClusterConfig(replica=bad)  # type: ignore[arg-type]
    table = {"clients": np.int32(3), "speed": np.float32(2.0)}
    assert with_overrides(TINY, {"cluster": {"replica": [table]}}).cluster.replica[0].clients == 3


def test_a_plan_for_another_number_of_clients() -> None:
    task = with_overrides(TINY, {"cluster": {"replicas": 2, "clients": 2}})
    requests = instance((3, 4), (5, 6))
    env = ServingEnv(task)
    for queues in ([[0], [1]], [[0], [1], [], [], []]):
        with pytest.raises(ServegymError, match=f"for {len(queues)} clients, the task has 4"):
            env.reset(options={"requests": requests, "plan": plan_from_queues(queues)})
    env.reset(options={"requests": requests, "plan": plan_from_queues([[0], [], [1], []])})


def served(task: TaskConfig, requests: Any, *, mixed: bool = False) -> dict[str, Any]:
    policy = TriggerPolicy("fcfs", EAGER, mixed=True) if mixed else make_policy("fcfs")
    case = bound_case(lower(task), requests)
    return play(task, "fcfs", policy, case, seed=0).row


def test_levelled_prefill_with_mixed_stages_runs() -> None:
    costs = StageCosts(AffineDecode(1.0), LevelledPrefill((8, 64), (2.0, 3.0)))
    task = TaskConfig("levelled", ClusterConfig(clients=3, chunk_tokens=8), costs)
    row = served(task, instance((20, 5), (7, 3), (30, 4, 2.0)), mixed=True)
    assert row["unfinished_requests"] == 0
    assert row["mixed_stages"] > 0
    assert row["gap"] >= 0


@pytest.mark.parametrize("mixed", [False, True])
def test_a_request_larger_than_any_memory_is_rejected(mixed: bool) -> None:
    replicas = (ReplicaConfig(kv_capacity_tokens=16), ReplicaConfig(kv_capacity_tokens=32))
    cluster = ClusterConfig(
        2, 2, kv_block_tokens=4, replica=replicas, chunk_tokens=8 if mixed else 0
    )
    task = TaskConfig("small", cluster, UNIT_COSTS)
    row = served(task, instance((30, 3), (28, 4), (5, 5), (9, 9, 50.0)), mixed=mixed)
    assert (row["rejected"], row["unfinished_requests"]) == (1, 0)
    assert np.isfinite(row["makespan_s"])


def test_far_too_many_arrivals_end_at_the_cap() -> None:
    task = with_overrides(
        TINY,
        {
            "cluster": {"replicas": 2, "clients": 2, "kv_capacity_tokens": 200},
            "workload": {"requests": 300, "arrival_rate_per_s": 1000.0},
            "process": {"max_seconds": 30.0},
        },
    )
    row = play(task, "fcfs", make_policy("fcfs"), make_case(task, 0), seed=0).row
    assert 200 < row["unfinished_requests"] <= 300
    assert np.isnan(row["makespan_s"])
    assert np.isnan(row["gap"])


@pytest.mark.parametrize("chunk", [0, 1, 5])
@pytest.mark.parametrize("preempt", ["newest", "least-computed", "fewest-output"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_progress_never_stops(chunk: int, preempt: str, replicas: int) -> None:
    """Memory of the largest request and one block more, and a watermark that leaves almost nothing."""
    rng = np.random.default_rng(chunk)
    for block in (1, 3, 16):
        rows = [
            (int(rng.integers(1, 30)), int(rng.integers(1, 30)), float(rng.integers(0, 20)))
            for _ in range(20)
        ]
        largest = max(-(-(prompt + output) // block) for prompt, output, _ in rows)
        cluster = ClusterConfig(
            replicas,
            8,
            kv_capacity_tokens=(largest + 1) * block,
            kv_block_tokens=block,
            watermark=float(rng.choice([0.0, 0.5, 0.99])),
            preempt=preempt,
            chunk_tokens=chunk,
        )
        row = served(TaskConfig("tight", cluster, UNIT_COSTS), instance(*rows), mixed=chunk > 0)
        assert (row["rejected"], row["unfinished_requests"]) == (0, 0)


def test_sglang_wants_equal_memory_in_a_pool() -> None:
    replicas = (ReplicaConfig(kv_capacity_tokens=64), ReplicaConfig(kv_capacity_tokens=128))
    pool: dict[str, Any] = {"replicas": 2, "router": "pool", "admission_guard": "sglang"}
    refused(lambda: ClusterConfig(replica=replicas, **pool), "pool of replicas of unlike memory")
    assert ClusterConfig(replica=replicas[:1] * 2, **pool).router == "pool"
