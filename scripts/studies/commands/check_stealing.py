"""What stealing is worth, by how well output lengths are predicted: each rule with and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servegym.envs.files import write_file
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS
from servegym.studies.cases import held_out, load_tasks, short_name
from servegym.studies.checks.common import TAUS, Collection, noted_multipliers, picture
from servegym.studies.checks.stealing import lines, play_case, report
from servegym.studies.cli import command_line, parse
from servegym.studies.workers import open_workers


@dataclass(frozen=True)
class Args:
    """Measure the value of stealing; goes on where it was interrupted."""

    tasks: str = "GSM8K-v0,Paper-v0"
    """Comma-separated tasks or task TOMLs, all of whose requests are present at t = 0."""
    cases: int = 100
    """Held-out cases of each task, seeds 1000000 and up."""
    output: Path = Path("results/checks/stealing")
    """Folder for a CSV file a task, stealing.md and stealing.png."""
    jobs: int = USUAL_JOBS
    """Worker processes."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    asked = {name: getattr(args, name) for name in ("tasks", "cases", "output")}
    return command_line("check_stealing", **asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Play, tabulate and draw."""
    args = parse(Args, argv)
    tasks, seeds = load_tasks(args.tasks), held_out(args.cases)
    with open_workers(args.jobs, args.cluster) as crew, locked(args.output):
        collection = Collection(
            args.output, {"taus": TAUS, "tuned": noted_multipliers()}, texts=("tau",)
        )
        collection.open(tasks)
        tables = {
            short_name(task): (task, collection.rows(task, seeds, play_case, crew))
            for task in tasks
        }
        text = report(tables, command_of(args))
        write_file(args.output / "stealing.md", text)
        panels = {name: lines(task, rows) for name, (task, rows) in tables.items()}
        png = picture(panels, "Kendall's τ of predicted with true output lengths")
        write_file(args.output / "stealing.png", png)
    print(text)
    return 0
