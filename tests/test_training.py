"""Training: the SB3 environment, hyper-parameters, seeds, schedules, warm-up and time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecMonitor

from servegym.agents.hyperparameters import Hyperparameters, default_hyperparameters
from servegym.agents.imitation import imitate
from servegym.agents.sb3_vec_env import ServingSB3VecEnv
from servegym.agents.training import make_model, train
from servegym.envs import ServegymError, ServingEnv
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.registered import TASKS
from servegym.envs.vector_env import ServingVectorEnv
from tests.helpers import changed, weights
from tests.training_helpers import QUIET, SMALL, TINY, prefer_prefill, some_reference


def test_a_reference_is_named_and_given_or_neither() -> None:
    with pytest.raises(ServegymError, match="or neither"):
        make_model(TINY, replace(SMALL, reference="fcfs"))
    with pytest.raises(ServegymError, match="or neither"):
        make_model(TINY, SMALL, some_reference)
    make_model(TINY, replace(SMALL, reference="fcfs"), some_reference)


# The environment


def test_rows_are_those_of_the_vector_environment() -> None:
    task = changed(TINY, process={"max_decisions": 3})
    env = VecMonitor(ServingSB3VecEnv(ServingVectorEnv(3, task, copy=False)))
    plain = ServingVectorEnv(3, task)
    rng = np.random.default_rng(0)
    env.seed(5)
    first, _ = plain.reset(seed=5)
    before = np.asarray(env.reset())
    assert before.tobytes() == first.tobytes()
    kept, seen = before.copy(), set()
    for _ in range(60):
        actions = rng.integers(0, 7, 3)
        stepped, rewards, dones, infos = env.step(actions)
        observations = np.asarray(stepped)
        wanted, wanted_rewards, terminated, truncated, wanted_infos = plain.step(actions)
        assert observations.tobytes() == wanted.tobytes()
        assert rewards.tobytes() == wanted_rewards.tobytes()
        assert np.array_equal(dones, terminated | truncated)
        assert np.array_equal(np.stack(env.env_method("action_masks")), plain.action_masks())
        for e, info in enumerate(infos):
            told = wanted_infos["final_info"] if dones[e] else wanted_infos
            assert info.get("illegal_action", False) == told["illegal_action"][e]
            assert ("terminal_observation" in info) == dones[e]
            if dones[e]:
                seen.add(info["TimeLimit.truncated"])
                assert info["TimeLimit.truncated"] == truncated[e]
                assert (
                    info["terminal_observation"].tobytes() == wanted_infos["final_obs"][e].tobytes()
                )
                assert tuple(info["serving"]) == METRICS
                gaps = info["serving"]["gap"], wanted_infos["final_info"]["gap"][e]
                assert np.array_equal(*gaps, equal_nan=True)  # NaN where it was cut short
                assert info["episode"]["l"] == info["serving"]["decisions"]
        rewards += 1.0  # as SB3 does where an episode is truncated
    assert seen == {False, True}
    assert before.tobytes() == kept.tobytes()  # not overwritten by later steps


def test_sb3_contrib_finds_the_masks() -> None:
    env = VecMonitor(ServingSB3VecEnv(ServingVectorEnv(2, TINY)))
    env.reset()
    assert is_masking_supported(env)
    assert get_action_masks(env).shape == (2, 7)
    assert env.env_method("action_masks", indices=1)[0].shape == (7,)
    assert not env.has_attr("no such thing")
    assert env.get_attr("num_envs", [0]) == [2]
    with pytest.raises(ServegymError, match="cannot be set"):
        env.set_attr("num_envs", 3)
    env.set_options({"plan": None})
    with pytest.raises(ServegymError, match="no reset options"):
        env.reset()


# Hyper-parameters


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"algorithm": "maskable_ppo"}, {"algorithm": "ppo"}),
        ({"seed": 800}, {"seed": 799}),  # its environments would be validation's
        ({"environments": 1001, "steps": 10}, {"environments": 1000, "steps": 10}),
        ({"batch_size": 64 * 256 + 1}, {"batch_size": 64 * 256}),  # more than a rollout
        ({"batch_size": 4096.0}, {"batch_size": 4096}),
        ({"learning_rate": float("nan")}, {"learning_rate": 0.0}),
        ({"gamma": 1.1}, {"gamma": 1}),
        ({"epochs": True}, {"epochs": 1}),
        ({"imitation_temperature": 0.0}, {"imitation_temperature": 1e-6}),
        ({"depth": -1}, {"depth": 0}),
        ({"evolution_updates": -1}, {"evolution_updates": 0}),
        ({"evolution_pairs": 0}, {"evolution_pairs": 1}),
        ({"evolution_directions": 0}, {"evolution_directions": 1}),
        ({"evolution_spread": 0.0}, {"evolution_spread": 1e-6}),
        ({"evolution_learning_rate": -1.0}, {"evolution_learning_rate": 0.0}),
    ],
)
def test_hyperparameters_cannot_be_wrong(bad: dict[str, Any], good: dict[str, Any]) -> None:
    with pytest.raises(ServegymError, match=next(iter(bad))):
        Hyperparameters(**bad)
    Hyperparameters(**good)


def test_defaults_by_task() -> None:
    assert default_hyperparameters("my.toml") == Hyperparameters()
    for name in TASKS:
        default_hyperparameters(name)


# Training


def test_training_begins_with_the_seeds_of_the_agent() -> None:
    model = make_model(TINY, SMALL)
    env = model.get_env()
    assert env is not None
    for e, row in enumerate(np.asarray(env.reset())):
        assert row.tobytes() == ServingEnv(TINY).reset(seed=3000 + e)[0].tobytes()


def test_callbacks_are_not_training_time(tmp_path: Path) -> None:
    class Slow(BaseCallback):
        def _on_step(self) -> bool:
            time.sleep(0.02)
            return True

    options = replace(QUIET, max_minutes=0.4 / 60)  # the callback alone takes 0.64 s
    h = replace(SMALL, timesteps=128)
    assert (
        train(TINY, h, tmp_path / "run", callbacks=[Slow()], options=options).num_timesteps == 128
    )


def test_schedules_end_where_they_should(tmp_path: Path) -> None:
    h = replace(SMALL, learning_rate=0.01, final_learning_rate=0.2, entropy=0.1, final_entropy=0.5)
    model = train(TINY, h, tmp_path / "run", options=QUIET)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.002)
    assert model.ent_coef == pytest.approx(0.05)


def test_value_warmup_leaves_the_actor_alone(tmp_path: Path) -> None:
    h = replace(SMALL, timesteps=128, imitation_rounds=1, imitation_states=4, value_warmup=2)
    imitated = make_model(TINY, h)
    imitate(imitated, TINY, prefer_prefill, h)
    first = weights(imitated)
    last = weights(train(TINY, h, tmp_path, expert=prefer_prefill, options=QUIET))
    changed_parts = {name.rpartition(".")[0] for name in first if first[name] != last[name]}
    assert changed_parts == {"mlp_extractor.value_net.0", "mlp_extractor.value_net.2", "value_net"}


def test_a_warm_start_is_followed_by_smaller_steps() -> None:
    h = replace(
        SMALL, learning_rate=0.1, clip_range=0.3, warm_learning_rate=0.2, warm_clip_range=0.4
    )
    for rounds, rate, clip in ((0, 0.1, 0.3), (1, 0.2, 0.4)):
        model = make_model(TINY, replace(h, imitation_rounds=rounds))
        assert model.lr_schedule(1.0) == pytest.approx(rate)
        assert model.__dict__["clip_range"](1.0) == pytest.approx(clip)
