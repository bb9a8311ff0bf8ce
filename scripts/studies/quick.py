"""One episode of a policy, in compiled code where it is a rule or an agent: for studies of many episodes."""

from __future__ import annotations

from dataclasses import dataclass

from servegym.baselines.rules.compiled import CompilablePolicy, play_loaded
from servegym.envs.playing.evaluation import brief, play
from servegym.envs.playing.policy import Policy, asked_task
from servegym.envs.process.metrics import EpisodeLog, episode_metrics, records
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import load_case, lower, make_task_state


@dataclass(frozen=True)
class Played:
    """What came of it: the same as :func:`servegym.envs.playing.evaluation.play` says."""

    log: EpisodeLog
    elapsed_s: float
    """When it ended."""
    gap: float
    """NaN if requests were left or shed."""


def play_quickly(task: TaskConfig, name: str, policy: Policy, case: Case, seed: int) -> Played:
    """Play one episode; only what is neither, or may be cut short, is asked in Python.

    Examples
    --------
    >>> from servegym.baselines import make_policy
    >>> from servegym.envs import TASKS, make_case
    >>> task = TASKS["servegym/Tiny-v0"]
    >>> round(play_quickly(task, "fcfs", make_policy("fcfs"), make_case(task, 0), 0).gap, 3)
    0.328
    """
    cut_short = task.process.max_decisions > 0 or task.process.max_seconds > 0
    if cut_short or not isinstance(policy, CompilablePolicy):
        episode = play(task, name, policy, case, seed)
        return Played(episode.records, episode.elapsed_s, float(episode.row["gap"]))
    asked = asked_task(task, policy)
    state = make_task_state(asked, 1, len(case.requests))
    load_case(asked, state, 0, case, policy.prepare(brief(asked, case, seed)))
    play_loaded(state, lower(asked).costs, asked, policy)
    gap, now_s = episode_metrics(state, 0)["gap"], state.episodes[0].now_s
    return Played(records(state, 0), float(now_s), float(gap))
