"""Search for the best schedule of each case with all lengths known; tabulate what rules leave."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from servegym.baselines.calendar.planner import plan_jointly
from servegym.envs.bounds.padding import joint_bound
from servegym.envs.errors import ServegymError
from servegym.envs.files import write_file
from servegym.envs.playing.evaluation import BEST_KNOWN, make_case, play
from servegym.envs.playing.identity import check_unchanged, claim, hash_of, notes_of
from servegym.envs.playing.locks import locked
from servegym.envs.playing.summary import UNFINISHED, fixed, to_markdown, with_interval
from servegym.envs.playing.tables import ResumableTable
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.task.registered import load_task
from servegym.studies.cases import parse_policies, parse_seeds
from servegym.studies.cli import command_line, parse
from servegym.studies.policies import make_policy, weights_of

COLUMNS = (
    "task",
    "seed",
    "lower_bound_s",
    "joint_bound_s",
    "best_known_s",
    "found_by",
    "searched_s",
    "stages",
    "search_s",
)
"""Of ``best_known.csv``; behind them one makespan a policy. ``searched_s`` is the makespan that the
search found in ``search_s`` seconds, ``best_known_s`` the least of it and of all policies."""

FILE = "best_known.csv"
SEARCH = "search"


@dataclass(frozen=True)
class Args:
    """Search for best-known schedules; goes on where it was interrupted."""

    task: str = "GSM8K-v0"
    """A registered task or a task TOML, all of whose requests are present at t = 0."""
    seeds: str = "0:10"
    """FIRST:AFTER_LAST, or one seed. Held-out seeds begin at 1000000."""
    policies: str = "hybrid,lookahead-0.7,aligned,aligned-lookahead-0.7,rollout"
    """Comma-separated policies to compare with."""
    time_limit: float = 300.0
    """Seconds of search for a case."""
    output: Path = Path("results/best_known")
    """Folder for best_known.csv, best_known.md and the schedules, a JSON file a case."""


def search_case(
    task: TaskConfig, seed: int, args: Args, weights: Mapping[str, str], known: Mapping[str, str]
) -> dict[str, Any]:
    """Search one case, write its schedule and return its row of the table.

    ``weights`` and ``known`` are the hashes of agents and of the workload file, which must not change.
    """
    case = make_case(task, seed)
    clients = task.cluster.clients  # ``main`` has refused clusters
    costs = lower(task).costs
    started = perf_counter()
    plan = plan_jointly(case.requests, clients, costs, args.time_limit, seed)
    seconds = perf_counter() - started
    stages = [{"clock": stage.clock, "requests": list(stage.requests)} for stage in plan.stages]
    makespans = {SEARCH: plan.makespan_s}
    for name in parse_policies(args.policies, task.name):
        policy = make_policy(name, task.name, weights)
        makespans[name] = play(task, name, policy, case, seed).row["makespan_s"]
    finished = {name: seconds for name, seconds in makespans.items() if not math.isnan(seconds)}
    fastest = min(finished, key=finished.__getitem__)
    check_unchanged(task, known)
    schedule = json.dumps({"seed": seed, "stages": stages}) + "\n"
    write_file(args.output / f"{seed}.json", schedule)
    return {
        "task": task.name,
        "seed": seed,
        "lower_bound_s": plan.lower_bound_s,
        "joint_bound_s": joint_bound(case.requests, clients, costs).seconds,
        "best_known_s": makespans[fastest],
        "found_by": fastest,
        "searched_s": makespans.pop(SEARCH),
        "stages": len(plan.stages),
        "search_s": seconds,
    } | makespans


def report(rows: pd.DataFrame, command: str) -> str:
    """Return best_known.md: each case's bounds, best known and best policy, then mean gaps."""
    policies = [name for name in rows.columns if name not in COLUMNS]
    fastest = _best_policy(rows, policies)
    cases = pd.DataFrame(
        {
            "seed": rows["seed"].astype(str),
            "lower bound (s)": rows["lower_bound_s"].map("{:.2f}".format),
            "joint bound (s)": rows["joint_bound_s"].map("{:.2f}".format),
            "best known (s)": rows["best_known_s"].map("{:.2f}".format),
            "by": rows["found_by"],
            "best policy (s)": fastest["seconds"],
            "which": fastest["name"],
            "best known's gap (%)": _gaps(rows, "best_known_s", "lower_bound_s").map(fixed),
            "… to joint bound (%)": _gaps(rows, "best_known_s", "joint_bound_s").map(fixed),
            "stages": rows["stages"].astype(str),
            "search (s)": rows["search_s"].map("{:.0f}".format),
        }
    )
    schedules = {"joint bound": "joint_bound_s", "best known": "best_known_s"}
    schedules |= {name: name for name in policies}
    means = pd.DataFrame(
        [
            {
                "schedule": name,
                "gap to lower bound (%)": _mean_gap(rows, column, "lower_bound_s"),
                "gap to joint bound (%)": _mean_gap(rows, column, "joint_bound_s"),
            }
            for name, column in schedules.items()
        ]
    )
    return (
        f"# Best-known schedules\n\n`{command}`\n\n"
        "Makespans. The search sees all lengths; best known is the least of what it found in its time "
        "and of all\npolicies. The lower bound is that of rewards and gaps, the joint bound the "
        f"stronger one of\n`envs/bounds/padding.py`.\n\n{to_markdown(cases)}\nMean gaps over "
        f"{len(rows)} cases with 95 % Student-t intervals:\n\n{to_markdown(means)}"
    )


