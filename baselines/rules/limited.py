"""Policies that choose once how many clients run, or how much memory stays free: baselines of Elastic-v0.

A request of prompt p and output o holds p + k tokens in its k-th round. At a random moment of a long run
what a client holds has the mean m = Σ_i Σ_k (p_i + k) / Σ_i o_i and a deviation s likewise; n clients hold
n m ± s √n.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.special import ndtri

from servegym.envs.errors import ServegymError
from servegym.envs.playing.policy import Briefing, Policy, Situation
from servegym.envs.simulator.events import DECODE
from servegym.envs.task.config import Admission, TaskConfig
from servegym.envs.vocabulary import STEALS
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import Requests


def held_tokens(requests: Requests) -> tuple[float, float]:
    """Return mean and standard deviation of the tokens that a client holds, over all rounds.

    Examples
    --------
    >>> from servegym.envs import make_requests
    >>> held_tokens(make_requests([10, 10], [1, 3]))
    (11.75, 0.8291561975888499)
    """
    prompts = requests.prompt_tokens.astype(np.float64)
    rounds = requests.output_tokens.astype(np.float64)
    first = rounds * (rounds + 1) / 2  # Σ k
    second = rounds * (rounds + 1) * (2 * rounds + 1) / 6  # Σ k²
    total = rounds.sum()
    mean = float((prompts * rounds + first).sum() / total)
    squares = float((prompts**2 * rounds + 2 * prompts * first + second).sum() / total)
    return mean, float(np.sqrt(max(squares - mean**2, 0.0)))


@dataclass
class LimitedPolicy(Policy):
    """First come, first served within a cap or a reserve of ``process.caps`` and ``reserves``.

    Admits in mixed stages where the task has them. Knows of the requests what stands in the briefing,
    predicted lengths where they are not known; of requests that come later nothing, so it limits nothing
    where none is present at t = 0.

    Parameters
    ----------
    by
        ``worst``: as many clients as hold the longest prompt with the longest output each, the paper's fixed
        number. ``chance``: as many as memory holds with chance ``quantile``. ``reserve``: all clients, but
        leave free by what that quantile exceeds the mean. Of the caps on offer the largest within that
        number counts, else the smallest; of the reserves the smallest that suffices, else the largest.
    quantile
        > 0 and < 1.

    Examples
    --------
    >>> from servegym.envs import TASKS, make_case, play
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> round(play(task, "fixed", LimitedPolicy("worst"), make_case(task, 0), seed=0).row["gap"], 3)
    0.328
    """

    by: Literal["worst", "chance", "reserve"]
    quantile: float = 0.99
    _steals: tuple[int, ...] = field(default=(), init=False, repr=False)
    _action: int = field(default=DECODE, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.by not in ("worst", "chance", "reserve"):
            raise ServegymError(f"by must be worst, chance or reserve, got {self.by!r}")
        if not 0 < self.quantile < 1:
            raise ServegymError(f"quantile must lie between 0 and 1, got {self.quantile}")

    def limits(self, task: TaskConfig, requests: Requests | None) -> tuple[float, float]:
        """Return the cap and the reserve that are meant, as shares; what is on offer is not looked at."""
        replica = min(task.cluster.replica_tables(), key=lambda table: table.kv_capacity_tokens)
        memory = replica.kv_capacity_tokens
        if memory == 0 or requests is None:
            return 1.0, 0.0
        if self.by == "worst":
            longest = requests.prompt_tokens.max() + requests.output_tokens.max()
            return min(1.0, float(memory // longest) / replica.clients), 0.0
        mean, deviation = held_tokens(requests)
        z = max(float(ndtri(self.quantile)), 0.0)
        if self.by == "reserve":
            return 1.0, min(1.0, z * deviation * float(np.sqrt(memory / mean)) / memory)
        # n m + z s √n = memory, solved for √n
        root = (-z * deviation + np.sqrt((z * deviation) ** 2 + 4 * mean * memory)) / (2 * mean)
        return min(1.0, float(np.floor(root**2)) / replica.clients), 0.0

    def check_task(self, task: TaskConfig) -> None:
        """Refuse a task that lacks the rule ``fcfs``."""
        mixed = task.cluster.chunk_tokens > 0
        if "fcfs" not in (task.process.mixed_rules if mixed else task.process.rules):
            key = "process.mixed_rules" if mixed else "process.rules"
            raise ServegymError(
                f"this policy admits by 'fcfs', which {key} of {task.name} leaves out; add it there"
            )

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Find the action whose limits are nearest to what is meant."""
        task = briefing.task
        self.check_task(task)
        cap, reserve = self.limits(task, briefing.requests)
        caps = [share for share in task.process.caps if share <= cap]
        reserves = [share for share in task.process.reserves if share >= reserve]
        mixed = task.cluster.chunk_tokens > 0
        wanted = Admission(
            "fcfs",
            mixed,
            max(caps, default=min(task.process.caps)),
            min(reserves, default=max(task.process.reserves)),
        )
        self._action = 1 + task.admissions.index(wanted)
        self._steals = tuple(
            task.actions.index(f"steal:{kind}") for kind in STEALS if kind in task.process.steals
        )
        return None

    def act(self, situation: Situation) -> int:
        """Return what to steal; else admit within the limits; else decode."""
        mask = situation.mask
        for action in (*self._steals, self._action, DECODE):
            if mask[action]:
                return action
        return int(mask.argmax())  # nobody decodes, and what another has begun goes on
