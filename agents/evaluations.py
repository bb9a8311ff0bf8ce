"""What an evaluation during training measures, and the table of all of them: ``evaluations.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.agents.network import Network
from servegym.agents.validation import Trace, Validation, ValidationResult
from servegym.envs.files import write_file
from servegym.envs.playing.tables import Schema, read_rows
from servegym.envs.process.metrics import METRICS

CHARTED: Final = (
    "gap",
    "makespan_s",
    "client_utilization",
    "decode_utilization",
    "prefill_stages",
    "decode_rounds",
)
"""The metrics that have a chart, ``serving/<name>``. ``serving/gap`` is in percent (100 · gap),
utilisations are shares in 0 … 1, times are seconds."""

EVALUATION_COLUMNS: Final = (
    "timesteps",
    "wall_s",
    "training_s",
    "cases",
    "gap_percent",
    "gap_percent_sem",
    *CHARTED[1:],
    "decisions",
    "decision_ms_p50",
    "decision_ms_p99",
    "gap_percent_sampled",
    "unfinished",
    "mean_reward",
    "mean_ep_length",
)
"""Columns of ``evaluations.csv``: means over the validation cases, with the gap's standard error.
``training_s`` is ``wall_s`` without the seconds that evaluations took. ``gap_percent`` is of the most
probable actions, as an exported agent plays; ``gap_percent_sampled`` of actions drawn as in training.
``unfinished`` counts the cases that were cut short; if there are any, gap and makespan are empty.
``mean_reward`` and ``mean_ep_length`` are the mean return and the mean number of steps of the most
probable actions, under the names that stable-baselines3 gives them."""

_LATER_COLUMNS: Final = {
    "gap_percent_sampled": np.nan,
    "unfinished": 0,
    "mean_reward": np.nan,
    "mean_ep_length": np.nan,
}
"""Columns that a table of an earlier version lacks, with the values that they have there."""

_TIMED_DECISIONS: Final = 200
_SAMPLING_SEED: Final = 0  # the same draws in every evaluation, so that only the agent changes


class Evaluations:
    """The evaluations of a training run so far, and which of their agents is the best.

    Parameters
    ----------
    path
        ``evaluations.csv`` of the run.
    imitated
        Whether an expert was imitated before the first evaluation. If not, the network of the first
        evaluation is untrained and never counts as the best.
    """

    def __init__(self, path: Path, imitated: bool) -> None:
        self.path = path
        self.imitated = imitated
        self.rows = pd.DataFrame(columns=list(EVALUATION_COLUMNS))

    @property
    def best(self) -> Mapping[Any, Any] | None:
        """The row with the fewest unfinished cases, then the smallest gap; None before there is any."""
        best = None
        for row in self.rows.to_dict("records"):
            if self._may_be_best(row) and _is_better(row, best):
                best = row
        return best

    @property
    def since_best(self) -> int:
        """Evaluations since that of the best; 0 where there is no best."""
        best = self.best
        if best is None:
            return 0
        return int((self.rows["timesteps"] > best["timesteps"]).sum())

    @property
    def last_timesteps(self) -> int:
        """Timesteps at the last evaluation; −1 before the first."""
        return int(self.rows["timesteps"].iloc[-1]) if len(self.rows) else -1

    def read(self, timesteps: int) -> None:
        """Read the rows of the file up to a step; the table may be of an earlier version."""
        table = read_rows(self.path, _SCHEMA, "begin a new run")
        self.rows = table[table["timesteps"] <= timesteps].reset_index(drop=True)

    def would_be_best(self, row: Mapping[Any, Any]) -> bool:
        """Return whether the agent of a new row is better than the best so far."""
        return self._may_be_best(row) and _is_better(row, self.best)

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row and write the file."""
        rows = [*self.rows.to_dict("records"), row]
        self.rows = pd.DataFrame(rows, columns=list(EVALUATION_COLUMNS))
        write_file(self.path, self.rows.to_csv(index=False))

    def _may_be_best(self, row: Mapping[Any, Any]) -> bool:
        return bool(row["timesteps"] > 0) or self.imitated


_SCHEMA: Final = Schema(
    EVALUATION_COLUMNS,
    key=("timesteps",),
    whole=("timesteps", "cases", "unfinished"),
    optional=None,
    defaults=_LATER_COLUMNS,
    if_deleted="its evaluation is lost, for none is made again",
)


def measure(network: Network, validation: Validation) -> tuple[ValidationResult, dict[str, float]]:
    """Play the validation cases; return the greedy play and a row without steps and seconds."""
    result = validation.play(network.best)
    rng = np.random.default_rng(_SAMPLING_SEED)
    sampled = validation.play(partial(network.sampled, rng=rng))
    latency_ms = _latency_ms(network.best, result.trace)
    return result, _row(result.episodes) | {
        "decision_ms_p50": latency_ms[0],
        "decision_ms_p99": latency_ms[1],
        "gap_percent_sampled": 100.0 * means(sampled.episodes)["gap"],
        "mean_reward": float(result.returns.mean()),
        "mean_ep_length": float(result.lengths.mean()),
    }


def means(episodes: pd.DataFrame) -> dict[str, float]:
    """Return the mean metrics of episodes; NaN where one of them was cut short."""
    # pandas would leave out NaN, that is the cases that were cut short.
    return {name: float(episodes[name].mean(skipna=False)) for name in METRICS}


def _row(episodes: pd.DataFrame) -> dict[str, float]:
    """Return what a row of ``evaluations.csv`` takes from the episodes."""
    mean = means(episodes)
    return {
        "cases": len(episodes),
        "gap_percent": 100.0 * mean["gap"],
        "gap_percent_sem": 100.0 * _standard_error(episodes["gap"].to_numpy(float)),
        **{name: mean[name] for name in (*CHARTED[1:], "decisions")},
        "unfinished": int((episodes["unfinished_requests"] > 0).sum()),
    }


def _is_better(row: Mapping[Any, Any], best: Mapping[Any, Any] | None) -> bool:
    """Return whether an evaluation beats the best of those before it."""
    if best is None or row["unfinished"] != best["unfinished"]:
        return best is None or row["unfinished"] < best["unfinished"]
    # Where neither has a gap, the later agent has been trained for longer.
    return not row["gap_percent"] >= best["gap_percent"]


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _latency_ms(best: Any, trace: Trace) -> tuple[float, float]:
    """Return the median and the 99th percentile of a single decision's milliseconds."""
    nanoseconds = []
    for k in range(_TIMED_DECISIONS):
        observation = trace.observations[k % len(trace.observations)]
        mask = trace.masks[k % len(trace.masks)]
        started = perf_counter_ns()
        best(observation, mask)
        nanoseconds.append(perf_counter_ns() - started)
    p50, p99 = np.percentile(nanoseconds, [50, 99]) / 1e6
    return float(p50), float(p99)
