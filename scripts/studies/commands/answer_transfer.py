"""When moving running requests between replicas pays: bandwidth, lengths, skew; copy or recompute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servegym.envs.files import write_file
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS
from servegym.studies.answers import measured_links
from servegym.studies.answers.transfer import (
    LENGTHS,
    TEXTS,
    Rows,
    picture,
    play_case,
    report,
    transfer_task,
)
from servegym.studies.cases import held_out
from servegym.studies.checks.common import Collection
from servegym.studies.cli import command_line, parse, read_list
from servegym.studies.workers import open_workers


@dataclass(frozen=True)
class Args:
    """Move running requests over links of 1 … 450 GB/s; goes on where it was interrupted."""

    lengths: str = ",".join(LENGTHS)
    """Comma-separated presets of lengths."""
    cases: int = 40
    """Held-out cases of each preset, seeds 1000000 and up."""
    output: Path = Path("results/answers/transfer")
    """Folder for a CSV file a preset, transfer.md and transfer.png."""
    jobs: int = USUAL_JOBS
    """Worker processes."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    asked = {name: getattr(args, name) for name in ("lengths", "cases", "output")}
    return command_line("answer_transfer", **asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Play, tabulate and draw."""
    args = parse(Args, argv)
    names, seeds = read_list("--lengths", args.lengths, tuple(LENGTHS)), held_out(args.cases)
    tasks = {name: transfer_task(name) for name in names}
    with open_workers(args.jobs, args.cluster) as crew, locked(args.output):
        collection = Collection(args.output, {}, texts=TEXTS)
        collection.open(list(tasks.values()))
        tables = {
            name: Rows(collection.rows(task, seeds, play_case, crew))
            for name, task in tasks.items()
        }
        text = report(tables, measured_links.report(), command_of(args))
        write_file(args.output / "transfer.md", text)
        write_file(args.output / "transfer.png", picture(tables))
    print(text)
    return 0
