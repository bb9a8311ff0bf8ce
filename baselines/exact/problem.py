"""The joint problem of small cases: which prefill stage admits which request, and when.

One replica, all requests present at t = 0, lengths known. A schedule is a list of prefill stages,
each a decode-clock value (rounds run before it) and the requests it admits; between stages every
active client decodes. The makespan is

    Σ stages prefill(stage) + Σ rounds b(active clients) + c · Σ_i (d_i p_i + d_i (d_i + 1) / 2),

whose last term, the cache's, is the same for every schedule. What makes the exact methods' search smaller:

* **Requests of a kind** (equal prompt and rounds) are interchangeable.
* **Rounds count alone** (``JointProblem.counts_rounds``). Where b(n) = b₀ + b₁ n with b₀ ≥ 0 the
  decode time is b₀ · C + b₁ · Σ d_i, with C rounds. A stage at a clock where no request finishes can
  then run a round earlier, with the same members. So some optimal schedule has stages only at t = 0
  and at finishes.
* **Stages count alone** (``JointProblem.counts_stages``). If, besides, a stage costs a fixed time
  plus a time for each member, and there is no token budget, some optimal schedule never leaves a
  client idle at a stage while a request waits: the next request of that client can join the stage.
  Kinds then differ by rounds alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.schedules import Schedule, Stage, replay
from servegym.envs.machine.costs import CostTables
from servegym.envs.simulator.seconds import prefill_seconds
from servegym.envs.workload.requests import Requests


@dataclass(frozen=True)
class Outcome:
    """What a method found. Seconds without ``JointProblem.constant_s``."""

    schedule: Schedule | None
    bound_s: float
    """Lower bound on every schedule; the search caps it at its cutoff."""
    finished: bool
    """Whether the schedule, or the one known before if none was found, is proven optimal."""


@dataclass(frozen=True, eq=False)
class Kinds:
    """Requests that are alike, most decode rounds first."""

    prompt: NDArray[np.int64]  # (kinds,)
    rounds: NDArray[np.int64]  # (kinds,)
    count: NDArray[np.int64]  # (kinds,) requests of each
    members: list[list[int]]  # ids of each


@dataclass(frozen=True, eq=False)
class JointProblem:
    """A case for the exact methods; all requests must be present at t = 0."""

    requests: Requests
    clients: int
    costs: CostTables
    max_prefill_tokens: int = 0

    @cached_property
    def decode_s(self) -> NDArray[np.float64]:
        """Seconds of a round with n active clients, without its cache, shape (clients + 1,)."""
        return self.costs.decode_base_s[0]

    @cached_property
    def counts_rounds(self) -> bool:
        """Whether decode time depends on the number of rounds alone (see the module)."""
        base_s, slope_s = self.decode_line
        line = base_s + slope_s * np.arange(1, self.clients + 1)
        off_s = np.abs(self.decode_s[1:] - line).max()
        return bool(base_s >= 0 and off_s <= 1e-13 * self.decode_s.max())

    @property
    def decode_line(self) -> tuple[float, float]:
        """b₀ and b₁ of the line through the first and the last entry of ``decode_s``."""
        if self.clients == 1:
            return float(self.decode_s[1]), 0.0
        slope_s = float(self.decode_s[-1] - self.decode_s[1]) / (self.clients - 1)
        return float(self.decode_s[1]) - slope_s, slope_s

    @property
    def is_levelled(self) -> bool:
        """Whether prefill costs come in levels."""
        return self.costs.prefill_level_tokens.shape[1] > 0

    @cached_property
    def counts_stages(self) -> bool:
        """Whether prefill time depends on the number of stages alone (see the module)."""
        rates = self.costs.rates[0]
        has_floor = rates.prefill_floor_s > rates.prefill_base_s
        linear = not self.is_levelled and not has_floor and self.max_prefill_tokens == 0
        linear = linear and rates.prefill_per_batch_token_squared_s == 0
        return linear and self.counts_rounds

    @cached_property
    def kinds(self) -> Kinds:
        """The kinds of requests."""
        prompts = self.requests.prompt_tokens * (0 if self.counts_stages else 1)
        pairs = np.stack([-self.requests.decode_rounds, prompts], axis=1)
        kinds, kind_of = np.unique(pairs, axis=0, return_inverse=True)
        members = [np.flatnonzero(kind_of.ravel() == kind).tolist() for kind in range(len(kinds))]
        count = np.array([len(ids) for ids in members], dtype=np.int64)
        return Kinds(kinds[:, 1], -kinds[:, 0], count, members)

    def batch_s(self, prompts: NDArray[np.int64]) -> float:
        """Return the seconds of a prefill stage of these prompts."""
        squares = float((prompts.astype(float) ** 2).sum())
        return float(prefill_seconds(self.costs, 0, int(prompts.sum()), squares, len(prompts)))

    @property
    def cache_s(self) -> float:
        """Seconds that decode rounds take for the cached tokens, in every schedule."""
        d = self.requests.decode_rounds.astype(float)
        tokens = float((d * self.requests.prompt_tokens + d * (d + 1.0) / 2.0).sum())
        return float(self.costs.rates[0].decode_per_kv_token_s) * tokens

    @property
    def constant_s(self) -> float:
        """Seconds that every schedule takes and kinds leave out: cache, and prompts where kinds lack them."""
        if not self.counts_stages:
            return self.cache_s
        rates, prompts = self.costs.rates[0], self.requests.prompt_tokens.astype(float)
        per_token_s = float(rates.prefill_per_token_s * prompts.sum())
        return (
            self.cache_s
            + per_token_s
            + float(rates.prefill_per_token_squared_s * (prompts**2).sum())
        )

    def fits(self, ids: Sequence[int]) -> bool:
        """Return whether a stage may admit these requests together: the token budget."""
        budget = self.max_prefill_tokens
        tokens = int(self.requests.prompt_tokens[list(ids)].sum())
        return len(ids) <= 1 or budget == 0 or tokens <= budget

    def makespan_s(self, schedule: Schedule) -> float:
        """Return the makespan of a schedule in seconds, by ``replay``."""
        return replay(self.requests, self.clients, self.costs, schedule, self.max_prefill_tokens)

    def batches(self) -> Iterator[tuple[int, ...]]:
        """Yield every prefill stage as the number of requests of each kind."""
        kinds, budget = self.kinds, self.max_prefill_tokens

        def extend(row: tuple[int, ...], size: int, tokens: int) -> Iterator[tuple[int, ...]]:
            kind = len(row)
            if kind == len(kinds.count):
                if size > 0:
                    yield row
                return
            for count in range(min(int(kinds.count[kind]), self.clients - size) + 1):
                more = tokens + count * int(kinds.prompt[kind])
                if budget == 0 or more <= budget or size + count <= 1:
                    yield from extend((*row, count), size + count, more)

        return extend((), 0, 0)


def count_batches(counts: Sequence[int], clients: int) -> int:
    """Return the number of different stages of 1 … clients requests, of so many of each kind."""
    ways = np.zeros(clients + 1)
    ways[0] = 1.0
    for count in counts:
        ways = np.convolve(ways, np.ones(count + 1))[: clients + 1]
    return int(min(ways[1:].sum(), 2.0**62))


def greedy_schedule(problem: JointProblem) -> Schedule:
    """Return the best of some simple schedules: longest first, once K clients are idle, K = 1 … J."""
    schedules = [_threshold_schedule(problem, k) for k in range(1, problem.clients + 1)]
    return min(schedules, key=problem.makespan_s)


def _threshold_schedule(problem: JointProblem, threshold: int) -> Schedule:
    rounds = problem.requests.decode_rounds
    waiting = np.argsort(-rounds, kind="stable").tolist()
    schedule: list[Stage] = []
    ends: list[int] = []
    clock = 0
    while waiting:
        idle = problem.clients - len(ends)
        if idle >= threshold:
            ids: list[int] = []
            while waiting and len(ids) < idle and problem.fits([*ids, waiting[0]]):
                ids.append(waiting.pop(0))
            schedule.append(Stage(clock, tuple(ids)))
            ends += [clock + int(rounds[i]) for i in ids if rounds[i] > 0]
        else:
            clock = min(ends)
            ends = [end for end in ends if end > clock]
    return schedule
