"""Tables and pictures of the study of agents, from its committed CSV files alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError
from servegym.envs.files import write_file
from servegym.envs.pictures import draw_learning_curves, to_png
from servegym.envs.playing.evaluation import read_episodes
from servegym.envs.playing.summary import (
    UNFINISHED,
    by_case,
    fixed,
    mean_gaps,
    mean_interval,
    to_markdown,
    with_interval,
)
from servegym.envs.playing.tables import Schema, read_rows
from servegym.studies.agents.ablations import ablation_notes, ablation_table
from servegym.studies.agents.comparing import curve_of, differences, shown_interval, verdict
from servegym.studies.agents.play import CURVES, LARGE_SETTING, settings
from servegym.studies.agents.runs import MAIN, ablations
from servegym.studies.policies import SHIPPED

GAPS_FILE: Final = "ablation_gaps.csv"
_GAPS: Final = Schema(
    columns=("policy", "seed", "gap"),
    key=("policy", "seed"),
    whole=("seed",),
    texts=("policy",),
    if_deleted="its agents are played again",
)

HYBRID: Final = "hybrid"
RIVALS: Final = ("threshold", "lookahead", "aligned", "aligned-lookahead")
"""Families of rules that each agent is compared with, by the best member in the table."""

TARGET_MIN: Final = 15
"""Minutes in which an agent should close 40 % of the hybrid's gap."""

_SEED: Final = re.compile(rf"{SHIPPED}-\d+")
_ABLATION: Final = re.compile(rf"({'|'.join(ablations())})-\d+")


def simple_rules(episodes: pd.DataFrame) -> list[str]:
    """Return the policies that neither learn nor search: all but agents and ``rollout``."""
    return [
        name
        for name in dict.fromkeys(episodes["policy"])
        if not (_SEED.fullmatch(name) or _ABLATION.fullmatch(name) or name.startswith("rollout"))
    ]


def agents(episodes: pd.DataFrame) -> list[str]:
    """Return the names of the main runs' agents, by seed."""
    names = {name for name in episodes["policy"] if _SEED.fullmatch(name)}
    return sorted(names, key=lambda name: int(name.rsplit("-", 1)[1]))


def best_of(episodes: pd.DataFrame, names: Sequence[str]) -> str:
    """Return the policy of the smallest mean gap; none that leaves requests unserved if any does not."""
    return str(mean_gaps(episodes[episodes["policy"].isin(names)]).idxmin())


def best_of_family(episodes: pd.DataFrame, family: str) -> str | None:
    """Return the best policy of a family, with or without a number; None if there is none."""
    member = re.compile(rf"{family}(-[\d.]+)?")
    names = [name for name in simple_rules(episodes) if member.fullmatch(name)]
    return best_of(episodes, names) if names else None


def policy_table(episodes: pd.DataFrame) -> pd.DataFrame:
    """Return one row a policy, and one for the agents of all seeds together."""
    seeds = agents(episodes)
    rules = simple_rules(episodes)
    rivals = list(dict.fromkeys([HYBRID, best_of(episodes, rules)]))
    names = [name for name in dict.fromkeys(episodes["policy"]) if not _ABLATION.fullmatch(name)]
    rows = [_policy_row(episodes, name, [name], rivals) for name in names if name not in seeds]
    if seeds:
        rows.append(_policy_row(episodes, _together(seeds), seeds, rivals))
        rows += [_policy_row(episodes, name, [name], rivals) for name in seeds]
    return pd.DataFrame(rows)


def _together(seeds: Sequence[str]) -> str:
    return f"**{SHIPPED} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})**"


def _policy_row(
    episodes: pd.DataFrame, label: str, names: Sequence[str], rivals: Sequence[str]
) -> dict[str, str | int]:
    gaps = by_case(episodes, names)
    rows = episodes[episodes["policy"].isin(names)]
    row: dict[str, str | int] = {
        "policy": label,
        "n": gaps.shape[1],
        "gap (%)": shown_interval(gaps),
    }
    for rival in rivals:
        is_rival = len(names) == 1 and names[0] == rival
        row[f"− {rival} (points)"] = (
            "" if is_rival else shown_interval(differences(episodes, names, rival))
        )
    row["of hybrid's gap closed (%)"] = _closed(gaps, by_case(episodes, [HYBRID]))
    row["decision p99 (ms)"] = fixed(rows["decision_ms_p99"].median(), 3)
    return row


