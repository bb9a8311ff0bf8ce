"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from servegym.envs.errors import ServegymError


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to, or say why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServegymError(f"{folder}: cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ServegymError(f"{folder}: not writable")


def write_file(path: Path, content: str | bytes) -> None:
    """Write to a temporary name in the same folder, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise ServegymError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path, columns: Sequence[str], advice: str) -> pd.DataFrame:
    """Return a CSV file of just these columns, without rows where there is no file.

    Raises
    ------
    ServegymError
        If it is something else; ``advice`` says what to do.
    """
    if not path.is_file():
        return pd.DataFrame({name: [] for name in columns})
    try:
        table = pd.read_csv(path)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError):
        table = pd.DataFrame()
    if tuple(table.columns) != tuple(columns):
        raise ServegymError(f"{path}: not a table of this version; {advice}")
    return table
