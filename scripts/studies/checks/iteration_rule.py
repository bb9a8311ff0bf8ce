"""Does comparing C_p with C_d pick the better action? Both are tried, on known distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.baselines.lookahead.rollout import RolloutPolicy
from servegym.baselines.lookahead.verdicts import judge_episode, tally
from servegym.baselines.registry import make_trigger_policy
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import play
from servegym.envs.playing.summary import fixed, to_markdown, with_interval
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.distributions import MEAN_TOKENS, check_outputs, make_constructed_case
from servegym.studies.checks.common import Line, line
from servegym.studies.cli import split_names
from servegym.studies.tuned import numbered, tuned_multiplier

ERRORS: Final = (-0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
"""Relative errors of a cost estimate."""

NOISES: Final = (0.25, 0.5)
"""Standard deviations of the log of an error drawn anew at each decision."""

FIXED_JUDGE: Final = "lookahead-0.7"
PANEL: Final = tuple(f"lookahead-{multiplier}" for multiplier in (0.4, 0.5, 0.6, 0.8, 0.9, 1))
JUDGES: Final[dict[str, tuple[int, ...]]] = {
    "same": (0,),
    "fixed": (1,),
    "panel": tuple(range(1, 2 + len(PANEL))),
}
"""The rules that finish the episodes, as places in (the rule itself, ``FIXED_JUDGE``, *``PANEL``); of
several rules the mean end counts."""

JUDGE_WORDS: Final = {
    "panel": "the panel finishes",
    "same": "the rule itself finishes",
    "fixed": f"`{FIXED_JUDGE}` finishes",
}
"""The judges in the order of the report."""


class JudgedRule(NamedTuple):
    """A rule and the errors of its cost estimates; its fields are columns of the rows."""

    family: str
    base: float  # λ without errors
    factor: float = 1.0  # the errors of all estimates act as λ times this
    noise: float = 0.0  # standard deviation of the log of an error drawn anew at each decision

    @property
    def policy(self) -> str:
        """The policy's name with the λ that the errors amount to."""
        return numbered(self.family, round(self.base * self.factor, 6))

    @property
    def has_errors(self) -> bool:
        """Whether any estimate is wrong."""
        return self.factor != 1 or self.noise > 0


def multiplier_of(x: float, estimate: str) -> float:
    """Return the factor of λ that an error x of all estimates of ``C_p`` or ``C_d`` amounts to."""
    return 1 + x if estimate == "C_p" else 1 / (1 + x)


def _error_labels() -> dict[float, str]:
    labels: dict[float, list[str]] = {}
    for estimate in ("C_p", "C_d"):
        for x in ERRORS:
            label = f"{estimate} {100 * x:+.0f} %" if x else "none"
            labels.setdefault(round(multiplier_of(x, estimate), 9), []).append(label)
    return {factor: ", ".join(dict.fromkeys(labels[factor])) for factor in sorted(labels)}


ERROR_LABELS: Final = _error_labels()
"""Errors by the factor of λ that they amount to, ascending."""


def rules(task: TaskConfig) -> list[JudgedRule]:
    """Return the rules judged: the hybrid with λ = 1 and tuned under all errors, and two others."""
    judged = []
    for base in hybrid_bases(task):
        judged += [JudgedRule("hybrid", base, factor) for factor in ERROR_LABELS]
        judged += [JudgedRule("hybrid", base, noise=noise) for noise in NOISES]
    families = ("lookahead", "aligned-lookahead")
    return judged + [JudgedRule(family, tuned_multiplier(task, family)) for family in families]


def hybrid_bases(task: TaskConfig) -> list[float]:
    """Return the λ of the hybrid without errors: 1 and the tuned one."""
    return list(dict.fromkeys((1.0, tuned_multiplier(task, "hybrid"))))


def play_case(task: TaskConfig, seed: int, outputs: str, samples: int) -> list[dict[str, Any]]:
    """Return a row a rule: its errors, the episode's gap and the judges' verdicts."""
    case = make_constructed_case(task, outputs, seed)
    return [
        {"seed": seed, **rule._asdict(), **judge(task, case, rule, seed, samples)}
        for rule in rules(task)
    ]


