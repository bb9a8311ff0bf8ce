"""What `reset(options=…)` takes, and the plans in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegym.envs import Plan, Requests, ServegymError, ServingEnv, make_requests
from servegym.envs.bounds.batch import lower_bound
from servegym.envs.workload.plan import plan_from_queues
from tests.helpers import instance, make_env, play_randomly, start

THREE = instance((5, 2), (5, 3), (5, 4, 1.0))  # the last one comes later


def options(queues: list[list[int]], requests: Requests = THREE) -> dict[str, Any]:
    return {"requests": requests, "plan": plan_from_queues(queues)}


BAD_OPTIONS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    # a name that does not exist
    (
        {"request": THREE},
        "unknown reset option 'request'; did you mean 'requests'",
        {"requests": THREE},
    ),
    # a plan for another number of clients
    (options([[0], [1]]), "the plan is for 2 clients, the task has 3", options([[0], [1], []])),
    # a plan of requests that the instance does not have
    (options([[0], [1], [3]]), "requests outside 0 … 2", options([[0], [1], []])),
    # a plan of a request that has not arrived
    (
        options([[0], [1], [2]]),
        "only requests that are present at t = 0",
        options([[], [0, 1], []]),
    ),
]


@pytest.mark.parametrize(("bad", "words", "good"), BAD_OPTIONS)
def test_bad_reset_options(bad: dict[str, Any], words: str, good: dict[str, Any]) -> None:
    env = make_env(3)
    with pytest.raises(ServegymError, match=words):
        env.reset(options=bad)
    env.reset(options=good)
    play_randomly(env, np.random.default_rng(0))


@pytest.mark.parametrize("bad", [{"requests": [1, 2]}, {"plan": [[0], [1], []]}, {"bound": 5.0}])
def test_reset_options_of_a_wrong_type(bad: dict[str, Any]) -> None:
    with pytest.raises(ServegymError):
        make_env(3).reset(options={"requests": THREE} | bad)


def test_options_of_none_are_no_options() -> None:
    env = ServingEnv("Tiny-v0")
    observation, _ = env.reset(seed=1, options={"requests": None, "plan": None, "bound": None})
    assert observation.tobytes() == ServingEnv("Tiny-v0").reset(seed=1)[0].tobytes()


def test_a_known_bound_is_taken() -> None:
    env = make_env(3)
    bound = lower_bound(THREE, 3, env.costs)
    first = env.reset(options={"requests": THREE})
    again = env.reset(options={"requests": THREE, "bound": bound})
    assert first[0].tobytes() == again[0].tobytes()
    assert first[1] == again[1]


BAD_PLANS = [
    # a request twice
    (([0, 0], [0, 1, 2]), "each request at most once", ([0, 1], [0, 1, 2])),
    # offsets that do not span the order
    (([0, 1], [0, 1]), "offsets end at 1, but 2 requests", ([0, 1], [0, 2])),
    (([0, 1], [1, 2]), "must start at 0", ([0, 1], [0, 2])),
    (([0, 1], [0, 2, 1, 2]), "not decrease", ([0, 1], [0, 1, 1, 2])),
    (([], [0]), "must start at 0", ([], [0, 0])),
    # a request that no instance has
    (([0, -1], [0, 2]), r"plan order must lie in 0 … \d+, got -1", ([0, 1], [0, 2])),
]


@pytest.mark.parametrize(("bad", "words", "good"), BAD_PLANS)
def test_bad_plan(bad: Any, words: str, good: Any) -> None:
    with pytest.raises(ServegymError, match=words):
        Plan(np.array(bad[0], np.int64), np.array(bad[1], np.int64))
    Plan(np.array(good[0], np.int64), np.array(good[1], np.int64))


def test_plan_queues_and_loads() -> None:
    plan = plan_from_queues([[2, 0], [], [1]])
    assert plan.clients == 3
    assert [plan.queue(client).tolist() for client in range(3)] == [[2, 0], [], [1]]
    assert plan.loads(np.array([10, 20, 30])).tolist() == [40, 0, 20]


def test_the_number_of_requests_may_change_between_episodes(rng: np.random.Generator) -> None:
    env = make_env(2)
    for count in (3, 1, 17, 2):
        ones = np.ones(count, dtype=np.int64)
        start(env, make_requests(ones, 3 * ones))
        _, info = play_randomly(env, rng)
        assert info["requests"] == count
