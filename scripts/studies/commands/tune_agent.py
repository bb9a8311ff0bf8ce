"""Search hyper-parameters for an agent with Optuna; run it again to go on, or beside itself to go faster."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import pandas as pd
from tqdm import tqdm

from servegym.agents.hyperparameter_files import read_hyperparameters, write_hyperparameters
from servegym.agents.hyperparameters import (
    MAX_SEED,
    Hyperparameters,
    default_hyperparameters,
    usual_batch_size,
)
from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.playing.parallel import end_with_parent, run_parallel
from servegym.envs.playing.summary import to_markdown
from servegym.envs.task.registered import load_task
from servegym.studies.agents.tuning import (
    DEFAULTS,
    SPACE,
    Search,
    begun,
    best_of,
    finished,
    hyperparameters_of,
    import_optuna,
    open_study,
    run_trial,
    running,
)
from servegym.studies.agents.tuning_compared import Comparison, compare, comparison_text
from servegym.studies.cli import check_number, command_line, parse, read_list

MAX_TRIALS: Final = 100_000
MAX_CASES: Final = 100_000  # held-out seeds begin there


@dataclass(frozen=True)
class Args:
    """Search hyper-parameters; writes best.toml, trials.csv, tuning.md, comparison/, study.db and trials/.

    Trials are trained on training seeds and valued by the gap on validation cases; those behind the
    median of the others are pruned. The first trial is of the defaults. At the end the best trial's
    numbers and the defaults are trained anew on other seeds and compared on held-out cases. The same
    command on the same folder goes on with the study, also while others work on it.
    """

    task: str = "GSM8K-v0"
    """A registered task or a task TOML."""
    trials: int = 50
    """Trials of the study in all, those of earlier commands included."""
    timesteps: int = 300_000
    """Decisions of one trial."""
    parameters: str = ",".join(SPACE)
    """What is searched, separated by commas; the rest keeps its default."""
    hyperparameters: str = ""
    """TOML or JSON file of hyper-parameters to start from, in place of the task's defaults."""
    validation_cases: int = 40
    """Validation cases, seeds 900000 …"""
    evaluations: int = 8
    """Evaluations of one trial, after each of which it may be pruned."""
    agent_seed: int = 100
    """Agent seed of all trials, 0 … 799."""
    sampler_seed: int = 0
    """Seed of the search itself."""
    fresh_seeds: int = 3
    """Agent seeds, those next to --agent-seed, on which the best is compared with the defaults; 0: none."""
    held_out_cases: int = 100
    """Cases of that comparison, seeds 1000000 …"""
    storage: str = ""
    """Where trials are kept, a URL as Optuna takes it; study.db in the folder by default."""
    output: Path = Path("results/my-tuning")
    """Folder for the results."""
    jobs: int = 1
    """Worker processes; the same command may also be run several times at once."""


