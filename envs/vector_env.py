"""Many environments stepped in one compiled call, as a Gymnasium vector environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import gymnasium as gym
import numba
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from servegym.envs.arguments import as_array, whole_number
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.process.metrics import episode_metrics, records
from servegym.envs.process.steps import begin_row, make_rows, step_rows, step_rows_in_parallel
from servegym.envs.serving_env import ServingEnv, check_plan
from servegym.envs.task.cases import Case, PlanCase, room_for, sample_requests
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import bound_case, load_case, make_task_state

MAX_ENVIRONMENTS = 1_000_000
_EVERY_INFO = ("_lower_bound_s", "_replica", "_illegal_action")


class ServingVectorEnv(gym.vector.VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """``num_envs`` copies of :class:`ServingEnv` that step together.

    Row ``e`` is, bit for bit, what a single environment gives that is reset with seed + e and then
    reset without a seed whenever its episode ends. ``autoreset_mode`` says when, as in Gymnasium's
    ``SyncVectorEnv``; observations, rewards, flags and infos are those of that class:

    | ``autoreset_mode`` | after a row's episode has ended |
    |---|---|
    | ``SAME_STEP`` (default) | its next begins at once |
    | ``NEXT_STEP`` | the next step begins it; that step's action does not count, its reward is 0 |
    | ``DISABLED`` | ``reset(options={"reset_mask": …})`` begins it; a step before is refused |

    In same-step the observation is the first of the next episode; ``infos["final_obs"]`` and
    ``infos["final_info"]`` hold the last one and the info of the step that ended the row, with the metrics.
    In the other modes the metrics stand in ``infos`` itself. The ``infos`` of every reset and every step hold
    ``lower_bound_s``, ``replica`` and ``illegal_action``, of shape (num_envs,), as those of single
    environments do.

    ## Arguments
    ``num_envs``; ``task``, ``overrides`` and ``render_mode`` as for :class:`ServingEnv`; ``threads``:
    numba threads that step rows side by side, 1 by default; ``copy``: False returns the same arrays at
    every step, overwritten by the next; ``autoreset_mode``: an ``AutoresetMode`` of
    ``gymnasium.vector`` or its value, as ``"NextStep"``; ``max_episode_steps``: truncates an episode
    after so many steps, as ``gymnasium.make`` does; None or −1: never.

    ## Cases
    ``on_case``, an attribute: a function that is called with the row and the :class:`Case` of every
    episode that begins; None at first. The environment keeps no case. ``plan_case``, an attribute: a
    function that is called with the case before and returns the :class:`Plan` that its clients' queues
    follow, or None for the greedy longest-first plan, which all have at first.

    Examples
    --------
    >>> env = ServingVectorEnv(4, "Tiny-v0")
    >>> observations, infos = env.reset(seed=0)
    >>> actions = env.action_masks().argmax(axis=1)
    >>> env.step(actions)[1].shape
    (4,)
    """

    metadata: dict[str, Any] = ServingEnv.metadata | {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        task: str | os.PathLike[str] | TaskConfig = "servegym/GSM8K-v0",
        overrides: Mapping[str, Any] | None = None,
        threads: int = 1,
        copy: bool = True,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = whole_number("num_envs", num_envs, 1, MAX_ENVIRONMENTS)
        self._threads = whole_number("threads", threads, 1, numba.config.NUMBA_NUM_THREADS)
        self.max_episode_steps = _step_limit(max_episode_steps)  # 0: no limit
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}
        single = ServingEnv(task, overrides, render_mode)
        self.task = single.task
        self.costs = single.costs
        self.settings = single.settings
        self.machine = single.machine
        self.render_mode = render_mode
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(single.observation_space, self.num_envs)
        self.action_space = batch_space(single.action_space, self.num_envs)
        self.rows = make_rows(self.num_envs, len(self.task.actions), len(self.features))
        self.final_masks = np.zeros_like(self.rows.masks)  # where rows ended last, in same-step
        self.on_case: Callable[[int, Case], object] | None = None
        self.plan_case: PlanCase | None = None
        self.steps = np.zeros(self.num_envs, np.int64)  # of the episodes that are being played
        self._over = np.zeros(self.num_envs, np.bool_)  # rows that wait for their reset
        self._every_row = np.ones(self.num_envs, np.bool_)
        self._first_replica = np.zeros(self.num_envs, np.int64)
        for shared in (self._every_row, self._first_replica):  # in the infos of all steps
            shared.setflags(write=False)
        self._copy = copy
        self.rngs = [seeding.np_random(None)[0] for _ in range(self.num_envs)]  # of the rows
        sample_requests(
            self.task, np.random.default_rng(0)
        )  # refuse a workload that cannot be played
        self.state = make_task_state(self.task, self.num_envs, room_for(self.task))
        self._started = False

    def reset(
        self,
        *,
        seed: SupportsIndex | Sequence[SupportsIndex | None] | NDArray[np.integer] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start a new episode in every row; row e takes ``seed`` + e, or ``seed[e]``.

        ``options={"reset_mask": …}``, booleans of shape (num_envs,), resets only the rows that it marks.
        """
        seeds, chosen = self._seeds(seed), self._reset_mask(options)
        for e, row_seed in enumerate(seeds):
            if chosen[e]:
                if row_seed is not None:
                    self.rngs[e] = seeding.np_random(row_seed)[0]
                self._begin_episode(e)
        self._started = True
        infos = {
            "lower_bound_s": np.where(chosen, self._of_episodes("bound_s"), 0.0),
            "replica": np.where(chosen, self.replicas(), 0),
            "illegal_action": np.zeros(self.num_envs, np.bool_),
        }
        return self._observations(), infos | {f"_{name}": chosen.copy() for name in infos}

    def step(
        self, actions: ArrayLike
    ) -> tuple[
        NDArray[np.float32],
        NDArray[np.float64],
        NDArray[np.bool_],
        NDArray[np.bool_],
        dict[str, Any],
    ]:
        """Step every row; ``autoreset_mode`` says what follows on the end of an episode."""
        self._advance(self._checked(actions))
        rows, same_step = self.rows, self.autoreset_mode == AutoresetMode.SAME_STEP
        infos: dict[str, Any] = {}
        if self.max_episode_steps:
            self.steps += 1
        if not same_step and self._over.any():  # their step changed nothing that is returned
            self._begin_instead_of_step(self._over.copy())
        if self.max_episode_steps:
            rows.truncated[self.steps >= self.max_episode_steps] = True
        over = rows.terminated | rows.truncated
        illegal = rows.illegal.copy()
        if not same_step:
            self._over = over
        if np.count_nonzero(over):  # in a quarter of the time of any()
            if same_step:
                infos = self._begin_next(over)
                illegal[over] = False  # of the resets
            else:
                for e in np.flatnonzero(over):
                    infos = self._add_info(infos, episode_metrics(self.state, int(e)), int(e))
        infos["lower_bound_s"] = self._of_episodes("bound_s").copy()
        infos["replica"], infos["illegal_action"] = self.replicas(), illegal
        for name in _EVERY_INFO:
            infos[name] = self._every_row
        rewards, terminated, truncated = rows.rewards, rows.terminated, rows.truncated
        if self._copy:
            rewards, terminated, truncated = rewards.copy(), terminated.copy(), truncated.copy()
        return self._observations(), rewards, terminated, truncated, infos

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """Draw every row's clients over time so far as RGB images, each (height, width, 3)."""
        if self.render_mode is None:
            gym.logger.warn("render() needs render_mode='rgb_array'")
            return None
        if not self._started:
            raise ServegymError("call reset() first")
        from servegym.envs.pictures import draw_gantt, to_image

        layout, name = self.machine.layout, self.task.name
        chunked = layout.chunk_tokens > 0
        logs = [records(self.state, e) for e in range(self.num_envs)]
        return tuple(
            to_image(draw_gantt(log, layout.clients, name, chunked=chunked)) for log in logs
        )

    def action_masks(self) -> NDArray[np.bool_]:
        """Return which actions are legal now, shape (num_envs, actions)."""
        return self.rows.masks.copy() if self._copy else self.rows.masks

    def replicas(self) -> NDArray[np.int64]:
        """Return the replica that each row's observation is of: whose turn it is, the first one at the end.

        Shape (num_envs,); read-only where there is one replica.
        """
        replicas = len(self.machine.layout.clients)
        if replicas == 1:
            return self._first_replica
        return self._of_episodes("turn") % replicas  # at the end it is ``replicas``

    @property
    def features(self) -> tuple[str, ...]:
        """What each entry of an observation means."""
        return self.machine.features

    def _advance(self, actions: NDArray[np.int64]) -> None:
        if self._threads == 1:
            step_rows(self.state, self.costs, self.settings, self.rows, actions)
        else:
            numba.set_num_threads(self._threads)
            step_rows_in_parallel(self.state, self.costs, self.settings, self.rows, actions)

    def _checked(self, actions: ArrayLike) -> NDArray[np.int64]:
        if not self._started:
            raise ServegymError("call reset() before step()")
        if self.autoreset_mode == AutoresetMode.DISABLED and self._over.any():
            rows = ", ".join(map(str, np.flatnonzero(self._over)))
            raise ServegymError(
                f"the episodes of rows {rows} are over; call reset(options={{'reset_mask': …}}) "
                "before step()"
            )
        given = as_array(actions)
        if given.dtype.kind not in "iu":
            raise ServegymError(f"actions must be whole numbers, got {shown(actions)}")
        if given.shape != (self.num_envs,):
            raise ServegymError(f"actions must have shape ({self.num_envs},), got {given.shape}")
        chosen = np.ascontiguousarray(given, dtype=np.int64)
        most = self.rows.masks.shape[1] - 1
        if np.maximum.reduce(chosen.view(np.uint64)) > most:  # as such, negative numbers are huge
            raise ServegymError(
                f"actions must lie in 0 … {most}, got {given.min()} … {given.max()}"
            )
        return chosen

    def _begin_episode(self, e: int) -> None:
        requests = sample_requests(self.task, self.rngs[e])
        case = bound_case(self.machine, requests)
        plan = None if self.plan_case is None else self.plan_case(case)
        check_plan(plan, requests, self.machine.clients)
        load_case(self.task, self.state, e, case, plan)
        begin_row(self.state, self.costs, self.settings, self.rows, e)
        self.steps[e], self._over[e] = 0, False
        if self.on_case is not None:
            self.on_case(e, case)

    def _begin_next(self, over: NDArray[np.bool_]) -> dict[str, Any]:
        """Begin the next episodes of the ended rows; return their final infos, in Gymnasium's form."""
        last: dict[str, Any] = {}
        replicas = self.replicas()
        final = np.full(self.num_envs, None, dtype=object)
        for e in np.flatnonzero(over):
            told = {"replica": int(replicas[e]), "illegal_action": bool(self.rows.illegal[e])}
            last = self._add_info(last, told | episode_metrics(self.state, int(e)), int(e))
            final[e] = self.rows.observations[e].copy()
            self.final_masks[e] = self.rows.masks[e]
            self._begin_episode(int(e))
        return {
            "final_obs": final,
            "_final_obs": over,
            "final_info": last,
            "_final_info": over.copy(),
        }

    def _begin_instead_of_step(self, waiting: NDArray[np.bool_]) -> None:
        """Begin the next episodes of rows that ended at the step before."""
        rows = self.rows
        for e in np.flatnonzero(waiting):
            self._begin_episode(int(e))
        rows.rewards[waiting] = 0.0
        for flags in (rows.terminated, rows.truncated, rows.illegal):
            flags[waiting] = False

    def _of_episodes(self, name: str) -> NDArray[Any]:
        """Return a field of all rows' episodes; a record array takes four times as long."""
        return np.asarray(self.state.episodes)[name]

    def _observations(self) -> NDArray[np.float32]:
        return self.rows.observations.copy() if self._copy else self.rows.observations

    def _seeds(self, seed: Any) -> Sequence[int | None]:
        """Return each row's seed, None for a row that goes on with its own generator."""
        if seed is None:
            return [None] * self.num_envs
        listed = isinstance(seed, Sequence) and not isinstance(seed, str | bytes)
        if listed or (isinstance(seed, np.ndarray) and seed.ndim):
            if len(seed) != self.num_envs:
                raise ServegymError(
                    f"{self.num_envs} environments need as many seeds, got {len(seed)}"
                )
            return [None if value is None else whole_number("seed", value, 0) for value in seed]
        first = whole_number("seed", seed, 0)
        return range(first, first + self.num_envs)

    def _reset_mask(self, options: Any) -> NDArray[np.bool_]:
        """Return which rows a reset is for."""
        everyone = np.ones(self.num_envs, np.bool_)
        if options is None:
            return everyone
        if not (isinstance(options, Mapping) and options.keys() <= {"reset_mask"}):
            raise ServegymError(
                "the vector environment takes no reset options but {'reset_mask': …}, "
                f"got {shown(options)}"
            )
        if "reset_mask" not in options:
            return everyone
        mask = as_array(options["reset_mask"])
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,) or not mask.any():
            raise ServegymError(
                f"reset_mask must hold {self.num_envs} booleans, at least one of them True, "
                f"got {shown(options['reset_mask'])}"
            )
        if not (self._started or mask.all()):
            raise ServegymError("call reset() for all rows before you reset some")
        return mask


def _step_limit(max_episode_steps: int | None) -> int:
    """Return after how many steps an episode is truncated, 0: never."""
    if max_episode_steps is None:
        return 0
    limit = whole_number("max_episode_steps", max_episode_steps, -1)
    if limit == 0:
        raise ServegymError("max_episode_steps must be ≥ 1, or -1 for no limit, got 0")
    return max(limit, 0)


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError:
        raise unknown("autoreset_mode", mode, [each.value for each in AutoresetMode]) from None
