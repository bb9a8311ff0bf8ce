"""Evaluations in training: sampled play, cases cut short, the best agent, the line on the outcome."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from servegym.agents import charts
from servegym.agents.callbacks import ServingCallback
from servegym.agents.evaluations import EVALUATION_COLUMNS
from servegym.agents.evolution import Evolution
from servegym.agents.hyperparameters import Hyperparameters, Options, default_hyperparameters
from servegym.agents.network import Network
from servegym.agents.policy import load_agent
from servegym.agents.training import make_model, train
from servegym.agents.validation import Validation
from servegym.envs import make_case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import TASKS
from servegym.studies.commands import train as script
from tests.helpers import changed

TINY = TASKS["servegym/Tiny-v0"]
SEEDS = range(900_000, 900_008)
SMALL = Hyperparameters(
    environments=4, steps=16, batch_size=32, epochs=2, width=8, timesteps=4 * 64, seed=3
)
LOGGED = Options(progress=False)


def watcher(folder: Path, task: TaskConfig = TINY, **hyperparameters: Any) -> ServingCallback:
    references = {"hybrid": {"gap": 0.1}}
    return ServingCallback(task, SEEDS, 128, references, hyperparameters, folder)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0}).Reload()


@pytest.fixture(autouse=True)
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no pictures: they take longer than all else."""
    monkeypatch.setattr(charts, "to_image", lambda _: np.zeros((1, 1, 3), np.uint8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an evolution: evaluations at the run's start, within it and at its end."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    h = replace(SMALL, evolution_updates=1, evolution_pairs=2, evolution_directions=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "to_image", lambda _: np.zeros((1, 1, 3), np.uint8))
        train(TINY, h, folder, callbacks=[watcher(folder)], options=LOGGED)
    return folder


# Sampled play


def test_draws_follow_the_softmax_of_legal_scores() -> None:
    network = Network([(np.zeros((3, 1), np.float32), np.array([0.0, 1.0, 5.0], np.float32))])
    masks = np.tile([True, True, False], (20_000, 1))
    drawn = network.sampled(np.zeros((20_000, 1), np.float32), masks, np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=3) / 20_000
    wanted = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    assert shares == pytest.approx([*wanted, 0.0], abs=0.01)


def test_sampled_play_stands_beside_greedy_play(trained: Path) -> None:
    table = pd.read_csv(trained / "evaluations.csv")
    assert tuple(table.columns) == EVALUATION_COLUMNS
    assert (table["unfinished"] == 0).all()
    network = load_agent(trained / "final").network
    played = Validation(TINY, SEEDS).play(partial(network.sampled, rng=np.random.default_rng(0)))
    sampled = 100 * played.episodes["gap"].mean()
    assert table["gap_percent_sampled"].iloc[-1] == pytest.approx(sampled, rel=1e-12)
    assert (table["gap_percent_sampled"] != table["gap_percent"]).all()
    events = read(trained).Scalars("serving/gap_sampled")
    assert [event.value for event in events] == pytest.approx(list(table["gap_percent_sampled"]))


def test_the_gap_is_on_the_first_page_of_tensorboard(trained: Path) -> None:
    """TensorBoard sorts tags by group (the part before "/"), opens two groups and shows 12 tags of each."""
    tags = read(trained).Tags()
    cards = sorted([*tags["scalars"], *tags["images"]])
    assert any(tag.startswith("train/evolution") for tag in cards)
    groups = list(dict.fromkeys(tag.partition("/")[0] for tag in cards))
    assert groups[0] == "eval"
    page = [tag for tag in cards if tag.startswith("eval/")][:12]
    assert set(page) == {f"eval/{name}" for name in EVAL}
    events = read(trained)
    for name in ("gap", "gap_sampled"):
        shown = [
            [e.value for e in events.Scalars(f"{group}/{name}")] for group in ("eval", "serving")
        ]
        assert shown[0] == shown[1]


EVAL = ("gap", "gap_sampled", "mean_reward", "mean_ep_length")


def test_tools_of_stable_baselines3_find_the_mean_reward(trained: Path) -> None:
    """What ``EvalCallback`` logs under these names; of Tiny-v0 the return is minus the gap in percent."""
    table = pd.read_csv(trained / "evaluations.csv")
    assert np.allclose(table["mean_reward"], -table["gap_percent"], rtol=1e-12)
    assert (table["mean_ep_length"] == table["decisions"]).all()
    events = read(trained)
    for name in ("mean_reward", "mean_ep_length"):
        shown = events.Scalars(f"eval/{name}")
        assert [event.step for event in shown] == list(table["timesteps"])
        assert [event.value for event in shown] == pytest.approx(list(table[name]))


def test_a_table_of_an_earlier_version_is_gone_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    h = replace(SMALL, timesteps=128)
    train(TINY, h, folder, callbacks=[watcher(folder)], options=LOGGED)
    path = folder / "evaluations.csv"
    table = pd.read_csv(path)
    later = ["gap_percent_sampled", "unfinished", "mean_reward", "mean_ep_length"]
    earlier = table.drop(columns=later)
    earlier.to_csv(path, index=False)
    callback = watcher(folder)
    train(TINY, h, folder, callbacks=[callback], resume=True, options=LOGGED)
    assert tuple(callback.evaluations.rows.columns) == EVALUATION_COLUMNS
    assert (callback.evaluations.rows["unfinished"] == 0).all()
    assert callback.evaluations.rows["gap_percent_sampled"].isna().all()
    assert callback.best is not None
    assert callback.best["gap_percent"] == table["gap_percent"].iloc[-1]


# Episodes that are cut short

MANY = 10**6


@pytest.mark.parametrize("limit", [{"max_decisions": 4}, {"max_seconds": 20.0}])
def test_cases_that_are_cut_short_have_no_gap(limit: dict[str, Any], tmp_path: Path) -> None:
    task = changed(TINY, process=limit)
    callback = watcher(tmp_path / "run", task)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(task, SMALL, tmp_path / "run", callbacks=[callback], options=LOGGED)
    table = pd.read_csv(tmp_path / "run" / "evaluations.csv")
    assert (table["unfinished"] > 0).any()
    for _, row in table.iterrows():
        assert np.isnan(row["gap_percent"]) == (row["unfinished"] > 0)
    result = Validation(task, SEEDS).play(load_agent(tmp_path / "run" / "final").network.best)
    assert table["unfinished"].iloc[-1] == (result.episodes["unfinished_requests"] > 0).sum()
    events = read(tmp_path / "run")
    shown = [event.step for event in events.Scalars("serving/unfinished")]
    assert shown == list(table["timesteps"])
    assert "serving/train_unfinished" in events.Tags()["scalars"]
    for tag in events.Tags()["scalars"]:
        if tag.startswith("serving/"):
            assert all(np.isfinite(event.value) for event in events.Scalars(tag)), tag
    assert load_agent(tmp_path / "run" / "agent").card.training["timesteps"] > 0


def test_means_of_training_are_over_episodes_that_finished(tmp_path: Path) -> None:
    """A limit that no episode reaches changes no mean; only shares of unfinished episodes are added."""
    for name, process in (("free", {}), ("limited", {"max_decisions": MANY})):
        task = changed(TINY, process=process)
        folder = tmp_path / name
        train(task, SMALL, folder, callbacks=[watcher(folder, task)], options=LOGGED)
    free, limited = read(tmp_path / "free"), read(tmp_path / "limited")
    added = set(limited.Tags()["scalars"]) - set(free.Tags()["scalars"])
    assert added == {"serving/unfinished", "serving/train_unfinished"}
    for tag in added:
        assert {event.value for event in limited.Scalars(tag)} == {0.0}
    for tag in ("serving/gap", "serving/train_gap", "serving/train_makespan_s"):
        values = [[event.value for event in log.Scalars(tag)] for log in (free, limited)]
        assert values[0] == values[1]


def test_evolution_takes_a_candidate_that_is_cut_short_for_the_worst() -> None:
    h = replace(SMALL, evolution_updates=1, evolution_pairs=32, evolution_directions=2)
    task = changed(TINY, process={"max_decisions": 5})
    evolution = Evolution(make_model(task, h), task, h)
    candidates = np.random.default_rng(0).normal(size=(64, 7, 9)).astype(np.float32)
    free = Evolution(make_model(TINY, h), TINY, h)
    cases = [make_case(TINY, seed) for seed in range(32)]
    gaps_percent, whole_percent = (
        strategy.play_pairs(candidates, cases)[0] for strategy in (evolution, free)
    )
    cut_short = gaps_percent != whole_percent
    assert 0 < cut_short.sum() < 64
    assert set(gaps_percent[cut_short]) == {2.0 * max(gaps_percent[~cut_short].max(), 100.0)}
    update = evolution.update(0)
    assert np.isfinite(update)[:2].all()


# The best


def evaluation(timesteps: int, gap_percent: float, unfinished: int = 0) -> dict[str, Any]:
    row = dict.fromkeys(EVALUATION_COLUMNS, 0.0)
    return row | {
        "timesteps": timesteps,
        "gap_percent": gap_percent,
        "unfinished": unfinished,
        "cases": 20,
    }


NAN = float("nan")


@pytest.mark.parametrize(
    ("rows", "imitated", "best", "words"),
    [
        ([(0, 7.0)], False, None, "there is no best agent"),
        (
            [(0, 7.0), (9, 114.0), (10, 113.0)],
            False,
            10,
            "; the untrained network has 7.00 %: train",
        ),
        (
            [(0, 7.0), (9, 6.0), (10, 6.0)],
            False,
            9,
            "6.00 % above the lower bound on 20 validation",
        ),
        (
            [(0, 7.0), (9, 8.0)],
            True,
            0,
            "no evaluation after that, of what was imitated, is better",
        ),
        ([(0, 7.0), (9, 6.5)], True, 9, "taken after 9 timesteps, 6.50 %"),
        (
            [(0, 7.0), (9, NAN, 2), (10, NAN, 2), (11, NAN, 3)],
            False,
            10,
            "2 of 20 validation cases",
        ),
        ([(0, 7.0), (9, NAN, 1), (10, 50.0), (11, NAN, 1)], False, 10, "50.00 %"),
    ],
)
def test_which_evaluation_is_the_best_and_what_is_said_of_it(
    rows: list[Any], imitated: bool, best: int | None, words: str, tmp_path: Path
) -> None:
    callback = watcher(tmp_path, imitation_rounds=int(imitated))
    callback.evaluations.rows = pd.DataFrame([evaluation(*row) for row in rows])
    best_evaluation = callback.best
    assert (None if best_evaluation is None else best_evaluation["timesteps"]) == best
    assert words in callback.outcome[0]


@pytest.mark.parametrize(("gap_percent", "advised"), [(0.0, False), (0.004, False), (0.01, True)])
def test_nothing_is_advised_at_the_lower_bound(
    gap_percent: float, advised: bool, tmp_path: Path
) -> None:
    callback = watcher(tmp_path, imitation_rounds=0)
    rows = [(0, 0.0), (9, gap_percent)]
    callback.evaluations.rows = pd.DataFrame([evaluation(*row) for row in rows])
    assert ("train for longer" in callback.outcome[0]) == advised


def test_the_untrained_network_is_not_kept(tmp_path: Path) -> None:
    """At a learning rate of 0 nothing is learned: all gaps are equal, but the first is not the best."""
    folder = tmp_path / "run"
    callback = watcher(folder)
    train(TINY, replace(SMALL, learning_rate=0.0), folder, callbacks=[callback], options=LOGGED)
    assert load_agent(folder / "agent").card.training["timesteps"] == 128
    assert "the untrained network has" in callback.outcome[0]


# Defaults of a run


@pytest.mark.parametrize(
    ("task", "timesteps", "environments"),
    [
        ("servegym/GSM8K-v0", 2_000_000, 64),
        ("servegym/GSM8K-v0", 10_000_000, 64),
        ("servegym/GSM8K-v0", 300_000, 10),
        ("servegym/GSM8K-v0", 1, 1),
        ("my.toml", 1_000_000, 32),
        ("servegym/Tiny-v0", 100_000, 16),
        ("servegym/Tiny-v0", 50_000, 8),
    ],
)
def test_a_short_run_makes_as_many_updates(task: str, timesteps: int, environments: int) -> None:
    usual, short = default_hyperparameters(task), default_hyperparameters(task, timesteps)
    assert short.environments == environments
    if timesteps >= usual.timesteps:
        assert short == replace(usual, timesteps=timesteps)
    elif timesteps > usual.timesteps / usual.environments:
        updates = usual.timesteps / usual.rollout
        assert timesteps / short.rollout == pytest.approx(updates, rel=0.1)
        assert short.rollout / short.batch_size == usual.rollout / usual.batch_size


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("", (64, 256, 4096)),
        ("--timesteps 300000", (10, 256, 640)),
        ("--timesteps 300000 --environments 64", (64, 256, 4096)),
        ("--timesteps 300000 --steps 64 --batch-size 99", (10, 64, 99)),
        ("--environments 1", (1, 256, 64)),
        ("--task Tiny-v0", (16, 256, 1024)),
        ("--task GSM8KPredicted-v0", (64, 1024, 16_384)),
    ],
)
def test_environments_and_batch_follow_what_is_given(
    options: str, wanted: tuple[int, int, int]
) -> None:
    args = script.read_args(options.split())
    assert (args.environments, args.steps, args.batch_size) == wanted


def test_a_run_of_one_environment_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command names no batch size, and the default of the class is larger than its rollouts."""
    folder = tmp_path / "run"
    options = "--task Tiny-v0 --timesteps 64 --steps 32 --environments 1 --validation-cases 1"
    script.main([*options.split(), "--output", str(folder)])
    script.main(["--output", str(folder), "--resume"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("run: 64 timesteps")
    assert "on 1 validation cases" in lines[1]
    assert "hybrid" in lines[2]
    assert lines[2].endswith("1 validation cases, one case gives no interval")
    assert lines[3:] == lines[:3]
