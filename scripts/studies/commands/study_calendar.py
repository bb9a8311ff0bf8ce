"""Train calendars from several seeds and evaluate them on held-out cases: table, curves, page's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Final

import numpy as np
import pandas as pd
from tqdm import tqdm

from servegym.baselines.calendar.fitted import CALENDAR_FILE, calendar_policy, read_parameters
from servegym.baselines.calendar.learning import Search
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.files import write_file
from servegym.envs.pictures import draw_learning_curves, to_png
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import end_with_parent
from servegym.envs.playing.summary import mean_interval, to_markdown, with_interval
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import load_task
from servegym.studies.agents.algorithms import CALENDAR
from servegym.studies.agents.calendar import EVALUATIONS_FILE, CalendarTraining
from servegym.studies.agents.learners_report import gaps_of_rivals
from servegym.studies.agents.rollouts import play_rollouts, rollouts_table
from servegym.studies.cli import check_number, command_line, parse, split_names
from servegym.studies.policies import make_policy, note_agents

CALENDARS: Final = (1, 10, 30, 100, 300)
"""Calendars that are played in imagination before an episode."""

PLAYED_BY_SEEDS: Final = (1, 30)
"""… by the calendars of the other training seeds."""


@dataclass(frozen=True)
class Args:
    """Study the policy calendar; writes seed-*/, held_out.csv, rollouts.csv, table.md and a picture."""

    task: str = "GSM8K-v0"
    """A registered task or a task TOML."""
    seeds: int = 5
    """Training seeds 0 … seeds − 1; those in the folder are gone on with."""
    cases: int = 100
    """Held-out cases, seeds 1000000 …"""
    rival: Path = Path("results/gsm8k/episodes.csv")
    """Episodes of other policies on the same cases, for paired differences."""
    others: Path = Path("results/agents/GSM8K-v0/curves.csv")
    """Evaluations of PPO's training runs, drawn beside; left out where there is no such file."""
    rivals: str = "hybrid,aligned-lookahead-0.5,ppo,rollout"
    """Policies of that table to compare with."""
    rollouts: str = "rollout-2:calendar-1,rollout:calendar-1,rollout-2:ppo,rollout:ppo"
    """Searches over agents that are played on the same cases."""
    output: Path = Path("results/agents/GSM8K-v0/calendar")
    """Folder of the study."""
    threads: int = 2
    """Threads that play the candidates."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, evaluate, write."""
    end_with_parent()
    args = parse(Args, argv)
    check_number("--seeds", args.seeds, 1, 100)
    check_number("--cases", args.cases, 2, 100_000)
    task = load_task(args.task)
    others = gaps_of_rivals(args.rival, args.rivals.split(","), args.cases)
    rollouts = split_names(args.rollouts)
    for name in rollouts:  # refuse a mistyped one before hours of training
        make_policy(name, task.name)
    with locked(args.output):
        for seed in range(args.seeds):
            _train(task, args, seed)
        episodes = _evaluate(task, args)
        write_file(args.output / "held_out.csv", episodes.to_csv(index=False))
        note_agents(rollouts, task.name, args.output)
        searches = play_rollouts(task, rollouts, _held_out(args), args.output / "rollouts.csv")
        curves = _curves(args)
        references = {name: 100 * float(rows.mean()) for name, rows in others.items()}
        figure = draw_learning_curves(curves, references)
        write_file(args.output / "learning_curves.png", to_png(figure))
        text = _page(task, args, episodes, others, searches)
        write_file(args.output / "table.md", text)
    print(text)
    return 0


def _held_out(args: Args) -> range:
    return range(HELD_OUT_SEED, HELD_OUT_SEED + args.cases)


def _folder(args: Args, seed: int) -> Path:
    return args.output / f"seed-{seed}"


def _train(task: TaskConfig, args: Args, seed: int) -> None:
    folder = _folder(args, seed)
    command = command_line("train", task=args.task, algorithm=CALENDAR, seed=seed, output=folder)
    done = folder / EVALUATIONS_FILE
    how = Search(seed=seed)
    if done.is_file():  # the fitness that a resume needs is not kept with the results
        last = pd.read_csv(done)["generation"].max()
        if last == how.generations and (folder / CALENDAR_FILE).is_file():
            return
    resume = (folder / "run.json").is_file()
    CalendarTraining(
        task, how, folder, command, evaluate_every=100, threads=args.threads, resume=resume
    ).train()


