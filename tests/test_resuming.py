"""Resumed training ends in the same bits; checkpoints and folders of other runs are refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from servegym.agents import record
from servegym.agents.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from servegym.agents.record import identity
from servegym.agents.training import make_model, train
from servegym.envs import ServegymError
from servegym.envs.task.registered import TASKS
from servegym.envs.vector_env import ServingVectorEnv
from tests.helpers import changed, weights
from tests.training_helpers import (
    QUIET,
    SMALL,
    TINY,
    StopAt,
    prefer_prefill,
    refusal,
    some_reference,
)


@pytest.mark.parametrize("algorithm", ["ppo", "maskable-ppo"])
def test_resumed_training_ends_in_the_same_weights(algorithm: str, tmp_path: Path) -> None:
    """Stopped after an imitated start, inside the value warm-up, then once more, later."""
    h = replace(
        SMALL,
        algorithm=algorithm,
        value_warmup=3,
        imitation_rounds=2,
        imitation_states=40,
        imitation_environments=4,
        imitation_batch_size=16,
        imitation_epochs=2,
    )
    h = replace(h, reference="made up")
    task = changed(TINY, process={"max_decisions": 4})  # truncation bootstraps from the critic
    whole = train(
        *(task, h, tmp_path / "whole"),
        expert=prefer_prefill,
        reference=some_reference,
        options=QUIET,
    )
    folder = tmp_path / "stopped"
    for stop in (2 * 64 + 20, 5 * 64 + 60):
        with pytest.raises(KeyboardInterrupt):
            train(
                task,
                h,
                folder,
                callbacks=[StopAt(stop)],
                expert=prefer_prefill,
                reference=some_reference,
                resume=folder.exists(),
                options=QUIET,
            )
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002 (whatever else draws from the global generators)
    assert len(checkpoints(folder / "checkpoints")) == 2
    # No expert is needed: the checkpoint is of after the imitation.
    resumed = train(task, h, folder, reference=some_reference, resume=True, options=QUIET)
    assert resumed.num_timesteps == whole.num_timesteps == 6 * 64
    assert weights(resumed) == weights(whole)
    ends = [load_file(checkpoints(f / "checkpoints")[-1]) for f in (tmp_path / "whole", folder)]
    assert ends[0].keys() == ends[1].keys()
    for name, array in ends[0].items():
        assert array.tobytes() == ends[1][name].tobytes(), name


def test_resume_before_the_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    h = replace(SMALL, imitation_rounds=1, imitation_states=8, imitation_environments=4)

    def killed(_: ServingVectorEnv) -> NDArray[np.float64]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, h, tmp_path / "run", expert=killed, options=QUIET)
    resumed = train(TINY, h, tmp_path / "run", expert=prefer_prefill, resume=True, options=QUIET)
    whole = train(TINY, h, tmp_path / "whole", expert=prefer_prefill, options=QUIET)
    assert weights(resumed) == weights(whole)


def test_a_time_limit_stops_after_a_rollout_and_can_be_gone_on_from(tmp_path: Path) -> None:
    soon = replace(QUIET, max_minutes=1e-9)
    assert train(TINY, SMALL, tmp_path / "run", options=soon).num_timesteps == 64
    resumed = train(TINY, SMALL, tmp_path / "run", resume=True, options=QUIET)
    assert weights(resumed) == weights(train(TINY, SMALL, tmp_path / "whole", options=QUIET))


# Checkpoints and folders that do not fit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short finished run of SMALL."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(TINY, replace(SMALL, timesteps=64), folder, options=QUIET)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(folder: Path, task: Any = TINY, **other: Any) -> OnPolicyAlgorithm:
    h = replace(SMALL, **{"timesteps": 64, **other})
    return train(task, h, folder, resume=True, options=QUIET)


def test_a_finished_run_is_resumed_without_another_step(run: Path) -> None:
    unfinished = run / "checkpoints" / ".000000000064.safetensors.1.tmp"
    unfinished.touch()
    assert resume(run).num_timesteps == 64
    assert not unfinished.exists()


def test_runs_of_others_are_not_resumed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServegymError, match=r"a run with name 'servegym/Tiny-v0', this one has"):
        resume(run, task=TASKS["servegym/Paper-v0"])
    with pytest.raises(ServegymError, match=r"a run with learning_rate 0\.001, this one has 0\.5"):
        resume(run, learning_rate=0.5)
    monkeypatch.setattr(record, "OBSERVATION_VERSION", 0)
    with pytest.raises(ServegymError, match="observation_version"):
        resume(run)


def test_a_run_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match="--resume"):
        train(TINY, SMALL, run, options=QUIET)
    (run / "run.json").unlink()
    with pytest.raises(ServegymError, match="not empty"):
        train(TINY, SMALL, run, options=QUIET)
    with pytest.raises(ServegymError, match="holds no run"):
        train(TINY, SMALL, tmp_path / "none", resume=True, options=QUIET)
    (run / "run.json").write_text("[]")
    with pytest.raises(ServegymError, match="not the record"):
        resume(run)


def test_damaged_checkpoints_are_refused(run: Path) -> None:
    path = checkpoints(run / "checkpoints")[-1]
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b""):
        path.write_bytes(damaged)
        with pytest.raises(ServegymError, match="damaged") as caught:
            resume(run)
        assert "\n" not in str(caught.value)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ServegymError, match="not a servegym checkpoint"):
        resume(run)
    path.unlink()
    assert resume(run).num_timesteps == 64  # from the one before


def test_a_checkpoint_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    for h, words in ((replace(SMALL, timesteps=64, width=9), "width 9"), (SMALL, "timesteps 384")):
        model = make_model(TINY, h).learn(1)
        path = save_checkpoint(model, identity(TINY, h), tmp_path / words)
        target = checkpoints(run / "checkpoints")[-1]
        target.write_bytes(path.read_bytes())
        with pytest.raises(ServegymError, match=words):
            resume(run)


def test_a_checkpoint_that_lies_about_its_run_is_refused(tmp_path: Path) -> None:
    """The identity agrees, the arrays do not fit: the error is one line."""
    expected = identity(TINY, SMALL)
    for other in (replace(SMALL, width=9), replace(SMALL, environments=2)):
        path = save_checkpoint(make_model(TINY, other).learn(1), expected, tmp_path)
        with pytest.raises(ServegymError, match=r"damaged|other environments") as caught:
            load_checkpoint(make_model(TINY, SMALL), expected, path)
        assert "\n" not in str(caught.value)


# The same from the command line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "holds a run; go on with it by --resume, or name another"),
        (("--resume", "--task", "Paper-v0"), "a run with name 'servegym/Tiny-v0', this one has"),
        (("--resume", "--width", "9"), "a run with width 8, this one has 9"),
    ],
)
def test_folders_of_other_runs(
    options: Sequence[str], words: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)
    monkeypatch.setitem(sys.modules, "servegym.agents.training", None)
    assert words in refusal(["--output", str(run), "--task", "Tiny-v0", *options])
    assert contents(run) == before


def test_a_truncated_checkpoint_from_the_command_line(run: Path) -> None:
    path = checkpoints(run / "checkpoints")[-1]
    path.write_bytes(path.read_bytes()[:1000])
    before = contents(run)
    options = ["--task", "Tiny-v0", "--output", str(run), "--resume", "--validation-cases", "0"]
    words = refusal(options)
    assert "delete it to go on from the one before" in words
    assert contents(run) == before


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        '{"task": {}, "hyperparameters": 3, "observation_version": 2, "command": "x"}',
    ],
)
def test_a_damaged_record_from_the_command_line(record: str, run: Path) -> None:
    (run / "run.json").write_text(record)
    assert "run.json" in refusal(["--output", str(run), "--resume"])


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
