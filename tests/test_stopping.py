"""Training that ends early: callbacks that return False, non-finite weights, full disks."""

from __future__ import annotations

import errno
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from stable_baselines3.common.callbacks import (
    BaseCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.vec_env import VecMonitor

from servegym.agents import charts
from servegym.agents.callbacks import ServingCallback
from servegym.agents.checkpoints import checkpoints
from servegym.agents.hyperparameters import Hyperparameters, Options
from servegym.agents.policy import load_agent
from servegym.agents.sb3_vec_env import ServingSB3VecEnv
from servegym.agents.training import train
from servegym.envs import ServegymError
from servegym.envs.task.registered import TASKS
from servegym.envs.vector_env import ServingVectorEnv
from tests.helpers import changed, weights

TINY = TASKS["servegym/Tiny-v0"]
SMALL = Hyperparameters(
    environments=4, steps=16, batch_size=32, epochs=2, width=8, timesteps=6 * 64, seed=3
)
EVOLVING = replace(
    SMALL, timesteps=2 * 64, evolution_updates=4, evolution_pairs=2, evolution_directions=2
)
QUIET = Options(checkpoint_every=100, tensorboard=False, progress=False)


class StopAfter(BaseCallback):
    """Stops training after a number of calls, as callbacks of stable-baselines3 do."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls
        self.ended = 0

    def _on_step(self) -> bool:
        return self.n_calls < self.calls

    def _on_training_end(self) -> None:
        self.ended += 1


def watcher(folder: Path) -> ServingCallback:
    return ServingCallback(TINY, [900_000, 900_001], 128, {}, {}, folder)


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no pictures: they take longer than all else."""
    monkeypatch.setattr(charts, "to_image", lambda _: np.zeros((1, 1, 3), np.uint8))


def last_state(folder: Path) -> dict[str, bytes]:
    arrays = load_file(checkpoints(folder / "checkpoints")[-1])
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that were not stopped."""
    folders = {}
    for name, h in (
        ("ppo", replace(SMALL, algorithm="ppo")),
        ("maskable-ppo", SMALL),
        ("evolving", EVOLVING),
    ):
        folders[name] = tmp_path_factory.mktemp("whole") / name
        train(TINY, h, folders[name], options=QUIET)
    return folders


@pytest.mark.parametrize(
    ("algorithm", "calls"),
    [("ppo", 37), ("maskable-ppo", 1), ("maskable-ppo", 37), ("maskable-ppo", 48)],
)
def test_a_callback_stops_training_and_a_resume_ends_in_the_same_state(
    algorithm: str, calls: int, whole: dict[str, Path], tmp_path: Path
) -> None:
    """Also in the first step, and in a rollout's last step: stable-baselines3 does not learn from it then."""
    stop = StopAfter(calls)
    h = replace(SMALL, algorithm=algorithm)
    model = train(TINY, h, tmp_path / "run", callbacks=[stop], options=QUIET)
    assert stop.ended == 1
    assert model.num_timesteps == 4 * calls
    learned = (calls - 1) // 16
    saved = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert int(saved.stem) == 64 * learned
    with safe_open(saved, framework="numpy") as file:
        assert json.loads(file.metadata()["values"])["n_updates"] == learned * h.epochs
    kept = {name: value.tobytes() for name, value in load_file(saved).items()}
    assert {name: kept[f"policy.{name}"] for name in weights(model)} == weights(model)
    resumed = train(TINY, h, tmp_path / "run", resume=True, options=QUIET)
    assert resumed.num_timesteps == h.timesteps
    assert last_state(tmp_path / "run") == last_state(whole[algorithm])


@pytest.mark.parametrize("kind", ["episodes", "reward"])
def test_callbacks_of_stable_baselines3_stop_it(kind: str, tmp_path: Path) -> None:
    if kind == "episodes":
        callback: BaseCallback = StopTrainingOnMaxEpisodes(max_episodes=2)  # in each environment
    else:
        vector_env = VecMonitor(ServingSB3VecEnv(ServingVectorEnv(2, TINY)))
        threshold = StopTrainingOnRewardThreshold(-1e9)
        callback = EvalCallback(
            vector_env, callback_on_new_best=threshold, n_eval_episodes=2, eval_freq=10, verbose=0
        )
    model = train(TINY, SMALL, tmp_path / "run", callbacks=[callback], options=QUIET)
    assert 0 < model.num_timesteps < SMALL.timesteps
    if kind == "episodes":
        assert isinstance(callback, StopTrainingOnMaxEpisodes)
        assert 8 <= callback.n_episodes < 8 + 4
    else:
        assert model.num_timesteps == 40


@pytest.mark.usefixtures("unseen")
def test_a_stopped_run_is_evaluated_and_its_table_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(TINY, SMALL, folder, callbacks=[watcher(folder), StopAfter(3 * 16 + 5)], options=QUIET)
    stopped = pd.read_csv(folder / "evaluations.csv")
    assert list(stopped["timesteps"]) == [0, 128, 212]
    assert load_agent(folder / "final").card.training["timesteps"] == 212
    train(TINY, SMALL, folder, callbacks=[watcher(folder)], resume=True, options=QUIET)
    resumed = pd.read_csv(folder / "evaluations.csv")
    assert list(resumed["timesteps"]) == [0, 128, 212, 256, 384]
    pd.testing.assert_frame_equal(resumed[:3], stopped)
    best = 1 + int(resumed["gap_percent"][1:].argmin())
    kept = load_agent(folder / "agent").card.training["timesteps"]
    assert kept == resumed["timesteps"].iloc[best]


def test_ppo_that_was_stopped_is_not_followed_by_evolution(tmp_path: Path) -> None:
    stop = StopAfter(16 + 3)
    model = train(TINY, EVOLVING, tmp_path / "run", callbacks=[stop], options=QUIET)
    assert model.num_timesteps == 4 * 19
    assert stop.ended == 1


def test_a_callback_stops_an_evolution(whole: dict[str, Path], tmp_path: Path) -> None:
    stop = StopAfter(2 * 16 + 3)  # PPO's steps, then one call after each update
    stopped = train(TINY, EVOLVING, tmp_path / "run", callbacks=[stop], options=QUIET)
    assert stop.n_calls == 2 * 16 + 3
    assert stop.ended == 1
    saved = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert int(saved.stem) == stopped.num_timesteps
    train(TINY, EVOLVING, tmp_path / "run", resume=True, options=QUIET)
    assert last_state(tmp_path / "run") == last_state(whole["evolving"])


# What cannot go on


class Spoil(BaseCallback):
    """Makes a weight infinite before the second update, as a far too high learning rate does."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.num_timesteps > 64:
            with torch.no_grad():
                next(iter(self.model.policy.parameters())).fill_(torch.inf)


def test_weights_that_are_no_numbers_end_training(tmp_path: Path) -> None:
    words = "no longer finite after 128 timesteps.* with a learning_rate below 0.001"
    with pytest.raises(ServegymError, match=words):
        train(TINY, SMALL, tmp_path / "run", callbacks=[Spoil()], options=QUIET)
    assert [path.stem for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["0" * 12]


@pytest.mark.parametrize("rules", [("fcfs",), ("fcfs", "longest")])
def test_a_task_without_a_choice_is_refused(rules: tuple[str, ...], tmp_path: Path) -> None:
    """All requests fit at once, so only the order of admission is left to choose, if there are two rules."""
    task = changed(TINY, workload={"requests": 2}, process={"rules": rules})
    h = replace(SMALL, timesteps=64)
    if len(rules) > 1:
        assert train(task, h, tmp_path / "run", options=QUIET).num_timesteps == 64
        return
    with pytest.raises(ServegymError, match="episodes offer no choice"):
        train(task, h, tmp_path / "run", options=QUIET)
    assert not (tmp_path / "run").exists()


class Full(BaseCallback):
    """Fails as TensorBoard's writers do on a full disk: in a thread, then in the caller."""

    def _on_step(self) -> bool:
        thread = threading.Thread(target=self.write)
        thread.start()
        thread.join()
        self.write()
        return True

    def write(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = threading.excepthook
    words = r"run: cannot be written: No space left on device; .* --resume"
    with pytest.raises(ServegymError, match=words):
        train(TINY, SMALL, tmp_path / "run", callbacks=[Full()], options=QUIET)
    assert threading.excepthook is usual
    assert capsys.readouterr().err == ""
