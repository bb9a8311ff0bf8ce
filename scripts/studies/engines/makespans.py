"""Lockstep runs repeated on fresh requests: how far makespans and their ratios are predicted, by medians.

Two runs of the same work on one machine differ by a percent or two, also in CPU time, so that one run says
little of a ratio. Each run has requests and a calibration of its own, and another part of it goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd

from servegym.envs.playing.evaluation import HELD_OUT_SEED
from servegym.envs.playing.tables import ResumableTable, Row, Schema
from servegym.studies.engines.held_out import HeldOut

MOST_RUNS: Final = 999

AIMS: Final = {"makespan": 3.0, "ratio": 2.0}
"""Percent and points within which medians are to lie."""

_MADE: Final = tuple(item.name for item in fields(HeldOut))
_SCHEMA: Final = Schema(
    columns=("run", "seed", "load", *_MADE),
    key=("run", "policy"),
    whole=("run", "seed", "iterations"),
    texts=("policy",),
    optional=("difference",),
    if_deleted="its run is made again",
)


def request_seed(seed: int, run: int) -> int:
    """Return the seed of a run's requests: a held-out one, which no other run of any ``seed`` has."""
    return HELD_OUT_SEED + (MOST_RUNS + 1) * seed + run


def open_runs(path: Path) -> ResumableTable:
    """Return the runs that a folder has: a row a policy and run."""
    return ResumableTable(path, _SCHEMA, "remove the file", ("run",))


def run_rows(run: int, seed: int, load: float, held: Sequence[HeldOut]) -> list[Row]:
    """Return the rows of a run; ``load``: of the machine, its own process included."""
    named = {"run": run, "seed": seed, "load": round(load, 2)}
    return [
        named | asdict(row) | {"difference": np.nan if row.difference is None else row.difference}
        for row in held
    ]


@dataclass(frozen=True)
class Errors:
    """Of predictions, a row a run and a column a policy, in the order of the rows."""

    makespan: pd.DataFrame
    """Percent of what was measured."""
    ratio: pd.DataFrame
    """Points of the ratio to the first policy, which is left out."""
    measured_ratio: pd.DataFrame
    predicted_ratio: pd.DataFrame


def errors_of(rows: pd.DataFrame, seconds: Literal["cpu", "wall"] = "cpu") -> Errors:
    """Return the errors of all runs."""
    names = list(dict.fromkeys(rows["policy"]))
    measured, predicted = (
        rows.pivot(index="run", columns="policy", values=name)[names].astype(float)
        for name in (f"{seconds}_s", f"predicted_{seconds}_s")
    )
    ratios = [each.div(each[names[0]], axis=0)[names[1:]] for each in (measured, predicted)]
    return Errors(
        100 * (predicted / measured - 1), 100 * (ratios[1] - ratios[0]), ratios[0], ratios[1]
    )


def pairs_in_order(errors: Errors) -> tuple[int, int]:
    """Return how many pairs of policies are predicted to differ by more than the aim, and are so ordered.

    Both by the median over runs of the difference of two ratios; the first policy's ratio is 1.
    """
    measured, predicted = (
        pd.concat([pd.Series(1.0, table.index, name=""), table], axis=1).to_numpy()
        for table in (errors.measured_ratio, errors.predicted_ratio)
    )
    apart = right = 0
    for one in range(measured.shape[1]):
        for other in range(one):
            said = float(np.median(predicted[:, one] - predicted[:, other]))
            found = float(np.median(measured[:, one] - measured[:, other]))
            if 100 * abs(said) > AIMS["ratio"]:
                apart += 1
                right += said * found > 0
    return right, apart


def _largest(medians: pd.Series) -> tuple[str, float]:
    name = str(medians.abs().idxmax())
    return name, float(medians[name])


def verdict(errors: Errors) -> str:
    """Return in a few sentences how the medians stand to the aims."""
    makespans, ratios = errors.makespan.median(), errors.ratio.median()
    right, apart = pairs_in_order(errors)
    said = [
        f"{int((medians.abs() <= aim).sum())} of {len(medians)} within {aim:g} {unit} "
        f"(the largest: {worst[0]}, {worst[1]:+.1f})"
        for medians, aim, unit, worst in (
            (makespans, AIMS["makespan"], "%", _largest(makespans)),
            (ratios, AIMS["ratio"], "points", _largest(ratios)),
        )
    ]
    order = "No two policies are predicted to differ by more than that."
    if apart > 0:
        order = (
            f"Of {apart} pairs of policies that are predicted to differ by more than that {right} come in "
            "the predicted order."
        )
    return f"Median errors of makespans: {said[0]}; of ratios: {said[1]}. {order}"


def medians_table(rows: pd.DataFrame) -> str:
    """Return a row a policy, as a table in Markdown: medians over runs, and their range."""
    by_cpu, by_wall = errors_of(rows), errors_of(rows, "wall")
    names = [str(name) for name in by_cpu.makespan]
    first = names[0]
    named = "policy | iterations | simulator's | CPU (s) | makespan, error (%) | by wall"
    lines = [
        f"| {named} | ratio to {first} | predicted | error (points) | by wall |",
        "|:--|--:|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        own = rows[rows["policy"] == name]
        parted = own[own["difference"].notna()]
        equal = "all" if parted.empty else f"not in {len(parted)} of {len(own)} runs"
        cells = [name, f"{own['iterations'].sum()}", equal, f"{own['cpu_s'].median():.2f}"]
        cells += [_range(each.makespan[name]) for each in (by_cpu, by_wall)]
        if name == first:
            cells += ["1", "1", "", ""]
        else:
            cells += [f"{by_cpu.measured_ratio[name].median():.3f}"]
            cells += [f"{by_cpu.predicted_ratio[name].median():.3f}"]
            cells += [_range(each.ratio[name]) for each in (by_cpu, by_wall)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: pd.Series) -> str:
    """Return a median, and the least and the largest where there are several."""
    median = f"{values.median():+.1f}"
    return median if len(values) == 1 else f"{median} ({values.min():+.1f} … {values.max():+.1f})"


def stages_table(rows: pd.DataFrame) -> str:
    """Return what decode rounds and prefills took, and their errors in percent of the makespan."""
    prefill, said = rows["prefill_cpu_s"], rows["predicted_prefill_cpu_s"]
    decode = rows["cpu_s"] - prefill
    parts = pd.DataFrame(
        {
            "policy": rows["policy"],
            "decode": decode,
            "decode_error": 100 * (rows["predicted_cpu_s"] - said - decode) / rows["cpu_s"],
            "prefill": prefill,
            "prefill_error": 100 * (said - prefill) / rows["cpu_s"],
        }
    )
    lines = [
        "| policy | decode (s) | its error (%) | prefill (s) | its error (%) |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name, own in parts.groupby("policy", sort=False):
        found = own.drop(columns="policy").median()
        lines.append(
            f"| {name} | {found['decode']:.2f} | {found['decode_error']:+.1f} | "
            f"{found['prefill']:.2f} | {found['prefill_error']:+.1f} |"
        )
    return "\n".join(lines)
