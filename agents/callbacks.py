"""What training reports: evaluations, charts in TensorBoard, the best and the last agent, the outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from servegym.agents.charts import Charts
from servegym.agents.early_stopping import Evaluation, OnEvaluation, says_stop
from servegym.agents.evaluations import Evaluations, measure
from servegym.agents.export import export_agent, policy_network
from servegym.agents.outcome import (
    SUMMARY,
    Comparison,
    best_of,
    compare,
    describe,
    describe_best,
    write_summary,
)
from servegym.agents.policy import load_agent
from servegym.agents.validation import Validation
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.files import make_folder
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.cases import PlanCase
from servegym.envs.task.config import TaskConfig


class ServingCallback(BaseCallback):
    """Evaluates, logs and exports the agent of PPO or MaskablePPO while it is trained.

    An evaluation, at the start, every ``every_timesteps`` and at the end, plays the validation cases
    greedily, with the numpy network that would be exported. Its means are logged as ``serving/…``, with
    two figures: the first case's Gantt chart, and the critic's values against the actual returns to
    go. ``serving/gap_sampled`` is of the same cases with actions drawn as in training, from a separate
    generator. Where it is far below ``serving/gap``, the policy is still spread over several actions.
    ``eval/mean_reward`` and ``eval/mean_ep_length`` are there for tools of stable-baselines3.
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
    before); ``final/``, the last agent; ``summary.json``, how the run has come out, at its end;
    ``tensorboard/reference-<policy>/``. The training run's own events should also lie in
    ``tensorboard/``. The callback draws from no global generator and changes no weights, so the trained
    weights are those without the callback.

    ``on_evaluation`` is the hook for pruning and early stopping, called with an
    :class:`~servegym.agents.early_stopping.Evaluation` after each evaluation. Where it returns False,
    training ends before the next update, with its checkpoint, ``final/`` and ``summary.json``, and can
    be resumed. Where it raises an ``Exception``, training ends in the same way, and the exception then
    leaves ``train`` or ``learn`` (as Optuna's ``TrialPruned`` should). Ctrl-C goes through at once.

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
    rule_gaps
        Gaps of the rules that the outcome compares the best agent with, fractions, a number for each
        validation seed, by policy name.
    on_evaluation
        See above.
    plan_case
        Plans the validation cases as ``hyperparameters["plan"]`` does; None: they have greedy plans.

    Examples
    --------
    >>> def prune(evaluation):
    ...     trial.report(evaluation.gap_percent, evaluation.timesteps)
    ...     if trial.should_prune():
    ...         raise optuna.TrialPruned
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
        *,
        rule_gaps: Mapping[str, Sequence[float]] | None = None,
        on_evaluation: OnEvaluation | None = None,
        plan_case: PlanCase | None = None,
    ) -> None:
        super().__init__()
        if every_timesteps < 1:
            raise ServegymError(f"every_timesteps must be ≥ 1, got {every_timesteps}")
        for values in references.values():
            for name in values:
                if name not in METRICS:
                    raise unknown("metric", name, METRICS)
        for name, gaps in (rule_gaps or {}).items():
            if len(gaps) != len(validation_seeds):
                raise ServegymError(
                    f"rule_gaps[{name!r}] must hold a gap for each of {len(validation_seeds)} validation "
                    f"seeds, got {len(gaps)}"
                )
        self.task = task
        self.validation = Validation(task, validation_seeds, plan_case)
        self.every_timesteps = every_timesteps
        self.references = references
        self.hyperparameters = hyperparameters
        self.folder = folder
        self.command = command
        self.rule_gaps = rule_gaps or {}
        self.on_evaluation = on_evaluation
        self.plan = str(hyperparameters.get("plan", ""))
        self.stopped = False
        """Whether the hook has asked to stop."""
        self.comparisons: list[Comparison] = []
        """The best agent beside each rule; known once training has ended."""
        imitated = hyperparameters.get("imitation_rounds", 0) > 0
        self.evaluations = Evaluations(folder / "evaluations.csv", imitated)
        self._opened: Charts | None = None
        self._ended: list[Mapping[str, float]] = []
        self._began_s = 0.0  # perf_counter() at the start, had the run never been interrupted
        self._evaluating_s = 0.0
        self._raised: Exception | None = None

    @property
    def best(self) -> Mapping[Any, Any] | None:
        """The evaluation whose agent is in ``agent/``, a row of the table; None before there is any."""
        return self.evaluations.best

    @property
    def last_mean_reward(self) -> float:
        """``eval/mean_reward`` of the last evaluation, as tools of stable-baselines3 ask for it."""
        rows = self.evaluations.rows
        return float(rows["mean_reward"].iloc[-1]) if len(rows) else float("nan")

    @property
    def status(self) -> str:
        """The last gap, the best and a rule's in a few words, for a line of progress."""
        rows, best = self.evaluations.rows, self.best
        if len(rows) == 0:
            return ""
        words = [f"gap {rows['gap_percent'].iloc[-1]:.2f} %"]
        if best is not None:
            words.append(f"best {best['gap_percent']:.2f} %")
        rule = next(iter(self.references), None)
        if rule is not None and "gap" in self.references[rule]:
            words.append(f"{rule} {100 * self.references[rule]['gap']:.2f} %")
        return ", ".join(words).replace("nan %", "unfinished")

    @property
    def outcome(self) -> list[str]:
        """How training has come out, a line each: the best agent, and whether it beats the rules."""
        lines = [describe_best(self.evaluations, self.folder), describe(self.comparisons)]
        if self.stopped:
            lines.append(
                f"stopped by its hook after {self.evaluations.last_timesteps:,} of "
                f"{self._total_timesteps:,} timesteps; a resume goes on"
            )
        return [line for line in lines if line]

    def _on_training_start(self) -> None:
        make_folder(self.folder)
        (self.folder / SUMMARY).unlink(missing_ok=True)  # the run goes on: it is of an earlier end
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
        return not self.stopped

    def _on_rollout_end(self) -> None:
        actions = self.locals["rollout_buffer"].actions.astype(np.int64).ravel()
        self._charts.log_rollout(actions, self._ended)
        self._ended.clear()

    def _on_training_end(self) -> None:
        if self.evaluations.last_timesteps < self.num_timesteps and not self.stopped:
            self._evaluate(last=True)
        self._export("final")
        self._conclude()
        self._charts.close()
        if self._raised is not None:
            raise self._raised

    @property
    def _ppo(self) -> OnPolicyAlgorithm:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise ServegymError(f"only PPO and MaskablePPO, not {type(self.model).__name__}")
        return self.model

    @property
    def _charts(self) -> Charts:
        assert self._opened is not None, "training has not started"
        return self._opened

    def _export(self, name: str) -> None:
        export_agent(self._ppo, self.task, self.command, self.folder / name, self.plan)

    def _evaluate(self, last: bool = False) -> None:
        """Play the validation cases; keep the row and the best agent, log and draw; ask the hook."""
        started_s = perf_counter()
        wall_s = started_s - self._began_s
        result, measured = measure(policy_network(self._ppo), self.validation)
        row = measured | {
            "timesteps": self.num_timesteps,
            "wall_s": wall_s,
            "training_s": wall_s - self._evaluating_s,
        }
        if self.evaluations.would_be_best(row):
            self._export("agent")
        self.evaluations.add(row)
        self._charts.log_evaluation(result, row, self._ppo)
        self._ask(row, last)
        self._evaluating_s += perf_counter() - started_s

    def _ask(self, row: Mapping[str, float], last: bool) -> None:
        """Call the hook; note whether training is to stop."""
        if self.on_evaluation is None:
            return
        best = self.best
        evaluation = Evaluation(
            number=len(self.evaluations.rows) - 1,
            timesteps=self.num_timesteps,
            total_timesteps=self._total_timesteps,
            gap_percent=row["gap_percent"],
            gap_percent_sem=row["gap_percent_sem"],
            mean_reward=row["mean_reward"],
            cases=int(row["cases"]),
            unfinished=int(row["unfinished"]),
            best_gap_percent=float("nan") if best is None else float(best["gap_percent"]),
            since_best=self.evaluations.since_best,
            references={
                name: 100.0 * values["gap"]
                for name, values in self.references.items()
                if "gap" in values
            },
            last=last,
        )
        try:
            stop = says_stop(self.on_evaluation(evaluation))
        except Exception as error:
            self._raised, stop = error, True
        self.stopped = stop and not last

    @property
    def _total_timesteps(self) -> int:
        return int(self.locals.get("total_timesteps", self.num_timesteps))

    def _conclude(self) -> None:
        """Compare the best agent with the rules; write the summary."""
        best = self.best
        if best is not None and not best["unfinished"] and self.rule_gaps:
            # The agent in the folder may be of before a resume; it plays the same cases alike.
            played = self.validation.play(load_agent(self.folder / "agent").network.best)
            gaps = played.episodes["gap"].to_numpy(float)
            self.comparisons = compare(gaps, self.rule_gaps)
        state = {
            "timesteps": self.evaluations.last_timesteps,
            "total_timesteps": self._total_timesteps,
            "stopped_by_hook": self.stopped,
        }
        best_numbers = best_of(self.evaluations)
        write_summary(self.folder, state, best_numbers, self.comparisons, self.outcome)
