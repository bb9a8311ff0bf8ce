"""Train an agent with PPO; go on after a kill with --resume; watch it with TensorBoard."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from servegym.agents.hyperparameters import (
    Hyperparameters,
    Options,
    default_hyperparameters,
    usual_batch_size,
)
from servegym.agents.record import RECORD, check_run, read_run
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.errors import ServegymError
from servegym.envs.play.evaluation import make_case
from servegym.envs.play.locks import locked
from servegym.envs.play.parallel import end_with_parent
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import load_task
from servegym.envs.vocabulary import ADMISSION_RULES
from servegym.studies.cli import check_number, parse

if TYPE_CHECKING:
    from servegym.agents.callbacks import ServingCallback
    from servegym.agents.imitation import Expert

VALIDATION_SEED: Final = 900_000
MAX_VALIDATION_CASES: Final = 100_000  # held-out seeds begin there
TO_THE_END: Final = {"max_decisions": 0, "max_seconds": 0.0}
"""Rules that an agent is compared with are, however short its episodes are cut."""

THRESHOLDS: Final = (1, 2, 3, 5, 7, 10, 12, 15, 20, 25, 30, 40, 60)


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
    """Threads of torch and of the imitated expert."""


def usual_validation_cases(hyperparameters: Hyperparameters) -> int:
    """Return how many there are unless told otherwise: what evolution gains is less than the luck of 20."""
    return 300 if hyperparameters.evolves else 20


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


def references(task: TaskConfig, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the mean metrics on the validation cases of the hybrid and of the best threshold.

    They admit by their own rules, also where the agent is not offered these, and play to the end.
    """
    task = with_overrides(task, {"process": {"rules": ADMISSION_RULES} | TO_THE_END})
    cases = [make_case(task, seed) for seed in seeds]

    def means(name: str) -> dict[str, float]:
        policy = make_trigger_policy(name)
        rows = [play_compiled(task, policy, case) for case in cases]
        return {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}

    thresholds = {f"threshold-{k}": means(f"threshold-{k}") for k in THRESHOLDS}
    best = min(thresholds, key=lambda name: thresholds[name]["gap"])
    return {"hybrid": means("hybrid"), best: thresholds[best]}


def make_callbacks(
    args: Args, task: TaskConfig, hyperparameters: Hyperparameters, command: str
) -> list[ServingCallback]:
    """Return what evaluates the agent while it is trained."""
    if args.validation_cases == 0:
        return []
    from servegym.agents import callbacks

    seeds = range(VALIDATION_SEED, VALIDATION_SEED + args.validation_cases)
    lines: Mapping[str, Mapping[str, float]] = references(task, seeds)
    shown = asdict(hyperparameters)
    return [
        callbacks.ServingCallback(
            task, seeds, args.evaluate_every, lines, shown, args.output, command=command
        )
    ]


def outcome(callback: ServingCallback) -> str:
    """Return in one line which agent is kept as the best, and whether training was of use."""
    first, best = callback.evaluations.iloc[0], callback.best
    if best is None:
        return "nothing was learned before the first evaluation: there is no best agent"
    folder, cases = callback.folder / "agent", int(best["cases"])
    text = f"{folder}: taken after {int(best['timesteps']):,} timesteps, "
    if best["unfinished"]:
        count, limits = int(best["unfinished"]), "process.max_decisions or max_seconds"
        return text + f"{count} of {cases} validation cases cut short by {limits}"
    gap_percent = best["gap_percent"]
    text += f"{gap_percent:.2f} % above the lower bound on {cases} validation cases"
    if best["timesteps"] == 0:
        return text + "; no evaluation after that, of what was imitated, is better"
    at_the_bound = gap_percent < 0.005  # shown as 0.00 %: nothing can be better
    if first["timesteps"] == 0 and first["gap_percent"] <= gap_percent and not at_the_bound:
        return text + (
            f", {best['gap_percent_sampled']:.2f} % with sampled actions; the untrained network has "
            f"{first['gap_percent']:.2f} %: train for longer, or at another learning rate"
        )
    return text


def make_expert(args: Args, task: TaskConfig) -> Expert | None:
    """Return whom to imitate, if anybody."""
    if args.imitation_rounds == 0:
        return None
    from servegym.baselines.expert import make_rollout_expert, make_rule_expert

    if args.imitate == "rule":
        return make_rule_expert(args.expert, task)
    return make_rollout_expert(args.expert, task, args.threads)


def make_reference(args: Args, task: TaskConfig) -> Callable[[Case], float] | None:
    """Return what returns are measured from, if anything."""
    if not args.reference:
        return None
    policy = make_trigger_policy(args.reference)
    task = with_overrides(task, {"process": TO_THE_END})
    return lambda case: 100.0 * play_compiled(task, policy, case)["gap"]


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
    make_trigger_policy(args.expert)  # refuse a mistyped one even where nobody is imitated
    make_reference(args, task)  # … or a reference
    words = ["python", "scripts/train.py", *(sys.argv[1:] if argv is None else argv)]
    with locked(args.output):
        check_run(task, hyperparameters, args.output, args.resume)
        train_agent(args, task, hyperparameters, options, shlex.join(words))
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
            expert=make_expert(args, task),
            reference=make_reference(args, task),
            resume=args.resume,
            command=command,
            options=options,
            checked=True,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; go on from the last checkpoint with --output {args.output} --resume"
        ) from None
    print(f"{args.output}: {model.num_timesteps} timesteps")
    for callback in callbacks:
        print(outcome(callback))
