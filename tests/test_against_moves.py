"""Moving requests: the compiled core equals the slow reference; whatever is done, everybody is served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import Requests, ServingEnv
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.playing.evaluation import play
from servegym.envs.simulator.state import IDLE, NOBODY
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.vocabulary import ADMISSION_RULES, STEALS
from tests.against_cluster import compare_cluster
from tests.cluster_helpers import (
    MANY_STEPS,
    assert_empty,
    play_any,
    requests_of,
    shared_case,
    stealing_case,
    task_of,
)
from tests.random_clusters import ClusterCase, random_case
from tests.reference_cluster import ClusterSpec, ReplicaSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode table ends at batch"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # kernels as plain Python
]


def case_of(seed: int) -> ClusterCase:
    """A random case in which requests may move; every other one is exact."""
    return shared_case(np.random.default_rng([21, seed]), dyadic=bool(seed % 2), moving=True)


def thieves(seed: int) -> ClusterCase:
    """The same, both kinds of theft allowed wherever there is something to steal from."""
    return stealing_case(np.random.default_rng([21, seed]), dyadic=bool(seed % 2))


def posed(case: ClusterCase, **process: object) -> tuple[ServingEnv, Requests]:
    """The environment of a case at its first decision, with every rule of admission."""
    env = ServingEnv(task_of(case.spec, mixed_rules=ADMISSION_RULES, **process))
    requests = requests_of(case)
    env.reset(options={"requests": requests})
    return env, requests


# ---- the reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_the_compiled_core_equals_the_reference(first: int) -> None:
    moves = sum(
        sum(record.moves for record in compare_cluster(case_of(seed)).records)
        for seed in range(first, first + 50)
    )
    assert moves > 50


# ---- any legal actions -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_any_legal_actions_serve_everybody(seed: int) -> None:
    """Nothing is lost on the way; the return is the gap, and memory is empty at the end."""
    rng = np.random.default_rng([22, seed])
    env, _ = posed(thieves(seed), decisions=str(rng.choice(["events", "rounds"])))
    state = env.state
    assert state is not None

    def watch() -> None:
        assert (state.replicas[0].used_blocks <= state.machines.blocks).all()

    total, _ = play_any(env, rng, watch)
    log, metrics = env.records(), env.metrics()
    assert np.isfinite(log.finished_s[~log.rejected]).all()
    assert_empty(state)
    assert int(state.episodes[0].served_rounds) == int(log.decode_rounds[~log.rejected].sum())
    if not log.rejected.all():
        assert total == pytest.approx(-100 * metrics["gap"], rel=1e-9, abs=1e-9)
        assert metrics["gap"] > -1e-9


def test_an_illegal_action_is_replaced_by_the_first_legal_one() -> None:
    """A mask says what a step takes, thefts and waiting included."""
    replaced = stolen = 0
    for seed in range(16):
        rng = np.random.default_rng([23, seed])
        envs = [posed(thieves(seed))[0] for _ in range(2)]
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
            stolen += envs[0].task.actions[taken].startswith("steal")
            assert seen.tobytes() == other[0].tobytes()
            assert (reward, over) == (other[1], other[2])
    assert replaced > 0
    assert stolen > 0


@pytest.mark.parametrize("kind", STEALS)
def test_a_theft_is_legal_until_there_is_no_room(kind: str) -> None:
    """Each takes something at once: the mask of the same replica changes, or room does."""
    for seed in range(30):
        env, _ = posed(thieves(seed))
        state, name = env.state, f"steal:{kind}"
        if name not in env.task.actions:
            continue
        assert state is not None
        action, over = env.task.actions.index(name), False
        rng = np.random.default_rng([24, seed])
        while not over:
            mask = env.action_masks()
            before = int(state.requests[0].moves.sum()) + int(state.episodes[0].transfers)
            taken = action if mask[action] else int(rng.choice(np.flatnonzero(mask)))
            now_s = float(state.episodes[0].now_s)
            over = env.step(np.int64(taken))[2]
            if taken == action and not over and float(state.episodes[0].now_s) == now_s:
                assert (
                    int(state.requests[0].moves.sum()) + int(state.episodes[0].transfers) > before
                )


# ---- waiting ---------------------------------------------------------------------------------


def test_decoding_where_nobody_decodes_is_waiting() -> None:
    """Action 0 begins no stage; it is legal where only theft is, memory is kept for others, or in a pool."""
    waited = kept = 0
    for seed in range(40):
        env, _ = posed(thieves(seed))
        state, over = env.state, False
        assert state is not None
        rng = np.random.default_rng([25, seed])
        while not over:
            mask, turn = env.action_masks(), int(state.episodes[0].turn)
            replica = state.replicas[0, turn]
            if mask[0] and not replica.active:
                waited += 1
                kept += replica.used_blocks > 0
                kinds = {env.task.actions[k].split(":")[0] for k in np.flatnonzero(mask)}
                shared = state.queues.shape[1] < state.replicas.shape[1]
                assert kinds == {"decode", "steal"} or replica.used_blocks > 0 or shared
                assert replica.partial == NOBODY
                rounds = int(replica.rounds)
                now_s = float(state.episodes[0].now_s)
                over = env.step(np.int64(0))[2]
                assert replica.rounds == rounds or float(state.episodes[0].now_s) > now_s
                if not over and int(state.episodes[0].turn) > turn:  # else it has been asked again
                    assert replica.stage == IDLE or float(state.episodes[0].now_s) > now_s
            else:
                assert mask[0] == (replica.active > 0)
                over = env.step(np.int64(rng.choice(np.flatnonzero(mask))))[2]
    assert waited > 20
    assert kept > 10


def choose_waiting(env: ServingEnv, rng: np.random.Generator) -> int:
    """Wait where that is legal; else anything."""
    assert env.state is not None
    mask, turn = env.action_masks(), int(env.state.episodes[0].turn)
    waits = mask[0] and not env.state.replicas[0, turn].active
    return 0 if waits else int(rng.choice(np.flatnonzero(mask)))


def choose_stealing(env: ServingEnv, rng: np.random.Generator) -> int:
    """Steal where that is legal; else anything."""
    legal = np.flatnonzero(env.action_masks())
    steals = [k for k in legal if env.task.actions[k].startswith("steal")]
    return int(rng.choice(steals or legal))


def choose_no_theft(env: ServingEnv, rng: np.random.Generator) -> int:
    """Never steal, though it may be legal: wait or do anything else."""
    legal = np.flatnonzero(env.action_masks())
    return int(rng.choice([k for k in legal if not env.task.actions[k].startswith("steal")]))


@pytest.mark.parametrize("choose", [choose_waiting, choose_stealing, choose_no_theft])
def test_waiting_and_stealing_come_to_an_end(
    choose: Callable[[ServingEnv, np.random.Generator], int],
) -> None:
    """Whoever waits or steals whenever it may still serves everybody."""
    for seed in range(40):
        env, _ = posed(thieves(seed))
        rng, over, steps = np.random.default_rng([26, seed]), False, 0
        while not over:
            over = env.step(np.int64(choose(env, rng)))[2]
            steps += 1
            assert steps < MANY_STEPS, seed
        log = env.records()
        assert np.isfinite(log.finished_s[~log.rejected]).all()
        assert env.state is not None
        assert_empty(env.state)


# ---- the compiled loop -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fcfs", "lpt", "hybrid", "vllm"])
def test_the_environment_equals_the_compiled_loop(name: str) -> None:
    """The same metrics from the policy object, asked at each decision, and from compiled code."""
    moves = 0.0
    for seed in range(24):
        case = thieves(seed)
        if name == "vllm" and case.spec.chunk_tokens == 0:
            case = ClusterCase(case.requests, replace(case.spec, chunk_tokens=16))
        task, policy = task_of(case.spec), make_trigger_policy(name)
        instance = bound_case(lower(task), requests_of(case))
        compiled = play_compiled(task, policy, instance)
        row = play(task, name, policy, instance, seed=0).row
        moves += compiled["moves"]
        for metric, value in compiled.items():
            if metric != "decisions":  # compiled code counts those where the rule has a choice
                assert row[metric] == value or np.isnan(value), (seed, metric)
    assert moves > 50


@pytest.mark.parametrize("seed", range(8))
def test_a_rollout_never_ends_later_than_its_base(seed: int) -> None:
    """With known lengths and everybody present at the start, thefts among its actions."""
    case = thieves(seed)
    rows = [(0.0, prompt, output) for _, prompt, output in case.requests]
    task = task_of(case.spec)
    instance = bound_case(lower(task), requests_of(ClusterCase(rows, case.spec)))
    base, policy = make_policy("fcfs"), make_policy("rollout(variations=2, base=fcfs)")
    usual = play(task, "fcfs", base, instance, seed=0).row["makespan_s"]
    ours = play(task, "rollout", policy, instance, seed=0).row["makespan_s"]
    assert ours <= usual * (1 + 1e-9)


def test_what_a_victim_leaves_of_the_budget_goes_to_the_half_computed_prompt() -> None:
    """Two decode and fill the budget of 2; one is preempted, so the prompt begun goes on by a token."""
    case = random_case(np.random.default_rng([22856, 77]), dyadic=False, moving=True)
    spec = replace(case.spec, padded=False, reserve="chunk")
    compare_cluster(ClusterCase(case.requests, spec))


def test_a_finish_elsewhere_may_let_a_thief_take_a_running_request() -> None:
    """At 11 s a finish leaves three at each of two replicas; the first one's requests fit the thief's memory.

    The second had four, and its longest did not fit. The thief's round ends at 11.4 s.
    """
    costs = StageCosts(AffineDecode(1.0, 0.0), AffinePrefill(2.0, 0.0, 0.0, 0.0))
    replicas = (ReplicaSpec(4, 100), ReplicaSpec(4, 100), ReplicaSpec(4, 100, 0.7))
    spec = ClusterSpec(replicas, costs, router="round-robin", steals=("running",))
    first = [(1, 95), (1, 95), (1, 95), (1, 1)]
    second = [(40, 60), (1, 10), (1, 50), (1, 50)]
    thief = [(70, 28), (1, 1), (1, 1), (1, 1)]
    rows = [(0.0, *row) for turn in zip(first, second, thief, strict=True) for row in turn]
    moves = compare_cluster(ClusterCase(rows, spec)).moves
    assert [(move.source and move.source.id, move.target.id) for move in moves] == [(0, 2)]
    assert 11.4 < moves[0].made_s < 11.5
