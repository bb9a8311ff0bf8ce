"""What ``scripts/train.py`` trains with: references, expert, validation, the hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from servegym.agents.hyperparameters import Hyperparameters, Options
from servegym.agents.record import read_run
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.playing.evaluation import brief, make_case
from servegym.envs.playing.policy import Briefing
from servegym.envs.process.metrics import METRICS
from servegym.envs.task.cases import Case, PlanCase
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.vocabulary import USUAL_RULES
from servegym.envs.workload.plan import Plan
from servegym.studies.policies import planner_of
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


def mean_metrics(rows: pd.DataFrame) -> dict[str, float]:
    """Return the means of the METRICS over cases, a row each."""
    return {metric: float(np.mean(rows[metric])) for metric in METRICS}


def make_expert(
    hyperparameters: Hyperparameters, task: TaskConfig, threads: int = 1
) -> Expert | None:
    """Return the expert to imitate; None without imitation."""
    if hyperparameters.imitation_rounds == 0:
        return None
    from servegym.baselines.expert import make_rollout_expert, make_rule_expert

    if hyperparameters.imitate == "rule":
        return make_rule_expert(hyperparameters.expert, task, hyperparameters.plan)
    h = hyperparameters
    return make_rollout_expert(h.expert, task, threads, h.imitation_samples, h.seed)


def make_reference(
    hyperparameters: Hyperparameters, task: TaskConfig, plan_case: PlanCase | None = None
) -> Callable[[Case], float] | None:
    """Return the gap, by case, that returns are measured from; None without a reference.

    ``plan_case``, where the reference follows the same plans, saves making them twice.
    """
    if not hyperparameters.reference:
        return None
    policy = make_trigger_policy(hyperparameters.reference)
    task = with_overrides(task, {"process": TO_THE_END})
    plan = hyperparameters.plan
    if plan_case is None or not plan or make_trigger_policy(plan).planner != policy.planner:
        return lambda case: play_compiled(task, policy, case)["gap"]
    policy.prepare(
        Briefing(task, None, np.random.default_rng(0))
    )  # refuse a rule that the task lacks
    return lambda case: play_compiled(task, policy, case, plan_case(case))["gap"]


class _Planned:
    """Plans cases by a policy's planner; asked again for the last case, it returns the same plan."""

    def __init__(self, planner: Callable[[Briefing], Plan | None], task: TaskConfig) -> None:
        self._planner, self._task = planner, task
        self._last: tuple[Case, Plan | None] | None = None

    def __call__(self, case: Case) -> Plan | None:
        if self._last is None or self._last[0] is not case:
            # A planner that draws samples draws the same ones for a case every time.
            self._last = case, self._planner(brief(self._task, case, seed=0))
        return self._last[1]


def make_plan_case(hyperparameters: Hyperparameters, task: TaskConfig) -> PlanCase | None:
    """Return what plans each case as ``hyperparameters.plan`` does; None: greedy plans.

    Raises
    ------
    ServegymError
        If there is no such policy, it plans nothing, or the task leaves out its rule.
    """
    if not hyperparameters.plan:
        return None
    planner = planner_of(hyperparameters.plan)
    planner(Briefing(task, None, np.random.default_rng(0)))  # refuse a rule that the task lacks
    return _Planned(planner, task)


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
            {name: mean_metrics(rows) for name, rows in rules.items()},
            asdict(hyperparameters),
            folder,
            command=command,
            plan_case=make_plan_case(hyperparameters, task),
            rule_gaps={name: list(rows["gap"]) for name, rows in rules.items()},
            on_evaluation=on_evaluation,
        )
    ]


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

    The parameters are those of ``servegym.agents.train``. A run that is resumed notes the command that
    began it. An exception of the callbacks' hook leaves this function once the run is saved.
    """
    # Imported late: torch takes seconds, and what can be refused should be refused before.
    from servegym.agents.training import train

    options = options or Options()
    if resume:  # agents are those of a run that was never stopped, to the byte
        command = read_run(folder)["command"]
        for callback in callbacks:
            callback.command = command
    plan_case = make_plan_case(hyperparameters, task)
    model = train(
        task,
        hyperparameters,
        folder,
        callbacks=callbacks,
        expert=make_expert(hyperparameters, task, options.threads),
        reference=make_reference(hyperparameters, task, plan_case),
        plan_case=plan_case,
        resume=resume,
        command=command,
        options=options,
        checked=checked,
    )
    return model.num_timesteps
