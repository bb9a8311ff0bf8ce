"""Does comparing C_p with C_d pick the better action? Both are tried, on known distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pandas as pd

from servegym.envs.files import write_file
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import USUAL_JOBS
from servegym.envs.task.distributions import OUTPUTS
from servegym.envs.workload.presets import WORKLOAD_PRESETS
from servegym.studies.cases import held_out, load_tasks, short_name
from servegym.studies.checks.common import Collection, noted_multipliers, picture
from servegym.studies.checks.iteration_rule import (
    ERRORS,
    FIXED_JUDGE,
    NOISES,
    PANEL,
    lines,
    parse_outputs,
    play_case,
    report,
)
from servegym.studies.cli import check_number, command_line, parse
from servegym.studies.workers import open_workers

MAX_SAMPLES: Final = 1_000_000


@dataclass(frozen=True)
class Args:
    """Judge the Lagrangian rule's decisions; goes on where it was interrupted."""

    tasks: str = "GSM8K-v0,Paper-v0"
    """Comma-separated tasks or task TOMLs: clients, number of requests and cost model."""
    outputs: str = "constant,uniform,narrow,wide,bimodal,gsm8k-lognormal"
    """Comma-separated distributions of output lengths, constructed ones or workload presets."""
    cases: int = 16
    """Held-out cases of each task and distribution, seeds 1000000 and up."""
    samples: int = 30
    """Decisions of an episode that are judged, at most."""
    output: Path = Path("results/checks/iteration_rule")
    """Folder for a CSV file a task, iteration_rule.md and iteration_rule.png."""
    jobs: int = USUAL_JOBS
    """Worker processes."""
    cluster: str | None = None
    """Workers of a cluster, in place of --jobs: tcp://HOST:PORT (dask), ray://HOST:PORT or ray:auto (Ray)."""


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    asked = {
        name: getattr(args, name) for name in ("tasks", "outputs", "cases", "samples", "output")
    }
    return command_line("check_iteration_rule", **asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Play, judge, tabulate and draw."""
    args = parse(Args, argv)
    tasks, seeds = load_tasks(args.tasks), held_out(args.cases)
    all_outputs = parse_outputs(args.outputs)
    check_number("--samples", args.samples, 1, MAX_SAMPLES)
    asked = {"samples": args.samples, "errors": ERRORS, "noises": NOISES}
    asked |= {"judges": [FIXED_JUDGE, *PANEL], "tuned": noted_multipliers()}
    with open_workers(args.jobs, args.cluster) as crew, locked(args.output):
        collection = Collection(
            args.output, asked, texts=("family",), parts=(*OUTPUTS, *WORKLOAD_PRESETS)
        )
        collection.open(tasks)
        tables = {}
        for task in tasks:
            parts = []
            for outputs in all_outputs:
                play = partial(play_case, outputs=outputs, samples=args.samples)
                rows = collection.rows(task, seeds, play, crew, outputs)
                parts.append(rows.assign(outputs=outputs))
            tables[short_name(task)] = task, pd.concat(parts, ignore_index=True)
        text = report(tables, all_outputs, args.samples, command_of(args))
        write_file(args.output / "iteration_rule.md", text)
        panels = {name: lines(task, rows, all_outputs) for name, (task, rows) in tables.items()}
        png = picture(panels, "error of all estimates of C_p (%)")
        write_file(args.output / "iteration_rule.png", png)
    print(text)
    return 0
