"""Compare ways to train for speed: CPU time a decision, gap against CPU minutes, held-out cases."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from servegym.agents.hyperparameters import MAX_SEED
from servegym.envs.playing.evaluation import HELD_OUT_SEED
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import Workers
from servegym.studies.agents.runs import ABLATED, WAYS, Run, train_all
from servegym.studies.agents.training_speed import evaluate_ways, measure_costs, write_comparison
from servegym.studies.cli import check_folder, check_number, command_line, parse, read_list
from servegym.studies.workers import open_workers

PARTS: Final = ("train", "measure", "evaluate", "report")


@dataclass(frozen=True)
class Args:
    """Compare ways to train an agent of GSM8K-v0 for speed; goes on where it was interrupted."""

    parts: str = ",".join(PARTS)
    """Comma-separated: train (into --runs), measure (CPU time a decision, of the trained ways), evaluate
    (held-out cases), report (table and picture)."""
    ways: str = ",".join(WAYS)
    """Comma-separated ways to train."""
    seeds: int = 2
    """Training runs of each way, agent seeds 0 …."""
    timesteps: int = 600_000
    """Timesteps of each run."""
    cases: int = 100
    """Held-out cases, seeds 1000000 …."""
    repeats: int = 5
    """Rollouts and updates of each way that its CPU time is the least of."""
    runs: Path = Path("runs/speed")
    """Folder of the training runs."""
    output: Path = Path(f"results/agents/{ABLATED}/speed")
    """Folder for curves, episodes, costs, table and picture."""
    jobs: int = 1
    """Training runs, or worker processes, at a time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for."""
    args = parse(Args, argv)
    check_number("--seeds", args.seeds, 1, MAX_SEED + 1)
    check_number("--timesteps", args.timesteps, 1, 10**12)
    check_number("--cases", args.cases, 2, HELD_OUT_SEED)
    check_number("--repeats", args.repeats, 1, 1000)
    parts = read_list("--parts", args.parts, PARTS)
    ways = read_list("--ways", args.ways, list(WAYS))
    check_folder(args.runs)
    check_folder(args.output)
    grid = [Run(ABLATED, way, seed, args.timesteps) for seed in range(args.seeds) for way in ways]
    with open_workers(args.jobs, None) as crew:
        if "train" in parts:
            with locked(args.runs):
                failed = train_all(grid, args.runs, crew)
            if failed:
                print("\n".join(failed), file=sys.stderr)
                return 1
        if parts != ["train"]:
            with locked(args.output):
                command = command_line(
                    "study_training_speed", *(sys.argv[1:] if argv is None else argv)
                )
                _compare(args, parts, grid, command, crew)
    return 0


def _compare(
    args: Args, parts: Sequence[str], grid: Sequence[Run], command: str, crew: Workers
) -> None:
    """Do the parts that come after training."""
    if "measure" in parts:
        measure_costs(grid, args.runs, args.output, args.repeats)
    if "evaluate" in parts:
        evaluate_ways(grid, args.runs, args.output, args.cases, crew)
    if "report" in parts:
        print("wrote", ", ".join(map(str, write_comparison(args.output, command))))