def _best_policy(rows: pd.DataFrame, policies: Sequence[str]) -> pd.DataFrame:
    """Return makespan and name of each case's best policy; none where no policy finished."""
    best = []
    for makespans in rows[list(policies)].to_numpy(float):
        if np.isnan(makespans).all():
            best.append((UNFINISHED, "–"))
        else:
            place = int(np.nanargmin(makespans))
            best.append((fixed(makespans[place]), policies[place]))
    return pd.DataFrame(best, columns=["seconds", "name"], index=rows.index)


def _gaps(rows: pd.DataFrame, column: str, bound: str) -> pd.Series:
    """Return gaps in percent."""
    return 100 * (rows[column] / rows[bound] - 1)


def _mean_gap(rows: pd.DataFrame, column: str, bound: str) -> str:
    return "" if column == bound else with_interval(_gaps(rows, column, bound).to_numpy())


def open_rows(
    args: Args, task: TaskConfig, weights: Mapping[str, str]
) -> tuple[TaskConfig, ResumableTable]:
    """Return the task as it is named in the folder, and the table of the finished cases there.

    Refuses a folder of another search.
    """
    asked = {"task": notes_of(task), "policies": args.policies, "time_limit": args.time_limit}
    asked |= hash_of(task)
    if weights:
        asked["weights"] = dict(weights)
    notes = claim(args.output / "search.json", asked, "cases", tables=[FILE])
    path = args.output / FILE
    policies = parse_policies(args.policies, task.name)
    schema = replace(BEST_KNOWN, columns=[*COLUMNS, *policies], others=False, optional=policies)
    schema = replace(schema, if_deleted="its case is searched again")
    table = ResumableTable(path, schema, "choose a new --output folder", ("seed",))
    return replace(task, name=notes["task"]["name"]), table


def check(args: Args, task: TaskConfig) -> None:
    """Refuse what the search cannot do, before anything is written."""
    parse_policies(args.policies, task.name)
    if args.time_limit <= 0:
        raise ServegymError(f"--time-limit must be > 0 seconds, got {args.time_limit}")
    if not load_task(args.task).cluster.is_batch_machine:
        raise ServegymError(
            f"--task {args.task} is a cluster; best_known knows one replica without a memory limit, "
            "mixed stages and sheds"
        )
    if task.workload.draws_arrivals:
        raise ServegymError(f"--task {args.task} has arrivals; best_known needs all at t = 0")
    if task.cluster.max_prefill_tokens > 0:
        raise ServegymError(f"--task {args.task} has a prefill token budget; best_known knows none")


def main(argv: Sequence[str] | None = None) -> int:
    """Search every case and write the tables."""
    args = parse(Args, argv)
    task, seeds = load_task(args.task), parse_seeds(args.seeds)
    check(args, task)
    make_case(task, seeds[0])  # refuse a workload file before anything is written
    with locked(args.output):
        text = search(task, seeds, args)
    print(text)
    return 0


def search(task: TaskConfig, seeds: Sequence[int], args: Args) -> str:
    """Search what is missing; write and return the report."""
    weights = weights_of(parse_policies(args.policies, task.name), task.name)
    task, table = open_rows(args, task, weights)
    known = hash_of(task)
    with table:
        for seed in tqdm(table.missing(seeds), desc=task.name):
            table.add([search_case(task, seed, args, weights, known)])
    rows = table.frame()
    rows = rows[rows["seed"].isin(seeds)].sort_values("seed")
    asked = {name: getattr(args, name) for name in ("task", "seeds", "policies", "time_limit")}
    text = report(rows, command_line("best_known", **asked, output=args.output))
    write_file(args.output / "best_known.md", text)
    return text
