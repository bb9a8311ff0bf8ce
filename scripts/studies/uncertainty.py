"""Policies, pulls and plans under uncertain output lengths: what is played, tables and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pandas as pd

from servegym.agents.policy import load_agent
from servegym.baselines.planning.sampled import mean_largest_load, plan_by_samples, sample_rounds
from servegym.baselines.rules.compiled import CompilablePolicy, play_compiled
from servegym.baselines.rules.plans import plan_at_risk, plan_expected
from servegym.envs.playing.evaluation import brief, make_case, play
from servegym.envs.playing.policy import Policy
from servegym.envs.playing.summary import to_markdown, with_interval
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.studies.agents.comparing import verdict
from servegym.studies.checks.common import TAUS, line, picture
from servegym.studies.policies import AGENTS, SHIPPED, make_policy
from servegym.studies.tuned import TUNING_CASES

PREDICTED: Final = "GSM8KPredicted-v0"
MIXED: Final = "GSM8KMixed-v0"
CLAIRVOYANT_OF: Final = "GSM8K-v0"
CLAIRVOYANT: Final = "ppo-known"
"""The agent of GSM8K-v0, trained with lengths known."""

TUNED_THRESHOLD: Final = "threshold-K"
"""Stands for the threshold whose K is the best of each τ on training cases."""

QUALITY: Final = (
    *("random", "fcfs", "static", "round-robin", "feedback-0.5", "offline", "offline-steal"),
    *("hybrid", "hybrid-0.2", "lpt", TUNED_THRESHOLD, "threshold-12", "lookahead-0.7"),
    *("aligned-0.5", "aligned-lookahead-0.5", "quantile", CLAIRVOYANT, SHIPPED),
)
SLOW: Final = ("offline-saa", "rollout", "rollout-6:threshold-12")
"""Policies of the quality table that take a second or more an episode: on fewer cases."""

PULLS: Final = (
    *("random", "fcfs", "round-robin", "feedback-0.5", "offline", "offline-risk", "offline-risk-3"),
    *("offline-steal", "hybrid", "threshold-12", "aligned-0.5", "mean-sd-0", "mean-sd-1"),
    *("mean-sd-2", "mean-sd-3", "quantile-0.5", "quantile-0.9", "quantile-0.95", "quantile"),
    *("quantile-0.999", "quantile-0.9999"),
)
"""Policies of the mixed table; ``mean-sd-0`` pulls by the mean, with the trigger of the others."""

SCENARIOS: Final = (1, 8, 32, 128, 512)
RISKS: Final = (0.0, 1.0, 3.0)
FRESH: Final = 1000
"""Scenarios that plans are judged by; no plan was made with them."""


NONE_LEARNED: Final[Mapping[str, Policy]] = MappingProxyType({})


def with_tau(task: TaskConfig, tau: float) -> TaskConfig:
    """Return the task at a prediction quality."""
    return with_overrides(task, {"information": {"kendall_tau": tau}})


def agents() -> dict[str, Policy]:
    """Return the agents of the tables, which a worker elsewhere may not have."""
    return {
        SHIPPED: make_policy(SHIPPED, PREDICTED),
        CLAIRVOYANT: load_agent(AGENTS / CLAIRVOYANT_OF),
    }


def gaps_of(
    task: TaskConfig,
    seed: int,
    names: Sequence[str],
    best_threshold: str = "",
    learned: Mapping[str, Policy] = NONE_LEARNED,
) -> dict[str, float]:
    """Return each policy's gap on one case."""
    case, gaps = make_case(task, seed), {}
    for name in names:
        policy = learned.get(name)
        if policy is None:
            policy = make_policy(best_threshold if name == TUNED_THRESHOLD else name, PREDICTED)
        if isinstance(policy, CompilablePolicy):
            gaps[name] = play_compiled(task, policy, case)["gap"]
        else:
            gaps[name] = float(play(task, name, policy, case, seed).row["gap"])
    return gaps


def play_quality(
    task: TaskConfig,
    seed: int,
    names: Sequence[str],
    thresholds: Mapping[float, str],
    learned: Mapping[str, Policy],
) -> list[dict[str, Any]]:
    """Return one row a τ: each policy's gap on the same requests. ``learned`` are :func:`agents`."""
    return [
        {"seed": seed, "tau": tau}
        | gaps_of(with_tau(task, tau), seed, names, thresholds[tau], learned)
        for tau in TAUS
    ]


