"""Files of hyper-parameters: what is read and written, what is refused, and train --hyperparameters."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from servegym.agents.hyperparameter_files import read_hyperparameters, write_hyperparameters
from servegym.agents.hyperparameters import Hyperparameters, default_hyperparameters
from servegym.envs import ServegymError
from servegym.studies.commands.train import main as train
from servegym.studies.commands.train import read_args
from tests.training_helpers import refusal

GSM8K = "servegym/GSM8K-v0"


@pytest.mark.parametrize("name", ["all.toml", "all.json"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    values = asdict(
        Hyperparameters(learning_rate=1 / 3, expert="hybrid(memory=1)", reference="lpt")
    )
    write_hyperparameters(tmp_path / name, values, "Two lines\nof a comment")
    assert read_hyperparameters(tmp_path / name) == values


def test_whole_numbers_may_stand_for_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("gamma = 1\nwidth = 32\n")
    read = read_hyperparameters(tmp_path / "a.toml")
    assert [(type(value), value) for value in read.values()] == [(float, 1.0), (int, 32)]


BAD: list[tuple[str, str, str, str]] = [
    ("a.toml", "widht = 64", "did you mean 'width'?", "width = 64"),
    (
        "a.toml",
        "width = 64.0",
        "width must be a whole number in 1 … 8192, got 64.0",
        "width = 8192",
    ),
    ("a.toml", "width = true", "width must be a whole number", "width = 1"),
    ("a.toml", f"width = 1{'0' * 400}", "width must be a whole number", "width = 2"),
    ("a.toml", "gamma = nan", "gamma must be a number in 0 … 1, got nan", "gamma = 0"),
    ("a.toml", "gamma = inf", "gamma must be a number in 0 … 1", "gamma = 1"),
    ("a.toml", "gamma = '1'", "gamma must be a number in 0 … 1, got '1'", "gamma = 1.0"),
    ("a.toml", "expert = 3", "expert must be a text, got 3", "expert = 'hybrid'"),
    ("a.toml", "algorithm = 'dqn'", "choose from maskable-ppo, ppo", "algorithm = 'ppo'"),
    ("a.toml", "imitate = 'rules'", "did you mean 'rule'?", "imitate = 'rule'"),
    ("a.toml", "[ppo]\nwidth = 64", "unknown hyper-parameter 'ppo'", "width = 64"),
    ("a.toml", "width: 64", "not TOML", "width=64"),
    ("a.json", "{", "not JSON", "{}"),
    ("a.json", "[1]", "must hold a table of hyper-parameters, got [1]", '{"width": 1}'),
    ("a.json", '{"gamma": NaN}', "gamma must be a number in 0 … 1", '{"gamma": 1}'),
    ("a.json", '{"width": null}', "width must be a whole number in 1", '{"width": 3}'),
]


@pytest.mark.parametrize(("name", "text", "words", "good"), BAD)
def test_bad_files(name: str, text: str, words: str, good: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    line = refusal(["--hyperparameters", str(tmp_path / name), "--output", str(tmp_path / "run")])
    assert words in line
    assert str(tmp_path / name) in line
    assert not (tmp_path / "run").exists()
    (tmp_path / name).write_text(good)
    read_hyperparameters(tmp_path / name)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match="no such file of hyper-parameters"):
        read_hyperparameters(tmp_path / "none.toml")
    with pytest.raises(ServegymError, match="is a folder, not a file of hyper-parameters"):
        read_hyperparameters(tmp_path)


def test_train_takes_a_file_between_defaults_and_options(tmp_path: Path) -> None:
    path = tmp_path / "best.toml"
    usual = read_args(["--task", "GSM8K-v0"])
    path.write_text("epochs = 7\nwidth = 32\n")
    args = read_args(["--task", "GSM8K-v0", "--hyperparameters", str(path), "--width", "16"])
    assert (args.epochs, args.width, args.batch_size) == (7, 16, usual.batch_size)
    # Timesteps of the file count as those of the option: fewer environments, a smaller batch.
    path.write_text("timesteps = 300000\n")
    short = default_hyperparameters(GSM8K, 300_000)
    args = read_args(["--hyperparameters", str(path)])
    assert (args.environments, args.batch_size) == (short.environments, short.batch_size)
    assert args.evaluate_every == 300_000 // 8
    path.write_text("timesteps = 300000\nenvironments = 20\nsteps = 64\n")
    args = read_args(["--hyperparameters", str(path), "--timesteps", "100000"])
    assert (args.timesteps, args.environments, args.batch_size) == (100_000, 20, 320)
    path.write_text("environments = 2\nsteps = 8\nbatch_size = 16\n")
    assert read_args(["--hyperparameters", str(path)]).batch_size == 16
    with pytest.raises(ServegymError, match=r"batch_size must be at most .* 8, got 16"):
        read_args(["--hyperparameters", str(path), "--environments", "1"])


def test_a_run_with_a_file_is_resumed_without_it(tmp_path: Path) -> None:
    path, folder = tmp_path / "best.json", str(tmp_path / "run")
    sizes: dict[str, Any] = {"environments": 4, "steps": 16, "width": 8, "timesteps": 64}
    path.write_text(json.dumps(sizes | {"epochs": 1}))
    words = ["--task", "Tiny-v0", "--validation-cases", "0", "--output", folder]
    assert train([*words, "--hyperparameters", str(path)]) == 0
    recorded = json.loads((tmp_path / "run/run.json").read_text())["hyperparameters"]
    assert {key: recorded[key] for key in sizes} == sizes
    resumed = ["--output", folder, "--resume", "--hyperparameters", str(path)]
    assert train(resumed) == 0
    path.write_text('{"epochs": 2}')
    with pytest.raises(ServegymError, match="epochs 1, this one has 2"):
        train(resumed)
    path.unlink()
    with pytest.raises(ServegymError, match="no such file of hyper-parameters"):
        train(resumed)
    assert train(resumed[:3]) == 0
