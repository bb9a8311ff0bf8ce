"""What TensorBoard shows of a search over whole episodes, beside the rules that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from servegym.agents.charts import References, log_means
from servegym.envs.pictures import draw_gantt, to_image
from servegym.envs.process.metrics import EpisodeLog


class SearchCharts:
    """Writes the tags that training by PPO has, so that both can be looked at side by side.

    Parameters
    ----------
    folder
        Gets the run's own events, and a run ``reference-<policy>`` for each reference.
    references
        Mean metrics of the policies to compare with, by policy name.
    purge_step
        In a resumed run TensorBoard hides what was logged from this step on; None: a new run.
    """

    def __init__(
        self, folder: Path, references: Mapping[str, Mapping[str, float]], purge_step: int | None
    ) -> None:
        self._own = SummaryWriter(str(folder), purge_step=purge_step)
        self._references = References(folder, references, purge_step)

    def log_generation(self, gap_percent: float, episodes: int) -> None:
        """Log the median gap of a generation's candidates after so many training episodes."""
        self._own.add_scalar("serving/train_gap", gap_percent, episodes)

    def log_evaluation(self, means: Mapping[str, float], episodes: int) -> None:
        """Log the mean metrics of the validation cases, and the references at the same step."""
        # What EvalCallback of stable-baselines3 logs: an episode's return is −100 · gap.
        self._own.add_scalar("eval/mean_reward", -100.0 * means["gap"], episodes)
        log_means(self._own, means, episodes)
        self._references.log(episodes)

    def log_schedule(
        self, log: EpisodeLog, clients: Sequence[int], title: str, episodes: int
    ) -> None:
        """Log the Gantt chart of an episode."""
        image = to_image(draw_gantt(log, clients, title))
        self._own.add_image("serving/gantt", image, episodes, dataformats="HWC")

    def close(self) -> None:
        """Close the files."""
        self._own.close()
        self._references.close()
