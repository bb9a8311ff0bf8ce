"""What a workload file holds, whatever its container: CSV, JSON lines or JSON, each also gzipped."""

from __future__ import annotations

import csv
import io
import json
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.errors import ServegymError, shown
from servegym.envs.files import MAX_BYTES, beyond_limits, decode_text, read_bytes
from servegym.envs.workload.formats import FORMATS

SUFFIXES: Final = (".csv", ".jsonl", ".json", ".csv.gz", ".jsonl.gz", ".json.gz")
"""Ends of the names of workload files."""

_GZIP: Final = b"\x1f\x8b"
_AS_GZIP: Final = 16 + zlib.MAX_WBITS
_PACKED, _UNPACKED = 1 << 16, 1 << 15  # bytes that are read, and unpacked, at once


class Cells(NamedTuple):
    """Some columns of a file."""

    names: tuple[str, ...]  # of all columns, also those that were not kept
    table: (
        pd.DataFrame
    )  # the wanted columns: texts, or JSON's values; a cell that is not there is NaN
    lines: NDArray[
        np.int64
    ]  # (rows,) the line of each row, from 1; the place in the list of a JSON list
    place: str  # what ``lines`` counts: line or entry


def is_file(source: str) -> bool:
    """Return whether a source is a workload file by its name, in capitals or not."""
    return source.lower().endswith(SUFFIXES)


def read_workload_text(path: Path) -> str:
    """Return a workload file's text, unpacked if it is gzipped; line ends stay as they are.

    Raises
    ------
    ServegymError
        If the file cannot be read, is no whole gzip file, too large or not UTF-8.
    """
    data = read_bytes(path, "workload file")
    if data.startswith(_GZIP):
        data = _unpacked(path, data)
    elif path.name.lower().endswith(".gz"):
        raise ServegymError(f"{path}: is not gzipped; name it without .gz")
    return decode_text(path, data)


def _unpacked(path: Path, data: bytes) -> bytes:
    """Return what a gzip file holds, of any number of members."""
    pieces: list[bytes] = []
    size, at = 0, 0
    reader = zlib.decompressobj(_AS_GZIP)
    try:
        while at < len(data) and not (reader.eof and data[at] == 0):  # zeros fill up a block
            if reader.eof:  # the next member
                reader = zlib.decompressobj(_AS_GZIP)
            rest = data[at : at + _PACKED]
            at += len(rest)
            while rest and not reader.eof:
                pieces.append(reader.decompress(rest, _UNPACKED))
                size += len(pieces[-1])
                rest = reader.unconsumed_tail
            if size > MAX_BYTES:
                raise ServegymError(f"{path}: unpacks to more than {MAX_BYTES} bytes; cut it")
            at -= len(reader.unused_data)
        problem = "" if reader.eof else "ends early"
    except zlib.error:
        problem = "is damaged"
    unpacked = b"".join(pieces)
    if problem:
        line = unpacked.count(b"\n") + 1
        raise ServegymError(f"{path}: line {line}: the gzip file {problem} here; fetch it again")
    return unpacked


# ---- CSV ------------------------------------------------------------------------------------


def read_csv_cells(path: Path, text: str, wanted: tuple[str, ...]) -> Cells:
    """Return the ``wanted`` columns of a CSV text without quotation marks, as texts.

    A row with too few fields lacks the last ones.

    Raises
    ------
    ServegymError
        If a row has more fields than the header.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n") + "\n"
    names = csv_header(text)
    _check_fields(path, text, len(names))
    kept = [k for k, name in enumerate(names) if name in wanted]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)
        table = pd.read_csv(
            io.StringIO(text),
            header=0,
            names=list(range(len(names))),  # by number: others may stand there twice
            index_col=False,
            usecols=kept,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
        )
    table.columns = pd.Index([names[k] for k in kept])
    return Cells(names, table, np.arange(2, len(table) + 2), "line")


def csv_header(text: str) -> tuple[str, ...]:
    """Return the names in the first line of a CSV text, without quotation marks."""
    first = text.split("\n", 1)[0].rstrip("\r")
    names = next(csv.reader([first]), []) if '"' in first else first.split(",")
    return tuple(name.strip(' \t"') for name in names)


def _check_fields(path: Path, text: str, fields: int) -> None:
    """Refuse a line with more fields than the header has."""
    data = np.frombuffer(text.encode(), np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    commas = np.flatnonzero(data == ord(","))
    counts = np.diff(np.searchsorted(commas, ends), prepend=0) + 1
    if counts.max() > fields:
        line = int(np.argmax(counts > fields))
        raise ServegymError(
            f"{path}: line {line + 1}: {counts[line]} fields where the header has {fields}"
        )


# ---- JSON -----------------------------------------------------------------------------------


def read_json_cells(path: Path, text: str) -> Cells:
    """Return the columns of all formats that a list of JSON objects holds, or one object a line.

    Raises
    ------
    ServegymError
        If the text is not JSON, or anything but objects.
    """
    place = "entry" if text.lstrip().startswith("[") else "line"
    wanted = {name for form in FORMATS.values() for name in (*form.lengths, form.arrival)}
    wanted |= {"predicted_output_tokens", "predicted_spread"}
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    names: dict[str, None] = {}
    for line, value in _whole_json(path, text) if place == "entry" else _json_lines(path, text):
        if not isinstance(value, dict):
            raise ServegymError(f"{path}: {place} {line}: must be an object, got {shown(value)}")
        names |= dict.fromkeys(value)
        rows.append({name: value[name] for name in wanted & value.keys()})
        lines.append(line)
    if not rows:
        raise ServegymError(f"{path}: holds no request; at least one is needed")
    kept = [name for name in names if name in wanted]
    columns = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in kept}
    table = pd.DataFrame(columns, index=range(len(rows)), columns=kept)
    return Cells(tuple(names), table, np.array(lines, np.int64), place)


def _whole_json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ServegymError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ServegymError(f"{path}: not JSON that can be read: {beyond_limits(error)}") from None
    yield from enumerate(values, 1)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not content.strip():
            continue
        try:
            yield line, json.loads(content)
        except json.JSONDecodeError as error:
            raise ServegymError(f"{path}: line {line}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            problem = beyond_limits(error)
            raise ServegymError(
                f"{path}: line {line}: not JSON that can be read: {problem}"
            ) from None


# ---- numbers --------------------------------------------------------------------------------


def numbers_in(cells: pd.Series[Any]) -> NDArray[np.float64]:
    """Return the numbers in a column of texts or of JSON's values; NaN where there is none."""
    if cells.dtype != object:
        return pd.to_numeric(cells, errors="coerce").to_numpy(dtype=float)
    return np.array([_number(value) for value in cells])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return np.nan
    try:
        return np.nan if isinstance(value, str) and "_" in value else float(value)
    except ValueError:
        return np.nan
    except OverflowError:
        return np.inf if value > 0 else -np.inf  # type: ignore[operator]


_NO_VALUES: Final = {"", "nan", "na", "n/a", "null", "none"}


def is_hole(value: Any) -> bool:
    """Return whether a cell holds nothing, however written."""
    if isinstance(value, str):
        return value.strip().lower() in _NO_VALUES
    return value is None or (isinstance(value, float) and np.isnan(value))
