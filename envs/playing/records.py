"""One CSV file per episode, one row per request: where and when each was served."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.files import make_folder, write_file
from servegym.envs.process.metrics import EpisodeLog
from servegym.envs.process.service import NAN
from servegym.envs.workload.requests import Requests

RECORD_COLUMNS: Final = (
    "request",
    "replica",
    "client",
    "arrival_s",
    "admitted_s",
    "first_token_s",
    "finished_s",
    "prompt_tokens",
    "output_tokens",
    "preemptions",
    "recomputed_tokens",
    "moves",
    "met_slo",
    "gap_between_tokens_s",
    "class",
)
"""Columns of ``records/POLICY-SEED.csv``; ``request`` is the row of the workload, from 0.

``met_slo`` is 1 or 0 once a request has arrived, ``gap_between_tokens_s`` its worst gap between two tokens.
"""

_LONGEST_NAME: Final = 80


def records_path(output: Path, policy: str, seed: int) -> Path:
    """Return the file of an episode's records.

    A policy whose name is no good file name, such as the folder of an agent, gets one of its own: what
    does not fit becomes ``_``, and a ``~`` and eight digits that depend on the whole name follow.

    Examples
    --------
    >>> records_path(Path("out"), "threshold-12", 3).as_posix()
    'out/records/threshold-12-3.csv'
    >>> records_path(Path("out"), "runs/a", 3).as_posix()
    'out/records/runs_a~7c3ea947-3.csv'
    """
    name = re.sub(r"[^a-z0-9._-]", "_", policy[:_LONGEST_NAME])
    if (
        name != policy or name.lstrip(".-") != policy or not name
    ):  # capitals: some systems take them for small
        name = f"{name.lstrip('.-')}~{hashlib.sha256(policy.encode()).hexdigest()[:8]}"
    return output / "records" / f"{name}-{seed}.csv"


def records_table(log: EpisodeLog, requests: Requests | None = None) -> pd.DataFrame:
    """Return an episode's records by row of the workload; a cell is empty where nothing happened.

    Parameters
    ----------
    log
        The records, by request.
    requests
        What was served, for the rows and the classes; None: in order of their rows, without classes.

    Examples
    --------
    >>> from servegym.envs import ServingEnv
    >>> env = ServingEnv("Tiny-v0")
    >>> _ = env.reset(seed=0)
    >>> records_table(env.records())["request"].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    count = len(log.arrival_s)
    rows = None if requests is None else requests.rows
    classes: list[str] | float = NAN
    if requests is not None and requests.class_of is not None:
        classes = [requests.class_names[place] for place in requests.class_of]
    table = pd.DataFrame(
        {
            "request": np.arange(count) if rows is None else rows,
            "replica": _known(log.replica, (log.replica >= 0) & ~log.rejected),
            "client": _known(log.client, np.isfinite(log.admitted_s) & (log.client >= 0)),
            "arrival_s": log.arrival_s,
            "admitted_s": log.admitted_s,
            "first_token_s": log.first_token_s,
            "finished_s": log.finished_s,
            "prompt_tokens": log.prompt_tokens,
            "output_tokens": log.decode_rounds + 1,
            "preemptions": _known(log.preemptions, ~log.rejected),
            "recomputed_tokens": _known(log.recomputed_tokens, ~log.rejected),
            "moves": _known(log.moves, ~log.rejected),
            "met_slo": _known(log.met_slo, log.arrived),
            "gap_between_tokens_s": log.worst_gap_s,
            "class": classes,
        },
        columns=list(RECORD_COLUMNS),
    )
    return table.sort_values("request", ignore_index=True)


def _known(values: NDArray[np.integer] | NDArray[np.bool_], there: NDArray[np.bool_]) -> pd.Series:
    """Return whole numbers that are missing where they mean nothing."""
    return pd.Series(values.astype(np.int64)).astype("Int64").where(there)


def records_text(log: EpisodeLog, requests: Requests | None) -> str:
    """Return the content of a file of records: :func:`records_table` as CSV."""
    return records_table(log, requests).to_csv(index=False, lineterminator="\n")


def write_records(path: Path, text: str) -> None:
    """Write the content of a file of records, whole or not at all.

    Raises
    ------
    ServegymError
        If the file cannot be written.
    """
    make_folder(path.parent)
    write_file(path, text)
