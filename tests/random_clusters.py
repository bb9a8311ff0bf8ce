"""Random small cases of the cluster: every option of the reference, little memory, many ties.

``random_case(rng, dyadic=True)`` has costs, arrivals and speeds that are multiples of powers of two:
every sum of seconds is exact in any order, so ties are ties for everybody and times compare with ==.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts, TableDecode
from tests.reference_cluster import GUARDS, ROUTERS, VICTIMS, ClusterSpec, ReplicaSpec
from tests.reference_cluster_parts import MIGRATIONS, SHARES, TAKES
from tests.reference_costs import decode_round_s


@dataclass(frozen=True)
class ClusterCase:
    """Requests (arrival in seconds, prompt, output), in any order, and the cluster they meet."""

    requests: list[tuple[float, int, int]]
    spec: ClusterSpec


def random_case(
    rng: np.random.Generator,
    *,
    dyadic: bool,
    chunked: bool | None = None,
    routers: list[str] = ROUTERS,
    rejections: bool = True,
    moving: bool | None = None,
    sglang: bool = False,
) -> ClusterCase:
    """A case of up to 30 requests on up to 4 replicas; with `sglang`, under its guard.

    What moves requests is drawn last: without it (`moving=False`) a seed means what it always meant.
    """
    block = int(rng.choice([1, 1, 2, 3, 4, 16]))
    longest = int(rng.choice([6, 24, 80]))
    costs = random_costs(rng, dyadic=dyadic)
    router = str(rng.choice(routers))
    requests = random_requests(rng, longest, decode_round_s(costs, 1, 0), dyadic=dyadic)
    largest = max(-(-(prompt + output) // block) for _, prompt, output in requests)
    limited = router == "llumnix" or bool(rng.random() < 0.75)
    replicas = random_replicas(rng, largest * block, limited=limited, dyadic=dyadic)
    if rejections and limited and rng.random() < 0.15:  # one request that fits nowhere
        most = max(replica.kv_capacity_tokens for replica in replicas)
        requests[int(rng.integers(len(requests)))] = (requests[0][0], most, 1 + block)
    if chunked is None:
        chunked = bool(rng.random() < 0.5)
    stale = len(replicas) > 1 and rng.random() < 0.25
    spec = ClusterSpec(
        replicas,
        costs,
        kv_block_tokens=block,
        watermark=float(rng.choice([0.0, 0.0, 0.0625, 0.25])),
        preempt=str(rng.choice(VICTIMS)),
        admission_guard=str(rng.choice(GUARDS, p=[0.6, 0.2, 0.2])),
        chunk_tokens=int(rng.choice([1, 2, 5, 8, 16, 64, 1000])) if chunked else 0,
        max_prefill_tokens=int(rng.choice([0, 0, 1, longest, 3 * longest])),
        padded=bool(rng.random() < 0.2),
        reserve=str(rng.choice(["chunk", "chunk", "prompt"])),
        mixed=str(rng.choice(["one-pass", "sum"])),
        router=router,
        draws=[int(draw) for draw in rng.integers(0, len(replicas), len(requests))],
        staleness_s=float(rng.choice([0.25, 1.0, 8.0])) if stale else 0.0,
    )
    if moving is None:
        moving = bool(rng.random() < 0.5) and not sglang
    if moving:
        unit_s = 1.0 if dyadic else decode_round_s(costs, 1, 0)
        spec = with_moves(rng, spec, unit_s, longest)
        if rng.random() < 0.5:
            requests = one_sided(requests, len(spec.replicas))
        if rng.random() < 0.5:
            requests = in_two_waves(requests, float(rng.integers(4, 80)) / 4 * unit_s)
    if sglang:
        share = float(rng.choice([1.0, 1.0, 0.0, 0.3, 1.3]))
        spec = replace(spec, admission_guard="sglang", conservativeness=share)
    if sglang and router == "pool":  # which has no rule for unlike memory there
        most = max(part.kv_capacity_tokens for part in spec.replicas)
        parts = tuple(replace(part, kv_capacity_tokens=most) for part in spec.replicas)
        spec = replace(spec, replicas=parts)
    elif limited and router != "llumnix" and len(spec.replicas) > 1 and rng.random() < 0.15:
        spec = replace(spec, replicas=one_unlimited(rng, spec.replicas, block))
    return ClusterCase(requests, spec)


def in_step(rng: np.random.Generator, case: ClusterCase) -> ClusterCase:
    """The same with rounds of 1 s everywhere, prompts and arrivals in whole seconds, at least 3 replicas.

    Most stages begin and end together with those of other replicas, whose memories differ.
    """
    prefill = AffinePrefill(
        float(rng.choice([1, 2])), float(rng.choice([0.0, 0.0, 0.25])), 0.0, 1.0
    )
    replicas = tuple(replace(replica, speed=1.0) for replica in case.spec.replicas)
    if len(replicas) < 3:
        replicas += tuple(replace(replicas[0], clients=int(n)) for n in rng.integers(1, 4, 2))
    memory = [replica.kv_capacity_tokens for replica in replicas]
    if all(memory) and case.spec.admission_guard != "sglang":
        most, least = max(memory), case.spec.kv_block_tokens
        shares = [1.0, *rng.choice([0.3, 0.5, 1.0, 1.0], len(replicas) - 1)]
        memory = [max(least, int(most * share)) for share in shares]
    parts = zip(replicas, memory, strict=True)
    spec = replace(
        case.spec,
        costs=replace(case.spec.costs, decode=AffineDecode(1.0, 0.0), prefill=prefill),
        replicas=tuple(replace(replica, kv_capacity_tokens=kv) for replica, kv in parts),
        draws=[int(draw) for draw in rng.integers(0, len(replicas), len(case.requests))],
    )
    requests = [(float(np.floor(at_s)), prompt, out) for at_s, prompt, out in case.requests]
    return ClusterCase(requests, spec)


def one_unlimited(
    rng: np.random.Generator, replicas: tuple[ReplicaSpec, ...], block: int
) -> tuple[ReplicaSpec, ...]:
    """One without a limit of memory; the largest request may not fit into the others."""
    chosen = int(rng.integers(len(replicas)))
    memory = [
        max(block, int(r.kv_capacity_tokens * rng.choice([0.25, 0.5, 1.0]))) for r in replicas
    ]
    memory[chosen] = 0
    parts = zip(replicas, memory, strict=True)
    return tuple(replace(replica, kv_capacity_tokens=tokens) for replica, tokens in parts)


def one_sided(
    requests: list[tuple[float, int, int]], replicas: int
) -> list[tuple[float, int, int]]:
    """Short outputs at first in all turns but the last: most replicas are idle before one is."""
    return [
        (
            arrival,
            prompt,
            output if i % replicas == replicas - 1 or i > len(requests) // 2 else min(output, 2),
        )
        for i, (arrival, prompt, output) in enumerate(requests)
    ]


def in_two_waves(
    requests: list[tuple[float, int, int]], second_s: float
) -> list[tuple[float, int, int]]:
    """The later half of the rows arrives at once, when the first half has been stolen from."""
    half = (len(requests) + 1) // 2
    return [
        (0.0 if i < half else second_s, prompt, output)
        for i, (_, prompt, output) in enumerate(requests)
    ]


def with_moves(
    rng: np.random.Generator, spec: ClusterSpec, unit_s: float, longest: int
) -> ClusterSpec:
    """The same with moves, on several replicas where one could have been; times are in `unit_s`.

    Copying the longest request takes up to some 16 units, so many moves fail or come too late.
    """
    replicas = spec.replicas
    if len(replicas) == 1:
        replicas *= int(rng.choice([1, 2, 3]))
    clients, memory = int(rng.choice([0, 0, 4])), int(rng.choice([1, 1, 2, 4]))
    replicas = tuple(
        replace(r, clients=r.clients + clients, kv_capacity_tokens=r.kv_capacity_tokens * memory)
        for r in replicas
    )
    roles = [str(role) for role in rng.choice(["both", "prefill", "decode"], len(replicas))]
    with_roles = bool(rng.random() < 0.35)
    steals = (("waiting",), ("running",), ("waiting", "running"), ())[int(rng.integers(4))]
    if len(replicas) == 1 or spec.router == "pool":
        with_roles, steals = False, ()
    if with_roles and "both" not in roles:
        roles[:2] = ["prefill", "decode"]
    if with_roles:
        parts = zip(replicas, roles, strict=True)
        replicas = tuple(replace(replica, role=role) for replica, role in parts)
    delays = [0.0, 0.0, 0.125, 1.0, 4.5, 12.0]
    rates = [longest / 8, longest / 2, 4 * longest]  # tokens per unit
    rates_per_s = [2.0 ** np.ceil(np.log2(rate)) / unit_s for rate in rates]
    return replace(
        spec,
        replicas=replicas,
        steals=steals,
        steal_takes=str(rng.choice(TAKES)),
        steal_delay_s=float(rng.choice(delays)) * unit_s,
        latency_s=float(rng.choice(delays)) * unit_s,
        bytes_per_s=float(rng.choice(rates_per_s)),
        kv_bytes_per_token=int(rng.choice([0, 1, 1, 1])),
        move_by=str(rng.choice(["copy", "copy", "recompute", "cheaper"])),
        preempt_to=str(rng.choice(["recompute", "host"])),
        host_latency_s=float(rng.choice(delays)) * unit_s,
        host_bytes_per_s=float(rng.choice(rates_per_s)),
    )


def balanced(rng: np.random.Generator, case: ClusterCase, unit_s: float) -> ClusterCase:
    """The same where replicas balance their load, wherever there is a victim, or turn away who is late."""
    spec, several = case.spec, len(case.spec.replicas) > 1 and case.spec.router != "pool"
    steals = (("waiting",), ("running",), ("waiting", "running"))[int(rng.integers(3))]
    sheds = rng.random() < (0.5 if several else 1.0)
    spec = replace(
        spec,
        steals=steals if several else (),
        steal_share=str(rng.choice(SHARES)),
        migrate=str(rng.choice(MIGRATIONS)),
        steal_period_s=float(rng.choice([0.0, 0.0, 0.75, 3.0, 12.0])) * unit_s,
        freeness_steps=float(rng.choice([0.5, 2.0, 3.0, 8.0])),
        shed_s=float(rng.choice([2.0, 6.0, 20.0])) * unit_s if sheds else np.inf,
    )
    return ClusterCase(case.requests, spec)


def random_requests(
    rng: np.random.Generator, longest: int, round_s: float, *, dyadic: bool
) -> list[tuple[float, int, int]]:
    """Up to 30 rows, not in order of arrival; some arrive together, some all at the start."""
    count = int(rng.integers(1, 31))
    until_s = float(rng.choice([0.0, 4.0, 40.0])) * (1.0 if dyadic else round_s)
    arrivals = rng.uniform(0.0, until_s, count)
    if dyadic:
        arrivals = np.floor(arrivals * 4) / 4
    else:
        arrivals[rng.random(count) < 0.3] = arrivals[0]
    prompts = rng.integers(1, longest + 1, count)
    outputs = rng.integers(1, int(rng.choice([longest // 2, longest])) + 1, count)
    outputs[rng.random(count) < 0.1] = 1
    rows = zip(arrivals, prompts, outputs, strict=True)
    return [(float(arrival), int(prompt), int(output)) for arrival, prompt, output in rows]


def random_replicas(
    rng: np.random.Generator, largest: int, *, limited: bool, dyadic: bool
) -> tuple[ReplicaSpec, ...]:
    """Equal replicas or different ones; the least memory holds the largest request just so."""
    count = int(rng.choice([1, 1, 2, 3, 4]))
    speeds = [0.5, 1.0, 2.0, 4.0] if dyadic else [0.7, 1.0, 1.3, 3.1]
    kinds = [
        ReplicaSpec(
            clients=int(rng.choice([1, 2, 3, 5, 8])),
            kv_capacity_tokens=largest
            + int(rng.choice([0, 1, largest // 4, largest // 2, largest, 3 * largest]))
            if limited
            else 0,
            speed=float(rng.choice(speeds)),
        )
        for _ in range(count)
    ]
    if rng.random() < 0.6:
        kinds = [ReplicaSpec(kinds[0].clients, kinds[0].kv_capacity_tokens)] * count
    return tuple(kinds)


def random_costs(rng: np.random.Generator, *, dyadic: bool) -> StageCosts:
    """Affine or by a table, with and without what attention and the floor add.

    Attention of every client over the cache of all has a generator of its own: a seed means what it meant.
    """
    own = rng.spawn(1)[0]
    if dyadic:  # batches a power of two apart: what lies between is exact, too
        base, steps = float(rng.integers(1, 17)) / 8, rng.integers(0, 9, 4) / 16
        per_client, per_token = rng.integers(0, 5, 2) / 64
        per_kv, squared = float(rng.integers(0, 5)) / 1024, float(rng.integers(0, 3)) / 8192
        prefill, floor = float(rng.integers(1, 33)) / 8, float(rng.choice([0.0, 2.0]))
        batches = (1, 2, 4, 8)
    else:
        base, steps = float(rng.uniform(0.01, 0.1)), rng.uniform(0.0, 0.02, 4)
        per_client, per_token = rng.uniform(0.0, 1e-3, 2)
        per_kv, squared = float(rng.uniform(0.0, 1e-5)), float(rng.uniform(0.0, 1e-6))
        prefill, floor = float(rng.uniform(0.01, 0.2)), float(rng.choice([0.0, 0.05]))
        batches = (1, 3, 4, 11)
    table = tuple(float(base + rise) for rise in np.cumsum(steps))
    shared = 0.0
    if own.random() < 0.3:
        shared = float(own.integers(1, 5)) / 16384 if dyadic else float(own.uniform(0.0, 2e-6))
    decode: AffineDecode | TableDecode = AffineDecode(base, float(per_client), per_kv, shared)
    if rng.random() < 0.4:
        decode = TableDecode(batches, table, per_kv, shared)
    return StageCosts(decode, AffinePrefill(prefill, float(per_token), squared, floor))
