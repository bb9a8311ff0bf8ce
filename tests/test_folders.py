"""Folders of results: one process at a time, and only what belongs together."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock

from servegym.agents.hyperparameters import Hyperparameters
from servegym.agents.record import begin_run, check_run
from servegym.baselines.exact.optima import find_optima
from servegym.baselines.registry import make_policy
from servegym.envs.errors import ServegymError
from servegym.envs.playing import locks
from servegym.envs.playing.evaluation import evaluate as play_all
from servegym.envs.playing.identity import claim_task
from servegym.envs.playing.locks import LOCK_FILE, locked
from servegym.envs.playing.policy import Policy
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import TASKS
from servegym.studies.agents.play import settings
from servegym.studies.checks.common import Collection
from servegym.studies.commands import (
    best_known,
    check_stealing,
    evaluate,
    paper,
    study_agents,
    train,
    tune,
)
from servegym.studies.policies import make_policy as make_any_policy
from servegym.studies.policies import weights_of

TINY = TASKS["servegym/Tiny-v0"]
RESULTS = Path(__file__).parents[1] / "results"
CSV = "prompt_tokens,output_tokens\n5,3\n7,2\n4,9\n"
OTHER = "prompt_tokens,output_tokens\n5,3\n7,2\n4,8\n"

# ---- two processes ---------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from servegym.envs.playing.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the folder; killed in the end."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_every_script_refuses_a_folder_in_use_and_a_kill_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.05)
    folder = tmp_path / "out"
    runs = tmp_path / "out"
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (evaluate.main, ["--task", "Tiny-v0", "--policies", "fcfs", "--seeds", "0"]),
        (tune.main, ["--task", "Tiny-v0", "--cases", "1"]),
        (paper.main, ["--cases", "2"]),
        (best_known.main, ["--task", "Tiny-v0", "--policies", "fcfs", "--seeds", "0"]),
        (check_stealing.main, ["--tasks", "Tiny-v0", "--cases", "2"]),
        (study_agents.main, ["--tasks", "Tiny-v0", "--parts", "train", "--runs", str(runs)]),
        (study_agents.main, ["--tasks", "Tiny-v0", "--parts", "report"]),
        (train.main, ["--task", "Tiny-v0", "--timesteps", "1"]),
    ]
    with held_by_another(folder) as process:
        for main, options in commands:
            with pytest.raises(ServegymError) as refused:
                main([*options, "--output", str(folder)])
            assert str(refused.value).startswith(
                f"{folder}: another process (pid {process.pid}) writes its results there"
            )
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
    options = ["--task", "Tiny-v0", "--policies", "fcfs", "--seeds", "0", "--output", str(folder)]
    assert evaluate.main(options) == 0
    assert not (folder / LOCK_FILE).exists()


def test_the_same_thread_may_hold_a_folder_again(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path):
            assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"
        assert (tmp_path / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []


def test_another_thread_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.05)

    def hold() -> None:
        with locked(tmp_path):
            pass

    with ThreadPoolExecutor(1) as executor:
        with locked(tmp_path):
            refused = executor.submit(hold).exception(timeout=20)
        assert isinstance(refused, ServegymError)
        assert f"(pid {os.getpid()})" in str(refused)
        executor.submit(hold).result(timeout=20)


def test_a_folder_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match="nothing"), locked(tmp_path / "a" / "b"):
        raise ServegymError("nothing")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left = tmp_path / f".episodes.csv.{gone.pid}.tmp"
    alive, foreign = tmp_path / f".plan.json.{os.getppid()}.tmp", tmp_path / ".note.tmp"
    for path in (left, alive, foreign):
        path.touch()
    with locked(tmp_path):
        assert not left.exists()
        assert alive.exists()
        assert foreign.exists()


@pytest.mark.parametrize(
    ("name", "why"), [("file", "there is a file of this name"), ("file/out", "Not a directory")]
)
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServegymError, match=f"cannot be made: {why}"), locked(tmp_path / name):
        pytest.fail("held")


def test_a_folder_that_cannot_be_locked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network disk without locks."""

    def acquire(lock: object, **words: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as without_locks:
        without_locks.setattr(FileLock, "acquire", acquire)
        words = r"cannot be locked: No locks.* another disk"
        with pytest.raises(ServegymError, match=words), locked(tmp_path):
            pytest.fail("held")
    (tmp_path / LOCK_FILE).mkdir()
    words = rf"cannot be locked: {LOCK_FILE} in it is a folder"
    with pytest.raises(ServegymError, match=words), locked(tmp_path):
        pytest.fail("held")
    (tmp_path / LOCK_FILE).rmdir()
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).is_file()


