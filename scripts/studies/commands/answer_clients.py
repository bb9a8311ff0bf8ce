"""How many clients: fixed counts against admission that looks at memory, by memory and length variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servegym.envs.files import write_file
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS
from servegym.studies.answers.clients import TEXTS, Rows, clients_task, picture, play_case, report
from servegym.studies.cases import held_out
from servegym.studies.checks.common import Collection
from servegym.studies.cli import command_line, parse


@dataclass(frozen=True)
class Args:
    """Fix the number of clients, or decide it online; goes on where it was interrupted."""

    cases: int = 20
    """Held-out cases of each setting, seeds 1000000 and up."""
    output: Path = Path("results/answers/clients")
    """Folder for clients.csv, clients.md and clients.png."""
    jobs: int = USUAL_JOBS
    """Worker processes."""


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    return command_line("answer_clients", cases=args.cases, output=args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Play, tabulate and draw."""
    args = parse(Args, argv)
    task, seeds = clients_task(), held_out(args.cases)
    with locked(args.output):
        collection = Collection(args.output, {}, texts=TEXTS)
        collection.open([task])
        rows = Rows(collection.rows(task, seeds, play_case, args.jobs))
        text = report(rows, command_of(args))
        write_file(args.output / "clients.md", text)
        write_file(args.output / "clients.png", picture(rows))
    print(text)
    return 0
