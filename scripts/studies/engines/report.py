"""What an engine has done beside what the simulator says: iterations, makespan, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from servegym.engines.calibration import Fit, fit_costs, predicted_seconds, table_of
from servegym.engines.iterations import Iteration, first_difference, simulate
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.records import records_path, records_table
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.task.config import TaskConfig
from servegym.envs.workload.requests import Requests
from servegym.studies.engines.loads import engine_policy


@dataclass(frozen=True)
class Served:
    """What came of one policy on an engine."""

    policy: str
    iterations: Sequence[Iteration]
    log: EpisodeLog
    clock_s: float
    """The twin's, at the end."""
    requests: Requests
    """With the lengths that the engine has found."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all iterations, without the twin."""
        return sum(each.cpu_s for each in self.iterations)

    @property
    def wall_s(self) -> float:
        """Wall seconds of all iterations, without the twin."""
        return sum(each.wall_s for each in self.iterations)

    @property
    def twin_ms(self) -> float:
        """Median wall milliseconds of twin and policy in an iteration; the first may compile."""
        return 1e3 * float(np.median([each.twin_s for each in self.iterations]))

    def latencies_s(self) -> np.ndarray:
        """Return from arrival to the last token, of those that have finished, on the twin's clock."""
        latency = self.log.finished_s - self.log.arrival_s
        return latency[np.isfinite(latency)]


def beside_simulator(served: Served, task: TaskConfig, seed: int) -> tuple[int | None, int, float]:
    """Return where the simulator's trace first differs (None: nowhere), its length and its makespan.

    The simulator serves the lengths that the engine has found, under a new policy of the same name.
    """
    policy = engine_policy(served.policy, task)
    requests = replace(served.requests, arrival_s=served.log.arrival_s)
    iterations, twin = simulate(task, policy, requests, seed)
    return first_difference(served.iterations, iterations), len(iterations), twin.clock_s


def fit_of(iterations: Sequence[Iteration], seconds: Literal["cpu", "wall"]) -> Fit | None:
    """Return costs fitted to iterations; None where they are too few."""
    try:
        return fit_costs(table_of(iterations, seconds))
    except ServegymError:
        return None


def summary(
    all_served: Mapping[str, Served], task: TaskConfig, seed: int, *, compares: bool
) -> str:
    """Return the table that ends a run.

    Parameters
    ----------
    all_served
        By policy; costs are fitted to the first, so that only the others are predictions.
    compares
        Whether the twin's clock is the cost model's, so that the simulator must run the same iterations.
    """
    first = next(iter(all_served.values()))
    fit = fit_of(first.iterations, "cpu" if compares else "wall")
    if not compares and fit is not None:
        task = replace(task, cost=fit.costs)
    rows, differences = [], []
    for name, served in all_served.items():
        place, length, makespan_s = beside_simulator(served, task, seed)
        count = len(served.iterations)
        if place is not None:
            differences.append(f"{name} differs from iteration {place} on")
        fitted_s = (
            np.nan
            if fit is None
            else predicted_seconds(fit.costs, table_of(served.iterations)).sum()
        )
        latency = served.latencies_s()
        rows.append(
            {
                "policy": name,
                "iterations": count,
                "simulator's": length,
                "equal": count if place is None else place,
                "makespan": f"{served.clock_s:.3f}",
                "simulated": f"{makespan_s:.3f}",
                "latency": f"{latency.mean():.2f}" if len(latency) else "",
                "p95": f"{np.percentile(latency, 95):.2f}" if len(latency) else "",
                "engine CPU": f"{served.cpu_s:.2f}",
                "by fit": "" if fit is None else f"{fitted_s:.2f}",
                "twin ms": f"{served.twin_ms:.3f}",
            }
        )
    text = pd.DataFrame(rows).to_string(index=False) + "\n"
    if compares and not differences:
        text += (
            "The simulator, by itself, runs the same iterations: kind, requests, tokens of each.\n"
        )
    elif compares:
        text += f"NOT the simulator's iterations: {'; '.join(differences)}.\n"
    else:
        costs = "the task's costs" if fit is None else f"costs fitted to {first.policy}"
        text += (
            "The clock is measured, so that the simulator's own iterations may differ; simulated has "
            f"{costs}.\n"
        )
    text += (
        "Seconds. makespan, simulated and latency: on the twin's clock. engine CPU: time of this process "
        f"in iterations;\nby fit: what costs fitted to the iterations of {first.policy} say of them. "
        "twin ms: twin and policy,\nmedian of an iteration.\n"
    )
    return text


def write_run(output: Path, served: Served, seed: int) -> None:
    """Write records and iterations of a run."""
    records = records_path(output, served.policy, seed)
    make_folder(records.parent)
    write_file(records, records_table(served.log).to_csv(index=False))
    folder = output / "iterations"
    make_folder(folder)
    table = table_of(served.iterations)
    write_file(folder / records.name, table.to_csv(index=False))
