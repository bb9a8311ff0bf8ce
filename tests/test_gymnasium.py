"""What a Gymnasium user tries on a single environment; every warning is an error (pyproject)."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit, TransformReward

import servegym.envs
from servegym.envs import TASKS, Requests, ServegymError, ServingEnv
from servegym.envs.process.metrics import METRICS
from tests.helpers import make_env, play_randomly, start

COMMON = {"lower_bound_s", "replica", "illegal_action"}
"""The keys of every info, of a reset and of a step."""


@pytest.mark.parametrize("name", TASKS)
def test_gymnasium_check_env(name: str) -> None:
    gymnasium_check_env(gym.make(name).unwrapped, skip_render_check=True)


def test_checkers_of_a_cluster_that_observes_all_blocks() -> None:
    from stable_baselines3.common.env_checker import check_env

    overrides = {
        "cluster": {"replicas": 3, "clients": 2, "kv_capacity_tokens": 3000, "chunk_tokens": 64},
        "process": {"observe": ["replica", "memory", "cluster"]},
    }
    env = gym.make("servegym/Tiny-v0", overrides=overrides).unwrapped
    gymnasium_check_env(env, skip_render_check=True)
    check_env(env, warn=True)


def test_gymnasium_check_env_with_rendering() -> None:
    gymnasium_check_env(gym.make("servegym/Tiny-v0", render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("name", TASKS)
def test_stable_baselines_check_env(name: str) -> None:
    from stable_baselines3.common.env_checker import check_env

    check_env(gym.make(name).unwrapped, warn=True)


def test_action_masker_and_mask_lookup() -> None:
    """sb3-contrib finds the masks on the environment itself and through its own wrapper."""
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
    from sb3_contrib.common.wrappers import ActionMasker
    from stable_baselines3.common.vec_env import DummyVecEnv

    plain = ServingEnv("Tiny-v0")
    plain.reset(seed=1)
    assert is_masking_supported(plain)
    assert np.array_equal(get_action_masks(plain), plain.action_masks())
    wrapped = ActionMasker(plain, lambda env: env.unwrapped.action_masks())  # type: ignore[attr-defined]
    assert np.array_equal(wrapped.action_masks(), plain.action_masks())
    vector = DummyVecEnv([lambda: plain, lambda: ServingEnv("Tiny-v0")])
    vector.reset()
    assert get_action_masks(vector).shape == (2, 7)


def test_make_with_the_module_in_the_name() -> None:
    """A fresh interpreter that has imported gymnasium only."""
    code = (
        "import gymnasium\n"
        "env = gymnasium.make('servegym.envs:servegym/Paper-v0')\n"
        "print(env.unwrapped.task.name, env.spec.id)\n"
    )
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert printed.split() == ["servegym/Paper-v0", "servegym/Paper-v0"]


@pytest.mark.parametrize("name", TASKS)
def test_made_by_name_with_overrides(name: str) -> None:
    env = gym.make(name, overrides={"cluster": {"clients": 7}}).unwrapped
    assert isinstance(env, ServingEnv)
    assert env.task.cluster.clients == 7
    assert env.task.name == name


def test_a_made_environment_is_made_again_from_its_json() -> None:
    words: dict[str, Any] = {"overrides": {"cluster": {"clients": 7}}, "max_episode_steps": 9}
    spec = gym.make("servegym/Tiny-v0", **words).spec
    assert spec is not None
    again = gym.make(EnvSpec.from_json(spec.to_json()))
    assert again.spec == spec
    assert isinstance(again.unwrapped, ServingEnv)
    assert again.unwrapped.task.cluster.clients == 7


def test_the_module_may_be_loaded_again() -> None:
    importlib.reload(servegym.envs)
    assert isinstance(gym.make("servegym/Tiny-v0").unwrapped, ServingEnv)


def test_closing_twice_does_no_harm() -> None:
    env = gym.make("servegym/Tiny-v0")
    env.reset(seed=0)
    env.close()
    env.close()


def test_legal_actions_are_sampled_by_the_mask() -> None:
    env = ServingEnv("Tiny-v0")
    env.reset(seed=0)
    env.action_space.seed(0)
    mask = env.action_masks()
    drawn = {int(env.action_space.sample(mask=mask.astype(np.int8))) for _ in range(100)}
    assert drawn == set(np.flatnonzero(mask).tolist())


# ---- episodes that a wrapper cuts ------------------------------------------------------------


def made() -> gym.Env:
    return gym.make("servegym/Tiny-v0", max_episode_steps=2)


def made_without_checks() -> gym.Env:
    return gym.make("servegym/Tiny-v0", max_episode_steps=2, disable_env_checker=True)


def by_hand() -> gym.Env:
    return TimeLimit(ServingEnv("Tiny-v0"), 2)


def under_others() -> gym.Env:
    return RecordEpisodeStatistics(TransformReward(made(), lambda reward: 2 * float(reward)))


def twice() -> gym.Env:
    return TimeLimit(TimeLimit(ServingEnv("Tiny-v0"), 2), 5)


def copied() -> gym.Env:
    return copy.deepcopy(made())


def pickled() -> gym.Env:
    env: gym.Env = pickle.loads(pickle.dumps(by_hand()))
    return env


@pytest.mark.parametrize(
    "make", [made, made_without_checks, by_hand, under_others, twice, copied, pickled]
)
def test_the_last_info_of_a_cut_episode_holds_every_metric(make: Callable[[], gym.Env]) -> None:
    env = make()
    inner = env.unwrapped
    assert isinstance(inner, ServingEnv)
    for _ in range(2):  # the second episode, too
        env.reset(seed=0)
        *_, terminated, truncated, info = env.step(3)
        assert (terminated, truncated, set(info)) == (False, False, COMMON)
        *_, terminated, truncated, info = env.step(3)
        assert (terminated, truncated) == (False, True)
        info.pop("episode", None)  # of RecordEpisodeStatistics
        assert info.keys() == COMMON | set(METRICS)
        assert info["unfinished_requests"] > 0
        assert np.isnan(info["gap"])
        assert np.isnan(info["makespan_s"])
        told = [info[name] for name in METRICS]
        assert np.array_equal(told, list(inner.metrics().values()), equal_nan=True)


def test_a_limit_is_forgotten_with_its_wrapper() -> None:
    """A wrapper's limit cuts no episode that is reset without it, and no other environment's."""
    env, other = ServingEnv("Tiny-v0"), ServingEnv("Tiny-v0")

    class ResetsAnother(gym.Wrapper):
        def reset(self, **words: Any) -> Any:
            other.reset(seed=0)
            return super().reset(**words)

    TimeLimit(ResetsAnother(env), 1).reset(seed=0)
    assert env.step(3)[4].keys() == COMMON | set(METRICS)
    assert other.step(3)[4].keys() == COMMON
    env.reset(seed=0)
    assert env.step(3)[4].keys() == COMMON


def test_metrics_at_any_time(three_on_two: Requests) -> None:
    env = make_env(2)
    start(env, three_on_two)
    before = env.metrics()
    assert tuple(before) == METRICS
    assert before["unfinished_requests"] == before["requests"] == 3
    assert np.isnan(before["client_utilization"])  # of no time at all
    _, info = play_randomly(env, np.random.default_rng(0))
    assert env.metrics() | {"replica": 0, "illegal_action": False} == info


# ---- pictures --------------------------------------------------------------------------------


def test_bad_render_mode() -> None:
    with pytest.raises(ServegymError, match="render_mode must be None or 'rgb_array', got 'human'"):
        ServingEnv("Tiny-v0", render_mode="human")
    ServingEnv("Tiny-v0", render_mode="rgb_array")


def test_rendering_needs_its_mode(three_on_two: Requests) -> None:
    env = make_env(2)
    start(env, three_on_two)
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.render() is None


def test_rendered_image(three_on_two: Requests) -> None:
    """A picture in bytes, with the red of a prefill stage."""
    env = ServingEnv("Tiny-v0", render_mode="rgb_array")
    env.reset(seed=1)
    env.step(np.int64(1))
    image = env.render()
    assert image is not None
    assert image.dtype == np.uint8
    assert image.ndim == 3
    colours = {tuple(pixel) for pixel in image.reshape(-1, 3)[::7].tolist()}
    assert (0xD1, 0x49, 0x5B) in colours
