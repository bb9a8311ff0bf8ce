"""Search for the best schedule of each case with all lengths known; tabulate what rules leave."""

from __future__ import annotations

if __name__ == "__main__":  # first of all: see _start.py
    import sys

    sys.path.insert(0, __file__.rpartition("/")[0] or ".")
    from _start import begin

    begin()

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
from _cli import command_line, parse, run
from _policies import make_policy
from evaluate import parse_policies, parse_seeds
from tqdm import tqdm

from servegym.baselines.joint_plan import plan_jointly
from servegym.envs.config import TaskConfig
from servegym.envs.errors import ServegymError
from servegym.envs.evaluation import make_case, play
from servegym.envs.files import make_folder, write_file
from servegym.envs.joint_bound import joint_bound
from servegym.envs.summary import to_markdown, with_interval
from servegym.envs.tasks import load_task

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


def search_case(task: TaskConfig, seed: int, args: Args, folder: Path) -> dict[str, Any]:
    """Search one case, write its schedule and return its row of the table."""
    case = make_case(task, seed)
    clients = task.cluster.clients
    costs = task.cost.tables(clients)
    started = perf_counter()
    plan = plan_jointly(case.requests, clients, costs, args.time_limit, seed)
    seconds = perf_counter() - started
    stages = [{"clock": stage.clock, "requests": stage.requests.tolist()} for stage in plan.stages]
    write_file(folder / f"{seed}.json", json.dumps({"seed": seed, "stages": stages}) + "\n")
    makespans = {SEARCH: plan.makespan_s}
    for name in parse_policies(args.policies, task.name):
        policy = make_policy(name, task.name)
        makespans[name] = play(task, name, policy, case, seed).row["makespan_s"]
    fastest = min(makespans, key=makespans.__getitem__)
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
    cases = pd.DataFrame(
        {
            "seed": rows["seed"].astype(str),
            "lower bound (s)": rows["lower_bound_s"].map("{:.2f}".format),
            "joint bound (s)": rows["joint_bound_s"].map("{:.2f}".format),
            "best known (s)": rows["best_known_s"].map("{:.2f}".format),
            "by": rows["found_by"],
            "best policy (s)": rows[policies].min(axis=1).map("{:.2f}".format),
            "which": rows[policies].idxmin(axis=1),
            "best known's gap (%)": _gaps(rows, "best_known_s", "lower_bound_s").map(
                "{:.2f}".format
            ),
            "… to joint bound (%)": _gaps(rows, "best_known_s", "joint_bound_s").map(
                "{:.2f}".format
            ),
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
        f"stronger one of\n`envs/joint_bound.py`.\n\n{to_markdown(cases)}\nMean gaps over "
        f"{len(rows)} cases with 95 % Student-t intervals:\n\n{to_markdown(means)}"
    )


def _gaps(rows: pd.DataFrame, column: str, bound: str) -> pd.Series:
    """Return gaps in percent."""
    return 100 * (rows[column] / rows[bound] - 1)


def _mean_gap(rows: pd.DataFrame, column: str, bound: str) -> str:
    return "" if column == bound else with_interval(_gaps(rows, column, bound).to_numpy())


def open_rows(args: Args, task: TaskConfig, path: Path) -> list[dict[str, Any]]:
    """Return the finished cases that stand in the folder; refuse those of another search."""
    asked = {"task": asdict(task), "policies": args.policies, "time_limit": args.time_limit}
    note = json.dumps(asked, indent=2, default=str) + "\n"
    make_folder(args.output)
    known = args.output / "search.json"
    if known.is_file() and known.read_text("utf-8") != note:
        raise ServegymError(
            f"{args.output} holds cases of another task, limit or version; choose a new --output"
        )
    write_file(known, note)
    if not path.is_file():
        return []
    return [dict(row) for row in pd.read_csv(path).to_dict("records")]  # type: ignore[arg-type]


def check(args: Args, task: TaskConfig) -> None:
    """Refuse what the search cannot do, before anything is written."""
    parse_policies(args.policies, task.name)
    if args.time_limit <= 0:
        raise ServegymError(f"--time-limit must be > 0 seconds, got {args.time_limit}")
    if task.workload.arrival_rate_per_s > 0:
        raise ServegymError(f"--task {args.task} has arrivals; best_known needs all at t = 0")
    if task.cluster.max_prefill_tokens > 0:
        raise ServegymError(f"--task {args.task} has a prefill token budget; best_known knows none")


def main(argv: Sequence[str] | None = None) -> int:
    """Search every case and write the tables."""
    args = parse(Args, argv)
    task, seeds = load_task(args.task), parse_seeds(args.seeds)
    check(args, task)
    path = args.output / "best_known.csv"
    rows = open_rows(args, task, path)
    done = {row["seed"] for row in rows}
    for seed in tqdm([seed for seed in seeds if seed not in done], desc=task.name):
        rows.append(search_case(task, seed, args, args.output))
        write_file(path, pd.DataFrame(rows).to_csv(index=False))
    table = pd.DataFrame(rows)
    table = table[table["seed"].isin(seeds)].sort_values("seed")
    asked = {name: getattr(args, name) for name in ("task", "seeds", "policies", "time_limit")}
    text = report(table, command_line("best_known", **asked, output=args.output))
    write_file(args.output / "best_known.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    run(main)
