"""Given cases of a task, played side by side in compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.envs.process.steps import begin_row, make_rows, step_rows
from servegym.envs.task.cases import Case, PlanCase
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import load_case, lower, make_task_state

Predict = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.int64]]
"""Observations (cases, features) and masks (cases, actions) to legal actions (cases,)."""


class Step(NamedTuple):
    """One step of all rows."""

    actions: NDArray[np.int64]  # (cases,)
    played: NDArray[np.bool_]  # (cases,) the case was not over before the step
    ended: NDArray[np.bool_]  # (cases,) the case was over after the step and not before
    rewards: NDArray[np.float64]  # (cases,)


class SideBySide:
    """Rows of one task; row e plays the e-th of the cases that are given. Draws nothing at random.

    Parameters
    ----------
    task
        Task of the cases.
    cases
        Most cases that are played at once.
    requests
        Requests of the largest case.
    plan_case
        Plans each case; None: all have the greedy plan.
    """

    def __init__(
        self, task: TaskConfig, cases: int, requests: int, plan_case: PlanCase | None = None
    ) -> None:
        self.task = task
        self._plan_case = plan_case
        self.state = make_task_state(task, cases, requests)
        machine = lower(task)
        self._costs, self._settings = machine.costs, machine.settings
        self._features = len(machine.features)

    def play(self, cases: Sequence[Case], predict: Predict) -> Iterator[Step]:
        """Play every case once to its end; yield after each step.

        ``predict`` is asked for rows that have ended, too, and its actions there change no result:
        terminated rows stay as they are, truncated rows play on without being reported.
        """
        state, n = self.state, len(cases)
        rows = make_rows(n, len(self.task.actions), self._features)
        for e, case in enumerate(cases):
            plan = None if self._plan_case is None else self._plan_case(case)
            load_case(self.task, state, e, case, plan)
            begin_row(state, self._costs, self._settings, rows, e)
        alive = np.ones(n, np.bool_)
        while alive.any():
            actions = np.ascontiguousarray(predict(rows.observations, rows.masks), np.int64)
            step_rows(state, self._costs, self._settings, rows, actions)
            ended = alive & (rows.terminated | rows.truncated)
            yield Step(actions, alive, ended, rows.rewards)
            alive = alive & ~ended  # a new array: the old one is the caller's
