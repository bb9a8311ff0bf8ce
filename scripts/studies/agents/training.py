"""What ``scripts/train.py`` trains with and tells: references, expert, validation, the outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from servegym.agents.hyperparameters import Hyperparameters
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
    from servegym.agents.imitation import Expert

VALIDATION_SEED: Final = 900_000
"""The first seed of the cases that training chooses its best agent by."""

TO_THE_END: Final = {"max_decisions": 0, "max_seconds": 0.0}
"""The rules that an agent is compared with play to the end, however short its episodes are cut."""


def usual_validation_cases(hyperparameters: Hyperparameters) -> int:
    """Return the usual number of validation cases: evolution gains less than 20 cases can show."""
    return 300 if hyperparameters.evolves else 20


def references(task: TaskConfig, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return the mean metrics of ``hybrid`` and of the best threshold on the validation cases.

    Both use their own admission rules, even where the agent is not offered these, and play to the end.
    """
    task = with_overrides(task, {"process": {"rules": USUAL_RULES} | TO_THE_END})
    cases = [make_case(task, seed) for seed in seeds]

    def means(name: str) -> dict[str, float]:
        policy = make_trigger_policy(name)
        rows = [play_compiled(task, policy, case) for case in cases]
        return {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}

    candidates = {f"threshold-{k}": means(f"threshold-{k}") for k in THRESHOLDS}
    best = min(candidates, key=lambda name: candidates[name]["gap"])
    return {"hybrid": means("hybrid"), best: candidates[best]}


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


def outcome(callback: ServingCallback) -> str:
    """Return in one line which agent is kept as the best, and whether training was of use."""
    first, best = callback.evaluations.rows.iloc[0], callback.best
    if best is None:
        return "nothing was learned before the first evaluation: there is no best agent"
    folder, cases = callback.folder / "agent", int(best["cases"])
    text = f"{folder}: taken after {int(best['timesteps']):,} timesteps, "
    if best["unfinished"]:
        count, limits = int(best["unfinished"]), "process.max_decisions or max_seconds"
        return text + f"{count} of {cases} validation cases cut short by {limits}"
    gap_percent = best["gap_percent"]
    text += f"{gap_percent:.2f} % above the lower bound on {cases} validation cases"
    if best["timesteps"] == 0:
        return text + "; no evaluation after that, of what was imitated, is better"
    at_the_bound = gap_percent < 0.005  # shown as 0.00 %: nothing can be better
    if first["timesteps"] == 0 and first["gap_percent"] <= gap_percent and not at_the_bound:
        return text + (
            f", {best['gap_percent_sampled']:.2f} % with sampled actions; the untrained network has "
            f"{first['gap_percent']:.2f} %: train for longer, or at another learning rate"
        )
    return text
