"""Command lines: what they write, and one clear line for every wrong input."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd
import pytest

from servegym.envs.task.registered import TASKS
from servegym.studies.cli import SCRIPTS, run
from servegym.studies.commands import evaluate, paper, tune
from servegym.studies.robustness.kills import left_of_session
from tests.test_packaging import offences, python_files

CSV = "prompt_tokens,output_tokens\n5,3\n7,2\n4,9\n"


def refused(script: str, output: Path, *options: str) -> str:
    """Run a script that must refuse: status 2, one line, nothing written. Returns the line."""
    main = importlib.import_module(f"servegym.studies.commands.{script}").main
    shown, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(shown), redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        run(main, [*options, "--output", str(output)])
    assert stop.value.code == 2
    assert shown.getvalue() == ""
    assert len(errors.getvalue().strip().splitlines()) == 1, errors.getvalue()
    assert not output.exists()
    return errors.getvalue()


def test_run_as_a_command(tmp_path: Path) -> None:
    """As a user does, from another folder: the same line and status."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "evaluate.py"), "--task", "Papr-v0"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "evaluate.py: unknown task 'Papr-v0'; did you mean 'Paper-v0'? (a task file ends in .toml)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_no_module_imports_a_command() -> None:
    """What two commands need stands in a module beside them; these two load one by its script's name."""
    found = offences(python_files("scripts/studies"), {"servegym.studies.commands"})
    assert list(dict.fromkeys(found)) == [
        f"scripts/studies/{name}.py imports servegym.studies.commands"
        for name in ("robustness/outcomes", "start")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "Papr-v0"], "did you mean 'Paper-v0'"),  # unknown task
        (["--task", "missing.toml"], "no such task file"),
        (["--policies", "fcfs,hybird"], "did you mean 'hybrid'"),
        (["--policies", ","], "names no policy"),
        (["--seeds", "5:5"], "is empty"),
        (["--seeds", "-1"], "FIRST:AFTER_LAST"),  # negative
        (["--seeds", "1.5"], "FIRST:AFTER_LAST"),  # fractional
        (["--seeds", "0:1000001"], "too much"),  # enormous
        (["--seeds", "nan"], "FIRST:AFTER_LAST"),
        (["--workload", "missing.csv"], "no such workload file"),
        (["--jobs", "0"], "--jobs must lie"),
        (["--jobs", "two"], "two"),  # not a number
        (["--polices", "fcfs"], "did you mean '--policies'"),  # unknown option
    ],
)
def test_evaluate_refuses(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in refused("evaluate", tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[cluster]\nclient = 3\n", "line 2: unknown key 'cluster.client'"),
        ("[clusters]\nclients = 3\n", "did you mean 'cluster'"),
        ("[cluster]\nclients = 1000001\n", "clients must be a whole number"),
        ('[cost]\npreset = "a100"\n', "line 2: unknown cost preset"),
        ("[cluster\n", "not TOML"),
    ],
)
def test_evaluate_refuses_task_files(tmp_path: Path, toml: str, message: str) -> None:
    path = tmp_path / "task.toml"
    path.write_text(toml)
    assert message in refused("evaluate", tmp_path / "out", "--task", str(path))


@pytest.mark.parametrize("rows", ["", "prompt_tokens,output_tokens\n", CSV + "1,nan\n"])
def test_evaluate_refuses_workloads(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "work.csv"
    path.write_text(rows)
    options = ["--task", "Tiny-v0", "--workload", str(path), "--policies", "fcfs"]
    assert "work.csv" in refused("evaluate", tmp_path / "out", *options)


def test_a_summary_tells_of_another_reference(tmp_path: Path) -> None:
    """Its command makes the same table; what nobody said is not in it."""
    for reference, told in (("fcfs", " --reference fcfs`"), ("hybrid", "")):
        options = ["--task", "Tiny-v0", "--policies", "hybrid,fcfs", "--seeds", "0:2"]
        options += ["--output", str(tmp_path), "--reference", reference, "--jobs", "1"]
        assert evaluate.main(options) == 0
        text = (tmp_path / "summary.md").read_text("utf-8")
        assert f"gap − {reference}" in text
        assert ("--reference" in text) == bool(told)
        assert told in text


def test_evaluate_refuses_a_folder_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused("evaluate", tmp_path / "file" / "out")


def test_evaluate_on_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "work.csv"
    path.write_text(CSV)
    options = ["--task", "Tiny-v0", "--workload", str(path), "--policies", "fcfs,lpt"]
    options += ["--seeds", "1000000:1000002", "--output", str(tmp_path / "out"), "--jobs", "1"]
    assert evaluate.main(options) == 0
    table = pd.read_csv(tmp_path / "out" / "episodes.csv")
    assert list(table["requests"]) == [3] * 4
    assert "| lpt" in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--list-policies", ["threshold-K", "hybrid", "random"]),
        ("--list-costs", ["llama2-70b-a100x4", "0.92", "17%"]),
        ("--list-tasks", ["servegym/Paper-v0", "1319"]),
    ],
)
def test_listings(capsys: pytest.CaptureFixture[str], flag: str, words: list[str]) -> None:
    assert evaluate.main([flag]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)


def test_listings_stand_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """The text begins two columns behind the longest name."""
    assert evaluate.main(["--list-tasks"]) == 0
    lines = dict(zip(TASKS, capsys.readouterr().out.splitlines(), strict=True))
    width = max(map(len, TASKS)) + 2
    assert all(line[:width] == f"{name:{width}}" != line for name, line in lines.items())
    assert all(line[width:].split()[0].isdigit() for line in lines.values())


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    """Interrupted in the middle: status 130, one last line, and the same table after resuming."""
    options = ["--task", "GSM8K-v0", "--policies", "fcfs,lpt", "--jobs", "2"]
    options += ["--seeds", "0:4000", "--output", str(tmp_path)]
    running = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "evaluate.py"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    path = tmp_path / "episodes.csv"
    while not path.exists() and running.poll() is None:
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == "evaluate.py: interrupted"
    finished = pd.read_csv(path)
    assert 0 < len(finished) < 8000
    assert not list(tmp_path.glob(".*"))
    assert left_of_session(running) == []


def test_paper_and_tune_on_few_cases(tmp_path: Path) -> None:
    output = tmp_path / "paper"
    assert paper.main(["--output", str(output), "--cases", "2", "--jobs", "1"]) == 0
    text = (output / "table.md").read_text()
    assert "| 201.00" in text
    assert (output / "gantt.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "makespan_vs_bound.png").read_bytes().startswith(b"\x89PNG")
    tuned = tmp_path / "tune"
    options = ["--task", "Tiny-v0", "--cases", "2", "--output", str(tuned), "--jobs", "1"]
    assert tune.main(options) == 0
    assert "threshold-" in (tuned / "tuning.md").read_text()


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("paper", ["--cases", "1"], "--cases must lie"),
        ("paper", ["--jobs", "0"], "--jobs must lie in 1"),
        ("tune", ["--cases", "0"], "--cases must lie"),
        ("tune", ["--task", "Tyni-v0"], "did you mean 'Tiny-v0'"),
        ("benchmark", ["--repeats", "0"], "--repeats must lie in 1"),
    ],
)
def test_other_scripts_refuse(
    tmp_path: Path, script: str, options: list[str], message: str
) -> None:
    assert message in refused(script, tmp_path / "out", *options)
