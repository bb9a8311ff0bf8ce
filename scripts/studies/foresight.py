"""What knowing the next finish is worth where output lengths are not known.

Three rules of one form differ only in what they know of the next finish. A stage pays once the idle time
until then outweighs the stage's fixed cost per request that it admits,

    idle² · seconds until the next finish  ≥  m · active · (fixed part of a stage),

which for finishes at a constant rate is the economic order quantity. The seconds are those of the finish
that is *expected* next, the mean by the *rate* at which the running requests finish, or the *true* ones.
The last is no policy: it is told what no scheduler knows, and lives in this study alone. All admit the
longest first, by predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.playing.summary import to_markdown, with_interval
from servegym.envs.process.metrics import episode_metrics
from servegym.envs.simulator.admission import admits
from servegym.envs.simulator.events import advance, decode, prefill
from servegym.envs.simulator.seconds import decode_seconds
from servegym.envs.simulator.stages import rounds_to_next_finish
from servegym.envs.simulator.state import NOBODY, State
from servegym.envs.simulator.view import view
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import load_case, lower, make_task_state
from servegym.envs.vocabulary import LONGEST
from servegym.studies.agents.comparing import verdict
from servegym.studies.policies import make_policy

KNOWN: Final = ("expected", "rate", "true")
"""What a rule knows of the next finish."""

EXPECTED: Final = 0
RATE: Final = 1

MULTIPLIERS: Final = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0)
"""The values of m that are tried on training cases."""

BEST_RULE: Final = "threshold-12"
"""The best rule of the registry on the task."""

SAMPLED: Final = ("rollout(samples=16)",)
"""Rollouts by samples; their base is ``BEST_RULE``."""

DETERMINISTIC: Final = f"rollout-6:{BEST_RULE}"
"""The rollout that plays expected lengths."""


@kernel
def finish_rate(state: State, e: int, r: int) -> float:
    """Return how many of the running requests finish a round, by the beliefs given the tokens emitted.

    The sum of the hazards of lognormal lengths; a belief without spread adds nothing.
    """
    replica = state.replicas[e, r]
    rate = 0.0
    for place in range(replica.active):
        i = state.expected[e, r, place].request
        request, belief = state.requests[e, i], state.beliefs[e, i]
        if belief.spread == 0.0:
            continue
        admitted = state.clients[e, r, request.client].expected_end - request.expected_rounds
        emitted = replica.rounds - admitted + 1
        z = (math.log(emitted) - belief.log_median) / belief.spread
        beyond = 0.5 * math.erfc(z / math.sqrt(2.0))
        density = math.exp(-z * z / 2.0) / (math.sqrt(2.0 * math.pi) * belief.spread * emitted)
        rate += density / max(beyond, 1e-300)
    return rate


@shared_kernel
def run_foresight(state: State, costs: CostTables, known: int, multiplier: float) -> None:
    """Play row 0, one replica, to its end under the rule that knows what ``KNOWN[known]`` says."""
    while True:
        r = advance(state, costs, 0)
        if r == NOBODY:
            break
        replica = state.replicas[0, r]
        chosen = admits(state, 0, r, LONGEST)
        if chosen and replica.active > 0:
            now = view(state, costs, 0, r)
            if known == EXPECTED:
                next_s = now.seconds_to_finish
            elif known == RATE:
                next_s = now.round_s / max(finish_rate(state, 0, r), 1e-9)
            else:
                rounds = rounds_to_next_finish(state, 0, r)
                next_s = decode_seconds(costs, r, replica.active, replica.cached_tokens, rounds)
            fixed = now.active * now.prefill_fixed_s
            chosen = float(now.idle) * now.idle * next_s >= multiplier * fixed
        if chosen:
            prefill(state, costs, 0, r, LONGEST, 0)
        elif replica.active > 0:
            decode(state, costs, 0, r, False)


def foresight_gap(task: TaskConfig, case: Case, known: str, multiplier: float) -> float:
    """Return the gap, a fraction, of one rule on a case."""
    state = make_task_state(task, 1, len(case.requests))
    load_case(task, state, 0, case)
    run_foresight(state, lower(task).costs, KNOWN.index(known), multiplier)
    return episode_metrics(state, 0)["gap"]


def tuned_multipliers(task: TaskConfig, cases: int) -> dict[str, float]:
    """Return each rule's best m on training cases, seeds 0 …."""
    sums = {(known, m): 0.0 for known in KNOWN for m in MULTIPLIERS}
    for seed in range(cases):
        case = make_case(task, seed)
        for known, m in sums:
            sums[known, m] += foresight_gap(task, case, known, m)
    return {known: min(MULTIPLIERS, key=lambda m: sums[known, m]) for known in KNOWN}


