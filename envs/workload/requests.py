"""Requests of one episode, and the CSV files they come from."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from servegym.envs.arguments import real_numbers, whole_numbers
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.files import decode_text, read_bytes

MAX_TOKENS: Final = 10_000_000
"""Longest prompt or output accepted, in tokens; beyond it a file is taken to be wrong."""

MAX_REQUESTS: Final = 10_000_000
"""Most requests of an episode."""

MAX_ARRIVAL_S: Final = 1e9
"""Latest arrival accepted, in seconds."""

MAX_SPREAD: Final = 5.0
"""Largest standard deviation of a log length accepted; a factor of 150 either way."""

_REQUIRED: Final = ("prompt_tokens", "output_tokens")
_OPTIONAL: Final = ("arrival_s", "predicted_output_tokens", "predicted_spread")


@dataclass(frozen=True, eq=False)
class Requests:
    """The requests of one episode, in arrival order: a request's id is its row.

    A prediction is a lognormal distribution of the output length: its mean and the standard
    deviation of the length's logarithm, 0 where the predictor is certain. Without a spread nobody has
    predicted, and the predictions are only the true lengths over again.

    Raises
    ------
    ServegymError
        If the arrays hold anything but numbers in one dimension, differ in length, are empty or longer
        than ``MAX_REQUESTS``, hold a token count outside 1 … ``MAX_TOKENS``, a spread outside 0 …
        ``MAX_SPREAD`` or an arrival outside 0 … ``MAX_ARRIVAL_S`` or earlier than the one before it.
    """

    arrival_s: NDArray[np.float64]  # (requests,) seconds, nondecreasing
    prompt_tokens: NDArray[np.int64]  # (requests,) ≥ 1
    output_tokens: NDArray[np.int64]  # (requests,) ≥ 1, the prefill stage emits the first
    predicted_output_tokens: NDArray[np.int64]  # (requests,) ≥ 1, mean that a predictor expects
    predicted_spread: NDArray[np.float64] | None = None  # (requests,) or None: not predicted

    def __post_init__(self) -> None:
        self._set("arrival_s", real_numbers("arrival_s", self.arrival_s))
        if len(self.arrival_s) == 0:
            raise ServegymError("a workload needs at least one request, got none")
        if len(self.arrival_s) > MAX_REQUESTS:
            raise ServegymError(
                f"a workload has at most {MAX_REQUESTS} requests, got {len(self.arrival_s)}"
            )
        predicted = self.predicted_output_tokens
        for name in ("prompt_tokens", "output_tokens"):
            self._set(name, _tokens(name, getattr(self, name)))
        if predicted is not self.output_tokens:  # the usual case is not looked at twice
            predicted = _tokens("predicted_output_tokens", predicted)
        self._set("predicted_output_tokens", predicted)
        spread = self.predicted_spread
        if spread is not None:
            spread = real_numbers("predicted_spread", spread)
            self._set("predicted_spread", spread)
            if not np.all((spread >= 0) & (spread <= MAX_SPREAD)):
                raise ServegymError(f"predicted_spread must lie in 0 … {MAX_SPREAD:g}")
        arrivals = self.arrival_s
        ordered = bool((arrivals[1:] >= arrivals[:-1]).all())  # False where one is NaN
        if not (ordered and arrivals[0] >= 0 and arrivals[-1] <= MAX_ARRIVAL_S):
            _refuse_arrivals(arrivals)

    def _set(self, name: str, values: NDArray[Any]) -> None:
        """Put a checked column in the place of what was passed in."""
        if name != "arrival_s" and len(values) != len(self.arrival_s):
            raise ServegymError(
                f"{name} has {len(values)} entries, arrival_s has {len(self.arrival_s)}"
            )
        object.__setattr__(self, name, values)  # the way into a frozen dataclass

    def __len__(self) -> int:
        return len(self.arrival_s)

    def first(self, count: int) -> Requests | None:
        """Return the ``count`` earliest requests, None if that is nobody."""
        if count == 0:
            return None
        spread = self.predicted_spread
        return Requests(
            self.arrival_s[:count],
            self.prompt_tokens[:count],
            self.output_tokens[:count],
            self.predicted_output_tokens[:count],
            None if spread is None else spread[:count],
        )

    @property
    def decode_rounds(self) -> NDArray[np.int64]:
        """Decode rounds each request needs after its prefill: output tokens − 1, shape (requests,)."""
        return self.output_tokens - 1

    def as_predicted(self) -> Requests:
        """Return the requests with their predictions in the place of the true lengths.

        Raises
        ------
        ServegymError
            If nobody has predicted them.
        """
        if self.predicted_spread is None:
            raise ServegymError(
                "these requests have no predicted output lengths; sample_requests and inform "
                "predict them as the task says"
            )
        return replace(self, output_tokens=self.predicted_output_tokens)


def _refuse_arrivals(arrivals: NDArray[np.float64]) -> NoReturn:
    """Say what is wrong with arrival times that are not 0 … ``MAX_ARRIVAL_S`` in ascending order."""
    on_time = (arrivals >= 0) & (arrivals <= MAX_ARRIVAL_S)
    if on_time.all():
        raise ServegymError("arrival_s must not decrease; sort the requests first")
    i = int(np.argmin(on_time))
    raise ServegymError(
        f"arrival_s must be finite and ≥ 0, at most {MAX_ARRIVAL_S:g} seconds, got {arrivals[i]} for "
        f"request {i}"
    )


def make_requests(
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    arrival_s: ArrayLike | None = None,
    predicted_output_tokens: ArrayLike | None = None,
    predicted_spread: ArrayLike | None = None,
) -> Requests:
    """Sort by arrival (ties keep their order) and fill the optional columns.

    Missing arrivals are 0; missing predictions are the true output lengths. Predictions without a
    spread get one and the same: the root mean square of log(true / predicted), what a predictor's
    user knows of its errors in general.

    Raises
    ------
    ServegymError
        If a column is not a list or an array of one dimension, holds no numbers or numbers out of the
        range that :class:`Requests` names, or the columns differ in length.
    """
    # Copies, so that the caller may go on writing into the arrays.
    prompts = _tokens("prompt_tokens", prompt_tokens).copy()
    outputs = _tokens("output_tokens", output_tokens).copy()
    arrivals = np.zeros(len(prompts)) if arrival_s is None else real_numbers("arrival_s", arrival_s)
    predictions = outputs
    if predicted_output_tokens is not None:
        predictions = _tokens("predicted_output_tokens", predicted_output_tokens).copy()
    spread = None
    if predicted_spread is not None:
        if predicted_output_tokens is None:
            raise ServegymError("predicted_spread needs predicted_output_tokens beside it")
        spread = real_numbers("predicted_spread", predicted_spread).copy()
    lengths = [len(prompts), len(outputs), len(arrivals), len(predictions)]
    if len({*lengths, lengths[0] if spread is None else len(spread)}) > 1:
        raise ServegymError(
            f"a workload's columns must be equally long, got {len(prompts)} prompt_tokens, "
            f"{len(outputs)} output_tokens, {len(arrivals)} arrival_s, {len(predictions)} predictions"
            + ("" if spread is None else f", {len(spread)} spreads")
        )
    if predicted_output_tokens is not None and spread is None:
        spread = np.full(len(outputs), _usual_error(outputs, predictions))
    if arrival_s is None:
        return Requests(arrivals, prompts, outputs, predictions, spread)
    order = np.argsort(arrivals, kind="stable")
    return Requests(
        arrivals[order],
        prompts[order],
        outputs[order],
        predictions[order],
        None if spread is None else spread[order],
    )


def _usual_error(outputs: NDArray[np.int64], predictions: NDArray[np.int64]) -> float:
    """Return the root mean square of log(true / predicted), at most ``MAX_SPREAD``."""
    if len(outputs) == 0:
        return 0.0  # ``Requests`` says what is wrong
    errors = np.log(outputs / predictions)
    return min(float(np.sqrt(np.mean(errors**2))), MAX_SPREAD)


def _tokens(name: str, values: ArrayLike) -> NDArray[np.int64]:
    return whole_numbers(name, values, 1, MAX_TOKENS)


def read_requests(path: str | Path) -> Requests:
    """Read a workload CSV of ``prompt_tokens`` and ``output_tokens``.

    Optional columns: ``arrival_s``, ``predicted_output_tokens`` and, beside it, ``predicted_spread``,
    the standard deviation of log(true / predicted); see ``make_requests`` for what is missing.

    Raises
    ------
    ServegymError
        One line naming the file, the line and the column: missing file, no rows, unknown or missing
        columns, a value that is not a whole number in 1 … 10 million (not a finite time ≥ 0 for
        ``arrival_s``, not a number in 0 … 5 for ``predicted_spread``).
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
    if "predicted_spread" in table.columns and "predicted_output_tokens" not in table.columns:
        raise ServegymError(
            f"{path}: line 1: column 'predicted_spread' needs 'predicted_output_tokens' beside it"
        )
    if len(table) == 0:
        raise ServegymError(f"{path}: the file has a header but no request; add at least one row")
    columns = {name: _column(path, table[name]) for name in table.columns}
    return make_requests(
        columns["prompt_tokens"],
        columns["output_tokens"],
        columns.get("arrival_s"),
        columns.get("predicted_output_tokens"),
        columns.get("predicted_spread"),
    )


