"""Imitation before training: soft targets, returns to go, states of whole episodes, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from servegym.agents.imitation import collect, imitate, soft_targets, spread_over_episodes
from servegym.agents.training import make_model, train
from servegym.envs import ServegymError
from servegym.envs.vector_env import ServingVectorEnv
from tests.helpers import changed
from tests.training_helpers import QUIET, SMALL, TINY, prefer_prefill


def test_soft_targets() -> None:
    values = np.array([[0.0, np.log(3.0), -np.inf], [-np.inf, -5.0, -np.inf]])
    assert soft_targets(values, 1.0) == pytest.approx(np.array([[0.25, 0.75, 0], [0, 1, 0]]))
    assert soft_targets(values, 0.5)[0] == pytest.approx(np.array([0.1, 0.9, 0]))


def test_labels_hold_the_reward_from_here_on() -> None:
    """An expert that knows the gap at the end: value targets are the true returns to go."""
    env = ServingVectorEnv(1, TINY)

    def act(env: ServingVectorEnv, _: object = None) -> NDArray[np.int64]:
        return env.action_masks()[:, ::-1].argmax(axis=1) * -1 + 6

    env.reset(seed=0)
    rewards: list[float] = []
    gap, over = 0.0, False
    while not over:
        _, reward, terminated, _, infos = env.step(act(env))
        rewards.append(float(reward[0]))
        over = bool(terminated[0])
        if over:
            gap = 100 * float(infos["final_info"]["gap"][0])
    assert len(rewards) > 2
    env.reset(seed=0)

    def expert(env: ServingVectorEnv) -> NDArray[np.float64]:
        return np.where(env.action_masks(), -gap, -np.inf)

    labelled = collect(env, expert, act, len(rewards), 0.02)
    to_go = np.cumsum(rewards[::-1])[::-1]
    assert labelled.returns == pytest.approx(to_go, abs=1e-4)
    assert labelled.targets.sum(axis=1) == pytest.approx(1.0)
    assert (labelled.targets[~labelled.masks] == 0).all()


def test_rows_are_spread_over_their_episodes() -> None:
    task = changed(TINY, workload={"requests": 200}, cluster={"clients": 4})
    env = ServingVectorEnv(5, task, copy=False)
    env.reset(seed=0)
    spread_over_episodes(env, lambda env, _: env.action_masks().argmax(axis=1))
    shares = env.state.episodes["finished"] / 200
    assert (shares >= np.arange(5) / 5).all()
    assert (shares < np.arange(5) / 5 + 0.1).all()
    observations, masks = env.rows.observations.copy(), env.action_masks().copy()
    assert observations[:, 4] == pytest.approx(shares)
    assert masks.any(axis=1).all()


def test_spreading_ends_where_episodes_are_too_short() -> None:
    env = ServingVectorEnv(40, TINY, copy=False)  # eight requests: no state at 39/40
    env.reset(seed=0)
    spread_over_episodes(env, lambda env, _: env.action_masks().argmax(axis=1))
    assert (env.state.episodes["finished"] < 8).all()


@pytest.mark.parametrize("algorithm", ["ppo", "maskable-ppo"])
def test_the_learner_comes_to_do_what_the_expert_does(algorithm: str) -> None:
    h = replace(
        SMALL,
        algorithm=algorithm,
        width=32,
        imitation_rounds=2,
        imitation_states=600,
        imitation_environments=8,
        imitation_batch_size=64,
        imitation_epochs=15,
        imitation_learning_rate=3e-3,
    )
    rule = 3  # longest first, else decode

    def expert(env: ServingVectorEnv) -> NDArray[np.float64]:
        masks = env.action_masks()
        crowded = env.rows.observations[:, 0] < 0.5
        values = np.where(
            np.arange(masks.shape[1]) == np.where(crowded, rule, 0)[:, None], -1.0, -2
        )
        return np.where(masks, values, -np.inf)

    model = make_model(TINY, h)
    imitate(model, TINY, expert, h)
    env = ServingVectorEnv(16, TINY)
    env.reset(seed=900_000)
    agreed = []
    for _ in range(20):
        legal: Any = {"action_masks": env.action_masks()} if algorithm == "maskable-ppo" else {}
        actions, _ = model.predict(env.rows.observations, deterministic=True, **legal)
        agreed.append(actions == expert(env).argmax(axis=1))
        env.step(actions)
    assert np.mean(agreed) > 0.97


def test_imitation_wants_an_expert_and_the_gap(tmp_path: Path) -> None:
    h = replace(SMALL, imitation_rounds=1)
    with pytest.raises(ServegymError, match="no expert"):
        train(TINY, h, tmp_path / "run", options=QUIET)
    task = changed(TINY, process={"reward": "latency"})
    with pytest.raises(ServegymError, match="gap"):
        imitate(make_model(task, h), task, prefer_prefill, h)
    with pytest.raises(ServegymError, match="gap"):
        train(task, h, tmp_path / "other", expert=prefer_prefill, options=QUIET)
    assert not (tmp_path / "other").exists()
