"""Best-known tables: bounds, best known and policies in order, and schedules that can be carried out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from servegym.baselines.schedules import Stage, replay
from servegym.envs.bounds.padding import joint_bound
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.task.lowering import lower
from servegym.envs.task.registered import TASKS
from servegym.studies.commands import best_known
from servegym.studies.commands.best_known import COLUMNS, report

COMMITTED = Path(__file__).parents[1] / "results" / "best_known"
OPTIONS = ["--task", "Tiny-v0", "--policies", "random,rollout", "--seeds", "0:4"]


def policies_of(table: pd.DataFrame) -> pd.DataFrame:
    return table[[name for name in table.columns if name not in COLUMNS]]


def in_order(table: pd.DataFrame) -> bool:
    """Whether lower bound ≤ joint bound ≤ best known ≤ search and policies, case by case."""
    steps = table[["lower_bound_s", "joint_bound_s", "best_known_s"]].to_numpy()
    fastest = np.minimum(table["searched_s"], policies_of(table).min(axis=1))
    rounding = 1e-12 * table["lower_bound_s"].to_numpy()[:, None]  # of a schedule at its bound
    return bool((np.diff(steps, axis=1) >= -rounding).all() and (steps[:, 2] == fastest).all())


HURRIED = "0.000001"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search without time; tests copy what they change."""
    folder = tmp_path_factory.mktemp("searched")
    assert best_known.main([*OPTIONS, "--time-limit", HURRIED, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(searched: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(searched, tmp_path / "copy"))


def test_a_table_is_in_order_however_short_the_search(searched: Path, tmp_path: Path) -> None:
    assert best_known.main([*OPTIONS, "--time-limit", "0.2", "--output", str(tmp_path)]) == 0
    for output in (searched, tmp_path):
        table = pd.read_csv(output / "best_known.csv")
        assert tuple(table.columns) == (*COLUMNS, "random", "rollout")
        assert len(table) == 4
        assert in_order(table)


def test_a_policy_that_is_faster_than_the_search_is_the_best_known() -> None:
    row = {"task": "t", "seed": 0, "lower_bound_s": 8.0, "joint_bound_s": 10.0}
    row |= {"best_known_s": 11.0, "found_by": "b", "searched_s": 12.0, "stages": 3, "search_s": 1.0}
    table = pd.DataFrame([row | {"a": 13.0, "b": 11.0}])
    assert in_order(table)
    text = report(table, "command")
    assert "| 0      | 8.00" in text
    assert "37.50" in text  # 11 / 8
    assert "| best known  | 37.50                    | 10.00" in text
    assert "| joint bound | 25.00" in text


def test_finished_cases_are_kept(folder: Path) -> None:
    before = (folder / "best_known.csv").read_text()
    best_known.main([*OPTIONS, "--time-limit", HURRIED, "--output", str(folder)])
    assert (folder / "best_known.csv").read_text() == before
    with pytest.raises(
        ServegymError,
        match=r"another task, setting or version \(time_limit 1e-06, now 0\.2\)",
    ):
        best_known.main([*OPTIONS, "--time-limit", "0.2", "--output", str(folder)])


# ---- what is committed -----------------------------------------------------------------------


def test_the_committed_table_is_in_order_and_follows_from_its_rows() -> None:
    table = pd.read_csv(COMMITTED / "best_known.csv")
    assert in_order(table)
    assert table["seed"].min() >= HELD_OUT_SEED
    text = (COMMITTED / "best_known.md").read_text()
    assert text == report(table, text.split("`")[1])


def test_a_committed_schedule_is_what_the_table_says() -> None:
    row = pd.read_csv(COMMITTED / "best_known.csv").iloc[0]
    task = TASKS[row["task"]]
    clients, costs = task.cluster.clients, lower(task).costs
    requests = make_case(task, int(row["seed"])).requests
    assert joint_bound(requests, clients, costs).seconds == pytest.approx(row["joint_bound_s"])
    stages = json.loads((COMMITTED / f"{row['seed']}.json").read_text())["stages"]
    schedule = [Stage(stage["clock"], tuple(stage["requests"])) for stage in stages]
    assert replay(requests, clients, costs, schedule) == pytest.approx(row["searched_s"])


def test_a_table_without_its_note_is_refused(folder: Path) -> None:
    """Without its note, another task's or workload's table would pass for this one's."""
    before = (folder / "best_known.csv").read_bytes()
    (folder / "search.json").unlink()
    with pytest.raises(ServegymError, match=r"holds best_known\.csv, but no search\.json"):
        best_known.main([*OPTIONS, "--time-limit", HURRIED, "--output", str(folder)])
    assert (folder / "best_known.csv").read_bytes() == before
    assert not (folder / "search.json").exists()
