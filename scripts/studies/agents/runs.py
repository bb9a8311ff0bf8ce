"""The training runs of the study of agents: which there are, where they lie, how they are run."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from servegym.agents.card import CARD_FILE
from servegym.agents.hyperparameters import Hyperparameters, default_hyperparameters
from servegym.agents.record import read_run
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, read_bytes, write_file
from servegym.envs.playing.nodes.identity import versions
from servegym.envs.playing.parallel import Elsewhere, Workers, run_parallel
from servegym.envs.task.registered import load_task
from servegym.studies.agents.processes import (
    LIBRARIES,
    Slice,
    files_in,
    keep_files,
    train_here,
    train_slice,
    without_root,
)
from servegym.studies.agents.training import EVALUATE_EVERY

MAIN: Final = "main"
SHORT: Final = "short"
ABLATED: Final = "GSM8K-v0"
"""The task of the ablations; a task file starts from it, so each says only what is different."""

TASK_FILE: Final = "task.toml"

_START: Final = (
    "import sys; sys.argv[0] = 'train.py'\n"
    "from servegym.studies.start import run_command; run_command('train')"
)

TRAIN: Sequence[str] = ("-c", _START)
"""What Python runs to train one agent: ``scripts/train.py``, in an installed package, too."""


@dataclass(frozen=True)
class Variant:
    """The options in which an ablation differs from the main runs."""

    options: Mapping[str, str] = field(default_factory=dict)
    """Options of ``scripts/train.py``, without dashes."""
    process: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the task's ``[process]``."""


def ablations() -> dict[str, Variant]:
    """Return the ablations by name; ``short`` is the main run in the ablations' timesteps."""
    rules = load_task(ABLATED).process.rules
    without = {
        f"without-{rule}": Variant(process={"rules": [other for other in rules if other != rule]})
        for rule in rules
    }
    imitation = {
        "imitation-rounds": "2",
        "imitation-states": "15000",
        "expert": "aligned-lookahead-0.7",
    }
    return {
        SHORT: Variant(),
        "imitation": Variant(options=imitation),
        "every-round": Variant(process={"decisions": "rounds"}),
        **without,
        "ppo-unmasked": Variant(options={"algorithm": "ppo"}),
    }


_OFTEN: Final = {"evaluate-every": "75000"}

WAYS: Final[Mapping[str, Variant]] = {
    "default": Variant(options=_OFTEN),
    "segments-64-width-64-epochs-2": Variant(
        options=_OFTEN | {"environments": "76", "steps": "64", "width": "64", "epochs": "2"}
    ),
}
"""Ways to train that are compared for speed. In 600,000 timesteps the second has as many decisions to a
rollout as the default, 19 · 256, in more environments of fewer steps."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    variant: str
    seed: int
    timesteps: int

    @property
    def name(self) -> str:
        """Its folder within that of all runs: task/variant/seed."""
        return f"{self.task}/{self.variant}/{self.seed}"

    @property
    def policy(self) -> str:
        """Its agent's name in tables."""
        return f"{'ppo' if self.variant == MAIN else self.variant}-{self.seed}"


def grid(
    tasks: Sequence[str],
    variants: Sequence[str],
    timesteps: Mapping[str, int],
    seeds: int,
    ablation_timesteps: int,
    ablation_seeds: Sequence[int],
) -> list[Run]:
    """Return the training runs, the most valuable first.

    Parameters
    ----------
    tasks, variants
        What to train; ablations are of ``ABLATED`` only.
    timesteps
        Of the main runs, by task.
    seeds
        How many main runs of each task, agent seeds 0 …
    ablation_timesteps, ablation_seeds
        Of each ablation's runs; the seeds one by one.
    """
    runs = [
        Run(task, MAIN, seed, timesteps[task])
        for task in tasks
        if MAIN in variants
        for seed in range(seeds)
    ]
    return runs + [
        Run(ABLATED, variant, seed, ablation_timesteps)
        for seed in ablation_seeds
        for variant in variants
        if variant != MAIN and ABLATED in tasks
    ]


def is_finished(run: Run, runs: Path) -> bool:
    """Return whether a run has come to its end."""
    return (runs / run.name / "final" / CARD_FILE).is_file()


