"""The hook of a training run, the line of progress, and what is said of the run at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from servegym.agents import Evaluation, Patience, ServingCallback, charts
from servegym.agents.checkpoints import checkpoints
from servegym.agents.early_stopping import says_stop
from servegym.agents.hyperparameters import Options
from servegym.agents.outcome import BEATS, EVEN, LOSES, compare, describe
from servegym.agents.policy import load_agent
from servegym.agents.progress import ProgressLine
from servegym.agents.training import train
from servegym.agents.validation import Validation
from servegym.envs import ServegymError
from servegym.studies.agents import training as studies
from servegym.studies.commands import train as script
from tests.helpers import Terminal, weights
from tests.test_documents import ROOT, blocks
from tests.training_helpers import QUIET, SMALL, TINY

SEEDS = (900_000, 900_001, 900_002)
GAPS = {"hybrid": [0.25, 0.5, 0.75]}
EVERY = 128
EVOLVING = replace(
    SMALL, timesteps=128, evolution_updates=3, evolution_pairs=2, evolution_directions=2
)


@pytest.fixture(autouse=True)
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no pictures: they take longer than all else."""
    monkeypatch.setattr(charts, "to_image", lambda _: np.zeros((1, 1, 3), np.uint8))


def watcher(folder: Path, hook: Callable[[Evaluation], bool | None] | None) -> ServingCallback:
    lines = {"hybrid": {"gap": 0.5}}
    return ServingCallback(
        TINY, SEEDS, EVERY, lines, {}, folder, rule_gaps=GAPS, on_evaluation=hook
    )