# ---- contents that changed -------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> TaskConfig:
    path = tmp_path / "w.csv"
    path.write_text(CSV)
    return with_overrides(TINY, {"workload": {"source": str(path)}})


def rerun_evaluate(task: TaskConfig, folder: Path) -> None:
    play_all(task, make_policy, ["fcfs"], range(2), folder, progress=False)


def rerun_optima(task: TaskConfig, folder: Path) -> None:
    find_optima(task, range(1), folder, 1.0, progress=False)


def rerun_check(task: TaskConfig, folder: Path) -> None:
    Collection(folder, {"samples": 1}).open([task])


def rerun_training(task: TaskConfig, folder: Path) -> None:
    if (folder / "run.json").exists():
        check_run(task, Hyperparameters(), folder, resume=True)
    else:
        begin_run(task, Hyperparameters(), folder, "", resume=False)


def rerun_best_known(task: TaskConfig, folder: Path) -> None:
    toml = folder.parent / "t.toml"
    source = Path(task.workload.source).absolute()
    toml.write_text(
        f'[cluster]\nclients = 3\n[cost]\npreset = "tiny"\n[workload]\nsource = "{source}"\n'
    )
    options = ["--task", str(toml), "--policies", "fcfs", "--seeds", "0", "--time-limit", "0.01"]
    best_known.main([*options, "--output", str(folder)])


RERUNS = [rerun_evaluate, rerun_optima, rerun_check, rerun_training, rerun_best_known]


