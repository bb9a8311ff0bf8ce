"""Each rule with stealing and without it, by how well output lengths are predicted."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_loaded
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.playing.evaluation import brief, make_case
from servegym.envs.playing.summary import fixed, mean_interval, to_markdown, with_interval
from servegym.envs.process.metrics import episode_metrics
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import load_case, lower, make_task_state
from servegym.studies.checks.common import TAUS, Line, line
from servegym.studies.tuned import numbered, tuned_multiplier

KNOWN: Final = "known"
"""Stands in the column ``tau`` where lengths are known; its gaps must equal those of τ = 1."""


class Pair(NamedTuple):
    """One trigger with three ways to share out the requests."""

    trigger: str
    without: str  # each client serves its planned queue only
    stealing: str  # the same plan, an idle client with an empty queue steals
    queue: str  # no plan: one queue, longest first


def pairs(task: TaskConfig) -> list[Pair]:
    """Return the pairs of a task: eager, the Lagrangian rule with λ = 1 and with the tuned λ."""
    compared = [Pair("eager", "offline", "offline-steal", "threshold-1")]
    for multiplier in dict.fromkeys((1.0, tuned_multiplier(task, "hybrid"))):
        names = (numbered(family, multiplier) for family in ("hybrid-plan", "hybrid", "lpt"))
        compared.append(Pair(f"Lagrangian, λ = {multiplier:g}", *names))
    return compared


def play_stealing(task: TaskConfig, policy: TriggerPolicy, case: Case) -> dict[str, float]:
    """Return the metrics of one episode and ``stolen``, the share of requests not served as planned."""
    state = make_task_state(task, 1, len(case.requests))
    load_case(task, state, 0, case, policy.prepare(brief(task, case, seed=0)))
    play_loaded(state, lower(task).costs, task, policy)
    requests = state.requests[0]
    stolen = float(np.mean(requests["client"] != requests["plan_client"]))
    return episode_metrics(state, 0) | {"stolen": stolen}


def play_case(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    """Return a row a prediction quality: every policy's gap, and what stealing policies stole."""
    rows = []
    for tau in (*TAUS, KNOWN):
        information: dict[str, Any] = {"output_lengths": KNOWN}
        if tau != KNOWN:
            information = {"output_lengths": "predicted", "kendall_tau": tau}
        informed = with_overrides(task, {"information": information})
        case = make_case(informed, seed)  # the same requests at every τ
        row: dict[str, Any] = {"seed": seed, "tau": str(tau), "bound_s": case.bound.seconds}
        for pair in pairs(task):
            for name in pair[1:]:
                played = play_stealing(informed, make_trigger_policy(name), case)
                row[name] = played["gap"]
                if name == pair.stealing:
                    row[f"stolen by {name}"] = played["stolen"]
        rows.append(row)
    return rows


def at(rows: pd.DataFrame, tau: float | str) -> pd.DataFrame:
    """Return the rows of one prediction quality, a case each, by seed."""
    return rows[rows["tau"].astype(str) == str(tau)].sort_values("seed")


def tabulate(rows: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    """Return one row a prediction quality: three gaps, paired differences, requests stolen."""
    table = []
    for tau in (*TAUS, KNOWN):
        cases = at(rows, tau)
        without, stealing, queue = (cases[name].to_numpy(float) for name in pair[1:])
        table.append(
            {
                "τ": str(tau),
                f"`{pair.without}` (%)": with_interval(without, 100),
                f"`{pair.stealing}` (%)": with_interval(stealing, 100),
                f"`{pair.queue}` (%)": with_interval(queue, 100),
                "stealing changes the gap by (points)": with_interval(stealing - without, 100),
                "better / equal / worse cases": _signs(stealing - without),
                "one queue − stealing (points)": with_interval(queue - stealing, 100),
                "stolen (% of requests)": with_interval(
                    cases[f"stolen by {pair.stealing}"].to_numpy(float), 100, 1
                ),
            }
        )
    return pd.DataFrame(table)


def _signs(differences: np.ndarray) -> str:
    better, worse = (differences < -1e-9).sum(), (differences > 1e-9).sum()
    return f"{better} / {len(differences) - better - worse} / {worse}"


def findings(rows: pd.DataFrame, task: TaskConfig) -> str:
    """Return in words at which τ stealing gains, loses or makes no clear difference."""
    lines = []
    for pair in pairs(task):
        effects: dict[str, list[str]] = {"gains": [], "loses": [], "changes nothing clear": []}
        for tau in TAUS:
            cases = at(rows, tau)
            mean, half = mean_interval(
                (cases[pair.stealing] - cases[pair.without]).to_numpy(float) * 100
            )
            effect = "changes nothing clear"
            if abs(mean) > half:
                effect = "gains" if mean < 0 else "loses"
            effects[effect].append(f"{tau} ({fixed(mean, sign='+')})")
        summary = "; ".join(
            f"{effect} at τ = {', '.join(texts)}" for effect, texts in effects.items() if texts
        )
        lines.append(f"- {pair.trigger}: stealing {summary}.")
    worst = max(
        float(np.abs(at(rows, 1.0)[name].to_numpy() - at(rows, KNOWN)[name].to_numpy()).max())
        for pair in pairs(task)
        for name in pair[1:]
    )
    lines.append(f"- τ = 1 against lengths known: largest difference of a gap {100 * worst:.2g} %.")
    return "\n".join(lines) + "\n"


INTRODUCTION: Final = """\
Gap to the lower bound with stealing and without, by Kendall's τ of the predicted output lengths with
the true ones (0: everyone is predicted alike, 1: perfect). A row compares three ways to share out the
requests under one trigger: the offline plan, each client its own queue; the same plan with Algorithm 1
of the paper, where an idle client with an empty queue steals the longest request of the client with
most work; and one queue without a plan, longest predicted first. Means over held-out cases with 95 %
Student-t intervals, differences paired by case.
"""


def report(tables: dict[str, tuple[TaskConfig, pd.DataFrame]], command: str) -> str:
    """Return stealing.md."""
    parts = ["# The value of stealing\n", f"`{command}`\n", INTRODUCTION]
    for name, (task, rows) in tables.items():
        seeds = rows["seed"]
        parts.append(
            f"## {name}\n\n{seeds.nunique()} cases, seeds {seeds.min()} … {seeds.max()}.\n"
        )
        parts.append(f"{findings(rows, task)}")
        parts += [
            f"### {pair.trigger}\n\n{to_markdown(tabulate(rows, pair))}" for pair in pairs(task)
        ]
    return "\n".join(parts)


def lines(task: TaskConfig, rows: pd.DataFrame) -> list[Line]:
    """Return the picture's lines of one task."""
    drawn = []
    for k, pair in enumerate(pairs(task)):
        trigger = "Lagrangian, λ tuned" if k == 2 else pair.trigger  # one legend for all tasks
        ways = (("own queues", "s--"), ("stealing", "o-"), ("one queue", "^:"))
        for (way, style), name in zip(ways, pair[1:], strict=True):
            values = [100 * at(rows, tau)[name].to_numpy(float) for tau in TAUS]
            drawn.append(line(f"{trigger}: {way}", TAUS, values, f"C{k}", style))
    return drawn
