"""Files that training leaves: event files, evaluations.csv, the best and the last agent."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from servegym.agents import charts, training
from servegym.agents.callbacks import ServingCallback
from servegym.agents.checkpoints import checkpoints, load_checkpoint
from servegym.agents.evaluations import EVALUATION_COLUMNS
from servegym.agents.hyperparameters import Hyperparameters, Options
from servegym.agents.policy import load_agent
from servegym.agents.record import identity
from servegym.agents.validation import Validation
from servegym.envs import ServegymError, load_task
from servegym.envs.pictures import draw_learning_curves, draw_values, to_image
from servegym.envs.process.metrics import METRICS
from servegym.envs.vector_env import ServingVectorEnv

TINY = load_task("Tiny-v0")
SEEDS = (500, 501, 502)
ROLLOUT = 64
REFERENCES = {
    "hybrid": {"gap": 0.125, "makespan_s": 40.0, "prefill_stages": 5.0},
    "threshold-12": {"gap": 0.0625},
}
CHARTS = (
    *("serving/gap", "serving/makespan_s", "serving/client_utilization"),
    *("serving/decode_utilization", "serving/prefill_stages", "serving/decode_rounds"),
)
ACTIONS = ("decode", *TINY.process.rules)


class Reporting(gym.Wrapper):
    """Puts the metrics of an ended episode into info["serving"], as training reads them; the gap is 0.25."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        if terminated or truncated:
            info = {"serving": {name: info[name] for name in METRICS} | {"gap": 0.25}}
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> Any:
        return self.env.get_wrapper_attr("action_masks")()


def make_model(algorithm: Any, folder: Path) -> Any:
    envs = DummyVecEnv([lambda: Reporting(gym.make("servegym/Tiny-v0"))] * 2)
    model = algorithm(
        "MlpPolicy",
        envs,
        n_steps=ROLLOUT // 2,
        batch_size=32,
        n_epochs=1,
        learning_rate=0.03,
        gamma=1.0,
        seed=0,
        device="cpu",
        policy_kwargs={"net_arch": [8]},
    )
    model.set_logger(configure(str(folder / "tensorboard" / "training"), ["tensorboard"]))
    return model


def make_callback(folder: Path) -> ServingCallback:
    hyperparameters = {"learning_rate": 0.03, "net_arch": [8], "masks": True}
    return ServingCallback(
        TINY, SEEDS, 2 * ROLLOUT, REFERENCES, hyperparameters, folder, command="train"
    )


def train(folder: Path, rollouts: int, algorithm: Any = MaskablePPO) -> Any:
    model = make_model(algorithm, folder)
    return model.learn(rollouts * ROLLOUT, callback=make_callback(folder))


