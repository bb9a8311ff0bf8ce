"""Write files whole or not at all; read them whole or refuse them in one line."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from servegym.envs.errors import ServegymError, shown

MAX_BYTES: Final = 2**30
"""Largest file that is read, in bytes; the project's own are far smaller."""

_OTHER_ENCODINGS: Final = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

WRONG_VALUES: Final = (
    ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""Errors that a damaged file's values cause: of another type, out of range, missing."""


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to, or say why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ServegymError(
            f"{folder}: cannot be made: there is a file of this name; name another folder"
        ) from None
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


def read_bytes(path: Path, kind: str = "file") -> bytes:
    """Return a file's content; messages call the file a ``kind``.

    Raises
    ------
    ServegymError
        If the file is missing, a folder, a device or a pipe (which may never end), larger than
        ``MAX_BYTES``, or not readable.
    """
    check_readable(path, kind)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServegymError(f"{path}: cannot be read: {error.strerror}") from None


def check_readable(path: Path, kind: str = "file") -> None:
    """Refuse what :func:`read_bytes` refuses, for readers that open a file themselves."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ServegymError(f"{path}: cannot be read: is a folder, not a {kind}")
        if not stat.S_ISREG(status.st_mode):
            raise ServegymError(f"{path}: cannot be read: a device or a pipe, not a {kind}")
        if status.st_size > MAX_BYTES:
            raise ServegymError(
                f"{path}: cannot be read: of {status.st_size} bytes, more than {MAX_BYTES}"
            )
    except (FileNotFoundError, NotADirectoryError):
        raise ServegymError(f"{path}: no such {kind}") from None
    except OSError as error:
        raise ServegymError(f"{shortened(path)}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a name with a NUL, or one that the system's encoding lacks
        if isinstance(error, ServegymError):
            raise
        raise ServegymError(f"{shown(str(path))}: is no name of a file: {error}") from None


def read_text(path: Path, kind: str = "file") -> str:
    r"""Return a UTF-8 file's text without a byte-order mark; lines end in ``\n``.

    Raises
    ------
    ServegymError
        If the file is not UTF-8, or :func:`read_bytes` refuses it.
    """
    return decode_text(path, read_bytes(path, kind)).replace("\r\n", "\n").replace("\r", "\n")


def decode_text(path: Path, data: bytes) -> str:
    """Decode a file's bytes; line ends stay as they are. See :func:`read_text`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        for mark, name in _OTHER_ENCODINGS.items():
            if data.startswith(mark):
                raise ServegymError(f"{path}: is in {name}; save it as UTF-8") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise ServegymError(f"{path}: line {line}: cannot be read as a text in UTF-8") from None


def read_json(path: Path, kind: str = "file") -> Any:
    """Return the value that a JSON file holds.

    Raises
    ------
    ServegymError
        If the file is not JSON, or :func:`read_text` refuses it.
    """
    text = read_text(path, kind)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ServegymError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ServegymError(f"{path}: not JSON that can be read: {beyond_limits(error)}") from None


def beyond_limits(error: ValueError | RecursionError) -> str:
    """Name the limit of Python's parser that a syntactically valid text exceeds."""
    return "too deep" if isinstance(error, RecursionError) else "a number of too many digits"


def shortened(path: Path) -> str:
    """Return a path for a message, cut in the middle if it is longer than any system takes."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:100]} … {text[-50:]} ({len(text)} characters)"
