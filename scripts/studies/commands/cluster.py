"""The schedulers that people know on the five tasks of clusters, memory and traffic, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from servegym.envs.files import write_file
from servegym.envs.playing.identity import claim, hash_of, notes_of
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS, Workers, run_parallel
from servegym.envs.playing.tables import ResumableTable, Row
from servegym.studies import anew
from servegym.studies.cases import held_out
from servegym.studies.cli import command_line, parse
from servegym.studies.known_schedulers import ENTRIES, ROWS, WHO, play_case, report, short_report
from servegym.studies.workers import open_workers

FILES = ("rows.json", "rows.csv")


@dataclass(frozen=True)
class Args:
    """Compare schedulers on Chat, Cluster, Disaggregated, Elastic and Rollout."""

    output: Path = Path("results/cluster")
    """Folder for the tables and raw rows. An interrupted run goes on, a finished one starts anew."""
    cases: int = 100
    """Held-out cases of each task, seeds 1000000 and up."""
    jobs: int = USUAL_JOBS
    """Worker processes."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Play and tabulate."""
    args = parse(Args, argv)
    seeds = held_out(args.cases)
    with open_workers(args.jobs, args.cluster) as crew, locked(args.output):
        anew.begin(args.output, {}, FILES)
        table = open_rows(args.output)
        fill(table, seeds, crew)
        # From the file: the same after any number of interruptions.
        rows = open_rows(args.output).frame()
        rows = rows[rows["seed"].isin(seeds)]
        text = report(rows, command_line("cluster", cases=args.cases, output=args.output))
        write_file(args.output / "table.md", text)
        write_file(args.output / "short.md", short_report(rows))
        anew.end(args.output)
    print(text)
    print(f"wrote {args.output}: table.md, short.md, rows.csv")
    return 0


def open_rows(folder: Path) -> ResumableTable:
    """Return the rows of a folder; refuse those of other tasks."""
    asked = {
        entry.name: {"task": notes_of(entry.task), "window": entry.window} | hash_of(entry.task)
        for entry in ENTRIES
    }
    claim(folder / FILES[0], asked, "episodes", indent=1, tables=FILES[1:])
    places = [entry.name for entry in ENTRIES], list(WHO)

    def order(row: Row) -> tuple[int, int, int]:
        return places[0].index(row["task"]), places[1].index(row["policy"]), row["seed"]

    return ResumableTable(
        folder / FILES[1],
        ROWS,
        "remove the file or choose a new --output folder",
        ("task", "policy", "seed"),
        order=order,
        float_format="%.6g",
    )


def fill(table: ResumableTable, seeds: Sequence[int], jobs: Workers) -> None:
    """Play what is missing."""
    works = []
    for entry in ENTRIES:
        for seed in seeds:
            keys = [(entry.name, name, seed) for name in entry.policies]
            if names := [name for _, name, _ in table.missing(keys)]:
                works.append((entry, names, seed))
    bar = tqdm(total=sum(len(names) for _, names, _ in works), unit="episode")
    with bar, closing(run_parallel(play_case, works, jobs)) as results, table:
        for rows in results:
            table.add(rows)
            bar.update(len(rows))
