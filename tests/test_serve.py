"""``scripts/serve.py``: what it refuses before anything is made, and how it ends when it is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from servegym.engines.iterations import next_in_lockstep
from servegym.envs import ServegymError
from servegym.studies.commands import serve

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FEW = ["--requests", "3", "--clients", "2"]


def run(output: Path, *options: str) -> int:
    return serve.main([*FEW, "--output", str(output), *options])


def files(output: Path) -> list[str]:
    return sorted(str(each.relative_to(output)) for each in output.rglob("*") if each.is_file())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "Chat-v0"], "a twin has no limit of KV memory"),
        (["--task", "Cluster-v0"], "a twin has one replica"),
        (["--model", "smollm2"], "take --task GSM8KPredicted-v0"),
        (["--model", "nowhere"], "no such folder"),
        (["--clock", "wall", "--compare", "fcfs,ppo"], "take --clock busy"),
        (["--port", "8000"], "leave out --requests"),
        (["--prompts", __file__], "tiny has none"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_a_folder_is_made(
    tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ServegymError, match=message):
        run(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Let the given step of all engines end with an error."""
    steps = iter(range(step))

    def advance(engines: Any) -> Any:
        if next(steps, None) is None:
            raise error
        return next_in_lockstep(engines)

    monkeypatch.setattr("servegym.studies.commands.serve.next_in_lockstep", advance)


@pytest.mark.parametrize("step", [0, 1, 9])
def test_an_interruption_leaves_records_of_all_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """After the first step the second engine has not seen its requests yet."""
    stop_at(monkeypatch, step, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="interrupted; records so far are in"):
        run(tmp_path, "--compare", "fcfs,hybrid")
    folders = ("iterations", "records")
    assert files(tmp_path) == [f"{f}/{p}-0.csv" for f in folders for p in ("fcfs", "hybrid")]


def test_a_fault_leaves_no_records_that_look_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 1, ServegymError("no plan"))
    with pytest.raises(ServegymError, match="no plan"):
        run(tmp_path, "--compare", "fcfs,hybrid")
    assert files(tmp_path) == []