def _read_table(path: Path) -> pd.DataFrame:
    """Return the file's cells as texts, labelled by line; each row must have as many as the header."""
    text = decode_text(path, read_bytes(path, "workload file"))
    _check_separator(path, text)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []  # where each row begins: a quoted field may run over several lines
    try:
        line = 1
        for row in reader:
            rows.append(row)
            lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ServegymError(f"{path}: line {line}: not a CSV file: {error}") from None
    while rows and not any(rows[-1]):
        rows.pop()  # blank lines at the end
    if not rows:
        raise ServegymError(f"{path}: the file is empty; a header and one row are needed")
    header = [name.strip() for name in rows[0]]
    for name in header:
        if header.count(name) > 1:
            raise ServegymError(f"{path}: line 1: column {shown(name)} stands there twice")
    for line, row in zip(lines[1:], rows[1:], strict=False):
        if len(row) != len(header):
            raise ServegymError(
                f"{path}: line {line}: {len(row)} fields where the header has {len(header)}"
            )
    return pd.DataFrame(rows[1:], index=lines[1 : len(rows)], columns=header, dtype=str)


def _check_separator(path: Path, text: str) -> None:
    """Refuse a header between whose names something else than a comma stands."""
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    if "," in header:
        return
    for separator, name in {";": "';'", "\t": "a tab", "|": "'|'", " ": "a space"}.items():
        if {part.strip(" \"'") for part in header.split(separator)}.issuperset(_REQUIRED):
            raise ServegymError(f"{path}: line 1: uses {name} between fields; a workload uses ','")


def _column(path: Path, texts: pd.Series[str]) -> NDArray[np.float64]:
    """Parse one column; the first bad value is named with its line."""
    values = pd.to_numeric(texts, errors="coerce").to_numpy(dtype=float)
    if texts.name == "arrival_s":
        rule = f"a time in seconds, 0 … {MAX_ARRIVAL_S:g}"
        good = np.isfinite(values) & (values >= 0) & (values <= MAX_ARRIVAL_S)
    elif texts.name == "predicted_spread":
        rule = f"a number in 0 … {MAX_SPREAD:g}"
        good = (values >= 0) & (values <= MAX_SPREAD)
    else:
        rule = f"a whole number in 1 … {MAX_TOKENS}"
        good = (values >= 1) & (values <= MAX_TOKENS) & (np.floor(values) == values)
    if not good.all():
        row = int(np.argmin(good))
        raise ServegymError(
            f"{path}: line {texts.index[row]}: {texts.name} must be {rule}, "
            f"got {shown(texts.iloc[row])}"
        )
    return values
