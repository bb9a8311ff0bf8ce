"""The vector environment: every row is a single environment, bit for bit."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import gymnasium as gym
import numba
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from servegym.envs import ServegymError, ServingEnv
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.cases import Case
from servegym.envs.vector_env import ServingVectorEnv

SMALL: dict[str, Any] = {"cluster": {"clients": 6}, "workload": {"requests": 25}}
TASKS = [
    ("Tiny-v0", {}),
    ("GSM8K-v0", SMALL),
    ("Paper-v0", SMALL | {"process": {"decisions": "rounds", "max_decisions": 40}}),
    ("GSM8K-v0", SMALL | {"workload": {"requests": 25, "arrival_rate_per_s": 2.0}}),
]


def any_action(rng: np.random.Generator, actions: int) -> int:
    """Legal or illegal: how the environment replaces it is compared, too."""
    return int(rng.integers(actions))


@pytest.mark.parametrize(("task", "overrides"), TASKS)
@pytest.mark.parametrize("threads", [1, numba.config.NUMBA_NUM_THREADS])
def test_a_row_is_a_single_environment(task: str, overrides: dict[str, Any], threads: int) -> None:
    rows = 3
    vector = ServingVectorEnv(rows, task, overrides, threads=threads)
    singles = [ServingEnv(task, overrides) for _ in range(rows)]
    rng = np.random.default_rng(0)
    observations, infos = vector.reset(seed=7)
    for e, env in enumerate(singles):
        first, info = env.reset(seed=7 + e)
        assert first.tobytes() == observations[e].tobytes()
        assert info["lower_bound_s"] == infos["lower_bound_s"][e]
    for _ in range(150):
        actions = [any_action(rng, vector.rows.masks.shape[1]) for _ in singles]
        observations, rewards, terminated, truncated, infos = vector.step(actions)
        for e, env in enumerate(singles):
            last, reward, ended, cut, info = env.step(actions[e])
            assert (reward, ended, cut) == (rewards[e], terminated[e], truncated[e])
            told = infos["final_info"] if ended or cut else infos
            assert info["illegal_action"] == told["illegal_action"][e]
            if ended or cut:
                assert last.tobytes() == infos["final_obs"][e].tobytes()
                final = {name: infos["final_info"][name][e] for name in METRICS}
                assert np.array_equal([info[name] for name in METRICS], list(final.values()), True)
                last, _ = env.reset()
            assert last.tobytes() == observations[e].tobytes()
            assert np.array_equal(env.action_masks(), vector.action_masks()[e])


def test_gymnasium_makes_it_and_knows_its_autoreset() -> None:
    env = gym.make_vec("servegym/Tiny-v0", num_envs=4, vectorization_mode="vector_entry_point")
    assert isinstance(env.unwrapped, ServingVectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    observations, _ = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    assert env.action_space.contains(env.action_space.sample())


def test_copies_unless_told_otherwise() -> None:
    env = ServingVectorEnv(2, "Tiny-v0")
    first, _ = env.reset(seed=0)
    kept = first.copy()
    env.step([3, 3])
    assert np.array_equal(first, kept)
    shared = ServingVectorEnv(2, "Tiny-v0", copy=False)
    first, _ = shared.reset(seed=0)
    shared.step([3, 3])
    assert not np.array_equal(first, kept)


def test_seeds_one_by_one() -> None:
    env = ServingVectorEnv(2, "Tiny-v0")
    first, _ = env.reset(seed=[5, 9])
    assert first[1].tobytes() == ServingEnv("Tiny-v0").reset(seed=9)[0].tobytes()


NO_COUNTS: list[Any] = [2.0, np.float32(2), "2", None, True, [2], np.array([2])]
BAD_ARGUMENTS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"num_envs": 0}, "num_envs must lie in 1 … 1000000, got 0", {"num_envs": 1}),
    ({"num_envs": 1_000_001}, "got 1000001", {"num_envs": np.uint8(2)}),
    *(
        ({"num_envs": bad}, "num_envs must be a whole number, got", {"num_envs": np.int64(2)})
        for bad in NO_COUNTS
    ),
    ({"threads": 0}, "threads must lie in 1 …", {"threads": np.int64(1)}),
    ({"threads": numba.config.NUMBA_NUM_THREADS + 1}, "threads must lie in", {"threads": 1}),
    *(({"threads": bad}, "threads must be a whole", {"threads": 1}) for bad in NO_COUNTS),
    ({"task": "Tyni-v0"}, "did you mean 'Tiny-v0'?", {"task": "Tiny-v0"}),
    ({"overrides": 0}, "overrides must be a table", {"overrides": None}),
    *(
        ({"max_episode_steps": bad}, "max_episode_steps must be", {"max_episode_steps": good})
        for bad, good in [(0, 1), (-2, -1), (2.0, np.int64(2)), ("2", None), (True, 10**30)]
    ),
    *(
        ({"autoreset_mode": bad}, "unknown autoreset_mode", {"autoreset_mode": good})
        for bad, good in [
            ("nextstep", "NextStep"),
            (None, "Disabled"),
            (["SameStep"], AutoresetMode.SAME_STEP),
        ]
    ),
    *(
        ({"render_mode": bad}, "render_mode must be None or 'rgb_array'", {"render_mode": good})
        for bad, good in [("human", "rgb_array"), ("rgb_array_list", None), (True, None)]
    ),
]


@pytest.mark.parametrize(("arguments", "words", "good"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: dict[str, Any], words: str, good: dict[str, Any]) -> None:
    with pytest.raises(ServegymError) as error:
        ServingVectorEnv(**{"task": "Tiny-v0", **arguments})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    ServingVectorEnv(**{"task": "Tiny-v0", **good})


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_function_is_called_with_every_case_that_begins(mode: AutoresetMode) -> None:
    """In every mode the last case of each row is the one that is being played."""
    env = ServingVectorEnv(2, "Tiny-v0", autoreset_mode=mode)
    cases: dict[int, Case] = {}
    begun: list[int] = []

    def begin(e: int, case: Case) -> None:
        cases[e] = case
        begun.append(e)

    env.on_case = begin
    env.reset(seed=3)
    assert begun == [0, 1]
    rng, episodes = np.random.default_rng(0), 2
    for _ in range(30):
        assert len(begun) == episodes
        for e, bound_s in enumerate(env.state.episodes["bound_s"]):
            assert cases[e].bound.seconds == bound_s
        actions = [int(rng.choice(np.flatnonzero(mask))) for mask in env.action_masks()]
        over = np.logical_or(*env.step(actions)[2:4])
        if mode == AutoresetMode.DISABLED and over.any():
            env.reset(options={"reset_mask": over})
        if mode == AutoresetMode.NEXT_STEP and over.any():
            env.step([0, 0])
        episodes += int(over.sum())
    assert episodes > 4


def test_an_environment_keeps_no_case() -> None:
    env = ServingVectorEnv(2, "Tiny-v0")
    begun: list[weakref.ref[Case]] = []
    env.on_case = lambda _, case: begun.append(weakref.ref(case))
    env.reset(seed=3)
    gc.collect()
    assert [case() for case in begun] == [None, None]


def test_the_requests_of_rows_are_not_given() -> None:
    env = ServingVectorEnv(2, "Tiny-v0")
    with pytest.raises(ServegymError, match=r"no reset options but \{'reset_mask'"):
        env.reset(options={"requests": None})
    env.reset(seed=[1, 2], options={})
