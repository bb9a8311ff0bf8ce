"""Task files: a task as TOML, and the line of a key that is wrong."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from servegym.envs.errors import ServegymError
from servegym.envs.files import beyond_limits, read_text
from servegym.envs.task.config import TaskConfig, check_mixed_once, with_overrides
from servegym.envs.workload.cells import is_file


def read_task(path: str | Path, base: TaskConfig) -> TaskConfig:
    r"""Read a task TOML; keys it leaves out keep ``base``'s values.

    The relative path of a file in ``workload.source`` is looked up beside the TOML file.

    Raises
    ------
    ServegymError
        One line naming file, line and key.

    Examples
    --------
    >>> import tempfile
    >>> from servegym.envs import TASKS
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "mine.toml"
    ...     _ = path.write_text("[cluster]\nclients = 50\n")
    ...     read_task(path, base=TASKS["servegym/GSM8K-v0"]).cluster.clients
    50
    """
    path = Path(path)
    text = read_text(path, "task file")
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ServegymError(f"{path}: not TOML: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ServegymError(f"{path}: not TOML that can be read: {beyond_limits(error)}") from None
    workload = sections.get("workload")
    if isinstance(workload, dict) and is_file(str(workload.get("source", ""))):
        workload["source"] = str(path.parent / workload["source"])
    task = replace(base, name=str(path))
    try:
        check_mixed_once(sections)
    except ServegymError as error:
        line = _line_of(text, ("cost", "mixed"))
        raise ServegymError(f"{path}: line {line}: {error}") from None
    for section, values in sections.items():
        for part in _parts(section, values):
            try:
                task = with_overrides(task, part)
            except ServegymError as error:
                line = _line_of(text, _key_at_fault(section, error, sections))
                raise ServegymError(f"{path}: line {line}: {error}") from None
    return task


def _parts(section: str, values: Any) -> list[dict[str, Any]]:
    """Take a section apart key by key, so that an error has one key to blame.

    [cost] and [cluster] are one piece each, as their keys depend on each other.
    """
    if section in ("cost", "cluster") or not isinstance(values, dict) or not values:
        return [{section: values}]
    # What may be said of arrivals and of a trace depends on the source and the number of requests.
    last = ("requests", "arrival_rate_per_s", "arrivals", "trace")
    keys = sorted(values, key=lambda key: last.index(key) if key in last else -1)
    return [{section: {key: values[key]}} for key in keys]


def _key_at_fault(section: str, error: ServegymError, sections: dict[str, Any]) -> tuple[str, ...]:
    """Return the key to blame: the first that the message names and the file holds, or the error's own."""
    known = (section, *error.key)
    for found in re.findall(rf"\b{section}((?:\.\w+|\[\d+\])+)", str(error)):
        named = (section, *re.findall(r"\w+", found))
        if named[: len(known)] == known and _holds(sections, named):
            return named
    return known


def _line_of(text: str, key: tuple[str, ...]) -> int:
    """Return the 1-based line where a key of a TOML text is set, or the table nearest around it.

    The parser itself is asked, so that quotes, dotted keys, inline tables and tables of tables mean
    here what they meant in reading: a key is set by the statement with which the text's beginning
    comes to hold it.
    """
    lines, ends = text.split("\n"), _statement_ends(text)
    while key and not _holds(tomllib.loads(text), key):
        key = key[:-1]
    first = bisect_left(
        ends, True, key=lambda end: _holds(tomllib.loads("\n".join(lines[:end])), key)
    )
    return ends[first - 1] + 1 if first else 1


def _holds(table: Any, key: tuple[str, ...]) -> bool:
    for part in key:
        if isinstance(table, list):  # of tables
            if not part.isdigit() or int(part) >= len(table):
                return False
            table = table[int(part)]
            continue
        if not isinstance(table, dict) or part not in table:
            return False
        table = table[part]
    return True


_TOML_TOKENS: Final = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|\'{3}.*?\'{3,5}'''  # texts over several lines
    r"""|"(?:\\.|[^"\\])*"|\'[^\']*\'|#[^\n]*|[\[{\]}\n]""",
    re.DOTALL,
)
"""All that may hold a bracket or an end of a line, and these themselves."""


def _statement_ends(text: str) -> list[int]:
    """Return after how many lines each statement of a valid TOML text ends; blank lines are some, too."""
    ends, line, depth = [], 0, 0
    for token in _TOML_TOKENS.findall(text + "\n"):
        line += token.count("\n")
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if token == "\n" and depth == 0:
            ends.append(line)
    return ends
