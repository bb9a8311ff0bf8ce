"""The study of trained agents: train, play held-out cases, transfer, tables and pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servegym.agents.hyperparameters import MAX_SEED
from servegym.envs.playing.evaluation import HELD_OUT_SEED
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS, Workers
from servegym.envs.task.registered import NAMESPACE, TASKS
from servegym.studies.agents.play import evaluate_agents, play_transfer
from servegym.studies.agents.report import write_task, write_transfer
from servegym.studies.agents.runs import ABLATED, MAIN, Run, ablations, grid, train_all
from servegym.studies.cli import check_folder, check_number, command_line, parse, read_list
from servegym.studies.workers import open_workers

PAPER = "Paper-v0"
TINY = "Tiny-v0"
PREDICTED = "GSM8KPredicted-v0"
MAX_TIMESTEPS = 10**12
PARTS = ("train", "evaluate", "transfer", "report")


@dataclass(frozen=True)
class Args:
    """Study trained agents; goes on where it was interrupted."""

    parts: str = ",".join(PARTS)
    """Comma-separated: train (hours; into --runs), evaluate, transfer (both play agents; into
    --output), report (tables and pictures from what the two have left)."""
    tasks: str = f"{ABLATED},{PAPER},{TINY},{PREDICTED}"
    """Comma-separated tasks."""
    variants: str = "all"
    """Comma-separated: main (the agent itself) and ablations, which are of GSM8K-v0 only: short,
    imitation, every-round, without-RULE, ppo-unmasked; or all."""
    seeds: int = 5
    """Main runs of each task, agent seeds 0 …."""
    timesteps: int = 8_000_000
    """Timesteps of a main run, but for the three tasks below."""
    paper_timesteps: int = 50_000
    """Timesteps of a main run on Paper-v0."""
    tiny_timesteps: int = 300_000
    """Timesteps of a main run on Tiny-v0."""
    predicted_timesteps: int = 3_000_000
    """Timesteps of a main run on GSM8KPredicted-v0."""
    ablation_seeds: int = 1
    """Agent seeds of each ablation: 0 … and up to here."""
    first_ablation_seed: int = 0
    """The first of them; above 0 seeds are added to results whose earlier runs are no longer there."""
    ablation_timesteps: int = 2_000_000
    """Timesteps of an ablation's run."""
    cases: int = 100
    """Held-out cases, seeds 1000000 …."""
    transfer_cases: int = 30
    """Held-out cases of each setting of transfer; a third of them with 2000 clients."""
    runs: Path = Path("runs/study")
    """Folder of the training runs."""
    output: Path = Path("results/agents")
    """Folder for agents, episodes, tables and pictures."""
    jobs: int = USUAL_JOBS
    """Training runs, or worker processes, at a time."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""


def read_tasks(text: str) -> list[str]:
    """Return the short names of registered tasks."""
    short = [name.removeprefix(f"{NAMESPACE}/") for name in TASKS]
    return read_list("--tasks", text, short)


def make_grid(args: Args, tasks: Sequence[str]) -> list[Run]:
    """Return the training runs that the options ask for."""
    every = [MAIN, *ablations()]
    variants = every if args.variants == "all" else read_list("--variants", args.variants, every)
    special = {
        PAPER: args.paper_timesteps,
        TINY: args.tiny_timesteps,
        PREDICTED: args.predicted_timesteps,
    }
    timesteps = {task: special.get(task, args.timesteps) for task in tasks}
    ablation_seeds = range(args.first_ablation_seed, args.ablation_seeds)
    return grid(tasks, variants, timesteps, args.seeds, args.ablation_timesteps, ablation_seeds)


def check(args: Args) -> None:
    """Refuse numbers out of range."""
    limits = {
        "seeds": (1, MAX_SEED + 1),
        "ablation_seeds": (1, MAX_SEED + 1),
        "first_ablation_seed": (0, args.ablation_seeds - 1),
        "cases": (2, HELD_OUT_SEED),  # a single one has no interval
        "transfer_cases": (2, HELD_OUT_SEED),
        "timesteps": (1, MAX_TIMESTEPS),
        "paper_timesteps": (1, MAX_TIMESTEPS),
        "tiny_timesteps": (1, MAX_TIMESTEPS),
        "predicted_timesteps": (1, MAX_TIMESTEPS),
        "ablation_timesteps": (1, MAX_TIMESTEPS),
    }
    for name, (least, most) in limits.items():
        check_number(f"--{name.replace('_', '-')}", getattr(args, name), least, most)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for."""
    args = parse(Args, argv)
    check(args)
    parts, tasks = read_list("--parts", args.parts, PARTS), read_tasks(args.tasks)
    runs = make_grid(args, tasks)
    check_folder(args.runs)
    check_folder(args.output)
    with open_workers(args.jobs, args.cluster) as crew:
        if "train" in parts:
            with locked(args.runs):
                failed = train_all(runs, args.runs, crew)
            if failed:
                print("\n".join(failed), file=sys.stderr)
                return 1
        if parts != ["train"]:
            command = command_line("study_agents", *(sys.argv[1:] if argv is None else argv))
            with locked(args.output):
                play_and_report(args, parts, tasks, runs, command, crew)
    return 0


def play_and_report(
    args: Args,
    parts: Sequence[str],
    tasks: Sequence[str],
    runs: Sequence[Run],
    command: str,
    crew: Workers,
) -> None:
    """Do the parts that come after training."""
    if "evaluate" in parts:
        for task in tasks:
            print(f"{task}: {args.cases} held-out cases")
            with locked(args.output / task):
                evaluate_agents(task, runs, args.runs, args.output, args.cases, crew)
    if "transfer" in parts:
        play_transfer(args.output, args.transfer_cases, crew)
    if "report" in parts:
        written = [path for task in tasks for path in write_task(task, args.output, command)]
        written += write_transfer(args.output, command)
        print("wrote", ", ".join(str(path) for path in written))
