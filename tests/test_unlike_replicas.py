"""Plans of tasks whose replicas differ: the greedy one of the loader, policies, what a plan counts by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegym.baselines import make_policy, make_trigger_policy
from servegym.envs import AffineDecode, Plan, Requests, TableDecode, make_requests
from servegym.envs.machine.costs import AffinePrefill, StageCosts
from servegym.envs.machine.layout import UNLIMITED_TOKENS
from servegym.envs.playing.evaluation import brief, make_case, play
from servegym.envs.simulator.state import NOBODY
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import bound_case, lay_out, load_case, lower, make_task_state
from servegym.envs.task.sections import WorkloadConfig
from tests.helpers import UNIT_COSTS, random_requests

PLANNED = ["offline", "offline-risk", "offline-saa-4", "hybrid-plan"]


def task_of(*replicas: dict[str, Any], **keys: Any) -> TaskConfig:
    """Replicas of two clients each, where they do not say otherwise."""
    task = TaskConfig("test", cost=UNIT_COSTS, workload=WorkloadConfig("tiny", requests=40))
    cluster = {"replicas": len(replicas), "clients": 2, "router": "plan", "replica": replicas}
    return with_overrides(task, {"cluster": cluster | keys})


def greedy_queues(task: TaskConfig, requests: Requests) -> list[list[int]]:
    """The planned queues that the loader makes, of the clients of all replicas in order."""
    state = make_task_state(task, 1, len(requests))
    load_case(task, state, 0, bound_case(lower(task), requests))
    queues = [
        [(int(row.plan_replica), int(row.plan_client))] if row.plan_client != NOBODY else []
        for row in state.requests[0, : len(requests)]
    ]
    held: list[list[int]] = []
    for r, clients in enumerate(state.machines.clients):
        held += [
            [i for i, at in enumerate(queues) if at == [(r, client)]] for client in range(clients)
        ]
    return held


def expected_queues(task: TaskConfig, requests: Requests) -> list[list[int]]:
    """Longest first to the client that would end first, in plain words; without rounds last."""
    fleet, block = lay_out(task).fleet(), task.cluster.kv_block_tokens
    rounds, clients = requests.decode_rounds, range(len(fleet.round_s))
    queues: list[list[int]] = [[] for _ in clients]
    load = [0] * len(queues)
    for i in sorted(range(len(rounds)), key=lambda i: (-rounds[i], i)):
        whole = -(-int(requests.prompt_tokens[i] + requests.output_tokens[i]) // block) * block
        may = [j for j in clients if whole <= fleet.tokens[j]]
        if requests.arrival_s[i] > 0 or not may:
            continue
        if rounds[i] > 0:
            best = min(may, key=lambda j: ((load[j] + rounds[i]) * fleet.round_s[j], j))
        else:
            best = min(may, key=lambda j: (len(queues[j]), load[j] * fleet.round_s[j], j))
        queues[best].append(i)
        load[best] += int(rounds[i])
    return [sorted(queue) for queue in queues]


class TestWhatCounts:
    def test_seconds_of_a_full_round(self) -> None:
        """1 s and 0.5 s for each active client, at twice the speed."""
        cost = StageCosts(AffineDecode(1.0, 0.5), AffinePrefill(1.0, 0.0))
        task = with_overrides(
            TaskConfig("test", cost=cost),
            {"cluster": {"replicas": 2, "clients": 2, "replica": [{"clients": 1}, {"speed": 2.0}]}},
        )
        fleet = lay_out(task).fleet()
        assert fleet.round_s.tolist() == [1.5, 1.0, 1.0]
        assert fleet.tokens.tolist() == [UNLIMITED_TOKENS] * 3

    def test_memory_in_whole_blocks(self) -> None:
        task = task_of({"kv_capacity_tokens": 39}, {}, kv_block_tokens=10)
        assert lay_out(task).fleet().tokens.tolist() == [30, 30, *[UNLIMITED_TOKENS] * 2]

    def test_one_replica_has_nobody_to_be_faster_than(self) -> None:
        assert lay_out(task_of({"speed": 3.0})).round_s == ()

    def test_a_table_warns_where_costs_are_lowered_and_only_there(self) -> None:
        cost = StageCosts(TableDecode((1,), (1.0,)), AffinePrefill(1.0, 0.0))
        task = TaskConfig("test", cost=cost)
        task = with_overrides(task, {"cluster": {"replicas": 2, "clients": 2}})
        assert lay_out(task).fleet().round_s.tolist() == [1.0] * 4
        with pytest.warns(UserWarning, match="decode table ends at batch 1"):
            lower(task)


class TestGreedyPlan:
    def test_by_hand(self) -> None:
        """Rounds of 1 s and of 2 s: 8 and 7 to the fast, 6 and 5 to the slow, 1 to who ends at 8 s then."""
        task = task_of({}, {"speed": 0.5})
        requests = make_requests([1] * 5, [9, 8, 7, 6, 2])
        assert greedy_queues(task, requests) == [[0], [1, 4], [2], [3]]

    @pytest.mark.parametrize("router", ["plan", "pool"])
    @pytest.mark.parametrize("seed", range(12))
    def test_equals_plain_words(self, seed: int, router: str) -> None:
        rng = np.random.default_rng(seed)
        replicas = [
            {
                "clients": int(rng.integers(1, 4)),
                "speed": float(rng.choice([0.5, 1.0, 3.0])),
                "kv_capacity_tokens": int(rng.choice([0, 25, 60])),
            }
            for _ in range(int(rng.integers(1, 5)))
        ]
        task = task_of(*replicas, router=router, kv_block_tokens=int(rng.choice([1, 4])))
        requests = random_requests(rng, 30, dyadic=True)
        assert greedy_queues(task, requests) == expected_queues(task, requests)

    def test_equal_speeds_and_memory_that_holds_all_change_nothing(self) -> None:
        requests = random_requests(np.random.default_rng(0), 30, dyadic=True)
        usual = greedy_queues(task_of({}, {}, {}), requests)
        for same in ({"speed": 2.0}, {"kv_capacity_tokens": 10**6}):
            assert greedy_queues(task_of(same, same, same), requests) == usual

    def test_by_expected_lengths(self) -> None:
        """Who is expected to be too long for the small replica is not planned there."""
        requests = make_requests([1, 1], [2, 2], None, np.array([50, 2]), np.array([0.5, 0.5]))
        task = task_of({"kv_capacity_tokens": 20, "speed": 99.0}, {})
        task = with_overrides(task, {"information": {"output_lengths": "predicted"}})
        assert greedy_queues(task, requests) == [[1], [], [0], []]


def plan_of(name: str, task: TaskConfig, requests: Requests) -> Plan:
    case = bound_case(lower(task), requests)
    plan = make_policy(name).prepare(brief(task, case, seed=0))
    assert plan is not None
    return plan


@pytest.mark.parametrize("name", PLANNED)
def test_policies_plan_by_seconds_and_memory(name: str) -> None:
    """The clients of the fast replica serve more; the longest fit into the slow one alone."""
    rng = np.random.default_rng(0)
    requests = make_requests(rng.integers(1, 9, 60), rng.integers(20, 60, 60))
    task = task_of({"speed": 3.0, "kv_capacity_tokens": 60}, {}, clients=3)
    plan = plan_of(name, task, requests)
    needs = requests.prompt_tokens + requests.output_tokens
    assert (needs > 60).any()
    assert all(needs[plan.queue(client)].max(initial=0) <= 60 for client in range(3))
    assert len(plan.order) == 60
    fast, slow = np.split(plan.loads(requests.decode_rounds), 2)
    assert fast.min() > 2 * slow.max()


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("replicas", [1, 3])
def test_policies_plan_equal_replicas_as_one_of_all_clients(name: str, replicas: int) -> None:
    rng = np.random.default_rng(1)
    requests = make_requests(rng.integers(1, 9, 30), rng.integers(1, 60, 30))
    plan = plan_of(name, task_of(*[{"speed": 2.0}] * replicas, clients=6 // replicas), requests)
    same = plan_of(name, task_of({}, clients=6), requests)
    assert np.array_equal(plan.order, same.order)
    assert np.array_equal(plan.offsets, same.offsets)


@pytest.mark.parametrize("name", ["offline", "hybrid", "offline-steal"])
def test_a_plan_by_seconds_is_near_the_bound(name: str) -> None:
    """With equal shares the slow replica would take four times as long as the fast one."""
    task = task_of({"speed": 2.0}, {}, {"speed": 0.5}, clients=4)
    task = with_overrides(task, {"workload": {"requests": 200}})
    row = play(task, name, make_trigger_policy(name), make_case(task, 0), 0).row
    assert row["gap"] < 0.2
