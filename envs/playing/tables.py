"""Tables of results as CSV files: read to the last bit or refused in one line, and gone on with."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple, Self, TypeVar

import pandas as pd

from servegym.envs.errors import ServegymError
from servegym.envs.files import decode_text, read_bytes, write_file

SAVE_EVERY_S: Final = 2.0
"""Seconds between two writes of a :class:`ResumableTable` that rows are added to."""

SAVE_SHARE: Final = 0.05
"""Share of the time that writing takes at most: a table of a million rows takes half a minute each time."""

Row = dict[str, Any]
"""One row of a table: cells by column."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Schema:
    """The columns of a table of results; those not named below hold finite numbers."""

    columns: Sequence[str]
    """The columns in their order."""
    others: bool = False
    """Whether other columns are allowed, too, in any order."""
    key: Sequence[str] = ()
    """Columns that together name a row: no two rows have the same cells there."""
    whole: Collection[str] = ("seed",)
    """Columns of whole numbers ≥ 0, none missing."""
    texts: Collection[str] = ()
    """Columns of texts, none empty."""
    flags: Collection[str] = ()
    """Columns of ``True`` and ``False``."""
    optional: Collection[str] | None = ()
    """Columns of numbers where a cell may be empty, which is NaN; None: all that are not ``whole``."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Columns that tables of earlier versions lack, and their value in such a table."""
    if_deleted: str = "its results are made again"
    """What follows where a damaged line is deleted; ends the messages that advise to delete one."""


class _Row(NamedTuple):
    line: int
    cells: list[str]


def read_rows(path: Path, schema: Schema, remedy: str) -> pd.DataFrame:
    """Return a CSV file of results; without rows where there is no file.

    Every number is read to the last bit, so that a table written again has the same bytes. Two rows
    whose cells are all equal count once.

    Parameters
    ----------
    path, schema
        The file and its columns.
    remedy
        What to do about a file of other columns, such as ``remove the file``.

    Raises
    ------
    ServegymError
        One line naming file and line: other columns, another separator, a row that is cut off, a cell
        of another type than its column, two rows of the same key that differ.
    """
    if not path.exists():
        return pd.DataFrame({name: [] for name in schema.columns})
    header, rows = _parse(path, schema, remedy)
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


def as_rows(table: pd.DataFrame) -> list[Row]:
    """Return the rows of a table."""
    return [
        {str(name): cell for name, cell in row.items()}
        for row in table.to_dict("records")  # whose cells are plain numbers and texts
    ]


class ResumableTable:
    """Rows of a CSV file that an interrupted run goes on with.

    Rows that are added are saved every ``SAVE_EVERY_S`` seconds, less often where that would take more
    than ``SAVE_SHARE`` of the time, and when the ``with`` block ends, also by an exception. The file is
    always whole: it is written under another name, then renamed.

    Parameters
    ----------
    path, schema, remedy
        As of :func:`read_rows`; without the file the table begins without rows.
    key
        Columns that name a unit of work, which may have several rows. A key of one column is the
        cell itself, of several a tuple.
    order
        What rows are sorted by, equal ones as they came; None leaves them as they came.
    float_format
        Of numbers in the file, such as ``%.7g``; None writes them to the last bit.

    Raises
    ------
    ServegymError
        If the file is damaged or, later, cannot be written.
    """

    def __init__(
        self,
        path: Path,
        schema: Schema,
        remedy: str,
        key: Sequence[str],
        *,
        order: Callable[[Row], Any] | None = None,
        float_format: str | None = None,
    ) -> None:
        self._path, self._schema, self._key = path, schema, key
        self._order, self._float_format = order, float_format
        self._rows: dict[Hashable, list[Row]] = {}
        self._take(as_rows(read_rows(path, schema, remedy)))
        self._saved, self._changed, self._wait_s = monotonic(), False, SAVE_EVERY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._changed:
            self.save()

    @property
    def rows(self) -> list[Row]:
        """All rows in the order of the file."""
        rows = [row for group in self._rows.values() for row in group]
        return rows if self._order is None else sorted(rows, key=self._order)

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return those of ``keys`` that have no row yet, in their order."""
        return [key for key in keys if key not in self._rows]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add all rows of one or several keys; earlier rows of these keys are dropped."""
        self._take(rows)
        self._changed = True
        if monotonic() - self._saved > self._wait_s:
            self.save()

    def save(self) -> None:
        """Write the file."""
        started = monotonic()
        text = self.frame().to_csv(index=False, float_format=self._float_format)
        write_file(self._path, text)
        self._saved, self._changed = monotonic(), False
        self._wait_s = max(SAVE_EVERY_S, (self._saved - started) / SAVE_SHARE)

    def frame(self) -> pd.DataFrame:
        """Return all rows in the order of the file."""
        rows = self.rows
        if self._schema.others and rows:
            return pd.DataFrame(rows)
        return pd.DataFrame(rows, columns=list(self._schema.columns))

    def _take(self, rows: Iterable[Mapping[str, Any]]) -> None:
        groups: dict[Hashable, list[Row]] = {}
        for row in rows:
            cells = tuple(row[name] for name in self._key)
            groups.setdefault(cells if len(cells) > 1 else cells[0], []).append(dict(row))
        for key, group in groups.items():
            self._rows.pop(key, None)  # new rows stand behind the others
            self._rows[key] = group


