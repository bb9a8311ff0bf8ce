"""Tables of results as CSV files: read to the last bit, or refused in one line."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from servegym.envs.errors import ServegymError
from servegym.envs.files import decode_text, read_bytes


@dataclass(frozen=True)
class Schema:
    """What a table of results must be; a column is of finite numbers unless it is named here."""

    columns: Sequence[str]
    """Its columns in their order."""
    others: bool = False
    """Whether it may have other columns, too, in any order."""
    key: Sequence[str] = ()
    """Columns that together name a row: no two rows have the same."""
    whole: Collection[str] = ("seed",)
    """Columns of whole numbers ≥ 0, none missing."""
    texts: Collection[str] = ()
    """Columns of texts, none empty."""
    flags: Collection[str] = ()
    """Columns of ``True`` and ``False``."""
    optional: Collection[str] | None = ()
    """Columns of numbers where a cell may be empty, which is NaN; None: all that are not ``whole``."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Columns that tables of earlier versions lack, and what they stand for there."""


class _Row(NamedTuple):
    line: int
    cells: list[str]


def read_rows(path: Path, schema: Schema, remedy: str) -> pd.DataFrame:
    """Return a CSV file of results; without rows where there is no file.

    Every number is read to the last bit, so a table that is written again stays what it was. A row that
    stands there twice, cell by cell, is taken once.

    Parameters
    ----------
    path, schema
        The file and what it must be.
    remedy
        What to do about a file that is something else, such as ``remove it``.

    Raises
    ------
    ServegymError
        One line naming file and line: other columns, a row that is cut off, a cell that is not what
        its column holds, two rows of the same key that differ.
    """
    if not path.exists():
        return pd.DataFrame({name: [] for name in schema.columns})
    header, rows = _parse(path, remedy)
    lacking = _lacking(path, header, schema, remedy)
    rows = _each_once(path, header, rows, schema)
    columns: dict[str, Any] = {}
    for name in header if schema.others else schema.columns:
        if name in lacking:
            columns[name] = [schema.defaults[name]] * len(rows)
        else:
            place = header.index(name)
            texts = [(row.line, row.cells[place]) for row in rows]
            columns[name] = _values(path, name, texts, schema)
    return pd.DataFrame(columns)


def _parse(path: Path, remedy: str) -> tuple[list[str], list[_Row]]:
    try:
        text = decode_text(path, read_bytes(path, "table"))
    except ServegymError as error:
        raise ServegymError(f"{error}; {remedy}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [_Row(reader.line_num, cells) for cells in reader if cells]  # not of blank lines
    except csv.Error as error:
        raise ServegymError(
            f"{path}: line {reader.line_num}: not a row of a table ({error}); delete this line"
        ) from None
    if not rows:
        raise ServegymError(f"{path}: empty; {remedy}")
    header = rows.pop(0).cells
    for line, cells in rows:
        if len(cells) != len(header):
            raise ServegymError(
                f"{path}: line {line}: {len(cells)} cells where the header has {len(header)}; delete "
                "this line, and its results are made again"
            )
    if rows and not text.endswith(("\n", "\r")):
        raise ServegymError(
            f"{path}: line {rows[-1].line}: cut off, no end of the line; delete this line, and its "
            "results are made again"
        )
    return header, rows


def _lacking(path: Path, header: Sequence[str], schema: Schema, remedy: str) -> set[str]:
    """Return the columns that the table of an earlier version lacks; refuse other columns."""
    missing = [name for name in schema.columns if name not in header]
    strange = [name for name in header if name not in schema.columns and not schema.others]
    if len(set(header)) < len(header):
        problem = "a column stands there twice"
    elif lost := [name for name in missing if name not in schema.defaults]:
        problem = f"no column {lost[0]!r}"
    elif strange:
        problem = f"column {strange[0]!r} is not one of its"
    elif not schema.others and [x for x in schema.columns if x not in missing] != list(header):
        problem = "its columns are in another order"
    else:
        return set(missing)
    raise ServegymError(f"{path}: not a table of this version: {problem}; {remedy}")


def _each_once(
    path: Path, header: Sequence[str], rows: Sequence[_Row], schema: Schema
) -> list[_Row]:
    """Return the rows less those that are there twice; refuse two that differ under one key."""
    places = [header.index(name) for name in schema.key]
    found: dict[tuple[str, ...], _Row] = {}
    for row in rows:
        key = tuple(row.cells[place] for place in places) if places else tuple(row.cells)
        first = found.setdefault(key, row)
        if first.cells != row.cells:
            named = ", ".join(f"{name} {row.cells[header.index(name)]}" for name in schema.key)
            raise ServegymError(
                f"{path}: lines {first.line} and {row.line}: two different rows of {named}; delete "
                "the wrong one, or both, and the results are made again"
            )
    return list(found.values())


def _values(path: Path, name: str, texts: list[tuple[int, str]], schema: Schema) -> list[Any]:
    """Return the cells of a column; of integers if all of its cells are, as pandas has it."""
    if name in schema.texts:
        return [_checked(path, line, name, text, text != "", "a text") for line, text in texts]
    if name in schema.flags:
        known = {"True": True, "False": False}
        return [
            known[_checked(path, line, name, text, text in known, "True or False")]
            for line, text in texts
        ]
    if name in schema.whole or all(_is_whole(text.removeprefix("-")) for _, text in texts):
        signed = name not in schema.whole
        return [
            int(
                _checked(
                    path, line, name, text,
                    signed or (_is_whole(text) and int(text) < 2**63), "a whole number ≥ 0",
                )
            )
            for line, text in texts
        ]  # fmt: skip
    optional = schema.optional is None or name in schema.optional
    return [
        math.nan if optional and text == "" else _number(path, line, name, text)
        for line, text in texts
    ]


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _number(path: Path, line: int, name: str, text: str) -> float:
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    _checked(path, line, name, text, math.isfinite(value), "a number")
    return value


def _checked(path: Path, line: int, name: str, text: str, good: bool, wanted: str) -> str:
    if not good:
        raise ServegymError(
            f"{path}: line {line}: {name} must be {wanted}, got {text[:40]!r}; delete this line, and "
            "its results are made again"
        )
    return text
