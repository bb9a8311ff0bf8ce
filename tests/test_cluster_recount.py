"""Whatever is done in a cluster, every sum that the simulator keeps equals a count; all is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from servegym.envs import ServingEnv, make_requests
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.simulator.state import LANDED, State
from servegym.envs.task.sections import InformationConfig
from servegym.envs.vocabulary import ADMISSION_RULES, MOVES, OBSERVATION_BLOCKS, ROUTERS
from tests.cluster_helpers import (
    informed,
    play_any,
    play_eagerly,
    requests_of,
    shared_case,
    stealing_case,
    task_of,
)
from tests.random_clusters import ClusterCase
from tests.recount import recount
from tests.reference_cluster import ClusterSpec, ReplicaSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]


def watched(
    env: ServingEnv,
    rng: np.random.Generator,
    prefer: str = "decode",
    also: Callable[[State], None] = lambda _: None,
) -> tuple[float, dict[str, float]]:
    """Take random legal actions; at every decision recount, and look at clocks and observation."""
    state = env.state
    assert state is not None
    clocks = [float(state.episodes[0].now_s), *state.replicas[0].clock_s.tolist()]

    def watch() -> None:
        recount(state)
        also(state)
        now = [float(state.episodes[0].now_s), *state.replicas[0].clock_s.tolist()]
        assert all(before <= after for before, after in zip(clocks, now, strict=True))
        assert max(now) == now[0]  # nothing is booked that has not happened
        clocks[:] = now
        observation = env.rows.observations[0]
        assert (observation >= 0).all()
        assert (observation <= 1).all()

    return play_any(env, rng, watch, prefer)


def case_of(seed: int, *, moving: bool = False) -> ClusterCase:
    rng = np.random.default_rng([12, seed])
    return shared_case(rng, dyadic=bool(seed % 2), moving=moving)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_every_rule_and_mixed_rule(seed: int, *, moving: bool) -> None:
    case, rng = case_of(seed, moving=moving), np.random.default_rng(seed)
    decisions = str(rng.choice(["events", "rounds"]))
    process = {"mixed_rules": ADMISSION_RULES, "observe": OBSERVATION_BLOCKS}
    env = ServingEnv(task_of(case.spec, decisions=decisions, **process))
    env.reset(options={"requests": requests_of(case)})
    watched(env, rng)
    log = env.records()
    assert np.isfinite(log.finished_s[~log.rejected]).all()


@pytest.mark.parametrize("lengths", ["known", "predicted"])
def test_thefts_meet_every_kind_of_transfer(lengths: str) -> None:
    met = set[int]()

    def look(state: State) -> None:
        met.update(state.transfers[0, : int(state.episodes[0].transfers)].kind.tolist())

    for seed in range(60):
        rng = np.random.default_rng([seed, 16])
        case = stealing_case(rng, dyadic=bool(seed % 2))
        known = requests_of(case)
        expected = np.maximum(known.output_tokens // rng.integers(1, 4, len(known)), 1)
        spec = replace(case.spec, move_by=tuple(MOVES)[seed % 2])
        task = task_of(spec, mixed_rules=ADMISSION_RULES)
        env = ServingEnv(replace(task, information=informed(lengths)))
        requests = requests_of(case, expected.tolist())
        env.reset(options={"requests": known if lengths == "known" else requests})
        watched(env, rng, "steal", look)
        log = env.records()
        assert np.isfinite(log.finished_s[~log.rejected]).all()
    assert met == set(range(LANDED + 1))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("rule", ADMISSION_RULES)
def test_one_rule_alone_serves_everybody(rule: str, router: str) -> None:
    """Also a rule that follows a plan, where replicas differ in memory."""
    for seed in range(2):
        rng = np.random.default_rng([seed, 13])
        case = shared_case(rng, dyadic=True, routers=["llumnix"])  # every memory is limited
        task = task_of(case.spec, rules=(rule,), mixed_rules=(rule,))
        env = ServingEnv(replace(task, cluster=replace(task.cluster, router=router)))
        env.reset(options={"requests": requests_of(case)})
        watched(env, rng)
        log = env.records()
        assert np.isfinite(log.finished_s[~log.rejected]).all()


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_lengths_that_are_not_known(seed: int, *, moving: bool) -> None:
    """Preempted requests, and those that move, that outlive their expected lengths, too."""
    rng = np.random.default_rng([seed, 14])
    case = shared_case(rng, dyadic=bool(seed % 2), moving=moving)
    known = requests_of(case)
    expected = np.maximum(known.output_tokens // rng.integers(1, 4, len(known)), 1)
    requests = make_requests(
        known.prompt_tokens,
        known.output_tokens,
        known.arrival_s,
        expected,
        np.full(len(known), rng.choice([0.0, 0.3, 1.5])),
    )
    task = task_of(replace(case.spec, admission_guard="none"), mixed_rules=ADMISSION_RULES)
    env = ServingEnv(replace(task, information=InformationConfig(output_lengths="predicted")))
    env.reset(options={"requests": requests})
    watched(env, rng)
    log = env.records()
    assert np.isfinite(log.finished_s[~log.rejected]).all()


@pytest.mark.parametrize("seed", range(30))
def test_the_return_is_minus_the_mean_latency(seed: int) -> None:
    """Over all requests; one that is rejected waits for nothing."""
    case = case_of(seed)
    env = ServingEnv(task_of(case.spec, reward="latency"))
    env.reset(options={"requests": requests_of(case)})
    total, _ = play_eagerly(env, "mixed:fcfs" if case.spec.chunk_tokens else "prefill:fcfs")
    log = env.records()
    latency_s = np.where(log.rejected, 0.0, log.finished_s - log.arrival_s)
    assert total == pytest.approx(-latency_s.mean(), rel=1e-9, abs=1e-9)


def test_the_bound_holds_where_more_clients_decode_than_a_pass_has_tokens() -> None:
    """Prefill stages are not bound by the token budget of a mixed stage."""
    costs = StageCosts(AffineDecode(1.75), AffinePrefill(2.0, 0.0))
    spec = ClusterSpec((ReplicaSpec(5),), costs, chunk_tokens=1)
    env = ServingEnv(task_of(spec))
    env.reset(options={"requests": requests_of(ClusterCase([(0.0, 4, 20)] * 10, spec))})
    _, info = play_eagerly(env, "prefill:fcfs")
    assert info["gap"] >= 0


@pytest.mark.parametrize("chunked", [False, True])
def test_an_illegal_action_is_replaced_by_the_first_legal_one(*, chunked: bool) -> None:
    """A mask says what a step takes, on every replica of a cluster."""
    rng = np.random.default_rng(15)
    replaced = 0
    for _ in range(12):
        case = shared_case(rng, dyadic=True, chunked=chunked, rejections=False)
        envs = [ServingEnv(task_of(case.spec)) for _ in range(2)]
        for env in envs:
            env.reset(options={"requests": requests_of(case)})
        over = False
        while not over:
            mask = envs[0].action_masks()
            assert mask.any()
            action = int(rng.integers(len(mask)))
            taken = action if mask[action] else int(np.argmax(mask))
            seen, reward, over, _, info = envs[0].step(np.int64(action))
            other = envs[1].step(np.int64(taken))
            assert info.get("illegal_action", False) == (action != taken)
            replaced += action != taken
            assert seen.tobytes() == other[0].tobytes()
            assert (reward, over) == (other[1], other[2])
    assert replaced > 0
