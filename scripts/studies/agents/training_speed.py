"""Ways to train, compared for speed: what a decision costs, and the gap at equal CPU time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.agents.hyperparameters import Hyperparameters
from servegym.agents.record import read_run
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.pictures import draw_learning_curves, to_png
from servegym.envs.playing.evaluation import HELD_OUT_SEED, evaluate, read_episodes
from servegym.envs.playing.parallel import Workers
from servegym.envs.playing.summary import by_case, fixed, mean_interval, to_markdown, with_interval
from servegym.envs.playing.tables import Schema, read_rows
from servegym.envs.task.registered import load_task
from servegym.studies.agents.play import CURVES, keep_curves
from servegym.studies.agents.runs import ABLATED, Run, is_finished
from servegym.studies.policies import BEST, make_listed_policy, note_weights

COSTS_FILE: Final = "costs.csv"
SHOWN: Final = ("environments", "steps", "batch_size", "epochs", "width")
PASSED: Final = 3.0
"""A gap in percent: half the hybrid's, and just above the first plateau, 2.8 %, that agents come to."""

PLAIN: Final = "-plain"
"""Ends the name of a way with the libraries' own tanh and distribution, which is measured only."""

COSTS: Final = Schema(
    ("way", *SHOWN, "collect_us", "learn_us"),
    key=("way",),
    whole=SHOWN,
    texts=("way",),
    optional=(),
    if_deleted="measure it again with --parts measure",
)

NOTES: Final = """CPU time is of one torch thread: µs a decision to collect it (environment, choice of the
action) and to learn from it (all epochs), the least of several rollouts and updates in which the ways took
turns. CPU seconds are decisions × both. Validation gaps are of the best agent so far, means over training
seeds. Held-out gaps are of the best agents by validation, ± half a 95 % Student-t interval: over cases, of
the mean over training seeds; over training seeds, of each seed's mean over cases."""


def measure_costs(grid: Sequence[Run], runs: Path, output: Path, repeats: int) -> None:
    """Measure what a decision costs in each way that has been trained; writes ``costs.csv``."""
    from servegym.agents.speed import training_costs  # torch takes seconds

    ways: dict[str, Hyperparameters] = {}
    for run in _finished(grid, runs):
        recorded = read_run(runs / run.name)["hyperparameters"]
        names = {item.name for item in fields(Hyperparameters)}
        known = {name: value for name, value in recorded.items() if name in names}
        ways.setdefault(run.variant, Hyperparameters(**known))
    first = next(iter(ways))
    ways[f"{first}{PLAIN}"] = ways[first]
    costs = training_costs(load_task(ABLATED), ways, repeats, plain=[f"{first}{PLAIN}"])
    rows = [
        {"way": way, **{name: getattr(h, name) for name in SHOWN}}
        | {"collect_us": round(costs[way][0], 2), "learn_us": round(costs[way][1], 2)}
        for way, h in ways.items()
    ]
    make_folder(output)
    write_file(output / COSTS_FILE, pd.DataFrame(rows).to_csv(index=False))


def evaluate_ways(grid: Sequence[Run], runs: Path, output: Path, cases: int, jobs: Workers) -> None:
    """Keep the learning curves of finished runs; play their best agents on held-out cases."""
    finished = _finished(grid, runs)
    folders = {run.policy: runs / run.name / BEST for run in finished}
    weights = note_weights(folders, output)
    keep_curves(finished, runs, output)
    policy_of = partial(make_listed_policy, folders=folders, weights=weights)
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + cases)
    evaluate(load_task(ABLATED), policy_of, list(folders), seeds, output, jobs=jobs)


def _finished(grid: Sequence[Run], runs: Path) -> list[Run]:
    finished = [run for run in grid if is_finished(run, runs)]
    if not finished:
        raise ServegymError(f"{runs}: holds no finished run; begin with --parts train")
    return finished


