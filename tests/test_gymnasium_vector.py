"""The vector environment against Gymnasium's own: the same rows, step by step, in every autoreset mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector as wrappers

from servegym.envs import ServegymError
from servegym.envs.process.metrics import METRICS
from servegym.envs.vector_env import ServingVectorEnv

ROWS = 3
TASKS: list[tuple[str, dict[str, Any]]] = [
    ("Tiny-v0", {}),
    ("GSM8K-v0", {"cluster": {"clients": 6}, "workload": {"requests": 25}}),
    ("Tiny-v0", {"process": {"decisions": "rounds", "max_decisions": 5}}),
    (
        "Tiny-v0",
        {
            "cluster": {
                "replicas": 3,
                "clients": 2,
                "kv_capacity_tokens": 3000,
                "chunk_tokens": 64,
            },
            "workload": {"arrival_rate_per_s": 3.0},
            "process": {"observe": ["replica", "memory", "cluster"]},
        },
    ),
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
    return (ours.dtype, ours.shape, ours.tobytes()) == (
        theirs.dtype,
        theirs.shape,
        theirs.tobytes(),
    )


@pytest.mark.parametrize("steps", [None, 1, 4])
@pytest.mark.parametrize(("task", "overrides"), TASKS)
@pytest.mark.parametrize("mode", AutoresetMode)
def test_as_gymnasium_steps_it(
    mode: AutoresetMode, task: str, overrides: dict[str, Any], steps: int | None
) -> None:
    """Legal and illegal actions; at the end the generators' states are also those of Gymnasium."""
    ours, theirs = both(task, overrides, mode, steps)
    assert ours.metadata == theirs.metadata
    rng, episodes = np.random.default_rng(0), 0
    observations, expected = ours.reset(seed=5), theirs.reset(seed=5)
    assert same(observations[0], expected[0])
    assert same(observations[1], expected[1])
    for _ in range(60):
        actions = rng.integers(ours.rows.masks.shape[1], size=ROWS)
        observation, reward, terminated, truncated, infos = ours.step(actions)
        wanted = theirs.step(actions)
        got = (observation, reward, terminated, truncated)
        assert all(same(a, b) for a, b in zip(got, wanted[:4], strict=True))
        over = terminated | truncated
        assert same(infos, wanted[4])
        assert infos.keys() >= observations[1].keys()
        episodes += int(over.sum())
        if mode == AutoresetMode.DISABLED and over.any():
            begun = ours.reset(options={"reset_mask": over})
            anew = theirs.reset(options={"reset_mask": over})
            assert same(begun[0], anew[0])
            assert same(begun[1], anew[1])
    assert episodes >= (6 if "observe" not in overrides.get("process", {}) else 3)
    for ours_rng, row in zip(ours.rngs, theirs.envs, strict=True):
        assert ours_rng.bit_generator.state == row.unwrapped.np_random.bit_generator.state


@pytest.mark.parametrize("mode", AutoresetMode)
def test_some_rows_are_reset_with_seeds(mode: AutoresetMode) -> None:
    ours, theirs = both("Tiny-v0", {}, mode, None)
    mask = np.array([True, False, True])
    ours.reset(seed=5)
    theirs.reset(seed=5)
    actions = np.array([3, 3, 3])
    seeds: list[int | list[int | None] | None] = [9, [1, 2, None], None]
    for seed in seeds:
        ours.step(actions)
        theirs.step(actions)
        begun = ours.reset(seed=seed, options={"reset_mask": mask})
        wanted = theirs.reset(seed=seed, options={"reset_mask": mask})
        assert same(begun[0], wanted[0])
        assert same(begun[1], wanted[1])


# ---- Gymnasium's wrappers --------------------------------------------------------------------


def halved(observation: Any) -> Any:
    return observation / np.float32(2)


