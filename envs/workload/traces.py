"""Workload files as they are published, recognised by their columns.

A file in our own columns is read strictly. Of published traces (``formats.FORMATS``) rows that are no
request are dropped and counted: those of zero prompt or output tokens (BurstGPT's failures), and those with
a value missing. Anything else that is wrong is refused with its line. Rows may stand in any order; equal
times keep theirs. Times count from a published trace's first request.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError, shown
from servegym.envs.workload.arrivals import Measured
from servegym.envs.workload.cells import (
    Cells,
    csv_header,
    is_hole,
    numbers_in,
    read_csv_cells,
    read_json_cells,
    read_workload_text,
)
from servegym.envs.workload.csv import check_own_names, check_separator, own_requests, read_own_csv
from servegym.envs.workload.formats import FORMATS, OWN, Format, recognise
from servegym.envs.workload.requests import (
    MAX_ARRIVAL_S,
    MAX_REQUESTS,
    MAX_TOKENS,
    Requests,
    make_requests,
)


@dataclass(frozen=True, eq=False)
class Trace:
    r"""A workload file as read: its requests, and what was left out.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "trace.csv"
    ...     _ = path.write_text("num_prefill_tokens,num_decode_tokens\n70,300\n55,0\n")
    ...     read_trace(path).summary()
    '1 request of 2 rows (vidur); dropped: 1 of zero tokens'
    """

    form: str
    """One of ``FORMATS``."""
    requests: Requests
    """Sorted by arrival; ``rows`` are those of the file, from 0. All at t = 0 without arrival times."""
    arrives: bool
    """Whether the file has arrival times."""
    read: int
    """Rows of the file."""
    dropped: Mapping[str, int]
    """How many rows were left out, by reason."""

    def summary(self) -> str:
        """Return in one line how many rows were read and why some were dropped."""
        count = len(self.requests)
        text = f"{count} request{'s' if count > 1 else ''} of {self.read} rows ({self.form})"
        if self.arrives:
            text += f" over {self.requests.arrival_s[-1]:.6g} s"
        reasons = [f"{count} {reason}" for reason, count in self.dropped.items() if count]
        return text + (f"; dropped: {', '.join(reasons)}" if reasons else "")

    def measured(self, rate_scale: float = 1.0) -> Measured | None:
        """Return the scaled rate and the cv of its gaps; None without arrivals over some time."""
        arrivals_s = self.requests.arrival_s
        if not self.arrives or len(arrivals_s) < 3 or arrivals_s[-1] <= arrivals_s[0]:
            return None
        gaps_s = np.diff(arrivals_s)
        return Measured(rate_scale / float(gaps_s.mean()), float(gaps_s.std() / gaps_s.mean()))

    def without_longer(self, max_tokens: int) -> Trace:
        """Return the trace without requests whose prompt and output exceed ``max_tokens``.

        Raises
        ------
        ServegymError
            Without the path, if none is left.
        """
        kept = self.requests
        fits = np.flatnonzero(kept.prompt_tokens + kept.output_tokens <= max_tokens)
        if len(fits) == len(kept):
            return self
        if len(fits) == 0:
            raise ServegymError(f"none of {len(kept)} requests has at most {max_tokens} tokens")
        dropped = {**self.dropped, f"of more than {max_tokens} tokens": len(kept) - len(fits)}
        return replace(self, requests=picked(kept, fits), dropped=dropped)


def picked(requests: Requests, chosen: NDArray[np.int64]) -> Requests:
    """Return the requests at some places, in order; their rows are those of the file."""
    spread, rows = requests.predicted_spread, requests.rows
    outputs = requests.output_tokens[chosen]
    predicted = requests.predicted_output_tokens
    return Requests(
        requests.arrival_s[chosen],
        requests.prompt_tokens[chosen],
        outputs,
        outputs if predicted is requests.output_tokens else predicted[chosen],
        None if spread is None else spread[chosen],
        chosen if rows is None else rows[chosen],
        class_of=None if requests.class_of is None else requests.class_of[chosen],
        class_names=requests.class_names,
    )


# ---- reading --------------------------------------------------------------------------------


def read_requests(path: str | Path) -> Requests:
    r"""Read a workload file: our own columns, or a published trace (``read_trace``).

    Our own columns are ``prompt_tokens`` and ``output_tokens``; optional: ``arrival_s``,
    ``predicted_output_tokens`` and, beside it, ``predicted_spread``, the standard deviation of
    log(true / predicted); see ``make_requests`` for what is missing.

    Raises
    ------
    ServegymError
        One line naming the file, the line and the column: missing file, no rows, unknown or missing
        columns, a value that is not a whole number in 1 … 10 million (not a finite time ≥ 0 for
        ``arrival_s``, not a number in 0 … 5 for ``predicted_spread``).

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "requests.csv"
    ...     _ = path.write_text("prompt_tokens,output_tokens\n70,300\n55,120\n")
    ...     read_requests(path).output_tokens
    array([300, 120])
    """
    return read_trace(path).requests


def read_trace(path: str | Path) -> Trace:
    """Read a workload file and say what was left out of it.

    Raises
    ------
    ServegymError
        One line naming the file and the line of what is wrong, or if no request is left.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "mooncake.jsonl"
    ...     _ = path.write_text(
    ...         '{"timestamp": 0, "input_length": 70, "output_length": 5, "hash_ids": []}'
    ...     )
    ...     read_trace(path).requests.output_tokens
    array([5])
    """
    path = Path(path)
    text = read_workload_text(path)
    if not path.name.lower().removesuffix(".gz").endswith((".json", ".jsonl")):
        return _read_csv(path, text)
    cells = read_json_cells(path, text)
    form = _recognised_json(path, cells)
    if form == OWN:
        check_own_names(str(path), cells.names)
        table = cells.table.set_index(pd.Index(cells.lines))
        return _own(own_requests(path, table, cells.place), "arrival_s" in cells.names)
    return _published(path, cells, form)


def _own(requests: Requests, arrives: bool) -> Trace:
    return Trace(OWN, requests, arrives, len(requests), {})


def _read_csv(path: Path, text: str) -> Trace:
    check_separator(path, text)
    names = csv_header(text.replace("\r", "\n"))
    try:
        form = recognise(names)
    except ServegymError as error:
        raise ServegymError(f"{path}: line 1: {error}") from None
    if form in (None, OWN):
        return _own(read_own_csv(path, text), "arrival_s" in names)
    columns = FORMATS[form]
    wanted = (columns.prompt, columns.output, columns.arrival)
    for name in wanted:
        if names.count(name) > 1:
            raise ServegymError(f"{path}: line 1: column {shown(name)} stands there twice")
    cells = _quoted_cells(path, text) if '"' in text else read_csv_cells(path, text, wanted)
    if len(cells.table) == 0:
        raise ServegymError(f"{path}: the file has a header but no request; add at least one row")
    return _published(path, cells, form)


def _quoted_cells(path: Path, text: str) -> Cells:
    """Read a CSV text with quotation marks, in which a field may run over several lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    lines, line = [], 1
    try:
        for row in reader:
            rows.append([*row])
            lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ServegymError(f"{path}: line {line}: not a CSV file: {error}") from None
    while rows and not any(rows[-1]):
        rows.pop()  # blank lines at the end
    names = tuple(name.strip(' \t"') for name in rows[0])
    for line, row in zip(lines, rows, strict=False):
        if len(row) > len(names):
            raise ServegymError(
                f"{path}: line {line}: {len(row)} fields where the header has {len(names)}"
            )
        row += [""] * (len(names) - len(row))
    table = pd.DataFrame(rows[1:], columns=list(names), dtype=str)
    return Cells(names, table, np.array(lines[1 : len(rows)], np.int64), "line")