def read(folder: Path, run: str) -> EventAccumulator:
    events = EventAccumulator(
        str(folder / "tensorboard" / run), size_guidance={"scalars": 0, "images": 0}
    )
    return events.Reload()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of five rollouts: evaluations after 0, 2, 4 and 5 of them."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, 5)
    return folder


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no pictures: they take longer than all else, and most tests do not look at them."""
    monkeypatch.setattr(charts, "to_image", lambda _: np.zeros((1, 1, 3), np.uint8))


STEPS = [0, 2 * ROLLOUT, 4 * ROLLOUT, 5 * ROLLOUT]


def test_every_chart_is_there(trained: Path) -> None:
    events = read(trained, "training")
    tags = [*CHARTS, "serving/gap_sampled", "serving/decision_ms_p50", "serving/decision_ms_p99"]
    tags += [f"shares/{action}" for action in ACTIONS]
    for tag in tags:
        assert [event.step for event in events.Scalars(tag)] == STEPS, tag
    for tag in (
        *(tag.replace("serving/", "serving/train_") for tag in CHARTS),
        *(f"shares/train_{action}" for action in ACTIONS),
    ):
        steps = [event.step for event in events.Scalars(tag)]
        assert set(steps) <= {ROLLOUT * k for k in range(1, 6)}
        assert len(steps) >= 4, tag
    for prefix in ("", "train_"):
        shares = [
            [event.value for event in events.Scalars(f"shares/{prefix}{action}")]
            for action in ACTIONS
        ]
        assert np.allclose(np.sum(shares, axis=0), 1.0, atol=1e-6)
    assert {event.value for event in events.Scalars("serving/train_gap")} == {25.0}
    assert "train/value_loss" in events.Tags()["scalars"]  # stable-baselines3's own stay


def test_the_gap_is_in_percent_and_what_the_agent_does(trained: Path) -> None:
    agent = load_agent(trained / "final")
    result = Validation(TINY, SEEDS).play(agent.network.best)
    events = read(trained, "training")
    assert events.Scalars("serving/gap")[-1].value == pytest.approx(
        100 * result.episodes["gap"].mean(), rel=1e-5
    )
    assert events.Scalars("serving/makespan_s")[-1].value == pytest.approx(
        result.episodes["makespan_s"].mean(), rel=1e-5
    )


def test_references_are_constant_in_the_same_charts(trained: Path) -> None:
    for policy, values in REFERENCES.items():
        events = read(trained, f"reference-{policy}")
        assert set(events.Tags()["scalars"]) == {f"serving/{name}" for name in values} | {
            "eval/gap"
        }
        for name, value in values.items():
            lines = events.Scalars(f"serving/{name}")
            assert [event.step for event in lines] == STEPS
            expected = 100 * value if name == "gap" else value
            assert {event.value for event in lines} == {expected}


@pytest.mark.parametrize("tag", ["serving/gantt", "serving/value"])
def test_pictures(trained: Path, tag: str) -> None:
    images = read(trained, "training").Images(tag)
    assert [event.step for event in images] == STEPS
    assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in images)
    assert all(event.width > 500 and event.height > 100 for event in images)


def test_the_value_figure_compares_with_what_the_episode_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(*lines: Any) -> Any:
        drawn.append(lines)
        return draw_values(*lines)

    monkeypatch.setattr(charts, "draw_values", draw)
    model = make_model(MaskablePPO, tmp_path)
    model.learn(1, callback=make_callback(tmp_path))
    first, last = drawn
    assert not np.array_equal(first[1], last[1])  # the critic has learnt
    result = Validation(TINY, SEEDS).play(load_agent(tmp_path / "final").network.best)
    clock_s, estimates, returns = last
    assert returns[0] == pytest.approx(-100 * result.episodes["gap"].iloc[0])  # γ = 1
    assert returns[-1] == result.trace.rewards[-1]
    assert np.array_equal(clock_s, result.trace.clock_s)
    for observation, estimate in zip(result.trace.observations, estimates, strict=True):
        value = model.policy.predict_values(torch.as_tensor(observation[None]))
        assert value.item() == pytest.approx(estimate, rel=1e-5)


def test_hyperparameters_name_their_metrics(trained: Path) -> None:
    """TensorBoard joins a run's hyper-parameters with the last values of the named scalars."""
    metadata = read(trained, "training").summary_metadata
    hparams = {tag: metadata[tag] for tag in metadata if tag.startswith("_hparams_")}
    assert set(hparams) >= {"_hparams_/experiment", "_hparams_/session_start_info"}
    content = b"".join(entry.plugin_data.content for entry in hparams.values())
    for word in (
        b"learning_rate",
        b"net_arch",
        b"[8]",
        b"masks",
        *(tag.encode() for tag in CHARTS),
    ):
        assert word in content


