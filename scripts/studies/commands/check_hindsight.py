"""Policies that never evict beside the least sum of latencies that hindsight could have had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from tqdm import tqdm

from servegym.envs.files import make_folder, write_file
from servegym.studies.checks.hindsight import POLICIES, draw, least_latency, total_latency
from servegym.studies.checks.intervals import (
    INTERVALS,
    LONGEST,
    PROMPT,
    draw_outputs,
    mean_latency,
)
from servegym.studies.cli import check_number, command_line, parse


class Size(NamedTuple):
    """What instances of a row are drawn from."""

    requests: int
    memory: tuple[int, int]  # tokens, least and most
    rate: float  # arrivals in a unit; 0: all at t = 0


SIZES: Final = (
    Size(6, (10, 14), 0.0),
    Size(6, (10, 14), 0.5),
    Size(8, (10, 14), 0.0),
    Size(8, (10, 14), 0.5),
    Size(10, (12, 18), 0.0),
    Size(10, (12, 18), 0.5),
)

WHAT = """The model of arXiv 2502.07115: rounds of one unit, free prefills, a memory of M tokens, nobody is
interrupted; prompts of 1 … 5 tokens, outputs as long as memory holds. Each policy plays in the simulator.
HiGHS finds the least sum of latencies in hindsight, among all that are no worse than the best
policy's: a policy that beat hindsight would leave none, and end the command. A ratio is a policy's sum over
that least one; mean and worst are over the cases that are proven within the limit."""

AFTER = """The paper has 40 to 60 requests and M of 30 to 50. As its summaries say, MC-SF has mean ratios of
1.005 there (all at t = 0) and 1.047 (arrivals); HiGHS proves no case of that size. Ratios of so few requests
are worse: one wrong start weighs more."""


MEMORIES: Final = (500, 2000)
REQUESTS: Final = 300

INTERVAL_WHAT = f"""The model of arXiv 2508.14544: {REQUESTS} requests at t = 0, prompts of {PROMPT} tokens,
outputs of 1 … {LONGEST}. Mean latency in units; `mc-sf` knows the outputs. An evicted request goes on with
the tokens that it has, at no cost, so `a-min` may be better than who knows all and evicts nobody. In the
paper it starts again."""


@dataclass(frozen=True)
class Args:
    """Play tiny cases and solve them in hindsight."""

    cases: int = 20
    """Cases of each size."""
    limit_s: float = 60.0
    """Seconds for one integer program."""
    seed: int = 0
    """Case k of a size is drawn from (seed, place of the size, k)."""
    output: Path = Path("results/checks")
    """Folder for hindsight.md."""

    def __post_init__(self) -> None:
        check_number("--cases", self.cases, 1, 10_000)
        check_number("--limit-s", self.limit_s, 0.01, 1e6)
        check_number("--seed", self.seed, 0, 2**62)


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    asked = {name: getattr(args, name) for name in ("cases", "limit_s", "seed", "output")}
    return command_line("check_hindsight", **asked)


def rows_of(args: Args, place: int, size: Size) -> list[str]:
    """One line a policy: ratios over the proven cases of a size."""
    ratios: list[list[float]] = []
    for k in tqdm(range(args.cases), desc=f"{size.requests} requests, rate {size.rate:g}"):
        rng = np.random.default_rng([args.seed, place, k])
        instance = draw(size.requests, size.memory, size.rate, rng)
        sums = [total_latency(instance, policy) for policy in POLICIES.values()]
        best = least_latency(instance, min(sums), args.limit_s)
        if best is not None:
            ratios.append([total / best for total in sums])
    when = f"rate {size.rate:g}" if size.rate > 0 else "at t = 0"
    cells = f"| {size.requests} | {size.memory[0]} … {size.memory[1]} | {when} |"
    cells += f" {len(ratios)} of {args.cases} |"
    lines = []
    for name, own in zip(POLICIES, zip(*ratios, strict=True), strict=False):
        values = np.array(own)
        lines.append(
            f"{cells} {name} | {values.mean():.4f} | {values.max():.4f} | {(values == 1).sum()} |"
        )
    return lines or [f"{cells} none | | | |"]


def interval_rows(args: Args) -> list[str]:
    """One line a memory, a kind of outputs and of intervals."""
    lines = []
    for memory in MEMORIES:
        for uniform in (True, False):
            rng = np.random.default_rng([args.seed, memory, int(uniform)])
            outputs = draw_outputs(uniform, REQUESTS, rng)
            exact, _ = mean_latency("mc-sf", outputs, outputs, memory)
            for name, ends in INTERVALS.items():
                lower, upper = ends(outputs)
                careful, _ = mean_latency("a-max", outputs, upper, memory)
                bold, evictions = mean_latency("a-min", outputs, lower, memory)
                kind = "uniform" if uniform else "lognormal"
                lines.append(
                    f"| {memory} | {kind} | {name} | {exact:.2f} | {bold:.2f} | {evictions} | {careful:.2f} |"
                )
    return lines


def report(args: Args) -> str:
    """Return hindsight.md."""
    lines = [line for place, size in enumerate(SIZES) for line in rows_of(args, place, size)]
    bounds = "| M | outputs | intervals | mc-sf | a-min | evictions | a-max |"
    head = "| n | M | arrivals | proven | policy | mean ratio | worst | optimal |"
    parts = [
        "# MC-SF beside hindsight",
        f"`{command_of(args)}`",
        WHAT,
        "\n".join([head, "|--:|:--|:--|--:|:--|--:|--:|--:|", *lines]),
        AFTER,
        "## Lengths known by an interval",
        INTERVAL_WHAT,
        "\n".join([bounds, "|--:|:--|:--|--:|--:|--:|--:|", *interval_rows(args)]),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Play, solve, tabulate and write."""
    args = parse(Args, argv)
    make_folder(args.output)
    text = report(args)
    write_file(args.output / "hindsight.md", text)
    print(text)
    return 0
