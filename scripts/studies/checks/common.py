"""What the checks of the method share: tables of rows that a run goes on with, and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from servegym.envs.errors import ServegymError
from servegym.envs.pictures import to_png
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.identity import check_unchanged, claim, hash_of, notes_of
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import Workers, run_parallel
from servegym.envs.playing.summary import mean_interval
from servegym.envs.playing.tables import ResumableTable, Schema
from servegym.envs.task.config import TaskConfig
from servegym.studies.cases import short_name
from servegym.studies.tuned import TUNED

TAUS: Final = (0.0, 0.2, 0.4, 0.55, 0.69, 0.9, 1.0)
"""Values of Kendall's τ of predicted with true lengths, where a study varies the predictions' quality."""

PlayCase = Callable[[TaskConfig, int], list[dict[str, Any]]]
"""Plays one case of a check and returns its rows, each with the case's ``seed``; picklable."""


def noted_multipliers() -> dict[str, dict[str, float]]:
    """Return the tuned λ that the checks' rules use, as noted beside the checks' rows."""
    families = ("hybrid", "lookahead", "aligned-lookahead")
    return {
        task: {family: TUNED[task][family] for family in families}
        for task in ("GSM8K-v0", "Paper-v0")
    }


@dataclass(frozen=True)
class Collection:
    """The rows of a check in a folder: CSV files by task, and notes of what the rows depend on."""

    output: Path
    asked: Mapping[str, Any]
    """What rows depend on besides task and seed; all rows of a folder have the same."""
    texts: Sequence[str] = ()
    """Columns of texts; all others are of numbers."""
    parts: Sequence[str] = ("",)
    """Names of a task's tables; the empty one stands for a task's only table."""

    def open(self, tasks: Sequence[TaskConfig]) -> None:
        """Make the folder; refuse one that holds rows of something else."""
        for task in tasks:
            make_case(task, 0)  # refuse a workload file before anything is written
        with locked(self.output):
            for task in tasks:
                self._claim(task)

    def _claim(self, task: TaskConfig) -> None:
        asked = {"task": notes_of(task), **self.asked, **hash_of(task)}
        tables = [self._path(task, part).name for part in self.parts]
        claim(self.output / f"{short_name(task)}.json", asked, "rows", indent=1, tables=tables)

    def rows(
        self, task: TaskConfig, seeds: range, play_case: PlayCase, jobs: Workers, part: str = ""
    ) -> pd.DataFrame:
        """Play the cases that are missing and return the rows of all, by seed.

        ``part`` is one of ``parts``. Finished cases are kept in the file, so that an interrupted check
        goes on where it stopped. What is returned is read from the file: it is the same after any
        number of interruptions.
        """
        path = self._path(task, part)
        with locked(self.output):
            self._claim(task)
            known, table = hash_of(task), self._open(path)
            missing = table.missing(seeds)
            of_task = partial(play_case, task)
            results = run_parallel(of_task, [(seed,) for seed in missing], jobs)
            with closing(results), table:
                for rows in tqdm(results, total=len(missing), desc=path.stem, unit="case"):
                    check_unchanged(task, known)
                    table.add(rows)
            played = self._open(path).frame()
        return played[played["seed"].isin(seeds)].reset_index(drop=True)

    def _open(self, path: Path) -> ResumableTable:
        """Return a table, without rows where there is no file; each case has as many rows."""
        schema = Schema(("seed",), others=True, texts=self.texts, optional=None)
        table = ResumableTable(
            path, schema, "remove the file or choose a new --output folder", ("seed",),
            order=lambda row: row["seed"], float_format="%.7g",
        )  # fmt: skip
        counts = Counter(row["seed"] for row in table.rows)
        if len(set(counts.values())) > 1:
            seed = min(counts, key=counts.__getitem__)
            raise ServegymError(
                f"{path}: seed {seed} has {counts[seed]} rows where others have "
                f"{max(counts.values())}; delete its rows, and the case is played again"
            )
        return table

    def _path(self, task: TaskConfig, part: str) -> Path:
        name = f"{short_name(task)}-{part}" if part else short_name(task)
        return self.output / f"{name}.csv"


class Line(NamedTuple):
    """One line of a picture: means and half intervals over x."""

    label: str
    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    half: NDArray[np.float64]
    colour: str
    style: str


def line(
    label: str,
    x: Sequence[float],
    values: Sequence[NDArray[np.float64]],
    colour: str,
    style: str,
) -> Line:
    """Return the line of the means of ``values``, an array of cases for each x."""
    intervals = [mean_interval(gaps) for gaps in values]
    means, halves = np.array(intervals, dtype=float).T
    return Line(label, np.asarray(x, dtype=float), means, halves, colour, style)


def picture(panels: Mapping[str, Sequence[Line]], x_label: str) -> bytes:
    """Return a PNG of gaps with panels side by side, by title; bands are 95 % intervals.

    One legend serves all panels, so their lines have the same labels.
    """
    figure = Figure(figsize=(1.2 + 4.6 * max(len(panels), 2), 4.8), dpi=110, layout="constrained")
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for shown in lines:
            low, high = shown.mean - shown.half, shown.mean + shown.half
            axes.plot(
                *(shown.x, shown.mean, shown.style),
                color=shown.colour, label=shown.label, linewidth=1.6, markersize=4,
            )  # fmt: skip
            axes.fill_between(shown.x, low, high, color=shown.colour, alpha=0.2, linewidth=0)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(x_label)
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("gap to the lower bound (%)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        *(handles, labels), loc="outside lower center", ncols=3, fontsize=8, frameon=False,
        handlelength=4,
    )  # fmt: skip
    return to_png(figure)