def test_the_table_follows_the_run(trained: Path) -> None:
    table = pd.read_csv(trained / "evaluations.csv")
    assert tuple(table.columns) == EVALUATION_COLUMNS
    assert list(table["timesteps"]) == STEPS
    assert (table["cases"] == len(SEEDS)).all()
    assert (table["training_s"].diff()[1:] > 0).all()
    assert (table["training_s"] <= table["wall_s"]).all()
    best = Validation(TINY, SEEDS).play(load_agent(trained / "agent").network.best)
    lowest = table["gap_percent"][1:].min()  # the untrained network is never the best
    assert 100 * best.episodes["gap"].mean() == pytest.approx(lowest, rel=1e-9)
    assert load_agent(trained / "final").card.training["timesteps"] == STEPS[-1]
    assert load_agent(trained / "agent").card.training["command"] == "train"


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
def test_watching_changes_nothing(tmp_path: Path, algorithm: Any) -> None:
    watched = train(tmp_path, 3, algorithm)
    alone = make_model(algorithm, tmp_path / "alone").learn(3 * ROLLOUT)
    pairs = zip(watched.policy.parameters(), alone.policy.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.usefixtures("unseen")
def test_a_resumed_run_goes_on_in_table_and_charts(trained: Path, tmp_path: Path) -> None:
    """Killed after five rollouts, with its last checkpoint after three: the rows until then are kept."""
    model = make_model(MaskablePPO, tmp_path)
    model.learn(3 * ROLLOUT, callback=make_callback(tmp_path))
    model.save(tmp_path / "checkpoint.zip")
    model.logger.close()
    ahead = make_model(MaskablePPO, tmp_path)
    ahead.num_timesteps = 3 * ROLLOUT
    ahead.learn(2 * ROLLOUT, callback=make_callback(tmp_path), reset_num_timesteps=False)
    ahead.logger.close()
    before = pd.read_csv(tmp_path / "evaluations.csv")
    assert list(before["timesteps"]) == [ROLLOUT * k for k in (0, 2, 3, 4, 5)]
    resumed = make_model(MaskablePPO, tmp_path)
    resumed.set_parameters(tmp_path / "checkpoint.zip")
    resumed.num_timesteps = 3 * ROLLOUT
    callback = make_callback(tmp_path)
    resumed.learn(3 * ROLLOUT, callback=callback, reset_num_timesteps=False)
    after = pd.read_csv(tmp_path / "evaluations.csv")
    assert list(after["timesteps"]) == [ROLLOUT * k for k in (0, 2, 3, 4, 6)]
    pd.testing.assert_frame_equal(after[:3], before[:3])
    assert (after["training_s"].diff()[1:] > 0).all()
    assert callback.best is not None
    assert callback.best["gap_percent"] == after["gap_percent"][1:].min()
    for run in ("training", "reference-hybrid"):
        shown = [event.step for event in read(tmp_path, run).Scalars("serving/gap")]
        assert shown == [ROLLOUT * k for k in (0, 2, 3, 4, 6)]


@pytest.mark.usefixtures("unseen")
def test_a_worse_agent_does_not_replace_the_best(tmp_path: Path) -> None:
    callback = make_callback(tmp_path)
    model = make_model(MaskablePPO, tmp_path)
    model.learn(ROLLOUT, callback=callback)
    rows = callback.evaluations.rows.assign(gap_percent=-1.0)  # better than anything can be
    rows.to_csv(tmp_path / "evaluations.csv", index=False)
    kept = (tmp_path / "agent" / "agent.json").read_bytes()
    model.learn(4 * ROLLOUT, callback=make_callback(tmp_path), reset_num_timesteps=False)
    assert (tmp_path / "agent" / "agent.json").read_bytes() == kept
    assert load_agent(tmp_path / "final").card.training["timesteps"] == 5 * ROLLOUT


@pytest.mark.usefixtures("unseen")
def test_seconds_of_imitation_count(tmp_path: Path) -> None:
    """`train` passes them to the callback; resuming a finished run adds nothing."""

    def slow(env: ServingVectorEnv) -> Any:
        time.sleep(0.2)
        return np.where(env.action_masks(), 0.0, -np.inf)

    h = Hyperparameters(
        environments=2,
        steps=ROLLOUT // 2,
        batch_size=32,
        width=8,
        timesteps=1,
        imitation_rounds=1,
        imitation_states=4,
        imitation_environments=2,
    )
    options = Options(progress=False)
    training.train(
        TINY, h, tmp_path, callbacks=[make_callback(tmp_path)], expert=slow, options=options
    )
    before = pd.read_csv(tmp_path / "evaluations.csv")
    assert before[["wall_s", "training_s"]].min().min() > 0.4  # two labelled steps
    training.train(
        TINY, h, tmp_path, callbacks=[make_callback(tmp_path)], resume=True, options=options
    )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "evaluations.csv"), before)
    # Killed after the checkpoint and before the evaluation: the seconds of the rollout still count.
    before[:1].to_csv(tmp_path / "evaluations.csv", index=False)
    saved = checkpoints(tmp_path / "checkpoints")[-1]
    taken_s = load_checkpoint(training.make_model(TINY, h), identity(TINY, h), saved).training_s
    training.train(
        TINY, h, tmp_path, callbacks=[make_callback(tmp_path)], resume=True, options=options
    )
    after = pd.read_csv(tmp_path / "evaluations.csv")
    assert list(after["timesteps"]) == [0, ROLLOUT]
    assert after["training_s"].iloc[-1] >= taken_s > before["training_s"].iloc[0]


