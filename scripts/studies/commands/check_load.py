"""What the machines of registered tasks bear by the formula and as served, beside what is offered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from servegym.envs.files import make_folder, write_file
from servegym.envs.task.served import SERVED
from servegym.studies.checks.load import load_of
from servegym.studies.cli import check_number, command_line, parse

TEXT = """# What the tasks' machines bear

`{command}`

{requests} requests of each task present at once, under `vllm`, which moves them as the task allows; means
of {seeds} draws. μ = K / (b · E[g]) (Nie, Si and Zhou, 2605.04595): K tokens of memory of all replicas that
decode, b mean seconds of their passes, stops included, g token-passes of a request. Served: requests a second
of the middle 60 % of finishes. Where served is far below μ, clients or prefill limit before memory does.
Load: what arrives / served.

| task | K (tokens) | E[g] | b (ms) | μ (per s) | served | served / μ | arrives | load |
|:--|--:|--:|--:|--:|--:|--:|--:|--:|
"""


@dataclass(frozen=True)
class Args:
    """Serve each task's requests at once; writes load.md."""

    requests: int = 3000
    """Of each draw."""
    seeds: int = 5
    """Draws."""
    output: Path = Path("results/tasks")
    """Folder for load.md."""

    def __post_init__(self) -> None:
        check_number("--requests", self.requests, 100, 100_000)
        check_number("--seeds", self.seeds, 1, 10_000)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, tabulate and write."""
    args = parse(Args, argv)
    make_folder(args.output)
    command = command_line(
        "check_load", requests=args.requests, seeds=args.seeds, output=args.output
    )
    text = TEXT.format(command=command, requests=args.requests, seeds=args.seeds)
    for task in SERVED:
        loads = [load_of(task, "vllm", args.requests, seed) for seed in range(args.seeds)]
        known, served = mean(load.known for load in loads), mean(load.served for load in loads)
        arrivals = task.workload.arrivals
        rate = arrivals.rate_per_s if arrivals is not None else None
        offered = "all at t = 0 | " if rate is None else f"{rate:.3g} | {rate / served:.2f}"
        text += (
            f"| {task.name.removeprefix('servegym/')} | {loads[0].tokens} "
            f"| {mean(load.area for load in loads):.3g} "
            f"| {1e3 * mean(load.pass_s for load in loads):.1f} | {known:.2f} | {served:.2f} "
            f"| {served / known:.2f} | {offered} |\n"
        )
    write_file(args.output / "load.md", text)
    print(text)
    return 0
