"""The offline planner: hand-solved plans, the load bound, and agreement with brute force."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from servegym.baselines.planning import walk as walk_module
from servegym.baselines.planning.planner import (
    SOLVERS,
    CertifiedPlan,
    plan_offline,
    rebalanced_plan,
)
from servegym.baselines.planning.walk import Walk
from servegym.envs.bounds.rounds import rounds_lower_bound
from servegym.envs.errors import ServegymError
from servegym.envs.task.cluster import MAX_CLIENTS
from servegym.envs.workload.plan import Plan, plan_from_queues
from servegym.envs.workload.requests import MAX_TOKENS
from tests.planner_helpers import least_load, lengths, tiny, whole


def queues(plan: Plan) -> list[list[int]]:
    return [plan.queue(client).tolist() for client in range(plan.clients)]


def lognormal(requests: int, seed: int) -> NDArray[np.int64]:
    """Decode rounds like those of GSM8K answers (mean about 345)."""
    lengths = np.random.default_rng(seed).lognormal(5.71294, 0.51011, requests)
    return np.clip(np.rint(lengths), 1, 1024).astype(np.int64) - 1


small = st.tuples(
    st.lists(lengths, max_size=40).map(lambda numbers: whole(*numbers)), st.integers(1, 9)
)


class TestRoundsLowerBound:
    @pytest.mark.parametrize(
        ("rounds", "clients", "bound"),
        [
            ([], 3, 0),
            ([0, 0], 1, 0),
            ([5], 2, 5),  # the longest
            ([4, 3, 3], 2, 6),  # pigeonhole: two of the three on one client; the area says 5
            ([3, 3, 3, 3, 3], 2, 9),  # pigeonhole with k = 2; the area says 8
            ([3, 3, 2, 2, 2], 2, 6),  # area 12 / 2
            ([1, 1, 1], 2, 2),
            ([2, 2, 1], 2, 3),  # area 5 / 2, rounded up
        ],
    )
    def test_by_hand(self, rounds: list[int], clients: int, bound: int) -> None:
        assert rounds_lower_bound(whole(*rounds), clients) == bound

    @given(tiny)
    def test_never_above_the_optimum(self, case: tuple[NDArray[np.int64], int]) -> None:
        assert rounds_lower_bound(*case) <= least_load(*case)

    @given(small)
    def test_vectorised_agrees_with_its_definition(
        self, case: tuple[NDArray[np.int64], int]
    ) -> None:
        rounds, clients = case
        longest = sorted(rounds.tolist(), reverse=True)
        sets = (longest[: k * clients + 1] for k in range(len(rounds)) if k * clients < len(rounds))
        pigeonhole = [sum(each[-(len(each) // clients + 1) :]) for each in sets if clients > 1]
        expected = max([math.ceil(sum(longest) / clients), *pigeonhole, *longest[:1]])
        assert rounds_lower_bound(rounds, clients) == expected

    @pytest.mark.parametrize(
        ("rounds", "clients", "message"),
        [
            ([1], 0, "clients must be ≥ 1, got 0"),
            ([1, -1], 1, "rounds must be ≥ 0, got -1"),
        ],
    )
    def test_refuses(self, rounds: list[int], clients: int, message: str) -> None:
        with pytest.raises(ServegymError, match=message):
            rounds_lower_bound(whole(*rounds), clients)


class TestHandSolved:
    @pytest.mark.parametrize(
        ("rounds", "clients", "expected"),
        [
            ([7], 1, [[0]]),
            ([1, 3, 2], 1, [[1, 2, 0]]),  # one client: longest first
            ([2, 5, 2, 5], 1, [[1, 3, 0, 2]]),  # ties by id
            ([4, 6], 3, [[], [0], [1]]),  # a client to spare
            ([5, 4, 3, 3, 3], 2, [[0, 1], [2, 3, 4]]),  # longest first alone leaves 10 and 8
            ([3, 3, 2, 2, 2], 2, [[0, 1], [2, 3, 4]]),  # the textbook case: 7 against 6
            ([0, 9, 0, 0], 3, [[0], [1], [2], [3]]),  # see below: one queue is [1]
        ],
    )
    def test_queues(self, rounds: list[int], clients: int, expected: list[list[int]]) -> None:
        """Clients are alike: only the set of queues counts."""
        certified = plan_offline(whole(*rounds), clients)
        assert certified.status == "optimal"
        if 0 not in rounds:
            assert sorted(queues(certified.plan)) == expected

    def test_requests_without_rounds_go_to_the_shortest_queues(self) -> None:
        certified = plan_offline(whole(0, 9, 0, 0, 0), 3)
        assert sorted(len(queue) for queue in queues(certified.plan)) == [1, 2, 2]
        assert certified.load == 9

    def test_no_request_at_all(self) -> None:
        certified = plan_offline(whole(), 2)
        assert (queues(certified.plan), certified.load, certified.status, certified.gap) == (
            [[], []],
            0,
            "optimal",
            0,
        )

    def test_the_optimum_may_be_above_the_bound(self) -> None:
        """5 + 5 and 5 + 3: the area says 9, and only whole requests show that 9 is impossible."""
        certified = plan_offline(whole(5, 5, 5, 3), 2)
        assert (certified.load, certified.lower_bound, certified.status) == (10, 10, "optimal")


@given(tiny)
def test_agrees_with_brute_force(case: tuple[NDArray[np.int64], int]) -> None:
    certified = plan_offline(*case)
    assert certified.load == certified.lower_bound == least_load(*case)


@given(small, st.integers(0, 3))
def test_every_plan_is_sound(case: tuple[NDArray[np.int64], int], seed: int) -> None:
    rounds, clients = case
    certified = plan_offline(rounds, clients, time_limit_s=0.02, seed=seed)
    assert sorted(certified.plan.order.tolist()) == list(range(len(rounds)))
    assert certified.plan.clients == clients
    assert certified.load == certified.plan.loads(rounds).max()
    assert rounds_lower_bound(rounds, clients) <= certified.lower_bound <= certified.load
    assert (certified.status == "optimal") == (certified.load == certified.lower_bound)
    assert certified.load <= plan_offline(rounds, clients, solver="lpt").load
    for queue in queues(certified.plan):
        assert queue == sorted(queue, key=lambda request: (-rounds[request], request))


@pytest.mark.parametrize("seed", range(5))
def test_the_papers_size_is_solved(seed: int) -> None:
    """1319 requests on 200 clients: the area bound is met."""
    rounds = lognormal(1319, seed)
    certified = rebalanced_plan(rounds, 200)
    assert certified.load == math.ceil(rounds.sum() / 200)


@pytest.mark.parametrize(
    ("scale", "requests", "clients"),
    [
        (1, 700, 3),  # far more requests a client than are split exactly
        (9_000, 60, 20),  # loads beyond the bits of a row
        (9_000, 700, 3),  # both
    ],
)
def test_long_queues_and_long_requests(scale: int, requests: int, clients: int) -> None:
    rounds = lognormal(requests, seed=0) * scale
    certified = rebalanced_plan(rounds, clients, tries=2000)
    assert sorted(certified.plan.order.tolist()) == list(range(requests))
    assert certified.gap < 0.02
    assert certified.load < plan_offline(rounds, clients, solver="lpt").load


def test_pricing_proves_what_the_area_cannot() -> None:
    """Each client takes two of 511 and one of 300; the last 300 costs far more than its area."""
    rounds = np.repeat(whole(511, 300), [40, 21])
    certified = plan_offline(rounds, 20, time_limit_s=20)
    assert rounds_lower_bound(rounds, 20) < certified.lower_bound == certified.load


class TestReproducibility:
    def test_the_clock_is_not_asked(self) -> None:
        rounds = lognormal(320, seed=2)
        first, second = (rebalanced_plan(rounds, 100, tries=3000) for _ in range(2))
        assert queues(first.plan) == queues(second.plan)

    def test_another_seed_walks_elsewhere(self) -> None:
        rounds = lognormal(320, seed=2)
        first, second = (rebalanced_plan(rounds, 100, tries=3000, seed=seed) for seed in (0, 1))
        assert queues(first.plan) != queues(second.plan)

    def test_no_tries_are_longest_first(self) -> None:
        rounds = lognormal(320, seed=2)
        walked = rebalanced_plan(rounds, 100, tries=0)
        assert queues(walked.plan) == queues(plan_offline(rounds, 100, solver="lpt").plan)

    def test_portions_do_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """How often the walk looks at the clock does not change the plan."""
        rounds = lognormal(320, seed=2)
        plain = rebalanced_plan(rounds, 100, tries=3000)
        monkeypatch.setattr(walk_module, "PORTION_S", 0.0)
        portioned = rebalanced_plan(rounds, 100, tries=3000)
        assert queues(plain.plan) == queues(portioned.plan)

    def test_compiled_and_interpreted_agree(self) -> None:
        """The same kernels as plain Python find the same plan."""
        program = (
            "import json, numpy as np\n"
            "from servegym.baselines.planning.planner import rebalanced_plan\n"
            "rounds = np.arange(1, 100, 7) ** 2\n"
            "print(json.dumps(rebalanced_plan(rounds, 4, tries=40).plan.order.tolist()))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        )
        compiled = rebalanced_plan(np.arange(1, 100, 7) ** 2, 4, tries=40)
        assert json.loads(done.stdout) == compiled.plan.order.tolist()


class TestWalk:
    def make(self, deadline: float = math.inf) -> Walk:
        return Walk(whole(5, 4, 3, 3, 3), 2, np.random.default_rng(0), deadline)

    def test_aims_at_a_target(self) -> None:
        walk = self.make()
        assert walk.best == 10
        assert walk.aim(9, tries=200)
        assert walk.best == 9

    def test_a_target_out_of_reach_uses_up_the_tries(self) -> None:
        walk = self.make()
        assert not walk.aim(8, tries=200)
        assert walk.best == 9

    def test_one_client_has_no_partner(self) -> None:
        walk = Walk(whole(5, 4), 1, np.random.default_rng(0), math.inf)
        assert walk.aim(9, tries=10)
        assert not walk.aim(8, tries=10)

    def test_a_passed_deadline_stops_it_at_once(self) -> None:
        walk = self.make(deadline=time.perf_counter())
        assert not walk.aim(9, tries=10**12)
        assert walk.best == 10

    def test_a_kick_leaves_the_best_plan_alone(self) -> None:
        walk = self.make()
        walk.aim(9, tries=200)
        before = walk.client_of().copy()
        for _ in range(20):
            walk.kick()
            walk.aim(8, tries=1)
        assert walk.best == 9
        assert walk.client_of().tolist() == before.tolist()


class TestCertifiedPlan:
    PLAN = plan_from_queues([[0], [1]])

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"lower_bound": 6}, "lower bound must lie in 0 … the load 5, got 6"),
            ({"lower_bound": -1}, "got -1"),
            ({"seconds": -1e-9}, "seconds must be ≥ 0"),
            ({"seconds": math.nan}, "seconds must be ≥ 0, got nan"),
        ],
    )
    def test_refuses_nonsense(self, values: dict[str, Any], message: str) -> None:
        good: dict[str, Any] = {
            "plan": self.PLAN,
            "load": 5,
            "lower_bound": 5,
            "solver": "lpt",
            "seconds": 0.0,
        }
        assert CertifiedPlan(**good).status == "optimal"  # the legal boundary
        with pytest.raises(ServegymError, match=message):
            CertifiedPlan(**good | values)

    def test_summary(self) -> None:
        certified = CertifiedPlan(self.PLAN, 10, 8, "lpt", 0.0125)
        assert certified.gap == 0.25
        assert certified.summary() == (
            "load 10 rounds, lower bound 8, feasible (gap 25.000%), 0.013 s, solver lpt"
        )


@pytest.mark.parametrize(
    ("bad", "good", "message"),
    [
        ({"clients": 0}, {"clients": 1}, "clients must lie in 1 … 1000000, got 0"),
        ({"clients": MAX_CLIENTS + 1}, {"clients": MAX_CLIENTS}, "got 1000001"),
        ({"clients": -3}, {"clients": 3}, "got -3"),
        ({"rounds": whole(-1)}, {"rounds": whole(0)}, "rounds must lie in 0 …"),
        ({"rounds": whole(MAX_TOKENS + 1)}, {"rounds": whole(MAX_TOKENS)}, "got 10000001"),
        ({"rounds": np.array([1.5])}, {"rounds": np.array([1], dtype=np.int8)}, "row of whole"),
        ({"rounds": np.array([[1]])}, {"rounds": np.array([])}, "row of whole numbers"),
        ({"time_limit_s": 0.0}, {"time_limit_s": 1e-9}, "must be > 0 seconds, got 0.0"),
        ({"time_limit_s": math.nan}, {"time_limit_s": 1e9}, "got nan"),
        ({"time_limit_s": math.inf}, {}, "got inf"),
        ({"solver": "rebalanse"}, {"solver": "rebalance"}, "did you mean 'rebalance'"),
        ({"seed": -1}, {"seed": 0}, "seed must be ≥ 0"),
    ],
)
def test_arguments(bad: dict[str, Any], good: dict[str, Any], message: str) -> None:
    plain: dict[str, Any] = {"rounds": whole(3, 4), "clients": 2}
    with pytest.raises(ServegymError, match=message):
        plan_offline(**plain | bad)
    plan_offline(**plain | good)


def test_tries_must_not_be_negative() -> None:
    with pytest.raises(ServegymError, match="tries must be ≥ 0, got -1"):
        rebalanced_plan(whole(1), 1, tries=-1)
    rebalanced_plan(whole(1), 1, tries=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_a_plan(solver: str) -> None:
    rounds = whole(9, 8, 0, 7, 6, 5, 4)
    certified = plan_offline(rounds, 3, solver=solver)
    assert sorted(certified.plan.order.tolist()) == list(range(7))
    assert certified.solver == solver
    assert certified.load == 13  # 9 + 4, 8 + 5, 7 + 6
    assert certified.status == "optimal"
