"""Queues that are known exactly, beside the simulator: mean waits and the rates that a replica can bear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from servegym.envs.files import make_folder, write_file
from servegym.studies.checks.capacities import CAPACITIES
from servegym.studies.checks.queueing import BATCHES, QUEUES, WARM_UP, batch_means
from servegym.studies.cli import check_number, command_line, parse

LEAST = 10_000  # requests; fewer leave batches too small to mean anything

LOADS = (0.95, 0.98, 1.02, 1.05)

WHAT = """Each queue is a task of the simulator, served in compiled code under a first-come rule (or the one
named). Means over requests after the first {warm_up:.0%}, with 95 % intervals of {batches} batch means;
of so many intervals one in twenty misses the truth."""

RATES = """Poisson arrivals at a share of the rate that a fluid count says a replica can just bear. Every pass
takes as long, whatever is in it, but in the last row. saturated: requests per second with all of them
present at the start, as a share of the formula. growth: how many more are in system at the last arrival
than halfway, as a share of those who came since; in brackets what overload must leave, 1 − 1 / load."""


@dataclass(frozen=True)
class Args:
    """Serve queues that are known exactly, and tabulate them beside theory."""

    requests: int = 1_000_000
    """Requests of a queue."""
    seed: int = 0
    """Row k is drawn from (seed, k)."""
    output: Path = Path("results/checks")
    """Folder for queueing.md."""

    def __post_init__(self) -> None:
        check_number("--requests", self.requests, LEAST, 10_000_000)
        check_number("--seed", self.seed, 0, 2**62)


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    asked = {name: getattr(args, name) for name in ("requests", "seed", "output")}
    return command_line("check_queueing", **asked)


def queue_rows(args: Args) -> tuple[list[str], int, int]:
    """One line a number; how many intervals hold the exact value, and how many there are."""
    lines, held, count = list[str](), 0, 0
    for place, queue in enumerate(tqdm(QUEUES, desc="queues")):
        rng = np.random.default_rng([args.seed, place])
        for measured in queue.play(args.requests, rng):
            mean, half = batch_means(measured.values)
            within = abs(mean - measured.exact) <= half
            held, count = held + within, count + 1
            lines.append(
                f"| {queue.name} | {queue.how} | {measured.name} | {len(measured.values)} | "
                f"{measured.exact:.6f} | {mean:.6f} | ± {half:.6f} | {'yes' if within else 'no'} |"
            )
    return lines, held, count


def capacity_rows(args: Args) -> list[str]:
    """One line a replica: its rate, what it serves when saturated, growth at each load."""
    lines = []
    for place, capacity in enumerate(tqdm(CAPACITIES, desc="rates")):
        rng = np.random.default_rng([args.seed, len(QUEUES) + place])
        saturated = capacity.saturated(args.requests // 4, rng)
        growths = [capacity.left_over(load, args.requests // 2, rng)[1] for load in LOADS]
        cells = [
            f"{growth + 0.0:.4f} ({max(0.0, 1 - 1 / load):.4f})"
            for growth, load in zip(growths, LOADS, strict=True)
        ]
        lines.append(
            f"| {capacity.name} | `{capacity.policy}` | {capacity.formula} | {capacity.rate:.3f} | "
            f"{saturated:.4f} | {' | '.join(cells)} |"
        )
    return lines


def report(args: Args) -> str:
    """Return queueing.md."""
    rows, held, count = queue_rows(args)
    first = "| queue | the simulator is it by | what | n | exact | simulated | 95 % | holds it |"
    loads = " | ".join(f"growth at {load}" for load in LOADS)
    second = f"| replica | policy | formula | per second | saturated | {loads} |"
    parts = [
        "# The simulator beside exact queues",
        f"`{command_of(args)}`",
        "## Mean waits",
        WHAT.format(warm_up=WARM_UP, batches=BATCHES),
        "\n".join([first, "|:--|:--|:--|" + "--:|" * 4 + ":--|", *rows]),
        f"{held} of {count} intervals hold the exact value.",
        "## Rates that a replica can bear",
        RATES,
        "\n".join([second, "|:--|:--|:--|" + "--:|" * (2 + len(LOADS)), *capacity_rows(args)]),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, tabulate and write."""
    args = parse(Args, argv)
    make_folder(args.output)
    text = report(args)
    write_file(args.output / "queueing.md", text)
    print(text)
    return 0
