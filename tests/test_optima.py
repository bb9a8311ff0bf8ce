"""Optima and best-known schedules beside policies: resumed, marked where unproven, never above policies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.baselines.catalogue import MIXED, REGISTRY
from servegym.baselines.exact import optima as module
from servegym.baselines.exact.optima import COLUMNS, find_optima
from servegym.baselines.registry import make_policy
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import evaluate, make_case, play, read_best_known
from servegym.envs.playing.summary import best_known_by_case, summarise
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import TASKS
from servegym.studies.commands import evaluate as script
from tests.test_summary import episodes

TINY = TASKS["servegym/Tiny-v0"]
POLICIES = [
    f"{name}-2" if entry.required else name for name, entry in REGISTRY.items() if name not in MIXED
]


def optima(rows: dict[int, tuple[float, bool]]) -> pd.DataFrame:
    """Rows of (proven bound, whether it is the optimum) by seed."""
    table = [{"seed": seed, "bound_s": bound, "proven": ok} for seed, (bound, ok) in rows.items()]
    return pd.DataFrame(table)


def played(makespans: dict[str, list[float]], bound_s: float = 1.0) -> pd.DataFrame:
    """Episodes of the given makespans by policy, one a seed; all lower bounds are alike."""
    table = episodes(makespans)
    return table.assign(
        makespan_s=table["gap"], lower_bound_s=bound_s, gap=table["gap"] / bound_s - 1
    )


# ---- the file --------------------------------------------------------------------------------


def test_optima_are_kept_and_unproven_ones_searched_again(tmp_path: Path) -> None:
    hurried = find_optima(TINY, range(3), tmp_path, 1e-4, progress=False)
    assert list(hurried.columns) == list(COLUMNS)
    assert not hurried["proven"].any()
    path = tmp_path / module.FILE
    assert find_optima(TINY, range(3), tmp_path, 1e-4, progress=False).equals(hurried)
    optima = find_optima(TINY, range(4), tmp_path, 10.0, progress=False)
    assert optima["proven"].all()
    assert (optima["bound_s"] == optima["optimum_s"]).all()
    assert (hurried["bound_s"] <= optima["bound_s"][:3]).all()
    assert (hurried["optimum_s"] >= optima["optimum_s"][:3]).all()
    path.write_text(path.read_text().replace(f"{optima['optimum_s'][1]}", "3.5"))
    kept = find_optima(TINY, [1, 4], tmp_path, 20.0, progress=False)
    assert list(kept["seed"]) == [1, 4]
    assert kept["optimum_s"][0] == 3.5
    assert len(pd.read_csv(path)) == 5


@pytest.mark.parametrize(
    "overrides",
    [{"workload": {"requests": 13}}, {"workload": {"arrival_rate_per_s": 0.5}}],
)
def test_what_is_not_small_is_left_out(tmp_path: Path, overrides: dict) -> None:
    table = find_optima(with_overrides(TINY, overrides), range(2), tmp_path, 1.0, progress=False)
    assert len(table) == 0
    assert not (tmp_path / module.FILE).exists()
    twelve = with_overrides(TINY, {"workload": {"requests": 12}})
    assert len(find_optima(twelve, range(1), tmp_path, 1e-4, progress=False)) == 1


def test_few_requests_that_the_search_cannot_hold(tmp_path: Path) -> None:
    task = with_overrides(TINY, {"cluster": {"clients": 12}, "workload": {"requests": 12}})
    with pytest.raises(ServegymError, match=r"it can do \d+ different .* a lower bound is"):
        find_optima(task, range(1), tmp_path, 1.0, progress=False)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / module.FILE).write_text(content)
    with pytest.raises(ServegymError, match=r"optima\.csv"):
        find_optima(TINY, range(1), tmp_path, 1.0)


# ---- every policy ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["known", "unknown"])
def informed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TaskConfig, pd.DataFrame]:
    """Tiny-v0 with known or unknown lengths, and the optima of four cases."""
    task = with_overrides(TINY, {"information": {"output_lengths": request.param}})
    folder = tmp_path_factory.mktemp(request.param)
    return task, find_optima(task, range(4), folder, 10.0, progress=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_is_below_the_optimum(
    informed: tuple[TaskConfig, pd.DataFrame], policy: str
) -> None:
    """Every registered policy, with known and with unknown lengths."""
    task, optima = informed
    assert list(optima["seed"]) == list(range(4))
    for seed, optimum_s in zip(optima["seed"], optima["optimum_s"], strict=True):
        case = make_case(task, seed)
        makespan_s = play(task, policy, make_policy(policy), case, seed).row["makespan_s"]
        assert case.bound.seconds * (1 - 1e-9) <= optimum_s <= makespan_s * (1 + 1e-9)


# ---- tables ----------------------------------------------------------------------------------


def test_the_optimum_is_the_first_row_and_gaps_to_it_a_column() -> None:
    table = summarise(
        played({"a": [12.0, 15.0], "b": [10.0, 13.0]}, 8.0),
        "a",
        optima({0: (10.0, True), 1: (12.0, True), 7: (1.0, True)}),
    )
    assert list(table["policy"]) == ["optimum", "a", "b"]
    assert list(table["n"]) == [2, 2, 2]
    assert table["gap (%)"][0].startswith("37.50")  # 10/8 and 12/8
    assert list(table["makespan (s)"].str[:5]) == ["11.00", "13.50", "11.50"]
    assert list(table["gap to optimum (%)"].str[:5]) == ["", "22.50", "4.17 "]
    assert table["stages"][0] == ""
    assert list(table.iloc[:, -1]) == ["", "", "-25.00 ± 0.00"]


def test_an_optimum_that_is_not_proven_is_called_a_bound() -> None:
    table = summarise(
        played({"a": [12.0, 15.0]}), None, optima({0: (10.0, True), 1: (12.0, False)})
    )
    assert table["policy"][0] == "optimum (1 of 2 proven, else its bound)"


def test_best_known_is_a_row_and_changes_no_other() -> None:
    rows = played({"a": [12.0, 15.0, 9.0], "b": [10.0, 13.0, 9.0]}, 8.0)
    known = pd.DataFrame({"seed": [0, 1, 9], "best_known_s": [9.0, 14.0, 1.0]})
    assert best_known_by_case(rows, known).to_dict() == {0: 9.0, 1: 13.0}  # b is faster on 1
    table, without = summarise(rows, "a", None, known), summarise(rows, "a")
    assert list(table["policy"]) == ["best known", "a", "b"]
    assert list(table["n"]) == [2, 3, 3]
    assert table["makespan (s)"][0].startswith("11.00")
    assert table[1:].reset_index(drop=True).equals(without)


def test_tables_without_cases_have_no_row() -> None:
    rows = played({"a": [12.0]})
    known = pd.DataFrame({"seed": [9], "best_known_s": [9.0]})
    assert summarise(rows, None, optima({5: (1.0, True)}), known).equals(summarise(rows))


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(*[st.floats(1.0, 100.0)] * 4), min_size=2, max_size=5, unique_by=lambda row: row
    )
)
def test_bound_optimum_best_known_and_policies_stand_in_order(
    cases: list[tuple[float, ...]],
) -> None:
    """Per case: lower bound ≤ optimum ≤ everything else, in any order; then so are the means."""
    bounds = np.array([sorted(case) for case in cases])
    policies = {"a": bounds[:, 2].tolist(), "b": bounds[:, 3].tolist()}
    rows = played(policies)
    rows["lower_bound_s"] = np.tile(bounds[:, 0], 2)
    rows["gap"] = rows["makespan_s"] / rows["lower_bound_s"] - 1
    best_known_s = np.array([case[0] for case in cases])  # perhaps a poor one
    known = pd.DataFrame(
        {"seed": range(len(cases)), "best_known_s": np.maximum(best_known_s, bounds[:, 1])}
    )
    by_case = best_known_by_case(rows, known)
    fastest = rows.groupby("seed")["makespan_s"].min()
    assert (by_case <= fastest).all()
    assert (by_case >= bounds[:, 1]).all()
    table = summarise(rows, None, optima({k: (b[1], True) for k, b in enumerate(bounds)}), known)
    means = [float(cell.split(" ± ")[0]) for cell in table["makespan (s)"]]
    assert list(table["policy"]) == ["optimum", "best known", "a", "b"]
    assert float(table["lower bound (s)"][0].split(" ± ")[0]) <= means[0] <= means[1]
    assert means[1] <= min(means[2:])


# ---- the command -----------------------------------------------------------------------------


def test_evaluate_shows_optimum_and_best_known(tmp_path: Path) -> None:
    options = ["--task", "Tiny-v0", "--policies", "fcfs,hybrid", "--seeds", "0:3", "--jobs", "1"]
    options += ["--output", str(tmp_path)]
    assert script.main(options) == 0
    labels = [line.split("|")[1].strip() for line in table_of(tmp_path)]
    assert labels == ["optimum", "fcfs", "hybrid"]
    rows = pd.read_csv(tmp_path / "episodes.csv")
    known = pd.DataFrame({"best_known_s": rows.groupby("seed")["makespan_s"].min()}).reset_index()
    known["task"] = "servegym/Tiny-v0"
    known.to_csv(tmp_path / "best_known.csv", index=False)
    assert script.main(options) == 0
    labels = [line.split("|")[1].strip() for line in table_of(tmp_path)]
    assert labels == ["optimum", "best known", "fcfs", "hybrid"]
    assert script.main([*options, "--optimum-limit", "0"]) == 0
    labels = [line.split("|")[1].strip() for line in table_of(tmp_path)]
    assert labels == ["best known", "fcfs", "hybrid"]


def table_of(folder: Path) -> list[str]:
    lines = (folder / "summary.md").read_text().splitlines()
    return [line for line in lines if line.startswith("| ")][1:]


def test_evaluate_says_what_is_not_proven_and_what_is_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--policies", "fcfs", "--seeds", "0:2", "--jobs", "1", "--optimum-limit", "1e-4"]
    assert script.main([*options, "--task", "Tiny-v0", "--output", str(tmp_path / "a")]) == 0
    assert "2 of 2 optima are not proven within 0.0001 s" in capsys.readouterr().out
    task = tmp_path / "task.toml"
    task.write_text('[cluster]\nclients = 12\n[workload]\nsource = "tiny"\nrequests = 12\n')
    assert script.main([*options, "--task", str(task), "--output", str(tmp_path / "b")]) == 0
    assert "No optimum: 12 requests on 12 clients are too many" in capsys.readouterr().out
    assert "a lower bound is" in (tmp_path / "b" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty; remove the file"),
        ("task,seed\nservegym/Tiny-v0,0\n", "no column 'best_known_s'"),
        ("task,seed,best_known_s\nservegym/Paper-v0,0,99\n", "every case of servegym/Tiny-v0 once"),
        ("task,seed,best_known_s\nservegym/Tiny-v0,0,99\nservegym/Tiny-v0,0,98\n", "lines 2 and 3"),
        ("task,seed,best_known_s\nservegym/Tiny-v0,0,1\n", "another task or version"),  # < bound
        (
            "task,seed,best_known_s,lower_bound_s\nservegym/Tiny-v0,0,99,3\n",
            "another task or version",
        ),
    ],
)
def test_best_known_schedules_of_something_else_are_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    rows = evaluate(TINY, make_policy, ["fcfs"], range(1), tmp_path, progress=False)
    path = tmp_path / "best_known.csv"
    assert read_best_known(path, TINY.name, rows) is None
    path.write_text("task,seed,best_known_s\nservegym/Tiny-v0,0,99\n")
    assert read_best_known(path, TINY.name, rows) is not None
    path.write_text(content)
    with pytest.raises(ServegymError, match=message):
        read_best_known(path, TINY.name, rows)
