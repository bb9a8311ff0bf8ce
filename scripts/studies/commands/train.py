"""Train an agent by the task's usual learner, PPO or another; go on after a kill with --resume."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Final

from servegym.agents.early_stopping import Patience
from servegym.agents.hyperparameter_files import read_hyperparameters
from servegym.agents.hyperparameters import (
    Hyperparameters,
    Options,
    default_hyperparameters,
    usual_batch_size,
)
from servegym.agents.record import RECORD, check_run, read_run
from servegym.baselines.registry import make_trigger_policy
from servegym.envs.errors import ServegymError
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import end_with_parent
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import load_task
from servegym.studies.agents.algorithms import CALENDAR, algorithm_of
from servegym.studies.agents.train_calendar import CalendarArgs, train_calendar
from servegym.studies.agents.training import (
    EVALUATE_EVERY,
    make_callbacks,
    make_plan_case,
    make_reference,
    train_watched,
    usual_evaluations,
)
from servegym.studies.cli import check_number, command_line, options_of, parse

MAX_VALIDATION_CASES: Final = 100_000  # held-out seeds begin there


@dataclass(frozen=True)
class Args(Hyperparameters):
    """Train by PPO; writes checkpoints/, evaluations.csv, tensorboard/, agent/, final/, summary.json.

    These are the options of PPO. GSM8K-v0's usual learner is another: --algorithm calendar --help.
    """

    algorithm: str = Hyperparameters.algorithm
    """maskable-ppo, or ppo, which is not told the legal actions; or calendar, which has other options.
    Where it is not given, options that only one learner has choose it, else the task does."""
    task: str = "GSM8K-v0"
    """A registered task or a task TOML."""
    output: Path = Path("runs/agent")
    """Folder of the run."""
    hyperparameters: str = ""
    """TOML or JSON file of hyper-parameters, as tune_agent.py writes; options given here come first."""
    resume: bool = False
    """Go on with the run in the folder; options that are not given are those of that run."""
    max_minutes: float = 0.0
    """Stop once training has taken so long, without evaluations and imitation, since this start or
    resume; 0: never. The learning rate still decays over the timesteps."""
    validation_cases: int = 20
    """Validation cases, seeds 900000 …; 0: no evaluations. 300 by default for a task whose agents evolve."""
    evaluate_every: int = EVALUATE_EVERY
    """Timesteps between two evaluations; by default an eighth of all, where that is less."""
    patience: int = 0
    """Stop once so many evaluations in a row have brought no better agent; 0: never."""
    checkpoint_every: int = 10
    """Rollouts between two checkpoints."""
    threads: int = 1
    """Threads of torch, of the imitated expert and of evolution's episodes."""


def read_args(argv: Sequence[str]) -> Args:
    """Return the options; those not given are the task's defaults, or those of the run to resume."""
    if {"-h", "--help"} & set(argv):
        return parse(Args, argv)
    anything = Args(batch_size=2)  # fits every rollout: the usual one depends on other options
    args = parse(Args, argv, anything)
    filed = read_hyperparameters(Path(args.hyperparameters)) if args.hyperparameters else {}
    if not args.resume:
        name = load_task(args.task).name
        usual = default_hyperparameters(name)
        least = replace(anything, timesteps=filed.get("timesteps", usual.timesteps))
        timesteps = parse(Args, argv, least).timesteps
        usual = replace(default_hyperparameters(name, timesteps), batch_size=2)
        usual = replace(usual, **(filed | {"timesteps": timesteps, "batch_size": 2}))
        args = parse(Args, argv, replace(anything, **asdict(usual), **usual_evaluations(usual)))
        batch_size = filed.get("batch_size", usual_batch_size(args.rollout))
        return parse(Args, argv, replace(args, batch_size=batch_size))
    record = read_run(args.output)
    names = {item.name for item in fields(Hyperparameters)}
    recorded = {key: value for key, value in record["hyperparameters"].items() if key in names}
    try:
        usual = Hyperparameters(**recorded)
        usual_args = replace(anything, **recorded, **usual_evaluations(usual))
        begun = parse(Args, options_of(record["command"]), usual_args)
        first = replace(begun, **recorded)
    except ValueError as error:  # an option, a number or a quote that is none
        place = args.output / RECORD
        raise ServegymError(f"{place}: damaged ({error}); begin a run in another folder") from None
    return parse(Args, argv, replace(first, **filed))


def main(argv: Sequence[str] | None = None) -> int:
    """Train."""
    end_with_parent()
    words = list(sys.argv[1:] if argv is None else argv)
    command = command_line("train", *words)
    if algorithm_of(words, Args, CalendarArgs, Args.task) == CALENDAR:
        train_calendar(words, command)
    else:
        train_ppo(words, command)
    return 0


def train_ppo(words: Sequence[str], command: str) -> None:
    """Train by PPO; ``command`` is noted in the folder."""
    args = read_args(words)
    check_number("--validation-cases", args.validation_cases, 0, MAX_VALIDATION_CASES)
    if args.evaluate_every < 1:
        raise ServegymError(f"--evaluate-every must be ≥ 1, got {args.evaluate_every}")
    if args.patience < 0:
        raise ServegymError(f"--patience must be ≥ 0, got {args.patience}")
    task = load_task(args.task)
    hyperparameters = Hyperparameters(
        **{item.name: getattr(args, item.name) for item in fields(Hyperparameters)}
    )
    options = Options(args.checkpoint_every, args.max_minutes, args.threads)
    make_trigger_policy(args.expert)  # refuse a mistyped one even without imitation
    make_reference(hyperparameters, task)  # … or a reference
    make_plan_case(hyperparameters, task)  # … or a plan
    with locked(args.output):
        check_run(task, hyperparameters, args.output, args.resume)
        train_agent(args, task, hyperparameters, options, command)


def train_agent(
    args: Args, task: TaskConfig, hyperparameters: Hyperparameters, options: Options, command: str
) -> None:
    """Train in a folder that is locked and that ``check_run`` has found fit."""
    callbacks = make_callbacks(
        task,
        hyperparameters,
        args.output,
        cases=args.validation_cases,
        every=args.evaluate_every,
        command=command,
        on_evaluation=Patience(args.patience) if args.patience else None,
    )
    try:
        timesteps = train_watched(
            task,
            hyperparameters,
            args.output,
            callbacks,
            resume=args.resume,
            command=command,
            options=options,
            checked=True,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"go on from the last checkpoint with --output {args.output} --resume"
        ) from None
    print(f"{args.output}: {timesteps} timesteps")
    for callback in callbacks:
        print("\n".join(callback.outcome))
