"""The joint planner: its schedules are real ones, never below the optimum, and often reach it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.baselines.calendar.planner import JointPlan, plan_jointly
from servegym.baselines.calendar.search import anneal, make_calendar, misfit
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.baselines.schedules import Stage, replay
from servegym.envs import Requests, make_requests
from servegym.envs.errors import ServegymError
from servegym.envs.machine.costs import StageCosts
from servegym.envs.playing.evaluation import make_case
from servegym.envs.task.registered import TASKS
from tests.helpers import UNIT_COSTS, changed, instance, random_costs
from tests.reference_simulator import decode_round_s, optimal_makespan, prefill_stage_s

TINY = TASKS["servegym/Tiny-v0"]
GSM8K = TASKS["servegym/GSM8K-v0"]


def stage(clock: int, *ids: int) -> Stage:
    return Stage(clock, ids)


def carried_out_s(
    requests: Requests, clients: int, costs: StageCosts, stages: tuple[Stage, ...]
) -> float:
    """A second opinion: the makespan round by round, refusing what no schedule may do."""
    emitted = [0] * len(requests)
    prompts, outputs = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
    seconds, clock, coming = 0.0, 0, list(stages)
    while coming or any(0 < e < o for e, o in zip(emitted, outputs, strict=True)):
        active = [i for i in range(len(requests)) if 0 < emitted[i] < outputs[i]]
        if coming and coming[0].clock == clock:
            batch = list(coming.pop(0).requests)
            assert 0 < len(batch) <= clients - len(active)
            assert all(emitted[i] == 0 for i in batch)
            seconds += prefill_stage_s(costs, [prompts[i] for i in batch])
            stepped = batch
        else:
            assert active
            cached = sum(prompts[i] + emitted[i] for i in active)
            seconds += decode_round_s(costs, len(active), cached)
            clock, stepped = clock + 1, active
        for i in stepped:
            emitted[i] += 1
    assert emitted == outputs
    return seconds


def small_case(seed: int, most: int, longest: int) -> tuple[Requests, int, StageCosts]:
    rng = np.random.default_rng(seed)
    n, clients = int(rng.integers(1, most + 1)), int(rng.integers(1, 4))
    requests = make_requests(rng.integers(1, 41, n), rng.integers(1, longest + 1, n))
    return requests, clients, random_costs(rng, clients, dyadic=False)


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_plans_are_schedules_and_the_second_opinion_agrees(seed: int) -> None:
    requests, clients, costs = small_case(seed, most=30, longest=25)
    tables = costs.tables(clients)
    plan = plan_jointly(requests, clients, tables, seed=seed, moves=20_000)
    clocks = [stage.clock for stage in plan.stages]
    assert clocks == sorted(clocks)
    admitted = np.concatenate([stage.requests for stage in plan.stages])
    assert sorted(admitted.tolist()) == list(range(len(requests)))
    assert replay(requests, clients, tables, plan.stages) == pytest.approx(
        plan.makespan_s, abs=1e-9
    )
    assert carried_out_s(requests, clients, costs, plan.stages) == pytest.approx(plan.makespan_s)
    assert plan.gap >= -1e-12


def test_tiny_cases_are_never_below_the_optimum_and_mostly_reach_it() -> None:
    reached = 0
    for seed in range(30):
        requests, clients, costs = small_case(seed, most=5, longest=5)
        plan = plan_jointly(requests, clients, costs.tables(clients), moves=50_000)
        optimum = optimal_makespan(requests, clients, costs)
        assert plan.makespan_s >= optimum - 1e-9
        reached += plan.makespan_s < optimum + 1e-9
    assert reached >= 24


def test_a_hand_solved_case() -> None:
    """Lengths 4, 2 and 2 on two clients: the second follows the third at once, 2 stages, 4 rounds."""
    requests = instance((5, 5), (5, 3), (5, 3))
    plan = plan_jointly(requests, 2, UNIT_COSTS.tables(2), moves=10_000)
    assert plan.makespan_s == 2 * 2.0 + 4 * 1.0
    assert [stage.clock for stage in plan.stages] == [0, 2]
    assert 0 in plan.stages[0].requests


def test_a_plan_is_no_worse_than_rules_and_moves_improve_it() -> None:
    task = changed(GSM8K, cluster={"clients": 20}, workload={"requests": 130})
    case, tables = make_case(task, 0), task.cost.tables(20)
    rules_alone = plan_jointly(case.requests, 20, tables, moves=0)
    rule = play_compiled(task, make_trigger_policy("aligned-lookahead-0.7"), case)
    assert rules_alone.makespan_s <= rule["makespan_s"] + 1e-9
    searched = plan_jointly(case.requests, 20, tables, moves=1_000_000)
    assert searched.gap < 0.9 * rules_alone.gap


def test_equal_arguments_give_equal_plans() -> None:
    case = make_case(TINY, 3)

    def plan(seed: int) -> JointPlan:
        return plan_jointly(case.requests, 3, TINY.cost.tables(3), seed=seed, moves=5_000)

    first, second = plan(1), plan(1)
    assert first.makespan_s == second.makespan_s
    for mine, its in zip(first.stages, second.stages, strict=True):
        assert mine.clock == its.clock
        np.testing.assert_array_equal(mine.requests, its.requests)


def test_no_time_leaves_the_rules() -> None:
    case = make_case(TINY, 3)
    tables = TINY.cost.tables(3)
    hurried = plan_jointly(case.requests, 3, tables, time_limit_s=0.0)
    assert hurried.makespan_s <= plan_jointly(case.requests, 3, tables, moves=0).makespan_s


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_the_annealed_energy_is_that_of_the_schedule(seed: int) -> None:
    """Energy, stops and held clients after many moves equal those computed anew."""
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, 30, 40))
    times = np.concatenate(([0], np.sort(rng.choice(np.arange(1, 60), 8, replace=False))))
    calendar = make_calendar(lengths, rng.integers(0, 8, 40), times)
    clients = int(rng.integers(1, 12))
    left = anneal(calendar, clients, 30.0, 0.5, 2_000, rng)
    fresh = make_calendar(calendar.lengths, calendar.start, calendar.times)
    assert misfit(fresh, clients, fresh.stop, fresh.held) == left
    np.testing.assert_array_equal(fresh.next_stage, calendar.next_stage)
    np.testing.assert_array_equal(fresh.stop, calendar.stop)
    np.testing.assert_array_equal(fresh.held[:-1], calendar.held[:-1])
    assert (np.diff(calendar.times) > 0).all()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage(0, 0, 1), stage(1, 2)], "admits 1 requests, but 0 clients are idle"),
        ([stage(0, 0, 0), stage(4, 1)], "each once"),
        ([stage(0, 0), stage(0, 0)], "must admit requests that wait"),
        ([stage(0, 0, 3)], "must admit requests that wait"),
        ([stage(0), stage(0, 1)], "at least one"),
        ([stage(0, 0, 1)], "no stage admits request 2"),
        ([stage(0, 0, 1), stage(9, 2)], "decoding stands at 4 with 0 active"),
        ([stage(0, 0), stage(2, 1), stage(1, 2)], "decoding stands at 2 with 2 active"),
    ],
)
def test_what_is_no_schedule_is_refused(stages: list[Stage], message: str) -> None:
    requests = instance((5, 5), (5, 5), (5, 5))
    with pytest.raises(ServegymError, match=message):
        replay(requests, 2, UNIT_COSTS.tables(2), stages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": [stage(0, 0, 1), Stage(1.5, (2,))]}, "decode clock of stage 1 must be a whole"),  # type: ignore[arg-type]
        ({"schedule": [stage(0, 0, 1), Stage(2**63, (2,))]}, "decode clock of stage 1 must lie"),
        ({"schedule": [stage(-1, 0, 1)]}, "decode clock of stage 0 must lie"),
        ({"schedule": [Stage(0, (0, 0.7))]}, r"requests of stage 0 .*whole numbers, got 0.7"),  # type: ignore[arg-type]
        ({"schedule": [Stage(0, ("a",))]}, "requests of stage 0 must be whole numbers, got texts"),  # type: ignore[arg-type]
        ({"requests": make_requests([5, 5, 5], [2, 3, 2], arrival_s=[0.0, 0.0, 0.5])}, "arrives at 0.5 s"),
        ({"clients": 3}, "clients must lie in 1 … 2, got 3"),
        ({"clients": 0}, "clients must lie in 1 … 2, got 0"),
        ({"clients": 2.0}, "clients must be a whole number"),
        ({"max_prefill_tokens": -1}, "max_prefill_tokens must be ≥ 0"),
    ],
)  # fmt: skip
def test_what_is_no_case_to_replay_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "requests": instance((5, 2), (5, 3), (5, 2)),
        "clients": 2,
        "costs": UNIT_COSTS.tables(2),
        "schedule": [stage(0, 0, 1), stage(1, 2)],
        "max_prefill_tokens": 10,
    }
    makespan_s = replay(**arguments)
    assert makespan_s == 2 + 1 + 2 + 1
    with pytest.raises(ServegymError, match=message) as refusal:
        replay(**arguments | change)
    assert "\n" not in str(refusal.value)
    # As numpy has whole numbers, and with tables of more clients.
    stages = [Stage(np.int64(0), np.array([0, 1])), Stage(np.int64(1), np.array([2.0]))]  # type: ignore[arg-type]
    twin = {"schedule": stages, "costs": UNIT_COSTS.tables(3), "max_prefill_tokens": 0}
    assert replay(**arguments | twin) == makespan_s


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": 0}, "clients must be ≥ 1, got 0"),
        ({"time_limit_s": -1.0}, "time limit must be ≥ 0"),
        ({"time_limit_s": float("nan")}, "time limit must be ≥ 0"),
        ({"moves": -1}, "moves must be ≥ 0"),
        ({"requests": instance((5, 5), (5, 5, 1.0))}, "1 arrive later"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    good: dict[str, Any] = {
        "requests": instance((5, 5)),
        "clients": 2,
        "costs": UNIT_COSTS.tables(2),
    }
    plan_jointly(**good, moves=0)
    with pytest.raises(ServegymError, match=message):
        plan_jointly(**(good | change))
