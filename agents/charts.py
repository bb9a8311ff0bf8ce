"""What TensorBoard shows of a training run: metrics, shares of actions, figures, references."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from stable_baselines3.common.logger import HParam, Image, Logger, TensorBoardOutputFormat
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from servegym.agents.actions import charted
from servegym.agents.evaluations import CHARTED, means
from servegym.agents.validation import Trace, ValidationResult
from servegym.envs.pictures import draw_gantt, draw_values, to_image
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower

_NOT_TEXT: Final = ("stdout", "log", "json", "csv")


class References:
    """Writes the charts of the policies to compare with, each as a run of its own: ``reference-<policy>``.

    Parameters
    ----------
    folder
        Gets the runs.
    metrics
        Mean metrics, by policy name.
    purge_step
        In a resumed run TensorBoard hides what was logged from this step on; None: a new run.
    """

    def __init__(
        self, folder: Path, metrics: Mapping[str, Mapping[str, float]], purge_step: int | None
    ) -> None:
        self._metrics = metrics
        self._writers = {
            policy: SummaryWriter(str(folder / f"reference-{policy}"), purge_step=purge_step)
            for policy in metrics
        }

    def log(self, step: int) -> None:
        """Log what there is, at a step of the run that is compared."""
        for policy, writer in self._writers.items():
            log_means(writer, self._metrics[policy], step)

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


def log_means(writer: SummaryWriter, metrics: Mapping[str, float], step: int) -> None:
    """Write the charted metrics into a run, and to the disk."""
    lines = _charts(metrics)
    for tag, value in (lines | _first_page(lines)).items():
        writer.add_scalar(tag, value, step)
    writer.flush()


class Charts:
    """Writes the charts of a run through the model's logger, and those of references as runs beside it.

    Parameters
    ----------
    task
        What the model is trained on.
    logger
        The model's; it writes the training run's own events.
    references
        Mean metrics of the policies to compare with, by policy name.
    folder
        Gets a run ``reference-<policy>`` for each reference.
    purge_step
        In a resumed run TensorBoard hides what references logged from this step on; None: a new run.
    """

    def __init__(
        self,
        task: TaskConfig,
        logger: Logger,
        references: Mapping[str, Mapping[str, float]],
        folder: Path,
        purge_step: int | None,
    ) -> None:
        self.task = task
        self.logger = logger
        self._actions = tuple(map(charted, task.actions))
        self._references = References(folder, references, purge_step)
        if purge_step is not None:
            self._forget_events_from(purge_step)

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Log the hyper-parameters once; TensorBoard shows the metrics' last values beside them."""
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in hyperparameters.items()
        }
        metrics = dict.fromkeys((f"serving/{name}" for name in CHARTED), 0.0)
        self.logger.record("hparams", HParam(plain, metrics), exclude=_NOT_TEXT)

    def log_rollout(self, actions: NDArray[np.int64], ended: list[Mapping[str, float]]) -> None:
        """Log the shares of a rollout's actions and the means over the episodes that ended in it."""
        shares = np.bincount(actions, minlength=len(self._actions)) / len(actions)
        for action, share in zip(self._actions, shares, strict=True):
            self.logger.record_mean(f"shares/train_{action}", float(share))
        if not ended:
            return
        episodes = pd.DataFrame(ended)
        finished = episodes[episodes["unfinished_requests"] == 0]
        charts = _charts(means(finished), "train_") if len(finished) else {}
        if self._may_cut_short:
            charts["serving/train_unfinished"] = 1.0 - len(finished) / len(episodes)
        for tag, value in charts.items():
            self.logger.record_mean(tag, value)

    def log_evaluation(
        self, result: ValidationResult, row: Mapping[str, float], model: OnPolicyAlgorithm
    ) -> None:
        """Log an evaluation with its figures, and the references at the same step."""
        charts = _charts(means(result.episodes))
        if np.isfinite(row["gap_percent_sampled"]):
            charts["serving/gap_sampled"] = row["gap_percent_sampled"]
        if self._may_cut_short:
            charts["serving/unfinished"] = row["unfinished"] / row["cases"]
        for tag, value in (charts | _first_page(charts)).items():
            self.logger.record(tag, value)
        for action, share in zip(self._actions, result.action_shares, strict=True):
            self.logger.record(f"shares/{action}", float(share))
        for percentile in (50, 99):
            name = f"decision_ms_p{percentile}"
            self.logger.record(f"serving/{name}", row[name])
        # What EvalCallback of stable-baselines3 logs; its tools look for these names.
        for name in ("mean_reward", "mean_ep_length"):
            self.logger.record(f"eval/{name}", row[name])
        self.logger.record("time/total_timesteps", model.num_timesteps, exclude="tensorboard")
        drawn = self._draw(result, model) if self.logger.output_formats else {}  # for somebody
        for tag, image in drawn.items():
            self.logger.record(tag, Image(image, "HWC"), exclude=_NOT_TEXT)
        self.logger.dump(model.num_timesteps)
        self._references.log(model.num_timesteps)

    def close(self) -> None:
        """Close the references' runs."""
        self._references.close()

    @property
    def _may_cut_short(self) -> bool:
        return self.task.process.max_decisions > 0 or self.task.process.max_seconds > 0

    def _draw(
        self, result: ValidationResult, model: OnPolicyAlgorithm
    ) -> dict[str, NDArray[np.uint8]]:
        trace, episode = result.trace, result.episodes.iloc[0]
        unfinished = int(episode["unfinished_requests"])
        outcome = (
            f"cut short with {unfinished} requests unfinished"
            if unfinished
            else f"{episode['makespan_s']:.1f} s, {100 * episode['gap']:.2f} % above the lower bound"
        )
        title = (
            f"seed {int(episode['seed'])} after {model.num_timesteps:,} steps: {outcome}, "
            f"{int(episode['prefill_stages'])} prefill stages"
        )
        gantt = draw_gantt(
            trace.records,
            lower(self.task).layout.clients,
            title,
            chunked=self.task.cluster.chunk_tokens > 0,
        )
        returns = _returns_to_go(trace.rewards, float(model.gamma))
        values = draw_values(trace.clock_s, _value_estimates(trace, model), returns)
        return {"serving/gantt": to_image(gantt), "serving/value": to_image(values)}

    def _forget_events_from(self, step: int) -> None:
        """Make TensorBoard hide what the interrupted run logged beyond its last checkpoint."""
        restart = SessionLog(status=SessionLog.START)
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                file_writer: Any = output.writer.file_writer  # torch types it as None
                file_writer.add_event(Event(step=step, session_log=restart), step)


