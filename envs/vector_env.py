"""Many environments stepped in one compiled call, as a Gymnasium vector environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numba
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from servegym.envs.cases import Case, bound_case, load_case, make_task_state, sample_requests
from servegym.envs.config import TaskConfig
from servegym.envs.decision_process import begin_row, make_rows, step_rows, step_rows_in_parallel
from servegym.envs.errors import ServegymError
from servegym.envs.metrics import episode_metrics
from servegym.envs.serving_env import ServingEnv

MAX_ENVIRONMENTS = 1_000_000


class ServingVectorEnv(gym.vector.VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """``num_envs`` copies of :class:`ServingEnv` that step together.

    Row ``e`` is, bit for bit, what a single environment gives that is reset with seed + e and then
    reset without a seed whenever its episode ends. Autoreset is same-step: the observation of a row
    that ends is the first of its next episode; ``info["final_obs"]`` and ``info["final_info"]``
    hold the last one and the metrics.

    ## Arguments
    ``num_envs``; ``task`` and ``overrides`` as for :class:`ServingEnv`; ``threads``: numba threads
    that step rows side by side, 1 by default; ``copy``: False returns the same arrays at every step,
    overwritten by the next; ``reference``: returns some policy's gap in percent on a case. It is added to
    an episode's last reward, so that the return is what was gained on that policy. Which policy is best
    does not change, but the luck of a case, which both have, leaves the return.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        task: str | TaskConfig = "servegym/GSM8K-v0",
        overrides: Mapping[str, Any] | None = None,
        threads: int = 1,
        copy: bool = True,
        reference: Callable[[Case], float] | None = None,
    ) -> None:
        if not 1 <= num_envs <= MAX_ENVIRONMENTS:
            raise ServegymError(f"num_envs must lie in 1 … {MAX_ENVIRONMENTS}, got {num_envs}")
        if not 1 <= threads <= numba.config.NUMBA_NUM_THREADS:
            raise ServegymError(
                f"threads must lie in 1 … {numba.config.NUMBA_NUM_THREADS}, got {threads}"
            )
        single = ServingEnv(task, overrides)
        if reference is not None and single.task.process.reward != "gap":
            raise ServegymError(
                f"a reference needs process.reward 'gap', got {single.task.process.reward!r}"
            )
        self.num_envs = num_envs
        self.task = single.task
        self.costs = single.costs
        self.settings = single.settings
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(single.observation_space, num_envs)
        self.action_space = batch_space(single.action_space, num_envs)
        self.rows = make_rows(num_envs, 1 + len(self.task.process.rules))
        self.reference = reference
        self.reference_gaps = np.zeros(num_envs)  # percent, of the cases that are being played
        self._threads = threads
        self._copy = copy
        self._rngs = [seeding.np_random(None)[0] for _ in range(num_envs)]
        requests = len(sample_requests(self.task, np.random.default_rng(0)))
        self.state = make_task_state(self.task, num_envs, requests)
        self._started = False

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start a new episode in every row; row e takes ``seed`` + e, or ``seed[e]``."""
        if options:
            raise ServegymError(f"the vector environment takes no reset options, got {options}")
        seeds = seed if isinstance(seed, Sequence) else self._spread(seed)
        if len(seeds) != self.num_envs:
            raise ServegymError(
                f"{self.num_envs} environments need as many seeds, got {len(seeds)}"
            )
        for e, own in enumerate(seeds):
            if own is not None:
                self._rngs[e] = seeding.np_random(own)[0]
            self._begin_episode(e)
        self._started = True
        return self._observations(), {"lower_bound_s": self.state.episodes["bound_s"].copy()}

    def step(
        self, actions: ArrayLike
    ) -> tuple[
        NDArray[np.float32],
        NDArray[np.float64],
        NDArray[np.bool_],
        NDArray[np.bool_],
        dict[str, Any],
    ]:
        """Step every row; rows that end begin their next episode at once."""
        self._advance(self._checked(actions))
        rows = self.rows
        ended = np.flatnonzero(rows.terminated | rows.truncated)
        # What would have followed on an episode that was cut short holds its reference's gap already.
        rows.rewards[rows.terminated] += self.reference_gaps[rows.terminated]
        infos: dict[str, Any] = {"illegal_action": rows.illegal.copy()}
        if len(ended):
            infos = self._begin_next(ended, infos)
        rewards, terminated, truncated = rows.rewards, rows.terminated, rows.truncated
        if self._copy:
            rewards, terminated, truncated = rewards.copy(), terminated.copy(), truncated.copy()
        return self._observations(), rewards, terminated, truncated, infos

    def action_masks(self) -> NDArray[np.bool_]:
        """Return which actions are legal now, shape (num_envs, actions)."""
        return self.rows.masks.copy() if self._copy else self.rows.masks

    def _advance(self, actions: NDArray[np.int64]) -> None:
        if self._threads == 1:
            step_rows(self.state, self.costs, self.settings, self.rows, actions)
        else:
            numba.set_num_threads(self._threads)
            step_rows_in_parallel(self.state, self.costs, self.settings, self.rows, actions)

    def _checked(self, actions: ArrayLike) -> NDArray[np.int64]:
        if not self._started:
            raise ServegymError("call reset() before step()")
        chosen = np.ascontiguousarray(actions, dtype=np.int64)
        if chosen.shape != (self.num_envs,):
            raise ServegymError(f"actions must have shape ({self.num_envs},), got {chosen.shape}")
        most = self.rows.masks.shape[1] - 1
        if chosen.min() < 0 or chosen.max() > most:
            raise ServegymError(
                f"actions must lie in 0 … {most}, got {chosen.min()} … {chosen.max()}"
            )
        return chosen

    def _begin_episode(self, e: int) -> None:
        requests = sample_requests(self.task, self._rngs[e])
        case = bound_case(self.task, self.costs, requests)
        load_case(self.task, self.state, e, case)
        if self.reference is not None:
            self.reference_gaps[e] = self.reference(case)
        begin_row(self.state, self.costs, self.settings, self.rows, e)

    def _begin_next(self, ended: NDArray[np.intp], infos: dict[str, Any]) -> dict[str, Any]:
        """Keep what the ended rows leave behind, in Gymnasium's form, and begin their next episode."""
        last: dict[str, Any] = {}
        for e in ended:
            last = self._add_info(last, episode_metrics(self.state, int(e)), int(e))
        final = np.full(self.num_envs, None, dtype=object)
        for e in ended:
            final[e] = self.rows.observations[e].copy()
            self._begin_episode(int(e))
        marked = np.zeros(self.num_envs, np.bool_)
        marked[ended] = True
        return infos | {
            "final_obs": final,
            "_final_obs": marked,
            "final_info": last,
            "_final_info": marked.copy(),
        }

    def _observations(self) -> NDArray[np.float32]:
        return self.rows.observations.copy() if self._copy else self.rows.observations

    def _spread(self, seed: int | None) -> list[int | None]:
        return [None if seed is None else seed + e for e in range(self.num_envs)]
