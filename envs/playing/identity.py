"""What results depend on: noted beside the results, compared before results are added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from servegym.envs.arguments import field_types
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, read_json, write_file
from servegym.envs.machine.costs import StageCosts
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.workload.cells import is_file
from servegym.envs.workload.sources import workload_sha256

HASH: Final = "workload_sha256"
"""Key of the hash of the task's workload file, or of the figures of its preset, where it has one."""

_LATER: Final = ("prefill_per_batch_token_squared_s", "decode_per_client_kv_token_s")
"""Rates that came later, at the end of the record: hashes go on to the last that is used."""

_CLASS: Final = "class"
"""Key of the class of a user's own cost model."""


def notes_of(task: TaskConfig) -> dict[str, Any]:
    """Return what a task is, for JSON: its sections.

    A user's own cost model is noted by its class and by the hash of the tables that it makes.
    """
    if isinstance(task.cost, StageCosts):
        return asdict(task)
    digest = hashlib.sha256()
    for table in lower(task).costs.by_name().values():
        digest.update(_bytes_of(np.asarray(table)))
    model = type(task.cost)
    cost = {
        _CLASS: f"{model.__module__}:{model.__qualname__}",
        "tables_sha256": digest.hexdigest(),
    }
    return asdict(replace(task, cost=TaskConfig(task.name).cost)) | {"cost": cost}


def _bytes_of(table: NDArray[Any]) -> bytes:
    """Return what is hashed of a table; a rate that came later counts where it or a later one is used."""
    if table.dtype.names is None:
        return table.tobytes()
    names = list(table.dtype.names)
    while names[-1] in _LATER and not table[names[-1]].any():
        names.pop()
    return np.stack([table[name] for name in names], axis=-1).tobytes()


def hash_of(task: TaskConfig) -> dict[str, str]:
    """Return the hash of what the task's requests are drawn from by its key; nothing for a formula."""
    found = workload_sha256(task.workload.source)
    return {} if found is None else {HASH: found}


_ABSENT: Final = object()
"""The value of a key that is not there."""


class DifferentError(ServegymError):
    """Something that results depend on has changed."""


def compare(place: str, words: str, found: Any, wanted: Mapping[str, Any], remedy: str) -> None:
    """Refuse notes that differ from those wanted, naming the first difference.

    A workload file or a task file counts by what is in it: the same under another path is the same.
    A key of the configuration that the notes lack, as those of an earlier version do, stands for its
    default. A key that only the notes have is a difference, whatever its value.

    Parameters
    ----------
    place, words
        Where the notes are, and the message about a difference, with ``{name}``, ``{old}``, ``{new}``.
    found, wanted
        The notes as read from JSON, and those of this task and version.
    remedy
        What to do about a difference.

    Raises
    ------
    DifferentError
        If they differ.
    """
    known = json.loads(json.dumps(wanted, default=str))  # as it was written: tuples are lists
    if not isinstance(found, dict):
        raise DifferentError(f"{place}: of another version; {remedy}")
    difference = _difference(found, known, _defaults())
    if difference is None:
        return
    name, old, new = difference
    if name == HASH:
        source = known.get("task", known)["workload"]["source"]
        what = "the workload file" if is_file(source) else "the figures of the preset"
        problem = f"{what} {source} {'has' if is_file(source) else 'have'} changed since"
        if old is None:
            problem = f"what was in the workload file {source} was not noted"
    else:
        problem = words.format(name=name, old=_short(old), new=_short(new))
    raise DifferentError(f"{place}: {problem}; {remedy}")


def _difference(
    found: dict[str, Any], wanted: dict[str, Any], defaults: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """Return the first key with other values, and these; None where there is none."""
    for name, new in wanted.items():
        default = defaults.get(name)
        old = found.get(name, default)
        if isinstance(old, dict) and isinstance(new, dict):
            if name == "cost" and (_CLASS in old) != (_CLASS in new):
                return name, old, new  # the keys of a user's own model are not those of ours
            deeper = defaults if name == "task" else default
            known = deeper if isinstance(deeper, Mapping) else {}  # a table may stand for a name
            if difference := _difference(old, new, known):
                return difference
        elif old != new and not _same_file(name, old, new):
            return name, old, new
    for name in found:
        if name not in wanted:
            return name, found[name], _ABSENT
    return None


@cache
def _defaults() -> Mapping[str, Any]:
    """Return the defaults of a task's keys as notes hold them: by section, by part of the cost."""
    sections = asdict(TaskConfig(""))
    del sections["name"]  # which has no default
    sections["cost"] = {
        part: {
            item.name: item.default
            for model in get_args(hint) or (hint,)
            for item in fields(model)
            if item.default is not MISSING
        }
        for part, hint in field_types(StageCosts).items()
    }
    return dict(json.loads(json.dumps(sections)))


def _same_file(key: str, old: Any, new: Any) -> bool:
    """Return whether two values name a file that is compared by its content instead."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    if key == "source":
        return is_file(old) and is_file(new)
    tasks = key == "name" and all(name.lower().endswith(".toml") for name in (old, new))
    return tasks and Path(old).name == Path(new).name


def _short(value: Any) -> str:
    text = "none" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else f"{text[:40]} … {text[-15:]}"


def claim(
    path: Path, wanted: Mapping[str, Any], what: str, indent: int = 2, tables: Sequence[str] = ()
) -> Any:
    """Note in a JSON file what results depend on; return the notes in the file, old ones if any.

    Parameters
    ----------
    path, wanted, indent
        The file, its contents, and its indentation.
    what
        The results in the folder of the file, such as ``episodes``.
    tables
        Names of tables beside the file that depend on it, and are written after it.

    Raises
    ------
    ServegymError
        If the file holds other notes (:class:`DifferentError`), is damaged or cannot be written, or if
        it has been removed and a table has not.
    """
    remedy = "choose a new --output folder"
    if path.exists():
        try:
            found = read_json(path)
        except ServegymError as error:
            raise ServegymError(f"{error}; damaged; {remedy}") from None
        words = f"holds {what} of another task, setting or version ({{name}} {{old}}, now {{new}})"
        compare(str(path.parent), words, found, wanted, remedy)
        return found
    for name in tables:
        if (path.parent / name).exists():
            raise ServegymError(
                f"{path.parent}: holds {name}, but no {path.name} that says of which task; {remedy}"
            )
    make_folder(path.parent)
    text = json.dumps(wanted, indent=indent, default=str)
    write_file(path, text + "\n")
    return json.loads(text)


def claim_task(task: TaskConfig, output: Path) -> TaskConfig:
    """Note a task in ``task.json`` of a folder of episodes; return it under the name it has there.

    Raises
    ------
    ServegymError
        If the folder holds episodes of another task, of another content of its workload file, or of
        another version, or tables of what is not noted.
    """
    wanted = notes_of(task) | hash_of(task)
    tables = ("episodes.csv", "optima.csv", "service.csv")
    notes = claim(output / "task.json", wanted, "episodes", tables=tables)
    return replace(task, name=notes["name"])


def check_unchanged(task: TaskConfig, known: Mapping[str, str]) -> None:
    """Refuse to go on if the task's workload file has changed.

    Parameters
    ----------
    task, known
        The task and its :func:`hash_of` from before.
    """
    if hash_of(task) != known:
        raise DifferentError(
            f"{task.workload.source}: the workload file has changed while it was in use; what had "
            "been made before is kept, restore the file to go on"
        )
