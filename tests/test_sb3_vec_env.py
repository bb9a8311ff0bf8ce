"""The vector environment under Stable-Baselines3, and the files that training leaves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.agents.hyperparameters import Hyperparameters, Options
from servegym.agents.sb3_vec_env import ServingSB3VecEnv
from servegym.agents.training import make_model, train
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import ServegymError, load_task
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.config import with_overrides
from servegym.envs.vector_env import ServingVectorEnv

TINY = load_task("Tiny-v0")
SMALL = Hyperparameters(timesteps=64, environments=2, steps=16, batch_size=16, epochs=1, width=4)


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_rows_begin_anew_in_the_same_step(mode: str) -> None:
    with pytest.raises(ServegymError, match=f"needs autoreset_mode 'SameStep', got '{mode}'"):
        ServingSB3VecEnv(ServingVectorEnv(2, TINY, autoreset_mode=mode))
    ServingSB3VecEnv(ServingVectorEnv(2, TINY, autoreset_mode="SameStep"))


def test_metrics_are_metrics_also_where_the_last_action_was_illegal() -> None:
    env = ServingSB3VecEnv(ServingVectorEnv(2, TINY, max_episode_steps=1))
    env.reset()
    *_, dones, infos = env.step(np.array([0, 3]))
    assert dones.tolist() == [True, True]
    assert ["illegal_action" in info for info in infos] == [True, False]
    for info in infos:
        assert tuple(info["serving"]) == METRICS
        assert info["TimeLimit.truncated"]


def test_infos_tell_the_replica_of_the_observation() -> None:
    """As the vector environment's do, also where the next episode has begun."""
    overrides = {"cluster": {"replicas": 3, "clients": 1}, "process": {"observe": ["cluster"]}}
    inner = ServingVectorEnv(4, TINY, overrides)
    env = ServingSB3VecEnv(inner)
    env.seed(0)
    assert env.reset().shape == (4, len(inner.features))
    assert [info["replica"] for info in env.reset_infos] == inner.replicas().tolist()
    seen, ended = set[int](), 0
    for _ in range(40):
        _, _, dones, infos = env.step(inner.action_masks().argmax(axis=1))
        assert [info["replica"] for info in infos] == inner.replicas().tolist()
        seen |= {info["replica"] for info in infos}
        ended += int(dones.sum())
    assert seen == {0, 1, 2}
    assert ended > 0


def test_a_saved_state_holds_the_steps_that_are_left() -> None:
    env, twin = (ServingSB3VecEnv(ServingVectorEnv(2, TINY, max_episode_steps=3)) for _ in "ab")
    env.seed(0)
    env.reset()
    twin.reset()
    env.step(np.array([3, 3]))
    twin.set_state(*env.get_state())
    for _ in range(4):
        actions = np.array([3, 3])
        assert np.array_equal(env.step(actions)[2], twin.step(actions)[2])
    unlimited = ServingSB3VecEnv(ServingVectorEnv(2, TINY))
    with pytest.raises(ServegymError, match="other environments"):
        unlimited.set_state(*env.get_state())


def test_with_a_reference_the_return_is_what_was_gained_on_it() -> None:
    """A return is 100 · (the reference's gap − the episode's); only an episode's last reward differs."""
    policy = make_trigger_policy("fcfs")
    env = ServingSB3VecEnv(
        ServingVectorEnv(3, TINY), lambda case: play_compiled(TINY, policy, case)["gap"]
    )
    plain = ServingSB3VecEnv(ServingVectorEnv(3, TINY))
    for environment in (env, plain):
        environment.seed(5)
        environment.reset()
    rng, returns, ended = np.random.default_rng(0), np.zeros(3), 0
    while ended < 12:
        reference_percent = env.reference_gaps_percent.copy()  # on the cases that are being played
        masks = env.env_method("action_masks")
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        _, rewards, dones, infos = env.step(actions)
        gained = rewards - plain.step(actions)[1]
        assert np.array_equal(gained, np.where(dones, reference_percent, 0.0))
        returns += rewards
        for e in np.flatnonzero(dones):
            gap = infos[e]["serving"]["gap"]
            assert returns[e] == pytest.approx(reference_percent[e] - 100 * gap, abs=1e-9)
            returns[e], ended = 0.0, ended + 1


def test_a_reference_counts_where_an_episode_is_played_to_its_end() -> None:
    """In one that is cut short, the critic estimates the rest of the return, with the reference's gap."""
    rng = np.random.default_rng(0)
    task = with_overrides(TINY, {"process": {"max_decisions": 4}})
    plain = ServingSB3VecEnv(ServingVectorEnv(4, task))
    compared = ServingSB3VecEnv(ServingVectorEnv(4, task), lambda _: 0.5)
    for environment in (plain, compared):
        environment.seed(0)
        environment.reset()
    seen: set[Any] = set()
    for _ in range(100):
        actions = rng.integers(0, 7, 4)
        _, rewards, dones, infos = plain.step(actions)
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        terminated = dones & ~truncated
        assert compared.step(actions)[1] == pytest.approx(rewards + 50.0 * terminated)
        seen |= set(zip(terminated.tolist(), truncated.tolist(), strict=True))
    assert seen == {(False, False), (True, False), (False, True)}


def test_a_saved_state_holds_the_gaps_of_a_reference_in_percent() -> None:
    """As in the checkpoints of all versions."""
    env = ServingSB3VecEnv(ServingVectorEnv(2, TINY), lambda _: 0.5)
    env.reset()
    arrays, _ = env.get_state()
    assert arrays["reference_gaps"].view(np.float64).tolist() == [50.0, 50.0]


def test_bad_references() -> None:
    latency = with_overrides(TINY, {"process": {"reward": "latency"}})
    nothing: Any = 0.5
    ServingSB3VecEnv(ServingVectorEnv(2, TINY), lambda _: 0.5)
    ServingSB3VecEnv(ServingVectorEnv(2, latency), None)
    with pytest.raises(ServegymError, match=r"a reference needs process\.reward 'gap'"):
        ServingSB3VecEnv(ServingVectorEnv(2, latency), lambda _: 0.5)
    with pytest.raises(ServegymError, match=r"reference must be a function of a case, got 0\.5"):
        ServingSB3VecEnv(ServingVectorEnv(2, TINY), nothing)


@pytest.mark.parametrize("bad", [np.array([1.0, 2.0]), ["1", "2"], None])
def test_bad_actions(bad: np.ndarray) -> None:
    env = ServingSB3VecEnv(ServingVectorEnv(2, TINY))
    env.reset()
    with pytest.raises(ServegymError, match="actions must be whole numbers"):
        env.step(bad)


@pytest.mark.parametrize("tensorboard", [True, False])
def test_training_leaves_nothing_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: bool
) -> None:
    """SB3's own logger would make a folder there at the start of every run."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    train(TINY, SMALL, tmp_path / "run", options=Options(tensorboard=tensorboard, progress=False))
    make_model(TINY, SMALL).learn(64)
    left = {path.name for path in temporary.iterdir()}
    # torch keeps one empty cache folder a user, made with the process's first optimizer.
    assert {name for name in left if not name.startswith("torchinductor_")} == set()
