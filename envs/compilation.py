"""A kernel is compiled by one process at a time, and whoever waits is told what for.

Without a lock all workers of a first run would compile the same kernels side by side. The lock is the
kernel's own: kernels call each other in one direction only, so no two processes wait for each other.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Final

from filelock import BaseFileLock, FileLock, Timeout

PATIENCE_S: Final = 600.0
"""A process that waits longer, for one that was stopped, compiles for itself."""

_QUIET_S: Final = 1.0
"""Nothing is said of less."""


class Notice:
    """Says on standard error that kernels are compiled: a line that counts on a terminal, else one line.

    Parameters
    ----------
    quiet_s
        Seconds of compiling before the first word.
    """

    def __init__(self, quiet_s: float = _QUIET_S) -> None:
        self.silent = False
        """Whether to say nothing, as where another process tells of the same work."""
        self._quiet_s = quiet_s
        self._depth = 0
        self._ready = 0
        self._since = 0.0
        self._before_s = 0.0
        self._width = 0
        self._said = False

    def begin(self) -> None:
        """Note that a kernel is being compiled."""
        if self._depth == 0:
            self._since = perf_counter()
        self._depth += 1
        self._tell()

    def end(self) -> None:
        """Note that it is ready."""
        self._depth -= 1
        self._ready += 1
        if self._depth > 0:
            self._tell()
            return
        self._before_s += perf_counter() - self._since
        if self._width:
            _write(f"\r{' ' * self._width}\r")  # what comes next finds an empty line
            self._width = 0

    def _tell(self) -> None:
        taken_s = self._before_s + perf_counter() - self._since
        if self.silent or taken_s < self._quiet_s:
            return
        if is_terminal():
            minutes, seconds = divmod(int(taken_s), 60)
            line = f"compiling kernels, on the first run only: {self._ready} ready, {minutes}:{seconds:02}"
            self._width = max(self._width, len(line))
            _write(f"\r{line:{self._width}}")
        elif not self._said:
            _write("servegym: compiling kernels, on the first run only, for a minute or two\n")
        self._said = True


NOTICE: Final = Notice()
"""That of this process."""


class Turn:
    """The right to compile one kernel, which other processes wait for; held until it is ready.

    Parameters
    ----------
    paths
        Where the lock's file may lie; the first whose folder can be written is taken, and no other is
        asked for. Without any, nobody waits.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = iter(paths)
        self._lock: BaseFileLock | None = None

    def take(self) -> bool:
        """Wait for it; return whether this process has it now: another may have made the kernel."""
        for path in self._paths:
            if os.access(path.parent, os.W_OK):
                lock = FileLock(path)
                with contextlib.suppress(Timeout, OSError, NotImplementedError):
                    lock.acquire(timeout=PATIENCE_S)
                    self._lock = lock
                break
        return self._lock is not None

    def give_back(self) -> None:
        """Let the next process have it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def is_terminal() -> bool:
    """Return whether standard error is a terminal."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _write(text: str) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # nowhere to say it
        sys.stderr.write(text)
        sys.stderr.flush()
