"""What ``--task``, ``--policies``, ``--seeds`` and ``--cases`` of a command line name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from servegym.baselines.registry import split_policies
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import HELD_OUT_SEED
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import NAMESPACE, load_task
from servegym.studies.cli import check_number, split_names
from servegym.studies.policies import make_policy

MAX_SEEDS: Final = 1_000_000
MAX_SEED: Final = 2**62


def parse_seeds(text: str) -> range:
    """Return the seeds of ``FIRST:AFTER_LAST`` or of one number."""
    match = re.fullmatch(r"(\d{1,19})(?::(\d{1,19}))?", text)
    if match is None:
        raise ServegymError(f"--seeds must be FIRST:AFTER_LAST, such as 0:100, got {text!r}")
    first = int(match[1])
    seeds = range(first, int(match[2]) if match[2] else first + 1)
    if len(seeds) == 0:
        raise ServegymError(f"--seeds {text} is empty; did you mean {first}:{first + 1}?")
    if len(seeds) > MAX_SEEDS or seeds[-1] > MAX_SEED:
        raise ServegymError(
            f"--seeds {text} is too much: at most {MAX_SEEDS} seeds up to {MAX_SEED}"
        )
    return seeds


def parse_policies(text: str, task_name: str) -> list[str]:
    """Return the names of a comma-separated list, each once; refuse what is no policy of the task."""
    names = split_policies(text)
    if not names:
        raise ServegymError("--policies names no policy; see --list-policies")
    for name in names:
        make_policy(name, task_name)
    return names


def held_out(cases: int, option: str = "--cases") -> range:
    """Return the held-out seeds of so many cases, at least two: one case has no interval."""
    check_number(option, cases, 2, HELD_OUT_SEED)
    return range(HELD_OUT_SEED, HELD_OUT_SEED + cases)


def short_name(task: TaskConfig) -> str:
    """Return a task's name without the namespace; of a TOML file its stem."""
    name = task.name.removeprefix(f"{NAMESPACE}/")
    return Path(name).stem if name.lower().endswith(".toml") else name


def load_tasks(text: str) -> list[TaskConfig]:
    """Return the tasks of a comma-separated list, each once, for a check of the method.

    Raises
    ------
    ServegymError
        If a task is unknown, has arrivals after t = 0, hides lengths or cuts episodes short, or if two
        tasks would write the same file.
    """
    names = split_names(text)
    if not names:
        raise ServegymError("--tasks names no task; give one, such as GSM8K-v0")
    tasks = [load_task(name) for name in names]
    for name, task in zip(names, tasks, strict=True):
        if task.information.output_lengths != "known":
            raise ServegymError(f"--tasks {name}: the check itself says what is known of lengths")
        if task.workload.draws_arrivals:
            raise ServegymError(f"--tasks {name} has arrivals; the checks need all at t = 0")
        if task.process.max_decisions > 0 or task.process.max_seconds > 0:
            raise ServegymError(
                f"--tasks {name} cuts episodes short (process.max_decisions, max_seconds); the checks "
                "need whole ones"
            )
    if len({short_name(task) for task in tasks}) < len(tasks):
        raise ServegymError(f"--tasks {text}: two tasks would write the same file")
    return tasks
