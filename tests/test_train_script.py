"""The script train.py: options, refusals, Ctrl-C and kills."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest

from servegym.agents import record, training
from servegym.agents.checkpoints import checkpoints, load_checkpoint
from servegym.agents.hyperparameters import Hyperparameters, default_hyperparameters
from servegym.agents.record import identity
from servegym.agents.training import make_model
from servegym.envs import ServegymError
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from servegym.studies.agents.algorithms import algorithm_of
from servegym.studies.agents.train_calendar import CalendarArgs
from servegym.studies.agents.training import references
from servegym.studies.cli import run as run_script
from servegym.studies.commands import train as script
from tests.training_helpers import QUIET, SMALL, TINY, StopAt, refusal

ROOT = Path(__file__).resolve().parent.parent


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("--task", "Tiny-v0", "--environments", "4", "--steps", "16", "--batch-size", "64"),
        *("--validation-cases", "0", "--output", str(folder), *more),
    ]


def test_train_and_resume_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert script.main(arguments(folder, "--timesteps", "128", "--epochs", "2")) == 0
    content = json.loads((folder / "run.json").read_text())
    assert content["hyperparameters"]["epochs"] == 2
    assert content["hyperparameters"]["width"] == default_hyperparameters(TINY.name).width
    assert "--epochs 2" in content["command"]
    assert list((folder / "tensorboard").glob("events.*"))
    # Options that are not given are those of the run.
    assert script.main(["--output", str(folder), "--resume"]) == 0
    assert "128 timesteps" in capsys.readouterr().out
    with pytest.raises(ServegymError, match="epochs 2, this one has 3"):
        script.main(["--output", str(folder), "--resume", "--epochs", "3"])


@pytest.mark.parametrize(
    ("bad", "words", "good"),
    [
        (("--algorithm", "maskableppo"), "did you mean 'maskable-ppo'", ("--algorithm", "ppo")),
        (("--algorithm", "dqn"), "choose from calendar, maskable-ppo", ("--algorithm", "ppo")),
        (("--stages", "9"), "unknown option '--stages'", ()),
        (("--task", "GSM8k"), "did you mean 'GSM8K-v0'", ("--task", "GSM8K-v0")),
        (("--task", "missing.toml"), "no such task file", ("--task", "servegym/Tiny-v0")),
        (("--learning-rat", "1"), "did you mean '--learning-rate'", ("--learning-rate", "1")),
        (("--learning-rate", "nan"), "learning_rate must be a number", ("--learning-rate", "0")),
        (("--timesteps", "many"), "many", ("--timesteps", "1")),
        (("--timesteps", "1e6"), "not a whole number: '1e6'", ("--timesteps", "1000000")),
        (("--timesteps", "0"), "timesteps must be a whole number in 1", ("--timesteps", "1")),
        (("--seed", "800"), "seed must be a whole number in 0 … 799", ("--seed", "799")),
        (("--evaluate-every", "0"), "--evaluate-every must be", ("--evaluate-every", "1")),
        (("--patience", "-1"), "--patience must be ≥ 0", ("--patience", "1")),
        (("--validation-cases", "-1"), "--validation-cases must", ("--validation-cases", "0")),
        (("--checkpoint-every", "0"), "checkpoint_every must be", ("--checkpoint-every", "1")),
        (("--max-minutes", "nan"), "--max-minutes must be a finite number", ("--max-minutes", "0")),
        (("--threads", "0"), "threads must lie", ("--threads", "1")),
        (("--expert", "algined"), "did you mean 'aligned'", ("--expert", "lookahead-0.7")),
        (("--resume",), "holds no run to resume", ()),
    ],
)
def test_bad_options(
    bad: Sequence[str],
    words: str,
    good: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before torch is imported, with nothing written; the nearest valid option is taken."""
    common = ["--algorithm", "maskable-ppo", "--validation-cases", "0"]
    common += ["--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "servegym.agents.training", None)  # importing it fails
        assert words in refusal([*common, *bad])
    assert not (tmp_path / "run").exists()
    begun = Mock()
    monkeypatch.setattr(training, "train", begun)
    assert script.main([*common, *good]) == 0
    begun.assert_called_once()


def test_ctrl_c_leaves_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt = StopAt(20)
    monkeypatch.setattr(script, "make_callbacks", lambda *_, **__: [interrupt])
    with pytest.raises(SystemExit) as caught:
        run_script(script.main, arguments(tmp_path / "run"))
    assert caught.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--output {tmp_path / 'run'} --resume" in last
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "000000000000.safetensors"
    ]


