"""Evaluation: rows, resuming, refusing, and the same numbers from one process or two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from servegym.baselines.registry import make_policy
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import COLUMNS, evaluate, make_case, play
from servegym.envs.playing.policy import Policy
from servegym.envs.serving_env import ServingEnv
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS

TASK = TASKS["servegym/Tiny-v0"]
TIMED = ["decision_ms_p50", "decision_ms_p99", "prepare_s"]
PROMISED_COLUMNS = (
    "task,policy,seed,requests,makespan_s,lower_bound_s,gap,client_utilization,decode_utilization,"
    "decode_rounds,prefill_stages,prefill_s,output_tokens_per_s,ttft_p50_s,ttft_p99_s,tpot_p50_s,"
    "tpot_p99_s,decisions,decision_ms_p50,decision_ms_p99"
)


def run(output: Path, names: list[str], seeds: range, jobs: int = 1) -> pd.DataFrame:
    return evaluate(TASK, make_policy, names, seeds, output, jobs=jobs, progress=False)


def test_the_columns_other_tools_rely_on_come_first() -> None:
    assert ",".join(COLUMNS[:20]) == PROMISED_COLUMNS


def test_a_case_is_what_the_environment_samples() -> None:
    case = make_case(TASK, 5)
    env = ServingEnv(TASK)
    _, info = env.reset(seed=5)
    log = env.records()
    assert np.array_equal(case.requests.prompt_tokens, log.prompt_tokens)
    assert np.array_equal(case.requests.decode_rounds, log.decode_rounds)
    assert info["lower_bound_s"] == case.bound.seconds


def test_policies_meet_the_same_cases_in_the_order_asked_for(tmp_path: Path) -> None:
    table = run(tmp_path, ["lpt", "fcfs"], range(3))
    assert list(table["policy"]) == ["lpt"] * 3 + ["fcfs"] * 3
    assert list(table["seed"]) == [0, 1, 2] * 2
    bounds = table.pivot_table(index="seed", columns="policy", values="lower_bound_s")
    assert np.array_equal(bounds["lpt"], bounds["fcfs"])
    assert np.allclose(table["gap"], table["makespan_s"] / table["lower_bound_s"] - 1)


def test_two_processes_give_the_same_rows(tmp_path: Path) -> None:
    serial = run(tmp_path / "one", ["random", "hybrid"], range(4))
    parallel = run(tmp_path / "two", ["random", "hybrid"], range(4), jobs=2)
    pd.testing.assert_frame_equal(serial.drop(columns=TIMED), parallel.drop(columns=TIMED))


def test_finished_episodes_are_not_run_again(tmp_path: Path) -> None:
    run(tmp_path, ["fcfs"], range(2))
    path = tmp_path / "episodes.csv"
    marked = pd.read_csv(path).assign(makespan_s=123.0)
    marked.to_csv(path, index=False)
    table = run(tmp_path, ["fcfs", "lpt"], range(3))
    assert list(table["makespan_s"][:2]) == [123.0, 123.0]  # kept, not played
    assert len(table) == 6
    assert 123.0 not in set(table["makespan_s"][2:])


def test_only_what_was_asked_for_is_returned_and_the_rest_is_kept(tmp_path: Path) -> None:
    run(tmp_path, ["fcfs", "lpt"], range(4))
    table = run(tmp_path, ["lpt"], range(1, 3))
    assert list(zip(table["policy"], table["seed"], strict=True)) == [("lpt", 1), ("lpt", 2)]
    assert len(pd.read_csv(tmp_path / "episodes.csv")) == 8


def test_an_interrupted_evaluation_keeps_what_is_finished(tmp_path: Path) -> None:
    calls = 0

    def interrupt(name: str) -> Policy:
        nonlocal calls
        calls += 1
        if calls == 5:  # one call to check the name, then one a case
            raise KeyboardInterrupt
        return make_policy(name)

    with pytest.raises(KeyboardInterrupt):
        evaluate(TASK, interrupt, ["fcfs"], range(9), tmp_path, progress=False)
    assert list(pd.read_csv(tmp_path / "episodes.csv")["seed"]) == [0, 1, 2]
    whole = run(tmp_path / "whole", ["fcfs"], range(9))
    resumed = run(tmp_path, ["fcfs"], range(9))
    pd.testing.assert_frame_equal(resumed.drop(columns=TIMED), whole.drop(columns=TIMED))


def test_nothing_is_written_for_an_unknown_policy(tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match="did you mean 'fcfs'"):
        run(tmp_path / "new", ["fcsf"], range(1))
    assert not (tmp_path / "new").exists()


def test_a_folder_of_another_task_is_refused(tmp_path: Path) -> None:
    run(tmp_path, ["fcfs"], range(1))
    other = with_overrides(TASK, {"cluster": {"clients": 4}})
    with pytest.raises(ServegymError, match="another task"):
        evaluate(other, make_policy, ["fcfs"], range(1), tmp_path, progress=False)


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "", "\x00\x01"])
def test_a_damaged_table_is_refused(tmp_path: Path, content: str) -> None:
    run(tmp_path, ["fcfs"], range(1))
    (tmp_path / "episodes.csv").write_text(content)
    with pytest.raises(ServegymError, match=r"episodes\.csv"):
        run(tmp_path, ["fcfs"], range(1))


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServegymError, match="cannot be made"):
        run(tmp_path / "file" / "results", ["fcfs"], range(1))


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    run(tmp_path, ["fcfs"], range(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes.csv", "task.json"]


def test_decisions_are_asked_every_round_where_a_policy_needs_it() -> None:
    case = make_case(TASK, 0)
    assert play(TASK, "aligned", make_policy("aligned"), case, 0).row["decision_points"] == "rounds"
    assert play(TASK, "fcfs", make_policy("fcfs"), case, 0).row["decision_points"] == "events"


def test_a_truncated_episode_has_a_row() -> None:
    task = with_overrides(TASK, {"process": {"max_decisions": 2}})
    row = play(task, "fcfs", make_policy("fcfs"), make_case(task, 0), 0).row
    assert row["decisions"] == 2
    assert 0 < row["client_utilization"] <= 1


def test_policies_with_arrivals_plan_only_what_is_there() -> None:
    overrides = {"workload": {"arrival_rate_per_s": 0.5}}
    task = with_overrides(TASK, overrides)
    case = make_case(task, 0)
    for name in ("offline", "offline-steal", "hybrid", "aligned"):
        assert play(task, name, make_policy(name), case, 0).row["gap"] >= -1e-12
