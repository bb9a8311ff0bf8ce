"""Service by class of request, and in steady state: rows of ``service.csv``, and a table of them.

A window leaves out what arrives while the system fills up and while it drains; the requests that arrive in
it count, whenever they are served. Within one long run successive requests are not independent: intervals
come from the means of batches, which nearly are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError
from servegym.envs.playing.summary import UNFINISHED, fixed, student_half, with_interval
from servegym.envs.playing.tables import Row, Schema
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.process.service import NAN
from servegym.envs.workload.requests import EVERYBODY, Requests

BATCHES: Final = 20
"""Batches of a run: B. Schmeiser, "Batch size effects in the analysis of simulation output", Operations
Research 30 (1982), finds that more than 10 … 30 gain nothing."""

_LEAST_IN_BATCH: Final = 5

_HALVES: Final = ("ttft_mean_s", "tpot_mean_s", "e2e_mean_s", "slo_attainment")
"""Means of a run that have an interval by batches, half as wide as ``NAME_half``."""

COLUMNS: Final = (
    "policy",
    "seed",
    "class",
    "warmup_s",
    "cooldown_s",
    "requests",
    "finished",
    "met_slo",
    "slo_attainment",
    "goodput_per_s",
    *(f"{what}_{how}_s" for what in ("ttft", "tpot", "e2e") for how in ("mean", "p50", "p99")),
    "gap_between_tokens_p99_s",
    *(f"{name}_half" for name in _HALVES),
)
"""Columns of ``service.csv``."""

SERVICE: Final = Schema(
    COLUMNS,
    key=("policy", "seed", "class", "warmup_s", "cooldown_s"),
    whole=("seed", "requests", "finished", "met_slo"),
    texts=("policy", "class"),
    optional=COLUMNS[COLUMNS.index("slo_attainment") :],
)
"""What ``service.csv`` must be; an empty cell is a figure of no request."""


class Window(NamedTuple):
    """What is left out of the arrivals, in simulated seconds.

    Examples
    --------
    >>> Window(warmup_s=60.0).cooldown_s
    0.0
    """

    warmup_s: float = 0.0  # of the beginning
    cooldown_s: float = 0.0  # before the last arrival

    @property
    def cuts(self) -> bool:
        """Whether anything is left out."""
        return self.warmup_s > 0 or self.cooldown_s > 0


def check_window(window: Window) -> None:
    """Refuse times that are no times."""
    for name, seconds in zip(("warm-up", "cool-down"), window, strict=True):
        if not 0 <= seconds < np.inf:
            raise ServegymError(f"the {name} must be ≥ 0 seconds, got {seconds}")


def service_rows(
    log: EpisodeLog, requests: Requests, window: Window, elapsed_s: float
) -> list[Row]:
    """Return a row of figures for all requests that arrive in a window, and one a class.

    Parameters
    ----------
    log, requests
        What happened to the requests, and these.
    window
        Both ends belong to it.
    elapsed_s
        When the episode ended: goodput is over all of it, unless the window cuts anything; then it is over
        the window.

    Raises
    ------
    ServegymError
        If no request arrives in the window.
    """
    last_s = float(requests.arrival_s[-1])
    from_s, to_s = window.warmup_s, last_s - window.cooldown_s
    within = (log.arrival_s >= from_s) & (log.arrival_s <= to_s)
    if not within.any():
        raise ServegymError(
            f"no request arrives from {from_s:g} to {to_s:g} s; the last arrives after {last_s:g} s: "
            "shorten the warm-up or the cool-down"
        )
    seconds = to_s - from_s if window.cuts and to_s > from_s else elapsed_s
    groups = [(EVERYBODY, within)]
    if requests.class_of is not None:
        groups += [
            (name, within & (requests.class_of == k)) for k, name in enumerate(requests.class_names)
        ]
    cuts = {"warmup_s": float(window.warmup_s), "cooldown_s": float(window.cooldown_s)}
    return [{"class": name, **cuts, **_figures(log, chosen, seconds)} for name, chosen in groups]


def _figures(log: EpisodeLog, chosen: NDArray[np.bool_], seconds: float) -> Row:
    """Return the figures of the chosen requests, those that have arrived; their order is that of arrival."""
    chosen = chosen & log.arrived
    done = chosen & np.isfinite(log.finished_s)
    first = chosen & np.isfinite(log.first_token_s)
    decoded = done & (log.decode_rounds > 0)
    decode_s = (log.finished_s - log.first_token_s)[decoded]
    values = {
        "ttft": (log.first_token_s - log.arrival_s)[first],
        "tpot": decode_s / log.decode_rounds[decoded],
        "e2e": (log.finished_s - log.arrival_s)[done],
    }
    met = log.met_slo[chosen].astype(float)
    row: Row = {
        "requests": int(chosen.sum()),
        "finished": int(done.sum()),
        "met_slo": int(met.sum()),
        "slo_attainment": float(met.mean()) if len(met) else NAN,
        "goodput_per_s": float(met.sum()) / seconds if seconds > 0 else NAN,
    }
    for what, each in values.items():
        median, high = np.percentile(each, (50, 99)) if len(each) else (NAN, NAN)
        row[f"{what}_mean_s"] = float(each.mean()) if len(each) else NAN
        row[f"{what}_p50_s"], row[f"{what}_p99_s"] = float(median), float(high)
        row[f"{what}_mean_s_half"] = half_width(each)
    gaps = log.worst_gap_s[done & np.isfinite(log.worst_gap_s)]
    row["gap_between_tokens_p99_s"] = float(np.percentile(gaps, 99)) if len(gaps) else NAN
    row["slo_attainment_half"] = half_width(met)
    return row


def half_width(values: NDArray[np.float64], batches: int = BATCHES) -> float:
    """Return half the width of the 95 % interval of a run's mean, by the means of batches.

    Batches are of successive values, equally long but for one; their means are taken as independent and
    normal (Student's t). NaN where a batch would hold fewer than five values.
    """
    if len(values) < _LEAST_IN_BATCH * batches:
        return NAN
    return student_half(np.array([batch.mean() for batch in np.array_split(values, batches)]))


def service_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a policy and class from rows of ``service.csv`` of one window.

    Intervals are over seeds; of one seed they are by batches, where there are requests enough.
    """
    table: list[dict[str, Any]] = []
    for (policy, name), group in rows.groupby(["policy", "class"], sort=False):
        table.append(
            {
                "policy": policy,
                "class": "all" if name == EVERYBODY else name,
                "n": len(group),
                "requests": fixed(float(group["requests"].mean()), 0),
                "SLO met (%)": _cell(group, "slo_attainment", 100, 1),
                "goodput (1/s)": _cell(group, "goodput_per_s", 1, 3),
                "TTFT mean (s)": _cell(group, "ttft_mean_s", 1, 2),
                "TTFT p99 (s)": _cell(group, "ttft_p99_s", 1, 2),
                "TPOT mean (ms)": _cell(group, "tpot_mean_s", 1000, 1),
                "worst gap p99 (ms)": _cell(group, "gap_between_tokens_p99_s", 1000, 0),
                "latency mean (s)": _cell(group, "e2e_mean_s", 1, 2),
            }
        )
    return pd.DataFrame(table)


def _cell(group: pd.DataFrame, name: str, scale: float, digits: int) -> str:
    """Format a mean over episodes with its interval; empty where no request has the figure."""
    text = with_interval(group[name].dropna().to_numpy(float), scale, digits)
    if text == UNFINISHED:
        return ""
    if len(group) == 1 and name in _HALVES and not np.isnan(group[f"{name}_half"].iloc[0]):
        text += f" ± {fixed(scale * float(group[f'{name}_half'].iloc[0]), digits)}"
    return text


def chosen_rows(
    rows: Sequence[Row], names: Sequence[str], seeds: Sequence[int], window: Window
) -> pd.DataFrame:
    """Return those rows that were asked for, in order of ``names`` and seeds."""
    found = [
        row
        for row in rows
        if row["policy"] in names
        and row["seed"] in seeds
        and (row["warmup_s"], row["cooldown_s"]) == window
    ]
    place = {name: k for k, name in enumerate(names)}
    found.sort(key=lambda row: (place[row["policy"]], row["seed"]))
    return pd.DataFrame(found, columns=list(COLUMNS))
