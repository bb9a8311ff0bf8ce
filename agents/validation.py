"""Greedy play on the same validation cases, side by side, again and again during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.side_by_side import Predict, SideBySide
from servegym.envs.process.metrics import EpisodeLog, episode_metrics, records
from servegym.envs.task.cases import PlanCase
from servegym.envs.task.config import TaskConfig


@dataclass(frozen=True)
class Trace:
    """The decisions of the first case."""

    observations: NDArray[np.float32]  # (decisions, features)
    masks: NDArray[np.bool_]  # (decisions, actions)
    rewards: NDArray[np.float64]  # (decisions,)
    clock_s: NDArray[np.float64]  # (decisions,) time of each decision
    records: EpisodeLog


@dataclass(frozen=True)
class ValidationResult:
    """One policy on all validation cases."""

    episodes: pd.DataFrame
    """One row a case: ``seed`` and the METRICS, in the order of the seeds."""
    returns: NDArray[np.float64]  # (cases,) sum of rewards
    lengths: NDArray[np.int64]  # (cases,) steps
    action_shares: NDArray[np.float64]  # (actions,) of all decisions
    trace: Trace


class Validation:
    """Validation cases of a task, sampled once: those of ``make_case(task, seed)``.

    Draws from no global random generator, so that playing them changes nothing in training.
    """

    def __init__(
        self, task: TaskConfig, seeds: Sequence[int], plan_case: PlanCase | None = None
    ) -> None:
        if len(seeds) == 0:
            raise ServegymError("validation needs at least one seed")
        self.task = task
        self.seeds = tuple(seeds)
        self._cases = [make_case(task, seed) for seed in seeds]
        requests = max(len(case.requests) for case in self._cases)
        self._rows = SideBySide(task, len(seeds), requests, plan_case)

    def play(self, predict: Predict) -> ValidationResult:
        """Play every case once to its end."""
        state = self._rows.state
        metrics: list[dict[str, float]] = [{} for _ in self._cases]
        counts = np.zeros(len(self.task.actions), np.int64)
        returns, lengths = np.zeros(len(self._cases)), np.zeros(len(self._cases), np.int64)
        seen: list[tuple[NDArray[np.float32], NDArray[np.bool_], float]] = []
        rewards: list[float] = []
        first: EpisodeLog | None = None

        def watched(
            observations: NDArray[np.float32], masks: NDArray[np.bool_]
        ) -> NDArray[np.int64]:
            if first is None:
                clock_s = float(state.episodes[0]["now_s"])
                seen.append((observations[0].copy(), masks[0].copy(), clock_s))
            return predict(observations, masks)

        for step in self._rows.play(self._cases, watched):
            counts += np.bincount(step.actions[step.played], minlength=len(counts))
            returns[step.played] += step.rewards[step.played]
            lengths += step.played
            if step.played[0]:
                rewards.append(float(step.rewards[0]))
            for e in np.flatnonzero(step.ended).tolist():
                metrics[e] = {"seed": self.seeds[e]} | episode_metrics(state, e)
            if step.ended[0]:
                first = records(state, 0)
        assert first is not None
        observations, masks, clocks_s = zip(*seen, strict=True)
        trace = Trace(
            np.stack(observations), np.stack(masks), np.array(rewards), np.array(clocks_s), first
        )
        shares = counts / counts.sum()
        return ValidationResult(pd.DataFrame(metrics), returns, lengths, shares, trace)
