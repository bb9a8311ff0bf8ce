"""Tune the number of each rule on training seeds, in compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from servegym.envs.files import write_file
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.playing.identity import check_unchanged, hash_of
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS, Workers, run_parallel
from servegym.envs.playing.summary import UNFINISHED, mean_gaps, to_markdown, with_interval
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import load_task
from servegym.studies.cli import check_number, command_line, parse
from servegym.studies.tuned import MULTIPLIERS, THRESHOLDS, gaps
from servegym.studies.workers import open_workers

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
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""


def candidates() -> list[str]:
    """Return the names of all policies that are tried."""
    names = [f"threshold-{k}" for k in THRESHOLDS]
    return names + [f"{name}-{number}" for name in MULTIPLIED for number in MULTIPLIERS]


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
    task = load_task(args.task)
    make_case(task, 0)  # refuse a workload file before anything is written
    with open_workers(args.jobs, args.cluster) as crew, locked(args.output):
        table = play(task, args, crew)
        best = best_of_families(table)
        means = table.groupby("policy", sort=False)["gap"].agg(["count", "mean", "std"])
        write_file(args.output / "tuning.csv", means.astype({"count": np.int64}).to_csv())
        command = command_line("tune", task=args.task, cases=args.cases, output=args.output)
        text = f"# Tuning on {task.name}\n\n`{command}`\n\n{to_markdown(best)}"
        write_file(args.output / "tuning.md", text)
    print(to_markdown(best))
    return 0


def play(task: TaskConfig, args: Args, crew: Workers) -> pd.DataFrame:
    """Return one row per policy and training case, by case."""
    known, names = hash_of(task), candidates()
    arguments = [(task, seed, names) for seed in range(args.cases)]
    rounds = run_parallel(gaps, arguments, crew)
    with closing(rounds), tqdm(rounds, total=args.cases, unit="case") as bar:
        cases = sorted(bar, key=lambda rows: int(rows[0]["seed"]))
    check_unchanged(task, known)
    return pd.DataFrame([row for rows in cases for row in rows])