def arguments(run: Run, runs: Path) -> list[str]:
    """Return the arguments of ``scripts/train.py``, ``--resume`` if the run was begun.

    Those of the run are given with ``--resume``, too: a run of other timesteps is refused then.
    """
    variant = (ablations() | dict(WAYS)).get(run.variant, Variant())
    options = {"task": run.task} | _task_defaults(run.task)
    if variant.process:
        options["task"] = str(_task_file(run, runs))
    options["evaluate-every"] = str(EVALUATE_EVERY)  # also of short runs: curves are of equal steps
    options |= variant.options
    options |= {"seed": str(run.seed), "timesteps": str(run.timesteps)}
    options["output"] = str(runs / run.name)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [*words, "--resume"] if (runs / run.name / "run.json").is_file() else words


def train_all(grid: Sequence[Run], runs: Path, workers: Workers) -> list[str]:
    """Train what is not finished, a run a worker at a time; return one line per run that failed.

    On a cluster no folder is shared: a run's files travel with each of its slices, and come back.
    """
    for run in grid:
        _check_timesteps(run, runs)
    waiting = [run for run in grid if not is_finished(run, runs)]
    failed = []
    ended = (
        _train_here(waiting, runs, workers)
        if isinstance(workers, int)
        else _train_elsewhere(waiting, runs, workers)
    )
    with (
        closing(ended),
        tqdm(total=len(grid), initial=len(grid) - len(waiting), unit="run") as bar,
    ):
        for run, status in ended:
            bar.update()
            if status != 0:
                failed.append(f"{run.name} failed; see {log_file(run, runs)}")
    return failed


def log_file(run: Run, runs: Path) -> Path:
    """Return the file for what a run prints: beside the run's folder, in which only the run writes."""
    return runs / f"{run.name}.log"


def _train_here(waiting: Sequence[Run], runs: Path, jobs: int) -> Generator[tuple[Run, int]]:
    """Train in processes of this machine; yield runs with their exit status."""
    words = [
        (number, TRAIN, arguments(run, runs), log_file(run, runs))
        for number, run in enumerate(waiting)
    ]
    with closing(run_parallel(train_here, words, jobs)) as results:
        for number, status in results:
            yield waiting[number], status


def _train_elsewhere(
    waiting: Sequence[Run], runs: Path, nodes: Elsewhere
) -> Generator[tuple[Run, int]]:
    """Train on a cluster's workers; yield runs with their exit status."""
    slices = deque((_slice(number, run, runs),) for number, run in enumerate(waiting))
    with closing(nodes.run(train_slice, slices)) as results:
        for came in results:
            run = waiting[came.number]
            keep_files(runs / run.name, came.files)
            make_folder(log_file(run, runs).parent)
            with log_file(run, runs).open("ab") as log:
                log.write(came.log)
            if came.status is None:
                slices.append((_slice(came.number, run, runs),))
            else:
                yield run, came.status


def _slice(number: int, run: Run, runs: Path) -> Slice:
    """Return the next slice of a run, with the files that there are of it."""
    here, there = str(runs), without_root(runs)
    words = [
        str(there / Path(word).relative_to(runs)) if word.startswith(f"{here}{os.sep}") else word
        for word in arguments(run, runs)
    ]
    files = {str(there / run.name / name): data for name, data in files_in(runs / run.name).items()}
    task = runs / run.task / run.variant / TASK_FILE
    if task.is_file():
        files[str(there / task.relative_to(runs))] = read_bytes(task)
    return Slice(number, TRAIN, words, str(there / run.name), files, versions(LIBRARIES))


def _task_defaults(task: str) -> dict[str, str]:
    """Return the task's defaults where they are not those of the class, which a task file would get."""
    defaults, usual = default_hyperparameters(load_task(task).name), Hyperparameters()
    return {
        item.name.replace("_", "-"): str(getattr(defaults, item.name))
        for item in fields(Hyperparameters)
        if getattr(defaults, item.name) != getattr(usual, item.name)
    }


def _task_file(run: Run, runs: Path) -> Path:
    """Write the task of an ablation and return its path."""
    path = runs / run.task / run.variant / TASK_FILE
    make_folder(path.parent)
    keys = ablations()[run.variant].process
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in keys.items()]
    write_file(path, "".join(["[process]\n", *lines]))
    return path


def _check_timesteps(run: Run, runs: Path) -> None:
    """Refuse to take a finished run of other timesteps for one of this grid."""
    if not is_finished(run, runs):
        return
    timesteps = read_run(runs / run.name)["hyperparameters"].get("timesteps")
    if timesteps != run.timesteps:
        raise ServegymError(
            f"{runs / run.name}: a run of {timesteps} timesteps, not {run.timesteps}; "
            "name another --runs folder"
        )