def judge(
    task: TaskConfig, case: Case, rule: JudgedRule, seed: int, samples: int
) -> dict[str, float]:
    """Return an episode's gap and how the judges count at most ``samples`` of its decisions."""
    policy = make_trigger_policy(rule.policy)
    judges = (policy, *map(make_trigger_policy, (FIXED_JUDGE, *PANEL)))
    metrics, verdicts = judge_episode(task, case, policy, judges, samples, seed, rule.noise)
    row = {
        "bound_s": case.bound.seconds,
        "gap": metrics["gap"],
        "decisions": metrics["decisions"],
        "judged": len(verdicts),
        "prefills": sum(verdict.prefills for verdict in verdicts),
    }
    if not rule.has_errors:
        best = RolloutPolicy(policy, variations=0, rules=())
        row["gap_if_better"] = play(task, "better", best, case, seed).row["gap"]
    for name, places in JUDGES.items():
        row |= {f"{name}_{count}": value for count, value in tally(verdicts, places).items()}
    return row


def select(rows: pd.DataFrame, rule: JudgedRule, outputs: str | None = None) -> pd.DataFrame:
    """Return a rule's episodes with at least one decision; of one distribution, or None for all."""
    chosen = (
        (rows["family"] == rule.family)
        & np.isclose(rows["base"], rule.base)
        & np.isclose(rows["factor"], rule.factor, rtol=1e-5)
        & np.isclose(rows["noise"], rule.noise)
        & (rows["judged"] > 0)
    )
    if outputs is not None:
        chosen &= rows["outputs"] == outputs
    return rows[chosen]


def shares(episodes: pd.DataFrame, judge: str) -> dict[str, NDArray[np.float64]]:
    """Return shares of each episode's decisions that are no tie, in percent; NaN where all are ties."""
    clear = (episodes["judged"] - episodes[f"{judge}_ties"]).to_numpy(float)
    clear[clear == 0] = np.nan
    early, late, prefill = (
        episodes[f"{judge}_{name}"].to_numpy(float) / clear * 100
        for name in ("early", "late", "prefill_better")
    )
    return {"right": 100 - early - late, "early": early, "late": late, "prefill": prefill}


def _cell(values: NDArray[np.float64], digits: int = 1) -> str:
    known = values[np.isfinite(values)]
    return with_interval(known, digits=digits) if len(known) else "–"


def _mean(values: NDArray[np.float64], digits: int = 1) -> str:
    known = values[np.isfinite(values)]
    return fixed(known.mean(), digits) if len(known) else "–"


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> str:
    return fixed(100 * part.sum() / whole.sum(), 0) if whole.sum() > 0 else "–"


def verdict_row(episodes: pd.DataFrame, judge: str) -> dict[str, str]:
    """Return the cells of one judge: means over the episodes with intervals."""
    share = shares(episodes, judge)
    judged, bound_s = episodes["judged"].to_numpy(float), episodes["bound_s"].to_numpy(float)
    stake_s, regret_s, decode_regret_s = (
        episodes[f"{judge}_{name}"].to_numpy(float) / judged
        for name in ("stake_s", "regret_s", "decode_regret_s")
    )
    return {
        "better action (%)": _cell(share["right"]),
        "always prefill / always decode (%)": (
            f"{_mean(share['prefill'], 0)} / {_mean(100 - share['prefill'], 0)}"
        ),
        "too early / too late (%)": f"{_mean(share['early'])} / {_mean(share['late'])}",
        "ties (% of all)": f"{100 * (episodes[f'{judge}_ties'] / judged).mean():.1f}",
        "regret (ms)": _cell(1e3 * regret_s),
        "(% of bound)": f"{100 * (regret_s / bound_s).mean():.4f}",
        "of what was at stake: rule / always prefill / always decode (%)": " / ".join(
            _share(lost_s, stake_s)
            for lost_s in (regret_s, stake_s - decode_regret_s, decode_regret_s)
        ),
        "AUC of C_d / C_p": _cell(episodes[f"{judge}_auc"].to_numpy(float), 2),
    }


