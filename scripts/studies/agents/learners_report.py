"""What a study of learners has found, as a page and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from servegym.envs.errors import ServegymError, unknown
from servegym.envs.files import read_text
from servegym.envs.pictures import draw_learning_curves
from servegym.envs.playing.evaluation import HELD_OUT_SEED
from servegym.envs.playing.summary import to_markdown, with_interval
from servegym.studies.agents.timed import Plan

COMPARED_WITH: Final = "cma"
"""The learner that the others are compared with."""


def gaps_of_rivals(path: Path, names: Sequence[str], cases: int) -> dict[str, pd.Series]:
    """Return the gaps of other policies on the first held-out cases.

    Raises
    ------
    ServegymError
        If there is no such table, or the table lacks a policy or a case.
    """
    read_text(path, "--rival, a table of episodes")  # refuses what is no file, or no text
    try:
        table = pd.read_csv(path, dtype={"gap": str})[["policy", "seed", "gap"]]
        table = table.astype({"gap": float})
    except (ValueError, KeyError):
        raise ServegymError(f"--rival {path}: no table with policy, seed and gap") from None
    known = list(dict.fromkeys(table["policy"].astype(str)))
    for name in names:
        if name not in known:
            raise unknown(f"policy in {path}:", name, known)
    wanted = list(range(HELD_OUT_SEED, HELD_OUT_SEED + cases))
    found = {}
    for name in names:
        gaps = table[table["policy"] == name].set_index("seed")["gap"]
        if not set(wanted) <= set(gaps.index):
            raise ServegymError(
                f"{path}: lacks cases of {name!r}; play {cases} from {HELD_OUT_SEED} on, or name "
                "another --rival"
            )
        found[name] = gaps.loc[wanted]
    return found


def draw(curves: pd.DataFrame, rivals: Mapping[str, pd.Series]) -> Figure:
    """Draw the gap of the best so far, which is what is kept, over CPU minutes; both axes logarithmic."""
    best = curves.groupby(["learner", "training_seed"])["gap_percent"].cummin()
    drawn = curves.assign(gap_percent=best).rename(
        columns={"learner": "label", "training_seed": "seed"}
    )
    drawn = drawn[np.isfinite(drawn["gap_percent"])]
    references = {name: 100 * float(gaps.mean()) for name, gaps in rivals.items()}
    figure = draw_learning_curves(drawn, references)
    axes = figure.axes[0]
    axes.set_xscale("log")
    axes.set_xlim(left=drawn["training_s"].min() / 60)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("CPU minutes of training")
    # An untrained agent's gap would hide all differences.
    highest = 1.2 * max(references.values(), default=float(drawn["gap_percent"].max()))
    axes.set_yscale("log")
    axes.set_ylim(0.9 * min([drawn["gap_percent"].min(), *references.values()]), highest)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    return figure


def page(
    plan: Plan,
    command: str,
    curves: pd.DataFrame,
    episodes: pd.DataFrame,
    rivals: Mapping[str, pd.Series],
) -> str:
    """Return table.md."""
    by_case = episodes.pivot_table(
        index="seed", columns="learner", values="gap", sort=False, dropna=False
    )
    by_run = episodes.pivot_table(
        index="training_seed", columns="learner", values="gap", sort=False, dropna=False
    )
    rows = []
    for learner in by_case:
        steps = curves[curves["learner"] == learner].groupby("training_seed")["steps"].max()
        row = {
            "learner": learner,
            "steps": f"{steps.mean():.0f}",
            "gap (%), over seeds": with_interval(by_run[learner].to_numpy(), 100),
            "over cases": with_interval(by_case[learner].to_numpy(), 100),
        }
        if COMPARED_WITH in by_case:
            for title, table in (("over seeds", by_run), ("over cases", by_case)):
                apart = (table[learner] - table[COMPARED_WITH]).to_numpy()
                itself = learner == COMPARED_WITH
                row[f"− {COMPARED_WITH} (points), {title}"] = (
                    "" if itself else with_interval(apart, 100)
                )
        for name, gaps in rivals.items():
            apart = by_case[learner].to_numpy() - gaps.to_numpy()
            row[f"− {name} (points), over cases"] = with_interval(apart, 100)
        rows.append(row)
    return (
        f"# Learners of {plan.task.name} on equal time\n\n`{command}`\n\n"
        f"{plan.minutes:g} CPU minutes of training each, without evaluations, on one core; "
        f"n = {len(by_run)} training seeds, {len(by_case)} held-out cases. What was best on "
        f"{plan.validation_cases} validation cases is played. Intervals are 95 %: over training seeds "
        "of the mean over cases, and over cases of the mean over training seeds. A step is a "
        "generation, a schedule planned and imitated, or a rollout with its updates.\n\n"
        f"{to_markdown(pd.DataFrame(rows))}\n"
    )
