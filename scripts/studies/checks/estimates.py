"""Wrong estimates of output lengths in the plan, in stealing, in the iteration rule and in queues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.summary import fixed, to_markdown, with_interval
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.estimates import ESTIMATES, estimated_task
from servegym.envs.workload.sources import output_lengths
from servegym.studies.tuned import numbered, tuned_multiplier

PERFECT: Final = "perfect"
FLOOR: Final = "fcfs"
"""The policy that uses no estimate."""

QUEUES: Final = ("threshold-12", "lookahead-0.7", "aligned")
SAME: Final = 1e-9
"""Gaps that differ by less are a tie of two policies."""

Rows = Mapping[str, pd.DataFrame]
"""Rows of each estimate, a case each."""


def policies(task: TaskConfig) -> list[str]:
    """Return the policies compared: the method's parts, its tuned form, and one-queue rules."""
    tuned = tuned_multiplier(task, "hybrid")
    names = [FLOOR, "offline", "offline-steal", "hybrid-plan", "hybrid"]
    names += [numbered("hybrid-plan", tuned), numbered("hybrid", tuned), "lpt", *QUEUES]
    return list(dict.fromkeys(names))


def play_case(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    """Return a row an estimate: its errors, and gap and idle share of every policy."""
    case = make_case(task, seed)
    lengths = output_lengths(task.workload.source, task.workload.trace)
    informed = estimated_task(task)
    rows = []
    for name, estimate in ESTIMATES.items():
        rng = np.random.default_rng([seed, 2])  # the same draws for every estimate
        requests = estimate(case.requests, lengths, rng)
        true, predicted = requests.output_tokens, requests.predicted_output_tokens
        row: dict[str, Any] = {"seed": seed, "estimate": name, "bound_s": case.bound.seconds}
        row["kendall_tau"] = kendall(true, predicted)
        row["bias"] = float(predicted.sum() / true.sum() - 1)
        row["error"] = float(np.abs(predicted - true).sum() / true.sum())
        for policy in policies(task):
            played = play_compiled(
                informed, make_trigger_policy(policy), Case(requests, case.bound)
            )
            row[policy] = played["gap"]
            row[f"idle {policy}"] = 1 - played["client_utilization"]
        rows.append(row)
    return rows


def kendall(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return Kendall's τ-b of two rows of numbers; 0 where one of them does not vary."""
    if len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
        return 0.0
    return float(stats.kendalltau(first, second).statistic)


def spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return Spearman's ρ of two rows of numbers; 0 where one of them does not vary."""
    if len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def by_estimate(rows: pd.DataFrame) -> Rows:
    """Return the rows of each estimate, by seed."""
    groups = rows.sort_values("seed").groupby("estimate")
    return {estimate: groups.get_group(estimate) for estimate in ESTIMATES}


def cells(rows: Rows, estimate: str, column: str) -> NDArray[np.float64]:
    """Return a column under one estimate, a case each, by seed."""
    return rows[estimate][column].to_numpy(float)


def gap_table(rows: Rows, names: Sequence[str]) -> pd.DataFrame:
    """Return gaps in percent, a row an estimate with its measured quality, a column a policy."""
    return pd.DataFrame(
        [
            {
                "estimate": estimate,
                "τ-b": f"{cells(rows, estimate, 'kendall_tau').mean():.2f}",
                "bias (%)": f"{round(100 * cells(rows, estimate, 'bias').mean()):+d}",
                "mean error (%)": f"{100 * cells(rows, estimate, 'error').mean():.0f}",
            }
            | {f"`{name}`": with_interval(cells(rows, estimate, name), 100) for name in names}
            for estimate in ESTIMATES
        ]
    )


def idle_table(rows: Rows, names: Sequence[str]) -> pd.DataFrame:
    """Return idle time of a client in seconds (and its share of the makespan in percent)."""
    table = []
    for estimate in ESTIMATES:
        row = {"estimate": estimate}
        bound_s = cells(rows, estimate, "bound_s")
        for name in names:
            share = cells(rows, estimate, f"idle {name}")
            idle_s = share * (1 + cells(rows, estimate, name)) * bound_s
            row[f"`{name}`"] = f"{with_interval(idle_s, digits=1)} ({100 * share.mean():.1f} %)"
        table.append(row)
    return pd.DataFrame(table)


def steps(task: TaskConfig) -> list[tuple[str, str, str]]:
    """Return the parts of the method: name, policy without the part, policy with it."""
    tuned = numbered("hybrid", tuned_multiplier(task, "hybrid"))
    plan = numbered("hybrid-plan", tuned_multiplier(task, "hybrid"))
    parts = [
        ("plan", FLOOR, "offline"),
        ("stealing", "offline", "offline-steal"),
        ("rule λ = 1", "offline-steal", "hybrid"),
        ("rule λ = 1, no stealing", "offline", "hybrid-plan"),
        ("stealing under λ = 1", "hybrid-plan", "hybrid"),
    ]
    if tuned != "hybrid":
        parts += [
            ("rule tuned", "offline-steal", tuned),
            ("rule tuned, no stealing", "offline", plan),
            ("stealing under tuned λ", plan, tuned),
        ]
    return parts


def step_table(rows: Rows, task: TaskConfig) -> pd.DataFrame:
    """Return what each part of the method changes of the gap, in points, paired by case."""
    return pd.DataFrame(
        [
            {"estimate": estimate}
            | {
                f"{part} ({with_} − {without})": with_interval(
                    cells(rows, estimate, with_) - cells(rows, estimate, without), 100
                )
                for part, without, with_ in steps(task)
            }
            for estimate in ESTIMATES
        ]
    )


def rank_table(rows: Rows, names: Sequence[str]) -> pd.DataFrame:
    """Return how the order of the policies holds, against that under perfect estimates.

    Correlations are of the policies' gaps case by case. "Lost" is what the policy that is best on
    average under perfect estimates loses against the best one under this estimate, paired by case.
    """
    gaps = {name: {e: cells(rows, e, name) for e in ESTIMATES} for name in names}
    means = {e: {name: float(gaps[name][e].mean()) for name in names} for e in ESTIMATES}
    chosen = min(names, key=lambda name: means[PERFECT][name])
    perfect = _by_case(rows, PERFECT, names)
    table = []
    for estimate in ESTIMATES:
        order = sorted(names, key=lambda name: means[estimate][name])
        now = _by_case(rows, estimate, names)
        pairs = list(zip(perfect, now, strict=True))
        table.append(
            {
                "estimate": estimate,
                "Kendall's τ-b": with_interval(np.array([kendall(*pair) for pair in pairs])),
                "Spearman's ρ": with_interval(np.array([spearman(*pair) for pair in pairs])),
                "best three": ", ".join(
                    f"`{name}` {fixed(100 * means[estimate][name])} %" for name in order[:3]
                ),
                f"rank of `{FLOOR}`": f"{order.index(FLOOR) + 1} of {len(names)}",
                f"lost by `{chosen}` (points)": with_interval(
                    gaps[chosen][estimate] - gaps[order[0]][estimate], 100
                ),
            }
        )
    return pd.DataFrame(table)


def _by_case(rows: Rows, estimate: str, names: Sequence[str]) -> NDArray[np.float64]:
    """Return gaps of shape (cases, policies), equal up to rounding made equal."""
    table = np.stack([cells(rows, estimate, name) for name in names], axis=1)
    return np.rint(table / SAME)


def findings(rows: Rows, names: Sequence[str]) -> str:
    """Return in words how much each group of errors changes each policy's mean gap at worst."""
    groups = {
        "everyone wrong by the same factor": [name for name in ESTIMATES if name.startswith("all")],
        "errors of a request's own": [name for name in ESTIMATES if name.startswith("random")],
        "the workload's mean for everyone": ["workload mean"],
        "reversed order": ["reversed order"],
    }
    texts = []
    for group, estimates in groups.items():
        worst = {
            name: max(
                100 * float((cells(rows, e, name) - cells(rows, PERFECT, name)).mean())
                for e in estimates
            )
            for name in names
            if name != FLOOR
        }
        listed = ", ".join(
            f"`{name}` {fixed(worst[name], sign='+')}"
            for name in sorted(worst, key=lambda name: worst[name])
        )
        texts.append(f"- {group}, worst change of the gap in points: {listed}.")
    return "\n".join(texts) + "\n"


INTRODUCTION: Final = """\
Schedulers plan and decide by estimated lengths, the simulator and the lower bound by true ones. Every
estimate brings as spread the root mean square of its log errors (calibrated ones and the workload's
mean their own, the one "taken as exact" none), by which a request that outlives its estimate is
expected anew. Random errors are lognormal factors of mean 1 with this standard deviation of their log.
τ-b is the rank correlation of estimated with true lengths, bias and mean error are Σ(estimate − truth)
and Σ|estimate − truth| over Σ truth. Means over held-out cases with 95 % Student-t intervals.
"""


def report(tables: dict[str, tuple[TaskConfig, pd.DataFrame]], command: str) -> str:
    """Return estimates.md."""
    parts = ["# What estimates of output lengths are worth\n", f"`{command}`\n", INTRODUCTION]
    for name, (task, table) in tables.items():
        names, seeds, rows = policies(task), table["seed"], by_estimate(table)
        parts += [
            f"## {name}\n\n{seeds.nunique()} cases, seeds {seeds.min()} … {seeds.max()}.\n",
            findings(rows, names),
            f"### Gap to the lower bound (%)\n\n{to_markdown(gap_table(rows, names))}",
            "### What each part of the method changes (points of the gap, paired by case)\n",
            to_markdown(step_table(rows, task)),
            "### The policies' order, against that under perfect estimates\n",
            to_markdown(rank_table(rows, names)),
            "### Idle time of a client: seconds, and share of the makespan\n",
            to_markdown(idle_table(rows, names)),
        ]
    return "\n".join(parts)
