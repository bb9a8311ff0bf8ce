"""Train an agent with PPO; go on after a kill with --resume; watch it with TensorBoard."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

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
from servegym.studies.agents.training import (
    VALIDATION_SEED,
    make_expert,
    make_reference,
    outcome,
    references,
    usual_validation_cases,
)
from servegym.studies.cli import check_number, command_line, parse

if TYPE_CHECKING:
    from servegym.agents.callbacks import ServingCallback

MAX_VALIDATION_CASES: Final = 100_000  # held-out seeds begin there


@dataclass(frozen=True)
class Args(Hyperparameters):
    """Train an agent; writes run.json, checkpoints/, evaluations.csv, tensorboard/, agent/, final/."""

    task: str = "GSM8K-v0"
    """A registered task or a task TOML."""
    output: Path = Path("runs/agent")
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in the folder; options that are not given are those of that run."""
    max_minutes: float = 0.0
    """Stop once training has taken so long, without evaluations and imitation, since this start or
    resume; 0: never. The learning rate still decays over the timesteps."""
    validation_cases: int = 20
    """Validation cases, seeds 900000 …; 0: no evaluations. 300 by default for a task whose agents evolve."""
    evaluate_every: int = 250_000
    """Timesteps between two evaluations."""
    checkpoint_every: int = 10
    """Rollouts between two checkpoints."""
    threads: int = 1
    """Threads of torch, of the imitated expert and of evolution's episodes."""


def read_args(argv: Sequence[str] | None) -> Args:
    """Return the options; those not given are the task's defaults, or those of the run to resume."""
    if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        return parse(Args, argv)
    anything = Args(batch_size=2)  # fits every rollout: the usual one depends on other options
    args = parse(Args, argv, anything)
    if not args.resume:
        name = load_task(args.task).name
        usual = default_hyperparameters(name)
        timesteps = parse(Args, argv, replace(anything, timesteps=usual.timesteps)).timesteps
        usual = replace(default_hyperparameters(name, timesteps), batch_size=2)
        cases = usual_validation_cases(usual)
        args = parse(Args, argv, replace(anything, **asdict(usual), validation_cases=cases))
        return parse(Args, argv, replace(args, batch_size=usual_batch_size(args.rollout)))
    record = read_run(args.output)
    names = {item.name for item in fields(Hyperparameters)}
    recorded = {key: value for key, value in record["hyperparameters"].items() if key in names}
    try:
        begun = parse(Args, shlex.split(record["command"])[2:], replace(anything, **recorded))
        first = replace(begun, **recorded)
    except ValueError as error:  # an option, a number or a quote that is none
        place = args.output / RECORD
        raise ServegymError(f"{place}: damaged ({error}); begin a run in another folder") from None
    return parse(Args, argv, first)


def make_callbacks(
    args: Args, task: TaskConfig, hyperparameters: Hyperparameters, command: str
) -> list[ServingCallback]:
    """Return what evaluates the agent while it is trained."""
    if args.validation_cases == 0:
        return []
    from servegym.agents import callbacks

    seeds = range(VALIDATION_SEED, VALIDATION_SEED + args.validation_cases)
    lines: Mapping[str, Mapping[str, float]] = references(task, seeds)
    logged = asdict(hyperparameters)
    return [
        callbacks.ServingCallback(
            task, seeds, args.evaluate_every, lines, logged, args.output, command=command
        )
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train."""
    end_with_parent()
    args = read_args(argv)
    check_number("--validation-cases", args.validation_cases, 0, MAX_VALIDATION_CASES)
    if args.evaluate_every < 1:
        raise ServegymError(f"--evaluate-every must be ≥ 1, got {args.evaluate_every}")
    task = load_task(args.task)
    hyperparameters = Hyperparameters(
        **{item.name: getattr(args, item.name) for item in fields(Hyperparameters)}
    )
    options = Options(args.checkpoint_every, args.max_minutes, args.threads)
    make_trigger_policy(args.expert)  # refuse a mistyped one even without imitation
    make_reference(hyperparameters, task)  # … or a reference
    command = command_line("train", *(sys.argv[1:] if argv is None else argv))
    with locked(args.output):
        check_run(task, hyperparameters, args.output, args.resume)
        train_agent(args, task, hyperparameters, options, command)
    return 0


def train_agent(
    args: Args, task: TaskConfig, hyperparameters: Hyperparameters, options: Options, command: str
) -> None:
    """Train in a folder that is locked and that ``check_run`` has found fit."""
    # Imported late: torch takes seconds, and what can be refused should be refused before.
    from servegym.agents.training import train

    callbacks = make_callbacks(args, task, hyperparameters, command)
    try:
        model = train(
            task,
            hyperparameters,
            args.output,
            callbacks=callbacks,
            expert=make_expert(hyperparameters, task, args.threads),
            reference=make_reference(hyperparameters, task),
            resume=args.resume,
            command=command,
            options=options,
            checked=True,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"go on from the last checkpoint with --output {args.output} --resume"
        ) from None
    print(f"{args.output}: {model.num_timesteps} timesteps")
    for callback in callbacks:
        print(outcome(callback))