def test_a_folder_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Mock(wraps=record.check_run)
    for module in (script, training):
        monkeypatch.setattr(module, "check_run", check)
    folder = tmp_path / "run"
    begun, resumed = arguments(folder, "--timesteps", "64"), ["--resume", "--output", str(folder)]
    for calls, options in ((1, begun), (2, resumed)):
        assert script.main(options) == 0
        assert check.call_count == calls
    training.train(TINY, SMALL, tmp_path / "other", options=QUIET)
    assert check.call_count == 3


def test_killed_training_leaves_a_checkpoint_to_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("--timesteps", "100000000", "--checkpoint-every", "1")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments(folder, *more)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    patience = time.monotonic() + 60
    while _steps(folder) < 256 and process.poll() is None:
        assert time.monotonic() < patience
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
    saved = checkpoints(folder / "checkpoints")
    # A temporary file may be left, and one checkpoint more if it was killed before forgetting it.
    assert 2 <= len(saved) <= 3
    h = Hyperparameters(**json.loads((folder / "run.json").read_text())["hyperparameters"])
    model = make_model(TINY, h)
    load_checkpoint(model, identity(TINY, h), saved[-1])
    assert model.num_timesteps == int(saved[-1].stem) >= 256


def _steps(folder: Path) -> int:
    paths = checkpoints(folder / "checkpoints")
    return int(paths[-1].stem) if paths else -1


def test_references_admit_by_rules_that_the_agent_lacks() -> None:
    task = with_overrides(TASKS["servegym/Tiny-v0"], {"process": {"rules": ["fcfs"]}})
    names = list(references(task, [900_000]))
    assert names[0] == "hybrid"
    assert names[1].startswith("threshold-")


@pytest.mark.parametrize(
    ("words", "learner"),
    [
        ("", "calendar"),  # the usual one of the usual task
        ("--seed 3 --output runs/a --help", "calendar"),
        ("--task GSM8K-v0", "calendar"),
        ("--task servegym/GSM8K-v0", "calendar"),
        ("--task Tiny-v0", "maskable-ppo"),
        ("--task=GSM8KPredicted-v0", "maskable-ppo"),
        ("--algorithm ppo", "ppo"),
        ("--algorithm=calendar --task Tiny-v0", "calendar"),
        ("--algorithm ppo --algorithm calendar", "calendar"),
        # Options that only one learner has choose it.
        ("--timesteps 300000", "maskable-ppo"),
        ("--evaluate_every 3 --imitation_rounds 1", "maskable-ppo"),
        ("--hyperparameters best.toml", "maskable-ppo"),
        ("--task Tiny-v0 --stages=9", "calendar"),
        # … mistyped, too: that learner refuses them.
        ("--timestep 300000", "maskable-ppo"),
        ("--task Tiny-v0 --generation 9", "calendar"),
    ],
)
def test_which_learner_is_run(words: str, learner: str) -> None:
    assert algorithm_of(words.split(), script.Args, CalendarArgs, "GSM8K-v0") == learner


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--timesteps 9 --stages 9", "--timesteps is an option of maskable-ppo, --stages one of"),
        ("--algorithm calender", "did you mean 'calendar'"),
        ("--task GSM8k", "did you mean 'GSM8K-v0'"),
        ("--task Chat-v0 --algorithm calendar", "are present at t = 0"),
        ("--task GSM8KPredicted-v0 --stages 9", "where output lengths are known"),
        ("--generations 0", "generations must lie in 1"),
        ("--validation-cases 0", "--validation-cases must lie in 1"),
        ("--algorithm calendar --timesteps 9", "unknown option '--timesteps'"),
    ],
)
def test_bad_options_of_the_calendar(words: str, message: str, tmp_path: Path) -> None:
    assert message in refusal([*words.split(), "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_is_resumed_by_its_own_learner(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"algorithm": "calendar"}))
    words = ["--resume", "--output", str(tmp_path)]
    assert algorithm_of(words, script.Args, CalendarArgs, "GSM8K-v0") == "calendar"
    (tmp_path / "run.json").write_text("{")
    assert algorithm_of(words, script.Args, CalendarArgs, "GSM8K-v0") == "maskable-ppo"
    assert "go on with a copy of it" in refusal(words)
    search = {"task": {}, "algorithm": "calendar", "search": {}, "command": "train"}
    (tmp_path / "run.json").write_text(json.dumps(search))
    assert "of another learner" in refusal([*words, "--algorithm", "ppo"])
