"""Requests of one episode, and the CSV files they come from."""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from servegym.envs.errors import ServegymError, unknown

MAX_TOKENS: Final = 10_000_000
"""Longest prompt or output accepted, in tokens; beyond it a file is taken to be wrong."""

MAX_ARRIVAL_S: Final = 1e9
"""Latest arrival accepted, in seconds."""

_REQUIRED: Final = ("prompt_tokens", "output_tokens")
_OPTIONAL: Final = ("arrival_s", "predicted_output_tokens")


@dataclass(frozen=True, eq=False)
class Requests:
    """The requests of one episode, in arrival order: a request's id is its row.

    Raises
    ------
    ServegymError
        If the arrays differ in length, are empty, hold a token count outside 1 … ``MAX_TOKENS`` or
        an arrival that is negative, not finite or earlier than the one before it.
    """

    arrival_s: NDArray[np.float64]  # (requests,) seconds, nondecreasing
    prompt_tokens: NDArray[np.int64]  # (requests,) ≥ 1
    output_tokens: NDArray[np.int64]  # (requests,) ≥ 1, the prefill stage emits the first
    predicted_output_tokens: NDArray[np.int64]  # (requests,) ≥ 1, what a predictor says of them

    def __post_init__(self) -> None:
        if len(self.arrival_s) == 0:
            raise ServegymError("a workload needs at least one request, got none")
        for name in ("prompt_tokens", "output_tokens", "predicted_output_tokens"):
            values = getattr(self, name)
            if len(values) != len(self.arrival_s):
                raise ServegymError(
                    f"{name} has {len(values)} entries, arrival_s has {len(self.arrival_s)}"
                )
            if values.min() < 1 or values.max() > MAX_TOKENS:
                raise ServegymError(f"{name} must lie in 1 … {MAX_TOKENS}")
        if not np.all(np.isfinite(self.arrival_s)) or self.arrival_s[0] < 0:
            raise ServegymError("arrival_s must be finite and ≥ 0")
        if np.any(np.diff(self.arrival_s) < 0):
            raise ServegymError("arrival_s must not decrease; sort the requests first")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def first(self, count: int) -> Requests | None:
        """Return the ``count`` earliest requests, None if that is nobody."""
        if count == 0:
            return None
        return Requests(*(getattr(self, item.name)[:count] for item in fields(self)))

    @property
    def decode_rounds(self) -> NDArray[np.int64]:
        """Decode rounds each request needs after its prefill: output tokens − 1, shape (requests,)."""
        return self.output_tokens - 1


def make_requests(
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    arrival_s: ArrayLike | None = None,
    predicted_output_tokens: ArrayLike | None = None,
) -> Requests:
    """Sort by arrival (ties keep their order) and fill the optional columns.

    Missing arrivals are 0; missing predictions are the true output lengths.
    """
    prompts = _whole("prompt_tokens", prompt_tokens)
    outputs = _whole("output_tokens", output_tokens)
    arrivals = np.zeros(len(prompts)) if arrival_s is None else np.asarray(arrival_s, dtype=float)
    predictions = outputs
    if predicted_output_tokens is not None:
        predictions = _whole("predicted_output_tokens", predicted_output_tokens)
    if not len(prompts) == len(outputs) == len(arrivals) == len(predictions):
        raise ServegymError(
            f"a workload's columns must be equally long, got {len(prompts)} prompt_tokens, "
            f"{len(outputs)} output_tokens, {len(arrivals)} arrival_s, {len(predictions)} predictions"
        )
    if arrival_s is None:
        return Requests(arrivals, prompts, outputs, predictions)
    order = np.argsort(arrivals, kind="stable")
    return Requests(arrivals[order], prompts[order], outputs[order], predictions[order])


def _whole(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer) and not np.array_equal(array, np.rint(array)):
        raise ServegymError(f"{name} must be whole numbers")
    return array.astype(np.int64)


def read_requests(path: str | Path) -> Requests:
    """Read a workload CSV: ``prompt_tokens, output_tokens[, arrival_s, predicted_output_tokens]``.

    Raises
    ------
    ServegymError
        One line naming the file, the line and the column: missing file, no rows, unknown or missing
        columns, a value that is not a whole number in 1 … 10 million (not a finite time ≥ 0 for
        ``arrival_s``).
    """
    path = Path(path)
    table = _read_table(path)
    for name in _REQUIRED:
        if name not in table.columns:
            raise ServegymError(
                f"{path}: line 1: column {name!r} is missing; a workload has "
                f"{', '.join(_REQUIRED)} and optionally {', '.join(_OPTIONAL)}"
            )
    for name in table.columns:
        if name not in _REQUIRED + _OPTIONAL:
            error = unknown("column", name, _REQUIRED + _OPTIONAL)
            raise ServegymError(f"{path}: line 1: {error}")
    if len(table) == 0:
        raise ServegymError(f"{path}: the file has a header but no request; add at least one row")
    columns = {name: _column(path, table[name]) for name in table.columns}
    return make_requests(
        columns["prompt_tokens"],
        columns["output_tokens"],
        columns.get("arrival_s"),
        columns.get("predicted_output_tokens"),
    )


def _read_table(path: Path) -> pd.DataFrame:
    """Return the file's cells as texts; every row must have as many as the header."""
    if not path.is_file():
        raise ServegymError(f"{path}: no such workload file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ServegymError(f"{path}: not a CSV file in UTF-8: {error}") from None
    while rows and not any(rows[-1]):
        rows.pop()  # blank lines at the end
    if not rows:
        raise ServegymError(f"{path}: the file is empty; a header and one row are needed")
    header = [name.strip() for name in rows[0]]
    for name in header:
        if header.count(name) > 1:
            raise ServegymError(f"{path}: line 1: column {name!r} stands there twice")
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ServegymError(
                f"{path}: line {line}: {len(row)} fields where the header has {len(header)}"
            )
    return pd.DataFrame(rows[1:], columns=header, dtype=str)


def _column(path: Path, texts: pd.Series[str]) -> NDArray[np.float64]:
    """Parse one column; the first bad value is named with its line (the header is line 1)."""
    values = pd.to_numeric(texts, errors="coerce").to_numpy(dtype=float)
    if texts.name == "arrival_s":
        rule = f"a time in seconds, 0 … {MAX_ARRIVAL_S:g}"
        good = np.isfinite(values) & (values >= 0) & (values <= MAX_ARRIVAL_S)
    else:
        rule = f"a whole number in 1 … {MAX_TOKENS}"
        good = (values >= 1) & (values <= MAX_TOKENS) & (np.floor(values) == values)
    if not good.all():
        row = int(np.argmin(good))
        raise ServegymError(
            f"{path}: line {row + 2}: {texts.name} must be {rule}, got {texts.iloc[row]!r}"
        )
    return values
