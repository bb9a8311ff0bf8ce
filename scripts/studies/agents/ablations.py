"""Tables of the ablations: a row a variant with both kinds of interval, and a row a training run."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.playing.summary import by_case, fixed, to_markdown, with_interval
from servegym.studies.agents.comparing import curve_of, differences, shown_interval, verdict
from servegym.studies.agents.runs import MAIN, SHORT, ablations
from servegym.studies.policies import SHIPPED


def ablation_table(episodes: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return one row a run of an ablation, beside the main run of the same seed."""
    played = set(episodes["policy"])
    rows = []
    for variant in ablations():
        for seed in sorted(set(curves.loc[curves["variant"] == variant, "seed"])):
            name = f"{variant}-{seed}"
            if name not in played:
                continue
            curve = curve_of(curves, variant, seed)
            timesteps = int(curve["timesteps"].iloc[-1])
            rows.append(
                {
                    "variant": variant,
                    "seed": str(seed),
                    "timesteps": f"{timesteps:,}",
                    "training (min)": f"{curve['training_s'].iloc[-1] / 60:.1f}",
                    "best validation gap (%)": fixed(curve["gap_percent"].min()),
                    "main's until then (%)": _best_until(curve_of(curves, MAIN, seed), timesteps),
                    "held-out gap (%)": shown_interval(by_case(episodes, [name])),
                    f"− {SHORT} (points)": _against(episodes, name, f"{SHORT}-{seed}"),
                    "− main (points)": _against(episodes, name, f"{SHIPPED}-{seed}"),
                }
            )
    return pd.DataFrame(rows)


def _best_until(curve: pd.DataFrame, timesteps: int) -> str:
    reached = curve[curve["timesteps"] <= timesteps]
    return fixed(reached["gap_percent"].min()) if len(reached) else ""


def _against(episodes: pd.DataFrame, name: str, rival: str) -> str:
    if rival == name or rival not in set(episodes["policy"]):
        return ""
    return verdict(differences(episodes, [name], rival)[0])


def ablation_summary(episodes: pd.DataFrame) -> pd.DataFrame:
    """Return one row a variant: the mean over its training seeds, with both kinds of interval."""
    played = set(episodes["policy"])
    rows = []
    for variant in ablations():
        seeds = [seed for seed in _seeds(played, variant) if seed in _seeds(played, SHORT)]
        names = [f"{variant}-{seed}" for seed in seeds]
        if not names:
            continue
        paired = by_case(episodes, [*names, *(f"{SHORT}-{seed}" for seed in seeds)])
        gaps, of_short = paired[: len(names)], paired[len(names) :]
        row = {"variant": variant, "training seeds": str(len(names))}
        row |= _both_intervals("held-out gap (%)", gaps, with_interval)
        if variant != SHORT:
            row |= _both_intervals(f"− {SHORT} (points)", gaps - of_short, verdict)
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _seeds(played: Collection[str], variant: str) -> list[int]:
    member = re.compile(rf"{variant}-(\d+)")
    return sorted(int(found[1]) for name in played if (found := member.fullmatch(name)))


def _both_intervals(
    column: str, values: NDArray[np.float64], shown: Callable[[NDArray[np.float64]], str]
) -> dict[str, str]:
    """Format the mean of values of shape (training seeds, cases): over cases, and over training seeds."""
    over_seeds = shown(values.mean(axis=1)) if len(values) > 1 else "one seed"
    return {
        f"{column}, over cases": shown(values.mean(axis=0)),
        f"{column}, over training seeds": over_seeds,
    }


ABLATION_NOTES: Final = f"""`{SHORT}` is the main run in the ablations' timesteps: the learning rate
decays over the timesteps, so the point that a longer run has reached by then ("main's until then",
validation) is no fair comparison, nor is its end ("− main"). `without-…` leaves an admission rule out,
`every-round` decides at every decode round, `imitation` imitates `rollout` before PPO, `ppo-unmasked`
does not tell training which actions are legal. Best agents by validation, on the held-out cases,
paired by case and training seed; ± is half a 95 % Student-t interval. In the first table it is over cases,
of the mean over training seeds, and over training seeds, of each seed's mean over cases; in the second,
of one training run each, over cases. Minutes are of the clock, on the machine that ran them, with pauses."""


def ablation_notes(episodes: pd.DataFrame) -> str:
    """Return what must be read with :func:`ablation_table`, and the variants' table before it."""
    summary = ablation_summary(episodes)
    return (
        f"{ABLATION_NOTES}\n\n{to_markdown(summary).rstrip()}" if len(summary) else ABLATION_NOTES
    )
