"""What learns to schedule, step by step: searches for a calendar, imitation of schedules, PPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.calendar.fitted import (
    CALENDAR_FILE,
    CalendarParameters,
    calendar_policy,
    read_parameters,
    write_parameters,
)
from servegym.baselines.calendar.imitation import Example, calendars, fit_weights, plan_example
from servegym.baselines.calendar.learning import SEEDS_PER_SEARCH, CalendarSearch, Players, Search
from servegym.baselines.rules.compiled import CompilablePolicy
from servegym.envs.errors import ServegymError, unknown
from servegym.envs.task.config import TaskConfig, with_overrides

PADS: Final = (0.0, 1.0, 10.0, 30.0)
"""Weights of padding that ``ppo-scores`` may choose at each stage, besides the rule's own 3."""

IMITATING_SHARE: Final = 0.2
"""Of the time, after which ``imitation-cma`` begins to search."""


class Learner(Protocol):
    """Something that learns a policy in steps of a second or so."""

    task: TaskConfig
    """What its policy plays; offers the actions that it may take."""

    def step(self, share: float) -> None:
        """Learn a little; ``share`` of the time has passed."""

    def policy(self) -> CompilablePolicy:
        """Return what has been learned so far."""

    def save(self, folder: Path) -> None:
        """Write what has been learned so far."""


class SearchLearner:
    """A search for a calendar by an optimiser.

    Parameters
    ----------
    task, how
        What is learned, by which search.
    first
        What it begins at; None: the usual.
    """

    def __init__(
        self, task: TaskConfig, how: Search, first: CalendarParameters | None = None
    ) -> None:
        self.task = task
        self._search = CalendarSearch(task, how, first=first)

    def step(self, share: float) -> None:
        """Do one generation."""
        self._search.step()

    def policy(self) -> CompilablePolicy:
        """Return the policy of the search's centre."""
        return calendar_policy(self._search.centre)

    def save(self, folder: Path) -> None:
        """Write the search's centre."""
        write_parameters(self._search.centre, folder, self.task.name)


class ImitationLearner:
    """Plans one case after the other and imitates all schedules so far.

    Parameters
    ----------
    task, seed
        What is learned; training cases are those of a search of this seed.
    """

    def __init__(self, task: TaskConfig, seed: int) -> None:
        self.task = task
        self._seed, self._examples, self._seeds = seed, list[Example](), list[int]()
        self.parameters: CalendarParameters | None = None

    def step(self, share: float) -> None:
        """Plan another case, fit weights, and choose the calendar that plays the planned cases best."""
        number = SEEDS_PER_SEARCH * self._seed + len(self._seeds) % SEEDS_PER_SEARCH
        self._examples.append(plan_example(self.task, number))
        self._seeds.append(number)
        candidates = calendars(self._examples, fit_weights(self._examples))
        seeds = np.array(self._seeds[:_CASES_TO_CHOOSE_BY])
        players = Players(self.task, len(seeds), 1)
        gaps = [_median_gap(players, each, seeds) for each in candidates]
        self.parameters = candidates[int(np.argmin(gaps))]

    def policy(self) -> CompilablePolicy:
        """Return the policy of the best calendar."""
        return calendar_policy(self._known())

    def save(self, folder: Path) -> None:
        """Write the best calendar."""
        write_parameters(self._known(), folder, self.task.name)

    def _known(self) -> CalendarParameters:
        assert self.parameters is not None, "nothing has been imitated yet"
        return self.parameters


_CASES_TO_CHOOSE_BY: Final = 12


def _median_gap(
    players: Players, parameters: CalendarParameters, seeds: NDArray[np.int64]
) -> float:
    """Return a typical gap on the cases: the mean goes by the few that end with a request left over."""
    return float(np.median(players.gaps([parameters], seeds)))


class ImitationSearchLearner:
    """Imitates for a share of the time, then searches from there."""

    def __init__(self, task: TaskConfig, seed: int) -> None:
        self.task = task
        self._seed = seed
        self._imitation = ImitationLearner(task, seed)
        self._search: SearchLearner | None = None

    def step(self, share: float) -> None:
        """Do a step of imitation or of the search."""
        if self._search is None:
            self._imitation.step(share)
            if share >= IMITATING_SHARE:
                self._search = self._begin()
        else:
            self._search.step(share)

    def _begin(self) -> SearchLearner:
        first = self._imitation.parameters
        assert first is not None
        how = Search(stages=len(first.log_intervals), seed=self._seed)
        return SearchLearner(self.task, how, first)

    def policy(self) -> CompilablePolicy:
        """Return the policy of what is under way."""
        return (self._search or self._imitation).policy()

    def save(self, folder: Path) -> None:
        """Write what is under way."""
        (self._search or self._imitation).save(folder)


