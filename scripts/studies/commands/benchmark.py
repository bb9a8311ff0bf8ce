"""Measure speed: the simulator, the environment, the policies, the planner. One core.

Every figure is a median over repeats. The speed of the machine itself is that of a plain Python loop,
timed between the measurements, so that runs on shared machines can be compared by ratios.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pandas as pd

from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.summary import to_markdown
from servegym.studies.cli import check_number, command_line, parse
from servegym.studies.speed import (
    Figure,
    commit,
    decision_figures,
    environment_figures,
    latency_figures,
    machine,
    planner_figures,
    python_loop,
    simulator_figures,
    task_figures,
    training_figures,
    vector_figures,
)

MAX_REPEATS = 1_000_000


@dataclass(frozen=True)
class Args:
    """Measure speed; writes benchmark.csv and benchmark.md."""

    output: Path = Path("results/benchmark")
    """Folder for the results."""
    repeats: int = 5
    """Repeats of each measurement; the median counts."""
    plans: int = 100
    """Seeds the planner is tried on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the tables."""
    args = parse(Args, argv)
    check_number("--repeats", args.repeats, 1, MAX_REPEATS)
    check_number("--plans", args.plans, 1, MAX_REPEATS)
    make_folder(args.output)
    loops = [python_loop()]
    figures: list[Figure] = []
    measurements: list[Callable[[], list[Figure]]] = [
        lambda: simulator_figures(args.repeats),
        lambda: environment_figures(args.repeats),
        lambda: vector_figures(args.repeats),
        lambda: task_figures(args.repeats),
        latency_figures,
        decision_figures,
        lambda: planner_figures(args.plans),
    ]
    if importlib.util.find_spec("sb3_contrib"):
        measurements.append(lambda: training_figures(args.repeats))
    else:
        print("training is not measured: it needs the extra servegym[train]")
    for measure in measurements:
        figures += measure()
        loops.append(python_loop())
    figures.append(Figure("(the machine: ten million additions in Python)", median(loops), "s", ""))
    table = pd.DataFrame([figure.__dict__ for figure in figures])
    write_file(args.output / "benchmark.csv", table.to_csv(index=False))
    shown = table.assign(value=table["value"].map(lambda value: f"{value:.3g}"))
    text = (
        f"# Speed, one core\n\n`{command_line('benchmark', output=args.output)}` at {commit()} on "
        f"{machine()}\n\n{to_markdown(shown)}"
    )
    write_file(args.output / "benchmark.md", text)
    print(text)
    return 0