HALF = gym.spaces.Box(0.0, 0.5, (65,), np.float32)
WRAPPERS: list[tuple[str, dict[str, Any]]] = [
    ("TransformObservation", {"func": halved, "single_observation_space": HALF}),
    ("RescaleObservation", {"min_obs": np.float32(-1), "max_obs": np.float32(1)}),
    ("DtypeObservation", {"dtype": np.float32}),
    ("ReshapeObservation", {"shape": (5, 13)}),
    ("FlattenObservation", {}),
    ("FilterObservation", {"filter_keys": ["a"]}),  # refuses what is no Dict
    ("NormalizeObservation", {}),
    ("TransformAction", {"func": np.flip}),
    ("ClipAction", {}),  # refuses what is no Box
    ("TransformReward", {"func": halved}),
    ("ClipReward", {"min_reward": -1.0, "max_reward": 1.0}),
    ("NormalizeReward", {}),
    ("RecordEpisodeStatistics", {}),
    ("DictInfoToList", {}),
]


def wrapped_rollout(env: gym.vector.VectorEnv, name: str, words: dict[str, Any]) -> list[Any]:
    """Everything a wrapped environment returns in some steps; or the error it refuses with."""
    mode = env.metadata["autoreset_mode"]
    try:
        env = getattr(wrappers, name)(env, **words)
    except (TypeError, ValueError) as error:
        return [type(error), str(error)]
    rng, seen = np.random.default_rng(0), [env.reset(seed=5)[0].copy()]
    for _ in range(12):
        step: Any = env.step(rng.integers(7, size=ROWS))
        seen += [array.copy() for array in step[:4]]
        infos = step[4] if isinstance(step[4], list) else [step[4]]
        seen += [info["episode"][key] for info in infos if "episode" in info for key in "rl"]
        seen += [info["gap"] for info in infos if "gap" in info]
        if mode == AutoresetMode.DISABLED and (step[2] | step[3]).any():
            env.reset()
    return seen


@pytest.mark.parametrize(("name", "words"), WRAPPERS)
@pytest.mark.parametrize("mode", AutoresetMode)
def test_wrappers_do_what_they_do_to_gymnasiums_own(
    mode: AutoresetMode, name: str, words: dict[str, Any]
) -> None:
    """Or refuse it with the same words: observations of same-step rows, for one."""
    ours, theirs = both("Tiny-v0", {}, mode, None)
    got, wanted = (wrapped_rollout(env, name, words) for env in (ours, theirs))
    assert len(got) == len(wanted)
    for mine, other in zip(got, wanted, strict=True):
        assert np.array_equal(mine, other, equal_nan=isinstance(mine, np.ndarray))
    if mode == AutoresetMode.NEXT_STEP and name not in ("FilterObservation", "ClipAction"):
        assert len(got) > 12


def test_statistics_of_rows_that_are_not_reset_go_on() -> None:
    """The mask is left in the caller's options, where Gymnasium's wrapper looks for it."""
    env = wrappers.RecordEpisodeStatistics(
        ServingVectorEnv(2, "Tiny-v0", autoreset_mode="Disabled", max_episode_steps=3)
    )
    env.reset(seed=0)
    env.step(np.array([3, 3]))
    env.reset(options={"reset_mask": np.array([True, False])})
    env.step(np.array([3, 3]))
    *_, truncated, infos = env.step(np.array([3, 3]))
    assert truncated.tolist() == [False, True]
    assert infos["episode"]["l"].tolist() == [0, 3]


# ---- making them -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "vector_entry_point", "sync"])
def test_made_with_a_limit_and_pictures(mode: str | None) -> None:
    env = gym.make_vec(
        "servegym/Tiny-v0", 2, mode, max_episode_steps=2, render_mode="rgb_array", overrides={}
    )
    env.reset(seed=0)
    env.step(np.array([3, 3]))
    *_, terminated, truncated, infos = env.step(np.array([3, 3]))
    assert (terminated.tolist(), truncated.tolist()) == ([False, False], [True, True])
    metrics = infos.get("final_info", infos)
    assert set(METRICS) <= metrics.keys()
    assert np.isnan(metrics["gap"]).all()
    frames = env.render()
    assert isinstance(frames, tuple)
    assert [np.shape(frame)[2] for frame in frames] == [3, 3]
    env.close()
    env.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_made_in_processes_of_their_own() -> None:
    words: dict[str, Any] = {"max_episode_steps": 2}
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    theirs = gym.make_vec("servegym/Tiny-v0", 2, "async", mode, **words)
    ours = gym.make_vec("servegym/Tiny-v0", 2, **words)
    try:
        assert same(ours.reset(seed=0)[0], theirs.reset(seed=0)[0])
        for _ in range(3):
            assert same(ours.step(np.array([3, 3]))[0], theirs.step(np.array([3, 3]))[0])
    finally:
        theirs.close()


