"""Policies on engines beside a calibration in the same lockstep: how well makespans are predicted."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from servegym.engines.calibration import Fit, fit_costs, predicted_seconds, table_of
from servegym.engines.iterations import Stepping, first_difference, next_in_lockstep, simulate
from servegym.envs.task.config import TaskConfig
from servegym.studies.engines.grid import Grid
from servegym.studies.engines.loads import Load, engine_policy


@dataclass(frozen=True)
class HeldOut:
    """One policy on a workload of which no iteration was fitted."""

    policy: str
    iterations: int
    difference: int | None
    """Where the simulator's iterations first differ; None: nowhere."""
    cpu_s: float
    wall_s: float
    predicted_cpu_s: float
    predicted_wall_s: float
    twin_ms: float


FITTED = ("fcfs", "threshold-8")
"""Policies whose iterations on a workload of their own are fitted with the grid."""


class Calibration:
    """A grid, and a workload under the policies ``FITTED``, to be run in lockstep.

    The grid alone would say little of what batches in service are like: an engine that packs requests into
    one row pays for their product with the cached tokens, which affine costs only have near what is fitted.
    """

    def __init__(self, model: Any, task: TaskConfig, grid: Grid, load: Load) -> None:
        self._grid = grid
        self._engines = {
            name: load.engine(model, task, engine_policy(name, task)) for name in FITTED
        }

    def parts(self) -> dict[str, Stepping]:
        """Return what is to be advanced."""
        return {"the grid": self._grid} | {f"fit {name}": e for name, e in self._engines.items()}

    def log(self, seconds: Literal["cpu", "wall"] = "cpu") -> pd.DataFrame:
        """Return all iterations so far."""
        iterations = list(self._grid.iterations)
        for engine in self._engines.values():
            iterations += engine.iterations
        return table_of(iterations, seconds)


def run_all(parts: Mapping[str, Stepping]) -> None:
    """Run engines in lockstep to their ends."""
    alive = dict(parts)
    while alive:
        name, iteration = next_in_lockstep(alive)
        if iteration is None:
            del alive[name]


def order_of(count: int, run: int) -> list[int]:
    """Return the order in which a run's parts are advanced where they are equally far.

    What an iteration costs depends on what has run before it. Of ten parts each is first once in ten runs,
    and stands behind each other once.

    Examples
    --------
    >>> order_of(10, 0), order_of(10, 1)
    ([0, 1, 9, 2, 8, 3, 7, 4, 6, 5], [3, 4, 2, 5, 1, 6, 0, 7, 9, 8])
    """
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    return [(place + 3 * run) % count for place in zigzag]


def in_one_lockstep(
    model: Any,
    task: TaskConfig,
    calibration: Calibration,
    load: Load,
    names: Sequence[str],
    seed: int,
    run: int = 0,
) -> tuple[Fit, list[HeldOut], pd.DataFrame]:
    """Serve a load under policies beside a calibration; predict the ones from the other.

    Parameters
    ----------
    task
        Whose costs the policies go by, fitted before.
    run
        Which of several: each has its parts in another order.

    Returns
    -------
    fit, rows, log
        Costs fitted to the calibration's CPU time, a row a policy, and the calibration's log.
    """
    engines = {
        name: load.engine(model, task, engine_policy(name, task), seed=seed) for name in names
    }
    parts = list((calibration.parts() | engines).items())
    turned = dict(parts[place] for place in order_of(len(parts), run))
    gc.collect()
    gc.freeze()  # else one iteration now and then pays for a look at all that is loaded
    try:
        run_all(turned)
    finally:
        gc.unfreeze()
    log = calibration.log()
    fit, wall_fit = fit_costs(log), fit_costs(calibration.log("wall"))
    rows = []
    for name, engine in engines.items():
        simulated, _ = simulate(task, engine_policy(name, task), load.requests, seed)
        table, done = table_of(simulated), engine.iterations
        twin_s = sorted(each.twin_s for each in done)
        rows.append(
            HeldOut(
                name,
                len(done),
                first_difference(done, simulated),
                sum(each.cpu_s for each in done),
                sum(each.wall_s for each in done),
                float(predicted_seconds(fit.costs, table).sum()),
                float(predicted_seconds(wall_fit.costs, table).sum()),
                1e3 * twin_s[len(twin_s) // 2],
            )
        )
    return fit, rows, log


def with_costs(task: TaskConfig, fit: Fit) -> TaskConfig:
    """Return the task with fitted costs."""
    return replace(task, cost=fit.costs)


def quality_table(log: pd.DataFrame) -> str:
    """Return how well each form of prefill, and decode, fit a log, as a table in Markdown."""
    lines = [
        "| stage | form | iterations | R² | median error | worst error |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    forms = {"linear": "1, T", "prompts": "1, T, Σp²", "batch": "1, T, T²"}
    fits = {
        name: fit_costs(log, name) for name in forms if name != "prompts" or "prompt_squares" in log
    }
    rows = [("decode", "1, B, kv", next(iter(fits.values())).decode_quality)]
    rows += [("prefill", forms[name], fit.prefill_quality) for name, fit in fits.items()]
    for stage, form, found in rows:
        lines.append(
            f"| {stage} | {form} | {found.iterations} | {found.r_squared:.3f} | "
            f"{found.median_error:.1%} | {found.worst_error:.1%} |"
        )
    return "\n".join(lines)


def costs_line(fit: Fit) -> str:
    """Return a fit in one sentence."""
    decode, prefill = fit.decode, fit.prefill
    squared = {
        "linear": "",
        "prompts": f" + {1e3 * prefill.per_token_squared:.3g} Σp²",
        "batch": f" + {1e3 * prefill.per_batch_token_squared:.3g} T²",
    }[fit.form]
    return (
        f"Decode {1e3 * decode.base:.3g} + {1e3 * decode.per_client:.3g} B + "
        f"{1e3 * decode.per_kv_token:.3g} kv ms; prefill {1e3 * prefill.base:.3g} + "
        f"{1e3 * prefill.per_token:.3g} T{squared} ms."
    )


def held_out_table(rows: Sequence[HeldOut]) -> str:
    """Return measured and predicted makespans, their errors and ratios to the first policy's."""
    first = rows[0]
    named = "policy | iterations | simulator's | CPU (s) | predicted (s) | error | wall error"
    lines = [
        f"| {named} | ratio to {first.policy} | predicted |",
        "|:--|--:|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        equal = "all" if row.difference is None else f"until {row.difference}"
        lines.append(
            f"| {row.policy} | {row.iterations} | {equal} | {row.cpu_s:.2f} | {row.predicted_cpu_s:.2f} | "
            f"{row.predicted_cpu_s / row.cpu_s - 1:+.1%} | "
            f"{row.predicted_wall_s / row.wall_s - 1:+.1%} | {row.cpu_s / first.cpu_s:.3f} | "
            f"{row.predicted_cpu_s / first.predicted_cpu_s:.3f} |"
        )
    return "\n".join(lines)