def rule_table(rows: pd.DataFrame, task: TaskConfig, judge: str, all_outputs: Sequence[str]) -> str:
    """Return a row for each distribution and rule without errors; those of all distributions first."""
    table = []
    for outputs in (None, *all_outputs):
        for rule in (rule for rule in rules(task) if not rule.has_errors):
            episodes = select(rows, rule, outputs)
            if len(episodes) == 0:
                continue
            row = {
                "outputs": outputs or "**all**",
                "rule": f"`{rule.policy}`",
                "n": str(len(episodes)),
            }
            row["decisions"] = f"{episodes['decisions'].mean():.0f}"
            table.append(row | verdict_row(episodes, judge))
            if judge == next(iter(JUDGE_WORDS)):
                better = (episodes["gap"] - episodes["gap_if_better"]).to_numpy(float)
                table[-1]["gap (%)"] = with_interval(episodes["gap"].to_numpy(float), 100)
                table[-1]["better action each time gains (points)"] = with_interval(better, 100)
    return to_markdown(pd.DataFrame(table))


def error_table(rows: pd.DataFrame, base: float, judge: str) -> str:
    """Return the hybrid under errors, over all distributions: a row an error and its λ."""
    right = JudgedRule("hybrid", base)
    cases = [(label, factor, 0.0) for factor, label in ERROR_LABELS.items()]
    cases += [(f"C_p ±{100 * noise:.0f} % at random", 1.0, noise) for noise in NOISES]
    table = []
    for label, factor, noise in cases:
        episodes = select(rows, JudgedRule("hybrid", base, factor, noise))
        plain = select(rows, right).set_index(["outputs", "seed"])["gap"]
        change = episodes.set_index(["outputs", "seed"])["gap"] - plain
        row = {"error": label, "acts as λ": f"{base * factor:.3g}" if noise == 0 else "–"}
        row |= verdict_row(episodes, judge)
        row["gap (%)"] = fixed(100 * episodes["gap"].mean())
        row["gap changes by (points)"] = with_interval(change.dropna().to_numpy(float), 100)
        table.append(row)
    return to_markdown(pd.DataFrame(table))


def distribution_table(
    rows: pd.DataFrame,
    base: float,
    all_outputs: Sequence[str],
    values: NDArray[np.float64],
    digits: int,
) -> str:
    """Return means of ``values``, a number a row, of the hybrid by distribution and by the λ of errors."""
    rows = rows.assign(value=values)
    table = []
    for outputs in all_outputs:
        row = {"outputs": outputs}
        for factor in ERROR_LABELS:
            episodes = select(rows, JudgedRule("hybrid", base, factor), outputs)
            row[f"λ × {factor:.3g}"] = _cell(episodes["value"].to_numpy(float), digits)
        if any(cell != "–" for cell in list(row.values())[1:]):
            table.append(row)
    return to_markdown(pd.DataFrame(table))


INTRODUCTION: Final = f"""\
The paper decides by C_d ≥ λ · C_p, cost of waiting on against cost of a prefill stage. Here both
actions are played out at up to {{samples}} decisions of each episode, evenly spread over those the rule
meets: decode on, or prefill under the rule's own admission rule. The better one is that after which the
episode ends earlier, finished by a judge: **the rule itself**, or **`{FIXED_JUDGE}`** whatever the
rule. Which requests happen to be left last moves the end more than one decision does, so that one
judge's verdicts within an episode hang together; **the panel** averages that luck: better is the action
after which the episode ends earlier on average over seven finishing rules, `lookahead` with
λ = 0.4, 0.5, … 1. Output lengths are known.

**Errors.** If all estimates of C_p are (1 + x) times the truth, the rule prefills iff
C_d ≥ λ (1 + x) C_p; if those of C_d are, iff (1 + x) C_d ≥ λ C_p. An error is thus another λ, exactly:
λ (1 + x) or λ / (1 + x); +100 % of C_p and −50 % of C_d are the same rule. Errors drawn anew at each
decision (lognormal factors of mean 1 on C_p) are no λ and are played as such.

- *Better action*: share of the decisions at which the rule took it, ties (differences below 1e-9 of the
  makespan) left out; beside it what prefilling always and decoding always would score there.
- *Too early*: it prefilled where decoding on was better; *too late*: the other way round; both as shares
  of the same decisions.
- *Regret*: how much later the episode ends by the rule's action than by the better one, mean over all
  judged decisions. *Of what was at stake*: regret over the mean difference between the two actions; a
  coin's is 50 %. Beside it what prefilling always and decoding always would lose at the same decisions.
- *AUC*: chance that C_d / C_p is larger at a decision where prefilling is better than at one where it is
  not; 0.5 tells nothing. It depends on the states that the rule meets, not on λ itself.
- *Better action each time*: the same rule, but at every decision the action that ends earlier when the
  rule goes on (`rollout` with the rule as its base and its own admission rule only).

Outputs have a mean of {MEAN_TOKENS} tokens: uniform 1 … {2 * MEAN_TOKENS - 1}, narrow and wide lognormal
of spread 0.2 and 1.0, bimodal 64 or 624. Means over cases with 95 % Student-t intervals.
"""