@pytest.mark.parametrize("rerun", RERUNS)
@pytest.mark.parametrize("content", [OTHER, CSV + "1,1\n"], ids=["a cell", "a row more"])
def test_a_changed_workload_is_noticed(
    rerun: Callable[[TaskConfig, Path], None],
    content: str,
    task: TaskConfig,
    tmp_path: Path,
) -> None:
    out, source = tmp_path / "out", Path(task.workload.source)
    rerun(task, out)
    stamp = source.stat()
    source.write_text(content)
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the time does not tell
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ServegymError, match=r"the workload file .*w\.csv has changed since"):
        rerun(task, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    source.write_text(CSV)
    rerun(task, out)


@pytest.mark.parametrize("rerun", RERUNS)
def test_the_same_content_elsewhere_is_the_same_workload(
    rerun: Callable[[TaskConfig, Path], None],
    task: TaskConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rerun(task, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "copy.csv").write_text(CSV)
    monkeypatch.chdir(tmp_path / "new")
    rerun(with_overrides(task, {"workload": {"source": "copy.csv"}}), tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json")} == before


@pytest.mark.parametrize("rerun", RERUNS)
def test_a_workload_that_has_vanished_is_named(
    rerun: Callable[[TaskConfig, Path], None], task: TaskConfig, tmp_path: Path
) -> None:
    rerun(task, tmp_path / "out")
    Path(task.workload.source).unlink()
    with pytest.raises(ServegymError, match=r"w\.csv: no such workload file"):
        rerun(task, tmp_path / "out")


def test_a_workload_that_changes_meanwhile_is_not_mixed_in(
    task: TaskConfig, tmp_path: Path
) -> None:
    source, calls = Path(task.workload.source), 0

    def change(name: str) -> Policy:
        nonlocal calls
        calls += 1
        if calls == 4:  # one call to check the name, then one a case
            source.write_text(OTHER)
        return make_policy(name)

    with pytest.raises(ServegymError, match=r"w\.csv: the workload file has changed while"):
        play_all(task, change, ["fcfs"], range(9), tmp_path / "out", progress=False)
    assert list(pd.read_csv(tmp_path / "out" / "episodes.csv")["seed"]) == [0, 1]
    source.write_text(CSV)
    resumed = play_all(task, make_policy, ["fcfs"], range(9), tmp_path / "out", progress=False)
    assert resumed["makespan_s"].nunique() == 1


def test_a_changed_task_file_is_named_by_its_key(tmp_path: Path) -> None:
    path, out = tmp_path / "t.toml", tmp_path / "out"
    text = '[cluster]\nclients = 3\n[cost]\npreset = "tiny"\n[workload]\nsource = "tiny"\nrequests = 5\n'
    path.write_text(text)
    options = ["--policies", "fcfs", "--seeds", "0", "--jobs", "1", "--output", str(out)]
    assert evaluate.main(["--task", str(path), *options]) == 0
    path.write_text(text.replace("= 3", "= 4"))
    with pytest.raises(
        ServegymError, match=r"another task, setting or version \(clients 3, now 4\)"
    ):
        evaluate.main(["--task", str(path), *options])
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "t.toml").write_text(text)
    options[3] = "0:2"
    assert evaluate.main(["--task", str(tmp_path / "moved" / "t.toml"), *options]) == 0
    assert set(pd.read_csv(out / "episodes.csv")["task"]) == {str(path)}  # one name for one task


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"name": 1}'])
def test_damaged_notes_are_refused(damage: str, task: TaskConfig, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(damage)
    with pytest.raises(ServegymError, match="choose a new --output folder"):
        claim_task(task, tmp_path)


@pytest.mark.parametrize("table", ["episodes.csv", "optima.csv"])
def test_a_table_without_notes_is_refused(table: str, task: TaskConfig, tmp_path: Path) -> None:
    (tmp_path / table).touch()
    with pytest.raises(ServegymError, match=f"holds {table}, but no task.json"):
        claim_task(task, tmp_path)
    assert not (tmp_path / "task.json").exists()


def test_a_workload_without_a_noted_hash_is_refused(task: TaskConfig, tmp_path: Path) -> None:
    claim_task(task, tmp_path)
    notes = json.loads((tmp_path / "task.json").read_text())
    del notes["workload_sha256"]
    (tmp_path / "task.json").write_text(json.dumps(notes))
    with pytest.raises(ServegymError, match=r"w\.csv was not noted"):
        claim_task(task, tmp_path)


def test_weights_that_change_meanwhile_are_refused(tmp_path: Path) -> None:
    weights = weights_of(["ppo", "fcfs"], "Tiny-v0")
    assert make_any_policy("ppo", "Tiny-v0", weights).prepare is not None
    with pytest.raises(ServegymError, match="the weights of 'ppo' have changed while it played"):
        make_any_policy("ppo", "Tiny-v0", {"ppo": "others"})


def test_best_known_schedules_of_other_weights_are_refused(tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    shutil.copytree(RESULTS / "agents" / "Tiny-v0" / "seeds" / "0", agent)
    options = ["--task", "Tiny-v0", "--policies", f"fcfs,{agent}", "--seeds", "0"]
    options += ["--time-limit", "0.01", "--output", str(tmp_path / "out")]
    assert best_known.main(options) == 0
    shutil.rmtree(agent)
    shutil.copytree(RESULTS / "agents" / "Tiny-v0" / "seeds" / "1", agent)
    with pytest.raises(ServegymError, match=r"holds cases of another task, setting or version \(/"):
        best_known.main(options)


def test_an_interrupted_paper_of_another_agent_begins_anew(tmp_path: Path) -> None:
    rows = tmp_path / "study" / "episodes.csv"
    rows.parent.mkdir()
    rows.touch()
    paper.begin(tmp_path, {"ppo": "one"})
    assert not rows.exists()  # the last run had come to its end
    rows.touch()
    paper.begin(tmp_path, {"ppo": "one"})
    assert rows.exists()
    paper.begin(tmp_path, {"ppo": "other"})
    assert not rows.exists()


def committed(name: str) -> list[Any]:
    paths = sorted(RESULTS.rglob(name))
    assert paths
    return [pytest.param(path, id=str(path.parent.relative_to(RESULTS))) for path in paths]


@pytest.mark.parametrize("path", committed("task.json"))
def test_committed_notes_are_accepted_and_left_as_they_are(path: Path, tmp_path: Path) -> None:
    tasks = TASKS | {task.name: task for task in settings().values()}
    task = tasks[json.loads(path.read_text())["name"]]
    (tmp_path / "task.json").write_bytes(path.read_bytes())
    assert claim_task(task, tmp_path) == task
    assert (tmp_path / "task.json").read_bytes() == path.read_bytes()
    (tmp_path / "task.json").unlink()
    claim_task(task, tmp_path)
    made = json.loads((tmp_path / "task.json").read_text())
    assert holds(made, json.loads(path.read_text()))  # later versions note more


def holds(made: Any, noted: Any) -> bool:
    """Whether notes hold all that earlier ones did."""
    if not isinstance(noted, dict):
        return bool(made == noted)
    return all(key in made and holds(made[key], value) for key, value in noted.items())