def _evaluate(task: TaskConfig, args: Args) -> pd.DataFrame:
    """Play each seed's calendar; ``ms`` is CPU time a decision, planning included."""
    rows = []
    plays = [
        (seed, calendars)
        for seed in range(args.seeds)
        for calendars in (CALENDARS if seed == _best_seed(args) else PLAYED_BY_SEEDS)
    ]
    for seed, calendars in tqdm(plays, unit="play"):
        parameters = read_parameters(_folder(args, seed) / CALENDAR_FILE)
        policy = calendar_policy(parameters, calendars)
        for case_seed in _held_out(args):
            case = make_case(task, case_seed)
            started = process_time()
            metrics = play_compiled(task, policy, case)
            ms = 1e3 * (process_time() - started) / metrics["decisions"]
            rows.append(
                {
                    "training_seed": seed,
                    "calendars": calendars,
                    "seed": case_seed,
                    "gap": metrics["gap"],
                    "makespan_s": metrics["makespan_s"],
                    "stages": int(metrics["prefill_stages"]),
                    "decisions": int(metrics["decisions"]),
                    "ms": ms,
                }
            )
    return pd.DataFrame(rows)


def _best_seed(args: Args) -> int:
    """Return the training seed of the smallest gap on the validation cases."""
    gaps = [
        pd.read_csv(_folder(args, seed) / EVALUATIONS_FILE)["gap_percent"].min()
        for seed in range(args.seeds)
    ]
    return int(np.argmin(gaps))


def _curves(args: Args) -> pd.DataFrame:
    """Return the evaluations of all seeds as learning curves, and those of PPO's runs."""
    tables = []
    for seed in range(args.seeds):
        table = pd.read_csv(_folder(args, seed) / EVALUATIONS_FILE)
        tables.append(
            pd.DataFrame(
                {
                    "label": "calendar",
                    "seed": seed,
                    "training_s": table["training_s"],
                    "gap_percent": table["gap_percent"],
                }
            )
        )
    if args.others.is_file():
        others = pd.read_csv(args.others)
        others = others[others["variant"] == "main"].assign(label="ppo")
        tables.append(others[["label", "seed", "training_s", "gap_percent"]])
    return pd.concat(tables, ignore_index=True)


def _page(
    task: TaskConfig,
    args: Args,
    episodes: pd.DataFrame,
    others: dict[str, pd.Series],
    searches: pd.DataFrame,
) -> str:
    command = command_line(
        "study_calendar", task=args.task, seeds=args.seeds, cases=args.cases, output=args.output
    )
    best = _best_seed(args)
    rows = []
    for (seed, calendars), group in episodes.groupby(["training_seed", "calendars"], sort=False):
        gaps = group.set_index("seed")["gap"]
        row = {
            "training seed": seed,
            "calendars": calendars,
            "n": len(gaps),
            "gap (%)": with_interval(gaps.to_numpy(float), 100),
            "CPU ms a decision": f"{group['ms'].median():.3f}",
            "stages": f"{group['stages'].mean():.1f}",
        }
        for name, theirs in others.items():
            difference = gaps.to_numpy(float) - theirs.to_numpy(float)
            row[f"− {name} (points)"] = with_interval(difference, 100)
        rows.append(row)
    own = episodes[episodes["calendars"] == 30].groupby("training_seed")["gap"].mean()
    mean, half = mean_interval(own.to_numpy(float))
    return (
        f"# Calendars learned for {task.name}\n\n`{command}`\n\n"
        f"Each seed is a run of `train.py --algorithm calendar`; seed {best} has the smallest gap on the "
        "validation cases. Intervals in the table are over cases. With 30 calendars the mean over "
        f"{args.seeds} training seeds is {100 * mean:.2f} ± {100 * half:.2f} % (over seeds).\n\n"
        f"{to_markdown(pd.DataFrame(rows))}\n"
        "`CPU ms a decision` is the median over cases of all CPU time of an episode, planning before it "
        "included, over its decisions.\n\n"
        "Searches at every decision, with an agent that goes on in their imagination:\n\n"
        f"{rollouts_table(searches, others)}\n"
    )
