"""The exact optimum: three ways agree, schedules are valid, no policy is faster, limits are honest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.baselines.catalogue import MIXED, REGISTRY
from servegym.baselines.exact.optimum import METHODS, ExactOptimum, exact_optimum
from servegym.baselines.exact.problem import JointProblem
from servegym.baselines.exact.search import search
from servegym.baselines.registry import make_policy
from servegym.baselines.schedules import Schedule, Stage
from servegym.envs import Requests, make_requests
from servegym.envs.bounds.batch import lower_bound
from servegym.envs.errors import ServegymError
from servegym.envs.machine.costs import (
    AffineDecode,
    AffinePrefill,
    CostModel,
    LevelledPrefill,
    StageCosts,
    TableDecode,
)
from servegym.envs.machine.presets import cost_preset
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from tests.helpers import UNIT_COSTS, instance, random_costs
from tests.reference_simulator import optimal_makespan

TINY = TASKS["servegym/Tiny-v0"]
# A full batch takes more than two halves, and a round of three less than one of two.
ODD_DECODE = TableDecode((1, 2, 3), (1.0, 2.5, 2.2), 0.01)
STEEP_LEVELS = LevelledPrefill((8, 16, 40), (1.0, 5.0, 6.0))
COSTS = (
    None,  # random_costs
    None,
    cost_preset("tiny").costs,
    StageCosts(AffineDecode(1.0), AffinePrefill(0.0, 0.1)),  # stages cost nothing by themselves
    StageCosts(AffineDecode(1.0, 0.1, 0.001), AffinePrefill(0.1, 0.05, 0.0, 1.5)),  # a floor
    StageCosts(AffineDecode(0.5), STEEP_LEVELS),
    StageCosts(ODD_DECODE, AffinePrefill(1.0, 0.01)),
    StageCosts(ODD_DECODE, STEEP_LEVELS),
)


def solve(
    requests: Requests, clients: int, costs: CostModel, budget: int = 0, **how: Any
) -> ExactOptimum:
    return exact_optimum(requests, clients, costs.tables(clients), budget, **how)


def tiny_requests(n: int, longest: int, seed: int) -> Requests:
    rng = np.random.default_rng(seed)
    return make_requests(rng.integers(4, 13, n), 1 + rng.integers(0, longest, n))


def random_case(seed: int) -> tuple[Requests, int, StageCosts, int]:
    """Up to 5 requests on 1 … 3 clients; many are alike, many need no round, some budgets bind."""
    rng = np.random.default_rng(seed)
    clients, n = int(rng.choice([1, 2, 2, 3, 3])), int(rng.integers(1, 6))
    costs = COSTS[seed % len(COSTS)] or random_costs(rng, clients, dyadic=False)
    prompts = rng.integers(1, int(rng.choice([4, 41])), n)
    requests = make_requests(prompts, 1 + rng.integers(0, int(rng.choice([2, 4, 6])), n))
    return requests, clients, costs, int(rng.choice([0, 0, 0, 1, 20, 60]))


@pytest.mark.filterwarnings("ignore:decode table ends")
@pytest.mark.parametrize("block", range(10))
def test_three_ways_agree(block: int) -> None:
    """Search, program and the reference's exhaustive search, on 240 cases.

    The search also without the known schedule that cuts it off, which often is optimal itself.
    """
    for seed in range(24 * block, 24 * block + 24):
        requests, clients, costs, budget = random_case(seed)
        expected = pytest.approx(optimal_makespan(requests, clients, costs, budget), rel=1e-9)
        problem = JointProblem(requests, clients, costs.tables(clients), budget)
        alone = search(problem, np.inf, 60)
        assert alone.schedule is not None
        assert problem.makespan_s(alone.schedule) == expected, seed
        assert alone.bound_s + problem.constant_s == expected, seed
        for method in METHODS:
            optimum = solve(requests, clients, costs, budget, method=method)
            assert optimum.proven, (seed, method)
            assert optimum.lower_bound_s == optimum.makespan_s == expected, (seed, method)
            assert problem.makespan_s(optimum.schedule) == optimum.makespan_s


@pytest.mark.filterwarnings("ignore:decode table ends")
def test_the_cases_are_varied() -> None:
    """Each shortcut applies to some of the 240 cases and not to others."""
    problems = []
    for seed in range(240):
        requests, clients, costs, budget = random_case(seed)
        problems.append(JointProblem(requests, clients, costs.tables(clients), budget))
    assert sum(not problem.counts_rounds for problem in problems) > 30
    assert sum(problem.counts_stages for problem in problems) > 30
    assert sum(problem.counts_rounds and not problem.counts_stages for problem in problems) > 60
    assert sum(min(problem.requests.decode_rounds) == 0 for problem in problems) > 60


@pytest.mark.parametrize("method", METHODS)
def test_by_hand(method: str) -> None:
    """Rounds 3, 3, 1 and 1 on two clients, a stage 2 s: pairs of a length, 2 + 3 + 2 + 1 s."""
    optimum = solve(instance((5, 4), (5, 2), (5, 4), (5, 2)), 2, UNIT_COSTS, method=method)
    assert optimum.makespan_s == 8.0
    assert {frozenset(ids) for _, ids in optimum.schedule} == {frozenset({0, 2}), frozenset({1, 3})}


@pytest.mark.parametrize("method", METHODS)
def test_requests_without_rounds(method: str) -> None:
    """Each stage holds two at most, nothing is decoded."""
    optimum = solve(instance(*[(5, 1)] * 5), 2, UNIT_COSTS, method=method)
    assert optimum.makespan_s == 6.0
    assert all(clock == 0 for clock, _ in optimum.schedule)


@pytest.mark.parametrize("method", METHODS)
def test_waiting_can_pay(method: str) -> None:
    """Two clients together are slower than one after the other: a client stays idle on purpose."""
    costs = StageCosts(TableDecode((1, 2), (1.0, 5.0)), AffinePrefill(0.5, 0.0))
    optimum = solve(instance((5, 3), (5, 3)), 2, costs, method=method)
    assert optimum.makespan_s == 0.5 + 2.0 + 0.5 + 2.0


@pytest.mark.parametrize(("clients", "longest"), [(3, 9), (3, 30), (4, 9)])
def test_larger_cases_are_proven(clients: int, longest: int) -> None:
    """The bound of ``servegym.envs.bounds.batch`` lies below the optimum; the search closes the gap."""
    for seed in range(3):
        requests = tiny_requests(10, longest, seed)
        result = solve(requests, clients, TINY.cost)
        bound = lower_bound(requests, clients, TINY.cost.tables(clients))
        assert result.proven
        assert bound.seconds <= result.makespan_s


@settings(max_examples=40)
@given(
    st.integers(0, 2**31),
    st.sampled_from(
        [f"{n}-2" if entry.required else n for n, entry in REGISTRY.items() if n not in MIXED]
    ),
    st.sampled_from(["tiny", "llama2-70b-a100x4", "paper"]),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_no_policy_is_faster(
    seed: int, policy: str, preset: str, requests: int, clients: int
) -> None:
    overrides = {"cost": {"preset": preset}, "cluster": {"clients": clients}}
    task = with_overrides(TINY, overrides | {"workload": {"requests": requests}})
    case = make_case(task, seed)
    played = play(task, policy, make_policy(policy), case, seed).row["makespan_s"]
    optimum = solve(case.requests, clients, task.cost)
    assert optimum.proven
    assert case.bound.seconds * (1 - 1e-9) <= optimum.makespan_s <= played * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_out_of_time(method: str) -> None:
    """The best schedule so far, and a bound that holds."""
    requests = tiny_requests(12, 30, 0)
    optimum = solve(requests, 4, TINY.cost)
    assert optimum.proven
    result = solve(requests, 4, TINY.cost, method=method, time_limit_s=0.001)
    assert not result.proven
    assert result.lower_bound_s <= optimum.makespan_s < result.makespan_s
    assert result.gap == result.makespan_s / result.lower_bound_s - 1 > 0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([Stage(0, (0, 1))], "no stage admits request 2"),
        ([Stage(0, (0, 1)), Stage(1, (1, 2))], "each once"),
        ([Stage(0, (0, 1, 2))], "3 requests, but 2 clients are idle"),
        ([Stage(0, (0, 1)), Stage(0, (2,))], "1 requests, but 0 clients are idle"),
        ([Stage(0, (1,)), Stage(1, (0,)), Stage(0, (2,))], "decoding stands at 1 with 2 active"),
        ([Stage(1, (0, 1)), Stage(1, (2,))], "decoding stands at 0 with 0 active"),
        ([Stage(0, (0, 1)), Stage(4, (2,))], "decoding stands at . with 0 active"),
    ],
)
def test_replay_refuses(three_on_two: Requests, schedule: Schedule, message: str) -> None:
    problem = JointProblem(three_on_two, 2, UNIT_COSTS.tables(2))
    assert problem.makespan_s([Stage(0, (0, 1)), Stage(1, (2,))]) == 2 + 1 + 2 + 2
    with pytest.raises(ServegymError, match=message):
        problem.makespan_s(schedule)


def test_replay_refuses_a_stage_over_the_budget(three_on_two: Requests) -> None:
    problem = JointProblem(three_on_two, 2, UNIT_COSTS.tables(2), 9)
    with pytest.raises(ServegymError, match="over the token budget"):
        problem.makespan_s([Stage(0, (0, 1)), Stage(1, (2,))])


FEW = instance((5, 2), (5, 4))


@pytest.mark.parametrize(
    ("requests", "clients", "how", "message"),
    [
        (FEW, 2, {"method": "serach"}, "did you mean 'search'"),
        (FEW, 2, {"time_limit_s": 0.0}, "time_limit_s must be finite and > 0"),
        (FEW, 2, {"time_limit_s": np.nan}, "time_limit_s must be finite and > 0"),
        (FEW, 3, {}, "the cost tables are for 2 clients, not 3"),
        (FEW, 0, {}, "clients must be ≥ 1"),
        (instance((5, 2), (5, 4, 1.5)), 2, {}, r"all requests at t = 0, the last arrives at 1.5 s"),
        # The search tells differing requests apart by one bit each; 16 are the most it can do.
        (tiny_requests(60, 500, 0), 2, {}, r"it can do 16 different .* a lower bound is \d+"),
        (
            tiny_requests(60, 500, 0),
            2,
            {"method": "mip"},
            r"it can do 200000; a lower bound is \d+",
        ),
    ],
)
def test_refuses(requests: Requests, clients: int, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ServegymError, match=message):
        exact_optimum(requests, clients, TINY.cost.tables(2), **how)


def test_clients_that_no_request_is_left_for_change_nothing() -> None:
    """A user's four requests on the usual 200 clients are a small case."""
    requests, costs = instance((70, 30), (55, 12), (90, 51), (40, 20)), cost_preset("tiny").costs
    few, many = solve(requests, 4, costs), solve(requests, 200, costs)
    assert many.proven
    assert many.makespan_s == few.makespan_s
    assert many.schedule == few.schedule
