"""Results during training: serving metrics in TensorBoard, evaluations.csv, the best agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, Image, TensorBoardOutputFormat
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from servegym.agents.export import export_agent, policy_network
from servegym.agents.validation import Trace, Validation, ValidationResult
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.files import make_folder, write_file
from servegym.envs.pictures import draw_gantt, draw_values, to_image
from servegym.envs.playing.tables import Schema, read_rows
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.config import TaskConfig

CHARTED: Final = (
    "gap",
    "makespan_s",
    "client_utilization",
    "decode_utilization",
    "prefill_stages",
    "decode_rounds",
)
"""The metrics that have a chart of their own, ``serving/<name>``. ``serving/gap`` is in percent of the
lower bound (100 · gap), utilisations are shares in 0 … 1, times are seconds."""

EVALUATION_COLUMNS: Final = (
    "timesteps",
    "wall_s",
    "training_s",
    "cases",
    "gap_percent",
    "gap_percent_sem",
    *CHARTED[1:],
    "decisions",
    "decision_ms_p50",
    "decision_ms_p99",
    "gap_percent_sampled",
    "unfinished",
)
"""Columns of ``evaluations.csv``: means over the validation cases, with the gap's standard error.
``training_s`` is ``wall_s`` without the seconds that evaluations took. ``gap_percent`` is of the most
probable actions, as an exported agent plays; ``gap_percent_sampled`` of actions drawn as in training.
``unfinished`` counts the cases that were cut short; with any, there is no mean gap or makespan."""

_LATER_COLUMNS: Final = {"gap_percent_sampled": np.nan, "unfinished": 0}
"""Columns of the current version, with their values for a table of an earlier one."""

_TIMED_DECISIONS: Final = 200
_SAMPLING_SEED: Final = 0  # the same draws in every evaluation, so that only the agent changes
_NOT_TEXT: Final = ("stdout", "log", "json", "csv")


class ServingCallback(BaseCallback):
    """Watch PPO or MaskablePPO train on a task.

    Every ``every_timesteps``, at the start and at the end it plays the validation cases greedily, with
    the numpy network that would be exported, and logs ``serving/…`` with two figures (the first
    case's Gantt chart; the critic's estimates against the actual return to go). ``serving/gap_sampled``
    is of the same cases with actions drawn as in training, from a separate generator: where it is far
    below ``serving/gap``, the agent does not mostly take the most probable action yet. Between
    evaluations it logs ``serving/train_…``: means over the episodes that ended in a rollout (from
    ``info["serving"]``, the METRICS of the ended episode), and ``shares/…``, those of the actions.

    Where the task cuts episodes short (``process.max_decisions`` or ``max_seconds``), means in training
    are over those that finished, ``serving/train_unfinished`` and ``serving/unfinished`` are the shares
    of the others, and an evaluation with unfinished cases has no gap.

    References are separate runs beside the training run, with the same tags. TensorBoard draws equal
    tags of all runs below its log folder into one chart, so the lines are in the charts that open
    first, with a legend, and can be switched off. A custom-scalars layout would show them only on
    another page.

    The folder gets ``evaluations.csv``, the best agent so far in ``agent/`` (the fewest unfinished
    cases, then the smallest gap; not of the first evaluation, unless an expert was imitated before), the
    last one in ``final/`` and the references in ``tensorboard/reference-<policy>/``; the training run's own
    events should lie in ``tensorboard/``, too. The callback draws from no global generator and changes
    no weights, so the trained weights are those without the callback.

    Where ``model.num_timesteps`` is not 0 at the start, training was resumed: evaluations beyond that
    step are dropped from the table, the best so far is that of the rows kept, and the seconds go on
    from the last of them or, under ``train``, from the checkpoint.

    Parameters
    ----------
    task
        What the model is trained on.
    validation_seeds
        Seeds of the validation cases; apart from those of training and of held-out evaluation.
    every_timesteps
        Environment steps between two evaluations, rounded up to whole rollouts.
    references
        Mean metrics on the validation cases of policies to compare with, by policy name: keys as in
        METRICS, ``gap`` as a fraction.
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
        self.evaluations = pd.DataFrame(columns=list(EVALUATION_COLUMNS))
        self._actions = ("decode", *task.process.rules)
        self._ended: list[Mapping[str, float]] = []
        self._writers: dict[str, SummaryWriter] = {}
        self._began_s = 0.0  # perf_counter() when the run would have begun without interruption
        self._evaluating_s = 0.0

    @property
    def best(self) -> Mapping[Any, Any] | None:
        """The evaluation whose agent is in ``agent/``, a row of the table; None before there is any.

        An untrained network is never the best, however badly training goes.
        """
        best = None
        for row in self.evaluations.to_dict("records"):
            if self._may_be_best(row) and _is_better(row, best):
                best = row
        return best

    def _on_training_start(self) -> None:
        make_folder(self.folder)
        resumed = self.num_timesteps > 0
        if resumed:
            # A rollout that a callback stopped changed no weights: its evaluation is of this checkpoint.
            self.evaluations = _read_evaluations(
                self._table_path, self.num_timesteps + self._ppo.n_steps * self._ppo.n_envs - 1
            )
        last = self.evaluations.iloc[-1] if len(self.evaluations) else None
        wall_s = 0.0 if last is None else float(last["wall_s"])
        training_s = 0.0 if last is None else float(last["training_s"])
        # Only `train` passes the seconds of imitation and those from the last row to the checkpoint.
        untold_s = max(0.0, float(self.locals.get("training_s", 0.0)) - training_s)
        wall_s, training_s = wall_s + untold_s, training_s + untold_s
        self._began_s = perf_counter() - wall_s
        self._evaluating_s = wall_s - training_s
        next_step = max(self.num_timesteps, self._last_evaluated) + 1
        for policy in self.references:
            path = self.folder / "tensorboard" / f"reference-{policy}"
            self._writers[policy] = SummaryWriter(
                str(path), purge_step=next_step if resumed else None
            )
        if resumed:
            self._forget_events_from(next_step)
        self._log_hyperparameters()
        if last is None:
            self._evaluate()

    def _on_rollout_start(self) -> None:
        every = self.every_timesteps
        if self.num_timesteps // every > self._last_evaluated // every:
            self._evaluate()

    def _on_step(self) -> bool:
        if self.locals["dones"].any():
            self._ended += [info["serving"] for info in self.locals["infos"] if "serving" in info]
        return True

    def _on_rollout_end(self) -> None:
        taken = self.locals["rollout_buffer"].actions.astype(np.int64).ravel()
        shares = np.bincount(taken, minlength=len(self._actions)) / len(taken)
        for action, share in zip(self._actions, shares, strict=True):
            self.logger.record_mean(f"shares/train_{action}", float(share))
        if self._ended:
            ended = pd.DataFrame(self._ended)
            finished = ended[ended["unfinished_requests"] == 0]
            charts = _charts(_means(finished), "train_") if len(finished) else {}
            if self._may_cut_short:
                charts["serving/train_unfinished"] = 1.0 - len(finished) / len(ended)
            for tag, value in charts.items():
                self.logger.record_mean(tag, value)
            self._ended.clear()

    def _on_training_end(self) -> None:
        if self._last_evaluated < self.num_timesteps:
            self._evaluate()
        export_agent(self._ppo, self.task, self.command, self.folder / "final")
        for writer in self._writers.values():
            writer.close()

    @property
    def _ppo(self) -> OnPolicyAlgorithm:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise ServegymError(f"only PPO and MaskablePPO, not {type(self.model).__name__}")
        return self.model

    @property
    def _may_cut_short(self) -> bool:
        return self.task.process.max_decisions > 0 or self.task.process.max_seconds > 0

    def _may_be_best(self, row: Mapping[Any, Any]) -> bool:
        """Return whether anything was learned before an evaluation."""
        return row["timesteps"] > 0 or self.hyperparameters.get("imitation_rounds", 0) > 0

    @property
    def _table_path(self) -> Path:
        return self.folder / "evaluations.csv"

    @property
    def _last_evaluated(self) -> int:
        return int(self.evaluations["timesteps"].iloc[-1]) if len(self.evaluations) else -1

    def _evaluate(self) -> None:
        """Play the validation cases, log, draw, keep the row and the best agent."""
        started_s = perf_counter()
        wall_s = started_s - self._began_s
        training_s = wall_s - self._evaluating_s
        network = policy_network(self._ppo)
        result = self.validation.play(network.best)
        rng = np.random.default_rng(_SAMPLING_SEED)
        sampled = self.validation.play(partial(network.sampled, rng=rng))
        latency_ms = _latency_ms(network.best, result.trace)
        row = _row(result.episodes) | {
            "timesteps": self.num_timesteps,
            "wall_s": wall_s,
            "training_s": training_s,
            "decision_ms_p50": latency_ms[0],
            "decision_ms_p99": latency_ms[1],
            "gap_percent_sampled": 100.0 * _means(sampled.episodes)["gap"],
        }
        if self._may_be_best(row) and _is_better(row, self.best):
            export_agent(self._ppo, self.task, self.command, self.folder / "agent")
        rows = [*self.evaluations.to_dict("records"), row]
        self.evaluations = pd.DataFrame(rows, columns=list(EVALUATION_COLUMNS))
        write_file(self._table_path, self.evaluations.to_csv(index=False))
        self._log(result, row)
        self._evaluating_s += perf_counter() - started_s

    def _log(self, result: ValidationResult, row: Mapping[str, float]) -> None:
        charts = _charts(_means(result.episodes))
        if np.isfinite(row["gap_percent_sampled"]):
            charts["serving/gap_sampled"] = row["gap_percent_sampled"]
        if self._may_cut_short:
            charts["serving/unfinished"] = row["unfinished"] / row["cases"]
        for tag, value in charts.items():
            self.logger.record(tag, value)
        for action, share in zip(self._actions, result.action_shares, strict=True):
            self.logger.record(f"shares/{action}", float(share))
        for percentile in (50, 99):
            name = f"decision_ms_p{percentile}"
            self.logger.record(f"serving/{name}", row[name])
        for tag, image in self._draw(result).items():
            self.logger.record(tag, Image(image, "HWC"), exclude=_NOT_TEXT)
        self.logger.dump(self.num_timesteps)
        for policy, values in self.references.items():
            for tag, value in _charts(values).items():
                self._writers[policy].add_scalar(tag, value, self.num_timesteps)
            self._writers[policy].flush()

    def _draw(self, result: ValidationResult) -> dict[str, NDArray[np.uint8]]:
        trace, episode = result.trace, result.episodes.iloc[0]
        unfinished = int(episode["unfinished_requests"])
        outcome = (
            f"cut short with {unfinished} requests unfinished"
            if unfinished
            else f"{episode['makespan_s']:.1f} s, {100 * episode['gap']:.2f} % above the lower bound"
        )
        title = (
            f"seed {int(episode['seed'])} after {self.num_timesteps:,} steps: {outcome}, "
            f"{int(episode['prefill_stages'])} prefill stages"
        )
        gantt = draw_gantt(trace.records, self.task.cluster.clients, title)
        returns = _returns_to_go(trace.rewards, float(self._ppo.gamma))
        values = draw_values(trace.clock_s, self._value_estimates(trace), returns)
        return {"serving/gantt": to_image(gantt), "serving/value": to_image(values)}

    def _value_estimates(self, trace: Trace) -> NDArray[np.float64]:
        policy = self._ppo.policy
        with torch.no_grad():
            observations = torch.as_tensor(trace.observations, device=policy.device)
            return policy.predict_values(observations).cpu().numpy().ravel().astype(np.float64)

    def _log_hyperparameters(self) -> None:
        """Log the hyper-parameters once; TensorBoard shows the metrics' last values beside them."""
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in self.hyperparameters.items()
        }
        metrics = dict.fromkeys((f"serving/{name}" for name in CHARTED), 0.0)
        self.logger.record("hparams", HParam(plain, metrics), exclude=_NOT_TEXT)

    def _forget_events_from(self, step: int) -> None:
        """Make TensorBoard hide what the interrupted run logged beyond its last checkpoint."""
        restart = SessionLog(status=SessionLog.START)
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                file_writer: Any = output.writer.file_writer  # torch types it as None
                file_writer.add_event(Event(step=step, session_log=restart), step)


