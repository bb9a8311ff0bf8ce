"""Workload files in our own columns: one request a row, each value checked, none dropped."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.workload.cells import numbers_in
from servegym.envs.workload.formats import FORMATS
from servegym.envs.workload.requests import (
    EVERYBODY,
    MAX_ARRIVAL_S,
    MAX_CLASSES,
    MAX_SPREAD,
    MAX_TOKENS,
    Requests,
    make_requests,
)

_REQUIRED: Final = ("prompt_tokens", "output_tokens")
_OPTIONAL: Final = ("arrival_s", "predicted_output_tokens", "predicted_spread", "class")


def read_own_csv(path: Path, text: str) -> Requests:
    """Return the requests of a CSV text with our own columns; nothing is dropped.

    Raises
    ------
    ServegymError
        One line naming the file, the line and the column; see ``read_requests``.
    """
    table = _read_table(path, text)
    for name in _REQUIRED:
        if name not in table.columns:
            raise ServegymError(
                f"{path}: line 1: column {name!r} is missing; a workload has "
                f"{', '.join(_REQUIRED)} and optionally {', '.join(_OPTIONAL)}"
            )
    check_own_names(f"{path}: line 1", table.columns)
    if len(table) == 0:
        raise ServegymError(f"{path}: the file has a header but no request; add at least one row")
    return own_requests(path, table, "line")


def check_own_names(where: str, names: Iterable[str]) -> None:
    """Refuse a column that our own format does not have, or a spread without predictions."""
    for name in names:
        if name not in _REQUIRED + _OPTIONAL:
            error = unknown("column", name, _REQUIRED + _OPTIONAL)
            raise ServegymError(f"{where}: {error}")
    if "predicted_spread" in names and "predicted_output_tokens" not in names:
        raise ServegymError(
            f"{where}: column 'predicted_spread' needs 'predicted_output_tokens' beside it"
        )


def own_requests(path: Path, table: pd.DataFrame, place: str) -> Requests:
    """Return the requests of a table of our own columns, whose index holds the place of each row."""
    classes = _classes(path, table["class"], place) if "class" in table.columns else None
    columns = {name: _column(path, table[name], place) for name in table.columns if name != "class"}
    return make_requests(
        columns["prompt_tokens"],
        columns["output_tokens"],
        columns.get("arrival_s"),
        columns.get("predicted_output_tokens"),
        columns.get("predicted_spread"),
        classes=classes,
    )


def _read_table(path: Path, text: str) -> pd.DataFrame:
    """Return the file's cells as texts, labelled by line; each row must have as many as the header."""
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


def check_separator(path: Path, text: str) -> None:
    """Refuse a header between whose names something else than a comma stands."""
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    if "," in header:
        return
    for separator, name in {";": "';'", "\t": "a tab", "|": "'|'", " ": "a space"}.items():
        parts = {part.strip(" \"'") for part in header.split(separator)}
        if any(parts >= form.lengths for form in FORMATS.values()):
            raise ServegymError(f"{path}: line 1: uses {name} between fields; a workload uses ','")


def _classes(path: Path, texts: pd.Series[Any], place: str) -> list[str]:
    """Return the class of each request; the first that is missing is named with its line."""
    classes = [str(text).strip() for text in texts]
    seen: set[str] = set()
    for line, name in zip(texts.index, classes, strict=True):
        seen.add(name)
        if name in ("", EVERYBODY):
            raise ServegymError(
                f"{path}: {place} {line}: class must be a text or a number, not {EVERYBODY!r}, got "
                f"{shown(name)}"
            )
        if len(seen) > MAX_CLASSES:
            raise ServegymError(
                f"{path}: {place} {line}: class {shown(name)} is one more than the {MAX_CLASSES} "
                "classes that a workload may have"
            )
    return classes


def _column(path: Path, texts: pd.Series[Any], place: str) -> NDArray[np.float64]:
    """Parse one column; the first bad value is named with its line."""
    values = numbers_in(texts)
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
            f"{path}: {place} {texts.index[row]}: {texts.name} must be {rule}, "
            f"got {shown(texts.iloc[row])}"
        )
    return values
