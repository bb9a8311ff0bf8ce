"""Tune the one number of each rule on training seeds, in compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.files import write_file
from servegym.envs.play.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.play.identity import check_unchanged, hash_of
from servegym.envs.play.locks import locked
from servegym.envs.play.parallel import USUAL_JOBS, check_jobs, run_parallel
from servegym.envs.play.summary import UNFINISHED, mean_gaps, to_markdown, with_interval
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import load_task
from servegym.studies.cli import check_number, command_line, parse

THRESHOLDS = (1, 2, 3, 4, 5, 7, 10, 12, 15, 18, 20, 25, 30, 40, 60, 100)
MULTIPLIERS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
MULTIPLIED = ("hybrid", "lpt", "lookahead", "aligned", "aligned-lookahead", "feedback")


@dataclass(frozen=True)
class Args:
    """Tune thresholds and multipliers on training seeds; writes tuning.csv and tuning.md."""

    task: str = "GSM8K-v0"
    """A registered task or a task TOML."""
    cases: int = 100
    """Training cases: seeds 0 … cases − 1."""
    output: Path = Path("results/tuning/GSM8K-v0")
    """Folder for the results."""
    jobs: int = USUAL_JOBS
    """Worker processes."""


def candidates() -> list[str]:
    """Return the names of all policies that are tried."""
    names = [f"threshold-{k}" for k in THRESHOLDS]
    return names + [f"{name}-{number}" for name in MULTIPLIED for number in MULTIPLIERS]


def gaps(task: TaskConfig, seed: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per policy for one training case."""
    case = make_case(task, seed)
    return [
        {"policy": name, "seed": seed, "gap": play_compiled(task, policy, case)["gap"]}
        for name, policy in ((name, make_trigger_policy(name)) for name in names)
    ]


def best_of_families(table: pd.DataFrame) -> pd.DataFrame:
    """Return the best member of each family with its mean gap; none that leaves requests unserved."""
    means = mean_gaps(table)
    families = means.index.str.rsplit("-", n=1).str[0]
    best = means.groupby(families).idxmin()
    rows = []
    for family, name in best.items():
        gaps = table.loc[table["policy"] == name, "gap"].to_numpy(float)
        served = np.isfinite(means[name])
        cells = (name, with_interval(gaps, 100, 3)) if served else ("–", UNFINISHED)
        rows.append({"family": family, "best": cells[0], "gap (%)": cells[1]})
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and write the tables."""
    args = parse(Args, argv)
    check_number("--cases", args.cases, 1, HELD_OUT_SEED)
    check_jobs(args.jobs)
    task = load_task(args.task)
    make_case(task, 0)  # refuse a workload file before anything is written
    with locked(args.output):
        table = play(task, args)
        best = best_of_families(table)
        means = table.groupby("policy", sort=False)["gap"].agg(["count", "mean", "std"])
        write_file(args.output / "tuning.csv", means.astype({"count": np.int64}).to_csv())
        command = command_line("tune", task=args.task, cases=args.cases, output=args.output)
        text = f"# Tuning on {task.name}\n\n`{command}`\n\n{to_markdown(best)}"
        write_file(args.output / "tuning.md", text)
    print(to_markdown(best))
    return 0


def play(task: TaskConfig, args: Args) -> pd.DataFrame:
    """Return one row per policy and training case, by case."""
    known, names = hash_of(task), candidates()
    arguments = [(task, seed, names) for seed in range(args.cases)]
    rounds = run_parallel(gaps, arguments, args.jobs)
    with closing(rounds), tqdm(rounds, total=args.cases, unit="case") as bar:
        found = sorted(bar, key=lambda rows: int(rows[0]["seed"]))
    check_unchanged(task, known)
    return pd.DataFrame([row for rows in found for row in rows])
