"""State that training reads back: for any damage one line names the file and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from servegym.agents.card import CARD_FILE, WEIGHTS_FILE
from servegym.agents.checkpoints import load_checkpoint, save_checkpoint
from servegym.agents.hyperparameters import Hyperparameters
from servegym.agents.policy import load_agent
from servegym.agents.record import begin_run, identity
from servegym.agents.training import make_model
from servegym.envs.errors import ServegymError
from servegym.envs.task.registered import TASKS
from servegym.studies.cli import SCRIPTS
from servegym.studies.cli import run as run_script
from servegym.studies.commands import train as script
from servegym.studies.robustness.damaged_files import BYTES, PLACES, TENSORS, damage

TINY = TASKS["servegym/Tiny-v0"]
SMALL = Hyperparameters(environments=2, steps=16, batch_size=16, epochs=1, width=4, timesteps=32)
SHIPPED = SCRIPTS.parent / "results" / "agents" / "Tiny-v0"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one rollout."""
    model = make_model(TINY, SMALL).learn(1)
    return save_checkpoint(model, identity(TINY, SMALL), tmp_path_factory.mktemp("good"))


def load(path: Path) -> None:
    load_checkpoint(make_model(TINY, SMALL), identity(TINY, SMALL), path)


def refusal(path: Path) -> str:
    with pytest.raises(ServegymError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith("; delete it to go on from the one before")
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("kind", [*BYTES, *PLACES, *TENSORS])
def test_damaged_checkpoints(good: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / good.name
    path.write_bytes(good.read_bytes())
    load(path)
    for seed in range(2):
        path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
        path.write_bytes(good.read_bytes())
        damage(path, kind, np.random.default_rng(seed))
        refusal(path)


def test_a_changed_number_is_seen(good: Path, tmp_path: Path) -> None:
    """A whole file with another number: a run that went on from it could crash or learn nonsense."""
    with safe_open(good, framework="numpy") as file:
        header = file.metadata()
    arrays = load_file(good)
    name = next(name for name in arrays if name.startswith("rows.") and arrays[name].size)
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(-1)[0] ^= 1
    path = tmp_path / good.name
    save_file(arrays, path, header)
    assert "damaged (its SHA-256 differs)" in refusal(path)


def test_checkpoints_of_before_the_hash_are_read(good: Path, tmp_path: Path) -> None:
    with safe_open(good, framework="numpy") as file:
        header = file.metadata()
    header.pop("sha256")
    path = tmp_path / good.name
    save_file(load_file(good), path, header)
    load(path)


def changed(**values: Any) -> Callable[[dict[str, Any]], str]:
    return lambda record: json.dumps(record | values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: "", "line 1: not JSON"),
        (lambda record: "[" * 100_000, "not JSON that can be read"),
        (lambda record: "9" * 100_000, "not JSON that can be read"),
        (lambda record: json.dumps([record]), "not the record of a run"),
        (lambda record: "null", "not the record of a run"),
        (changed(task=None), "not the record of a run"),
        (changed(command=7), "not the record of a run"),
        (changed(command="python scripts/train.py --task 'Tiny-v0"), "No closing quotation"),
        (changed(command="python scripts/train.py --tusk Tiny-v0"), "unknown option '--tusk'"),
        (changed(command="python scripts/train.py --seed x"), "--seed"),
        (changed(hyperparameters={"seed": "x"}), "seed must be a whole number"),
        (changed(hyperparameters={"steps": None}), "steps must be a whole number"),
        (changed(hyperparameters={"learning_rate": 1e999}), "learning_rate must be a number"),
    ],
)
def test_damaged_records(
    change: Callable[[dict[str, Any]], str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = "python scripts/train.py --task Tiny-v0"
    begin_run(TINY, replace(SMALL, seed=1), tmp_path, command, resume=False)
    path = tmp_path / "run.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(SystemExit) as stop:
        run_script(script.main, ["--resume", "--output", str(tmp_path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{path}: " in message
    assert words in message
    assert "begin a run in another folder" in message


@pytest.mark.parametrize("file", [CARD_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", list(PLACES))
def test_agents_that_are_no_files(file: str, kind: str, tmp_path: Path) -> None:
    for name in (CARD_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    load_agent(tmp_path)
    damage(tmp_path / file, kind, np.random.default_rng(0))
    with pytest.raises(ServegymError) as error:
        load_agent(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}: ")
