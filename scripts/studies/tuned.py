"""The numbers of rules: which are tried on training cases, and which were best there.

The best numbers are those of ``results/tuning/``; a test compares them. They stand here because an
installed package comes without ``results/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any, Final

import numpy as np
import pandas as pd

from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.parallel import Workers, run_parallel
from servegym.envs.playing.summary import mean_gaps
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.registered import load_task
from servegym.studies.cases import short_name

THRESHOLDS: Final = (1, 2, 3, 4, 5, 7, 10, 12, 15, 18, 20, 25, 30, 40, 60, 100)
"""K of ``threshold-K`` that is tried, for the 200 clients of ``THRESHOLDS_OF``."""

THRESHOLDS_OF: Final = "GSM8K-v0"

MULTIPLIERS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
"""λ that is tried of every other rule."""

TUNING_CASES: Final = 20
"""Training cases that a study tunes a threshold on."""

TUNED: Final[dict[str, dict[str, float]]] = {
    "GSM8K-v0": {
        "threshold": 12, "hybrid": 0.2, "lpt": 0.3, "lookahead": 0.7, "aligned": 1.0,
        "aligned-lookahead": 0.5,
    },
    "Paper-v0": {
        "threshold": 1, "hybrid": 0.01, "lpt": 0.01, "lookahead": 0.01, "aligned": 0.02,
        "aligned-lookahead": 0.01,
    },
    "GSM8KPredicted-v0": {
        "threshold": 12, "hybrid": 0.3, "lpt": 0.5, "lookahead": 1.0, "aligned": 1.5,
        "aligned-lookahead": 1.5, "feedback": 0.3,
    },
}  # fmt: skip
"""The best number of each family of rules by task, over 100 training cases."""

BEST: Final = "-*"
"""Ends the name of a family in a list of policies: its best member is meant."""


def tuned_multiplier(task: TaskConfig, family: str) -> float:
    """Return a rule's λ tuned on the task, 1 on a task where none was tuned."""
    return TUNED.get(short_name(task), {}).get(family, 1.0)


def numbered(family: str, multiplier: float) -> str:
    """Return a policy's name with its λ, without where that is 1."""
    return family if multiplier == 1 else f"{family}-{multiplier:g}"


def with_tuned(task: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return policies' names, the best number in place of each ``*``, as in ``hybrid-*``."""
    return tuple(
        _best_of(task, name.removesuffix(BEST)) if name.endswith(BEST) else name for name in names
    )


def _best_of(task: str, family: str) -> str:
    number = TUNED[task][family]
    return f"threshold-{number}" if family == "threshold" else numbered(family, number)


def thresholds(clients: int) -> list[str]:
    """Return the ``threshold-K`` to try; K is in proportion to the clients."""
    share = clients / load_task(THRESHOLDS_OF).cluster.clients
    return [f"threshold-{k}" for k in sorted({max(1, round(share * k)) for k in THRESHOLDS})]


def gaps(task: TaskConfig, seed: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Play rules on one training case; return a row each with ``policy``, ``seed`` and ``gap``."""
    case = make_case(task, seed)
    return [
        {"policy": name, "seed": seed, "gap": play_compiled(task, policy, case)["gap"]}
        for name, policy in ((name, make_trigger_policy(name)) for name in names)
    ]


def tuned_threshold(task: TaskConfig, cases: int, jobs: Workers) -> str:
    """Return the ``threshold-K`` of the smallest mean gap on the first training cases.

    Raises
    ------
    ServegymError
        If every threshold leaves requests unserved, as where episodes are cut short.
    """
    names = thresholds(task.cluster.clients)
    results = run_parallel(gaps, [(task, seed, names) for seed in range(cases)], jobs)
    with closing(results):
        means = mean_gaps(pd.DataFrame([row for rows in results for row in rows]))
    if np.isinf(means.min()):
        raise ServegymError(
            f"{task.name}: no threshold serves all requests; raise process.max_decisions or max_seconds"
        )
    return str(means.idxmin())