@pytest.mark.usefixtures("unseen")
def test_a_damaged_table_is_refused_on_resume(tmp_path: Path) -> None:
    model = train(tmp_path, 1)
    path = tmp_path / "evaluations.csv"
    path.write_text(path.read_text() + "x\n")
    with pytest.raises(ServegymError, match="delete this line, and its evaluation is lost"):
        model.learn(ROLLOUT, callback=make_callback(tmp_path), reset_num_timesteps=False)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ServegymError, match=r"evaluations\.csv: not a table of this version"):
        model.learn(ROLLOUT, callback=make_callback(tmp_path), reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every_timesteps": 0}, "every_timesteps must be"),
        ({"validation_seeds": []}, "at least one seed"),
        ({"references": {"hybrid": {"gpa": 0.1}}}, "did you mean 'gap'"),
        ({"rule_gaps": {"hybrid": [0.1]}}, "a gap for each of 3 validation seeds, got 1"),
    ],
)
def test_bad_arguments(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "task": TINY,
        "validation_seeds": SEEDS,
        "every_timesteps": 1,
        "references": {},
        "hyperparameters": {},
        "folder": tmp_path,
    }
    ServingCallback(**good)
    with pytest.raises(ServegymError, match=message):
        ServingCallback(**(good | change))


def test_learning_curves() -> None:
    """Two seeds of one line on a common grid: the mean in the middle of the band."""
    curves = pd.DataFrame(
        {
            "label": ["PPO"] * 5 + ["imitation"] * 2,
            "seed": [0, 0, 0, 1, 1, 0, 0],
            "training_s": [0.0, 60.0, 120.0, 0.0, 120.0, 0.0, 60.0],
            "gap_percent": [8.0, 4.0, 2.0, 6.0, 2.0, 5.0, 1.0],
        }
    )
    figure = draw_learning_curves(curves, {"hybrid": 3.0, "threshold-12": 2.5})
    axes = figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert np.allclose(lines["PPO"].get_xdata(), [0, 1, 2])
    assert np.allclose(lines["PPO"].get_ydata(), [7, 4, 2])
    assert np.allclose(lines["imitation"].get_ydata(), [5, 1])
    assert set(np.asarray(lines["hybrid (3.00 %)"].get_ydata())) == {3.0}
    assert set(np.asarray(lines["threshold-12 (2.50 %)"].get_ydata())) == {2.5}
    assert axes.get_ylim()[1] < 3 * 3.0  # all fits
    curves["gap_percent"] *= 10
    assert draw_learning_curves(curves, {"hybrid": 3.0}).axes[0].get_ylim()[1] == 9.0
    assert draw_learning_curves(curves, {}).axes[0].get_ylim()[1] > 70
    assert len(axes.collections) == 1  # one seed has no band
    assert to_image(figure).shape[2] == 3
