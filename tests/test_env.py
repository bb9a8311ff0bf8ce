"""The environment: actions and masks, observations, the end of episodes, rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from servegym.envs import TASKS, Requests, ServegymError, ServingEnv
from servegym.envs.process.metrics import METRICS
from tests.helpers import (
    inside,
    instance,
    make_env,
    play_randomly,
    random_costs,
    random_legal_action,
    random_requests,
    start,
)

# ---- actions and masks -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_masks_and_step_agree(seed: int) -> None:
    """An action is called illegal if and only if the mask says so; something is always legal."""
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, dyadic=True)
    clients = int(rng.integers(1, 6))
    env = make_env(clients, random_costs(rng, clients, dyadic=True))
    start(env, requests)
    over = False
    while not over:
        mask = env.action_masks()
        assert mask.any()
        assert mask.dtype == np.bool_
        action = int(rng.integers(len(mask)))
        _, _, over, _, info = env.step(np.int64(action))
        assert info["illegal_action"] == (not mask[action])


def test_an_illegal_action_is_replaced_by_the_first_legal_one(three_on_two: Requests) -> None:
    """At 0 s nobody runs, so decode (0) is illegal; the plan rule (1) is taken instead."""
    env, twin = make_env(2), make_env(2)
    for each in (env, twin):
        start(each, three_on_two)
    assert env.action_masks().tolist() == [False, True, True, True, True, True, True]
    first, second = env.step(np.int64(0)), twin.step(np.int64(1))
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1:4] == second[1:4]
    assert second[4] == {"lower_bound_s": 7.0, "replica": 0, "illegal_action": False}
    assert first[4] == second[4] | {"illegal_action": True}


def test_an_illegal_action_at_the_end_is_told_beside_the_metrics(three_on_two: Requests) -> None:
    """At 3 s client 0 falls idle; nothing is planned there, so the plan rule (1) is illegal."""
    env = make_env(2, rules=("plan", "fcfs"))
    start(env, three_on_two, [[0], [1, 2]])
    assert env.action_masks().tolist() == [False, True, True]
    env.step(np.int64(1))
    assert env.action_masks().tolist() == [True, False, True]
    env.step(np.int64(2))
    start(env, three_on_two, [[0], [1, 2]])
    env.step(np.int64(1))
    *_, terminated, _, info = env.step(np.int64(1))  # decode in its place, then 2 runs by itself
    assert not terminated
    assert info == {"lower_bound_s": 7.0, "replica": 0, "illegal_action": True}


BAD_ACTIONS = [(-1, 1), (7, 6)]  # the neighbour is legal


@pytest.mark.parametrize(("bad", "good"), BAD_ACTIONS)
def test_action_out_of_range(bad: int, good: int, three_on_two: Requests) -> None:
    env = make_env(2)
    start(env, three_on_two)
    with pytest.raises(ServegymError, match=rf"action must lie in 0 … 6, got {bad}"):
        env.step(np.int64(bad))
    env.step(np.int64(good))


@pytest.mark.parametrize("make", [int, np.int32, np.int64, np.uint8, np.array])
def test_actions_of_any_integer_type(make: Callable[[int], Any], three_on_two: Requests) -> None:
    env = make_env(2)
    start(env, three_on_two)
    env.step(make(5))
    assert env.view().active == 1


def test_mask_is_a_copy(three_on_two: Requests) -> None:
    env = make_env(2)
    start(env, three_on_two)
    env.action_masks()[:] = False
    assert env.action_masks().any()


def test_masks_of_single_rules(three_on_two: Requests) -> None:
    """`process.rules` decides which actions there are, in its order."""
    env = make_env(2, rules=("fcfs", "plan"))
    assert env.action_space == gym.spaces.Discrete(3)
    start(env, three_on_two, [[2], [1, 0]])
    env.step(np.int64(1))
    assert env.records().client.tolist() == [0, 1, -1]


# ---- observations ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_observation_lies_in_the_box(seed: int) -> None:
    """On random instances, also with all lengths 1 and with idle time between arrivals."""
    rng = np.random.default_rng(seed)
    clients = int(rng.integers(1, 9))
    env = make_env(clients, random_costs(rng, clients, dyadic=False), decisions="rounds")
    observation, _ = start(env, random_requests(rng, dyadic=False))
    over = False
    while not over:
        assert env.observation_space.contains(observation)
        observation, _, over, _, _ = env.step(np.int64(random_legal_action(env, rng)))
    assert env.observation_space.contains(observation)


def test_observation_lies_in_the_box_at_the_extremes() -> None:
    """The longest prompt and output that a workload may hold, beside the shortest."""
    env = make_env(2)
    observation, _ = start(env, instance((10**7, 10**7), (1, 1), (10**7, 1), (1, 10**7)))
    for _ in range(3):
        assert env.observation_space.contains(observation)
        observation, _, over, _, _ = env.step(np.int64(3 if env.action_masks()[3] else 0))
        if over:
            break
    assert env.observation_space.contains(observation)


def test_observation_size_does_not_depend_on_the_clients() -> None:
    sizes = set()
    for clients in (1, 50, 5000):
        env = ServingEnv("GSM8K-v0", overrides={"cluster": {"clients": clients}})
        sizes |= {env.reset(seed=0)[0].shape, env.observation_space.shape}
    assert sizes == {(len(ServingEnv("Tiny-v0").features),)}


def test_observations_are_not_overwritten(three_on_two: Requests) -> None:
    env = make_env(2)
    first, _ = start(env, three_on_two)
    kept = first.copy()
    env.step(np.int64(1))
    assert np.array_equal(first, kept)


# ---- the end ---------------------------------------------------------------------------------


def test_step_before_reset_and_after_the_end(three_on_two: Requests) -> None:
    env = make_env(2)
    with pytest.raises(ServegymError, match="call reset"):
        env.step(np.int64(0))
    start(env, three_on_two)
    play_randomly(env, np.random.default_rng(0))
    with pytest.raises(ServegymError, match=r"the episode is over; call reset\(\) before step\(\)"):
        env.step(np.int64(0))
    start(env, three_on_two)
    env.step(np.int64(1))


def test_nothing_to_see_before_reset() -> None:
    env = ServingEnv("Tiny-v0")
    for look in (env.view, env.records, env.metrics, env.action_masks):
        with pytest.raises(ServegymError, match=r"call reset\(\)"):
            look()


def test_an_episode_without_any_choice(lone_rule_env: ServingEnv) -> None:
    """The episode ends in reset. One step says so, and its reward is the whole return."""
    observation, _ = start(lone_rule_env, instance((5, 3), (5, 1)))
    assert lone_rule_env.observation_space.contains(observation)
    assert lone_rule_env.action_masks().tolist() == [True, False]
    _, reward, terminated, truncated, info = lone_rule_env.step(np.int64(0))
    assert (terminated, truncated) == (True, False)
    assert info["decisions"] == 0
    assert info["makespan_s"] == 2 + 2 + 2
    assert reward == pytest.approx(-100 * info["gap"], abs=1e-9)


def test_one_request(rng: np.random.Generator) -> None:
    """The smallest instance: one request of one token. Six rules are on offer, so one decision."""
    env = make_env(3)
    start(env, instance((1, 1)))
    total, info = play_randomly(env, rng)
    assert info["decisions"] == 1
    assert info["makespan_s"] == 2.0
    assert info["gap"] == total == 0.0
    assert np.isnan(info["tpot_p50_s"])


def test_after_the_end_decode_is_legal_and_info_holds_every_metric(three_on_two: Requests) -> None:
    env = make_env(2)
    start(env, three_on_two)
    _, info = play_randomly(env, np.random.default_rng(1))
    assert env.action_masks().tolist() == [True] + [False] * 6
    assert info.keys() == {"replica", "illegal_action", *METRICS}


@pytest.mark.parametrize("most", [1, 2, 3])
def test_truncation_by_decisions(most: int) -> None:
    env = make_env(1, max_decisions=most)
    start(env, instance(*[(5, 5)] * 10))
    for decision in range(1, most + 1):
        _, _, terminated, truncated, info = env.step(np.int64(1))
        assert (terminated, truncated) == (False, decision == most)
        assert info["replica"] == 0
    assert info.keys() == {"replica", "illegal_action", *METRICS}
    assert info["decisions"] == most
    assert info["unfinished_requests"] == 10 - most
    assert np.isnan(info["makespan_s"])
    assert np.isnan(info["gap"])
    with pytest.raises(ServegymError, match="the episode is over"):
        env.step(np.int64(1))


# Each request takes a stage of 2 s and 4 rounds; decisions fall at 0, 6, 12, 18 … s.
SECONDS = [(5.5, 1), (6.0, 2), (11.9, 2), (12.0, 3), (0.0, 10)]


@pytest.mark.parametrize(("most", "steps"), SECONDS)
def test_truncation_by_seconds(most: float, steps: int) -> None:
    """Truncated at the first decision point after the limit; a limit of 0 never truncates."""
    env = make_env(1, max_seconds=most)
    start(env, instance(*[(5, 5)] * 10))
    ends = [env.step(np.int64(1))[2:4] for _ in range(steps)]
    assert ends[:-1] == [(False, False)] * (steps - 1)
    assert ends[-1] == ((False, True) if most else (True, False))


def test_the_end_is_termination_even_where_a_limit_falls_together() -> None:
    env = make_env(1, max_decisions=2, max_seconds=11.0)
    start(env, instance((5, 5), (5, 5)))
    assert env.step(np.int64(1))[2:4] == (False, False)
    assert env.step(np.int64(1))[2:4] == (True, False)


def test_truncated_return_counts_what_is_lost_so_far() -> None:
    """After one of two requests the clock stands at 6 of 12 s and half of the work is done: no loss."""
    env = make_env(1, max_decisions=1)
    start(env, instance((5, 5), (5, 5)))
    _, reward, _, _, info = env.step(np.int64(1))
    assert info["lower_bound_s"] == 12.0
    assert reward == pytest.approx(0.0, abs=1e-9)


# ---- rewards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("reward", ["gap", "latency"])
def test_returns(name: str, reward: str) -> None:
    env = ServingEnv(name, overrides={"process": {"reward": reward}})
    env.reset(seed=3)
    total, info = play_randomly(env, np.random.default_rng(3))
    log = env.records()
    latency = float((log.finished_s - log.arrival_s).mean())
    expected = -100 * info["gap"] if reward == "gap" else -latency
    assert total == pytest.approx(expected, rel=1e-9)


def test_reset_info_holds_the_bound() -> None:
    env = ServingEnv("Tiny-v0")
    _, info = env.reset(seed=2)
    bound_s = inside(env).bound_s
    assert info == {"lower_bound_s": bound_s, "replica": 0, "illegal_action": False}
