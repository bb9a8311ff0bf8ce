"""Episodes that were cut short have no gap in any table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from servegym.baselines.registry import make_policy, make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import evaluate as play_all
from servegym.envs.playing.evaluation import make_case, play, read_episodes
from servegym.envs.playing.summary import (
    best_known_by_case,
    fixed,
    mean_gaps,
    mean_interval,
    stratified_interval,
    summarise,
    with_interval,
)
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from servegym.studies.agents.report import best_of, policy_table
from servegym.studies.cases import load_tasks
from servegym.studies.commands import best_known, evaluate, paper, tune
from servegym.studies.tuned import tuned_threshold
from tests.test_summary import episodes

TINY = TASKS["servegym/Tiny-v0"]
NAN = float("nan")
TOML = (
    '[cluster]\nclients = 3\n[cost]\npreset = "tiny"\n[workload]\nsource = "tiny"\nrequests = 8\n'
)
CUT = TOML + "[process]\nmax_decisions = 2\n"


def cut(gaps: dict[str, list[float]]) -> pd.DataFrame:
    """Episodes with the given gaps; those of NaN were cut short."""
    rows = episodes(gaps)
    return rows.assign(makespan_s=1 + rows["gap"], unfinished_requests=rows["gap"].isna() * 3)


# ---- tables ----------------------------------------------------------------------------------


def test_means_are_those_of_finished_episodes_and_the_others_are_counted() -> None:
    table = summarise(cut({"a": [0.1, NAN, 0.3], "b": [0.2, 0.2, 0.6], "c": 3 * [NAN]}), "b")
    assert list(table["n"]) == [3, 3, 3]
    assert list(table["unfinished"]) == ["1", "0", "3"]
    assert table["gap (%)"].iloc[0] == with_interval(np.array([10.0, 30.0]))
    assert table["gap (%)"].iloc[2] == table["makespan (s)"].iloc[2] == "unfinished"
    assert list(table["gap − b (points)"]) == [with_interval(np.array([-10.0, -30.0])), "", ""]


def test_without_cut_episodes_there_is_no_such_column() -> None:
    assert "unfinished" not in summarise(cut({"a": [0.1, 0.2]})).columns


def test_a_reference_that_never_finished_gives_no_difference() -> None:
    table = summarise(cut({"a": [0.1, 0.2], "b": [NAN, NAN]}), "b")
    assert list(table["gap − b (points)"]) == ["", ""]


def test_the_best_known_is_never_nan() -> None:
    known = pd.DataFrame({"seed": [0, 1, 2], "best_known_s": [1.05, 1.5, 1.5]})
    best_known_s = best_known_by_case(cut({"a": [0.1, NAN, NAN], "b": [0.2, NAN, 0.2]}), known)
    assert list(best_known_s) == [1.05, 1.5, 1.2]
    table = summarise(cut({"a": [NAN, NAN, NAN]}), None, best_known=known)
    assert list(table["policy"]) == ["best known", "a"]
    assert list(table["unfinished"]) == ["", "3"]


def test_what_leaves_requests_unserved_wins_nothing() -> None:
    rows = cut({"threshold-1": [0.01, NAN], "threshold-2": [0.5, 0.6], "hybrid": [NAN, NAN]})
    assert list(mean_gaps(rows)[["threshold-1", "threshold-2"]]) == [np.inf, 0.55]
    assert best_of(rows, ["threshold-1", "threshold-2"]) == "threshold-2"
    best = tune.best_of_families(rows).set_index("family")
    assert list(best.loc["threshold"]) == [
        "threshold-2",
        with_interval(rows["gap"][2:4].to_numpy(), 100, 3),
    ]
    table = tune.best_of_families(cut({"lpt-1": [NAN], "lpt-2": [NAN]}))
    assert list(table.iloc[0]) == ["lpt", "–", "unfinished"]


def test_tables_of_the_study_and_the_paper_say_unfinished() -> None:
    rows = cut({"hybrid": [0.1, 0.2], "fcfs": [0.2, NAN], "lpt": [NAN, NAN]})
    table = policy_table(rows).set_index("policy")
    assert table.loc["fcfs", "gap (%)"] == "20.00"
    assert table.loc["fcfs", "n"] == 1
    assert table.loc["lpt", "gap (%)"] == "unfinished"
    assert table.loc["lpt", "of hybrid's gap closed (%)"] == "unfinished"
    shown = paper.comparison(rows[rows["seed"] == 1], rows)
    assert list(shown.iloc[:, -1])[1:] == ["20.00 (1 unfinished)", "unfinished"]
    assert list(shown["makespan (s)"]) == ["1.20", "unfinished", "unfinished"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, NAN, 1.0], "1.00 ± 0.00 (1 unfinished)"),
        ([2.0, NAN], "2.00 (1 unfinished)"),
        ([NAN], "unfinished"),
        ([], "unfinished"),
        ([-0.001, -0.002], "0.00 ± 0.01"),
        ([-0.001], "0.00"),
        ([-0.006], "-0.01"),
    ],
)
def test_cells(values: list[float], text: str) -> None:
    assert with_interval(np.array(values)) == text


def test_means_of_nothing_are_nan_without_a_warning() -> None:
    assert np.isnan(mean_interval(np.array([NAN, NAN]))).all()
    assert np.isnan(stratified_interval(np.zeros((3, 0)))).all()
    assert [fixed(-0.0), fixed(-0.004), fixed(-1e-17, 0, "+"), fixed(-0.005, 2, "+")] == [
        *("0.00", "0.00", "+0", "-0.01")
    ]


def test_two_rows_of_one_episode_are_refused() -> None:
    rows = cut({"a": [0.1], "b": [0.2]})
    with pytest.raises(ServegymError, match="two episodes of policy 'a', seed 0"):
        summarise(pd.concat([rows, rows[:1]]), "b")


# ---- scripts ---------------------------------------------------------------------------------


def test_evaluate_says_unfinished_and_resumes(
    tmp_path: Path, write: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", str(write("t.toml", CUT)), "--policies", "fcfs,hybrid", "--jobs", "1"]
    options += ["--seeds", "0:3", "--output", str(tmp_path / "out")]
    assert evaluate.main(options) == 0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert text.count("| unfinished") == 5  # two cells a policy and the column's name
    assert "nan" not in text + capsys.readouterr().out
    before = (tmp_path / "out" / "episodes.csv").read_bytes()
    assert evaluate.main(options) == 0
    assert (tmp_path / "out" / "episodes.csv").read_bytes() == before
    table = read_episodes(tmp_path / "out" / "episodes.csv")
    assert table["gap"].isna().all()
    assert (table["unfinished_requests"] > 0).all()


def test_compiled_episodes_are_cut_where_others_are(tmp_path: Path) -> None:
    for limit in ({"max_decisions": 2}, {"max_seconds": 5.0}, {"max_decisions": 10**6}):
        task = with_overrides(TINY, {"process": limit})
        for name in ("fcfs", "aligned"):
            case, policy = make_case(task, 1), make_trigger_policy(name)
            row = play(task, name, policy, case, 1).row
            metrics = play_compiled(task, policy, case)
            assert str(metrics) == str({metric: row[metric] for metric in METRICS})


def test_tune_names_no_winner_where_nothing_finishes(
    tmp_path: Path, write: Callable[[str, str], Path]
) -> None:
    options = ["--task", str(write("t.toml", CUT)), "--cases", "2", "--jobs", "1"]
    assert tune.main([*options, "--output", str(tmp_path / "out")]) == 0
    assert "| –      | unfinished" in (tmp_path / "out" / "tuning.md").read_text()


def test_a_threshold_is_tuned_on_whole_episodes_only() -> None:
    with pytest.raises(ServegymError, match=r"no threshold serves all requests; .*max_decisions"):
        tuned_threshold(with_overrides(TINY, {"process": {"max_decisions": 2}}), 2, 1)


def test_best_known_is_the_search_where_no_policy_finishes(
    tmp_path: Path, write: Callable[[str, str], Path]
) -> None:
    options = ["--task", str(write("t.toml", CUT)), "--policies", "fcfs,lpt", "--seeds", "0:2"]
    options += ["--time-limit", "0.05", "--output", str(tmp_path / "out")]
    for _ in range(2):  # resumed, too
        assert best_known.main(options) == 0
    table = pd.read_csv(tmp_path / "out" / "best_known.csv")
    assert set(table["found_by"]) == {"search"}
    text = (tmp_path / "out" / "best_known.md").read_text()
    assert text.count("| unfinished") == 6
    assert "nan" not in text


def test_checks_refuse_tasks_that_cut_episodes_short(write: Callable[[str, str], Path]) -> None:
    with pytest.raises(ServegymError, match="cuts episodes short"):
        load_tasks(str(write("t.toml", CUT)))
    assert len(load_tasks(str(write("u.toml", TOML)))) == 1


def test_some_episodes_finished_and_some_not(tmp_path: Path) -> None:
    """The limit lies between the policies' needs: the mean is over finished episodes."""
    whole = play_all(TINY, make_policy, ["fcfs"], range(12), tmp_path / "a", progress=False)
    limit = float(whole["makespan_s"].median())
    task = with_overrides(TINY, {"process": {"max_seconds": limit}})
    rows = play_all(task, make_policy, ["fcfs"], range(12), tmp_path / "b", progress=False)
    finished = rows["unfinished_requests"] == 0
    assert 0 < finished.sum() < 12
    expected = with_interval(whole["gap"].to_numpy()[finished.to_numpy()], 100)
    assert summarise(rows)["gap (%)"].iloc[0] == expected
