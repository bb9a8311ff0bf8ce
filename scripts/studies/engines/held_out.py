"""Policies on engines beside a calibration in the same lockstep: how well makespans are predicted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from servegym.engines.calibration import Fit, fit_costs, predicted_seconds, table_of
from servegym.engines.iterations import Stepping, first_difference, next_in_lockstep, simulate
from servegym.envs.machine.costs import TableDecode
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
    prefill_cpu_s: float
    """Of ``cpu_s``, what prefills took."""
    predicted_prefill_cpu_s: float
    twin_ms: float


def fitted_policies(clients: int) -> tuple[str, str]:
    """Return the policies whose iterations on a workload of their own are fitted; neither is judged.

    They wait for half, and for all but one of the clients to be idle, so that any number of clients is seen.

    Examples
    --------
    >>> fitted_policies(16)
    ('threshold-8', 'threshold-15')
    """
    return f"threshold-{max(1, clients // 2)}", f"threshold-{max(1, clients - 1)}"


class Calibration:
    """A grid, and a workload under ``fitted_policies``, to be run in lockstep.

    Prefills of both are fitted, decode rounds of the workload alone: what a cached token costs grows with
    how many there are (keys and values leave the processor's caches), which costs do not have; they hold
    where they are fitted. The grid's batches are short of what requests hold in service, so that one fit
    through both is wrong for either.
    """

    def __init__(self, model: Any, task: TaskConfig, grid: Grid, load: Load) -> None:
        self._grid = grid
        self._engines = {
            name: load.engine(model, task, engine_policy(name, task))
            for name in fitted_policies(task.cluster.clients)
        }

    def parts(self) -> dict[str, Stepping]:
        """Return what is to be advanced."""
        return {"the grid": self._grid} | {f"fit {name}": e for name, e in self._engines.items()}

    def log(self, seconds: Literal["cpu", "wall"] = "cpu") -> pd.DataFrame:
        """Return the iterations so far that are fitted."""
        iterations = [each for each in self._grid.iterations if each.kind == "prefill"]
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
    fitted: Callable[[pd.DataFrame], Fit] = fit_costs,
) -> tuple[Fit, list[HeldOut], pd.DataFrame]:
    """Serve a load under policies beside a calibration; predict the ones from the other.

    Parameters
    ----------
    task
        Whose costs the policies go by, fitted before.
    run
        Which of several: each has its parts in another order.
    fitted
        Fits costs to a log.

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
    fit, wall_fit = fitted(log), fitted(calibration.log("wall"))
    rows = []
    for name, engine in engines.items():
        simulated, _ = simulate(task, engine_policy(name, task), load.requests, seed)
        table, done = table_of(simulated), engine.iterations
        said_s, prefill = predicted_seconds(fit.costs, table), table["kind"] == "prefill"
        twin_s = sorted(each.twin_s for each in done)
        rows.append(
            HeldOut(
                name,
                len(done),
                first_difference(done, simulated),
                sum(each.cpu_s for each in done),
                sum(each.wall_s for each in done),
                float(said_s.sum()),
                float(predicted_seconds(wall_fit.costs, table).sum()),
                sum(each.cpu_s for each in done if each.kind == "prefill"),
                float(said_s[prefill].sum()),
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
    rows = [
        ("decode", "1, B, kv", next(iter(fits.values())).decode_quality),
        ("decode", "1, B, kv, B·kv", fit_costs(log, "linear", "batch").decode_quality),
        ("decode", "table by B, kv", fit_costs(log, "linear", "table").decode_quality),
    ]
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
    if isinstance(decode, TableDecode):
        pairs = zip(decode.batch, decode.seconds, strict=True)
        rounds = ", ".join(f"{batch}: {1e3 * seconds:.3g}" for batch, seconds in pairs)
        rounds = f"[{rounds}] by B"
    else:
        rounds = f"{1e3 * decode.base:.3g} + {1e3 * decode.per_client:.3g} B"
    rounds += f" + {1e3 * decode.per_kv_token:.3g} kv"
    if decode.per_client_kv_token > 0:
        rounds += f" + {1e3 * decode.per_client_kv_token:.3g} B·kv"
    squared = {
        "linear": "",
        "prompts": f" + {1e3 * prefill.per_token_squared:.3g} Σp²",
        "batch": f" + {1e3 * prefill.per_batch_token_squared:.3g} T²",
    }[fit.form]
    return (
        f"Decode {rounds} ms; prefill {1e3 * prefill.base:.3g} + {1e3 * prefill.per_token:.3g} T{squared} "
        "ms."
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
