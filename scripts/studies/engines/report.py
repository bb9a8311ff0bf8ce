"""What an engine has done beside what the simulator says: iterations, makespan, latency."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd

from servegym.engines.calibration import Fit, fit_costs, predicted_seconds, table_of
from servegym.engines.iterations import Iteration, first_difference, simulate
from servegym.envs.errors import ServegymError
from servegym.envs.files import WRONG_VALUES, make_folder, read_json, write_file
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


def run_files(served: Served, seed: int) -> dict[Path, str]:
    """Return records and iterations of a run, by where they stand in the output folder."""
    records = records_path(Path(), served.policy, seed)
    iterations = table_of(served.iterations)
    return {
        records: records_table(served.log).to_csv(index=False),
        Path("iterations") / records.name: iterations.to_csv(index=False),
    }


NOTE: Final = "serve.json"
"""In the output folder: which files in it are of the last run, and go with it."""

_OWN: Final = ("records", "iterations", "serve.md")
"""What a run may leave there besides."""


def check_own(output: Path) -> None:
    """Refuse a folder with such files that no run has noted as its own."""
    noted = {path.parts[0] for path in _noted(output)}
    for name in _OWN:
        if (output / name).exists() and name not in noted:
            raise ServegymError(
                f"{output}: holds {name} that serve.py has not written; choose another --output"
            )


def replace_run(output: Path, files: Mapping[Path, str]) -> None:
    """Write the files of a run in place of those of the last one in the same folder."""
    before = _noted(output)
    make_folder(output)
    _write_note(output, before | files.keys())  # whoever comes after a sudden end finds all of them
    for path in before - files.keys():
        (output / path).unlink(missing_ok=True)
    for path, text in files.items():
        make_folder((output / path).parent)
        write_file(output / path, text)
    _write_note(output, files.keys())


def _write_note(output: Path, files: Iterable[Path]) -> None:
    names = sorted(path.as_posix() for path in files)
    write_file(output / NOTE, json.dumps({"files": names}, indent=1) + "\n")


def _noted(output: Path) -> set[Path]:
    """Return the files of the last run; refuse a note of others."""
    note = output / NOTE
    if not note.exists():
        return set()
    try:
        files = {Path(name) for name in read_json(note)["files"]}
        known = all(path.parts[0] in _OWN and ".." not in path.parts for path in files)
    except WRONG_VALUES as error:
        if isinstance(error, ServegymError):
            raise
        known = False
    if not known:
        raise ServegymError(f"{note}: not a list of what serve.py has written; remove the file")
    return files
