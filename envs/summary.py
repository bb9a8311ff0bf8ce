"""From rows of episodes to tables of means with 95 % intervals. Pure functions of a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % Student-t interval (NaN for one value)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    half = stats.sem(values) * stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    return mean, float(half)


def stratified_interval(
    values: NDArray[np.float64], resamples: int = 9999
) -> tuple[float, float, float]:
    """Return the mean over runs and cases and the ends of its 95 % stratified bootstrap interval.

    The method of rliable (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
    Statistical Precipice", NeurIPS): cases are strata, training runs are drawn anew within each. It
    takes what a run does on one case as independent of what it does on another; where whole runs are
    good or bad, the interval of the runs' means is wider, so state that one, too.

    Parameters
    ----------
    values
        One row a training run, one column a case. The ends are NaN for a single run.
    resamples
        Bootstrap samples; drawn from a generator of its own, so the same values give the same ends.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    found = stats.bootstrap(
        tuple(values.T),
        _mean_of_strata,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)


def _mean_of_strata(*strata: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return the mean of the strata's means; each stratum weighs the same."""
    return np.mean([stratum.mean(axis=axis) for stratum in strata], axis=0)


def by_case(episodes: pd.DataFrame, policies: Sequence[str]) -> NDArray[np.float64]:
    """Return the gap in percent of each policy on each case, shape (policies, cases).

    Only cases that all of them have played, in order of their seeds.
    """
    table = episodes[episodes["policy"].isin(policies)].pivot_table(
        index="policy", columns="seed", values="gap"
    )
    return 100.0 * table.loc[list(policies)].dropna(axis=1).to_numpy(float)


def with_interval(values: NDArray[np.float64], scale: float = 1.0, digits: int = 2) -> str:
    """Format a mean with its interval; where nothing varies (one case) the mean alone."""
    mean, half = mean_interval(np.asarray(values, dtype=float) * scale)
    text = f"{mean:.{digits}f}"
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def summarise(episodes: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """Return one row a policy: n, means with 95 % intervals, and paired differences.

    Parameters
    ----------
    episodes
        Rows with the columns of ``servegym.envs.evaluation.COLUMNS``, of one task.
    reference
        The policy that the last column's paired differences of the gap are taken from; None or a
        policy that is not in the table: no such column.
    """
    policies = list(dict.fromkeys(episodes["policy"]))
    rows = [_summary_row(episodes[episodes["policy"] == policy]) for policy in policies]
    table = pd.DataFrame(rows)
    if reference in policies and len(policies) > 1:
        table[f"gap − {reference} (points)"] = _paired(episodes, policies, str(reference))
    return table


def _summary_row(group: pd.DataFrame) -> dict[str, str | int]:
    def cell(column: str, scale: float = 1.0, digits: int = 2) -> str:
        return with_interval(group[column].to_numpy(float), scale, digits)

    return {
        "policy": str(group["policy"].iloc[0]),
        "n": len(group),
        "gap (%)": cell("gap", 100),
        "makespan (s)": cell("makespan_s"),
        "lower bound (s)": cell("lower_bound_s"),
        "client util. (%)": cell("client_utilization", 100, 1),
        "decode util. (%)": cell("decode_utilization", 100, 1),
        "stages": cell("prefill_stages", digits=0),
        "TTFT p50 (s)": cell("ttft_p50_s", digits=1),
        "decision p99 (ms)": f"{group['decision_ms_p99'].median():.3f}",
        "asked at": str(group["decision_points"].iloc[0]),
    }


def _paired(episodes: pd.DataFrame, policies: Sequence[str], reference: str) -> list[str]:
    gaps = episodes.pivot_table(index="seed", columns="policy", values="gap")
    differences = [(gaps[policy] - gaps[reference]).dropna().to_numpy() for policy in policies]
    return [
        "" if policy == reference or len(difference) == 0 else with_interval(difference, 100)
        for policy, difference in zip(policies, differences, strict=True)
    ]


def to_markdown(table: pd.DataFrame) -> str:
    """Return a GitHub table without the index; cells stay as they are written."""
    return table.to_markdown(index=False, disable_numparse=True) + "\n"