@pytest.mark.parametrize("mode", [None, "sync"])
def test_made_again_from_its_spec(mode: str | None) -> None:
    words: dict[str, Any] = {"overrides": {"cluster": {"clients": 2}}, "max_episode_steps": 7}
    env = gym.make_vec("servegym/Tiny-v0", 3, mode, **words)
    assert env.spec is not None
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        again = gym.make_vec(spec)
        assert repr(again) == repr(env)
        assert same(again.reset(seed=1)[0], env.reset(seed=1)[0])
    plain = gym.make_vec(gym.spec("servegym/Tiny-v0"), 3)
    assert repr(plain) == "ServingVectorEnv(servegym/Tiny-v0, num_envs=3)"


def test_its_mode_is_its_own() -> None:
    """The arguments of one environment change neither the class nor another environment."""
    made = gym.make_vec("servegym/Tiny-v0", 2, autoreset_mode="NextStep")
    assert made.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert ServingVectorEnv(2, "Tiny-v0").metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert ServingVectorEnv.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


def test_no_limit_is_none_or_minus_one() -> None:
    env = ServingVectorEnv(1, "Tiny-v0", max_episode_steps=-1)
    thousand: Any = np.int64(1000)
    twin = ServingVectorEnv(1, "Tiny-v0", max_episode_steps=thousand)
    env.reset(seed=0)
    twin.reset(seed=0)
    for _ in range(30):
        assert same(env.step([3])[3], twin.step([3])[3])


def copied(env: ServingVectorEnv) -> ServingVectorEnv:
    return copy.deepcopy(env)


def pickled(env: ServingVectorEnv) -> ServingVectorEnv:
    twin: ServingVectorEnv = pickle.loads(pickle.dumps(env))
    return twin


@pytest.mark.parametrize("duplicate", [copied, pickled])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_a_copy_plays_on_equally(
    duplicate: Callable[[ServingVectorEnv], ServingVectorEnv], mode: AutoresetMode
) -> None:
    env, _ = both("Tiny-v0", {}, mode, 3)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    env.step(rng.integers(7, size=ROWS))
    twin = duplicate(env)
    for actions in rng.integers(7, size=(20, ROWS)):
        for mine, other in zip(env.step(actions), twin.step(actions), strict=True):
            assert same(mine, other)


# ---- what is refused -------------------------------------------------------------------------


def test_a_row_that_is_over_is_not_stepped() -> None:
    env = ServingVectorEnv(3, "Tiny-v0", autoreset_mode="Disabled", max_episode_steps=2)
    env.reset(seed=0)
    env.step([3, 3, 3])
    env.reset(options={"reset_mask": np.array([False, True, False])})
    assert env.step([3, 3, 3])[3].tolist() == [True, False, True]
    with pytest.raises(ServegymError, match=r"the episodes of rows 0, 2 are over; call reset\("):
        env.step([3, 3, 3])
    env.reset(options={"reset_mask": [True, False, True]})
    assert env.step([3, 3, 3])[3].tolist() == [False, True, False]


BAD_MASKS: list[Any] = [None, "ab", [1, 0], [True], [[True, False]], [False, False], [[True], []]]


@pytest.mark.parametrize("bad", BAD_MASKS)
def test_bad_reset_masks(bad: Any) -> None:
    env = ServingVectorEnv(2, "Tiny-v0")
    with pytest.raises(ServegymError, match="call reset\\(\\) for all rows before"):
        env.reset(options={"reset_mask": [True, False]})
    env.reset(seed=0)
    with pytest.raises(ServegymError, match="reset_mask must hold 2 booleans, at least one"):
        env.reset(options={"reset_mask": bad})
    env.reset(options={"reset_mask": [True, False]})


def test_pictures_need_their_mode_and_an_episode() -> None:
    env = ServingVectorEnv(2, "Tiny-v0")
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.render() is None
    with pytest.raises(ServegymError, match=r"call reset\(\) first"):
        ServingVectorEnv(2, "Tiny-v0", render_mode="rgb_array").render()