def _closed(gaps: NDArray[np.float64], hybrid: NDArray[np.float64]) -> str:
    """Return the share of the hybrid's mean gap that is closed, in percent."""
    if gaps.size == 0 or hybrid.size == 0:
        return UNFINISHED
    return fixed(100 * (1 - gaps.mean() / hybrid.mean()), 0)


def task_notes(episodes: pd.DataFrame) -> str:
    """Return what must be read with :func:`policy_table`."""
    seeds = agents(episodes)
    cases = episodes["seed"]
    text = f"Held-out cases, seeds {cases.min()} … {cases.max()}. ± is a 95 % Student-t interval."
    if len(seeds) > 1:
        means = by_case(episodes, seeds).mean(axis=1)
        text += (
            " [ ] is a 95 % stratified bootstrap interval: training seeds drawn anew within each "
            "case, as in rliable (Agarwal et al. 2021, arXiv 2108.13264). It takes what one agent "
            "does on two cases as independent; from whole training runs, one mean each, the "
            f"agents' gap is {with_interval(means)} (Student-t)."
        )
    return text


def seed_table(
    episodes: pd.DataFrame, curves: pd.DataFrame, validation: pd.DataFrame
) -> pd.DataFrame:
    """Return one row a main run: how fast it passed the hybrid and how it ended."""
    hybrid, _ = mean_interval(by_case(validation, [HYBRID]).ravel())
    rivals = [name for name in (best_of_family(episodes, family) for family in RIVALS) if name]
    held_out_hybrid = by_case(episodes, [HYBRID])
    rows = []
    for name in agents(episodes):
        curve = curve_of(curves, MAIN, int(name.rsplit("-", 1)[1]))
        gaps = by_case(episodes, [name])
        row: dict[str, str | int] = {
            "seed": name.rsplit("-", 1)[1],
            "timesteps": f"{curve['timesteps'].iloc[-1]:,}",
            "training (min)": f"{curve['training_s'].iloc[-1] / 60:.1f}",
            f"passes hybrid's {fixed(hybrid)} % (min)": minutes_to_pass(curve, hybrid),
            f"closed in {TARGET_MIN} min (%)": closed_by(curve, hybrid, TARGET_MIN),
            "best validation gap (%)": fixed(curve["gap_percent"].min()),
            "held-out gap (%)": shown_interval(gaps),
            "of hybrid's gap closed (%)": _closed(gaps, held_out_hybrid),
        }
        for rival in [HYBRID, *rivals]:
            row[f"− {rival} (points)"] = verdict(differences(episodes, [name], rival)[0])
        rows.append(row)
    return pd.DataFrame(rows)


SEED_NOTES: Final = f"""Minutes of training are without evaluations; what is passed, or closed within so
many ({TARGET_MIN} is the target's), is measured on the cases of validation, the rest on held-out ones.
Better, worse: the 95 % interval of the paired difference over the held-out cases excludes 0."""


def minutes_to_pass(curve: pd.DataFrame, gap_percent: float) -> str:
    """Return the minutes of training at the first evaluation below a gap, or ``never``."""
    below = curve[curve["gap_percent"] < gap_percent]
    return f"{below['training_s'].iloc[0] / 60:.1f}" if len(below) else "never"


def closed_by(curve: pd.DataFrame, hybrid_percent: float, minutes: float) -> str:
    """Return the share of the hybrid's gap, in percent, that the best agent by then had closed."""
    best = curve.loc[curve["training_s"] <= 60 * minutes, "gap_percent"].min()
    return fixed(100 * (1 - best / hybrid_percent), 0)


