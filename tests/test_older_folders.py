"""Folders of earlier versions are gone on with: what they lack has its default."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from servegym.agents.card import CARD_FILE
from servegym.agents.hyperparameters import Hyperparameters
from servegym.agents.policy import load_agent
from servegym.agents.record import begin_run, check_run
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import (
    COLUMNS,
    read_best_known,
    read_episodes,
)
from servegym.envs.playing.identity import claim_task, compare, notes_of
from servegym.envs.process.metrics import METRIC_DEFAULTS, METRICS
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import TASKS
from servegym.studies.agents.play import settings
from servegym.studies.commands import evaluate

TINY = TASKS["servegym/Tiny-v0"]
RESULTS = Path(__file__).parents[1] / "results"
NO_VALUE = ("gap_between_tokens_p50_s", "gap_between_tokens_p99_s", "preempted_slowdown")
"""Metrics without a value where all requests are there at once and memory is not limited."""
Notes = dict[str, Any]


def written(task: TaskConfig) -> Notes:
    """The notes of a task as they are read back."""
    return dict(json.loads(json.dumps(notes_of(task))))


def compared(found: Notes, task: TaskConfig) -> None:
    compare("folder", "holds another ({name} {old}, now {new})", found, notes_of(task), "remedy")


def without(*keys: str) -> Callable[[Notes], None]:
    """Remove a key."""

    def change(notes: Notes) -> None:
        for key in keys[:-1]:
            notes = notes[key]
        del notes[keys[-1]]

    return change


LACKING = [
    (("cluster", "max_prefill_tokens"), {"cluster": {"max_prefill_tokens": 100}}),
    (("workload", "arrival_rate_per_s"), {"workload": {"arrival_rate_per_s": 2.0}}),
    (("information", "quantile"), {"information": {"quantile": 0.5}}),
    (("information",), {"information": {"quantile": 0.5}}),
    (("process", "rules"), {"process": {"rules": ("fcfs",)}}),
    (("process", "max_seconds"), {"process": {"max_seconds": 5.0}}),
    (("process", "observe"), {"process": {"observe": ("memory",)}}),
    (("cost", "engine_overhead"), {"cost": {"engine_overhead": {"base": 0.5}}}),
    (("cost", "engine_overhead", "per_client"), {"cost": {"engine_overhead": {"per_client": 0.5}}}),
    (
        ("cost", "decode", "per_client_kv_token"),
        {"cost": {"model": "levelled", "decode": {"base": 1.0, "per_client_kv_token": 0.5}}},
    ),
    (
        ("cost", "decode", "per_kv_token"),
        {"cost": {"model": "levelled", "decode": {"base": 1.0, "per_kv_token": 0.5}}},
    ),
]


@pytest.mark.parametrize(("keys", "overrides"), LACKING)
def test_notes_that_lack_a_key_are_of_its_default(keys: tuple[str, ...], overrides: Any) -> None:
    found = written(TINY)
    without(*keys)(found)
    compared(found, TINY)
    with pytest.raises(ServegymError, match="holds another") as refusal:
        compared(found, with_overrides(TINY, overrides))
    assert "\n" not in str(refusal.value)


def test_notes_that_lack_a_key_without_a_default_are_refused() -> None:
    for keys in (("name",), ("cost", "decode", "base"), ("cost", "prefill", "level_tokens")):
        found = written(TINY)
        compared(found, TINY)
        without(*keys)(found)
        with pytest.raises(ServegymError, match=f"{keys[-1]} None, now"):
            compared(found, TINY)


@pytest.mark.parametrize("value", [None, 0, False, "x", {}, {"deeper": 1}])
@pytest.mark.parametrize("section", ["", "cluster", "cost", "process"])
def test_notes_of_a_later_version_are_refused(section: str, value: Any) -> None:
    found = written(TINY)
    (found[section] if section else found)["later"] = value
    with pytest.raises(ServegymError, match=r"later .*, now none\); remedy$") as refusal:
        compared(found, TINY)
    assert "\n" not in str(refusal.value)


def test_the_notes_of_runs_hold_a_task_of_their_own() -> None:
    found: Notes = {"task": written(TINY), "version": 2}
    del found["task"]["information"]["deviations"]
    compare("run", "{name} {old} {new}", found, {"task": notes_of(TINY), "version": 2}, "")
    del found["version"]
    with pytest.raises(ServegymError, match="version None 2"):
        compare("run", "{name} {old} {new}", found, {"task": notes_of(TINY), "version": 2}, "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of results/tiny as an earlier version would have left it."""
    for name in ("task.json", "episodes.csv"):
        shutil.copy(RESULTS / "tiny" / name, tmp_path)
    notes = json.loads((tmp_path / "task.json").read_text())
    del notes["process"]["max_seconds"], notes["information"]["deviations"]
    (tmp_path / "task.json").write_text(json.dumps(notes))
    return tmp_path


