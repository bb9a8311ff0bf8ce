"""How many clients: fixed counts against admission that looks at memory, by memory and length variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from servegym.envs.files import write_file
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS
from servegym.studies.answers.clients import (
    MEMORIES,
    TEXTS,
    Rows,
    clients_task,
    picture,
    play_case,
    report,
)
from servegym.studies.cases import held_out
from servegym.studies.checks.common import Collection
from servegym.studies.cli import command_line, parse, read_list
from servegym.studies.workers import open_workers


@dataclass(frozen=True)
class Args:
    """Fix the number of clients, or decide it online; goes on where it was interrupted."""

    memories: str = ",".join(map(str, MEMORIES))
    """Comma-separated tokens of memory."""
    cases: int = 30
    """Held-out cases of each setting, seeds 1000000 and up."""
    output: Path = Path("results/answers/clients")
    """Folder for a CSV file a memory, clients.md and clients.png."""
    jobs: int = USUAL_JOBS
    """Worker processes."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    asked = {name: getattr(args, name) for name in ("memories", "cases", "output")}
    return command_line("answer_clients", **asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Play, tabulate and draw."""
    args = parse(Args, argv)
    memories = read_list("--memories", args.memories, [str(memory) for memory in MEMORIES])
    tasks, seeds = [clients_task(int(memory)) for memory in memories], held_out(args.cases)
    with open_workers(args.jobs, args.cluster) as crew, locked(args.output):
        collection = Collection(args.output, {}, texts=TEXTS)
        collection.open(tasks)
        tables = [collection.rows(task, seeds, play_case, crew) for task in tasks]
        rows = Rows(pd.concat(tables, ignore_index=True))
        text = report(rows, command_of(args))
        write_file(args.output / "clients.md", text)
        write_file(args.output / "clients.png", picture(rows))
    print(text)
    return 0
