"""Greedy play on the same validation cases, side by side, again and again during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.cases import load_case, make_task_state
from servegym.envs.config import TaskConfig
from servegym.envs.decision_process import begin_row, make_rows, step_rows
from servegym.envs.errors import ServegymError
from servegym.envs.evaluation import make_case
from servegym.envs.metrics import Records, episode_metrics, records
from servegym.envs.serving_env import make_settings

Predict = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.int64]]
"""Observations (cases, OBSERVATION_SIZE) and masks (cases, actions) to legal actions (cases,)."""


@dataclass(frozen=True)
class Trace:
    """What happened in the first case."""

    observations: NDArray[np.float32]  # (decisions, OBSERVATION_SIZE)
    masks: NDArray[np.bool_]  # (decisions, actions)
    rewards: NDArray[np.float64]  # (decisions,)
    clock_s: NDArray[np.float64]  # (decisions,) when each decision was taken
    records: Records


@dataclass(frozen=True)
class ValidationResult:
    """One policy on all validation cases."""

    episodes: pd.DataFrame
    """One row a case: ``seed`` and the METRICS, in the order of the seeds."""
    action_shares: NDArray[np.float64]  # (actions,) of all decisions
    trace: Trace


class Validation:
    """Validation cases of a task, sampled once: those of ``make_case(task, seed)``.

    Draws from no global random generator, so that playing them changes nothing in training.
    """

    def __init__(self, task: TaskConfig, seeds: Sequence[int]) -> None:
        if len(seeds) == 0:
            raise ServegymError("validation needs at least one seed")
        self.task = task
        self.seeds = tuple(seeds)
        self._cases = [make_case(task, seed) for seed in seeds]
        self._costs = task.cost.tables(task.cluster.clients)
        self._settings = make_settings(task)
        requests = max(len(case.requests) for case in self._cases)
        self._state = make_task_state(task, len(seeds), requests)
        self._rows = make_rows(len(seeds), 1 + len(task.process.rules))

    def play(self, predict: Predict) -> ValidationResult:
        """Play every case once to its end."""
        state, rows = self._state, self._rows
        for e, case in enumerate(self._cases):
            load_case(self.task, state, e, case)
            begin_row(state, self._costs, self._settings, rows, e)
        metrics: list[dict[str, float]] = [{} for _ in self._cases]
        alive = np.ones(len(self._cases), np.bool_)
        counts = np.zeros(rows.masks.shape[1], np.int64)
        steps: list[tuple[NDArray[np.float32], NDArray[np.bool_], float, float]] = []
        first: Records | None = None
        while alive.any():
            actions = np.ascontiguousarray(predict(rows.observations, rows.masks), np.int64)
            counts += np.bincount(actions[alive], minlength=len(counts))
            seen = rows.observations[0].copy(), rows.masks[0].copy()
            clock_s = float(state.replicas[0, 0]["clock_s"])
            # Rows that have terminated stand still, those that were truncated play on unheard.
            step_rows(state, self._costs, self._settings, rows, actions)
            if alive[0]:
                steps.append((*seen, float(rows.rewards[0]), clock_s))
            ended = alive & (rows.terminated | rows.truncated)
            for e in np.flatnonzero(ended).tolist():
                metrics[e] = {"seed": self.seeds[e]} | episode_metrics(state, e)
            if ended[0]:
                first = records(state, 0)
            alive &= ~ended
        assert first is not None
        observations, masks, rewards, clocks_s = zip(*steps, strict=True)
        trace = Trace(
            np.stack(observations), np.stack(masks), np.array(rewards), np.array(clocks_s), first
        )
        return ValidationResult(pd.DataFrame(metrics), counts / counts.sum(), trace)