def write_comparison(output: Path, command: str) -> list[Path]:
    """Write ``table.md`` and ``gap_against_cpu.png`` from the files in the folder; return their paths."""
    for name in (COSTS_FILE, "curves.csv", "episodes.csv"):
        if not (output / name).is_file():
            raise ServegymError(
                f"{output / name}: no such file; begin with --parts measure,evaluate"
            )
    costs = read_rows(output / COSTS_FILE, COSTS, "remove the file and measure again")
    curves = read_rows(output / "curves.csv", CURVES, "remove the file and play again")
    curves = with_cpu_time(curves, costs)
    episodes = read_episodes(output / "episodes.csv")
    plain = costs["way"].str.endswith(PLAIN)
    table = comparison(costs[~plain], curves, episodes)
    notes = f"{NOTES} {episodes['seed'].nunique()} held-out cases."
    for _, cost in costs[plain].iterrows():
        notes += (
            f" With torch's tanh and sb3-contrib's distribution `{cost['way'].removesuffix(PLAIN)}` takes "
            f"{cost['collect_us']:.1f} µs to collect and {cost['learn_us']:.1f} µs to learn."
        )
    text = f"# Ways to train for speed\n\n`{command}`\n\n{notes}\n\n"
    write_file(output / "table.md", text + to_markdown(table))
    shown = curves.assign(training_s=curves["cpu_s"]).rename(columns={"variant": "label"})
    figure = draw_learning_curves(shown, {})
    figure.axes[0].set_xlabel("CPU minutes of training")
    figure.axes[0].set_ylim(top=20)  # untrained agents' gaps would hide all differences
    write_file(output / "gap_against_cpu.png", to_png(figure))
    return [output / "table.md", output / "gap_against_cpu.png"]


def with_cpu_time(curves: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Return the evaluations of the ways measured, with ``cpu_s``, in the order of ``costs``."""
    us = (costs["collect_us"] + costs["learn_us"]).set_axis(costs["way"])
    curves = curves[curves["variant"].isin(us.index)]
    curves = curves.assign(cpu_s=1e-6 * curves["timesteps"] * curves["variant"].map(us))
    order = curves["variant"].map({way: k for k, way in enumerate(costs["way"])})
    return curves.iloc[np.argsort(order, kind="stable")]


def comparison(costs: pd.DataFrame, curves: pd.DataFrame, episodes: pd.DataFrame) -> pd.DataFrame:
    """Return one row a way; gaps at equal CPU time are at that of the fastest way's whole run."""
    equal_s = curves.groupby("variant")["cpu_s"].max().min()
    rows = []
    for _, cost in costs.iterrows():
        way = str(cost["way"])
        own = curves[curves["variant"] == way]
        names = [f"{way}-{seed}" for seed in sorted(set(own["seed"]))]
        gaps = by_case(episodes, names)
        each = ", ".join(fixed(mean) for mean in gaps.mean(axis=1))
        us = float(cost["collect_us"] + cost["learn_us"])
        rows.append(
            {
                "way": way,
                "environments × steps": f"{cost['environments']} × {cost['steps']}",
                "batch": f"{cost['batch_size']}",
                "epochs": f"{cost['epochs']}",
                "width": f"{cost['width']}",
                "collect (µs)": fixed(float(cost["collect_us"]), 1),
                "learn (µs)": fixed(float(cost["learn_us"]), 1),
                "decisions a CPU second": f"{round(1e6 / us, -2):,.0f}",
                "CPU s of the run": fixed(float(own["cpu_s"].max()), 0),
                f"every seed below {PASSED} % (CPU s)": _all_below(own, PASSED),
                f"validation gap in {fixed(equal_s, 0)} CPU s (%)": _best_until(own, equal_s),
                "at the end (%)": _best_until(own, np.inf),
                "held-out gap (%), over cases": with_interval(gaps.mean(axis=0)),
                "each training seed (%)": each,
                "over training seeds (%)": _over_seeds(gaps.mean(axis=1)),
            }
        )
    return pd.DataFrame(rows)


def _best_until(curves: pd.DataFrame, cpu_s: float) -> str:
    """Return the mean over seeds of the best validation gap until then, if each was evaluated by then."""
    reached = curves[(curves["cpu_s"] <= cpu_s * (1 + 1e-9)) & (curves["timesteps"] > 0)]
    if reached["seed"].nunique() < curves["seed"].nunique():
        return "not evaluated"
    return fixed(float(reached.groupby("seed")["gap_percent"].min().mean()))


def _all_below(curves: pd.DataFrame, gap_percent: float) -> str:
    """Return the CPU seconds at the first evaluation below a gap, of the last seed that gets there."""
    below = curves[curves["gap_percent"] < gap_percent].groupby("seed")["cpu_s"].min()
    return fixed(float(below.max()), 0) if len(below) == curves["seed"].nunique() else "never"


def _over_seeds(means: NDArray[np.float64]) -> str:
    mean, half = mean_interval(means)
    return f"{fixed(mean)} ± {fixed(half)} (n = {len(means)})"
