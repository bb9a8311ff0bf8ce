"""``run.json``: which run a folder holds. Imports no torch, so that a wrong folder is refused at once."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from servegym.agents.hyperparameters import Hyperparameters
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, read_json, shortened, write_file
from servegym.envs.playing.identity import compare, hash_of, notes_of
from servegym.envs.playing.locks import LOCK_FILE
from servegym.envs.process.observation import OBSERVATION_VERSION
from servegym.envs.task.config import TaskConfig

_PACKAGES: Final = ("numpy", "torch", "stable-baselines3", "sb3-contrib", "gymnasium", "numba")
RECORD: Final = "run.json"


def identity(task: TaskConfig, hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Return what identifies a run: task, hyper-parameters, observation version.

    Also the hash of the task's workload file, where the task has one.
    """
    return {
        "task": notes_of(task),
        "hyperparameters": asdict(hyperparameters),
        "observation_version": OBSERVATION_VERSION,
    } | hash_of(task)


def check_run(
    task: TaskConfig, hyperparameters: Hyperparameters, folder: Path, resume: bool
) -> None:
    """Make sure that a run can begin in a folder or, to resume, that the run in it is this one.

    Raises
    ------
    ServegymError
        If the folder holds a run and ``resume`` is not given, holds another run, or holds none; if the
        run is to imitate or to evolve for another reward than ``gap``; or if the task sheds requests.
    """
    for needs, what in (
        (hyperparameters.warm, "imitation"),
        (hyperparameters.evolves, "evolution"),
    ):
        if needs and task.process.reward != "gap":
            raise ServegymError(
                f"{what} needs process.reward = 'gap', the task has {task.process.reward!r}"
            )
    if task.cluster.shed_at > 0:
        raise ServegymError(
            "agents are chosen by the gap, which an episode with requests shed has not; set "
            f"cluster.shed_at to 0, the task has {task.cluster.shed_at}"
        )
    record = folder / RECORD
    if resume:
        content, wanted = read_run(folder), identity(task, hyperparameters)
        noted = {key: content[key] for key in wanted if key in content}
        check_identity(str(record), noted, wanted)
    else:
        check_unused(folder)


def check_unused(folder: Path) -> None:
    """Refuse a folder in which no run can begin: it holds a run, or anything but its lock."""
    if (folder / RECORD).exists():
        raise ServegymError(f"{folder}: holds a run; go on with it by --resume, or name another")
    if folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        raise ServegymError(f"{folder}: not empty and holds no run; name another folder")


def begin_run(
    task: TaskConfig, hyperparameters: Hyperparameters, folder: Path, command: str, resume: bool
) -> None:
    """Claim a folder that :func:`check_run` has found fit; writes ``run.json``."""
    if resume:
        for unfinished in folder.rglob(".*.tmp"):  # what a kill has left
            unfinished.unlink()
        return
    make_folder(folder)
    content = identity(task, hyperparameters) | {
        "command": command,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    }
    write_file(folder / RECORD, json.dumps(content, indent=2) + "\n")


_SEARCH: Final = {"task": dict, "algorithm": str, "search": dict, "command": str}
_RUN: Final = {"task": dict, "hyperparameters": dict, "observation_version": int, "command": str}


def read_run(folder: Path) -> dict[str, Any]:
    """Return the record of the run of PPO in a folder: identity, command, versions."""
    content = _read(folder)
    if not _has(content, _RUN):
        what = "of another learner" if _has(content, _SEARCH) else "not the record of a run"
        raise ServegymError(f"{folder / RECORD}: {what}; {_ADVICE}")
    return content


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run of any learner; what is searched for counts as its hyper-parameters."""
    content = _read(folder)
    if _has(content, _SEARCH):
        chosen = content["search"] | {"algorithm": content["algorithm"]}
        return dict(content) | {"hyperparameters": chosen}
    return read_run(folder)


_ADVICE: Final = "go on with a copy of it, or begin a run in another folder"


def _has(content: Any, types: Mapping[str, type]) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(key), type_) for key, type_ in types.items()
    )


def _read(folder: Path) -> Any:
    record = folder / RECORD
    if not os.path.lexists(record):
        raise ServegymError(f"{shortened(folder)}: holds no run to resume")
    try:
        return read_json(record)
    except ServegymError as error:
        raise ServegymError(f"{error}; {_ADVICE}") from None


def check_identity(place: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse the identity of another run, naming the first difference.

    A hyper-parameter that an earlier version did not have counts as its default.
    """
    if isinstance(found, dict) and isinstance(found.get("hyperparameters"), dict):
        hyperparameters = asdict(Hyperparameters()) | found["hyperparameters"]
        found = found | {"hyperparameters": hyperparameters}
    words = "belongs to a run with {name} {old}, this one has {new}"
    compare(place, words, found, wanted, "resume with the same, or begin a run in another folder")
