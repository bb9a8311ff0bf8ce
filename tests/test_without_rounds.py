"""Requests of one output token need no decode round: they add no load, so plans spread them by number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from servegym.baselines.planning.planner import SOLVERS, plan_offline
from servegym.baselines.registry import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import Requests, ServingEnv, make_requests
from servegym.envs.playing.evaluation import brief
from servegym.envs.simulator.heap import deal
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, lower
from servegym.envs.workload.plan import Plan
from tests.helpers import UNIT_COSTS, inside, instance, make_env, start

PLANNING = ("offline", "offline-saa-8", "offline-risk", "round-robin", "hybrid-plan")


def task_of(clients: int) -> TaskConfig:
    return TaskConfig("test", cluster=ClusterConfig(clients=clients), cost=UNIT_COSTS)


def plan_by(policy: str, requests: Requests, clients: int) -> Plan:
    task = task_of(clients)
    case = bound_case(lower(task), requests)
    plan = make_policy(policy).prepare(brief(task, case, seed=0))
    assert plan is not None
    return plan


def most_without_rounds(plan: Plan, requests: Requests) -> int:
    """The most requests without rounds that a client is given."""
    without = requests.decode_rounds == 0
    return max(int(without[plan.queue(client)].sum()) for client in range(plan.clients))


def test_dealt_last_and_by_number() -> None:
    # Loads 5, 4 and 3; then the fewest requests, of these the least load: 2, 1, 0, 2, 1.
    rounds = np.array([0, 5, 0, 4, 3, 0, 0, 0])
    assert deal(rounds, 3).tolist() == [2, 0, 1, 1, 2, 0, 2, 1]


def test_dealt_to_those_who_hold_nothing() -> None:
    assert deal(np.array([7, 0, 0, 0, 0]), 3).tolist() == [0, 1, 2, 1, 2]


@pytest.mark.parametrize("policy", PLANNING)
def test_all_of_one_token_take_one_stage(policy: str) -> None:
    requests = make_requests(np.ones(50, int), np.ones(50, int))
    task = task_of(200)
    case = bound_case(lower(task), requests)
    metrics = play_compiled(task, make_trigger_policy(policy), case)
    assert metrics["prefill_stages"] == 1
    assert metrics["gap"] == 0.0


MIXTURES: dict[str, Callable[[], Requests]] = {
    "a few long": lambda: make_requests(np.ones(45, int), np.r_[np.ones(40, int), 80, 60, 9, 7, 5]),
    "as many long": lambda: make_requests(np.ones(60, int), np.tile([1, 30, 1, 50], 15)),
    "one long": lambda: make_requests(np.ones(41, int), np.r_[200, np.ones(40, int)]),
}


@pytest.mark.parametrize("policy", [name for name in PLANNING if name != "round-robin"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixed_with_long_ones(policy: str, mixture: str) -> None:
    requests = MIXTURES[mixture]()
    even = -(-int((requests.decode_rounds == 0).sum()) // 20)
    assert most_without_rounds(plan_by(policy, requests, 20), requests) <= even + 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("outputs", [[1] * 12, [1] * 9 + [6, 4, 3]], ids=["alone", "mixed"])
def test_every_solver_spreads_them(solver: str, outputs: list[int]) -> None:
    requests = make_requests(np.ones(12, int), np.array(outputs))
    certified = plan_offline(requests.decode_rounds, 6, solver=solver)
    assert certified.status == "optimal"
    assert most_without_rounds(certified.plan, requests) <= 2


def play_own_queues(env: ServingEnv) -> int:
    """Prefill by plan wherever possible; return the number of stages."""
    over = False
    while not over:
        mask = env.action_masks()
        _, _, over, _, _ = env.step(np.int64(1 if mask[1] else 0))
    return inside(env).stages


@pytest.mark.parametrize("late", [3, 40], ids=["few at once", "many at once"])
def test_the_greedy_plan_and_late_arrivals_spread_them(late: int) -> None:
    # At 2 s, after the first stage, clients 0 … 3 run for 50 rounds and all others are idle.
    rows = [(1, 51)] * 4 + [(1, 1)] * 16 + [(1, 1, 1.5)] * late
    env = make_env(20, rules=("plan", "fcfs"))
    start(env, instance(*rows))
    # One stage for those at t = 0, one for 3 late ones. 40 are two for each client: two stages, and two
    # more once the four clients have finished.
    assert play_own_queues(env) == (2 if late == 3 else 5)


def test_a_late_request_avoids_queues_of_requests_without_rounds() -> None:
    # Client 0 is to serve request 0, which has no rounds; the late one of 5 rounds joins client 1.
    env = make_env(2, rules=("plan", "fcfs"))
    start(env, instance((1, 3), (1, 1), (1, 1), (1, 6, 1.0)), [[0, 1, 2], []])
    assert env.state is not None
    env.step(np.int64(0))
    assert env.state.requests[0]["plan_client"].tolist() == [0, 0, 0, 1]
