"""Tuned numbers: those of results/tuning, and the policies that they name."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

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


@pytest.fixture
def without_studies() -> Iterator[None]:
    """As if no module of servegym.studies were imported yet."""

    def taken_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if f"{name}.".startswith("servegym.studies.")]
        return {name: sys.modules.pop(name) for name in names}

    before = taken_out()
    yield
    taken_out()
    sys.modules.update(before)


@pytest.mark.usefixtures("without_studies")
def test_no_results_are_needed_to_import_the_studies(tmp_path: Path) -> None:
    """As in an installed package: every module below servegym.studies, from a copy without results."""
    root = tmp_path / "studies"
    shutil.copytree(RESULTS.parent / "scripts" / "studies", root)
    spec = spec_from_file_location("servegym.studies", root / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["servegym.studies"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)
    for path in sorted(root.rglob("*.py")):
        name = ".".join(("servegym.studies", *path.relative_to(root).with_suffix("").parts))
        assert import_module(name.removesuffix(".__init__")).__file__ == str(path)
