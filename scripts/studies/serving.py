"""Given requests served under a named policy, in compiled code: what studies count and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_loaded
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.machine.costs import CostTables
from servegym.envs.playing.policy import asked_task
from servegym.envs.process.metrics import EpisodeLog, records
from servegym.envs.simulator.state import State
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, load_case, lower, make_task_state
from servegym.envs.workload.requests import make_requests


@dataclass
class Service:
    """An episode that can be served again and again.

    Parameters
    ----------
    task, policy
        The task as the policy wants to be asked.
    """

    task: TaskConfig
    policy: TriggerPolicy
    case: Case
    state: State
    costs: CostTables

    def load(self) -> None:
        """Put the requests before the machine."""
        load_case(self.task, self.state, 0, self.case)

    def play(self) -> None:
        """Serve them to the end."""
        play_loaded(self.state, self.costs, self.task, self.policy)


@dataclass(frozen=True)
class Served:
    """What came of it."""

    log: EpisodeLog
    """In order of arrival."""
    seconds: float
    """When the last request finished."""
    passes: Sequence[int]
    """Of each replica: decode rounds, prefill and mixed stages."""
    prompted: int
    """Passes that computed prompts, of all replicas."""
    preemptions: int
    recomputed_tokens: int
    in_system_s: float
    """∫ requests that have arrived and not finished dt."""
    replicas: Any
    """Records of the replicas at the end."""


def service(
    task: TaskConfig,
    policy: str | TriggerPolicy,
    prompts: ArrayLike,
    outputs: ArrayLike,
    arrivals: ArrayLike | None = None,
) -> Service:
    """Set up an episode; without arrivals all requests are present at t = 0."""
    player = make_trigger_policy(policy) if isinstance(policy, str) else policy
    asked = asked_task(task, player)
    machine = lower(asked)
    requests = make_requests(prompts, outputs, arrivals)
    state = make_task_state(asked, 1, len(requests))
    return Service(asked, player, bound_case(machine, requests), state, machine.costs)


def serve(
    task: TaskConfig,
    policy: str | TriggerPolicy,
    prompts: ArrayLike,
    outputs: ArrayLike,
    arrivals: ArrayLike | None = None,
) -> Served:
    """Serve requests under a compiled rule.

    Examples
    --------
    >>> from servegym.envs import TASKS
    >>> serve(TASKS["servegym/Tiny-v0"], "fcfs", [4, 4], [3, 2]).passes
    [3]
    """
    episode = service(task, policy, prompts, outputs, arrivals)
    episode.load()
    episode.play()
    replicas = episode.state.replicas[0].copy()
    log = records(episode.state, 0)
    return Served(
        log=log,
        seconds=float(episode.state.episodes[0].now_s),
        passes=(replicas.rounds + replicas.prefill_stages).tolist(),
        prompted=int((replicas.prefill_stages + replicas.mixed_stages).sum()),
        preemptions=int(replicas.preemptions.sum()),
        recomputed_tokens=int(log.recomputed_tokens.sum()),
        in_system_s=float(episode.state.episodes[0].in_system_s),
        replicas=replicas,
    )
