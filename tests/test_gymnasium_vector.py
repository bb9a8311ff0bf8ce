"""The vector environment against Gymnasium's own: the same rows, step by step, in every autoreset mode."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector as wrappers

from servegym.envs import ServegymError, ServingEnv
from servegym.envs.metrics import METRICS
from servegym.envs.vector_env import ServingVectorEnv

ROWS = 3
TASKS: list[tuple[str, dict[str, Any]]] = [
    ("Tiny-v0", {}),
    ("GSM8K-v0", {"cluster": {"clients": 6}, "workload": {"requests": 25}}),
    ("Tiny-v0", {"process": {"decisions": "rounds", "max_decisions": 5}}),
    # A single rule and client: there is never a choice, an episode is over when it begins.
    ("Tiny-v0", {"cluster": {"clients": 1}, "process": {"rules": ["fcfs"]}}),
]


def both(
    task: str, overrides: dict[str, Any], mode: AutoresetMode, steps: int | None
) -> tuple[ServingVectorEnv, SyncVectorEnv]:
    """The same rows twice: compiled, and as Gymnasium steps single environments."""
    ours = ServingVectorEnv(
        ROWS, task, overrides, autoreset_mode=mode, max_episode_steps=steps, render_mode="rgb_array"
    )
    name = f"servegym/{task}"
    words: dict[str, Any] = {"overrides": overrides, "render_mode": "rgb_array"}
    theirs = SyncVectorEnv(
        [lambda: gym.make(name, max_episode_steps=steps, **words)] * ROWS, autoreset_mode=mode
    )
    return ours, theirs


def same(ours: Any, theirs: Any) -> bool:
    """Whether two arrays, or infos of arrays, are equal in shape, type and every bit."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if theirs.dtype == object:
        pairs = zip(ours, theirs, strict=True)
        return all(a is b is None or same(a, b) for a, b in pairs)
    return (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def split_illegal(
    infos: dict[str, Any], over: np.ndarray, mode: AutoresetMode
) -> tuple[dict[str, Any], np.ndarray]:
    """Take what is told of illegal actions out of Gymnasium's infos; return both."""
    rest, illegal = dict(infos), np.zeros(ROWS, np.bool_)
    for each in (rest, rest.get("final_info", {})):
        if "illegal_action" in each:
            assert same(each["illegal_action"], each["_illegal_action"])
            illegal |= each["illegal_action"]
    rest.pop("illegal_action", None)
    rest.pop("_illegal_action", None)
    if mode != AutoresetMode.SAME_STEP:
        assert "final_info" not in rest
    return rest, illegal


@pytest.mark.parametrize("steps", [None, 1, 4])
@pytest.mark.parametrize(("task", "overrides"), TASKS)
@pytest.mark.parametrize("mode", AutoresetMode)
def test_as_gymnasium_steps_it(
    mode: AutoresetMode, task: str, overrides: dict[str, Any], steps: int | None
) -> None:
    """Legal and illegal actions; in the end also the generators stand where Gymnasium's do."""
    ours, theirs = both(task, overrides, mode, steps)
    assert ours.metadata == theirs.metadata
    rng, episodes = np.random.default_rng(0), 0
    observations, expected = ours.reset(seed=5), theirs.reset(seed=5)
    assert same(observations[0], expected[0])
    assert same(observations[1], expected[1])
    for _ in range(60):
        actions = rng.integers(ours.single_action_space.n, size=ROWS)
        observation, reward, terminated, truncated, infos = ours.step(actions)
        wanted = theirs.step(actions)
        got = (observation, reward, terminated, truncated)
        assert all(same(a, b) for a, b in zip(got, wanted[:4], strict=True))
        over = terminated | truncated
        rest, illegal = split_illegal(wanted[4], over, mode)
        assert same(infos.pop("illegal_action"), illegal)
        assert same(infos.pop("_illegal_action"), illegal)
        assert same(infos, rest)
        episodes += int(over.sum())
        if mode == AutoresetMode.DISABLED and over.any():
            again = {"options": {"reset_mask": over}}
            begun, anew = ours.reset(**again), theirs.reset(**copy.deepcopy(again))
            assert same(begun[0], anew[0])
            assert same(begun[1], anew[1])
    assert episodes >= 6
    for own, row in zip(ours._rngs, theirs.envs, strict=True):
        assert own.bit_generator.state == row.unwrapped.np_random.bit_generator.state


@pytest.mark.parametrize("mode", AutoresetMode)
def test_some_rows_are_reset_with_seeds(mode: AutoresetMode) -> None:
    ours, theirs = both("Tiny-v0", {}, mode, None)
    mask = np.array([True, False, True])
    ours.reset(seed=5)
    theirs.reset(seed=5)
    actions = np.array([3, 3, 3])
    for seed in (9, [1, 2, 3], None):
        ours.step(actions)
        theirs.step(actions)
        begun = ours.reset(seed=seed, options={"reset_mask": mask})
        wanted = theirs.reset(seed=seed, options={"reset_mask": mask})
        assert same(begun[0], wanted[0])
        assert same(begun[1], wanted[1])
