"""The training runs of the study of agents: which there are, where they lie, how they are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from threading import Lock
from typing import Any, Final

from tqdm import tqdm

from servegym.agents.hyperparameters import Hyperparameters, default_hyperparameters
from servegym.agents.policy import CARD_FILE
from servegym.agents.record import read_run
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.parallel import PARENT, useful_jobs
from servegym.envs.task.registered import load_task
from servegym.studies.agents.training import EVALUATE_EVERY
from servegym.studies.cli import SCRIPTS

MAIN: Final = "main"
SHORT: Final = "short"
ABLATED: Final = "GSM8K-v0"
"""The task of the ablations; a task file starts from it, so each says only what is different."""

TRAIN: Final = SCRIPTS / "train.py"
"""The script that trains one agent."""


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
    ablation_seeds: int,
) -> list[Run]:
    """Return the training runs, the most valuable first.

    Parameters
    ----------
    tasks, variants
        What to train; ablations are of ``ABLATED`` only.
    timesteps
        Of the main runs, by task.
    """
    runs = [
        Run(task, MAIN, seed, timesteps[task])
        for task in tasks
        if MAIN in variants
        for seed in range(seeds)
    ]
    return runs + [
        Run(ABLATED, variant, seed, ablation_timesteps)
        for seed in range(ablation_seeds)
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
    variant = ablations().get(run.variant, Variant())
    options = {"task": run.task} | _task_defaults(run.task)
    if variant.process:
        options["task"] = str(_task_file(run, runs))
    options |= variant.options
    options |= {"seed": str(run.seed), "timesteps": str(run.timesteps)}
    options["evaluate-every"] = str(EVALUATE_EVERY)  # also of short runs: curves are of equal steps
    options["output"] = str(runs / run.name)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [*words, "--resume"] if (runs / run.name / "run.json").is_file() else words


def train_all(grid: Sequence[Run], runs: Path, jobs: int) -> list[str]:
    """Train what is not finished, ``jobs`` runs at a time; return one line per run that failed."""
    for run in grid:
        _check_timesteps(run, runs)
    waiting = [run for run in grid if not is_finished(run, runs)]
    jobs = useful_jobs(jobs, len(waiting))
    processes = TrainingProcesses(runs)
    failed = []
    with (
        ThreadPoolExecutor(jobs) as executor,
        tqdm(total=len(grid), initial=len(grid) - len(waiting), unit="run") as bar,
    ):
        futures: dict[Future[int], Run] = {
            executor.submit(processes.train, run): run for run in waiting
        }
        try:
            for future in as_completed(futures):
                run = futures[future]
                bar.update()
                if future.result() != 0:
                    failed.append(f"{run.name} failed; see {log_file(run, runs)}")
        except BaseException:
            processes.stop()
            executor.shutdown(cancel_futures=True)
            raise
    return failed


def log_file(run: Run, runs: Path) -> Path:
    """Return the file for what a run prints: beside the run's folder, in which only the run writes."""
    return runs / f"{run.name}.log"


class TrainingProcesses:
    """The training processes under way."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._lock = Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def train(self, run: Run) -> int:
        """Train one agent in a new process; return the process's exit status."""
        log = log_file(run, self.runs)
        make_folder(log.parent)
        command = [sys.executable, str(TRAIN), *arguments(run, self.runs)]
        # As many runs as cores share the machine; a log needs no bar ten times a second.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "30"}
        # A run ends when this process does, even by a kill.
        environment[PARENT] = str(os.getpid())
        with log.open("ab") as output:
            with self._lock:
                if self._stopped:
                    return 1
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
                self._processes.add(process)
            status = process.wait()
        with self._lock:
            self._processes.remove(process)
        return status

    def stop(self) -> None:
        """End the processes under way and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()


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
    path = runs / run.task / run.variant / "task.toml"
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