def go_on(folder: Path, seeds: str) -> None:
    options = ["--task", "Tiny-v0", "--policies", "fcfs", "--seeds", seeds, "--jobs", "1"]
    options += ["--optimum-limit", "0"]  # of optima, test_optima.py
    assert evaluate.main([*options, "--output", str(folder)]) == 0


@pytest.mark.parametrize("metric", list(METRIC_DEFAULTS))
def test_a_folder_without_a_metric_is_gone_on_with(folder: Path, metric: str) -> None:
    path = folder / "episodes.csv"
    whole = read_episodes(path)
    pd.read_csv(path, dtype=str).drop(columns=metric, errors="ignore").to_csv(path, index=False)
    go_on(folder, "0:2")
    table = read_episodes(path)
    old, new = table[table["seed"] >= 1_000_000], table[table["seed"] < 1_000_000]
    assert len(old) == len(whole)
    assert len(new) == 2
    both = [whole, old]
    ours, theirs = (
        rows.drop(columns=metric).sort_values(["policy", "seed"]).reset_index(drop=True)
        for rows in both
    )
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    default = METRIC_DEFAULTS[metric]
    assert old[metric].isna().all() if default != default else (old[metric] == default).all()
    assert new[metric].isna().all() if metric in NO_VALUE else new[metric].notna().all()
    assert list(pd.read_csv(path).columns) == list(COLUMNS)
    if metric == next(iter(METRIC_DEFAULTS)):
        before = path.read_bytes()
        go_on(folder, "0:2")  # nothing is left to play
        assert path.read_bytes() == before


@pytest.mark.parametrize("column", ["gap", "makespan_s", "lower_bound_s", "requests", "policy"])
def test_a_table_without_what_an_episode_is_known_by_is_refused(folder: Path, column: str) -> None:
    assert column in (*set(METRICS) - set(METRIC_DEFAULTS), "policy")
    path = folder / "episodes.csv"
    pd.read_csv(path, dtype=str).drop(columns=column).to_csv(path, index=False)
    with pytest.raises(ServegymError, match=f"no column '{column}'"):
        go_on(folder, "0")


def test_everything_that_is_committed_is_read(tmp_path: Path) -> None:
    tasks = TASKS | {task.name: task for task in settings().values()}
    for path in RESULTS.rglob("task.json"):
        (tmp_path / "task.json").write_bytes(path.read_bytes())
        task = tasks[json.loads(path.read_text())["name"]]
        assert claim_task(task, tmp_path) == task
    for path in RESULTS.rglob("episodes.csv"):
        episodes = read_episodes(path)
        assert len(episodes)
        assert not episodes[["makespan_s", "lower_bound_s", "decisions"]].isna().any(axis=None)
        name = episodes["task"].iloc[0]
        read_best_known(path.parent / "best_known.csv", name, episodes)
    for path in RESULTS.rglob(CARD_FILE):
        card = load_agent(path.parent).card
        content = json.loads(path.read_text())
        if "actions" not in content:  # the first versions noted rules only
            assert card.actions == ("decode", *(f"prefill:{rule}" for rule in content["rules"]))
            assert card.plan == ""


def test_a_run_without_a_later_hyperparameter_is_of_its_default(tmp_path: Path) -> None:
    begin_run(TINY, Hyperparameters(), tmp_path, "", resume=False)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["hyperparameters"]["evolution_updates"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    check_run(TINY, Hyperparameters(), tmp_path, resume=True)
    with pytest.raises(ServegymError, match="evolution_updates 0, this one has 7"):
        check_run(TINY, Hyperparameters(evolution_updates=7), tmp_path, resume=True)