def play_foresight(
    task: TaskConfig, seed: int, multipliers: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the gaps of the best rule and of the three rules on one case."""
    case = make_case(task, seed)
    row: dict[str, Any] = {"seed": seed}
    row[BEST_RULE] = play_compiled(task, make_trigger_policy(BEST_RULE), case)["gap"]
    return [row | {k: foresight_gap(task, case, k, m) for k, m in multipliers.items()}]


def play_sampled(task: TaskConfig, seed: int) -> list[dict[str, Any]]:
    """Return the gaps of the best rule and of rollouts with it as base, and their time a decision."""
    case = make_case(task, seed)
    row: dict[str, Any] = {"seed": seed}
    row[BEST_RULE] = play_compiled(task, make_trigger_policy(BEST_RULE), case)["gap"]
    for name in SAMPLED:
        played = play(task, name, make_policy(name, task.name), case, seed).row
        row[name], row[f"{name} ms"] = played["gap"], played["decision_ms_p50"]
    return [row]


NOTES: Final = f"""\
Gap to the clairvoyant bound; differences to `{BEST_RULE}`, the best rule of the registry, paired by case;
intervals are 95 %, Student-t over cases. The rules prefill once idle² · seconds until the next finish reach m
times a stage's fixed cost, and admit the longest first, by predictions. They differ in what they know of the
next finish: the one *expected* next, the *rate* of finishing by the beliefs, or the *true* one, which no
scheduler knows. m is the best of {", ".join(f"{m:g}" for m in MULTIPLIERS)} on training cases.
"""
SAMPLED_NOTES: Final = f"""\
Every decision draws so many futures from the beliefs and plays the base's own action, decode and each stage
in all of them; another action replaces the base's where its mean gain exceeds 3 standard errors. The base is
`{BEST_RULE}`. The deterministic `{DETERMINISTIC}` is in [quality.md](quality.md).
"""


def report_foresight(rows: pd.DataFrame, multipliers: Mapping[str, float]) -> str:
    """Return the table of the three rules, and which share of the true one's gain the rate has."""
    base = 100 * rows[BEST_RULE].to_numpy(float)
    table = [{"rule": f"`{BEST_RULE}`", "n": str(len(rows)), "gap (%)": with_interval(base)}]
    gains = {}
    for known, m in multipliers.items():
        gaps = 100 * rows[known].to_numpy(float)
        gains[known] = float((base - gaps).mean())
        table.append(
            {
                "rule": f"{known}, m = {m:g}",
                "n": str(len(rows)),
                "gap (%)": with_interval(gaps),
                f"− `{BEST_RULE}` (points)": verdict(gaps - base),
            }
        )
    half = gains["true"] / 2
    return (
        f"{NOTES}\n{to_markdown(pd.DataFrame(table).fillna(''))}\n"
        f"To know the next finish gains {gains['true']:.2f} points on `{BEST_RULE}`, half of that is "
        f"{half:.2f}; the rate, which beliefs give, gains {gains['rate']:.2f}.\n"
    )


def report_sampled(rows: pd.DataFrame) -> str:
    """Return the table of rollouts by samples."""
    base = 100 * rows[BEST_RULE].to_numpy(float)
    table = [{"policy": f"`{BEST_RULE}`", "n": str(len(rows)), "gap (%)": with_interval(base)}]
    for name in SAMPLED:
        gaps = 100 * rows[name].to_numpy(float)
        table.append(
            {
                "policy": f"`{name}`",
                "n": str(len(rows)),
                "gap (%)": with_interval(gaps),
                f"− `{BEST_RULE}` (points)": verdict(gaps - base),
                "decision (ms, median)": f"{np.median(rows[f'{name} ms']):.1f}",
            }
        )
    return f"{SAMPLED_NOTES}\n{to_markdown(pd.DataFrame(table).fillna(''))}"
