"""What is known at an evaluation during training, and when to stop by it: the hook of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from servegym.envs.errors import ServegymError


@dataclass(frozen=True)
class Evaluation:
    """The state of a training run at one evaluation; gaps are in percent.

    Examples
    --------
    >>> def far_behind_is_hopeless(evaluation: Evaluation) -> bool:
    ...     return evaluation.gap_percent < 2 * evaluation.references["hybrid"]
    """

    number: int
    """0 for the run's first, of what was imitated or of the untrained network; a resumed run counts on."""
    timesteps: int
    """Decisions that the agent has been trained on."""
    total_timesteps: int
    """Decisions that the run was asked for; it ends at the first whole rollout from there on."""
    gap_percent: float
    """Mean gap of the greedy agent on the validation cases; NaN if cases were cut short."""
    gap_percent_sem: float
    """Standard error of that mean; NaN with one case."""
    mean_reward: float
    """Mean return of the greedy agent on the validation cases, also of those that were cut short."""
    cases: int
    """Validation cases."""
    unfinished: int
    """Those of them that were cut short."""
    best_gap_percent: float
    """Gap of the best agent so far, this one included; NaN while there is none."""
    since_best: int
    """Evaluations since that of the best agent: 0 if this is it, or if there is none."""
    references: Mapping[str, float]
    """Gaps of the rules that the run is compared with, by name."""
    last: bool
    """Whether training ends here anyway."""


OnEvaluation = Callable[[Evaluation], bool | None]
"""Called after each evaluation. Training goes on unless it returns False or raises an ``Exception``."""


@dataclass(frozen=True)
class Patience:
    """Stops training once so many evaluations in a row have brought no better agent.

    Examples
    --------
    >>> Patience(0)
    Traceback (most recent call last):
        ...
    servegym.envs.errors.ServegymError: patience must be a whole number ≥ 1, got 0
    """

    evaluations: int

    def __post_init__(self) -> None:
        number: Any = self.evaluations
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ServegymError(f"patience must be a whole number ≥ 1, got {number!r}")

    def __call__(self, evaluation: Evaluation) -> bool:
        """Return whether training should go on."""
        return evaluation.since_best < self.evaluations


def says_stop(answer: object) -> bool:
    """Return whether a hook's answer ends training: False, also numpy's; None goes on."""
    return isinstance(answer, bool | np.bool_) and not answer
