"""Does comparing C_p with C_d pick the better action? Both are tried, on known distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.baselines.lookahead.rollout import RolloutPolicy
from servegym.baselines.lookahead.verdicts import judge_episode, tally
from servegym.baselines.registry import make_trigger_policy
from servegym.envs.errors import ServegymError
from servegym.envs.files import write_file
from servegym.envs.play.evaluation import play
from servegym.envs.play.locks import locked
from servegym.envs.play.parallel import USUAL_JOBS
from servegym.envs.play.summary import fixed, to_markdown, with_interval
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.distributions import (
    MEAN_TOKENS,
    check_outputs,
    make_constructed_case,
)
from servegym.studies.checks.common import (
    TUNED,
    Collection,
    Line,
    held_out,
    line,
    load_tasks,
    numbered,
    picture,
    short_name,
    tuned_multiplier,
)
from servegym.studies.cli import check_number, command_line, parse, split_names

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
"""Who finishes the episodes: places among the rule itself, ``FIXED_JUDGE`` and ``PANEL``; the mean end
of several counts."""

SAID: Final = {
    "panel": "the panel finishes",
    "same": "the rule itself finishes",
    "fixed": f"`{FIXED_JUDGE}` finishes",
}
"""The judges in the order of the report."""


class Variant(NamedTuple):
    """A rule, its λ, and what its estimates are off by."""

    family: str
    base: float  # λ as meant
    factor: float  # λ that the errors amount to, over ``base``
    noise: float

    @property
    def policy(self) -> str:
        """The policy's name, errors included."""
        return numbered(self.family, round(self.base * self.factor, 6))


MAX_SAMPLES: Final = 1_000_000


@dataclass(frozen=True)
class Args:
    """Judge the Lagrangian rule's decisions; goes on where it was interrupted."""

    tasks: str = "GSM8K-v0,Paper-v0"
    """Comma-separated tasks or task TOMLs: clients, number of requests and cost model."""
    outputs: str = "constant,uniform,narrow,wide,bimodal,gsm8k-lognormal"
    """Comma-separated distributions of output lengths, constructed ones or workload presets."""
    cases: int = 16
    """Held-out cases of each task and distribution, seeds 1000000 and up."""
    samples: int = 30
    """Decisions of an episode that are judged, at most."""
    output: Path = Path("results/checks/iteration_rule")
    """Folder for a CSV file a task, iteration_rule.md and iteration_rule.png."""
    jobs: int = USUAL_JOBS
    """Worker processes."""


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


def variants(task: TaskConfig) -> list[Variant]:
    """Return what is played: the hybrid with λ = 1 and tuned under all errors, and two others."""
    found = []
    for base in dict.fromkeys((1.0, tuned_multiplier(task, "hybrid"))):
        found += [Variant("hybrid", base, factor, 0.0) for factor in ERROR_LABELS]
        found += [Variant("hybrid", base, 1.0, noise) for noise in NOISES]
    for family in ("lookahead", "aligned-lookahead"):
        found.append(Variant(family, tuned_multiplier(task, family), 1.0, 0.0))
    return found


@dataclass(frozen=True)
class Trial:
    """Plays one case; picklable, for worker processes."""

    outputs: str
    samples: int

    def __call__(self, task: TaskConfig, seed: int) -> list[dict[str, Any]]:
        """Return a row a variant."""
        case = make_constructed_case(task, self.outputs, seed)
        return [
            {"seed": seed, **variant._asdict(), **self.judge(task, case, variant, seed)}
            for variant in variants(task)
        ]

    def judge(self, task: TaskConfig, case: Case, variant: Variant, seed: int) -> dict[str, float]:
        """Return an episode's gap and what the judges say of its decisions."""
        policy = make_trigger_policy(variant.policy)
        judges = (policy, *map(make_trigger_policy, (FIXED_JUDGE, *PANEL)))
        metrics, verdicts = judge_episode(
            task, case, policy, judges, self.samples, seed, variant.noise
        )
        row = {
            "bound_s": case.bound.seconds,
            "gap": metrics["gap"],
            "decisions": metrics["decisions"],
            "judged": len(verdicts),
            "prefills": sum(verdict.prefills for verdict in verdicts),
        }
        if variant.factor == 1 and variant.noise == 0:
            best = RolloutPolicy(policy, variations=0, rules=())
            row["gap_if_better"] = play(task, "better", best, case, seed).row["gap"]
        for judge, places in JUDGES.items():
            found = tally(verdicts, places)
            row |= {f"{judge}_{name}": value for name, value in found.items()}
        return row


