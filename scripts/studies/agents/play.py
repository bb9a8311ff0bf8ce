"""What the study of agents plays: held-out cases of each task, and settings no agent has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd

from servegym.agents.card import CARD_FILE, WEIGHTS_FILE
from servegym.agents.hyperparameters import default_hyperparameters
from servegym.agents.policy import load_agent
from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.playing.evaluation import HELD_OUT_SEED, evaluate
from servegym.envs.playing.parallel import Workers
from servegym.envs.playing.tables import ResumableTable, Schema, as_rows, read_rows
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import load_task
from servegym.studies.agents.runs import ABLATED, MAIN, Run, is_finished
from servegym.studies.agents.training import VALIDATION_SEED, usual_validation_cases
from servegym.studies.policies import BEST, SHIPPED, make_listed_policy, note_weights
from servegym.studies.tuned import TUNING_CASES, tuned_threshold, with_tuned

BASELINES: Final[dict[str, tuple[str, ...]]] = {
    "GSM8K-v0": (
        *("random", "fcfs", "hybrid", "hybrid-*", "lpt", "threshold-*", "lookahead"),
        *("lookahead-*", "aligned", "aligned-lookahead-*", "rollout"),
    ),
    "Paper-v0": (
        *("fcfs", "random", "hybrid", "hybrid-*", "offline", "threshold-*", "lookahead"),
        *("aligned", "aligned-lookahead-*", "rollout"),
    ),
    "GSM8KPredicted-v0": (
        *("random", "fcfs", "feedback-*", "hybrid", "hybrid-*", "lpt-*", "threshold-*"),
        *("lookahead", "aligned-*", "aligned-lookahead-*", "quantile", "rollout"),
    ),
}
"""The policies that the agents of a task are compared with; ``*`` is the number tuned on the task."""

OTHER_BASELINES: Final = ("random", "fcfs", "hybrid", "threshold-1", "lookahead", "aligned")
"""The same for any other task."""

REFERENCES: Final = ("hybrid", "threshold", "aligned", "rollout")
"""Policies, or the families they belong to, that learning curves are drawn with."""

FEW_CASES: Final = 100
"""With more validation cases than these, learning curves are drawn without the rollout."""

OWN_THRESHOLD: Final = "threshold-K"
TRANSFER_RULES: Final = ("hybrid", OWN_THRESHOLD, "lookahead-*", "aligned-lookahead-0.7")
"""The rules that the agent is compared with in every setting; K is tuned on the setting itself."""

LARGE_SETTING: Final = "clients-2000"
"""The setting that is played on a third of the cases."""

CURVE_COLUMNS: Final = ("variant", "seed", "timesteps", "training_s", "gap_percent")
CURVES: Final = Schema(
    CURVE_COLUMNS,
    key=("variant", "seed", "timesteps"),
    whole=("seed", "timesteps"),
    texts=("variant",),
    optional=("gap_percent",),
    if_deleted="its run is read again by --parts evaluate",
)
EVALUATIONS: Final = Schema(
    CURVE_COLUMNS[2:],
    others=True,
    key=("timesteps",),
    whole=("timesteps",),
    optional=None,
    if_deleted="the curve is drawn without its evaluation",
)
"""What ``curves.csv`` and a run's ``evaluations.csv`` must be."""


def baselines(task: str) -> tuple[str, ...]:
    """Return the baselines of a task."""
    return with_tuned(task, BASELINES.get(task, OTHER_BASELINES))


