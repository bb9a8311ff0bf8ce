"""``ServingEnv``: LLM-inference scheduling as a Gymnasium environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, Final, SupportsFloat, SupportsIndex

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from servegym.envs.arguments import plain, whole_number
from servegym.envs.bounds.batch import LowerBound
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.process.metrics import EpisodeLog, episode_metrics, records
from servegym.envs.process.steps import begin_row, make_rows, step_row
from servegym.envs.simulator.imagination import imagine_row
from servegym.envs.simulator.outlook import Outlook, outlook
from servegym.envs.simulator.state import State, make_alike
from servegym.envs.simulator.view import DecisionView, deciding, view
from servegym.envs.task.cases import Case, inform, sample_requests
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.lowering import bound_case, load_case, lower, make_task_state
from servegym.envs.task.registered import load_task
from servegym.envs.workload.plan import Plan
from servegym.envs.workload.requests import Requests
from servegym.envs.workload.sources import check_readable

_RESET_OPTIONS: Final = {"requests": Requests, "plan": Plan, "bound": LowerBound}


class ServingEnv(gym.Env[NDArray[np.float32], np.int64]):
    """Serve all requests of an episode as fast as possible on a model of a GPU cluster.

    ## Description
    One replica of a large language model serves requests on J clients (concurrency slots). Whenever
    a client is idle and a request waits, a scheduler chooses: stop everyone for a *prefill* stage
    that admits waiting requests (every decoding client stalls), or go on with *decode* rounds (every
    active client emits one token, the idle ones nothing). Between decision points the simulator
    fast-forwards. This is the problem of arXiv 2502.15763; CONTRIBUTING.md has the exact semantics.

    ## Action space
    ``Discrete(1 + number of rules)``; the default rules:

    | action | what |
    |---|---|
    | 0 | decode until the choice changes: a client finishes or a request arrives |
    | 1 | prefill, ``plan``: each idle client takes the head of its own planned queue |
    | 2 | prefill, ``steal``: own queue, else the longest request of the client with most work |
    | 3 | prefill, ``longest``: longest waiting requests first |
    | 4 | prefill, ``shortest`` |
    | 5 | prefill, ``fcfs``: in order of arrival |
    | 6 | prefill, ``aligned``: requests that finish together with running ones |

    ``action_masks()`` tells which are legal; at least one always is. An illegal action is replaced by
    the first legal one, and ``info["illegal_action"]`` says whether it was.

    ## Observation space
    ``Box(0, 1, (65,), float32)``, already scaled and independent of J: the block ``replica`` of the
    replica whose turn it is. A log-scaled x reads log₂(1 + x), straight between powers of two, over 14
    (rounds) or 8 (queue), at most 1.

    | entry | what |
    |---|---|
    | 0 | active clients / clients |
    | 1 | clients a stage could fill now / clients |
    | 2 | waiting / arrived |
    | 3 | waiting per client, log-scaled |
    | 4 | finished / arrived |
    | 5 | cached tokens' share of the next decode round's seconds |
    | 6 | expected rounds waiting / rounds of all arrived |
    | 7 | expected rounds running / rounds of all arrived |
    | 8 | stage seconds / (stage + seconds until the next finish) |
    | 9 | idle time waited against the fixed cost of a stage, a / (a + b) |
    | 10 | idle time until the next finish against the fixed cost of a stage, a / (a + b) |
    | 11 | both idle times against the whole cost of a stage, a / (a + b) |
    | 12 | fixed share of a stage that fills the idle clients |
    | 13 | stage seconds / (stage + decode round seconds) |
    | 14 | longest waiting, log-scaled rounds |
    | 15 | median waiting, log-scaled rounds |
    | 16 | shortest waiting, log-scaled rounds |
    | 17 … 26 | rounds until a share of the clients is done, log-scaled |
    | 27 … 40 | running requests / clients, by rounds left |
    | 41 … 54 | waiting requests / waiting, by expected rounds |
    | 55 … 59 | idle clients / clients once the idle time from now on costs ¼ … 4 stages |
    | 60 … 64 | rounds until then, log-scaled |

    The shares are 0%, 1%, 2%, 5%, 10%, 20%, 35%, 50%, 75%, 100%; 0% is the next finish.
    Idle time is held against ¼, ½, 1, 2 and 4 times the fixed cost of a stage.
    The histograms' buckets begin at 0, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048 rounds.
    ``features`` names every entry.

    ``process.observe`` names the blocks that a task observes, any of the four; they stand in the order
    ``replica``, ``memory``, ``cluster``, ``latency``. Entries of the block ``memory``, where memory that is
    not limited reads 0, 0, 1, 1 and then 0, and a task without mixed stages 0 in the last four:

    | entry | what |
    |---|---|
    | 0 | memory is limited, 0 or 1 |
    | 1 | blocks in use / blocks |
    | 2 | blocks free beyond the watermark / blocks |
    | 3 | rounds until memory is full, log-scaled |
    | 4 | rounds until the next finish against rounds until memory is full, a / (a + b) |
    | 5 | blocks of the next decode round against free blocks, a / (a + b) |
    | 6 | tokens of the decoding at their finishes against memory, a / (a + b) |
    | 7 | blocks that waiting prefills want against all blocks, a / (a + b) |
    | 8 | blocks that waiting prefills want against free blocks, a / (a + b) |
    | 9 | mean blocks of a waiting prefill / blocks |
    | 10 | preemptions here against finished requests per replica, a / (a + b) |
    | 11 | half-computed prompt's share left |
    | 12 | tokens left of the half-computed prompt against the chunk budget left, a / (a + b) |
    | 13 | chunk budget that the decoding leave / chunk budget |
    | 14 | tokens of waiting prefills against the chunk budget left, a / (a + b) |

    Entries of the block ``cluster``. Other replicas are as a router sees them that looks now. With one
    replica comparisons read ½, and entries 10 … 16 read 0. In a pool all replicas have the same queue:

    | entry | what |
    |---|---|
    | 0 | 1 / replicas |
    | 1 | waiting here against the mean of all replicas, a / (a + b) |
    | 2 | waiting here against the most elsewhere, a / (a + b) |
    | 3 | running here against the mean of all replicas, a / (a + b) |
    | 4 | expected tokens to compute here against the mean of all replicas, a / (a + b) |
    | 5 | expected tokens to compute here against the most elsewhere, a / (a + b) |
    | 6 | free share of memory here against the mean of all replicas, a / (a + b) |
    | 7 | blocks in use or wanted here against the mean of all replicas, a / (a + b) |
    | 8 | clients here against the mean of all replicas, a / (a + b) |
    | 9 | mean seconds of a token, all clients busy, against those here, a / (a + b) |
    | 10 | replicas without a request / other replicas |
    | 11 | replicas in a prefill or mixed stage / other replicas |
    | 12 | idle clients elsewhere / clients elsewhere |
    | 13 | waiting elsewhere / waiting |
    | 14 | waiting elsewhere per client there, log-scaled |
    | 15 | waiting elsewhere against idle clients here, a / (a + b) |
    | 16 | mean seconds until a round or stage elsewhere ends against a round here, a / (a + b) |
    | 17 | idle clients here that no request waits or comes for / clients, where replicas may steal |
    | 18 | requests on the way here / clients |
    | 19 | seconds to copy a cached request of mean length against prefilling it again, a / (a + b) |

    Entries of the block ``latency``. Those of a limit that ``[slo]`` lacks read 0, as do shares of nobody;
    the last reads 1 until a request has finished. A request without a second token has no time per token:

    | entry | what |
    |---|---|
    | 0 | the first token has a limit, 0 or 1 |
    | 1 | the time per token has a limit, 0 or 1 |
    | 2 | age of the oldest that waits for its first token against the limit, a / (a + b) |
    | 3 | waiting for their first token for less than ¼ of the limit / waiting |
    | 4 | waiting for their first token for ¼ of the limit or more / waiting, less than ½ |
    | 5 | waiting for their first token for ½ of the limit or more / waiting, less than ¾ |
    | 6 | waiting for their first token for ¾ of the limit or more / waiting, not beyond it |
    | 7 | waiting for their first token beyond the limit / waiting |
    | 8 | waiting again after their first token / waiting |
    | 9 | seconds of a stage that fills the idle clients against the first token's limit, a / (a + b) |
    | 10 | running above the limit per token so far / clients |
    | 11 | running within a fifth below the limit per token so far / clients |
    | 12 | mean seconds per token so far of the running against the limit, a / (a + b) |
    | 13 | seconds of a round against the limit per token, a / (a + b) |
    | 14 | finished within the limits / finished |

    Rounds to a finish are expected ones: true where ``information.output_lengths`` is "known", else
    by the prediction, revised when a request outlives it. No entry depends on a true length before a
    finish reveals it. Rewards, ``info`` and ``records()`` do: they are not for schedulers to read.

    ## Reward
    ``gap`` (default): the return of an episode is exactly −100 · (makespan / lower bound − 1); each
    step's reward is what it lost, in percent of the bound. ``latency``: the return is minus the mean
    latency in seconds, over all requests; one that is rejected counts 0, one that is shed until then.
    ``goodput``: the return is exactly the number of requests that finished within the limits of ``[slo]``.
    The natural discount is 1. An episode that is truncated, or sheds requests, has no gap: its return is
    minus what was lost.

    ## Start and end
    Every ``info``, of a reset and of a step, holds ``lower_bound_s``; ``replica``, the number of the replica
    that the observation is of: whose turn it is, 0 at the end; and ``illegal_action``.
    ``reset(seed=…)`` samples the task's workload; ``options`` may hold ``requests`` (a
    :class:`Requests`), its ``bound`` where that is already known, and ``plan`` (a :class:`Plan` of
    the requests present at t = 0; without it the greedy longest-first plan is used). Terminated when
    all requests have finished; truncated at ``process.max_decisions`` or ``process.max_seconds``.
    The last ``info`` holds every metric (``servegym.envs.process.metrics.METRICS``), also where
    ``gymnasium.make(…, max_episode_steps=…)`` or a ``TimeLimit`` cuts the episode; ``makespan_s`` and
    ``gap`` are NaN where requests are left, ``gap`` also where some were shed. :meth:`metrics` returns the
    metrics at any time.

    ## Arguments
    ``task``: a registered id, a TOML file or a :class:`TaskConfig`; ``overrides``: keys to replace,
    as ``{"cluster": {"clients": 50}}``; ``render_mode``: ``"rgb_array"`` draws the clients over time
    (needs matplotlib). A workload file is read when the environment is made.

    ## Version history
    * v0: initial version.

    Examples
    --------
    >>> env = ServingEnv("Tiny-v0")
    >>> observation, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step(env.action_masks().argmax())
    >>> observation.shape, bool(reward <= 0)
    ((65,), True)
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        task: str | os.PathLike[str] | TaskConfig = "servegym/GSM8K-v0",
        overrides: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        if not (render_mode is None or plain(render_mode) in self.metadata["render_modes"]):
            raise ServegymError(
                f"render_mode must be None or 'rgb_array', got {shown(render_mode)}"
            )
        self.task = with_overrides(load_task(task), {} if overrides is None else overrides)
        check_readable(self.task.workload.source, self.task.workload.trace)
        self.render_mode = render_mode
        self.machine = lower(self.task)
        self.costs = self.machine.costs
        self.settings = self.machine.settings
        self._last_action = len(self.task.actions) - 1
        self.action_space = spaces.Discrete(1 + self._last_action)
        self.observation_space = spaces.Box(0.0, 1.0, (len(self.features),), np.float32)
        self.state: State | None = None
        self._imagined: State | None = None
        self.rows = make_rows(1, 1 + self._last_action, len(self.features))
        self._many_replicas = len(self.machine.layout.clients) > 1
        self._over = True
        self._bound_s = float("nan")  # of the episode
        self._steps_left = float("inf")  # until a wrapper cuts the episode

    def reset(
        self, *, seed: SupportsIndex | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Load an instance and run to its first decision point."""
        options = self._checked_options(options)
        super().reset(seed=None if seed is None else whole_number("seed", seed, 0))
        requests = options.get("requests")
        if requests is None:
            requests = sample_requests(self.task, self.np_random)
        else:
            requests = inform(self.task, requests, self.np_random)
        self._load(requests, options.get("plan"), options.get("bound"))
        begin_row(self._state, self.costs, self.settings, self.rows, 0)
        self._over = False
        self._steps_left = _steps_until_cut(self)
        self._bound_s = float(self._state.episodes[0].bound_s)
        return self.rows.observations[0].copy(), self._info(illegal=False)

    def step(
        self, action: SupportsIndex
    ) -> tuple[NDArray[np.float32], SupportsFloat, bool, bool, dict[str, Any]]:
        """Carry out an action and run to the next decision point."""
        if self._over:
            raise ServegymError("the episode is over; call reset() before step()")
        rows = self.rows
        chosen = whole_number("action", action, 0, self._last_action)
        step_row(self._state, self.costs, self.settings, rows, 0, chosen)
        info = self._info(illegal=bool(rows.illegal[0]))
        terminated, truncated = bool(rows.terminated[0]), bool(rows.truncated[0])
        self._over = terminated or truncated
        self._steps_left -= 1
        if self._over or self._steps_left <= 0:
            info.update(episode_metrics(self._state, 0))
        return rows.observations[0].copy(), float(rows.rewards[0]), terminated, truncated, info

    def render(self) -> NDArray[np.uint8] | None:
        """Draw the clients over time so far as an RGB image, shape (height, width, 3)."""
        if self.render_mode is None:
            gym.logger.warn("render() needs render_mode='rgb_array'")
            return None
        from servegym.envs.pictures import draw_gantt, to_image

        layout = self.machine.layout
        chunked = layout.chunk_tokens > 0
        figure = draw_gantt(self.records(), layout.clients, self.task.name, chunked=chunked)
        return to_image(figure)

    def action_masks(self) -> NDArray[np.bool_]:
        """Return which actions are legal now, shape (actions,); sb3-contrib asks for this name."""
        if self.state is None:
            raise ServegymError("call reset() before action_masks()")
        return self.rows.masks[0].copy()

    def view(self) -> DecisionView:
        """Return the numbers that rules decide by."""
        return view(self._state, self.costs, 0, deciding(self._state, 0))

    def outlook(self) -> Outlook:
        """Return what a stage now would cost later, in memory and in limits that are missed."""
        r = deciding(self._state, 0)
        return outlook(self._state, self.costs, 0, r, view(self._state, self.costs, 0, r))

    def imagine(self) -> State:
        """Return the episode as its scheduler believes it to be, one row to try things on.

        Expected lengths in the place of true ones, nothing that has not arrived. The arrays are the
        caller's until the next call, which overwrites them.
        """
        state = self._state
        if self._imagined is None or self._imagined.requests.shape != state.requests.shape:
            self._imagined = make_alike(state, 1)
        imagine_row(state, self.costs, 0, self._imagined, 0)
        return self._imagined

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the episode so far (``servegym.envs.process.metrics.METRICS``).

        What the last ``info`` holds. As long as requests are unfinished, ``makespan_s`` and ``gap`` are
        NaN.
        """
        return episode_metrics(self._state, 0)

    def records(self) -> EpisodeLog:
        """Return a copy of the per-request records so far."""
        return records(self._state, 0)

    @property
    def features(self) -> tuple[str, ...]:
        """What each entry of the observation means."""
        return self.machine.features

    @property
    def _state(self) -> State:
        if self.state is None:
            raise ServegymError("call reset() first")
        return self.state

    def _info(self, *, illegal: bool) -> dict[str, Any]:
        return {
            "lower_bound_s": self._bound_s,
            "replica": self._replica() if self._many_replicas else 0,
            "illegal_action": illegal,
        }

    def _replica(self) -> int:
        """Return the replica that the observation is of: whose turn it is, the first one at the end.

        As ``deciding``, without the microseconds of a call into a kernel.
        """
        turn = int(self._state.episodes["turn"][0])
        return turn if turn < len(self.machine.layout.clients) else 0

    @staticmethod
    def _checked_options(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if options is None:
            return {}
        if not isinstance(options, Mapping):
            raise ServegymError(
                f"reset options must be a table, as {{'requests': …}}, got {shown(options)}"
            )
        for key, value in options.items():
            if key not in _RESET_OPTIONS:
                raise unknown("reset option", key, _RESET_OPTIONS)
            if value is not None and not isinstance(value, _RESET_OPTIONS[key]):
                raise ServegymError(
                    f"reset option {key} must be a {_RESET_OPTIONS[key].__name__}, "
                    f"got {shown(value)}"
                )
        return options

    def _load(self, requests: Requests, plan: Plan | None, bound: LowerBound | None) -> None:
        check_plan(plan, requests, self.machine.clients)
        if self.state is None or self.state.requests.shape[1] != len(requests):
            self.state = make_task_state(self.task, 1, len(requests))
        case = Case(requests, bound) if bound else bound_case(self.machine, requests)
        load_case(self.task, self.state, 0, case, plan)


def _steps_until_cut(env: ServingEnv) -> float:
    """Return after how many steps a ``TimeLimit`` around ``env`` ends the episode; inf without one.

    Gymnasium tells an environment nothing of its wrappers, but the last info of an episode that one of
    them cuts is to hold the metrics, too. While ``reset`` runs, the wrappers' own ``reset`` called it:
    they are found on the stack, once an episode, so that no step pays for it.
    """
    steps = float("inf")
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is TimeLimit.reset.__code__:
            limit: TimeLimit = frame.f_locals["self"]
            if limit.unwrapped is env:
                steps = min(steps, limit._max_episode_steps)
        frame = frame.f_back
    return steps


def check_plan(plan: Plan | None, requests: Requests, clients: int) -> None:
    """Refuse a plan that does not fit the instance."""
    if plan is None or len(plan.order) == 0:
        return
    if plan.clients != clients:
        raise ServegymError(f"the plan is for {plan.clients} clients, the task has {clients}")
    if plan.order.min() < 0 or plan.order.max() >= len(requests):
        raise ServegymError(f"the plan names requests outside 0 … {len(requests) - 1}")
    if requests.arrival_s[plan.order].max() > 0:
        raise ServegymError("a plan may hold only requests that are present at t = 0")
