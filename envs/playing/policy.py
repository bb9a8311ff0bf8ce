"""The one interface of everything that decides: rules, searches, trained agents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.simulator.outlook import Outlook
from servegym.envs.simulator.state import State
from servegym.envs.simulator.view import DecisionView
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import Requests


@dataclass(frozen=True)
class Briefing:
    """What a policy is told before an episode: the task, and the requests as a scheduler knows them.

    ``requests`` holds those present at t = 0, with ids as in the episode (they come first); None if
    there are none. Where output lengths are not known, their ``output_tokens`` are the predicted ones.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> Briefing(TASKS["servegym/Tiny-v0"], None, np.random.default_rng(0)).task.name
    'servegym/Tiny-v0'
    """

    task: TaskConfig
    requests: Requests | None
    rng: np.random.Generator


def _no_outlook() -> Outlook:
    raise ServegymError("this situation carries no outlook; play() gives one")


def _no_imagination() -> State:
    raise ServegymError("this situation carries no model of the future; play() gives one")


@dataclass(frozen=True)
class Situation:
    """What a policy is told at a decision point.

    Examples
    --------
    >>> from servegym.envs import ServingEnv
    >>> env = ServingEnv("Tiny-v0")
    >>> observation, _ = env.reset(seed=0)
    >>> situation = Situation(env.view(), observation, env.action_masks(), env.imagine)
    >>> situation.view.idle, situation.mask.any()
    (3, np.True_)
    """

    view: DecisionView
    observation: NDArray[np.float32]  # (features,) see ``ServingEnv.features``
    mask: NDArray[np.bool_]  # (actions,) legal actions
    imagine: Callable[[], State] = _no_imagination
    """Makes the episode as the scheduler believes it to be (``ServingEnv.imagine``), where asked."""
    outlook: Callable[[], Outlook] = _no_outlook
    """Returns what a stage now would cost later (``ServingEnv.outlook``), where asked."""


class Policy(Protocol):
    """Decides at every decision point; one object plays one episode after another.

    A user's policy derives from this class and needs only ``act``.

    Examples
    --------
    >>> class Patient(Policy):
    ...     def act(self, situation: Situation) -> int:
    ...         return int(np.flatnonzero(situation.mask)[0])  # decode wherever that is legal
    """

    @property
    def decisions(self) -> Literal["events", "rounds"] | None:
        """Where the policy wants to be asked, as ``process.decisions``; None: as the task says."""
        return None

    @property
    def comparison(self) -> Mapping[str, Any]:
        """How lengths are compared and expected, as keys of ``[information]``; empty: as the task says."""
        return {}

    @property
    def cluster(self) -> Mapping[str, Any]:
        """Keys of ``[cluster]`` that belong to the scheduler, as ``preempt``; empty: the task's.

        They are ``admission_guard``, ``conservativeness``, ``patience_s``, ``shortest_by``, ``level_tokens``,
        ``preempt``, ``steal_share``, ``migrate``, ``steal_period_s``, ``freeness_steps``, ``shed_at`` and, of
        a task that has mixed stages, ``chunk_tokens``.
        """
        return {}

    @property
    def needed_rules(self) -> tuple[str, ...]:
        """Admission rules that the policy needs beside those that the task offers."""
        return ()

    def check_task(self, task: TaskConfig) -> None:
        """Raise a ServegymError of one line if the policy cannot play the task, before anything is written.

        The task is asked as the policy declares.
        """
        return

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Get ready for an episode; return the offline plan that the rules follow, if any."""
        return None

    @abstractmethod
    def act(self, situation: Situation) -> int:
        """Return a legal action."""


_DECLARED: Final = {
    "comparison": (
        "information",
        ("compare_by", "quantile", "deviations", "expect", "interval"),
    ),
    "cluster": (
        "cluster",
        (
            "admission_guard",
            "conservativeness",
            "patience_s",
            "shortest_by",
            "level_tokens",
            "preempt",
            "steal_share",
            "migrate",
            "steal_period_s",
            "freeness_steps",
            "shed_at",
            "chunk_tokens",
        ),
    ),
}
"""What a policy may declare besides ``decisions``: the section of the task and its keys."""


def asked_task(task: TaskConfig, policy: Policy) -> TaskConfig:
    """Return the task with decisions, rules, comparison and its scheduler's keys as the policy declares them.

    Nothing else of the task can be declared: all policies serve the same requests on the same machine.

    Raises
    ------
    ServegymError
        If the policy declares what no task can have, or needs mixed stages where there are none.
    """
    sections: dict[str, Mapping[str, Any]] = {}
    process: dict[str, Any] = {}
    if policy.decisions is not None:
        process["decisions"] = policy.decisions
    more = tuple(
        rule for rule in getattr(policy, "needed_rules", ()) if rule not in task.process.rules
    )
    if more:
        process["rules"] = task.process.rules + more
    if process:
        sections["process"] = process
    for name, (section, keys) in _DECLARED.items():
        values = getattr(policy, name)
        if not isinstance(values, Mapping):
            raise ServegymError(
                f"{name} must be a table of keys, as {{{keys[0]!r}: …}}, or {{}} for the task's, "
                f"got {shown(values)}"
            )
        for key in values:
            if key not in keys:
                raise unknown(f"key in a policy's {name}:", key, keys)
        if values:
            sections[section] = values
    needed = getattr(policy, "needs_mixed_stages", False)  # few policies have it
    needed = needed or sections.get("cluster", {}).get("chunk_tokens")
    if task.cluster.chunk_tokens == 0 and needed:
        raise ServegymError(
            f"this policy needs mixed stages, which {task.name} has not: its cluster.chunk_tokens is "
            "0, vLLM's default is 8192"
        )
    return with_overrides(task, sections) if sections else task
