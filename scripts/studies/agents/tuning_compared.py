"""The best trial of a search beside the defaults: both trained anew on other seeds, and played held out.

A trial's own value cannot be compared with: it is the least of many, on the cases that chose it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from tqdm import tqdm

from servegym.agents.card import CARD_FILE
from servegym.agents.hyperparameters import Hyperparameters
from servegym.envs.playing.evaluation import HELD_OUT_SEED, evaluate, read_episodes
from servegym.envs.playing.locks import locked
from servegym.envs.playing.parallel import run_parallel
from servegym.envs.playing.summary import by_case, to_markdown, with_interval
from servegym.studies.agents.tuning import Search, train_with
from servegym.studies.policies import make_listed_policy, note_weights

FOLDER: Final = "comparison"
DEFAULTS: Final = "defaults"
_FINAL: Final = "final"
_BEST: Final = "agent"


@dataclass(frozen=True)
class Comparison:
    """What is trained and played."""

    search: Search
    trial: int
    """Number of the best trial."""
    found: Hyperparameters
    """Its hyper-parameters."""
    seeds: Sequence[int]
    """Agent seeds that no trial was trained with."""
    cases: int
    """Held-out cases, seeds 1000000 …"""

    @property
    def folder(self) -> Path:
        """Where runs and episodes are kept."""
        return self.search.folder / FOLDER

    @property
    def sides(self) -> dict[str, Hyperparameters]:
        """The two that are compared, by name."""
        return {DEFAULTS: self.search.usual, f"trial-{self.trial}": self.found}

    def policies(self, side: str) -> list[str]:
        """Return the names of a side's agents, by seed."""
        return [f"{side}-{seed}" for seed in self.seeds]


def compare(comparison: Comparison, jobs: int) -> None:
    """Train both sides on each seed, in the trials' timesteps, and play all; goes on where it was left.

    Raises
    ------
    ServegymError
        If another process compares in this folder.
    """
    runs = {
        f"{side}-{seed}": (replace(hyperparameters, seed=seed), _run(comparison, side, seed))
        for side, hyperparameters in comparison.sides.items()
        for seed in comparison.seeds
    }
    with locked(comparison.folder):
        waiting = [(comparison.search, *run) for run in runs.values() if not _is_finished(run[1])]
        lines = run_parallel(_train, waiting, jobs)
        with (
            closing(lines),
            tqdm(lines, total=len(runs), initial=len(runs) - len(waiting), unit="run") as bar,
        ):
            for _ in bar:
                pass
        folders = {name: _agent(folder) for name, (_, folder) in runs.items()}
        weights = note_weights(folders, comparison.folder)
        evaluate(
            comparison.search.task,
            partial(make_listed_policy, folders=folders, weights=weights),
            list(folders),
            range(HELD_OUT_SEED, HELD_OUT_SEED + comparison.cases),
            comparison.folder,
            jobs=jobs,
        )


def _run(comparison: Comparison, side: str, seed: int) -> Path:
    return comparison.folder / side / str(seed)


def _is_finished(folder: Path) -> bool:
    return (folder / _FINAL / CARD_FILE).is_file()


def _agent(folder: Path) -> Path:
    """Return the best agent of a run; its last one, where no evaluation was better than the first."""
    best = folder / _BEST
    return best if (best / CARD_FILE).is_file() else folder / _FINAL


def _train(search: Search, hyperparameters: Hyperparameters, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    train_with(search, hyperparameters, folder)


def comparison_text(comparison: Comparison) -> str:
    """Return the part of the report about a comparison; nothing while it is not finished."""
    path = comparison.folder / "episodes.csv"
    if not path.is_file():
        return ""
    sides = list(comparison.sides)
    names = [name for side in sides for name in comparison.policies(side)]
    last = HELD_OUT_SEED + comparison.cases - 1
    episodes = read_episodes(path)
    episodes = episodes[episodes["policy"].isin(names) & (episodes["seed"] <= last)]
    if len(episodes) < len(names) * comparison.cases:
        return ""
    count = len(comparison.seeds)
    return f"""
## Trained anew

The defaults and the best trial's numbers, each trained on {count} agent seeds that no trial had, in
{comparison.search.usual.timesteps:,} decisions a run; the best agent of a run by the same validation
cases. Gaps in percent on {comparison.cases} held-out cases, seeds {HELD_OUT_SEED} … {last}. In the row
of a seed ± is a 95 % Student-t interval over cases, of one run a side, the difference paired by case;
in the last row over the {count} training seeds' means, the difference paired by seed.

{to_markdown(comparison_table(comparison, episodes))}"""


def comparison_table(comparison: Comparison, episodes: pd.DataFrame) -> pd.DataFrame:
    """Return a row an agent seed, over cases, and one over the seeds' means."""
    usual, found = (
        np.stack([by_case(episodes, [name])[0] for name in comparison.policies(side)])
        for side in comparison.sides
    )
    sides = list(comparison.sides)

    def row(label: str, old: np.ndarray, new: np.ndarray) -> dict[str, str]:
        return {
            "agent seed": label,
            f"{sides[0]} (%)": with_interval(old),
            f"{sides[1]} (%)": with_interval(new),
            "difference (points)": with_interval(new - old),
        }

    rows = [
        row(str(seed), old, new)
        for seed, old, new in zip(comparison.seeds, usual, found, strict=True)
    ]
    return pd.DataFrame([*rows, row("all", usual.mean(axis=1), found.mean(axis=1))])
