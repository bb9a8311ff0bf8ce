"""Runs of learners of equal CPU time: train, evaluate on the way, play held-out cases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from servegym.baselines.rules.compiled import CompilablePolicy, play_compiled
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, read_json, write_file
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.playing.identity import hash_of, notes_of
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import load_task
from servegym.studies.agents.learners import FASTER, Learner, load_policy, make_learner
from servegym.studies.agents.training import VALIDATION_SEED

EVALUATED_AT: Final = (0.03, 0.07, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0)
"""Shares of the time after which a learner is evaluated."""

HELD_OUT_FILE: Final = "held_out.csv"
CURVE_FILE: Final = "evaluations.csv"
RUN_FILE: Final = "run.json"


_TYPES: Final[dict[str, dict[str, type]]] = {
    CURVE_FILE: {"training_s": float, "steps": int, "gap_percent": float},
    HELD_OUT_FILE: {"seed": int, "gap": float},
}


@dataclass(frozen=True)
class Plan:
    """What every run of a study has in common.

    Parameters
    ----------
    task
        What is learned.
    minutes
        CPU minutes of training.
    validation_cases, cases
        Cases of seeds 900000 … and 1000000 …
    hyperparameters
        Of the learner ``FASTER``.
    """

    task: TaskConfig
    minutes: float
    validation_cases: int
    cases: int
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


def run(plan: Plan, learner: str, seed: int, folder: Path) -> None:
    """Train and evaluate, unless the folder holds the whole run; one that was killed begins anew.

    Raises
    ------
    ServegymError
        If the folder holds another run.
    """
    known = _identity(plan, learner, seed)
    record = folder / RUN_FILE
    if record.is_file():
        _check(record, known)
        if (folder / HELD_OUT_FILE).is_file():
            return
    make_folder(folder)
    write_file(record, json.dumps(known, indent=2) + "\n")
    _warm_up(learner)
    made = make_learner(learner, plan.task, seed, plan.hyperparameters)
    rows = _train(made, plan, folder, f"{learner}, seed {seed}")
    write_file(folder / CURVE_FILE, pd.DataFrame(rows).to_csv(index=False))
    cases = range(HELD_OUT_SEED, HELD_OUT_SEED + plan.cases)
    gaps = _gaps(made.task, load_policy(made.task, folder), cases)
    table = pd.DataFrame({"seed": list(cases), "gap": gaps})
    write_file(folder / HELD_OUT_FILE, table.to_csv(index=False))


@cache
def _warm_up(learner: str) -> None:
    """Load machine code and import torch before any clock starts."""
    small = make_learner(learner, load_task("Tiny-v0"), 0, {})
    small.step(1.0)
    _gaps(small.task, small.policy(), range(1))


def _identity(plan: Plan, learner: str, seed: int) -> dict[str, Any]:
    known = {"learner": learner, "seed": seed, "minutes": plan.minutes} | {
        "validation_cases": plan.validation_cases,
        "cases": plan.cases,
        "task": notes_of(plan.task),
    }
    if learner == FASTER:
        known["hyperparameters"] = dict(plan.hyperparameters)
    return json.loads(json.dumps(known | hash_of(plan.task)))


def _check(record: Path, known: dict[str, Any]) -> None:
    content = read_json(record)
    found = content if isinstance(content, dict) else {}
    for key, value in known.items():
        if found.get(key) != value:
            raise ServegymError(
                f"{record}: a run with another {key}; name another folder for the runs, or remove this one"
            )


def _train(learner: Learner, plan: Plan, folder: Path, title: str) -> list[dict[str, Any]]:
    """Train for the time; keep what is best by validation, and return the evaluations."""
    seeds = range(VALIDATION_SEED, VALIDATION_SEED + plan.validation_cases)
    budget_s, spent_s, steps = 60 * plan.minutes, 0.0, 0
    due = list(EVALUATED_AT)
    rows: list[dict[str, Any]] = []
    with tqdm(total=100, unit="%", desc=title, bar_format=_BAR) as bar:
        while due:
            started = process_time()
            learner.step(min(spent_s / budget_s, 1.0))
            spent_s += process_time() - started
            steps += 1
            share = spent_s / budget_s
            bar.update(min(int(100 * share), 100) - bar.n)
            if share < due[0]:
                continue
            due = [each for each in due if each > share]
            gap = 100 * float(_gaps(learner.task, learner.policy(), seeds).mean())
            gap = gap if np.isfinite(gap) else float("inf")
            if gap < min((row["gap_percent"] for row in rows), default=float("inf")) or not rows:
                learner.save(folder)
            rows.append({"training_s": spent_s, "steps": steps, "gap_percent": gap})
            bar.set_postfix_str(f"{gap:.2f} %")
    return rows


_BAR: Final = "{desc}: {percentage:3.0f} % of the time [{elapsed}{postfix}]"


def _gaps(task: TaskConfig, policy: CompilablePolicy, seeds: Sequence[int]) -> NDArray[np.float64]:
    return np.array([play_compiled(task, policy, make_case(task, seed))["gap"] for seed in seeds])


def read_runs(
    folders: Mapping[tuple[str, int], Path],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the curves and the held-out episodes of runs, by learner and training seed.

    Returns
    -------
    curves
        ``learner``, ``training_seed``, ``training_s`` (CPU seconds), ``steps``, ``gap_percent``.
    episodes
        ``learner``, ``training_seed``, ``seed``, ``gap``.
    """
    found: list[list[pd.DataFrame]] = [[], []]
    for (learner, seed), folder in folders.items():
        for tables, name in zip(found, (CURVE_FILE, HELD_OUT_FILE), strict=True):
            # As Python reads numbers: pandas' parser may change a last digit.
            try:
                table = pd.read_csv(folder / name, dtype=str).astype(_TYPES[name])
            except (OSError, ValueError, KeyError):
                raise ServegymError(
                    f"{folder / name}: damaged; remove {folder}, and the run is done anew"
                ) from None
            table.insert(0, "learner", learner)
            table.insert(1, "training_seed", seed)
            tables.append(table)
    curves, episodes = (pd.concat(tables, ignore_index=True) for tables in found)
    return curves, episodes