def _recognised_json(path: Path, cells: Cells) -> str:
    """Return the format of JSON objects; refuse a file in which it changes."""
    there = cells.table.notna()
    first = [name for name in cells.table.columns if there[name].iloc[0]]
    try:
        form = recognise(first) or recognise(cells.names)
    except ServegymError as error:
        place = f"{cells.place} {cells.lines[0]}"
        try:  # the first one may have a hole
            form = recognise(cells.names)
        except ServegymError:
            raise ServegymError(f"{path}: {place}: {error}") from None
    if form is None:
        keys = ", ".join(sorted(form.prompt for form in FORMATS.values()))
        raise ServegymError(f"{path}: has none of the keys {keys}, by which a trace is known")
    for name, other in FORMATS.items():
        if name != form and other.lengths <= set(cells.table.columns):
            row = int(np.argmax(there[other.prompt] | there[other.output]))
            raise ServegymError(
                f"{path}: {cells.place} {cells.lines[row]}: columns of {name} in a file of {form}"
            )
    return form


def _published(path: Path, cells: Cells, form: str) -> Trace:
    """Return the requests of a published trace; count the rows that are none."""
    columns = FORMATS[form]
    holes = np.zeros(len(cells.table), np.bool_)
    tokens = []
    for name in (columns.prompt, columns.output):
        values = numbers_in(cells.table[name])
        holes |= _holes(cells, name, values)
        good = (values >= 0) & (values <= MAX_TOKENS) & (np.floor(values) == values)
        _refuse_first(path, cells, name, holes | good, f"a whole number in 0 … {MAX_TOKENS}")
        tokens.append(values)
    arrives = columns.arrival in cells.table.columns
    times_s = np.zeros(len(holes))
    if arrives:
        times_s, lacking = _times(path, cells, columns, holes)
        holes = holes | lacking
    empty = ~holes & ((tokens[0] == 0) | (tokens[1] == 0))
    kept = np.flatnonzero(~(holes | empty))
    dropped = {"of zero tokens": int(empty.sum()), "with a value missing": int(holes.sum())}
    if len(kept) == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise ServegymError(f"{path}: none of its {len(holes)} rows is a request: {reasons}")
    if len(kept) > MAX_REQUESTS:
        raise ServegymError(f"{path}: holds {len(kept)} requests, more than {MAX_REQUESTS}; cut it")
    times_s = times_s[kept] - times_s[kept].min()
    if times_s.max() > MAX_ARRIVAL_S:
        line = cells.lines[kept[np.argmax(times_s)]]
        raise ServegymError(
            f"{path}: {cells.place} {line}: {columns.arrival} lies {times_s.max():.3g} s after the "
            f"first, more than {MAX_ARRIVAL_S:g}"
        )
    requests = make_requests(tokens[0][kept], tokens[1][kept], times_s if arrives else None)
    rows = kept if requests.rows is None else kept[requests.rows]
    in_order = len(rows) == len(holes) and requests.rows is None
    requests = replace(requests, rows=None if in_order else rows)
    return Trace(form, requests, arrives, len(holes), dropped)