def select(rows: pd.DataFrame, variant: Variant, outputs: str | None = None) -> pd.DataFrame:
    """Return the episodes of a variant with at least one decision; of one distribution or of all."""
    chosen = (
        (rows["family"] == variant.family)
        & np.isclose(rows["base"], variant.base)
        & np.isclose(rows["factor"], variant.factor, rtol=1e-5)
        & np.isclose(rows["noise"], variant.noise)
        & (rows["judged"] > 0)
    )
    if outputs is not None:
        chosen &= rows["outputs"] == outputs
    return rows[chosen]


def shares(episodes: pd.DataFrame, judge: str) -> dict[str, NDArray[np.float64]]:
    """Return shares of the decisions that are no tie, an episode each, in percent; NaN without any."""
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
    """Return what one judge says of episodes: means over them with intervals."""
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
    """Return the rules without errors: a row a distribution and rule, first all together."""
    table = []
    for outputs in (None, *all_outputs):
        for variant in variants(task):
            if variant.factor != 1 or variant.noise > 0:
                continue
            episodes = select(rows, variant, outputs)
            if len(episodes) == 0:
                continue
            row = {
                "outputs": outputs or "**all**",
                "rule": f"`{variant.policy}`",
                "n": str(len(episodes)),
            }
            row["decisions"] = f"{episodes['decisions'].mean():.0f}"
            table.append(row | verdict_row(episodes, judge))
            if judge == next(iter(SAID)):
                better = (episodes["gap"] - episodes["gap_if_better"]).to_numpy(float)
                table[-1]["gap (%)"] = with_interval(episodes["gap"].to_numpy(float), 100)
                table[-1]["better action each time gains (points)"] = with_interval(better, 100)
    return to_markdown(pd.DataFrame(table))


def error_table(rows: pd.DataFrame, base: float, judge: str) -> str:
    """Return the hybrid under errors, over all distributions: a row an error and its λ."""
    right = Variant("hybrid", base, 1.0, 0.0)
    cases = [(label, factor, 0.0) for factor, label in ERROR_LABELS.items()]
    cases += [(f"C_p ±{100 * noise:.0f} % at random", 1.0, noise) for noise in NOISES]
    table = []
    for label, factor, noise in cases:
        episodes = select(rows, Variant("hybrid", base, factor, noise))
        plain = select(rows, right).set_index(["outputs", "seed"])["gap"]
        change = episodes.set_index(["outputs", "seed"])["gap"] - plain
        row = {"error": label, "acts as λ": f"{base * factor:.3g}" if noise == 0 else "–"}
        row |= verdict_row(episodes, judge)
        row["gap (%)"] = fixed(100 * episodes["gap"].mean())
        row["gap changes by (points)"] = with_interval(change.dropna().to_numpy(float), 100)
        table.append(row)
    return to_markdown(pd.DataFrame(table))


def matrix(
    rows: pd.DataFrame,
    base: float,
    all_outputs: Sequence[str],
    value: Callable[[pd.DataFrame], NDArray[np.float64]],
    digits: int,
) -> str:
    """Return ``value`` of the hybrid's episodes by distribution and by the λ that it acts by."""
    table = []
    for outputs in all_outputs:
        row = {"outputs": outputs}
        for factor in ERROR_LABELS:
            episodes = select(rows, Variant("hybrid", base, factor, 0.0), outputs)
            row[f"λ × {factor:.3g}"] = _cell(value(episodes), digits)
        if any(cell != "–" for cell in list(row.values())[1:]):
            table.append(row)
    return to_markdown(pd.DataFrame(table))


def _gap(episodes: pd.DataFrame) -> NDArray[np.float64]:
    return 100 * episodes["gap"].to_numpy(float)


def _right(episodes: pd.DataFrame) -> NDArray[np.float64]:
    return shares(episodes, "panel")["right"]


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


