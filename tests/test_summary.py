"""Tables of means: hand-made rows, known means and intervals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from servegym.envs.evaluation import COLUMNS
from servegym.envs.summary import mean_interval, summarise, to_markdown, with_interval


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


def test_differences_are_paired_by_seed() -> None:
    # The policies differ by exactly 1 point on every case, whatever the case.
    table = summarise(episodes({"a": [0.01, 0.05, 0.09], "b": [0.02, 0.06, 0.10]}), "a")
    column = table.columns[-1]
    assert column == "gap − a (points)"
    assert list(table[column]) == ["", "1.00 ± 0.00"]
    assert list(table["n"]) == [3, 3]


def test_without_the_reference_there_is_no_column() -> None:
    assert "gap − z (points)" not in summarise(episodes({"a": [0.1], "b": [0.2]}), "z").columns


def test_markdown_keeps_cells_as_written() -> None:
    text = to_markdown(pd.DataFrame({"policy": ["fcfs"], "gap (%)": ["12.10"]}))
    assert text.splitlines()[0].split("|")[1].strip() == "policy"
    assert text.splitlines()[2].split("|")[2].strip() == "12.10"
