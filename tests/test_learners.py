"""Optimisers, imitation of schedules, and the study that compares learners on equal time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from servegym.agents.record import RECORD
from servegym.baselines.calendar import imitation
from servegym.baselines.calendar.fitted import CalendarParameters
from servegym.baselines.calendar.imitation import (
    agreement,
    calendars,
    fit_weights,
    make_example,
    plan_example,
)
from servegym.baselines.calendar.learning import (
    CalendarSearch,
    Search,
    first_vector,
    to_parameters,
    to_vector,
)
from servegym.baselines.calendar.optimizers import OPTIMIZERS, EvolutionStrategy, make_optimizer
from servegym.baselines.schedules import Stage
from servegym.envs import TASKS
from servegym.envs.task.config import with_overrides
from servegym.studies.agents.calendar import CalendarTraining
from servegym.studies.agents.learners import LEARNERS
from servegym.studies.commands import study_learners
from tests.helpers import instance, refused

TINY = TASKS["servegym/Tiny-v0"]
SMALL = with_overrides(
    TASKS["servegym/GSM8K-v0"], {"cluster": {"clients": 20}, "workload": {"requests": 150}}
)
FEW = Search(stages=5, population=6, cases=3, generations=4)

# ---- optimisers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_descends_and_repeats(name: str) -> None:
    def found() -> np.ndarray:
        optimizer = make_optimizer(name, np.full(4, 0.5), 0.1, 12, seed=3)
        for _ in range(150):
            asked = [optimizer.ask() for _ in range(12)]
            optimizer.tell([(vector, float(np.square(vector).sum())) for vector in asked])
        assert optimizer.generation == 150
        return optimizer.mean

    assert np.linalg.norm(found()) < 0.1
    assert found().tolist() == found().tolist()


def test_perturbations_come_in_opposite_pairs() -> None:
    strategy = EvolutionStrategy(np.arange(3.0), 0.5, 6, seed=1)
    asked = np.array([strategy.ask() for _ in range(6)])
    np.testing.assert_allclose(asked[::2] + asked[1::2], 2 * np.tile(np.arange(3.0), (3, 1)))
    strategy.tell([(vector, 1.0) for vector in asked])  # nothing to learn
    assert strategy.mean.tolist() == [0.0, 1.0, 2.0]
    assert not np.allclose(strategy.ask(), asked[0])


def test_one_very_bad_candidate_turns_no_step() -> None:
    usual, spoilt = (EvolutionStrategy(np.zeros(3), 0.1, 20, seed=1) for _ in range(2))
    asked = [usual.ask() for _ in range(20)]
    values = [float(vector[0]) for vector in asked]
    usual.tell(list(zip(asked, values, strict=True)))
    worst = [values[0] + 1e6, *values[1:]] if values[0] > 0 else [values[0], 1e6, *values[2:]]
    spoilt.tell(list(zip(asked, worst, strict=True)))
    assert usual.mean[0] < 0
    assert spoilt.mean[0] < 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_search_is_resumed_by_its_fitness_alone(name: str) -> None:
    how = replace(FEW, optimizer=name)
    whole = CalendarSearch(SMALL, how)
    fitness = np.array([whole.step() for _ in range(3)])
    again = CalendarSearch(SMALL, how)
    again.replay(fitness[:2])
    assert again.step().tolist() == fitness[2].tolist()
    assert again.centre == whole.centre


def test_a_run_says_its_optimizer_unless_it_is_the_usual(tmp_path: Path) -> None:
    """Runs from before there was a choice are gone on with."""
    usual, other = tmp_path / "usual", tmp_path / "other"
    CalendarTraining(TINY, FEW, usual, "", validation_cases=1)
    assert "optimizer" not in (usual / RECORD).read_text()
    CalendarTraining(TINY, FEW, usual, "", validation_cases=1, resume=True)
    es = replace(FEW, optimizer="es")
    CalendarTraining(TINY, es, other, "", validation_cases=1)
    CalendarTraining(TINY, es, other, "", validation_cases=1, resume=True)
    refused(
        lambda: CalendarTraining(TINY, FEW, other, "", validation_cases=1, resume=True),
        "another search",
    )


def test_wrong_searches_are_refused() -> None:
    refused(lambda: Search(optimizer="cmaes"), "optimizer")
    refused(lambda: Search(optimizer="es", population=7), "needs an even population, got 7; take 8")
    refused(lambda: EvolutionStrategy(np.zeros(2), 0.1, 5, 0), "even population, got 5; take 6")
    first = to_parameters(first_vector(6))
    refused(lambda: CalendarSearch(SMALL, FEW, first=first), "has 5 stages, what it begins at 6")


def test_a_search_begins_at_what_it_is_given() -> None:
    vector = first_vector(5) + 0.01
    given = to_parameters(vector)
    assert to_parameters(to_vector(given)).weights == given.weights
    assert CalendarSearch(SMALL, FEW, first=given).centre.spare == pytest.approx(given.spare)
    np.testing.assert_allclose(
        np.diff(CalendarSearch(SMALL, FEW, first=given).centre.log_intervals),
        np.diff(given.log_intervals),
    )


# ---- imitation ---------------------------------------------------------------------------------


def test_an_example_holds_what_a_schedule_shows() -> None:
    # Two clients. Stages at 0, 3 and 5, the end at 9; the pairs of the first stage are its two requests
    # (3 and 5 rounds) against those left (2 and 4).
    requests = instance((1, 4), (1, 6), (1, 3), (1, 5))
    stages = [Stage(0, (0, 1)), Stage(3, (2,)), Stage(5, (3,))]
    example = make_example(requests, 2, stages, np.random.default_rng(0))
    assert example.clocks.tolist() == [0, 3, 5, 9]
    assert example.mean_rounds == 7.0
    assert example.spare == pytest.approx(2 / 7)
    admitted = {tuple(row) for row in example.pairs[0].tolist()}
    # Rounds, to the next target, least later, as long waiting, before the end, share of the clock.
    # 3 rounds: to 3: 0; later from 3 to 6: 3, from 5 to 8: 1. 5 rounds: to 5: 0; from 3 to 8: 1.
    # 2 rounds from 3: to 5: 0; later from 5 to 7: 2.
    assert admitted == {
        (3.0, 0.0, 1.0, 1.0, 6.0, 0.0),
        (5.0, 0.0, 1.0, 1.0, 4.0, 0.0),
        (2.0, 0.0, 2.0, 1.0, 4.0, 3 / 9),
    }
    assert {row[0] for row in example.pairs[1].tolist()} == {2.0, 4.0}


def test_stages_without_a_round_between_them_are_one() -> None:
    requests = instance((1, 4), (1, 1), (1, 3), (1, 1))
    stages = [Stage(0, (0,)), Stage(0, (1,)), Stage(2, (2,)), Stage(4, (3,))]
    example = make_example(requests, 2, stages, np.random.default_rng(0))
    assert example.clocks.tolist() == [0, 2, 4, 5]


def test_weights_are_fitted_to_a_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imitation, "PAIRS_PER_CASE", 500)
    examples = [plan_example(SMALL, seed, 2000) for seed in range(2)]
    weights = fit_weights(examples)
    assert weights == fit_weights([plan_example(SMALL, seed, 2000) for seed in range(2)])
    assert weights.pad == 1.0
    assert min(agreement(weights, example) for example in examples) > 0.7
    found = calendars(examples, weights)
    assert len(found) == 3
    assert isinstance(found[-1], CalendarParameters)


def test_what_shows_nothing_is_refused() -> None:
    requests = instance((1, 4), (1, 6))
    alone = make_example(requests, 2, [Stage(0, (0, 1))], np.random.default_rng(0))
    refused(lambda: fit_weights([alone]), "show no choice to imitate")
    refused(
        lambda: make_example(requests, 2, [Stage(1, (0, 1))], np.random.default_rng(0)),
        "begins at 0",
    )
    cluster = with_overrides(SMALL, {"cluster": {"replicas": 2}})
    refused(lambda: plan_example(cluster, 0), "one replica, got 2")


# ---- the study ---------------------------------------------------------------------------------

QUICK = ["--task", "Tiny-v0", "--minutes", "0.0005", "--validation-cases", "2", "--cases", "3"]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]


def test_all_learners_are_compared(folders: list[str], tmp_path: Path) -> None:
    fast = tmp_path / "fast.toml"
    fast.write_text("epochs = 1\n")
    more = ["--learners", ",".join(LEARNERS), "--hyperparameters", str(fast), "--seeds", "2"]
    study_learners.main([*QUICK, *folders, *more, "--rivals", ""])
    out = tmp_path / "out"
    episodes = pd.read_csv(out / "held_out.csv")
    assert sorted(episodes["learner"].unique()) == sorted(LEARNERS)
    assert len(episodes) == len(LEARNERS) * 2 * 3
    assert episodes["seed"].min() == 1_000_000
    assert np.isfinite(episodes["gap"]).all()
    table = (out / "table.md").read_text()
    assert "over seeds" in table
    assert "− cma (points), over cases" in table
    assert (out / "learners.png").read_bytes().startswith(b"\x89PNG")

    # What is there is kept; a run without its last file is done anew.
    kept = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("held_out.csv")}
    lost = tmp_path / "runs" / "cma" / "seed-0" / "held_out.csv"
    lost.unlink()
    study_learners.main([*QUICK, *folders, *more, "--rivals", ""])
    assert lost.is_file()
    assert all(path.read_bytes() == content for path, content in kept.items() if path != lost)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learners", "cmaes"], "learner"),
        (["--learners", "cma,cma"], "names one twice"),
        (["--learners", "ppo-fast"], "--hyperparameters belongs to the learner ppo-fast"),
        (["--hyperparameters", "fast.toml"], "--hyperparameters belongs to the learner ppo-fast"),
        (["--minutes", "0"], "--minutes must lie in 0.0001"),
        (["--seeds", "0"], "--seeds"),
        (["--cases", "1"], "--cases"),
        (["--validation-cases", "0"], "--validation-cases"),
        (["--rival", "none.csv"], "none.csv"),
        (
            ["--rival", "pyproject.toml"],
            "--rival pyproject.toml: no table with policy, seed and gap",
        ),
        (["--rivals", "hybird"], "did you mean 'hybrid'"),
        (["--rivals", ","], "policy in"),
    ],
)
def test_wrong_options_leave_nothing(
    options: list[str], words: str, folders: list[str], tmp_path: Path
) -> None:
    refused(lambda: study_learners.main([*QUICK, *folders, *options]), words)
    assert not list(tmp_path.iterdir())


def test_rivals_must_have_the_cases(folders: list[str], tmp_path: Path) -> None:
    rival = tmp_path / "episodes.csv"
    rival.write_text("policy,seed,gap\nhybrid,1000000,0.1\n")
    options = ["--rival", str(rival), "--rivals", "hybrid"]
    refused(lambda: study_learners.main([*QUICK, *folders, *options]), "lacks cases of 'hybrid'")
    assert [path.name for path in tmp_path.iterdir()] == ["episodes.csv"]


def test_runs_of_another_study_are_refused(folders: list[str], tmp_path: Path) -> None:
    options = ["--learners", "es", "--seeds", "1", "--rivals", ""]
    study_learners.main([*QUICK, *folders, *options])
    refused(
        lambda: study_learners.main([*QUICK, *folders, *options, "--minutes", "0.001"]),
        "a run with another minutes",
    )
    table = tmp_path / "runs" / "es" / "seed-0" / "held_out.csv"
    table.write_text("")
    refused(lambda: study_learners.main([*QUICK, *folders, *options]), "damaged; remove")