def report(tables: Mapping[str, tuple[TaskConfig, pd.DataFrame]], args: Args) -> str:
    """Return iteration_rule.md."""
    parts = ["# Does comparing C_p with C_d pick the better action?\n", f"`{command_of(args)}`\n"]
    parts.append(INTRODUCTION.format(samples=args.samples))
    all_outputs = parse_outputs(args.outputs)
    for name, (task, rows) in tables.items():
        parts.append(f"## Costs of {name}\n")
        idle = [one for one in all_outputs if (rows[rows["outputs"] == one]["judged"] == 0).all()]
        if idle:
            parts.append(
                f"Nothing to decide with {', '.join(idle)} outputs: all clients fall idle at once.\n"
            )
        for judge, words in SAID.items():
            table = rule_table(rows, task, judge, all_outputs)
            parts.append(f"### No errors; {words}\n\n{table}")
        for base in dict.fromkeys((1.0, tuned_multiplier(task, "hybrid"))):
            rule = f"`{numbered('hybrid', base)}`"
            parts += [
                f"### {rule} with wrong cost estimates, all distributions together\n",
                f"Where {SAID['panel']}:\n\n{error_table(rows, base, 'panel')}",
                f"Where {SAID['same']}:\n\n{error_table(rows, base, 'same')}",
                f"Gap (%) by distribution:\n\n{matrix(rows, base, all_outputs, _gap, 2)}",
                f"Better action (%) by distribution, where {SAID['panel']}:\n",
                matrix(rows, base, all_outputs, _right, 0),
            ]
    return "\n".join(parts)


def lines(task: TaskConfig, rows: pd.DataFrame, all_outputs: Sequence[str]) -> list[Line]:
    """Return the picture's lines of one task: the gap over the error of C_p, λ = 1 and tuned."""
    found = []
    bases = dict.fromkeys((1.0, tuned_multiplier(task, "hybrid")))
    for k, outputs in enumerate(all_outputs):
        for base, label, style in zip(bases, ("λ = 1", "λ tuned"), ("o-", "s--"), strict=False):
            values = [
                _gap(select(rows, Variant("hybrid", base, multiplier_of(x, "C_p"), 0.0), outputs))
                for x in ERRORS
            ]
            if all(len(some) for some in values):
                x = [100 * error for error in ERRORS]
                found.append(line(f"{outputs}, {label}", x, values, f"C{k}", style))
    return found


def parse_outputs(text: str) -> tuple[str, ...]:
    """Return the distributions of a comma-separated list, each once; refuse an unknown one."""
    names = tuple(split_names(text))
    if not names:
        raise ServegymError("--outputs names no distribution; give one, such as uniform")
    for name in names:
        check_outputs(name)
    return names


def command_of(args: Args) -> str:
    """Return the command that does what ``args`` say."""
    asked = {
        name: getattr(args, name) for name in ("tasks", "outputs", "cases", "samples", "output")
    }
    return command_line("check_iteration_rule", **asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Play, judge, tabulate and draw."""
    args = parse(Args, argv)
    tasks, seeds = load_tasks(args.tasks), held_out(args.cases, args.jobs)
    outputs = parse_outputs(args.outputs)
    check_number("--samples", args.samples, 1, MAX_SAMPLES)
    asked = {"samples": args.samples, "errors": ERRORS, "noises": NOISES}
    asked |= {"judges": [FIXED_JUDGE, *PANEL], "tuned": TUNED}
    with locked(args.output):
        collection = Collection(args.output, asked, texts=("family",))
        collection.open(tasks)
        tables = {}
        for task in tasks:
            parts = [
                collection.rows(task, seeds, Trial(one, args.samples), args.jobs, one).assign(
                    outputs=one
                )
                for one in outputs
            ]
            tables[short_name(task)] = task, pd.concat(parts, ignore_index=True)
        text = report(tables, args)
        write_file(args.output / "iteration_rule.md", text)
        panels = {name: lines(task, rows, outputs) for name, (task, rows) in tables.items()}
        png = picture(panels, "error of all estimates of C_p (%)")
        write_file(args.output / "iteration_rule.png", png)
    print(text)
    return 0