def read_search(args: Args) -> Search:
    """Return the search that the options describe."""
    check_number("--trials", args.trials, 1, MAX_TRIALS)
    check_number("--validation-cases", args.validation_cases, 1, MAX_CASES)
    check_number("--evaluations", args.evaluations, 1, 1000)
    check_number("--sampler-seed", args.sampler_seed, 0, 2**32 - 1)
    check_number("--fresh-seeds", args.fresh_seeds, 0, MAX_SEED // 2)
    check_number("--held-out-cases", args.held_out_cases, 2, HELD_OUT_SEED)
    names = read_list("--parameters", args.parameters, tuple(SPACE))
    task = load_task(args.task)
    usual = default_hyperparameters(task.name, max(1, args.timesteps))
    usual = replace(usual, timesteps=args.timesteps, seed=args.agent_seed)
    if args.hyperparameters:
        filed = read_hyperparameters(Path(args.hyperparameters))
        filed |= {"timesteps": args.timesteps, "seed": args.agent_seed}
        wider = replace(usual, **(filed | {"batch_size": 2}))
        usual = replace(wider, batch_size=filed.get("batch_size", usual_batch_size(wider.rollout)))
    make_case(task, 0)  # refuse a workload file before anything is written
    storage = args.storage or f"sqlite:///{args.output / 'study.db'}"
    return Search(
        task,
        usual,
        tuple(names),
        args.validation_cases,
        args.evaluations,
        args.output,
        storage,
        args.trials,
        args.sampler_seed,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Search, and write what was found after each trial."""
    end_with_parent()
    args = parse(Args, argv)
    search = read_search(args)
    import_optuna()
    if not args.storage:  # the folder holds the trials; else a wrong storage is refused before it
        make_folder(args.output)
    study = open_study(search)
    make_folder(args.output)
    done = begun(study)
    arguments = [(search, index) for index in range(done, args.trials)]
    lines = run_parallel(run_trial, arguments, args.jobs)
    try:
        with closing(lines), tqdm(lines, total=args.trials, initial=done, unit="trial") as bar:
            for line in bar:
                if line:
                    bar.write(line)
                write_results(args, search, study)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted after {len(finished(study))} of {args.trials} trials; "
            "the same command goes on with the study"
        ) from None
    if others := running(study):
        print(write_results(args, search, study))
        print(f"{others} of {args.trials} trials under way elsewhere, or killed in the last minute")
        return 0
    comparison = comparison_of(args, search, study)
    if comparison is not None:
        compare(comparison, args.jobs)
    print(write_results(args, search, study))
    return 0


def comparison_of(args: Args, search: Search, study: Any) -> Comparison | None:
    """Return what the best trial is compared by; None where that is not asked for or has no sense."""
    best = best_of(study)
    if best is None or best.user_attrs.get(DEFAULTS) or args.fresh_seeds == 0:
        return None
    first = search.usual.seed + 1
    if first + args.fresh_seeds > MAX_SEED + 1:  # then those before it
        first = search.usual.seed - args.fresh_seeds
    return Comparison(
        search,
        best.number,
        hyperparameters_of(search.usual, best.params),
        range(first, first + args.fresh_seeds),
        args.held_out_cases,
    )


def write_results(args: Args, search: Search, study: Any) -> str:
    """Write the table of trials and, once there is a best, its file; return the report."""
    rows = table(study)
    write_file(args.output / "trials.csv", rows.to_csv(index=False))
    best = best_of(study)
    if best is None:
        return f"{args.output}: no trial of {len(rows)} came to its end"
    usual = search.usual
    found = hyperparameters_of(usual, best.params)
    name = search.task.name.removeprefix("servegym/")
    cases = f"{search.cases} validation cases"
    write_hyperparameters(
        args.output / "best.toml",
        {key: value for key, value in asdict(found).items() if key != "seed"},
        f"Trial {best.number}, the best of {len(rows)} on {name}: {best.value:.3f} % on {cases}.\n"
        "`train --hyperparameters` takes this file.",
    )
    words = {
        item.name: getattr(args, item.name)
        for item in fields(Args)
        if getattr(args, item.name) != item.default or item.name in ("task", "output")
    }
    first = next((trial for trial in finished(study) if trial.user_attrs.get(DEFAULTS)), None)
    report = (
        f"# Hyper-parameters for {name}\n\n`{command_line('tune_agent', **words)}`\n\n"
        f"{len(rows)} trials of {usual.timesteps:,} decisions, agent seed {usual.seed}; gaps in percent "
        f"on {cases}.\n\n"
        + (
            f"No trial is better than the first, of the defaults: {best.value:.3f} %"
            if best.user_attrs.get(DEFAULTS)
            else f"{to_markdown(beside(found, usual))}\nTrial {best.number} has {best.value:.3f} %"
            + (
                ""
                if first is None
                else f"; trial {first.number}, of the defaults, {first.value:.3f} %"
            )
        )
        + f".\n\n{to_markdown(ranked(rows))}"
    )
    if (comparison := comparison_of(args, search, study)) is not None:
        report += comparison_text(comparison)
    write_file(args.output / "tuning.md", report)
    train = command_line("train", task=args.task, hyperparameters=args.output / "best.toml")
    return (
        f"{args.output / 'best.toml'}: trial {best.number}, {best.value:.2f} % on {cases}; "
        f"train by `{train}`"
    )


def table(study: Any) -> pd.DataFrame:
    """Return a row per trial that has ended, by number."""
    rows = []
    for trial in sorted(finished(study), key=lambda trial: trial.number):
        row = {"trial": trial.number, "state": trial.state.name.lower()}
        row["gap_percent"] = trial.value if trial.state.name == "COMPLETE" else float("nan")
        known = trial.user_attrs
        row |= {"timesteps": known.get("timesteps", 0), "seconds": round(known["seconds"], 1)}
        rows.append(row | trial.params)
    return pd.DataFrame(rows)


def beside(found: Hyperparameters, usual: Hyperparameters) -> pd.DataFrame:
    """Return the hyper-parameters that differ from those that the search began with."""
    old, new = asdict(usual), asdict(found)
    rows = [
        {"hyper-parameter": name, "default": f"{old[name]:.4g}", "found": f"{new[name]:.4g}"}
        for name in old
        if old[name] != new[name]
    ]
    return pd.DataFrame(rows, columns=["hyper-parameter", "default", "found"])


def ranked(rows: pd.DataFrame, most: int = 10) -> pd.DataFrame:
    """Return the trials of the smallest gaps, then pruned ones, as a reader wants them."""
    best = rows.sort_values(["gap_percent", "trial"], na_position="last").head(most)
    shown = best.drop(columns=["seconds"]).rename(columns={"gap_percent": "gap (%)"})
    numbers = shown.columns.difference(["trial", "state", "timesteps"])
    texts = {name: shown[name].map("{:.4g}".format).replace("nan", "–") for name in numbers}
    return shown.assign(**texts)
