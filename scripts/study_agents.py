"""The study of trained agents: train, play held-out cases, transfer, tables and pictures."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _cli import parse, run
from _study_runs import ABLATED, MAIN, Run, ablations, grid, train_all

from servegym.agents.hyperparameters import MAX_SEED
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.tasks import load_task

PAPER = "Paper-v0"
PARTS = ("train",)


@dataclass(frozen=True)
class Args:
    """Study trained agents; goes on where it was interrupted."""

    parts: str = "train"
    """Comma-separated: train (hours; into --runs), evaluate, transfer (both play agents; into
    --output), report (tables and pictures from what the two have left)."""
    tasks: str = f"{ABLATED},{PAPER}"
    """Comma-separated tasks."""
    variants: str = "all"
    """Comma-separated: main (the agent itself) and ablations, of GSM8K-v0 only; all, or see --help
    of an unknown one."""
    seeds: int = 5
    """Main runs of each task, agent seeds 0 …."""
    timesteps: int = 12_000_000
    """Timesteps of a main run, but for Paper-v0."""
    paper_timesteps: int = 4_000_000
    """Timesteps of a main run on Paper-v0."""
    ablation_seeds: int = 1
    """Runs of each ablation, agent seeds 0 …."""
    ablation_timesteps: int = 4_000_000
    """Timesteps of an ablation's run."""
    runs: Path = Path("runs/study")
    """Folder of the training runs."""
    output: Path = Path("results/agents")
    """Folder for agents, episodes, tables and pictures."""
    jobs: int = 2
    """Training runs, or worker processes, at a time."""


def read_list(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Return the names of a comma-separated list, each once; refuse unknown ones."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ServegymError(f"{option} names nothing; choose from {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown(f"name in {option}:", name, known)
    return names


def make_grid(args: Args) -> list[Run]:
    """Return the training runs that the options ask for."""
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    for task in tasks:
        load_task(task)
    every = [MAIN, *ablations()]
    variants = every if args.variants == "all" else read_list("--variants", args.variants, every)
    timesteps = {task: args.paper_timesteps if task == PAPER else args.timesteps for task in tasks}
    return grid(
        tasks, variants, timesteps, args.seeds, args.ablation_timesteps, args.ablation_seeds
    )


def check(args: Args) -> None:
    """Refuse numbers out of range."""
    for name, most in (("seeds", MAX_SEED + 1), ("ablation_seeds", MAX_SEED + 1), ("jobs", 1024)):
        if not 1 <= getattr(args, name) <= most:
            option = name.replace("_", "-")
            raise ServegymError(f"--{option} must lie in 1 … {most}, got {getattr(args, name)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for."""
    args = parse(Args, argv)
    check(args)
    parts = read_list("--parts", args.parts, PARTS)
    runs = make_grid(args)
    if "train" in parts:
        failed = train_all(runs, args.runs, args.jobs)
        if failed:
            print("\n".join(failed), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    # Training takes hours and children: a plain kill must end them as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(main)