def _holes(cells: Cells, name: str, values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return where a column holds nothing; only cells without a number are looked at."""
    holes = np.zeros(len(values), np.bool_)
    odd = np.flatnonzero(np.isnan(values))
    holes[odd] = [is_hole(value) for value in cells.table[name].iloc[odd]]
    return holes


def _refuse_first(path: Path, cells: Cells, name: str, good: NDArray[np.bool_], rule: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        value = cells.table[name].iloc[row]
        raise ServegymError(
            f"{path}: {cells.place} {cells.lines[row]}: {name} must be {rule}, got {shown(value)}"
        )


def _times(
    path: Path, cells: Cells, columns: Format, holes: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return arrival times in seconds from some instant, and where they are missing."""
    name = columns.arrival
    if columns.per_s is None:
        return _dates(path, cells, name, holes)
    values = numbers_in(cells.table[name])
    lacking = _holes(cells, name, values)
    rule = "a number" if columns.per_s == 1 else "a number, without a date"
    _refuse_first(path, cells, name, holes | lacking | np.isfinite(values), rule)
    there = ~(holes | lacking)
    first = values[there].min() if there.any() else 0.0
    return (values - first) / columns.per_s, lacking


_ZONE: Final = r"(?:[zZ]|[+-]\d\d:?\d\d)\s*$"


def _dates(
    path: Path, cells: Cells, name: str, holes: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    texts = cells.table[name].astype(str)
    try:
        dates = pd.to_datetime(texts, format="ISO8601", errors="coerce")
        if dates.isna().any():  # padded, perhaps
            dates = pd.to_datetime(texts.str.strip(), format="ISO8601", errors="coerce")
    except ValueError:  # zones differ, or only some rows have one
        zoned = texts.str.contains(_ZONE, regex=True).to_numpy()
        there = ~np.array([is_hole(text) for text in texts])
        alike = zoned == zoned[np.argmax(there)]
        rule = "a date with a zone, as" if zoned[np.argmax(there)] else "a date without a zone, as"
        _refuse_first(path, cells, name, alike | ~there, f"{rule} the rows before")
        dates = pd.to_datetime(texts.str.strip(), format="ISO8601", errors="coerce", utc=True)
    if dates.dt.tz is not None:
        dates = dates.dt.tz_convert(None)
    instants = dates.to_numpy("datetime64[ns]")
    unknown = np.isnat(instants)
    lacking = np.zeros(len(unknown), np.bool_)
    lacking[unknown] = [is_hole(value) for value in cells.table[name][unknown]]
    rule = "a date and time, as 2023-11-16 18:15:46.680"
    _refuse_first(path, cells, name, holes | lacking | ~unknown, rule)
    there = instants[~unknown & ~holes]
    first = there.min() if len(there) else np.datetime64(0, "ns")
    return (instants - first) / np.timedelta64(1, "ns") / 1e9, lacking
