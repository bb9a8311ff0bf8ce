"""The blocks `memory` and `cluster`: every entry against plain formulas, bounds, constants, by hand.

The formulas are written from the features' names, entry by entry, over the requests of the episode. What
others see of a replica (`look`) is the routers' and is compared with the reference simulator elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from servegym.envs import ServingEnv, load_task, make_case, make_requests, play
from servegym.envs.process.blocks import BLOCK_FEATURES, block_of, features_of
from servegym.envs.process.observation import FEATURES
from servegym.envs.process.observed_cluster import CLUSTER_FEATURES
from servegym.envs.process.observed_latency import LATENCY_FEATURES
from servegym.envs.process.observed_memory import MEMORY_FEATURES
from servegym.envs.simulator.routing import Load, look
from servegym.envs.simulator.state import DECODE_RUN, IDLE, MIXED, NOBODY, PREFILL
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.sections import InformationConfig, ProcessConfig
from servegym.envs.vocabulary import ADMISSION_RULES, OBSERVATION_BLOCKS
from tests.cluster_helpers import requests_of, shared_case, task_of
from tests.helpers import UNIT_COSTS, changed, instance, random_legal_action, refused, start

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]

THIRD, TWO_THIRDS = round(1 / 3, 6), round(2 / 3, 6)
ALL = {"process": {"observe": OBSERVATION_BLOCKS}}
TINY = load_task("Tiny-v0")


# ---- the formulas ----------------------------------------------------------------------------


def share(a: float, b: float) -> float:
    """a / (a + b), 0 if both are 0."""
    return a / (a + b) if a + b > 0 else 0.0


def against(a: float, b: float) -> float:
    """The same, ½ if both are 0."""
    return a / (a + b) if a + b > 0 else 0.5


def log(x: float, doublings: int) -> float:
    """log₂(1 + x) / doublings, with a straight line between powers of two, at most 1."""
    power = math.floor(math.log2(1 + x))
    return min((power + (1 + x) / 2**power - 1) / doublings, 1.0)


def waiting_in(env: ServingEnv, q: int) -> list[Any]:
    """The requests that wait in a queue."""
    assert env.state is not None
    found, i = [], int(env.state.queues[0, q].first)
    while i != NOBODY:
        request = env.state.requests[0, i]
        if request.phase == 1:
            found.append(request)
        i = int(request.next)
    return found


def expected_memory(env: ServingEnv, r: int) -> list[float]:
    state, cluster = env.state, env.task.cluster
    assert state is not None
    replica, requests = state.replicas[0, r], state.requests[0]
    length, capacity = cluster.kv_block_tokens, cluster.replica_tables()[r].kv_capacity_tokens
    blocks = capacity // length
    running = state.finishes[0, r, : replica.active]
    left = [int(due - replica.rounds) for due in running.due]
    whole = [int(requests[i].prompt_tokens + requests[i].decode_rounds) for i in running.request]
    held = [most - rounds for most, rounds in zip(whole, left, strict=True)]
    waiting = waiting_in(env, min(r, state.queues.shape[1] - 1))
    tokens = [int(request.prompt_tokens + request.emitted) for request in waiting]
    wanted = sum(-(-todo // length) for todo in tokens)
    entries = [0.0, 0.0, 1.0, 1.0, *[0.0] * 7]
    if capacity:

        def used(rounds: int) -> int:
            partial = [] if replica.partial == NOBODY else [int(requests[replica.partial].computed)]
            return sum(-(-(t + rounds) // length) for t in held) + sum(
                -(-t // length) for t in partial
            )

        free, to_full = blocks - used(0), 0
        while held and used(to_full + 1) <= blocks:
            to_full += 1
        finished = state.episodes[0].finished / cluster.replicas
        entries = [
            1.0,
            used(0) / blocks,
            max(free - math.floor(cluster.watermark * blocks), 0) / blocks,
            log(to_full, 14) if held else 1.0,
            share(min(left), to_full) if held else 0.0,
            share(used(1) - used(0), free) if held else 0.0,
            share(sum(whole) + len(whole), blocks * length) if held else 0.0,
            share(wanted, blocks),
            share(wanted, free),
            min(wanted / len(waiting) / blocks, 1.0) if waiting else 0.0,
            share(int(replica.preemptions), finished),
        ]
    budget = cluster.chunk_tokens
    if not budget:
        return [*entries, *[0.0] * 4]
    unused = max(budget - len(held), 0)
    more = todo = 0
    if replica.partial != NOBODY:
        half = requests[replica.partial]
        todo = int(half.prompt_tokens + half.emitted)
        more = todo - int(half.computed)
    return [
        *entries,
        more / todo if todo else 0.0,
        share(more, unused) if todo else 0.0,
        unused / budget,
        share(sum(tokens), unused),
    ]


def seconds_left(env: ServingEnv, s: int) -> float:
    """Until the stage of a replica ends, or the decode round that runs now, round by round."""
    assert env.state is not None
    replica, now_s = env.state.replicas[0, s], float(env.state.episodes[0].now_s)
    if replica.stage == IDLE:
        return 0.0
    if replica.stage != DECODE_RUN:
        return float(replica.clock_s + replica.stage_s) - now_s
    end_s, cached = float(replica.clock_s), int(replica.cached_tokens)
    while end_s < now_s or end_s == replica.clock_s:
        end_s += round_seconds(env, s, int(replica.active), cached)
        cached += int(replica.active)
    return end_s - now_s


def round_seconds(env: ServingEnv, s: int, active: int, cached: int) -> float:
    rates = env.costs.rates[s]
    rate = rates.decode_per_kv_token_s + active * rates.decode_per_client_kv_token_s
    return float(env.costs.decode_base_s[s, active] + rate * cached)


def expected_cluster(env: ServingEnv, r: int) -> list[float]:
    state, parts = env.state, env.task.cluster.replica_tables()
    assert state is not None
    count, pool = len(parts), env.task.cluster.router == "pool"
    seen: list[Load] = [look(state, env.costs, 0, s) for s in range(count)]
    waiting = [len(waiting_in(env, 0 if pool else s)) for s in range(count)]
    held = [(request.phase == 2, int(request.replica)) for request in state.requests[0]]
    running = [sum(holds and at == s for holds, at in held) for s in range(count)]
    clients = [part.clients for part in parts]
    idle = [most - busy for most, busy in zip(clients, running, strict=True)]
    work = [max(load.tokens, 0) for load in seen]
    blocks = [load.used_blocks + load.wanted_blocks for load in seen]
    length = env.task.cluster.kv_block_tokens
    memories = [part.kv_capacity_tokens // length for part in parts]
    free = [
        1 - load.used_blocks / memory if memory else 1.0
        for load, memory in zip(seen, memories, strict=True)
    ]
    token_s = [round_seconds(env, s, most, 0) / most for s, most in enumerate(clients)]
    others = [s for s in range(count) if s != r]
    stages = [int(state.replicas[0, s].stage) for s in range(count)]

    def to_mean(values: list[Any]) -> float:
        return against(values[r], sum(values) / count)

    def to_most(values: list[int]) -> float:
        return against(values[r], max(values[s] for s in others)) if others else 0.5

    entries = [
        1 / count,
        to_mean(waiting),
        to_most(waiting),
        to_mean(running),
        to_mean(work),
        to_most(work),
        to_mean(free),
        to_mean(blocks),
        to_mean(clients),
        against(sum(token_s) / count, token_s[r]),
    ]
    if not others:
        return [*entries, *[0.0] * 10]
    elsewhere = 0 if pool else sum(waiting[s] for s in others)
    places = sum(clients[s] for s in others)
    own = state.replicas[0, r]
    round_s = round_seconds(env, r, int(own.active), int(own.cached_tokens))
    return [
        *entries,
        sum(running[s] == 0 and (pool or waiting[s] == 0) for s in others) / len(others),
        sum(stages[s] in (PREFILL, MIXED) for s in others) / len(others),
        sum(idle[s] for s in others) / places,
        elsewhere / sum(waiting) if sum(waiting) else 0.0,
        log(elsewhere / places, 8),
        share(elsewhere, idle[r]),
        share(sum(seconds_left(env, s) for s in others) / len(others), round_s),
        *[0.0] * 3,  # no moves
    ]


# ---- the comparison --------------------------------------------------------------------------


def assert_observed(env: ServingEnv, observation: np.ndarray, r: int) -> None:
    assert env.observation_space.contains(observation)
    names = MEMORY_FEATURES + CLUSTER_FEATURES
    of_blocks = observation[len(FEATURES) : -len(LATENCY_FEATURES)]  # which has a file of its own
    expected = expected_memory(env, r) + expected_cluster(env, r)
    wrong = [
        (name, float(ours), theirs)
        for name, ours, theirs in zip(names, of_blocks, expected, strict=True)
        if not math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-7)
    ]
    assert wrong == []


@pytest.mark.parametrize("seed", range(40))
def test_every_entry(seed: int) -> None:
    """At every decision of random clusters; the block `replica` is that of a twin that observes it alone."""
    rng = np.random.default_rng([seed, 31])
    case = shared_case(rng, dyadic=True)
    settings: dict[str, Any] = {
        "mixed_rules": ADMISSION_RULES,
        "decisions": str(rng.choice(["events", "rounds"])),
    }
    env = ServingEnv(task_of(case.spec, observe=OBSERVATION_BLOCKS, **settings))
    twin = ServingEnv(task_of(case.spec, **settings))
    options = {"requests": requests_of(case)}
    (observation, info), (alone, other_info) = (e.reset(options=options) for e in (env, twin))
    over = env.state is not None and env.state.episodes[0].finished == len(case.requests)
    while not over:
        assert observation[: len(FEATURES)].tobytes() == alone.tobytes()
        assert info == other_info
        assert_observed(env, observation, info["replica"])
        legal = np.flatnonzero(env.action_masks())
        action = int(legal[0] if rng.random() < 0.5 else rng.choice(legal))
        observation, _, over, _, info = env.step(np.int64(action))
        alone, *_, other_info = twin.step(np.int64(action))
    assert env.observation_space.contains(observation)
    assert info["replica"] == 0


@pytest.mark.parametrize("seed", range(12))
def test_bounds_where_requests_outlive_what_was_expected(seed: int) -> None:
    rng = np.random.default_rng([seed, 32])
    case = shared_case(rng, dyadic=False)
    known = requests_of(case)
    guesses = np.maximum(known.output_tokens // 3, 1)
    columns = known.prompt_tokens, known.output_tokens, known.arrival_s
    requests = make_requests(*columns, guesses, np.full(len(known), 0.3))
    spec = replace(case.spec, admission_guard="none")
    task = task_of(spec, observe=OBSERVATION_BLOCKS, decisions="rounds")
    env = ServingEnv(replace(task, information=InformationConfig(output_lengths="predicted")))
    observation, _ = env.reset(options={"requests": requests})
    over = False
    while not over:
        assert env.observation_space.contains(observation)
        observation, _, over, *_ = env.step(np.int64(random_legal_action(env, rng)))


def test_constants_of_one_replica_without_a_memory_limit(rng: np.random.Generator) -> None:
    env = ServingEnv(with_overrides(TINY, ALL))
    observation, _ = env.reset(seed=0)
    memory = [0.0, 0.0, 1.0, 1.0, *[0.0] * 11]
    cluster = [1.0, *[0.5] * 9, *[0.0] * 10, *[0.0] * 14, 1.0]  # and latency
    over = False
    while not over:
        assert observation[len(FEATURES) :].tolist() == memory + cluster
        observation, _, over, *_ = env.step(np.int64(random_legal_action(env, rng)))
    assert observation[len(FEATURES) :].tolist() == memory + cluster


# ---- by hand ---------------------------------------------------------------------------------


def seen(env: ServingEnv, block: str) -> dict[str, float]:
    """Entries of a block by name."""
    values = dict(zip(env.features, env.rows.observations[0], strict=True))
    return {name: round(float(values[name]), 6) for name in BLOCK_FEATURES[block]}


def test_memory_by_hand() -> None:
    """20 blocks of 2 tokens. Prompts of 6 and 8 run and take 3 + 4 blocks; 12 waits and wants 6.

    A round takes 2 blocks: both prompts fill theirs. So do rounds 3, 5 … 13, when 7 + 14 would be more
    than 20 blocks. The shorter one finishes after 4 rounds. At their finishes they have 11 and 18 tokens.
    """
    task = changed(
        TaskConfig("test", cost=UNIT_COSTS),
        cluster={"clients": 3, "kv_capacity_tokens": 40, "kv_block_tokens": 2, "watermark": 0.25},
        process={"observe": ("memory",), "rules": ("fcfs",)},
    )
    env = ServingEnv(task)
    start(env, instance((6, 5), (8, 10), (12, 3, 1.0)))  # the first stage is taken without asking
    assert seen(env, "memory") == {
        "memory is limited, 0 or 1": 1.0,
        "blocks in use / blocks": 7 / 20,
        "blocks free beyond the watermark / blocks": 8 / 20,
        "rounds until memory is full, log-scaled": round(log(12, 14), 6),
        "rounds until the next finish against rounds until memory is full, a / (a + b)": 4 / 16,
        "blocks of the next decode round against free blocks, a / (a + b)": round(2 / 15, 6),
        "tokens of the decoding at their finishes against memory, a / (a + b)": round(29 / 69, 6),
        "blocks that waiting prefills want against all blocks, a / (a + b)": round(6 / 26, 6),
        "blocks that waiting prefills want against free blocks, a / (a + b)": round(6 / 19, 6),
        "mean blocks of a waiting prefill / blocks": 6 / 20,
        "preemptions here against finished requests per replica, a / (a + b)": 0.0,
        "half-computed prompt's share left": 0.0,
        "tokens left of the half-computed prompt against the chunk budget left, a / (a + b)": 0.0,
        "chunk budget that the decoding leave / chunk budget": 0.0,
        "tokens of waiting prefills against the chunk budget left, a / (a + b)": 0.0,
    }


def test_cluster_by_hand() -> None:
    """Two replicas of two clients, the second twice as fast; requests 1 and 3 are the second's.

    Stages hold one request. The second replica is asked at 1 s: one request runs with 4 rounds left, one
    waits. The first is in its stage of 2 s; two requests wait there.
    """
    task = changed(
        TaskConfig("test", cost=UNIT_COSTS),
        cluster={"replicas": 2, "clients": 2, "max_prefill_tokens": 4},
        process={"observe": ("cluster", "replica"), "rules": ("fcfs",)},
    )
    env = ServingEnv(with_overrides(task, {"cluster": {"replica": [{}, {"speed": 2.0}]}}))
    _, info = start(env, instance((4, 3), (4, 5), (4, 2), (4, 2), (4, 1)))
    assert info["replica"] == 1
    here, there = 4 + 5, 6 + 5 + 4  # tokens of prompts and rounds after them
    assert seen(env, "cluster") == {
        "1 / replicas": 0.5,
        "waiting here against the mean of all replicas, a / (a + b)": 0.4,
        "waiting here against the most elsewhere, a / (a + b)": THIRD,
        "running here against the mean of all replicas, a / (a + b)": 0.5,
        "expected tokens to compute here against the mean of all replicas, a / (a + b)": round(
            here / (here + (here + there) / 2), 6
        ),
        "expected tokens to compute here against the most elsewhere, a / (a + b)": 9 / 24,
        "free share of memory here against the mean of all replicas, a / (a + b)": 0.5,
        # one prompt in use and one wanted here, one in use and two wanted there, 4 blocks each
        "blocks in use or wanted here against the mean of all replicas, a / (a + b)": round(
            8 / (8 + 10), 6
        ),
        "clients here against the mean of all replicas, a / (a + b)": 0.5,
        "mean seconds of a token, all clients busy, against those here, a / (a + b)": 0.6,
        "replicas without a request / other replicas": 0.0,
        "replicas in a prefill or mixed stage / other replicas": 1.0,
        "idle clients elsewhere / clients elsewhere": 0.5,
        "waiting elsewhere / waiting": TWO_THIRDS,
        "waiting elsewhere per client there, log-scaled": 1 / 8,
        "waiting elsewhere against idle clients here, a / (a + b)": TWO_THIRDS,
        # one second of the stage there, half a second of a round here
        "mean seconds until a round or stage elsewhere ends against a round here, a / (a + b)": TWO_THIRDS,
        "idle clients here that no request waits or comes for / clients, where replicas may steal": 0.0,
        "requests on the way here / clients": 0.0,
        "seconds to copy a cached request of mean length against prefilling it again, a / (a + b)": 0.0,
    }


# ---- blocks and names ------------------------------------------------------------------------


def test_names_are_unique() -> None:
    names = features_of(OBSERVATION_BLOCKS)
    assert len(set(names)) == len(names)
    assert tuple(BLOCK_FEATURES) == OBSERVATION_BLOCKS
    for block, features in BLOCK_FEATURES.items():
        assert {block_of(name) for name in features} == {block}


def test_the_docstring_tabulates_every_entry() -> None:
    text = ServingEnv.__doc__ or ""
    for features in (MEMORY_FEATURES, CLUSTER_FEATURES, LATENCY_FEATURES):
        for entry, name in enumerate(features):
            assert f"| {entry} | {name} |" in text


@pytest.mark.parametrize("observe", [("memory",), ("cluster", "memory"), ("cluster", "replica")])
def test_blocks_stand_in_their_order(observe: tuple[str, ...]) -> None:
    """Whatever the order in which a task names them; each is what it is among all blocks."""
    overrides = {"cluster": {"replicas": 2, "kv_capacity_tokens": 4000, "router": "random"}}
    whole = ServingEnv(with_overrides(TINY, ALL | overrides))
    env = ServingEnv(with_overrides(TINY, {"process": {"observe": observe}} | overrides))
    assert env.task.process == ProcessConfig(observe=observe[::-1])
    everything, _ = whole.reset(seed=1)
    observation, _ = env.reset(seed=1)
    for _ in range(5):
        by_name = dict(zip(whole.features, everything.tolist(), strict=True))
        assert [by_name[name] for name in env.features] == observation.tolist()
        action = np.int64(env.action_masks().argmax())
        everything, observation = whole.step(action)[0], env.step(action)[0]


def test_sizes_depend_on_no_number_of_anything() -> None:
    shapes = set()
    for cluster in ({"clients": 2}, {"clients": 7, "replicas": 3, "kv_capacity_tokens": 5000}):
        for requests in (3, 40):
            overrides = ALL | {"cluster": cluster, "workload": {"requests": requests}}
            env = ServingEnv(with_overrides(TINY, overrides))
            assert env.observation_space.shape == env.reset(seed=0)[0].shape
            shapes.add(env.observation_space.shape)
    assert shapes == {(len(features_of(OBSERVATION_BLOCKS)),)}


def test_blocks_that_do_not_exist() -> None:
    for observe, words in (
        (["memry"], "unknown block of process.observe: 'memry'; did you mean 'memory'?"),
        (["weather"], "unknown block of process.observe: 'weather'; choose from replica, memory"),
        ([], "process.observe must name at least one block, each once"),
        (["memory", "memory"], "process.observe must name at least one block, each once"),
        ("memory", "process.observe must be a list, got 'memory'"),
    ):
        overrides = {"process": {"observe": observe}}
        refused(partial(with_overrides, TINY, overrides), words)


@pytest.mark.parametrize("policy", ["rollout-1", "fcfs"])
def test_what_is_observed_changes_no_rule(policy: str) -> None:
    """Nor imagination, which copies the rows of any task."""
    from servegym.baselines.registry import make_policy

    overrides = {"cluster": {"replicas": 2, "clients": 2, "kv_capacity_tokens": 4000}}
    task = with_overrides(TINY, overrides)
    gaps = [
        play(each, policy, make_policy(policy), make_case(each, 3), 3).row["gap"]
        for each in (task, with_overrides(task, ALL))
    ]
    assert gaps[0] == gaps[1]
