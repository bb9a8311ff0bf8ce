"""``train --algorithm calendar``: its options, and the run in a folder that is locked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from servegym.agents.record import RECORD
from servegym.baselines.calendar.learning import Search
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.files import read_json
from servegym.envs.playing.locks import locked
from servegym.envs.task.registered import load_task
from servegym.studies.agents.algorithms import CALENDAR
from servegym.studies.cli import check_number, options_of, parse


@dataclass(frozen=True)
class CalendarArgs(Search):
    """Train a calendar by CMA-ES; writes evaluations.csv, tensorboard/, calendar.json, summary.json.

    These are the options of --algorithm calendar, the usual one of GSM8K-v0. Those of PPO, the usual
    one of other tasks, are listed by --algorithm maskable-ppo --help.
    """

    algorithm: str = CALENDAR
    """calendar; or maskable-ppo, ppo, which have other options."""
    task: str = "GSM8K-v0"
    """A registered task or a task TOML; output lengths known, all requests present at t = 0."""
    output: Path = Path("runs/agent")
    """Folder of the run, which is a policy once trained."""
    resume: bool = False
    """Go on with the run in the folder, with the same options; it ends in the same numbers."""
    validation_cases: int = 20
    """Validation cases, seeds 900000 …"""
    evaluate_every: int = 250
    """Generations between two evaluations."""
    threads: int = 2
    """Threads that play the candidates; their number changes no result."""


def read_args(argv: Sequence[str] | None) -> CalendarArgs:
    """Return the options; those not given are the defaults, or those of the run to resume."""
    args = parse(CalendarArgs, argv)
    record = args.output / RECORD
    if not args.resume or not record.is_file():
        return args
    content = read_json(record)
    try:
        begun = parse(CalendarArgs, options_of(content["command"]))
    except (
        TypeError,
        KeyError,
        ValueError,
    ) as error:  # an option, a number or a quote that is none
        raise ServegymError(f"{record}: damaged ({error}); begin a run in another folder") from None
    return parse(CalendarArgs, argv, begun)


def train_calendar(argv: Sequence[str] | None, command: str) -> None:
    """Train as the options say; ``command`` is noted in the folder."""
    args = read_args(argv)
    check_number("--validation-cases", args.validation_cases, 1, 100_000)
    if args.evaluate_every < 1:
        raise ServegymError(f"--evaluate-every must be ≥ 1, got {args.evaluate_every}")
    if args.algorithm != CALENDAR:
        raise unknown("algorithm", args.algorithm, (CALENDAR,))
    task = load_task(args.task)
    how = Search(**{item.name: getattr(args, item.name) for item in fields(Search)})
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
            raise KeyboardInterrupt(f"go on with --output {args.output} --resume") from None
    print("\n".join(training.outcome))
