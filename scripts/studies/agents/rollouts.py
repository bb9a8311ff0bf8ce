"""Searches whose base is an agent: gap and CPU time of a decision on held-out cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import process_time

import numpy as np
import pandas as pd
from tqdm import tqdm

from servegym.envs.files import write_file
from servegym.envs.playing.evaluation import make_case, play
from servegym.envs.playing.summary import to_markdown, with_interval
from servegym.envs.task.config import TaskConfig
from servegym.studies.policies import make_policy


def play_rollouts(
    task: TaskConfig, names: Sequence[str], seeds: Sequence[int], path: Path
) -> pd.DataFrame:
    """Play the policies on the cases; goes on with the rows of ``path``, which is written after each case.

    Returns
    -------
    A row an episode: ``policy``, ``seed``, ``gap`` (a fraction), ``decisions`` and ``ms``, the episode's CPU
    time in milliseconds, planning and simulator included, over its decisions.
    """
    rows = []
    if path.is_file():
        table = pd.read_csv(path, dtype={"gap": str, "ms": str})
        rows = table.astype({"gap": float, "ms": float}).to_dict("records")  # as Python reads them
    done = {(row["policy"], row["seed"]) for row in rows}
    for seed in tqdm(seeds, unit="case"):
        missing = [name for name in names if (name, seed) not in done]
        if not missing:
            continue
        case = make_case(task, seed)
        for name in missing:
            policy = make_policy(name, task.name)
            began_s = process_time()
            played = play(task, name, policy, case, seed)
            spent_ms = 1e3 * (process_time() - began_s)
            decisions = int(played.row["decisions"])
            rows.append(
                {
                    "policy": name,
                    "seed": seed,
                    "gap": played.row["gap"],
                    "decisions": decisions,
                    "ms": spent_ms / decisions,
                }
            )
        write_file(path, pd.DataFrame(rows).to_csv(index=False))
    table = pd.DataFrame(rows)
    return table[table["policy"].isin(list(names)) & table["seed"].isin(list(seeds))]


def rollouts_table(rows: pd.DataFrame, rivals: Mapping[str, pd.Series]) -> str:
    """Return the table of searches, with paired differences to rivals; intervals are over cases.

    Parameters
    ----------
    rivals
        By name, gaps of others on the same cases, fractions, by case seed.
    """
    lines = []
    for name, group in rows.groupby("policy", sort=False):
        gaps = group["gap"].to_numpy(float)
        line = {
            "policy": f"`{name}`",
            "n": len(gaps),
            "gap (%)": with_interval(gaps, 100),
            "CPU ms a decision": f"{np.median(group['ms']):.1f}",
        }
        for rival, theirs in rivals.items():
            difference = gaps - theirs.loc[group["seed"]].to_numpy(float)
            line[f"− {rival} (points)"] = with_interval(difference, 100)
        lines.append(line)
    return to_markdown(pd.DataFrame(lines))
