"""Worker processes: no more than are useful, and none left, however the parent ends."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import joblib
import pandas as pd
import pytest

from servegym.baselines.registry import make_policy
from servegym.envs.errors import ServegymError
from servegym.envs.playing import parallel
from servegym.envs.playing.evaluation import make_case, play, read_episodes
from servegym.envs.playing.parallel import MAX_JOBS, run_parallel, useful_jobs
from servegym.envs.task.registered import TASKS
from servegym.studies.cli import SCRIPTS
from servegym.studies.commands import (
    answer_clients,
    answer_scale,
    answer_transfer,
    best_known,
    capacity,
    check_estimates,
    check_iteration_rule,
    check_robustness,
    check_stealing,
    cluster,
    evaluate,
    paper,
    study_agents,
    study_training_speed,
    study_uncertainty,
    tune,
)
from servegym.studies.robustness.kills import left_of_session, processes_of_session

TASK = TASKS["servegym/GSM8K-v0"]


@pytest.mark.parametrize("jobs", [1, 7])
def test_every_result_comes_once(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cpu_count", lambda: 2)
    with closing(run_parallel(operator.add, [(k, 1) for k in range(20)], jobs)) as results:
        assert sorted(results) == list(range(1, 21))


def test_one_job_is_this_process() -> None:
    assert list(run_parallel(os.getpid, [(), ()], 1)) == [os.getpid()] * 2
    assert list(run_parallel(os.getpid, [()], 2)) == [os.getpid()]  # one thing to do


def test_a_worker_that_is_killed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cpu_count", lambda: 2)
    with pytest.raises(ServegymError, match="a worker process was ended from outside"):
        list(run_parallel(os._exit, [(9,), (9,)], 2))
    with closing(run_parallel(operator.add, [(k, 1) for k in range(4)], 2)) as results:
        assert sorted(results) == [1, 2, 3, 4]  # the next pool works


@pytest.mark.parametrize(
    ("jobs", "things", "processors", "useful", "notice"),
    [
        (2, 100, 8, 2, ""),
        (2, 1, 8, 1, ""),  # the usual number is nobody's wish
        (2, 100, 1, 1, ""),
        (8, 100, 8, 8, ""),
        (12, 100, 8, 8, "--jobs 12: 8 are used, more would be idle (8 processors)"),
        (12, 3, 8, 3, "--jobs 12: 3 are used, more would be idle (3 to do)"),
        (12, 0, 8, 1, ""),  # nothing to do
        (MAX_JOBS, 5000, 4, 4, f"--jobs {MAX_JOBS}: 4 are used"),
    ],
)
def test_jobs_are_capped_at_what_is_useful(
    jobs: int,
    things: int,
    processors: int,
    useful: int,
    notice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(parallel, "cpu_count", lambda: processors)
    for _ in range(3):
        assert useful_jobs(jobs, things) == useful
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if notice else 0)
    assert all(line.startswith(notice) for line in lines)


@pytest.mark.parametrize("jobs", ["0", "-1", "1025", str(10**20), "9" * 400])
@pytest.mark.parametrize(
    "main",
    [
        answer_clients.main,
        answer_scale.main,
        answer_transfer.main,
        capacity.main,
        cluster.main,
        evaluate.main,
        tune.main,
        paper.main,
        study_agents.main,
        study_training_speed.main,
        study_uncertainty.main,
        check_estimates.main,
        check_iteration_rule.main,
        check_robustness.main,
        check_stealing.main,
    ],
)
def test_absurd_jobs_are_refused_by_every_script(
    main: Callable[[list[str]], int], jobs: str, tmp_path: Path
) -> None:
    with pytest.raises(ServegymError, match=r"--jobs must lie in 1 … 1024, got ") as refused:
        main(["--jobs", jobs, "--output", str(tmp_path / "out")])
    assert len(str(refused.value)) < 200
    assert not (tmp_path / "out").exists()


def test_every_script_with_jobs_is_in_the_list_above() -> None:
    with_jobs = {
        path.stem
        for path in (SCRIPTS / "studies" / "commands").glob("*.py")
        if "\n    jobs: int" in path.read_text()
    }
    listed = {
        "capacity",
        "cluster",
        "evaluate",
        "tune",
        "paper",
        "study_agents",
        "study_training_speed",
        "study_uncertainty",
        "check_robustness",
    }
    listed |= {"check_estimates", "tune_agent", "check_iteration_rule", "check_stealing"}
    assert with_jobs == listed | {"answer_clients", "answer_scale", "answer_transfer"}
    assert "joblib" not in best_known.__dict__


def start(output: Path) -> subprocess.Popen[bytes]:
    """An evaluation with two workers, in a session of its own."""
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), "--task", "GSM8K-v0"]
    command += ["--policies", "fcfs,lpt", "--seeds", "0:4000", "--jobs", "2"]
    return subprocess.Popen(
        [*command, "--output", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_no_process_outlives_a_killed_evaluation(tmp_path: Path) -> None:
    """All processes end soon; finished episodes are kept, and a second run adds to them."""
    folders = {number: tmp_path / number.name for number in (signal.SIGKILL, signal.SIGTERM)}
    running = {number: start(folder) for number, folder in folders.items()}
    with ExitStack() as stack:
        for process in running.values():
            stack.callback(process.wait)
            stack.callback(process.kill)
        check_kills(running, folders)


def check_kills(
    running: Mapping[signal.Signals, subprocess.Popen[bytes]],
    folders: Mapping[signal.Signals, Path],
) -> None:
    for number, process in running.items():
        while not (folders[number] / "episodes.csv").exists() and process.poll() is None:
            time.sleep(0.02)
        assert len(processes_of_session(process.pid)) >= min(3, 1 + joblib.cpu_count())
        process.send_signal(number)
        process.wait(timeout=20)
        assert left_of_session(process) == []
        kept = pd.read_csv(folders[number] / "episodes.csv").set_index(["policy", "seed"])
        policy, seed = kept.index[0][0], int(kept.index[0][1])
        options = ["--task", "GSM8K-v0", "--policies", policy, "--seeds", str(seed), "--jobs", "1"]
        evaluate.main([*options, "--output", str(folders[number])])
        assert not list(folders[number].glob(".*"))
        resumed = read_episodes(folders[number] / "episodes.csv").set_index(["policy", "seed"])
        pd.testing.assert_frame_equal(resumed.loc[kept.index], kept, check_dtype=False)
        played = play(TASK, policy, make_policy(policy), make_case(TASK, seed), seed).row
        assert played["makespan_s"] == kept["makespan_s"].iloc[0]
