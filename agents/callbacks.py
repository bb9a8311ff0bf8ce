"""What training reports of an agent: evaluations, charts in TensorBoard, the best and the last agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from servegym.agents.charts import Charts
from servegym.agents.evaluations import Evaluations, measure
from servegym.agents.export import export_agent, policy_network
from servegym.agents.validation import Validation
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.files import make_folder
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.config import TaskConfig


class ServingCallback(BaseCallback):
    """Evaluates, logs and exports the agent of PPO or MaskablePPO while it is trained.

    An evaluation, at the start, every ``every_timesteps`` and at the end, plays the validation cases
    greedily, with the numpy network that would be exported. Its means are logged as ``serving/…``, with
    two figures: the first case's Gantt chart, and the critic's values against the actual returns to
    go. ``serving/gap_sampled`` is of the same cases with actions drawn as in training, from a separate
    generator. Where it is far below ``serving/gap``, the policy is still spread over several actions.
    After each rollout ``serving/train_…`` are means over the episodes that ended in it
    (``info["serving"]`` holds the METRICS of an ended episode), ``shares/train_…`` the shares of actions.

    If the task cuts episodes short (``process.max_decisions`` or ``max_seconds``), means in training
    are over finished episodes, ``serving/train_unfinished`` and ``serving/unfinished`` are the shares of
    unfinished ones, and an evaluation with unfinished cases has no gap.

    References are separate runs beside the training run, with the same tags. TensorBoard draws equal
    tags of all runs below its log folder into one chart. So the references' lines are in the charts
    that open first, with a legend, and can be switched off; a custom-scalars layout would show them
    only on another page.

    The callback writes into the folder: ``evaluations.csv``; ``agent/``, the best agent so far (fewest
    unfinished cases, then smallest gap; never of the first evaluation, unless an expert was imitated
    before); ``final/``, the last agent; ``tensorboard/reference-<policy>/``. The training run's own
    events should also lie in ``tensorboard/``. The callback draws from no global generator and changes
    no weights, so the trained weights are those without the callback.

    Training was resumed if ``model.num_timesteps`` is not 0 at the start. Evaluations after that step
    are then dropped from the table, the best agent is that of the rows kept, and seconds go on from
    the last row or, under ``train``, from the checkpoint.

    Parameters
    ----------
    task
        What the model is trained on.
    validation_seeds
        Seeds of the validation cases; apart from those of training and of held-out evaluation.
    every_timesteps
        Environment steps between two evaluations, rounded up to whole rollouts.
    references
        Mean metrics of the policies to compare with, on the validation cases, by policy name; keys as
        in METRICS.
    hyperparameters
        Shown on TensorBoard's HParams page with the metrics.
    folder
        Folder of the run.
    command
        The command line, for ``agent.json``.
    """

    def __init__(
        self,
        task: TaskConfig,
        validation_seeds: Sequence[int],
        every_timesteps: int,
        references: Mapping[str, Mapping[str, float]],
        hyperparameters: Mapping[str, Any],
        folder: Path,
        command: str = "",
    ) -> None:
        super().__init__()
        if every_timesteps < 1:
            raise ServegymError(f"every_timesteps must be ≥ 1, got {every_timesteps}")
        for values in references.values():
            for name in values:
                if name not in METRICS:
                    raise unknown("metric", name, METRICS)
        self.task = task
        self.validation = Validation(task, validation_seeds)
        self.every_timesteps = every_timesteps
        self.references = references
        self.hyperparameters = hyperparameters
        self.folder = folder
        self.command = command
        imitated = hyperparameters.get("imitation_rounds", 0) > 0
        self.evaluations = Evaluations(folder / "evaluations.csv", imitated)
        self._opened: Charts | None = None
        self._ended: list[Mapping[str, float]] = []
        self._began_s = 0.0  # perf_counter() at the start, had the run never been interrupted
        self._evaluating_s = 0.0

    @property
    def best(self) -> Mapping[Any, Any] | None:
        """The evaluation whose agent is in ``agent/``, a row of the table; None before there is any."""
        return self.evaluations.best

    def _on_training_start(self) -> None:
        make_folder(self.folder)
        resumed = self.num_timesteps > 0
        if resumed:
            # An evaluation in a rollout that a callback stopped is of this checkpoint's weights.
            self.evaluations.read(self.num_timesteps + self._ppo.n_steps * self._ppo.n_envs - 1)
        self._set_clocks()
        next_step = max(self.num_timesteps, self.evaluations.last_timesteps) + 1
        self._opened = Charts(
            self.task,
            self.logger,
            self.references,
            self.folder / "tensorboard",
            next_step if resumed else None,
        )
        self._charts.log_hyperparameters(self.hyperparameters)
        if len(self.evaluations.rows) == 0:
            self._evaluate()

    def _set_clocks(self) -> None:
        """Let the seconds go on from the last evaluation, or from the checkpoint."""
        rows = self.evaluations.rows
        wall_s, training_s = rows[["wall_s", "training_s"]].iloc[-1] if len(rows) else (0.0, 0.0)
        # Only `train` passes seconds that no row holds: of imitation, or from the last row to the checkpoint.
        more_s = max(0.0, float(self.locals.get("training_s", 0.0)) - float(training_s))
        self._began_s = perf_counter() - (float(wall_s) + more_s)
        self._evaluating_s = float(wall_s) - float(training_s)

    def _on_rollout_start(self) -> None:
        every = self.every_timesteps
        if self.num_timesteps // every > self.evaluations.last_timesteps // every:
            self._evaluate()

    def _on_step(self) -> bool:
        if self.locals["dones"].any():
            self._ended += [info["serving"] for info in self.locals["infos"] if "serving" in info]
        return True

    def _on_rollout_end(self) -> None:
        actions = self.locals["rollout_buffer"].actions.astype(np.int64).ravel()
        self._charts.log_rollout(actions, self._ended)
        self._ended.clear()

    def _on_training_end(self) -> None:
        if self.evaluations.last_timesteps < self.num_timesteps:
            self._evaluate()
        export_agent(self._ppo, self.task, self.command, self.folder / "final")
        self._charts.close()

    @property
    def _ppo(self) -> OnPolicyAlgorithm:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise ServegymError(f"only PPO and MaskablePPO, not {type(self.model).__name__}")
        return self.model

    @property
    def _charts(self) -> Charts:
        assert self._opened is not None, "training has not started"
        return self._opened

    def _evaluate(self) -> None:
        """Play the validation cases; keep the row and the best agent, log and draw."""
        started_s = perf_counter()
        wall_s = started_s - self._began_s
        result, measured = measure(policy_network(self._ppo), self.validation)
        row = measured | {
            "timesteps": self.num_timesteps,
            "wall_s": wall_s,
            "training_s": wall_s - self._evaluating_s,
        }
        if self.evaluations.would_be_best(row):
            export_agent(self._ppo, self.task, self.command, self.folder / "agent")
        self.evaluations.add(row)
        self._charts.log_evaluation(result, row, self._ppo)
        self._evaluating_s += perf_counter() - started_s