def summary(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "summary.json").read_text("utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the run that nobody watches."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return weights(train(TINY, SMALL, folder, options=QUIET))


# The hook


def test_the_hook_is_told_of_each_evaluation_and_changes_no_weights(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    seen: list[Evaluation] = []
    folder = tmp_path / "run"
    watched = train(TINY, SMALL, folder, callbacks=[watcher(folder, seen.append)], options=QUIET)
    assert weights(watched) == whole
    table = pd.read_csv(folder / "evaluations.csv")
    assert [each.number for each in seen] == [0, 1, 2, 3]
    assert [each.last for each in seen] == [False, False, False, True]
    assert {each.total_timesteps for each in seen} == {SMALL.timesteps}
    assert all(each.references == {"hybrid": 50.0} and each.cases == 3 for each in seen)
    for name in ("timesteps", "gap_percent", "gap_percent_sem", "mean_reward"):
        assert [getattr(each, name) for each in seen] == pytest.approx(list(table[name]))
    best = np.minimum.accumulate(table["gap_percent"][1:])  # that of the untrained network is none
    assert np.isnan(seen[0].best_gap_percent)
    assert [each.best_gap_percent for each in seen[1:]] == pytest.approx(list(best))
    assert [each.since_best == 0 for each in seen[1:]] == list(table["gap_percent"][1:] == best)


def test_a_hook_stops_training_and_a_resume_ends_in_the_same_state(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    callback = watcher(folder, lambda evaluation: evaluation.number != 2)
    train(TINY, SMALL, folder, callbacks=[callback], options=QUIET)
    assert list(pd.read_csv(folder / "evaluations.csv")["timesteps"]) == [0, 128, 256]
    assert int(checkpoints(folder / "checkpoints")[-1].stem) == 256
    said = summary(folder)
    assert said["timesteps"] == 256
    assert said["total_timesteps"] == SMALL.timesteps
    assert said["stopped_by_hook"]
    assert said["text"][-1].startswith("stopped by its hook after 256 of 384 timesteps")
    assert load_agent(folder / "final").card.training["timesteps"] > 0
    goes_on = watcher(folder, lambda _: True)
    resumed = train(TINY, SMALL, folder, callbacks=[goes_on], resume=True, options=QUIET)
    assert weights(resumed) == whole
    assert list(pd.read_csv(folder / "evaluations.csv")["timesteps"]) == [0, 128, 256, 384]
    assert not summary(folder)["stopped_by_hook"]


@pytest.mark.parametrize(
    ("answer", "stops"),
    [(False, True), (np.bool_(False), True), (None, False), (True, False), (0.0, False)],
)
def test_which_answers_stop(answer: object, stops: bool) -> None:
    assert says_stop(answer) == stops


class PrunedError(Exception):
    """As Optuna's TrialPruned."""


@pytest.mark.parametrize(("number", "steps"), [(0, 0), (1, 128), (3, 384)])
def test_what_a_hook_raises_leaves_training_once_all_is_saved(
    number: int, steps: int, tmp_path: Path
) -> None:
    def prune(evaluation: Evaluation) -> None:
        if evaluation.number == number:
            raise PrunedError

    folder = tmp_path / "run"
    with pytest.raises(PrunedError):
        train(TINY, SMALL, folder, callbacks=[watcher(folder, prune)], options=QUIET)
    assert int(checkpoints(folder / "checkpoints")[-1].stem) == steps
    assert (folder / "final" / "agent.json").is_file()
    said = summary(folder)
    assert said["timesteps"] == steps
    assert said["stopped_by_hook"] == (steps < SMALL.timesteps)


def test_a_hook_stops_an_evolution_before_its_next_update(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hook = watcher(folder, lambda evaluation: evaluation.timesteps < 128)
    stopped = train(TINY, EVOLVING, folder, callbacks=[hook], options=QUIET)
    assert stopped.num_timesteps == 128
    resumed = train(TINY, EVOLVING, folder, resume=True, options=QUIET)
    assert weights(resumed) == weights(train(TINY, EVOLVING, tmp_path / "whole", options=QUIET))


def test_the_hook_of_the_page_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks(ROOT / "results" / "agents" / "README.md", "python")
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    exec(code.replace("4096", "2048"), {})
    lines = capsys.readouterr().out.splitlines()
    table = pd.read_csv(tmp_path / "evaluations.csv")
    assert [int(line.split()[0]) for line in lines] == list(table["timesteps"])
    assert len(lines) <= 3


def test_patience_ends_a_run_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a learning rate of 0 no evaluation brings a better agent than the first that counts."""
    options = "--task Tiny-v0 --environments 4 --steps 16 --batch-size 64 --learning-rate 0"
    options += " --timesteps 640 --validation-cases 2 --evaluate-every 64 --patience 2"
    folder = tmp_path / "run"
    assert script.main([*options.split(), "--output", str(folder)]) == 0
    assert list(pd.read_csv(folder / "evaluations.csv")["timesteps"]) == [0, 64, 128, 192]
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1:] == summary(folder)["text"]
    assert shown.err.startswith("0 of 640 timesteps: gap ")
    assert ", best 27.34 %, hybrid 20.80 %" in shown.err.splitlines()[1]


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_a_bad_patience_is_refused(number: Any) -> None:
    with pytest.raises(ServegymError, match="a whole number ≥ 1"):
        Patience(number)


def test_a_resumed_run_is_evaluated_as_its_command_asked(tmp_path: Path) -> None:
    """What the command leaves out has the defaults of the run's own hyper-parameters."""
    for timesteps, wanted in ((2_000_000, 250_000), (300_000, 37_500), (1, 1)):
        h = replace(SMALL, timesteps=timesteps)
        assert studies.usual_evaluations(h)["evaluate_every"] == wanted
    record = {"task": {}, "observation_version": 1, "command": "servegym train --task Tiny-v0"}
    recorded = {"evolution_updates": 1, "timesteps": 4000, "batch_size": 64}
    (tmp_path / "run.json").write_text(json.dumps(record | {"hyperparameters": recorded}))
    args = script.read_args(["--output", str(tmp_path), "--resume"])
    assert (args.validation_cases, args.evaluate_every) == (300, 500)


# The outcome


def test_the_best_agent_is_compared_with_the_rules_case_by_case(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    callback = watcher(folder, None)
    train(TINY, SMALL, folder, callbacks=[callback], options=QUIET)
    played = Validation(TINY, SEEDS).play(load_agent(folder / "agent").network.best)
    points = 100 * (played.episodes["gap"] - np.array(GAPS["hybrid"]))
    (rule,) = summary(folder)["rules"]
    assert rule["difference_points"] == pytest.approx(points.mean())
    half = 4.302652729911275 * points.std(ddof=1) / np.sqrt(3)  # Student's t of 2 degrees, 97.5 %
    assert rule["interval_points"] == pytest.approx(half)
    assert rule["gap_percent"] == 50.0
    assert summary(folder)["text"] == callback.outcome
    assert callback.outcome[1].endswith("3 validation cases, 95 % intervals of paired differences")


@pytest.mark.parametrize(
    ("gaps", "rule", "verdict", "words"),
    [
        ([0.01, 0.02], [0.06, 0.07], BEATS, "it beats x (6.50 %) by 5.00 ± 0.00 points; 2 "),
        ([0.06, 0.07], [0.01, 0.02], LOSES, "it loses to x (1.50 %) by 5.00 ± 0.00 points; 2 "),
        ([0.01, 0.02], [0.02, 0.01], EVEN, "x (1.50 %; difference +0.00 ± 12.71 points); 2 "),
        ([0.01], [0.06], EVEN, "x (6.00 %; difference -5.00 points); 1 validation cases, one case"),
    ],
)
def test_verdicts(gaps: list[float], rule: list[float], verdict: str, words: str) -> None:
    (found,) = compare(np.array(gaps), {"x": rule})
    assert found.verdict == verdict
    assert words in describe([found])
    assert describe([]) == ""


# The line of progress


def test_a_terminal_gets_a_bar_with_gap_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with ProgressLine(1000, 0, "timesteps", "gap 60.00 %") as line:
        line.update(500, "gap 2.31 %, best 2.10 %, hybrid 6.70 %")
    assert "gap 60.00 %" in terminal.text
    last = terminal.text.split("\r")[-1]
    assert last.startswith("timesteps 50%|") or "timesteps:  50%|" in last
    assert "500/1.00k" in last
    assert "left, gap 2.31 %, best 2.10 %, hybrid 6.70 %" in last


def test_a_log_gets_a_line_for_each_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(1000, 0, "timesteps", "gap 60.00 %") as line:
        for done in range(100, 1001, 100):
            line.update(100, f"gap {1 + done // 500:.2f} %")
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "0 of 1,000 timesteps: gap 60.00 %"
    assert [text.split(",")[0] for text in shown[1:]] == ["100 of 1", "500 of 1", "1"]
    assert "left: gap 2.00 %" in shown[2]


def test_a_log_without_evaluations_gets_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(1000, 0, "timesteps") as line:
        for _ in range(100):
            line.update(10, "", "return -3.000")
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 10
    assert all(text.endswith("return -3.000") for text in shown)
    with ProgressLine(1000, 0, "timesteps", "gap", shown=False) as line:
        line.update(1000, "other")
    assert capsys.readouterr().err == ""


def test_options_may_silence_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(TINY, replace(SMALL, timesteps=64), tmp_path / "run", options=Options(progress=False))
    assert capsys.readouterr().err == ""
