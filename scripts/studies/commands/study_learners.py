"""Compare learners on equal CPU time: curves, held-out cases, one picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servegym.envs.errors import ServegymError, unknown
from servegym.envs.files import write_file
from servegym.envs.pictures import to_png
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import end_with_parent
from servegym.envs.task.registered import load_task
from servegym.studies.agents.learners import FASTER, LEARNERS, USUAL
from servegym.studies.agents.learners_report import draw, gaps_of_rivals, page
from servegym.studies.agents.timed import Plan, read_runs, run
from servegym.studies.cli import check_number, command_line, parse


@dataclass(frozen=True)
class Args:
    """Train each learner for the same CPU time; writes table.md, learning.csv, held_out.csv, learners.png."""

    task: str = "GSM8K-v0"
    """A registered task or a task TOML; output lengths known, all requests present at t = 0."""
    learners: str = ",".join(USUAL)
    """Comma-separated: cma, sep-cma, es, imitation, imitation-cma, ppo-scores, ppo, ppo-fast."""
    hyperparameters: str = ""
    """TOML or JSON file of what ppo-fast trains with, where that is not the task's default."""
    minutes: float = 5.0
    """CPU minutes of training, without evaluations."""
    seeds: int = 3
    """Training seeds 0 … seeds − 1; runs in the folder are kept, one that was killed begins anew."""
    validation_cases: int = 20
    """Validation cases, seeds 900000 …: what is best by them is kept and played at the end."""
    cases: int = 100
    """Held-out cases, seeds 1000000 …"""
    rival: Path = Path("results/gsm8k/episodes.csv")
    """Episodes of other policies on the same cases, drawn as lines."""
    rivals: str = "hybrid,rollout"
    """Policies of that table; none if empty."""
    runs: Path = Path("runs/learners")
    """Folder of the runs."""
    output: Path = Path("results/agents/GSM8K-v0/learners")
    """Folder of the study."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then write."""
    end_with_parent()
    args = parse(Args, argv)
    plan, learners = _plan(args), _learners(args)
    names = args.rivals.split(",") if args.rivals else []
    rivals = gaps_of_rivals(args.rival, names, args.cases) if names else {}
    folders = {
        (learner, seed): args.runs / learner / f"seed-{seed}"
        for seed in range(args.seeds)
        for learner in learners
    }
    with locked(args.runs), locked(args.output):
        for (learner, seed), folder in folders.items():
            run(plan, learner, seed, folder)
        curves, episodes = read_runs(folders)
        write_file(args.output / "learning.csv", curves.to_csv(index=False))
        write_file(args.output / "held_out.csv", episodes.to_csv(index=False))
        write_file(args.output / "learners.png", to_png(draw(curves, rivals)))
        command = command_line("study_learners", *(sys.argv[1:] if argv is None else argv))
        text = page(plan, command, curves, episodes, rivals)
        write_file(args.output / "table.md", text)
    print(text)
    return 0


def _plan(args: Args) -> Plan:
    check_number("--seeds", args.seeds, 1, 100)
    check_number("--cases", args.cases, 2, 100_000)
    check_number("--validation-cases", args.validation_cases, 1, 100_000)
    if not 1e-4 <= args.minutes <= 1e5:
        raise ServegymError(f"--minutes must lie in 0.0001 … 100000, got {args.minutes}")
    task = load_task(args.task)
    if task.process.max_decisions or task.process.max_seconds:
        raise ServegymError(
            f"{task.name} cuts episodes short: set process.max_decisions and process.max_seconds to 0"
        )
    if bool(args.hyperparameters) != (FASTER in args.learners.split(",")):
        raise ServegymError(
            f"--hyperparameters belongs to the learner {FASTER}: give both or neither"
        )
    changed = {}
    if args.hyperparameters:
        from servegym.agents.hyperparameter_files import read_hyperparameters

        changed = read_hyperparameters(Path(args.hyperparameters))
    return Plan(task, args.minutes, args.validation_cases, args.cases, changed)


def _learners(args: Args) -> list[str]:
    names = args.learners.split(",")
    for name in names:
        if name not in LEARNERS:
            raise unknown("learner", name, LEARNERS)
    if len(set(names)) < len(names):
        raise ServegymError("--learners names one twice; name each once")
    return names