def transfer_table(played: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one row a setting: the agent beside the rules, and the best of them."""
    rows = []
    for name, episodes in played.items():
        rules = [policy for policy in dict.fromkeys(episodes["policy"]) if policy != SHIPPED]
        best = best_of(episodes, rules)
        threshold = str(best_of_family(episodes, "threshold"))
        row = {"setting": name, "n": str(episodes["seed"].nunique()), "K": threshold.split("-")[1]}
        for policy in [*rules, SHIPPED]:
            column = "threshold-K" if policy == threshold else policy
            row[f"{column} (%)"] = shown_interval(by_case(episodes, [policy]))
        row["best rule"] = "threshold-K" if best == threshold else best
        row["ppo − best rule (points)"] = verdict(differences(episodes, [SHIPPED], best)[0])
        rows.append(row)
    return pd.DataFrame(rows)


TRANSFER_NOTES: Final = f"""The agent of GSM8K-v0 as it is, in settings that it was not trained on: other
numbers of clients (requests in proportion), the other output lengths, other cost models. Gaps to the
lower bound on held-out cases (`{LARGE_SETTING}`: a third of them); K is the best of 16 on 20 training
cases of the very setting. ± is a 95 % Student-t interval."""


def write_task(task: str, output: Path, command: str) -> list[Path]:
    """Write a task's tables and pictures; return their paths."""
    folder = output / task
    episodes = _with_gaps(_episodes(folder / "episodes.csv"), folder / GAPS_FILE)
    curves = read_rows(_existing(folder / "curves.csv"), CURVES, "remove the file and play again")
    validation = _episodes(folder / "validation" / "episodes.csv")
    tables = {
        "table.md": (task, task_notes(episodes), policy_table(episodes)),
        "seeds.md": (
            f"{task}: training runs",
            SEED_NOTES,
            seed_table(episodes, curves, validation),
        ),
        "ablations.md": (
            f"{task}: ablations",
            ablation_notes(episodes),
            ablation_table(episodes, curves),
        ),
    }
    written = []
    for name, (title, notes, table) in tables.items():
        if len(table):
            written.append(_write_table(folder / name, title, command, notes, table))
    lines = reference_lines(validation)
    main = curves[curves["variant"] == MAIN]
    main = main.assign(label=f"{SHIPPED} ({main['seed'].nunique()} seeds)")
    ablations = curves[curves["variant"] != MAIN].rename(columns={"variant": "label"})
    pictures: dict[str, tuple[pd.DataFrame, Literal["training_s", "timesteps"]]] = {
        "learning_curves.png": (main, "training_s"),
        "ablation_curves.png": (ablations, "timesteps"),  # their seeds may be of several machines
    }
    for name, (shown, over) in pictures.items():
        if len(shown):
            write_file(folder / name, to_png(draw_learning_curves(shown, lines, over)))
            written.append(folder / name)
    return written


def _with_gaps(episodes: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Add the gaps of runs of which no more is kept, as all of their episodes would be a large file."""
    gaps = read_rows(path, _GAPS, "remove the file and play again")
    return pd.concat([episodes, gaps[~gaps["policy"].isin(episodes["policy"])]], ignore_index=True)


def reference_lines(validation: pd.DataFrame) -> dict[str, float]:
    """Return the gaps in percent, on the cases of validation, that curves are drawn with."""
    played = set(validation["policy"])
    threshold = best_of_family(validation, "threshold") or ""
    names = [name for name in (HYBRID, threshold, "aligned", "rollout") if name in played]
    return {name: mean_interval(by_case(validation, [name]).ravel())[0] for name in names}


def write_transfer(output: Path, command: str) -> list[Path]:
    """Write the table of the settings that have been played, if any; return its path."""
    folder = output / "transfer"
    played = {
        name: _episodes(folder / name / "episodes.csv")
        for name in settings()
        if (folder / name / "episodes.csv").is_file()
    }
    if not played:
        return []
    table = transfer_table(played)
    title = "Transfer without training"
    return [_write_table(output / "transfer.md", title, command, TRANSFER_NOTES, table)]


def _write_table(path: Path, title: str, command: str, notes: str, table: pd.DataFrame) -> Path:
    write_file(path, f"# {title}\n\n`{command}`\n\n{notes}\n\n{to_markdown(table)}")
    return path


def _episodes(path: Path) -> pd.DataFrame:
    return read_episodes(_existing(path))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ServegymError(f"{path}: no such file; begin with --parts evaluate")
    return path