def report(
    tables: Mapping[str, tuple[TaskConfig, pd.DataFrame]],
    all_outputs: Sequence[str],
    samples: int,
    command: str,
) -> str:
    """Return iteration_rule.md."""
    parts = ["# Does comparing C_p with C_d pick the better action?\n", f"`{command}`\n"]
    parts.append(INTRODUCTION.format(samples=samples))
    for name, (task, rows) in tables.items():
        parts.append(f"## Costs of {name}\n")
        undecided = [
            outputs
            for outputs in all_outputs
            if (rows[rows["outputs"] == outputs]["judged"] == 0).all()
        ]
        if undecided:
            parts.append(
                f"Nothing to decide with {', '.join(undecided)} outputs: all clients fall idle at once.\n"
            )
        for judge_name, words in JUDGE_WORDS.items():
            table = rule_table(rows, task, judge_name, all_outputs)
            parts.append(f"### No errors; {words}\n\n{table}")
        gap_percent = 100 * rows["gap"].to_numpy(float)
        right_percent = shares(rows, "panel")["right"]
        for base in hybrid_bases(task):
            panel, same = JUDGE_WORDS["panel"], JUDGE_WORDS["same"]
            gap_table = distribution_table(rows, base, all_outputs, gap_percent, 2)
            parts += [
                f"### `{numbered('hybrid', base)}` with wrong cost estimates, all distributions together\n",
                f"Where {panel}:\n\n{error_table(rows, base, 'panel')}",
                f"Where {same}:\n\n{error_table(rows, base, 'same')}",
                f"Gap (%) by distribution:\n\n{gap_table}",
                f"Better action (%) by distribution, where {panel}:\n",
                distribution_table(rows, base, all_outputs, right_percent, 0),
            ]
    return "\n".join(parts)


def lines(task: TaskConfig, rows: pd.DataFrame, all_outputs: Sequence[str]) -> list[Line]:
    """Return the picture's lines of one task: the gap over the error of C_p, λ = 1 and tuned."""
    drawn = []
    for k, outputs in enumerate(all_outputs):
        labels = (("λ = 1", "o-"), ("λ tuned", "s--"))
        for base, (label, style) in zip(hybrid_bases(task), labels, strict=False):
            episodes = [
                select(rows, JudgedRule("hybrid", base, multiplier_of(error, "C_p")), outputs)
                for error in ERRORS
            ]
            if all(len(table) for table in episodes):
                x = [100 * error for error in ERRORS]
                values = [100 * table["gap"].to_numpy(float) for table in episodes]
                drawn.append(line(f"{outputs}, {label}", x, values, f"C{k}", style))
    return drawn


def parse_outputs(text: str) -> tuple[str, ...]:
    """Return the distributions of a comma-separated list, each once; refuse an unknown one."""
    names = tuple(split_names(text))
    if not names:
        raise ServegymError("--outputs names no distribution; give one, such as uniform")
    for name in names:
        check_outputs(name)
    return names
