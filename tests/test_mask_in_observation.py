"""The mask in the observation: of single environments, of vector environments, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from servegym.envs import MaskInObservation, ServegymError, ServingEnv, VectorMaskInObservation
from servegym.envs.vector_env import ServingVectorEnv
from tests.test_gymnasium_vector import ROWS, both, same


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version:UserWarning")
def test_checkers_of_gymnasium_and_sb3() -> None:
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    env = MaskInObservation(ServingEnv("Tiny-v0"))
    check_env(env, skip_render_check=True)
    sb3_check_env(env, warn=True)


def test_observation_and_mask_are_those_of_the_environment() -> None:
    env, plain = MaskInObservation(gym.make("servegym/Tiny-v0")), ServingEnv("Tiny-v0")
    for seed in range(3):
        observation, info = env.reset(seed=seed)
        expected, wanted = plain.reset(seed=seed)
        assert info == wanted
        over = False
        while not over:
            assert env.observation_space.contains(observation)
            assert observation["observation"].tobytes() == expected.tobytes()
            assert np.array_equal(observation["action_mask"], plain.action_masks())
            action = env.action_space.sample(mask=observation["action_mask"])
            observation, *ours, info = env.step(action)
            expected, *theirs, _ = plain.step(action)
            assert ours == theirs
            assert not info["illegal_action"]
            over = bool(ours[1])
        assert observation["action_mask"].tolist() == [1] + [0] * 6  # after the end


def test_keys_of_other_libraries() -> None:
    env = MaskInObservation(ServingEnv("Tiny-v0"), observation_key="obs", mask_key="mask")
    observation, _ = env.reset(seed=0)
    assert observation.keys() == env.observation_space.spaces.keys() == {"obs", "mask"}
    assert observation["mask"].dtype == np.int8
    assert env.observation_space["mask"] == spaces.MultiBinary(7)


def test_made_again_from_its_spec() -> None:
    env = MaskInObservation(gym.make("servegym/Tiny-v0", max_episode_steps=7), mask_key="legal")
    assert env.spec is not None
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert isinstance(again, MaskInObservation)
    ours, theirs = (each.reset(seed=3)[0] for each in (env, again))
    assert ours.keys() == theirs.keys() == {"observation", "legal"}
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)


def test_a_copy_has_the_masks_of_its_own_episode() -> None:
    env = MaskInObservation(ServingEnv("Tiny-v0"))
    env.reset(seed=0)
    twin = copy.deepcopy(env)
    expected = env.step(np.int64(3))[0]
    env.step(np.int64(3))
    got = twin.step(np.int64(3))[0]
    assert all(got[key].tobytes() == expected[key].tobytes() for key in got)


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_rows_are_wrapped_single_environments(mode: AutoresetMode, steps: int | None) -> None:
    """In every bit, ``final_obs`` and its mask included, as Gymnasium steps them."""
    ours = VectorMaskInObservation(both("Tiny-v0", {}, mode, steps)[0])
    made = [lambda: MaskInObservation(gym.make("servegym/Tiny-v0", max_episode_steps=steps))] * ROWS
    theirs = SyncVectorEnv(made, autoreset_mode=mode)
    assert ours.observation_space == theirs.observation_space
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.metadata["autoreset_mode"] == mode
    rng, ended = np.random.default_rng(0), 0
    begun, wanted = ours.reset(seed=5), theirs.reset(seed=5)
    assert same(begun[0], wanted[0])
    assert same(begun[1], wanted[1])
    for _ in range(30):
        actions = rng.integers(7, size=ROWS)
        step, expected = ours.step(actions), theirs.step(actions)
        assert all(same(got, right) for got, right in zip(step, expected, strict=True))
        assert ours.observation_space.contains(step[0])
        assert np.array_equal(step[0]["action_mask"], ours.action_masks())
        over = step[2] | step[3]
        ended += int(over.sum())
        if mode == AutoresetMode.DISABLED and over.any():
            mask = {"reset_mask": over}
            assert same(ours.reset(options=mask)[0], theirs.reset(options=dict(mask))[0])
    assert ended >= 3


class WithoutMasks(gym.Env[Any, Any]):
    """Discrete actions, but nobody says which are legal."""

    observation_space = spaces.Box(0, 1, (2,))
    action_space = spaces.Discrete(2)


class Continuous(WithoutMasks):
    """Says which actions are legal, but they are no list."""

    action_space: Any = spaces.Box(0, 1, (2,))

    def action_masks(self) -> np.ndarray:
        return np.ones(2, np.bool_)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (WithoutMasks(), {}, "needs Discrete actions and action_masks()"),
    (Continuous(), {}, "needs Discrete actions and action_masks()"),
    (None, {}, "needs a single environment, as ServingEnv, got None"),
    (ServingVectorEnv(2, "Tiny-v0"), {}, "for a ServingVectorEnv take VectorMaskInObservation"),
    (ServingEnv("Tiny-v0"), {"mask_key": "observation"}, "must differ, both are 'observation'"),
    (ServingEnv("Tiny-v0"), {"observation_key": ""}, "observation_key must be a text"),
    (ServingEnv("Tiny-v0"), {"mask_key": 3}, "mask_key must be a text that is not empty, got 3"),
]


@pytest.mark.parametrize(("env", "words", "message"), BAD)
def test_bad_arguments(env: Any, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ServegymError) as error:
        MaskInObservation(env, **words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_vector_environment_of_others_is_refused() -> None:
    theirs = SyncVectorEnv([lambda: ServingEnv("Tiny-v0")] * 2)
    others: list[Any] = [theirs, ServingEnv("Tiny-v0"), None]
    for env in others:
        with pytest.raises(ServegymError, match="put MaskInObservation around each single env"):
            VectorMaskInObservation(env)
    with pytest.raises(ServegymError, match="must differ, both are 'x'"):
        VectorMaskInObservation(ServingVectorEnv(2, "Tiny-v0"), "x", "x")
    limited = gym.make_vec("servegym/Tiny-v0", 2, max_episode_steps=3)
    VectorMaskInObservation(limited, "x", "y").reset(seed=0)
