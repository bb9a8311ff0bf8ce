"""The one interface of everything that decides: rules, searches, trained agents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError
from servegym.envs.simulator.state import State
from servegym.envs.simulator.view import DecisionView
from servegym.envs.task.config import TaskConfig
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import Requests


@dataclass(frozen=True)
class Briefing:
    """What a policy is told before an episode: the task, and the requests as a scheduler knows them.

    ``requests`` holds those present at t = 0, with ids as in the episode (they come first); None if
    there are none. Where output lengths are not known, their ``output_tokens`` are the predicted ones.
    """

    task: TaskConfig
    requests: Requests | None
    rng: np.random.Generator


def _no_imagination() -> State:
    raise ServegymError("this situation carries no model of the future; play() gives one")


@dataclass(frozen=True)
class Situation:
    """What a policy is told at a decision point."""

    view: DecisionView
    observation: NDArray[np.float32]  # (OBSERVATION_SIZE,)
    mask: NDArray[np.bool_]  # (actions,) legal actions
    imagine: Callable[[], State] = _no_imagination
    """Makes the episode as the scheduler believes it to be (``ServingEnv.imagine``), where asked."""


class Policy(Protocol):
    """Decides at every decision point; one object plays one episode after another."""

    def adapt(self, task: TaskConfig) -> TaskConfig:
        """Return the task as this policy wants to be asked: how often, and what is compared how.

        It may not change what is served on what machine.
        """
        ...

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Get ready for an episode; return the offline plan that its rules follow, if any."""
        ...

    def act(self, situation: Situation) -> int:
        """Return a legal action."""
        ...
