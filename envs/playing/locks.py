"""One process at a time writes to a folder of results."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder

LOCK_FILE: Final = ".servegym.lock"
"""Name of the file that a process locks while it writes results to a folder; holds the process's id."""

_PATIENCE_S: Final = 0.3  # another process may be just about to leave
_TEMPORARY: Final = re.compile(r"\..+\.(\d+)\.tmp")  # as write_file names them


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if missing, for this thread alone; the thread may hold it several times.

    The operating system releases the lock when the process ends, however it ends. Temporary files of
    killed processes are removed, and so is a folder that was made here and stayed empty.

    Raises
    ------
    ServegymError
        If another process holds the folder, or it cannot be made, written to or locked.
    """
    made = _missing(folder)
    make_folder(folder)
    path = folder.resolve() / LOCK_FILE
    lock = FileLock(path, is_singleton=True, fallback_to_soft=False)
    outermost = not lock.is_locked
    try:
        lock.acquire(timeout=_PATIENCE_S, poll_interval=0.05)
    except Timeout:
        raise ServegymError(
            f"{folder}: another process{_holder(path)} writes its results there; wait until it has "
            "finished or choose another folder"
        ) from None
    except OSError as error:
        if path.is_dir():
            raise ServegymError(
                f"{folder}: cannot be locked: {LOCK_FILE} in it is a folder; remove or rename that"
            ) from None
        raise ServegymError(
            f"{folder}: cannot be locked: {error.strerror}; choose a folder on another disk"
        ) from None
    try:
        if outermost:
            with suppress(OSError):  # a full disk; the id is only for the message above
                path.write_text(f"{os.getpid()}\n")
            _remove_leftovers(folder)
        yield
    finally:
        if outermost:
            with suppress(OSError):
                path.unlink()  # while it is held: whoever opened it before sees that it is gone
        lock.release()
        if outermost:
            _remove_empty(made)


def _missing(folder: Path) -> list[Path]:
    """Return the folder and those above it that are still to be made, the innermost first."""
    with suppress(OSError):  # what may not be looked into is refused in the next line
        return [path for path in (folder, *folder.parents) if not path.exists()]
    return []


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError):
        return f" (pid {int(path.read_text())})"
    return ""


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that have ended."""
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            with suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # there a signal of 0 would end the process
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
