"""Tune the one number of each rule on training seeds, in compiled code."""

from __future__ import annotations

if __name__ == "__main__":  # first of all: see _start.py
    import sys

    sys.path.insert(0, __file__.rpartition("/")[0] or ".")
    from _start import begin

    begin()

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from _cli import MAX_JOBS, check_number, command_line, parse, run
from joblib import Parallel, delayed
from tqdm import tqdm

from servegym.baselines.episodes import play_compiled
from servegym.baselines.registry import make_trigger_policy
from servegym.envs.config import TaskConfig
from servegym.envs.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.files import make_folder, write_file
from servegym.envs.summary import to_markdown, with_interval
from servegym.envs.tasks import load_task

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
    jobs: int = 2
    """Worker processes."""


def candidates() -> list[str]:
    """Return the names of all policies that are tried."""
    names = [f"threshold-{k}" for k in THRESHOLDS]
    return names + [f"{name}-{number}" for name in MULTIPLIED for number in MULTIPLIERS]


def gaps(task: TaskConfig, seed: int, names: Sequence[str]) -> list[dict[str, object]]:
    """Return one row per policy for one training case."""
    case = make_case(task, seed)
    return [
        {"policy": name, "seed": seed, "gap": play_compiled(task, policy, case)["gap"]}
        for name, policy in ((name, make_trigger_policy(name)) for name in names)
    ]


def best_of_families(table: pd.DataFrame) -> pd.DataFrame:
    """Return the best member of each family with its mean gap."""
    means = table.groupby("policy")["gap"].mean()
    families = means.index.str.rsplit("-", n=1).str[0]
    best = means.groupby(families).idxmin()
    return pd.DataFrame(
        {
            "family": best.index,
            "best": best.to_numpy(),
            "gap (%)": [
                with_interval(table.loc[table["policy"] == name, "gap"].to_numpy(float), 100, 3)
                for name in best
            ],
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and write the tables."""
    args = parse(Args, argv)
    check_number("--cases", args.cases, 1, HELD_OUT_SEED)
    check_number("--jobs", args.jobs, 1, MAX_JOBS)
    task, names = load_task(args.task), candidates()
    make_folder(args.output)
    parallel = Parallel(n_jobs=args.jobs, return_as="generator")
    rounds = parallel(delayed(gaps)(task, seed, names) for seed in range(args.cases))
    rows = [row for some in tqdm(rounds, total=args.cases, unit="case") for row in some]
    table = pd.DataFrame(rows)
    best = best_of_families(table)
    means = table.groupby("policy", sort=False)["gap"].agg(["count", "mean", "std"])
    write_file(args.output / "tuning.csv", means.astype({"count": np.int64}).to_csv())
    command = command_line("tune", task=args.task, cases=args.cases, output=args.output)
    text = f"# Tuning on {task.name}\n\n`{command}`\n\n{to_markdown(best)}"
    write_file(args.output / "tuning.md", text)
    print(to_markdown(best))
    return 0


if __name__ == "__main__":
    run(main)
