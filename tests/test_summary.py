"""Tables of means: hand-made rows, known means and intervals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from servegym.envs.playing.evaluation import COLUMNS
from servegym.envs.playing.summary import (
    by_case,
    mean_interval,
    stratified_interval,
    summarise,
    to_markdown,
    with_interval,
)


def episodes(gaps: dict[str, list[float]]) -> pd.DataFrame:
    """Rows of episodes with the given gaps; every other number is 1."""
    rows = [
        {
            **dict.fromkeys(COLUMNS, 1.0),
            "policy": policy,
            "seed": seed,
            "gap": gap,
            "decision_points": "events",
        }
        for policy, values in gaps.items()
        for seed, gap in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_the_interval_is_students() -> None:
    # n = 4, mean 2.5, s = 1.29099, t(0.975, 3) = 3.18245.
    mean, half = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert half == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-6)


def test_one_value_has_no_interval() -> None:
    mean, half = mean_interval(np.array([7.0]))
    assert mean == 7.0
    assert math.isnan(half)
    assert with_interval(np.array([0.07]), scale=100) == "7.00"


def test_a_policy_that_sheds_has_no_gap() -> None:
    rows = episodes({"a": [0.01, 0.05], "b": [math.nan, 0.06]})  # b has shed in its first episode
    rows.loc[rows["gap"].notna(), "shed"] = 0.0
    table = summarise(rows, "a")
    assert list(table["shed"]) == ["0", with_interval(np.array([1.0, 0.0]), digits=1)]
    assert list(table["gap (%)"]) == [with_interval(np.array([1.0, 5.0])), ""]
    assert list(table["gap − a (points)"]) == list(summarise(rows, "b").iloc[:, -1]) == ["", ""]
    assert "shed" not in summarise(rows[rows["policy"] == "a"])


def test_the_makespan_of_who_sheds_is_not_compared() -> None:
    rows = episodes({"a": [0.5, 0.5], "b": [math.nan, math.nan]})  # b sheds
    rows.loc[rows["policy"] == "a", ["shed", "makespan_s"]] = 0.0, 3.0
    optima = pd.DataFrame({"seed": [0, 1], "bound_s": 2.0, "proven": True})
    best = pd.DataFrame({"seed": [0, 1], "best_known_s": 2.5})
    table = summarise(rows, "a", optima, best).set_index("policy")
    column = table["gap to optimum (%)"]
    assert list(column) == ["", "25.00 ± 0.00", "50.00 ± 0.00", ""]
    rows.loc[rows["policy"] == "b", "client_utilization"] = math.nan  # everybody, at once
    assert summarise(rows)["client util. (%)"].iloc[1] == ""


def test_differences_are_paired_by_seed() -> None:
    # The policies differ by exactly 1 point on every case, whatever the case.
    table = summarise(episodes({"a": [0.01, 0.05, 0.09], "b": [0.02, 0.06, 0.10]}), "a")
    column = table.columns[-1]
    assert column == "gap − a (points)"
    assert list(table[column]) == ["", "1.00 ± 0.00"]
    assert list(table["n"]) == [3, 3]


def test_the_bootstrap_draws_runs_anew_within_each_case() -> None:
    # Two runs, apart by 2 on the second case only: its mean is 2, 3 or 4 at ¼, ½ and ¼.
    mean, low, high = stratified_interval(np.array([[2.0, 4.0], [2.0, 2.0]]))
    assert (mean, low, high) == (2.5, 2.0, 3.0)


def test_the_bootstrap_of_many_cases_is_that_of_a_mean_of_independent_draws() -> None:
    # Runs at 0 and 1 on each of 400 cases: a stratum's mean has variance ⅛, all of them ⅛ / 400.
    mean, low, high = stratified_interval(np.repeat([[0.0], [1.0]], 400, axis=1))
    assert mean == 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(1 / 8 / 400), rel=0.05)


def test_one_run_has_no_bootstrap() -> None:
    mean, low, high = stratified_interval(np.array([[1.0, 3.0]]))
    assert mean == 2.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_gaps_by_case_are_those_that_all_have_played() -> None:
    table = episodes({"a": [0.01, 0.05, 0.09], "b": [0.02, 0.06]})
    assert by_case(table, ["b", "a"]) == pytest.approx(np.array([[2.0, 6.0], [1.0, 5.0]]))


def test_without_the_reference_there_is_no_column() -> None:
    assert "gap − z (points)" not in summarise(episodes({"a": [0.1], "b": [0.2]}), "z").columns


def test_markdown_keeps_cells_as_written() -> None:
    text = to_markdown(pd.DataFrame({"policy": ["fcfs"], "gap (%)": ["12.10"]}))
    assert text.splitlines()[0].split("|")[1].strip() == "policy"
    assert text.splitlines()[2].split("|")[2].strip() == "12.10"
