"""From rows of episodes to tables of means with 95 % intervals. Pure functions of a table."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

from servegym.envs.errors import ServegymError

CONFIDENCE = 0.95


UNFINISHED = "unfinished"
"""What stands in a table where no episode was finished."""


def fixed(value: float, digits: int = 2, sign: str = "") -> str:
    """Format a number with so many digits, never as ``-0.00``; ``sign`` is ``+`` to show both signs."""
    return f"{value:{sign}z.{digits}f}"


def finished(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values less the NaN of episodes that were cut short."""
    values = np.asarray(values, dtype=float)
    return values[~np.isnan(values)]


def mean_gaps(episodes: pd.DataFrame) -> pd.Series:
    """Return the mean gap of each policy, infinite where one of its episodes was cut short.

    For choosing the best: what leaves requests unserved must not win by those it has served.
    """
    means = episodes.groupby("policy")["gap"].agg(lambda gaps: gaps.mean(skipna=False))
    return means.astype(float).fillna(np.inf)


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % Student-t interval (NaN for one value).

    Over the values that are not NaN; the mean is NaN where there are none.
    """
    values = finished(values)
    mean = float(np.mean(values)) if len(values) else float("nan")
    if len(values) < 2:
        return mean, float("nan")
    return mean, student_half(values)


def student_half(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> float:
    """Return half the width of the Student-t interval, 95 %, of the mean of at least two values."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(error * stdtrit(len(values) - 1, 0.5 + confidence / 2))


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
        One row a training run, one column a case. The ends are NaN for a single run, the mean, too,
        without any case.
    resamples
        Bootstrap samples; drawn from a generator of its own, so the same values give the same ends.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean()) if values.size else float("nan")
    if len(values) < 2 or values.size == 0:
        return mean, float("nan"), float("nan")
    from scipy import stats  # half a second, which every command would wait for

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

    Only cases that all of them have played to the end, in order of their seeds.
    """
    table = _gaps(episodes[episodes["policy"].isin(policies)])
    return 100.0 * table[list(policies)].dropna().to_numpy(float).T


def _gaps(episodes: pd.DataFrame) -> pd.DataFrame:
    """Return the gaps, a row a seed, a column a policy; NaN where it was cut short or not played."""
    doubled = episodes[episodes.duplicated(["policy", "seed"])]
    if len(doubled):
        policy, seed = doubled.iloc[0][["policy", "seed"]]
        raise ServegymError(f"two episodes of policy {policy!r}, seed {seed}; give each once")
    return episodes.pivot(index="seed", columns="policy", values="gap")


def with_interval(values: NDArray[np.float64], scale: float = 1.0, digits: int = 2) -> str:
    """Format a mean with its interval; where nothing varies (one case) the mean alone.

    NaN is left out, as of episodes that were cut short, and how many there are is said.
    """
    values = np.asarray(values, dtype=float)
    whole = finished(values)
    if len(whole) == 0:
        return UNFINISHED
    mean, half = mean_interval(whole * scale)
    text = fixed(mean, digits)
    if not np.isnan(half):
        text += f" ± {fixed(half, digits)}"
    cut_short = len(values) - len(whole)
    return f"{text} ({cut_short} {UNFINISHED})" if cut_short else text


OPTIMUM = "optimum"
BEST_KNOWN = "best known"
"""Labels of the rows that are no policies'."""