def _value_estimates(trace: Trace, model: OnPolicyAlgorithm) -> NDArray[np.float64]:
    policy = model.policy
    with torch.no_grad():
        observations = torch.as_tensor(trace.observations, device=policy.device)
        return policy.predict_values(observations).cpu().numpy().ravel().astype(np.float64)


def _charts(metrics: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Return the charted metrics that have a value, by tag; the gap in percent."""
    return {
        f"serving/{prefix}{name}": metrics[name] * (100.0 if name == "gap" else 1.0)
        for name in CHARTED
        if np.isfinite(metrics.get(name, np.nan))
    }


def _first_page(charts: Mapping[str, float]) -> dict[str, float]:
    """Return the gaps once more as ``eval/…``: TensorBoard opens the first two groups of tags only."""
    return {
        tag.replace("serving/", "eval/"): value
        for tag, value in charts.items()
        if tag in ("serving/gap", "serving/gap_sampled")
    }


def _returns_to_go(rewards: NDArray[np.float64], discount: float) -> NDArray[np.float64]:
    """Return each decision's sum of discounted rewards from it on, shape (decisions,)."""
    returns = np.zeros(len(rewards))
    later = 0.0
    for k in range(len(rewards) - 1, -1, -1):
        later = rewards[k] + discount * later
        returns[k] = later
    return returns
