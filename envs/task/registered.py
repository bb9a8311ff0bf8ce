"""The registered tasks, and how a name or a TOML file becomes a task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from servegym.envs.arguments import plain
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.machine.presets import cost_preset
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.sections import InformationConfig, WorkloadConfig
from servegym.envs.task.served import SERVED
from servegym.envs.task.toml import read_task

NAMESPACE: Final = "servegym"

PAPER_CASE_SEED: Final = 523
"""The seed of Paper-v0 that stands for the paper's single case, from ``scripts/calibrate.py``."""

TASKS: Final[dict[str, TaskConfig]] = {
    "servegym/Tiny-v0": TaskConfig(
        name="servegym/Tiny-v0",
        cluster=ClusterConfig(clients=3),
        cost=cost_preset("tiny").costs,
        workload=WorkloadConfig(source="tiny", requests=8),
    ),
    "servegym/Paper-v0": TaskConfig(
        name="servegym/Paper-v0",
        cost=cost_preset("paper").costs,
        workload=WorkloadConfig(source="gsm8k-cap512"),
    ),
    "servegym/GSM8K-v0": TaskConfig(name="servegym/GSM8K-v0"),
    "servegym/GSM8KPredicted-v0": TaskConfig(
        name="servegym/GSM8KPredicted-v0",
        information=InformationConfig(output_lengths="predicted", kendall_tau=0.55),
    ),
    "servegym/GSM8KMixed-v0": TaskConfig(
        name="servegym/GSM8KMixed-v0",
        workload=WorkloadConfig(source="gsm8k-mixed"),
        information=InformationConfig(output_lengths="predicted", predictor="column"),
    ),
    **{task.name: task for task in SERVED},
}
"""Task configurations by id; ``gymnasium.make`` takes the same ids."""


def load_task(task: str | os.PathLike[str] | TaskConfig) -> TaskConfig:
    """Return a task by id (with or without ``servegym/``) or from a TOML file; a task as it is.

    A TOML file starts from ``servegym/GSM8K-v0``: the keys it leaves out keep that task's values.

    Raises
    ------
    ServegymError
        If there is no such task, with the nearest id.

    Examples
    --------
    >>> load_task("GSM8K-v0").cluster.clients
    200
    """
    if isinstance(task, TaskConfig):
        return task
    name_or_path = plain(task)
    if not isinstance(name_or_path, str):
        raise ServegymError(
            f"task must be an id, the path of a .toml file or a TaskConfig, got {shown(task)}"
        )
    for name in (name_or_path, f"{NAMESPACE}/{name_or_path}"):
        if name in TASKS:
            return TASKS[name]
    if name_or_path.lower().endswith(".toml") or _is_file(name_or_path):
        return read_task(name_or_path, base=TASKS["servegym/GSM8K-v0"])
    short = [name.removeprefix(f"{NAMESPACE}/") for name in TASKS]
    error = unknown("task", name_or_path.removeprefix(f"{NAMESPACE}/"), short)
    raise ServegymError(f"{error} (a task file ends in .toml)")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a name too long for the system
        return False
