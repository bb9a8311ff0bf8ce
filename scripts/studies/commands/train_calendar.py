"""Train the policy ``calendar``: CMA-ES over whole episodes in compiled code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from servegym.baselines.calendar.learning import Search
from servegym.envs.errors import ServegymError
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import end_with_parent
from servegym.envs.task.registered import load_task
from servegym.studies.cli import check_number, command_line, parse


@dataclass(frozen=True)
class Args(Search):
    """Train a calendar of prefill stages; writes run.json, fitness.npy, evaluations.csv, calendar.json."""

    task: str = "GSM8K-v0"
    """A registered task or a task TOML; output lengths known, all requests present at t = 0."""
    output: Path = Path("runs/calendar")
    """Folder of the run, which is a policy once trained."""
    resume: bool = False
    """Go on with the run in the folder; it ends in the same numbers."""
    validation_cases: int = 20
    """Validation cases, seeds 900000 …"""
    evaluate_every: int = 250
    """Generations between two evaluations."""
    threads: int = 2
    """Threads that play the candidates; their number changes no result."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train."""
    end_with_parent()
    args = parse(Args, argv)
    check_number("--validation-cases", args.validation_cases, 1, 100_000)
    if args.evaluate_every < 1:
        raise ServegymError(f"--evaluate-every must be ≥ 1, got {args.evaluate_every}")
    task = load_task(args.task)
    how = Search(**{item.name: getattr(args, item.name) for item in fields(Search)})
    command = command_line("train_calendar", *(sys.argv[1:] if argv is None else argv))
    from servegym.studies.agents.calendar import CalendarTraining

    with locked(args.output):
        training = CalendarTraining(
            task,
            how,
            args.output,
            command,
            validation_cases=args.validation_cases,
            evaluate_every=args.evaluate_every,
            threads=args.threads,
            resume=args.resume,
        )
        try:
            training.train()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; go on with --output {args.output} --resume"
            ) from None
        print(training.outcome())
    return 0
