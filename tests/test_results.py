"""Published numbers agree: README, results/, and constants taken from them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from servegym.baselines.registry import make_policy
from servegym.envs.machine.presets import PAPER_ROUND_S
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case, play
from servegym.envs.playing.summary import summarise, to_markdown
from servegym.envs.task.registered import PAPER_CASE_SEED, TASKS
from servegym.studies.commands.calibrate import PAPER_BASELINE_S
from servegym.studies.commands.draw_model import IDLE_CLIENTS, SEED, TASK, play_episode
from servegym.studies.commands.paper import (
    LEARNED,
    OTHERS,
    PUBLISHED,
    STEPS,
    report,
    short_report,
)
from servegym.studies.commands.readme import with_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAPER = TASKS["servegym/Paper-v0"]


def test_readme_shows_the_tables_as_they_are() -> None:
    text = (ROOT / "README.md").read_text()
    assert with_tables(text, ROOT) == text


def test_the_paper_table_follows_from_its_episodes() -> None:
    case = pd.read_csv(RESULTS / "paper/case/episodes.csv")
    study = pd.read_csv(RESULTS / "paper/study/episodes.csv")
    assert report(case, study) == (RESULTS / "paper/table.md").read_text()
    assert short_report(case, study) == (RESULTS / "paper/short.md").read_text()
    assert set(study["policy"]) == {*STEPS, *OTHERS, *LEARNED}
    assert study.groupby("policy")["seed"].nunique().eq(100).all()
    assert study["seed"].min() >= HELD_OUT_SEED


def test_the_episode_that_is_drawn_is_that_of_a_rule() -> None:
    env, decisions = play_episode()
    name = f"threshold-{IDLE_CLIENTS}"
    row = play(TASK, name, make_policy(name), make_case(TASK, SEED), SEED).row
    assert env.metrics()["makespan_s"] == row["makespan_s"] == 19.0
    assert decisions == [(0.0, "prefill"), (6.0, "decode"), (10.0, "prefill"), (15.0, "prefill")]


def test_the_gsm8k_table_follows_from_its_episodes() -> None:
    episodes = pd.read_csv(RESULTS / "gsm8k/episodes.csv")
    assert episodes["seed"].min() >= HELD_OUT_SEED
    best_known = pd.read_csv(RESULTS / "gsm8k/best_known.csv")
    table = to_markdown(summarise(episodes, "hybrid", best_known=best_known))
    assert table in (RESULTS / "gsm8k/summary.md").read_text()
    source = pd.read_csv(RESULTS / "best_known/best_known.csv")
    assert best_known.equals(source[list(best_known.columns)])


@pytest.mark.parametrize("name", ["paper/study", "paper/case", "gsm8k"])
def test_no_episode_beats_its_bound(name: str) -> None:
    assert (pd.read_csv(RESULTS / name / "episodes.csv")["gap"] >= -1e-12).all()


@pytest.mark.parametrize("policy", ["fcfs", "hybrid"])
def test_the_single_case_is_reproduced(policy: str) -> None:
    """The code still plays the single case as the committed table says."""
    row = play(
        PAPER, policy, make_policy(policy), make_case(PAPER, PAPER_CASE_SEED), PAPER_CASE_SEED
    ).row
    table = pd.read_csv(RESULTS / "paper/case/episodes.csv").set_index("policy")
    assert row["makespan_s"] == pytest.approx(table.loc[policy, "makespan_s"], rel=1e-9)


def test_the_calibration_hits_its_one_target() -> None:
    row = play(
        PAPER, "fcfs", make_policy("fcfs"), make_case(PAPER, PAPER_CASE_SEED), PAPER_CASE_SEED
    ).row
    assert f"{row['makespan_s']:.2f}" == f"{PAPER_BASELINE_S:.2f}" == PUBLISHED["fcfs"][0]
    text = (RESULTS / "calibration/calibration.md").read_text()
    assert f"Decode round: {1e3 * PAPER_ROUND_S:.3f} ms" in text
    assert f"training seed {PAPER_CASE_SEED}," in text


@pytest.mark.parametrize(("task", "episodes"), [("Paper-v0", "paper/study"), ("GSM8K-v0", "gsm8k")])
def test_tuned_names_are_the_best_of_the_tuning(task: str, episodes: str) -> None:
    text = (RESULTS / "tuning" / task / "tuning.md").read_text()
    best = set(re.findall(r"\b(?:hybrid|threshold)-[\d.]+", text))
    assert len(best) == 2
    assert best <= set(pd.read_csv(RESULTS / episodes / "episodes.csv")["policy"])
