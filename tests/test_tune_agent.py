"""tune_agent: trials that are pruned, interrupted, killed and gone on with; storages that do not fit."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegym.agents.hyperparameter_files import read_hyperparameters
from servegym.agents.hyperparameters import Hyperparameters, default_hyperparameters
from servegym.envs import TASKS, ServegymError
from servegym.studies.agents import tuning, tuning_compared
from servegym.studies.agents.training import train_watched
from servegym.studies.agents.tuning import SPACE, hyperparameters_of, numbers_of
from servegym.studies.cli import parse
from servegym.studies.commands import tune_agent as script

USUAL = default_hyperparameters("servegym/GSM8K-v0", 300_000)


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("--task", "Tiny-v0", "--timesteps", "256", "--validation-cases", "2"),
        *("--parameters", "learning_rate,steps", "--evaluations", "2", "--fresh-seeds", "0"),
        *("--output", str(folder), *more),
    ]


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of a moment: few steps and environments."""
    usual = Hyperparameters(environments=2, steps=16, batch_size=8, epochs=1, width=8)
    monkeypatch.setattr(script, "default_hyperparameters", lambda *_: usual)
    monkeypatch.setitem(SPACE, "steps", tuning.Range(8, 32))


def states(folder: Path) -> list[str]:
    table = pd.read_csv(folder / "trials.csv")
    assert table["trial"].is_monotonic_increasing
    return list(table["state"])


# ---- numbers and hyper-parameters, without Optuna --------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_defaults_lie_in_the_space(task: str) -> None:
    usual = default_hyperparameters(task, 300_000)
    numbers = numbers_of(usual, tuple(SPACE))
    for name, number in numbers.items():
        assert SPACE[name].least <= number <= SPACE[name].most
    again = hyperparameters_of(usual, numbers)
    for name, value in asdict(usual).items():
        assert getattr(again, name) == pytest.approx(value), name


def test_any_numbers_of_the_space_make_hyperparameters() -> None:
    rng = np.random.default_rng(0)
    for warm in (False, True):
        usual = replace(USUAL, imitation_rounds=1) if warm else USUAL
        for _ in range(200):
            numbers = {name: rng.choice([r.least, r.most]) for name, r in SPACE.items()}
            whole = {name: int(numbers[name]) for name in tuning._WHOLE}
            h = hyperparameters_of(usual, numbers | whole)
            assert 2 <= h.batch_size <= h.rollout
            assert h.gae_lambda == 1 - numbers["gae_decay"]
            rates = (h.learning_rate, h.warm_learning_rate)
            assert rates[warm] == numbers["learning_rate"]
            assert rates[not warm] == getattr(
                usual, ("warm_" if not warm else "") + "learning_rate"
            )


