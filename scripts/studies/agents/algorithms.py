"""Which learner ``train`` runs: the one named, that of the run to resume, or the task's usual one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from servegym.agents.hyperparameters import ALGORITHMS, Hyperparameters
from servegym.agents.record import RECORD
from servegym.baselines.calendar.fitted import FAMILY
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.files import read_json
from servegym.envs.task.registered import load_task

CALENDAR: Final = FAMILY
"""The calendar of prefill stages, learned by CMA-ES."""

LEARNERS: Final = (CALENDAR, *ALGORITHMS)

_USUAL: Final = {"servegym/GSM8K-v0": CALENDAR}
"""Tasks whose usual learner is not PPO: there calendars end lower, sooner (results/agents)."""


def algorithm_of(words: Sequence[str], ppo: type, calendar: type, default_task: str) -> str:
    """Return the learner that the words of a command line ask for.

    It is the one that ``--algorithm`` names; else, with ``--resume``, that of the run in ``--output``; else
    the only one that has all options given; else the task's usual one.

    Parameters
    ----------
    words
        The arguments of ``train``.
    ppo, calendar
        The dataclasses of the two learners' options.
    default_task
        The task where none is named.

    Raises
    ------
    ServegymError
        If no learner has the name, or options of both kinds are given.
    """
    given = _options(words)
    named = given.get("--algorithm")
    if named is not None:
        if named not in LEARNERS:
            raise unknown("algorithm", named, LEARNERS)
        return named
    if "--resume" in given:
        return _recorded(Path(given.get("--output") or str(_default(ppo, "output"))))
    first, second = _names(ppo), _names(calendar)
    only_first = [name for name in given if _nearest(name, first | second) in first - second]
    only_second = [name for name in given if _nearest(name, first | second) in second - first]
    if only_first and only_second:
        raise ServegymError(
            f"{only_first[0]} is an option of {ALGORITHMS[0]}, {only_second[0]} one of {CALENDAR}; leave one "
            "out, or name the learner by --algorithm"
        )
    if only_first or only_second:
        return CALENDAR if only_second else ALGORITHMS[0]
    return _USUAL.get(
        load_task(given.get("--task") or default_task).name, Hyperparameters.algorithm
    )


def _options(words: Sequence[str]) -> dict[str, str]:
    """Return the options given with what stands behind them; the last one counts, as in the parser."""
    found: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name != "--help":
            found[name.replace("_", "-")] = value if equals else following
    return found


def _recorded(folder: Path) -> str:
    """Return the learner of the run in a folder; what is wrong with its record, the learner itself says."""
    try:
        content: Any = read_json(folder / RECORD)
    except (OSError, ServegymError):
        return Hyperparameters.algorithm
    calendar = isinstance(content, dict) and content.get("algorithm") == CALENDAR
    return CALENDAR if calendar else Hyperparameters.algorithm


def _names(options: type) -> set[str]:
    return {f"--{item.name.replace('_', '-')}" for item in fields(options)}


def _default(options: type, name: str) -> Any:
    return next(item.default for item in fields(options) if item.name == name)


def _nearest(name: str, known: set[str]) -> str:
    """Return the option that a mistyped one stands for, so that its own learner refuses it."""
    return (get_close_matches(name, sorted(known), 1) or [name])[0]