class PPOLearner:
    """PPO, a rollout and its updates a step; rates decay over the time, not over the timesteps.

    Parameters
    ----------
    task
        Its actions are the agent's.
    seed
        Agent seed.
    changed
        Hyper-parameters other than the task's defaults.
    """

    def __init__(
        self, task: TaskConfig, seed: int, changed: Mapping[str, Any] | None = None
    ) -> None:
        # Imported late: torch takes seconds, and searches do without.
        from servegym.agents.hyperparameters import default_hyperparameters
        from servegym.agents.training import make_model

        h = replace(default_hyperparameters(task.name), **(changed or {}), seed=seed)
        if h.warm or h.evolves or h.reference or h.plan:
            raise ServegymError(
                "the study's PPO has no imitation, evolution, reference or plan: leave them out"
            )
        self.task, self._h = task, h
        self._model = make_model(task, h)
        self._total, self._callback = self._model._setup_learn(_LONGEST, None, True, "", False)
        self._callback.on_training_start({}, {})

    def step(self, share: float) -> None:
        """Collect a rollout and learn from it."""
        from servegym.agents.hyperparameters import linear_decay

        model, h = self._model, self._h
        environments = model.get_env()
        assert environments is not None
        model.collect_rollouts(environments, self._callback, model.rollout_buffer, h.steps)
        model._current_progress_remaining = 1 - share
        model.ent_coef = linear_decay(h.entropy, h.final_entropy)(1 - share)
        model.train()

    def policy(self) -> CompilablePolicy:
        """Return the agent as numpy plays it."""
        from servegym.agents.card import AgentCard
        from servegym.agents.export import policy_network
        from servegym.agents.policy import LearnedPolicy

        network = policy_network(self._model)
        card = AgentCard(self.task.actions, self.task.process.decisions, network.sizes, "")
        return LearnedPolicy(network, card)

    def save(self, folder: Path) -> None:
        """Export the agent."""
        from servegym.agents.export import export_agent

        export_agent(self._model, self.task, "study_learners", folder)


_LONGEST: Final = 10**12


def task_of_scores(task: TaskConfig) -> TaskConfig:
    """Return the task whose one rule is ``scored``, of which an agent chooses the weight of padding."""
    return with_overrides(task, {"process": {"rules": ("scored",), "pads": PADS}})


def load_policy(task: TaskConfig, folder: Path) -> CompilablePolicy:
    """Return what a learner has saved."""
    if (folder / CALENDAR_FILE).is_file():
        return calendar_policy(read_parameters(folder / CALENDAR_FILE))
    from servegym.agents.policy import load_agent

    policy: CompilablePolicy = load_agent(folder)
    return policy


Make = Callable[[TaskConfig, int, Mapping[str, Any]], Learner]

_MAKERS: Final[dict[str, Make]] = {
    "cma": lambda task, seed, _: SearchLearner(task, Search(seed=seed)),
    "sep-cma": lambda task, seed, _: SearchLearner(task, Search(seed=seed, optimizer="sep-cma")),
    "es": lambda task, seed, _: SearchLearner(
        task, Search(seed=seed, optimizer="es", spread=ES_SPREAD)
    ),
    "imitation": lambda task, seed, _: ImitationLearner(task, seed),
    "imitation-cma": lambda task, seed, _: ImitationSearchLearner(task, seed),
    "ppo-scores": lambda task, seed, _: PPOLearner(task_of_scores(task), seed),
    "ppo": lambda task, seed, _: PPOLearner(task, seed),
    "ppo-fast": PPOLearner,
}

ES_SPREAD: Final = 0.1
"""Standard deviation of the perturbations of ``es``."""

LEARNERS: Final = tuple(_MAKERS)

FASTER: Final = "ppo-fast"
"""The learner that takes hyper-parameters of a file."""

USUAL: Final = tuple(name for name in LEARNERS if name != FASTER)


def make_learner(
    name: str, task: TaskConfig, seed: int, hyperparameters: Mapping[str, Any]
) -> Learner:
    """Return a learner at its beginning.

    Parameters
    ----------
    name
        One of ``LEARNERS``.
    task
        Registered or of a file.
    seed
        Training seed, 0 … 799.
    hyperparameters
        Of ``FASTER``, where they are not the task's defaults.
    """
    if name not in _MAKERS:
        raise unknown("learner", name, LEARNERS)
    return _MAKERS[name](task, seed, hyperparameters)
