"""Beyond 1,000 clients: planning time, cost of a decision and gap to the bound, up to 20,000 clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servegym.envs.files import write_file
from servegym.envs.playing.locks import locked
from servegym.studies.answers.scale import CLIENTS, TEXTS, base_task, picture, play_case, report
from servegym.studies.cases import held_out
from servegym.studies.checks.common import Collection
from servegym.studies.cli import check_number, command_line, parse


@dataclass(frozen=True)
class Args:
    """Play clusters of 200 … 20,000 clients on 1 … 64 replicas; goes on where it was interrupted."""

    most_clients: int = CLIENTS[-1]
    """Clients of the largest clusters."""
    cases: int = 10
    """Held-out cases, seeds 1000000 and up."""
    output: Path = Path("results/answers/scale")
    """Folder for scale.csv, scale.md and scale.png."""
    jobs: int = 1
    """Worker processes; more than one disturb each other's times."""

    def __post_init__(self) -> None:
        check_number("--most-clients", self.most_clients, CLIENTS[0], CLIENTS[-1])


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    asked = {name: getattr(args, name) for name in ("most_clients", "cases", "output")}
    return command_line("answer_scale", **asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Play, time, tabulate and draw."""
    args = parse(Args, argv)
    task, seeds = base_task(args.most_clients), held_out(args.cases)
    with locked(args.output):
        collection = Collection(args.output, {}, texts=TEXTS)
        collection.open([task])
        rows = collection.rows(task, seeds, play_case, args.jobs)
        text = report(rows, command_of(args))
        write_file(args.output / "scale.md", text)
        write_file(args.output / "scale.png", picture(rows))
    print(text)
    return 0
