"""The scripts of the three checks: stealing by hand, refusals, resuming, and committed results."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.plans import plan_expected
from servegym.envs import ServegymError, TaskConfig, load_task
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.task.cases import Case
from servegym.envs.task.estimates import estimated_task
from servegym.studies.cases import held_out, load_tasks, short_name
from servegym.studies.checks import estimates, iteration_rule, stealing
from servegym.studies.checks.common import Collection
from servegym.studies.checks.stealing import play_stealing
from servegym.studies.commands import (
    check_estimates,
    check_iteration_rule,
    check_stealing,
    study_uncertainty,
)
from tests.checks_helpers import SMALL, unit_case
from tests.helpers import instance
from tests.test_scripts import refused

ROOT = Path(__file__).parents[1]
SCRIPTS = ("check_iteration_rule", "check_estimates", "check_stealing")


# ---- stealing ------------------------------------------------------------------------------------


def test_with_a_perfect_plan_nothing_is_left_to_steal() -> None:
    task, case = unit_case(2, 1, 4, 3, 2)  # queues 4, 1 and 3, 2: both clients end at round 5
    without, stealing = (
        play_stealing(task, make_trigger_policy(name), case)
        for name in ("offline", "offline-steal")
    )
    assert without == stealing
    assert stealing["stolen"] == 0
    assert without["makespan_s"] == 5 + 3 * 2  # stages at rounds 0, 3 and 4


def test_what_stealing_saves_by_hand() -> None:
    # Predicted alike, so requests 0 and 2 (1 round each) go to client 0, 1 and 3 (9 each) to client 1.
    # Own queues: stages at rounds 0, 1 and 9, the last request ends at round 18.
    # Stealing: client 0 is through at round 2 and takes request 3, which ends at round 11.
    task, case = unit_case(2, 1, 9, 1, 9)
    requests = instance((5, 2), (5, 10), (5, 2), (5, 10), predicted=[5, 5, 5, 5])
    informed, case = estimated_task(task), Case(requests, case.bound)
    played = {
        name: play_stealing(informed, make_trigger_policy(name), case)
        for name in ("offline", "offline-steal")
    }
    assert played["offline"]["makespan_s"] == 18 + 3 * 2
    assert played["offline"]["stolen"] == 0
    assert played["offline-steal"]["makespan_s"] == 11 + 3 * 2
    assert played["offline-steal"]["stolen"] == 0.25


def test_hybrid_without_stealing_serves_own_queues_only() -> None:
    policy = make_trigger_policy("hybrid-plan-0.2")
    assert (policy.rule, policy.planner, policy.parameter) == ("plan", plan_expected, 0.2)
    assert play_stealing(SMALL, policy, make_case(SMALL, 3))["stolen"] == 0


# ---- scripts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "Tyni-v0"], "did you mean 'Tiny-v0'"),  # misspelt
        (["--tasks", ","], "names no task"),
        (["--tasks", "GSM8KPredicted-v0"], "the check itself says what is known"),
        (["--cases", "1"], "--cases must lie"),
        (["--cases", "1000001"], "--cases must lie"),
        (["--cases", "two"], "two"),
        (["--jobs", "0"], "--jobs must lie in 1"),
        (["--case", "2"], "did you mean '--cases'"),  # unknown option
    ],
)
def test_checks_refuse(tmp_path: Path, script: str, options: list[str], message: str) -> None:
    assert message in refused(script, tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--outputs", "unifrom"], "did you mean 'uniform'"),
        (["--outputs", ","], "names no distribution"),
        (["--samples", "0"], "--samples must lie in 1"),
    ],
)
def test_the_iteration_check_refuses(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in refused("check_iteration_rule", tmp_path / "out", *options)


def test_tasks_with_arrivals_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "late.toml"
    path.write_text("[workload]\narrival_rate_per_s = 1.0\n")
    with pytest.raises(ServegymError, match="has arrivals"):
        load_tasks(str(path))
    path.write_text("[workload]\nrequests = 9\n")
    assert [short_name(task) for task in load_tasks(f"{path},Tiny-v0")] == ["late", "Tiny-v0"]
    with pytest.raises(ServegymError, match="same file"):
        load_tasks("Tiny-v0,servegym/Tiny-v0")


def test_the_least_that_is_legal() -> None:
    assert held_out(2) == range(HELD_OUT_SEED, HELD_OUT_SEED + 2)
    assert held_out(HELD_OUT_SEED)[-1] == 2 * HELD_OUT_SEED - 1
    assert iteration_rule.parse_outputs(" tiny,uniform,tiny ") == ("tiny", "uniform")


def fake_case(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    return [{"seed": seed, "kind": kind, "gap": seed / 3} for kind in ("a", "b")]


def test_a_collection_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    """Interrupted, or extended later: the same file as from a single run."""
    task, seeds = load_task("Tiny-v0"), range(5, 9)

    def stopped(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
        if seed == 7:
            raise KeyboardInterrupt
        return fake_case(task, seed)

    whole, parts = (Collection(tmp_path / name, {}, texts=("kind",)) for name in ("whole", "parts"))
    for collection in (whole, parts):
        collection.open([task])
    table = whole.rows(task, seeds, fake_case, 1)
    with pytest.raises(KeyboardInterrupt):
        parts.rows(task, seeds, stopped, 1)
    assert list(pd.read_csv(tmp_path / "parts/Tiny-v0.csv")["seed"]) == [5, 5, 6, 6]
    pd.testing.assert_frame_equal(parts.rows(task, seeds, fake_case, 1), table)
    first, second = ((tmp_path / name / "Tiny-v0.csv").read_bytes() for name in ("whole", "parts"))
    assert first == second
    assert list(parts.rows(task, seeds[:1], fake_case, 1)["kind"]) == ["a", "b"]


def test_a_collection_refuses_rows_of_something_else(tmp_path: Path) -> None:
    task = load_task("Tiny-v0")
    Collection(tmp_path, {"samples": 5}).open([task])
    Collection(tmp_path, {"samples": 5}).open([task])  # the same again
    with pytest.raises(ServegymError, match="another task, setting or version"):
        Collection(tmp_path, {"samples": 6}).open([task])
    for damage in ("", "nonsense\n1\n", "seed,gap\n0,x\n", "seed,gap\n0,1\n0,2\n1,1\n"):
        (tmp_path / "Tiny-v0.csv").write_text(damage)
        with pytest.raises(ServegymError, match=r"Tiny-v0\.csv: (empty|not a table|line 2|seed 1)"):
            Collection(tmp_path, {"samples": 5}).rows(task, range(2), fake_case, 1)


def test_a_table_of_a_part_without_its_note_is_refused(tmp_path: Path) -> None:
    """It would pass for this task's and this setting's. Another task's table is no part of this one's."""
    task = load_task("Tiny-v0")
    collection = Collection(tmp_path, {"samples": 5}, texts=("kind",), parts=("near", "far"))
    collection.open([task])
    collection.rows(task, range(2), fake_case, 1, "far")
    (tmp_path / "Tiny-v0.json").unlink()
    with pytest.raises(ServegymError, match=r"holds Tiny-v0-far\.csv, but no Tiny-v0\.json"):
        collection.open([task])
    (tmp_path / "Tiny-v0-far.csv").rename(tmp_path / "Tiny-v0-other.csv")
    collection.open([task])


@pytest.mark.parametrize(
    ("main", "options", "table"),
    [
        (
            check_iteration_rule.main,
            ["--tasks", "Tiny-v0", "--outputs", "tiny", "--samples", "1"],
            "Tiny-v0-uniform.csv",  # of an earlier run
        ),
        (study_uncertainty.main, ["--parts", "quality"], "GSM8KPredicted-v0-slow.csv"),
    ],
)
def test_checks_in_parts_notice_a_deleted_note(
    main: Callable[[list[str]], int], options: list[str], table: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(study_uncertainty, "tuned_threshold", lambda *_: "threshold-12")
    (tmp_path / table).write_text("seed,family\n")
    with pytest.raises(ServegymError, match=f"holds {table}, but no "):
        main([*options, "--cases", "2", "--jobs", "1", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [table]


def run_check(script: str, output: Path, cases: int) -> None:
    task = output.parent / "small.toml"  # where a plan meets its bound at once; Tiny-v0's do not
    task.write_text("[cluster]\nclients = 8\n[workload]\nrequests = 40\n")
    options = ["--tasks", str(task), "--cases", str(cases), "--jobs", "1", "--output", str(output)]
    if script == "check_iteration_rule":
        options += ["--outputs", "uniform,constant", "--samples", "4"]
    module = {
        "check_iteration_rule": check_iteration_rule,
        "check_estimates": check_estimates,
        "check_stealing": check_stealing,
    }[script]
    with redirect_stdout(io.StringIO()):
        assert module.main(options) == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_more_cases_later_give_the_same_tables(tmp_path: Path, script: str) -> None:
    output = tmp_path / "out"
    run_check(script, output, 2)
    run_check(script, output, 3)
    resumed = {path.name: path.read_bytes() for path in output.iterdir()}
    for path in output.iterdir():
        path.unlink()
    run_check(script, output, 3)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == resumed
    text = (output / f"{script.removeprefix('check_')}.md").read_text()
    assert f"`python scripts/{script}.py --tasks {tmp_path}" in text
    assert "## Costs of small" in text or "## small" in text
    assert "nan" not in text


# ---- results -------------------------------------------------------------------------------------


def committed(check: str, task: str, part: str = "") -> pd.DataFrame:
    name = f"{task}-{part}" if part else task
    path = ROOT / "results/checks" / check / f"{name}.csv"
    table = pd.read_csv(path)
    assert table["seed"].min() >= HELD_OUT_SEED
    return table


def test_the_reports_follow_from_their_rows() -> None:
    tasks = {name: load_task(name) for name in ("GSM8K-v0", "Paper-v0")}
    texts = {
        "estimates": estimates.report(
            {name: (task, committed("estimates", name)) for name, task in tasks.items()},
            check_estimates.command_of(check_estimates.Args()),
        ),
        "stealing": stealing.report(
            {name: (task, committed("stealing", name)) for name, task in tasks.items()},
            check_stealing.command_of(check_stealing.Args()),
        ),
    }
    args = check_iteration_rule.Args()
    all_outputs = iteration_rule.parse_outputs(args.outputs)
    judged = {}
    for name, task in tasks.items():
        parts = [
            committed("iteration_rule", name, outputs).assign(outputs=outputs)
            for outputs in all_outputs
        ]
        judged[name] = task, pd.concat(parts, ignore_index=True)
    texts["iteration_rule"] = iteration_rule.report(
        judged, all_outputs, args.samples, check_iteration_rule.command_of(args)
    )
    for check, text in texts.items():
        assert (ROOT / "results/checks" / check / f"{check}.md").read_text() == text
