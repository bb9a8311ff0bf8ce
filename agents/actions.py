"""An agent's actions by name, as ``TaskConfig.actions`` writes them: checked, found in a task, charted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError, unknown
from servegym.envs.task.config import TaskConfig
from servegym.envs.vocabulary import ADMISSION_RULES, STEALS

_DECODE: Final = "decode"
_PREFILL: Final = "prefill:"

_RULE: Final = "admission rule"
_KINDS: Final = {
    "prefill": ("process.rules", _RULE, ADMISSION_RULES),
    "mixed": ("process.mixed_rules", _RULE, ADMISSION_RULES),
    "steal": ("process.steals", "kind of steal", STEALS),
}
"""Of ``KIND:CHOICE``: the key of a task that offers it, what a choice is called, and which there are."""


def actions_of_rules(rules: Sequence[str]) -> tuple[str, ...]:
    """Return the actions of a task that knows only admission rules.

    Examples
    --------
    >>> actions_of_rules(["fcfs", "longest"])
    ('decode', 'prefill:fcfs', 'prefill:longest')
    """
    return (_DECODE, *(f"{_PREFILL}{rule}" for rule in rules))


def check_actions(actions: Sequence[str]) -> None:
    """Refuse a name that no task can have; what follows a second colon is left to the task.

    Raises
    ------
    ServegymError
        Naming the action.
    """
    for action in actions:
        kind, colon, choice = action.partition(":")
        if action == _DECODE:
            continue
        if not colon or kind not in _KINDS:
            raise unknown("action", action, (_DECODE, *(f"{kind}:CHOICE" for kind in _KINDS)))
        _, called, choices = _KINDS[kind]
        if choice.partition(":")[0] not in choices:
            raise unknown(called, choice, choices)


def places_of(actions: Sequence[str], task: TaskConfig) -> NDArray[np.intp]:
    """Return the task's number of each of an agent's actions.

    Raises
    ------
    ServegymError
        If the task lacks one, naming it and the key of the task that would bring it.
    """
    offered = task.actions
    for action in actions:
        if action not in offered:
            raise ServegymError(f"this agent may choose {action!r}, {_remedy(action, task)}")
    return np.array([offered.index(action) for action in actions], np.intp)


def _remedy(action: str, task: TaskConfig) -> str:
    kind, _, choice = action.partition(":")
    key = _KINDS[kind][0]
    if ":" in choice:
        return f"which process.caps and process.reserves of {task.name} leave out; add its shares there"
    if kind == "mixed" and task.cluster.chunk_tokens == 0:
        return (
            f"which {task.name} has not: its cluster.chunk_tokens is 0, no mixed stages; "
            "vLLM's default is 8192"
        )
    return f"which {key} of {task.name} leaves out; add {choice!r} there"


def charted(action: str) -> str:
    """Return an action's name in charts: a prefill stage goes by its rule alone, as it always has.

    Examples
    --------
    >>> charted("prefill:longest"), charted("mixed:longest")
    ('longest', 'mixed:longest')
    """
    return action.removeprefix(_PREFILL)