def _charts(metrics: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Return the charted metrics that have a value, by tag, in the units of the charts."""
    return {
        f"serving/{prefix}{name}": metrics[name] * (100.0 if name == "gap" else 1.0)
        for name in CHARTED
        if np.isfinite(metrics.get(name, np.nan))
    }


def _means(episodes: pd.DataFrame) -> dict[str, float]:
    # pandas would leave out NaN, that is the cases that were cut short.
    return {name: float(episodes[name].mean(skipna=False)) for name in METRICS}


def _row(episodes: pd.DataFrame) -> dict[str, float]:
    """Return what a row of ``evaluations.csv`` takes from the episodes."""
    means = _means(episodes)
    return {
        "cases": len(episodes),
        "gap_percent": 100.0 * means["gap"],
        "gap_percent_sem": 100.0 * _standard_error(episodes["gap"].to_numpy(float)),
        **{name: means[name] for name in (*CHARTED[1:], "decisions")},
        "unfinished": int((episodes["unfinished_requests"] > 0).sum()),
    }


def _is_better(row: Mapping[Any, Any], best: Mapping[Any, Any] | None) -> bool:
    """Return whether an evaluation beats the best of those before it."""
    if best is None or row["unfinished"] != best["unfinished"]:
        return best is None or row["unfinished"] < best["unfinished"]
    # Where neither has a gap, the later agent has been trained for longer.
    return not row["gap_percent"] >= best["gap_percent"]


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(stats.sem(values)) if len(values) > 1 else float("nan")


def _returns_to_go(rewards: NDArray[np.float64], discount: float) -> NDArray[np.float64]:
    """Return Σ_k discount^k · reward of each decision and those after it, shape (decisions,)."""
    returns = np.zeros(len(rewards))
    later = 0.0
    for k in range(len(rewards) - 1, -1, -1):
        later = rewards[k] + discount * later
        returns[k] = later
    return returns


def _latency_ms(best: Any, trace: Trace) -> tuple[float, float]:
    """Return the median and the 99th percentile of a single decision's milliseconds."""
    nanoseconds = []
    for k in range(_TIMED_DECISIONS):
        observation = trace.observations[k % len(trace.observations)]
        mask = trace.masks[k % len(trace.masks)]
        started = perf_counter_ns()
        best(observation, mask)
        nanoseconds.append(perf_counter_ns() - started)
    p50, p99 = np.percentile(nanoseconds, [50, 99]) / 1e6
    return float(p50), float(p99)


def _read_evaluations(path: Path, timesteps: int) -> pd.DataFrame:
    """Return the evaluations up to a step; the table may be of an earlier version."""
    whole = ("timesteps", "cases", "unfinished")
    schema = Schema(
        EVALUATION_COLUMNS,
        key=("timesteps",),
        whole=whole,
        optional=None,
        defaults=_LATER_COLUMNS,
        if_deleted="its evaluation is lost, for none is made again",
    )
    table = read_rows(path, schema, "begin a new run")
    return table[table["timesteps"] <= timesteps].reset_index(drop=True)
