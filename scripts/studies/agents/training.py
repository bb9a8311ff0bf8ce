"""What ``scripts/train.py`` trains with: references, expert, validation, the hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from servegym.agents.hyperparameters import Hyperparameters, Options
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.playing.evaluation import make_case
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.vocabulary import USUAL_RULES
from servegym.studies.tuned import THRESHOLDS

if TYPE_CHECKING:
    from servegym.agents.callbacks import ServingCallback
    from servegym.agents.early_stopping import OnEvaluation
    from servegym.agents.imitation import Expert

VALIDATION_SEED: Final = 900_000
"""The first seed of the cases that training chooses its best agent by."""

EVALUATE_EVERY: Final = 250_000
"""Most timesteps between two evaluations, unless others are asked for."""

EVALUATIONS: Final = 8
"""Evaluations of a shorter run, besides that at its beginning."""

TO_THE_END: Final = {"max_decisions": 0, "max_seconds": 0.0}
"""The rules that an agent is compared with play to the end, however short its episodes are cut."""


def usual_evaluations(hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Return the usual ``validation_cases`` and ``evaluate_every`` of a run."""
    every = min(EVALUATE_EVERY, hyperparameters.timesteps // EVALUATIONS)
    return {
        "validation_cases": usual_validation_cases(hyperparameters),
        "evaluate_every": max(1, every),
    }


def usual_validation_cases(hyperparameters: Hyperparameters) -> int:
    """Return the usual number of validation cases: evolution gains less than 20 cases can show."""
    return 300 if hyperparameters.evolves else 20


def references(task: TaskConfig, seeds: Sequence[int]) -> dict[str, pd.DataFrame]:
    """Return the metrics of ``hybrid`` and of the best threshold on the validation cases, a row a case.

    Both use their own admission rules, even where the agent is not offered these, and play to the end.
    """
    task = with_overrides(task, {"process": {"rules": USUAL_RULES} | TO_THE_END})
    cases = [make_case(task, seed) for seed in seeds]

    def rows(name: str) -> pd.DataFrame:
        policy = make_trigger_policy(name)
        return pd.DataFrame([play_compiled(task, policy, case) for case in cases])

    candidates = {f"threshold-{k}": rows(f"threshold-{k}") for k in THRESHOLDS}
    best = min(candidates, key=lambda name: float(candidates[name]["gap"].mean()))
    return {"hybrid": rows("hybrid"), best: candidates[best]}


def make_expert(
    hyperparameters: Hyperparameters, task: TaskConfig, threads: int = 1
) -> Expert | None:
    """Return the expert to imitate; None without imitation."""
    if hyperparameters.imitation_rounds == 0:
        return None
    from servegym.baselines.expert import make_rollout_expert, make_rule_expert

    if hyperparameters.imitate == "rule":
        return make_rule_expert(hyperparameters.expert, task)
    return make_rollout_expert(hyperparameters.expert, task, threads)


def make_reference(
    hyperparameters: Hyperparameters, task: TaskConfig
) -> Callable[[Case], float] | None:
    """Return the gap, by case, that returns are measured from; None without a reference."""
    if not hyperparameters.reference:
        return None
    policy = make_trigger_policy(hyperparameters.reference)
    task = with_overrides(task, {"process": TO_THE_END})
    return lambda case: play_compiled(task, policy, case)["gap"]


def make_callbacks(
    task: TaskConfig,
    hyperparameters: Hyperparameters,
    folder: Path,
    *,
    cases: int,
    every: int = EVALUATE_EVERY,
    command: str = "",
    on_evaluation: OnEvaluation | None = None,
) -> list[ServingCallback]:
    """Return what evaluates the agent while it is trained: a callback, or none without ``cases``.

    Parameters
    ----------
    cases
        Validation cases, seeds ``VALIDATION_SEED`` …
    every
        Timesteps between two evaluations.
    on_evaluation
        The hook for pruning and early stopping, see ``ServingCallback``.
    """
    if cases == 0:
        return []
    from servegym.agents.callbacks import ServingCallback

    seeds = range(VALIDATION_SEED, VALIDATION_SEED + cases)
    rules = references(task, seeds)
    return [
        ServingCallback(
            task,
            seeds,
            every,
            {
                name: {metric: float(np.mean(rows[metric])) for metric in METRICS}
                for name, rows in rules.items()
            },
            asdict(hyperparameters),
            folder,
            command=command,
            rule_gaps={name: list(rows["gap"]) for name, rows in rules.items()},
            on_evaluation=on_evaluation,
        )
    ]


def _means(rows: pd.DataFrame) -> dict[str, float]:
    return {metric: float(np.mean(rows[metric])) for metric in METRICS}


def train_watched(
    task: TaskConfig,
    hyperparameters: Hyperparameters,
    folder: Path,
    callbacks: Sequence[ServingCallback],
    *,
    resume: bool = False,
    command: str = "",
    options: Options | None = None,
    checked: bool = False,
) -> int:
    """Train with the expert and the reference that the hyper-parameters name; return the timesteps.

    The parameters are those of ``servegym.agents.train``. An exception of the callbacks' hook leaves
    this function once the run is saved.
    """
    # Imported late: torch takes seconds, and what can be refused should be refused before.
    from servegym.agents.training import train

    options = options or Options()
    model = train(
        task,
        hyperparameters,
        folder,
        callbacks=callbacks,
        expert=make_expert(hyperparameters, task, options.threads),
        reference=make_reference(hyperparameters, task),
        resume=resume,
        command=command,
        options=options,
        checked=checked,
    )
    return model.num_timesteps