def test_without_optuna_a_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ServegymError, match=r"optuna is not installed; get it by .*servegym\[tune\]"
    ):
        script.main(arguments(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


BAD: list[tuple[tuple[str, ...], str, tuple[str, ...]]] = [
    (("--trials", "0"), "--trials must lie in 1", ("--trials", "1")),
    (("--evaluations", "0"), "--evaluations must lie in 1", ("--evaluations", "1")),
    (("--validation-cases", "0"), "--validation-cases must lie", ("--validation-cases", "1")),
    (("--timesteps", "0"), "timesteps must be a whole number in 1", ("--timesteps", "1")),
    (("--agent-seed", "800"), "seed must be a whole number in 0 … 799", ("--agent-seed", "799")),
    (("--sampler-seed", "-1"), "--sampler-seed must lie in 0", ("--sampler-seed", "0")),
    (("--fresh-seeds", "400"), "--fresh-seeds must lie in 0 … 399", ("--fresh-seeds", "399")),
    (("--held-out-cases", "1"), "--held-out-cases must lie in 2", ("--held-out-cases", "2")),
    (("--parameters", "widht"), "did you mean 'width'?", ("--parameters", "width,epochs")),
    (("--parameters", ","), "--parameters names nothing", ("--parameters", "steps")),
    (("--task", "Tyni-v0"), "did you mean 'Tiny-v0'?", ("--task", "Tiny-v0")),
]


@pytest.mark.parametrize(("bad", "words", "good"), BAD)
def test_bad_options(
    bad: tuple[str, ...], words: str, good: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ServegymError) as error:
        script.main([*arguments(tmp_path / "out"), *bad])
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()
    script.read_search(parse(script.Args, [*arguments(tmp_path / "out"), *good]))


# ---- studies -----------------------------------------------------------------------------------


def test_a_study_is_gone_on_with_as_if_it_had_not_been_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    small(monkeypatch)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert script.main(arguments(whole, "--trials", "3")) == 0
    said = capsys.readouterr().out
    assert f"train --task Tiny-v0 --hyperparameters {whole / 'best.toml'}`" in said.replace(
        ".py", ""
    )

    script.main(arguments(parts, "--trials", "1"))
    assert states(parts) == ["complete"]
    with monkeypatch.context() as patch:
        patch.setattr(
            tuning, "train_watched", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt, match="interrupted after 1 of 3 trials; the same"):
            script.main(arguments(parts, "--trials", "3"))
    script.main(arguments(parts, "--trials", "3"))
    tables = [pd.read_csv(folder / "trials.csv") for folder in (whole, parts)]
    unlike = ["trial", "seconds"]  # the interrupted trial has a number, too
    one, other = (table.drop(columns=unlike) for table in tables)
    pd.testing.assert_frame_equal(one, other)
    assert tables[0]["gap_percent"].notna().all()

    first = tables[0].iloc[0]
    assert (first["learning_rate"], first["steps"]) == (1e-3, 16)  # the defaults
    best = tables[0].sort_values("gap_percent").iloc[0]
    found = read_hyperparameters(whole / "best.toml")
    assert (found["learning_rate"], found["steps"]) == (best["learning_rate"], best["steps"])
    assert "seed" not in found
    report = (whole / "tuning.md").read_text()
    assert f" {best['gap_percent']:.3f} %" in report
    assert "of the defaults" in report
    assert not list(whole.glob("trials/*/checkpoints"))

    script.main(arguments(whole, "--trials", "3"))  # nothing is left to do
    assert len(states(whole)) == 3
    with pytest.raises(
        ServegymError, match=r"tuned with .*, this one has .*; choose another --out"
    ):
        script.main(arguments(whole, "--trials", "3", "--validation-cases", "3"))


def test_the_best_is_compared_with_the_defaults_on_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    small(monkeypatch)
    options = arguments(tmp_path, "--trials", "2", "--agent-seed", "799")
    script.main(options)
    study: Any = tuning.open_study(script.read_search(parse(script.Args, options)))
    best = tuning.best_of(study)
    if best.user_attrs.get(tuning.DEFAULTS):  # then there is nothing to compare
        monkeypatch.setattr(script, "best_of", lambda _: tuning.finished(study)[1])
        best = tuning.finished(study)[1]
    more = [*options, "--fresh-seeds", "2", "--held-out-cases", "3"]
    with monkeypatch.context() as patch:
        trained: list[Path] = []

        def train(search: Any, hyperparameters: Hyperparameters, folder: Path) -> None:
            if len(trained) == 3:
                raise KeyboardInterrupt
            trained.append(folder)
            tuning.train_with(search, hyperparameters, folder)

        patch.setattr(tuning_compared, "train_with", train)
        with pytest.raises(KeyboardInterrupt):
            script.main(more)
    assert "Trained anew" not in (tmp_path / "tuning.md").read_text()
    script.main(more)
    folder = tmp_path / "comparison"
    runs = sorted(path.parent.relative_to(folder) for path in folder.rglob("run.json"))
    sides = ("defaults", f"trial-{best.number}")
    assert [str(run) for run in runs] == [f"{side}/{seed}" for side in sides for seed in (797, 798)]
    notes = [json.loads((folder / run / "run.json").read_text())["hyperparameters"] for run in runs]
    assert [note["seed"] for note in notes] == [797, 798, 797, 798]
    rates = [note["learning_rate"] for note in notes]
    assert rates == [1e-3, 1e-3, *[best.params["learning_rate"]] * 2]
    episodes = pd.read_csv(folder / "episodes.csv")
    assert sorted(set(episodes["seed"])) == [1_000_000, 1_000_001, 1_000_002]
    lines = (tmp_path / "tuning.md").read_text().split("## Trained anew")[1].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert [row[0] for row in cells] == ["agent seed", cells[1][0], "797", "798", "all"]
    gaps = 100 * episodes.groupby("policy")["gap"].mean()
    usual, found = (np.array([gaps[f"{side}-{seed}"] for seed in (797, 798)]) for side in sides)
    assert cells[-1][3].startswith(f"{(found - usual).mean():z.2f} ± ")
    assert cells[2][1].startswith(f"{usual[0]:.2f} ± ")


OTHER = """
import sys, time
from servegym.agents.hyperparameters import Hyperparameters
from servegym.studies.agents import tuning
from servegym.studies.commands import tune_agent as script

usual = Hyperparameters(environments=2, steps=16, batch_size=8, epochs=1, width=8)
script.default_hyperparameters = lambda *_: usual
tuning.SPACE["steps"] = tuning.Range(8, 32)
tuning.HEARTBEAT_S = 1


def train_with(search, hyperparameters, folder, *_):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{")
    time.sleep(240)


tuning.train_with = train_with
script.main(sys.argv[1:])
"""


def test_two_processes_share_a_study_and_one_that_is_killed_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process is killed while both are at a trial; this one goes on."""
    optuna = pytest.importorskip("optuna")
    small(monkeypatch)
    command = arguments(tmp_path, "--trials", "6")

    def of(*names: str) -> list[Any]:
        url = f"sqlite:///{tmp_path / 'study.db'}"
        trials = optuna.load_study(study_name=tuning.STUDY, storage=url).get_trials()
        return [trial for trial in trials if trial.state.name in names]

    def wait_for_running(count: int) -> None:
        until = time.monotonic() + 240
        while other.poll() is None and time.monotonic() < until:
            with suppress(Exception):  # the storage is not there yet
                if sum(bool(trial.params) for trial in of("RUNNING")) == count:
                    return
            time.sleep(0.05)
        raise AssertionError("the other process is not at a trial")

    def train(*words: Any) -> Any:
        if other.poll() is None:
            wait_for_running(2)
            other.kill()
            other.wait()
        return train_with(*words)

    train_with = tuning.train_with
    other = subprocess.Popen([sys.executable, "-W", "ignore", "-c", OTHER, *command])
    try:
        wait_for_running(1)
        monkeypatch.setattr(tuning, "train_with", train)
        assert script.main(command) == 0
    finally:
        other.kill()
        other.wait()
    assert len(of(*tuning.ENDED)) == 5
    monkeypatch.setattr(tuning, "HEARTBEAT_S", 1)
    time.sleep(3)  # after which a trial that nobody works at is taken over
    assert script.main(command) == 0
    ended = of(*tuning.ENDED)
    assert len(ended) == len(states(tmp_path)) == 6
    assert not of("RUNNING")
    (lost,) = of("FAIL")
    assert [trial.params for trial in ended].count(lost.params) == 1  # tried again, once
    assert len({tuple(trial.params.values()) for trial in ended}) == 6


def test_trials_are_pruned_and_weights_may_become_infinite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")
    small(monkeypatch)
    trained = []

    def train(task: Any, hyperparameters: Any, folder: Path, callbacks: Any, **_: Any) -> int:
        trained.append(folder)
        if len(trained) == 2:
            raise ServegymError("weights are no longer finite after 64 timesteps; begin …")
        if len(trained) == 3:
            raise optuna.TrialPruned
        return original(task, hyperparameters, folder, callbacks, **_)

    original = train_watched
    monkeypatch.setattr(tuning, "train_watched", train)
    script.main(arguments(tmp_path, "--trials", "3"))
    assert states(tmp_path) == ["complete", "pruned", "pruned"]
    assert "| pruned" in (tmp_path / "tuning.md").read_text()


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning")
def test_a_trial_whose_process_was_killed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    small(monkeypatch)
    monkeypatch.setattr(tuning, "train_watched", lambda *_, **__: 0)
    tmp_path.joinpath("trials").mkdir()
    options = arguments(tmp_path, "--trials", "1")
    study: Any = tuning.open_study(script.read_search(parse(script.Args, options)))
    trial = study.ask()
    assert trial.suggest_float("learning_rate", 1e-4, 5e-3, log=True) > 0
    study._storage.record_heartbeat(trial._trial_id)
    script.main(options)
    assert "1 of 1 trials under way elsewhere" in capsys.readouterr().out
    with closing(sqlite3.connect(tmp_path / "study.db")) as storage, storage:
        storage.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    script.main(options)
    assert [trial.state.name for trial in study.get_trials()] == ["FAIL", "COMPLETE"]
    assert study.get_trials()[1].params["learning_rate"] == trial.params["learning_rate"]


def test_the_hook_prunes_who_is_behind_the_median() -> None:
    optuna = pytest.importorskip("optuna")
    from servegym.agents import Evaluation

    def evaluation(number: int, gap_percent: float, last: bool = False) -> Evaluation:
        return Evaluation(
            number, 64 * number, 128, gap_percent, 0.0, -gap_percent, 2, 0, gap_percent, 0, {}, last
        )

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0)
    study = optuna.create_study(pruner=pruner)
    for gap_percent in (3.0, 4.0):
        trial = study.ask()
        tuning.pruning(trial)(evaluation(1, gap_percent, last=True))
        study.tell(trial, gap_percent)
    hook = tuning.pruning(study.ask())
    hook(evaluation(1, 3.4))
    hook(evaluation(2, 9.0, last=True))  # it ends here anyway
    worse = tuning.pruning(study.ask())
    with pytest.raises(optuna.TrialPruned):
        worse(evaluation(1, 5.0))
    unfinished = tuning.pruning(study.ask())
    with pytest.raises(optuna.TrialPruned):
        unfinished(evaluation(1, float("nan")))


def test_storages_that_hold_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    small(monkeypatch)
    path = tmp_path / "study.db"
    for content in (b"no database", b"SQLite format 3\0" + bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(
            ServegymError, match=r"study\.db: cannot be used as a storage of trials"
        ):
            script.main(arguments(tmp_path, "--trials", "1"))
        assert path.read_bytes() == content
    path.unlink()
    others = optuna.create_study(storage=f"sqlite:///{path}", study_name=tuning.STUDY)
    others.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(ServegymError, match="holds trials of another program; choose another"):
        script.main(arguments(tmp_path, "--trials", "1"))
    path.unlink()
    path.mkdir()
    with pytest.raises(ServegymError, match="is a folder, not a storage of trials"):
        script.main(arguments(tmp_path, "--trials", "1"))
    for url in ("nosuch://x", "sqlite:////no/such/folder/study.db"):
        with pytest.raises(ServegymError, match="cannot be used as a storage of trials"):
            script.main(arguments(tmp_path / "new", "--trials", "1", "--storage", url))
    assert not (tmp_path / "new").exists()
