"""Tuned numbers: those of results/tuning, and the policies that they name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from servegym.envs.task.registered import load_task
from servegym.studies.agents.play import BASELINES, baselines
from servegym.studies.tuned import TUNED, thresholds, tuned_multiplier, with_tuned

RESULTS = Path(__file__).parents[1] / "results"


def test_the_tuned_tasks_are_those_of_the_results() -> None:
    assert set(TUNED) == {path.name for path in (RESULTS / "tuning").iterdir()}


@pytest.mark.parametrize("task", TUNED)
def test_tuned_numbers_are_those_of_the_tuning(task: str) -> None:
    text = (RESULTS / "tuning" / task / "tuning.md").read_text()
    best = re.findall(r"^\| ([a-z-]+) +\| \1-([\d.]+) ", text, re.MULTILINE)
    assert TUNED[task] == {family: float(number) for family, number in best}


@pytest.mark.parametrize("task", TUNED)
def test_every_threshold_that_is_tried_was_tuned(task: str) -> None:
    tried = pd.read_csv(RESULTS / "tuning" / task / "tuning.csv")["policy"]
    assert thresholds(200) == [name for name in tried if name.startswith("threshold-")]


def test_thresholds_are_in_proportion_to_the_clients() -> None:
    assert thresholds(20) == [f"threshold-{k}" for k in (1, 2, 3, 4, 6, 10)]
    assert thresholds(2000)[-1] == "threshold-1000"


def test_a_star_stands_for_the_tuned_number() -> None:
    names = ("fcfs", "hybrid", "hybrid-*", "threshold-*", "aligned-*")
    assert with_tuned("GSM8K-v0", names) == (
        "fcfs", "hybrid", "hybrid-0.2", "threshold-12", "aligned",
    )  # fmt: skip
    assert with_tuned("Paper-v0", ["threshold-*"]) == ("threshold-1",)


def test_where_nothing_was_tuned_the_multiplier_is_one() -> None:
    assert tuned_multiplier(load_task("Tiny-v0"), "hybrid") == 1
    assert tuned_multiplier(load_task("GSM8K-v0"), "feedback") == 1
    assert tuned_multiplier(load_task("Paper-v0"), "hybrid") == 0.01


@pytest.mark.parametrize("task", [*BASELINES, "Tiny-v0"])
def test_the_baselines_are_those_of_the_committed_episodes(task: str) -> None:
    played = dict.fromkeys(pd.read_csv(RESULTS / "agents" / task / "episodes.csv")["policy"])
    rules = [name for name in played if name in baselines(task)]
    assert rules == list(baselines(task))


def test_no_results_are_needed_to_import_the_studies(tmp_path: Path) -> None:
    """As in an installed package: every module below servegym.studies, from a copy without results."""
    code = f"""
import sys
from importlib import import_module
from pathlib import Path
import servegym.studies
root = Path({str(tmp_path / "studies")!r})
servegym.studies.__path__[:] = [str(root)]
for path in sorted(root.rglob("*.py")):
    name = ".".join(("servegym.studies", *path.relative_to(root).with_suffix("").parts))
    module = import_module(name.removesuffix(".__init__"))
    assert module.__name__ == "servegym.studies" or module.__file__ == str(path), module
"""
    shutil.copytree(RESULTS.parent / "scripts" / "studies", tmp_path / "studies")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
