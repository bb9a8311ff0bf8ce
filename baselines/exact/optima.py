"""The exact optima of a small task's cases, kept in a file beside the episodes they are compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import pandas as pd
from tqdm import tqdm

from servegym.baselines.exact.optimum import exact_optimum
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.identity import check_unchanged, claim_task, hash_of
from servegym.envs.playing.locks import locked
from servegym.envs.playing.tables import ResumableTable, Schema
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.workload.requests import Requests

COLUMNS: Final = ("seed", "optimum_s", "bound_s", "proven", "time_limit_s", "search_s")
"""Columns of ``optima.csv``. ``optimum_s`` is the best schedule's makespan, the optimum where ``proven``;
``bound_s`` is a lower bound on every schedule's (equal where proven)."""

OPTIMA: Final = Schema(COLUMNS, key=("seed",), flags=("proven",))
"""What ``optima.csv`` must be."""

FILE: Final = "optima.csv"

MAX_REQUESTS: Final = 12
"""Larger cases are not tried: they may take minutes, and most exceed the search's tables."""


class TooLargeError(ServegymError):
    """A case of few requests exceeds the search's tables."""


def is_small(requests: Requests) -> bool:
    """Whether a case's optimum is looked for: few requests, all present at t = 0."""
    return len(requests) <= MAX_REQUESTS and not np.any(requests.arrival_s > 0)


def find_optima(
    task: TaskConfig,
    seeds: Iterable[int],
    output: Path,
    time_limit_s: float,
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Return the optima of those cases that are small, a row of ``COLUMNS`` each, by seed.

    The optimum is of the true lengths, whatever the task's scheduler knows of them.

    Parameters
    ----------
    task, seeds
        The cases.
    output
        Folder for ``optima.csv`` and ``task.json``; a case that stands there is searched again only
        if it is not proven and the limit has been raised.
    time_limit_s
        Seconds of search for a case, > 0.

    Raises
    ------
    ServegymError
        If the folder holds another task's results or a damaged file, or is written to by another
        process; :class:`TooLargeError` if a case has few requests and still exceeds the
        search's tables; the message names a size that fits, and a lower bound.
    """
    path = output / FILE
    if path.exists():
        claim_task(task, output)
    wanted = sorted(set(seeds))
    table = _open(path)
    missing = _missing(table, wanted, time_limit_s)
    small = bool(missing) and is_small(make_case(task, missing[0]).requests)
    if not small or not task.cluster.is_batch_machine:
        return _of(table, wanted)
    with locked(output):
        claim_task(task, output)
        known = hash_of(task)
        with _open(path) as table:  # again: rows may have been added until the folder was locked
            for seed in tqdm(missing, desc="optima", disable=not progress):
                row = _search(task, seed, time_limit_s)
                check_unchanged(task, known)
                if row is not None:
                    table.add([row])
    return _of(table, wanted)


def _open(path: Path) -> ResumableTable:
    return ResumableTable(path, OPTIMA, "remove the file", ("seed",), order=lambda row: row["seed"])


def _missing(table: ResumableTable, seeds: Sequence[int], time_limit_s: float) -> list[int]:
    """Return the seeds without a row, and those that a shorter time limit left unproven."""
    again = {row["seed"] for row in table.rows if _try_again(row, time_limit_s)}
    lacking = set(table.missing(seeds))
    return [seed for seed in seeds if seed in lacking | again]


def _of(table: ResumableTable, seeds: Collection[int]) -> pd.DataFrame:
    """Return the rows of these seeds, by seed."""
    return pd.DataFrame([row for row in table.rows if row["seed"] in seeds], columns=list(COLUMNS))


def _try_again(row: dict[str, Any], time_limit_s: float) -> bool:
    return not row["proven"] and time_limit_s > row["time_limit_s"]


def _search(task: TaskConfig, seed: int, time_limit_s: float) -> dict[str, Any] | None:
    """Return the row of a case; None where it is not small."""
    requests, machine = make_case(task, seed).requests, lower(task)
    if not is_small(requests) or not task.cluster.is_batch_machine:
        return None
    started = perf_counter()
    try:
        found = exact_optimum(
            requests,
            machine.clients,
            machine.costs,
            machine.settings.max_prefill_tokens,
            time_limit_s=time_limit_s,
        )
    except ServegymError as error:
        raise TooLargeError(str(error)) from None
    values = (seed, found.makespan_s, found.lower_bound_s, found.proven, time_limit_s)
    return dict(zip(COLUMNS, (*values, perf_counter() - started), strict=True))