def summarise(
    episodes: pd.DataFrame,
    reference: str | None = None,
    optima: pd.DataFrame | None = None,
    best_known: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return one row a policy: n, means with 95 % intervals, and paired differences.

    An episode that was cut short has no makespan and no gap: it counts among the n and in the column
    ``unfinished``, which stands there only if it is needed, and is left out of those two means and of
    paired differences. A policy that sheds requests has a column of their mean number, and no gaps: the lower
    bound is that of all requests.

    Parameters
    ----------
    episodes
        Rows with the columns of ``servegym.envs.playing.evaluation.COLUMNS``, of one task.
    reference
        The policy that the last column's paired differences of the gap are taken from; None or a
        policy that is not in the table: no such column.
    optima
        Rows with the columns ``seed``, ``bound_s`` and ``proven`` of some of the cases: makes the
        first row, and a column of gaps to it. Where an optimum is not proven its proven bound stands
        in for it, so that a gap to it is never understated, and the row's label says so.
    best_known
        Rows with the columns ``seed`` and ``best_known_s`` of some of the cases: makes a row; see
        :func:`best_known_by_case`. Rows of policies stay what they are.

    Examples
    --------
    >>> from servegym.baselines import make_policy
    >>> from servegym.envs import TASKS, make_case, play
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> rows = [play(task, "fcfs", make_policy("fcfs"), make_case(task, k), k).row for k in range(3)]
    >>> summarise(pd.DataFrame(rows)).iloc[0]["n"]
    np.int64(3)
    """
    policies = list(dict.fromkeys(episodes["policy"]))
    groups = {policy: episodes[episodes["policy"] == policy] for policy in policies}
    cut_short = bool(episodes["makespan_s"].isna().any())
    sheds = {policy for policy, group in groups.items() if _shed(group).any()}
    rows = [_summary_row(group, cut_short, bool(sheds)) for group in groups.values()]
    makespans = [_makespans_of_all(group) for group in groups.values()]
    if best_known is not None and len(known_s := best_known_by_case(episodes, best_known)):
        rows.insert(0, _floor_row(BEST_KNOWN, episodes, known_s))
        makespans.insert(0, known_s)
    if optima is not None and len(floor := _played(episodes, optima)):
        floor_s = floor["bound_s"]
        for row, makespan_s in zip(rows, makespans, strict=True):
            row[f"gap to {OPTIMUM} (%)"] = _gap_to(makespan_s, floor_s)
        rows.insert(0, _floor_row(_label(floor), episodes, floor_s))
    # Missing cells: a column that only some rows have, such as the gap to the optimum.
    table = pd.DataFrame(rows).fillna("")
    if cut_short:
        table.insert(2, UNFINISHED, table.pop(UNFINISHED))  # beside the n, also behind other rows
    if reference in policies and len(policies) > 1:
        differences = _paired(episodes, policies, str(reference), sheds)
        others = [""] * (len(table) - len(policies))
        table[f"gap − {reference} (points)"] = others + differences
    return table


def best_known_by_case(episodes: pd.DataFrame, best_known: pd.DataFrame) -> pd.Series:
    """Return the least makespan known of each case in both tables, seconds by seed.

    It is the least of ``best_known_s`` and of every policy's makespan, so no policy is below it that has
    shed nobody.
    """
    known = _played(episodes, best_known)["best_known_s"]
    fastest = _makespans_of_all(episodes).groupby(level="seed").min().loc[known.index]
    return known.where((known <= fastest) | fastest.isna(), fastest)


def _makespans_of_all(episodes: pd.DataFrame) -> pd.Series:
    """Return makespans by seed; NaN where requests were shed, as others' are those of all requests."""
    return episodes.set_index("seed")["makespan_s"].where(_shed(episodes) == 0)


def _played(episodes: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """Return the cases that some policy has played, by seed."""
    return cases[cases["seed"].isin(episodes["seed"])].set_index("seed").sort_index()


def _label(optima: pd.DataFrame) -> str:
    proven = int(optima["proven"].sum())
    if proven == len(optima):
        return OPTIMUM
    return f"{OPTIMUM} ({proven} of {len(optima)} proven, else its bound)"


def _floor_row(label: str, episodes: pd.DataFrame, seconds: pd.Series) -> dict[str, str | int]:
    """Return the row of makespans that no policy made; ``seconds`` by seed."""
    bounds_s = episodes.groupby("seed")["lower_bound_s"].first().loc[seconds.index]
    return {
        "policy": label,
        "n": len(seconds),
        "gap (%)": _gap_to(seconds, bounds_s),
        "makespan (s)": with_interval(seconds.to_numpy(float)),
        "lower bound (s)": with_interval(bounds_s.to_numpy(float)),
    }


def _gap_to(seconds: pd.Series, floor_s: pd.Series) -> str:
    """Format the gap over the finished cases in both, in percent; nothing where there is none."""
    gaps = (seconds / floor_s - 1).dropna()
    return with_interval(gaps.to_numpy(float), 100) if len(gaps) else ""


def _shed(group: pd.DataFrame) -> NDArray[np.float64]:
    """Return how many requests each episode has shed, which then has no gap; none in an older table."""
    if "shed" not in group:
        return np.zeros(len(group))
    no_gap = group["gap"].isna() & group["makespan_s"].notna()  # else it was cut short
    return np.where(no_gap, np.nan_to_num(group["shed"].to_numpy(float)), 0.0)


def _summary_row(group: pd.DataFrame, cut_short: bool, sheds: bool) -> dict[str, str | int]:
    def cell(column: str, scale: float = 1.0, digits: int = 2) -> str:
        known = finished(group[column].to_numpy(float))
        return with_interval(known, scale, digits) if len(known) or not shed.any() else ""

    shed = _shed(group)
    row: dict[str, str | int] = {"policy": str(group["policy"].iloc[0]), "n": len(group)}
    if cut_short:
        row[UNFINISHED] = str(group["makespan_s"].isna().sum())
    if sheds:
        row["shed"] = with_interval(shed, digits=1) if shed.any() else "0"
    return row | {
        "gap (%)": "" if shed.any() else cell("gap", 100),
        "makespan (s)": cell("makespan_s"),
        "lower bound (s)": cell("lower_bound_s"),
        "client util. (%)": cell("client_utilization", 100, 1),
        "decode util. (%)": cell("decode_utilization", 100, 1),
        "stages": cell("prefill_stages", digits=0),
        "TTFT p50 (s)": cell("ttft_p50_s", digits=1),
        "decision p99 (ms)": fixed(group["decision_ms_p99"].median(), 3),
        "asked at": str(group["decision_points"].iloc[0]),
    }


def _paired(
    episodes: pd.DataFrame, policies: Sequence[str], reference: str, without: Container[str] = ()
) -> list[str]:
    """Format differences to the reference; nothing for itself and policies without gaps."""
    gaps = _gaps(episodes)
    differences = [(gaps[policy] - gaps[reference]).dropna().to_numpy() for policy in policies]
    if reference in without:
        return [""] * len(policies)
    return [
        ""
        if policy == reference or policy in without or len(difference) == 0
        else with_interval(difference, 100)
        for policy, difference in zip(policies, differences, strict=True)
    ]


def to_markdown(table: pd.DataFrame) -> str:
    """Return a GitHub table without the index; cells stay as they are written."""
    return table.to_markdown(index=False, disable_numparse=True) + "\n"