def _parse(path: Path, schema: Schema, remedy: str) -> tuple[list[str], list[_Row]]:
    try:
        text = decode_text(path, read_bytes(path, "table"))
    except ServegymError as error:
        raise ServegymError(f"{error}; {remedy}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [_Row(reader.line_num, cells) for cells in reader if cells]  # not of blank lines
    except csv.Error as error:
        raise ServegymError(
            f"{path}: line {reader.line_num}: not a row of a table ({error}); delete this line, "
            f"and {schema.if_deleted}"
        ) from None
    if not rows:
        raise ServegymError(f"{path}: empty; {remedy}")
    header = rows.pop(0).cells
    _check_separator(path, header, schema)
    for line, cells in rows:
        if len(cells) != len(header):
            raise ServegymError(
                f"{path}: line {line}: {len(cells)} cells where the header has {len(header)}; delete "
                f"this line, and {schema.if_deleted}"
            )
    if rows and not text.endswith(("\n", "\r")):
        raise ServegymError(
            f"{path}: line {rows[-1].line}: cut off, no end of the line; delete this line, and "
            f"{schema.if_deleted}"
        )
    return header, rows


def _check_separator(path: Path, header: Sequence[str], schema: Schema) -> None:
    """Refuse a table that a spreadsheet has saved with another separator than a comma."""
    for separator, name in ((";", "';'"), ("\t", "tabs"), ("|", "'|'")):
        if len(header) == 1 and set(schema.columns) & set(header[0].split(separator)) - {header[0]}:
            raise ServegymError(
                f"{path}: line 1: its columns are separated by {name}; save it with commas"
            )


def _lacking(path: Path, header: Sequence[str], schema: Schema, remedy: str) -> set[str]:
    """Return the columns that the table of an earlier version lacks; refuse other columns."""
    missing = [name for name in schema.columns if name not in header]
    strange = [name for name in header if name not in schema.columns and not schema.others]
    if len(set(header)) < len(header):
        problem = "a column stands there twice"
    elif lost := [name for name in missing if name not in schema.defaults]:
        problem = f"no column {lost[0]!r}"
    elif strange:
        problem = f"column {strange[0]!r} is not one of its columns"
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
    first_rows: dict[tuple[str, ...], _Row] = {}
    for row in rows:
        key = tuple(row.cells[place] for place in places) if places else tuple(row.cells)
        first = first_rows.setdefault(key, row)
        if first.cells != row.cells:
            named = ", ".join(f"{name} {row.cells[header.index(name)]}" for name in schema.key)
            raise ServegymError(
                f"{path}: lines {first.line} and {row.line}: two different rows of {named}; delete "
                f"the wrong one, or both, and {schema.if_deleted}"
            )
    return list(first_rows.values())


def _values(path: Path, name: str, texts: list[tuple[int, str]], schema: Schema) -> list[Any]:
    """Return the cells of a column; of integers if all of its cells are, as pandas has it."""

    def checked(line: int, text: str, good: bool, wanted: str) -> str:
        if not good:
            raise ServegymError(
                f"{path}: line {line}: {name} must be {wanted}, got {text[:40]!r}; delete this line, "
                f"and {schema.if_deleted}"
            )
        return text

    if name in schema.texts:
        return [checked(line, text, text != "", "a text") for line, text in texts]
    if name in schema.flags:
        known = {"True": True, "False": False}
        return [known[checked(line, text, text in known, "True or False")] for line, text in texts]
    if name in schema.whole:
        return [
            int(checked(line, text, _is_whole(text) and int(text) < 2**63, "a whole number ≥ 0"))
            for line, text in texts
        ]
    if all(_is_whole(text.removeprefix("-")) for _, text in texts):
        return [int(text) for _, text in texts]
    optional = schema.optional is None or name in schema.optional
    return [
        math.nan
        if optional and text == ""
        else float(checked(line, text, math.isfinite(_number(text)), "a number"))
        for line, text in texts
    ]


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _number(text: str) -> float:
    """Return the number that a text stands for, NaN if none; Python's ``1_000`` is none here."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