def play_mixed(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    """Return each policy's gap."""
    return [{"seed": seed} | gaps_of(task, seed, PULLS)]


def judge_plans(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    """Return each plan's mean largest load in rounds, in the scenarios it was made with and in others."""
    briefing = brief(task, make_case(task, seed), seed)
    requests, rng = briefing.requests, briefing.rng
    assert requests is not None
    fresh = sample_rounds(requests, FRESH, np.random.default_rng([seed, 2]))
    row: dict[str, Any] = {
        "seed": seed,
        "means": mean_largest_load(plan_expected(requests, briefing), fresh),
    }
    for k in RISKS[1:]:
        row[f"risk-{k:g}"] = mean_largest_load(plan_at_risk(requests, briefing, k), fresh)
    for scenarios in SCENARIOS:
        rounds = sample_rounds(requests, scenarios, rng)
        sampled = plan_by_samples(requests, task.cluster.all_clients, rounds, rng)
        row[f"saa-{scenarios} in sample"] = sampled.in_sample_rounds
        row[f"saa-{scenarios}"] = mean_largest_load(sampled.plan, fresh)
    return [row]


def by_tau(rows: pd.DataFrame, name: str) -> list[np.ndarray]:
    """Return a policy's gaps in percent, an array of cases for each τ."""
    return [
        100 * rows.loc[rows["tau"] == tau].sort_values("seed")[name].to_numpy(float) for tau in TAUS
    ]


def quality_table(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return one row a policy, one column a τ."""
    return pd.DataFrame(
        [
            {"policy": name, "n": str(rows["seed"].nunique())}
            | {
                f"τ = {tau:g}": with_interval(values)
                for tau, values in zip(TAUS, by_tau(rows, name), strict=True)
            }
            for name in names
        ]
    )


def learned_against_rules(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, for each τ, the shipped agent's paired difference to the best of the other rows."""
    rules = [name for name in QUALITY if name not in (SHIPPED, CLAIRVOYANT)]
    table = []
    for place, tau in enumerate(TAUS):
        gaps = {name: by_tau(rows, name)[place] for name in (*rules, SHIPPED)}
        best = min(rules, key=lambda name: float(gaps[name].mean()))
        table.append(
            {
                "τ": f"{tau:g}",
                "best rule": best,
                "its gap (%)": with_interval(gaps[best]),
                f"`{SHIPPED}` − it (points)": verdict(gaps[SHIPPED] - gaps[best]),
            }
        )
    return pd.DataFrame(table)


def mixed_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a policy with its paired difference to the pull by the mean."""
    mean_pull = rows["mean-sd-0"].to_numpy(float)
    return pd.DataFrame(
        [
            {
                "policy": name,
                "n": str(len(rows)),
                "gap (%)": with_interval(rows[name].to_numpy(float), 100),
                "− `mean-sd-0` (points)": ""
                if name == "mean-sd-0"
                else with_interval(rows[name].to_numpy(float) - mean_pull, 100),
            }
            for name in PULLS
        ]
    )


def plans_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a plan: rounds in the scenarios it was made with, in others, and against ``means``."""
    means = rows["means"].to_numpy(float)
    table = []
    for name in [column for column in rows.columns if column != "seed"]:
        if name.endswith("in sample"):
            continue
        fresh, promised = rows[name].to_numpy(float), f"{name} in sample"
        table.append(
            {
                "plan": name,
                "n": str(len(rows)),
                "own scenarios (rounds)": with_interval(rows[promised].to_numpy(float), digits=0)
                if promised in rows
                else "",
                f"{FRESH} others (rounds)": with_interval(fresh, digits=0),
                "− means (%)": "" if name == "means" else with_interval(fresh / means - 1, 100),
            }
        )
    return pd.DataFrame(table)


QUALITY_NOTES: Final = f"""\
Gap to the lower bound, which is that of the true lengths, in percent on GSM8K-v0's requests, by Kendall's
τ of the predictions with the truth. `{TUNED_THRESHOLD}` has its K tuned on {TUNING_CASES} training cases
of each τ; `{SHIPPED}` is the agent of {PREDICTED}, trained at τ = 0.55 alone, `{CLAIRVOYANT}` that of
GSM8K-v0, trained with lengths known. `random`, `fcfs`, `static`, `round-robin` and `feedback` use no
prediction. Intervals are 95 %, Student-t. Spreads are equal here, so a pull by a quantile is one by the
mean.
"""
MIXED_NOTES: Final = f"""\
{MIXED}: half of the predictions have a spread of 0.1, the others of 0.8, and which is known. Gap to the
clairvoyant bound; differences paired by case.
"""
PLANS_NOTES: Final = f"""\
Mean over scenarios of the largest client load, for plans by the means, by the means plus k standard
deviations (`risk-k`), and by sample-average approximation over S scenarios (`saa-S`). Judged by {FRESH}
scenarios that no plan has seen; what a plan promises on its own is beside it.
"""


def report_quality(rows: pd.DataFrame, slow_rows: pd.DataFrame) -> str:
    """Return the tables by prediction quality."""
    table = pd.concat([quality_table(rows, QUALITY), quality_table(slow_rows, SLOW)])
    return (
        f"{QUALITY_NOTES}\n{to_markdown(table)}\n"
        f"The agent against the best of the other policies that were played on as many cases:\n\n"
        f"{to_markdown(learned_against_rules(rows))}"
    )


def report_mixed(rows: pd.DataFrame) -> str:
    """Return the table of pulls."""
    return f"{MIXED_NOTES}\n{to_markdown(mixed_table(rows))}"


def report_plans(tables: Mapping[str, pd.DataFrame]) -> str:
    """Return a table of plans for each task."""
    parts = [f"## {name}\n\n{to_markdown(plans_table(rows))}" for name, rows in tables.items()]
    return "\n".join([PLANS_NOTES, *parts])


def draw_quality(rows: pd.DataFrame) -> bytes:
    """Return the picture of gaps over τ."""
    styles = {
        "fcfs": ("C7", ":"), "feedback-0.5": ("C5", "^:"), "hybrid": ("C3", "s--"),
        "offline-steal": ("C1", "v--"), TUNED_THRESHOLD: ("C0", "o-"),
        "aligned-lookahead-0.5": ("C4", "x-"), SHIPPED: ("C2", "D-"),
    }  # fmt: skip
    lines = [line(name, TAUS, by_tau(rows, name), *style) for name, style in styles.items()]
    return picture({"GSM8K-v0's requests, lengths predicted": lines}, "Kendall's τ of predictions")