def evaluate_agents(
    task: str, grid: Sequence[Run], runs: Path, output: Path, cases: int, jobs: Workers
) -> None:
    """Copy a task's finished agents and learning curves; play them and the baselines.

    Writes into ``output/<task>/``: the best agent, ``seeds/<seed>/``, ``curves.csv``,
    ``episodes.csv`` on held-out cases and ``validation/episodes.csv``, the references on the cases of
    validation.

    Raises
    ------
    ServegymError
        If no run is finished, or episodes of other weights stand in the folder.
    """
    asked = [run for run in grid if run.task == task]
    finished = [run for run in asked if is_finished(run, runs)]
    if not finished:
        raise ServegymError(f"{runs}: holds no finished run of {task}; begin with --parts train")
    if len(finished) < len(asked):
        left = ", ".join(run.name for run in asked if run not in finished)
        print(f"not finished, left out: {left}")
    folder = output / task
    folders = {run.policy: runs / run.name / BEST for run in finished}
    weights = note_weights(folders, folder)
    curves = keep_curves(finished, runs, folder)
    _ship([run for run in finished if run.variant == MAIN], runs, curves, folder)
    config, policies = load_task(task), baselines(task)
    policy_of = partial(make_listed_policy, folders=folders, weights=weights)
    count = usual_validation_cases(default_hyperparameters(config.name))
    lines = [name for name in policies if name.split("-")[0] in REFERENCES]
    if count > FEW_CASES:  # a rollout takes seconds a case
        lines = [name for name in lines if name != "rollout"]
    seeds = range(VALIDATION_SEED, VALIDATION_SEED + count)
    evaluate(config, policy_of, lines, seeds, folder / "validation", jobs=jobs)
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + cases)
    evaluate(config, policy_of, [*policies, *folders], seeds, folder, jobs=jobs)


def keep_curves(finished: Sequence[Run], runs: Path, folder: Path) -> pd.DataFrame:
    """Write the learning curves of these runs; those of other runs stay in the file."""
    curves = ResumableTable(
        folder / "curves.csv", CURVES, "remove the file and play again", ("variant", "seed")
    )
    for run in finished:
        path = runs / run.name / "evaluations.csv"
        table = read_rows(path, EVALUATIONS, "train this run anew").round(6)
        table = table.assign(variant=run.variant, seed=run.seed)[list(CURVE_COLUMNS)]
        curves.add(as_rows(table))
    curves.save()
    return curves.frame()


def _ship(main: Sequence[Run], runs: Path, curves: pd.DataFrame, folder: Path) -> None:
    """Copy the best agent of every main run, and the best of these by validation as the task's."""
    if not main:
        return
    best = curves[curves["variant"] == MAIN].groupby("seed")["gap_percent"].min()
    winner = min(main, key=lambda run: float(best[run.seed]))
    for run in main:
        _copy_agent(runs / run.name / BEST, folder / "seeds" / str(run.seed))
    _copy_agent(runs / winner.name / BEST, folder)


def _copy_agent(source: Path, target: Path) -> None:
    load_agent(source)  # refuses one that is damaged
    make_folder(target)
    for name in (WEIGHTS_FILE, CARD_FILE):
        write_file(target / name, (source / name).read_bytes())


def settings() -> dict[str, TaskConfig]:
    """Return what the agent of ``ABLATED`` is played on without having seen it, by name."""
    home = load_task(ABLATED)
    requests = home.workload.requests / home.cluster.clients
    overrides: dict[str, Mapping[str, Any]] = {
        f"clients-{clients}": {
            "cluster": {"clients": clients},
            "workload": {"requests": round(requests * clients)},
        }
        for clients in (50, 500, 2000)
    }
    overrides["outputs-cap512"] = {"workload": {"source": "gsm8k-cap512"}}
    for preset in ("llama2-70b-h100x8", "llama3-8b-a100x1"):
        overrides[f"cost-{preset}"] = {"cost": {"preset": preset}}
    return {
        name: replace(with_overrides(home, sections), name=f"{home.name} {name}")
        for name, sections in overrides.items()
    }


def play_transfer(output: Path, cases: int, jobs: Workers) -> None:
    """Play the shipped agent of ``ABLATED`` and rules in every setting.

    Writes ``output/transfer/<setting>/episodes.csv``.
    """
    agent = output / ABLATED
    if not (agent / CARD_FILE).is_file():
        raise ServegymError(f"{agent}: holds no agent; begin with --parts train,evaluate")
    folders = {SHIPPED: agent}
    for name, task in settings().items():
        folder = output / "transfer" / name
        weights = note_weights(folders, folder)
        threshold = tuned_threshold(task, TUNING_CASES, jobs)
        rules = [threshold if rule == OWN_THRESHOLD else rule for rule in TRANSFER_RULES]
        names = [*with_tuned(ABLATED, rules), SHIPPED]
        count = max(1, cases // 3) if name == LARGE_SETTING else cases
        seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + count)
        print(f"{name}: {count} cases, {', '.join(names)}")
        policy_of = partial(make_listed_policy, folders=folders, weights=weights)
        evaluate(task, policy_of, names, seeds, folder, jobs=jobs)
