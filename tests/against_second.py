"""Random small clusters with exact costs, played by the core and by the second simulator.

``python -m tests.against_second --cases 1000`` compares at length.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servegym.baselines import make_policy
from servegym.envs import TaskConfig, make_requests, play
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.cluster import ClusterConfig, ReplicaConfig
from servegym.envs.task.lowering import bound_case, lower
from tests.second_simulator import Cluster, Costs, Machine, serve

ROUTERS = ("round-robin", "least-requests", "least-waiting", "vllm-dp", "pool")


def draw(rng: np.random.Generator) -> tuple[Cluster, list[tuple[float, int, int]]]:
    """Draw a cluster and requests of (arrival, prompt, output); all seconds are sums of powers of two."""
    chunked, count = bool(rng.random() < 0.6), int(rng.integers(1, 25))
    block = int(rng.choice([1, 1, 2, 3, 4, 16]))
    longest = int(rng.choice([3, 10, 40]))
    least = int(
        rng.choice([block, 2 * longest, 2 * longest])
    )  # smallest memory; then nobody is rejected
    router = str(rng.choice(ROUTERS))
    machines: list[Machine] = []
    common = router == "pool" or rng.random() < 0.6
    for _ in range(int(rng.choice([1, 1, 2, 3, 4]))):
        limited = rng.random() < 0.8
        capacity = int(rng.integers(least, least + longest + 1)) // block * block + block
        speed = float(rng.choice([0.5, 1.0, 2.0]))
        machine = Machine(int(rng.integers(1, 7)), capacity if limited else 0, speed)
        if machines and common:
            machine = machine._replace(capacity=machines[0].capacity)
        machines.append(machine)
    costs = Costs(
        decode_base=float(rng.choice([1.0, 0.25])),
        decode_per_client=float(rng.choice([0.0, 0.125, 0.5])),
        decode_per_kv_token=float(rng.choice([0.0, 0.0, 2.0**-6])),
        prefill_base=float(rng.choice([0.0, 0.5, 2.0])),
        prefill_per_token=float(rng.choice([0.0625, 0.25])),
        prefill_per_token_squared=float(rng.choice([0.0, 0.0, 2.0**-8])),
        prefill_floor=float(rng.choice([0.0, 1.5])),
        sums=bool(rng.random() < 0.4),
    )
    cluster = Cluster(
        machines=tuple(machines),
        costs=costs,
        block=block,
        watermark=float(rng.choice([0.0, 0.0, 0.05, 0.25, 0.5, 0.96875])),
        chunk=int(rng.choice([1, 2, 3, 5, 8, 16, 64])) if chunked else 0,
        budget=0 if chunked else int(rng.choice([0, 0, 1, 8, 30])),
        router=router,
    )
    spread = float(rng.choice([0.0, 1.0, 10.0, 60.0]))
    step = float(rng.choice([1.0, 0.25, 0.0625]))
    requests = [
        (
            float(np.floor(rng.random() * spread / step) * step),
            int(rng.integers(1, longest + 1)),
            int(rng.integers(1, longest + 1)),
        )
        for _ in range(count)
    ]
    return cluster, requests


def is_known(cluster: Cluster) -> bool:
    """Return whether the page of exact rules says all of a cluster.

    It says nothing of a pool of replicas whose rounds end, by different steps, where another evicts.
    """
    return cluster.router != "pool" or len({machine.speed for machine in cluster.machines}) == 1


def task_of(cluster: Cluster) -> TaskConfig:
    """Return the cluster as a task."""
    costs = cluster.costs
    replicas = tuple(ReplicaConfig(m.clients, m.capacity, m.speed) for m in cluster.machines)
    return TaskConfig(
        "second",
        cluster=ClusterConfig(
            replicas=len(replicas),
            kv_block_tokens=cluster.block,
            watermark=cluster.watermark,
            chunk_tokens=cluster.chunk,
            max_prefill_tokens=cluster.budget,
            mixed="sum" if costs.sums else "one-pass",
            router=cluster.router,
            replica=replicas,
        ),
        cost=StageCosts(AffineDecode(*costs[:3]), AffinePrefill(*costs[3:7])),
    )


def played(
    cluster: Cluster, requests: list[tuple[float, int, int]]
) -> tuple[EpisodeLog, NDArray[np.int64], dict[str, Any]]:
    """Return the core's records, the row of each, and its metrics."""
    task = task_of(cluster)
    arrivals, prompts, outputs = zip(*requests, strict=True)
    given = make_requests(prompts, outputs, arrivals)
    name = "vllm" if cluster.chunk else "fcfs"
    episode = play(task, name, make_policy(name), bound_case(lower(task), given), seed=0)
    rows = np.arange(len(requests)) if given.rows is None else given.rows
    return episode.records, rows, episode.row


def differences(cluster: Cluster, requests: list[tuple[float, int, int]]) -> list[str]:
    """Return in what the two differ; none: they agree to the last bit."""
    log, rows, metrics = played(cluster, requests)
    expected = serve(cluster, requests)
    found = []
    for k, row in enumerate(rows):
        want = expected[row]
        got: tuple[float, ...] = (float(log.rejected[k]),)
        ours: tuple[float, ...] = (float(want.rejected),)
        if not want.rejected:
            columns = (
                log.admitted_s,
                log.first_token_s,
                log.finished_s,
                log.replica,
                log.preemptions,
            )
            got += (*(float(column[k]) for column in columns), float(log.recomputed_tokens[k]))
            ours += (want.admitted, want.first_token, want.finish, want.replica, want.preemptions)
            ours += (want.prefilled - want.prompt,)
        if got != ours:
            found.append(f"row {row}: core {got}, second {ours}")
    ends = [request.finish for request in expected if not request.rejected]
    if ends and metrics["makespan_s"] < metrics["lower_bound_s"] * (1 - 1e-12):
        found.append(f"bound {metrics['lower_bound_s']} above makespan {metrics['makespan_s']}")
    return found


def main() -> None:
    """Compare and print what differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    compared = wrong = preemptions = rejected = 0
    for seed in range(args.first, args.first + args.cases):
        cluster, requests = draw(np.random.default_rng(seed))
        if not is_known(cluster):
            continue
        compared += 1
        found = differences(cluster, requests)
        served = serve(cluster, requests)
        preemptions += sum(request.preemptions for request in served)
        rejected += sum(request.rejected for request in served)
        wrong += bool(found)
        if found and wrong <= 20:
            print(seed, cluster, requests, *found, sep="\n  ", flush=True)
    print(f"{compared} cases, {preemptions} preemptions, {rejected} rejected: {wrong} differ")


if __name__ == "__main__":
    main()
