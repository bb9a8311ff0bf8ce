"""Moves that cannot be, each refused in one line beside a legal twin; memory that hardly suffices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs import TaskConfig, load_task
from servegym.envs.task.cluster import ClusterConfig, LinkConfig, ReplicaConfig
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from servegym.envs.task.sections import ProcessConfig
from servegym.envs.vocabulary import EVICTIONS, MOVES, STEALS
from tests.helpers import UNIT_COSTS, instance, refused
from tests.test_bad_clusters import served

Write = Callable[[str, str], Path]
Sections = dict[str, dict[str, Any]]

TINY = TASKS["servegym/Tiny-v0"]
ROLES: dict[str, list[dict[str, str]]] = {
    "prefill": [{"role": "prefill"}, {"role": "prefill"}],
    "decode": [{"role": "decode"}, {"role": "decode"}],
    "apart": [{"role": "prefill"}, {"role": "decode"}],
    "mixed": [{"role": "prefill"}, {}],
}


def cluster(**keys: Any) -> Sections:
    return {"cluster": {"replicas": 2, **keys}}


def stealing(*steals: str, **keys: Any) -> Sections:
    return {**cluster(**keys), "process": {"steals": list(steals)}}


# Sections of a task, what is refused, and the same made legal.
BAD_MOVES: list[tuple[Sections, str, Sections]] = [
    (cluster(link={"bytes_per_s": 0}), "bytes_per_s must be > 0 and at most 1e18, got 0.0",
     cluster(link={"bytes_per_s": 1e-3})),
    (cluster(link={"bytes_per_s": 2e18}), "bytes_per_s must be > 0", cluster(link={"bytes_per_s": 1e18})),
    (cluster(link={"latency_s": -1e-3}), "latency_s must lie in 0 … 1e6, got -0.001",
     cluster(link={"latency_s": 0})),
    (cluster(link={"latency_s": float("nan")}), "latency_s must lie in", cluster(link={"latency_s": 1e6})),
    (cluster(link={"latency": 1}), "did you mean", cluster(link={"latency_s": 1})),
    (cluster(link="nvlnk"), "nvlnk", cluster(link="nvlink")),
    (cluster(link=3), "link", cluster(link="rdma1")),
    (cluster(host_link={"bytes_per_s": -1.0}), "bytes_per_s must be > 0", cluster(host_link="pcie5")),
    (cluster(host_link="pcie"), "cluster.host_link", cluster(host_link="pcie4")),
    (cluster(steal_order="shortest"), "cluster.steal_order", cluster(steal_order="newest")),
    (cluster(move="teleport"), "cluster.move", cluster(move="cheaper")),
    (cluster(evict="disk"), "cluster.evict", cluster(evict="host")),
    (cluster(steal_delay_s=-1.0), "cluster.steal_delay_s must lie in 0 … 1e6, got -1.0",
     cluster(steal_delay_s=0)),
    (cluster(kv_bytes_per_token=-1), "cluster.kv_bytes_per_token must be a whole number in 0",
     cluster(kv_bytes_per_token=0)),
    (cluster(replica=[{"role": "prefil"}, {}]), "role", cluster(replica=ROLES["mixed"])),
    (cluster(replica=ROLES["prefill"]), "one must be 'both' or 'decode'", cluster(replica=ROLES["apart"])),
    (cluster(replica=ROLES["decode"]), "one must be 'both' or 'prefill'", cluster(replica=ROLES["mixed"])),
    (cluster(replica=ROLES["apart"], router="pool"), "knows no roles",
     cluster(replica=ROLES["apart"], router="least-tokens")),
    (cluster(replica=ROLES["mixed"], router="plan"), "knows no roles", cluster(router="plan")),
    (stealing("waitin"), "did you mean 'waiting'", stealing("waiting")),
    (stealing("running", "running"), "process.steals must name each kind once",
     stealing("running", "waiting")),
    (stealing("waiting", replicas=1), "cluster.replicas is 1", stealing("waiting")),
    (stealing("running", router="pool"), "replicas share a pool", stealing("running", router="plan")),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "words", "good"), BAD_MOVES)
def test_bad_moves(bad: Sections, words: str, good: Sections) -> None:
    refused(lambda: with_overrides(TINY, bad), words)
    with_overrides(TINY, good)


@pytest.mark.parametrize(("bad", "words", "good"), BAD_MOVES)
def test_bad_files(write: Write, bad: Sections, words: str, good: Sections) -> None:
    path = write("bad.toml", as_toml(bad))
    refused(lambda: load_task(str(path)), words)
    assert load_task(str(write("good.toml", as_toml(good)))).cluster.replicas >= 1


def as_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A task file with these sections; replicas are tables of their own."""
    lines = list[str]()
    for section, keys in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in keys.items() if key != "replica"]
        for table in keys.get("replica", []):
            lines.append(f"[[{section}.replica]]")
            lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_links_and_roles_of_a_file(write: Write) -> None:
    text = """
[cluster]
replicas = 2
link = {latency_s = 0.002, bytes_per_s = 1e10}
host_link = "pcie5"
[[cluster.replica]]
role = "prefill"
[[cluster.replica]]
role = "decode"
clients = 3
[process]
steals = ["waiting", "running"]
"""
    task = load_task(str(write("task.toml", text)))
    assert task.cluster.link == LinkConfig(0.002, 1e10)
    assert [part.role for part in task.cluster.replica] == ["prefill", "decode"]
    between, host = task.cluster.link_numbers()
    assert (between.latency_s, host.bytes_per_s) == (0.002, 50e9)
    assert task.actions[-2:] == ("steal:waiting", "steal:running")


# ---- progress --------------------------------------------------------------------------------

TAKEN = [(), *((kind,) for kind in STEALS), tuple(STEALS)]


@pytest.mark.parametrize("chunk", [0, 1, 5])
@pytest.mark.parametrize("evict", EVICTIONS)
@pytest.mark.parametrize(
    "roles", [("both", "both"), ("prefill", "decode"), ("prefill", "both", "decode")]
)
def test_progress_never_stops(chunk: int, evict: str, roles: tuple[str, ...]) -> None:
    """Memory of the largest request and one block more, with every combination of moves."""
    rng = np.random.default_rng([chunk, list(EVICTIONS).index(evict), len(roles)])
    for steals, move in product(TAKEN, MOVES):
        block = int(rng.choice([1, 3, 16]))
        rows = [
            (int(rng.integers(1, 30)), int(rng.integers(1, 30)), float(rng.integers(0, 20)))
            for _ in range(12)
        ]
        largest = max(-(-(prompt + output) // block) for prompt, output, _ in rows)
        config = ClusterConfig(
            len(roles),
            6,
            kv_capacity_tokens=(largest + 1) * block,
            kv_block_tokens=block,
            watermark=float(rng.choice([0.0, 0.5, 0.99])),
            chunk_tokens=chunk,
            move=move,
            evict=evict,
            steal_delay_s=float(rng.choice([0.0, 0.5, 4.0])),
            link=LinkConfig(float(rng.choice([0.0, 3.0])), 1e6),
            kv_bytes_per_token=int(rng.choice([0, 10**5])),
            host_link=LinkConfig(float(rng.choice([0.0, 2.0])), 1e6),
            replica=tuple(ReplicaConfig(role=role) for role in roles),
        )
        process = ProcessConfig(steals=steals)
        task = TaskConfig("tight", config, UNIT_COSTS, process=process)
        row = served(task, instance(*rows), mixed=chunk > 0)
        assert (row["rejected"], row["unfinished_requests"]) == (0, 0)
