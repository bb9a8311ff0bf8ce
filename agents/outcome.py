"""How a training run has come out: its best agent, whether that beats the rules, ``summary.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from servegym.agents.evaluations import Evaluations
from servegym.envs.files import write_file
from servegym.envs.playing.summary import student_half

SUMMARY: Final = "summary.json"

BEATS: Final = "beats"
LOSES: Final = "loses to"
EVEN: Final = "is not told apart from"
"""Verdicts on an agent beside a rule: the 95 % interval of the mean difference lies below 0, above, or
holds 0, or there is none, of a single case."""


@dataclass(frozen=True)
class Comparison:
    """An agent beside a rule on the same validation cases."""

    rule: str
    gap_percent: float
    """Mean gap of the rule."""
    difference_points: float
    """Mean over the cases of the agent's gap minus the rule's; below 0 the agent is better."""
    interval_points: float
    """Half of the 95 % Student-t interval of that mean; NaN with one case."""
    cases: int

    @property
    def verdict(self) -> str:
        """One of ``BEATS``, ``LOSES`` and ``EVEN``."""
        if self.difference_points + self.interval_points < 0:
            return BEATS
        return LOSES if self.difference_points - self.interval_points > 0 else EVEN

    def __str__(self) -> str:
        half = f" ± {self.interval_points:.2f}" if np.isfinite(self.interval_points) else ""
        if self.verdict == EVEN:
            gap, points = f"{self.gap_percent:.2f} %", f"{self.difference_points:+.2f}{half} points"
            return f"{EVEN} {self.rule} ({gap}; difference {points})"
        points = f"{abs(self.difference_points):.2f}{half} points"
        return f"{self.verdict} {self.rule} ({self.gap_percent:.2f} %) by {points}"


def compare(
    gaps: NDArray[np.float64], rule_gaps: Mapping[str, Sequence[float]]
) -> list[Comparison]:
    """Compare an agent's gaps, fractions by case, with those of each rule on the same cases."""
    found = []
    for rule, others in rule_gaps.items():
        theirs = np.asarray(others, dtype=float)
        points = 100.0 * (gaps - theirs)
        half = student_half(points) if len(points) > 1 else float("nan")
        mean = 100.0 * float(theirs.mean())
        found.append(Comparison(rule, mean, float(points.mean()), half, len(points)))
    return found


def describe_best(evaluations: Evaluations, folder: Path) -> str:
    """Return in one line which agent is kept as the best, and whether training was of use.

    Parameters
    ----------
    folder
        Of the run.
    """
    first, best = evaluations.rows.iloc[0], evaluations.best
    if best is None:
        return "nothing was learned before the first evaluation: there is no best agent"
    cases = int(best["cases"])
    text = f"{folder / 'agent'}: taken after {int(best['timesteps']):,} timesteps, "
    if best["unfinished"]:
        count, limits = int(best["unfinished"]), "process.max_decisions or max_seconds"
        return text + f"{count} of {cases} validation cases cut short by {limits}"
    gap_percent = best["gap_percent"]
    text += f"{gap_percent:.2f} % above the lower bound on {cases} validation cases"
    if best["timesteps"] == 0:
        return text + "; no evaluation after that, of what was imitated, is better"
    at_the_bound = gap_percent < 0.005  # shown as 0.00 %: nothing can be better
    if first["timesteps"] == 0 and first["gap_percent"] <= gap_percent and not at_the_bound:
        return text + (
            f", {best['gap_percent_sampled']:.2f} % with sampled actions; the untrained network has "
            f"{first['gap_percent']:.2f} %: train for longer, or at another learning rate"
        )
    return text


def describe(comparisons: Sequence[Comparison]) -> str:
    """Return in one line whether the agent beats the rules; empty without rules.

    Training has chosen the agent by these cases, so held-out cases may show a little less.
    """
    if not comparisons:
        return ""
    cases = comparisons[0].cases
    one = "one case gives no interval"
    note = "95 % intervals of paired differences" if cases > 1 else one
    return f"it {', '.join(map(str, comparisons))}; {cases} validation cases, {note}"


def best_of(evaluations: Evaluations) -> dict[str, Any] | None:
    """Return the numbers of the best agent for ``summary.json``; None if there is none."""
    best, counts = evaluations.best, ("timesteps", "cases", "unfinished")
    if best is None:
        return None
    means = ("gap_percent", "gap_percent_sem", "mean_reward")
    return {name: int(best[name]) for name in counts} | {name: float(best[name]) for name in means}


def write_summary(
    folder: Path,
    state: Mapping[str, Any],
    best: Mapping[str, Any] | None,
    comparisons: Sequence[Comparison],
    text: Sequence[str],
) -> None:
    """Write ``summary.json``: how far the run has come, its best agent, each comparison, all in words.

    Parameters
    ----------
    state
        How far the run has come, by name.
    best
        Numbers of the best agent, by name; None if there is none.
    text
        What a person is told, a line each.
    """
    content = dict(state) | {
        "best": None if best is None else {name: _plain(value) for name, value in best.items()},
        "rules": [
            {name: _plain(value) for name, value in asdict(each).items()}
            | {"verdict": each.verdict}
            for each in comparisons
        ],
        "text": list(text),
    }
    write_file(folder / SUMMARY, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it: null in place of NaN."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
